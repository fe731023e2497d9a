"""Bases that can be learned, the exponent schedule, and what holds on any basis: solvers, averages, files."""

import copy
import gc
import math
import weakref

import pytest
import torch
from exact import Exact, measured_orders
from torch import Tensor

from anisodiff.denoiser import Denoiser
from anisodiff.errors import InvalidArgument, StageError
from anisodiff.grids.fixed import uniform
from anisodiff.networks.unets import RawNetwork
from anisodiff.objectives.losses import edm_loss, tlsm_loss
from anisodiff.paths import rotated
from anisodiff.paths.noise_path import NoisePath
from anisodiff.paths.rotated import (
    SeparableBasis,
    bands,
    principal_vectors,
    random_vectors,
    rotated_basis,
)
from anisodiff.paths.schedules import ExponentSchedule, FixedSchedule, KnotSchedule, LogLinear, integrated_rate
from anisodiff.paths.splitting import split_path
from anisodiff.paths.subspaces import Basis, Subspaces, dct_matrix, partition
from anisodiff.solvers.generation import start
from anisodiff.solvers.loop import solve
from anisodiff.solvers.registry import SOLVERS
from anisodiff.storage import checkpoints
from anisodiff.training.loop import TrainingPlan, TrainingState, train

SIDE = 4
LOGS = torch.tensor([[-6.0, 4.0], [-3.0, 3.0]], dtype=torch.float64)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def turned(basis, angle: float = 0.5, seed: int = 5):
    with torch.no_grad():
        basis.turn.copy_(angle * normal(len(basis.turn), seed=seed))
    return basis


BASES = {
    "separable": lambda: turned(rotated_basis("separable:5", (3, SIDE, SIDE))),
    "separable, one channel": lambda: turned(rotated_basis("separable:5", (1, SIDE, SIDE))),
    "separable, more than a channel has": lambda: turned(rotated_basis("separable:20", (3, SIDE, SIDE))),
    "dense": lambda: turned(rotated_basis("dense:5", (3, SIDE, SIDE))),
    "dense, identity": lambda: turned(rotated_basis("dense:5", (3, SIDE, SIDE), "identity")),
    "dense, random": lambda: turned(rotated_basis("dense:48", (3, SIDE, SIDE), random_vectors(48, 1))),
}


def rows_of(basis) -> Tensor:
    """The vectors, in the order of the coefficients, `[D, D]`."""
    shape = basis.index.shape
    identity = torch.eye(basis.index.numel(), dtype=torch.float64).reshape(-1, *shape)
    return basis.from_pixels(identity).reshape(len(identity), -1).T


@pytest.mark.parametrize("name", BASES)
def test_bases_are_orthonormal_and_go_there_and_back(name):
    basis = BASES[name]()
    rows, x = rows_of(basis), normal(2, *basis.index.shape)
    assert isinstance(basis, Basis)
    assert (rows @ rows.T - torch.eye(len(rows))).abs().max() < 1e-13
    assert (basis.to_pixels(basis.from_pixels(x)) - x).abs().max() < 1e-13
    assert (basis.to_pixels(x).flatten(1) - x.flatten(1) @ rows).abs().max() < 1e-13
    assert basis.from_pixels(x.float()).dtype == torch.float32


@pytest.mark.parametrize("name", BASES)
def test_functions_of_the_covariance_are_dense_products(name):
    """`F(M) x = sum_j F(g_j) sum_{k in j} u_k u_k^T x`, and inner products in each subspace."""
    basis = BASES[name]()
    rows, index = rows_of(basis), basis.index.flatten()
    x, y, values = normal(2, *basis.index.shape), normal(2, *basis.index.shape, seed=1), normal(2, basis.count, seed=2)
    found = basis.to_pixels(basis.scale(basis.from_pixels(x), values)).flatten(1)
    products = basis.inner(basis.from_pixels(x), basis.from_pixels(y))
    for b in range(2):
        parts = [rows[index == j] for j in range(basis.count)]
        expected = sum(values[b, j] * part.T @ (part @ x[b].flatten()) for j, part in enumerate(parts))
        assert torch.allclose(found[b], expected, atol=1e-12)
        assert torch.allclose(
            products[b], torch.stack([part @ x[b].flatten() @ (part @ y[b].flatten()) for part in parts])
        )
    assert basis.ranks.tolist() == [len(part) for part in parts]


