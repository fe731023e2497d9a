"""A plan counts what Snakemake counts, and its hours are those of measured speeds."""

import json
from pathlib import Path

import pytest
import yaml
from runs import RUN, SPACE, WARP
from workflow_runs import jobs, snakemake

from anisodiff.compute import Compute
from anisodiff.experiment import planning
from anisodiff.experiment.config import resolve
from anisodiff.experiment.files import shards
from anisodiff.experiment.training_seeds import replicated
from anisodiff.metrics.registry import FeatureFile
from anisodiff.stages import throughput

ROOT = Path(__file__).parents[1]
FEATURES = ROOT / "config/checkpoints/digits/features.safetensors"


def configuration(name: str) -> dict:
    return yaml.safe_load((ROOT / name).read_text())


def test_the_plan_counts_the_jobs_of_a_dry_run(tmp_path):
    """And makes nothing."""
    (tmp_path / "config").symlink_to(ROOT / "config")
    config = configuration("tests/workflow/short.yaml")
    planned = snakemake(tmp_path, config, "plan")
    assert planned.returncode == 0, planned.stderr
    found = jobs(tmp_path, config)
    found["digits"] = found.pop("all")
    by_rule = ", ".join(f"{rule} {count}" for rule, count in sorted(found.items()))
    page = (tmp_path / "results/logs/plan.txt").read_text()
    assert f"Jobs from nothing: {by_rule};" in page
    assert page.splitlines()[1].split()[:2] == ["digits", str(sum(found.values()))]
    assert not (tmp_path / "results/digits").exists()


def test_speeds_are_measured_for_what_costs_differently(start, tmp_path):
    settings = RUN.changed(subspaces="block")
    runs = {
        "one": settings,
        "same": settings.changed(learning_rate=1.0),
        "envelope": settings.changed(path_gradient="envelope"),
    }
    runs["level"] = settings.changed(path_gradient="level", subspaces="whole", label_weights="rank")
    runs["basis"] = settings.changed(subspaces="dense:64", learn_basis=True)
    runs["planes"] = settings.changed(planes=4)
    runs["energy"] = settings.changed(kinetic=[1.0, 1.0])
    warps = {"warp": WARP.changed(steps="per_nfe", window="uniform")}
    output = tmp_path / "throughput.json"
    throughput.measure_throughput(
        SPACE, 8, runs, warps, start[2], start[0], FeatureFile("digits-cnn", FEATURES), output, Compute(), 0.1
    )
    found = json.loads(output.read_text())
    speeds = found["training_images_per_second"]
    assert speeds["one"] == speeds["same"]
    assert len({*speeds.values()}) == len(runs) - 1
    assert found["shape"] == [1, 8, 8]
    assert found["images"] == 1797
    assert min(found["evaluations_per_second"], found["features_per_second"], *speeds.values(),
               *found["warp_images_per_second"].values()) > 0  # fmt: skip
    assert found["environment"]["device"]


def test_hours_and_bytes_of_a_small_plan(tmp_path):
    """By hand: two methods, ten images in shards of five at NFE 3 and 5, two ranges at 3."""
    config = configuration("tests/workflow/short.yaml")
    dataset = config["datasets"]["digits"]
    dataset["methods"] = {
        "edm": {"network": "base", "path": "edm", "grid": "karras", "solver": "heun"},
        "iso": {"network": "iso", "path": "iso", "grid": "warped", "solver": "midpoint", "warp": "iso"},
    }
    dataset["sampling"] = {"nfe": [3, 5], "images": 10, "shard": 5, "batch": 5, "ranges_at": {3: 2}, "keep": "images"}
    dataset["plots"] = {"strip_methods": ["edm", "iso"]}
    del dataset["geometry"], dataset["convergence"], dataset["searches"], dataset["tunings"]
    config = resolve(config)
    measured = {
        "evaluations_per_second": 2.0, "features_per_second": 4.0, "training_images_per_second": {"iso": 10.0},
        "warp_images_per_second": {"iso": 5.0}, "shape": [1, 8, 8], "images": 100, "network_bytes": 1000,
        "environment": {"device": "a GPU"},
    }  # fmt: skip
    found = planning.work(config.datasets["digits"], measured)
    assert found["images"] == 2 * (20 + 10)
    assert found["evaluations"] == 2 * (20 * 3 + 10 * 5)
    assert found["sampling hours"] == pytest.approx((220 / 2 + 60 / 4) / 3600)
    assert found["training hours"] == pytest.approx((1000 / 10 + 1000 / 5) / 3600)
    cells = 2 * (2 * 2 + 2)
    assert found["cell bytes"] == cells * 64 * 65 / 2 * 8 + 60 * 64 * 4  # sums, and the features of every image
    assert found["bytes"] == found["cell bytes"] + 100 * 64 + 1000 * (2 + 9) + 60 * (64 + 200)
    (tmp_path / "digits").mkdir()
    (tmp_path / "digits/throughput.json").write_text(json.dumps(measured))
    page = planning.page(config, {"digits": {"sample": 12, "download": 2}}, tmp_path)
    assert "download 2, sample 12" in page
    assert "a GPU" in page
    assert "?" not in page
    unknown = planning.page(config, {"digits": {}}, tmp_path / "elsewhere")
    assert "make the target `throughput`" in unknown


def test_the_ladder_has_every_solver_and_its_jobs(tmp_path):
    """Given after the experiment that it adds to."""
    utils = pytest.importorskip("snakemake.utils")
    config = configuration("config/config.yaml")
    utils.update_config(config, configuration("config/ladder.yaml"))
    dataset = replicated(resolve(config).datasets["digits"])
    solvers = {method.solver for method in dataset.methods.values()}
    assert solvers == {"euler", "heun", "midpoint", "dpm2", "dpmpp", "unipc", "deis", "exp-ab", "ipndm", "tuned"}
    (tmp_path / "config").symlink_to(ROOT / "config")
    found = jobs(tmp_path, config)
    assert found["search"] == len(dataset.searches)
    assert found["tune"] == len(dataset.tunings)
    assert found["sample"] == sum(len(shards(dataset, method)) for method in dataset.methods)


def test_evaluations_of_tunings_by_hand():
    """Teachers are shared; what no row uses is not made."""
    config = configuration("tests/workflow/short.yaml")
    digits = config["datasets"]["digits"]
    digits["tunings"]["twice"] = digits["tunings"]["gs"] | {"nfe": [3, 4]}
    assert planning.tuning_evaluations(resolve(config).datasets["digits"]) == 4 * 4 * 16 * 3 + 5 * 48
    digits["methods"]["twice"] = digits["methods"]["gs"] | {"tuning": "twice"}
    assert planning.tuning_evaluations(resolve(config).datasets["digits"]) == 4 * 4 * 16 * (3 + 3 + 4) + 5 * 48
