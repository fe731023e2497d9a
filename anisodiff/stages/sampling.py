"""The sampling stages: feature statistics of seed ranges, and trajectories for the figures."""

import contextlib
import json
import tempfile
import time
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from anisodiff.compute import CPU, Compute
from anisodiff.data import image_sets, sources
from anisodiff.errors import StageError, naming
from anisodiff.experiment.files import cell_of
from anisodiff.grids.levels import Levels
from anisodiff.methods import Method, Sampler
from anisodiff.metrics import frechet
from anisodiff.metrics.cells import load_reference, read_cell
from anisodiff.metrics.feature_networks import Features, extractor
from anisodiff.metrics.registry import FEATURES, FeatureFile, Keep
from anisodiff.solvers.generation import generate
from anisodiff.solvers.singlestep import Step
from anisodiff.storage import checkpoints
from anisodiff.storage.files import Metadata, digest, fingerprint, provenance, write_text

TRAIN_AGAIN = "train its network and path again with lower rates, or sample in float32"
PREVIEW = 64  # images of a range that are kept to look at


@dataclass(frozen=True)
class Drawing:
    """What a sampling job draws.

    Attributes:
        nfes: budgets.
        first: first seed.
        last: last seed, inclusive.
        batch: images at a time.
        keep: "statistics" of the features alone; "features" too; or "images" besides, one of EDM's dataset zips beside
            each cell, numbered by their seeds.
    """

    nfes: Sequence[int]
    first: int
    last: int
    batch: int
    keep: Keep = "statistics"

    @property
    def seeds(self) -> range:
        """All seeds."""
        return range(self.first, self.last + 1)


def sample(method: Method, drawing: Drawing, features: FeatureFile, output: Path, compute: Compute = CPU) -> None:
    """Feature statistics of one seed range at every budget.

    Each budget's cell is a file of its own beside the manifest `output`, named by budget and range and marked with a
    key of its settings and inputs: a run that was stopped, or that got a new budget, makes only what is missing or
    damaged.

    Args:
        method: its settings and files.
        drawing: budgets and seeds.
        features: the feature network.
        output: JSON manifest of the cells.
        compute: where, and in which precision.
    """
    compute.begin()
    sampler = Sampler(method, compute)
    extract = extractor(*features, compute.device)
    digests = sampler.digests | {features.file: digest(features.file)}
    cells, total = [], len(drawing.nfes) * len(drawing.seeds)
    bar = tqdm(total=total, desc=output.parent.name, unit="img", unit_scale=True, mininterval=5)
    for nfe in drawing.nfes:
        grid_file = sampler.files.grid(nfe, drawing.nfes)
        inputs = [sampler.files.network, sampler.files.path, *([] if grid_file is None else [grid_file]), features.file]
        settings = {
            "dataset": method.space.model_dump(), "method": method.settings.model_dump(), "nfe": nfe,
            "seeds": [drawing.first, drawing.last], "batch": drawing.batch, "dtype": compute.dtype,
        }  # fmt: skip
        key = fingerprint(settings, [digests[file] for file in inputs])
        cell = cell_of(output, nfe)
        zipped = cell.with_suffix(".zip") if drawing.keep == "images" else None
        if not _is_made(cell, key, drawing.keep) or not (zipped is None or _is_zipped(zipped, key)):
            made = {"key": key, "environment": compute.environment()}
            made |= {"device_seconds": sampler.training_seconds(grid_file)}
            solver = sampler.solver(nfe, grid_file)
            _make_cell(
                sampler, solver, extract, drawing, (cell, zipped), provenance(settings, sampler.headers) | made, bar
            )
        cells.append(str(cell.relative_to(output.parent)))
    bar.close()
    write_text(output, json.dumps(cells, indent=1) + "\n")


def _is_made(cell: Path, key: str, keep: Keep) -> bool:
    """Whether a cell is there, whole, of this key, and with what is kept."""
    try:
        made = read_cell(cell)
        # cells of version 0.1 do not say where they were made
        known = made.metadata["key"] == key and "environment" in made.metadata
        return known and (keep == "statistics" or made.features is not None)
    except (StageError, KeyError):
        return False


def _is_zipped(file: Path, key: str) -> bool:
    """Whether the images of a cell of this key are there."""
    try:
        with zipfile.ZipFile(file) as archive:
            return archive.comment == key.encode()
    except (OSError, zipfile.BadZipFile):
        return False


