"""Tunings as a stage: pairs and budgets that go on after a stop, what rows may use them, what tables say of them."""

import copy
import itertools
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from runs import ROOT, SPACE, method_of

import anisodiff
from anisodiff.compute import CPU
from anisodiff.errors import StageError, Stopped
from anisodiff.experiment.config import resolve
from anisodiff.experiment.settings import MethodSettings, TuningSettings
from anisodiff.methods import Method, MethodFiles, Sampler
from anisodiff.metrics.registry import FeatureFile
from anisodiff.report import costs
from anisodiff.solvers.generation import final_states
from anisodiff.solvers.multistep import THEORIES
from anisodiff.solvers.registry import SOLVERS
from anisodiff.stages import tuning
from anisodiff.storage import checkpoints
from anisodiff.storage.tunings import load_tuning

START = MethodSettings(network="base", path="edm", grid="log-snr", solver="dpmpp", append_zero=False)
TEACHER = START.changed(grid="karras", solver="heun", append_zero=None)
ASKED = TuningSettings(
    start="dpmpp", teacher="edm", teacher_nfe=7, nfe=[3, 4], steps=8, batch=8, warm_up=2, pairs=16, heldout=8,
    save_seconds=1e-3,
)  # fmt: skip


@pytest.fixture(scope="module")
def pairs(start, tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("pairs") / "pairs.safetensors"
    tuning.make_pairs(method_of(start, TEACHER), 7, range(1000, 1024), 8, file)
    return file


def tuned(start, pairs: Path, file: Path, method: MethodSettings = START, features=None, **changes) -> Path:
    tuning.tune(ASKED.changed(**changes), method_of(start, method), pairs, features, file)
    return file


@pytest.fixture(scope="module")
def made(start, pairs, tmp_path_factory) -> Path:
    return tuned(start, pairs, tmp_path_factory.mktemp("tuned") / "gs.safetensors")


def images(sampler: Sampler, nfe: int, grid: Path | None) -> torch.Tensor:
    levels, step = sampler.solver(nfe, grid)
    drawn = final_states(
        sampler.denoiser, levels, step, range(1016, 1024), sampler.shape, sampler.classes, 8, **sampler.options
    )
    return sampler.path.to_pixels(next(drawn)[1])


def row(start, tuning_file: Path, **changes) -> Sampler:
    settings = START.changed(grid="tuned", solver="tuned", tuning="gs", append_zero=None).changed(**changes)
    return Sampler(Method(SPACE, settings, MethodFiles(*start[:2], (tuning_file,))), CPU)


def test_pairs_go_on_after_a_stop_and_are_the_same(start, pairs, tmp_path, monkeypatch):
    calls, true = [], tuning.save_pairs

    def stopping(*arguments, **metadata):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        true(*arguments, **metadata)

    monkeypatch.setattr(tuning, "time", SimpleNamespace(monotonic=itertools.count().__next__))  # a second a batch
    monkeypatch.setattr(tuning, "save_pairs", stopping)
    again = tmp_path / "again.safetensors"
    with pytest.raises(KeyboardInterrupt):
        tuning.make_pairs(method_of(start, TEACHER), 7, range(1000, 1024), 8, again)
    drawn, draw = [], tuning.teacher_pairs
    monkeypatch.setattr(tuning, "teacher_pairs", lambda *a, **k: drawn.append(1) or draw(*a, **k))
    tuning.make_pairs(method_of(start, TEACHER), 7, range(1000, 1024), 8, again)
    assert len(drawn) == 1
    assert checkpoints.header(again)["device_seconds"] == 3  # of both processes
    one, other = (checkpoints.read(file)[0] for file in (pairs, again))
    assert one.keys() == other.keys() == {"noise", "labels", "images"}
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert [each.name for each in tmp_path.iterdir()] == ["again.safetensors"]


def test_a_row_makes_the_images_that_the_tuning_judged(start, pairs, made):
    """Held-out errors of the header, from images of the row; never worse than the method it starts from."""
    outcomes = checkpoints.header(made)["outcomes"]
    taught = checkpoints.read(pairs)[0]["images"][16:]
    for nfe in (3, 4):
        plain = images(Sampler(method_of(start, START), CPU), nfe, None)
        found = [(each - taught).square().sum().item() / 8 for each in (plain, images(row(start, made), nfe, made))]
        assert found[1] == pytest.approx(outcomes[str(nfe)]["tuned"], rel=1e-4)
        assert found[1] < found[0]
        assert outcomes[str(nfe)]["start"] <= found[0] * (1 + 1e-5)
        assert (
            outcomes[str(nfe)]["numbers"] == nfe + nfe + 4 * nfe - 3
        )  # falls, labels, and of coefficients those that are used


def test_other_solvers_run_on_tuned_levels(start, made):
    levels, _ = row(start, made).solver(3, made)
    own, step = row(start, made, solver="dpmpp").solver(3, made)
    assert torch.equal(own.nodes, levels.nodes)
    assert step.func is SOLVERS["dpmpp"].step


def test_a_tuning_that_was_stopped_goes_on_and_is_the_same(start, pairs, made, tmp_path, monkeypatch):
    """Stopped in the second budget, it does not tune the first again."""
    again, runs, true = tmp_path / "gs.safetensors", [], tuning.run

    def stopping(records, training, *arguments):
        runs.append(training.step)
        if len(runs) == 2:
            for _ in range(3):
                next(records)
            arguments[1].save(training)
            raise Stopped("stopped")
        true(records, training, *arguments)

    monkeypatch.setattr(tuning, "run", stopping)
    with pytest.raises(Stopped):
        tuned(start, pairs, again)
    tuned(start, pairs, again)
    assert runs == [0, 0, 8, 3]
    one, other = (checkpoints.read(file)[0] for file in (made, again))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert not (tmp_path / ".state").exists() or not list((tmp_path / ".state").iterdir())


def test_what_is_not_learned_stays(start, pairs, tmp_path):
    file = tuned(start, pairs, tmp_path / "ld3.safetensors", learn=["levels", "labels"], nfe=[3])
    levels, step = row(start, file).solver(3, file)
    theory = row(start, file, solver="dpmpp").solver(3, file)[1]
    assert not torch.equal(step.told, levels.nodes[:-1])
    plain = tuned(start, pairs, tmp_path / "levels.safetensors", learn=["levels"], nfe=[3])
    sampler = row(start, plain)
    assert torch.equal(sampler.solver(3, plain)[1].told, sampler.solver(3, plain)[0].nodes[:-1])
    torch.testing.assert_close(
        images(sampler, 3, plain), images(row(start, plain, solver="dpmpp"), 3, plain), rtol=1e-4, atol=1e-4
    )
    assert theory.func is SOLVERS["dpmpp"].step


def test_budgets_on_a_shared_curve(start, pairs, tmp_path):
    file = tuned(start, pairs, tmp_path / "curve.safetensors", shared_levels=True)
    outcomes = checkpoints.header(file)["outcomes"]
    assert list(outcomes) == ["3", "4"]
    assert sum(each["tuned"] / each["start"] for each in outcomes.values()) < 2
    ends = [row(start, file).solver(nfe, file)[0].nodes[[0, -1]] for nfe in (3, 4)]
    assert torch.allclose(*ends)


def test_analytic_first_steps_and_flows(start, pairs, tmp_path):
    """DyWeight's form: flows, from Euler's steps, with one step more than evaluations."""
    method = START.changed(solver="ipndm", order=1, afs=True)
    file = tuned(start, pairs, tmp_path / "dy.safetensors", method, learn=["labels", "coefficients"], nfe=[3])
    sampler = row(start, file, afs=True)
    before = sampler.denoiser.evaluations
    images(sampler, 3, file)
    assert sampler.denoiser.evaluations - before == 3
    assert sampler.solver(3, file)[0].steps == 4


def test_a_loss_in_the_metrics_own_features_is_marked(start, pairs, tmp_path):
    features = FeatureFile("digits-cnn", ROOT / "config/checkpoints/digits/features.safetensors")
    asked = {"kind": "digits-cnn", "url": str(features.file)}
    settings = ASKED.model_dump() | {"features": asked, "nfe": [3]}
    tuning.tune(TuningSettings.model_validate(settings), method_of(start, START), pairs, features, tmp_path / "own.st")
    files = {"own": tmp_path / "own.st"}
    assert costs.on_metric(files, "digits-cnn") == {"own"}
    assert costs.on_metric(files, "inception") == set()
    assert "| own | dpmpp | edm at NFE 7 | 3 |" in costs.tuning_page(files)


def test_files_that_do_not_fit_are_refused_in_a_line(start, pairs, made, tmp_path):
    with pytest.raises(StageError, match="not tuned for 5 evaluations: use one of 3, 4"):
        row(start, made).solver(5, made)
    metadata = checkpoints.read(made)[1]
    for name in ("network", "path"):
        other = tmp_path / f"{name}.safetensors"
        checkpoints.save(other, checkpoints.read(made)[0], metadata | {name: "0" * 64})
        with pytest.raises(StageError, match=f"tuned for another {name}: take its own, or tune again"):
            row(start, other).solver(3, other)
    for tensors in ({}, {"3/nodes": torch.ones(4, 1, 1)}, {"3/nodes": torch.ones(4, 1, 1) / 0}):
        checkpoints.save(tmp_path / "damaged", tensors, metadata)
        with pytest.raises(StageError, match="damaged: holds no tuned solver for 3"):
            load_tuning(tmp_path / "damaged", row(start, made).path, 3)
    with pytest.raises(StageError, match="holds no tuning"):
        load_tuning(pairs, row(start, made).path, 3)
    with pytest.raises(StageError, match="holds no pairs"):
        tuned(start, made, tmp_path / "x.safetensors")
    with pytest.raises(StageError, match="24 pairs, 28 are asked for"):
        tuned(start, pairs, tmp_path / "x.safetensors", heldout=12)
    with pytest.raises(StageError, match="a teacher of 7 evaluations for 8"):
        tuned(start, pairs, tmp_path / "x.safetensors", nfe=[8])


def test_pairs_that_do_not_fit_memory_are_refused(start, pairs, tmp_path, monkeypatch):
    monkeypatch.setattr("os.sysconf", lambda name: 10)
    with pytest.raises(StageError, match=r"reading it takes .* GB of 0.0: lower the tuning's pairs"):
        tuned(start, pairs, tmp_path / "x.safetensors")


CONFIG = yaml.safe_load((ROOT / "config/config.yaml").read_text())
DIGITS = CONFIG["datasets"]["digits"]
DIGITS["tunings"] |= {"t": {"start": "plain", "teacher": "edm", "nfe": [3, 5]}}
DIGITS["methods"]["plain"] = {
    "network": "base",
    "path": "edm",
    "grid": "log-snr",
    "solver": "dpmpp",
    "append_zero": False,
}
DIGITS["methods"]["t"] = {
    "network": "base", "path": "edm", "grid": "tuned", "solver": "tuned", "tuning": "t", "nfe": [3, 5],
}  # fmt: skip


@pytest.mark.parametrize(
    ("key", "changes", "words"),
    [
        ("tunings", {"start": "edm"}, r"t\.start: heun of 'edm' has no weights to tune: use one of dpmpp, exp-ab"),
        ("tunings", {"start": "t"}, r"t\.start: tuned of 't' has no weights"),
        ("tunings", {"start": "none"}, r"t\.start: 'none' is unknown"),
        ("tunings", {"teacher": "t"}, r"t\.teacher: 't' is tuned itself"),
        ("tunings", {"teacher_nfe": 36}, r"t: method 'edm': 36 cannot be spent"),
        ("tunings", {"teacher_nfe": 5}, r"t\.teacher_nfe: 5 is no more than the 5 that are tuned: raise it"),
        ("tunings", {"window": 2}, r"t\.window: 2 for dpmpp of order 3: give 3 or more"),
        ("tunings", {"learn": []}, r"t\.learn: "),
        ("tunings", {"learn": ["levels", "levels"]}, r"t\.learn: 'levels' is given twice"),
        ("tunings", {"subspaces": "dense:4"}, r"t\.subspaces: 'dense:4' is none of the solver's subspaces"),
        ("tunings", {"first_seed": 10}, r"t\.first_seed: seeds up to 3999 are judged: give 4000 or more"),
        ("tunings", {"nfe": [3]}, r"methods\.t\.nfe: 5 is not tuned by 't'"),
        ("methods", {"network": "ani"}, r"t\.network: 't' is tuned with 'base', not 'ani'"),
        ("methods", {"path": "ani"}, r"t\.tuning: 't' is tuned on another path"),
        ("methods", {"threshold": True}, r"t\.threshold: 't' is tuned with False, not True"),
        ("methods", {"tuning": None}, r"t\.tuning: '' is unknown; known here: gs, gs-ani, t"),
        ("methods", {"grid": "karras", "solver": "dpmpp"}, r"t\.tuning: only the grid 'tuned' takes one"),
        ("methods", {"grid": "karras", "tuning": None}, r"t\.grid: the solver tuned goes with the grid tuned: set it"),
        (
            "methods",
            {"solver": "heun"},
            r"t\.solver: heun evaluates twice a step, tuned levels have a step an evaluation",
        ),
    ],
)
def test_tunings_that_cannot_be_are_refused(key, changes, words):
    config = copy.deepcopy(CONFIG)
    config["datasets"]["digits"][key]["t"] |= changes
    with pytest.raises(StageError, match=words):
        resolve(config)


def test_the_configuration_is_accepted_as_it_is():
    assert resolve(copy.deepcopy(CONFIG)).datasets["digits"].tunings["t"].steps == 300


def test_solvers_that_can_be_tuned_are_those_with_a_theory():
    assert {name for name, entry in SOLVERS.items() if entry.linear} == set(THEORIES)
    with pytest.raises(ValueError, match="tuned has the numbers of a tuning"):
        SOLVERS["tuned"].with_order()


def test_the_header_is_plain(made):
    """What `inspect` prints."""
    assert json.loads(json.dumps(checkpoints.header(made)))["budgets"] == [3, 4]


def test_in_python_a_tuning_is_a_file(start, made):
    model = anisodiff.load(start[0])
    found = anisodiff.sample(model, nfe=3, seeds=range(1016, 1024), batch=8, tuning=made)
    assert torch.equal(found, images(row(start, made), 3, made).clamp(-1, 1))
    with pytest.raises(StageError, match="not tuned for 9 evaluations"):
        anisodiff.sample(model, tuning=made)
    with pytest.raises(StageError, match=r"'tuned' is unknown here: use one of .*, or a tuning's file"):
        anisodiff.sample(model, solver="tuned")
    other = anisodiff.load(ROOT / "config/checkpoints/digits/base.safetensors")
    with pytest.raises(StageError, match="tuned for another network: load that"):
        anisodiff.sample(other, nfe=3, tuning=made)