def test_a_separable_basis_is_the_product_of_its_rotations():
    basis = BASES["separable"]()
    sizes, parts = (3, SIDE, SIDE), []
    for size, turn, start_at in zip(
        sizes, basis.turn.detach().split([3, 6, 6]), (torch.eye(3).double(), dct_matrix(4), dct_matrix(4)), strict=True
    ):
        upper = torch.zeros(size, size, dtype=torch.float64)
        upper[tuple(torch.triu_indices(size, size, 1))] = turn
        parts.append(torch.linalg.matrix_exp(upper - upper.T) @ start_at)
    assert (rows_of(basis) - torch.kron(parts[0], torch.kron(parts[1], parts[2]))).abs().max() < 1e-13
    assert len(basis.turn) == 3 + SIDE * (SIDE - 1)


class WrongNetwork(RawNetwork):
    """Smooth, and no denoiser of anything."""

    def forward(self, x, noise_label, labels=None):
        return torch.sin(x + x.flip(-1)) + 0.1 * x**3 + noise_label[:, None, None, None]


@pytest.mark.parametrize("kind", ["separable:5", "dense:5"])
def test_without_a_turn_it_is_the_dct(kind):
    """Coefficients, losses and samples are those of `Subspaces`."""
    shape = (3, SIDE, SIDE)
    logs = torch.linspace(-6, -4, 5, dtype=torch.float64)[:, None] + torch.tensor([0.0, 3.0, 8.0])
    x0, eps, t = normal(4, *shape), normal(4, *shape, seed=1), torch.tensor([0.1, 0.4, 0.7, 0.9]).double()
    results = []
    for basis in (Subspaces(partition(SIDE, "radial:5")), rotated_basis(kind, shape)):
        path = NoisePath(basis, KnotSchedule(logs))
        denoiser, levels = Denoiser(WrongNetwork(), path), uniform(path, 4)
        noise = basis.from_pixels(eps)
        losses = tlsm_loss(denoiser, x0, noise, t, probes=noise.sign()[None])
        gradient = torch.autograd.grad(losses.mean(), path.schedule.theta)[0]
        images = path.to_pixels(solve(denoiser, start(denoiser, eps, levels), levels))
        results.append(
            [noise, losses, gradient, edm_loss(denoiser, x0, eps, t), images, denoiser(x0, 0.5), path.weights]
        )
    for dct, ours in zip(*results, strict=True):
        assert torch.allclose(dct, ours, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("count", [1, 2, 5, 8])
def test_bands_are_the_radial_partition_where_there_is_one(count):
    assert torch.equal(bands(8, 3, count), partition(8, f"radial:{count}").expand(3, -1, -1))


@pytest.mark.parametrize(("channels", "count"), [(1, 16), (3, 13), (3, 16), (3, 17), (3, 48)])
def test_bands_number_any_count_in_the_order_of_frequency(channels, count):
    index = bands(SIDE, channels, count)
    p = torch.arange(SIDE)
    radius = (p[:, None] ** 2 + p[None, :] ** 2).expand(channels, -1, -1)
    ranks = index.flatten().bincount()
    assert len(ranks) == count
    assert ranks.max() - ranks.min() <= (channels if count <= SIDE**2 else 1)
    largest = torch.stack([radius[index == j].max() for j in range(count)])
    smallest = torch.stack([radius[index == j].min() for j in range(count)])
    assert (largest[:-1] <= smallest[1:]).all()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: rotated_basis("dense:4", (3, 32, 32)), "3072 dimensions, a dense one takes 1024 at most"),
        (lambda: rotated_basis("dense:4", (3, 32, 16)), "on square images"),
        (lambda: rotated_basis("radial:4", (3, 8, 8)), "use separable:J or dense:J"),
        (lambda: rotated_basis("separable:4", (3, 8, 8), "identity"), "a separable one starts at the DCT"),
        (lambda: rotated_basis("dense:4", (3, 8, 8), "wavelets"), "'wavelets' is unknown: use dct or identity"),
        (lambda: rotated_basis("dense:4", (1, 2, 2), torch.ones(4, 4)), "not orthonormal"),
        (lambda: rotated_basis("dense:4", (1, 2, 2), torch.eye(3)), r"a start of \[3, 3\] for 4"),
        (lambda: rotated_basis("separable:49", (3, 4, 4)), "49 of 48 modes"),
        (lambda: SeparableBasis(torch.tensor([[[0, 2], [2, 2]]])), "leaves out a number"),
        (lambda: SeparableBasis(torch.tensor([[[0, 1], [1, 1]]]), torch.zeros(3)), "3 angles, this basis has 2"),
    ],
)
def test_bases_that_are_none_are_refused(make, words):
    with pytest.raises(InvalidArgument, match=words):
        make()


