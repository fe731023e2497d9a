"""Euler and Maruyama's solver: its step by hand, its moments without sampling, and one seed an image."""

from pathlib import Path

import pytest
import torch
from exact import SIDE, ExactGaussian, flat_path, gaussian, measured_orders, unequal_path
from small_network import denoiser

from anisodiff.errors import InvalidArgument
from anisodiff.exact.flexible_process import FlexibleProcess
from anisodiff.grids.fixed import karras, uniform
from anisodiff.grids.levels import Levels, at
from anisodiff.models import Model, sample
from anisodiff.paths.noise_path import edm_path
from anisodiff.solvers.generation import Draws, final_states, generate
from anisodiff.solvers.loop import solve
from anisodiff.solvers.registry import SOLVERS
from anisodiff.solvers.singlestep import ProbabilityFlow, State
from anisodiff.solvers.stochastic import euler_maruyama
from anisodiff.solvers.trajectories import record_trajectory


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_step_is_the_flexible_processes_own():
    """In pixels, with dense matrices: `x + (A x / 2 + A score) dbeta + sqrt(A dbeta) xi`, unit variance of the data."""
    rates = torch.tensor([0.3, 1.0, 2.0], dtype=torch.float64)
    path = flat_path(torch.zeros(3, 2).double() + torch.tensor([-3.0, 3.0]), torch.arange(3), seed=1)
    vectors = path.subspaces.vectors
    noise = vectors.T @ torch.diag(rates) @ vectors
    process = FlexibleProcess(noise, torch.zeros_like(noise))
    model = ExactGaussian(path, torch.tensor([1.0, 0.25, 0.04], dtype=torch.float64)[:, None, None])
    model.sigma_data = 1.0
    betas = torch.tensor([1.5, 1.2], dtype=torch.float64)
    levels = at(torch.expm1(rates * betas[:, None]).sqrt()[:, None])
    x, xi = normal(4, 3), normal(4, 3, seed=1)
    z = path.from_pixels((x @ process.additive(1.5)[0].T)[:, :, None, None])
    step = euler_maruyama(ProbabilityFlow(model), State(z, source=lambda: xi[:, :, None, None]), 0, levels)
    found = path.to_pixels(step.z).flatten(1) @ process.transition(1.2)[0].T
    phi, covariance = process.transition(1.5)
    data = vectors.T @ torch.diag(model.spectrum.flatten()) @ vectors
    score = -torch.linalg.solve(phi @ data @ phi.T + covariance, x.T).T
    root = vectors.T @ torch.diag(rates.sqrt()) @ vectors
    expected = x + 0.3 * (x / 2 + score) @ noise + 0.3**0.5 * xi @ root
    assert (found - expected).abs().max() < 1e-12


def moments(model: ExactGaussian, levels: Levels) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean (from 1) and variance of every coefficient at the last level. A step is affine in state and noise, both of
    which the model keeps apart, so that one state and one noise of ones say all."""
    ones, nothing = torch.ones(1, 1, SIDE, SIDE, dtype=torch.float64), torch.zeros(1, 1, SIDE, SIDE).double()
    problem, shape = ProbabilityFlow(model), problem_shape(model)
    mean, variance = ones, model.spectrum + model.variances(levels.nodes[0].square())
    for k in range(levels.steps):
        factor = euler_maruyama(problem, State(ones, source=lambda: nothing), k, levels).z
        added = euler_maruyama(problem, State(nothing, source=lambda: shape), k, levels).z
        mean, variance = factor * mean, factor.square() * variance + added.square()
    return mean, variance


def problem_shape(model: ExactGaussian) -> torch.Tensor:
    """Pixels whose coefficients are all 1."""
    return model.path.to_pixels(torch.ones(1, 1, SIDE, SIDE, dtype=torch.float64))


def test_moments_converge_at_first_order():
    """To the marginal's, on unequal levels; without sampling."""
    path = unequal_path()
    model = gaussian(path)
    errors = []
    for steps in (200, 400, 800):
        levels = uniform(path, steps + 1, append_zero=False)
        exact = model.spectrum + model.variances(levels.nodes[-1].square())
        errors.append(float((moments(model, levels)[1] - exact).norm()))
    assert errors[-1] < 0.02
    assert torch.allclose(measured_orders(errors), torch.ones(2), atol=0.1)


