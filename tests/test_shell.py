"""What the configuration's texts can do to a shell: nothing. Every rule's command is run, with another `python`."""

import copy
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from anisodiff.data.download import address_path
from anisodiff.errors import StageError
from anisodiff.experiment.config import resolve

pytest.importorskip("snakemake", reason="the workflow needs snakemake (extra `workflow`)")

ROOT = Path(__file__).parents[1]
SHORT = yaml.safe_load((ROOT / "tests/workflow/short.yaml").read_text())
INJECTIONS = (
    "$(touch INJECTED)", "`touch INJECTED`", "; touch INJECTED;", "' ; touch INJECTED '", '" ; touch INJECTED "',
    "&& touch INJECTED #", "| touch INJECTED", "> INJECTED", "{output} * ~ \\ !",
)  # fmt: skip
HOSTILE = " ".join(INJECTIONS)


def hostile() -> dict:
    """The shortened configuration with all that rules can be asked for, and a shell's words in all its free texts."""
    config = copy.deepcopy(SHORT)
    config |= {"mirror": f"mirror {HOSTILE}", "offline": True}
    config["cluster"] = {"options": "--comment='$(touch INJECTED); `touch INJECTED`' ; touch INJECTED"}
    digits = config["datasets"]["digits"]
    digits["images"] = {"url": f"set {HOSTILE}.zip", "sha256": "0" * 64, "transform": "center-crop", "resolution": 8}
    digits["base"] = {"url": f"https://host/{HOSTILE.replace('#', '')}/network.pkl?{HOSTILE}", "md5": "0" * 32}
    digits["features"] = {"kind": "inception", "url": f"../{HOSTILE}.pt"}
    digits["reference"] = {"url": f"/some/{HOSTILE}.npz"}
    digits["bases"] = {"pca": {"rank": 2}}
    digits["paths"]["edm"] |= {"subspaces": "basis:pca"}
    digits["runs"]["iso"] |= {"subspaces": "basis:pca"}
    digits["geometry"] = {"ani": digits["geometry"]["ani"]}
    digits["likelihoods"] = {"edm": {"network": "base", "path": "spectral-ani"}}
    digits["tunings"]["gs"]["features"] = {"kind": "inception", "url": f"../other {HOSTILE}.pt"}
    digits["plots"] |= {"published": [HOSTILE]}
    digits["ladder"] = ["edm", "ani"]
    digits["pretrain"] = {"kimg": 1, "learning_rate": 0.1, "network": {}}
    other = {key: digits[key] for key in ("base", "sampling", "pretrain")}
    method = {"network": "base", "path": "edm", "grid": "karras", "solver": "heun"}
    config["datasets"]["other"] = other | {
        "images": {"url": f"https://host/{HOSTILE}.zip?{HOSTILE}"},
        "features": {"kind": "digits-cnn", "url": f"file:///{HOSTILE}.safetensors"},
        "paths": {"edm": {"kind": "karras"}},
        "methods": {"edm": method},
    }  # fmt: skip
    return config


