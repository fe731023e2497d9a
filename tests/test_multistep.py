"""Multistep solvers against exact Gaussian trajectories, with exact history; and against Euler where they agree."""

import itertools
import math

import pytest
import torch
from exact import SIDE, gaussian, measured_orders, mixture_over, unequal_path

from anisodiff.errors import InvalidArgument
from anisodiff.grids.fixed import VpTime, given, karras, log_snr, time_uniform, uniform
from anisodiff.grids.levels import Levels, at
from anisodiff.paths.noise_path import NoisePath
from anisodiff.paths.schedules import KnotSchedule
from anisodiff.paths.subspaces import Subspaces
from anisodiff.solvers.loop import solve
from anisodiff.solvers.multistep import (
    ADAMS_BASHFORTH,
    _phi,
    weights_in_sigma,
    weights_in_vp_time,
    weights_of_equal_steps,
    weights_of_estimates,
)
from anisodiff.solvers.registry import SOLVERS
from anisodiff.solvers.singlestep import ProbabilityFlow, State

OF_ESTIMATES = ("dpmpp", "exp-ab", "unipc", "unipc-bh1")


def exact(model, levels: Levels) -> list[torch.Tensor]:
    """States at every node of a trajectory."""
    first = model.variances(levels.nodes[0].square())
    ones = torch.ones(1, 1, SIDE, SIDE, dtype=torch.float64)
    at = lambda k: model.variances(levels.nodes[k].square())  # noqa: E731
    return [ones * ((model.spectrum + at(k)) / (model.spectrum + first)).sqrt() for k in range(len(levels.nodes))]


def error(name: str, order: int, levels: Levels) -> float:
    """From a quarter of the grid to three quarters, started with exact history."""
    model = gaussian(unequal_path())
    states, problem, step = exact(model, levels), ProbabilityFlow(model), SOLVERS[name].with_order(order)
    first, last = levels.steps // 4, levels.steps * 3 // 4
    value = problem.denoised if name in OF_ESTIMATES else problem.flow
    past = tuple(value(states[k], levels.nodes[k]) for k in range(first - 1, first - 1 - order, -1))
    state = State(states[first], past[: max(order - 1, 1)], states[first - 1] if name.startswith("unipc") else None)
    for k in range(first, last):
        state = step(problem, state, k, levels)
    return float((state.z - states[last]).norm())


CASES = [
    *((name, order, order) for name in ("ipndm-v", "deis") for order in (1, 2, 3, 4)),
    *(("exp-ab", order, order) for order in (1, 2, 3)),
    *(("dpmpp", order, min(order, 2)) for order in (1, 2, 3)),  # half of the second derivative costs 3M its third
    *((name, order, order + 1) for name in ("unipc", "unipc-bh1") for order in (2, 3)),  # the corrector adds one
]


@pytest.mark.parametrize(("name", "order", "nominal"), CASES)
def test_order_of_convergence_with_exact_history(name, order, nominal):
    """On levels that differ between subspaces."""
    errors = [error(name, order, uniform(unequal_path(), steps + 1, append_zero=False)) for steps in (64, 128, 256)]
    assert (measured_orders(errors) > nominal - 0.25).all()


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_constant_coefficients_have_their_order_on_equal_steps(order):
    errors = [
        error("ipndm", order, karras(steps + 1, 2, 0.05, 8.0, rho=1.0, append_zero=False)) for steps in (64, 128, 256)
    ]
    assert (measured_orders(errors) > order - 0.25).all()
    if order > 2:  # and 2 on steps that change smoothly
        errors = [
            error("ipndm", order, log_snr(steps + 1, 2, 0.05, 8.0, append_zero=False)) for steps in (64, 128, 256)
        ]
        assert torch.allclose(measured_orders(errors), torch.full((2,), 2.0), atol=0.2)


@pytest.mark.parametrize("name", ["ipndm-v", "deis", "dpmpp", "unipc"])
def test_order_two_from_its_own_start(name):
    """The first step is Euler's, which costs every multistep solver the orders above two."""
    path = unequal_path()
    model = gaussian(path)
    errors = []
    for steps in (128, 256, 512):
        levels = uniform(path, steps + 1, append_zero=False)
        states = exact(model, levels)
        errors.append(float((solve(model, states[0], levels, SOLVERS[name].with_order()) - states[-1]).norm()))
    orders = measured_orders(errors)
    assert torch.allclose(orders, torch.full_like(orders, 2.0), atol=0.4)


