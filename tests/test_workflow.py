"""The workflow as a user meets it, on the shortened configuration, in a folder of its own."""

import copy
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import PIL.Image
import pytest
import torch
import yaml
from workflow_runs import BASE, FIGURES, ROOT, SHARDS, SHORT, jobs, snakemake, with_change

from anisodiff.experiment.config import resolve
from anisodiff.experiment.files import shards
from anisodiff.experiment.planning import jobs_of, needed
from anisodiff.storage import checkpoints

pytest.importorskip("snakemake", reason="the workflow needs snakemake (extra `workflow`)")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """An empty folder in which the configuration's relative urls hold."""
    made = tmp_path_factory.mktemp("workflow")
    (made / "config").symlink_to(ROOT / "config")
    return made


@pytest.fixture(scope="module")
def finished(folder) -> Path:
    """A folder with a full run of the shortened configuration."""
    expected = {
        "all": 1, "download": 2, "images": 1, "reference": 1, "path": 2, "finetune": 4, "warp": 1, "warp_per_nfe": 2,
        "search": 1, "pairs": 1, "tune": 1, "sample": 10 * SHARDS, "trajectory": 2, "geometry": 2, "geometry_table": 1,
        "convergence": 2, "distance": 1, "table": 1, "plots": 1,
    }  # fmt: skip
    assert jobs(folder, SHORT) == expected
    ran = snakemake(folder, SHORT, "--show-failed-logs")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return folder


def test_everything_configured_is_made(finished):
    results = finished / "results/digits"
    table = pd.read_csv(results / "table.csv")
    assert len(table) == 6 * 2 + 3
    assert (table["evaluations"] == table["nfe"]).all()
    trained = table.set_index("method")["seeds"]
    assert trained[trained > 1].index.unique().tolist() == ["edm-finetuned"]
    assert table.loc[table["seeds"] > 1, "seed_error"].gt(0).all()
    assert table[["error", "kid", "precision", "recall"]].notna().all(axis=None)
    assert set(table.loc[table["nfe"] == 3, "ranges"]) == {2}
    assert (table["images"] == 64).all()
    assert table["mean"].between(0, 1000).all()
    for name in FIGURES:
        for kind in ("svg", "png"):
            assert (results / "plots" / f"{name}.{kind}").stat().st_size > 1000
    shapes = pd.read_csv(results / "geometry.csv")
    assert shapes.groupby("name", sort=False)["denoiser"].count().to_dict() == {"edm": 3, "ani": 4}
    page = (results / "table.md").read_text()
    assert re.search(r"^\| ani \| ani \| ani \| path-time \| midpoint \| 2 \|", page, re.M)
    assert re.search(r"^\| edm-finetuned .* \| 2 \|", page, re.M)


def test_a_second_run_has_nothing_to_do(finished):
    assert jobs(finished, SHORT) == {}
    assert jobs(finished, SHORT, "digits") == {"digits": 1} or jobs(finished, SHORT, "digits") == {}


def test_where_files_may_be_taken_from_fetches_none_again(finished, tmp_path):
    assert jobs(finished, SHORT | {"offline": True, "mirror": str(tmp_path)}) == {}


END = {"all": 1, "distance": 1, "table": 1, "plots": 1}


def test_a_warps_setting_reruns_its_own_stages_alone(finished):
    found = jobs(finished, with_change("warps.iso.learning_rate", 0.02))
    assert found == {"warp": 1, "sample": SHARDS, "trajectory": 1, **END}


def test_a_runs_setting_reruns_what_comes_from_it(finished):
    found = jobs(finished, with_change("runs.ani.path_learning_rate", 0.002))
    made = {"finetune": 1, "warp_per_nfe": 2, "sample": 2 * SHARDS, "trajectory": 1, "geometry": 1}
    assert found == {**made, "geometry_table": 1, **END}


def test_a_solver_reruns_its_method(finished):
    """And the tuning that it teaches."""
    taught = {"pairs": 1, "tune": 1, "sample": 2 * SHARDS}
    assert jobs(finished, with_change("methods.edm.solver", "midpoint")) == {**taught, "convergence": 1, **END}


def test_a_training_seed_more_runs_alone(finished):
    rows = {"sample": 2 * SHARDS, "warp_per_nfe": 2, "finetune": 1}  # ani and ani-warped
    assert jobs(finished, with_change("runs.ani.seeds", 2)) == {**rows, **END}
    assert jobs(finished, with_change("runs.edm-finetuned.seeds", 1)) == END


def test_a_new_method_runs_alone(finished):
    config = copy.deepcopy(SHORT)
    config["datasets"]["digits"]["methods"]["iso"] = {
        "network": "base", "path": "iso", "grid": "path-time", "solver": "midpoint",
    }  # fmt: skip
    assert jobs(finished, config) == {"sample": SHARDS, **END}


