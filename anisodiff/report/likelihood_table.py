"""Bits per dimension of networks over paths, as rows and as a part of a page."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd
import torch

from anisodiff.errors import StageError
from anisodiff.experiment.settings import MethodSettings
from anisodiff.experiment.training_seeds import without_seed
from anisodiff.objectives.likelihood import bits_per_dimension
from anisodiff.report.plain_tables import markdown
from anisodiff.report.published import published_values
from anisodiff.storage import checkpoints

ESTIMATORS = {"ode": "bits_per_dim", "bound": "bits_per_dim_bound"}  # in the header of a table


def likelihood_rows(files: Mapping[str, Sequence[Path]]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Bits per dimension as `likelihood.csv` and `likelihood-images.csv` have them.

    The first has a row a likelihood, training seed and estimator, with the mean and its standard error over images. The
    second has a row for each image too; `image` is its place among the held-out ones, the same image in all rows.

    Args:
        files: those of the stage `likelihood`, by name, a file a shard.

    Raises:
        StageError: a file holds no likelihood.
    """
    rows, images = [], []
    for name, shards in files.items():
        read_shards = [checkpoints.read(file) for file in shards]
        for file, (_, metadata) in zip(shards, read_shards, strict=True):
            if not metadata.get("likelihood"):
                raise StageError(f"{file}: holds no likelihood: delete it and run again")
        settings = read_shards[0][1]["settings"]["likelihood"]
        plain, seed = without_seed(name)
        for estimator in settings["estimators"]:
            nats = torch.cat([tensors[estimator] for tensors, _ in read_shards])
            grey_levels = settings["grey_levels"] if estimator == "ode" else None
            bits = bits_per_dimension(nats, read_shards[0][1]["dimensions"], grey_levels)
            key = {"likelihood": plain, "training_seed": seed, "estimator": estimator}
            images += [key | {"image": place, "bits_per_dim": each} for place, each in enumerate(bits.tolist())]
            rows.append(
                key
                | {
                    "network": without_seed(settings["network"])[0],
                    "path": without_seed(settings["path"])[0],
                    "bits_per_dim": float(bits.mean()),
                    "error": float(bits.std() / len(bits) ** 0.5),
                    "images": len(bits),
                    "grey_levels": settings["grey_levels"],
                    "version": " ".join(sorted({each for _, about in read_shards for each in about["versions"]})),
                    "commit": " ".join(sorted({each for _, about in read_shards for each in about["commits"]})),
                }
            )
    return pd.DataFrame(rows), pd.DataFrame(images)


def over_seeds(measured: pd.DataFrame) -> pd.DataFrame:
    """One row a likelihood and estimator: means over training seeds, their standard error, that over images.

    Args:
        measured: one row a likelihood, of `likelihood_rows`; one or more.
    """
    groups = measured.groupby(["likelihood", "estimator"], sort=False)
    found = groups.agg({name: "mean" if name in ("bits_per_dim", "error") else "first" for name in measured})
    found["seeds"] = groups["training_seed"].nunique()
    found["seed_error"] = groups["bits_per_dim"].std() / found["seeds"] ** 0.5
    return found.reset_index(drop=True)


def with_likelihoods(tidy: pd.DataFrame, measured: pd.DataFrame, methods: Mapping[str, MethodSettings]) -> pd.DataFrame:
    """Cells with the bits per dimension of their method's network over its path, and the error of these, where those
    were measured; of several likelihoods of the two, by the first."""
    of_method = [(methods[name].network, methods[name].path) for name in tidy["method"]]
    averaged = over_seeds(measured) if len(measured) else measured
    for estimator, column in ESTIMATORS.items() if len(measured) else ():
        of = averaged[averaged["estimator"] == estimator].drop_duplicates(["network", "path"])
        known = of.set_index(["network", "path"])[["bits_per_dim", "error"]].reindex(of_method)
        tidy[column], tidy[f"{column}_error"] = known["bits_per_dim"].to_numpy(), known["error"].to_numpy()
    return tidy


def bits_columns(tidy: pd.DataFrame) -> list[str]:
    """Columns of a table with bits per dimension, where any were measured."""
    return [column for column in ESTIMATORS.values() if column in tidy and tidy[column].notna().any()]


def likelihood_page(measured: pd.DataFrame, published: pd.DataFrame | None = None) -> str:
    """Bits per dimension as a part of a page for people.

    Args:
        measured: one row a likelihood, of `likelihood_rows`; one or more.
        published: rows of `published_values`; those without a likelihood are left out.
    """
    rows = [["likelihood", "network", "path", "estimator", "bits per dimension", "images"]]
    for row in over_seeds(measured).to_dict("records"):
        trained = f" ± {row['seed_error']:.3f}" if row["seeds"] > 1 else ""
        value = f"{row['bits_per_dim']:.3f}{trained} ({row['error']:.3f})"
        made_of = [row[name] for name in ("likelihood", "network", "path", "estimator")]
        rows.append([*made_of, value, str(row["images"])])
    others = published_values("", "", []) if published is None else published
    others = others.dropna(subset=list(ESTIMATORS.values()), how="all").to_dict("records")
    for row in others:
        stated = not pd.isna(row["bits_per_dim"])
        value = f"{row['bits_per_dim']:.2f}" if stated else f"< {row['bits_per_dim_bound']:.2f}"
        rows.append([f"{row['method']}, published", "", "", "" if stated else "bound", value, ""])
    levels = " or ".join(map(str, sorted(set(measured["grey_levels"]))))
    notes = (
        "Negative log-likelihood of held-out images, in brackets the standard error over them. ode: density along the "
        f"probability flow, of images dequantised from {levels} grey levels; bound: lower bound of the probability of "
        "grey levels, so an upper one here. Lower is better; rows share their first images, so differences between "
        "rows are better known than the rows."
    )
    if measured["version"].nunique() > 1:
        notes += " Rows are of several versions of the code: likelihood.csv says which."
    if (measured["training_seed"] > 0).any():
        notes += " ±: standard error over training seeds, where there are several."
    if others:
        sources = "; ".join(dict.fromkeys(row["source"] for row in others))
        notes += f"\n\nPublished values are of other networks and images, as printed in {sources}."
    return f"\n{markdown(rows)}\n\n{notes}\n"
