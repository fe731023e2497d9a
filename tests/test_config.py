import copy
from pathlib import Path

import pytest
import yaml

from anisodiff.config import describe, load_schema, resolve
from anisodiff.files import StageError

ROOT = Path(__file__).parents[1]
SCHEMA = load_schema(ROOT / "workflow/schemas/config.schema.yaml")
CONFIG = yaml.safe_load((ROOT / "config/config.yaml").read_text())


def changed(path: str, value) -> dict:
    config = copy.deepcopy(CONFIG)
    at = config
    *parents, last = path.split(".")
    for part in parents:
        at = at[part]
    at[last] = value
    return config


def test_the_embedded_configuration_is_valid_and_completed():
    resolved = resolve(CONFIG, SCHEMA)
    digits = resolved["datasets"]["digits"]
    assert digits["runs"]["ani"]["probes"] == 1
    assert digits["sigma_max"] == 80
    assert digits["paths"]["edm"] == {
        "kind": "karras",
        "subspaces": "whole",
        "schedules": "shared",
        "label_weights": "rank",
        "c": 1,
        "knots": 32,
    }
    assert resolve(resolved, SCHEMA) == resolved
    assert list(digits["methods"]) == list(CONFIG["datasets"]["digits"]["methods"])


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (
            "devise",
            "cpu",
            "devise: unknown key; known here: cluster, compile, datasets, device, dtype, mirror, offline, threads",
        ),
        (
            "datasets.digits.runs.iso.kimgs",
            3,
            r"datasets\.digits\.runs\.iso\.kimgs: unknown key; known here: batch, c,",
        ),
        ("datasets.digits.pretrain.network.width", 3, r"pretrain\.network\.width: unknown key"),
        ("datasets.digits.runs.iso.kimg", -1, r"datasets\.digits\.runs\.iso\.kimg: -1 is less than"),
        ("datasets.digits.runs.iso.gradient", "half", r"runs\.iso\.gradient: 'half' is not one of"),
        ("datasets.digits.methods.iso.solver", "rk4", r"methods\.iso\.solver: 'rk4' is not one of"),
        (
            "datasets.digits.methods.iso.network",
            "isso",
            r"methods\.iso\.network: 'isso' is unknown; known here: ani, base",
        ),
        ("datasets.digits.methods.iso.path", "none", r"methods\.iso\.path: 'none' is unknown"),
        ("datasets.digits.methods.iso-warped.warp", "ani", r"iso-warped\.warp: 'ani' is the warp of another path"),
        ("datasets.digits.methods.iso.warp", "iso", r"methods\.iso\.warp: only the grid 'warped' takes one"),
        ("datasets.digits.runs.iso-start.start", "iso", r"start from one another in a circle"),
        ("datasets.digits.runs.edm", {"start": "base", "loss": "edm", "kimg": 1, "learning_rate": 1}, "rename the run"),
        ("datasets.digits.sampling.nfe", [9, 10], r"sampling\.nfe: method 'edm': 10 cannot be spent: .*use 9 or 11"),
        ("datasets.digits.paths.edm.subspaces", "basis:pca", r"edm\.subspaces: 'pca' is unknown; known here: none"),
        ("datasets.digits.runs.ani.schedules", "class", r"runs\.ani\.schedules: one a class needs labels"),
        ("datasets.digits.reference", {"url": "x.npz"}, r"reference: published statistics are of Inception's"),
        ("datasets.digits.runs.iso.micro_batch", 100, r"runs\.iso\.micro_batch: 100 does not divide the batch of 256"),
        ("datasets.digits.methods.iso.order", 2, r"methods\.iso\.order: midpoint has one order: leave it out"),
        ("datasets.digits.methods.iso.grid", "given", r"methods\.iso\.levels: the grid 'given' needs them"),
        ("cluster", {"jobs": {"finetun": {"gpus": 2}}}, r"cluster\.jobs: 'finetun' is not one of"),
        ("datasets.digits.jobs", {"finetune": {"gpu": 2}}, r"jobs\.finetune\.gpu: unknown key; known here: cpus, gpus"),
        ("datasets.digits.sampling.nfe", [1], r"sampling\.nfe: method '.*': 1 cannot be spent"),
        ("datasets.digits.convergence", {"edm": 8}, r"convergence\.edm: method 'edm': 8 cannot be spent: .*use 7 or 9"),
        ("datasets.digits.convergence", {"emd": 9}, r"convergence: 'emd' is unknown"),
        ("datasets.digits.geometry.edm.network", "isso", r"geometry\.edm\.network: 'isso' is unknown"),
        ("datasets.digits.geometry.edm.shown", 33, r"geometry\.edm\.shown: 33 is greater than"),
        ("datasets.digits.plots.published", ["EDM"], r"plots\.published: published values are FIDs"),
        ("datasets.digits.sampling.ranges_at", {6: 2}, r"ranges_at\.6: no method has such a budget"),
        ("datasets.digits.plots", {"strip_methods": ["iso", "anni"]}, r"plots\.strip_methods: 'anni' is unknown"),
        ("datasets.digits.base.sha256", "abc", r"base\.sha256: 'abc' does not match"),
    ],
)
def test_what_is_wrong_is_named_with_its_key(path, value, words):
    with pytest.raises(StageError, match=words) as caught:
        resolve(changed(path, value), SCHEMA)
    assert "\n" not in str(caught.value)


def test_the_page_of_keys_is_the_schemas():
    assert (ROOT / "config/README.md").read_text() == describe(SCHEMA), "run `make config/README.md`"


def test_the_schema_uses_known_keywords():
    """A comma in an unquoted description would cut it and leave a stray key."""
    known = {
        "$schema", "title", "description", "unit", "default", "type", "enum", "const", "anyOf", "pattern", "minimum",
        "maximum", "exclusiveMinimum", "minItems", "maxItems", "uniqueItems", "items", "minProperties", "required",
        "properties", "additionalProperties", "propertyNames",
    }  # fmt: skip

    def check(node):
        assert set(node) <= known, set(node) - known
        for child in [*node.get("properties", {}).values(), node.get("items"), node.get("additionalProperties")]:
            if isinstance(child, dict):
                check(child)

    check(SCHEMA)


def test_every_key_has_a_description():
    for line in describe(SCHEMA).splitlines():
        if line.startswith("| `"):
            assert line.rstrip("| ").count("|") >= 4, f"no description: {line}"


def test_the_conda_environment_has_the_pins_of_the_lock():
    environment = yaml.safe_load((ROOT / "envs/environment.yaml").read_text())
    lock = (ROOT / "envs/requirements.txt").read_text().splitlines()
    pins = sorted(line.strip() for line in lock if line.strip() and not line.startswith("#"))
    assert sorted(environment["dependencies"][-1]["pip"]) == pins
    assert all("==" in pin for pin in pins)
