"""A batch in pieces, on one process or shared out to several: the same weights."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from runs import ROOT, RUN, command, weights

from anisodiff.errors import StageError
from anisodiff.experiment.settings import RunSettings
from anisodiff.storage import checkpoints
from anisodiff.training.launch import launch
from anisodiff.training.loop import ResumeStore, TrainingPlan, TrainingState, train

PIECES = RUN.changed(kimg=0.64, micro_batch=8, save_seconds=300)


def run(start, folder: Path, settings: RunSettings, processes: int) -> None:
    subprocess.run(
        [*command(start, folder, settings), "--processes", str(processes)], cwd=ROOT, check=True, timeout=300
    )


@pytest.fixture(scope="module")
def alone(start, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("alone")
    run(start, folder, PIECES, 1)
    return folder


def farthest(found: dict, expected: dict) -> float:
    assert found.keys() == expected.keys()
    return max(float((found[name].double() - expected[name].double()).abs().max()) for name in expected)


def test_two_processes_reach_the_weights_of_one(start, alone, tmp_path):
    run(start, tmp_path, PIECES, 2)
    assert farthest(weights(tmp_path), weights(alone)) < 1e-5
    about = checkpoints.header(tmp_path / "network.safetensors")
    assert about["processes"] == 2
    assert about["device_seconds"] == pytest.approx(2 * about["seconds"])


@pytest.mark.parametrize("quiet", ["network", "path"])
def test_gradients_left_on_their_process_are_noticed(start, alone, tmp_path, quiet):
    """The comparison above, with the network's or the path's gradients kept from the sum, fails."""
    script = tmp_path / "broken.py"
    wanted = "float64" if quiet == "path" else "float32"
    script.write_text(
        "import sys, torch\nfrom anisodiff import cli\nfrom anisodiff.training import parallel\n"
        "whole = parallel.sum_gradients\n"
        "def partial(parameters, loss):\n"
        f"    return whole([p for p in parameters if p.dtype != torch.{wanted}], loss)\n"
        "parallel.sum_gradients = partial\ncli.main()\n"
    )
    command_line = command(start, tmp_path, PIECES)[3:]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    subprocess.run([*torchrun, *command_line], cwd=ROOT, check=True, timeout=300)
    found = weights(tmp_path)
    names = [name for name in found if name.startswith(quiet)]
    expected = weights(alone)
    assert farthest({name: found[name] for name in names}, {name: expected[name] for name in names}) > 1e-4


def test_processes_that_are_stopped_go_on_together(start, alone, tmp_path):
    settings = PIECES.changed(save_seconds=1e-3)
    command_line = [*command(start, tmp_path, settings), "--processes", "2"]
    process = subprocess.Popen(command_line, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    while not list(tmp_path.glob(".state/*/*/step-*")) and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate()
    assert process.returncode != 0
    assert "state saved; start again to go on" in errors
    run(start, tmp_path, settings, 3)
    assert farthest(weights(tmp_path), weights(alone)) < 1e-5


def test_pieces_add_up_to_their_batch():
    """Without dropout, a batch in one piece and in four is the same gradient."""
    schedule = {"kimg": 0.08, "batch": 8, "ramp_kimg": 0.0, "ema_kimg": 1.0, "ema_ramp": None, "seed": 0}
    found = []
    for micro_batch in (None, 2):
        torch.manual_seed(0)
        layer = torch.nn.Linear(3, 1).double()
        made = TrainingPlan(**schedule, micro_batch=micro_batch)
        rows = torch.arange(24, dtype=torch.float64).reshape(8, 3) / 24
        pieces = iter(list(rows.split(made.piece)) * made.steps)
        draw = lambda _, pieces=pieces: {"rows": next(pieces)}  # noqa: E731
        loss = lambda drawn, layer=layer: layer(drawn["rows"]).square().mean()  # noqa: E731
        training = TrainingState({"layer": layer}, {"layer": 1e-2})
        list(train(training, made, draw, loss))
        found.append(layer.weight.detach().clone())
    torch.testing.assert_close(*found, rtol=1e-12, atol=0)


def test_more_processes_than_pieces_is_one_line(start, tmp_path):
    failed = subprocess.run(
        [*command(start, tmp_path, PIECES.changed(micro_batch=None)), "--processes", "2"],
        cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert failed.returncode != 0
    said = [line for line in failed.stderr.splitlines() if line.startswith("anisodiff: ")]
    assert said == ["anisodiff: micro_batch: 2 processes for 1 pieces of a batch of 32: set it to 16 or less"]


def test_several_machines_need_a_slurm_job(monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with pytest.raises(StageError, match="machines: 2 need a Slurm job"):
        launch(1, 2, 1)


def test_a_state_of_another_version_is_refused(tmp_path):
    store = ResumeStore(tmp_path, "key")
    training = TrainingState({"layer": torch.nn.Linear(2, 2)}, {"layer": 1e-3})
    state = tmp_path / "key" / "step-000000001.safetensors"
    checkpoints.save(state, training.tensors(), training.metadata() | {"version": "0.0.1+00000000"})
    with pytest.raises(StageError, match=r"resume state of version 0\.0\.1\+00000000, this is .*: go on with that"):
        store.load(training)
    assert state.exists()
