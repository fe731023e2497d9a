"""Solvers that remember: one evaluation a step, and a polynomial through the last ones (orders up to 4).

Every subspace has steps of its own, so weights are `[B or 1, J]`. A solver starts with the orders that its history
allows, and makes a step to 0 as a plain Euler step. Adams-Bashforth solvers extrapolate the flow,
`x_next = x - sum_i w_i flow_i`; DPM-Solver++ and UniPC the estimate of the clean image, in log sigma.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from anisodiff.grids import Levels, VpTime
from anisodiff.singlestep import Problem, State, euler

ADAMS_BASHFORTH = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))


def ipndm(problem: Problem, state: State, k: int, levels: Levels, order: int) -> State:
    """Improved pseudo-numerical method: Adams-Bashforth with the weights of equal steps, on any steps.

    Zhang and Chen 2023 (arXiv:2204.13902). Of its order on levels that are uniform in sigma.
    """

    def weights(nodes: Sequence[Tensor], sigma_next: Tensor) -> list[Tensor]:
        return [(sigma_next - nodes[0]) * weight for weight in ADAMS_BASHFORTH[len(nodes) - 1]]

    return _extrapolate_flow(problem, state, k, levels, order, weights)


def ipndm_v(problem: Problem, state: State, k: int, levels: Levels, order: int) -> State:
    """Adams-Bashforth with the weights of the steps that are made: polynomials in sigma."""
    return _extrapolate_flow(problem, state, k, levels, order, _weights_in_sigma)


def deis(problem: Problem, state: State, k: int, levels: Levels, order: int) -> State:
    """DEIS-tAB: polynomials in the time of the variance-preserving process (Zhang and Chen 2023, arXiv:2204.13902)."""
    return _extrapolate_flow(problem, state, k, levels, order, _weights_in_vp_time)


def _extrapolate_flow(problem: Problem, state: State, k: int, levels: Levels, order: int, weights) -> State:
    if levels.is_to_zero(k):
        return euler(problem, state, k, levels)
    flows = (problem.flow(state.z, levels.nodes[k]), *state.past)[:order]
    nodes = [levels.nodes[k - back] for back in range(len(flows))]
    z = state.z
    for flow, weight in zip(flows, weights(nodes, levels.nodes[k + 1]), strict=True):
        z = z - problem.scale(flow, weight)
    return State(z, flows)


def _weights_in_sigma(nodes: Sequence[Tensor], sigma_next: Tensor) -> list[Tensor]:
    """Integrals of the Lagrange polynomials over sigma; two points of Gauss are exact to degree 3."""
    points, gauss = _gauss(2, nodes[0], sigma_next)
    return [(_lagrange(nodes, each, points) * gauss).sum(0) for each in range(len(nodes))]


def _weights_in_vp_time(nodes: Sequence[Tensor], sigma_next: Tensor) -> list[Tensor]:
    """Integrals over sigma of the Lagrange polynomials in the process's time; twelve points of Gauss."""
    time = VpTime()
    times = [time.of(node) for node in nodes]
    points, gauss = _gauss(12, times[0], time.of(sigma_next))
    rate = time.rate(points)
    return [(_lagrange(times, each, points) * rate * gauss).sum(0) for each in range(len(nodes))]


