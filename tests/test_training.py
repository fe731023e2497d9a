"""Stopped anywhere and started again, a run ends with the weights of one that ran through."""

import errno
import fcntl
import json
import math
import os
import platform
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
import yaml
from runs import ROOT, RUN, SPACE, command, inputs_of, weights

from anisodiff.compute import CPU
from anisodiff.errors import StageError
from anisodiff.experiment.config import resolve
from anisodiff.experiment.settings import PathSettings, RunSettings
from anisodiff.methods import read_denoiser
from anisodiff.stages import finetuning, initial_paths
from anisodiff.storage import checkpoints
from anisodiff.training import image_guard
from anisodiff.training.jobs import BatchSampler, _heldout_loss, plan_of
from anisodiff.training.loop import EarlyStop, ResumeStore, TrainingPlan, TrainingState, _lines_to, train


def run(start, folder: Path, settings: RunSettings, stop: signal.Signals | None = None) -> subprocess.CompletedProcess:
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
    assert (tmp_path / "network.jsonl").read_text() == (through / "network.jsonl").read_text()
    assert not list(tmp_path.glob(".state/**/*"))
    if stop == signal.SIGTERM:
        assert "state saved; start again to go on" in stopped.stderr


def test_the_path_was_learned_and_the_kimg_counted(start, through):
    path, about = checkpoints.load_path(through / "path.safetensors")
    logs = path.schedule.curve.logs
    assert not torch.allclose(logs[0], logs[1])
    assert about["kimg"] == pytest.approx(2.56)
    assert about["versions"]
    assert about["settings"]["run"]["probe_fraction"] == 0.25


def test_a_state_of_other_settings_is_not_used(start, tmp_path):
    run(start, tmp_path, RUN, signal.SIGKILL)
    other = RUN.changed(learning_rate=2e-3, kimg=0.32)
    assert run(start, tmp_path, other).returncode == 0
    fresh = tmp_path / "fresh"
    fresh.mkdir()
    assert run(start, fresh, other).returncode == 0
    assert all(torch.equal(value, weights(fresh)[name]) for name, value in weights(tmp_path).items())


def test_a_state_of_another_dataset_is_not_used(start, tmp_path):
    """Half of a run on images that are now held out would be taken for a whole one."""
    assert run(start, tmp_path, RUN, signal.SIGKILL).returncode == -signal.SIGKILL
    fresh = tmp_path / "fresh"
    for folder in (tmp_path, fresh):
        outputs = folder / "network.safetensors", folder / "path.safetensors"
        finetuning.finetune(SPACE.changed(heldout=65), RUN, inputs_of(start), *outputs)
    assert all(torch.equal(value, weights(fresh)[name]) for name, value in weights(tmp_path).items())


def test_a_lock_that_was_removed_meanwhile_keeps_nobody_out_and_lets_nobody_in(tmp_path, monkeypatch):
    """Between opening the file and locking it, the process that held it ends and removes it."""
    store, true = ResumeStore(tmp_path / "network", "key"), fcntl.flock
    removed = []

    def flock(*arguments):
        if not removed:
            removed.append(store.lock.unlink())
        true(*arguments)

    monkeypatch.setattr(fcntl, "flock", flock)
    with store.locked():
        assert f"process {os.getpid()}" in store.lock.read_text()
        with pytest.raises(StageError, match=f"process {os.getpid()} .* trains here"), store.locked():
            pass


@pytest.mark.parametrize("changes", [{"loss": "edm", "label_weights": "rank"}, {"path_learning_rate": 0}])
def test_a_path_that_does_not_learn_is_as_it_was_given(start, tmp_path, changes):
    """Not resampled to a learned one's knots."""
    settings = PathSettings(kind="spectral", subspaces="block", label_weights="equal")
    given = initial_paths.initial_path(SPACE, settings, start[2])
    checkpoints.save_path(tmp_path / "given.safetensors", given)
    outputs = tmp_path / "network.safetensors", tmp_path / "path.safetensors"
    inputs = inputs_of((start[0], tmp_path / "given.safetensors", start[2]))
    finetuning.finetune(SPACE, RUN.changed(kimg=0.064, **changes), inputs, *outputs)
    found = checkpoints.load_path(outputs[1])[0]
    assert len(given.curve.nodes) > 32
    assert torch.equal(found.curve.nodes, given.curve.nodes)
    assert torch.equal(found.curve.logs, given.curve.logs)
    assert found.weights.tolist() == [0.5, 0.5]


