"""Likelihoods against densities in closed form, and bounds against divergences by quadrature."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from exact import ExactGaussian, ExactMixture, flat_path, gaussian, measured_orders, unequal_path
from small_network import denoiser
from torch import Tensor

from anisodiff.errors import InvalidArgument
from anisodiff.grids.fixed import karras, uniform
from anisodiff.objectives import likelihood
from anisodiff.objectives.likelihood import Moments, bound, diffusion_loss, ode_log_likelihood, seeded
from anisodiff.paths.noise_path import NoisePath
from anisodiff.paths.principal import PcaSubspaces
from anisodiff.paths.schedules import KnotSchedule
from anisodiff.paths.subspaces import Subspaces, partition


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def log_density(model: ExactMixture, z: Tensor, g: Tensor) -> Tensor:
    """Log density of coefficients under noise of variances `g [1, J]`."""
    flat = z.flatten(1)
    m = model.path.scale(torch.ones_like(z), g).flatten(1)
    return model.log_density(flat, m) - flat.shape[1] / 2 * math.log(2 * math.pi)


def moments_of(model: ExactMixture) -> Moments:
    weights, means, covariances = model.mixture
    mean = weights @ means
    variance = weights @ (covariances.diagonal(dim1=1, dim2=2) + means.square()) - mean.square()
    return Moments(mean[:, None, None], variance[:, None, None])


def draw(model: ExactMixture, count: int, seed: int = 0) -> Tensor:
    """Images of the mixture, in pixels."""
    weights, means, covariances = model.mixture
    which = torch.multinomial(weights, count, replacement=True, generator=torch.Generator().manual_seed(seed))
    eigenvalues, vectors = torch.linalg.eigh(covariances)
    roots = vectors * eigenvalues.clamp(min=0).sqrt()[:, None]
    z = means[which] + (roots[which] @ normal(count, means.shape[1], 1, seed=seed + 1))[:, :, 0]
    return model.path.to_pixels(z[:, :, None, None])


def solid() -> ExactMixture:
    """Two Gaussians in three dimensions, over a random basis with a level for each."""
    logs = torch.tensor([[-6.0, 8.76], [-5.0, 8.0], [-7.0, 8.76]], dtype=torch.float64)
    factors = normal(2, 3, 3, seed=1) / 3
    covariances = factors @ factors.mT + 0.05 * torch.eye(3, dtype=torch.float64)
    weights = torch.tensor([0.6, 0.4], dtype=torch.float64)
    return ExactMixture(flat_path(logs, torch.arange(3), seed=2), weights, normal(2, 3, seed=3), covariances)


def errors_of(model: ExactMixture, steps: int, moments: Moments) -> Tensor:
    x0, levels = draw(model, 40), uniform(model.path, steps + 1, append_zero=False)
    truth = log_density(model, model.path.from_pixels(x0), levels.nodes[-1].square())
    return (ode_log_likelihood(model, x0, levels, moments) - truth).abs()


def test_log_density_of_a_mixture_at_order_two():
    model = solid()
    errors = [float(errors_of(model, steps, moments_of(model)).mean()) for steps in (32, 64, 128)]
    assert errors[-1] < 8e-4
    assert torch.allclose(measured_orders(errors), torch.full((2,), 2.0), atol=0.25)


def test_a_prior_without_the_datas_moments_is_worse():
    """N(0, M_T), at a last level of 80."""
    model = solid()
    nothing = Moments(torch.zeros(3, 1, 1).double(), torch.zeros(3, 1, 1).double())
    found, plain = errors_of(model, 128, moments_of(model)), errors_of(model, 128, nothing)
    assert plain.mean() > 5 * found.mean()
    assert 2e-3 < plain.max() < 5e-2


def test_likelihood_of_a_gaussian_in_dct_coefficients():
    """Closed form, D = 16, two levels; nothing but the quadrature is off."""
    path = unequal_path()
    model = gaussian(path)
    x0 = path.to_pixels(model.spectrum.sqrt() * normal(20, 1, 4, 4))
    levels = uniform(path, 129, append_zero=False)
    variance = model.spectrum + model.variances(levels.nodes[-1].square())[0]
    truth = torch.distributions.Normal(0.0, variance.sqrt()).log_prob(path.from_pixels(x0)).flatten(1).sum(1)
    found = ode_log_likelihood(model, x0, levels, Moments(torch.zeros_like(variance), model.spectrum))
    assert (found - truth).abs().max() < 2e-2


def test_probes_estimate_the_trace():
    """Their mean is the exact one within its standard error; those of one image do not depend on the others'."""
    model = solid()
    levels = uniform(model.path, 17, append_zero=False)
    x0 = draw(model, 1).expand(4000, -1, -1, -1)
    exact = ode_log_likelihood(model, x0[:1], levels, moments_of(model))
    probes = likelihood.rademacher(1, (3, 1, 1), seeded(range(4000)))
    found = ode_log_likelihood(model, x0, levels, moments_of(model), probes=probes)
    error = float(found.std()) / 4000**0.5
    assert found.std() > 0.05  # a probe is not exact here
    assert abs(float(found.mean() - exact)) < 4 * error
    assert torch.equal(likelihood.rademacher(1, (3, 1, 1), seeded([7, 3]))[:, 0], probes[:, 7])
    two = likelihood.rademacher(2, (3, 1, 1), seeded(range(4000)))
    assert float(ode_log_likelihood(model, x0, levels, moments_of(model), probes=two).std()) == pytest.approx(
        float(found.std()) / 2**0.5, rel=0.1
    )


