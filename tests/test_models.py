"""The public face: what `import anisodiff` offers, and that its images are those of the stages."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import anisodiff
from anisodiff.errors import StageError
from anisodiff.grids.fixed import karras
from anisodiff.paths.noise_path import NoisePath, edm_path
from anisodiff.paths.rotated import rotated_basis
from anisodiff.paths.schedules import KnotSchedule, karras_logs
from anisodiff.paths.splitting import split_path
from anisodiff.paths.subspaces import Subspaces, partition
from anisodiff.pixels import to_uint8
from anisodiff.solvers.generation import generate
from anisodiff.storage import checkpoints

ROOT = Path(__file__).parents[1]
BASE = ROOT / "config/checkpoints/digits/base.safetensors"


@pytest.fixture
def run(tmp_path):
    """A run's folder: a network and a path of two subspaces."""
    logs = karras_logs(8, 1e-9, 0.002, 80.0)
    bent = torch.cat([logs, logs + torch.linspace(0, torch.pi, 8, dtype=torch.float64).sin()])
    shutil.copy(BASE, tmp_path / "network.safetensors")
    checkpoints.save_path(
        tmp_path / "path.safetensors", NoisePath(Subspaces(partition(8, "block")), KnotSchedule(bent))
    )
    return tmp_path


@pytest.mark.parametrize(("solver", "nfe"), [("heun", 9), ("ipndm", 6)])
def test_images_are_those_of_the_sampling_stage(solver, nfe):
    model = anisodiff.load(BASE)
    steps = (nfe + 1) // 2 if solver == "heun" else nfe
    step = anisodiff.SOLVERS[solver].with_order()
    made = generate(model.denoiser, karras(steps, 1, 0.002, 80.0), step, range(5), (1, 8, 8), 0, batch=4)
    expected = torch.cat([images for _, images in made])
    assert torch.equal(to_uint8(anisodiff.sample(model, nfe, solver, range(5), batch=4)), expected)


def test_a_runs_folder_brings_its_own_path(run):
    model = anisodiff.load(run)
    assert (model.shape, model.classes, model.path_file is not None) == ((1, 8, 8), 0, True)
    assert model.denoiser.sigma_data == checkpoints.header(BASE)["sigma_data"]
    nodes = anisodiff.levels(model, 9).nodes
    assert nodes.shape == (6, 1, 2)
    assert (nodes[1, 0, 0] != nodes[1, 0, 1]) & (nodes[-1] == 0).all()
    images = anisodiff.sample(model, seeds=range(3))
    assert images.shape == (3, 1, 8, 8)
    assert images.abs().max() <= 1
    other = anisodiff.sample(model, seeds=[2])
    torch.testing.assert_close(other[0], images[2], atol=1e-4, rtol=0)
    assert not torch.allclose(images, anisodiff.sample(anisodiff.load(BASE), seeds=range(3)), atol=0.05)
    assert anisodiff.sample(model, seeds=[]).shape == (0, 1, 8, 8)


def test_levels_of_ones_own(run):
    model = anisodiff.load(BASE)
    model.denoiser.evaluations = 0
    anisodiff.sample(model, solver="euler", seeds=range(2), grid=anisodiff.karras(4, 1, 0.002, 80.0))
    assert model.denoiser.evaluations == 4


def test_levels_end_where_those_of_the_training_did(tmp_path):
    network, header = checkpoints.load_network(BASE)
    header["settings"] = {"dataset": {"sigma_min": 0.01, "sigma_max": 20.0}}
    checkpoints.save_network(tmp_path / "network.safetensors", network, **header)
    for file, ends in ((BASE, [80.0, 0.002]), (tmp_path / "network.safetensors", [20.0, 0.01])):
        nodes = anisodiff.levels(anisodiff.load(file), 9).nodes
        assert nodes[[0, -2]].flatten().tolist() == pytest.approx(ends)


def test_what_cannot_be_is_one_line(run, tmp_path):
    model = anisodiff.load(BASE)
    checkpoints.save_path(tmp_path / "large.safetensors", edm_path(16))
    in_colour = split_path(edm_path(8), rotated_basis("separable:4", (3, 8, 8)), "rank")
    checkpoints.save_path(tmp_path / "colour.safetensors", in_colour)
    for call, says in (
        (lambda: anisodiff.sample(model, solver="rk45"), "solver: 'rk45' is unknown here: use one of euler, heun,"),
        (lambda: anisodiff.levels(model, 9, grid="cosine"), "grid: 'cosine' is unknown here: use one of karras,"),
        (
            lambda: anisodiff.levels(model, 8, "heun"),
            "8 cannot be spent: heun on the karras grid ends in one step to 0",
        ),
        (lambda: anisodiff.load(BASE, tmp_path / "large.safetensors"), "makes images of side 8, .* is for 16"),
        (lambda: anisodiff.load(BASE, tmp_path / "colour.safetensors"), ".* is for images of 3 channels, .* makes 1"),
        (lambda: anisodiff.load(tmp_path / "nothing"), ".*nothing: "),
    ):
        with pytest.raises(StageError, match=says) as refused:
            call()
        assert "\n" not in str(refused.value)
    with pytest.raises(AttributeError, match="module 'anisodiff' has no attribute 'sampel'"):
        anisodiff.sampel  # noqa: B018


@pytest.mark.parametrize("module", ["anisodiff", "anisodiff.cli", "anisodiff.report.progress", *(
    f"anisodiff.experiment.{name}" for name in ("budgets", "config", "config_text", "planning", "slurm")
)])  # fmt: skip
def test_what_help_and_workflow_import_needs_no_torch(module):
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    assert subprocess.run([sys.executable, "-c", code], env=environment, cwd=ROOT, check=False).returncode == 0


def test_every_public_name_is_there():
    assert all(getattr(anisodiff, name) is not None for name in anisodiff.__all__)
    assert set(anisodiff._HOME) == set(anisodiff.__all__)
