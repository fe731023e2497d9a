"""The search stage: from a network and its path to levels for every budget, in one file."""

import time
from pathlib import Path
from typing import Any

import torch

from anisodiff.compute import CPU, Compute
from anisodiff.grids import fixed, gits
from anisodiff.methods import read_denoiser
from anisodiff.solvers.generation import draw_for
from anisodiff.solvers.registry import SOLVERS
from anisodiff.storage import checkpoints
from anisodiff.storage.files import provenance


def search_levels(
    dataset: dict[str, Any],
    settings: dict[str, Any],
    network_file: Path,
    path_file: Path,
    output: Path,
    compute: Compute = CPU,
) -> None:
    """Search levels for every number of steps that the fine grid has.

    Args:
        dataset: settings of the dataset.
        settings: grid, points, images, seed, cost, gamma, analytic, analytic_nfe, solver, order.
        network_file: the network.
        path_file: the path.
        output: safetensors file of the fine grid and the ways through it.
        compute: where, and in which precision.
    """
    began = time.monotonic()
    compute = compute.begin()
    denoiser, abouts = read_denoiser(network_file, path_file, dataset, compute)
    path = denoiser.path
    if settings["grid"] == "karras":
        count, low, high = path.subspaces.count, dataset["sigma_min"], dataset["sigma_max"]
        fine = fixed.karras(settings["points"], count, low, high, append_zero=False)
    else:
        fine = fixed.uniform(path, settings["points"], append_zero=False)
    seeds = range(settings["seed"], settings["seed"] + settings["images"])
    noise, labels = draw_for(denoiser, seeds, dataset["class_conditional"], compute.device)
    found = gits.search(
        denoiser,
        noise,
        fine.to(compute.device).for_labels(labels),
        labels,
        settings["cost"],
        settings["gamma"],
        settings["analytic"],
        SOLVERS[settings["solver"]].with_order(settings["order"]),
        settings["analytic_nfe"],
    )
    tensors = {"nodes": fine.nodes}
    for kind, ways in (("way", found.ways), ("analytic", found.analytic_ways)):
        tensors |= {f"{kind}-{steps}": torch.tensor(way) for steps, way in ways.items()}
    parts = dict(zip(("trajectories", "costs", "programming", "analytic step"), found.seconds, strict=True))
    made = provenance({"dataset": dataset, "search": settings}, abouts)
    made |= {"search": True, "parts": parts, "made_on": compute.environment()}
    checkpoints.save(output, tensors, made | {"device_seconds": round(time.monotonic() - began, 1)})
    print(", ".join(f"{name} {seconds:.3f} s" for name, seconds in parts.items()))
