"""A turning frame cannot be seen in the noise path's coordinates; in the process's own every step pays for it."""

import copy

import pytest
import torch
from exact import flat_path, mixture_over
from small_network import network as small
from torch import Tensor, nn

from anisodiff.denoiser import Denoiser
from anisodiff.errors import InvalidArgument
from anisodiff.exact.flexible_process import FlexibleProcess
from anisodiff.grids.levels import at
from anisodiff.networks.turned import PlaneFrame, Turned
from anisodiff.networks.unets import RawNetwork
from anisodiff.objectives.losses import edm_loss
from anisodiff.paths.noise_path import NoisePath
from anisodiff.paths.schedules import KnotSchedule
from anisodiff.paths.subspaces import Subspaces, partition
from anisodiff.solvers.loop import solve
from anisodiff.solvers.registry import SOLVERS
from anisodiff.solvers.singlestep import ProbabilityFlow, State
from anisodiff.solvers.stochastic import euler_maruyama

SPECTRUM = torch.tensor([1.0, 0.25, 0.04, 1.44], dtype=torch.float64)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def omega(rates: list[float]) -> Tensor:
    blocks = [torch.tensor([[0, rate], [-rate, 0]], dtype=torch.float64) for rate in rates]
    return torch.block_diag(*blocks)


def test_a_frame_turns_by_the_matrix_exponential():
    """In pixels, and in the coefficients of a basis; coordinates that no plane has stay."""
    x, beta = normal(3, 5, 1, 1), torch.tensor([0.1, 1.0, 8.0], dtype=torch.float64)
    rates = torch.tensor([0.7, -2.0], dtype=torch.float64)
    matrix = torch.zeros(5, 5, dtype=torch.float64)
    order = [3, 0, 1, 4]
    matrix[torch.tensor(order)[:, None], torch.tensor(order)] = omega(rates.tolist())
    basis = flat_path(torch.tensor([[-1.0, 1.0]]), torch.zeros(5, dtype=torch.int64), seed=1).subspaces
    for each in (None, basis):
        vectors = torch.eye(5, dtype=torch.float64) if each is None else basis.vectors
        q = torch.linalg.matrix_exp(-beta[:, None, None] * (vectors.T @ matrix @ vectors))
        frame = PlaneFrame(order, rates, each)
        assert torch.allclose(frame.turn(x, beta).flatten(1), (q @ x.flatten(1)[:, :, None])[:, :, 0], atol=1e-13)
        assert torch.allclose(frame.turn(frame.turn(x, beta), -beta), x, atol=1e-13)


def test_the_label_says_how_far_the_frame_has_turned():
    """By `log(1 + g)`; then the same way back."""

    class Seen(RawNetwork):
        shape, classes = (1, 2, 2), 0

        def forward(self, x, noise_label, labels=None, augment_labels=None):
            self.x = x
            return x + 1

    inner, g = Seen(), torch.tensor([1e-9, 0.3, 6400.0], dtype=torch.float64)
    frame = PlaneFrame(range(4), torch.tensor([0.7, 2.0], dtype=torch.float64))
    x, ones = normal(3, 1, 2, 2), torch.ones(3, 1, 2, 2, dtype=torch.float64)
    found = Turned(inner, frame)(x, g.log() / 8)
    assert torch.allclose(inner.x, frame.turn(x, torch.log1p(g)), atol=1e-12)
    assert torch.allclose(found, x + frame.turn(ones, -torch.log1p(g)), atol=1e-12)


class InOwnCoordinates(RawNetwork):
    """F of the exact flow, from the process's own coordinates `x = Q c_in y`; it turns back by itself.

    Args:
        model: the exact flow over a path.
        frame: the process's; None does not turn.
    """

    def __init__(self, model, frame: PlaneFrame | None):
        super().__init__()
        self.model, self.frame = model, frame
        self.config = {"in_channels": 1, "img_resolution": 2, "label_dim": 0}

    def forward(self, x, noise_label, labels=None, augment_labels=None):
        g = (8 * noise_label).exp()[:, None]
        back = x if self.frame is None else self.frame.turn(x, -torch.log1p(g[:, 0]))
        z = back * (1 + g).sqrt()[:, :, None, None]
        # F of sigma_data = 1: flow = -sqrt(g) / (1 + g) z + F / sqrt(1 + g)
        raw = (self.model.flow(z, g) + z * (g.sqrt() / (1 + g))[:, :, None, None]) * (1 + g).sqrt()[:, :, None, None]
        return raw if self.frame is None else self.frame.turn(raw, torch.log1p(g[:, 0]))


