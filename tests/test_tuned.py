"""Tuned solvers: they start as the solvers that they correct, and tuning finds what brute force finds."""

import itertools
import math

import numpy as np
import pytest
import torch
from exact import SIDE, ExactGaussian, gaussian, measured_orders, solution, unequal_path
from scipy import optimize
from small_network import denoiser

from anisodiff.errors import InvalidArgument
from anisodiff.grids.fixed import given, karras, log_snr, uniform
from anisodiff.grids.learned import CurveLevels, FreeLevels, curve_through, resampled
from anisodiff.grids.levels import Levels, at
from anisodiff.objectives.tuning import (
    Pairs,
    feature_error,
    joined,
    squared_error,
    student_images,
    teacher_pairs,
)
from anisodiff.paths.noise_path import NoisePath, edm_path
from anisodiff.paths.principal import PcaSubspaces
from anisodiff.paths.schedules import KnotSchedule, karras_logs
from anisodiff.paths.subspaces import Subspaces, partition
from anisodiff.solvers.generation import draw, generate
from anisodiff.solvers.loop import solve
from anisodiff.solvers.registry import SOLVERS
from anisodiff.solvers.trajectories import record_trajectory
from anisodiff.solvers.tuned import TunedSolver
from anisodiff.training.tuning import mean_error, tuning_plan, tuning_work


def tuned(path: NoisePath, levels: Levels, per_subspace: bool = False, **options) -> TunedSolver:
    return TunedSolver(path, FreeLevels(levels, per_subspace), per_subspace=per_subspace, **options)


