import json

import pandas as pd
import pytest
import torch

from anisodiff.errors import StageError
from anisodiff.experiment.settings import MethodSettings
from anisodiff.metrics import frechet
from anisodiff.report import cells, drawing, plain_tables, tables
from anisodiff.report.distances import LEFT_OUT, distances
from anisodiff.storage import checkpoints

METHODS = {
    name: MethodSettings(network="base", path="edm", grid="karras", solver=solver)
    for name, solver in (("second", "heun"), ("first", "midpoint"))
}


def shard(folder, method, nfe, seeds, features, **changes):
    statistics = frechet.FeatureStatistics(features.shape[1])
    statistics.add(features)
    about = {
        "settings": {"nfe": nfe, "seeds": list(seeds)}, "evaluations": nfe, "kimg": 12.0, "stopped_early": False,
        "seconds": 1.0, "versions": ["1"], "commits": ["abc"], "device_seconds": 7200.0,
        "environment": {"device": "a GPU", "host": "n1"}, "last_step": [0.03, 0.0], **changes,
    }  # fmt: skip
    about = {key: value for key, value in about.items() if value is not None}  # early versions say less
    cell = folder / method / f"nfe{nfe}" / f"{seeds[0]}-{seeds[1]}.safetensors"
    checkpoints.save(cell, statistics.tensors() | {"preview": torch.zeros(4, 1, 8, 8, dtype=torch.uint8)}, about)
    manifest = folder / method / f"{seeds[0]}-{seeds[1]}.json"
    made = json.loads(manifest.read_text()) if manifest.exists() else []
    manifest.write_text(json.dumps([*made, str(cell.relative_to(folder / method))]))
    return manifest


@pytest.fixture
def results(tmp_path):
    generator = torch.Generator().manual_seed(0)
    normal = lambda shift: torch.randn(10, 3, generator=generator) + shift  # noqa: E731
    truth = frechet.FeatureStatistics(3)
    truth.add(normal(0))
    checkpoints.save(tmp_path / "reference.safetensors", truth.gaussian.tensors(), {"features": "digits-cnn"})
    manifests = []
    for method, shift in (("second", 1.0), ("first", 0.3)):
        for first in (0, 10, 20, 30):
            made = shard(tmp_path, method, 9, (first, first + 9), normal(shift))
            if first < 20:
                early = (
                    {"stopped_early": True, "versions": ["0", "1"], "last_step": None}
                    if method == "first"
                    else {"last_step": [0.05, 0.0]}
                )
                shard(tmp_path, method, 11, (first, first + 9), normal(shift), **early)
            manifests.append(made)
    reference, left_out = tmp_path / "reference.safetensors", tmp_path / "left.csv"
    distances("toy", reference, manifests, 20, "digits-cnn", tmp_path / "d.csv", left_out)
    return tmp_path


def test_cells_are_ranges_of_summed_shards(results):
    rows = pd.read_csv(results / "d.csv")
    assert len(rows) == 6
    tables.table(results / "d.csv", results / "left.csv", METHODS, results)
    tidy = pd.read_csv(results / "table.csv", dtype={"version": str})
    assert list(tidy.columns) == [*cells.COLUMNS, "on_metric"]
    assert tidy["method"].tolist() == ["second", "second", "first", "first"]
    cell = tidy[(tidy["method"] == "first") & (tidy["nfe"] == 9)].iloc[0]
    ours = rows[(rows["method"] == "first") & (rows["nfe"] == 9)]["distance"]
    assert cell["ranges"] == 2
    assert cell["images"] == 20
    assert cell["mean"] == pytest.approx(ours.mean(), rel=1e-5)
    assert cell["std"] == pytest.approx(ours.std(ddof=1), rel=1e-5)
    assert cell["min"] == pytest.approx(ours.min(), rel=1e-5)
    assert pd.isna(tidy[tidy["nfe"] == 11]["std"]).all()


def test_the_page_marks_the_best_other_versions_and_stopped_runs(results):
    tables.table(results / "d.csv", results / "left.csv", METHODS, results)
    page = (results / "table.md").read_text()
    row = next(line for line in page.splitlines() if line.startswith("| first"))
    assert row.count("**") == 4
    assert "‡" in row.split("|")[1]
    assert row.split("|")[-2].strip().endswith("†")
    assert "†" not in row.split("|")[-3]
    assert "| 12 |" in row
    assert "kimg" in page
    assert "20 images a seed range, one range, 2 at NFE 9." in page
    assert "One training a row: nothing is known of its spread over trainings." in page
    assert "In brackets: standard error over images" in page
    assert "Last step, by the mean noise level: second from 0.03-0.05 to 0; first at NFE 9 from 0.03 to 0.\n" in page
    tex = (results / "table.tex").read_text()
    assert tex.count("\\textbf") == 3  # ten images are too few to tell the two apart at NFE 11
    assert tex.count("&") == 3 * 7


