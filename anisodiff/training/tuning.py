"""The tuning of solvers under a frozen network, on the loop that all trainings share."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from anisodiff.denoiser import Denoiser
from anisodiff.errors import InvalidArgument
from anisodiff.objectives.tuning import ImageLoss, Pairs, squared_error, student_images
from anisodiff.solvers.loop import SolveOptions
from anisodiff.solvers.tuned import TunedSolver
from anisodiff.training.jobs import TrainingJob
from anisodiff.training.loop import Batch, EarlyStop, TrainingPlan, TrainingState, train


@dataclass
class TuningJob(TrainingJob):
    """A tuning that is set up.

    Attributes:
        starts: mean error of each solver on the held-out pairs as it starts.
    """

    starts: list[float]


def tuning_plan(steps: int = 300, batch: int = 128, warm_up: int = 10, seed: int = 0) -> TrainingPlan:
    """Length and rates of a tuning: a linear warm-up under half a cosine down to 0; nothing is averaged.

    Args:
        steps: gradient steps.
        batch: pairs a step.
        warm_up: steps.
        seed: of the choice of pairs.
    """
    kimg = (steps - 0.5) * batch / 1000  # a plan rounds up to whole batches
    return TrainingPlan(kimg, batch, warm_up * batch / 1000, 0.0, None, seed, decay="cosine")


def mean_error(
    denoiser: Denoiser, solver: TunedSolver, pairs: Pairs, loss: ImageLoss, batch: int, **options: Unpack[SolveOptions]
) -> float:
    """Mean loss of a solver's images over pairs.

    Args:
        denoiser: network over the path, where it computes.
        solver: at its present numbers.
        pairs: noise and the teacher's images.
        loss: of each image.
        batch: images at a time.
        options: keyword arguments of `student_images`.
    """
    device, total = solver.labels.device, 0.0
    with torch.no_grad():
        step = solver()
        for first in range(0, len(pairs), batch):
            part = pairs.take(slice(first, first + batch), device)
            images = student_images(denoiser, step, part.noise, part.labels, recompute=False, **options)
            total += float(loss(images, part.images).to(torch.float64).sum())
    return total / len(pairs)


def tuning_work(
    denoiser: Denoiser,
    solvers: Sequence[TunedSolver],
    pairs: Pairs,
    heldout: Pairs,
    plan: TrainingPlan,
    rate: float = 0.02,
    loss: ImageLoss = squared_error,
    every: int = 20,
    recompute: bool = True,
    **options: Unpack[SolveOptions],
) -> TuningJob:
    """Set up the tuning of a solver, or of several budgets' that share a curve, of which each step draws one.

    Losses are in units of each solver's at its start on the held-out pairs. When the records end, the solvers have the
    numbers that were best there, those of the start among them; the state knows them as `good`, so that a `ResumeStore`
    keeps all that a stage needs.

    Args:
        denoiser: network over the path, where it computes; frozen here.
        solvers: tuned in place, on the same device.
        pairs: to learn from, kept on the CPU.
        heldout: to choose by.
        plan: length, batch and seed, from `tuning_plan`.
        rate: Adam's, at its highest.
        loss: of each image.
        every: steps between looks at the held-out pairs.
        recompute: see `student_images`.
        options: `analytic_first` and `threshold`, see `ProbabilityFlow`.

    Raises:
        InvalidArgument: the teacher is what the solvers start as, so that there is nothing to learn.
    """
    denoiser.eval().requires_grad_(False)
    device = solvers[0].labels.device
    starts = [mean_error(denoiser, solver, heldout, loss, plan.piece, **options) for solver in solvers]
    if min(starts) == 0:
        raise InvalidArgument("teacher: its images are those of the start: take a larger budget")

    def draw(generator: torch.Generator) -> Batch:
        index = torch.randperm(len(pairs), generator=generator)[: plan.piece]
        return {"index": index, "solver": torch.randint(len(solvers), (), generator=generator)}

    def mean_loss(drawn: Batch) -> Tensor:
        which, part = int(drawn["solver"]), pairs.take(drawn["index"], device)
        images = student_images(denoiser, solvers[which](), part.noise, part.labels, recompute, **options)
        return loss(images, part.images).mean() / starts[which]

    def heldout_loss() -> float:
        errors = [mean_error(denoiser, solver, heldout, loss, plan.piece, **options) for solver in solvers]
        return sum(error / start for error, start in zip(errors, starts, strict=True)) / len(solvers)

    training = TrainingState({"solvers": nn.ModuleList(solvers)}, {"solvers": rate})
    guard = EarlyStop(heldout_loss, every, float("inf"))  # rises are borne: the best is kept

    def records() -> Iterator[dict[str, Any]]:
        yield from train(training, plan, draw, mean_loss, guard)
        training.restore(training.good)

    return TuningJob(training, plan, records(), denoiser.path, starts)
