"""What cells cost: pages of sampling and training times, of searches and of tuned solvers."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import pandas as pd

from anisodiff.errors import StageError
from anisodiff.report.cells import in_order, union
from anisodiff.report.plain_tables import markdown
from anisodiff.storage import checkpoints
from anisodiff.storage.files import Metadata


def costs(rows: pd.DataFrame, order: Sequence[str]) -> pd.DataFrame:
    """One row a cell: its mean distance, beside what sampling and training took on which device.

    Args:
        rows: rows of `distances`.
        order: names of the methods.
    """
    groups = rows.groupby(["method", "nfe"], sort=False)
    found = groups.agg(
        mean=("distance", "mean"), evaluations=("evaluations", "max"), images=("images", "sum"),
        seconds=("seconds", "sum"), training_seconds=("training_seconds", "max"),
        device=("device", partial(union, separator=", ")), host=("host", union),
    ).reset_index()  # fmt: skip
    found["images_per_second"] = found["images"] / found["seconds"]
    found["seconds_per_1000"] = 1000 / found["images_per_second"]
    return in_order(found, order)


def cost_page(spent: pd.DataFrame) -> str:
    """`costs` as a page for people."""
    head = ["method", "NFE", "distance", "s per 1,000 images", "images/s", "training, device hours", "device"]
    lines = [
        [row["method"], str(row["nfe"]), f"{row['mean']:.2f}", f"{row['seconds_per_1000']:.1f}",
         f"{row['images_per_second']:.1f}", f"{row['training_seconds'] / 3600:.3g}", row["device"]]
        for row in spent.to_dict("records")
    ]  # fmt: skip
    notes = (
        "Sampling with its features, averaged over seed ranges. Training: of network, path, warp, search and "
        "tuning since the base network, summed over devices; of several trainings the longest. Times are comparable on "
        "one device, with nothing beside."
    )
    return f"{markdown([head, *lines])}\n\n{notes}\n"


def _header(file: Path, kind: str) -> Metadata:
    """The header of a file of a stage's, which says its kind."""
    metadata = checkpoints.header(file)
    if not metadata.get(kind):
        raise StageError(f"{file}: holds no {kind}: give the file of a {kind}")
    return metadata


def search_page(searches: Mapping[str, Path]) -> str:
    """Seconds of every search's parts (GITS, Table 4); nothing where nothing was searched."""
    if not searches:
        return ""
    rows = [
        ["search", "trajectories, s", "costs, s", "programming, s", "analytic step, s", "noises", "points", "device"]
    ]
    for name, file in searches.items():
        metadata = _header(file, "search")
        parts, settings = metadata["parts"], metadata["settings"]["search"]
        seconds = [f"{parts[key]:.3f}" for key in ("trajectories", "costs", "programming", "analytic step")]
        counts = [str(settings[key]) for key in ("images", "points")]
        rows.append([name, *seconds, *counts, metadata["environment"]["device"]])
    return f"\nEach search of levels, once for all budgets:\n\n{markdown(rows)}\n"


def on_metric(tunings: Mapping[str, Path], features: str) -> set[str]:
    """Names of the tunings whose loss compares images in the features of the table's own distance.

    Args:
        tunings: files of the stage `tune`, by name.
        features: kind of the table's feature network.
    """
    compared = {name: _header(file, "tuning")["settings"]["tuning"]["features"] for name, file in tunings.items()}
    return {name for name, each in compared.items() if each is not None and each["kind"] == features}


def tuning_page(tunings: Mapping[str, Path]) -> str:
    """Held-out error of every tuning's budgets before and after, and what it took; nothing where nothing was tuned."""
    if not tunings:
        return ""
    rows = [["tuning", "from", "teacher", "NFE", "error at the start", "tuned", "s", "numbers", "device"]]
    for name, file in tunings.items():
        metadata = _header(file, "tuning")
        settings = metadata["settings"]["tuning"]
        for nfe, each in metadata["outcomes"].items():
            taught = f"{settings['teacher']} at NFE {settings['teacher_nfe']}"
            measured = [f"{each['start']:.4g}", f"{each['tuned']:.4g}", f"{each['seconds']:.0f}", str(each["numbers"])]
            rows.append([name, settings["start"], taught, nfe, *measured, metadata["environment"]["device"]])
    notes = (
        "Error: mean squared distance of an image to the teacher's from the same noise, in pixels or in the features "
        "of the tuning's loss, on held-out noises. numbers: of the solver, that were learned. The teacher's images "
        "belong to training's device hours above."
    )
    return f"\nEach tuned solver, budget by budget:\n\n{markdown(rows)}\n\n{notes}\n"
