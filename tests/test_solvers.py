"""On Gaussian data the flow's solution is known: `x(t) = x(T) sqrt((lambda + g(t)) / (lambda + g(T)))`."""

import math

import pytest
import torch
from exact import SIDE, gaussian, measured_orders, mixture_over, solution, unequal_path

from anisodiff.errors import InvalidArgument, StageError
from anisodiff.experiment.budgets import steps_for_nfe
from anisodiff.experiment.settings import ImageSpace, MethodSettings
from anisodiff.grids.fixed import karras, uniform
from anisodiff.grids.levels import Levels
from anisodiff.methods import levels_of
from anisodiff.paths.noise_path import NoisePath, Warp
from anisodiff.paths.schedules import KnotSchedule
from anisodiff.paths.subspaces import Subspaces
from anisodiff.solvers.loop import solve
from anisodiff.solvers.registry import SOLVERS
from anisodiff.solvers.singlestep import ProbabilityFlow, State


def error(name: str, steps: int) -> float:
    path = unequal_path()
    model = gaussian(path)
    levels = uniform(path, steps + 1, append_zero=False)
    z = torch.ones(1, 1, SIDE, SIDE, dtype=torch.float64)
    return float((solve(model, z, levels, SOLVERS[name].with_order()) - solution(model, z, levels)).norm())


@pytest.mark.parametrize(("name", "order"), [("euler", 1.0), ("heun", 2.0), ("midpoint", 3.0)])
def test_order_of_convergence_on_gaussian_data(name, order):
    """On unequal levels. The midpoint gains an order on Gaussian data: its third-order error is
    `x (k'' + 6 k k' + 4 k^3) / 24` with `k = sigma / (lambda + sigma^2)`, which vanishes."""
    orders = measured_orders([error(name, steps) for steps in (64, 128, 256)])
    assert torch.allclose(orders, torch.full_like(orders, order), atol=0.12)


@pytest.mark.parametrize(("name", "order"), [("euler", 1.0), ("heun", 2.0), ("midpoint", 2.0)])
def test_order_of_convergence_on_a_mixture(name, order):
    """On unequal levels, against the same solver with very many steps."""
    logs = torch.tensor([[-2.0, 2.0], [-1.0, 1.5]], dtype=torch.float64)
    path = NoisePath(Subspaces(torch.tensor([[0, 1], [1, 1]])), KnotSchedule(logs))
    model, z, _ = mixture_over(path)
    step = SOLVERS[name].with_order()
    ends = {steps: solve(model, z, uniform(path, steps + 1, append_zero=False), step) for steps in (16, 32, 64)}
    truth = solve(model, z, uniform(path, 1025, append_zero=False), SOLVERS["midpoint"].with_order())
    orders = measured_orders([float((end - truth).norm()) for end in ends.values()])
    assert torch.allclose(orders, torch.full_like(orders, order), atol=0.2)


def noise_like(z: torch.Tensor, seed: int = 1):
    """A source of noise for stochastic solvers."""
    generator = torch.Generator().manual_seed(seed)
    return lambda: torch.randn(z.shape, generator=generator, dtype=z.dtype)


@pytest.mark.parametrize("name", [name for name, each in SOLVERS.items() if not each.tuned])
def test_exact_samples_in_the_limit(name):
    """Many steps turn the path's initial noise into draws whose variances are the data's."""
    path = unequal_path()
    model = gaussian(path)
    levels = uniform(path, 2001 if name in ("euler", "ipndm", "euler-maruyama") else 201, append_zero=False)
    first, last = (model.variances(levels.nodes[k].square()) for k in (0, -1))
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(20_000, 1, SIDE, SIDE, generator=generator, dtype=torch.float64) * (model.spectrum + first).sqrt()
    variances = solve(model, z, levels, SOLVERS[name].with_order(), source=noise_like(z)).var(0)
    assert torch.allclose(variances, (model.spectrum + last)[0], rtol=0.06)


