"""The sampling stages: feature statistics of seed ranges, and trajectories for the figures."""

import contextlib
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from anisodiff.compute import CPU, Compute
from anisodiff.data import image_sets, sources
from anisodiff.errors import StageError, naming
from anisodiff.methods import Sampler
from anisodiff.metrics import frechet
from anisodiff.metrics.cells import load_reference, read_cell
from anisodiff.solvers.generation import generate
from anisodiff.storage import checkpoints
from anisodiff.storage.files import digest, fingerprint, provenance, write_text

TRAIN_AGAIN = "train its network and path again with lower rates, or sample in float32"
PREVIEW = 64  # images of a range that are kept to look at


def sample(
    dataset: dict[str, Any],
    method: dict[str, Any],
    nfes: Sequence[int],
    seeds: tuple[int, int],
    batch: int,
    files: Sequence[Path],
    features: tuple[str, Path],
    output: Path,
    compute: Compute = CPU,
    keep_images: bool = False,
) -> None:
    """Feature statistics of one seed range at every budget.

    Each budget's cell is a file of its own beside the manifest `output`, named by budget and range and marked with a
    key of its settings and inputs: a run that was stopped, or that got a new budget, makes only what is missing or
    damaged.

    Args:
        dataset: settings of the dataset.
        method: settings of the method.
        nfes: budgets.
        seeds: first and last seed, inclusive.
        batch: images at a time.
        files: network, path, warps (see `Sampler`).
        features: kind and file of the feature network.
        output: JSON manifest of the cells.
        compute: where, and in which precision.
        keep_images: write the images too, one of EDM's dataset zips beside each cell, numbered by their seeds.
    """
    from tqdm import tqdm

    compute.begin()
    sampler = Sampler(dataset, method, files, compute)
    extract = frechet.extractor(*features, compute.device)
    seed_list = range(seeds[0], seeds[1] + 1)
    digests = {file: digest(file) for file in (*files, features[1])}
    cells = []
    bar = tqdm(total=len(nfes) * len(seed_list), desc=output.parent.name, unit="img", unit_scale=True, mininterval=5)
    for nfe in nfes:
        grid_file = sampler.grid_file(nfe, nfes)
        inputs = [*files[:2], *([] if grid_file is None else [grid_file]), features[1]]
        settings = {"dataset": dataset, "method": method, "nfe": nfe, "seeds": list(seeds), "batch": batch}
        settings["dtype"] = compute.dtype
        key = fingerprint(settings, [digests[file] for file in inputs])
        cell = output.parent / f"nfe{nfe}" / f"{seeds[0]}-{seeds[1]}.safetensors"
        zipped = cell.with_suffix(".zip") if keep_images else None
        if not _is_made(cell, key) or not (zipped is None or zipped.is_file()):
            made = {"key": key, "made_on": compute.environment(), "device_seconds": sampler.training_seconds(grid_file)}
            _make_cell(
                sampler, sampler.levels(nfe, grid_file), extract, seed_list, batch, cell, zipped, settings, made, bar
            )
        cells.append(str(cell.relative_to(output.parent)))
    bar.close()
    write_text(output, json.dumps(cells, indent=1) + "\n")


def _is_made(cell: Path, key: str) -> bool:
    """Whether a cell is there, whole, and of this key."""
    try:
        about = read_cell(cell)[1]
        return about["key"] == key and "made_on" in about  # cells of version 0.1 do not say where they were made
    except (StageError, KeyError):
        return False


def _make_cell(sampler, levels, extract, seeds, batch, cell, zipped, settings, made, bar) -> None:
    began = time.monotonic()
    statistics, preview, spent = None, [], 0
    before, batches = sampler.denoiser.evaluations, 0
    kept = contextlib.nullcontext() if zipped is None else sources.writing_zip(zipped)
    with naming(cell.parents[1].name, TRAIN_AGAIN), kept as keep:
        for chosen, images in generate(
            sampler.denoiser,
            levels,
            sampler.step,
            seeds,
            sampler.shape,
            sampler.classes,
            batch,
            sampler.device,
            f"NFE {settings['nfe']}",
            **sampler.options,
        ):
            found = extract(images)
            statistics = statistics or frechet.FeatureStatistics(found.shape[1])
            statistics.add(found)
            preview.append(images[: max(0, PREVIEW - spent)])
            spent += len(preview[-1])
            batches += 1
            bar.update(len(chosen))
            if keep is not None:
                for seed, image in zip(chosen, images.numpy(), strict=True):
                    keep(seed, image)
    seconds = time.monotonic() - began
    last = levels.nodes[-2:].to(sampler.device)
    about = provenance(settings, sampler.abouts) | made
    about |= {
        "evaluations": (sampler.denoiser.evaluations - before) / batches,
        "kimg": sampler.abouts[0]["kimg"],
        "stopped_early": any(each.get("stopped_early", False) for each in sampler.abouts),
        "seconds": round(seconds, 2),
        "images_per_second": round(len(seeds) / seconds, 2),
        "last_step": [float(f"{sampler.path.mean_log(each.square()).mean().div(2).exp():.4g}") for each in last],
    }
    checkpoints.save(cell, statistics.tensors() | {"preview": torch.cat(preview)}, about)


