"""Solvers by name, and the loop that runs them."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from anisodiff.denoiser import Denoiser
from anisodiff.errors import InvalidArgument
from anisodiff.grids.levels import Levels
from anisodiff.solvers.costs import EVALUATIONS, ORDERS, STOCHASTIC
from anisodiff.solvers.multistep import deis, dpmpp, exp_ab, ipndm, ipndm_v, unipc, unipc_bh1
from anisodiff.solvers.singlestep import NoiseSource, ProbabilityFlow, State, Step, dpm2, euler, heun, midpoint
from anisodiff.solvers.stochastic import euler_maruyama


@dataclass(frozen=True)
class Solver:
    """A solver's step, and what it costs.

    Attributes:
        step: takes one step, at the solver's own order; multistep solvers take an `order` up to `max_order`.
        evaluations: of the denoiser a step (a step to 0 costs one).
        max_order: highest order, and the usual one, of a multistep solver; None for others.
        stochastic: whether it adds noise at every step, and needs a source of it.
    """

    step: Callable[..., State]
    evaluations: int
    max_order: int | None = None
    stochastic: bool = False

    def with_order(self, order: int | None = None) -> Step:
        """The step of an order; None is the solver's usual one.

        Raises:
            InvalidArgument: it has no such order.
        """
        if self.max_order is None:
            if order is not None:
                raise InvalidArgument(f"order: {order} is not to be chosen for {self.step.__name__}: leave it out")
            return self.step
        if order is not None and not 1 <= order <= self.max_order:
            raise InvalidArgument(f"order: {self.step.__name__} has orders 1 to {self.max_order}, not {order}")
        return partial(self.step, order=order or self.max_order)


STEPS = {
    "euler": euler,
    "heun": heun,
    "midpoint": midpoint,
    "dpm2": dpm2,
    "dpmpp": dpmpp,
    "exp-ab": exp_ab,
    "unipc": unipc,
    "unipc-bh1": unipc_bh1,
    "deis": deis,
    "ipndm": ipndm,
    "ipndm-v": ipndm_v,
    "euler-maruyama": euler_maruyama,
}
SOLVERS = {
    name: Solver(step, EVALUATIONS.get(name, 1), ORDERS.get(name), name in STOCHASTIC) for name, step in STEPS.items()
}


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
        source: of a stochastic solver's noise, see `generation.Draws`; None serves the others.
    """
    problem = ProbabilityFlow(denoiser, labels, analytic_first, threshold)
    levels, state = levels.to(z.device), State(z, source=source)
    with torch.no_grad():
        for k in range(levels.steps):
            state = step(problem, state, k, levels)
            if watch is not None:
                watch(k, state)
    return state.z