def mean(levels: torch.Tensor) -> torch.Tensor:
    return levels.log().mean(-1, keepdim=True).exp()


def column(*levels: float) -> list[torch.Tensor]:
    """Equal levels in two subspaces, one node each."""
    return [torch.full((1, 2), level, dtype=torch.float64) for level in levels]


def test_weights_of_equal_steps_are_adams_bashforth():
    nodes, end = column(4.0, 5.0, 6.0, 7.0), column(3.0)[0]
    for order in (1, 2, 3, 4):
        expected = torch.tensor(ADAMS_BASHFORTH[order - 1], dtype=torch.float64)
        for found in (weights_in_sigma(nodes[:order], end, mean), weights_of_equal_steps(nodes[:order], end, mean)):
            assert torch.allclose(torch.cat(found), -expected[:, None].expand(-1, 2))


def test_weights_integrate_polynomials_exactly():
    """A flow that is a cubic in sigma, or in the process's time, is integrated without error."""
    nodes, (end,) = column(2.0, 2.5, 3.5, 5.0), column(1.2)
    found = sum(weight * node**3 for weight, node in zip(weights_in_sigma(nodes, end, mean), nodes, strict=True))
    assert torch.allclose(found, (end**4 - nodes[0] ** 4) / 4)
    weights = weights_in_vp_time(nodes, end, mean)
    found = sum(weight * VpTime().time_at(node) ** 2 for weight, node in zip(weights, nodes, strict=True))
    fine = torch.linspace(0, 1, 200_001, dtype=torch.float64)[:, None, None]
    sigma = nodes[0] + (end - nodes[0]) * fine
    expected = torch.trapezoid(VpTime().time_at(sigma) ** 2, sigma, dim=0)
    assert torch.allclose(found, expected, rtol=1e-8)


def test_weights_of_estimates_are_the_exponential_integrators():
    """Where levels are equal: integrals of `exp(-(h - s))` times the polynomials through the estimates."""
    nodes, (end,) = column(2.0, 3.0, 5.0), column(0.7)
    h = float((nodes[0] / end).log()[0, 0])
    places = [-math.log(float(node[0, 0]) / 2.0) for node in nodes]
    fine = torch.linspace(0, h, 200_001, dtype=torch.float64)
    expected = []
    for which in range(3):
        others = [place for other, place in enumerate(places) if other != which]
        polynomial = torch.stack([(fine - other) / (places[which] - other) for other in others]).prod(0)
        expected.append(torch.trapezoid((fine - h).exp() * polynomial, fine))
    found = torch.cat(weights_of_estimates(nodes, nodes[0], end, mean))
    assert torch.allclose(found, torch.stack(expected)[:, None].expand(-1, 2), rtol=1e-8)


def test_phi_has_no_cancellation():
    """Against the integrals that they are: `-int_0^h exp(-s) ds` and its means."""
    h = torch.tensor([0.0, 1e-12, 1e-4, 0.49, 0.51, 9.0], dtype=torch.float64)
    phi_1, phi_2, phi_3 = _phi(h)
    share = torch.linspace(0, 1, 100_001, dtype=torch.float64)[:, None]
    decay = (-h * (1 - share)).exp()
    assert torch.allclose(phi_1, -h * torch.trapezoid(decay, share, dim=0), rtol=1e-8)
    assert torch.allclose(phi_2, h * torch.trapezoid(decay * share, share, dim=0), rtol=1e-8)
    assert torch.allclose(phi_3, -h * torch.trapezoid(decay * share**2, share, dim=0) / 2, rtol=1e-8)


def test_time_of_the_variance_preserving_process_inverts():
    sigma = torch.logspace(-2.5, 2, 30, dtype=torch.float64, requires_grad=True)
    process = VpTime()
    time = process.time_at(sigma)
    assert torch.allclose(process.sigma(time), sigma)
    ends = process.time_at(torch.tensor([0.002, 80.0], dtype=torch.float64))
    assert torch.allclose(ends, torch.tensor([1e-3, 1.0], dtype=torch.float64))
    assert torch.allclose(process.rate(time) * torch.autograd.grad(time.sum(), sigma)[0], torch.ones_like(sigma))


