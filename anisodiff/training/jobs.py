"""Trainings set up and ready to run: what is drawn, which loss, which guard."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from anisodiff import pixels
from anisodiff.compute import Compute
from anisodiff.data import image_sets
from anisodiff.data.augmentation import augmentation_labels, augmented, draw_augmentation
from anisodiff.denoiser import Denoiser
from anisodiff.errors import StageError, naming
from anisodiff.experiment.settings import ImageSpace, PretrainSettings, RunSettings, TrainingSettings, WarpSettings
from anisodiff.networks.turned import Turned
from anisodiff.networks.unets import RawNetwork
from anisodiff.objectives.losses import edm_loss, kinetic, tlsm_loss, warp_loss
from anisodiff.objectives.registry import LOSSES
from anisodiff.paths.noise_path import NoisePath, Warp
from anisodiff.storage.files import Metadata
from anisodiff.training import loop, parallel
from anisodiff.training.image_guard import image_error
from anisodiff.training.loop import Batch, EarlyStop, TrainingPlan, TrainingState, train


def plan_of(settings: TrainingSettings) -> TrainingPlan:
    """The training plan among a stage's settings."""
    names = ("kimg", "batch", "micro_batch", "ramp_kimg", "ema_kimg", "ema_ramp", "seed", "decay")
    path_ema_kimg = settings.path_ema_kimg if isinstance(settings, RunSettings) else 0.0  # a run has two averages
    freeze_after = settings.freeze_after if isinstance(settings, RunSettings) else 1.0
    shared = {name: getattr(settings, name) for name in names}
    return TrainingPlan(**shared, path_ema_kimg=path_ema_kimg, freeze_after=freeze_after)


@runtime_checkable
class Batches(Protocol):
    """What the training of a network draws from: images, each batch from the CPU generator that it is given."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of the images."""
        ...

    @property
    def fixed_count(self) -> int:
        """How many images are held out."""
        ...

    def draw(self, count: int, generator: torch.Generator) -> Batch:
        """A batch as `images`, with `labels` where the network has them."""
        ...

    def fixed(self, index: Tensor) -> Batch:
        """Held-out images by their place, as `draw` gives them."""
        ...

    def moved(self, drawn: Batch) -> Batch:
        """A batch on the device, its images as `x0`."""
        ...