def exact_denoisers() -> list[Denoiser]:
    """Over one isotropic path: not turned, and turned at two rates."""
    logs = torch.tensor([[-6.0, 6.0]], dtype=torch.float64)
    path = NoisePath(Subspaces(partition(2, "whole")), KnotSchedule(logs))
    model = mixture_over(path)[0]
    found = [Denoiser(InOwnCoordinates(model, None), path, 1.0)]
    for rates in ([0.7, -2.0], [3.0, 0.1]):
        frame = PlaneFrame(range(4), torch.tensor(rates, dtype=torch.float64))
        found.append(Denoiser(Turned(InOwnCoordinates(model, frame), frame), path, 1.0))
    return found


def test_loss_and_samples_of_the_exact_flow_do_not_depend_on_the_frame():
    straight, *turned = exact_denoisers()
    x0, eps, z = normal(5, 1, 2, 2), normal(5, 1, 2, 2, seed=1), 10 * normal(5, 1, 2, 2, seed=2)
    sigma = torch.tensor([0.1, 0.5, 1.0, 4.0, 15.0], dtype=torch.float64)
    levels = at(torch.logspace(1.2, -1.2, 12, dtype=torch.float64)[:, None, None])
    loss, end = edm_loss(straight, x0, eps, sigma), solve(straight, z, levels, SOLVERS["heun"].step)
    for each in turned:
        assert torch.allclose(edm_loss(each, x0, eps, sigma), loss, rtol=1e-12)
        assert torch.allclose(solve(each, z, levels, SOLVERS["heun"].step), end, atol=1e-11)
        assert each.evaluations == straight.evaluations
    bare = Denoiser(turned[0].network.network, straight.path, 1.0)  # the test can tell
    assert not torch.allclose(edm_loss(bare, x0, eps, sigma), loss, rtol=0.1)


def frechet(found: Tensor, truth: Tensor) -> float:
    """Squared Frechet distance of two covariances, mean 0."""
    root = torch.linalg.eigvals((found @ truth).detach()).real.clamp(min=0).sqrt()
    return float(found.trace() + truth.trace() - 2 * root.sum())


def betas(steps: int) -> tuple[Tensor, Tensor]:
    """The paper's at uniform times down to 1e-3, and the steps as its code makes them, with the rate at their start."""
    t = torch.linspace(1, 1e-3, steps + 1, dtype=torch.float64)
    return 0.1 * t + 9.95 * t**2, (0.1 + 19.9 * t[:-1]) * -t.diff()


def in_own_coordinates(rate: float, times: Tensor, lengths: Tensor) -> float:
    """Exact covariance of Euler and Maruyama's samples of `dx = 1/2 beta' (-x - 2 omega x) dt + sqrt(beta') dW`."""
    process = FlexibleProcess(torch.eye(4, dtype=torch.float64), omega([rate, rate]))
    unit = torch.eye(4, dtype=torch.float64)
    found = unit
    for beta, length in zip(times[:-1].tolist(), lengths.tolist(), strict=True):
        phi, added = process.transition(beta)
        score = -torch.linalg.inv(phi @ torch.diag(SPECTRUM) @ phi.T + added)
        step = unit + length * (unit / 2 + process.drift + score)
        found = step @ found @ step.T + length * unit
    phi, added = process.transition(float(times[-1]))
    return frechet(found, phi @ torch.diag(SPECTRUM) @ phi.T + added)


class Gaussian(nn.Module):
    """Exact flow of N(0, diag(SPECTRUM)) over one subspace."""

    def flow(self, z: Tensor, g: Tensor) -> Tensor:
        g = g[:, :, None, None]
        return -g.sqrt() * z / (SPECTRUM.reshape(1, 1, 2, 2) + g)