def test_principal_vectors_make_the_coefficients_uncorrelated():
    images = (normal(500, 12) @ normal(12, 12, seed=1)).reshape(500, 3, 2, 2) + 5
    basis = rotated_basis("dense:12", (3, 2, 2), principal_vectors(images))
    covariance = basis.from_pixels(images - images.mean(0)).flatten(1).T.cov().detach()
    variances = covariance.diagonal()
    assert (covariance - variances.diag()).abs().max() < 1e-11 * variances.max()
    assert (variances.diff() < 0).all()
    assert basis.index.flatten().tolist() == list(range(12))


@pytest.mark.parametrize("name", BASES)
def test_a_basis_kept_for_the_network_follows_its_angles(name):
    """Formed once while they stay, and never a copy's."""
    basis = BASES[name]()
    kept = basis.detached()
    assert basis.detached() is kept
    assert not kept.learnable
    assert torch.equal(rows_of(kept), rows_of(basis))
    twin = copy.deepcopy(basis)
    for _ in range(3):  # as an average is updated
        with torch.no_grad():
            twin.turn.lerp_(twin.turn + 1, 0.1)
        assert torch.equal(rows_of(twin.detached()), rows_of(twin))
    basis.load_state_dict(turned(BASES[name](), seed=6).state_dict())
    assert torch.equal(rows_of(basis.detached()), rows_of(basis))
    assert not torch.equal(rows_of(basis), rows_of(kept))


def test_matrices_of_earlier_angles_are_given_up():
    basis = BASES["dense"]()
    earlier = weakref.ref(basis.detached())
    for _ in range(2):
        with torch.no_grad():
            basis.turn.mul_(0.9)
        basis.detached()
    gc.collect()
    assert earlier() is None


def test_a_sampling_forms_the_rotations_once(monkeypatch):
    basis = rotated_basis("separable:5", (3, SIDE, SIDE))
    denoiser = Denoiser(WrongNetwork(), NoisePath(basis, KnotSchedule(LOGS[:1].expand(5, -1))))
    levels, formed, exponential = uniform(denoiser.path, 6), [], torch.linalg.matrix_exp
    monkeypatch.setattr(rotated.torch.linalg, "matrix_exp", lambda matrix: formed.append(1) or exponential(matrix))
    images = denoiser.path.subspaces.detached().to_pixels(
        solve(denoiser, start(denoiser, normal(2, 3, 4, 4), levels), levels)
    )
    assert len(formed) == 3  # channels, rows, columns
    assert not images.requires_grad


class PixelGaussian(Exact):
    """The exact flow for Gaussian data whose axes are the path's, computed with matrices of all pixels."""

    def __init__(self, path: NoisePath, spectrum: Tensor):
        super().__init__(path)
        self.rows, self.spectrum = rows_of(path.subspaces).detach(), spectrum  # [D, D], [D]

    def matrix(self, variances: Tensor) -> Tensor:
        return self.rows.T @ torch.diag(variances) @ self.rows

    def flow(self, z: Tensor, g: Tensor, labels: Tensor | None = None) -> Tensor:
        self.evaluations += 1
        m = g[0, self.path.subspaces.index.flatten()]
        x = self.path.to_pixels(z).flatten(1)
        score = -torch.linalg.solve(self.matrix(self.spectrum + m), x.T).T
        return self.path.from_pixels((score @ self.matrix(m.sqrt())).reshape(z.shape))


