"""The toy stage: the flexible forward process, learned on a plane in three dimensions, and what its flow looks like.

The process, the plane z = 2 and what its figures show are those of FP-Diffusion (arXiv:2206.10365, Section 4.1).
"""

import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from anisodiff.compute import CPU, Compute
from anisodiff.denoiser import Denoiser
from anisodiff.errors import StageError, naming
from anisodiff.exact.flexible_process import ProcessCoordinates
from anisodiff.exact.toys import Plane, as_images
from anisodiff.experiment.settings import (
    ImageSpace,
    PlaneSettings,
    RunSettings,
    ToyRowSettings,
    ToyTrainingSettings,
    TrainingSettings,
)
from anisodiff.grids import fixed
from anisodiff.metrics import frechet, geometry
from anisodiff.networks.mlp import Mlp
from anisodiff.networks.turned import PlaneFrame, Turned
from anisodiff.paths.noise_path import NoisePath
from anisodiff.paths.rotated import DenseBasis, random_vectors
from anisodiff.paths.schedules import FIRST_TIME, ExponentSchedule, integrated_rate
from anisodiff.paths.subspaces import Subspaces, partition
from anisodiff.solvers.generation import Draws, final_states
from anisodiff.solvers.registry import SOLVERS
from anisodiff.solvers.trajectories import record_trajectory
from anisodiff.storage import checkpoints
from anisodiff.storage.files import Metadata, fingerprint, provenance
from anisodiff.training.jobs import drive, network_work, saved_network, saved_path
from anisodiff.training.loop import Batch

SPACE = ImageSpace(sigma_data=1.0)  # with which the network sees the process's own coordinates
SHAPE = (3, 1, 1)
HELDOUT = 512  # points on which the end of a training is checked
TIMES, POINTS = 200, 256  # of the kinetic energy: times, and points at each
CURVES = 512  # trajectories whose length is measured
SHOWN = 4  # sampling trajectories in a figure, as in the paper's
STARTS = (-1.5, 0.0, 1.5)  # of forward trajectories, in standard deviations of the direction that tilts
FORWARD = torch.linspace(0, 0.5, 151, dtype=torch.float64)  # their times: later ones are noise alone
SECTION = 0.3  # time of the velocities in a figure: mean and deviation of the normal direction are about 1 there
GRID = (torch.linspace(-2.4, 2.4, 9), torch.linspace(-1.6, 3.2, 9))  # their places, x and z


class PlaneBatches:
    """Draws of a plane, in the place of a data set's.

    Args:
        plane: the data.
        seed: seed of the held-out points.
        device: where batches are used.
    """

    shape, fixed_count = SHAPE, HELDOUT

    def __init__(self, plane: Plane, seed: int, device: str):
        self.plane, self.device = plane, device
        self.heldout = plane.draw(HELDOUT, torch.Generator().manual_seed(seed)).float()

    def draw(self, count: int, generator: torch.Generator) -> Batch:
        """Draw new points, as images `[count, 3, 1, 1]`."""
        return {"images": self.plane.draw(count, generator).float()}

    def fixed(self, index: Tensor) -> Batch:
        """Held-out points by their place."""
        return {"images": self.heldout[index]}

    def moved(self, drawn: Batch) -> Batch:
        """The batch on the device, its points as `x0`."""
        there = {name: each.to(self.device) for name, each in drawn.items()}
        return {"x0": there.pop("images"), **there}


@dataclass(frozen=True)
class Process:
    """A process that is learned, or fixed.

    Attributes:
        denoiser: network over the path, or the exact one.
        frame: that turns; None where omega is 0.
        omega: before it learned, in radians a unit of beta.
    """

    denoiser: Denoiser
    frame: PlaneFrame | None = None
    omega: float = 0.0

    @property
    def path(self) -> NoisePath:
        return self.denoiser.path

    @property
    def coordinates(self) -> ProcessCoordinates:
        """What is seen from the process."""
        return ProcessCoordinates(self.path, self.frame)