class BatchSampler:
    """Draws of one dataset, each from the CPU generator that it is given, and their way to the device.

    Args:
        space: what the dataset says of its images.
        folder: of the training images.
        device: where batches are used.
        augment: probability of each of EDM's augmentations; 0 for none.
    """

    def __init__(self, space: ImageSpace, folder: Path, device: str, augment: float = 0.0):
        self.augment = augment
        self.images, self.heldout = image_sets.load(folder).split(space.heldout)
        self.flips, self.use_labels, self.device = space.flips, space.class_conditional, device
        if self.use_labels and not self.images.classes:
            raise StageError(
                f"{folder}: the images have no labels: set class_conditional to false, or give a labelled source"
            )

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of the images."""
        return self.images.shape

    @property
    def fixed_count(self) -> int:
        """How many images are held out."""
        return len(self.heldout)

    def draw(self, count: int, generator: torch.Generator) -> Batch:
        """Images in uint8, labels where the network has them, parameters of their augmentation where there is one."""
        drawn = self._shown(*self.images.batch(count, generator, self.flips and not self.augment))
        if self.augment:
            drawn["augmentation"] = draw_augmentation(count, self.augment, generator)
        return drawn

    def fixed(self, index: Tensor) -> Batch:
        """Held-out images by their place."""
        return self._shown(*self.heldout.take(index))

    def _shown(self, images: Tensor, labels: Tensor) -> Batch:
        return {"images": images} | ({"labels": labels} if self.use_labels else {})

    def moved(self, drawn: Batch) -> Batch:
        """Move a batch to the device, its images, augmented where they are to be, as `x0` in [-1, 1]."""
        there = {name: each.to(self.device, non_blocking=True) for name, each in drawn.items()}
        x0, parameters = pixels.to_unit(there.pop("images")), there.pop("augmentation", None)
        if parameters is None:
            return {"x0": x0, **there}
        return {"x0": augmented(x0, parameters), "augment_labels": augmentation_labels(parameters), **there}


@dataclass
class TrainingJob:
    """A training that is set up: its state, its length, and the records that drive it when they are taken.

    Attributes:
        training: what is trained.
        schedule: how long, and how fast.
        records: from `train`; taking one makes a step.
        path: that the network is trained on.
    """

    training: TrainingState
    schedule: TrainingPlan
    records: Iterator[Metadata]
    path: NoisePath


def network_work(
    space: ImageSpace,
    settings: PretrainSettings | RunSettings,
    network: RawNetwork,
    path: NoisePath,
    batches: Batches,
    compute: Compute,
) -> TrainingJob:
    """The training of a network with EDM's loss, or of network and path with TLSM.

    Args:
        space: what the dataset says of its images.
        settings: of the run.
        network: weights to start from; trained in place.
        path: to start from; trained in place where the loss is TLSM.
        batches: of the training images.
        compute: where, and in which precision.

    Raises:
        StageError: the path has too many subspaces for its gradient.
    """
    schedule = plan_of(settings)
    learns = not isinstance(settings, RunSettings) or LOSSES[settings.loss].learns_network
    network.train(learns).requires_grad_(learns)
    network, path = compute.prepare(network), path.to(compute.device)
    run = settings if isinstance(settings, RunSettings) and LOSSES[settings.loss].learns_path else None
    modules: dict[str, nn.Module] = {"network": network}
    rates = {"network": settings.learning_rate}
    if isinstance(network, Turned):
        modules, rates = {"network": network.network, "frame": network.frame}, rates | {"frame": settings.learning_rate}
    basis = path.get_submodule("subspaces").requires_grad_(False)
    if run:
        modules, rates = modules | {"path": path.schedule}, rates | {"path": run.path_learning_rate}
        if run.learn_basis:
            basis.requires_grad_(True)
            with naming("learn_basis", "see the run's path and subspaces"):
                path.require_learnable_basis()
            modules, rates = modules | {"basis": basis}, rates | {"basis": run.basis_learning_rate}
    through_level = run is not None and run.path_gradient == "level"
    if through_level and path.subspaces.count > 1:
        raise StageError(
            f"path_gradient: level is for one subspace, this path has {path.subspaces.count}: take full or envelope"
        )
    denoiser = Denoiser(network, path, space.sigma_data, compute.body)
    shape = (schedule.piece, *batches.shape)

    def draw_edm(generator: torch.Generator) -> Batch:
        drawn = batches.draw(schedule.piece, generator)
        # EDM's log-normal noise levels
        drawn["sigma"] = (torch.randn(schedule.piece, generator=generator) * 1.2 - 1.2).exp()
        return drawn | {"eps": torch.randn(shape, generator=generator)}

    def draw_step(generator: torch.Generator) -> Batch:
        drawn = batches.draw(schedule.piece, generator)
        drawn["eps"] = torch.randn(shape, generator=generator)
        return drawn | _window(schedule.piece, 1 / STEPS, generator)

    def draw_tlsm(run: RunSettings, generator: torch.Generator) -> Batch:
        drawn = batches.draw(schedule.piece, generator)
        drawn["eps"] = torch.randn(shape, generator=generator)
        drawn["t"] = torch.rand(schedule.piece, generator=generator, dtype=torch.float64)
        if run.path_gradient == "full":
            count = max(1, round(run.probe_fraction * schedule.piece))
            signs = torch.rand((run.probes, count, *shape[1:]), generator=generator) < 0.5
            drawn["probes"] = torch.where(signs, -1.0, 1.0)
        if run.kinetic:
            drawn["probe"] = torch.where(torch.rand(shape, generator=generator) < 0.5, -1.0, 1.0)
        return drawn

    def mean_loss(drawn: Batch) -> Tensor:
        if run and run.loss == "discretisation":
            return _of_one_step(denoiser, run.c, batches.moved(drawn))
        if run:
            there = batches.moved(drawn)
            probe = there.pop("probe", None)
            value = tlsm_loss(denoiser, c=run.c, through_level=through_level, weight=run.weight, **there).mean()
            if run.kinetic and probe is not None:
                value = value + _kinetic(denoiser, there, probe, run.kinetic)
            return value
        return edm_loss(denoiser, **batches.moved(drawn)).mean()

    training = TrainingState(modules, rates)
    guard = None
    if run:
        averaged = Denoiser(saved_network(training), saved_path(training, path), space.sigma_data, compute.body)
        guard = _guard(averaged, batches, run, schedule, compute.device)
    draw = draw_edm
    if run:
        draw = draw_step if run.loss == "discretisation" else partial(draw_tlsm, run)
    records = train(training, schedule, draw, mean_loss, guard)
    return TrainingJob(training, schedule, records, path)


def _of_one_step(denoiser: Denoiser, c: float, drawn: Batch, warp: Warp | None = None) -> Tensor:
    """Mean of the warp's loss, in warped time or in the path's own."""
    discretisation, score_matching = warp_loss(denoiser, denoiser.path, warp, c=c, **drawn)
    return (discretisation + score_matching).mean()


STEPS = 8  # steps that a schedule is discretised in (paper, Section 5.2)


def _window(count: int, length: float | Tensor, generator: torch.Generator) -> Batch:
    """Start and end of a step in time, and a time between them, for every image.

    Args:
        count: images.
        length: how long the step is, but for what would pass 0.
        generator: a CPU generator.
    """
    uniform = lambda: torch.rand(count, generator=generator, dtype=torch.float64)  # noqa: E731
    start = uniform().clamp(min=1e-6)
    end = (start - length).clamp(min=0)
    return {"start": start, "end": end, "test": torch.lerp(end, start, uniform())}


def saved_network(training: TrainingState) -> RawNetwork:
    """What is saved of a network: its average, in its frame where it has one."""
    network = training.ema["network"]
    return Turned(network, training.ema["frame"]) if "frame" in training.ema else network


def saved_path(training: TrainingState, path: NoisePath) -> NoisePath:
    """What is saved of a path: its schedule and its basis as averaged, or as they are where they are not trained."""
    basis, schedule = training.ema.get("basis", path.subspaces), training.ema.get("path", path.schedule)
    return NoisePath(basis, schedule, path.weights)


def _kinetic(denoiser: Denoiser, drawn: Batch, probe: Tensor, factors: list[float]) -> Tensor:
    """Kinetic energy of the flow and of its gradient, at the batch's own noisy images."""
    path, labels = denoiser.path.for_labels(drawn.get("labels")), drawn.get("labels")
    basis = path.subspaces.detached()
    noisy = basis.from_pixels(drawn["x0"]) + path.scale(drawn["eps"], path.at(drawn["t"]).sigma)
    energy, slope = kinetic(denoiser, noisy.detach(), drawn["t"], probe, labels)
    return factors[0] * energy.mean() + factors[1] * slope.mean()