def reference(
    images: Path, features: tuple[str, Path], published: Path | None, output: Path, compute: Compute = CPU
) -> None:
    """The Gaussian that distances are measured to: published, or of all images of a folder.

    Args:
        images: made by the stage `images`.
        features: kind and file of the feature network.
        published: npz of reference statistics; None takes those of the images.
        output: safetensors file.
        compute: where.
    """
    compute.begin()
    described = {"features": features[0], "images": json.loads(image_sets.metadata_file(images).read_text())}
    if published is not None:
        gaussian, described["published"] = load_reference(published, features[0]), published.name
    else:
        gaussian = statistics_of(images, features, compute).gaussian
    preview = image_sets.load(images).pixels[:PREVIEW]
    about = provenance(described) | {"features": features[0], "made_on": compute.environment()}
    checkpoints.save(output, gaussian.tensors() | {"preview": preview}, about)


def statistics_of(images: Path, features: tuple[str, Path], compute: Compute) -> frechet.FeatureStatistics:
    """Feature statistics of all images of a folder."""
    from tqdm import tqdm

    extract = frechet.extractor(*features, compute.device)
    loaded, statistics = image_sets.load(images), None
    with tqdm(total=len(loaded), desc="reference", unit="img", unit_scale=True, mininterval=5) as bar:
        for part, _ in loaded.parts():
            found = extract(part)
            statistics = statistics or frechet.FeatureStatistics(found.shape[1])
            statistics.add(found)
            bar.update(len(part))
    return statistics


def evaluate(
    source: str,
    reference_file: Path,
    features: tuple[str, Path],
    resolution: int | None,
    transform: str,
    compute: Compute = CPU,
) -> dict[str, Any]:
    """Frechet distance of images from outside: a zip or a folder.

    Args:
        source: see `sources.open_source`.
        reference_file: written by the stage `reference`, or a published npz.
        features: kind and file of the feature network.
        resolution: side that the images are resized to; None leaves it.
        transform: see `sources.fit`.
        compute: where.
    """
    compute.begin()
    truth = load_reference(reference_file, features[0])
    with tempfile.TemporaryDirectory() as folder:
        sources.make_images(source, Path(folder) / "images", resolution, transform, compute.threads)
        statistics = statistics_of(Path(folder) / "images", features, compute)
    value = frechet.distance(statistics.gaussian, truth)
    return {"metric": frechet.TITLES[features[0]], "value": value, "images": statistics.count, "source": source}


def trajectory(
    dataset: dict[str, Any],
    method: dict[str, Any],
    nfe: int,
    seeds: Sequence[int],
    files: Sequence[Path],
    output: Path,
    compute: Compute = CPU,
) -> None:
    """Denoised estimates and states of a few images at every node of a method's grid, for the figures.

    Writes `denoised` and `states` `[nodes, images, C, H, W]` in pixels, and `levels` `[nodes, J]`.
    """
    compute.begin()
    sampler = Sampler(dataset, method, files, compute)
    recorded = sampler.trajectory(seeds, sampler.levels(nfe, sampler.grid_file(nfe, [nfe])))
    to_pixels = sampler.path.to_pixels
    tensors = {
        "denoised": torch.stack([to_pixels(z) for z in recorded.denoise_every_node()]),
        "states": torch.stack([to_pixels(z) for z in recorded.states]),
        "levels": recorded.levels.nodes[:, 0],
    }
    checkpoints.save(
        output, tensors, provenance({"method": method, "nfe": nfe}, sampler.abouts) | {"made_on": compute.environment()}
    )