def test_a_second_process_is_kept_out_while_another_makes_the_same_output(start, tmp_path):
    """As the successor of a killed run may meet its orphan, and with other settings too."""
    first = subprocess.Popen(command(start, tmp_path, RUN), cwd=ROOT, stderr=subprocess.DEVNULL)
    while not list(tmp_path.glob(".state/*/*/step-*")) and first.poll() is None:
        time.sleep(0.005)
    first.send_signal(signal.SIGSTOP)
    os.waitpid(first.pid, os.WUNTRACED)
    folder = tmp_path / ".state/network"
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    outputs = tmp_path / "network.safetensors", tmp_path / "path.safetensors"
    other = f"process {first.pid} on {platform.node()}"
    for settings in (RUN, RUN.changed(seed=4)):
        with pytest.raises(StageError) as refused:
            finetuning.finetune(SPACE, settings, inputs_of(start), *outputs)
        assert str(refused.value) == f"{folder}: {other} trains here: wait until it ends, or end it, and start again"
    first.kill()
    first.wait()
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before
    with ResumeStore(folder, "key").locked():
        pass


def test_a_lock_ends_with_its_block_and_is_missed_where_there_are_none(tmp_path, monkeypatch):
    store = ResumeStore(tmp_path, "key")
    for _ in range(2):
        with store.locked(), pytest.raises(StageError, match="trains here"), ResumeStore(tmp_path, "key").locked():
            pass
    none = lambda *_: (_ for _ in ()).throw(OSError(errno.ENOLCK, "No locks available"))  # noqa: E731
    monkeypatch.setattr("fcntl.flock", none)
    with store.locked(), ResumeStore(tmp_path, "key").locked():
        store.clear()


def test_a_truncated_state_gives_way_to_the_one_before(tmp_path, capsys):
    store = ResumeStore(tmp_path, "key")
    training = TrainingState({"layer": torch.nn.Linear(2, 2)}, {"layer": 1e-3})
    for training.step in (1, 2, 3):
        store.save(training)
    names = sorted(path.name for path in (tmp_path / "key").iterdir())
    assert names == ["step-000000002.safetensors", "step-000000003.safetensors"]
    newest = tmp_path / "key" / names[-1]
    newest.write_bytes(newest.read_bytes()[:100])
    again = TrainingState({"layer": torch.nn.Linear(2, 2)}, {"layer": 1e-3})
    assert store.load(again)
    assert again.step == 2
    assert torch.equal(again.modules["layer"].weight, training.modules["layer"].weight)
    assert capsys.readouterr().err == (
        f"anisodiff: {newest}: a damaged resume state: "
        "going on from the state before it, or from the start if there is none\n"
    )
    store.save(again)  # as it goes on, what it has passed over makes room
    assert [path.name for path in (tmp_path / "key").iterdir()] == ["step-000000002.safetensors"]


@pytest.mark.parametrize("stop", [7, 19, 20, 33])
def test_the_log_of_a_resumed_run_is_that_of_an_undisturbed_one(tmp_path, stop):
    """Means run over whole groups, also where a save falls between two of their steps."""

    def made() -> tuple[TrainingState, list]:
        torch.manual_seed(0)
        training = TrainingState({"layer": torch.nn.Linear(2, 1)}, {"layer": 1e-2})
        schedule = TrainingPlan(kimg=0.05, batch=1, ramp_kimg=0.0, ema_kimg=0.01, ema_ramp=None, seed=0)
        draw = lambda generator: {"x": torch.randn(1, 2, generator=generator)}  # noqa: E731
        loss = lambda drawn: training.modules["layer"](drawn["x"]).square().sum()  # noqa: E731
        return training, train(training, schedule, draw, loss)

    undisturbed = list(made()[1])
    store = ResumeStore(tmp_path, "key")
    training, records = made()
    begun = [next(records) for _ in range(stop)]
    store.save(training)
    training, records = made()
    assert store.load(training)
    assert [*begun, *records] == undisturbed
    assert [record["step"] for record in undisturbed if "loss" in record] == [20, 40, 50]