@pytest.mark.parametrize("name", [name for name, solver in SOLVERS.items() if solver.max_order])
def test_first_order_is_euler(name):
    """UniPC's too, but for its corrector, which needs a second step."""
    path = unequal_path()
    model = gaussian(path)
    levels = uniform(path, 2 if name.startswith("unipc") else 5, append_zero=False)
    z = torch.ones(1, 1, SIDE, SIDE, dtype=torch.float64)
    assert torch.allclose(
        solve(model, z, levels, SOLVERS[name].with_order(1)), solve(model, z, levels, SOLVERS["euler"].with_order())
    )


@pytest.mark.parametrize("name", [name for name, each in SOLVERS.items() if not each.tuned])
def test_a_point_mass_is_found_in_one_denoising(name):
    """Data of no spread: the estimate is exact at every level, and every solver's last step to 0 returns it."""
    path = unequal_path()
    model = gaussian(path)
    model.spectrum = torch.zeros_like(model.spectrum)
    levels = karras(6, 2, 0.02, 8.0)
    z = torch.ones(1, 1, SIDE, SIDE, dtype=torch.float64)
    end = solve(model, z, levels, SOLVERS[name].with_order(), source=lambda: torch.ones_like(z))
    assert end.abs().max() < 1e-12


def test_the_analytic_first_step_costs_nothing():
    path = unequal_path()
    model = gaussian(path)
    levels = uniform(path, 6, append_zero=False)
    z = torch.ones(2, 1, SIDE, SIDE, dtype=torch.float64)
    states = []
    solve(
        model,
        z,
        levels,
        SOLVERS["ipndm"].with_order(),
        watch=lambda k, state: states.append(state.z),
        analytic_first=True,
    )
    assert model.evaluations == 4
    sigma, after = (path.scale(torch.ones_like(z), levels.nodes[k]) for k in (0, 1))
    assert torch.allclose(states[0], z + (after - sigma) * z / (1 + sigma**2).sqrt())
    model.spectrum = torch.ones_like(model.spectrum)  # of unit variance the guess is sqrt(1 + s^2) / s times the flow
    assert torch.allclose(ProbabilityFlow(model, None, True).flow(z, levels.nodes[0]) * sigma / (1 + sigma**2).sqrt(),
                          model.flow(z, levels.nodes[0].square()))  # fmt: skip