def _guard(
    denoiser: Denoiser, batches: Batches, settings: RunSettings, schedule: TrainingPlan, device: str
) -> EarlyStop:
    """Watch what would be saved: its loss on held-out images, or the error of its few-step images."""
    every = max(1, round(settings.guard_kimg * 1000 / schedule.batch))
    if settings.guard == "images":
        error = image_error(denoiser, settings.guard_images, settings.guard_nfe, device)
        return EarlyStop(error, every, settings.guard_tolerance, keep_best=True)
    return EarlyStop(_heldout_loss(denoiser, batches, settings), every, settings.guard_tolerance)


def _heldout_loss(denoiser: Denoiser, batches: Batches, settings: RunSettings) -> Callable[[], float]:
    """The run's loss on fixed held-out images with fixed noise, 512 or more of them; TLSM's at stratified times.

    A rise means that the path has run away from what the network knows.
    """
    generator = torch.Generator().manual_seed(settings.seed)
    repeats = max(1, math.ceil(512 / max(1, batches.fixed_count)))
    index = torch.arange(batches.fixed_count).repeat(repeats)
    drawn = batches.fixed(index)
    drawn["eps"] = torch.randn(drawn["images"].shape, generator=generator)
    if settings.loss == "discretisation":
        drawn |= _window(len(index), 1 / STEPS, generator)
    else:
        order = torch.randperm(len(index), generator=generator)
        drawn["t"] = ((order + 0.5) / len(index)).to(torch.float64)
    fixed = batches.moved(drawn)

    def loss() -> float:
        with torch.no_grad():
            if settings.loss == "discretisation":
                return float(_of_one_step(denoiser, settings.c, fixed))
            return float(tlsm_loss(denoiser, c=settings.c, through_level=False, weight=settings.weight, **fixed).mean())

    return loss