def learn_plane(
    settings: ToyTrainingSettings,
    data: PlaneSettings,
    row: ToyRowSettings,
    output: Path,
    compute: Compute = CPU,
) -> None:
    """Train a row of the toy's table on a plane with one seed, and measure its flow.

    Args:
        settings: how it is trained and measured, and the seed.
        data: the plane.
        row: what is learned, and by which loss.
        output: safetensors file of what the figures show, with the row's columns in its header as `summary`.
        compute: where, and in which precision.

    Raises:
        StageError: the loss, or a sample, is not finite.
    """
    compute = compute.begin()
    plane = Plane(data.distance, (data.variances[0], data.variances[1]), data.tilt, data.thickness)
    parts = {"toy": settings, "plane": data, "row": row}
    network, path = _start(settings, row)

    def finish(process: Process, seconds: float) -> None:
        with naming("solver", "take another"):
            summary, shown = _measured(settings, plane, process)
        if not all(each.isfinite().all() for each in shown.values()):
            raise StageError(f"{output}: its flow is not finite: lower path_learning_rate, or learning_rate")
        measured = {"toy": True, "summary": summary, "seconds": seconds, "environment": compute.environment()}
        checkpoints.save(output, shown, provenance(parts | {"compute": asdict(compute)}) | measured)

    if row.learns == "exact":
        finish(Process(plane.denoiser(path)), 0.0)
        return
    batches = PlaneBatches(plane, settings.seed, compute.device)
    work = network_work(SPACE, _run(settings, row), network, path, batches, compute)
    training = work.training
    omega = float(network.frame.rates.detach().abs()) if isinstance(network, Turned) else 0.0

    def finish_training() -> None:
        learned = saved_network(training)
        frame = learned.frame if isinstance(learned, Turned) else None
        denoiser = Denoiser(learned, saved_path(training, work.path), SPACE.sigma_data, compute.body)
        finish(Process(denoiser.cpu(), frame, omega), training.seconds)

    key = fingerprint(parts | {"dtype": compute.dtype}, [])
    drive(work, key, settings.save_seconds, output, compute, finish_training)


def _start(settings: ToyTrainingSettings, row: ToyRowSettings) -> tuple[Mlp | Turned, NoisePath]:
    """Network and path before they learn: a random basis, and rates about 1 or of omega from N(0, 1) (B.2)."""
    torch.manual_seed(settings.seed)
    network, generator = Mlp(1, SHAPE[0]), torch.Generator().manual_seed(settings.seed)
    vectors = random_vectors(SHAPE[0], settings.seed)
    if row.learns == "noise":
        basis = DenseBasis(torch.arange(SHAPE[0]).reshape(SHAPE), vectors)
        ends = None
        if row.ends == "fixed":
            first, last = torch.expm1(integrated_rate(torch.tensor([FIRST_TIME, 1.0], dtype=torch.float64))).tolist()
            ends = (first, last)
        spread = settings.spread * torch.randn(SHAPE[0], generator=generator, dtype=torch.float64)
        return network, NoisePath(basis, ExponentSchedule(spread, ends))
    fixed_process = NoisePath(Subspaces(partition(1, "whole")), ExponentSchedule(torch.zeros(1)))
    if row.learns == "drift":
        basis = DenseBasis(torch.zeros(SHAPE, dtype=torch.int64), vectors)
        rate = torch.randn(1, generator=generator, dtype=torch.float64)
        return Turned(network, PlaneFrame([0, 1], rate, basis)), fixed_process
    return network, fixed_process


def _run(settings: ToyTrainingSettings, row: ToyRowSettings) -> RunSettings:
    """The row as a training run. The guard would end what the toy shows, a path that runs away, so it lets all pass."""
    shared = {name: getattr(settings, name) for name in TrainingSettings.model_fields}
    noise = row.learns == "noise"
    return RunSettings(
        **shared,
        start="toy",
        path="toy",
        loss="tlsm",
        weight=row.weight,
        subspaces=f"dense:{SHAPE[0]}" if noise else "whole",
        path_learning_rate=settings.path_learning_rate if noise else 0.0,
        learn_basis=noise,
        basis_learning_rate=settings.path_learning_rate,
        path_gradient="full" if noise else "envelope",
        kinetic=[row.kinetic, 0.0] if row.kinetic else None,
        guard_kimg=settings.kimg,
        guard_tolerance=math.inf,
    )


@torch.no_grad()
def _measured(settings: ToyTrainingSettings, plane: Plane, process: Process) -> tuple[Metadata, dict[str, Tensor]]:
    """Columns of a row, and what its figures show, in the process's own coordinates."""
    curves = _trajectories(settings, process)
    distances = {steps: _distance(settings, plane, process.denoiser, steps) for steps in settings.steps}
    energy, horizontal = _energies(settings, plane, process)
    measured = geometry.shape(curves)
    chords = (curves[-1] - curves[0]).norm(dim=1)
    summary = {
        **{f"w2_{steps}": value for steps, value in distances.items()},
        "exact": _distance(settings, plane, plane.denoiser(process.path), settings.steps[-1]),
        "energy": energy,
        "horizontal": horizontal,
        "length": float(measured.length.sum() / chords.sum()),
        **_learned(plane, process),
    }
    shown = {"sampling": curves[:, :SHOWN], "forward": _forward(plane, process)}
    return summary, shown | _section(plane, process)