def moved(solver: TunedSolver, by: float = 0.3) -> TunedSolver:
    """The solver with random corrections."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in solver.parameters():
            parameter += by * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return solver


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def one_hot(*classes: int) -> torch.Tensor:
    return torch.nn.functional.one_hot(torch.tensor(classes), 3).double()


def colour_denoiser():
    """Over an isotropic path, of images in three channels."""
    return ExactGaussian(edm_path(SIDE), torch.linspace(0.05, 2.0, 48, dtype=torch.float64).reshape(3, SIDE, SIDE))


# as the solvers that they correct


@pytest.mark.parametrize("append_zero", [False, True])
@pytest.mark.parametrize("kind", ["whole", "radial:3"])
@pytest.mark.parametrize("path_kind", ["isotropic", "anisotropic"])
@pytest.mark.parametrize(
    ("name", "order"), [("dpmpp", 1), ("dpmpp", 2), ("dpmpp", 3), ("exp-ab", 3), ("ipndm", 3), ("deis", 2)]
)
def test_without_corrections_it_is_the_solver_that_it_corrects(name, order, path_kind, kind, append_zero):
    path = edm_path(SIDE) if path_kind == "isotropic" else unequal_path()
    model, z = gaussian(path), normal(2, 1, SIDE, SIDE)
    levels = uniform(path, 6, append_zero=append_zero, last=0.05 if append_zero else None)
    step = tuned(path, levels, theory=name, order=order, subspaces=kind)()
    assert torch.allclose(step.levels.nodes, levels.nodes, rtol=1e-13)
    expected = solve(model, z, levels, SOLVERS[name].with_order(order))
    assert model.evaluations == levels.steps
    torch.testing.assert_close(solve(model, z, step.levels, step), expected, rtol=1e-11, atol=1e-12)
    assert model.evaluations == 2 * levels.steps


@pytest.mark.parametrize("kind", ["whole", "path", "block", "radial:4"])
def test_without_corrections_it_is_dpmpp_on_a_network_with_classes(kind):
    model, z, labels = denoiser("block"), 80 * normal(3, 2, 8, 8), one_hot(0, 2, 1)
    levels = karras(5, 2, 0.002, 80.0, append_zero=False)
    step = tuned(model.path, levels, subspaces=kind)()
    expected = solve(model, z, levels, SOLVERS["dpmpp"].with_order(), labels)
    torch.testing.assert_close(solve(model, z, step.levels, step, labels), expected, rtol=1e-10, atol=1e-10)


def test_each_class_keeps_its_own_schedule():
    logs = torch.tensor([[[-6.0, 4.0], [-3.0, 3.0]], [[-4.0, 3.0], [-5.0, 4.0]], [[-3.0, 3.0], [-3.0, 4.0]]]).double()
    path = NoisePath(Subspaces(partition(SIDE, "block")), KnotSchedule(logs))
    model, z, labels = gaussian(path), normal(4, 1, SIDE, SIDE), one_hot(2, 0, 1, 0)
    levels = uniform(path, 5, append_zero=False)
    step = tuned(path, levels, subspaces="radial:3")()
    own = step.levels.for_labels(labels)
    expected = solve(model, z, levels.for_labels(labels), SOLVERS["dpmpp"].with_order(), labels)
    torch.testing.assert_close(solve(model, z, own, step, labels), expected, rtol=1e-11, atol=1e-12)
    step = moved(tuned(path, levels, subspaces="radial:3"))()
    together = solve(model, z, step.levels.for_labels(labels), step, labels)
    for which, label in enumerate((2, 0, 1, 0)):
        alone = NoisePath(path.subspaces, KnotSchedule(logs[label]))
        alone_levels = Levels(levels.nodes[:, label, None], levels.inner[:, label, None])
        lone = moved(tuned(alone, alone_levels, subspaces="radial:3"))()
        found = solve(gaussian(alone), z[which : which + 1], lone.levels, lone)
        torch.testing.assert_close(together[which], found[0], rtol=1e-11, atol=1e-12)


def test_on_principal_subspaces_its_own_are_the_paths_or_the_whole():
    basis = torch.linalg.qr(normal(SIDE**2, 5))[0].T
    subspaces = PcaSubspaces(basis[None].contiguous(), torch.zeros(1, dtype=torch.int64))
    path = NoisePath(subspaces, KnotSchedule(torch.tensor([[-6.0, 4.0], [-3.0, 3.0]]).double()))
    model, z, levels = gaussian(path), normal(2, 1, SIDE, SIDE), uniform(path, 5, append_zero=False)
    model.flow = lambda z, g, labels=None: torch.sin(z)
    expected = solve(model, z, levels, SOLVERS["dpmpp"].with_order())
    for kind in ("path", "whole"):
        step = tuned(path, levels, subspaces=kind)()
        torch.testing.assert_close(solve(model, z, step.levels, step), expected, rtol=1e-11, atol=1e-12)
    step = moved(tuned(path, levels, subspaces="path"))()
    assert not torch.allclose(solve(model, z, step.levels, step), expected, rtol=1e-2)
    with pytest.raises(InvalidArgument, match="subspaces: block is of the DCT, the path's basis is another: use path"):
        tuned(path, levels, subspaces="block")


def test_the_order_of_convergence_is_dpmpps():
    path = unequal_path()
    model, z, errors = gaussian(path), torch.ones(1, 1, SIDE, SIDE, dtype=torch.float64), []
    for count in (64, 128, 256):
        step = tuned(path, uniform(path, count + 1, append_zero=False), subspaces="radial:4")()
        off = solve(model, z, step.levels, step) - solution(model, z, step.levels)
        errors.append(float(off.detach().norm()))
    assert torch.allclose(measured_orders(errors), torch.full((2,), 2.0), atol=0.4)


def test_an_analytic_first_step_costs_nothing_and_needs_no_label():
    model, z = denoiser("whole"), 80 * normal(2, 2, 8, 8)
    levels = karras(5, 1, 0.01, 80.0, append_zero=False)
    solver = tuned(model.path, levels)
    step = solver()
    expected = solve(model, z, levels, SOLVERS["dpmpp"].with_order(), analytic_first=True)
    before = model.evaluations
    found = solve(model, z, step.levels, step, analytic_first=True)
    assert model.evaluations - before == 3
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    student_images(model, solver(), z / 80, analytic_first=True).square().sum().backward()
    assert solver.labels.grad[0] == 0
    assert (solver.labels.grad[1:] != 0).all()


# what corrections do


@pytest.mark.parametrize("kind", ["block", "luma:whole", "luma:radial:2"])
def test_a_step_by_hand(kind):
    """DPM-Solver++(2M)'s weights, corrected in every subspace of the solver: of the DCT, and luma and chroma."""
    model = colour_denoiser()
    solver = moved(tuned(model.path, karras(4, 1, 0.1, 8.0, append_zero=False), subspaces=kind))
    step, states = solver(), [normal(2, 3, SIDE, SIDE)]
    solve(model, states[0], step.levels, step, watch=lambda k, state: states.append(state.z))
    estimates = [model.denoise(states[k], step.told[k].square()) for k in (1, 0)]
    before, sigma, after = (float(node) for node in step.levels.nodes[:3, 0, 0])
    reach = math.log(sigma / after) / (2 * math.log(before / sigma))
    theory = [after / sigma, (1 - after / sigma) * (1 + reach), (after / sigma - 1) * reach]

    coloured, bands = kind.startswith("luma:"), partition(SIDE, kind.removeprefix("luma:"))
    grey = lambda x: x.mean(1, keepdim=True).expand_as(x)  # noqa: E731
    colours = (grey, lambda x: x - grey(x)) if coloured else (lambda x: x,)
    dct = Subspaces(partition(SIDE, "block")).dct
    places = list(itertools.product(range(int(bands.max()) + 1), colours))
    assert len(places) == solver.cells.bands
    for corrections, (band, colour) in zip(solver.coefficients[1].T, places, strict=True):
        weights = torch.tensor(theory, dtype=torch.float64) + 0.1 * corrections[:3]
        parts = [dct(colour(each)) * (bands == band) for each in (states[2], states[1], *estimates)]
        expected = sum(weight * part for weight, part in zip(weights, parts[1:], strict=True))
        torch.testing.assert_close(parts[0], expected, rtol=1e-10, atol=1e-10)


