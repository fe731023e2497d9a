"""What training a path longer does: its held-out loss, and the distance of few-step images."""

from collections.abc import Mapping

import pandas as pd
from matplotlib import pyplot as plt
from matplotlib import ticker
from matplotlib.figure import Figure

from anisodiff.errors import StageError
from anisodiff.report.drawing import distance_axis, legend_beside, standard_errors, styles
from anisodiff.storage import checkpoints


def against_kimg(tidy: pd.DataFrame, series: Mapping[str, Mapping[str, str | None]]) -> Figure:
    """Distance at every budget against the images that the path has seen, a panel a series; and its held-out loss.

    Args:
        tidy: `table.csv`.
        series: name -> method -> file of its path, in any order; None for a path that is not trained, which is drawn as
            a level line.

    Raises:
        StageError: a path does not say its held-out loss: it was made by an early version, or is in closed form.
    """
    drawn = tidy[tidy["method"].isin([name for each in series.values() for name in each])]["nfe"].value_counts()
    budgets = sorted(drawn[drawn == drawn.max()].index)  # a line of one point would say nothing
    look = dict(zip(budgets, styles(len(budgets)), strict=True))
    figure, all_axes = plt.subplots(1, len(series) + 1, figsize=(3.1 * (len(series) + 1) + 0.8, 3.8), squeeze=False)
    *panels, losses = all_axes.flat
    for axes, (title, methods) in zip(panels, series.items(), strict=True):
        seen = {name: _trained(file) for name, file in methods.items() if file is not None}
        for nfe in budgets:
            rows = tidy[(tidy["nfe"] == nfe) & tidy["method"].isin(seen)]
            rows = rows.assign(seen=[seen[name][0] for name in rows["method"]]).sort_values("seen")
            axes.errorbar(
                rows["seen"], rows["mean"], standard_errors(rows), label=f"NFE {nfe}", capsize=2, markersize=5,
                linewidth=1.2, **look[nfe],
            )  # fmt: skip
        for name in [name for name in methods if name not in seen]:
            for nfe, level in tidy[tidy["method"] == name].set_index("nfe")["mean"].items():
                if nfe in look:
                    axes.axhline(level, color=look[nfe]["color"], linestyle=":", linewidth=1)
            axes.plot([], [], color="0.35", linestyle=":", linewidth=1, label=f"{name}, not trained")
        distance_axis(axes, tidy["features"].iloc[0])
        axes.set_title(title, fontsize=9, loc="left")
        axes.sharey(panels[0])
        axes.label_outer()
        points = sorted({(kimg, loss) for kimg, loss in seen.values()})
        losses.plot(*zip(*points, strict=True), marker="o", markersize=4, linewidth=1.2, color="0.35")
    for axes in all_axes.flat:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
        axes.xaxis.set_minor_formatter(ticker.NullFormatter())
    losses.set_title("loss on held-out images, first training", fontsize=9, loc="left")
    figure.supxlabel("images that the path has seen (thousands)", fontsize=9)
    legend_beside(losses, 8, panels)
    return figure


def _trained(path: str) -> tuple[float, float]:
    """Thousands of images that a path has seen, and its held-out loss."""
    metadata = checkpoints.header(path)
    if metadata.get("heldout") is None:
        raise StageError(f"{path}: does not say its held-out loss: train it again, or leave it out of plots.trained")
    return float(metadata["kimg"]), float(metadata["heldout"])
