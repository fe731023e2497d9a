import copy
import datetime
import json
import math
from pathlib import Path

import jsonschema
import pytest
import yaml
from pydantic import ValidationError

from anisodiff.errors import StageError
from anisodiff.experiment.budgets import strip_methods, warp_steps
from anisodiff.experiment.config import describe, json_schema, resolve
from anisodiff.experiment.config_text import check_text

ROOT = Path(__file__).parents[1]
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
    resolved = resolve(CONFIG)
    digits = resolved.datasets["digits"]
    assert digits.runs["ani"].probes == 1
    assert digits.sigma_max == 80
    assert digits.paths["edm"].model_dump() == {
        "kind": "karras",
        "subspaces": "whole",
        "schedules": "shared",
        "label_weights": "rank",
        "c": 1,
        "knots": 32,
        "basis_start": "dct",
        "ends": "fixed",
    }
    assert resolve(resolved.model_dump(exclude_unset=True)) == resolved
    with pytest.raises(ValidationError, match="frozen"):
        digits.sigma_max = 1.0
    assert list(digits.methods) == list(CONFIG["datasets"]["digits"]["methods"])


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
            r"datasets\.digits\.runs\.iso\.kimgs: unknown key; known here: basis_learning_rate, batch, c,",
        ),
        ("datasets.digits.pretrain.network.width", 3, r"pretrain\.network\.width: unknown key"),
        ("datasets.digits.runs.iso.kimg", -1, r"datasets\.digits\.runs\.iso\.kimg: -1.* is not above 0"),
        ("datasets.digits.runs.iso.path_gradient", "half", r"runs\.iso\.path_gradient: 'half' is not one of"),
        ("datasets.digits.methods.iso.solver", "rk4", r"methods\.iso\.solver: 'rk4' is not one of"),
        ("datasets.digits.searches.gits.solver", "tuned", r"searches\.gits\.solver: tuned has no images to try: use"),
        (
            "datasets.digits.searches.gits.solver",
            "euler-maruyama",
            r"gits\.solver: euler-maruyama has no images to try",
        ),
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
        (
            "datasets.digits.runs.iso.path",
            "ani",
            r"runs\.iso\.subspaces: 'ani' has several, the run one: set it to block",
        ),
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
        ("datasets.digits.base.sha256", "0" * 64 + "\n", r"base\.sha256: '0+\\n' holds a line break"),
        ("datasets.digits.base.sha256", 10**63, r"base\.sha256: is no finite number"),
        ("datasets.digits.base.url", "a\x1b[2Jb", r"base\.url: 'a\\x1b\[2Jb' holds a line break or another character"),
        ("datasets.digits.base.url", "", r"base\.url: '' does not match"),
        (
            "datasets.digits.base.url",
            "https://me:it@a.org/x",
            r"digits\.base\.url: https://a\.org/x: an address with a user",
        ),
        (
            "datasets.digits.base.url",
            datetime.date(2024, 1, 1),
            r"base\.url: .* is not of type 'string': put it in quotes",
        ),
        ("datasets.digits.base.url", True, r"base\.url: True is not of type 'string': put it in quotes"),
        ("datasets.digits.base.url", "\ud800", r"base\.url: '\\ud800' holds a line break or another character"),
        ("datasets.reference", CONFIG["datasets"]["digits"], r"datasets\.reference: a folder has this name: rename"),
        ("datasets.digits.methods.x\n", {}, r"methods: 'x\\n' holds a line break"),
        ("datasets.digits.methods." + "x" * 99, {}, r"methods: 'x+' does not match"),
        ("datasets.digits.methods", {True: {}}, r"digits\.methods\.True: is not text to YAML: put the key in quotes"),
        ("datasets.digits.methods", {1: {}, "1": {}}, r"digits\.methods\.1: given twice"),
        ("datasets.digits.sigma_max", math.nan, r"digits\.sigma_max: is no finite number"),
        ("datasets.digits.sigma_max", math.inf, r"digits\.sigma_max: is no finite number"),
        ("datasets.digits.sampling.images", 10**20, r"sampling\.images: is no finite number"),
        (
            "datasets.digits.sampling.images",
            "5e4",
            r"sampling\.images: '5e4' is not of type 'integer': YAML wants a point",
        ),
        ("datasets.digits.sampling.images", 50.5, r"sampling\.images: 50\.5 is not of type 'integer'"),
        ("datasets.digits.plots", {"strip_methods": ["iso"]}, r"plots\.strip_methods: 1 given, where 2 are needed"),
        ("datasets.digits.plots", {"strip_methods": ["a", "b", "c"]}, r"strip_methods: 3 given, where 2 are needed"),
        ("cluster", {"options": "--comment='a"}, r"cluster\.options: No closing quotation: mend the quotes"),
        ("datasets.digits.base", ["x" * 100_000], r"digits\.base: \['x+ \.\.\. x+'\] is not of type 'object'"),
    ],
)
def test_what_is_wrong_is_named_with_its_key(path, value, words):
    with pytest.raises(StageError, match=words) as caught:
        resolve(changed(path, value))
    assert "\n" not in str(caught.value)
    assert "me:it" not in str(caught.value)
    assert len(str(caught.value)) < 600