def test_steps_of_flows_are_the_interval_times_weighted_flows():
    """DyWeight's form, `z + (sigma_{k+1} - sigma_k) sum_j w_j d_j` with `d = -flow`, from Euler's weights."""
    model = gaussian(edm_path(SIDE))
    solver = tuned(model.path, karras(4, 1, 0.1, 8.0, append_zero=False), theory="ipndm", order=1)
    step, z = moved(solver)(), normal(2, 1, SIDE, SIDE)
    ends = [z]
    solve(model, z, step.levels, step, watch=lambda k, state: ends.append(state.z))
    directions = [-model.flow(ends[k], step.told[k].square()) for k in (2, 1, 0)]
    weights = torch.tensor([1.0, 0.0, 0.0]) + 0.1 * solver.coefficients[2, 1:, 0]
    change = (step.levels.nodes[3] - step.levels.nodes[2]).item() * sum(
        w * each for w, each in zip(weights, directions, strict=True)
    )
    torch.testing.assert_close(ends[3], ends[2] + change, rtol=1e-10, atol=1e-10)


def test_ties_of_full_rank_reach_what_free_subspaces_do_and_of_rank_one_start_alike_in_all():
    path, levels = edm_path(8), karras(4, 1, 0.1, 8.0, append_zero=False)
    tied = tuned(path, levels, subspaces="radial:4", rank=4)
    assert torch.linalg.matrix_rank(tied.shapes.detach()) == 4
    lone = tuned(path, levels, subspaces="radial:4", rank=1)
    with torch.no_grad():
        lone.coefficients.fill_(0.5)
    weights = lone().weights[:, 0, 0]
    alike = tuned(path, levels)
    with torch.no_grad():
        alike.coefficients.fill_(0.5)
    torch.testing.assert_close(weights, alike().weights[:, 0, 0, :1].expand_as(weights))
    with pytest.raises(InvalidArgument, match="rank: 5 for 4 subspaces: give 1 to 4"):
        tuned(path, levels, subspaces="radial:4", rank=5)


