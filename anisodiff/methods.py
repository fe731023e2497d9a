"""Methods put together from files and settings: a network over a path, on a grid, with a solver."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from anisodiff.compute import Compute
from anisodiff.denoiser import Denoiser
from anisodiff.errors import StageError, naming
from anisodiff.experiment.budgets import steps_for_nfe
from anisodiff.experiment.settings import ImageSpace, MethodSettings
from anisodiff.experiment.settings.base import basis_of, turns
from anisodiff.grids.levels import GridRequest, Levels
from anisodiff.grids.registry import GRIDS
from anisodiff.networks.unets import RawNetwork
from anisodiff.paths.noise_path import NoisePath, Warp
from anisodiff.paths.rotated import rotated_basis
from anisodiff.paths.subspaces import Basis, Subspaces, partition
from anisodiff.solvers.generation import Draws
from anisodiff.solvers.loop import SolveOptions
from anisodiff.solvers.registry import SOLVERS
from anisodiff.solvers.singlestep import Step
from anisodiff.solvers.trajectories import Trajectory, record_trajectory
from anisodiff.solvers.tuned import TunedStep
from anisodiff.storage import checkpoints
from anisodiff.storage.files import Metadata, digest
from anisodiff.storage.tunings import load_tuning


def check_dataset(network: RawNetwork, metadata: Metadata, space: ImageSpace, name: Path | str) -> None:
    """Refuse a network that was trained for other data than those it is used for.

    Args:
        network: the network.
        metadata: header of its file.
        space: what it is used for: sigma_data, class_conditional.
        name: the network's file, for the message.

    Raises:
        StageError: the network has another sigma_data, or does not say which; it has classes and the dataset is not,
            or the reverse.
    """
    own = own_sigma_data(metadata, name)
    if own != space.sigma_data:
        raise StageError(
            f"{name}: is for data of sigma_data {own:g}, the dataset's is {space.sigma_data:g}: "
            f"set sigma_data to {own:g}, or take another checkpoint"
        )
    if bool(network.classes) != space.class_conditional:
        has = f"has {network.classes} classes" if network.classes else "has no classes"
        raise StageError(
            f"{name}: {has}, the dataset says class_conditional: {str(space.class_conditional).lower()}: "
            f"set class_conditional to {str(bool(network.classes)).lower()}, or take another checkpoint"
        )


def check_images(network: RawNetwork, shape: Sequence[int], name: Path | str) -> None:
    """Refuse a network that makes other images than those it is used for.

    Args:
        network: the network.
        shape: channels, height and width of the images.
        name: the network's file, for the message.

    Raises:
        StageError: they differ.
    """
    if network.shape != tuple(shape):
        raise StageError(
            f"{name}: it makes images of {network.shape} (channels, height, width), the data's are {tuple(shape)}: "
            "set the dataset's resolution, or take another checkpoint"
        )


def check_path(network: RawNetwork, path: NoisePath, network_file: Path | str, path_file: Path | str) -> None:
    """Refuse a path that is for other images, or other classes, than a network.

    Args:
        network: the network.
        path: the path.
        network_file: the network's file, for the message.
        path_file: the path's.

    Raises:
        StageError: they do not fit.
    """
    (channels, *_, side), basis = network.shape, path.subspaces
    if basis.size != side:
        raise StageError(
            f"{network_file}: makes images of side {side}, {path_file} is for {basis.size}: "
            "set the dataset's resolution, or take another checkpoint"
        )
    if basis.channels not in (None, channels):
        raise StageError(
            f"{path_file}: is for images of {basis.channels} channels, {network_file} makes {channels}: take a path of "
            "this data"
        )
    classes = path.classes or basis.classes
    if classes and classes != network.classes:
        raise StageError(
            f"{path_file}: differs between its {classes} classes, {network_file} has {network.classes or 'none'}: "
            "use a network with these"
        )


def own_sigma_data(metadata: Metadata, name: Path | str) -> float:
    """The sigma_data that a network was trained with, by the header of its file.

    Raises:
        StageError: the header does not say.
    """
    found = checkpoints.sigma_data_of(metadata)
    if found is None:
        raise StageError(f"{name}: does not say its sigma_data: convert it or train it again")
    return found


def read_denoiser(
    network_file: Path, path_file: Path, space: ImageSpace, compute: Compute
) -> tuple[Denoiser, list[Metadata]]:
    """The denoiser of a network over a path, where a stage computes, and the headers of the two files.

    Args:
        network_file: the network.
        path_file: the path.
        space: what it is used for.
        compute: where, and in which precision.

    Raises:
        StageError: the network is for images of another size, or for other data (see `check_dataset`).
    """
    network, metadata = checkpoints.load_network(network_file)
    path, path_metadata = checkpoints.load_path(path_file)
    check_path(network, path, network_file, path_file)
    check_dataset(network, metadata, space, network_file)
    denoiser = Denoiser(compute.prepare(network), path, space.sigma_data, compute.body)
    return denoiser.to(compute.device), [metadata, path_metadata]


def subspaces_of(
    kind: str | list[list[int]],
    shape: tuple[int, int, int],
    basis: Path | None,
    start: str | Callable[[], Tensor] = "dct",
) -> Basis:
    """A partition of the DCT basis, a basis that can be learned, or the principal subspaces of a file.

    Args:
        kind: the setting `subspaces`.
        shape: channels, height and width of the images.
        basis: file of principal subspaces.
        start: vectors that a dense basis starts from, by name, or what makes them.

    Raises:
        StageError: there is no such partition or basis, or the basis has no file.
    """
    if basis_of(kind) is None:
        with naming("settings"):
            if isinstance(kind, str) and turns(kind):
                made = start if isinstance(start, str) else start()
                return rotated_basis(kind, shape, made)
            return Subspaces(partition(shape[-1], kind))
    if basis is None:
        raise StageError(f"subspaces: {kind} needs the file of that basis: give --basis")
    return checkpoints.load_basis(basis)[0]


def levels_of(
    method: MethodSettings,
    nfe: int,
    space: ImageSpace,
    path: NoisePath,
    warp: Warp | None = None,
    search: Path | None = None,
    tuned: Levels | None = None,
) -> Levels:
    """The levels on which a method spends its budget.

    Args:
        method: its settings (grid, solver, ...).
        nfe: the budget of denoiser evaluations an image.
        space: sigma_min and sigma_max of the Karras grid.
        path: the method's path.
        warp: for the grid "warped".
        search: file of the stage `search`, for the grid "searched".
        tuned: levels of a tuning, for the grid "tuned".

    Raises:
        StageError: the solver cannot spend exactly this budget on this grid, or the grid has no levels for it.
    """
    budget = steps_for_nfe(nfe, method)
    request = GridRequest(
        budget.points,
        budget.append_zero,
        path,
        space.sigma_min,
        space.sigma_max,
        rho=method.rho,
        last_level=method.last_level,
        warp=warp,
        by_hand=None if method.levels is None else method.levels.get(str(nfe)),
        search=None if search is None else checkpoints.load_search(search),
        analytic_first=method.afs,
        tuned=tuned,
    )
    with naming(search or f"{method.grid} at {nfe} evaluations", "give it more points" if search else "check the grid"):
        return GRIDS[method.grid].load()(request)


@dataclass(frozen=True)
class MethodFiles:
    """Files of a method.

    Attributes:
        network: the network.
        path: the noise path.
        grids: a search, a tuning or one warp for all budgets, or a warp for each; none for other grids.
    """

    network: Path
    path: Path
    grids: tuple[Path, ...] = ()

    def grid(self, nfe: int, nfes: Sequence[int]) -> Path | None:
        """The warp, search or tuning that the grid of one of several budgets comes from."""
        if len(self.grids) not in (0, 1, len(nfes)):
            raise StageError(f"grid: {len(self.grids)} files for {len(nfes)} budgets: give one, or one a budget")
        return None if not self.grids else self.grids[0] if len(self.grids) == 1 else self.grids[list(nfes).index(nfe)]


@dataclass(frozen=True)
class Method:
    """A method by its settings and files, not yet read.

    Attributes:
        space: what its dataset says.
        settings: the method's.
        files: network, path, warps, a search or a tuning.
    """

    space: ImageSpace
    settings: MethodSettings
    files: MethodFiles


class Sampler:
    """A method's network, path and warps, read from their files.

    Args:
        method: its settings and files.
        compute: where, and in which precision.
    """

    def __init__(self, method: Method, compute: Compute):
        self.space, self.settings, self.files, self.device = method.space, method.settings, method.files, compute.device
        if self.grid.from_file != bool(self.files.grids):
            raise StageError(
                "grid: give a warp for 'warped', or one a budget, a search for 'searched', a tuning for 'tuned', and "
                "none for other grids"
            )
        self.denoiser, self.headers = read_denoiser(self.files.network, self.files.path, self.space, compute)
        self.path = self.denoiser.path

    @property
    def grid(self):
        """The kind of grid."""
        return GRIDS[self.settings.grid]

    @functools.cached_property
    def digests(self) -> dict[Path, str]:
        """The digest of every file of the method, by the file."""
        return {file: digest(file) for file in (self.files.network, self.files.path, *self.files.grids)}

    @property
    def options(self) -> SolveOptions:
        """Options of `solve`."""
        return {"analytic_first": self.settings.afs, "threshold": self.settings.threshold}

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height, width of the images."""
        return self.denoiser.network.shape

    @property
    def classes(self) -> int:
        """Number of classes that images are drawn of; 0 without labels."""
        return self.denoiser.network.classes if self.space.class_conditional else 0

    def training_seconds(self, grid_file: Path | None) -> float:
        """Seconds of a device, since the base network, to train what is sampled from; network and path share theirs."""
        made = max(each.get("device_seconds", 0.0) for each in self.headers)
        return made + (0.0 if grid_file is None else checkpoints.header(grid_file).get("device_seconds", 0.0))

    def solver(self, nfe: int, grid_file: Path | None) -> tuple[Levels, Step]:
        """Levels of a budget and the step that the solver takes on them, from a warp, search or tuning if asked for.

        Raises:
            StageError: there are none for this budget; a tuning is of another network or path.
        """
        takes = self.grid.takes
        warp = checkpoints.load_warp(grid_file, self.path)[0] if grid_file and "warp" in takes else None
        search = grid_file if "search" in takes else None
        tuned = self._tuned(nfe, grid_file) if grid_file and "tuning" in takes else None
        learned = None if tuned is None else tuned.levels
        levels = levels_of(self.settings, nfe, self.space, self.path, warp, search, learned)
        if tuned is not None and SOLVERS[self.settings.solver].tuned:
            return levels, tuned
        with naming("solver"):
            return levels, SOLVERS[self.settings.solver].with_order(self.settings.order)

    def _tuned(self, nfe: int, file: Path) -> TunedStep:
        step, metadata = load_tuning(file, self.path, nfe)
        for name in ("network", "path"):
            if metadata.get(name) != self.digests[getattr(self.files, name)]:
                raise StageError(f"{file}: tuned for another {name}: take its own, or tune again")
        return step.to(self.device)

    def trajectory(self, seeds: Sequence[int], levels: Levels, step: Step) -> Trajectory:
        """Images of these seeds at every node of a grid."""
        drawn = Draws(seeds, self.shape, self.classes, self.device)
        own = levels.for_labels(drawn.labels)
        return record_trajectory(self.denoiser, drawn.noise, own, drawn.labels, step, source=drawn, **self.options)
