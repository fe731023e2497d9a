"""Training seeds as entries: what is made once, what several times, and on what."""

import copy

import pytest
from workflow_runs import SHORT

from anisodiff.errors import StageError
from anisodiff.experiment.config import resolve
from anisodiff.experiment.files import DatasetFiles
from anisodiff.experiment.settings import DatasetSettings
from anisodiff.experiment.training_seeds import first_of, replicated, with_seed, without_seed


def with_seeds(**seeds: int) -> DatasetSettings:
    config = copy.deepcopy(SHORT)
    for name, count in seeds.items():
        section, _, entry = name.partition("_")
        config["datasets"]["digits"][section][entry.replace("_", "-")]["seeds"] = count
    return resolve(config).datasets["digits"]


def test_all_that_depends_on_a_training_follows_its_seeds():
    made = replicated(with_seeds(runs_iso=3, runs_edm_finetuned=1))
    assert list(made.runs) == ["iso", "iso@1", "iso@2", "ani", "ani@1", "ani@2", "edm-finetuned"]
    assert [made.runs[name].seed for name in made.runs] == [0, 1, 2, 0, 1, 2, 0]
    assert (made.runs["ani@2"].start, made.runs["ani@2"].path) == ("iso@2", "iso@2")
    assert (made.runs["iso@2"].start, made.runs["iso@2"].path) == ("base", "edm")
    assert (made.warps["ani@1"].network, made.warps["ani@1"].seed) == ("ani@1", 1)
    assert made.methods["ani-warped@1"].warp == "ani@1"
    assert [name for name in made.methods if "@" not in name] == list(SHORT["datasets"]["digits"]["methods"])
    assert "edm@1" not in made.methods
    assert all(run.seeds == 1 for run in made.runs.values())
    assert first_of(made.runs) == ["iso", "ani", "edm-finetuned"]


def test_a_tunings_seeds_have_noises_of_their_own():
    made = replicated(with_seeds(tunings_gs=2, runs_edm_finetuned=1))
    first, second = made.tunings["gs"], made.tunings["gs@1"]
    assert second.first_seed == first.first_seed + first.pairs + first.heldout
    assert second.seed == first.seed + 1
    assert made.methods["gs@1"].tuning == "gs@1"
    files = DatasetFiles("digits", made)
    assert files.pairs("gs") != files.pairs("gs@1")
    assert files.network("iso@1") == "results/digits/runs/iso@1/network.safetensors"


def test_one_seed_changes_nothing():
    settings = with_seeds(runs_edm_finetuned=1)
    assert replicated(settings) == settings


def test_numbers_that_do_not_go_together_are_refused():
    with pytest.raises(
        StageError,
        match=r"digits\.runs\.ani: training seeds differ, 2 of seeds and 3 of start 'iso': give the same number",
    ):
        with_seeds(runs_iso=3, runs_ani=2)


def test_names_of_seeds_are_not_for_configurations():
    config = copy.deepcopy(SHORT)
    config["datasets"]["digits"]["methods"]["ani"]["network"] = "edm-finetuned@1"
    with pytest.raises(StageError, match=r"network: 'edm-finetuned@1' is unknown; known here: ani, base"):
        resolve(config)
    assert [without_seed(with_seed("ani", index)) for index in (0, 7)] == [("ani", 0), ("ani", 7)]
