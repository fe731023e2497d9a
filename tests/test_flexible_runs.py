"""Runs that learn a basis or a frame, and likelihoods as a stage: what is frozen, resumed, shared out, refused."""

import copy
import itertools
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from runs import EDM, ROOT, RUN, SPACE

from anisodiff.compute import CPU
from anisodiff.data import image_sets
from anisodiff.errors import StageError
from anisodiff.experiment.config import resolve
from anisodiff.experiment.settings import LikelihoodSettings, MethodSettings
from anisodiff.grids.fixed import karras
from anisodiff.methods import levels_of
from anisodiff.networks.turned import Turned
from anisodiff.report import likelihood_table
from anisodiff.report.published import published_values
from anisodiff.stages import finetuning, initial_paths, likelihoods
from anisodiff.stages.finetuning import TrainingInputs
from anisodiff.storage import checkpoints
from anisodiff.training.jobs import BatchSampler, network_work

CONFIG = yaml.safe_load((ROOT / "config/fp-digits.yaml").read_text())
SHORT = RUN.changed(kimg=0.32, batch=32, ema_kimg=0.0, ramp_kimg=0.0, guard_kimg=1.0, path_learning_rate=0.0)


@pytest.fixture(scope="module")
def spectral(start, tmp_path_factory) -> Path:
    """A path on which a basis can turn: each mode of the DCT a subspace."""
    settings = EDM.changed(kind="spectral", subspaces="separable:64")
    file = tmp_path_factory.mktemp("paths") / "dct.safetensors"
    checkpoints.save_path(file, initial_paths.initial_path(SPACE, settings, start[2]))
    return file


def finetuned(start, path: Path, folder: Path, **changes) -> tuple[Path, Path]:
    outputs = folder / "network.safetensors", folder / "path.safetensors"
    settings = SHORT.changed(subspaces="separable:64", label_weights="rank", **changes)
    finetuning.finetune(SPACE, settings, TrainingInputs(start[2], start[0], path), *outputs)
    return outputs


@pytest.mark.parametrize(("freeze_after", "moving"), [(0.5, 5), (1.0, 10)])
def test_a_basis_learns_and_stays_where_the_run_freezes_it(start, spectral, freeze_after, moving):
    """Mix training: after its share the forward process is held to the bit; joint training goes on."""
    network, path = checkpoints.load_network(start[0])[0], checkpoints.load_path(spectral)[0]
    settings = SHORT.changed(
        subspaces="separable:64", learn_basis=True, basis_learning_rate=0.01, freeze_after=freeze_after
    )
    batches = BatchSampler(SPACE, start[2], "cpu")
    work = network_work(SPACE, settings, network, path, batches, CPU)
    turns, weights = [path.subspaces.state_dict()["turn"].clone()], []
    for _ in work.records:
        turns.append(path.subspaces.state_dict()["turn"].clone())
        weights.append(next(network.parameters()).detach().clone())
    assert len(turns) == 11
    moved = [not torch.equal(now, before) for before, now in itertools.pairwise(turns)]
    assert moved == [True] * moving + [False] * (10 - moving)
    assert not any(torch.equal(now, before) for before, now in itertools.pairwise(weights))


def test_a_basis_that_is_not_learned_stays(start, spectral, tmp_path):
    _, path = finetuned(start, spectral, tmp_path)
    assert not checkpoints.load_path(path)[0].subspaces.state_dict()["turn"].any()


def test_a_frame_is_saved_with_its_network(start, tmp_path):
    settings = SHORT.changed(loss="edm", planes=3)
    outputs = tmp_path / "network.safetensors", tmp_path / "path.safetensors"
    finetuning.finetune(SPACE, settings, TrainingInputs(start[2], *start[:2]), *outputs)
    network, metadata = checkpoints.load_network(outputs[0])
    assert isinstance(network, Turned)
    assert len(network.frame.rates) == 3
    assert metadata["frame"]
    again = tmp_path / "again.safetensors"
    checkpoints.save_network(again, network)
    assert all(
        torch.equal(each, checkpoints.read(again)[0][name]) for name, each in checkpoints.read(outputs[0])[0].items()
    )


@pytest.mark.parametrize(
    ("run", "changes", "words"),
    [
        ("iso", {"learn_basis": True}, "learn_basis: takes loss tlsm and subspaces separable:J or dense:J"),
        ("separable", {"subspaces": "separable:1"}, "learn_basis: one subspace is the same in every basis"),
        ("separable", {"weight": "simple", "path_learning_rate": 0.1}, "weight: every rise of a level lowers simple"),
        ("separable", {"path_gradient": "level"}, "path_gradient: level is for the levels of one subspace"),
        ("separable", {"freeze_after": 0}, "freeze_after: 0.* is not above 0"),
    ],
)
def test_runs_that_cannot_learn_are_refused(run, changes, words):
    config = copy.deepcopy(CONFIG)
    config["datasets"]["fp-digits"]["runs"][run] |= changes
    with pytest.raises(StageError, match=rf"runs\.{run}\.{words}"):
        resolve(config)


