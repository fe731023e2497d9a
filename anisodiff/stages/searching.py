"""The search stage: from a network and its path to levels for every budget, in one file."""

import time
from pathlib import Path

import torch
from tqdm import tqdm

from anisodiff.compute import CPU, Compute
from anisodiff.experiment.settings import ImageSpace, SearchSettings
from anisodiff.grids import fixed, gits
from anisodiff.methods import read_denoiser
from anisodiff.solvers.generation import draw_for
from anisodiff.solvers.registry import SOLVERS
from anisodiff.storage import checkpoints
from anisodiff.storage.files import provenance


def search_levels(
    space: ImageSpace,
    settings: SearchSettings,
    network_file: Path,
    path_file: Path,
    output: Path,
    compute: Compute = CPU,
) -> None:
    """Search levels for every number of steps that the fine grid has.

    Args:
        space: what the dataset says of its images.
        settings: of the search.
        network_file: the network.
        path_file: the path.
        output: safetensors file of the fine grid and the ways through it.
        compute: where, and in which precision.
    """
    began = time.monotonic()
    compute = compute.begin()
    denoiser, headers = read_denoiser(network_file, path_file, space, compute)
    path = denoiser.path
    if settings.grid == "karras":
        count, low, high = path.subspaces.count, space.sigma_min, space.sigma_max
        fine = fixed.karras(settings.points, count, low, high, append_zero=False)
    else:
        fine = fixed.uniform(path, settings.points, append_zero=False)
    seeds = range(settings.seed, settings.seed + settings.images)
    noise, labels = draw_for(denoiser, seeds, space.class_conditional, compute.device)
    bars: dict[str, tqdm] = {}

    def told(part: str, done: int, total: int) -> None:
        if part not in bars:
            bars[part] = tqdm(total=total, desc=part, unit="step", mininterval=5)
        bars[part].update(done - bars[part].n)
        if done == total:
            bars[part].close()

    found = gits.search(
        denoiser,
        noise,
        fine.to(compute.device).for_labels(labels),
        labels,
        settings.cost,
        settings.gamma,
        settings.analytic,
        SOLVERS[settings.solver].with_order(settings.order),
        settings.analytic_nfe,
        told,
    )
    tensors = {"nodes": fine.nodes}
    for kind, ways in (("way", found.ways), ("analytic", found.analytic_ways)):
        tensors |= {f"{kind}-{steps}": torch.tensor(way) for steps, way in ways.items()}
    parts = dict(zip(("trajectories", "costs", "programming", "analytic step"), found.seconds, strict=True))
    made = provenance({"dataset": space, "search": settings}, headers)
    made |= {"search": True, "parts": parts, "environment": compute.environment()}
    checkpoints.save(output, tensors, made | {"device_seconds": round(time.monotonic() - began, 1)})
    print(", ".join(f"{name} {seconds:.3f} s" for name, seconds in parts.items()))
