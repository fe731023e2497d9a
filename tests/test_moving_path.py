"""Paths whose basis moves: the flow's derivative, the losses' gradients, and the kinetic energy, against exact flows.

The data are mixtures of Gaussians in the pixels of 2x2 images, whose axes are none of the basis's.
"""

import math

import numpy as np
import pytest
import torch
from exact import Exact
from torch import Tensor, nn

from anisodiff.denoiser import Denoiser
from anisodiff.errors import InvalidArgument
from anisodiff.networks.unets import RawNetwork
from anisodiff.objectives.losses import kinetic, tlsm_loss
from anisodiff.objectives.path_gradient import MovingFrame, flow_response
from anisodiff.paths.noise_path import NoisePath
from anisodiff.paths.rotated import DenseBasis, SeparableBasis
from anisodiff.paths.schedules import ExponentSchedule, KnotSchedule, integrated_rate
from anisodiff.paths.subspaces import Subspaces, partition

SIDE, D, C = 2, 4, 0.5
INDEX = torch.tensor([[[0, 1], [2, 1]]])
LOGS = torch.tensor([[-3.0, -1.0, 0.4, 2.0], [-2.5, -1.8, 0.9, 2.0], [-3.5, 0.5, 1.5, 2.5]], dtype=torch.float64)
TIMES = torch.tensor([0.15, 0.4, 0.8], dtype=torch.float64)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def path_on(kind: str, logs: Tensor = LOGS) -> NoisePath:
    basis = SeparableBasis(INDEX) if kind == "separable" else DenseBasis(INDEX)
    with torch.no_grad():
        basis.turn.copy_(normal(len(basis.turn), seed=5) / 2)
    return NoisePath(basis, KnotSchedule(logs))


def dense(path: NoisePath) -> Tensor:
    """The basis's vectors as rows, `[D, D]`, with the gradient of its angles."""
    return path.from_pixels(torch.eye(D, dtype=torch.float64).reshape(D, 1, SIDE, SIDE)).reshape(D, D).T


def function(path: NoisePath, values: Tensor) -> Tensor:
    """`F(M)` in pixels, `[B, D, D]`, for `values = F(g)`, with the gradients of both."""
    rows = dense(path)
    return rows.T @ (values[:, path.subspaces.index.flatten(), None] * rows)


class PixelMixture(Exact):
    """The exact flow over a path for a mixture of Gaussians that is given in pixels."""

    def __init__(self, path: NoisePath, means: Tensor, covariances: Tensor):
        super().__init__(path)
        self.means, self.covariances = means, covariances  # [K, D], [K, D, D], of equal shares

    def log_density(self, y: Tensor, m: Tensor) -> Tensor:
        """Of pixels `[B, D]` under noise of covariances `[B, D, D]`."""
        total = self.covariances + m[:, None]
        difference = y[:, None] - self.means
        solved = torch.linalg.solve(total, difference[..., None])[..., 0]
        return (-(difference * solved).sum(-1) / 2 - torch.logdet(total) / 2).logsumexp(1)

    def score(self, y: Tensor, m: Tensor) -> Tensor:
        with torch.enable_grad():
            at = y if y.requires_grad else y.detach().requires_grad_()
            return torch.autograd.grad(self.log_density(at, m).sum(), at, create_graph=True)[0]

    def flow(self, z: Tensor, g: Tensor, labels: Tensor | None = None, augment_labels: Tensor | None = None) -> Tensor:
        basis = self.path.subspaces.detached()
        m = function(NoisePath(basis, self.path.schedule), g).detach()
        score = self.score(basis.to_pixels(z).flatten(1), m).reshape(z.shape)
        return self.path.scale(basis.from_pixels(score), g.sqrt())


def mixture_over(path: NoisePath, components: int = 3) -> PixelMixture:
    factors = normal(components, D, D, seed=1) / 2
    return PixelMixture(path, normal(components, D, seed=2), factors @ factors.mT + 0.1 * torch.eye(D).double())


def axes_probes(batch: int) -> Tensor:
    """The coordinate axes scaled by sqrt(D): their average is the exact sum over i."""
    axes = torch.eye(D, dtype=torch.float64).reshape(-1, 1, 1, SIDE, SIDE)
    return axes.expand(-1, batch, -1, -1, -1) * math.sqrt(D)


