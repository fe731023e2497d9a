"""What figures share: looks that can be told apart without colour, legends beside the data, pictures."""

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pandas as pd
import torch
from matplotlib import pyplot as plt
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from anisodiff.metrics.registry import FEATURES
from anisodiff.report.captions import FIGURES
from anisodiff.storage.files import atomic

COLOURS = ["#000000", "#E69F00", "#0072B2", "#009E73", "#D55E00", "#CC79A7", "#56B4E9"]  # Okabe and Ito
DASHES = ["-", "--", "-.", ":"]
MARKERS = "osD^vPX<>*hp"
# colour of a path, the same in every figure: no two of these are of one lightness, for print in grey
PATHS = {"edm": "#000000", "iso": "#E69F00", "ani": "#0072B2", "spectral-iso": "#009E73", "spectral-ani": "#882255"}
FURTHER_COLOURS = (  # of other paths
    "#CC79A7", "#56B4E9", "#D55E00", "#332288", "#999933", "#44AA99", "#661100", "#117733", "#DDCC77", "#AA4499",
)  # fmt: skip
# line and marker of a solver, the same in every figure
Look = dict[str, Any]  # matplotlib's properties of a line
SOLVERS: dict[str, tuple[Any, str]] = {
    "midpoint": ("-", "o"),
    "heun": ("--", "s"),
    "euler": (":", "v"),
    "dpm2": ("-.", "^"),
    "dpmpp": ((0, (6, 1.5)), "D"),
    "exp-ab": ((0, (6, 1.5, 1, 1.5)), "d"),
    "unipc": ((0, (3, 1, 1, 1, 1, 1)), "P"),
    "unipc-bh1": ((0, (3, 2)), "p"),
    "deis": ((0, (2, 1)), "X"),
    "ipndm": ((0, (1, 1)), ">"),
    "ipndm-v": ((0, (4, 1, 1, 1)), "<"),
    "euler-maruyama": ((0, (1, 4)), "x"),
    "tuned": ((0, (8, 2)), "h"),
}
FURTHER_LINES: tuple[tuple[Any, str], ...] = (  # of other solvers
    ((0, (1, 2)), "*"),
    ((0, (8, 2, 2, 2)), "H"),
    ((0, (5, 3)), "1"),
    ((0, (2, 3)), "8"),
)
FILLS: tuple[dict[str, str], ...] = (  # of markers: methods that share path and solver
    {"fillstyle": "full"},
    {"fillstyle": "full", "markerfacecolor": "white"},
    *({"fillstyle": side, "markerfacecoloralt": "white"} for side in ("left", "right", "top", "bottom")),
)
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
    "svg.hashsalt": "anisodiff",
    "savefig.dpi": 200,
}


def save(figures: Mapping[str, Callable[[], Figure]], dataset: str, output: Path) -> None:
    """Draw figures and write each as SVG and PNG, under its title.

    Args:
        figures: name, as `captions` has it, and drawing of each.
        dataset: its name in the titles.
        output: folder.
    """
    with mpl.rc_context(STYLE):
        for name, draw in figures.items():
            figure = draw()
            figure.suptitle(FIGURES[name].title.format(dataset=dataset), fontsize=10)
            for kind in ("svg", "png"):
                with atomic(output / f"{name}.{kind}") as temporary:
                    figure.savefig(temporary, metadata={"Date": None} if kind == "svg" else {"Software": None})
            plt.close(figure)


