"""Solvers that remember: one evaluation a step, and a polynomial through the last ones (orders up to 4).

The polynomial is in the mean level, in a variable of the solver's own, and every subspace integrates it over its own
levels (see `singlestep.py`): weights are `[B or 1, J]`. A solver starts with the orders that its history allows, and
makes a step to 0 as a plain Euler step. Adams-Bashforth solvers extrapolate the flow, `x_next = x - sum_i w_i flow_i`;
DPM-Solver++, UniPC and the exponential integrator the estimate of the clean image, in log sigma.
"""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from anisodiff.grids.fixed import VpTime
from anisodiff.grids.levels import Levels
from anisodiff.solvers.singlestep import UNEVEN, ProbabilityFlow, State

ADAMS_BASHFORTH = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))

Variable = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Theory:
    """The weights of a linear multistep solver, `z_next = carry z + sum_i w_i value_i`, in each subspace.

    Attributes:
        weights: of the values at `nodes`, the latest first, in the step from the first of them to `end`:
            `(nodes, end, mean)` to one `[B or 1, J]` a node. Of flows they are `-w_i`.
        of_flows: values are flows; or else estimates of the clean image, and the last steps are of lower order.
    """

    weights: Callable[[Sequence[Tensor], Tensor, Variable], list[Tensor]]
    of_flows: bool = False

    def step(self, levels: Levels, k: int, known: int, mean: Variable) -> tuple[Tensor | None, list[Tensor]]:
        """The state's weight, where it is not 1, and those of the values, the latest first, in step k.

        Args:
            levels: the grid.
            k: index of the step.
            known: number of values that may be used.
            mean: mean level `[B, 1]` of levels `[B, J]`.
        """
        start, end = levels.nodes[k], levels.nodes[k + 1]
        if levels.ends_at_zero(k):
            return (None, [start]) if self.of_flows else (torch.zeros_like(start), [torch.ones_like(start)])
        count = known if self.of_flows else min(known, levels.steps - k)
        weights = self.weights([levels.nodes[k - back] for back in range(count)], end, mean)
        return (None, [-each for each in weights]) if self.of_flows else (end / start, weights)


def _linear(problem: ProbabilityFlow, state: State, k: int, levels: Levels, order: int, theory: Theory) -> State:
    value = problem.flow if theory.of_flows else problem.denoised
    values = (value(state.z, levels.nodes[k]), *state.history)[:order]
    carry, weights = theory.step(levels, k, len(values), problem.mean)
    z = state.z if carry is None else problem.scale(state.z, carry)
    for each, weight in zip(values, weights, strict=False):
        z = z + problem.scale(each, weight)
    return State(z, values)


def ipndm(problem: ProbabilityFlow, state: State, k: int, levels: Levels, order: int) -> State:
    """Improved pseudo-numerical method: Adams-Bashforth with the weights of equal steps, on any steps.

    Zhang and Chen 2023 (arXiv:2204.13902). Of its order on levels that are uniform in sigma.
    """
    return _linear(problem, state, k, levels, order, THEORIES["ipndm"])


def ipndm_v(problem: ProbabilityFlow, state: State, k: int, levels: Levels, order: int) -> State:
    """Adams-Bashforth with the weights of the steps that are made: polynomials in sigma.

    From order 3 on the published code has other weights, by a misplaced bracket; these are the method's.
    """
    return _linear(problem, state, k, levels, order, THEORIES["ipndm-v"])


def deis(problem: ProbabilityFlow, state: State, k: int, levels: Levels, order: int) -> State:
    """DEIS-tAB: polynomials in the time of the variance-preserving process (Zhang and Chen 2023, arXiv:2204.13902)."""
    return _linear(problem, state, k, levels, order, THEORIES["deis"])


def dpmpp(problem: ProbabilityFlow, state: State, k: int, levels: Levels, order: int) -> State:
    """DPM-Solver++ 2M and 3M as published (Lu et al. 2022, arXiv:2211.01095), of order 2 both.

    The last steps are of lower order, as they advise. 3M takes half of the second derivative, `exp_ab` the whole.
    """
    return _linear(problem, state, k, levels, order, THEORIES["dpmpp"])


def exp_ab(problem: ProbabilityFlow, state: State, k: int, levels: Levels, order: int) -> State:
    """Exponential Adams-Bashforth: the polynomial through the estimates in log sigma, integrated exactly.

    DPM-Solver++(3M) with the whole of the second derivative, of order 3. The last steps are of lower order.
    """
    return _linear(problem, state, k, levels, order, THEORIES["exp-ab"])


def weights_of_equal_steps(nodes: Sequence[Tensor], end: Tensor, _: Variable) -> list[Tensor]:
    """Weights of flows: Adams and Bashforth's, as if the steps that were made were as long as this one."""
    return [(end - nodes[0]) * weight for weight in ADAMS_BASHFORTH[len(nodes) - 1]]


