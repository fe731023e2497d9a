"""The likelihood stage: nats of held-out images under a network over a path, by the flow and by the bound."""

import math
import time
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from anisodiff.compute import CPU, Compute
from anisodiff.data import image_sets
from anisodiff.denoiser import Denoiser
from anisodiff.errors import StageError, naming
from anisodiff.experiment.settings import ImageSpace, LikelihoodSettings
from anisodiff.grids import fixed
from anisodiff.methods import check_images, read_denoiser
from anisodiff.objectives import likelihood
from anisodiff.pixels import to_unit
from anisodiff.solvers.generation import batches
from anisodiff.storage import checkpoints
from anisodiff.storage.files import digest, fingerprint, provenance


def measure_likelihood(
    space: ImageSpace,
    settings: LikelihoodSettings,
    rows: range,
    images: Path,
    network_file: Path,
    path_file: Path,
    output: Path,
    compute: Compute = CPU,
) -> None:
    """Measure the likelihood of held-out images, each with a generator of its own: noise of image n depends on n alone.

    Batches that are done are kept beside the output until all are: a run that was stopped goes on after them.

    Args:
        space: what the dataset says of its images.
        settings: of the likelihood.
        rows: places of the images among the held-out ones.
        images: made by the stage `images`.
        network_file: the network.
        path_file: the path.
        output: safetensors file of `ode` and `bound`, nats of each image; its header has the number of dimensions.
        compute: where, and in which precision.

    Raises:
        StageError: there are fewer held-out images, or they have other grey levels, or the path keeps no coefficients.
    """
    began = time.monotonic()
    compute = compute.begin()
    denoiser, headers = read_denoiser(network_file, path_file, space, compute)
    train, heldout = image_sets.load(images).split(space.heldout)
    check_images(denoiser.network, train.shape, network_file)
    if rows.stop > len(heldout):
        raise StageError(f"{images}: {len(heldout)} images are held out, {rows.stop} are wanted: lower images")
    inputs = [image_sets.metadata_file(images), network_file, path_file]
    key = fingerprint(
        {"dataset": space.model_dump(), "likelihood": settings.model_dump(), "dtype": compute.dtype},
        [digest(each) for each in inputs],
    )
    partial = output.with_suffix(".partial")
    found, before = _kept(partial, key)
    with naming(path_file, "take a path of other subspaces than basis:NAME, and images in [-1, 1]"):
        moments = likelihood.data_moments(denoiser.path, (to_unit(part) for part, _ in train.parts(bar="variances")))
        bar = tqdm(total=len(rows), desc=output.parent.name, unit="img", mininterval=5)
        for chosen, padded in batches(rows, settings.batch):
            if chosen[-1] not in found:
                pixels, labels = heldout.take(torch.tensor(padded))
                x0 = snapped(pixels, settings.grey_levels, images).to(compute.device)
                own = labels.to(compute.device) if space.class_conditional else None
                nats = _nats(denoiser, x0, own, [settings.seed + each for each in padded], moments, space, settings)
                for index, row in enumerate(chosen):
                    found[row] = nats[:, index].cpu()
                kept = {str(row): each for row, each in found.items()}
                checkpoints.save(partial, kept, {"key": key, "seconds": before + time.monotonic() - began})
            bar.update(len(chosen))
        bar.close()
    nats = torch.stack([found[row] for row in rows], dim=1)
    tensors = dict(zip(settings.estimators, nats, strict=True))
    metadata = provenance({"dataset": space, "likelihood": settings, "rows": [rows.start, rows.stop - 1]}, headers)
    metadata |= {"likelihood": True, "dimensions": math.prod(heldout.shape), "environment": compute.environment()}
    checkpoints.save(output, tensors, metadata | {"device_seconds": round(before + time.monotonic() - began, 1)})
    partial.unlink(missing_ok=True)


def snapped(pixels: Tensor, grey_levels: int, name: Path) -> Tensor:
    """Images in [-1, 1], exactly on their grey levels.

    Raises:
        StageError: a pixel is on none of so many levels.
    """
    place = pixels.to(torch.float32) * ((grey_levels - 1) / 255)
    if (place - place.round()).abs().max() > 0.5 * (grey_levels - 1) / 255 + 1e-3:
        raise StageError(f"{name}: images are not of {grey_levels} grey levels: set grey_levels to 256")
    return place.round() * (2 / (grey_levels - 1)) - 1


def _kept(partial: Path, key: str) -> tuple[dict[int, Tensor], float]:
    """Images that an earlier run has done, with the same settings and files, and the seconds that they took."""
    try:
        tensors, metadata = checkpoints.read(partial)
    except StageError:  # none, or damaged
        return {}, 0.0
    if metadata.get("key") != key:
        return {}, 0.0
    return {int(name): each for name, each in tensors.items()}, metadata.get("seconds", 0.0)


def _nats(
    denoiser: Denoiser,
    x0: Tensor,
    labels: Tensor | None,
    seeds: list[int],
    moments: likelihood.Moments,
    space: ImageSpace,
    settings: LikelihoodSettings,
) -> Tensor:
    """Nats of a batch, a row an estimator; each draws from generators of its own."""
    rows = []
    for estimator in settings.estimators:
        generators = likelihood.seeded(seeds)
        if estimator == "ode":
            noisy = likelihood.dequantised(x0, settings.grey_levels, generators)
            shape = denoiser.network.shape
            probes = likelihood.rademacher(settings.probes, shape, generators) if settings.probes else None
            ends = space.sigma_min, space.sigma_max
            levels, _ = fixed.at_mean_levels(denoiser.path, settings.steps + 1, *ends)
            rows.append(likelihood.ode_log_likelihood(denoiser, noisy, levels, moments, labels, probes))
        else:
            noise = settings.decoder_noise * 2 / (settings.grey_levels - 1)
            rows.append(likelihood.bound(denoiser, x0, moments, noise, settings.times, generators, labels))
    return torch.stack(rows)