def test_methods_that_spend_a_budget_in_unequal_steps_share_no_warp_for_each_budget():
    config = changed("datasets.digits.warps.iso.steps", "per_nfe")
    assert warp_steps(resolve(config).datasets["digits"], "iso", 9) == 4  # of the midpoint, before the step to 0
    methods = config["datasets"]["digits"]["methods"]
    methods["iso-warped-ipndm"] = methods["iso-warped"] | {"solver": "ipndm"}
    words = r"digits\.warps\.iso\.steps: 5 evaluations are 2 steps of 'iso-warped', and 4 of 'iso-warped-ipndm': give"
    with pytest.raises(StageError, match=words):
        resolve(config)
    del methods["iso-warped"]
    assert warp_steps(resolve(config).datasets["digits"], "iso", 9) == 8


@pytest.mark.parametrize(
    ("section", "entry", "words"),
    [
        (
            "methods",
            {"grid": "mean-karras", "solver": "dpmpp", "append_zero": False},
            r"x\.grid: 'iso-class' has a sch",
        ),
        ("likelihoods", {}, r"likelihoods\.x\.path: 'iso-class' has a schedule a class"),
        (
            "runs",
            {"start": "base", "loss": "tlsm", "kimg": 1, "learning_rate": 1},
            r"runs\.x\.schedules: 'iso-class' has",
        ),
    ],
)
def test_a_schedule_a_class_is_refused_where_one_is_for_all(section, entry, words):
    config = yaml.safe_load((ROOT / "config/digits-classes.yaml").read_text())
    dataset = config["datasets"]["digits-classes"]
    named = {"path": "iso-class"} | ({} if section == "runs" else {"network": "base"})
    dataset[section] = dataset.get(section, {}) | {"x": named | entry}
    with pytest.raises(StageError, match=words):
        resolve(config)
    if section == "likelihoods":
        dataset["likelihoods"]["x"]["estimators"] = ["bound"]
        resolve(config)


def test_whole_numbers_are_whole_however_they_are_written():
    config = changed("datasets.digits.sampling.images", 5.0e3)
    config["datasets"]["digits"] |= {
        "sampling": config["datasets"]["digits"]["sampling"] | {"batch": 32.0, "nfe": [9.0, 5]}
    }
    config["datasets"]["digits"]["warps"]["iso"]["steps"] = 8.0
    digits = resolve(config).datasets["digits"]
    found = [*digits.sampling.nfe, digits.sampling.images, digits.sampling.batch]
    found.append(digits.warps["iso"].steps)
    assert (found, {type(each) for each in found}) == ([9, 5, 5000, 32, 8], {int})
    assert type(digits.sigma_max) is float


@pytest.mark.parametrize("inside", [list, dict])
def test_aliases_of_aliases_are_refused_in_bounded_time(inside):
    bomb = "x"
    for _ in range(30):
        bomb = [bomb] * 10 if inside is list else dict.fromkeys("abcdefghij", bomb)
    with pytest.raises(StageError, match="holds too much"):
        resolve(changed("datasets.digits.ladder", bomb))
    circle = []
    circle.append(circle)
    with pytest.raises(StageError, match="holds too much"):
        resolve(changed("datasets.digits.ladder", circle))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: 1\nb: {c: 1, d: 2, c: 3}", r"b\.c: given twice, in lines 2 and 2: remove one"),
        ("a: 1\nb:\n  - c: 1\n    'c': 3", r"b\.0\.c: given twice, in lines 3 and 4"),
        ("a: {3: 1, '3': 2}", r"a\.3: given twice"),
        ('{"a": {"b": 1,\t"b": 2}}', r"b: given twice: remove one"),
        ("a: {minutes: 2:00:00}", r"a\.minutes: YAML reads 2:00:00 \(line 1\) in sixties: give minutes"),
        ("a: [1:30.5]", r"a\.0: YAML reads 1:30\.5 \(line 1\) in sixties"),
        ("a:\n  batch: 010", r"a\.batch: YAML reads 010 \(line 2\) in eights: leave out the leading 0"),
        ("{010: 1}", r"010: YAML reads 010 \(line 1\) in eights"),
        ("a: [", "is no YAML"),
        ("a: \xff", "is no YAML"),
    ],
)
def test_what_yaml_takes_in_silence_is_refused(tmp_path, text, says):
    file = tmp_path / "config.yaml"
    file.write_bytes(text.encode("latin1"))
    with pytest.raises(StageError, match=rf"config\.yaml: {says}") as refused:
        check_text(file)
    assert "\n" not in str(refused.value)


