import pytest
import torch
from small_network import denoiser

from anisodiff.errors import InvalidArgument
from anisodiff.grids.fixed import uniform
from anisodiff.solvers.generation import draw, generate
from anisodiff.solvers.singlestep import midpoint


def images(seeds: list[int], batch: int) -> torch.Tensor:
    model = denoiser("block").float()
    levels = uniform(model.path, 4)
    parts = list(generate(model, levels, midpoint, seeds, (2, 8, 8), 3, batch))
    assert [seed for chosen, _ in parts for seed in chosen] == seeds
    return torch.cat([pixels for _, pixels in parts])


def test_an_image_is_its_seed_bit_for_bit_in_any_shard():
    whole = images(list(range(10)), 4)
    assert whole.dtype == torch.uint8
    assert torch.equal(images([3, 7, 5], 4), whole[[3, 7, 5]])
    assert torch.equal(images([9], 4), whole[[9]])
    assert len(whole.flatten(1).unique(dim=0)) == 10


def test_an_image_is_its_seed_to_float_tolerance_in_any_batch():
    difference = images(list(range(6)), 6).int() - images(list(range(6)), 1).int()
    assert difference.abs().max() <= 1


def test_noise_and_label_depend_on_the_seed_alone():
    noise, labels = draw([5, 6, 5], (1, 4, 4), 10)
    assert torch.equal(noise[0], noise[2])
    assert torch.equal(labels[0], labels[2])
    assert not torch.equal(noise[0], noise[1])
    assert draw([5], (1, 4, 4), 0)[1] is None
    many = draw(range(2000), (1, 1, 1), 10)[1].mean(0)
    assert (many - 0.1).abs().max() < 0.03


def test_an_image_that_is_nan_is_refused_with_its_seed():
    """uint8 has no NaN: it would be a black image."""
    model = denoiser("block").float()
    classes = draw([1, 2, 3], (2, 8, 8), 3)[1].argmax(1)
    assert classes[0] != classes[1]
    with torch.no_grad():  # the images of one class overflow
        model.network.map_label.weight[:, classes[1]] = 1e38
    with pytest.raises(InvalidArgument, match=r"^edm, NFE 7: the image of seed 2 is NaN or infinite"):
        list(generate(model, uniform(model.path, 4), midpoint, [1, 2, 3], (2, 8, 8), 3, 2, name="edm, NFE 7"))