def parameters(path: NoisePath) -> tuple[Tensor, Tensor]:
    return path.subspaces.turn, path.schedule.theta


@pytest.mark.parametrize("root", ["U D", "symmetric"])
def test_derivative_of_the_flow_where_the_basis_moves(root):
    """One direction in angles and levels at once, with exact derivatives; Lemma 5 as printed is off by far."""
    path = path_on("dense")
    model, y, g = mixture_over(path), normal(3, D, seed=3), path(TIMES).g.detach()
    turned, raised = 3 * normal(6, seed=6), normal(*g.shape, seed=7)

    def matrices(step: Tensor) -> tuple[Tensor, Tensor]:
        """M and its root in pixels, a step along the direction."""
        basis = DenseBasis(INDEX)
        rows = torch.linalg.matrix_exp(skew(path.subspaces.turn.detach() + step * turned)) @ basis.vectors
        level = (g.log() + step * raised).exp()[:, INDEX.flatten()]
        m = rows.T @ (level[:, :, None] * rows)
        half = level.sqrt()[:, :, None] * rows  # N^T = D U
        return m, half.mT if root == "U D" else rows.T @ half

    zero = torch.zeros((), dtype=torch.float64)
    (m, n), (d_m, d_n) = torch.func.jvp(matrices, (zero,), (torch.ones_like(zero),))

    def flow_at(point: Tensor, step: Tensor) -> Tensor:
        m, n = matrices(step)
        return torch.stack([n[i].T @ gradient(model, point[i], m[i]) for i in range(len(point))])

    true = torch.func.jvp(lambda step: flow_at(y, step), (zero,), (torch.ones_like(zero),))[1]
    errors = []
    for i in range(len(y)):
        flow = lambda point, i=i: n[i].T @ gradient(model, point, m[i])  # noqa: E731
        bends = torch.func.jacfwd(torch.func.jacfwd(flow))(y[i])  # [f, a, b]
        slopes, score = torch.func.jacfwd(flow)(y[i]), gradient(model, y[i], m[i])
        bend, slope, end = torch.einsum("fab,ab->f", bends, d_m[i]) / 2, slopes @ d_m[i] @ score, d_n[i].T @ score
        lemma_end = torch.linalg.solve(m[i], d_m[i] @ (n[i].T @ score)) / 2
        printed_slope = slopes @ d_m[i] @ m[i] @ score  # M^{+1/2} in place of M^{-1/2}
        sums = bend + slope + end, bend + slope + lemma_end, bend + printed_slope + end
        errors.append([float((each - true[i]).abs().max()) for each in sums])
    ours, lemma, printed = (max(each) for each in zip(*errors, strict=True))
    assert ours < 1e-12
    assert lemma > (1 if root == "U D" else 0.1)
    assert printed > 1


def skew(turn: Tensor) -> Tensor:
    row, column = torch.triu_indices(D, D, 1)
    upper = torch.zeros(D, D, dtype=torch.float64).index_put((row, column), turn)
    return upper - upper.T


def gradient(model: PixelMixture, y: Tensor, m: Tensor) -> Tensor:
    return torch.func.grad(lambda point: model.log_density(point[None], m[None])[0])(y)


@pytest.mark.parametrize("kind", ["dense", "separable"])
def test_the_contracted_derivative_is_autograds_through_the_exact_flow(kind):
    path = path_on(kind)
    model, z, cotangent = mixture_over(path), normal(3, 1, SIDE, SIDE, seed=3), normal(3, 1, SIDE, SIDE, seed=4)
    g = path(TIMES).g.detach()
    response = flow_response(model, z, g, None, model.flow(z, g), cotangent, axes_probes(3))
    (found,) = torch.autograd.grad(response.in_basis(MovingFrame(path)).sum(), path.subspaces.turn)

    log_g, turn = g.log().requires_grad_(), path.subspaces.turn
    rows, now = dense(path), dense(path).detach()
    y, fixed = z.flatten(1) @ now, cotangent.flatten(1) @ now
    score = model.score(y, function(path, log_g.exp()))
    flow = (function(path, (log_g / 2).exp()) @ score[..., None])[..., 0]
    in_turn, in_levels = torch.autograd.grad((fixed * flow).sum(), (turn, log_g))
    assert rows.requires_grad
    assert torch.allclose(found, in_turn, rtol=1e-7, atol=1e-8)
    assert torch.allclose(response.in_levels(path), in_levels, rtol=1e-7, atol=1e-8)
    assert response.in_basis(MovingFrame(path)).abs().max() == 0