@pytest.mark.parametrize(
    "changes",
    [
        {"host": "1024"}, {"host": "12345678e123"}, {"commit": "123456789012"}, {"commit": "1234567e8901"},
        {"method": "nan"}, {"method": "null"}, {"method": "007"}, {"version": "1"}, {"device": "None"}, {"host": ""},
    ],
)  # fmt: skip
def test_text_that_reads_as_a_number_or_as_nothing_stays_text(tmp_path, changes):
    row = {
        "dataset": "toy", "method": "edm", "nfe": 3, "range": 0, "images": 32, "evaluations": 3.0, "distance": 1.5,
        "features": "digits-cnn", "kimg": 0.0, "stopped_early": False, "seconds": 1.0, "training_seconds": 0.0,
        "device": "CPU", "host": "vm", "version": "0.1.0+5f31bfa4", "commit": "91d8ae6613fe",
    } | changes  # fmt: skip
    pd.DataFrame([row]).to_csv(tmp_path / "d.csv", index=False)
    pd.DataFrame(columns=LEFT_OUT).to_csv(tmp_path / "left.csv", index=False)
    tables.table(tmp_path / "d.csv", tmp_path / "left.csv", {row["method"]: METHODS["first"]}, tmp_path)
    for name in ("table", "cost"):
        made = plain_tables.read(tmp_path / f"{name}.csv").iloc[0]
        said = made.index.intersection(plain_tables.TEXTS)
        assert {key: made[key] for key in said} == {key: row[key] for key in said}
    tidy = plain_tables.read(tmp_path / "table.csv")
    assert pd.isna(tidy["std"]).all()
    assert tidy["mean"].tolist() == [1.5]
    assert f"| {row['method']} | base |" in (tmp_path / "table.md").read_text()


def test_a_broken_table_is_named(tmp_path):
    (tmp_path / "d.csv").write_text("")
    pd.DataFrame(columns=LEFT_OUT).to_csv(tmp_path / "left.csv", index=False)
    with pytest.raises(StageError, match=r"d\.csv: no table \(.*\): mend it, or delete it and run again"):
        tables.table(tmp_path / "d.csv", tmp_path / "left.csv", METHODS, tmp_path)


def test_a_missing_shard_is_named(results):
    manifests = [results / "first" / "0-9.json"]
    with pytest.raises(StageError, match="first, nfe 9, range 0: 10 of 20 images"):
        distances(
            "toy", results / "reference.safetensors", manifests, 20, "digits-cnn", results / "e.csv", results / "f.csv"
        )
    assert not (results / "e.csv").exists()


def test_a_ladder_shows_what_each_row_buys(results):
    tables.table(results / "d.csv", results / "left.csv", METHODS, results, ["second", "first"])
    page = (results / "table.md").read_text()
    mean = pd.read_csv(results / "table.csv").set_index(["method", "nfe"])["mean"]
    rungs = [line for line in page.split("What each ingredient buys")[1].splitlines() if line.startswith("| ")]
    assert rungs[0] == "| row | adds | NFE 9 | NFE 11 |"
    assert rungs[2].startswith(f"| second |  | {mean['second', 9]:.2f} |")
    change = mean["first", 9] - mean["second", 9]
    assert rungs[3].startswith(f"| first | solver midpoint | {mean['first', 9]:.2f} ({change:+.2f} ± ")
    assert rungs[4].startswith(f"| best of the table |  | {mean['first', 9]:.2f} first |")


def test_a_ladder_names_every_setting_that_a_row_changes(results):
    methods = METHODS | {"first": METHODS["first"].changed(path="iso", append_zero=False, nfe=[9])}
    tables.table(results / "d.csv", results / "left.csv", methods, results, ["second", "first"])
    page = (results / "table.md").read_text()
    assert "| first | path iso, solver midpoint, append_zero false |" in page


def test_cost_stands_beside_the_distance(results):
    tables.table(results / "d.csv", results / "left.csv", METHODS, results)
    spent, tidy = pd.read_csv(results / "cost.csv"), pd.read_csv(results / "table.csv")
    assert spent["mean"].tolist() == tidy["mean"].tolist()
    cell = spent[(spent["method"] == "first") & (spent["nfe"] == 9)].iloc[0]
    assert cell["images_per_second"] == 10  # four shards of ten images, a second each
    assert cell["seconds_per_1000"] == 100
    row = next(line for line in (results / "cost.md").read_text().splitlines() if line.startswith("| first | 9"))
    assert row.split("|")[4:8] == [" 100.0 ", " 10.0 ", " 2 ", " a GPU "]


def test_methods_told_apart_without_colour():
    styles = drawing.styles(12)
    assert len({(style["linestyle"], style["marker"]) for style in styles}) == 12