@pytest.mark.parametrize("name", ["heun", "midpoint"])
def test_one_step_by_hand(name):
    """Signs and factors of one step, coefficient by coefficient (design; Eq. 17 and Lemma 6 corrected)."""
    path = unequal_path()
    model = gaussian(path)
    levels = uniform(path, 3, append_zero=False)
    z = torch.randn(2, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    state = SOLVERS[name].with_order()(ProbabilityFlow(model), State(z), 0, levels)
    sigma = lambda level: path.scale(torch.ones_like(z), level)  # noqa: E731
    now, then = sigma(levels.nodes[0]), sigma(levels.nodes[1])
    hat = then if name == "heun" else sigma(levels.inner[0])
    flow = lambda x, s: -s * x / (model.spectrum + s**2)  # noqa: E731
    f = flow(z, now)
    f_hat = flow(z - (hat - now) * f, hat)
    expected = z - (then - now) * f - (then - now) ** 2 / 2 / (hat - now) * (f_hat - f)
    assert torch.allclose(state.z, expected, atol=1e-12)


METHOD = MethodSettings(network="base", path="edm", grid="karras", solver="euler")


@pytest.mark.parametrize("afs", [False, True])
@pytest.mark.parametrize("append_zero", [None, False, True])
@pytest.mark.parametrize("solver", [name for name, each in SOLVERS.items() if not each.tuned])
@pytest.mark.parametrize("grid", ["karras", "log-snr", "vp-time", "path-time"])
def test_the_budget_is_what_is_spent(solver, grid, append_zero, afs):
    """Whatever the solver can spend; of two budgets that follow one another it can always spend one."""
    path = unequal_path()
    model = gaussian(path)
    method = METHOD.changed(solver=solver, grid=grid, append_zero=append_zero, afs=afs)
    z = torch.ones(1, 1, SIDE, SIDE, dtype=torch.float64)
    spent = []
    for nfe in (3, 4, 8, 9, 35):
        try:
            levels = levels_of(method, nfe, ImageSpace(), path)
        except StageError:
            continue
        before = model.evaluations
        solve(model, z, levels, SOLVERS[solver].with_order(), analytic_first=afs, source=noise_like(z))
        assert model.evaluations - before == nfe
        assert append_zero in (None, levels.ends_at_zero(levels.steps - 1))
        spent.append(nfe)
    assert {3, 4} & set(spent)
    assert len(spent) == 5 or (SOLVERS[solver].evaluations == 2 and len(spent) >= 2)


def test_last_step_to_zero_returns_the_denoised_image():
    path = unequal_path()
    model = gaussian(path)
    levels = uniform(path, 2)
    states = []
    z = torch.ones(1, 1, SIDE, SIDE, dtype=torch.float64)
    end = solve(model, z, levels, SOLVERS["midpoint"].with_order(), watch=lambda k, state: states.append(state.z))
    assert torch.allclose(end, model.denoise(states[-2], levels.nodes[-2].square()))
    assert not torch.equal(end, states[-2])


def test_inner_points_are_half_way_in_the_index():
    levels = karras(3, 1, 0.002, 80.0)
    roots = levels.nodes[:-1, 0, 0] ** (1 / 7)
    assert torch.allclose(levels.inner[:-1, 0, 0] ** (1 / 7), (roots[1:] + roots[:-1]) / 2)
    path = unequal_path()
    warp = Warp(path, knots=5)
    t = torch.tensor([0.75, 0.25], dtype=torch.float64)
    assert torch.allclose(uniform(path, 3, warp, False).inner[:, 0], path(warp(t)[0]).sigma)


@pytest.mark.parametrize("warped", [False, True])
def test_a_paths_grid_ends_at_its_last_level_before_a_step_to_zero(warped):
    """In the geometric mean over subspaces, so that the last evaluation has something to remove."""
    path = unequal_path()
    warp = Warp(path, knots=5) if warped else None
    found = uniform(path, 4, warp, last=0.3)
    assert float(path.mean_log(found.nodes[-2].square()) / 2) == pytest.approx(math.log(0.3))
    assert torch.equal(found.nodes[0], uniform(path, 4, warp).nodes[0])
    method = METHOD.changed(solver="midpoint", grid="path-time", last_level=0.3)
    space = ImageSpace()
    assert torch.equal(levels_of(method, 7, space, path).nodes, uniform(path, 4, last=0.3).nodes)
    even = levels_of(method, 6, space, path)  # no step to 0: down to t = 0
    assert torch.equal(even.nodes, uniform(path, 4, append_zero=False).nodes)
    deep = uniform(path, 4, last=1e-6)  # deeper than the path goes
    assert torch.equal(deep.nodes, uniform(path, 4).nodes)
    with pytest.raises(InvalidArgument, match="a last level of 9 is above the whole path"):
        uniform(path, 4, last=9.0)


def test_levels_must_fall():
    rising = torch.tensor([1.0, 2.0])[:, None, None]
    with pytest.raises(InvalidArgument, match="must fall"):
        Levels(rising, rising[:1])
    with pytest.raises(InvalidArgument, match="two nodes"):
        Levels(rising[:1], rising[:0])


@pytest.mark.parametrize(
    ("changes", "nfe", "words"),
    [
        ({"solver": "heun", "grid": "karras"}, 10, "ends in one step to 0 and takes odd budgets; use 9 or 11"),
        ({"solver": "heun", "grid": "karras", "afs": True}, 9, "takes even budgets"),
        ({"solver": "heun", "grid": "karras", "append_zero": False}, 9, "has no step to 0 and takes even budgets"),
        ({"solver": "midpoint", "grid": "path-time"}, 1, "midpoint needs 2 or more"),
        ({"solver": "ipndm", "grid": "karras", "order": 4}, 3, "ipndm of order 4 makes 3 steps with it"),
    ],
)  # fmt: skip
def test_a_budget_that_cannot_be_spent_says_why(changes, nfe, words):
    with pytest.raises(StageError, match=words):
        steps_for_nfe(nfe, METHOD.changed(**changes))