def exact_gradient(path: NoisePath, model: PixelMixture, x0: Tensor, eps: Tensor, weight: str) -> tuple[Tensor, Tensor]:
    """Of the mean loss in angles and levels, everything written out in pixels and nothing held constant."""
    noise = path(TIMES)
    x0, eps = x0.flatten(1), eps.flatten(1) @ dense(path).detach()
    root = function(path, noise.sigma)
    y = x0 + (root @ eps[..., None])[..., 0]
    flow = (root @ model.score(y, function(path, noise.g))[..., None])[..., 0]
    front = {"tlsm": noise.g_dot**2 / ((noise.g + C) * noise.g), "elbo": noise.g_dot / noise.g / 2}[weight]
    error = flow + eps
    loss = (error * (function(path, front) @ error[..., None])[..., 0]).sum(1).mean()
    return torch.autograd.grad(loss, parameters(path))


@pytest.mark.parametrize("weight", ["tlsm", "elbo"])
@pytest.mark.parametrize("kind", ["dense", "separable"])
def test_the_losss_gradient_is_autograds_through_the_exact_flow(kind, weight):
    """Not so the envelope alone, which is also what a correction with the basis held fixed gives the angles."""
    path = path_on(kind)
    model, x0, eps = mixture_over(path), normal(3, 1, SIDE, SIDE, seed=3), normal(3, 1, SIDE, SIDE, seed=4)
    expected = exact_gradient(path, model, x0, eps, weight)

    def found(probes: Tensor | None) -> tuple[Tensor, Tensor]:
        loss = tlsm_loss(model, x0, eps, TIMES, None, C, probes, weight=weight).mean()
        return torch.autograd.grad(loss, parameters(path))

    full, envelope = found(axes_probes(3)), found(None)
    for ours, true in zip(full, expected, strict=True):
        assert torch.allclose(ours, true, rtol=1e-7, atol=1e-8 * true.abs().max())
    for ours, true in zip(envelope, expected, strict=True):  # in angles: levels corrected, the basis not
        assert (ours - true).norm() > 0.05 * true.norm()


def test_the_losss_value_is_that_of_the_basis_as_it_is():
    path = path_on("dense")
    model, x0, eps = mixture_over(path), normal(3, 1, SIDE, SIDE, seed=3), normal(3, 1, SIDE, SIDE, seed=4)
    moving = [tlsm_loss(model, x0, eps, TIMES, None, C, probes) for probes in (None, axes_probes(3))]
    path.subspaces.turn.requires_grad_(False)
    fixed = tlsm_loss(model, x0, eps, TIMES, None, C)
    assert not path.subspaces.learnable
    assert all(torch.equal(loss, fixed) for loss in moving)


def test_the_gradient_is_that_of_the_expected_loss_in_the_turned_basis():
    """For Gaussian data the loss is quadratic in image and noise, so that cubature points give its mean exactly.

    The basis that is differentiated is moved as a whole here: the noise is drawn in its own coefficients.
    """
    path = path_on("dense")
    model = mixture_over(path, components=1)
    model.means = torch.zeros_like(model.means)
    points = torch.cat([torch.eye(2 * D), -torch.eye(2 * D)]).double() * math.sqrt(2 * D)
    root = torch.linalg.cholesky(model.covariances[0])
    x0 = (points[:, :D] @ root.T).reshape(-1, 1, SIDE, SIDE)
    eps, t = points[:, D:].reshape(-1, 1, SIDE, SIDE), torch.full((len(points),), 0.4, dtype=torch.float64)
    mean = lambda **how: tlsm_loss(model, x0, eps, t, None, C, **how).mean()  # noqa: E731
    turn = path.subspaces.turn
    (full,) = torch.autograd.grad(mean(probes=axes_probes(len(t))), turn)
    (envelope,) = torch.autograd.grad(mean(), turn)
    for k in range(len(turn)):
        sides = []
        for step in (1e-5, -1e-5):
            with torch.no_grad():
                turn[k] += step
                sides.append(mean())
                turn[k] -= step
        assert float(full[k]) == pytest.approx(float(sides[0] - sides[1]) / 2e-5, rel=1e-5, abs=1e-6)
    assert torch.allclose(envelope, full, rtol=1e-6, atol=1e-7)  # the mean of G given x_t is 0