def weights_in_sigma(nodes: Sequence[Tensor], end: Tensor, mean: Variable) -> list[Tensor]:
    """Weights of flows: integrals over each subspace's level of the Lagrange polynomials in the mean level.

    Args:
        nodes: levels `[B, J]` at which flows are known, the latest first; the step starts there.
        end: levels at which it ends.
        mean: mean level `[B, 1]` of levels `[B, J]`.
    """
    means, last = [mean(node) for node in nodes], mean(end)
    course = _Course([nodes[0], end, *nodes[1:]], [means[0], last, *means[1:]])
    return _integrals(means, means[0], last, lambda at: course(at)[1])


def weights_in_vp_time(nodes: Sequence[Tensor], end: Tensor, mean: Variable) -> list[Tensor]:
    """The same with polynomials in the variance-preserving process's time at the mean level."""
    process = VpTime()
    means, last = [mean(node) for node in nodes], mean(end)
    course = _Course([nodes[0], end, *nodes[1:]], [means[0], last, *means[1:]])
    times = [process.time_at(each) for each in means]
    density = lambda time: course(process.sigma(time))[1] * process.rate(time)  # noqa: E731
    return _integrals(times, times[0], process.time_at(last), density)


def weights_of_estimates(nodes: Sequence[Tensor], start: Tensor, end: Tensor, mean: Variable) -> list[Tensor]:
    """Weights of estimates in `x_end = sigma_end / sigma_start x + sum_i w_i D_i`, an exponential integrator.

    They are integrals of `exp(lambda - lambda_end)` times the Lagrange polynomials in the mean of
    `lambda = -log sigma`, over each subspace's lambda.

    Args:
        nodes: levels `[B, J]` at which estimates are known; those between which the step is made may be among them.
        start: levels at which it starts.
        end: levels at which it ends.
        mean: mean level `[B, 1]` of levels `[B, J]`.
    """
    points = [start, end, *(node for node in nodes if node is not start and node is not end)]
    course = _Course([-each.log() for each in points], [-mean(each).log() for each in points])
    places = [-mean(node).log() for node in nodes]
    return _integrals(places, course.places[0], course.places[1], lambda at: _exponential_density(course, at))


def _exponential_density(course: "_Course", at: Tensor) -> Tensor:
    value, rate = course(at)
    return (value - course.end).exp() * rate


class _Course:
    """How each subspace goes while the mean level does: its coordinate and the rate, at the mean's coordinate.

    It is the polynomial through the points, or the straight line over the step where a subspace goes too unevenly for
    one: where it slows down or stands still, a polynomial would go up and down again.

    Args:
        values: coordinates `[B, J]` of the subspaces at the step's start, at its end, and before it, the latest first.
        places: coordinates `[B, 1]` of the mean level there.
    """

    def __init__(self, values: Sequence[Tensor], places: Sequence[Tensor]):
        self.places, self.end = places, values[1]
        in_turn = [1, 0, *range(2, len(values))]
        slopes = [(values[a] - values[b]) / (places[a] - places[b]) for a, b in itertools.pairwise(in_turn)]
        slowest, fastest = torch.stack(slopes).aminmax(dim=0)
        even = fastest <= UNEVEN * slowest
        self.coefficients = [values[0]]  # Newton's divided differences
        differences = list(values)
        for width in range(1, len(values)):
            pairs = enumerate(itertools.pairwise(differences))
            differences = [(right - left) / (places[first + width] - places[first]) for first, (left, right) in pairs]
            straight = width == 1
            self.coefficients.append(differences[0] if straight else torch.where(even, differences[0], 0.0))

    def __call__(self, at: Tensor) -> tuple[Tensor, Tensor]:
        value, rate = self.coefficients[-1], torch.zeros_like(at)
        for place, coefficient in zip(self.places[-2::-1], self.coefficients[-2::-1], strict=True):
            value, rate = value * (at - place) + coefficient, rate * (at - place) + value
        return value, rate


def _integrals(places: Sequence[Tensor], first: Tensor, last: Tensor, density: Variable) -> list[Tensor]:
    """Integrals from `first` to `last` of the Lagrange polynomials of `places` times a density, by quadrature."""
    roots, weights = (each.to(first)[:, None, None] for each in _gauss(12))
    at = first + (last - first) * (roots + 1) / 2
    measure = density(at) * weights * (last - first) / 2
    return [(_lagrange(places, each, at) * measure).sum(0) for each in range(len(places))]


@functools.cache
def _gauss(points: int) -> tuple[Tensor, Tensor]:
    """Points in [-1, 1] and weights of Gauss and Legendre."""
    roots, weights = np.polynomial.legendre.leggauss(points)
    return torch.from_numpy(roots), torch.from_numpy(weights)


def _lagrange(places: Sequence[Tensor], which: int, at: Tensor) -> Tensor:
    value = torch.ones_like(at)
    for other, place in enumerate(places):
        if other != which:
            value = value * (at - place) / (places[which] - place)
    return value