def _distance(settings: ToyTrainingSettings, plane: Plane, denoiser: Denoiser, steps: int) -> float:
    """Squared W_2 between the plane's Gaussian and that fitted to samples."""
    seeds = range(settings.seed * settings.images, (settings.seed + 1) * settings.images)
    levels = fixed.uniform(denoiser.path, steps + 1, append_zero=False)
    step, statistics = SOLVERS[settings.solver].with_order(), frechet.FeatureStatistics(SHAPE[0])
    for chosen, z in final_states(denoiser, levels, step, seeds, SHAPE, 0, settings.images):
        statistics.add(denoiser.path.to_pixels(z)[: len(chosen)].flatten(1))
    return frechet.distance(statistics.gaussian, frechet.Gaussian(plane.mean, plane.factors.T @ plane.factors))


def _energies(settings: ToyTrainingSettings, plane: Plane, process: Process) -> tuple[float, float]:
    """Kinetic energy `int E|v|^2 dt` of the flow on the data's own noisy points, and its share along the plane."""
    generator = torch.Generator().manual_seed(settings.seed)
    total = along = 0.0
    for t in (torch.arange(TIMES, dtype=torch.float64) + 0.5) / TIMES:
        eps = torch.randn(POINTS, *SHAPE, generator=generator)
        x0, sigma = plane.draw(POINTS, generator).float(), process.path.at(t[None]).sigma
        z = process.path.from_pixels(x0) + process.path.scale(eps, sigma)
        velocity = process.coordinates.velocity(process.denoiser, z, t[None]).flatten(1).to(torch.float64)
        square, normal = velocity.square().sum(1), (velocity @ plane.normal).square()
        total, along = total + float(square.mean()) / TIMES, along + float((square - normal).mean()) / TIMES
    return total, along / total


def _trajectories(settings: ToyTrainingSettings, process: Process) -> Tensor:
    """Sampling trajectories, `[N, B, 3]`."""
    levels = fixed.uniform(process.path, settings.steps[-1] + 1, append_zero=False)
    noise = Draws(range(CURVES), SHAPE, 0).noise
    states = record_trajectory(process.denoiser, noise, levels, None, SOLVERS[settings.solver].with_order()).states
    times = torch.linspace(1, 0, len(states), dtype=torch.float64)
    pairs = zip(states, times, strict=True)
    return torch.stack([process.coordinates.of(z, process.path.at(t[None])).flatten(1) for z, t in pairs])


def _forward(plane: Plane, process: Process) -> Tensor:
    """Trajectories of the forward process from the data, `[N, B, 3]`; its increments are independent in z."""
    path, generator = process.path, torch.Generator().manual_seed(0)  # the same noise in all rows
    starts = plane.mean + torch.tensor(STARTS, dtype=torch.float64)[:, None] * plane.factors[0]
    z, points, before = path.from_pixels(as_images(starts)), [], torch.zeros(1, path.subspaces.count)
    for noise in (path.at(t[None]) for t in FORWARD):
        added = path.from_pixels(torch.randn(len(STARTS), *SHAPE, generator=generator, dtype=torch.float64))
        z, before = z + path.scale(added, (noise.g - before).sqrt()), noise.g
        points.append(process.coordinates.of(z, noise).flatten(1))
    return torch.stack(points)


def _section(plane: Plane, process: Process) -> dict[str, Tensor]:
    """Velocities in the x-z plane at one time, of the process and of the exact flow along its path."""
    t, (x, z) = torch.tensor([SECTION], dtype=torch.float64), GRID
    places = torch.cartesian_prod(x, z)
    points = as_images(torch.stack([places[:, 0], torch.zeros(len(places)), places[:, 1]], dim=1))
    coordinates = process.coordinates
    noisy = coordinates.back(points, process.path.at(t))
    found = {"places": places}
    for name, denoiser in (("velocity", process.denoiser), ("exact_velocity", plane.denoiser(process.path))):
        found[name] = coordinates.velocity(denoiser, noisy, t).flatten(1)
    return found


def _learned(plane: Plane, process: Process) -> dict[str, float | list[float]]:
    """Eigenvalues of R^-1, omega, and the angle in degrees of the vector nearest to the normal, now and at the start.

    That vector is omega's axis where it is omega that is learned.
    """
    basis = process.path.subspaces if process.frame is None else process.frame.basis
    rates = process.path.schedule.state_dict()["log_lambda"].exp().expand(SHAPE[0]).tolist()
    found: dict[str, float | list[float]] = {"rates": rates}
    if process.frame is not None:
        found |= {"omega": float(process.frame.rates.abs()), "omega_start": process.omega}
    if not isinstance(basis, DenseBasis):
        return found
    (now,), (start,) = basis.matrices(), basis.start_matrices()
    choice = range(SHAPE[0]) if process.frame is None else [SHAPE[0] - 1]
    angles = lambda vectors: (vectors @ plane.normal).abs().clamp(max=1).acos().rad2deg().tolist()  # noqa: E731
    nearest = min(choice, key=angles(now).__getitem__)
    found |= {"angle": angles(now)[nearest], "angle_start": min(angles(start)[k] for k in choice)}
    return found | ({"rate_normal": rates[nearest]} if process.frame is None else {})