def test_a_network_with_classes():
    """The likelihood of an image is its own and its class's, whatever else is in the batch."""
    model = denoiser("block").requires_grad_(False)
    levels = uniform(model.path, 5, append_zero=False, last=0.05)
    x0, labels = normal(3, 2, 8, 8) / 4, torch.eye(3, dtype=torch.float64)
    moments = likelihood.data_moments(model.path, [x0[:2], x0[2:]])
    flat = model.path.from_pixels(x0)
    assert torch.allclose(moments.mean, flat.mean(0))
    assert torch.allclose(moments.variance, flat.var(0, correction=0))
    probes = likelihood.rademacher(1, (2, 8, 8), seeded(range(3)))

    def estimates(rows: list[int], classes: Tensor) -> tuple[Tensor, Tensor]:
        of = [seeded(range(3))[row] for row in rows]
        return (
            ode_log_likelihood(model, x0[rows], levels, moments, classes[rows], probes[:, rows]),
            bound(model, x0[rows], moments, 0.02, 4, of, classes[rows]),
        )

    together, other = estimates([0, 1, 2], labels), estimates([0, 1, 2], labels.flip(0))
    for each, of_other, (alone, turned) in zip(
        together, other, zip(estimates([2], labels), estimates([1, 0], labels), strict=True), strict=True
    ):
        assert torch.allclose(each[2:], alone, rtol=1e-9)
        assert torch.allclose(each[[1, 0]], turned, rtol=1e-9)
        assert (each[0] - of_other[0]).abs() > 1e-3
    with pytest.raises(InvalidArgument, match="an exact trace takes 128 products"):
        ode_log_likelihood(model, x0, levels, moments, labels)


def test_classes_with_schedules_of_their_own():
    logs = torch.tensor([[[-6.0, 6.0], [-3.0, 5.0]], [[-2.0, 5.0], [-6.0, 6.0]]], dtype=torch.float64)
    subspaces = Subspaces(partition(4, "block"))
    spectrum = torch.linspace(0.01, 0.2, 16, dtype=torch.float64).reshape(1, 4, 4)
    path = NoisePath(subspaces, KnotSchedule(logs))
    model, labels = ExactGaussian(path, spectrum), torch.eye(2, dtype=torch.float64)
    model.flow = lambda z, g, labels: ExactGaussian(alone[0], spectrum).flow(z, g)  # by levels alone
    alone = [NoisePath(subspaces, KnotSchedule(each)) for each in logs]
    x0 = (normal(2, 1, 4, 4) / 8).clamp(-1, 1)
    moments = Moments(torch.zeros_like(spectrum), spectrum)
    found = ode_log_likelihood(model, x0, uniform(path, 5, append_zero=False), moments, labels)
    bounds = bound(model, x0, moments, 0.02, 8, seeded([0, 1]), labels)
    for row, own in enumerate(alone):
        one = ExactGaussian(own, spectrum)
        levels = uniform(own, 5, append_zero=False)
        mine = x0[row : row + 1]
        assert torch.allclose(found[row], ode_log_likelihood(one, mine, levels, moments)[0])
        assert torch.allclose(bounds[row], bound(one, mine, moments, 0.02, 8, seeded([row]))[0])


