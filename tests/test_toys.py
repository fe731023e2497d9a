"""The toy's exact flow against a density differentiated by autograd, and the small network that learns it."""

import pytest
import torch
from exact import flat_path

from anisodiff.denoiser import Denoiser
from anisodiff.errors import InvalidArgument
from anisodiff.exact.toys import Plane, as_images
from anisodiff.grids.fixed import karras
from anisodiff.networks.mlp import Mlp
from anisodiff.objectives.losses import edm_loss
from anisodiff.paths.noise_path import edm_path
from anisodiff.solvers.generation import generate
from anisodiff.solvers.loop import solve
from anisodiff.solvers.registry import SOLVERS

TILTED = Plane(2.0, (1.0, 0.09), 0.6, 0.1)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_points_lie_on_the_plane_with_its_moments():
    flat = Plane(2.0, (1.0, 0.09), 0.6)
    points = flat.draw(50_000, torch.Generator().manual_seed(0)).flatten(1)
    assert (points @ flat.normal - 2).abs().max() < 1e-12
    in_plane = points - 2 * flat.normal
    assert float(in_plane[:, 1].var()) == pytest.approx(0.09, rel=0.03)
    assert float((in_plane - in_plane[:, 1:2] * torch.tensor([0.0, 1, 0])).square().sum(1).mean()) == pytest.approx(
        1, rel=0.03
    )
    assert torch.equal(Plane().mean, torch.tensor([0, 0, 2], dtype=torch.float64))
    thick = TILTED.draw(50_000, torch.Generator().manual_seed(0)).flatten(1) @ TILTED.normal
    assert float(thick.std()) == pytest.approx(0.1, rel=0.03)


@pytest.mark.parametrize("plane", [Plane(), TILTED])
@pytest.mark.parametrize("level", [0.05, 1.0, 20.0])
def test_the_exact_flow_is_that_of_the_density(plane, level):
    """`M^{1/2} score`, by autograd, over a random basis with three levels."""
    logs = torch.tensor([[-9.0, 9.0]]).double().expand(3, -1)
    path = flat_path(logs, torch.arange(3), seed=4)
    g = (level * torch.tensor([[1.0, 0.5, 2.0]], dtype=torch.float64)).square()
    vectors = path.subspaces.vectors
    m = vectors.T @ torch.diag(g[0]) @ vectors
    covariance = plane.factors.T @ plane.factors + m
    x = (plane.mean + normal(6, 3) * (1 + level)).requires_grad_()
    density = torch.distributions.MultivariateNormal(plane.mean, covariance).log_prob(x)
    (score,) = torch.autograd.grad(density.sum(), x)
    flow = plane.denoiser(path).flow(path.from_pixels(as_images(x.detach())), g).flatten(1)
    expected = score @ vectors.T * g.sqrt()
    torch.testing.assert_close(flow, expected, rtol=1e-7, atol=1e-7)


def test_with_unit_variances_the_flow_of_isotropic_noise_is_vertical():
    """The paper's ground truth (Eq. 21): starting from N(0, T^2), x and y keep their place but for a scale."""
    path = edm_path(1)
    levels = karras(400, 1, 0.02, 80.0, append_zero=False)
    z = as_images(80 * normal(5, 3))
    end = solve(Plane().denoiser(path), z, levels, SOLVERS["heun"].step).flatten(1)
    torch.testing.assert_close(end[:, :2], z.flatten(1)[:, :2] * (1 + 4e-4) ** 0.5 / 6401**0.5, rtol=1e-3, atol=1e-4)
    assert (end[:, 2] - 2).abs().max() < 0.1


def trained(classes: int = 0) -> Denoiser:
    torch.manual_seed(0)
    model = Denoiser(Mlp(1, 3, classes), edm_path(1), 1.0)
    optimiser = torch.optim.Adam(model.parameters(), 3e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        x0 = TILTED.draw(256, generator).float()
        sigma = (1.5 * torch.randn(256, generator=generator)).exp()
        eps = torch.randn(x0.shape, generator=generator)
        loss = edm_loss(model, x0, eps, sigma).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return model.requires_grad_(False)


def test_the_small_network_learns_the_flow():
    model, exact = trained(), TILTED.denoiser(edm_path(1))
    for sigma in (0.3, 1.0, 3.0):
        z = TILTED.draw(500, torch.Generator().manual_seed(1)).float()
        z = z + sigma * torch.randn(z.shape, generator=torch.Generator().manual_seed(2))
        g = torch.full((1, 1), sigma**2, dtype=torch.float64)
        error = (model.flow(z, g) - exact.flow(z, g)).square().flatten(1).sum(1).mean()
        assert error < 0.1 * exact.flow(z, g).square().flatten(1).sum(1).mean()
    made = generate(model, karras(20, 1, 0.02, 80.0), SOLVERS["heun"].step, range(4), (3, 1, 1), 0, 4)
    assert next(made)[1].shape == (4, 3, 1, 1)


def test_the_small_network_has_the_face_of_a_raw_network():
    network = Mlp(2, 3, label_dim=4).double()
    assert (network.shape, network.classes) == ((3, 2, 2), 4)
    assert type(network)(**network.config).load_state_dict(network.state_dict())
    x, label, labels = normal(4, 3, 2, 2), normal(4), torch.eye(4, dtype=torch.float64)
    found = network(x, label, labels)
    assert found.shape == x.shape
    for other in (network(x, label), network(x, label + 1, labels), network(x, label, labels.flip(0))):
        assert not torch.allclose(found, other)
    with pytest.raises(InvalidArgument, match="labels: 3 classes for a network of 4"):
        network(x, label, labels[:, :3])
    with pytest.raises(InvalidArgument, match="for an unconditional network"):
        Mlp(2, 3)(x.float(), label.float(), labels.float())


def test_a_plane_of_negative_variance_is_refused():
    for wrong in (lambda: Plane(variances=(1.0, -1.0)), lambda: Plane(thickness=-0.1)):
        with pytest.raises(InvalidArgument, match="plane: its variances and its thickness"):
            wrong()
