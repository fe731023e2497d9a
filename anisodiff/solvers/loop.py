"""The loop that runs a solver."""

from collections.abc import Callable
from typing import TypedDict

import torch
from jaxtyping import Float
from torch import Tensor

from anisodiff.denoiser import Denoiser
from anisodiff.grids.levels import Levels
from anisodiff.solvers.singlestep import NoiseSource, ProbabilityFlow, State, Step, midpoint


class SolveOptions(TypedDict, total=False):
    """Keyword arguments of `solve` that pass through others.

    Attributes:
        analytic_first: see `ProbabilityFlow`.
        threshold: see `ProbabilityFlow`.
    """

    analytic_first: bool
    threshold: bool


def solve(
    denoiser: Denoiser,
    z: Float[Tensor, "b c h w"],
    levels: Levels,
    step: Step = midpoint,
    labels: Float[Tensor, "b k"] | None = None,
    watch: Callable[[int, State], None] | None = None,
    analytic_first: bool = False,
    threshold: bool = False,
    source: NoiseSource | None = None,
) -> Float[Tensor, "b c h w"]:
    """Integrate from the first level to the last.

    Args:
        denoiser: over the path whose coefficients `z` are.
        z: noisy coefficients at the first level.
        levels: the grid.
        step: one step of a solver.
        labels: one-hot classes.
        watch: called with the index and state after every step.
        analytic_first: see `ProbabilityFlow`.
        threshold: see `ProbabilityFlow`.
        source: source of a stochastic solver's noise, see `generation.Draws`; None serves the others.
    """
    problem = ProbabilityFlow(denoiser, labels, analytic_first, threshold)
    levels, state = levels.to(z.device), State(z, source=source)
    with torch.no_grad():
        for k in range(levels.steps):
            state = step(problem, state, k, levels)
            if watch is not None:
                watch(k, state)
    return state.z
