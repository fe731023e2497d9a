"""The export of a method at a budget: what it takes to sample with it elsewhere."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from anisodiff.compute import CPU
from anisodiff.errors import StageError
from anisodiff.experiment.config import read
from anisodiff.experiment.files import DatasetFiles
from anisodiff.grids.learned import FreeLevels
from anisodiff.grids.levels import Levels
from anisodiff.methods import Method, MethodFiles, Sampler
from anisodiff.paths.subspaces import Basis, Subspaces
from anisodiff.solvers.registry import SOLVERS
from anisodiff.solvers.singlestep import Step
from anisodiff.solvers.tuned import Cells, TunedSolver, TunedStep
from anisodiff.storage import checkpoints
from anisodiff.storage.files import digest, provenance, write_text
from anisodiff.storage.formats import DOCUMENT, FORMATS, LISTS, SigmaList

MODES, COLOURS = "orthonormal DCT-II of rows and columns", "orthonormal DCT-II of channels"
EQUAL = 1e-6  # relative; levels of subspaces that differ by less are one level
WORDS = {
    "sigma": "standard deviation of the noise on images in [-1, 1], x = x0 + sigma eps (EDM's, variance exploding)",
    "shift": "none: levels are what the solver steps on, told what the network is told; there are no timesteps",
    "denoiser": "D(z, sigma) = s^2 / (sigma^2 + s^2) z + sigma s / sqrt(sigma^2 + s^2) F(z / sqrt(sigma^2 + s^2), c), "
    "s = sigma_data, every factor in the coefficients of its subspace; F is the network, in pixels; c is a quarter of "
    "the sum over subspaces of label_weights times log sigma",
    "step": "z_0 = levels_0 eps in the coefficients of the basis; values v_k = D(z_k, told_k), or flows (D - z_k) / "
    "told_k where of_flows; in the cells z_{k+1} = weights_k0 z_k + sum_{i >= 1} weights_ki v_{k+1-i}, without what is "
    "before v_0; z_N is the image. With analytic_first v_0 is the flow -z_0 / sqrt(1 + levels_0^2), or z_0 + levels_0 "
    "times it, without the network. With threshold D is clipped, in pixels, at the 99.5 % quantile of its absolute "
    "values where that is above 1, and divided by it",
    "axes": "levels and told [step][class, or one][subspace], weights [step][the state, then the latest values]"
    "[class, or one][cell], index [channel, or one][row][column]",
}  # fmt: skip


def export(
    configfiles: Sequence[Path], dataset: str | None, method: str, nfe: int, kind: str, output: Path | None
) -> None:
    """Write a method of a finished run at a budget, and say what it is to be run with.

    Args:
        configfiles: the configuration.
        dataset: one of its datasets; None where it has one.
        method: one of the dataset's.
        nfe: its budget.
        kind: one of `FORMATS`.
        output: file to write; None prints.

    Raises:
        StageError: there is no such format, dataset or method, a file is not made yet, or the format does not carry
            what the method needs.
    """
    if kind not in FORMATS:
        raise StageError(f"format: {kind!r} is unknown: use one of {', '.join(FORMATS)}")
    name, chosen = _method(configfiles, dataset, method, nfe)
    sampler = Sampler(chosen, CPU)
    grid_file = chosen.files.grid(nfe, [nfe])
    levels, step = sampler.solver(nfe, grid_file)
    if kind == DOCUMENT:
        made = {"dataset": name, "method": method, "nfe": nfe} | _document(sampler, nfe, levels, step)
        text = "{\n" + ",\n".join(f"{json.dumps(key)}: {json.dumps(each)}" for key, each in made.items()) + "\n}"
    else:
        text = _list(LISTS[kind], kind, sampler, levels, step, grid_file)
    if output is None:
        print(text)
    else:
        write_text(output, text + "\n")


def _method(configfiles: Sequence[Path], dataset: str | None, method: str, nfe: int) -> tuple[str, Method]:
    """The dataset's name, and the method with the files of its run."""
    datasets = read(configfiles).datasets
    if dataset is None and len(datasets) > 1:
        raise StageError(f"dataset: the configuration has {', '.join(datasets)}: give --dataset")
    name = next(iter(datasets)) if dataset is None else dataset
    if name not in datasets:
        raise StageError(f"dataset: {name!r} is unknown: use one of {', '.join(datasets)}")
    found = datasets[name]
    if method not in found.methods:
        raise StageError(f"method: {method!r} is unknown: use one of {', '.join(found.methods)}")
    names, settings = DatasetFiles(name, found), found.methods[method]
    grids = tuple(Path(each) for each in names.grids(method, [nfe]))
    files = MethodFiles(Path(names.network(settings.network)), Path(names.path(settings.path)), grids)
    for file in (files.network, files.path, *files.grids):
        if not file.is_file():
            given = " ".join(map(str, configfiles))
            raise StageError(f"{file}: not made yet: run snakemake --profile local {file} --configfile {given}")
    return name, Method(found.space, settings, files)


