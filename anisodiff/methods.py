"""Methods put together from files and settings: a network over a path, on a grid, with a solver."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from anisodiff.compute import Compute
from anisodiff.denoiser import Denoiser
from anisodiff.errors import StageError, naming
from anisodiff.experiment.budgets import StepCount, steps_for_nfe
from anisodiff.experiment.config import basis_of
from anisodiff.grids import fixed
from anisodiff.grids.levels import Levels, at
from anisodiff.networks.unets import RawNetwork
from anisodiff.paths.noise_path import NoisePath, Warp
from anisodiff.paths.principal import PcaSubspaces
from anisodiff.paths.subspaces import Subspaces, partition
from anisodiff.solvers.generation import Draws
from anisodiff.solvers.registry import SOLVERS
from anisodiff.solvers.singlestep import Step
from anisodiff.solvers.trajectories import Trajectory, record_trajectory
from anisodiff.storage import checkpoints

LAST_LEVEL = 0.03  # mean level from which a path's grid takes its step to 0, where a method names no other


def check_dataset(network: RawNetwork, about: dict[str, Any], dataset: dict[str, Any], name: Path | str) -> None:
    """Refuse a network that was trained for other data than those it is used for.

    Args:
        network: the network.
        about: header of its file.
        dataset: settings of the dataset: sigma_data, class_conditional.
        name: the network's file, for the message.

    Raises:
        StageError: the network has another sigma_data, or does not say which; it has classes and the dataset is not,
            or the reverse.
    """
    own = own_sigma_data(about, name)
    if own != dataset["sigma_data"]:
        raise StageError(
            f"{name}: is for data of sigma_data {own:g}, the dataset's is {dataset['sigma_data']:g}: "
            f"set sigma_data to {own:g}, or take another checkpoint"
        )
    if bool(network.classes) != dataset["class_conditional"]:
        has = f"has {network.classes} classes" if network.classes else "has no classes"
        raise StageError(
            f"{name}: {has}, the dataset says class_conditional: {str(dataset['class_conditional']).lower()}: "
            f"set class_conditional to {str(bool(network.classes)).lower()}, or take another checkpoint"
        )


def own_sigma_data(about: dict[str, Any], name: Path | str) -> float:
    """The sigma_data that a network was trained with, by the header of its file.

    Raises:
        StageError: the header does not say.
    """
    found = checkpoints.sigma_data_of(about)
    if found is None:
        raise StageError(f"{name}: does not say its sigma_data: convert it or train it again")
    return found


def read_denoiser(
    network_file: Path, path_file: Path, dataset: dict[str, Any], compute: Compute
) -> tuple[Denoiser, list[dict[str, Any]]]:
    """The denoiser of a network over a path, where a stage computes, and the headers of the two files.

    Args:
        network_file: the network.
        path_file: the path.
        dataset: settings of the dataset that it is used for.
        compute: where, and in which precision.

    Raises:
        StageError: the network is for images of another size, or for other data (see `check_dataset`).
    """
    network, about = checkpoints.load_network(network_file)
    path, path_about = checkpoints.load_path(path_file)
    if path.subspaces.size != network.shape[-1]:
        raise StageError(
            f"{network_file}: makes images of side {network.shape[-1]}, the path is for {path.subspaces.size}: "
            "set the dataset's resolution, or take another checkpoint"
        )
    check_dataset(network, about, dataset, network_file)
    classes = path.classes or path.subspaces.classes
    if classes and classes != network.classes:
        raise StageError(
            f"{path_file}: differs between its {classes} classes, {network_file} has {network.classes or 'none'}: "
            "use a network with these"
        )
    denoiser = Denoiser(compute.prepare(network), path, dataset["sigma_data"], compute.body)
    return denoiser.to(compute.device), [about, path_about]


def subspaces_of(kind: str | list, size: int, basis: Path | None) -> Subspaces | PcaSubspaces:
    """A partition of the DCT basis, or the principal subspaces of a file."""
    if basis_of(kind) is None:
        with naming("settings"):
            return Subspaces(partition(size, kind))
    if basis is None:
        raise StageError(f"subspaces: {kind} needs the file of that basis: give --basis")
    return checkpoints.load_basis(basis)[0]


def levels_of(
    method: dict[str, Any],
    nfe: int,
    dataset: dict[str, Any],
    path: NoisePath,
    warp: Warp | None = None,
    search: Path | None = None,
) -> Levels:
    """The levels on which a method spends its budget.

    Args:
        method: its settings (grid, solver, ...).
        nfe: the budget of denoiser evaluations an image.
        dataset: sigma_min and sigma_max of the Karras grid.
        path: the method's path.
        warp: for the grid "warped".
        search: file of the stage `search`, for the grid "searched".

    Raises:
        StageError: the solver cannot spend exactly this budget on this grid.
    """
    with naming(f"grid {method['grid']}, {nfe} evaluations", "choose other levels, or another path"):
        return _levels_of(method, nfe, dataset, path, warp, search)


def _levels_of(method, nfe, dataset, path, warp, search) -> Levels:
    budget = steps_for_nfe(nfe, method)
    size, smallest, largest = path.subspaces.count, dataset["sigma_min"], dataset["sigma_max"]
    match method["grid"]:
        case "karras":
            return fixed.karras(budget.points, size, smallest, largest, method["rho"] or 7.0, budget.append_zero)
        case "log-snr":
            return fixed.log_snr(budget.points, size, smallest, largest, budget.append_zero)
        case "vp-time":
            rho = method["rho"] or 1.0
            return fixed.time_uniform(budget.points, size, smallest, largest, budget.append_zero, rho)
        case "searched":
            return found_levels(search, budget, method["afs"])
        case "given":
            return fixed.given(method["levels"][str(nfe)], size)
        case _:
            last = (method["last_level"] or LAST_LEVEL) if budget.append_zero else None
            return fixed.uniform(path, budget.points, warp, budget.append_zero, last)


def found_levels(file: Path, budget: StepCount, analytic: bool) -> Levels:
    """The levels that a search found for a budget.

    Args:
        file: written by the stage `search`.
        budget: how many nodes above 0, and whether a step to 0 follows.
        analytic: the first step is analytic.

    Raises:
        StageError: the search has no such number of steps.
    """
    tensors, about = checkpoints.read(file)
    if not about.get("search"):
        raise StageError(f"{file}: holds no search: give the file of a search")
    name = f"{'analytic' if analytic else 'way'}-{budget.points - 1}"
    if name not in tensors:
        raise StageError(f"{file}: found no levels for {budget.points - 1} steps: give it more points")
    return at(tensors["nodes"][tensors[name]], budget.append_zero)


class Sampler:
    """A method's network, path and warps, read from their files.

    Args:
        dataset: settings of the dataset.
        method: settings of the method.
        files: network, path, then a search or one warp for every budget, or one of either for all, or none.
        compute: where, and in which precision.
    """

    def __init__(self, dataset: dict[str, Any], method: dict[str, Any], files: Sequence[Path], compute: Compute):
        self.dataset, self.method, self.files, self.device = dataset, method, files, compute.device
        self.denoiser, self.abouts = read_denoiser(*files[:2], dataset, compute)
        self.path = self.denoiser.path

    @property
    def step(self) -> Step:
        return SOLVERS[self.method["solver"]].with_order(self.method["order"])

    @property
    def options(self) -> dict[str, bool]:
        """Options of `solve`."""
        return {"analytic_first": self.method["afs"], "threshold": self.method["threshold"]}

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.denoiser.network.shape

    @property
    def classes(self) -> int:
        return self.denoiser.network.classes if self.dataset["class_conditional"] else 0

    def grid_file(self, nfe: int, nfes: Sequence[int]) -> Path | None:
        """The warp or search that a budget's grid comes from."""
        files = self.files[2:]
        if (self.method["grid"] in ("warped", "searched")) != bool(files) or len(files) not in (0, 1, len(nfes)):
            raise StageError(
                "grid: give a warp for 'warped', or one a budget, a search for 'searched', and none for other grids"
            )
        return None if not files else files[0] if len(files) == 1 else files[list(nfes).index(nfe)]

    def training_seconds(self, grid_file: Path | None) -> float:
        """Seconds of a device, since the base network, to train what is sampled from; network and path share theirs."""
        made = max(about.get("device_seconds", 0.0) for about in self.abouts)
        return made + (0.0 if grid_file is None else checkpoints.header(grid_file).get("device_seconds", 0.0))

    def levels(self, nfe: int, grid_file: Path | None) -> Levels:
        warped = self.method["grid"] == "warped"
        warp = checkpoints.load_warp(grid_file, self.path)[0] if warped else None
        return levels_of(self.method, nfe, self.dataset, self.path, warp, None if warped else grid_file)

    def trajectory(self, seeds: Sequence[int], levels: Levels) -> Trajectory:
        """Images of these seeds at every node of a grid."""
        drawn = Draws(seeds, self.shape, self.classes, self.device)
        own = levels.for_labels(drawn.labels)
        step, options = self.step, self.options
        return record_trajectory(self.denoiser, drawn.noise, own, drawn.labels, step, source=drawn, **options)
