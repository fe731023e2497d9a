"""J = 1, or equal variances, is EDM: its denoiser, its loss, its Heun sampler, written again from the paper."""

import itertools
from pathlib import Path

import pytest
import torch
from runs import RUN, SPACE, WARP
from small_network import SIGMA_DATA, denoiser

import anisodiff
from anisodiff import pixels
from anisodiff.compute import Compute
from anisodiff.data import image_sets
from anisodiff.denoiser import Denoiser
from anisodiff.errors import InvalidArgument, StageError
from anisodiff.grids.fixed import karras
from anisodiff.methods import read_denoiser
from anisodiff.networks.unets import RawNetwork, SongUNet
from anisodiff.objectives.losses import edm_loss
from anisodiff.objectives.path_gradient import flow_derivative
from anisodiff.paths.noise_path import edm_path
from anisodiff.solvers.generation import start
from anisodiff.solvers.loop import solve
from anisodiff.solvers.singlestep import heun
from anisodiff.stages import finetuning
from anisodiff.stages.finetuning import TrainingInputs
from anisodiff.storage import checkpoints


def edm(net, x, sigma, labels):
    """Karras et al. 2022, Eq. 7 with the coefficients of Table 1."""
    sigma = sigma.reshape(-1, 1, 1, 1)
    c_skip = SIGMA_DATA**2 / (sigma**2 + SIGMA_DATA**2)
    c_out = sigma * SIGMA_DATA / (sigma**2 + SIGMA_DATA**2).sqrt()
    c_in = 1 / (SIGMA_DATA**2 + sigma**2).sqrt()
    return c_skip * x + c_out * net(c_in * x, sigma.flatten().log() / 4, labels)


def example(batch: int = 4):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, 2, 8, 8, generator=generator, dtype=torch.float64)
    labels = torch.nn.functional.one_hot(torch.arange(batch) % 3, 3).double()
    return x, labels, torch.tensor([0.002, 0.3, 5.0, 80.0], dtype=torch.float64)[:batch]


@pytest.mark.parametrize("kind", ["whole", "block", "radial:4"])
def test_equal_variances_are_edms_denoiser(kind):
    x, labels, sigma = example()
    ours = denoiser(kind)
    assert torch.allclose(ours(x, sigma, labels), edm(ours.network, x, sigma, labels), atol=1e-12)


