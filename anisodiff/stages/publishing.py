"""A finished run's tables and figures, copied to where they can be committed, with what made them."""

import json
import os
import platform
import shutil
from importlib.metadata import version as installed
from pathlib import Path

import pandas as pd

from anisodiff.compute import processor
from anisodiff.errors import StageError
from anisodiff.report.plain_tables import read
from anisodiff.storage.files import Metadata, atomic, provenance, write_text

FILES = ("table.csv", "table.md")
WHERE_MADE = (
    "table.tex", "cost.*", "distances*.csv", "metrics.md", "geometry.*", "likelihood*.csv", "convergence/*.csv",
    "tunings/*.safetensors", "plots/[!.]*",
)  # fmt: skip
PACKAGES = ("torch", "numpy", "scipy", "clean-fid", "snakemake", "matplotlib", "pandas")


def publish(results: Path, settings: Metadata, output: Path) -> None:
    """Copy tables and figures of a dataset or of the toy, and write `provenance.json` last.

    Args:
        results: folder of the run.
        settings: its settings.
        output: folder to fill; files of an earlier run are replaced, or removed where this run has none.

    Raises:
        StageError: the run has no table yet.
    """
    if missing := [name for name in FILES if not (results / name).is_file()]:
        raise StageError(f"{results / missing[0]}: no such file: make the dataset's results first")
    table = read(results / "table.csv")
    made_by = {key: sorted({each for cell in table[key] for each in cell.split()}) for key in ("version", "commit")}
    metadata = provenance(settings) | {
        "cells_made_by": made_by,
        "seconds": {str(path.relative_to(results / "benchmarks").with_suffix("")): _seconds(path)
                    for path in sorted((results / "benchmarks").rglob("*.tsv"))},
        "machine": {"processor": processor(), "cores": os.cpu_count(), "system": platform.platform()},
        "packages": {name: installed(name) for name in PACKAGES} | {"python": platform.python_version()},
    }  # fmt: skip
    copied = {name for pattern in (*FILES, *WHERE_MADE) for name in _matching(results, pattern)}
    for name in sorted(copied):
        with atomic(output / name) as temporary:
            shutil.copyfile(results / name, temporary)
    for name in {name for pattern in WHERE_MADE for name in _matching(output, pattern)} - copied:
        (output / name).unlink()
    write_text(output / "provenance.json", json.dumps(metadata, indent=1) + "\n")


def _matching(folder: Path, pattern: str) -> list[Path]:
    """Files of a folder by a pattern, relative to it."""
    return [file.relative_to(folder) for file in folder.glob(pattern) if file.is_file()]


def _seconds(benchmark: Path) -> float:
    return float(pd.read_csv(benchmark, sep="\t")["s"].iloc[0])
