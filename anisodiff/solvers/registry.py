"""Solvers by name: one function and one line here make a new one."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from anisodiff.errors import InvalidArgument
from anisodiff.registry import Entry

if TYPE_CHECKING:
    from anisodiff.solvers.singlestep import State, Step


@dataclass(frozen=True)
class Solver(Entry):
    """A solver's step, and what it costs.

    Attributes:
        source: the function that takes one step: `(problem, state, k, levels) -> state`; multistep solvers take an
            `order` up to `max_order` besides.
        evaluations: evaluations of the denoiser a step (a step to 0 costs one).
        max_order: highest order, and the usual one, of a multistep solver; None for others.
        stochastic: whether it adds noise at every step, and needs a source of it.
        linear: whether its weights are functions of the levels alone (`multistep.THEORIES`), so that it can be tuned.
        tuned: whether its numbers are those of a tuning, for one budget: `source` is the class of such steps.
    """

    evaluations: int = 1
    max_order: int | None = None
    stochastic: bool = False
    linear: bool = False
    tuned: bool = False

    @property
    def step(self) -> "Callable[..., State]":
        """One step, at the solver's own order."""
        return self.load()

    def usual_order(self, order: int | None = None) -> int | None:
        """The order that is meant: the one given, or else the highest; None for solvers that have no choice."""
        return order or self.max_order

    def with_order(self, order: int | None = None) -> "Step":
        """The step of an order; None is the solver's usual one.

        Raises:
            InvalidArgument: it has no such order, or its numbers are in a file.
        """
        if self.tuned:
            raise InvalidArgument("solver: tuned has the numbers of a tuning: give its file")
        step = self.step
        if self.max_order is None:
            if order is not None:
                raise InvalidArgument(f"order: {order} is not to be chosen for {step.__name__}: leave it out")
            return step
        if order is not None and not 1 <= order <= self.max_order:
            raise InvalidArgument(f"order: {step.__name__} has orders 1 to {self.max_order}, not {order}")
        return partial(step, order=self.usual_order(order))


SOLVERS = {
    "euler": Solver("solvers.singlestep:euler"),
    "heun": Solver("solvers.singlestep:heun", evaluations=2),
    "midpoint": Solver("solvers.singlestep:midpoint", evaluations=2),
    "dpm2": Solver("solvers.singlestep:dpm2", evaluations=2),
    "dpmpp": Solver("solvers.multistep:dpmpp", max_order=3, linear=True),
    "exp-ab": Solver("solvers.multistep:exp_ab", max_order=3, linear=True),
    "unipc": Solver("solvers.multistep:unipc", max_order=3),
    "unipc-bh1": Solver("solvers.multistep:unipc_bh1", max_order=3),
    "deis": Solver("solvers.multistep:deis", max_order=4, linear=True),
    "ipndm": Solver("solvers.multistep:ipndm", max_order=4, linear=True),
    "ipndm-v": Solver("solvers.multistep:ipndm_v", max_order=4, linear=True),
    "tuned": Solver("solvers.tuned:TunedStep", tuned=True),
    "euler-maruyama": Solver("solvers.stochastic:euler_maruyama", stochastic=True),
}