def test_a_stop_that_was_logged_but_not_saved_is_logged_once(tmp_path):
    log = tmp_path / "network.jsonl"
    lines = ['{"step": 20, "loss": 1.0}\n', '{"step": 20, "stopped_early": true, "heldout": 2.0}\n']
    log.write_text("".join(lines) + '{"step": 40, "lo')
    training = TrainingState({"layer": torch.nn.Linear(1, 1)}, {"layer": 1e-2}, step=20)
    assert _lines_to(log, training) == lines[:1]
    training.stopped_early = True
    assert _lines_to(log, training) == lines


def line_run(guard: EarlyStop | None, value: float = 1.0, steps: int = 40) -> TrainingState:
    torch.manual_seed(0)
    layer = torch.nn.Linear(1, 1)
    training = TrainingState({"layer": layer}, {"layer": 1e-2})
    schedule = TrainingPlan(kimg=steps / 1000, batch=1, ramp_kimg=0.0, ema_kimg=0.001, ema_ramp=None, seed=0)
    loss = lambda drawn: (layer(torch.ones(1, 1)) * value).sum()  # noqa: E731
    list(train(training, schedule, lambda generator: {}, loss, guard))
    return training


def test_a_loss_that_is_not_finite_ends_the_run():
    with pytest.raises(StageError, match="loss is nan at step 0: lower the learning rates"):
        line_run(None, float("nan"))


def test_the_guard_goes_back_to_the_last_good_state():
    heldout = iter([1.0, 0.9, 0.95, 1.2, 0.1])
    training = line_run(EarlyStop(lambda: next(heldout), every=5, tolerance=0.1))
    assert training.stopped_early
    assert training.step == 15
    assert training.heldout[-1] == (15, 1.2)
    good = line_run(None, steps=40)  # the same run to its end, for another weight
    assert not torch.equal(training.modules["layer"].weight, good.modules["layer"].weight)
    assert torch.equal(training.modules["layer"].weight, training.good["now/layer/weight"])


@pytest.mark.parametrize("at_the_end", [0.82, 5.0, math.nan])
def test_a_run_that_goes_bad_after_its_last_periodic_check_saves_what_was_checked(at_the_end):
    torch.manual_seed(0)
    training = TrainingState({"layer": torch.nn.Linear(1, 1)}, {"layer": 1e-2})
    schedule = TrainingPlan(kimg=0.04, batch=1, ramp_kimg=0.0, ema_kimg=0.002, ema_ramp=None, seed=0)
    checked = []

    def heldout() -> float:
        checked.append(training.ema["layer"].weight.clone())
        return [1.0, 0.9, 0.8, at_the_end][len(checked) - 1]

    loss = lambda drawn: training.modules["layer"](torch.ones(1, 1)).sum()  # noqa: E731
    records = list(train(training, schedule, lambda generator: {}, loss, EarlyStop(heldout, every=15, tolerance=0.1)))
    good = at_the_end == 0.82
    assert [step for step, _ in training.heldout] == [0, 15, 30, 40]
    assert training.stopped_early == (not good) == records[-1].get("stopped_early", False)
    assert records[-1]["heldout"] is training.heldout[-1][1]
    assert torch.equal(training.ema["layer"].weight, checked[-1] if good else checked[2])
    assert not torch.equal(checked[2], checked[3])


def test_a_start_that_the_guard_cannot_judge_is_one_line():
    with pytest.raises(StageError, match="held-out loss is nan at the start: start from another network or path"):
        line_run(EarlyStop(lambda: math.nan, every=5, tolerance=0.1))


