"""Measures of trajectories on curves of known shape, and the propositions of arXiv:2506.10177 where they are exact."""

import math

import pytest
import torch
from exact import unequal_path

from anisodiff.data.image_sets import Images
from anisodiff.exact.closed_forms import GaussianDenoiser, KernelDenoiser
from anisodiff.grids.fixed import at_mean_levels, karras
from anisodiff.grids.levels import levels
from anisodiff.metrics import geometry
from anisodiff.paths.noise_path import edm_path
from anisodiff.solvers.loop import solve
from anisodiff.solvers.registry import SOLVERS
from anisodiff.solvers.singlestep import ProbabilityFlow, State, euler
from anisodiff.solvers.trajectories import record_trajectory

SIDE = 4
SIZE = SIDE**2


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rotation(size: int, seed: int = 0) -> torch.Tensor:
    return torch.linalg.qr(draw(size, size, seed=seed))[0]


@pytest.fixture(scope="module")
def images() -> Images:
    generator = torch.Generator().manual_seed(2)
    pixels = torch.randint(256, (30, 1, SIDE, SIDE), generator=generator, dtype=torch.uint8)
    return Images(pixels, torch.zeros(30, dtype=torch.int64), 1)


def test_a_half_circle_about_its_chord():
    """In two dimensions of ten, radius 3."""
    angle = torch.linspace(0, math.pi, 181, dtype=torch.float64)
    flat = torch.zeros(181, 10, dtype=torch.float64)
    flat[:, 0], flat[:, 1] = 3 * angle.cos(), 3 * angle.sin()
    points = (flat @ rotation(10) + 7)[:, None]
    found = geometry.shape(points)
    assert torch.allclose(found.deviation[:, 0], 3 * angle.sin(), atol=1e-9)
    assert torch.allclose(found.to_end[:, 0], 6 * ((math.pi - angle) / 2).sin(), atol=1e-9)
    assert found.length.item() == pytest.approx(3 * math.pi, rel=1e-4)
    assert torch.allclose(found.explained[0], torch.ones(5, dtype=torch.float64))
    assert torch.allclose(found.error[:, 0, 0], found.deviation[:, 0])
    assert found.error[:, 0, 1:].max() < 1e-6
    assert found.plain[0, 1] == pytest.approx(1)
    assert torch.allclose(found.curve[:, 0, 0], 3 * (1 + angle.cos()))
    assert geometry.single_peak(found.deviation).tolist() == [1.0]


def test_explained_shares_by_brute_force():
    points = draw(12, 3, 7)
    found = geometry.shape(points)
    for b in range(3):
        each, ends = points[:, b], points[[0, -1], b]
        chord = (ends[0] - ends[1]) / (ends[0] - ends[1]).norm()
        away = (each - ends[1]) @ (torch.eye(7, dtype=torch.float64) - torch.outer(chord, chord))
        values = torch.linalg.eigvalsh(away.T @ away).flip(0)
        assert torch.allclose(found.explained[b], values.cumsum(0)[:5] / values.sum())
        plain = torch.linalg.eigvalsh(each.T.cov()).flip(0)
        assert torch.allclose(found.plain[b], plain.cumsum(0)[:3] / plain.sum())
        left = away - away @ found.directions[b, :2].T @ found.directions[b, :2]
        assert torch.allclose(found.error[:, b, 2], left.norm(dim=1))


def test_two_bows_are_no_boomerang():
    s = torch.linspace(0, 2 * math.pi, 100, dtype=torch.float64)
    deviation = torch.stack([s.sin().abs(), (s / 2).sin()], dim=1)
    assert geometry.single_peak(deviation).tolist() == [0.0, 1.0]


def test_turned_and_mirrored_copies_align():
    s = torch.linspace(0, 1, 50, dtype=torch.float64)
    plane = torch.stack([s * (1 - s), s * (1 - s) * (0.4 - s)], dim=1)
    turned = [plane @ rotation(2, seed) for seed in range(6)]
    turned[3] = turned[3] * 5  # size is no part of the shape
    curve = torch.cat([s[:, None, None].expand(-1, 6, 1), torch.stack(turned, dim=1)], dim=2)
    found, away = geometry.aligned(curve)
    assert away.max() < 1e-12
    assert torch.allclose(found[:, 1], found[:, 0])
    assert torch.allclose(found[:, 3, 1:], 5 * found[:, 0, 1:])
    other = curve.clone()
    other[:, 1, 1:] = draw(50, 2)
    assert geometry.aligned(other)[1][1] > 0.3


