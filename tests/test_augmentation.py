"""EDM's augmentation: its own images, its probabilities, and what a network and a training make of it."""

from pathlib import Path

import numpy as np
import pytest
import torch
from runs import NETWORK, SPACE

from anisodiff.data.augmentation import DRAWN, LABELS, augmentation_labels, augmented, draw_augmentation
from anisodiff.experiment.settings import PretrainSettings
from anisodiff.stages.finetuning import pretrain
from anisodiff.storage import checkpoints
from anisodiff.training.jobs import BatchSampler

EDM = Path(__file__).parent / "data/edm/augment.npz"  # made by EDM's training/augment.py


def test_images_and_labels_are_edms():
    with np.load(EDM) as held:
        images, parameters, labels, expected = (
            torch.from_numpy(held[name]) for name in ("images", "parameters", "labels", "augmented")
        )
    assert augmentation_labels(parameters) == pytest.approx(labels, abs=1e-6)
    assert augmented(images, parameters) == pytest.approx(expected, abs=5e-5)
    assert (expected - images).abs().amax((1, 2, 3))[1:].min() > 0.5  # the first is left as it is


def test_no_augmentation_leaves_the_image():
    images = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    none = torch.zeros(3, DRAWN)
    assert augmented(images, none) == pytest.approx(images, abs=1e-5)
    assert not augmentation_labels(none).any()
    assert augmentation_labels(none).shape == (3, LABELS)


def test_a_pretraining_draws_and_tells_the_network(start, tmp_path):
    settings = PretrainSettings(kimg=0.128, batch=32, learning_rate=1e-3, network=NETWORK, augment=0.5)
    batches = BatchSampler(SPACE, start[2], "cpu", augment=0.5)
    drawn = batches.moved(batches.draw(16, torch.Generator().manual_seed(0)))
    assert drawn["augment_labels"].shape == (16, LABELS)
    assert set(batches.moved(batches.fixed(torch.arange(4)))) == {"x0", "labels"}
    made = [tmp_path / name for name in ("a.safetensors", "b.safetensors")]
    for file in made:
        pretrain(SPACE, settings, start[2], file)
    network, _ = checkpoints.load_network(made[0])
    assert network.map_augment.weight.shape[1] == LABELS
    assert network.map_augment.weight.abs().sum() > 0
    again = checkpoints.read(made[1])[0]
    assert all(torch.equal(each, again[name]) for name, each in checkpoints.read(made[0])[0].items())


def test_each_kind_is_drawn_as_often_as_it_should_be():
    drawn = draw_augmentation(20_000, 0.12, torch.Generator().manual_seed(0))
    often = (drawn != 0).float().mean(0)
    assert often.tolist() == pytest.approx([0.5, 0.06, 0.12, 0.12, 0.12, 0.5, 0.12, 0.12], abs=0.01)
    assert torch.equal(drawn[:, 6] != 0, drawn[:, 7] != 0)
    again = draw_augmentation(20_000, 0.12, torch.Generator().manual_seed(0))
    assert torch.equal(drawn, again)
