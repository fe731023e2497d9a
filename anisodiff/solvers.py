"""Solvers of the probability-flow ODE `dx = -flow d(M^{1/2})` on any levels (paper, Section 5.1, signs corrected).

A step is `(flow, state, k, levels) -> state`. It sees levels, never the name of a schedule.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from anisodiff.denoiser import Denoiser
from anisodiff.grids import Levels


@dataclass(frozen=True)
class State:
    """What a solver carries from step to step.

    Attributes:
        z: noisy coefficients `[B, C, H, W]`.
        flow: the flow at the start of the step just made.
    """

    z: Float[Tensor, "b c h w"]
    flow: Float[Tensor, "b c h w"] | None = None


class Problem:
    """The flow over a path for fixed labels, and products with levels. Levels are `[B or 1, J]`."""

    def __init__(self, denoiser: Denoiser, labels: Float[Tensor, "b k"] | None = None):
        self.denoiser, self.labels, self.scale = denoiser, labels, denoiser.path.of(labels).scale

    def flow(self, z: Tensor, sigma: Tensor) -> Tensor:
        return self.denoiser.flow(z, sigma.square(), self.labels)


Step = Callable[[Problem, State, int, Levels], State]


def euler(problem: Problem, state: State, k: int, levels: Levels) -> State:
    """First order; DDIM. One evaluation."""
    sigma, sigma_next = levels.nodes[k], levels.nodes[k + 1]
    flow = problem.flow(state.z, sigma)
    return State(state.z - problem.scale(flow, sigma_next - sigma), flow)


def _second_order(problem: Problem, state: State, k: int, levels: Levels, sigma_hat: Tensor) -> State:
    """`x - Delta f - 1/2 Delta^2 delta^{-1} (f_hat - f)` with f_hat at `x - delta f` (paper, Eq. 17 and Lemma 6).

    A step to 0 is a plain Euler step.
    """
    if k + 1 == levels.steps and levels.ends_at_zero:
        return euler(problem, state, k, levels)
    sigma = levels.nodes[k]
    step, delta = levels.nodes[k + 1] - sigma, sigma_hat - sigma
    flow = problem.flow(state.z, sigma)
    flow_hat = problem.flow(state.z - problem.scale(flow, delta), sigma_hat)
    curve = problem.scale(flow_hat - flow, step.square() / (2 * delta))
    return State(state.z - problem.scale(flow, step) - curve, flow)


def heun(problem: Problem, state: State, k: int, levels: Levels) -> State:
    """EDM's trapezoidal Heun: evaluation point at the next node. Two evaluations, one on a step to 0."""
    return _second_order(problem, state, k, levels, levels.nodes[k + 1])


def midpoint(problem: Problem, state: State, k: int, levels: Levels) -> State:
    """The paper's Heun: evaluation point at the grid's inner level. Two evaluations, one on a step to 0."""
    return _second_order(problem, state, k, levels, levels.inner[k])


@dataclass(frozen=True)
class Solver:
    """A solver's step, and the denoiser evaluations that a step costs (one to 0 costs a single one)."""

    step: Step
    evaluations: int


SOLVERS = {"euler": Solver(euler, 1), "heun": Solver(heun, 2), "midpoint": Solver(midpoint, 2)}


def solve(
    denoiser: Denoiser,
    z: Float[Tensor, "b c h w"],
    levels: Levels,
    step: Step = midpoint,
    labels: Float[Tensor, "b k"] | None = None,
    watch: Callable[[int, State], None] | None = None,
) -> Float[Tensor, "b c h w"]:
    """Integrate from the first level to the last.

    Args:
        denoiser: over the path whose coefficients `z` are.
        z: noisy coefficients at the first level.
        levels: the grid.
        step: one step of a solver.
        labels: one-hot classes.
        watch: called with the index and state after every step.
    """
    problem = Problem(denoiser, labels)
    moved = Levels(levels.nodes.to(z.device), levels.inner.to(z.device))
    state = State(z)
    with torch.no_grad():
        for k in range(levels.steps):
            state = step(problem, state, k, moved)
            if watch is not None:
                watch(k, state)
    return state.z