# gradients


def gradients_agree(solver: TunedSolver, model, noise: torch.Tensor, labels=None, **options) -> set[str]:
    """Against central differences, in a few numbers of each kind; the names of the kinds that matter."""
    cotangent = normal(*noise.shape)

    def value() -> torch.Tensor:
        return (student_images(model, solver(), noise, labels, **options) * cotangent).sum()

    value().backward()
    matter = set()
    for name, parameter in solver.named_parameters():
        if not parameter.requires_grad:
            assert parameter.grad is None
            continue
        flat, slope = parameter.data.view(-1), parameter.grad.view(-1)
        for index in {len(flat) // 2, int(slope.abs().argmax())}:
            sides = []
            for h in (1e-5, -1e-5):
                flat[index] += h
                with torch.no_grad():
                    sides.append(float(value()))
                flat[index] -= h
            found = (sides[0] - sides[1]) / 2e-5
            assert float(slope[index]) == pytest.approx(found, rel=1e-5, abs=1e-6 * float(slope.abs().max()) + 1e-9)
        if slope.abs().max() > 0:
            matter.add(name)
    return matter


@pytest.mark.parametrize(
    ("kind", "theory", "append_zero"),
    [("whole", "dpmpp", False), ("radial:3", "dpmpp", True), ("radial:3", "ipndm", False)],
)
def test_gradients_are_those_of_finite_differences(kind, theory, append_zero):
    """J = 1 and 3, of the path and of the solver."""
    model = denoiser(kind)
    levels = karras(4, model.path.subspaces.count, 0.3, 20.0, append_zero=append_zero)
    solver = moved(tuned(model.path, levels, True, theory=theory, subspaces=kind))
    matter = gradients_agree(solver, model, normal(2, 2, 8, 8), one_hot(0, 2))
    assert matter == {"levels.corrections", "labels", "coefficients"}


def test_gradients_in_a_curve_and_in_ties():
    model = denoiser("whole")
    curve = curve_through(log_snr(8, 1, 0.3, 20.0, append_zero=False))
    solver = moved(TunedSolver(model.path, CurveLevels(curve, 4), subspaces="radial:3", rank=2))
    matter = gradients_agree(solver, model, normal(2, 2, 8, 8))
    assert matter == {"levels.curve.theta", "labels", "coefficients", "shapes"}


def test_gradients_of_the_integrators_weights_in_levels():
    """On levels that differ between subspaces, where weights come from a quadrature."""
    path = unequal_path()
    solver = moved(tuned(path, uniform(path, 5, append_zero=False), True, theory="exp-ab", learn=["levels"]), 0.1)
    assert gradients_agree(solver, gaussian(path), normal(2, 1, SIDE, SIDE)) == {"levels.corrections"}


def test_recomputing_changes_no_gradient_and_keeps_memory_from_growing():
    model, noise, labels = denoiser("whole"), normal(2, 2, 8, 8), one_hot(0, 1)
    kept, gradients = {}, {}
    for steps, recompute in itertools.product((2, 6), (False, True)):
        solver = moved(tuned(model.path, karras(steps + 1, 1, 0.01, 80.0, append_zero=False)), 0.1)
        held = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda each, held=held: held.append(each.numel()) or each, lambda each: each
        ):
            error = squared_error(student_images(model, solver(), noise, labels, recompute), noise).sum()
        error.backward()
        kept[steps, recompute] = sum(held)
        gradients[steps, recompute] = [parameter.grad for parameter in solver.parameters()]
    for steps in (2, 6):
        for plain, again in zip(gradients[steps, False], gradients[steps, True], strict=True):
            torch.testing.assert_close(again, plain, rtol=1e-12, atol=1e-12)
    growth = {recompute: (kept[6, recompute] - kept[2, recompute]) / 4 for recompute in (False, True)}
    assert growth[True] < 0.05 * growth[False]