def test_merged_keys_and_quoted_text_are_no_fault(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("a: &a {b: 1, c: 0}\nd: {<<: *a, b: 2}\ne: ['2:00:00', '010', 0, 0.5, 1_000, 0x10]\nf: [*a, *a]")
    check_text(file)
    levels = ["a0: &a0 [x, x]", *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 40))]
    file.write_text("\n".join(levels))
    check_text(file)
    for name in ROOT.glob("config/*.yaml"):
        check_text(name)


def test_strips_are_drawn_of_iso_and_ani_where_there_are_such_methods():
    digits = resolve(CONFIG).datasets["digits"]
    assert strip_methods(digits) == ["iso", "ani"]
    fewer = {name: method for name, method in digits.methods.items() if name != "ani"}
    assert strip_methods(digits.model_copy(update={"methods": fewer})) == []
    chosen = resolve(changed("datasets.digits.plots", {"strip_methods": ["edm", "iso"], "grid_nfe": 9}))
    assert strip_methods(chosen.datasets["digits"]) == ["edm", "iso"]


def test_the_page_of_keys_is_the_schemas():
    assert (ROOT / "config/README.md").read_text() == describe(), "run `make config/README.md`"
    assert (ROOT / "workflow/schemas/config.schema.json").read_text() == json_schema(), "run `make config/README.md`"


@pytest.mark.parametrize("file", ["config", "paper", "cifar10-small", "cluster"])
def test_the_schema_takes_what_the_settings_take(file):
    """Editors complete and check with it: it refuses what is refused, and takes what is taken."""
    validator = jsonschema.Draft202012Validator(json.loads(json_schema()))
    config = yaml.safe_load((ROOT / f"config/{file}.yaml").read_text())
    config.setdefault("datasets", CONFIG["datasets"])
    validator.validate(as_json_has_it(config))
    for path, value in (("datasets.digits.runs.iso.kimgs", 3), ("datasets.digits.methods.iso.solver", "rk4"),
                        ("datasets.digits.paths.edm.subspaces", "ring:3"), ("threads", 0)):  # fmt: skip
        with pytest.raises(jsonschema.ValidationError):
            validator.validate(as_json_has_it(changed(path, value)))


def as_json_has_it(config):
    """Keys are texts there."""
    return json.loads(json.dumps(config))


def test_every_key_has_a_description():
    for line in describe().splitlines():
        if line.startswith("| `"):
            assert line.rstrip("| ").count("|") >= 4, f"no description: {line}"


def test_the_conda_environment_has_the_pins_of_the_lock():
    environment = yaml.safe_load((ROOT / "envs/environment.yaml").read_text())
    lock = (ROOT / "envs/requirements.txt").read_text().splitlines()
    pins = sorted(line.strip() for line in lock if line.strip() and not line.startswith("#"))
    assert sorted(environment["dependencies"][-1]["pip"]) == pins
    assert all("==" in pin for pin in pins)


OLD = {
    "class_conditional": "labels", "append_zero": "to_zero", "path_gradient": "gradient", "probe_fraction": "share",
    "path-time": "uniform", "vp-time": "time-uniform",
}  # fmt: skip


def with_old_names(node):
    if isinstance(node, dict):
        return {OLD.get(key, key): with_old_names(value) for key, value in node.items()}
    return OLD.get(node, node) if isinstance(node, str) else node


@pytest.mark.parametrize("file", ["config", "paper", "cifar10-small"])
def test_old_names_are_the_new_ones_with_a_line_each(file, capsys):
    config = yaml.safe_load((ROOT / f"config/{file}.yaml").read_text())
    resolved = resolve(config)
    assert capsys.readouterr().err == ""
    old = with_old_names(config)
    assert old != config
    assert resolve(old) == resolved
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == len({line.split(": ", 2)[2] for line in lines})
    assert any("labels is called class_conditional now" in line for line in lines)
    assert any(line.endswith("grid: 'uniform' is called 'path-time' now; the old name goes with the next version")
               for line in lines)  # fmt: skip


def test_a_key_by_both_names_is_refused():
    both = changed("datasets.digits.labels", True)
    with pytest.raises(StageError, match=r"datasets\.digits\.labels: unknown key"):
        resolve(both)