@pytest.mark.parametrize("seed", [None, 5])
def test_the_paths_part_of_a_gaussian_in_closed_form(seed):
    """`1/2 log det((S + M) / M)` at the start less the same at the end, on any basis."""
    logs = torch.tensor([[-7.0, -1.0, 5.0], [-5.0, -3.0, 5.0], [-6.0, 0.0, 4.0]], dtype=torch.float64)
    path = flat_path(logs, torch.arange(3), seed)
    factor = normal(3, 3, seed=6) / 2
    model = ExactMixture(path, torch.ones(1).double(), torch.zeros(1, 3).double(), (factor @ factor.T)[None])
    count, s0 = 20_000, 0.02
    shares = (torch.arange(count) + 0.5) / count
    x0 = draw(model, count)
    eps, order = normal(count, 3, 1, 1, seed=8), torch.randperm(count, generator=torch.Generator().manual_seed(0))
    found = diffusion_loss(model, x0, eps, shares[order], s0).detach()
    ends = path.at(torch.tensor([0.0, 1.0])).g + s0**2
    start, end = (torch.logdet(torch.eye(3).double() + factor @ factor.T / m) / 2 for m in ends.detach())
    error = float(found.std()) / count**0.5
    assert error < 0.01 * float(start - end)
    assert abs(float(found.mean() - (start - end))) < 4 * error


def hermite(points: int) -> tuple[Tensor, Tensor]:
    """Standard normal points in two dimensions `[P, 2]`, and weights."""
    roots, weights = np.polynomial.hermite_e.hermegauss(points)
    grid = np.stack(np.meshgrid(roots, roots), -1).reshape(-1, 2)
    return torch.from_numpy(grid), torch.from_numpy(np.outer(weights, weights).flatten() / weights.sum() ** 2)


POINTS = torch.tensor([[1.0, 1.0], [-1.0, 0.5], [0.0, -0.5]], dtype=torch.float64)  # grey levels
PROBABILITIES = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)


def few_images(path: NoisePath) -> ExactMixture:
    """Three images of two pixels, with probabilities."""
    flat = path.from_pixels(POINTS[:, :, None, None]).flatten(1)
    return ExactMixture(path, PROBABILITIES, flat, torch.zeros(3, 2, 2, dtype=torch.float64))


def divergence(model: ExactMixture, which: int, t: float) -> float:
    """Of `N(x, M_t)` for an image x from the mixture under M_t, by quadrature."""
    points, weights = hermite(60)
    sigma = model.path.at(torch.tensor([t])).sigma.detach()
    z = (model.mixture[1][which] + points * sigma)[:, :, None, None]
    own = -points.square().sum(1) / 2 - sigma.log().sum() - math.log(2 * math.pi)
    return float(weights @ (own - log_density(model, z, sigma.square())))


def integral(model: ExactMixture, which: int) -> float:
    """Of `diffusion_loss` over noise and share, by quadrature, in two parts that meet in the middle."""
    points, weights = hermite(34)
    roots, lengths = np.polynomial.legendre.leggauss(24)
    shares = torch.from_numpy(np.concatenate([(roots + 1) / 4, (roots + 3) / 4])).repeat_interleave(len(points))
    eps = points.repeat(2 * len(roots), 1)[:, :, None, None]
    with torch.no_grad():
        loss = diffusion_loss(model, POINTS[which].expand(len(eps), -1)[:, :, None, None], eps, shares, 0.0)
    return float(torch.from_numpy(np.tile(lengths, 2)) / 4 @ (loss.reshape(-1, len(points)) @ weights))


@pytest.mark.parametrize("which", [0, 2])
def test_the_paths_part_depends_on_its_ends_alone(which):
    """Of an exact network: both levels together, unevenly, and one after the other, in two bases. It is the divergence
    of the image's noise from that of all images at the start, less the same at the end."""
    low, high, still = math.log(0.1), math.log(1e3), 1e-3
    middle = (low + high) / 2
    courses = [
        ([low, middle, high], [low, middle, high]),
        ([low, middle + 2.5, high], [low, middle - 2.5, high]),
        ([low, high - still, high], [low, low + still, high]),
    ]
    found = []
    for seed in (None, 9):
        for course in courses:
            model = few_images(flat_path(torch.tensor(course, dtype=torch.float64), torch.arange(2), seed))
            found.append(integral(model, which))
    truth = divergence(model, which, 0.0) - divergence(model, which, 1.0)
    assert max(found) - min(found) < 2e-4
    assert abs(found[0] - truth) < 2e-4


def estimate(model: ExactMixture, which: int, count: int = 2000) -> tuple[float, float]:
    """Mean of an image's bound, and its standard error."""
    x0 = POINTS[which].expand(count, -1)[:, :, None, None]
    found = bound(model, x0, moments_of(model), 0.06, 8, seeded(range(count)))
    return float(found.mean()), float(found.std()) / count**0.5


