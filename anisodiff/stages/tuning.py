"""The tuning stages: a teacher's images, and solvers whose numbers are learned from them."""

import os
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from tqdm import tqdm

from anisodiff.compute import CPU, Compute
from anisodiff.errors import StageError, naming
from anisodiff.experiment.settings import TuningSettings
from anisodiff.grids.learned import CurveLevels, FreeLevels, curve_through, resampled
from anisodiff.grids.levels import Levels, at
from anisodiff.methods import Method, Sampler
from anisodiff.metrics.feature_networks import extractor
from anisodiff.metrics.registry import FeatureFile
from anisodiff.objectives.tuning import ImageLoss, Pairs, feature_error, joined, squared_error, teacher_pairs
from anisodiff.pixels import to_grey_scale
from anisodiff.solvers.registry import SOLVERS
from anisodiff.solvers.tuned import TunedSolver, TunedStep
from anisodiff.storage import checkpoints
from anisodiff.storage.files import Metadata, digest, fingerprint, provenance
from anisodiff.storage.tunings import load_pairs, save_pairs, save_tuning
from anisodiff.training.loop import ResumeStore, run
from anisodiff.training.tuning import mean_error, tuning_plan, tuning_work

CHECKS = 15  # how often a tuning looks at the held-out pairs


def make_pairs(method: Method, nfe: int, seeds: range, batch: int, output: Path, compute: Compute = CPU) -> None:
    """Draw a teacher's images, and keep them with their noise.

    Batches that are done lie beside the output until all are: a run that was stopped goes on after them.

    Args:
        method: the teacher's settings and files.
        nfe: its budget, evaluations an image.
        seeds: one a pair.
        batch: images at a time.
        output: safetensors file of `noise` and `images`, `[N, C, H, W]`, and with classes one-hot `labels`, `[N, K]`.
        compute: where, and in which precision.

    Raises:
        StageError: an image is not finite, or the teacher cannot spend the budget.
    """
    compute = compute.begin()
    sampler = Sampler(method, compute)
    levels, step = sampler.solver(nfe, sampler.files.grid(nfe, [nfe]))
    settings = {"dataset": method.space, "method": method.settings, "nfe": nfe, "batch": batch, "dtype": compute.dtype}
    parts = output.with_suffix(".parts") / fingerprint(settings, list(sampler.digests.values()))
    made, seconds = [], 0.0
    with tqdm(total=len(seeds), desc="pairs", unit="img", unit_scale=True, mininterval=5) as bar:
        for first in range(0, len(seeds), batch):
            chosen = seeds[first : first + batch]
            part = parts / f"{chosen[0]}-{chosen[-1]}.safetensors"
            try:
                tensors, header = load_pairs(part)
                pairs = Pairs(*tensors)
            except StageError:  # none, or damaged
                began = time.monotonic()
                args = (sampler.denoiser, levels, step, chosen, sampler.shape, sampler.classes, batch, sampler.device)
                (pairs,) = teacher_pairs(*args, **sampler.options)
                if not pairs.images.isfinite().all():
                    raise StageError(
                        f"{output.parent.name}: an image is NaN or infinite: take another teacher"
                    ) from None
                header = {"seconds": time.monotonic() - began}
                save_pairs(part, pairs.noise, pairs.labels, pairs.images, **header)
            made.append(pairs)
            seconds += header.get("seconds", 0.0)
            bar.update(len(chosen))
    every = joined(made)
    metadata = provenance(settings | {"seeds": [seeds.start, seeds.stop - 1]}, sampler.headers)
    metadata |= {"nfe": nfe, "environment": compute.environment()}
    metadata["device_seconds"] = round(seconds, 1)
    save_pairs(output, every.noise, every.labels, every.images, **metadata)
    shutil.rmtree(output.with_suffix(".parts"), ignore_errors=True)