@pytest.fixture
def copied(finished, tmp_path):
    """A copy of the finished run, to change."""
    return Path(shutil.copytree(finished, tmp_path / "copy", symlinks=True))


def test_a_new_budget_samples_only_its_own_cells(copied):
    config = copy.deepcopy(SHORT)
    config["datasets"]["digits"]["sampling"]["nfe"] = [3, 5, 7]
    cells = copied / "results/digits/samples"
    before = {path: path.stat().st_mtime_ns for path in cells.glob("*/nfe*/*.safetensors")}
    assert len(before) == 7 * 3 + 3 * 2
    ran = snakemake(
        copied, config, "results/digits/samples/edm/0-63.json", "results/digits/samples/ani-warped/0-63.json"
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    after = {path: path.stat().st_mtime_ns for path in cells.glob("*/nfe*/*.safetensors")}
    assert {path: after[path] for path in before} == before
    new = sorted(str(path.relative_to(cells)) for path in after.keys() - before.keys())
    assert new == ["ani-warped/nfe7/0-63.safetensors", "edm/nfe7/0-63.safetensors"]


def test_a_lost_cell_is_made_again_and_no_other(copied):
    cells, target = copied / "results/digits/samples", "results/digits/distances.csv"
    lost = cells / "edm/nfe3/0-63.safetensors"
    first, times = checkpoints.read(lost)[0], {each: each.stat().st_mtime_ns for each in cells.glob("*/nfe*/*")}
    lost.unlink()
    assert jobs(copied, SHORT) == {"sample": 1, **END}
    ran = snakemake(copied, SHORT, target)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert [path for path, time in times.items() if path.stat().st_mtime_ns != time] == [lost]
    again = checkpoints.read(lost)[0]
    assert all(torch.equal(again[name], tensor) for name, tensor in first.items())
    assert jobs(copied, SHORT, target) == {}


def test_files_of_the_users_own_are_read_anew_when_they_change(tmp_path):
    shutil.copytree(ROOT / "config", tmp_path / "config")
    for folder in ("set", "models"):
        (tmp_path / folder).mkdir()
    picture = np.zeros((8, 8), dtype=np.uint8)
    PIL.Image.fromarray(picture).save(tmp_path / "set/0.png")
    shutil.copy(ROOT / BASE, tmp_path / "models/base.safetensors")
    config = copy.deepcopy(SHORT)
    config["datasets"]["digits"] |= {"images": {"url": "set"}, "base": {"url": "models/base.safetensors"}}
    read = ["results/digits/images", "results/fetched/local/models/base.safetensors"]
    ran = snakemake(tmp_path, config, *read)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert jobs(tmp_path, config, *read) == {}
    PIL.Image.fromarray(picture).save(tmp_path / "set/1.png")
    assert jobs(tmp_path, config, *read) == {"images": 1}
    shutil.copy(ROOT / "config/checkpoints/digits/features.safetensors", tmp_path / "models/base.safetensors")
    assert jobs(tmp_path, config, *read) == {"images": 1, "download": 1}


def test_a_failed_job_says_why_and_leaves_nothing(folder):
    other = folder / "failing"
    other.mkdir()
    (other / "config").symlink_to(ROOT / "config")
    config = with_change("base.sha256", "0" * 64)
    failed = snakemake(other, config, f"results/fetched/local/{BASE}")
    assert failed.returncode != 0
    assert not list((other / "results").rglob("*safetensors"))
    log = (other / f"results/fetched/logs/local/{BASE}.log").read_text()
    assert log.startswith("anisodiff: config/checkpoints/digits/base.safetensors: sha256 is ")
    assert log.count("\n") == 1


def test_a_wrong_configuration_is_one_line_with_the_key(folder):
    failed = snakemake(folder, with_change("methods.edm.solver", "rk4"), "--dry-run")
    assert failed.returncode != 0
    (line,) = failed.stderr.splitlines()
    assert line.startswith("anisodiff: configuration: datasets.digits.methods.edm.solver: 'rk4' is not one of")
    assert "Traceback" not in failed.stdout


def test_targets_by_name(tmp_path):
    config = yaml.safe_load((ROOT / "config/config.yaml").read_text())
    (tmp_path / "config").symlink_to(ROOT / "config")
    assert jobs(tmp_path, config, "pretrain_digits") == {
        "pretrain_digits": 1, "images": 1, "pretrain": 1, "train_features": 1,
    }  # fmt: skip
    digits = resolve(config).datasets["digits"]
    assert jobs(tmp_path, config, "digits")["sample"] == sum(len(shards(digits, method)) for method in digits.methods)


@pytest.mark.parametrize(("name", "expected"), [
    ("fp-mnist", {"finetune": 8, "likelihood": 8, "sample": 18}),
    ("fp-cifar10", {"finetune": 11, "likelihood": 11, "sample": 22}),
])  # fmt: skip
def test_flexible_processes_are_planned(tmp_path, name, expected):
    """From nothing, where the images may not be here yet."""
    config = yaml.safe_load((ROOT / f"config/{name}.yaml").read_text())
    (tmp_path / "config").symlink_to(ROOT / "config")
    found = jobs(tmp_path, config)
    assert {rule: found[rule] for rule in expected} == expected


def test_images_are_kept_in_one_zip_a_cell(finished, tmp_path):
    """Numbered by their seeds, and as far from the data as the cell says."""
    results = finished / "results/digits"
    made = snakemake(finished, with_change("sampling.keep", "images"), "results/digits/samples/edm/0-63.json")
    assert made.returncode == 0, made.stdout + made.stderr
    zipped = results / "samples/edm/nfe5/0-63.zip"
    with zipfile.ZipFile(zipped) as archive:
        names = [name for name in archive.namelist() if name.endswith(".png")]
    assert names == [f"00000/img{seed:08d}.png" for seed in range(64)]
    options = {
        "--reference": results / "reference.safetensors", "--features-kind": "digits-cnn",
        "--features": ROOT / "config/checkpoints/digits/features.safetensors",
    }  # fmt: skip
    command = [
        sys.executable,
        "-m",
        "anisodiff",
        "evaluate",
        zipped,
        *(each for pair in options.items() for each in pair),
    ]
    found = json.loads(subprocess.run(command, capture_output=True, check=True, cwd=ROOT).stdout)
    rows = pd.read_csv(results / "distances.csv")
    cell = rows[(rows["method"] == "edm") & (rows["nfe"] == 5) & (rows["range"] == 0)].iloc[0]
    assert found["value"] == pytest.approx(cell["distance"], rel=1e-7)
    assert found["images"] == 64


def test_every_result_says_where_it_was_made_and_what_it_cost(finished):
    results = finished / "results/digits"
    files = ["runs/iso/network.safetensors", "runs/iso/path.safetensors", "warps/iso.safetensors",
             "samples/edm/nfe3/0-63.safetensors", "reference.safetensors"]  # fmt: skip
    for file in files:
        about = checkpoints.header(results / file)
        assert about["environment"].keys() == {"host", "device", "torch", "threads"}
        assert about["commits"]
    cell = checkpoints.header(results / "samples/edm/nfe3/0-63.safetensors")
    assert cell["images_per_second"] == pytest.approx(64 / cell["seconds"], rel=0.1)
    spent = pd.read_csv(results / "cost.csv").set_index(["method", "nfe"])
    assert (spent.loc["edm", "training_seconds"] == 0).all()
    assert (spent.loc["ani-warped", "training_seconds"] > spent.loc["ani", "training_seconds"]).all()


@pytest.mark.parametrize(("profile", "config"), [("local", "config"), ("slurm", "paper")])
def test_the_profiles_are_found_by_name(tmp_path, profile, config):
    """Links at the root, as in a clone, and nothing in anybody's home; each has its experiment, with all its jobs."""
    for name in ("anisodiff", "config", "envs", "local", "slurm", "workflow"):
        (tmp_path / name).symlink_to(ROOT / name)
    environment = os.environ | {
        "HOME": str(tmp_path / "home"),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    found = subprocess.run(
        ["snakemake", "--profile", profile, "--dry-run", "--quiet", "rules"],
        cwd=tmp_path, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    counted = jobs_of(found.stdout + found.stderr)
    datasets = resolve(yaml.safe_load((ROOT / f"config/{config}.yaml").read_text())).datasets.values()
    assert counted["sample"] == sum(len(shards(dataset, method)) for dataset in datasets for method in dataset.methods)
    assert counted["finetune"] == sum(len(needed(dataset)["runs"]) for dataset in datasets)


def test_no_slurm_on_this_machine_is_one_line(tmp_path):
    for name in ("anisodiff", "config", "envs", "slurm", "tests", "workflow"):
        (tmp_path / name).symlink_to(ROOT / name)
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("bash", "sh", "git", "env", "which"):
        if found := shutil.which(name):
            (programs / name).symlink_to(found)
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{programs}"}
    failed = subprocess.run(
        ["snakemake", "--profile", "slurm", "--configfile", "tests/workflow/short.yaml"],
        cwd=tmp_path, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert failed.returncode != 0
    said = "slurm: there is no sbatch on this machine: run on a login node, or with --profile local"
    assert said in (failed.stdout + failed.stderr).splitlines()
    assert not (tmp_path / "results").exists()
