"""Our networks against outputs of the real EDM code, from the same weights in EDM's own pickles."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import anisodiff
from anisodiff.storage import checkpoints
from anisodiff.storage.pickles import load_edm

EDM = Path(__file__).parent / "data/edm"
NAMES = ["ddpmpp-uncond-16", "ncsnpp-cond-16", "adm-cond-16"]


@pytest.fixture(scope="module", params=NAMES)
def pair(request, tmp_path_factory):
    file = tmp_path_factory.mktemp("edm") / "network.safetensors"
    checkpoints.convert(EDM / f"{request.param}.pkl", file)
    known = {key: torch.from_numpy(value) for key, value in np.load(EDM / f"{request.param}.npz").items()}
    return anisodiff.load_denoiser(file), known, load_edm(EDM / f"{request.param}.pkl")


def test_denoised_images_are_edms(pair):
    denoiser, known, _ = pair
    with torch.no_grad():
        denoised = denoiser(known["x"], known["sigma"], known.get("labels"))
    assert (denoised - known["denoised"]).abs().max() < 1e-5


def test_labels_matter_where_the_network_has_classes(pair):
    denoiser, known, _ = pair
    with torch.no_grad():
        without = denoiser(known["x"], known["sigma"])
    same = torch.allclose(without, known["denoised"], atol=1e-5)
    assert same == (denoiser.network.classes == 0)


def test_every_tensor_of_the_pickle_is_used(pair):
    denoiser, _, published = pair
    ours = denoiser.network.state_dict()
    assert set(published.tensors) == set(ours)
    assert all(torch.equal(published.tensors[key], ours[key]) for key in ours)
    assert published.arguments.items() <= denoiser.network.config.items()


def test_second_and_forward_mode_derivatives_pass_through_attention(pair):
    """<u, H v> by double backward and by forward over reverse mode, against each other and against differences."""
    denoiser, known, _ = pair
    network = denoiser.network.double()
    x = known["x"].double() / 10
    sigma = torch.full((len(x),), 0.3, dtype=torch.float64)
    labels = known["labels"].double() if "labels" in known else None
    v = torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def gradient(at):
        at = at.detach().requires_grad_()
        value = network(at, sigma, labels).pow(2).sum()
        return at, torch.autograd.grad(value, at, create_graph=True)[0]

    try:
        with sdpa_kernel(SDPBackend.MATH):
            at, first = gradient(x)
            double = torch.autograd.grad((first * v).sum(), at)[0]
            _, forward = torch.func.jvp(torch.func.grad(lambda z: network(z, sigma, labels).pow(2).sum()), (x,), (v,))
            h = 1e-5
            differences = (gradient(x + h * v)[1] - gradient(x - h * v)[1]) / (2 * h)
    finally:
        denoiser.network.float()
    assert torch.allclose(double, forward, rtol=1e-9, atol=1e-9 * float(double.abs().max()))
    assert torch.allclose(double, differences.detach(), atol=1e-5 * float(double.abs().max()))