def test_the_guard_measures_the_files_that_are_written_and_changes_nothing(start, tmp_path):
    """Dropout is on in the steps between its checks, and off in the checks."""
    made = []
    for guard_kimg in (0.064, 1.0):
        settings = RUN.changed(kimg=0.32, save_seconds=300.0, path_ema_kimg=0.1, guard_kimg=guard_kimg)
        folder = tmp_path / str(guard_kimg)
        outputs = folder / "network.safetensors", folder / "path.safetensors"
        finetuning.finetune(SPACE, settings, inputs_of(start), *outputs)
        made.append(weights(folder))
        last = json.loads((folder / "network.jsonl").read_text().splitlines()[-1])
        saved, _ = read_denoiser(*outputs, SPACE, CPU)
        loss = _heldout_loss(saved, BatchSampler(SPACE, start[2], "cpu"), settings)
        assert last["heldout"] == pytest.approx(loss(), rel=1e-5)
    assert all(torch.equal(made[0][name], made[1][name]) for name in made[0])


def test_a_run_ends_with_the_path_whose_images_are_best(start, tmp_path):
    settings = RUN.changed(guard="images", guard_images=16, guard_kimg=0.32, path_learning_rate=0.3, ramp_kimg=0.0)
    outputs = tmp_path / "network.safetensors", tmp_path / "path.safetensors"
    finetuning.finetune(SPACE, settings, inputs_of(start), *outputs)
    records = [json.loads(line) for line in (tmp_path / "network.jsonl").read_text().splitlines()]
    checked = [record["heldout"] for record in records if "heldout" in record]
    teacher, _ = read_denoiser(*start[:2], SPACE, CPU)
    saved, _ = read_denoiser(*outputs, SPACE, CPU)
    truth = image_guard._drawn(teacher, 16, image_guard.TEACHER_NFE, "cpu")
    error = float((image_guard._drawn(saved, 16, 5, "cpu") - truth).square().flatten(1).sum(1).mean())
    assert error <= min(checked) * (1 + 1e-5)
    assert error < checked[-1]  # the last state is not the best
    assert image_guard.image_error(teacher, 16, image_guard.TEACHER_NFE, "cpu")() == 0


def test_a_schedule_learns_to_be_discretised_under_a_network_that_stays(start, tmp_path):
    settings = RUN.changed(loss="discretisation", learning_rate=0.0, path_learning_rate=0.03, ramp_kimg=0.0)
    outputs = tmp_path / "network.safetensors", tmp_path / "path.safetensors"
    finetuning.finetune(SPACE, settings, inputs_of(start), *outputs)
    records = [json.loads(line) for line in (tmp_path / "network.jsonl").read_text().splitlines()]
    checked = [record["heldout"] for record in records if "heldout" in record]
    assert checked[-1] < checked[0]
    before, after = (checkpoints.load_network(file)[0].state_dict() for file in (start[0], outputs[0]))
    assert all(torch.equal(each, after[name]) for name, each in before.items())


def test_rates_ramp_hold_and_halve():
    schedule = TrainingPlan(kimg=16.0, batch=100, ramp_kimg=1.0, ema_kimg=500.0, ema_ramp=0.05, seed=0, decay="steps")
    assert schedule.steps == 160
    assert schedule.rate(0) == pytest.approx(0.1)
    assert schedule.rate(9) == schedule.rate(79) == 1.0
    assert [schedule.rate(step) for step in (80, 99, 100, 120, 140, 159)] == [0.5, 0.5, 0.25, 0.125, 0.0625, 0.0625]
    assert schedule.ema_beta(19) == pytest.approx(0.5 ** (1 / (0.05 * 20)))


@pytest.mark.parametrize(("kimg", "batch"), [(1200.0, 1024), (16.0, 100)])
def test_rates_decay_as_in_the_published_code(kimg, batch):
    """Its `0.5 ** ((seen - total / 2) / (total / 8))` once `seen`, before the step, has passed half the images."""
    schedule = TrainingPlan(kimg=kimg, batch=batch, ramp_kimg=0.0, ema_kimg=0.0, ema_ramp=None, seed=0)
    total = int(kimg * 1000)
    for step in range(schedule.steps):
        seen = step * batch
        published = 1.0 if seen <= total // 2 else 0.5 ** ((seen - total // 2) / (total // 8))
        assert schedule.rate(step) == pytest.approx(published, rel=1e-9)
    assert schedule.rate(schedule.steps - 1) == pytest.approx(1 / 16, rel=0.1)


