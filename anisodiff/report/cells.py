"""Cells of a table: the distances of a method at a budget, over its seed ranges."""

from collections.abc import Sequence

import pandas as pd

COLUMNS = [
    "dataset", "method", "nfe", "evaluations", "images", "ranges", "mean", "std", "min", "features",
    "version", "commit",
]  # fmt: skip


def cells(distance_rows: pd.DataFrame, order: Sequence[str]) -> pd.DataFrame:
    """One row a cell: mean, standard deviation (N - 1; empty for one range) and minimum over its seed ranges."""
    groups = distance_rows.groupby(["dataset", "method", "nfe"], sort=False)
    table = groups.agg(
        evaluations=("evaluations", "max"),
        images=("images", "min"),
        ranges=("range", "nunique"),
        mean=("distance", "mean"),
        std=("distance", "std"),
        min=("distance", "min"),
        features=("features", "first"),
        version=("version", union),
        commit=("commit", union),
    ).reset_index()
    return in_order(table, order)[COLUMNS]


def in_order(table: pd.DataFrame, order: Sequence[str]) -> pd.DataFrame:
    """Rows by method as the configuration has them, then by budget."""
    rank = {name: index for index, name in enumerate(order)}
    return table.sort_values(
        ["method", "nfe"], key=lambda column: column.map(rank) if column.name == "method" else column
    )


def union(values: pd.Series, separator: str = " ") -> str:
    return separator.join(sorted({each for value in values for each in value.split(separator)}))