def _gauss(count: int, start: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
    """Points `[count, B, J]` and weights of Gauss-Legendre quadrature from `start` to `end`."""
    at, weights = (torch.from_numpy(each).to(start)[:, None, None] for each in np.polynomial.legendre.leggauss(count))
    return start + (end - start) * (at + 1) / 2, weights * (end - start) / 2


def _lagrange(nodes: Sequence[Tensor], which: int, at: Tensor) -> Tensor:
    value = torch.ones_like(at)
    for other, node in enumerate(nodes):
        if other != which:
            value = value * (at - node) / (nodes[which] - node)
    return value


def dpmpp(problem: Problem, state: State, k: int, levels: Levels, order: int) -> State:
    """DPM-Solver++ 2M and 3M (Lu et al. 2022, arXiv:2211.01095). The last steps are of lower order, as they advise.

    3M takes the whole second derivative; the published code takes half of it, and is of order 2 (measured).
    """
    if levels.is_to_zero(k):
        return euler(problem, state, k, levels)
    sigma, sigma_next = levels.nodes[k], levels.nodes[k + 1]
    estimates = (problem.denoised(state.z, sigma), *state.past)[:order]
    used = estimates[: levels.steps - k]
    h = (sigma / sigma_next).log()
    # lengths of the steps before, in units of this one
    r = [(levels.nodes[k - back - 1] / levels.nodes[k - back]).log() / h for back in range(len(used) - 1)]
    phi_1 = torch.expm1(-h)
    z = problem.scale(state.z, sigma_next / sigma) - problem.scale(used[0], phi_1)
    if len(used) == 2:
        z = z - problem.scale(used[0] - used[1], phi_1 / (2 * r[0]))
    elif len(used) == 3:
        phi_2 = phi_1 / h + 1
        phi_3 = phi_2 / h - 0.5
        near = problem.scale(used[0] - used[1], 1 / r[0])
        change = near - problem.scale(used[1] - used[2], 1 / r[1])
        slope = near + problem.scale(change, r[0] / (r[0] + r[1]))
        z = z + problem.scale(slope, phi_2) - problem.scale(change, 2 * phi_3 / (r[0] + r[1]))
    return State(z, estimates)


def unipc_bh1(problem: Problem, state: State, k: int, levels: Levels, order: int) -> State:
    """UniPC with B(h) = h, see `unipc`."""
    return _unipc(problem, state, k, levels, order, lambda h: -h)


def unipc(problem: Problem, state: State, k: int, levels: Levels, order: int) -> State:
    """UniPC with B(h) = exp(h) - 1 (Zhao et al. 2023, arXiv:2302.04867): each step is corrected by the next evaluation.

    The last steps are of lower order, and the last is not corrected.
    """
    return _unipc(problem, state, k, levels, order, lambda h: torch.expm1(-h))


def _unipc(problem: Problem, state: State, k: int, levels: Levels, order: int, scale_of) -> State:
    estimate = problem.denoised(state.z, levels.nodes[k])
    z = state.z
    if state.before is not None:
        lower = min(order, levels.steps - k + 1)
        z = _unipc_step(problem, state.before, state.past[:lower], k - 1, levels, scale_of, estimate)
    estimates = (estimate, *state.past)[:order]
    if levels.is_to_zero(k):
        return State(estimate, estimates)
    used = estimates[: levels.steps - k]
    return State(_unipc_step(problem, z, used, k, levels, scale_of), estimates, z)


def _unipc_step(
    problem: Problem,
    z: Tensor,
    estimates: Sequence[Tensor],
    k: int,
    levels: Levels,
    scale_of,
    target: Tensor | None = None,
) -> Tensor:
    """From node k to the next with the estimates at node k and before it; with the one at the next node, corrected."""
    sigma, sigma_next = levels.nodes[k], levels.nodes[k + 1]
    h = (sigma / sigma_next).log()
    scale = scale_of(h)
    # places of the other estimates, in units of the step from node k
    places = [(sigma / levels.nodes[k - back]).log() / h for back in range(1, len(estimates))]
    others = list(estimates[1:])
    if target is not None:
        places, others = [*places, torch.ones_like(h)], [*others, target]
    end = problem.scale(z, sigma_next / sigma) - problem.scale(estimates[0], torch.expm1(-h))
    for place, other, weight in zip(places, others, _unipc_weights(places, h, scale), strict=True):
        end = end - problem.scale(other - estimates[0], scale * weight / place)
    return end


def _unipc_weights(places: Sequence[Tensor], h: Tensor, scale: Tensor) -> list[Tensor]:
    """Solve for weights that match the Taylor series of the exact step; a single one is 1/2."""
    count = len(places)
    if count == 0:
        return []
    if count == 1:
        return [torch.full_like(h, 0.5)]
    rows, right, phi = [], [], torch.expm1(-h) / -h - 1
    for power in range(1, count + 1):
        rows.append(torch.stack([place ** (power - 1) for place in places], -1))
        right.append(phi * math.factorial(power) / scale)
        phi = phi / -h - 1 / math.factorial(power + 1)
    solved = torch.linalg.solve(torch.stack(rows, -2), torch.stack(right, -1))
    return list(solved.unbind(-1))
