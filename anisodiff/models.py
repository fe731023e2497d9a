"""Models for people: `load` one from its files, take its `levels`, `sample` images."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from anisodiff.denoiser import Denoiser
from anisodiff.errors import StageError
from anisodiff.experiment.settings import ImageSpace, MethodSettings
from anisodiff.grids.levels import Levels
from anisodiff.grids.registry import GRIDS
from anisodiff.methods import check_path, levels_of, own_sigma_data
from anisodiff.paths.noise_path import NoisePath, edm_path
from anisodiff.solvers.generation import final_states
from anisodiff.solvers.loop import SolveOptions
from anisodiff.solvers.registry import SOLVERS
from anisodiff.solvers.tuned import TunedStep
from anisodiff.storage import checkpoints
from anisodiff.storage.files import Metadata, digest
from anisodiff.storage.tunings import load_tuning


@dataclass(frozen=True)
class Model:
    """A network over a noise path.

    Attributes:
        denoiser: D, score and flow.
        device: where it computes.
        metadata: header of the network's file: settings, versions, training.
        network_file: where the network was read.
        path_file: where the path was; None for EDM's, which is in no file.
    """

    denoiser: Denoiser
    device: str
    metadata: Metadata
    network_file: Path
    path_file: Path | None = None

    @property
    def path(self) -> NoisePath:
        return self.denoiser.path

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height, width of the images."""
        return self.denoiser.network.shape

    @property
    def classes(self) -> int:
        """Number of classes; 0 of an unconditional network."""
        return self.denoiser.network.classes


def load(source: Path | str, path: Path | str | None = None, device: str = "cpu") -> Model:
    """Load a model from a run's folder, or from the file of a network.

    Args:
        source: folder of a run (`results/digits/runs/ani`), or safetensors file of a network.
        path: safetensors file of a noise path; None takes the run's own, or EDM's for the file of a network.
        device: torch's name of where to compute.

    Raises:
        StageError: there is no such file, or it is damaged or of another kind, or network and path do not fit.
    """
    source = Path(source)
    network_file = source / "network.safetensors" if source.is_dir() else source
    if path is None and source.is_dir():
        path = source / "path.safetensors"
    network, metadata = checkpoints.load_network(network_file)
    space = _space(metadata)
    if path is None:
        noise_path = edm_path(network.shape[-1], space.sigma_min, space.sigma_max)
    else:
        noise_path = checkpoints.load_path(path)[0]
        check_path(network, noise_path, network_file, path)
    denoiser = Denoiser(network, noise_path, own_sigma_data(metadata, network_file))
    path_file = None if path is None else Path(path)
    return Model(denoiser.to(device).eval().requires_grad_(False), device, metadata, network_file, path_file)


def load_denoiser(path: Path | str, device: str = "cpu") -> Denoiser:
    """Load the denoiser `D(x, sigma, labels=None)` of a network, with the sigma_data that it was trained with.

    Args:
        path: safetensors file of a network, as `anisodiff convert` and the training stages write it.
        device: torch's name of where to compute.

    Raises:
        StageError: there is no such file, or it holds no network, or it does not say its sigma_data.
    """
    return load(path, device=device).denoiser


def levels(model: Model, nfe: int, solver: str = "midpoint", grid: str | None = None) -> Levels:
    """Levels on which a solver makes exactly `nfe` evaluations an image.

    Args:
        model: a network over a path, as `load` returns it.
        nfe: evaluations of the denoiser.
        solver: one of `SOLVERS`.
        grid: "karras" (EDM's), "log-snr", "vp-time", "path-time" in the path's own time, or "mean-karras", times at
            which the path's geometric-mean level is on EDM's; None is "path-time" for a path of the model's own and
            "karras" for EDM's.

    Raises:
        StageError: the solver cannot spend this budget on this grid, or there is no such solver or grid.
    """
    _check_solver(solver)
    grids = [name for name, entry in GRIDS.items() if not (entry.from_file or "levels" in entry.takes)]
    if grid is not None and grid not in grids:
        raise StageError(f"grid: {grid!r} is unknown here: use one of {', '.join(grids)}")
    chosen = grid or ("karras" if model.path_file is None else "path-time")
    method = MethodSettings(network="base", path="own", grid=chosen, solver=solver)
    return levels_of(method, nfe, _space(model.metadata), model.path)


def _space(metadata: Metadata) -> ImageSpace:
    """The ends of the levels that a network was trained on: EDM's, where the header of its file names none."""
    settings = metadata.get("settings")
    dataset = settings.get("dataset") if isinstance(settings, dict) else None
    ends = dataset if isinstance(dataset, dict) else {}
    return ImageSpace(**{name: ends[name] for name in ("sigma_min", "sigma_max") if name in ends})


def sample(
    model: Model,
    nfe: int = 9,
    solver: str = "midpoint",
    seeds: Iterable[int] = range(16),
    grid: str | Levels | None = None,
    batch: int = 64,
    tuning: Path | str | None = None,
) -> Float[Tensor, "n c h w"]:
    """Draw images, one a seed: noise, class and image depend on the seed alone.

    Args:
        model: a network over a path, as `load` returns it.
        nfe: evaluations of the denoiser an image.
        solver: one of `SOLVERS`.
        seeds: one an image.
        grid: see `levels`; or levels of your own, which then say how many evaluations there are.
        batch: images at a time.
        tuning: file of a tuning of this network, whose levels and weights take the place of grid and solver.

    Returns:
        images in [-1, 1], on the CPU.

    Raises:
        StageError: see `levels`; a tuning is of another network, or has not this budget.
    """
    _check_solver(solver)
    options: SolveOptions = {}
    if tuning is not None:
        step, options = _tuned(model, nfe, tuning)
        grid = step.levels
    else:
        grid = grid if isinstance(grid, Levels) else levels(model, nfe, solver, grid)
        step = SOLVERS[solver].with_order()
    images, drawn = [], (list(seeds), model.shape, model.classes, batch, model.device)
    # kernels that repeat, in float32, as the stages have them
    with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
        for chosen, z in final_states(model.denoiser, grid, step, *drawn, **options):
            images.append(model.path.to_pixels(z)[: len(chosen)].clamp(-1, 1).cpu())
    return torch.cat(images) if images else torch.empty((0, *model.shape))


def _tuned(model: Model, nfe: int, file: Path | str) -> tuple[TunedStep, SolveOptions]:
    """A tuning's step at a budget, and the options of `solve` that it was tuned with."""
    step, metadata = load_tuning(file, model.path, nfe)
    if metadata.get("network") != digest(model.network_file):
        raise StageError(f"{file}: tuned for another network: load that")
    of_path = None if model.path_file is None else digest(model.path_file)
    if model.path.subspaces.count > 1 and metadata.get("path") != of_path:
        raise StageError(f"{file}: tuned on another path: load that")
    start = metadata["settings"]["start"]
    return step.to(model.device), {"analytic_first": start["afs"], "threshold": start["threshold"]}


def _check_solver(name: str) -> None:
    known = [each for each, solver in SOLVERS.items() if not solver.tuned]
    if name not in known:
        raise StageError(f"solver: {name!r} is unknown here: use one of {', '.join(known)}, or a tuning's file")