def warp_work(
    space: ImageSpace,
    settings: WarpSettings,
    network: RawNetwork,
    path: NoisePath,
    batches: BatchSampler,
    compute: Compute,
) -> TrainingJob:
    """The training of the time warp of a path, under a network that is left as it is.

    Args:
        space: what the dataset says of its images.
        settings: of the warp.
        network: that the warp is for.
        path: whose time is warped.
        batches: of the training images.
        compute: where, and in which precision.

    Raises:
        StageError: the window is of each budget, and not of one.
    """
    steps = settings.steps
    if isinstance(steps, str):
        raise StageError(f"steps: {steps} is a warp for each budget: give the steps of one")
    path = path.to(compute.device).requires_grad_(False)
    denoiser = Denoiser(compute.prepare(network), path, space.sigma_data, compute.body)
    warp = Warp(path, knots=settings.knots).to(compute.device)
    schedule = plan_of(settings)
    shape = (schedule.piece, *batches.shape)

    def draw(generator: torch.Generator) -> Batch:
        drawn = batches.draw(schedule.piece, generator)
        drawn["eps"] = torch.randn(shape, generator=generator)
        window = 1.0
        if settings.window == "uniform":
            window = torch.rand(schedule.piece, generator=generator, dtype=torch.float64)
        return drawn | _window(schedule.piece, window / steps, generator)

    def mean_loss(drawn: Batch) -> Tensor:
        return _of_one_step(denoiser, settings.c, batches.moved(drawn), warp)

    training = TrainingState({"warp": warp}, {"warp": settings.learning_rate})
    return TrainingJob(training, schedule, train(training, schedule, draw, mean_loss), path)


def drive(
    work: TrainingJob, key: str, save_seconds: float, output: Path, compute: Compute, finish: Callable[[], None]
) -> None:
    """Run a training to its end from the newest resume state; then rank 0 writes what was made, and drops the states.

    Args:
        work: the training.
        key: fingerprint of its settings and inputs: states of another key are never seen.
        save_seconds: longest time between two saves.
        output: the file that it makes; the log and the states lie beside it.
        compute: where.
        finish: writes what was made.
    """
    store = loop.ResumeStore(output.parent / ".state" / output.stem, key)
    with store.locked():
        store.load(work.training)
        log, device = output.with_suffix(".jsonl"), compute.device
        with naming(output.stem, "train with a lower rate of the path"):
            loop.run(work.records, work.training, work.schedule, store, log, save_seconds, output.stem, device)
        if parallel.rank() == 0:
            finish()
            store.clear()
    parallel.leave()