def test_a_helix_has_constant_curvature_and_torsion():
    """Uneven steps: radius 2, rise 0.5 a radian."""
    angle = torch.linspace(0, 1, 400, dtype=torch.float64) ** 1.5 * 6
    helix = torch.stack([2 * angle.cos(), 2 * angle.sin(), 0.5 * angle], dim=1)
    found = geometry.bending(torch.stack([helix, helix @ torch.diag(torch.tensor([1.0, 1, -1])).double()], dim=1), 4)
    curvature, torsion = torch.full((400, 2), 2 / 4.25).double(), (0.5 / 4.25 * torch.tensor([1.0, -1.0])).double()
    assert torch.allclose(found.curvature, curvature, rtol=1e-2)
    assert torch.allclose(found.curvature[4:-4], curvature[4:-4], rtol=1e-3)
    assert torch.allclose(found.torsion[4:-4], torsion.expand(392, 2), rtol=2e-3)
    assert found.arc[-1, 0].item() == pytest.approx(6 * 4.25**0.5, rel=1e-3)


def test_mean_levels_of_an_anisotropic_path_are_on_the_polynomial_grid():
    path = unequal_path()
    found, means = at_mean_levels(path, 20, 0.15, 5.0)
    assert torch.allclose(means, karras(20, 1, 0.15, 5.0, append_zero=False).nodes[:, 0, 0])
    weighted = found.nodes[:, 0].log() @ path.weights
    assert torch.allclose(weighted.exp(), means, rtol=1e-9)
    assert (found.nodes[1:-1, 0, 0] != found.nodes[1:-1, 0, 1]).all()


def test_trajectories_have_their_denoising_trajectory(images):
    path = unequal_path()
    model = KernelDenoiser(path, images)
    fine, _ = at_mean_levels(path, 20, 0.15, 5.0)
    found = record_trajectory(model, draw(4, 1, SIDE, SIDE), fine, None, euler, keep_flows=True)
    assert torch.allclose(found.denoised[7], model.denoise(found.states[7], fine.nodes[7].square()), atol=1e-9)


def test_data_in_one_point_bow_by_their_path_alone(images):
    path, point = unequal_path(), Images(images.pixels[:1], images.labels[:1], 1)
    fine, _ = at_mean_levels(path, 20, 0.15, 5.0)
    states = record_trajectory(KernelDenoiser(path, point), draw(4, 1, SIDE, SIDE), fine, None, euler).states
    raw = geometry.shape(states.flatten(2)).deviation
    free = geometry.shape(geometry.without_kinematics(states, fine.nodes, path).flatten(2)).deviation
    assert raw.max() > 0.1
    assert free.max() < 1e-9


def test_an_isotropic_path_has_no_bow_of_its_own(images):
    path = edm_path(SIDE)
    fine, _ = at_mean_levels(path, 20, 0.15, 5.0)
    states = record_trajectory(KernelDenoiser(path, images), draw(4, 1, SIDE, SIDE), fine, None, euler).states
    assert torch.allclose(geometry.without_kinematics(states, fine.nodes, path), states, atol=1e-9)


# Propositions 1 to 4


def test_proposition_1_a_step_is_a_convex_combination(images):
    """Of the point and the denoised one (Eq. 17), for Euler's step on EDM's path."""
    model = KernelDenoiser(edm_path(SIDE), images)
    grid = karras(10, 1, 0.002, 80.0, append_zero=False)
    z = 80 * draw(4, 1, SIDE, SIDE)
    stepped = euler(ProbabilityFlow(model), State(z), 3, grid).z
    share = grid.nodes[4, 0, 0] / grid.nodes[3, 0, 0]
    assert torch.allclose(stepped, share * z + (1 - share) * model.denoise(z, grid.nodes[3].square()))


def test_proposition_1_second_order():
    """Taylor's second-order step has `r + (sigma_n - sigma_{n+1}) / 2 dr/dsigma` for r; on Gaussian data."""
    spectrum = draw(SIZE, seed=3).square()

    def denoised(sigma):  # along the exact trajectory from z at sigma = 2
        x = z * ((spectrum + sigma**2) / (spectrum + 4)).sqrt()
        return spectrum / (spectrum + sigma**2) * x

    z, sigma = draw(SIZE), torch.tensor(2.0, dtype=torch.float64)
    rate = torch.func.jacfwd(denoised)(sigma)
    curvature = z * spectrum / (spectrum + 4) ** 2  # d^2 x / dsigma^2
    slope = z * 2 / (spectrum + 4)
    for later in (1.9, 0.3):
        taylor = z + (later - 2) * slope + (later - 2) ** 2 / 2 * curvature
        combined = later / 2 * z + (2 - later) / 2 * (denoised(sigma) + (later - 2) / 2 * rate)
        assert torch.allclose(taylor, combined)


