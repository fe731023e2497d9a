"""The figures of a dataset, as SVG and PNG: readable in print, axes with units, colour-blind safe."""

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard

import matplotlib as mpl
import numpy as np
import pandas as pd
import torch
from matplotlib import pyplot as plt
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from anisodiff.experiment.settings import FigureSettings
from anisodiff.paths.noise_path import NoisePath, Warp
from anisodiff.paths.rotated import RotatedBasis
from anisodiff.paths.subspaces import dct_matrix
from anisodiff.report import geometry_figures, training_figures
from anisodiff.report.drawing import (
    DASHES,
    MARKERS,
    Look,
    distance_axis,
    legend_beside,
    looks,
    path_colours,
    save,
    show,
    spread,
    standard_errors,
    tiled,
)  # fmt: skip
from anisodiff.report.likelihood_table import bits_columns
from anisodiff.report.plain_tables import read
from anisodiff.report.published import published_values
from anisodiff.storage import checkpoints


def make(table: Path, settings: FigureSettings, output: Path) -> None:
    """Draw every figure into a folder.

    Args:
        table: `table.csv`.
        settings: what to show.
        output: folder.
    """
    mpl.use("Agg")
    tidy = read(table)
    paths = {name: checkpoints.load_path(file)[0] for name, file in settings.paths.items()}
    warps = {
        name: (checkpoints.load_warp(file, paths[path])[0], path)
        for name, (file, path) in settings.warps.items()
        if path in paths
    }
    published = published_values(settings.dataset, settings.published.file, settings.published.methods)
    look = looks(settings.methods)
    figures: dict[str, Callable[[], Figure]] = {
        "distance-against-nfe": lambda: distance_against_nfe(tidy, settings.methods, look, published),
        "learned-levels": lambda: learned_levels(paths, warps, settings.sigma_max),
        "log-ratio": lambda: log_ratio(paths, warps, settings.sigma_max),
        "dct-bases": lambda: dct_bases(32),
        "samples": lambda: samples(settings),
    }
    if turned := {name: path.subspaces for name, path in paths.items() if is_turned(path.subspaces)}:
        figures["learned-bases"] = lambda: learned_bases(turned)
    if bits_columns(tidy):
        figures["bits-against-distance"] = lambda: bits_against_distance(tidy, settings.methods, look, published)
    if settings.ladder:
        figures["ladder"] = lambda: ladder(tidy, settings.ladder, look)
    if settings.strips:
        figures["denoising-strips"] = lambda: denoising_strips(settings.strips, look)
    if settings.geometry:
        figures |= geometry_figures.figures(settings.geometry)
    if settings.trained:
        figures["against-kimg"] = lambda: training_figures.against_kimg(tidy, settings.trained)
    if settings.convergence:
        figures["convergence"] = lambda: geometry_figures.convergence(settings.convergence, look)
    save(figures, settings.dataset, output)


LINES = 5  # a panel, at most
LINE = {"markersize": 6.5, "markeredgewidth": 0.8, "linewidth": 1.2}
NFE = "NFE (denoiser evaluations an image)"
TIME = "time t (variance units, 0 to T)"


