"""Figures of the shape of trajectories (arXiv:2506.10177), one row a network over a path.

Sampling goes from left to right: levels fall along the axis.
"""

from collections.abc import Callable

import numpy as np
import torch
from matplotlib import colors, ticker
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from anisodiff.metrics.geometry import DENOISERS
from anisodiff.report.drawing import COLOURS, DASHES, MARKERS, Look, distance_axis, legend_beside, show, styles, tiled
from anisodiff.report.plain_tables import read
from anisodiff.storage import checkpoints

KINDS = dict(zip(DENOISERS, ("#0072B2", "#D55E00", "#009E73", "#CC79A7"), strict=True))
NAMES = dict(zip(DENOISERS, ("network", "optimal (kernel)", "Gaussian", "Gaussian a class"), strict=True))
STRIPS = (
    "$x$, network's trajectory",
    "$D(x)$, network",
    "$D^*(x)$, optimum",
    "$x^*$, optimum's trajectory",
    "$D^*(x^*)$, optimum",
    "$D(x^*)$, network",
)
LEVEL = "mean noise level $\\bar\\sigma$ (pixel values)"
NARROW_LEVEL = LEVEL.replace(" (", "\n(")
Entries = dict[str, dict[str, Tensor]]


def figures(files: dict[str, str]) -> dict[str, Callable[[], Figure]]:
    """Name and drawing of every figure.

    Args:
        files: of the stage `geometry`, by name.
    """
    entries = {name: checkpoints.read(file)[0] for name, file in files.items()}
    found: dict[str, Callable[[], Figure]] = {
        "geometry-deviation": lambda: deviation(entries),
        "geometry-projections": lambda: projections(entries),
        "geometry-shapes": lambda: shapes(entries),
        "geometry-bending": lambda: bending(entries),
        "geometry-noise": lambda: noise(entries),
    }
    kernel = {name: tensors for name, tensors in entries.items() if "strips" in tensors}
    gaussian = {
        name: tensors
        for name, tensors in entries.items()
        if "gaussian.residual" in tensors and tensors["levels"].shape[1] == 1
    }
    if kernel:
        found |= {"geometry-optimum": lambda: optimum(kernel), "geometry-pictures": lambda: pictures(kernel)}
    if gaussian:
        found["geometry-gaussian"] = lambda: gaussian_residuals(gaussian)
    return found


def _kinds(tensors: dict[str, Tensor]) -> list[str]:
    return [kind for kind in KINDS if f"{kind}.deviation" in tensors]


def _rows(entries: Entries, columns: int, height: float = 2.1) -> tuple[Figure, np.ndarray]:
    return plt.subplots(
        len(entries), columns, figsize=(7.2, max(2.6, height * len(entries))), squeeze=False, sharex="col"
    )


def _falling(axes: Axes) -> None:
    axes.set_xscale("log")
    axes.invert_xaxis()


def _spread(axes: Axes, x: Tensor, values: Tensor, kind: str, label: str) -> None:
    """Median of `[N, B]` over trajectories, and where the middle 80 % of them are."""
    low, middle, high = np.nanquantile(values.numpy(), [0.1, 0.5, 0.9], axis=1)
    axes.plot(x, middle, color=KINDS[kind], linewidth=1.3, label=label, linestyle=DASHES[list(KINDS).index(kind)])
    axes.fill_between(x, low, high, color=KINDS[kind], alpha=0.15, linewidth=0)