def test_proposition_2_the_noise_prediction_has_the_norm_of_noise():
    """Images of rank 2 in 3,072 dimensions: near sqrt(d), and a trajectory of length sigma_T sqrt(d)."""
    size, rank = 32, 2
    factors = torch.zeros(1, rank, 3, size, size, dtype=torch.float64)
    factors[0, 0, 0, 3, 4], factors[0, 1, 2, 20, 9] = 4.0, 1.0
    path = edm_path(size)
    model = GaussianDenoiser(path, torch.zeros(1, 3, size, size), factors, torch.ones(1))
    fine, _ = at_mean_levels(path, 60, 0.002, 80.0)
    taught = record_trajectory(model, draw(20, 3, size, size), fine, None, euler, keep_flows=True)
    norms = taught.flows.flatten(2).norm(dim=2)
    assert norms.mean().item() == pytest.approx(math.sqrt(3072), rel=0.01)
    assert norms.std(dim=1).max() < math.sqrt(2 * rank)
    length = geometry.shape(taught.states.flatten(2)).length
    assert torch.allclose(length, torch.full_like(length, 80 * math.sqrt(3072)), rtol=0.05)


def test_proposition_3_likelihood_rises(images):
    """From x to any point no farther from the mean shift than x is, for the kernel estimate of the same bandwidth."""
    path = edm_path(SIDE)
    model = KernelDenoiser(path, images)
    for sigma in (0.1, 0.5, 3.0, 40.0):
        g = torch.full((1, 1), sigma**2, dtype=torch.float64)
        x = path.from_pixels(draw(200, 1, SIDE, SIDE, seed=5)) * (1 + sigma)
        best = model.denoise(x, g)
        radius = (best - x).flatten(1).norm(dim=1)
        away = torch.nn.functional.normalize(draw(200, SIZE, seed=6), dim=1) * radius[:, None]
        before = model.log_density(x, sigma)
        assert (model.log_density(best, sigma) >= before).all()
        assert (model.log_density(best + 0.999 * away.reshape(x.shape), sigma) >= before).all()
        farther = model.log_density(best + 3 * away.reshape(x.shape), sigma)
        assert (farther < before).any()  # the bound means something


def test_proposition_3_along_a_trajectory(images):
    path = edm_path(SIDE)
    model = KernelDenoiser(path, images)
    fine, means = at_mean_levels(path, 60, 0.01, 80.0)
    taught = record_trajectory(model, draw(10, 1, SIDE, SIDE), fine, None, euler, keep_flows=True)
    for k, sigma in enumerate(means[:-1].tolist()):
        before, after = (model.log_density(taught.states[n], sigma) for n in (k, k + 1))
        assert (after >= before - 1e-9).all()
        assert (model.log_density(taught.denoised[k], sigma) >= after - 1e-9).all()


def phi(eigenvalue: torch.Tensor, sigma: torch.Tensor, largest: float) -> torch.Tensor:
    """Eq. 23."""
    total = eigenvalue + largest**2
    ends = (eigenvalue / total).sqrt()
    return ((eigenvalue + sigma**2) / total).sqrt() - ends - sigma / largest * (1 - ends)


def test_proposition_4_gaussian_trajectories():
    """The residual of the chord is `sum_k phi_k u_k u_k^T (x_T - mean)`, and its norm has one maximum."""
    path = edm_path(SIDE)
    directions = rotation(SIZE)[:5]
    values = torch.tensor([9.0, 4.0, 1.0, 0.3, 0.05], dtype=torch.float64)
    mean = draw(1, 1, SIDE, SIDE, seed=8) * 0.3
    factors = (directions * values.sqrt()[:, None]).reshape(1, 5, 1, SIDE, SIDE)
    model = GaussianDenoiser(path, mean, factors, torch.ones(1))
    sigmas = torch.cat([karras(400, 1, 1e-4, 80.0, append_zero=False).nodes[:, 0, 0], torch.zeros(1)])
    grid = levels(sigmas[:, None, None], ((sigmas[1:] + sigmas[:-1]) / 2)[:, None, None], False)
    z = mean + 80 * draw(6, 1, SIDE, SIDE)
    states = [z]
    solve(model, z, grid, SOLVERS["heun"].with_order(), watch=lambda k, state: states.append(state.z))
    points = torch.stack(states).flatten(2)
    residual = points - points[-1] - sigmas[:, None, None] / 80 * (points[0] - points[-1])
    share = (z - mean).flatten(1) @ directions.T  # [B, r]
    expected = torch.einsum("nk,bk,kd->nbd", phi(values[None], sigmas[:, None], 80.0), share, directions)
    assert torch.allclose(residual, expected, atol=2e-3 * float(expected.abs().max()))
    size = expected.norm(dim=2)
    assert ((size.diff(dim=0) > 0).diff(dim=0).sum(0) == 1).all()  # it rises, then falls
    lowest = ((values * (values + 6400)).sqrt() - values).div(2).sqrt()  # phi_k' is 0
    slope = (phi(values, lowest * 1.001, 80.0) - phi(values, lowest * 0.999, 80.0)).abs()
    assert (slope < 1e-6 * phi(values, lowest, 80.0).abs()).all()
    # the trajectory deviation leaves out the residual's part along the chord, which is small
    deviation = geometry.shape(points).deviation.max(0).values
    assert (deviation < size.max(0).values).all()
    assert (deviation > 0.85 * size.max(0).values).all()