def dense_gaussian() -> PixelGaussian:
    path = NoisePath(turned(rotated_basis("dense:2", (1, SIDE, SIDE))), KnotSchedule(LOGS)).requires_grad_(False)
    return PixelGaussian(path, torch.linspace(2.0, 0.05, SIDE**2, dtype=torch.float64))


def error_of(name: str, steps: int) -> float:
    """Of one image at the end, against `x(t) = (S + M_t)^{1/2} (S + M_T)^{-1/2} x(T)` in pixels."""
    model = dense_gaussian()
    levels = uniform(model.path, steps + 1, append_zero=False)
    noise = normal(1, 1, SIDE, SIDE)
    found = model.path.to_pixels(solve(model, start(model, noise, levels), levels, SOLVERS[name].with_order()))
    m = [levels.nodes[k, 0].square()[model.path.subspaces.index.flatten()] for k in (0, -1)]
    growth = ((model.spectrum + m[1]) * m[0] / (model.spectrum + m[0])).sqrt()
    return float((found.flatten(1) - noise.flatten(1) @ model.matrix(growth)).norm())


@pytest.mark.parametrize("name", [name for name, each in SOLVERS.items() if not (each.stochastic or each.tuned)])
def test_every_solver_meets_the_exact_flow_on_a_dense_path(name):
    """Of first order Euler, of second and more the others, though the multistep methods come to it slowly."""
    errors = [error_of(name, steps) for steps in (32, 64, 128)]
    assert (measured_orders(errors) > (0.95 if name == "euler" else 1.8)).all()
    assert errors[-1] < (0.05 if name == "euler" else 0.001)


def test_the_path_is_the_module_that_is_trained():
    """Averages are over angles: the averaged basis stays orthonormal, where an average of bases would not."""
    path = NoisePath(
        rotated_basis("separable:5", (1, SIDE, SIDE)), KnotSchedule(LOGS[:1] + torch.arange(5)[:, None] / 5)
    )
    denoiser = Denoiser(WrongNetwork(), path)
    state = TrainingState({"path": path}, {"path": 0.3})
    x0 = normal(8, 1, SIDE, SIDE)

    def draw(generator: torch.Generator) -> dict[str, Tensor]:
        t = torch.rand(8, generator=generator, dtype=torch.float64)
        return {"eps": torch.randn(8, 1, SIDE, SIDE, generator=generator, dtype=torch.float64), "t": t}

    plan = TrainingPlan(0.16, 8, 0.0, 0.0, None, 0, path_ema_kimg=0.05)
    list(train(state, plan, draw, lambda drawn: tlsm_loss(denoiser, x0, **drawn).mean()))
    assert {name for name, _ in path.named_parameters()} == {"subspaces.turn", "schedule.theta"}
    now, average = (each.subspaces for each in (path, state.ema["path"]))
    assert now.turn.abs().max() > 0.5
    assert (now.turn - average.turn).abs().max() > 0.1
    with torch.no_grad():
        rows = [rows_of(each) for each in (now, average.detached())]
        mean = (rows[0] + rows_of(rotated_basis("separable:5", (1, SIDE, SIDE)))) / 2
    assert all((each @ each.T - torch.eye(16)).abs().max() < 1e-12 for each in rows)
    assert (mean @ mean.T - torch.eye(16)).abs().max() > 0.1


@pytest.mark.parametrize("ends", [None, (1e-9, 6400.0)])
def test_exponents_give_the_papers_variances(ends):
    rates = torch.tensor([0.01, 0.3, 1.0, 4.0, 300.0], dtype=torch.float64)
    schedule = ExponentSchedule(rates.log(), ends)
    time = 1e-3 + (1 - 1e-3) * schedule.nodes
    exact = torch.log(torch.expm1(rates[:4, None] * integrated_rate(time)))
    logs = schedule.curve.logs
    assert integrated_rate(torch.ones(1)).item() == pytest.approx(10.05)
    assert logs.isfinite().all()  # exp(3000) is none
    if ends is None:
        assert torch.allclose(logs[:4], exact, rtol=1e-9, atol=1e-9)
        between = torch.linspace(0, 1, 5000, dtype=torch.float64)
        beta = integrated_rate(1e-3 + (1 - 1e-3) * between)
        interpolated = schedule.curve(between).g[:, :4].log()
        assert (interpolated - torch.log(torch.expm1(beta[:, None] * rates[:4]))).abs().max() < 3e-3
    else:
        assert torch.allclose(logs[:, [0, -1]].exp(), torch.tensor(ends).double().expand(5, -1), rtol=1e-12)
        share = (exact - exact[:, :1]) / (exact[:, -1:] - exact[:, :1])
        assert torch.allclose(logs[:4], math.log(ends[0]) + share * math.log(ends[1] / ends[0]), rtol=1e-9, atol=1e-9)
    weights = normal(*logs.shape)
    (found,) = torch.autograd.grad((logs * weights).sum(), schedule.log_lambda)
    for j in range(len(rates)):
        step = torch.zeros(len(rates), dtype=torch.float64)
        step[j] = 1e-6
        sides = [
            (ExponentSchedule(rates.log() + sign * step, ends).curve.logs * weights).sum().item() for sign in (1, -1)
        ]
        assert found[j].item() == pytest.approx((sides[0] - sides[1]) / 2e-6, rel=1e-5, abs=1e-4)