def weights_of_dpmpp(nodes: Sequence[Tensor], end: Tensor, mean: Variable) -> list[Tensor]:
    """Weights of estimates of DPM-Solver++, of up to three; see `weights_of_estimates`.

    Divided differences of the estimates in the log of the mean level, in units of the step, times the functions phi of
    each subspace's own step.

    Args:
        nodes: levels `[B, J]` at which estimates are known, the latest first; the step starts there.
        end: levels at which it ends.
        mean: mean level `[B, 1]` of levels `[B, J]`.
    """
    phi_1, phi_2, phi_3 = _phi((nodes[0] / end).log())
    logs = [mean(each).log() for each in (end, *nodes)]
    lengths = [(before - after) / (logs[1] - logs[0]) for after, before in itertools.pairwise(logs[1:])]
    if len(nodes) == 1:
        return [-phi_1]
    if len(nodes) == 2:
        slope = -phi_1 / (2 * lengths[0])
        return [slope - phi_1, -slope]
    near, far = lengths
    change = (phi_2 * near - phi_3) / (near + far)  # weight of the difference between the two slopes
    slope = (phi_2 + change) / near
    return [slope - phi_1, -slope - change / far, change / far]


def _phi(h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`phi_1 = exp(-h) - 1`, `phi_2 = phi_1 / h + 1`, `phi_3 = phi_2 / h - 1/2`, without cancellation at small h."""
    small = h < 0.5
    series = sum((-h) ** power / math.factorial(power + 2) for power in range(1, 15))
    phi_1, divisor = torch.expm1(-h), torch.where(small, 1.0, h)
    phi_3 = torch.where(small, series, (phi_1 / divisor + 1) / divisor - 0.5)
    return phi_1, h * (phi_3 + 0.5), phi_3


def _exponential_step(
    problem: ProbabilityFlow,
    z: Tensor,
    estimates: Sequence[Tensor],
    nodes: Sequence[Tensor],
    start: Tensor,
    end: Tensor,
) -> Tensor:
    """Step from levels `start` to `end` with the estimates at `nodes`."""
    z = problem.scale(z, end / start)
    weights = weights_of_estimates(nodes, start, end, problem.mean)
    for estimate, weight in zip(estimates, weights, strict=False):
        z = z + problem.scale(estimate, weight)
    return z


def unipc_bh1(problem: ProbabilityFlow, state: State, k: int, levels: Levels, order: int) -> State:
    """UniPC with B(h) = h, see `unipc`."""
    return _unipc(problem, state, k, levels, order, lambda h: -h)


def unipc(problem: ProbabilityFlow, state: State, k: int, levels: Levels, order: int) -> State:
    """UniPC with B(h) = exp(h) - 1 (Zhao et al. 2023, arXiv:2302.04867): each step is corrected by the next evaluation.

    The last steps are of lower order, and the last is not corrected. With three estimates or more it is the exponential
    integrator through them, whatever B; with two, the second weighs half of B.
    """
    return _unipc(problem, state, k, levels, order, lambda h: torch.expm1(-h))


def _unipc(problem: ProbabilityFlow, state: State, k: int, levels: Levels, order: int, scale_of) -> State:
    estimate = problem.denoised(state.z, levels.nodes[k])
    z = state.z
    if state.previous is not None:
        past = state.history[: min(order, levels.steps - k + 1)]
        z = _unipc_step(problem, state.previous, past, k - 1, levels, scale_of, estimate)
    estimates = (estimate, *state.history)[:order]
    if levels.ends_at_zero(k):
        return State(estimate, estimates)
    used = estimates[: levels.steps - k]
    return State(_unipc_step(problem, z, used, k, levels, scale_of), estimates, z)


def _unipc_step(
    problem: ProbabilityFlow,
    z: Tensor,
    estimates: Sequence[Tensor],
    k: int,
    levels: Levels,
    scale_of: Variable,
    target: Tensor | None = None,
) -> Tensor:
    """Step from node k to the next with estimates at node k and earlier; corrected, with one at the next node."""
    start, *earlier = (levels.nodes[k - back] for back in range(len(estimates)))
    end = levels.nodes[k + 1]
    nodes = [start, *earlier]
    if target is not None:
        nodes, estimates = [*nodes, end], [*estimates, target]
    if len(nodes) != 2:
        return _exponential_step(problem, z, estimates, nodes, start, end)
    first, last, other = (problem.mean(node).log() for node in (start, end, nodes[1]))
    h, place = (start / end).log(), (first - other) / (first - last)  # of the other estimate, in units of the step
    z = problem.scale(z, end / start) - problem.scale(estimates[0], torch.expm1(-h))
    return z - problem.scale(estimates[1] - estimates[0], scale_of(h) / (2 * place))


THEORIES = {
    "dpmpp": Theory(weights_of_dpmpp),
    "exp-ab": Theory(lambda nodes, end, mean: weights_of_estimates(nodes, nodes[0], end, mean)),
    "ipndm": Theory(weights_of_equal_steps, of_flows=True),
    "ipndm-v": Theory(weights_in_sigma, of_flows=True),
    "deis": Theory(weights_in_vp_time, of_flows=True),
}