def tune(
    settings: TuningSettings,
    start: Method,
    pairs_file: Path,
    features: FeatureFile | None,
    output: Path,
    compute: Compute = CPU,
) -> None:
    """Learn levels, labels and coefficients of a solver for every budget, under a frozen network.

    Each budget starts from its method's levels, or from those that were tuned before it where these are better on the
    held-out pairs. A budget that is done is not tuned again by a run that goes on after one that was stopped.

    Args:
        settings: budgets, what is learned, and how.
        start: settings and files of the method that is corrected.
        pairs_file: made by `make_pairs`.
        features: network in whose features images are compared; None compares pixels.
        output: safetensors file of every budget's numbers (`load_tuning` reads it), with the errors before and after in
            its header.
        compute: where, and in which precision.

    Raises:
        StageError: the pairs are too few, too many for the memory, of another size, or a weaker teacher's.
    """
    compute = compute.begin()
    sampler = Sampler(start, compute)
    learned, heldout, header = _pairs(settings, sampler, pairs_file)
    loss = squared_error if features is None else _feature_loss(features, compute.device)
    inputs = [pairs_file, *([] if features is None else [features.file])]
    named = {"dataset": start.space, "start": start.settings, "tuning": settings, "dtype": compute.dtype}
    key = fingerprint(named, [*sampler.digests.values(), *map(digest, inputs)])
    states, before = output.parent / ".state" / output.stem, None
    steps: dict[int, TunedStep] = {}
    outcomes: dict[str, dict[str, float]] = {}
    plan = tuning_plan(settings.steps, settings.batch, settings.warm_up, settings.seed)
    options = sampler.options

    def error(solver: TunedSolver) -> float:
        return mean_error(sampler.denoiser, solver, heldout, loss, settings.batch, **options)

    with naming(output.stem, "see the tuning's settings"):
        for budgets in [settings.nfe] if settings.shared_levels else [[nfe] for nfe in settings.nfe]:
            own = {nfe: sampler.solver(nfe, start.files.grid(nfe, settings.nfe))[0] for nfe in budgets}
            if settings.shared_levels:
                solvers = _on_a_curve(settings, sampler, own)
            else:
                solvers = {nfe: _better(settings, sampler, levels, before, error) for nfe, levels in own.items()}
            work = tuning_work(
                sampler.denoiser, list(solvers.values()), learned, heldout, plan, settings.learning_rate, loss,
                max(1, settings.steps // CHECKS), **options,
            )  # fmt: skip
            label = "-".join(map(str, budgets))
            store = ResumeStore(states / f"nfe{label}", key)
            with store.locked():
                store.load(work.training)
                log, title = output.with_name(f"{output.stem}-nfe{label}.jsonl"), f"{output.stem}, NFE {label}"
                run(work.records, work.training, plan, store, log, settings.save_seconds, title, compute.device)
                store.save(work.training)
            for (nfe, solver), unlearned in zip(solvers.items(), work.starts, strict=True):
                with torch.no_grad():
                    steps[nfe], before = solver(), solver.levels() if "levels" in settings.learn else None
                outcomes[str(nfe)] = {
                    "start": unlearned,
                    "tuned": error(solver),
                    "seconds": work.training.seconds / len(solvers),
                    "numbers": solver.numbers,
                }
    made = provenance(named, [*sampler.headers, header])
    made |= {name: sampler.digests[getattr(start.files, name)] for name in ("network", "path")}
    made["outcomes"] = outcomes
    spent = sum(each["seconds"] for each in outcomes.values()) + header.get("device_seconds", 0.0)
    made |= {"device_seconds": round(spent, 1), "environment": compute.environment()}
    save_tuning(output, steps, settings.subspaces, **made)
    shutil.rmtree(states, ignore_errors=True)
    for nfe, each in outcomes.items():
        print(f"NFE {nfe}: held-out error {each['start']:.4g} -> {each['tuned']:.4g}")


def _pairs(settings: TuningSettings, sampler: Sampler, file: Path) -> tuple[Pairs, Pairs, Metadata]:
    """Pairs to learn from, pairs to choose by, and their header."""
    metadata = checkpoints.header(file)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if (size := 2 * file.stat().st_size) > memory:
        raise StageError(
            f"{file}: reading it takes {size / 1e9:.1f} GB of {memory / 1e9:.1f}: lower the tuning's pairs"
        )
    pairs = Pairs(*load_pairs(file)[0])
    if len(pairs) < settings.pairs + settings.heldout:
        raise StageError(
            f"{file}: {len(pairs)} pairs, {settings.pairs + settings.heldout} are asked for: make it again"
        )
    if pairs.noise.shape[1:] != sampler.shape:
        raise StageError(f"{file}: images of {tuple(pairs.noise.shape[1:])}, the network's are of {sampler.shape}")
    if metadata.get("nfe", 0) <= max(settings.nfe):
        raise StageError(
            f"{file}: a teacher of {metadata.get('nfe')} evaluations for {max(settings.nfe)}: take a larger"
        )
    return (
        pairs.take(slice(settings.pairs)),
        pairs.take(slice(settings.pairs, settings.pairs + settings.heldout)),
        metadata,
    )


def _feature_loss(features: FeatureFile, device: str) -> ImageLoss:
    extract = extractor(*features, device)
    return feature_error(lambda images: extract(to_grey_scale(images)))


def _solver(settings: TuningSettings, sampler: Sampler, levels: FreeLevels | CurveLevels) -> TunedSolver:
    """The method as it is, ready to be corrected."""
    method = sampler.settings
    order = SOLVERS[method.solver].usual_order(method.order) or 1
    solver = TunedSolver(
        sampler.path, levels, settings.learn, method.solver, order, settings.window, settings.subspaces,
        settings.per_subspace, settings.rank, settings.scale,
    )  # fmt: skip
    return solver.to(sampler.device)


def _better(
    settings: TuningSettings,
    sampler: Sampler,
    levels: Levels,
    before: Levels | None,
    error: Callable[[TunedSolver], float],
) -> TunedSolver:
    """The method on its own levels, or on those of the budget before, whichever has the smaller error."""
    starts = [levels, *([] if before is None else [resampled(before, levels.steps)])]
    grids = [FreeLevels(each.to("cpu"), settings.per_subspace) for each in starts]
    return min((_solver(settings, sampler, grid) for grid in grids), key=error)


def _on_a_curve(settings: TuningSettings, sampler: Sampler, own: Mapping[int, Levels]) -> dict[int, TunedSolver]:
    """Solvers whose levels are on one curve, at the start through the method's of the largest budget."""
    finest = own[max(own)]
    append_zero = finest.ends_at_zero(finest.steps - 1)
    curve = curve_through(at(finest.nodes[:-1]) if append_zero else finest)
    return {
        nfe: _solver(settings, sampler, CurveLevels(curve, levels.steps + 1 - append_zero, append_zero))
        for nfe, levels in own.items()
    }