class WrongNetwork(RawNetwork):
    """Smooth, and no denoiser of anything."""

    def __init__(self):
        super().__init__()
        self.mix = nn.Parameter(normal(D, D, seed=8) / 2)

    def forward(self, x, noise_label, labels=None):
        flat = x.flatten(1)
        return (torch.sin(flat @ self.mix) + 0.1 * flat**3 + noise_label[:, None]).reshape(x.shape)


def test_what_the_network_sees_is_held_constant():
    """The envelope of a wrong denoiser, with what may move with the angles written out."""
    path = path_on("dense")
    denoiser = Denoiser(WrongNetwork(), path)
    x0, eps = normal(3, 1, SIDE, SIDE, seed=3), normal(3, 1, SIDE, SIDE, seed=4)
    found = torch.autograd.grad(tlsm_loss(denoiser, x0, eps, TIMES, None, C).mean(), parameters(path))
    noise, rows = path(TIMES), dense(path).detach()
    in_now = lambda values: rows @ function(path, values) @ rows.T  # noqa: E731 - F(M) in present coefficients
    z = x0.flatten(1) @ rows.T + (in_now(noise.sigma) @ eps.flatten(1)[..., None])[..., 0]
    error = denoiser.flow(z.reshape(x0.shape), noise.g.detach()).flatten(1) + eps.flatten(1)
    front = in_now(noise.g_dot**2 / ((noise.g + C) * noise.g))
    loss = (error * (front @ error[..., None])[..., 0]).sum(1).mean()
    expected = torch.autograd.grad(loss, parameters(path))
    assert all(map(lambda ours, true: torch.allclose(ours, true, rtol=1e-9), found, expected))


@pytest.mark.parametrize("weight", ["tlsm", "elbo", "simple"])
@pytest.mark.parametrize("kind", ["dense", "separable"])
def test_a_basis_has_no_gradient_while_the_schedules_are_equal(kind, weight):
    path = path_on(kind, LOGS[:1].expand(3, -1))
    denoiser, x0, eps = Denoiser(WrongNetwork(), path), normal(3, 1, SIDE, SIDE, seed=3), normal(3, 1, SIDE, SIDE)
    tlsm_loss(denoiser, x0, eps, TIMES, None, C, axes_probes(3), weight=weight).mean().backward()
    assert path.subspaces.turn.grad.abs().max() == 0
    assert weight == "simple" or path.schedule.theta.grad.abs().max() > 0


def test_a_basis_that_no_loss_can_see_is_refused():
    path_on("dense").require_learnable_basis()
    with pytest.raises(InvalidArgument, match="no gradient until the schedules differ"):
        path_on("dense", LOGS[:1].expand(3, -1)).require_learnable_basis()
    whole = NoisePath(SeparableBasis(torch.zeros_like(INDEX)), KnotSchedule(LOGS[:1]))
    with pytest.raises(InvalidArgument, match="one subspace"):
        whole.require_learnable_basis()
    with pytest.raises(InvalidArgument, match="it is fixed"):
        NoisePath(Subspaces(INDEX[0]), KnotSchedule(LOGS)).require_learnable_basis()


def test_an_unknown_weight_is_refused():
    path = path_on("dense")
    with pytest.raises(InvalidArgument, match="'elob' is unknown: use one of tlsm, elbo, simple"):
        tlsm_loss(mixture_over(path), normal(3, 1, SIDE, SIDE), normal(3, 1, SIDE, SIDE), TIMES, weight="elob")


