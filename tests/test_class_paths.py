"""Schedules and bases of single classes: each image gets its own, in training and in sampling."""

import numpy as np
import pytest
import torch
from exact import Exact

from anisodiff.data import image_sets
from anisodiff.data.image_sets import Images
from anisodiff.data.principal_components import components, principal_subspaces
from anisodiff.denoiser import Denoiser
from anisodiff.errors import InvalidArgument, StageError
from anisodiff.experiment.settings import ImageSpace, PathSettings
from anisodiff.grids import fixed
from anisodiff.networks.unets import RawNetwork
from anisodiff.objectives.losses import edm_loss, tlsm_loss
from anisodiff.objectives.path_gradient import flow_derivative
from anisodiff.paths.noise_path import NoisePath, Warp
from anisodiff.paths.principal import PcaSubspaces, cluster
from anisodiff.paths.schedules import KnotSchedule, karras_logs
from anisodiff.paths.subspaces import Subspaces, dct_matrix, partition
from anisodiff.solvers import registry
from anisodiff.solvers.generation import generate
from anisodiff.solvers.loop import solve
from anisodiff.stages.initial_paths import coefficient_variances, initial_path
from anisodiff.storage import checkpoints

SIDE, CHANNELS = 4, 2
LOW_FIRST, HIGH_FIRST = (3.0, 9.0), (9.0, 3.0)  # exponents: which subspace's noise falls first


def logs_of(*exponents: tuple[float, float]) -> torch.Tensor:
    """Log variances of a schedule a class, `[classes, 2, knots]`."""
    karras = karras_logs(9, 1e-6, 0.01, 10.0)[0]
    low, high = karras[0], karras[-1]
    share = (karras - low) / (high - low)
    return torch.stack([torch.stack([low + (high - low) * share ** (e / 6) for e in pair]) for pair in exponents])


def path_of(*exponents: tuple[float, float], subspaces=None) -> NoisePath:
    logs = logs_of(*exponents)
    return NoisePath(subspaces or Subspaces(partition(SIDE, "block")), KnotSchedule(logs if len(logs) > 1 else logs[0]))


class Toy(RawNetwork):
    """A network that is not trained, and tells classes apart."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = torch.nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)
        self.shift = torch.nn.Linear(2, CHANNELS)

    def forward(self, x, noise_label, labels=None):
        shift = 0 if labels is None else self.shift(labels.to(x.dtype))[:, :, None, None]
        return torch.tanh(self.conv(x) + shift + noise_label[:, None, None, None])


def batch(count=6):
    generator = torch.Generator().manual_seed(1)
    normal = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    index = torch.arange(count) % 2
    t = torch.rand(count, generator=generator, dtype=torch.float64)
    labels = torch.nn.functional.one_hot(index, 2).double()
    return normal(count, CHANNELS, SIDE, SIDE), normal(count, CHANNELS, SIDE, SIDE), t, index, labels


def random_bases(count: int, rank: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    drawn = torch.randn(count, SIDE**2, rank, generator=generator, dtype=torch.float64)
    return torch.linalg.qr(drawn)[0].mT.contiguous()


def alone(path: NoisePath, label: int) -> NoisePath:
    """The path of one class, for images of that class only."""
    logs = path.curve.logs.detach()
    subspaces = path.subspaces
    if isinstance(subspaces, PcaSubspaces):
        basis = subspaces.vectors[subspaces.which[label if len(subspaces.which) > 1 else 0]]
        subspaces = PcaSubspaces(basis[None], torch.zeros(1, dtype=torch.int64))
    return NoisePath(subspaces, KnotSchedule(logs[label] if logs.ndim == 3 else logs))


PATHS = {
    "schedules": lambda: path_of(LOW_FIRST, HIGH_FIRST),
    "bases": lambda: path_of(LOW_FIRST, subspaces=PcaSubspaces(random_bases(2, 5), torch.tensor([0, 1]))),
    "both": lambda: path_of(
        LOW_FIRST, HIGH_FIRST, subspaces=PcaSubspaces(random_bases(2, 5), torch.tensor([1, 0]))
    ),
    "schedules on one basis": lambda: path_of(
        LOW_FIRST, HIGH_FIRST, subspaces=PcaSubspaces(random_bases(1, 5), torch.tensor([0]))
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", PATHS)
def test_losses_of_a_mixed_batch_are_those_of_the_classes_alone(kind):
    path, network = PATHS[kind](), Toy().double()
    x0, eps, t, index, labels = batch()
    probes = eps.flip(0)[None]
    for loss in (
        lambda p, rows: tlsm_loss(Denoiser(network, p), x0[rows], eps[rows], t[rows], labels[rows], 0.7),
        lambda p, rows: tlsm_loss(
            Denoiser(network, p), x0[rows], eps[rows], t[rows], labels[rows], 0.7, probes[:, rows]
        ),
        lambda p, rows: edm_loss(Denoiser(network, p), x0[rows], eps[rows], 10 * t[rows] + 0.1, labels[rows]),
    ):
        together = loss(path, torch.arange(6))
        for label in (0, 1):
            rows = (index == label).nonzero()[:, 0]
            assert torch.allclose(together[rows], loss(alone(path, label), rows), rtol=1e-9)


def test_opposite_schedules_are_not_mixed_up_in_sampling():
    """Two classes with opposite schedules, sampled together: each image is that of its own class's path alone."""
    path, network = path_of(LOW_FIRST, HIGH_FIRST), Toy()
    shape, seeds = (CHANNELS, SIDE, SIDE), range(12)

    def images(of: NoisePath, step) -> tuple[torch.Tensor, torch.Tensor]:
        found = generate(Denoiser(network, of), fixed.uniform(of, 4), step, seeds, shape, 2, 5)
        return torch.cat([pixels for _, pixels in found])

    labels = torch.tensor([int(torch.randint(2, (), generator=_after_noise(seed, shape))) for seed in seeds])
    assert 0 < labels.sum() < len(labels)
    for solver in (each.with_order() for each in registry.SOLVERS.values() if not each.tuned):
        mixed = images(path, solver)
        first, second = images(alone(path, 0), solver), images(alone(path, 1), solver)
        own = torch.where(labels[:, None, None, None] == 0, first, second)
        assert torch.equal(mixed, own)
        assert not torch.equal(mixed, first)  # the test can tell