def test_equal_schedules_have_no_basis_to_learn(start, tmp_path):
    settings = EDM.changed(subspaces="separable:4")
    checkpoints.save_path(tmp_path / "equal.safetensors", initial_paths.initial_path(SPACE, settings, start[2]))
    run = SHORT.changed(subspaces="separable:4", learn_basis=True, label_weights="rank")
    inputs = TrainingInputs(start[2], start[0], tmp_path / "equal.safetensors")
    with pytest.raises(StageError, match="learn_basis: basis: it has no gradient until the schedules differ"):
        finetuning.finetune(SPACE, run, inputs, tmp_path / "n.safetensors", tmp_path / "p.safetensors")


def test_a_basis_larger_than_memory_is_refused(tmp_path):
    with image_sets.writing(tmp_path / "large", 4, (3, 32, 32)) as (add, described):
        for value in range(4):
            add(np.full((3, 32, 32), value))
        described |= {"labels": [0] * 4, "classes": 0}
    settings = EDM.changed(subspaces="dense:2")
    with pytest.raises(StageError, match=r"3072 dimensions, a dense one takes 1024 at most: use separable:J"):
        initial_paths.initial_path(SPACE.changed(heldout=1), settings, tmp_path / "large")


ASKED = LikelihoodSettings(
    network="base", path="edm", images=8, shard=8, batch=4, grey_levels=17, steps=2, probes=1, times=2
)


def measured(start, output: Path, rows: range = range(8), **changes) -> dict[str, torch.Tensor]:
    likelihoods.measure_likelihood(SPACE, ASKED.changed(**changes), rows, start[2], *start[:2], output)
    return checkpoints.read(output)[0]


def test_a_likelihood_that_was_stopped_goes_on_and_is_the_same(start, tmp_path, monkeypatch):
    whole = measured(start, tmp_path / "whole.safetensors")
    assert {name: len(each) for name, each in whole.items()} == {"ode": 8, "bound": 8}
    calls, true = [], likelihoods._nats

    def stopping(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return true(*arguments)

    clock = itertools.count()  # it is read at the start, after each batch and at the end
    monkeypatch.setattr(likelihoods, "time", SimpleNamespace(monotonic=clock.__next__))
    monkeypatch.setattr(likelihoods, "_nats", stopping)
    with pytest.raises(KeyboardInterrupt):
        measured(start, tmp_path / "stopped.safetensors")
    assert not (tmp_path / "stopped.safetensors").exists()
    again = measured(start, tmp_path / "stopped.safetensors")
    assert len(calls) == 3  # the first batch was kept
    assert checkpoints.header(tmp_path / "stopped.safetensors")["device_seconds"] == 1 + 2
    assert all(torch.equal(again[name], each) for name, each in whole.items())
    assert not (tmp_path / "stopped.partial").exists()


def test_shards_and_batches_change_no_image(start, tmp_path):
    whole = measured(start, tmp_path / "whole.safetensors")
    parts = [measured(start, tmp_path / f"{rows.start}.safetensors", rows) for rows in (range(3), range(3, 8))]
    for name, each in whole.items():
        assert torch.allclose(torch.cat([part[name] for part in parts]), each, atol=1e-3)
    other = measured(start, tmp_path / "other.safetensors", seed=5)
    assert not torch.allclose(other["bound"], whole["bound"], atol=1e-3)


def test_bits_per_dimension_stand_beside_their_methods(start, tmp_path):
    measured(start, tmp_path / "base.safetensors")
    found, images = likelihood_table.likelihood_rows({"base": [tmp_path / "base.safetensors"]})
    nats = checkpoints.read(tmp_path / "base.safetensors")[0]
    bound = -nats["bound"].mean() / (64 * np.log(2))
    row = found[found["estimator"] == "bound"].iloc[0]
    assert row["bits_per_dim"] == pytest.approx(float(bound))
    assert row["error"] == pytest.approx(float(nats["bound"].std() / 8**0.5 / (64 * np.log(2))))
    bounds = images[images["estimator"] == "bound"]
    assert bounds["bits_per_dim"].to_numpy() == pytest.approx((-nats["bound"] / (64 * np.log(2))).numpy())
    assert bounds["image"].tolist() == list(range(8))
    density = -nats["ode"].mean() / (64 * np.log(2)) + np.log2(16 / 2)
    assert found[found["estimator"] == "ode"].iloc[0]["bits_per_dim"] == pytest.approx(float(density))
    published = published_values("cifar10", str(ROOT / "config/published.csv"), ["EDM", "FP-Noise (Mix)", "LSGM"])
    page = likelihood_table.likelihood_page(found, published)
    assert "| base | base | edm | ode |" in page
    assert "| LSGM, published |  |  | bound | < 3.43 |  |\n" in page
    assert "| FP-Noise (Mix), published |  |  |  | 3.20 |  |\n" in page
    assert "EDM, published" not in page
    assert page.endswith("as printed in arXiv:2206.10365, Table 2.\n")


def test_images_of_other_grey_levels_are_refused(start, tmp_path):
    with pytest.raises(StageError, match="images are not of 5 grey levels: set grey_levels to 256"):
        measured(start, tmp_path / "base.safetensors", grey_levels=5)


def test_the_grid_of_mean_levels_is_edms_on_edms_path(start):
    path, _ = checkpoints.load_path(start[1])
    method = MethodSettings(network="base", path="edm", grid="mean-karras", solver="euler", append_zero=False)
    found = levels_of(method, 6, SPACE, path).nodes
    assert torch.allclose(found, karras(7, 1, 0.002, 80.0, append_zero=False).nodes, rtol=1e-9)
