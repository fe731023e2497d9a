"""The derivative of the flow in theta, against exact mixtures and brute force (paper, Lemma 5)."""

import itertools

import pytest
import torch
from exact import ExactMixture, mixture_over
from runs import RUN, SPACE, inputs_of
from torch import nn

from anisodiff.denoiser import Denoiser
from anisodiff.errors import StageError
from anisodiff.networks.unets import RawNetwork
from anisodiff.objectives.losses import tlsm_loss
from anisodiff.objectives.path_gradient import flow_derivative
from anisodiff.paths.noise_path import NoisePath
from anisodiff.paths.schedules import KnotSchedule
from anisodiff.paths.subspaces import Subspaces, partition
from anisodiff.stages import finetuning
from anisodiff.storage import checkpoints

SIDE = 2  # four dimensions in two subspaces


def path_of(logs: torch.Tensor | None = None) -> NoisePath:
    if logs is None:
        logs = torch.tensor([[-3.0, -1.0, 0.4, 2.0], [-2.5, -1.8, 0.9, 2.0]])
    return NoisePath(Subspaces(torch.tensor([[0, 1], [1, 1]])), KnotSchedule(logs))


def exact_derivative(model: ExactMixture, z: torch.Tensor, g: torch.Tensor, cotangent: torch.Tensor) -> torch.Tensor:
    """`<G, d flow / d log g_j>` of the exact flow by central differences in log g."""
    columns = []
    for j in range(g.shape[1]):
        shift = torch.zeros_like(g)
        shift[:, j] = 1e-5
        up, down = (model.flow(z, (g.log() + sign * shift).exp()).detach() for sign in (1, -1))
        columns.append((cotangent * (up - down)).flatten(1).sum(1) / 2e-5)
    return torch.stack(columns, dim=1)


def axes_probes(batch: int) -> torch.Tensor:
    """The coordinate axes scaled by sqrt(d): their average is the exact sum over i."""
    axes = torch.eye(SIDE**2, dtype=torch.float64).reshape(-1, 1, 1, SIDE, SIDE)
    return axes.expand(-1, batch, -1, -1, -1) * SIDE


def test_exact_derivative_of_a_mixture():
    path = path_of()
    model, z, cotangent = mixture_over(path)
    g = path(torch.tensor([0.2, 0.5, 0.9])).g.detach()
    derivative = flow_derivative(model, z, g, None, model.flow(z, g), cotangent, axes_probes(3))
    assert torch.allclose(derivative, exact_derivative(model, z, g, cotangent), rtol=1e-7, atol=1e-8)


def test_the_papers_exponent_is_wrong():
    """With M^{+1/2} in the middle term, as printed in the paper, the derivative is off by far."""
    path = path_of()
    model, z, cotangent = mixture_over(path)
    g = path(torch.tensor([0.2, 0.5, 0.9])).g.detach()
    flow = model.flow(z, g)
    derivative = flow_derivative(model, z, g, None, flow, cotangent, axes_probes(3))
    z = z.requires_grad_()
    (slope,) = torch.autograd.grad(model.flow(z, g), z, cotangent)
    term = lambda power: path.inner(slope, path.scale(flow.detach(), g * g**power))  # noqa: E731
    wrong = derivative - term(-0.5) + term(0.5)
    assert (wrong - exact_derivative(model, z.detach(), g, cotangent)).abs().max() > 1e-2


@pytest.mark.parametrize("kind", ["sign", "normal"])
def test_probe_estimate_is_unbiased(kind):
    path = path_of()
    model, z, cotangent = mixture_over(path)
    g = path(torch.tensor([0.2, 0.5, 0.9])).g.detach()
    generator = torch.Generator().manual_seed(1)
    estimates = []
    for _ in range(400):
        probes = torch.randn(1, *z.shape, generator=generator, dtype=torch.float64)
        probes = probes.sign() if kind == "sign" else probes
        estimates.append(flow_derivative(model, z, g, None, model.flow(z, g), cotangent, probes))
    estimates = torch.stack(estimates)
    error = estimates.mean(0) - exact_derivative(model, z, g, cotangent)
    assert (error.abs() <= 4 * estimates.std(0) / len(estimates) ** 0.5 + 1e-9).all()