# what tuning finds


FIRST = 10.0
SIZE = 8
LAMBDAS = torch.logspace(-3, 2.5, SIZE**2, dtype=torch.float64)


def on_gaussian_data(kind: str, order: torch.Tensor) -> tuple[ExactGaussian, Pairs]:
    """Data of 64 variances over an isotropic path on some subspaces, and what the flow makes of noise of ones."""
    subspaces = Subspaces(partition(SIZE, kind))
    path = NoisePath(subspaces, KnotSchedule(karras_logs(8, 1e-9, 0.002, FIRST).expand(subspaces.count, -1)))
    spectrum = LAMBDAS[order].reshape(1, SIZE, SIZE)
    z = torch.ones(1, 1, SIZE, SIZE, dtype=torch.float64)
    end = FIRST * z * (spectrum / (spectrum + FIRST**2)).sqrt()
    return ExactGaussian(path, spectrum), Pairs(path.to_pixels(z), None, path.to_pixels(end))


def tune(model, solvers: list[TunedSolver], pairs: Pairs, steps: int, rate: float, **options) -> list[dict]:
    work = tuning_work(model, solvers, pairs, pairs, tuning_plan(steps, len(pairs)), rate, **options)
    return list(work.records)


def test_tuned_levels_are_as_good_as_the_best_by_brute_force():
    """Two free levels of three steps: DPM-Solver++(2M) to the second, then the estimate, on a fine grid of both."""
    model, pairs = on_gaussian_data("whole", torch.arange(SIZE**2))
    target = (LAMBDAS / (LAMBDAS + FIRST**2)).sqrt()
    one, two = torch.meshgrid(*[torch.logspace(-1.5, 0.99, 300, dtype=torch.float64)] * 2, indexing="ij")
    one, two = one[..., None], two[..., None]
    estimate = lambda z, sigma: LAMBDAS / (LAMBDAS + sigma**2) * z  # noqa: E731
    d0 = estimate(1.0, FIRST)
    z1 = one / FIRST + (1 - one / FIRST) * d0
    h, before = (one / two).log(), (FIRST / one).log()
    d1 = estimate(z1, one)
    z2 = two / one * z1 + (1 - two / one) * (d1 + h / (2 * before) * (d1 - d0))
    errors = ((estimate(z2, two) - target) * FIRST).square().sum(-1)
    best = float(errors[two[..., 0] < one[..., 0]].min())
    solver = tuned(model.path, given([FIRST, 2.0, 0.5, 0.0], 1), learn=["levels"])
    start = mean_error(model, solver, pairs, squared_error, 1)
    tune(model, [solver], pairs, 150, 0.2)
    found = mean_error(model, solver, pairs, squared_error, 1)
    assert best * 0.995 < found < 1.01 * best < 0.5 * start
    assert (solver.coefficients == 0).all()
    assert (solver.labels == 0).all()


@pytest.mark.parametrize("kind", ["whole", "radial:3"])
def test_tuned_coefficients_are_the_best_three_step_linear_solvers(kind):
    """In each subspace `z_3 = prod_k (a_k + c_k lambda / (lambda + sigma_k^2)) z_0`; least squares from many starts."""
    model, pairs = on_gaussian_data(kind, torch.randperm(SIZE**2, generator=torch.Generator().manual_seed(3)))
    sigmas = [FIRST, 3.0, 0.4]
    levels = given([*sigmas, 0.05], model.path.subspaces.count)
    solver = tuned(model.path, levels, learn=["coefficients"], order=1, window=1, subspaces=kind)
    spectrum, band, best = model.spectrum[0].numpy(), partition(SIZE, kind).numpy(), 0.0
    random = np.random.default_rng(0)
    for which in range(band.max() + 1):
        of = spectrum[band == which]
        shrink = [of / (of + sigma**2) for sigma in sigmas]
        target = np.sqrt(of / (of + FIRST**2))

        def residual(x, shrink=shrink, target=target):
            return FIRST * (np.prod([x[2 * k] + x[2 * k + 1] * shrink[k] for k in range(3)], axis=0) - target)

        fits = [optimize.least_squares(residual, random.normal(size=6), xtol=1e-15, ftol=1e-15) for _ in range(40)]
        best += 2 * min(fit.cost for fit in fits)
    start = mean_error(model, solver, pairs, squared_error, 1)
    tune(model, [solver], pairs, 250, 1.0)
    found = mean_error(model, solver, pairs, squared_error, 1)
    assert best * 0.995 < found < 1.01 * best < 0.2 * start


