"""Cells of a table: the distances of a method at a budget, over its training seeds and its seed ranges of images."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from anisodiff.metrics.spread import error_of_mean

COLUMNS = [
    "dataset", "method", "nfe", "evaluations", "images", "ranges", "seeds", "mean", "seed_error", "error", "std", "min",
    "corrected", "kid", "kid_error", "precision", "recall", "features", "version", "commit",
]  # fmt: skip
MEASURED = ["error", "corrected", "kid", "kid_error", "precision", "recall"]  # where features or shards allow
KEY = ["method", "nfe"]


def cells(distance_rows: pd.DataFrame, left_out: pd.DataFrame, order: Sequence[str]) -> pd.DataFrame:
    """One row a cell.

    `mean` is that over training seeds of the mean over seed ranges; `seed_error` its standard error over training seeds
    (empty for one); `error` its standard error over images; `std` the standard deviation over seed ranges (N - 1, of
    one training; empty for one range). Metrics are means.

    Args:
        distance_rows: rows of `distances`.
        left_out: distances without each group of images, from there.
        order: names of the methods.
    """
    rows = distance_rows.reindex(columns=list(dict.fromkeys([*distance_rows.columns, *MEASURED])))
    groups = rows.groupby(["dataset", *KEY], sort=False)
    table = groups.agg(
        evaluations=("evaluations", "max"),
        images=("images", "min"),
        ranges=("range", "nunique"),
        seeds=("training_seed", "nunique"),
        mean=("distance", "mean"),
        min=("distance", "min"),
        corrected=("corrected", "mean"),
        kid=("kid", "mean"),
        kid_error=("kid_error", "mean"),  # trainings share noises and ranges the real images: more make it no smaller
        precision=("precision", "mean"),
        recall=("recall", "mean"),
        features=("features", "first"),
        version=("version", union),
        commit=("commit", union),
    )
    of_seed = rows.groupby(["dataset", *KEY, "training_seed"], sort=False)["distance"]
    seeds = of_seed.mean().groupby(["dataset", *KEY], sort=False)
    table["seed_error"] = seeds.std() / np.sqrt(seeds.count())
    table["std"] = np.sqrt(of_seed.var().groupby(["dataset", *KEY], sort=False).mean())
    table = table.reset_index()
    errors = errors_over_images(left_out)
    grouped = left_out.groupby(KEY)["range"].nunique().to_dict()  # a range of one shard has no groups
    table["error"] = [
        errors[key] if grouped.get(key := (row["method"], row["nfe"])) == row["ranges"] else np.nan
        for row in table.to_dict("records")
    ]
    return in_order(table, order)[COLUMNS]


def errors_over_images(left_out: pd.DataFrame) -> dict[Any, float]:
    """Standard error over images of the mean of every cell whose images come in groups, by method and budget.

    All training seeds of a cell draw the same noises: what a group changes is averaged over them first.
    """
    averaged = left_out.groupby([*KEY, "range", "group"])["distance"].mean()
    return {
        key: error_of_mean([values.to_numpy() for _, values in of_cell.groupby("range")])
        for key, of_cell in averaged.groupby(KEY)
    }


def in_order(table: pd.DataFrame, order: Sequence[str]) -> pd.DataFrame:
    """Rows by method as the configuration has them, then by budget."""
    rank = {name: index for index, name in enumerate(order)}
    return table.sort_values(
        ["method", "nfe"], key=lambda column: column.map(rank) if column.name == "method" else column
    )


def union(values: pd.Series, separator: str = " ") -> str:
    """All parts of texts, once each."""
    return separator.join(sorted({each for value in values for each in value.split(separator)}))