def _make_cell(
    sampler: Sampler,
    solver: tuple[Levels, Step],
    extract: Features,
    drawing: Drawing,
    files: tuple[Path, Path | None],
    metadata: Metadata,
    bar: tqdm,
) -> None:
    """Draw the images of a cell, and write their statistics and, where a second file is named, the images."""
    began = time.monotonic()
    (levels, step), (cell, zipped), name = solver, files, files[0].parents[1].name
    statistics, preview, spent, every = None, [], 0, []
    before, batches = sampler.denoiser.evaluations, 0
    kept = contextlib.nullcontext() if zipped is None else sources.writing_zip(zipped, metadata["key"])
    with naming(name, TRAIN_AGAIN), kept as keep:
        for chosen, images in generate(
            sampler.denoiser,
            levels,
            step,
            drawing.seeds,
            sampler.shape,
            sampler.classes,
            drawing.batch,
            sampler.device,
            f"NFE {metadata['settings']['nfe']}",
            **sampler.options,
        ):
            found = extract(images)
            statistics = statistics or frechet.FeatureStatistics(found.shape[1])
            statistics.add(found)
            if drawing.keep != "statistics":
                every.append(found.to("cpu", torch.float32))
            preview.append(images[: max(0, PREVIEW - spent)])
            spent += len(preview[-1])
            batches += 1
            bar.update(len(chosen))
            if keep is not None:
                for seed, image in zip(chosen, images.numpy(), strict=True):
                    keep(seed, image, None)
    if statistics is None:
        raise StageError(f"{name}: no seeds: give a last seed that is not below the first")
    seconds = time.monotonic() - began
    last = levels.nodes[-2:].to(sampler.device)
    made = {
        "evaluations": (sampler.denoiser.evaluations - before) / batches,
        "kimg": sampler.headers[0]["kimg"],
        "stopped_early": any(each.get("stopped_early", False) for each in sampler.headers),
        "seconds": round(seconds, 2),
        "images_per_second": round(len(drawing.seeds) / seconds, 2),
        "last_step": [float(f"{sampler.path.mean_log(each.square()).mean().div(2).exp():.4g}") for each in last],
    }
    tensors = statistics.tensors() | {"preview": torch.cat(preview)}
    checkpoints.save(cell, tensors | ({"features": torch.cat(every)} if every else {}), metadata | made)


def reference(
    images: Path, features: FeatureFile, published: Path | None, keep: int, output: Path, compute: Compute = CPU
) -> None:
    """The Gaussian that distances are measured to: published, or of all images of a folder.

    Args:
        images: made by the stage `images`.
        features: the feature network.
        published: npz of reference statistics; None takes those of the images.
        keep: images, drawn at random, whose features are kept: at most half of them. Their distance to the rest of the
            data is stored as "floor": what a table with as many images a cell can come to.
        output: safetensors file.
        compute: where.
    """
    compute.begin()
    loaded = image_sets.load(images)
    described = {"features": features.kind, "images": json.loads(image_sets.metadata_file(images).read_text())}
    # few are in random order, as groups of them should be
    rest, few = loaded.split(min(keep, len(loaded) // 2))
    shown = torch.randperm(len(loaded), generator=torch.Generator().manual_seed(0))[:PREVIEW]  # of all classes
    tensors = {"preview": loaded.take(shown)[0]}
    metadata = {"features": features.kind, "floor": None, "images": len(loaded)}
    kept = torch.cat(list(features_of(few, features, compute))) if len(few) else None
    if published is not None:
        gaussian, described["published"] = load_reference(published, features.kind).gaussian, published.name
    else:
        statistics = frechet.FeatureStatistics.of(features_of(rest.in_order(), features, compute))
        if kept is not None:
            drawn = frechet.FeatureStatistics.of([kept])
            metadata["floor"] = frechet.distance(drawn.gaussian, statistics.gaussian) if len(kept) > 1 else None
            statistics = drawn + statistics
        gaussian = statistics.gaussian
    metadata |= provenance(described) | {"environment": compute.environment()}
    checkpoints.save(output, tensors | gaussian.tensors() | ({} if kept is None else {"features": kept}), metadata)


def features_of(images: image_sets.Images, features: FeatureFile, compute: Compute) -> Iterator[Tensor]:
    """Features of images, a part `[B, D]` at a time, in float32 on the CPU."""
    extract = extractor(*features, compute.device)
    if not len(images):
        raise StageError("images: there are none: make them again")
    for part, _ in images.parts(bar="reference"):
        yield extract(part).to("cpu", torch.float32)


def evaluate(
    source: str,
    reference_file: Path,
    features: FeatureFile,
    resolution: int | None,
    transform: str,
    compute: Compute = CPU,
) -> dict[str, Any]:
    """Frechet distance of images from outside: a zip or a folder.

    Args:
        source: see `sources.open_source`.
        reference_file: written by the stage `reference`, or a published npz.
        features: the feature network.
        resolution: side that the images are resized to; None leaves it.
        transform: see `sources.fit`.
        compute: where.
    """
    compute.begin()
    truth = load_reference(reference_file, features.kind).gaussian
    with tempfile.TemporaryDirectory() as folder:
        sources.make_images(source, Path(folder) / "images", resolution, transform, compute.threads)
        statistics = frechet.FeatureStatistics.of(
            features_of(image_sets.load(Path(folder) / "images"), features, compute)
        )
    value = frechet.distance(statistics.gaussian, truth)
    return {"metric": FEATURES[features.kind].title, "value": value, "images": statistics.count, "source": source}


def trajectory(method: Method, nfe: int, seeds: Sequence[int], output: Path, compute: Compute = CPU) -> None:
    """Denoised estimates and states of a few images at every node of a method's grid, for the figures.

    Writes `denoised` and `states` `[nodes, images, C, H, W]` in pixels, and `levels` `[nodes, J]`.

    Args:
        method: its settings and files.
        nfe: the budget.
        seeds: one an image.
        output: safetensors file.
        compute: where, and in which precision.
    """
    compute.begin()
    sampler = Sampler(method, compute)
    recorded = sampler.trajectory(seeds, *sampler.solver(nfe, sampler.files.grid(nfe, [nfe])))
    to_pixels = sampler.path.to_pixels
    tensors = {
        "denoised": torch.stack([to_pixels(z) for z in recorded.denoise_every_node()]),
        "states": torch.stack([to_pixels(z) for z in recorded.states]),
        "levels": recorded.levels.nodes[:, 0],
    }
    metadata = provenance({"method": method.settings, "nfe": nfe}, sampler.headers)
    checkpoints.save(output, tensors, metadata | {"environment": compute.environment()})