@pytest.mark.parametrize("kind", ["whole", "block"])
def test_equal_variances_are_edms_loss(kind):
    x, labels, sigma = example()
    eps = torch.randn(x.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    ours = denoiser(kind)
    weight = (sigma**2 + SIGMA_DATA**2) / (sigma * SIGMA_DATA) ** 2
    noisy = x + sigma.reshape(-1, 1, 1, 1) * eps
    expected = weight * (edm(ours.network, noisy, sigma, labels) - x).square().sum((1, 2, 3))
    assert torch.allclose(edm_loss(ours, x, eps, sigma, labels), expected, rtol=1e-9)


@pytest.mark.parametrize("kind", ["whole", "block"])
def test_equal_variances_are_edms_sampler(kind):
    """Karras et al. 2022, Algorithm 1 (deterministic)."""
    noise, labels, _ = example()
    ours = denoiser(kind)
    i = torch.arange(5, dtype=torch.float64)
    t = torch.cat([(80 ** (1 / 7) + i / 4 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7, torch.zeros(1)])
    x = noise * t[0]
    with torch.no_grad():
        for now, then in itertools.pairwise(t):
            d = (x - edm(ours.network, x, now.expand(4), labels)) / now
            x_next = x + (then - now) * d
            if then > 0:
                d_next = (x_next - edm(ours.network, x_next, then.expand(4), labels)) / then
                x_next = x + (then - now) * (d + d_next) / 2
            x = x_next
    levels = karras(5, ours.path.subspaces.count, 0.002, 80.0)
    z = solve(ours, start(ours, noise, levels), levels, heun, labels)
    assert torch.allclose(ours.path.to_pixels(z), x, atol=1e-9)
    assert ours.evaluations == 9


def test_denoiser_score_flow_round_trip():
    x, labels, _ = example()
    ours = denoiser("radial:3")
    path = ours.path
    g = torch.tensor([[0.2, 1.0, 3.0]], dtype=torch.float64).expand(4, -1)
    z = path.from_pixels(x)
    clean = ours.denoise(z, g, labels)
    score = path.scale(clean - z, 1 / g)
    assert torch.allclose(path.scale(score, g.sqrt()), ours.flow(z, g, labels), atol=1e-12)


def test_flow_keeps_its_digits_at_small_noise():
    """In float32 at sigma = 3e-5, where `(D - x) / sigma` has lost them."""
    exact = denoiser("whole")
    x, labels, _ = example()
    g = torch.full((4, 1), 1e-9, dtype=torch.float64)
    truth = exact.flow(x.float().double(), g, labels)
    single = denoiser("whole")
    single.network.float()
    found = single.flow(x.float(), g.float(), labels.float())
    cancelled = (single.denoise(x.float(), g.float(), labels.float()) - x.float()) / g.float().sqrt()[:, :, None, None]
    assert (found - truth).abs().max() < 2e-5
    assert (cancelled - truth).abs().max() > 1e-3


def test_noise_label_is_the_papers_for_two_subspaces():
    """sqrt(g_1 g_2) as the variance told to the network (paper, Section 4.3)."""
    seen = []

    class Spy(RawNetwork):
        def forward(self, x, noise_label, labels=None):
            seen.append(noise_label)
            return x

    path = denoiser("block", torch.tensor([0.5, 0.5])).path
    g = torch.tensor([[0.04, 9.0]], dtype=torch.float64)
    Denoiser(Spy(), path).flow(torch.zeros(1, 2, 8, 8, dtype=torch.float64), g)
    sigma = (0.04 * 9.0) ** 0.25
    assert seen[0].item() == pytest.approx(torch.tensor(sigma).log().item() / 4, rel=1e-6)


def test_the_path_gradient_runs_through_attention():
    """On whatever kernel torch picks: it takes first derivatives only."""
    ours = denoiser("block")
    x, labels, _ = example(2)
    g = torch.tensor([[0.3, 0.5]], dtype=torch.float64).expand(2, -1)
    flow = ours.flow(x, g, labels)
    probes = torch.ones(1, *x.shape, dtype=torch.float64)
    derivative = flow_derivative(ours, x, g, labels, flow, flow, probes)
    assert derivative.isfinite().all()
    assert (derivative != 0).all()
    ours.network.train()
    for block in ours.network.modules():
        block.dropout = 0.5
    assert torch.equal(flow_derivative(ours, x, g, labels, flow, flow, probes), derivative)
    assert ours.network.training


def test_one_level_for_all_images_in_any_form():
    x, labels, _ = example()
    ours = denoiser("block")
    each = ours(x, torch.full((4,), 0.3, dtype=torch.float64), labels)
    for sigma in (0.3, torch.tensor(0.3, dtype=torch.float64), torch.full((4, 1, 1, 1), 0.3, dtype=torch.float64)):
        assert torch.equal(ours(x, sigma, labels), each)
    with pytest.raises(InvalidArgument, match="sigma: 3 levels for 4 images"):
        ours(x, torch.ones(3), labels)


def test_labels_that_the_network_does_not_take_are_refused():
    x, labels, sigma = example()
    ours = denoiser("whole")
    with pytest.raises(InvalidArgument, match="labels: 2 classes for a network of 3"):
        ours(x, sigma, labels[:, :2])
    zeros = ours(x, sigma, torch.zeros_like(labels))
    assert torch.equal(ours(x, sigma), zeros)  # no class
    torch.manual_seed(0)
    none = SongUNet(8, 2, 2, model_channels=8, channel_mult=(1,), num_blocks=1, attn_resolutions=None).double().eval()
    with pytest.raises(InvalidArgument, match="labels: 3 classes for an unconditional network: give none"):
        Denoiser(none, edm_path(8))(x, sigma, labels)


CHECKPOINTS = Path(__file__).parents[1] / "config/checkpoints"


@pytest.mark.parametrize("name", ["own", "of version 0.1"])
def test_a_network_is_used_with_the_sigma_data_it_was_trained_with(tmp_path, name, start):
    """At sigma = 0.1 the digits' network makes 2.5 times the error with EDM's usual 0.5."""
    tensors, about = checkpoints.read(CHECKPOINTS / "digits/base.safetensors")
    if name == "of version 0.1":
        assert about.pop("sigma_data") == about["settings"]["dataset"]["sigma_data"]
    checkpoints.save(tmp_path / "base.safetensors", tensors, about)
    loaded = anisodiff.load_denoiser(tmp_path / "base.safetensors")
    assert loaded.sigma_data == 0.75
    x0 = pixels.to_unit(image_sets.load(start[2]).pixels[:64])
    noisy = x0 + 0.1 * torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        error = (loaded(noisy, 0.1) - x0).square().mean().sqrt()
        loaded.sigma_data = 0.5
        assert (loaded(noisy, 0.1) - x0).square().mean().sqrt() > 2 * error
    assert checkpoints.header(start[0])["sigma_data"] == SPACE.sigma_data  # as the training stages write it


def test_a_network_that_does_not_say_its_sigma_data_is_refused(tmp_path, start):
    tensors, about = checkpoints.read(start[0])
    checkpoints.save(tmp_path / "base.safetensors", tensors, {"config": about["config"], "kimg": 0.0})
    with pytest.raises(
        StageError, match=r"base\.safetensors: does not say its sigma_data: convert it or train it again"
    ):
        anisodiff.load_denoiser(tmp_path / "base.safetensors")
    with pytest.raises(StageError, match=r"base\.safetensors: does not say its sigma_data"):
        read_denoiser(tmp_path / "base.safetensors", start[1], SPACE, Compute())


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"sigma_data": 0.5}, r"is for data of sigma_data 0\.75, the dataset's is 0\.5: set sigma_data to 0\.75"),
        (
            {"class_conditional": False},
            "has 10 classes, the dataset says class_conditional: false: set class_conditional to true",
        ),
    ],
)
def test_a_network_for_other_data_is_refused_by_every_stage(tmp_path, start, changes, says):
    network, path, images = start
    dataset = SPACE.changed(**changes)
    with pytest.raises(StageError, match=rf"base\.safetensors: {says}"):
        read_denoiser(network, path, dataset, Compute())
    with pytest.raises(StageError, match=rf"network: {says}"):
        finetuning.finetune(dataset, RUN, TrainingInputs(images, network, path), tmp_path / "n", tmp_path / "p")
    with pytest.raises(StageError, match=rf"base\.safetensors: {says}"):
        finetuning.learn_warp(dataset, WARP, TrainingInputs(images, network, path), tmp_path / "w")


def test_an_unconditional_network_under_labels_is_refused(tmp_path):
    checkpoints.save_path(tmp_path / "path.safetensors", edm_path(8))
    dataset = SPACE.changed(class_conditional=True)
    with pytest.raises(
        StageError, match="has no classes, the dataset says class_conditional: true: set class_conditional to false"
    ):
        read_denoiser(CHECKPOINTS / "digits/base.safetensors", tmp_path / "path.safetensors", dataset, Compute())