def in_the_frame(rate: float, times: Tensor) -> float:
    """The same of the solver over the turned network. It is affine: its matrix from the unit vectors."""
    frame = PlaneFrame(range(4), torch.tensor([rate, rate], dtype=torch.float64))
    path = NoisePath(Subspaces(partition(2, "whole")), KnotSchedule(torch.tensor([[-9.0, 10.0]], dtype=torch.float64)))
    model = Denoiser(Turned(InOwnCoordinates(Gaussian(), frame), frame), path, 1.0).requires_grad_(False)
    levels = at(torch.expm1(times).sqrt()[:, None, None])
    vectors, nothing = torch.eye(4, dtype=torch.float64).reshape(4, 1, 2, 2), torch.zeros(4, 1, 2, 2).double()
    found = torch.eye(4, dtype=torch.float64) * float(levels.nodes[0].square() + 1)
    for k in range(levels.steps):
        step = lambda z, noise, k=k: euler_maruyama(  # noqa: E731
            ProbabilityFlow(model), State(z, source=lambda: noise), k, levels
        ).z.flatten(1)
        moved, added = step(vectors, nothing), step(nothing, vectors)
        found = moved.T @ found @ moved + added.T @ added
    end = float(levels.nodes[-1].square())
    return frechet(found / (1 + end), (torch.diag(SPECTRUM) + end * torch.eye(4).double()) / (1 + end))


def test_steps_in_the_processs_own_coordinates_pay_for_the_turn():
    """Each stretches the state by about `1 + (omega dbeta)^2 / 2`; 100 steps, rates of 2."""
    times, lengths = betas(100)
    assert in_own_coordinates(2.0, times, lengths) == pytest.approx(0.14, rel=0.02)
    assert in_own_coordinates(0.0, times, lengths) == pytest.approx(1.4e-4, rel=0.04)
    # the solver's own steps are differences of beta
    still = in_own_coordinates(0.0, times, -times.diff())
    assert still == pytest.approx(3.71e-4, rel=0.01)
    assert in_own_coordinates(2.0, times, -times.diff()) == pytest.approx(0.138, rel=0.01)
    for rate in (0.0, 2.0):
        assert in_the_frame(rate, times) == pytest.approx(still, rel=1e-6)


def test_it_is_a_raw_network_with_rates_that_learn():
    """Shape, classes and labels are the network's; a deep copy learns on its own."""
    inner = small()
    model = Turned(inner, PlaneFrame(range(8), torch.full((4,), 0.5)))
    assert (model.shape, model.classes) == ((2, 8, 8), 3)
    assert isinstance(model, RawNetwork)
    path = NoisePath(Subspaces(partition(8, "whole")), KnotSchedule(torch.tensor([[-6.0, 6.0]])))
    labels = torch.eye(3, dtype=torch.float64)
    z = normal(3, 2, 8, 8)
    g = torch.tensor([[0.1], [1.0], [10.0]], dtype=torch.float64)
    twin = copy.deepcopy(model)
    Denoiser(model, path).flow(z, g, labels).square().sum().backward()
    assert model.frame.rates.grad.abs().min() > 0
    assert twin.frame.rates.grad is None
    with pytest.raises(InvalidArgument, match="labels: 2 classes"):
        model(z, g[:, 0].log() / 8, labels[:, :2])


@pytest.mark.parametrize(
    ("coordinates", "planes", "words"),
    [
        ([0, 1, 2], 1, "3 coordinates are no pairs: leave one out"),
        ([0, 1, 1, 2], 2, "must differ"),
        ([-1, 1], 1, "start at 0"),
        ([0, 1], 2, "2 rates for 1 planes"),
    ],
)
def test_what_is_no_frame_is_one_line(coordinates, planes, words):
    with pytest.raises(InvalidArgument, match=words) as refused:
        PlaneFrame(coordinates, torch.zeros(planes))
    assert "\n" not in str(refused.value)


def test_planes_of_larger_images_are_refused():
    with pytest.raises(InvalidArgument, match="no coordinate 128 in images of 128"):
        Turned(small(), PlaneFrame([0, 128], torch.zeros(1)))