def every_job(folder: Path, config: dict) -> list[str]:
    """What a dry run of all that can be asked for says, job by job."""
    (folder / "config").symlink_to(ROOT / "config")
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    found = subprocess.run(
        [sys.executable, "-m", "snakemake", "--snakefile", ROOT / "workflow/Snakefile", "--directory", folder,
         "--configfile", folder / "config.yaml", "--cores", "1", "--dry-run", "--printshellcmds",
         "all", "plan", "throughput", "downloads", "report", "reference_digits", "pretrain_digits", "pretrain_other",
         "fp_toy", "reference_fp_toy"],
        capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert found.returncode == 0, found.stdout + found.stderr
    text = (found.stdout + found.stderr).split("\nJob stats:")[1]
    jobs = re.split(r"\n+\[\w{3} \w{3} [ \d]\d [\d:]{8} \d{4}\]\n", text)
    return [job for job in jobs if "\nShell command: " in job and "\nShell command: None" not in job]


def test_no_text_of_the_configuration_is_run(tmp_path):
    """The commands of a dry run are run, with a `python` that writes down what it is given: what is configured."""
    config = hostile()
    jobs = every_job(tmp_path, config)
    rules = {
        name for file in (ROOT / "workflow/rules").glob("*.smk")
        for name in re.findall(r"^(?:use rule \w+ as|rule) (\w+)", file.read_text(), re.M)
    }  # fmt: skip
    assert {re.search(r"rule (\w+):", job)[1] for job in jobs} == rules

    programs, given = tmp_path / "programs", tmp_path / "given"
    programs.mkdir()
    (programs / "python").write_text('#!/bin/sh\nprintf "%s\\n" "$@" END >> "$GIVEN"\n')
    (programs / "python").chmod(0o755)
    environment = os.environ | {"PATH": f"{programs}:{os.environ['PATH']}", "GIVEN": str(given)}
    before = {*tmp_path.iterdir()}
    for job in jobs:
        # as Snakemake does
        (tmp_path / re.search(r"^ +log: (.*)$", job, re.M)[1]).parent.mkdir(parents=True, exist_ok=True)
        command = job.split("\nShell command: ", 1)[1]
        ran = subprocess.run(["bash", "-c", command], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert (ran.returncode, ran.stderr) == (0, ""), command
    assert {*tmp_path.iterdir()} - before == {given, tmp_path / "results"}

    stages = [text.splitlines() for text in given.read_text().split("END\n")[:-1]]
    values = {name: {stage[stage.index(name) + 1] for stage in stages if name in stage}
              for name in ("--url", "--source", "--published", "--mirror", "--sha256", "--md5")}  # fmt: skip
    datasets = config["datasets"]
    urls = {datasets[name][key]["url"] for name in datasets for key in ("base", "features")}
    urls.add(datasets["digits"]["tunings"]["gs"]["features"]["url"])
    assert values["--url"] == urls | {datasets["digits"]["reference"]["url"], datasets["other"]["images"]["url"]}
    assert values["--source"] == {
        datasets["digits"]["images"]["url"], f"results/fetched/{address_path(datasets['other']['images']['url'])}"
    }  # fmt: skip
    shown = {text for text in values["--published"] if text.startswith("{")}  # a table's, beside the reference's file
    assert [json.loads(text)["methods"] for text in sorted(shown, key=len)] == [[], [HOSTILE]]
    assert values["--published"] - shown == {f"results/fetched/{address_path(datasets['digits']['reference']['url'])}"}
    assert values["--mirror"] == {config["mirror"]}
    assert (values["--sha256"], values["--md5"]) == ({"0" * 64}, {"0" * 32})

    asked = {re.search(r"slurm_extra=(.*?), (?:gpu|processes)=", job)[1] for job in jobs if "slurm_extra=" in job}
    for options in asked:
        words = subprocess.run(
            ["bash", "-c", f"printf '%s\\n' {options}"], cwd=tmp_path, capture_output=True, text=True
        )
        found = [word for word in words.stdout.splitlines() if not word.startswith("--signal")]
        assert found == shlex.split(config["cluster"]["options"])
    assert not (tmp_path / "INJECTED").exists()


@pytest.mark.parametrize("text", [*INJECTIONS, "line\nbreak", "name\n"])
@pytest.mark.parametrize("key", ["device", "cluster.account", "cluster.partition", "cluster.gpu_type", "datasets.NAME"])
def test_what_must_be_a_word_is_refused_otherwise(key, text):
    config = copy.deepcopy(SHORT)
    section, _, name = key.rpartition(".")
    entry = config.setdefault(section, {}) if section else config
    entry[text if name == "NAME" else name] = SHORT["datasets"]["digits"] if name == "NAME" else text
    with pytest.raises(StageError, match=f"^configuration: {key.removesuffix('.NAME')}") as refused:
        resolve(config)
    assert "\n" not in str(refused.value)