@pytest.mark.parametrize("kind", ["dense", "separable"])
def test_the_bound_of_a_gaussian_depends_on_the_ends_alone(kind):
    """Weight "elbo", stratified in time: `1/2 log det(S + M) / det M` at the start less the same at the end."""
    path = path_on(kind)
    model = mixture_over(path, components=1)
    model.means = torch.zeros_like(model.means)
    ends = function(path, path(torch.tensor([0.0, 1.0])).g.detach())
    at_ends = torch.logdet(model.covariances + ends) - torch.logdet(ends)
    batch = 40_000
    t = (
        torch.rand(batch, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + torch.arange(batch)
    ) / batch
    x0 = (normal(batch, D, seed=9) @ torch.linalg.cholesky(model.covariances[0]).T).reshape(-1, 1, SIDE, SIDE)
    with torch.no_grad():
        losses = tlsm_loss(model, x0, normal(batch, 1, SIDE, SIDE, seed=10), t, weight="elbo")
    expected = (at_ends[0] - at_ends[1]).item() / 2
    assert abs(losses.mean().item() - expected) < 4 * losses.std().item() / batch**0.5
    assert losses.std().item() / batch**0.5 < 0.01 * expected


def noise_of_the_paper(rates: Tensor) -> NoisePath:
    """FP-Noise with these rates, in a basis of its own."""
    path = path_on("dense")
    return NoisePath(path.subspaces, ExponentSchedule(rates.log()))


def test_fp_noise_in_our_coordinates_is_the_papers():
    """`c_in z` at sigma_data = 1 is x_t, and the flow is the same number: `Sigma^{1/2} score_x`."""
    rates = torch.tensor([0.3, 1.0, 2.5], dtype=torch.float64)
    path = noise_of_the_paper(rates)
    model, rows = mixture_over(path), dense(path).detach()
    x0, eps = normal(3, 1, SIDE, SIDE, seed=3), normal(3, 1, SIDE, SIDE, seed=4)
    nodes = torch.tensor([150, 250, 320])
    g = path(path.schedule.nodes[nodes]).g.detach()
    z = path.from_pixels(x0).detach() + path.scale(eps, g.sqrt())
    a = rows.T @ torch.diag(rates[INDEX.flatten()]) @ rows  # R^-1, the process's own matrix
    phi = torch.linalg.matrix_exp(-a * path.schedule.beta[nodes, None, None] / 2)
    variance = torch.eye(D).double() - phi @ phi.mT
    values, vectors = torch.linalg.eigh(variance)
    root = vectors @ (values.sqrt()[..., None] * vectors.mT)
    in_pixels = eps.flatten(1) @ rows
    x = (phi @ x0.flatten(1)[..., None] + root @ in_pixels[..., None])[..., 0]
    ours = path.to_pixels(path.scale(z, (1 + g).rsqrt())).flatten(1)
    assert (ours - x).abs().max() < 1e-12
    for i in range(3):
        of_x = PixelMixture(path, model.means @ phi[i], phi[i] @ model.covariances @ phi[i])
        flow = root[i] @ gradient(of_x, x[i], variance[i])
        assert (path.to_pixels(model.flow(z, g)).flatten(1)[i] - flow).abs().max() < 1e-12
    assert float(path.schedule.beta[-1]) == pytest.approx(10.05)  # the rate is linear, beta its integral: not 20


class AtPoint(Exact):
    """The flow of data that are one point, in coefficients."""

    def __init__(self, path: NoisePath, point: float):
        super().__init__(path)
        self.point = point

    def flow(self, z: Tensor, g: Tensor, labels: Tensor | None = None, augment_labels: Tensor | None = None) -> Tensor:
        return self.path.scale(self.point - z, g.rsqrt())


def test_kinetic_energy_along_the_normal_of_the_papers_plane():
    """Data at 2, lambda = 1: mean `2 exp(-beta/2)` and deviation `sqrt(1 - exp(-beta))` from time 0.001 to 1.

    The integral grows by 0.025 log(1/first time) as the first time falls: 7.844 here, 7.976 at 7e-6.
    """
    path = NoisePath(Subspaces(partition(1, "whole")), ExponentSchedule(torch.zeros(1)))
    nodes, weights = (torch.from_numpy(each) for each in np.polynomial.legendre.leggauss(4))
    edges = path.schedule.nodes
    t = (edges[:-1, None] + edges.diff()[:, None] * (nodes + 1) / 2).flatten()
    area = (edges.diff()[:, None] * weights / 2).flatten()
    total = 0.0
    for sign in (1.0, -1.0):  # the velocity is linear in the noise
        z = 2 + sign * path(t).sigma.detach()[..., None, None]
        energy, _ = kinetic(AtPoint(path, 2.0), z, t, torch.ones_like(z))
        total += (energy.detach() * area).sum().item() / 2
    time = torch.linspace(0, 1, 400_001, dtype=torch.float64).square() * 0.999 + 0.001
    beta = integrated_rate(time)
    square = (0.1 + 19.9 * time) ** 2 * ((-beta).exp() + (-2 * beta).exp() / (4 * -torch.expm1(-beta)))
    exact = float(torch.trapezoid(square, time))
    assert exact == pytest.approx(7.844, abs=1e-3)
    assert total / 0.999 == pytest.approx(exact, rel=2e-3)


class LinearFlow(Exact):
    """Gaussian data of these variances in the path's coefficients."""

    def __init__(self, path: NoisePath, variances: Tensor):
        super().__init__(path)
        self.variances = variances

    def flow(self, z: Tensor, g: Tensor, labels: Tensor | None = None, augment_labels: Tensor | None = None) -> Tensor:
        m = g[:, self.path.subspaces.index]
        return -m.sqrt() * z / (self.variances + m)


def test_kinetic_terms_of_a_gaussian():
    """`v_k = -1/2 g_dot / (1 + g) (s - 1) / (s + g) x_k` for data of variance s: nothing where s = 1."""
    path = path_on("dense")
    variances = torch.tensor([[[0.2, 1.0], [1.0, 3.0]]], dtype=torch.float64)
    z, probe = normal(3, 1, SIDE, SIDE, seed=3), normal(3, 1, SIDE, SIDE, seed=4)
    noise = path(TIMES)
    g, g_dot = (each[:, INDEX] for each in (noise.g, noise.g_dot))
    slope = -g_dot / (1 + g) * (variances - 1) / (variances + g) / 2
    energy, gradient = kinetic(LinearFlow(path, variances), z, TIMES, probe)
    assert torch.allclose(energy, (slope * z / (1 + g).sqrt()).square().flatten(1).sum(1), rtol=1e-12)
    assert torch.allclose(gradient, (slope * probe).square().flatten(1).sum(1), rtol=1e-12)


def test_the_kinetic_gradient_moves_the_path_under_a_flow_that_stays():
    """In angles and levels, with velocity and Jacobian written out in pixels; none reaches the network."""
    path = path_on("dense")
    network = WrongNetwork()
    denoiser = Denoiser(network, path)
    z, probe = normal(3, 1, SIDE, SIDE, seed=3), normal(3, 1, SIDE, SIDE, seed=4)
    noise, rows = path(TIMES), dense(path).detach()
    terms = kinetic(denoiser, z, TIMES, probe)
    frozen = noise.g.detach()
    flow = denoiser.flow(z, frozen).detach().flatten(1)
    jacobian = torch.stack(
        [
            torch.func.jacrev(
                lambda one, i=i: denoiser.flow(one.reshape(1, 1, SIDE, SIDE), frozen[i : i + 1]).flatten()
            )(z[i].flatten())
            for i in range(3)
        ]
    ).detach()
    f = lambda values: rows @ function(path, values) @ rows.T  # noqa: E731
    g, g_dot = noise.g, noise.g_dot
    share, of_flow, stretch = g_dot / (1 + g) / 2, g_dot / (g * (1 + g)).sqrt() / 2, (1 + g).sqrt()
    column = lambda each: each.flatten(1)[..., None]  # noqa: E731
    velocity = f(share / stretch) @ column(z) + f(of_flow) @ flow[..., None]
    slope = f(share) @ column(probe) + f(stretch) @ (jacobian.mT @ (f(of_flow) @ column(probe)))
    for found, vector in zip(terms, (velocity, slope), strict=True):
        expected = vector.square().sum((1, 2))
        assert torch.allclose(found, expected, rtol=1e-10)
        gradients = [torch.autograd.grad(each.sum(), parameters(path), retain_graph=True) for each in (found, expected)]
        assert all(map(lambda ours, true: torch.allclose(ours, true, rtol=1e-8, atol=1e-10), *gradients))
    sum(terms).sum().backward()
    assert network.mix.grad is None
