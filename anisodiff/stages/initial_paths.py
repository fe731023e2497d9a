"""Paths that no training made: EDM's, the closed form for the data's spectrum, and a finer one split off another."""

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
from anisodiff.paths.schedules import ScheduleRequest
from anisodiff.paths.splitting import label_weights
from anisodiff.paths.subspaces import Subspaces


def initial_path(
    space: ImageSpace, settings: PathSettings, images_folder: Path, basis: Path | None = None
) -> NoisePath:
    """A path that is not learned: EDM's ("karras") or the closed form for the data's spectrum ("spectral").

    Args:
        space: what the dataset says of its images.
        settings: of the path.
        images_folder: the training images.
        basis: file of principal subspaces, for subspaces "basis:NAME".

    Raises:
        StageError: the images, or their spectrum, do not make such a path.
    """
    images, _ = image_sets.load(images_folder).split(space.heldout)
    subspaces = subspaces_of(settings.subspaces, images.shape[-1], basis)
    per_class = settings.schedules == "class"
    if per_class and not images.classes:
        raise StageError(f"{images_folder}: the images have no labels: set schedules to shared")

    def spectra(of: Subspaces) -> list[Tensor]:
        variances = coefficient_variances(images, of)
        return [variances[:, of.index == j].flatten() for j in range(of.count)]

    request = ScheduleRequest(
        subspaces.count,
        space.g_min,
        space.sigma_min,
        space.sigma_max,
        settings.knots,
        settings.c,
        classes=images.classes if per_class else 0,
        spectra=partial(spectra, subspaces) if isinstance(subspaces, Subspaces) else None,
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


def coefficient_variances(images: image_sets.Images, subspaces: Subspaces) -> Tensor:
    """Variance of every DCT coefficient over the images in [-1, 1], in float64, `[C, H, W]`.

    Sums are of differences from the first images' mean: those of the images themselves lose digits where it is large.
    """
    centre = next(images.parts())[0].to(torch.float64).mean(0)
    total = squares = torch.zeros_like(centre)
    for part, _ in images.parts():
        z = subspaces.dct((part.to(torch.float64) - centre) / 127.5)
        total, squares = total + z.sum(0), squares + z.square().sum(0)
    return (squares - total.square() / len(images)) / (len(images) - 1)