@pytest.mark.parametrize("ends", [(1.0, 1.0), (0.0, 1.0), (1.0, math.inf)])
def test_ends_that_do_not_rise_are_refused(ends):
    with pytest.raises(InvalidArgument, match="do not rise from above 0"):
        ExponentSchedule(torch.zeros(2), ends)


SCHEDULES = {
    "knots": lambda count: KnotSchedule(torch.tensor([-6.0, 0.0, 4.0]) + torch.arange(count)[:, None] / 9),
    "fixed": lambda count: FixedSchedule(
        LogLinear(torch.tensor([0, 0.3, 1]).double(), torch.tensor([-6.0, 0.0, 4.0]).double().expand(count, -1))
    ),
    "exponent": lambda count: ExponentSchedule(torch.arange(count) / 9),
    "exponent, fixed ends": lambda count: ExponentSchedule(torch.arange(count) / 9, (1e-9, 6400.0)),
}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", BASES)
def test_a_path_is_read_back_as_it_was(name, schedule, tmp_path):
    basis = BASES[name]()
    path = NoisePath(basis, SCHEDULES[schedule](basis.count))
    file = tmp_path / "path.safetensors"
    checkpoints.save_path(file, path, kimg=3.0)
    again, about = checkpoints.load_path(file)
    assert about["kimg"] == 3
    assert type(again.subspaces) is type(basis)
    assert again.subspaces.start == basis.start
    assert ("vectors" in checkpoints.read(file)[0]) == (basis.start == "data")
    assert torch.equal(rows_of(again.subspaces), rows_of(basis))
    assert torch.equal(again.subspaces.index, basis.index)
    assert torch.equal(again.weights, path.weights)
    t = torch.linspace(0, 1, 7, dtype=torch.float64)
    assert torch.allclose(again(t).g, path(t).g, rtol=1e-12)
    assert type(again.schedule) is type(path.schedule)


def without(name: str):
    return lambda tensors, about: tensors.pop(name)


def other(name: str, change):
    return lambda tensors, about: tensors.update({name: change(tensors[name])})


def said(name: str, value):
    return lambda tensors, about: about.update({name: value})