def network_pairs(model, seeds: range) -> Pairs:
    levels = karras(8, model.path.subspaces.count, 0.01, 80.0)
    parts = teacher_pairs(model, levels, SOLVERS["heun"].with_order(), seeds, (2, 8, 8), 3, 8)
    return joined(list(parts))


@pytest.fixture(scope="module")
def model():
    return denoiser("whole").float()


@pytest.fixture(scope="module")
def pairs(model):
    return network_pairs(model, range(100, 116))


@pytest.fixture(scope="module")
def heldout(model):
    return network_pairs(model, range(200, 208))


def few_steps(model, **options) -> TunedSolver:
    return tuned(model.path, karras(4, 1, 0.01, 80.0, append_zero=False), **options)


def test_tuning_is_never_worse_on_held_out_pairs_than_its_start(model, pairs, heldout):
    """Whatever the rate; and the best of all looks is kept."""
    solver = few_steps(model)
    start = mean_error(model, solver, heldout, squared_error, 8)
    work = tuning_work(model, [solver], pairs, heldout, tuning_plan(6, 8), rate=30.0, every=2)
    records = list(work.records)
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6]
    looks = [value for _, value in work.training.heldout]
    assert looks[0] == pytest.approx(1)
    assert max(looks) > 1
    assert mean_error(model, solver, heldout, squared_error, 8) == pytest.approx(min(looks) * start)


def test_tuning_helps_on_a_network(model, pairs, heldout):
    solver = few_steps(model, subspaces="radial:4")
    start = mean_error(model, solver, heldout, squared_error, 8)
    list(tuning_work(model, [solver], pairs, heldout, tuning_plan(12, 8, warm_up=2), every=4).records)
    assert mean_error(model, solver, heldout, squared_error, 8) < 0.9 * start


def test_stopped_and_gone_on_it_ends_with_the_same_numbers(model, pairs, heldout):
    """From the state's tensors and metadata; and all of it is the seed's."""
    plan = tuning_plan(8, 4, warm_up=2)

    def work(solver: TunedSolver, plan=plan):
        return tuning_work(model, [solver], pairs, heldout, plan, every=3)

    through, stopped, again = few_steps(model), few_steps(model), few_steps(model)
    list(work(through).records)
    job = work(stopped)
    list(itertools.islice(job.records, 5))
    tensors = {name: value.clone() for name, value in job.training.tensors().items()}
    going_on = work(again)
    going_on.training.load(tensors, job.training.metadata())
    assert [record["step"] for record in going_on.records] == [6, 7, 8]
    for one, other in zip(through.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)
    other_seed = few_steps(model)
    list(work(other_seed, tuning_plan(8, 4, warm_up=2, seed=1)).records)
    assert not torch.equal(other_seed.coefficients, through.coefficients)


def test_budgets_share_a_curve(model, pairs, heldout):
    levels = log_snr(16, 1, 0.01, 80.0, append_zero=False)
    curve = curve_through(levels)
    solvers = [TunedSolver(model.path, CurveLevels(curve, points), learn=["levels"]) for points in (4, 6)]
    assert torch.allclose(solvers[1]().levels.nodes, levels.nodes[::3])  # uniform in log sigma: linear between knots
    starts = [mean_error(model, solver, heldout, squared_error, 16) for solver in solvers]
    list(tuning_work(model, solvers, pairs, heldout, tuning_plan(8, 8, warm_up=2), rate=0.1, every=4).records)
    ends = [mean_error(model, solver, heldout, squared_error, 16) for solver in solvers]
    assert sum(end / start for end, start in zip(ends, starts, strict=True)) < 1.9
    assert torch.equal(solvers[0].levels.curve.theta, solvers[1].levels.curve.theta)
    nodes = solvers[0]().levels.nodes
    assert torch.allclose(nodes[[0, -1]], levels.nodes[[0, -1]])
    assert not torch.allclose(nodes[1], levels.nodes[5])