def _legend(figure: Figure, column: np.ndarray) -> None:
    """One for the whole figure, of the lines that any axes of a column have; below, since the title is above."""
    named = {label: line for axes in column for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(named.values(), named.keys(), loc="outside lower center", ncols=4, fontsize=8)


def _finish(figure: Figure, all_axes: np.ndarray, entries: Entries, below: list[str], column: int = 0) -> None:
    for name, row in zip(entries, all_axes, strict=True):
        row[0].set_title(name, fontsize=9, loc="left")
    for axes, label in zip(all_axes[-1], below, strict=True):
        axes.set_xlabel(label)
    _legend(figure, all_axes[:, column])


def deviation(entries: Entries) -> Figure:
    """Figures 3, 10 and 16: distance from the chord between the ends, and to the last point.

    Between them the residual: without the curve that the path alone would make.
    """
    figure, all_axes = _rows(entries, 3)
    for tensors, (left, middle, right) in zip(entries.values(), all_axes, strict=True):
        for kind in _kinds(tensors):
            _spread(left, tensors["means"], tensors[f"{kind}.deviation"], kind, NAMES[kind])
            _spread(middle, tensors["means"], tensors[f"{kind}.residual_deviation"], kind, NAMES[kind])
            _spread(right, tensors["means"], tensors[f"{kind}.to_end"], kind, NAMES[kind])
        right.set_yscale("log")
        left.set_ylabel("deviation\n(pixel values)")
        middle.set_ylabel("residual\n(pixel values)")
        middle.sharey(left)
        right.set_ylabel("distance to the end\n(pixel values)")
    for axes in all_axes[0]:
        _falling(axes)
    _finish(figure, all_axes, entries, [NARROW_LEVEL] * 3)
    return figure


def projections(entries: Entries) -> Figure:
    """Figure 4: what is left when trajectories are projected, and what each direction explains."""
    figure, all_axes = _rows(entries, 2)
    for tensors, (left, right) in zip(entries.values(), all_axes, strict=True):
        error = tensors["network.error"].mean(1)
        for k in range(error.shape[1]):
            label = "chord alone" if k == 0 else f"chord + {k}"
            left.plot(tensors["means"], error[:, k], color=COLOURS[k], linestyle=DASHES[k % 4], label=label)
        left.set_ylabel("projection error\n(pixel values)")
        kinds = _kinds(tensors)
        for i, kind in enumerate(kinds):
            shares = 100 * tensors[f"{kind}.explained"]
            places = np.arange(shares.shape[1]) + (i - (len(kinds) - 1) / 2) * 0.6 / len(kinds)
            right.errorbar(
                places + 1, shares.mean(0), shares.std(0), color=KINDS[kind], label=NAMES[kind], marker=MARKERS[i],
                markersize=4, linestyle="none", capsize=2,
            )  # fmt: skip
        right.axhline(100, color="0.4", linewidth=0.8)
        right.set_ylabel("explained (%)")
    _falling(all_axes[0, 0])
    all_axes[0, 0].legend(loc="upper right", fontsize=7)
    _finish(figure, all_axes, entries, [LEVEL, "directions beside the chord"], column=1)
    return figure


def shapes(entries: Entries) -> Figure:
    """Figures 5 and 10: trajectories in three dimensions, turned about their chords onto one another."""
    kinds = [kind for kind in KINDS if any(kind in _kinds(tensors) for tensors in entries.values())]
    figure = plt.figure(figsize=(2.4 * max(3, len(kinds)), 2.5 * len(entries)), layout="constrained")
    for row, (name, tensors) in enumerate(entries.items()):
        for column, kind in enumerate(kinds):
            if kind not in _kinds(tensors):
                continue
            axes = figure.add_subplot(len(entries), len(kinds), row * len(kinds) + column + 1, projection="3d")
            for curve in tensors[f"{kind}.curve"].transpose(0, 1):
                axes.plot(*curve.T, color=KINDS[kind], linewidth=0.5, alpha=0.6)
            axes.set_title(f"{name}: {NAMES[kind]}", fontsize=8, y=0.98)
            axes.tick_params(labelsize=5, pad=-3)
            for axis in (axes.xaxis, axes.yaxis, axes.zaxis):
                axis.set_major_locator(ticker.MaxNLocator(3))
            axes.set_xlabel("along the chord", fontsize=6, labelpad=-8)
            axes.set_ylabel("first", fontsize=6, labelpad=-9)
            axes.set_zlabel("second", fontsize=6, labelpad=-10)
            axes.invert_xaxis()
            axes.set_box_aspect((1.6, 1, 1), zoom=0.9)  # pyright: ignore[reportArgumentType] - has no stubs, and 1 there
    words = "pixel values along the chord and in the first two directions; trajectories are turned about their chords"
    figure.text(0.5, 0.005, words, ha="center", fontsize=8)
    # the layout does not see the labels of three dimensions
    figure.set_layout_engine("constrained", rect=(0.0, 0.03, 0.97, 0.97))
    return figure


def bending(entries: Entries) -> Figure:
    """Figures 6 and 9: curvature, how fast the curve turns, and torsion where that is a twentieth of its fastest."""
    figure, all_axes = _rows(entries, 3)
    for tensors, (left, middle, right) in zip(entries.values(), all_axes, strict=True):
        means = tensors["fine_means"].double()
        for kind in _kinds(tensors):
            curvature, torsion = tensors[f"{kind}.curvature"].double(), tensors[f"{kind}.torsion"].double()
            turning = torch.rad2deg(curvature[1:] * tensors[f"{kind}.arc"].double().diff(dim=0))
            turning = turning / -means.log().diff()[:, None]
            _spread(left, means, curvature, kind, NAMES[kind])
            _spread(middle, means[1:], turning, kind, NAMES[kind])
            turns = turning.median(1).values
            clear = torch.cat([torch.tensor([False]), turns > 0.05 * turns.max()])
            _spread(right, means[clear], torsion.abs()[clear], kind, NAMES[kind])
        for axes, label in ((left, "curvature\n(1 / pixel value)"), (right, "|torsion|\n(1 / pixel value)")):
            axes.set_yscale("log")
            axes.set_ylabel(label)
        left.set_ylim(bottom=1e-9)
        right.set_ylim(bottom=1e-5)
        middle.set_ylabel("turning (degrees\nan e-fold of noise)")
    for axes in all_axes[0]:
        _falling(axes)
    _finish(figure, all_axes, entries, [NARROW_LEVEL] * 3)
    return figure


def noise(entries: Entries) -> Figure:
    """Figure 12: size of the noise prediction; that of noise is 1."""
    figure, all_axes = plt.subplots(1, len(entries), figsize=(7.2, 2.6), squeeze=False, sharey=True)
    for axes, (name, tensors) in zip(all_axes[0], entries.items(), strict=True):
        for kind in _kinds(tensors):
            _spread(axes, tensors["means"][:-1], tensors[f"{kind}.norm"], kind, NAMES[kind])
        axes.axhline(1, color="0.4", linewidth=0.8)
        _falling(axes)
        axes.set_title(name, fontsize=9, loc="left")
        axes.set_xlabel(NARROW_LEVEL)
    all_axes[0, 0].set_ylabel("$\\|\\hat\\epsilon\\| / \\sqrt{d}$ (1 is noise)")
    _legend(figure, all_axes[0])
    return figure


def optimum(entries: Entries) -> Figure:
    """Figures 9 and 22: how the optimum settles on one image, and how far the network is from it."""
    figure, all_axes = _rows(entries, 3, 2.2)
    for row, (tensors, (left, middle, right)) in enumerate(zip(entries.values(), all_axes, strict=True)):
        means = tensors["means"][:-1]
        entropy = tensors["entropy.optimal"]
        _spread(left, means, entropy, "kernel", "along the optimum's trajectory")
        _spread(left, means, tensors["entropy.sampled"], "network", "along the network's trajectory")
        left.set_ylabel("entropy of the weights\n(nats)")
        weights = tensors["weights"].T
        for weight, style in zip(weights, styles(len(weights)), strict=True):
            middle.plot(means, weight + 1e-10, **style | {"marker": "None"}, linewidth=1)
        middle.set_yscale("log")
        middle.set_ylabel("weights of eight images\n(one trajectory)")
        for kind, along in (("kernel", "optimal"), ("network", "sampled")):
            _spread(right, means, tensors[f"score_deviation.{along}"], kind, "")
        right.set_ylabel("$\\|D - D^*\\|$ (pixel values)")
        rate = (-entropy.mean(1).diff() / means.log().diff().abs()).clamp(min=0)
        beside = left.twinx()
        beside.plot((means[1:] * means[:-1]).sqrt(), rate, color="0.5", linewidth=0.9, linestyle=":")
        beside.grid(False)
        beside.tick_params(labelsize=6, colors="0.4")
        if row == 0:
            beside.set_title("dotted: loss per unit of $\\ln\\bar\\sigma$", fontsize=6, loc="right", color="0.4")
    for axes in all_axes[0]:
        _falling(axes)
    _finish(figure, all_axes, entries, [NARROW_LEVEL] * 3)
    return figure


def pictures(entries: Entries) -> Figure:
    """Figure 21: one trajectory of the network and one of the optimum from the same noise, and the images nearest."""
    name, tensors = next(iter(entries.items()))
    strips, ends, neighbours = tensors["strips"], tensors["ends"], tensors["neighbours"]
    figure, all_axes = plt.subplots(len(strips) + 2, 1, figsize=(7.2, 0.82 * (len(strips) + 2)))
    for axes, title, row in zip(all_axes, STRIPS, strips, strict=False):
        show(axes, tiled(row, len(row)))
        axes.set_ylabel(title, rotation=0, ha="right", va="center", fontsize=8)
    levels = tensors["means"][tensors["strip_nodes"].to(torch.int64)]
    for k, level in enumerate(levels):
        all_axes[0].text((k + 0.45) * (strips.shape[-1] + 1), -1.2, f"{level:.2g}", ha="center", fontsize=7)
    for axes, end, near, whose in zip(all_axes[-2:], ends, neighbours, ("network", "optimum"), strict=True):
        show(axes, tiled(torch.cat([end[None], near]), 1 + len(near)))
        axes.set_ylabel(f"end of the {whose}'s,\nnearest images", rotation=0, ha="right", va="center", fontsize=8)
    all_axes[0].set_title(f"{name}: pictures at mean levels $\\bar\\sigma$", fontsize=9, pad=14)
    return figure


def gaussian_residuals(entries: Entries) -> Figure:
    """Figures 13 to 15, Proposition 4: which directions leave the chord, when, and how much of it is deviation."""
    name, tensors = next(iter(entries.items()))
    variances, means = tensors["gaussian.variances"].double(), tensors["means"].double()
    kept = variances > 1e-6 * variances.max()
    variances, projections_ = variances[kept], tensors["gaussian.projections"].double()[kept]
    total = variances + means[0] ** 2
    ends = (variances / total).sqrt()
    phi = ((variances + means[:, None] ** 2) / total).sqrt() - ends - means[:, None] / means[0] * (1 - ends)
    figure, all_axes = plt.subplots(1, 3, figsize=(7.2, 3.0), width_ratios=(1, 1, 1.1))
    index = np.arange(1, len(variances) + 1)
    for axes, values, title in (
        (all_axes[0], phi.square(), "$\\varphi_k^2$"),
        (all_axes[1], (phi * projections_).square(), "$\\varphi_k^2 (u_k^T (x_T - \\mu))^2$"),
    ):
        norm = colors.LogNorm(float(values.max()) * 1e-4, float(values.max()))
        mesh = axes.pcolormesh(means, index, values.T.clamp(min=norm.vmin), norm=norm, cmap="cividis", rasterized=True)
        figure.colorbar(mesh, ax=axes, location="top", shrink=0.9).ax.tick_params(labelsize=6)
        axes.set_title(title, fontsize=8, pad=22)
        axes.set_ylabel("principal direction $k$")
        axes.set_yscale("log")
    _spread(all_axes[2], means, tensors["gaussian.deviation"], "gaussian", "deviation")
    _spread(all_axes[2], means, tensors["gaussian.residual"], "kernel", "residual (Proposition 4)")
    all_axes[2].set_ylabel("(pixel values)")
    all_axes[2].legend(fontsize=7, loc="upper left")
    all_axes[2].set_ylim(top=1.6 * float(tensors["gaussian.residual"].max()))
    all_axes[2].set_title(f"{name}: Gaussian data", fontsize=8)
    for axes in all_axes:
        _falling(axes)
        axes.set_xlabel(NARROW_LEVEL)
    return figure


def convergence(files: dict[str, str], look: dict[str, Look]) -> Figure:
    """Figures 8 and 11: distance of states and of denoised estimates; these are what a jump from the node returns.

    Args:
        files: method -> CSV of the stage `convergence`.
        look: of methods, from `looks`.
    """
    tables = {name: read(file) for name, file in files.items()}
    *_, last = tables.values()
    figure, both = plt.subplots(1, 2, figsize=(8.6, 3.6), sharex=True, sharey=True)
    for axes, kind, title in zip(both, ("state", "denoised"), ("states", "denoised estimates"), strict=True):
        for name, rows in tables.items():
            mine = rows[(rows["kind"] == kind) & (rows["evaluations"] > 0)]
            axes.plot(mine["evaluations"], mine["distance"], label=name, markersize=4, linewidth=1.2, **look[name])
        distance_axis(axes, last["features"].iloc[0])
        axes.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
        axes.set_title(title, fontsize=9, loc="left")
        axes.label_outer()
    figure.supxlabel(
        f"denoiser evaluations an image, of which the jump's is one ({last['images'].iloc[0]} images; lower is better)",
        fontsize=9,
    )
    legend_beside(both[1])
    return figure
