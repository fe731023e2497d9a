"""Tables as text: CSV files read back, Markdown written."""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from anisodiff.errors import StageError, one_line

TEXTS = (
    "dataset", "network", "method", "features", "device", "host", "version", "commit", "kind", "name", "denoiser",
    "source", "plane", "row", "likelihood", "estimator",
)  # fmt: skip


def read(file: Path | str) -> pd.DataFrame:
    """Read a CSV of this project's. What is text stays text: hosts, commits and names may read as numbers, or as "nan".

    Raises:
        StageError: it is missing, or no CSV.
    """
    try:
        columns = pd.read_csv(file, nrows=0).columns
        empty = {name: [""] for name in columns if name not in TEXTS}
        return pd.read_csv(file, dtype=dict.fromkeys(TEXTS, str), keep_default_na=False, na_values=empty)
    except (OSError, ValueError) as error:
        raise StageError(f"{file}: no table ({one_line(error)}): mend it, or delete it and run again") from error


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A table whose first row is its head."""
    head, *body = rows
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *body])