def test_the_bound_is_no_more_than_the_log_probability():
    """An exact network reaches it (levels half apart, decoder of 0.12 of that); one that is not stays below."""
    logs = torch.tensor([[-14.0, 8.0], [-13.0, 8.0]], dtype=torch.float64)
    model = few_images(flat_path(logs, torch.arange(2), 10))
    flow = model.flow
    for which, probability in enumerate(PROBABILITIES.tolist()):
        model.flow = flow
        mean, error = estimate(model, which)
        assert error < 0.05
        assert mean < math.log(probability) + 4 * error
        assert mean > math.log(probability) - 4 * error - 1e-3
        model.flow = lambda z, g, labels=None: 0.7 * flow(z, g)
        mean, error = estimate(model, which)
        assert mean < math.log(probability) - 10 * error


def test_the_priors_divergence_in_closed_form():
    model = solid()
    x0, moments = draw(model, 4), moments_of(model)
    found = likelihood.prior_divergence(model.path, x0, moments, 0.5).detach()
    m = model.path.at(torch.ones(1)).g[0].detach() + 0.25
    z = model.path.from_pixels(x0).flatten(1)
    for each, value in zip(z, found, strict=True):
        own = torch.distributions.MultivariateNormal(each, torch.diag(m))
        prior = torch.distributions.MultivariateNormal(
            moments.mean.flatten(), torch.diag(m + moments.variance.flatten())
        )
        assert float(value) == pytest.approx(float(torch.distributions.kl_divergence(own, prior)), rel=1e-9)


def test_bits_of_images_that_are_nothing_but_noise():
    """Evenly distributed grey levels are log2 of their number, by their density and by their probability."""
    levels = 17
    x0 = (torch.randint(levels, (200, 1, 4, 4), generator=torch.Generator().manual_seed(0)) / 8 - 1).double()
    x = likelihood.dequantised(x0, levels, seeded(range(200)))
    off = (x - x0) * (levels - 1) / 2
    assert off.abs().max() <= 0.5
    assert off.abs().max() > 0.49
    assert abs(float(off.mean())) < 4 / 12**0.5 / off.numel() ** 0.5
    assert torch.equal(likelihood.dequantised(x0[5:6], levels, seeded([5])), x[5:6])
    density = torch.full((1,), -16 * math.log(2 * levels / (levels - 1)), dtype=torch.float64)
    probability = torch.full((1,), -16 * math.log(levels), dtype=torch.float64)
    for found in (likelihood.bits_per_dimension(density, 16, levels), likelihood.bits_per_dimension(probability, 16)):
        assert float(found) == pytest.approx(math.log2(levels))


def refusals() -> list[tuple[str, Callable[[], object]]]:
    path = unequal_path()
    model = gaussian(path)
    moments = Moments(torch.zeros_like(model.spectrum), model.spectrum)
    large, unit = torch.full((1, 1, 4, 4), 255.0).double(), torch.zeros(1, 1, 4, 4).double()
    vectors = torch.linalg.qr(normal(16, 3))[0].T[None]
    principal = NoisePath(PcaSubspaces(vectors, torch.zeros(1, dtype=torch.int64)), path.schedule)
    of_it = ExactGaussian(principal, model.spectrum)
    nan = torch.full_like(unit, torch.nan)
    return [
        ("images go to 255: scale them to", lambda: bound(model, large, moments, 0.1, 4, seeded([0]))),
        ("images go to 255", lambda: likelihood.dequantised(large, 17, seeded([0]))),
        ("images go to nan", lambda: likelihood.dequantised(nan, 17, seeded([0]))),
        ("levels go down to 0", lambda: ode_log_likelihood(model, unit, karras(4, 2, 0.1, 9.0), moments)),
        (
            "keep no coefficients",
            lambda: ode_log_likelihood(of_it, unit, uniform(path, 3, append_zero=False), moments),
        ),
        ("keep no coefficients", lambda: bound(of_it, unit, moments, 0.1, 4, seeded([0]))),
        ("keep no coefficients", lambda: likelihood.data_moments(principal, [unit])),
        ("there are no images", lambda: likelihood.data_moments(path, [])),
    ]


@pytest.mark.parametrize("case", range(8))
def test_what_has_no_likelihood_is_one_line(case):
    words, call = refusals()[case]
    with pytest.raises(InvalidArgument, match=words) as refused:
        call()
    assert "\n" not in str(refused.value)
