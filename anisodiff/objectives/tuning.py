"""What a solver is tuned by: a student's images against a teacher's from the same noise, under a frozen network."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Unpack

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from anisodiff.denoiser import Denoiser
from anisodiff.grids.levels import Levels
from anisodiff.solvers.generation import draw, final_states, start
from anisodiff.solvers.loop import SolveOptions
from anisodiff.solvers.singlestep import ProbabilityFlow, State, Step
from anisodiff.solvers.tuned import TunedStep

ImageLoss = Callable[[Float[Tensor, "b c h w"], Float[Tensor, "b c h w"]], Float[Tensor, " b"]]


@dataclass(frozen=True)
class Pairs:
    """Noise, and the images that a teacher makes of it.

    Attributes:
        noise: standard normal, in pixels.
        labels: one-hot classes, or None.
        images: the teacher's, in pixels, as they come out of its last step.
    """

    noise: Float[Tensor, "n c h w"]
    labels: Float[Tensor, "n k"] | None
    images: Float[Tensor, "n c h w"]

    def __len__(self) -> int:
        return len(self.noise)

    def take(self, index: Tensor | slice, device: str | torch.device = "cpu") -> "Pairs":
        """Some of them, on a device."""
        labels = None if self.labels is None else self.labels[index].to(device)
        return Pairs(self.noise[index].to(device), labels, self.images[index].to(device))


def joined(parts: Sequence[Pairs]) -> Pairs:
    """Join the pairs of several batches."""
    labels = [part.labels for part in parts if part.labels is not None]
    noise, images = (torch.cat([getattr(part, name) for part in parts]) for name in ("noise", "images"))
    return Pairs(noise, torch.cat(labels) if labels else None, images)


def teacher_pairs(
    teacher: Denoiser,
    levels: Levels,
    step: Step,
    seeds: Sequence[int],
    shape: tuple[int, int, int],
    classes: int,
    batch: int,
    device: str = "cpu",
    **options: Unpack[SolveOptions],
) -> Iterator[Pairs]:
    """Yield pairs of these seeds, a batch at a time, on the CPU; pair n depends on seed n alone.

    Args:
        teacher: network over the teacher's path.
        levels: its grid.
        step: its solver's step.
        seeds: one a pair, far from those that are judged.
        shape: channels, height, width.
        classes: number of classes; 0 for an unconditional network.
        batch: images at a time.
        device: where to compute.
        options: keyword arguments of `solve`.
    """
    for chosen, z in final_states(teacher, levels, step, seeds, shape, classes, batch, device, **options):
        noise, labels = draw(chosen, shape, classes)
        yield Pairs(noise, labels, teacher.path.to_pixels(z)[: len(chosen)].cpu())


class _Recomputed(ProbabilityFlow):
    """The flow, whose evaluations keep no activations: a gradient evaluates once more."""

    def flow(self, z: Tensor, sigma: Tensor) -> Tensor:
        if self.analytic_next:
            return super().flow(z, sigma)
        return checkpoint(super().flow, z, sigma, use_reentrant=False)


def student_images(
    denoiser: Denoiser,
    step: TunedStep,
    noise: Float[Tensor, "b c h w"],
    labels: Float[Tensor, "b k"] | None = None,
    recompute: bool = True,
    **options: Unpack[SolveOptions],
) -> Float[Tensor, "b c h w"]:
    """Sample images in pixels, with gradients in the step's numbers.

    Args:
        denoiser: frozen network over the path.
        step: at the present numbers.
        noise: standard normal, in pixels.
        labels: one-hot classes.
        recompute: keep the states between steps only, and evaluate the network again for the gradient (gradient
            checkpointing; Chen et al. 2016, arXiv:1604.06174): the memory of one evaluation, whatever the budget.
        options: `analytic_first` and `threshold`, see `ProbabilityFlow`.
    """
    problem = (_Recomputed if recompute else ProbabilityFlow)(denoiser, labels, **options)
    levels = step.levels.for_labels(labels)
    state = State(start(denoiser, noise, levels, labels))
    for k in range(levels.steps):
        state = step(problem, state, k, levels)
    return denoiser.path.to_pixels(state.z)


def squared_error(found: Float[Tensor, "b c h w"], taught: Float[Tensor, "b c h w"]) -> Float[Tensor, " b"]:
    """Squared distance in pixels, summed over an image."""
    return (found - taught).square().flatten(1).sum(1)


def feature_error(features: Callable[[Tensor], Tensor]) -> ImageLoss:
    """Loss that is the squared distance between features, summed over them.

    Args:
        features: differentiable features `[B, D]` of images in [-1, 1], `[B, C, H, W]`. With those of the network that
            a table's metric uses, the tuning would learn the metric.
    """

    def error(found: Tensor, taught: Tensor) -> Tensor:
        with torch.no_grad():
            there = features(taught)
        return (features(found) - there).square().sum(1)

    return error