@pytest.mark.parametrize(
    ("name", "damage", "words"),
    [
        ("separable", without("turn"), "turn is missing"),
        ("separable", other("turn", lambda turn: turn[1:]), "14 angles, this basis has 15"),
        ("separable", other("turn", lambda turn: turn * torch.nan), "turn holds NaN"),
        ("separable", other("turn", lambda turn: turn.round().long()), r"turn is int64 \[15\]"),
        ("separable", other("index", lambda index: index[0]), r"index is int64 \[4, 4\]"),
        ("separable", other("index", lambda index: index + 1), "index does not number 5 subspaces from 0"),
        ("separable", said("turned", "dance"), "a basis that is 'dance' and turned from 'dct'"),
        ("separable", said("turned", ["dense"]), "a basis that is"),
        ("separable", said("turned_from", "identity"), "a basis that is 'separable' and turned from 'identity'"),
        ("dense", said("turned_from", "data"), "vectors is missing"),
        ("dense", said("turned_from", 3), "turned from 3"),
        ("dense, random", without("vectors"), "vectors is missing"),
        ("dense, random", other("vectors", lambda vectors: vectors * 2), "not orthonormal"),
        ("dense, random", other("vectors", lambda vectors: vectors[:7, :7].contiguous()), r"a start of \[7, 7\]"),
        ("dense", other("index", lambda index: index.repeat(1, 8, 8)), "3072 dimensions, a dense one takes 1024"),
        ("dense", without("log_lambda"), "log_lambda is missing"),
        ("dense", other("log_lambda", lambda logs: logs * 1e4), "does not rise"),
        ("dense", other("log_lambda", lambda logs: logs[:4]), "index does not number 4 subspaces"),
        ("dense", said("ends", [1.0]), r"ends is \[1.0\]"),
        ("dense", said("ends", [2.0, 1.0]), "do not rise"),
        ("dense", said("schedule", "exponents"), "logs is missing"),
    ],
)
def test_damaged_paths_are_refused_by_name(name, damage, words, tmp_path):
    basis = BASES[name]()
    file = tmp_path / "path.safetensors"
    checkpoints.save_path(file, NoisePath(basis, ExponentSchedule(torch.arange(basis.count) / 9)))
    checkpoints.load_path(file)
    tensors, about = checkpoints.read(file)
    damage(tensors, about)
    checkpoints.save(file, tensors, about)
    with pytest.raises(StageError, match=rf"path\.safetensors: holds no noise path \(.*{words}.*: give the file of a"):
        checkpoints.load_path(file)


def test_a_path_on_a_basis_starts_from_a_shared_isotropic_one():
    logs = torch.tensor([[-9.0, -2.0, 4.0]], dtype=torch.float64)
    shared = NoisePath(Subspaces(partition(SIDE, "whole")), KnotSchedule(logs))
    for name in BASES:
        path = split_path(shared, BASES[name](), "rank")
        assert torch.allclose(path.curve.logs, logs.expand(path.subspaces.count, -1))
    exponents = NoisePath(Subspaces(partition(SIDE, "whole")), ExponentSchedule(torch.ones(1), (1e-6, 100.0)))
    path = split_path(exponents, BASES["dense"](), "rank")
    assert torch.equal(path.curve.logs, exponents.curve.logs.expand(5, -1))


def test_a_path_goes_on_with_the_basis_as_it_has_turned():
    first = NoisePath(BASES["separable"](), SCHEDULES["knots"](5))
    path = split_path(first, rotated_basis("separable:5", (3, SIDE, SIDE)), "rank")
    assert torch.equal(path.subspaces.turn, first.subspaces.turn)
    assert path.subspaces is not first.subspaces
    assert torch.allclose(path.curve.logs, first.curve.logs)
    for basis in (
        BASES["dense"](),
        rotated_basis("separable:4", (3, SIDE, SIDE)),
        Subspaces(partition(SIDE, "radial:5")),
    ):
        with pytest.raises(InvalidArgument, match="a path of 5 subspaces cannot start one on others"):
            split_path(first, basis, "rank")


def test_a_basis_at_the_dct_takes_up_a_spectral_path():
    """Levels at the knots are those of the path, whose own nodes lie elsewhere."""
    nodes, logs = torch.tensor([0, 0.1, 0.2, 1], dtype=torch.float64), torch.tensor([[-9, -4, -2, 2], [-9, -8, -1, 2]])
    curve = LogLinear(nodes, logs.double())
    spectral = NoisePath(Subspaces(partition(SIDE, "radial:2")), FixedSchedule(curve))
    for basis in (rotated_basis("separable:2", (3, SIDE, SIDE)), rotated_basis("dense:2", (3, SIDE, SIDE))):
        path = split_path(spectral, basis, "rank", knots=21)
        t = torch.linspace(0, 1, 21, dtype=torch.float64)
        assert torch.allclose(path(t).g, spectral(t).g, rtol=1e-9)
        path.require_learnable_basis()
    for basis in (
        turned(rotated_basis("separable:2", (3, SIDE, SIDE))),
        rotated_basis("dense:2", (3, 4, 4), "identity"),
    ):
        with pytest.raises(InvalidArgument, match="a path of 2 subspaces cannot start one on others"):
            split_path(spectral, basis, "rank")