def _after_noise(seed: int, shape: tuple[int, ...]) -> torch.Generator:
    generator = torch.Generator().manual_seed(seed)
    torch.randn(shape, generator=generator)
    return generator


def test_the_gradient_of_a_class_reaches_its_own_schedule():
    path = path_of(LOW_FIRST, HIGH_FIRST)
    x0, eps, t, _, _ = batch()
    labels = torch.nn.functional.one_hot(torch.zeros(6, dtype=torch.int64), 2).double()
    tlsm_loss(Denoiser(Toy().double(), path), x0, eps, t, labels, 0.7, eps[None]).mean().backward()
    gradient = path.schedule.theta.grad
    assert gradient[0].abs().min() > 0
    assert gradient[1].abs().max() == 0


def test_without_labels_a_class_path_is_refused():
    path = path_of(LOW_FIRST, HIGH_FIRST)
    x0, eps, t, _, _ = batch()
    with pytest.raises(InvalidArgument, match="2 classes, but got no labels"):
        tlsm_loss(Denoiser(Toy().double(), path), x0, eps, t)
    with pytest.raises(InvalidArgument, match="labels of 3 classes"):
        path.for_labels(torch.eye(3))
    with pytest.raises(InvalidArgument, match="no common time to warp"):
        Warp(path)
    with pytest.raises(InvalidArgument, match="levels for each class"):
        fixed.uniform(path, 3).for_labels(None)


