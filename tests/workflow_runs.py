"""Runs of the workflow in folders of their own, and what a dry run says."""

import copy
import os
import re
import subprocess
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
SHORT = yaml.safe_load((ROOT / "tests/workflow/short.yaml").read_text())
BASE = "config/checkpoints/digits/base.safetensors"
FIGURES = ("distance-against-nfe", "learned-levels", "log-ratio", "dct-bases", "denoising-strips", "samples")
SHARDS = 2  # two seed ranges at NFE 3, in one shard each


def snakemake(folder: Path, config: dict, *arguments: str) -> subprocess.CompletedProcess:
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(config, sort_keys=False))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    command = [
        sys.executable, "-m", "snakemake", "--snakefile", str(ROOT / "workflow/Snakefile"), "--directory", str(folder),
        "--configfile", str(file), "--cores", "2", *arguments,
    ]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, check=False)


def jobs(folder: Path, config: dict, *arguments: str) -> dict[str, int]:
    """Rule -> number of jobs of a dry run."""
    found = snakemake(folder, config, "--dry-run", *arguments)
    assert found.returncode == 0, found.stderr
    text = found.stdout + found.stderr
    if "Nothing to be done" in text:
        return {}
    table = text.split("Job stats:")[-1]
    return {name: int(count) for name, count in re.findall(r"^(\w[\w-]*) +(\d+)$", table, re.M) if name != "total"}


def with_change(path: str, value) -> dict:
    config = copy.deepcopy(SHORT)
    at = config["datasets"]["digits"]
    *parents, last = path.split(".")
    for part in parents:
        at = at[part]
    at[last] = value
    return config
