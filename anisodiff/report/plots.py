"""The figures of a dataset, as SVG and PNG: readable in print, axes with units, colour-blind safe."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from anisodiff.errors import StageError
from anisodiff.paths.noise_path import NoisePath, Warp
from anisodiff.paths.subspaces import dct_matrix
from anisodiff.report import geometry_figures, tables
from anisodiff.report.captions import FIGURES
from anisodiff.report.drawing import DASHES, MARKERS, STYLE, distance_axis, legend_beside, show, styles, tiled
from anisodiff.storage import checkpoints
from anisodiff.storage.files import atomic


def make(table: Path, settings: dict[str, Any], output: Path) -> None:
    """Draw every figure into a folder.

    Args:
        table: `table.csv`.
        settings: what to show: dataset, sigma_max, methods, paths, warps, strips, grid_nfe, reference, samples,
            geometry, convergence, published.
        output: folder.
    """
    mpl.use("Agg")
    tidy = tables.read(table)
    paths = {name: checkpoints.load_path(file)[0] for name, file in settings["paths"].items()}
    warps = {
        name: (checkpoints.load_warp(file, paths[path])[0], path)
        for name, (file, path) in settings["warps"].items()
        if path in paths
    }
    published = published_values(settings["dataset"], **settings["published"])
    figures: dict[str, Callable[[], Figure]] = {
        "distance-against-nfe": lambda: distance_against_nfe(tidy, settings["methods"], published),
        "learned-levels": lambda: learned_levels(paths, warps, settings["sigma_max"]),
        "log-ratio": lambda: log_ratio(paths, warps, settings["sigma_max"]),
        "dct-bases": lambda: dct_bases(32),
        "samples": lambda: samples(settings),
    }
    if settings["strips"]:
        figures["denoising-strips"] = lambda: denoising_strips(settings["strips"])
    if settings["geometry"]:
        figures |= geometry_figures.figures(settings["geometry"])
    if settings["convergence"]:
        figures["convergence"] = lambda: geometry_figures.convergence(settings["convergence"])
    with mpl.rc_context(STYLE):
        for name, draw in figures.items():
            figure = draw()
            figure.suptitle(FIGURES[name].title.format(dataset=settings["dataset"]), fontsize=10)
            for kind in ("svg", "png"):
                with atomic(output / f"{name}.{kind}") as temporary:
                    figure.savefig(temporary, metadata={"Date": None} if kind == "svg" else {"Software": None})
            plt.close(figure)


LINES = 10  # a panel, at most


def published_values(dataset: str, file: str, methods: list[str]) -> pd.DataFrame:
    """Values that others published for a dataset.

    Args:
        dataset: its name.
        file: CSV of dataset, network, method, nfe, fid, images, source.
        methods: by name.

    Raises:
        StageError: nothing is known of a method.
    """
    if not methods:
        return pd.DataFrame(columns=["network", "method", "nfe", "fid"])
    rows = tables.read(file)
    rows = rows[rows["dataset"] == dataset]
    if unknown := sorted(set(methods) - set(rows["method"])):
        known = ", ".join(sorted(set(rows["method"]))) or "nothing"
        raise StageError(f"plots.published: {unknown[0]!r} has no values for {dataset} in {file}; it has {known}")
    return rows[rows["method"].isin(methods)].sort_values("nfe")


def distance_against_nfe(tidy: pd.DataFrame, methods: list[str], published: pd.DataFrame) -> Figure:
    """Paper, Figure 2. Bars are one standard deviation over seed ranges, where there are several.

    Many methods are shared out to panels; the grey line in each is the best of all. Published values are grey, too.

    Args:
        tidy: `table.csv`.
        methods: in order.
        published: from `published_values`.
    """
    panels = -(-len(methods) // LINES)
    size = -(-len(methods) // panels)
    figure, all_axes = plt.subplots(
        panels, figsize=(7.2, 4.2 if panels == 1 else 3.1 * panels), sharex=True, sharey=True, squeeze=False
    )
    budgets = sorted({*tidy["nfe"], *published["nfe"]})
    best = tidy.groupby("nfe")["mean"].min()
    for index, axes in enumerate(all_axes[:, 0]):
        if panels > 1:
            axes.plot(best.index, best, color="0.75", linewidth=5, label="best of all", zorder=0)
        for (method, network), rows in published.groupby(["method", "network"], sort=False):
            mark = MARKERS[published["method"].unique().tolist().index(method) % len(MARKERS)]
            label = f"{method}, published\n({network})"
            axes.plot(
                rows["nfe"], rows["fid"], color="0.6", marker=mark, markersize=4, label=label, zorder=1, linewidth=1
            )
        shown = methods[index * size : (index + 1) * size]
        for method, style in zip(shown, styles(len(shown)), strict=True):
            rows = tidy[tidy["method"] == method].sort_values("nfe")
            axes.errorbar(
                rows["nfe"], rows["mean"], rows["std"].fillna(0), label=method, markersize=4, linewidth=1.2, capsize=2,
                **style,
            )  # fmt: skip
        axes.set_xscale("log")
        axes.xaxis.set_minor_locator(mpl.ticker.NullLocator())
        distance_axis(axes, tidy["features"].iloc[0])
        axes.set_xticks(budgets, _apart(budgets))
        legend_beside(axes)
    axes.set_xlabel("NFE (denoiser evaluations an image)")
    all_axes[0, 0].set_title(f"{tidy['images'].min()} images a seed range; lower is better", fontsize=9)
    return figure


def _apart(budgets: list[int], ratio: float = 1.11) -> list[str]:
    """Labels of logarithmic ticks, without those that would touch the one before."""
    labels, last = [], 0.0
    for nfe in budgets:
        labels.append(str(nfe) if nfe >= last * ratio else "")
        last = nfe if labels[-1] else last
    return labels


def _curves(
    paths: dict[str, NoisePath], warps: dict[str, tuple[Warp, str]], points: int = 800
) -> list[tuple[str, Tensor, Tensor]]:
    """Name, times in [0, 1] and variances `[points, L, J]` of every path and warped path; L classes, or one for all."""
    t = torch.linspace(0, 1, points, dtype=torch.float64)
    with torch.no_grad():
        curves = [(name, t, path.table(t).square()) for name, path in paths.items()]
        curves += [
            (f"{name} (warped)", t, paths[path].table(warp(t)[0]).square()) for name, (warp, path) in warps.items()
        ]
    return curves


def _middle(g: Tensor) -> Tensor:
    """Geometric mean over the classes, `[points, L]` -> `[points]`."""
    return g.log().mean(1).exp()


def _band(axes: Axes, x: Tensor, values: Tensor, style: dict[str, Any]) -> None:
    """The range over classes of `[points, L]`, behind their mean."""
    if values.shape[1] > 1:
        low, high = values.min(1).values, values.max(1).values
        axes.fill_between(x, low, high, color=style["color"], alpha=0.2, linewidth=0)


def learned_levels(paths: dict[str, NoisePath], warps: dict[str, tuple[Warp, str]], sigma_max: float) -> Figure:
    """Paper, Figure 3: standard deviation of the noise in each subspace over time."""
    figure, axes = plt.subplots(figsize=(7.2, 4.2))
    curves = _curves(paths, warps)
    for (name, t, g), style in zip(curves, styles(len(curves)), strict=True):
        for j in range(g.shape[2]):
            label = name if g.shape[2] == 1 else f"{name}, subspace {j + 1}"
            dash = {"linestyle": DASHES[j % len(DASHES)]}
            every = {"markevery": (40 + 60 * j, 160), "markersize": 4}
            _band(axes, t * sigma_max**2, g[..., j].sqrt(), style)
            axes.plot(t * sigma_max**2, _middle(g[..., j]).sqrt(), label=label, linewidth=1.2, **(style | dash | every))
    axes.set_yscale("log")
    axes.set_xlabel("time t (variance units, 0 to T)")
    axes.set_ylabel("noise level $\\sigma_j(t) = g_j(t)^{1/2}$ (pixel values)")
    legend_beside(axes)
    return figure


def log_ratio(paths: dict[str, NoisePath], warps: dict[str, tuple[Warp, str]], sigma_max: float) -> Figure:
    """Paper, Figure 4: log g_1/g_j, below zero where the lowest frequencies are less noisy than the others."""
    figure, axes = plt.subplots(figsize=(7.2, 3.6))
    curves = [(name, t, g) for name, t, g in _curves(paths, warps) if g.shape[2] > 1]
    for (name, t, g), style in zip(curves, styles(len(curves)), strict=True):
        for j in range(1, g.shape[2]):
            dash = {"linestyle": DASHES[(j - 1) % len(DASHES)], "marker": None}
            ratio = (g[..., 0] / g[..., j]).log()
            _band(axes, t * sigma_max**2, ratio, style)
            axes.plot(t * sigma_max**2, ratio.mean(1), label=f"{name}: $g_1/g_{j + 1}$", **(style | dash))
    axes.axhline(0, color="0.4", linewidth=0.8)
    axes.set_xlabel("time t (variance units, 0 to T)")
    axes.set_ylabel("log ratio of variances (nats)")
    if curves:
        legend_beside(axes)
    else:
        axes.set_title("no method has an anisotropic path", fontsize=9)
    return figure


def dct_bases(size: int) -> Figure:
    """Paper, Figure 5: the first nine two-dimensional DCT modes by increasing frequency."""
    modes = dct_matrix(size)
    chosen = sorted(itertools.product(range(size), repeat=2), key=lambda pq: (pq[0] ** 2 + pq[1] ** 2, pq))[:9]
    figure, all_axes = plt.subplots(1, 9, figsize=(7.2, 1.15))
    for axes, (p, q) in zip(all_axes, chosen, strict=True):
        show(axes, torch.outer(modes[p], modes[q])[None], limits=None, title=f"({p}, {q})", framed=True)
    return figure


def denoising_strips(strips: dict[str, str]) -> Figure:
    """Paper, Figure 1: denoised estimates at every node from T to 0, and the schedule beside them."""
    shown = 3  # images
    figure, all_axes = plt.subplots(
        len(strips), 2, figsize=(7.2, 2.6 * len(strips)), width_ratios=(1.9, 1), squeeze=False
    )
    for (strip_axes, schedule_axes), (name, file) in zip(all_axes, strips.items(), strict=True):
        tensors, _ = checkpoints.read(file)
        denoised, levels = tensors["denoised"][:, :shown], tensors["levels"]
        nodes = len(denoised)
        show(strip_axes, tiled(denoised.transpose(0, 1).flatten(0, 1), nodes))
        width = denoised.shape[-1] + 1
        for k, level in enumerate(levels):
            text = "\n".join(f"{sigma:.2g}" for sigma in level) if level.max() > 0 else "0"
            strip_axes.text((k + 0.45) * width, -0.1 * width, text, ha="center", va="bottom", fontsize=7)
        strip_axes.set_title(f"{name}: estimates of $x_0$ at levels $\\sigma_j$", fontsize=9, pad=24)
        for j, style in enumerate(styles(levels.shape[1])):
            label = f"subspace {j + 1}" if levels.shape[1] > 1 else "all frequencies"
            look = style | {"linestyle": DASHES[j % len(DASHES)], "markersize": 7 - 3 * j, "linewidth": 2 - j}
            schedule_axes.plot(range(nodes - 1), levels[:-1, j], label=label, **look)
        schedule_axes.set_yscale("log")
        schedule_axes.set_xlabel("node (0 is t = T)")
        schedule_axes.set_ylabel("noise level $\\sigma_j$ (pixel values)")
        schedule_axes.legend(loc="lower left", fontsize=8)
    return figure


def samples(settings: dict[str, Any]) -> Figure:
    """Images of seeds 0, 1, 2, ... under every method, at one budget, beside images of the data."""
    nfe, folder = settings["grid_nfe"], Path(settings["samples"])
    panels = {"data": Path(settings["reference"])}
    for method in settings["methods"]:
        if firsts := list((folder / method / f"nfe{nfe}").glob("0-*.safetensors")):
            panels[f"{method}, NFE {nfe}"] = min(firsts)
    columns = 4
    rows = int(np.ceil(len(panels) / columns))
    figure, all_axes = plt.subplots(rows, columns, figsize=(7.2, 1.95 * rows), squeeze=False)
    for axes in all_axes.flat:
        axes.set_axis_off()
    for axes, (title, file) in zip(all_axes.flat, panels.items(), strict=False):
        preview = checkpoints.read(file)[0]["preview"]
        side = min(8, int(len(preview) ** 0.5))
        show(axes, tiled(preview[: side**2], side), limits=(0.0, 255.0), title=title)
    return figure
