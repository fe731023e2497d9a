"""Stopped anywhere and started again, a run ends with the weights of one that ran through."""

import json
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from runs import ROOT, RUN, command, weights

from anisodiff import checkpoints
from anisodiff.files import StageError
from anisodiff.training import Guard, ResumeStore, Schedule, Training, train


def run(start, folder: Path, settings: dict, stop: signal.Signals | None = None) -> subprocess.CompletedProcess:
    process = subprocess.Popen(command(start, folder, settings), cwd=ROOT, stderr=subprocess.PIPE, text=True)
    if stop is not None:
        while not list(folder.glob(".state/*/*/step-*")) and process.poll() is None:
            time.sleep(0.005)
        process.send_signal(stop)
    _, errors = process.communicate()
    return subprocess.CompletedProcess([], process.returncode, "", errors)


@pytest.fixture(scope="module")
def through(start, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("through")
    assert run(start, folder, RUN).returncode == 0
    return folder


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGKILL])
def test_stopped_and_started_again_ends_with_the_same_weights(start, through, tmp_path, stop):
    stopped = run(start, tmp_path, RUN, stop)
    assert stopped.returncode == (143 if stop == signal.SIGTERM else -signal.SIGKILL)
    assert not (tmp_path / "network.safetensors").exists()
    states = list(tmp_path.glob(".state/*/*/step-*.safetensors"))
    assert 1 <= len(states) <= 3
    assert run(start, tmp_path, RUN).returncode == 0
    expected, found = weights(through), weights(tmp_path)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    steps = [json.loads(line)["step"] for line in (tmp_path / "network.jsonl").read_text().splitlines()]
    assert steps == sorted(set(steps))
    assert steps[-1] == 80
    assert not list(tmp_path.glob(".state/**/*"))
    if stop == signal.SIGTERM:
        assert "state saved; start again to go on" in stopped.stderr


def test_the_path_was_learned_and_the_kimg_counted(start, through):
    path, about = checkpoints.load_path(through / "path.safetensors")
    logs = path.schedule.curve.logs
    assert not torch.allclose(logs[0], logs[1])
    assert about["kimg"] == pytest.approx(2.56)
    assert about["versions"]
    assert about["settings"]["run"]["share"] == 0.25


def test_a_state_of_other_settings_is_not_used(start, tmp_path):
    run(start, tmp_path, RUN, signal.SIGKILL)
    other = {**RUN, "learning_rate": 2e-3, "kimg": 0.32}
    assert run(start, tmp_path, other).returncode == 0
    fresh = tmp_path / "fresh"
    fresh.mkdir()
    assert run(start, fresh, other).returncode == 0
    assert all(torch.equal(value, weights(fresh)[name]) for name, value in weights(tmp_path).items())


def test_a_truncated_state_gives_way_to_the_one_before(tmp_path):
    store = ResumeStore(tmp_path, "key")
    training = Training({"layer": torch.nn.Linear(2, 2)}, {"layer": 1e-3})
    for training.step in (1, 2, 3):
        store.save(training)
    names = sorted(path.name for path in (tmp_path / "key").iterdir())
    assert names == ["step-000000002.safetensors", "step-000000003.safetensors"]
    newest = tmp_path / "key" / names[-1]
    newest.write_bytes(newest.read_bytes()[:100])
    again = Training({"layer": torch.nn.Linear(2, 2)}, {"layer": 1e-3})
    assert store.load(again)
    assert again.step == 2
    assert torch.equal(again.modules["layer"].weight, training.modules["layer"].weight)


def line_run(guard: Guard | None, value: float = 1.0, steps: int = 40) -> Training:
    torch.manual_seed(0)
    layer = torch.nn.Linear(1, 1)
    training = Training({"layer": layer}, {"layer": 1e-2})
    schedule = Schedule(kimg=steps / 1000, batch=1, ramp_kimg=0.0, ema_kimg=0.001, ema_ramp=None, seed=0)
    loss = lambda drawn: (layer(torch.ones(1, 1)) * value).sum()  # noqa: E731
    list(train(training, schedule, lambda generator: {}, loss, guard))
    return training


def test_a_loss_that_is_not_finite_ends_the_run():
    with pytest.raises(StageError, match="loss is nan at step 0: lower the learning rates"):
        line_run(None, float("nan"))


def test_the_guard_goes_back_to_the_last_good_state():
    heldout = iter([1.0, 0.9, 0.95, 1.2, 0.1])
    training = line_run(Guard(lambda: next(heldout), every=5, tolerance=0.1))
    assert training.stopped_early
    assert training.step == 15
    assert training.heldout[-1] == (15, 1.2)
    good = line_run(None, steps=40)  # the same run to its end, for another weight
    assert not torch.equal(training.modules["layer"].weight, good.modules["layer"].weight)
    assert torch.equal(training.modules["layer"].weight, training.good["now/layer/weight"])


def test_rates_ramp_hold_and_halve():
    schedule = Schedule(kimg=16.0, batch=100, ramp_kimg=1.0, ema_kimg=500.0, ema_ramp=0.05, seed=0)
    assert schedule.steps == 160
    assert schedule.rate(0) == pytest.approx(0.1)
    assert schedule.rate(9) == schedule.rate(79) == 1.0
    assert [schedule.rate(step) for step in (80, 99, 100, 120, 140, 159)] == [0.5, 0.5, 0.25, 0.125, 0.0625, 0.0625]
    assert schedule.ema_beta(19) == pytest.approx(0.5 ** (1 / (0.05 * 20)))
