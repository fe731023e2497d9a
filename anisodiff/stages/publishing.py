"""A finished run's tables and figures, copied to where they can be committed, with what made them."""

import json
import os
import platform
import shutil
from collections.abc import Sequence
from importlib.metadata import version as installed
from pathlib import Path

import pandas as pd

from anisodiff.compute import processor
from anisodiff.errors import StageError
from anisodiff.report.plain_tables import read
from anisodiff.storage.files import Metadata, atomic, provenance, write_text

PACKAGES = ("torch", "numpy", "scipy", "clean-fid", "snakemake", "matplotlib", "pandas")


def publish(results: Path, files: Sequence[Path], settings: Metadata, output: Path) -> None:
    """Copy tables and figures of a dataset or of the toy, and write `provenance.json` last.

    Args:
        results: folder of the run, with a `table.csv`.
        files: what is copied: files of the run, and folders of some.
        settings: settings of the run.
        output: folder to fill; what was published there earlier is replaced, or removed where it is no longer made.

    Raises:
        StageError: a file is not there.
    """
    if missing := [file for file in files if not file.exists()]:
        raise StageError(f"{missing[0]}: no such file: make the dataset's results first")
    table = read(results / "table.csv")
    made_by = {key: sorted({each for cell in table[key] for each in cell.split()}) for key in ("version", "commit")}
    metadata = provenance(settings) | {
        "cells_made_by": made_by,
        "seconds": {str(path.relative_to(results / "benchmarks").with_suffix("")): _seconds(path)
                    for path in sorted((results / "benchmarks").rglob("*.tsv"))},
        "machine": {"processor": processor(), "cores": os.cpu_count(), "system": platform.platform()},
        "packages": {name: installed(name) for name in PACKAGES} | {"python": platform.python_version()},
    }  # fmt: skip
    every = [each for file in files for each in (sorted(file.glob("[!.]*")) if file.is_dir() else [file])]
    names = [each.relative_to(results) for each in every]
    for name in names:
        with atomic(output / name) as temporary:
            shutil.copyfile(results / name, temporary)
    for name in _earlier(output) - set(names):
        (output / name).unlink(missing_ok=True)
    metadata["files"] = [name.as_posix() for name in names]
    write_text(output / "provenance.json", json.dumps(metadata, indent=1) + "\n")


def _earlier(output: Path) -> set[Path]:
    """Names of the files that were published there before, as its provenance says."""
    try:
        named = json.loads((output / "provenance.json").read_text())["files"]
    except (OSError, ValueError, LookupError, TypeError):  # none, or of an early version
        return set()
    paths = {Path(name) for name in named if isinstance(name, str)}
    return {path for path in paths if not path.is_absolute() and ".." not in path.parts}


def _seconds(benchmark: Path) -> float:
    return float(pd.read_csv(benchmark, sep="\t")["s"].iloc[0])
