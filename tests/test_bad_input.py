"""What goes wrong is one line on stderr that names the thing and the mend, with nothing half written."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from runs import ROOT, RUN, SPACE, method_of
from safetensors.torch import save_file

from anisodiff import cli, methods
from anisodiff.compute import Compute
from anisodiff.data import download, sources
from anisodiff.errors import StageError
from anisodiff.experiment.settings import LikelihoodSettings, MethodSettings, RunSettings
from anisodiff.metrics import frechet
from anisodiff.metrics.registry import FeatureFile
from anisodiff.paths.noise_path import edm_path
from anisodiff.report import costs, distances, geometry_table
from anisodiff.stages import sampling
from anisodiff.stages.likelihoods import measure_likelihood
from anisodiff.storage import checkpoints
from anisodiff.storage.files import atomic, digest
from anisodiff.storage.pickles import load_edm

EDM = ROOT / "tests/data/edm"


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
    with pytest.raises(StageError, match=r"edm\.safetensors: holds no geometry: give a file of the stage"):
        geometry_table.write({"edm": path}, tmp_path)
    with pytest.raises(StageError, match=r"edm\.safetensors: holds no search: give the file of a search"):
        costs.search_page({"gits": path})
    (tmp_path / "0-7.json").write_text(json.dumps([str(network)]))
    truth = torch.zeros(3).double(), torch.eye(3).double()
    checkpoints.save(tmp_path / "r.safetensors", frechet.Gaussian(*truth).tensors(), {"features": "digits-cnn"})
    with pytest.raises(StageError, match=r"base\.safetensors: holds no cell of a budget and seeds: delete it"):
        distances.distances(
            "digits",
            tmp_path / "r.safetensors",
            [tmp_path / "0-7.json"],
            8,
            "digits-cnn",
            tmp_path / "d",
            tmp_path / "l",
        )


@pytest.mark.parametrize(
    "header",
    [
        "[]", "3", "null", '"text"', "{", "", "[" * 100_000 + "]" * 100_000, '{"a":' * 100_000 + "1" + "}" * 100_000,
        '{"kimg": NaN}', '{"kimg": 1e999}', '{"kimg": -1}', '{"kimg": "3"}', '{"kimg": ' + "9" * 4000 + "}",
        '{"device_seconds": Infinity}', '{"sigma_data": [1]}', '{"versions": [[]]}', '{"commits": 3}', '{"config": []}',
        '{"stopped_early": 1}', '{"environment": "here"}', '{"kimg": 3}\nno digest\n', '{"kimg": 3}\n',
    ],
)  # fmt: skip
def test_a_header_that_is_none_is_refused(tmp_path, header):
    file = tmp_path / "network.safetensors"
    save_file({"x": torch.zeros(1)}, file, metadata={"json": header})
    for read in (checkpoints.header, checkpoints.read, checkpoints.load_network, checkpoints.load_path):
        with pytest.raises(
            StageError, match=r"network\.safetensors: (not a safetensors file of anisodiff|damaged)"
        ) as said:
            read(file)
        assert len(str(said.value)) < 600
        assert "\n" not in str(said.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_blocks": 10**6}, {"num_blocks": 10**12}, {"channel_mult": [1] * 10**4}, {"model_channels": 10**6},
        {"model_channels": 10**30}, {"model_channels": 0}, {"model_channels": 2}, {"label_dim": 10**6},
        {"img_resolution": 10**6}, {"img_resolution": 2**11 + 1}, {"channel_mult": 3}, {"channel_mult": []},
        {"channel_mult": [-1]}, {"channel_mult": [[1]]}, {"num_blocks": "1"}, {"num_blocks": True},
        {"num_blocks": 1.5}, {"num_blocks": None}, {"dropout": float("nan")}, {"dropout": 2},
        {"resample_filter": [1] * 10**4},
        {"encoder_type": "deep"}, {"embedding_type": []}, {"nothing": 3}, {"model_type": "Other"}, {"model_type": []},
        {"model_type": "DhariwalUNet"}, {"in_channels": 3}, {"tensors": 3},
    ],
)  # fmt: skip
def test_a_network_that_asks_for_what_its_file_does_not_hold(tmp_path, start, changes):
    tensors, about = checkpoints.read(start[0])
    file = tmp_path / "network.safetensors"
    checkpoints.save(file, tensors, about | {"config": about["config"] | changes})
    with pytest.raises(StageError, match=r"network\.safetensors: holds no network \(.*\): give the file") as said:
        checkpoints.load_network(file)
    assert len(str(said.value)) < 600


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_refused(tmp_path, start, value, monkeypatch):
    tensors, about = checkpoints.read(start[0])
    name = next(name for name in tensors if name.endswith("conv1.weight"))
    tensors[name] = tensors[name].clone()
    tensors[name][0, 0, 0, 0] = value
    checkpoints.save(tmp_path / "network.safetensors", tensors, about)
    with pytest.raises(StageError, match=rf"network\.safetensors: .*{name} holds NaN or infinite weights"):
        checkpoints.load_network(tmp_path / "network.safetensors")
    found = load_edm(EDM / "ddpmpp-uncond-16.pkl")
    next(iter(found.tensors.values())).view(-1)[0] = value
    monkeypatch.setattr(checkpoints, "load_edm", lambda path: found)
    with pytest.raises(StageError, match=r"ddpmpp-uncond-16\.pkl: .* holds NaN or infinite weights"):
        checkpoints.convert(EDM / "ddpmpp-uncond-16.pkl", tmp_path / "converted.safetensors")
    assert not (tmp_path / "converted.safetensors").exists()


def test_a_pickle_that_asks_for_a_million_blocks(tmp_path, monkeypatch):
    found = load_edm(EDM / "ddpmpp-uncond-16.pkl")
    found.arguments["num_blocks"] = 10**6
    monkeypatch.setattr(checkpoints, "load_edm", lambda path: found)
    with pytest.raises(StageError, match=r"ddpmpp-uncond-16\.pkl: holds no SongUNet .* do not fit"):
        checkpoints.convert(EDM / "ddpmpp-uncond-16.pkl", tmp_path / "converted.safetensors")


def test_images_that_are_nan_are_no_cell(tmp_path, start):
    """With weights that are finite: what overflows is refused with method, budget and seed."""
    tensors, about = checkpoints.read(start[0])
    tensors = {name: each * 1e30 if name.startswith("dec") else each for name, each in tensors.items()}
    checkpoints.save(tmp_path / "network.safetensors", tensors, about)
    settings = MethodSettings(network="base", path="edm", grid="karras", solver="euler")
    features = FeatureFile("digits-cnn", ROOT / "config/checkpoints/digits/features.safetensors")
    with pytest.raises(StageError, match=r"^edm: NFE 3: the image of seed 4 is NaN or infinite: train"):
        sampling.sample(
            method_of((tmp_path / "network.safetensors", start[1]), settings), sampling.Drawing([3], 4, 7, 4), features,
            tmp_path / "samples" / "edm" / "4-7.json",
        )  # fmt: skip
    assert not list((tmp_path / "samples").rglob("*.safetensors"))


def rising(*shape: int) -> torch.Tensor:
    return torch.linspace(-20, 8, shape[-1], dtype=torch.float64).expand(shape)


PATH = {"weights": torch.ones(1).double(), "index": torch.zeros(8, 8).long(), "nodes": rising(8) / 28 + 20 / 28,
        "logs": rising(1, 8)}  # fmt: skip


@pytest.mark.parametrize("kind", ["knots", "fixed"])
@pytest.mark.parametrize(
    "changes",
    [
        {"index": torch.full((8, 8), 10**11)}, {"index": torch.full((8, 8), -1)}, {"index": torch.eye(8).long() * 2},
        {"index": torch.zeros(8)}, {"index": torch.zeros(8, 4).long()}, {"index": torch.zeros(0, 0).long()},
        {"index": torch.arange(256**2).reshape(256, 256), "logs": rising(256**2, 2)}, {"index": torch.eye(8).long()},
        {"logs": rising(8)}, {"logs": rising(1, 1)}, {"logs": rising(1, 8).flip(1)}, {"logs": rising(1, 8) * torch.nan},
        {"logs": torch.zeros(1, 8).long()}, {"logs": torch.tensor([[0.0, torch.inf]])}, {"logs": torch.zeros(0, 8)},
        {"logs": rising(2, 2, 1, 8)}, {"weights": torch.ones(2)}, {"weights": torch.tensor([torch.nan])},
        {"weights": torch.tensor(1.0)}, {"weights": None}, {"logs": None},
        {"index": None}, {"index": None, "vectors": torch.zeros(1, 10**6, 0), "which": torch.zeros(1).long()},
        {"index": None, "vectors": torch.eye(8)[None], "which": torch.zeros(1).long()},
        {"index": None, "vectors": torch.eye(16)[None, :3], "which": torch.tensor([10**9])},
        {"index": None, "vectors": torch.ones(1, 3, 16), "which": torch.zeros(1).long()},
    ],
)  # fmt: skip
def test_a_path_that_is_none_or_asks_for_what_its_file_does_not_hold(tmp_path, kind, changes):
    """An index of 10^11 would be a table of 50 terabytes, a basis of 10^6 vectors without length one of 4."""
    tensors = {name: each for name, each in (PATH | changes).items() if each is not None}
    checkpoints.save(tmp_path / "whole.safetensors", PATH, {"schedule": kind})
    assert checkpoints.load_path(tmp_path / "whole.safetensors")[0].subspaces.size == 8
    checkpoints.save(tmp_path / "path.safetensors", tensors, {"schedule": kind})
    with pytest.raises(StageError, match=r"path\.safetensors: holds no noise path \(.*\): give the file") as said:
        checkpoints.load_path(tmp_path / "path.safetensors")
    assert len(str(said.value)) < 600


@pytest.mark.parametrize(
    "nodes", [rising(8), torch.linspace(0, 1, 7), torch.zeros(8), torch.zeros(1, 8), torch.ones(8)]
)
def test_nodes_that_do_not_fit_are_refused(tmp_path, nodes):
    checkpoints.save(tmp_path / "path.safetensors", PATH | {"nodes": nodes}, {"schedule": "fixed"})
    with pytest.raises(StageError, match=r"path\.safetensors: holds no noise path"):
        checkpoints.load_path(tmp_path / "path.safetensors")


def test_a_warp_or_basis_that_is_none_is_refused(tmp_path, start):
    path, file = checkpoints.load_path(start[1])[0], tmp_path / "file.safetensors"
    for tensors in ({}, {"logs": rising(2, 8)}, {"logs": rising(8)}, {"logs": torch.zeros(1, 8)}):
        checkpoints.save(file, tensors, {"warp": True})
        with pytest.raises(StageError, match=r"file\.safetensors: holds no warp \(.*\): give the file of a warp"):
            checkpoints.load_warp(file, path)
    for tensors in ({}, PATH, {"vectors": torch.zeros(1, 10**6, 0), "which": torch.zeros(1).long()}):
        checkpoints.save(file, tensors, {"basis": True})
        with pytest.raises(StageError, match=r"file\.safetensors: holds no basis \(.*\): give the file of a basis"):
            checkpoints.load_basis(file)


def test_the_commit_of_another_repository_is_not_ours(tmp_path):
    """A copy of the package inside another project, committed there or not."""
    shutil.copytree(ROOT / "anisodiff", tmp_path / "vendor" / "anisodiff")
    shutil.copytree(ROOT / "anisodiff", tmp_path / "anisodiff")
    git = ["git", "-C", tmp_path, "-c", "user.email=a@b", "-c", "user.name=x", "-c", "init.defaultBranch=main"]
    for command in (["init", "-q"], ["add", "vendor"], ["commit", "-qm", "another project"]):
        subprocess.run([*git, *command], check=True)

    def said(folder: Path) -> str:
        script = "from anisodiff.storage.files import commit; print(commit())"
        environment = os.environ | {"PYTHONPATH": str(folder)}
        return subprocess.run(
            [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
        ).stdout.strip()

    assert said(tmp_path) == said(tmp_path / "vendor") == "unknown"
    subprocess.run([*git, "add", "anisodiff"], check=True)
    subprocess.run([*git, "commit", "-qm", "a checkout of this project"], check=True)
    head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], check=True, capture_output=True, text=True).stdout
    assert said(tmp_path) == head.strip()


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


def finetune(start, folder: Path, settings: RunSettings, **options) -> subprocess.CompletedProcess:
    return anisodiff(
        "finetune", "--dataset", SPACE.as_json(), "--settings", settings.as_json(),
        "--network", str(start[0]), "--path", str(start[1]), "--images", str(start[2]),
        "--output-network", str(folder / "network.safetensors"),
        "--output-path", str(folder / "path.safetensors"), **options,
    )  # fmt: skip


def test_a_loss_that_is_nan(start, tmp_path):
    failed = finetune(start, tmp_path, RUN.changed(learning_rate=1e30, ramp_kimg=0, guard_kimg=100))
    assert "anisodiff: the loss is" in one_line(failed)
    assert "lower the learning rates" in failed.stderr
    assert not list(tmp_path.glob("*.safetensors"))


def test_a_runaway_path_is_stopped_and_recorded(start, tmp_path):
    made = finetune(
        start, tmp_path, RUN.changed(path_learning_rate=3.0, ramp_kimg=0, guard_kimg=0.1, guard_tolerance=0.02)
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
    words = "it makes images of (3, 16, 16) (channels, height, width), the data's are (1, 8, 8)"
    assert words in one_line(failed)
    path, space = tmp_path / "path.safetensors", SPACE.changed(class_conditional=False, sigma_data=0.5)
    checkpoints.save_path(path, edm_path(16))
    asked = LikelihoodSettings(network="base", path="edm", estimators=["bound"])
    with pytest.raises(StageError, match=re.escape(words)):
        measure_likelihood(space, asked, range(1), start[2], other, path, tmp_path / "likelihood.safetensors")
    settings = MethodSettings(network="base", path="edm", grid="karras", solver="heun")
    with pytest.raises(StageError, match=r"makes images of side 16, .* is for 8"):
        methods.Sampler(method_of((other, start[1]), settings), Compute())


def test_labels_that_are_missing(start, tmp_path):
    for index in range(80):
        (tmp_path / "set").mkdir(exist_ok=True)
        Image.fromarray(np.full((8, 8), index, np.uint8)).save(tmp_path / f"set/{index}.png")
    sources.make_images(str(tmp_path / "set"), tmp_path / "images")
    failed = finetune((*start[:2], tmp_path / "images"), tmp_path, RUN)
    assert "the images have no labels: set class_conditional to false, or give a labelled source" in one_line(failed)


def test_a_device_that_is_not_here():
    failed = anisodiff("reference", "--images", "x", "--features", "y", "--features-kind", "inception", "--output", "z",
                       "--compute", '{"device": "cuda"}', env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})  # fmt: skip
    assert "torch sees no GPU here: set device to cpu" in one_line(failed)


def test_a_full_disk(start, tmp_path):
    """A limit on the size of files stands in for a small disk."""
    failed = finetune(
        start, tmp_path, RUN.changed(kimg=0.32), prefix=("bash", "-c", 'ulimit -f 4; trap "" XFSZ; exec "$@"', "bash")
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


@pytest.mark.parametrize(
    ("dataset", "name"), [("digits", "base"), ("digits", "features"), ("cifar10-small", "base"), ("mnist-5k", "base")]
)
def test_committed_checkpoints_are_what_their_pages_say(dataset, name):
    folder = ROOT / "config/checkpoints" / dataset
    page = json.loads((folder / f"{name}.json").read_text())
    file = folder / f"{name}.safetensors"
    assert page.pop("sha256") == digest(file)
    assert page == checkpoints.header(file)
    assert file.stat().st_size < 20_000_000