def dct_vectors() -> torch.Tensor:
    """The low block of the DCT as vectors."""
    modes = dct_matrix(SIDE)
    products = torch.einsum("ph,qw->pqhw", modes, modes).flatten(2)
    return products[: SIDE // 2, : SIDE // 2].flatten(0, 1)


def test_principal_subspaces_spanned_by_low_dct_modes_are_the_block_partition():
    """The same covariance in two coordinate systems: one loss, one derivative, one image."""
    pca = PcaSubspaces(dct_vectors()[None], torch.zeros(1, dtype=torch.int64))
    ours, block = path_of(LOW_FIRST, subspaces=pca), path_of(LOW_FIRST)
    network, (x0, eps, t, _, _) = Toy().double(), batch()
    dct = block.from_pixels
    for probes in (None, eps.flip(0)[None]):
        a = tlsm_loss(Denoiser(network, ours), x0, eps, t, None, 0.7, probes)
        b = tlsm_loss(
            Denoiser(network, block), x0, dct(eps), t, None, 0.7, None if probes is None else dct(probes[0])[None]
        )
        assert torch.allclose(a, b, rtol=1e-9)
    levels = fixed.uniform(block, 5)
    images = [path.to_pixels(solve(Denoiser(network, path), path.from_pixels(x0), levels)) for path in (ours, block)]
    assert torch.allclose(*images, atol=1e-9)
    g = block(t).g.detach()
    derivatives = [
        flow_derivative(Denoiser(network, path), *(path.from_pixels(each) for each in (x0,)), g, None,
                        path.from_pixels(eps), path.from_pixels(x0 - eps), path.from_pixels(eps.flip(0))[None])
        for path in (ours, block)
    ]  # fmt: skip
    assert torch.allclose(*derivatives, rtol=1e-6, atol=1e-8)


def test_functions_of_the_covariance_compose():
    """F(M) G(M) = (FG)(M), and M is that of the dense matrix."""
    pca = PcaSubspaces(random_bases(2, 3), torch.tensor([0, 1]))
    x0, eps, _, index, labels = batch()
    path = path_of(LOW_FIRST, subspaces=pca).for_labels(labels)
    values = torch.rand(6, 2, dtype=torch.float64) + 0.5
    assert torch.allclose(path.scale(path.scale(x0, values), 1 / values), x0)
    for row in range(6):
        v = pca.vectors[index[row]]
        projector = v.T @ v
        dense = values[row, 0] * projector + values[row, 1] * (torch.eye(SIDE**2) - projector)
        assert torch.allclose(path.scale(x0, values)[row].flatten(1), x0[row].flatten(1) @ dense)
        both = path.inner(x0, eps)[row]
        assert both[0].item() == pytest.approx((x0[row].flatten(1) @ projector * eps[row].flatten(1)).sum().item())
        assert both.sum().item() == pytest.approx((x0[row] * eps[row]).sum().item())


def images_of(count=600, classes=3) -> Images:
    """Images whose classes vary along different pixels."""
    generator = torch.Generator().manual_seed(3)
    labels = torch.arange(count) % classes
    noise = torch.randn(count, 1, SIDE**2, generator=generator) * 4
    for label in range(classes):
        chosen = labels == label
        noise[chosen, :, 3 * label : 3 * label + 2] += torch.randn(int(chosen.sum()), 1, 2, generator=generator) * 40
    pixels = (noise + 128).clip(0, 255).reshape(count, 1, SIDE, SIDE).expand(-1, 3, -1, -1)
    return Images(pixels.to(torch.uint8).contiguous(), labels, classes)


def test_components_are_those_of_the_covariance():
    from sklearn.decomposition import PCA

    images = images_of()
    found = components(images, torch.arange(len(images)), 4)
    x = images.pixels.double().mean(1).flatten(1) / 127.5 - 1
    exact = torch.from_numpy(PCA(4, svd_solver="full").fit(x.numpy()).components_)
    assert (found @ exact.T).abs().diagonal() == pytest.approx(torch.ones(4).numpy(), abs=1e-6)
    few = torch.arange(SIDE**2 - 4)  # through the Gram matrix
    exact = torch.from_numpy(PCA(4, svd_solver="full").fit(x[few].numpy()).components_)
    assert (components(images, few, 4) @ exact.T).abs().diagonal() == pytest.approx(torch.ones(4).numpy(), abs=1e-6)


def bright(count=500) -> Images:
    """Images of one bright grey but for the last bit."""
    generator = torch.Generator().manual_seed(4)
    bits = torch.rand(count, 1, SIDE, SIDE, generator=generator) < torch.linspace(0.05, 0.5, SIDE**2).view(SIDE, SIDE)
    return Images((254 + bits).to(torch.uint8), torch.zeros(count, dtype=torch.int64), 0)


def test_covariances_keep_their_digits_where_the_mean_is_large():
    """Against two passes over the whole set."""
    images = bright()
    x = images.pixels.double() / 127.5
    x = x - x.mean(0)
    subspaces = Subspaces(partition(SIDE, "block"))
    exact = subspaces.dct(x).square().sum(0) / (len(x) - 1)
    for kind in ("block", "whole"):  # a spectrum is of modes, also where states are kept in pixels
        subspaces = Subspaces(partition(SIDE, kind))
        torch.testing.assert_close(coefficient_variances(images, subspaces), exact, rtol=1e-13, atol=0)
    exact = torch.linalg.svd(x.flatten(1), full_matrices=False)[2][:4]
    found = components(images, torch.arange(len(images)), 4)
    signs = (found * exact).sum(1, keepdim=True).sign()
    torch.testing.assert_close(found, signs * exact, rtol=0, atol=1e-12)


def test_images_alike_in_a_subspace_have_no_spectral_path(tmp_path):
    with image_sets.writing(tmp_path / "flat", 60, (1, SIDE, SIDE)) as (add, about):
        for value in range(200, 260):
            add(np.full((1, SIDE, SIDE), min(value, 255)))
        about |= {"labels": [0] * 60, "classes": 0}
    settings = PathSettings(kind="spectral", subspaces="block")
    with pytest.raises(StageError) as refused:
        initial_path(ImageSpace(heldout=1), settings, tmp_path / "flat")
    assert str(refused.value) == (
        f"{tmp_path / 'flat'}: subspaces block: the data do not vary in subspace 1, so no closed form has a "
        "schedule for it: let another subspace hold its modes, or take kind karras"
    )


def test_bases_of_classes_and_clusters():
    images = images_of(classes=4)
    # classes 0 and 3 share their pixels
    shared = images.labels == 3
    images.pixels[shared] = images_of(classes=4).pixels[images.labels == 0][: int(shared.sum())]
    by_class = principal_subspaces(images, 2, "class")
    assert by_class.vectors.shape == (4, 2, SIDE**2)
    for label in range(3):
        assert by_class.vectors[label][:, 3 * label : 3 * label + 2].square().sum().item() == pytest.approx(2, abs=0.05)
    clustered = principal_subspaces(images, 2, "cluster", 3)
    assert clustered.which[0] == clustered.which[3]
    assert len(clustered.which.unique()) == len(clustered.vectors) == 3
    assert len(principal_subspaces(images, 2, "all").vectors) == 1


def test_clusters_of_subspaces_are_found():
    generator = torch.Generator().manual_seed(5)
    centres = random_bases(3, 3)
    truth = torch.arange(12) % 3
    tilted = centres[truth] + 0.05 * torch.randn(12, 3, SIDE**2, generator=generator, dtype=torch.float64)
    found = cluster(torch.linalg.qr(tilted.mT)[0].mT, 3)
    assert len({(int(a), int(b)) for a, b in zip(truth, found, strict=True)}) == 3


def test_bad_bases_are_refused():
    with pytest.raises(InvalidArgument, match="not orthonormal"):
        PcaSubspaces(torch.ones(1, 2, 16), torch.zeros(1, dtype=torch.int64))
    images = images_of()
    with pytest.raises(StageError, match="lower the rank"):
        principal_subspaces(images, 16, "all")
    with pytest.raises(StageError, match="clusters of 3 classes"):
        principal_subspaces(images, 2, "cluster", 4)
    with pytest.raises(StageError, match="needs labels"):
        principal_subspaces(Images(images.pixels, torch.zeros(600, dtype=torch.int64), 0), 2, "class")


@pytest.mark.parametrize("kind", PATHS)
def test_a_path_is_read_back_as_it_was(kind, tmp_path):
    path = PATHS[kind]()
    checkpoints.save_path(tmp_path / "path.safetensors", path)
    again, _ = checkpoints.load_path(tmp_path / "path.safetensors")
    x0, _, t, _, labels = batch()
    ours, theirs = path.for_labels(labels), again.for_labels(labels)
    assert torch.allclose(ours.at(t).g, theirs.at(t).g, rtol=1e-9)
    assert torch.allclose(ours.scale(x0, ours.at(t).g), theirs.scale(x0, ours.at(t).g), rtol=1e-6)


class UnitGaussian(Exact):
    """The flow for `x0 ~ N(0, I)` on any subspaces."""

    def flow(self, z, g, labels=None):
        return -self.path.scale(z, g.sqrt() / (1 + g))


def test_the_exact_score_of_a_gaussian_on_principal_subspaces():
    """Every solver's answer goes to that of the exact flow as steps are added."""
    pca = PcaSubspaces(dct_vectors()[None], torch.zeros(1, dtype=torch.int64))
    path = path_of(LOW_FIRST, subspaces=pca)
    model = UnitGaussian(path)
    z = batch()[0]
    start, end = path(torch.tensor([1.0])).g, path(torch.tensor([0.0])).g
    exact = path.scale(z, ((1 + end) / (1 + start)).sqrt()).detach()
    errors = [
        float((solve(model, z, fixed.uniform(path, points, append_zero=False)) - exact).abs().max())
        for points in (17, 33)
    ]
    assert errors[1] < errors[0] / 3.5