class WrongNetwork(RawNetwork):
    """Smooth, cubic in its input, and no denoiser of anything; it reads its noise label."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(2)
        self.mix = nn.Parameter(torch.randn(4, 4, generator=generator, dtype=torch.float64) / 2)

    def forward(self, x, noise_label, labels=None):
        flat = x.flatten(1)
        return (torch.sin(flat @ self.mix) + 0.1 * flat**3 + noise_label[:, None]).reshape(x.shape)


def brute_force_gradient(mode: str, path: NoisePath, network: nn.Module, x0, eps, t, c: float) -> torch.Tensor:
    """theta-gradient of the mean loss, one image, coefficient and derivative at a time; sums over axes are exact.

    What may move with theta is written out: `position` and `front` follow theta, `frozen` does not.
    """
    denoiser = Denoiser(network, path)
    theta = path.schedule.theta

    def noise(parameters):
        curve = torch.func.functional_call(path, {"schedule.theta": parameters}, (t,))
        return curve.g, curve.g_dot

    frozen = noise(theta.detach())[0]
    expand = lambda values: path.scale(torch.ones_like(eps), values)  # noqa: E731

    def flow(position):
        return denoiser.flow(position, frozen)

    def loss(parameters):
        g, g_dot = noise(parameters)
        z = path.from_pixels(x0) + expand(g.sqrt()) * eps
        front = expand(g_dot**2 / ((g + c) * g))
        return (front * (flow(z) + eps) ** 2).sum() / len(x0)

    (gradient,) = torch.autograd.grad(loss(theta), theta)
    if mode == "envelope":
        return gradient
    z = (path.from_pixels(x0) + expand(frozen.sqrt()) * eps).detach()
    f, m = flow(z).detach(), expand(frozen)
    g_dot = noise(theta.detach())[1]
    cotangent = 2 * expand(g_dot**2 / ((frozen + c) * frozen)) * (f + eps) / len(x0)
    for j, k in itertools.product(*(range(size) for size in theta.shape)):
        direction = torch.zeros_like(theta)
        direction[j, k] = 1.0
        d_g = torch.func.jvp(lambda p: noise(p)[0], (theta.detach(),), (direction,))[1]
        d_m = expand(d_g)
        total = torch.zeros_like(f)
        for i in range(eps[0].numel()):
            axis = torch.zeros_like(eps[0]).flatten()
            axis[i] = 1.0
            axis = axis.reshape(eps[0].shape).expand_as(eps)
            h = 1e-3
            corners = [(a, b, flow(z + a * h * axis + b * h * d_m * axis).detach()) for a in (1, -1) for b in (1, -1)]
            total += 0.5 * sum(a * b * value for a, b, value in corners) / (4 * h * h)
        total += torch.func.jvp(flow, (z,), (d_m * f / m.sqrt(),))[1].detach()
        total += 0.5 * d_m / m * f
        gradient[j, k] += (cotangent * total).sum()
    return gradient


@pytest.mark.parametrize("mode", ["full", "envelope"])
def test_tlsm_gradient_of_a_wrong_denoiser(mode):
    """Everything TLSM holds constant and everything it lets through, seen where an exact network would hide it."""
    path, network = path_of(), WrongNetwork()
    generator = torch.Generator().manual_seed(3)
    x0, eps = (torch.randn(3, 1, SIDE, SIDE, generator=generator, dtype=torch.float64) for _ in range(2))
    t = torch.tensor([0.15, 0.4, 0.8], dtype=torch.float64)
    probes = axes_probes(3) if mode == "full" else None
    tlsm_loss(Denoiser(network, path), x0, eps, t, None, 0.7, probes).mean().backward()
    expected = brute_force_gradient(mode, path, network, x0, eps, t, 0.7)
    assert torch.allclose(path.schedule.theta.grad, expected, rtol=1e-4, atol=1e-6 * expected.abs().max())


def test_a_leak_through_the_preconditioning_would_be_seen():
    """The same loss with nothing held constant has another gradient, so the test above can fail."""
    path, network = path_of(), WrongNetwork()
    generator = torch.Generator().manual_seed(3)
    x0, eps = (torch.randn(3, 1, SIDE, SIDE, generator=generator, dtype=torch.float64) for _ in range(2))
    t = torch.tensor([0.15, 0.4, 0.8], dtype=torch.float64)
    noise = path(t)
    flow = Denoiser(network, path).flow(path.from_pixels(x0) + path.scale(eps, noise.sigma), noise.g)
    front = noise.g_dot**2 / ((noise.g + 0.7) * noise.g)
    (path.inner(flow + eps, flow + eps) * front).sum(1).mean().backward()
    expected = brute_force_gradient("envelope", path, network, x0, eps, t, 0.7)
    assert (path.schedule.theta.grad - expected).abs().max() > 0.05 * expected.abs().max()


def isotropic() -> tuple[NoisePath, torch.Tensor, torch.Tensor, torch.Tensor]:
    """A path of one subspace, with images, noise and times."""
    path = NoisePath(Subspaces(partition(SIDE, "whole")), KnotSchedule(torch.tensor([[-3.0, -1.0, 0.4, 2.0]])))
    generator = torch.Generator().manual_seed(3)
    x0, eps = (torch.randn(3, 1, SIDE, SIDE, generator=generator, dtype=torch.float64) for _ in range(2))
    return path, x0, eps, torch.tensor([0.15, 0.4, 0.8], dtype=torch.float64)


def test_the_gradient_through_the_level_is_the_losss_own_for_a_wrong_denoiser():
    """By central differences in theta; the one for an exact network is another."""
    path, x0, eps, t = isotropic()
    denoiser, theta = Denoiser(WrongNetwork(), path), path.schedule.theta
    mean = lambda **how: tlsm_loss(denoiser, x0, eps, t, None, 0.7, **how).mean()  # noqa: E731
    (found,) = torch.autograd.grad(mean(through_level=True), theta)
    (full,) = torch.autograd.grad(mean(probes=axes_probes(3)), theta)
    assert mean(through_level=True).item() == mean().item()
    expected = torch.zeros_like(theta)
    for k in range(theta.shape[1]):
        sides = []
        for h in (1e-6, -1e-6):
            with torch.no_grad():
                theta[0, k] += h
                sides.append(mean())
                theta[0, k] -= h
        expected[0, k] = (sides[0] - sides[1]) / 2e-6
    assert torch.allclose(found, expected, rtol=1e-6, atol=1e-7 * expected.abs().max())
    assert (full - expected).abs().max() > 0.05 * expected.abs().max()


def test_for_an_exact_network_both_derivatives_are_the_same():
    path, x0, eps, t = isotropic()
    model, _, _ = mixture_over(path)
    both = [
        torch.autograd.grad(tlsm_loss(model, x0, eps, t, None, 0.7, **how).mean(), path.schedule.theta)[0]
        for how in ({"through_level": True}, {"probes": axes_probes(3)})
    ]
    assert torch.allclose(*both, rtol=1e-6, atol=1e-8)


def test_the_level_gradient_is_for_one_subspace(start, tmp_path):
    _, x0, eps, t = isotropic()
    with pytest.raises(ValueError, match="one subspace only"):
        tlsm_loss(Denoiser(WrongNetwork(), path_of()), x0, eps, t, through_level=True)
    outputs = tmp_path / "network.safetensors", tmp_path / "path.safetensors"
    with pytest.raises(StageError, match="gradient: level is for one subspace, this path has 2: take full or envelope"):
        finetuning.finetune(SPACE, RUN.changed(path_gradient="level"), inputs_of(start), *outputs)
    isotropic_run = RUN.changed(path_gradient="level", subspaces="whole", label_weights="rank", kimg=0.128)
    finetuning.finetune(SPACE, isotropic_run, inputs_of(start), *outputs)
    paths = [checkpoints.load_path(file)[0].curve.logs for file in (start[1], outputs[1])]
    assert (paths[0] - paths[1]).abs().max() > 1e-4


def test_value_and_network_gradient_do_not_depend_on_the_mode():
    """The correction is worth zero: it changes theta's gradient and nothing else."""
    generator = torch.Generator().manual_seed(3)
    x0, eps = (torch.randn(4, 1, SIDE, SIDE, generator=generator, dtype=torch.float64) for _ in range(2))
    t = torch.linspace(0.1, 0.9, 4, dtype=torch.float64)
    results = []
    for probes in (None, axes_probes(2), axes_probes(4)):
        network = WrongNetwork()
        losses = tlsm_loss(Denoiser(network, path_of()), x0, eps, t, None, 0.7, probes)
        losses.mean().backward()
        results.append((losses.detach(), network.mix.grad))
    for losses, gradient in results[1:]:
        assert torch.allclose(losses, results[0][0])
        assert torch.allclose(gradient, results[0][1])


def test_partition_helper_is_the_papers_block():
    index = partition(8, "block")
    assert (index == 0).sum() == 16
    assert (index[:4, :4] == 0).all()
