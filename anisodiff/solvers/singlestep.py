"""Steps of the probability-flow ODE `dx = -flow d(M^{1/2})` on any levels (paper, Section 5.1, signs corrected).

A step is `(problem, state, k, levels) -> state`. It sees levels, never the name of a schedule. Here are those that
evaluate between nodes; those that remember earlier evaluations are in `multistep.py`.

The flow in one subspace changes with the noise in all of them. So what is extrapolated is a function of the
geometric-mean level, which every step lowers, and each subspace then moves by its own levels: one that slows down or
stands still is no division by nothing. Where all levels are equal these are the solvers as published.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from anisodiff.denoiser import Denoiser
from anisodiff.grids.levels import Levels

NoiseSource = Callable[[], Float[Tensor, "b c h w"]]  # every call draws anew: standard normal, in pixels

UNEVEN = 3.0  # a subspace goes unevenly where its slopes against the mean level differ by more


@dataclass(frozen=True)
class State:
    """What a solver carries from step to step.

    Attributes:
        z: noisy coefficients `[B, C, H, W]`.
        history: what it keeps of its earlier evaluations, flows or estimates of the clean image, the latest first.
        previous: coefficients at the node before, for solvers that correct their last step.
        source: what a stochastic solver draws its noise from.
    """

    z: Float[Tensor, "b c h w"]
    history: tuple[Float[Tensor, "b c h w"], ...] = ()
    previous: Float[Tensor, "b c h w"] | None = None
    source: NoiseSource | None = None


class ProbabilityFlow:
    """The flow over a path for fixed labels, and products with levels. Levels are `[B or 1, J]`.

    Args:
        denoiser: over the path.
        labels: one-hot classes.
        analytic_first: the first flow is `-x / sqrt(1 + sigma^2)`, the sample itself at unit variance, and costs no
            evaluation (analytic first step, AFS; Dockhorn et al. 2022, arXiv:2210.05475).
        threshold: estimates of the clean image are clipped at s = max(1, their 99.5 % quantile), and divided
            by it (dynamic thresholding; Saharia et al. 2022, arXiv:2205.11487).
    """

    def __init__(
        self,
        denoiser: Denoiser,
        labels: Float[Tensor, "b k"] | None = None,
        analytic_first: bool = False,
        threshold: bool = False,
    ):
        self.denoiser, self.labels, self.path = denoiser, labels, denoiser.path.for_labels(labels)
        self.scale = self.path.scale
        self.analytic_next, self.threshold = analytic_first, threshold

    def flow(self, z: Tensor, sigma: Tensor) -> Tensor:
        """The flow at levels `sigma`."""
        if self.analytic_next:
            self.analytic_next = False
            return self.analytic_flow(z, sigma)
        flow = self.denoiser.flow(z, sigma.square(), self.labels)
        return self.scale(self._clipped(z + self.scale(flow, sigma)) - z, 1 / sigma) if self.threshold else flow

    def analytic_flow(self, z: Tensor, sigma: Tensor) -> Tensor:
        """The direction that takes the flow's place in an analytic first step."""
        return -self.scale(z, (1 + sigma.square()).rsqrt())

    def denoised(self, z: Tensor, sigma: Tensor) -> Tensor:
        """The estimate of the clean image, in coefficients."""
        return z + self.scale(self.flow(z, sigma), sigma)

    def mean(self, sigma: Float[Tensor, "b j"]) -> Float[Tensor, "b 1"]:
        """Geometric-mean level: the variable that all subspaces share."""
        return (self.path.mean_log(sigma.square()) / 2).exp()[:, None]

    def _clipped(self, z: Tensor) -> Tensor:
        x = self.path.to_pixels(z)
        limit = x.abs().flatten(1).quantile(0.995, dim=1).clamp(min=1)[:, None, None, None]
        return self.path.from_pixels(x.clamp(-limit, limit) / limit)


Step = Callable[[ProbabilityFlow, State, int, Levels], State]


def euler(problem: ProbabilityFlow, state: State, k: int, levels: Levels) -> State:
    """First order; DDIM. One evaluation."""
    sigma, sigma_next = levels.nodes[k], levels.nodes[k + 1]
    flow = problem.flow(state.z, sigma)
    return State(state.z - problem.scale(flow, sigma_next - sigma), (flow,))


def _second_order(problem: ProbabilityFlow, state: State, k: int, levels: Levels, sigma_hat: Tensor) -> State:
    """`x - Delta f - curve (f_hat - f)` with f_hat at `x - delta f` (paper, Eq. 17 and Lemma 6; see `curve`).

    A step to 0 is a plain Euler step.
    """
    if levels.ends_at_zero(k):
        return euler(problem, state, k, levels)
    sigma, sigma_next = levels.nodes[k], levels.nodes[k + 1]
    step, delta = sigma_next - sigma, sigma_hat - sigma
    flow = problem.flow(state.z, sigma)
    change = problem.flow(state.z - problem.scale(flow, delta), sigma_hat) - flow
    mean, mean_hat, mean_next = (problem.mean(each) for each in (sigma, sigma_hat, sigma_next))
    bend = curve(delta, step, (mean_next - mean) / (mean_hat - mean))
    return State(state.z - problem.scale(flow, step) - problem.scale(change, bend))


def curve(delta: Tensor, step: Tensor, reach: Tensor) -> Tensor:
    """Weight of the flow's change in a second-order step: `1/2 Delta^2 delta^{-1}` (paper, Lemma 6) where it is sound.

    That takes the flow for linear in the subspace's own level. A subspace that slows down, or stands still while others
    move, is integrated with the flow linear in the mean level instead, in two straight pieces.

    Args:
        delta: how far the level goes to the evaluation point.
        step: how far it goes in the whole step.
        reach: the mean level's way in the whole step, in units of its way to the evaluation point.
    """
    first, rest = (reach - 1) * delta.abs(), (step - delta).abs()
    even = (first <= UNEVEN * rest) & (rest <= UNEVEN * first) & (delta != 0)
    own = step.square() / (2 * torch.where(even, delta, 1.0))
    return torch.where(even, own, delta / 2 + (step - delta) * (1 + reach) / 2)


def heun(problem: ProbabilityFlow, state: State, k: int, levels: Levels) -> State:
    """EDM's trapezoidal Heun: evaluation point at the next node. Two evaluations, one on a step to 0."""
    return _second_order(problem, state, k, levels, levels.nodes[k + 1])


def midpoint(problem: ProbabilityFlow, state: State, k: int, levels: Levels) -> State:
    """The paper's Heun: evaluation point at the grid's inner level. Two evaluations, one on a step to 0."""
    return _second_order(problem, state, k, levels, levels.inner[k])


def dpm2(problem: ProbabilityFlow, state: State, k: int, levels: Levels) -> State:
    """DPM-Solver-2: the flow at the geometric mean of the levels (Lu et al. 2022, arXiv:2206.00927, Algorithm 1).

    Two evaluations, one on a step to 0.
    """
    if levels.ends_at_zero(k):
        return euler(problem, state, k, levels)
    sigma, sigma_next = levels.nodes[k], levels.nodes[k + 1]
    sigma_hat = (sigma * sigma_next).sqrt()
    half = state.z - problem.scale(problem.flow(state.z, sigma), sigma_hat - sigma)
    return State(state.z - problem.scale(problem.flow(half, sigma_hat), sigma_next - sigma))