def styles(count: int) -> list[Look]:
    """Lines told apart by colour, dash and marker together."""
    marks = itertools.islice(itertools.cycle(MARKERS), count)
    return [
        {"color": COLOURS[i % len(COLOURS)], "linestyle": DASHES[(i // len(COLOURS)) % len(DASHES)], "marker": marker}
        for i, marker in enumerate(marks)
    ]


def _others(names: Iterable[str], known: Iterable[str], further: Sequence[Any]) -> dict[str, Any]:
    """What names that are not known get, by their own order: again from the first where there are more of them."""
    return dict(zip(sorted(set(names) - set(known)), itertools.cycle(further), strict=False))


def path_colours(paths: Iterable[str]) -> dict[str, str]:
    """The colour of each path, in every figure.

    Args:
        paths: all of an experiment; those that have no colour of their own get further ones by name.
    """
    return PATHS | _others(paths, PATHS, FURTHER_COLOURS)


def looks(methods: Mapping[str, Sequence[str]]) -> dict[str, Look]:
    """Looks of methods: colour says the path, line and marker the solver, the marker's filling what else differs.

    Args:
        methods: name -> path, solver; all of an experiment, so that a method looks the same in all its figures.
    """
    colours = path_colours(path for path, _ in methods.values())
    lines = SOLVERS | _others((solver for _, solver in methods.values()), SOLVERS, FURTHER_LINES)
    seen: Counter[tuple[str, str]] = Counter()
    found = {}
    for name, (path, solver) in methods.items():
        dash, marker = lines[solver]
        fill = FILLS[seen[path, solver] % len(FILLS)]
        seen[path, solver] += 1
        found[name] = {"color": colours[path], "linestyle": dash, "marker": marker, **fill}
    return found


def spread(values: Sequence[float], gap: float) -> list[float]:
    """Places for labels, as near to their values as they can be with this gap between any two, in the values' order."""
    order = sorted(range(len(values)), key=values.__getitem__)
    blocks: list[list[int]] = []
    middle = lambda block: sum(values[k] for k in block) / len(block)  # noqa: E731
    for k in order:
        blocks.append([k])
        while len(blocks) > 1:
            below, above = blocks[-2:]
            if middle(above) - middle(below) >= gap * (len(above) + len(below)) / 2:
                break
            blocks[-2:] = [below + above]
    places = [0.0] * len(values)
    for block in blocks:
        for k, which in enumerate(block):
            places[which] = middle(block) + gap * (k - (len(block) - 1) / 2)
    return places


def legend_beside(axes: Axes, size: int = 9, others: Sequence[Axes] = ()) -> None:
    """Draw the legend right of the axes, where it covers no data.

    Args:
        axes: that it stands beside, and whose lines it names.
        size: size of its text, in points.
        others: more of them; what several have is named once.
    """
    named = {}
    for each in (*others, axes):
        named |= {label: line for line, label in zip(*each.get_legend_handles_labels(), strict=True)}
    axes.legend(named.values(), named, fontsize=size, loc="upper left", bbox_to_anchor=(1.01, 1.0), borderaxespad=0.0)


def distance_axis(axes: Axes, features: str, across: bool = False) -> None:
    """A logarithmic axis of the Frechet distance of a feature network, labelled in plain numbers.

    Args:
        axes: that have it.
        features: kind of the feature network.
        across: it is the horizontal one.
    """
    axis = axes.xaxis if across else axes.yaxis
    (axes.set_xscale if across else axes.set_yscale)("log")
    axis.set_major_locator(ticker.LogLocator(subs=(1.0, 2.0, 3.0, 5.0)))
    axis.set_major_formatter(ticker.FormatStrFormatter("%g"))
    axis.set_minor_formatter(ticker.NullFormatter())
    axis.set_label_text(FEATURES[features].title.replace(", ", ",\n"))


def standard_errors(rows: pd.DataFrame) -> pd.Series:
    """Standard errors of cells over images and training seeds together; 0 where nothing is known of them."""
    parts = rows.reindex(columns=["error", "seed_error"]).astype(float)
    return parts.fillna(0).pow(2).sum(axis=1).pow(0.5)


def show(
    axes: Axes,
    image: Tensor,
    limits: tuple[float, float] | None = (-1.0, 1.0),
    title: str = "",
    framed: bool = False,
) -> None:
    low, high = limits or (-float(image.abs().max()), float(image.abs().max()))
    picture = ((image - low) / max(high - low, 1e-12)).clip(0, 1).permute(1, 2, 0).numpy()
    axes.imshow(picture.squeeze(-1) if picture.shape[-1] == 1 else picture, cmap="gray", vmin=0, vmax=1)
    axes.set(xticks=[], yticks=[])
    axes.grid(False)
    axes.spines[:].set(visible=framed, linewidth=0.5)
    axes.set_title(title, fontsize=8, pad=2)


def tiled(images: Tensor, columns: int) -> Tensor:
    """`[N, C, H, W]` -> one picture, with a margin of one pixel."""
    padded = torch.nn.functional.pad(images.to(torch.float32), (0, 1, 0, 1), value=float(images.max()))
    rows = [torch.cat(list(row), dim=2) for row in padded.split(columns) if len(row) == columns]
    return torch.cat(rows, dim=1)