def panels_of(methods: Mapping[str, Sequence[str]]) -> list[list[str]]:
    """Methods shared out to panels: those of a path together, and paths together while they are few."""
    by_path: dict[str, list[str]] = {}
    for name, (path, _) in methods.items():
        by_path.setdefault(path, []).append(name)
    panels: list[list[str]] = []
    whole = False  # the last panel holds paths that were not shared out
    for names in by_path.values():
        if whole and len(panels[-1]) + len(names) <= LINES:
            panels[-1] += names
            continue
        count = -(-len(names) // LINES)
        size = -(-len(names) // count)
        panels += [names[k : k + size] for k in range(0, len(names), size)]
        whole = count == 1
    return panels


def distance_against_nfe(
    tidy: pd.DataFrame,
    methods: Mapping[str, Sequence[str]],
    look: dict[str, Look],
    published: pd.DataFrame,
) -> Figure:
    """Paper, Figure 2, in small multiples: the grey band in each panel is the best of all methods at every budget.

    Bars are one standard error, over images and over training seeds where there are several. Published values are grey,
    in panels of their own, the last.

    Args:
        tidy: `table.csv`.
        methods: path and solver of each, in order.
        look: colour, line and marker of each, as `looks` gives them.
        published: rows of `published_values`; those without a budget are left out.
    """
    published = published.dropna(subset="nfe").astype({"nfe": int})
    others = published.groupby(["method", "network"], sort=False)
    panels = panels_of(methods)
    count = len(panels) + -(-others.ngroups // LINES)
    figure, all_axes = _panels(count)
    budgets = tidy[~tidy["on_metric"]].groupby("nfe")["mean"]  # tuned for this distance, a row is never the best
    best = budgets.min()[budgets.size() >= len(methods) / 2]  # of few rows it would say little
    for axes in all_axes.flat[:count] if count > 1 else ():
        axes.plot(best.index, best, color="0.82", linewidth=6, label="best of all", zorder=0)
    for axes, names in zip(all_axes.flat, panels, strict=False):
        for name in names:
            _line(axes, tidy, name, look[name], label=name)
        axes.set_title(_path_title(names, methods), fontsize=9, loc="left")
    for k, ((method, network), values) in enumerate(others):
        axes = all_axes.flat[len(panels) + k // LINES]
        label, style = f"{method}, published\n({network})", {"color": "0.45", "marker": MARKERS[k % LINES]}
        axes.plot(values["nfe"], values["fid"], label=label, markersize=4.5, linewidth=1, linestyle=":", **style)
        axes.set_title("published by others", fontsize=9, loc="left")
    budgets = sorted({*tidy["nfe"], *published["nfe"]})
    for k, axes in enumerate(all_axes.flat[:count]):
        _nfe_axis(axes, budgets, 1.11 if count == 1 else 1.2)
        distance_axis(axes, tidy["features"].iloc[0])
        axes.label_outer()
        legend_beside(axes, size=9 if k < len(panels) else 6)
    _hide(all_axes, count, NFE)
    figure.supxlabel(_images(tidy), fontsize=9)
    return figure


def _panels(count: int) -> tuple[Figure, np.ndarray]:
    """As many panels and no fewer, in two columns on the same axes."""
    columns = min(2, count)
    rows = -(-count // columns)
    size = (7.2, 4.2) if count == 1 else (10.5, 0.4 + 2.7 * rows)
    return plt.subplots(rows, columns, figsize=size, sharex=True, sharey=True, squeeze=False)


def _hide(all_axes: np.ndarray, count: int, label: str) -> None:
    """Hide the panels after these; those above them get their numbers and this label."""
    for empty in range(count, all_axes.size):
        all_axes.flat[empty].set_visible(False)
        above = all_axes.flat[empty - len(all_axes[0])]
        above.tick_params(labelbottom=True)
        above.set_xlabel(label)


def _path_title(names: list[str], methods: Mapping[str, Sequence[str]]) -> str:
    paths = list(dict.fromkeys(methods[name][0] for name in names))
    return f"path{'s' * (len(paths) > 1)} {', '.join(paths)}"


def _images(tidy: pd.DataFrame) -> str:
    return f"{tidy['images'].min()} images a seed range; lower is better"


def ladder(tidy: pd.DataFrame, names: list[str], look: dict[str, Look]) -> Figure:
    """Rows that add one ingredient each, named at the ends of their lines; bars are one standard error.

    Args:
        tidy: `table.csv`.
        names: methods, in order.
        look: colour, line and marker of each, as `looks` gives them.
    """
    figure, axes = plt.subplots(figsize=(7.2, 4.2))
    ends = [_line(axes, tidy, name, look[name]) for name in names]
    _nfe_axis(axes, sorted(set(tidy["nfe"])))
    distance_axis(axes, tidy["features"].iloc[0])
    low, high = np.log(axes.get_ylim())
    places = np.exp(spread([float(np.log(y)) for _, y in ends], 0.055 * (high - low)))
    last = max(nfe for nfe, _ in ends)
    for name, end, place in zip(names, ends, places, strict=True):
        _name_at_end(axes, name, end, float(place), look[name], early=end[0] < last)
    axes.set_title(_images(tidy), fontsize=9)
    return figure


def _name_at_end(axes: Axes, name: str, end: tuple[float, float], place: float, look: Look, early: bool) -> None:
    """Write a name right of the axes, after a piece of its line and led to from where that ends.

    Args:
        axes: with the line.
        name: of the line.
        end: last point of the line.
        place: of the name, on the vertical axis.
        look: of the line.
        early: others go on to the right: they are crossed in a grey that no line has.
    """
    beside = axes.get_yaxis_transform()
    leader = (
        {"color": "0.6", "linewidth": 0.6, "linestyle": ":"} if early else {"color": look["color"], "linewidth": 0.6}
    )
    axes.annotate(
        "", xy=end, xytext=(1.03, place), textcoords=beside, annotation_clip=False,
        arrowprops={"arrowstyle": "-", "shrinkA": 0, "shrinkB": 0, "zorder": 0.5, **leader},
    )  # fmt: skip
    axes.plot([1.03, 1.06, 1.09], [place] * 3, transform=beside, clip_on=False, markevery=[1], **LINE, **look)
    axes.annotate(name, xy=(1.1, place), xycoords=beside, color=look["color"], va="center", annotation_clip=False)


def _line(axes: Axes, tidy: pd.DataFrame, name: str, look: Look, label: str | None = None) -> tuple[float, float]:
    """Draw a method's distances with their spreads; the line's last point."""
    rows = tidy[tidy["method"] == name].sort_values("nfe")
    axes.errorbar(rows["nfe"], rows["mean"], standard_errors(rows), label=label, capsize=2, **LINE, **look)
    return float(rows["nfe"].iloc[-1]), float(rows["mean"].iloc[-1])


def _nfe_axis(axes: Axes, budgets: list[int], ratio: float = 1.11) -> None:
    axes.set_xscale("log")
    axes.xaxis.set_minor_locator(ticker.NullLocator())
    axes.set_xticks(budgets, _apart(budgets, ratio))
    axes.set_xlabel(NFE)


def _apart(budgets: list[int], ratio: float) -> list[str]:
    """Labels of logarithmic ticks, without those that would touch the one before."""
    labels, last = [], 0.0
    for nfe in budgets:
        labels.append(str(nfe) if nfe >= last * ratio else "")
        last = nfe if labels[-1] else last
    return labels


def _styled(
    paths: dict[str, NoisePath], warps: dict[str, tuple[Warp, str]], points: int = 800
) -> list[tuple[str, Tensor, Tensor, Look]]:
    """Name, times in [0, 1], variances `[points, L, J]` and look of every path, and of those that are warped (open
    markers); L classes, or one for all, and J subspaces. Paths with as many of both whose variances differ by 1 % at
    most are one, by the names of all, with the first's look."""
    t = torch.linspace(0, 1, points, dtype=torch.float64)
    colours, mark = path_colours(paths), dict(zip(paths, itertools.cycle(MARKERS), strict=False))
    own = lambda path, fill: {"color": colours[path], "marker": mark[path], "fillstyle": fill}  # noqa: E731
    with torch.no_grad():
        curves = []
        for path, levels in paths.items():
            curves.append((path, t, levels.table(t).square(), own(path, "full")))
            curves += [
                (f"{name} (warped)", t, levels.table(warp(t)[0]).square(), own(path, "none"))
                for name, (warp, warped) in warps.items()
                if warped == path
            ]
    alike: list[list[tuple[str, Tensor, Tensor, Look]]] = []
    for curve in curves:
        same = next((each for each in alike if _is_one_line(each[0][2], curve[2])), [])
        if not same:
            alike.append(same)
        same.append(curve)
    return [(" = ".join(name for name, *_ in each), *each[0][1:]) for each in alike]


def _is_one_line(a: Tensor, b: Tensor) -> bool:
    """Whether variances differ by 1 % at most."""
    return a.shape == b.shape and bool((a / b).log().abs().max() < 0.01)


def _middle(g: Tensor) -> Tensor:
    """Geometric mean over the classes, `[points, L]` -> `[points]`."""
    return g.log().mean(1).exp()


def _band(axes: Axes, x: Tensor, values: Tensor, style: Look) -> None:
    """The range over classes of `[points, L]`, behind their mean."""
    if values.shape[1] > 1:
        low, high = values.min(1).values, values.max(1).values
        axes.fill_between(x, low, high, color=style["color"], alpha=0.2, linewidth=0)


def _drawn(subspaces: int) -> list[int]:
    """Subspaces of a path that are drawn: all, or four from the first to the last."""
    last = min(subspaces, len(DASHES)) - 1
    return [round(k * (subspaces - 1) / max(last, 1)) for k in range(last + 1)]


def learned_levels(paths: dict[str, NoisePath], warps: dict[str, tuple[Warp, str]], sigma_max: float) -> Figure:
    """Paper, Figure 3: standard deviation of the noise in each subspace over time; of many paths in panels, with the
    first of them, where it is isotropic, in grey behind the others."""
    panels: list[list[tuple[str, Tensor, Tensor, Look]]] = []
    lines = LINES
    for curve in _styled(paths, warps):
        count = len(_drawn(curve[2].shape[2]))
        if lines + count > LINES:
            panels.append([])
            lines = 0
        panels[-1].append(curve)
        lines += count
    figure, all_axes = _panels(len(panels))
    for axes, curves in zip(all_axes.flat, panels, strict=False):
        name, t, g, _ = panels[0][0]
        if curves is not panels[0] and g.shape[2] == 1:
            axes.plot(t * sigma_max**2, _middle(g[..., 0]).sqrt(), color="0.82", linewidth=4, label=name, zorder=0)
        for name, t, g, style in curves:
            for k, j in enumerate(_drawn(g.shape[2])):
                label = name if g.shape[2] == 1 else f"{name}, subspace {j + 1}"
                look: Look = style | {"linestyle": DASHES[k], "markevery": (40 + 60 * k, 160), "markersize": 4}
                _band(axes, t * sigma_max**2, g[..., j].sqrt(), style)
                axes.plot(t * sigma_max**2, _middle(g[..., j]).sqrt(), label=label, linewidth=1.2, **look)
        axes.set_yscale("log")
        axes.set_xlabel(TIME)
        axes.set_ylabel("noise level $\\sigma_j(t) = g_j(t)^{1/2}$\n(pixel values)")
        axes.label_outer()
        legend_beside(axes, 9 if len(panels) == 1 else 8)
    _hide(all_axes, len(panels), TIME)
    return figure


def log_ratio(paths: dict[str, NoisePath], warps: dict[str, tuple[Warp, str]], sigma_max: float) -> Figure:
    """Paper, Figure 4: log g_1/g_j, below zero where the lowest frequencies are less noisy than the others."""
    figure, axes = plt.subplots(figsize=(7.2, 3.6))
    curves = [curve for curve in _styled(paths, warps) if curve[2].shape[2] > 1]
    for name, t, g, style in curves:
        for k, j in enumerate(_drawn(g.shape[2])[1:]):
            dash = {"linestyle": DASHES[k], "markevery": (40, 160), "markersize": 4}
            ratio = (g[..., 0] / g[..., j]).log()
            _band(axes, t * sigma_max**2, ratio, style)
            axes.plot(t * sigma_max**2, ratio.mean(1), label=f"{name}: $g_1/g_{{{j + 1}}}$", **(style | dash))
    axes.axhline(0, color="0.4", linewidth=0.8)
    axes.set_xlabel(TIME)
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


def is_turned(subspaces: Any) -> TypeGuard[RotatedBasis]:
    """Whether subspaces are of a learned basis, other than the one it started from."""
    return isinstance(subspaces, RotatedBasis) and bool(subspaces.turn.any())


def learned_bases(bases: Mapping[str, RotatedBasis], count: int = 9) -> Figure:
    """The vectors of learned bases that turned most, most first, each below the one that it started as and drawn to its
    own largest entry; with the angle between the two.

    Args:
        bases: learned bases, by the names of their paths.
        count: vectors of each.
    """
    figure, all_axes = plt.subplots(2 * len(bases), count, figsize=(7.2, 2.1 * len(bases)), squeeze=False)
    for (name, basis), rows in zip(bases.items(), all_axes.reshape(len(bases), 2, count), strict=True):
        with torch.no_grad():
            start, learned = (functools.reduce(torch.kron, f()) for f in (basis.start_matrices, basis.matrices))
        angles = (start * learned).sum(1).clip(-1, 1).acos().rad2deg()
        for place, row in enumerate(angles.argsort(descending=True)[:count].tolist()):
            for axes, vectors in zip(rows[:, place], (start, learned), strict=True):
                show(axes, vectors[row].reshape(basis.index.shape), limits=None, framed=True)
            rows[1, place].set_title(f"{angles[row]:.1f}°", fontsize=8, pad=2)
        rows[0, 0].set_title(" ", fontsize=9)  # the room for what follows, which is wider than its column
        label = f"{name}: {angles.mean():.1f}° on average"
        rows[0, 0].text(0, 1.06, label, transform=rows[0, 0].transAxes, fontsize=9, in_layout=False)
        for axes, label in zip(rows[:, 0], ("start", "learned"), strict=True):
            axes.set_ylabel(label, fontsize=8)
    return figure


ESTIMATES = {
    "bits_per_dim": "along the probability flow",
    "bits_per_dim_bound": "upper bound",
}  # titles of panels, by column of a table


def bits_against_distance(
    tidy: pd.DataFrame, methods: Mapping[str, Sequence[str]], look: dict[str, Look], published: pd.DataFrame
) -> Figure:
    """Bits per dimension of held-out images against the distance of samples; a panel an estimator.

    A point is a method where the likelihood of its network over its path was measured, at the largest budget that most
    of them have, or of its own without that. Upright bars are standard errors over images, level ones over images and
    over training seeds where there are several. Published values are grey.

    Args:
        tidy: `table.csv`, with bits per dimension.
        methods: path and solver of each, in order.
        look: colour and marker of each, as `looks` gives them.
        published: rows of `published_values`; those without both numbers are left out.
    """
    columns = bits_columns(tidy)
    width = 3.3 + 3.4 * len(columns)
    figure, all_axes = plt.subplots(1, len(columns), figsize=(width, 4.2), sharex=True, squeeze=False)
    marks = dict(zip(published["method"].unique(), itertools.cycle(MARKERS), strict=False))
    measured = tidy.dropna(subset=columns, how="all")
    shared = measured["nfe"].value_counts().sort_index(ascending=False).idxmax()
    measured = measured.assign(is_shared=measured["nfe"] == shared).sort_values(["is_shared", "nfe"])
    chosen = measured.groupby("method").tail(1).set_index("method")
    for axes, column in zip(all_axes.flat, columns, strict=True):
        shown = chosen.dropna(subset=column)
        for name in [name for name in methods if name in shown.index]:
            row, style = shown.loc[name], look[name] | {"linestyle": "none"}
            errors = {"xerr": standard_errors(shown.loc[[name]]).to_numpy(), "yerr": row[f"{column}_error"]}
            label = f"{name}, NFE {row['nfe']}"
            axes.errorbar(
                row["mean"], row[column], label=label, capsize=2, elinewidth=1, markersize=6, **errors, **style
            )
        for row in published.dropna(subset=["fid", column]).to_dict("records"):
            label, style = f"{row['method']}, published", {"color": "0.45", "marker": marks[row["method"]]}
            axes.errorbar(row["fid"], row[column], label=label, linestyle="none", markersize=4.5, **style)
        distance_axis(axes, tidy["features"].iloc[0], across=True)
        axes.set_title(ESTIMATES[column], fontsize=9, loc="left")
    all_axes[0, 0].set_ylabel("bits per dimension")
    legend_beside(all_axes[0, -1], size=8, others=list(all_axes[0, :-1]))
    return figure


def denoising_strips(strips: dict[str, str], look: dict[str, Look]) -> Figure:
    """Paper, Figure 1: denoised estimates at every node from T to 0, and the schedule beside them.

    Args:
        strips: method -> trajectory.
        look: from `looks`, of which the path's colour is taken; line, marker and filling say the subspace here.
    """
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
        for j in range(levels.shape[1]):
            label = f"subspace {j + 1}" if levels.shape[1] > 1 else "all frequencies"
            style = {"linestyle": DASHES[j % len(DASHES)], "marker": MARKERS[j % len(MARKERS)]}
            style |= {"markersize": max(7 - 3 * j, 3), "fillstyle": "none" if j == 0 else "full"}
            schedule_axes.plot(range(nodes - 1), levels[:-1, j], label=label, color=look[name]["color"], **style)
        schedule_axes.set_yscale("log")
        schedule_axes.set_xlabel("node (0 is t = T)")
        schedule_axes.set_ylabel("noise level $\\sigma_j$ (pixel values)")
        schedule_axes.legend(loc="lower left", fontsize=8)
    return figure


def samples(settings: FigureSettings) -> Figure:
    """Images of seeds 0, 1, 2, ... under every method, at one budget, beside images of the data."""
    panels = {"data": settings.reference}
    panels |= {f"{method}, NFE {settings.grid_nfe}": cell for method, cell in settings.samples.items()}
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
