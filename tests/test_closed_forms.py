"""Closed-form denoisers against densities differentiated by autograd, and against brute force."""

import pytest
import torch
from exact import ExactMixture, unequal_path

from anisodiff.data.image_sets import Images
from anisodiff.exact.closed_forms import GaussianDenoiser, KernelDenoiser
from anisodiff.metrics.gaussians import fit_gaussians
from anisodiff.pixels import to_unit

SIDE = 4


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture(scope="module")
def images() -> Images:
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(256, (40, 1, SIDE, SIDE), generator=generator, dtype=torch.uint8)
    return Images(pixels, torch.arange(40) % 3, 3)


@pytest.fixture(scope="module")
def path():
    return unequal_path()


@pytest.fixture(params=[0.002, 0.3, 80.0])
def g(request, path):
    """Variances of the two subspaces, at small, middle and large noise."""
    return torch.tensor([[request.param**2, 1.7 * request.param**2]], dtype=torch.float64)


def noisy(path, images, g) -> torch.Tensor:
    clean = path.from_pixels(to_unit(images.pixels[:5]).to(torch.float64))
    return clean + path.scale(draw(5, 1, SIDE, SIDE), g.sqrt())


def test_kernel_is_the_posterior_mean_over_the_images(path, images, g):
    z = noisy(path, images, g)
    clean = path.from_pixels(to_unit(images.pixels).to(torch.float64))
    m = path.scale(torch.ones(1, 1, SIDE, SIDE, dtype=torch.float64), g)
    expected = []
    for each in z:
        weights = (-((each - clean).square() / m).flatten(1).sum(1) / 2).softmax(0)
        expected.append((weights[:, None, None, None] * clean).sum(0))
    model = KernelDenoiser(path, images)
    assert torch.allclose(model.denoise(z, g), torch.stack(expected), atol=1e-5)
    assert torch.allclose(model.flow(z, g), path.scale(model.denoise(z, g) - z, g.rsqrt()), atol=1e-5)


def test_kernel_with_labels_is_over_the_images_of_the_class(path, images, g):
    z, labels = noisy(path, images, g), torch.eye(3)[[0, 1, 2, 0, 1]]
    found = KernelDenoiser(path, images).denoise(z, g, labels)
    for k in range(3):
        rows = (images.labels == k).nonzero()[:, 0]
        mine = KernelDenoiser(path, Images(images.pixels, images.labels, 3, rows))
        assert torch.allclose(found[labels[:, k] > 0], mine.denoise(z[labels[:, k] > 0], g), atol=1e-12)


def test_kernel_weights_go_from_even_to_one_image(path, images):
    model = KernelDenoiser(path, images)
    entropies = []
    for sigma in (1e4, 0.002):
        g = torch.full((1, 2), sigma**2, dtype=torch.float64)
        log_weights = model.log_weights(noisy(path, images, g), g)
        entropies.append(torch.special.entr(log_weights.exp()).sum(1))
        assert torch.allclose(log_weights.exp().sum(1), torch.ones(5, dtype=torch.float64))
    assert torch.allclose(entropies[0], torch.tensor(40.0, dtype=torch.float64).log(), atol=1e-3)
    assert entropies[1].max() < 1e-9


def test_nearest_images(path, images):
    z = path.from_pixels(to_unit(images.pixels[:5]).to(torch.float64))
    found = KernelDenoiser(path, images).nearest(z, 2)
    assert torch.allclose(found[:, 0].to(torch.float64), z, atol=1e-6)
    assert not torch.allclose(found[:, 1].to(torch.float64), z, atol=1e-2)


@pytest.mark.parametrize("per_class", [False, True])
def test_gaussians_have_the_flow_of_their_density(path, images, g, per_class):
    """The whole rank, so that the covariance is the data's; the score by autograd."""
    means, factors, shares = fit_gaussians(images, 16, per_class)
    rows = path.from_pixels(factors.flatten(0, 1)).reshape(len(means), -1, SIDE**2)
    exact = ExactMixture(path, shares, path.from_pixels(means).flatten(1), rows.transpose(1, 2) @ rows)
    z = noisy(path, images, g)
    model = GaussianDenoiser(path, means, factors, shares)
    assert torch.allclose(model.flow(z, g), exact.flow(z, g), rtol=1e-6, atol=1e-6)


def test_gaussian_has_the_moments_of_the_images(images):
    means, factors, shares = fit_gaussians(images, 16)
    flat = to_unit(images.pixels).flatten(1).to(torch.float64)
    rows = factors[0].flatten(1)
    assert torch.allclose(means.flatten(), flat.mean(0))
    assert shares.tolist() == [1.0]
    assert torch.allclose(rows.T @ rows, flat.T.cov(), atol=1e-12)
    kept = fit_gaussians(images, 3)[1][0].flatten(1)
    assert torch.allclose(kept, rows[:3])
    assert (rows.square().sum(1).diff() <= 0).all()


def test_gaussian_with_labels_is_that_of_the_class(path, images, g):
    means, factors, shares = fit_gaussians(images, 8, per_class=True)
    z, labels = noisy(path, images, g), torch.eye(3)[[0, 1, 2, 0, 1]]
    found = GaussianDenoiser(path, means, factors, shares).denoise(z, g, labels)
    alone = GaussianDenoiser(path, means[:1], factors[:1], torch.ones(1))
    assert torch.allclose(found[[0, 3]], alone.denoise(z[[0, 3]], g), atol=1e-12)
