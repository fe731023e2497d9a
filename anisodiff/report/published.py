"""Values that others published."""

from collections.abc import Sequence

import pandas as pd

from anisodiff.errors import StageError
from anisodiff.report.plain_tables import read

PUBLISHED = ["dataset", "network", "method", "nfe", "fid", "bits_per_dim", "bits_per_dim_bound", "images", "source"]


def published_values(dataset: str, file: str, methods: Sequence[str]) -> pd.DataFrame:
    """Values that others published for a dataset.

    Args:
        dataset: its name.
        file: CSV of the columns `PUBLISHED`; what is not stated is empty.
        methods: by name.

    Raises:
        StageError: nothing is known of a method.
    """
    rows = read(file) if methods else pd.DataFrame(columns=PUBLISHED)
    rows = rows[rows["dataset"] == dataset]
    if unknown := sorted(set(methods) - set(rows["method"])):
        known = ", ".join(sorted(set(rows["method"]))) or "nothing"
        raise StageError(f"plots.published: {unknown[0]!r} has no values for {dataset} in {file}; it has {known}")
    return rows[rows["method"].isin(methods)].sort_values("nfe")