def test_samples_have_these_moments():
    """Within their standard errors, covariances between coefficients too."""
    path = unequal_path()
    model = gaussian(path)
    levels = uniform(path, 31, append_zero=False)
    count = 20_000
    drawn = Draws(range(count), (1, SIDE, SIDE), 0)
    first = (model.spectrum + model.variances(levels.nodes[0].square())).sqrt()
    z = first * path.from_pixels(drawn.noise.double()) + 1
    found = solve(model, z, levels, euler_maruyama, source=drawn).flatten(1)
    mean, variance = (each.flatten() for each in moments(model, levels))
    assert ((found.mean(0) - mean).abs() < 4.5 * (variance / count).sqrt()).all()
    correlation = (found - mean) / variance.sqrt()
    away = correlation.T @ correlation / count - torch.eye(SIDE**2).double()
    error = ((1 + torch.eye(SIDE**2).double()) / count).sqrt()
    assert (away.abs() < 4.5 * error).all()


def final(model, seeds: list[int], batch: int) -> torch.Tensor:
    levels = karras(6, 1, 0.02, 80.0)
    parts = final_states(model, levels, euler_maruyama, seeds, (1, SIDE, SIDE), 0, batch)
    return torch.cat([z[: len(chosen)] for chosen, z in parts])


def test_batch_and_order_of_seeds_change_nothing_bit_for_bit():
    """Of arithmetic that a batch cannot change; padded images are those of their seed too."""
    path = edm_path(SIDE)
    model = ExactGaussian(path, torch.linspace(0.1, 2, SIDE**2)[None].reshape(1, SIDE, SIDE).double())
    whole = final(model, list(range(10)), 10)
    assert torch.equal(final(model, list(range(10)), 4), whole)
    assert torch.equal(final(model, [7, 2, 9], 2), whole[[7, 2, 9]])
    assert len(whole.flatten(1).unique(dim=0)) == 10
    ((_, padded),) = final_states(model, karras(6, 1, 0.02, 80.0), euler_maruyama, [3], (1, SIDE, SIDE), 0, 4)
    assert torch.equal(padded, whole[[3, 3, 3, 3]])


def test_images_of_a_network_are_their_seeds_in_any_shard():
    model = denoiser("block").float()
    levels = uniform(model.path, 5)

    def images(seeds: list[int]) -> torch.Tensor:
        return torch.cat([pixels for _, pixels in generate(model, levels, euler_maruyama, seeds, (2, 8, 8), 3, 4)])

    whole = images(list(range(6)))
    assert torch.equal(images([5, 1, 4]), whole[[5, 1, 4]])
    assert len(whole.flatten(1).unique(dim=0)) == 6


def test_noise_of_a_step_is_new_and_follows_the_label():
    drawn = Draws([5, 6], (1, 8, 8), 3)
    second, third = drawn(), drawn()
    products = torch.stack([drawn.noise, second, third]).flatten(2).transpose(0, 1)
    correlation = torch.corrcoef(products.flatten(0, 1)).abs()
    assert (correlation - torch.eye(6)).max() < 0.4
    generator = torch.Generator().manual_seed(6)
    assert torch.equal(torch.randn(1, 8, 8, generator=generator), drawn.noise[1])
    assert int(torch.randint(3, (), generator=generator)) == int(drawn.labels[1].argmax())
    assert torch.equal(torch.randn(1, 8, 8, generator=generator), second[1])


@pytest.mark.parametrize("name", [name for name, each in SOLVERS.items() if not each.tuned])
def test_only_stochastic_solvers_draw(name):
    path = unequal_path()
    drawn, levels = [], karras(6, 2, 0.02, 8.0)
    z = torch.ones(1, 1, SIDE, SIDE, dtype=torch.float64)

    def source() -> torch.Tensor:
        drawn.append(1)
        return z

    solve(gaussian(path), z, levels, SOLVERS[name].with_order(), source=source)
    assert len(drawn) == (levels.steps - 1 if SOLVERS[name].stochastic else 0)  # none on the step to 0
    assert SOLVERS[name].stochastic == (name == "euler-maruyama")


def test_trajectories_and_the_public_face_draw_the_same_noise():
    model = denoiser("whole").float()
    levels = karras(6, 1, 0.02, 80.0)
    network = model.network
    drawn = Draws(range(4), network.shape, network.classes)
    recorded = record_trajectory(model, drawn.noise, levels, drawn.labels, euler_maruyama, source=drawn)
    images = sample(Model(model, "cpu", {}, Path()), solver="euler-maruyama", seeds=range(4), grid=levels, batch=4)
    assert torch.equal(model.path.to_pixels(recorded.states[-1]).clamp(-1, 1), images)
    assert recorded.evaluations[-1] == levels.steps


def test_without_a_source_of_noise_it_says_so():
    path = unequal_path()
    with pytest.raises(InvalidArgument, match="euler-maruyama draws noise at every step: give"):
        solve(gaussian(path), torch.ones(1, 1, SIDE, SIDE).double(), karras(3, 2, 0.1, 1.0), euler_maruyama)