def test_thresholding_keeps_estimates_in_range():
    path = unequal_path()
    model = gaussian(path)
    z = 50 * torch.randn(3, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sigma = torch.full((1, 2), 0.1, dtype=torch.float64)
    assert path.to_pixels(ProbabilityFlow(model).denoised(z, sigma)).abs().max() > 10
    assert path.to_pixels(ProbabilityFlow(model, threshold=True).denoised(z, sigma)).abs().max() <= 1 + 1e-12
    small = z / 500
    torch.testing.assert_close(
        ProbabilityFlow(model, threshold=True).flow(small, sigma), ProbabilityFlow(model).flow(small, sigma)
    )


def test_grids_by_their_definitions():
    flat = karras(5, 1, 1.0, 9.0, rho=1.0, append_zero=False)
    assert flat.nodes.flatten().tolist() == [9, 7, 5, 3, 1]
    logs = log_snr(4, 1, 1.0, 8.0, append_zero=False).nodes.flatten()
    assert torch.allclose(logs, torch.tensor([8.0, 4.0, 2.0, 1.0], dtype=torch.float64))
    times = VpTime().time_at(time_uniform(5, 1, 0.002, 80.0, append_zero=False).nodes.flatten())
    assert torch.allclose(times.diff(), times.diff()[:1].expand(4))
    assert given([80.0, 1.0, 0.0], 2).ends_at_zero(1)
    with pytest.raises(InvalidArgument, match="must fall"):
        given([1.0, 2.0], 1)


@pytest.mark.parametrize(
    ("grid", "published"),
    [
        (time_uniform, [80.0000, 16.5063, 4.7464, 1.7541, 0.6502, 0.0020]),
        (time_uniform, [80.0, 34.8018, 16.5063, 8.5141, 4.7464, 2.8237, 1.7541, 1.0985, 0.6502, 0.3047, 0.0020]),
        (log_snr, [80.0000, 9.6090, 1.1542, 0.1386, 0.0167, 0.0020]),
        (log_snr, [80.0, 27.7258, 9.6090, 3.3302, 1.1542, 0.4000, 0.1386, 0.0480, 0.0167, 0.0058, 0.0020]),
        (karras, [80.0000, 24.4083, 5.8389, 0.9654, 0.0851, 0.0020]),
        (karras, [80.0, 45.3137, 24.4083, 12.3816, 5.8389, 2.5152, 0.9654, 0.3183, 0.0851, 0.0167, 0.0020]),
    ],
)
def test_grids_are_the_published_ones(grid, published):
    """GITS (arXiv:2506.10177), Table 9: uniform, log-SNR and polynomial grids on CIFAR-10."""
    found = grid(len(published), 1, 0.002, 80.0, append_zero=False).nodes.flatten()
    assert torch.allclose(found, torch.tensor(published, dtype=torch.float64), rtol=1e-3, atol=6e-5)


def test_orders_that_a_solver_has_not():
    with pytest.raises(InvalidArgument, match="order: dpmpp has orders 1 to 3, not 4"):
        SOLVERS["dpmpp"].with_order(4)
    with pytest.raises(InvalidArgument, match="order: 2 is not to be chosen for heun"):
        SOLVERS["heun"].with_order(2)


def stalling(share: float) -> Levels:
    """Six steps, in one of which the second subspace falls by a share of its usual step."""
    ends = torch.tensor([[2.0, 1.5], [-2.0, -1.0]], dtype=torch.float64) / 2
    logs = torch.lerp(ends[0], ends[1], torch.linspace(0, 1, 7, dtype=torch.float64)[:, None])
    steps = logs.diff(dim=0)
    whole = float(steps[:, 1].sum())
    steps[3, 1] *= share
    others = [0, 1, 2, 4, 5]
    steps[others, 1] = (whole - steps[3, 1]) / 5
    return at(torch.cat([logs[:1], logs[0] + steps.cumsum(0)]).exp()[:, None])


@pytest.mark.parametrize("share", [0.0, 1e-3, 0.5])
def test_a_subspace_may_slow_down_or_stand_still(share):
    """The flow there changes with the other subspace's noise: no solver divides by a step that is hardly made.

    Against Heun with very many steps along the same levels, linear in log sigma between nodes. Own steps as the
    variable give errors of 6 to 31 at a share of 1e-3.
    """
    logs = torch.tensor([[-2.0, 2.0], [-1.0, 1.5]], dtype=torch.float64)
    path = NoisePath(Subspaces(torch.tensor([[0, 1], [1, 1]])), KnotSchedule(logs))
    model, z, _ = mixture_over(path)
    levels = stalling(share)
    parts = torch.linspace(0, 1, 101, dtype=torch.float64)[:-1, None, None]
    between = [torch.lerp(a.log(), b.log(), parts).exp() for a, b in itertools.pairwise(levels.nodes)]
    truth = solve(model, z, at(torch.cat([*between, levels.nodes[-1:]])), SOLVERS["heun"].with_order())
    euler = float((solve(model, z, levels, SOLVERS["euler"].with_order()) - truth).norm())
    for name, solver in SOLVERS.items():
        if name != "euler" and not (solver.stochastic or solver.tuned):
            assert float((solve(model, z, levels, SOLVERS[name].with_order()) - truth).norm()) < 0.5 * euler, name


def test_levels_say_which_step_and_subspace_is_wrong():
    levels = lambda rows: Levels(torch.tensor(rows)[:, None], torch.ones(len(rows) - 1, 1, 2))  # noqa: E731
    assert levels([[4.0, 4.0], [3.0, 4.0], [0.0, 0.0]]).steps == 2
    with pytest.raises(InvalidArgument, match="must fall: step 1 of subspace 1 rises"):
        levels([[4.0, 4.0], [3.0, 3.0], [2.0, 3.5]])
    with pytest.raises(InvalidArgument, match="must fall: in step 1 no subspace does"):
        levels([[4.0, 4.0], [3.0, 3.0], [3.0, 3.0]])
    with pytest.raises(InvalidArgument, match="above 0, but for a last one of 0 in all subspaces"):
        levels([[4.0, 4.0], [3.0, 3.0], [1.0, 0.0]])