def _document(sampler: Sampler, nfe: int, levels: Levels, step: Step) -> dict[str, Any]:
    """Everything that sampling takes, in plain data."""
    method, files = sampler.settings, sampler.files
    named = {"network": files.network, "path": files.path} | ({"grid": files.grids[0]} if files.grids else {})
    weighed = _weighed(sampler, levels, step)
    solver = {"name": method.solver, "order": SOLVERS[method.solver].usual_order(method.order)} | sampler.options
    if weighed is None:
        solver |= {"inner": levels.inner.tolist()}
    else:
        weights = weighed.weights.clone()
        if weighed.of_flows:
            weights[:, 0] = 1.0
        solver |= {"of_flows": weighed.of_flows, "weights": weights.tolist(), "cells": _cells(weighed.cells)}
    return {
        "network_calls": nfe,
        "files": {key: {"file": str(each), "sha256": digest(each)} for key, each in named.items()},
        "images": {"shape": sampler.shape, "classes": sampler.classes},
        "words": WORDS,
        "sigma_data": sampler.space.sigma_data,
        "basis": _basis(sampler.path.subspaces),
        "label_weights": sampler.path.weights.tolist(),
        "levels": levels.nodes.tolist(),
        "told": (step.told if isinstance(step, TunedStep) else levels.nodes[:-1]).tolist(),
        "solver": solver,
        **provenance({"dataset": sampler.space, "method": method}, sampler.headers),
    }


def _weighed(sampler: Sampler, levels: Levels, step: Step) -> TunedStep | None:
    """The step with its weights in numbers; None for solvers that have none."""
    name = sampler.settings.solver
    if isinstance(step, TunedStep) or not SOLVERS[name].linear:
        return step if isinstance(step, TunedStep) else None
    order = SOLVERS[name].usual_order(sampler.settings.order) or 1
    with torch.no_grad():
        return TunedSolver(sampler.path, FreeLevels(levels), theory=name, order=order, window=order)()


def _basis(subspaces: Basis) -> dict[str, Any]:
    if isinstance(subspaces, Subspaces):
        return {"kind": "pixels" if subspaces.count == 1 else MODES, "index": [subspaces.index.tolist()]}
    return {"kind": f"{type(subspaces).__name__}, in the file of the path", "index": None}


def _cells(cells: Cells) -> dict[str, Any]:
    """Where weights differ. A cell lies in one band of the solver's and in one part, a subspace, of the path's."""
    turned = [MODES] * cells.transforms + [COLOURS] * cells.colour
    return {
        "coordinates": ["those of the basis", *turned],
        "index": "a cell is a subspace of the basis" if cells.index is None else cells.index.tolist(),
        "band": cells.band.tolist(),
        "part": cells.part.tolist(),
    }


def _list(form: SigmaList, kind: str, sampler: Sampler, levels: Levels, step: Step, grid_file: Path | None) -> str:
    """A list of sigmas; what it is to be run with goes to stderr.

    Raises:
        StageError: the method needs what no list carries.
    """
    method, nodes, to_zero = sampler.settings, levels.nodes, levels.ends_at_zero(levels.steps - 1)
    solver, order, learned = method.solver, method.order, []
    if isinstance(step, TunedStep) and grid_file is not None:
        solver, order, learned = _tuned_from(grid_file)
    low, high = nodes.amin((1, 2)), nodes.amax((1, 2))
    needs = {f"tuned {each}": True for each in learned if each != "levels"} | {
        "levels that differ between subspaces or classes": bool((high - low > EQUAL * high).any()),
        "an analytic first step": method.afs,
        "thresholding": method.threshold,
        "a last level above 0": form.flow and not to_zero,
    }
    if lost := [what for what, needed in needs.items() if needed]:
        raise StageError(f"{kind}: carries sigmas alone, not {', '.join(lost)}: use --format {DOCUMENT}")
    order = SOLVERS[solver].usual_order(order)
    known = form.samplers.get(solver if order is None else f"{solver}-{order}")
    if order is not None and not to_zero:  # theirs end in another order
        known = None
    same = "no sampler that is known to make the same steps" if known is None else known
    named = solver if order is None else f"{solver} of order {order}"
    print(f"anisodiff: for {form.takes}; the solver is {named}, in {form.software}: {same}", file=sys.stderr)
    sigmas = nodes[:, 0, 0]
    return form.write((sigmas / (1 + sigmas))[:-1].tolist() if form.flow else sigmas.tolist())


def _tuned_from(file: Path) -> tuple[str, int | None, list[str]]:
    """Solver and order that a tuning starts from, and what it learned."""
    made = checkpoints.header(file).get("settings", {})
    try:
        return made["start"]["solver"], made["start"]["order"], made["tuning"]["learn"]
    except (KeyError, TypeError) as error:
        raise StageError(f"{file}: does not say what was tuned: tune again") from error