def test_levels_of_one_budget_start_another():
    nodes = torch.tensor([8.0, 2.0, 0.5], dtype=torch.float64)[:, None, None]
    found = resampled(at(nodes), 4).nodes.flatten()
    assert torch.allclose(found, torch.tensor([8.0, 4.0, 2.0, 1.0, 0.5], dtype=torch.float64))
    to_zero = resampled(at(nodes, append_zero=True), 5).nodes.flatten()
    assert torch.allclose(to_zero, torch.tensor([8.0, 4.0, 2.0, 1.0, 0.5, 0.0], dtype=torch.float64))
    with pytest.raises(InvalidArgument, match="3 steps give no levels for 1"):
        resampled(at(nodes, append_zero=True), 1)


def test_a_loss_of_features():
    weights = normal(5, 16)
    features = lambda x: x.flatten(1) @ weights.T  # noqa: E731
    found, taught = normal(3, 1, 4, 4), normal(4, 1, 4, 4)[1:]
    expected = ((found - taught).flatten(1) @ weights.T).square().sum(1)
    assert torch.allclose(feature_error(features)(found, taught), expected)
    assert torch.allclose(squared_error(found, taught), (found - taught).square().sum((1, 2, 3)))


# images


@pytest.mark.parametrize("kind", ["whole", "radial:4"])
def test_an_image_is_its_seed_bit_for_bit_in_any_shard(model, kind):
    with torch.no_grad():
        step = moved(few_steps(model, subspaces=kind), 0.1)()

    def images(seeds: list[int]) -> torch.Tensor:
        parts = generate(model, step.levels, step, seeds, (2, 8, 8), 3, 4)
        return torch.cat([each for _, each in parts])

    whole = images(list(range(10)))
    assert torch.equal(images([3, 7, 5]), whole[[3, 7, 5]])
    assert torch.equal(images([9]), whole[[9]])
    assert len(whole.flatten(1).unique(dim=0)) == 10


def test_a_pair_is_its_seed(model, pairs):
    alone = network_pairs(model, range(107, 109))
    noise, labels = draw([107, 108], (2, 8, 8), 3)
    assert torch.equal(alone.noise, noise)
    assert torch.equal(alone.labels, labels)
    assert torch.equal(alone.images, pairs.images[7:9])
    assert len(pairs) == 16


def test_a_students_images_are_those_of_the_sampler(model, pairs):
    step = moved(few_steps(model, subspaces="radial:4"), 0.1)()
    part = pairs.take(slice(0, 4))
    with torch.no_grad():
        found = student_images(model, step, part.noise, part.labels)
    recorded = record_trajectory(model, part.noise, step.levels, part.labels, step)
    assert torch.equal(found, recorded.states[-1].detach())
    assert recorded.evaluations == [0, 1, 2, 3]


def test_its_numbers_are_its_tensors(model, tmp_path):
    solver = moved(few_steps(model, subspaces="radial:4"))
    torch.save(solver.state_dict(), tmp_path / "tensors")
    again = tuned(model.path, log_snr(4, 1, 0.1, 8.0, append_zero=False), subspaces="radial:4")
    again.load(torch.load(tmp_path / "tensors"))
    one, other = solver(), again()
    assert torch.equal(one.weights, other.weights)
    assert torch.equal(one.told, other.told)
    assert torch.equal(one.levels.nodes, other.levels.nodes)


# restrictions