def test_each_module_is_averaged_with_its_own_half_life():
    torch.manual_seed(0)
    modules = {name: torch.nn.Linear(1, 1).double() for name in ("network", "path")}
    training = TrainingState(modules, {"network": 1e-2, "path": 1e-2})
    schedule = TrainingPlan(
        kimg=0.02, batch=2, ramp_kimg=0.0, ema_kimg=0.008, ema_ramp=None, seed=0, path_ema_kimg=0.004
    )  # half-lives of four steps and of two
    expected = {name: module.weight.detach().clone() for name, module in modules.items()}
    loss = lambda drawn: sum(module(torch.ones(1, 1).double()).sum() for module in modules.values())  # noqa: E731
    for _ in train(training, schedule, lambda generator: {}, loss):
        for name, steps in (("network", 4), ("path", 2)):
            expected[name] = 0.5 ** (1 / steps) * expected[name] + (1 - 0.5 ** (1 / steps)) * modules[name].weight
    for name in modules:
        torch.testing.assert_close(training.ema[name].weight.detach(), expected[name].detach(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("ema_ramp", [None, 0.05])
def test_a_half_life_of_zero_keeps_the_last_parameters_exactly(ema_ramp):
    torch.manual_seed(0)
    modules = {name: torch.nn.Linear(3, 3) for name in ("network", "path")}
    training = TrainingState(modules, {"network": 1e-2, "path": 1e-1})
    schedule = TrainingPlan(kimg=0.04, batch=1, ramp_kimg=0.0, ema_kimg=0.01, ema_ramp=ema_ramp, seed=0)
    loss = lambda drawn: sum(module(torch.ones(1, 3)).square().sum() for module in modules.values())  # noqa: E731
    list(train(training, schedule, lambda generator: {}, loss))
    assert torch.equal(training.ema["path"].weight, modules["path"].weight)
    assert not torch.equal(training.ema["network"].weight, modules["network"].weight)


def of_the_start(settings: RunSettings, module: str) -> float:
    """Share of what a module started with in what is saved of it."""
    schedule = plan_of(settings)
    return math.prod(schedule.ema_beta(step, module) for step in range(schedule.steps))


@pytest.mark.parametrize("later", [False, True])
def test_what_the_papers_presets_save_of_paths_and_warps_is_all_learned(later):
    """Their networks are averaged as published, where the later code keeps much of the start."""
    utils = pytest.importorskip("snakemake.utils")
    config = {}
    for name in ["paper", "paper-later"] if later else ["paper"]:
        utils.update_config(config, yaml.safe_load((ROOT / f"config/{name}.yaml").read_text()))
    datasets = resolve(config).datasets
    for name, dataset in datasets.items():
        for settings in (run for key, run in dataset.runs.items() if not key.startswith("fp-")):  # of another paper
            assert of_the_start(settings, "path") == 0
            kept = 0.5 ** (1200 / (50_000 if name == "imagenet" else 500)) if later else 0
            assert of_the_start(settings, "network") == pytest.approx(kept, rel=0.01, abs=1e-6)
        assert all(of_the_start(settings, "warp") == 0 for settings in dataset.warps.values())


def test_another_seed_draws_otherwise():
    """Torch's CPU generator sees the low 32 bits of its seed only."""
    plans = [
        TrainingPlan(kimg=1.0, batch=8, ramp_kimg=0.0, ema_kimg=0.0, ema_ramp=None, seed=seed) for seed in range(4)
    ]
    seeds = [plan.piece_seed(step, 0) for plan in plans for step in range(125)]
    first = {float(torch.rand((), generator=torch.Generator().manual_seed(seed))) for seed in seeds}
    assert len(first) == len(seeds)
