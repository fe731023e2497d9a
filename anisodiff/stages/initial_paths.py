"""Paths that no training made, and the principal subspaces of the data."""

import math
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from anisodiff.data import image_sets
from anisodiff.data.principal_components import principal_subspaces
from anisodiff.errors import StageError, naming
from anisodiff.experiment.settings import BasisSettings, ImageSpace, PathSettings
from anisodiff.methods import subspaces_of
from anisodiff.paths.noise_path import NoisePath
from anisodiff.paths.principal import PcaSubspaces
from anisodiff.paths.registry import PATHS
from anisodiff.paths.rotated import RotatedBasis, principal_vectors, random_vectors
from anisodiff.paths.schedules import ScheduleRequest
from anisodiff.paths.splitting import label_weights
from anisodiff.paths.subspaces import Basis, Subspaces
from anisodiff.pixels import to_unit


def initial_path(
    space: ImageSpace, settings: PathSettings, images_folder: Path, basis: Path | None = None
) -> NoisePath:
    """A path that is not learned: EDM's ("karras"), the closed form for the data's spectrum ("spectral"), or the
    flexible process's ("exponent").

    Args:
        space: what the dataset says of its images.
        settings: of the path.
        images_folder: the training images.
        basis: file of principal subspaces, for subspaces "basis:NAME".

    Raises:
        StageError: the images, or their spectrum, do not make such a path.
    """
    images, _ = image_sets.load(images_folder).split(space.heldout)
    starts = {
        "pca": lambda: principal_vectors(torch.cat([to_unit(part) for part, _ in images.parts()])),
        "random": lambda: random_vectors(math.prod(images.shape), seed=0),
    }
    dense = str(settings.subspaces).startswith("dense:")
    start = starts.get(settings.basis_start, settings.basis_start) if dense else "dct"
    subspaces = subspaces_of(settings.subspaces, images.shape, basis, start)
    per_class = settings.schedules == "class"
    if per_class and not images.classes:
        raise StageError(f"{images_folder}: the images have no labels: set schedules to shared")

    def spectra(of: Subspaces | RotatedBasis) -> list[Tensor]:
        variances = coefficient_variances(images, of)
        index = of.index.expand_as(variances)
        return [variances[index == j] for j in range(of.count)]

    request = ScheduleRequest(
        subspaces.count,
        space.g_min,
        space.sigma_min,
        space.sigma_max,
        settings.knots,
        settings.c,
        classes=images.classes if per_class else 0,
        spectra=partial(spectra, subspaces) if isinstance(subspaces, Subspaces | RotatedBasis) else None,
        fixed_ends=settings.ends == "fixed",
    )
    mend = "let another subspace hold its modes, or take kind karras"
    with naming(f"{images_folder}: subspaces {settings.subspaces}", mend):
        schedule = PATHS[settings.kind].load()(request)
    return NoisePath(subspaces, schedule, label_weights(subspaces, settings.label_weights))


def principal_basis(space: ImageSpace, settings: BasisSettings, images_folder: Path) -> PcaSubspaces:
    """Principal subspaces of the images that are trained on.

    Args:
        space: what the dataset says of its images.
        settings: of the basis.
        images_folder: the training images.
    """
    images, _ = image_sets.load(images_folder).split(space.heldout)
    return principal_subspaces(images, settings.rank, settings.per, settings.clusters)


@torch.no_grad()
def coefficient_variances(images: image_sets.Images, subspaces: Basis) -> Tensor:
    """Variance of every coefficient over the images in [-1, 1], in float64, `[C, H, W]`: of the DCT for its partitions.

    One subspace of all of them keeps its states in pixels, but a closed form is for a spectrum, not for pixels.
    Sums are of differences from the first images' mean: those of the images themselves lose digits where it is large.
    """
    centre = next(images.parts())[0].to(torch.float64).mean(0)
    transform = subspaces.dct if isinstance(subspaces, Subspaces) else subspaces.from_pixels
    total = squares = torch.zeros_like(centre)
    for part, _ in images.parts(bar="variances"):
        z = transform((part.to(torch.float64) - centre) / 127.5)
        total, squares = total + z.sum(0), squares + z.square().sum(0)
    return (squares - total.square() / len(images)) / (len(images) - 1)
