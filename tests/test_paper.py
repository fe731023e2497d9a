"""The paper's configuration itself, end to end, from stand-ins in the published formats on a local server.

Only urls, counts and sizes are overridden: what passes here is what a user with a network and GPUs runs.
"""

import copy
import functools
import hashlib
import http.server
import json
import re
import threading
from pathlib import Path

import pandas as pd
import pytest
import standin
import yaml
from workflow_runs import FIGURES, jobs, snakemake

from anisodiff.experiment.config import resolve

pytest.importorskip("snakemake", reason="the workflow needs snakemake (extra `workflow`)")

ROOT = Path(__file__).parents[1]
PAPER = yaml.safe_load((ROOT / "config/paper.yaml").read_text())
KEPT = {
    "cifar10": {"edm", "iso", "ani", "ani-warped", "ipndm-gits-afs", "ani-pca-class"},
    "imagenet": {"edm", "ani-pca-clustered"},
}
SERVERS = ("https://nvlabs-fi-cdn.nvidia.com", "https://www.cs.toronto.edu")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("server")
    standin.publish(folder)

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    made = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder)))
    threading.Thread(target=made.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{made.server_port}", folder
    made.shutdown()


def overridden(address: str, served: Path, data: Path) -> dict:
    """The paper's configuration with other urls, counts and sizes."""
    text = json.dumps(PAPER)
    for each in SERVERS:
        text = text.replace(each, address)
    config = json.loads(text) | {"device": "cpu", "threads": 1}
    del config["datasets"]["ffhq"]  # is made as afhqv2 is
    archive = served / "~kriz/cifar-10-python.tar.gz"
    config["datasets"]["cifar10"]["images"]["md5"] = hashlib.md5(archive.read_bytes()).hexdigest()
    for name, dataset in config["datasets"].items():
        dataset["images"]["resolution"] = 16
        if name != "cifar10":
            file = standin.save_zip(data / f"{name}.zip", 200, 24, labels=name == "imagenet")
            dataset["images"]["url"] = str(file)
        dataset["heldout"] = 16
        for basis in dataset.get("bases", {}).values():
            basis["rank"] = 8
            basis["clusters"] = min(3, basis.get("clusters", 1))
        for run in dataset["runs"].values():
            run |= {"kimg": 0.032, "batch": 16, "micro_batch": 8, "guard_kimg": 0.032}
        for warp in dataset["warps"].values():
            warp |= {"kimg": 0.016, "batch": 16}
        # of the rows, one of each kind: those that the digits' own run makes, and other data sets, are left out
        kept = KEPT.get(name, {"edm"})
        dataset["methods"] = {
            row: settings | ({"nfe": [3]} if "nfe" in settings else {})
            for row, settings in dataset["methods"].items()
            if row in kept
        }
        shown = {method["path"] for method in dataset["methods"].values()}
        dataset["warps"] = {each: warp for each, warp in dataset["warps"].items() if each in shown}
        used = {method.get("tuning") for method in dataset["methods"].values()}
        dataset["tunings"] = {each: tuning for each, tuning in dataset["tunings"].items() if each in used}
        for search in dataset["searches"].values():
            search |= {"points": 7, "images": 4}
        small = {"images": 4, "shown": 2, "steps": 10, "fine_steps": 40}
        first = name == "cifar10"
        dataset["geometry"] = {"ani": dataset["geometry"]["ani"] | small} if first else {}
        asked = {"images": 4, "shard": 4, "batch": 4, "steps": 2, "times": 2}
        dataset["likelihoods"] = {"edm": dataset["likelihoods"]["edm"] | asked} if first else {}
        dataset["convergence"] = {"ipndm-gits-afs": 3} if first else {}
        dataset["ladder"] = [row for row in dataset["ladder"] if row in dataset["methods"]] if first else []
        dataset["plots"].pop("grid_nfe")
        dataset["sampling"] = {"nfe": [3], "images": 20, "shard": 20, "batch": 20}
    return config


FLEXIBLE = [name for name in PAPER["datasets"]["cifar10"]["runs"] if name.startswith("fp-")]


def test_the_papers_configuration_end_to_end(server, tmp_path):
    address, served = server
    config = overridden(address, served, tmp_path / "data")
    ran = snakemake(tmp_path, config, "--show-failed-logs", "--quiet", "progress")
    assert ran.returncode == 0, ran.stdout[-4000:] + ran.stderr[-4000:]
    for name, dataset in config["datasets"].items():
        results = tmp_path / "results" / name
        table = pd.read_csv(results / "table.csv")
        assert set(table["method"]) == set(dataset["methods"]) <= set(PAPER["datasets"][name]["methods"])
        assert (table["evaluations"] == 3).all()
        assert (table["features"] == "inception").all()
        assert table["mean"].between(0.1, 10_000).all()
        assert "FID" in (results / "table.md").read_text()
        for figure in FIGURES if name == "cifar10" else FIGURES[:1]:
            assert (results / "plots" / f"{figure}.png").stat().st_size > 1000
    assert (tmp_path / "results/cifar10/geometry.md").is_file()
    page = (tmp_path / "results/cifar10/table.md").read_text()
    assert re.search(r"^\| \w+ \| base \| edm \| ode \| .* \| 4 \|$", page, re.M)
    assert "| FP-Noise (Mix), published |  |  |  | 3.20 |  |" in page
    assert (tmp_path / "results/cifar10/plots/bits-against-distance.png").stat().st_size > 1000
    locked = json.loads((tmp_path / "config/lock.json").read_text())
    fetched = [
        each for each in (tmp_path / "results/fetched").rglob("*") if each.is_file() and "logs" not in each.parts
    ]
    assert len(locked) == len(fetched) - 1 == 7  # all but CIFAR's archive, whose md5 is published
    assert jobs(tmp_path, config) == {}


def test_the_later_preset_changes_runs_alone():
    later = yaml.safe_load((ROOT / "config/paper-later.yaml").read_text())
    for name, dataset in later["datasets"].items():
        assert set(dataset["runs"]) == set(PAPER["datasets"][name]["runs"]) - set(FLEXIBLE)
        assert set(dataset) == {"runs"}


def test_the_flexible_process_is_at_its_papers_size():
    """arXiv:2206.10365, 4.2: 1.2 million steps of 96 images, in mix training half of them with the process held."""
    dataset = resolve(copy.deepcopy(PAPER)).datasets["cifar10"]
    for name in ("fp-vp", "fp-noise", "fp-noise-mix", "fp-drift", "fp-drift-mix"):
        run, method = dataset.runs[name], dataset.methods[name]
        assert run.kimg * 1000 / run.batch == 1_200_000
        assert (run.batch, run.learning_rate) == (96, 0.0002)
        assert run.freeze_after == (0.5 if name.endswith("-mix") else 1.0)
        assert (method.solver, method.nfe) == ("euler-maruyama", [1000])
        assert name in dataset.likelihoods
    assert dataset.runs["fp-drift"].planes * 2 == 3 * 32 * 32
    assert dataset.runs["fp-noise"].learn_basis
