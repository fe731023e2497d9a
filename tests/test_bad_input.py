"""What goes wrong is one line on stderr that names the thing and the mend, with nothing half written."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from runs import DATASET, ROOT, RUN

from anisodiff import checkpoints, cli, datasets, download, sampling
from anisodiff.compute import Compute
from anisodiff.files import StageError, atomic, digest


def anisodiff(*arguments: str, prefix: tuple[str, ...] = (), env=None) -> subprocess.CompletedProcess:
    command = [*prefix, sys.executable, "-m", "anisodiff", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False, env=env)


def one_line(failed: subprocess.CompletedProcess) -> str:
    assert failed.returncode != 0
    lines = [line for line in failed.stderr.splitlines() if line.strip() and "img/s" not in line]
    assert len(lines) == 1, failed.stderr
    return lines[0]


def test_another_hash_is_refused(tmp_path):
    source = tmp_path / "source"
    source.write_text("text")
    with pytest.raises(StageError, match="fetch it again, or change the hash"):
        download.fetch(str(source), tmp_path / "made" / "file", "0" * 64)
    assert list((tmp_path / "made").iterdir()) == []
    download.fetch(str(source), tmp_path / "made" / "file", digest(source))
    assert (tmp_path / "made" / "file").read_text() == "text"


def test_a_missing_source_is_named(tmp_path):
    with pytest.raises(StageError, match="no such file: mend the url"):
        download.fetch(str(tmp_path / "none"), tmp_path / "file")


@pytest.mark.parametrize("content", [b"", b"\x80\x04K\x01.", b"0123456789" * 10])
def test_a_corrupt_checkpoint_is_refused(tmp_path, content):
    file = tmp_path / "network.safetensors"
    file.write_bytes(content)
    with pytest.raises(StageError, match=r"network\.safetensors: not a safetensors file"):
        checkpoints.load_network(file)


def test_another_kind_of_file_is_refused(tmp_path, start):
    network, path, _ = start
    with pytest.raises(StageError, match="holds no network"):
        checkpoints.load_network(path)
    with pytest.raises(StageError, match="holds no noise path"):
        checkpoints.load_path(network)


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    file = tmp_path / "file"
    file.write_text("old")

    def fail() -> None:
        with atomic(file) as temporary:
            temporary.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


def finetune(start, folder: Path, settings: dict, **options) -> subprocess.CompletedProcess:
    return anisodiff(
        "finetune", "--dataset", json.dumps(DATASET), "--settings", json.dumps(settings),
        "--network", str(start[0]), "--path", str(start[1]), "--images", str(start[2]),
        "--output-network", str(folder / "network.safetensors"),
        "--output-path", str(folder / "path.safetensors"), **options,
    )  # fmt: skip


def test_a_loss_that_is_nan(start, tmp_path):
    failed = finetune(start, tmp_path, {**RUN, "learning_rate": 1e30, "ramp_kimg": 0, "guard_kimg": 100})
    assert "anisodiff: the loss is" in one_line(failed)
    assert "lower the learning rates" in failed.stderr
    assert not list(tmp_path.glob("*.safetensors"))


def test_a_runaway_path_is_stopped_and_recorded(start, tmp_path):
    made = finetune(
        start, tmp_path, {**RUN, "path_learning_rate": 3.0, "ramp_kimg": 0, "guard_kimg": 0.1, "guard_tolerance": 0.02}
    )
    assert made.returncode == 0, made.stderr
    path, about = checkpoints.load_path(tmp_path / "path.safetensors")
    assert about["stopped_early"]
    assert about["kimg"] < 2.56
    assert path.schedule.curve.logs.isfinite().all()


def test_a_checkpoint_of_another_size_is_refused(start, tmp_path):
    other = tmp_path / "edm.safetensors"
    checkpoints.convert(ROOT / "tests/data/edm/ddpmpp-uncond-16.pkl", other)
    failed = finetune((other, *start[1:]), tmp_path, RUN)
    assert "it makes images of (3, 16, 16) (channels, height, width), the data's are (1, 8, 8)" in one_line(failed)
    method = {"grid": "karras", "solver": "heun"}
    with pytest.raises(StageError, match="makes images of side 16, the path is for 8"):
        sampling.Sampler({"sigma_data": 0.5, "labels": False}, method, [other, start[1]], Compute())


def test_labels_that_are_missing(start, tmp_path):
    for index in range(80):
        (tmp_path / "set").mkdir(exist_ok=True)
        Image.fromarray(np.full((8, 8), index, np.uint8)).save(tmp_path / f"set/{index}.png")
    datasets.make_images(str(tmp_path / "set"), tmp_path / "images")
    failed = finetune((*start[:2], tmp_path / "images"), tmp_path, RUN)
    assert "the images have no labels: set labels to false, or give a labelled source" in one_line(failed)


def test_a_device_that_is_not_here():
    failed = anisodiff("reference", "--images", "x", "--features", "y", "--features-kind", "inception", "--output", "z",
                       "--compute", '{"device": "cuda"}', env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})  # fmt: skip
    assert "torch sees no GPU here: set device to cpu" in one_line(failed)


def test_a_full_disk(start, tmp_path):
    """A limit on the size of files stands in for a small disk."""
    failed = finetune(
        start, tmp_path, {**RUN, "kimg": 0.32}, prefix=("bash", "-c", 'ulimit -f 4; trap "" XFSZ; exec "$@"', "bash")
    )
    assert "free some space" in one_line(failed)
    assert not list(tmp_path.glob("*.safetensors"))


def test_no_write_permission(start, tmp_path):
    readable = tmp_path / "readable"
    readable.mkdir()
    readable.chmod(0o555)
    if os.geteuid() == 0:
        pytest.skip("root may write anywhere")
    failed = finetune(start, readable, RUN)
    assert "give yourself write permission" in one_line(failed)


def test_a_setting_that_is_not_json():
    failed = anisodiff("finetune", "--dataset", "{", "--settings", "{}", "--network", "a", "--path", "b",
                       "--output-network", "c", "--output-path", "d")  # fmt: skip
    assert failed.returncode == 2
    assert "not JSON" in failed.stderr


@pytest.mark.parametrize(
    ("error", "mend"),
    [
        (PermissionError(13, "Permission denied", "results/x"), "results/x: Permission denied: give yourself write"),
        (OSError(28, "No space left on device", "results/x"), "results/x: No space left on device: free some space"),
    ],
)
def test_what_the_system_refuses_is_one_line(monkeypatch, error, mend):
    def refuse(**_) -> None:
        raise error

    monkeypatch.setattr(cli, "app", refuse)
    with pytest.raises(SystemExit, match=f"anisodiff: {mend}"):
        cli.main()


@pytest.mark.parametrize(("dataset", "name"), [("digits", "base"), ("digits", "features"), ("cifar10-small", "base")])
def test_committed_checkpoints_are_what_their_pages_say(dataset, name):
    folder = ROOT / "config/checkpoints" / dataset
    page = json.loads((folder / f"{name}.json").read_text())
    file = folder / f"{name}.safetensors"
    assert page.pop("sha256") == digest(file)
    assert page == checkpoints.header(file)
    assert file.stat().st_size < 20_000_000