def count_that_matter(solver: TunedSolver, model, noise, **options) -> int:
    student_images(model, solver(), noise, **options).square().sum().backward()
    return sum(int((each.grad != 0).sum()) for each in solver.parameters() if each.grad is not None)


def test_published_restrictions_have_the_published_numbers_of_parameters(model):
    noise = normal(2, 2, 8, 8).float()
    levels = karras(6, 1, 0.01, 80.0, append_zero=False)
    ld3 = tuned(model.path, levels, learn=["levels", "labels"])
    assert count_that_matter(ld3, model, noise) == ld3.numbers == 10  # five levels, five labels
    gs = tuned(model.path, levels, window=5)
    assert (
        count_that_matter(gs, model, noise) == gs.numbers == 10 + 5 + 15
    )  # and every state's weight, and every estimate's
    longer = karras(7, 1, 0.01, 80.0, append_zero=False)
    dyweight = tuned(model.path, longer, learn=["labels", "coefficients"], theory="ipndm", order=1)
    assert (
        count_that_matter(dyweight, model, noise, analytic_first=True) == dyweight.numbers - 1 == 20
    )  # design: NFE 5; the first label
    step, euler = dyweight(), SOLVERS["euler"].with_order()
    with torch.no_grad():
        expected = solve(model, noise, longer, euler)
        torch.testing.assert_close(solve(model, noise, step.levels, step), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(step.levels.nodes, tuned(model.path, longer)().levels.nodes)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"learn": []}, "learn: nothing: choose one or more of levels, labels, coefficients"),
        ({"learn": ["levels", "speed"]}, "learn: speed: choose"),
        ({"theory": "unipc"}, "theory: 'unipc' is unknown: use one of dpmpp"),
        ({"order": 4}, "order: 4 with a window of 3"),
        ({"subspaces": "rings"}, "subspaces: 'rings' is unknown"),
    ],
)
def test_what_cannot_be_tuned_is_refused_in_a_line(model, options, words):
    with pytest.raises(InvalidArgument, match=words) as error:
        few_steps(model, **options)
    assert "\n" not in str(error.value)


def test_other_paths_and_budgets_are_refused_in_a_line(model):
    two = denoiser("block").float()
    with pytest.raises(InvalidArgument, match="levels: are for J = 1, the path has 2"):
        tuned(two.path, karras(4, 1, 0.01, 80.0))
    step, z = few_steps(model)(), normal(1, 2, 8, 8).float()
    with pytest.raises(InvalidArgument, match="tuned solver: it is for a path of J = 1, this one has 2"):
        solve(two, z, karras(4, 2, 0.01, 80.0, append_zero=False), step)
    with pytest.raises(InvalidArgument, match="tuned solver: it makes 3 steps, the levels 4"):
        solve(model, z, karras(5, 1, 0.01, 80.0, append_zero=False), step)
    with pytest.raises(InvalidArgument, match="not the levels that it was tuned with"):
        solve(model, z, karras(4, 1, 0.02, 80.0, append_zero=False), step)
    with pytest.raises(
        InvalidArgument, match=r"coefficients is \(4, 4, 1\) and not \(3, 4, 1\): tuned for other steps"
    ):
        few_steps(model).load(tuned(model.path, karras(5, 1, 0.01, 80.0, append_zero=False)).state_dict())
    with pytest.raises(InvalidArgument, match="luma and chroma are of 3 channels, the images have 2"):
        student_images(model, few_steps(model, subspaces="luma:whole")(), z)
    with pytest.raises(InvalidArgument, match="curve: levels that go on to 0"):
        curve_through(karras(4, 1, 0.01, 80.0))


def test_a_teacher_that_is_the_start_is_refused(model):
    solver = few_steps(model)
    step = solver()
    own = joined(list(teacher_pairs(model, step.levels, step, range(4), (2, 8, 8), 0, 4)))
    with pytest.raises(InvalidArgument, match="teacher: its images are those of the start: take a larger budget"):
        tuning_work(model, [solver], own, own, tuning_plan(2, 4))
