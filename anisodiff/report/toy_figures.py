"""Figures of the toy (arXiv:2206.10365, Figures 1, 5 and 7), in the x-z plane, one colour a row in all of them."""

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from torch import Tensor

from anisodiff.exact.flexible_process import FlexibleProcess, critically_damped
from anisodiff.report.drawing import COLOURS, FURTHER_COLOURS, legend_beside, save
from anisodiff.report.toy_table import Files, header
from anisodiff.storage import checkpoints
from anisodiff.storage.files import Metadata

COLUMNS = 4  # panels side by side
PLANE = "0.82"
EXACT = "0.5"  # of the flow in closed form beside a learned one
FRICTIONS = {1.0: ("#44AA99", "--"), 2.0: ("#661100", "-"), 4.0: ("#999933", "-.")}  # in no row's colour
Entry = tuple[dict[str, Tensor], Metadata]  # of the first seed
Draw = Callable[[Axes, Entry, str], None]


def make(files: Files, output: Path) -> None:
    """Draw every figure into a folder, of the first seed of each row.

    Args:
        files: files of the stage `toy`, by plane and row.
        output: folder.
    """
    mpl.use("Agg")
    entries = {
        plane: {row: (checkpoints.read(found[0])[0], header(found[0])) for row, found in rows.items()}
        for plane, rows in files.items()
    }
    figures: dict[str, Callable[[], Figure]] = {
        "toy-forward": lambda: forward(entries),
        "toy-velocities": lambda: velocities(entries),
        "toy-trajectories": lambda: trajectories(entries),
        "toy-damped": damped,
    }
    save(figures, "FP-Diffusion's toy", output)


def colours(rows: Sequence[str]) -> dict[str, str]:
    """The colour of each row, in the order of the table."""
    return dict(zip(rows, itertools.cycle(dict.fromkeys([*COLOURS, *FURTHER_COLOURS])), strict=False))


def _panels(entries: dict[str, dict[str, Entry]], draw: Draw, legend: list[Line2D]) -> Figure:
    """A panel a row, planes below one another."""
    lines = [-(-len(rows) // COLUMNS) for rows in entries.values()]
    figure, grid = plt.subplots(
        sum(lines), COLUMNS, figsize=(7.4, 1.95 * sum(lines)), squeeze=False, sharex=True, sharey=True
    )
    for first, count, (plane, rows) in zip(itertools.accumulate([0, *lines]), lines, entries.items(), strict=False):
        panels, colour = grid[first : first + count].flatten(), colours(list(rows))
        for axes in panels[len(rows) :]:
            axes.set_visible(False)
        for axes, (row, entry) in zip(panels, rows.items(), strict=False):
            draw(axes, entry, colour[row])
            axes.set_title(f"{plane}: {row}", fontsize=8, loc="left", color=colour[row])
            axes.set_aspect("equal")
            axes.label_outer()
    for axes in grid[-1]:
        axes.set_xlabel("x")
    for axes in grid[:, 0]:
        axes.set_ylabel("z")
    figure.legend(handles=legend, loc="outside lower center", ncols=len(legend), fontsize=8)
    return figure


def _plane(axes: Axes, metadata: Metadata) -> None:
    """The plane, where it cuts the axes' own."""
    about = metadata["settings"]["plane"]
    normal = np.array([np.sin(about["tilt"]), np.cos(about["tilt"])])
    axes.axline(tuple(about["distance"] * normal), slope=-normal[0] / normal[1], color=PLANE, linewidth=3, zorder=0)


PLANE_LINE = Line2D([], [], color=PLANE, linewidth=3, label="the data's plane")


def _curves(name: str, linewidth: float, noise: int) -> Draw:
    """A drawing of the curves of this name; the mark at their end in the noise, first (0) or last (-1), is hollow."""

    def draw(axes: Axes, entry: Entry, colour: str) -> None:
        tensors, metadata = entry
        _plane(axes, metadata)
        for curve in tensors[name].unbind(1):
            axes.plot(curve[:, 0], curve[:, 2], color=colour, linewidth=linewidth)
            for end in (0, -1):
                fill = "white" if end == noise else colour
                axes.plot(*curve[end, [0, 2]], "o", color=colour, markersize=4, markerfacecolor=fill)

    return draw


def forward(entries: dict[str, dict[str, Entry]]) -> Figure:
    """Figure 1: forward trajectories from the data to noise; the same noise in all panels."""
    legend = [PLANE_LINE, _mark("start, t = 0", "k"), _mark("t = 0.5", "white")]
    return _panels(entries, _curves("forward", 0.7, noise=-1), legend)


def _mark(label: str, fill: str) -> Line2D:
    look = {"marker": "o", "linestyle": "none", "markerfacecolor": fill, "markersize": 4}
    return Line2D([], [], color="k", label=label, **look)


def velocities(entries: dict[str, dict[str, Entry]]) -> Figure:
    """Figure 5: velocities of the flow back to the data, learned and exact, in the section y = 0."""

    def draw(axes: Axes, entry: Entry, colour: str) -> None:
        tensors, metadata = entry
        _plane(axes, metadata)
        places = tensors["places"]
        for name, of, width in (("exact_velocity", EXACT, 0.012), ("velocity", colour, 0.006)):
            back = -tensors[name]
            axes.quiver(*places.T, back[:, 0], back[:, 2], color=of, width=width, angles="xy", scale=70, headwidth=4)

    exact = Line2D([], [], color=EXACT, linewidth=3, label="exact flow of the same process")
    return _panels(entries, draw, [PLANE_LINE, exact, Line2D([], [], color="k", linewidth=1.2, label="learned")])


def trajectories(entries: dict[str, dict[str, Entry]]) -> Figure:
    """Figure 7: four sampling trajectories, from noise of the same seeds."""
    legend = [PLANE_LINE, _mark("noise, t = 1", "white"), _mark("sample, t = 0", "k")]
    return _panels(entries, _curves("sampling", 1.1, noise=0), legend)


def damped() -> Figure:
    """Langevin dynamics with noise on the velocities alone: mean and covariance on the way to N(0, I), in closed form.

    From a position of 2, the distance of the paper's plane, at rest; beside the fixed process, with noise in both.
    """
    times = torch.linspace(0, 10, 201, dtype=torch.float64)
    unit = torch.eye(2, dtype=torch.float64)
    processes = {"noise on both (VP)": (FlexibleProcess(unit, 0 * unit), EXACT, ":")}
    for friction, look in FRICTIONS.items():
        name = f"friction {friction:g}" + (", critical" if friction == 2 else "")
        processes[name] = (critically_damped(1, friction), *look)
    start = torch.tensor([2, 0], dtype=torch.float64)
    figure, (left, right) = plt.subplots(1, 2, figsize=(7.4, 2.6), sharex=True)
    for name, (process, colour, dash) in processes.items():
        moments = [process.transition(float(beta)) for beta in times]
        mean = [float((phi @ start).norm()) for phi, _ in moments]
        covariance = [float((each - unit).norm()) for _, each in moments]
        for axes, values in ((left, mean), (right, covariance)):
            axes.semilogy(times, values, color=colour, linestyle=dash, label=name, linewidth=1.4)
    left.set(xlabel="time $\\beta$", ylabel="length of the mean")
    right.set(xlabel="time $\\beta$", ylabel="covariance less identity,\nFrobenius norm")
    legend_beside(right, size=8)
    return figure
