"""What figures share: looks that can be told apart without colour, legends beside the data, pictures."""

import itertools
from typing import Any

import torch
from matplotlib import ticker
from matplotlib.axes import Axes
from torch import Tensor

from anisodiff.metrics import frechet

COLOURS = ["#000000", "#E69F00", "#0072B2", "#009E73", "#D55E00", "#CC79A7", "#56B4E9"]  # Okabe and Ito
DASHES = ["-", "--", "-.", ":"]
MARKERS = "osD^vPX<>*hp"
STYLE = {
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


def styles(count: int) -> list[dict[str, Any]]:
    """Lines told apart by colour, dash and marker together."""
    marks = itertools.islice(itertools.cycle(MARKERS), count)
    return [
        {"color": COLOURS[i % len(COLOURS)], "linestyle": DASHES[(i // len(COLOURS)) % len(DASHES)], "marker": marker}
        for i, marker in enumerate(marks)
    ]


def legend_beside(axes: Axes) -> None:
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), borderaxespad=0.0)


def distance_axis(axes: Axes, features: str) -> None:
    """A logarithmic axis of the Frechet distance of a feature network, labelled in plain numbers."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
    axes.yaxis.set_minor_formatter(ticker.NullFormatter())
    axes.set_ylabel(frechet.TITLES[features].replace(", ", ",\n"))


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
