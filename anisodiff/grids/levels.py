"""Levels: the standard deviations at which a solver evaluates a path."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from anisodiff.errors import InvalidArgument

if TYPE_CHECKING:
    from anisodiff.paths.noise_path import NoisePath, Warp


@dataclass(frozen=True)
class Levels:
    """Standard deviations in each subspace, falling: in every step in some subspace, and rising in none.

    A last node of 0, in all subspaces, means one plain Euler step.

    Attributes:
        nodes: where steps begin and end, `[N, B or 1, J]`; before `for_labels`, the middle axis is that of the classes.
        inner: evaluation point of each step for solvers that take one between the nodes, `[N-1, B or 1, J]`; not
            used on a step to 0.
    """

    nodes: Float[Tensor, "n b j"]
    inner: Float[Tensor, "m b j"]

    def __post_init__(self) -> None:
        if len(self.nodes) < 2 or len(self.inner) != len(self.nodes) - 1:
            raise InvalidArgument(
                f"grid: {len(self.nodes)} nodes and {len(self.inner)} inner points: a step needs two nodes"
            )
        change = self.nodes.diff(dim=0)
        if (wrong := ~(change <= 0)).any():  # NaN too
            k, _, j = wrong.nonzero()[0].tolist()
            raise InvalidArgument(f"grid: levels must fall: step {k} of subspace {j} rises")
        if (still := (change == 0).all(2)).any():
            k = int(still.nonzero()[0, 0])
            raise InvalidArgument(f"grid: levels must fall: in step {k} no subspace does")
        if (self.nodes[:-1] <= 0).any() or (self.nodes[-1] < 0).any() or len((self.nodes[-1] == 0).unique()) > 1:
            raise InvalidArgument("grid: levels must be above 0, but for a last one of 0 in all subspaces")

    def for_labels(self, labels: Float[Tensor, "b k"] | None) -> "Levels":
        """Each image's levels, by its one-hot label, from levels of every class."""
        if self.nodes.shape[1] == 1:
            return self
        if labels is None:
            raise InvalidArgument("grid: has levels for each class, but the images have no labels")
        index = labels.argmax(1).to(self.nodes.device)
        return Levels(self.nodes[:, index], self.inner[:, index])

    def to(self, device: torch.device | str) -> "Levels":
        """The same on a device."""
        return Levels(self.nodes.to(device), self.inner.to(device))

    @property
    def steps(self) -> int:
        return len(self.nodes) - 1

    def ends_at_zero(self, k: int) -> bool:
        """Whether step k ends at 0."""
        return k + 1 == self.steps and bool((self.nodes[-1] == 0).all())


@dataclass(frozen=True)
class GridRequest:
    """What a grid is made for, and what is needed for one kind of grid or another.

    Attributes:
        points: nodes above 0.
        append_zero: a step to 0 follows the last of them.
        path: the noise path whose levels are taken.
        sigma_min: smallest level of grids that have one.
        sigma_max: their largest.
        rho: exponent of a polynomial grid; None is its usual one.
        last_level: geometric-mean level of a path's last node before a step to 0.
        warp: of a path's time.
        by_hand: levels, falling.
        search: tensors of a search: its fine grid `nodes`, and the ways through it by name.
        analytic_first: the first step is analytic, and a search has ways for that.
        tuned: what a tuning found for this budget.
    """

    points: int
    append_zero: bool
    path: "NoisePath"
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float | None = None
    last_level: float | None = None
    warp: "Warp | None" = None
    by_hand: Sequence[float] | None = None
    search: Mapping[str, Tensor] | None = None
    analytic_first: bool = False
    tuned: "Levels | None" = None


def levels(nodes: Tensor, inner: Tensor, append_zero: bool) -> Levels:
    """Levels as they are, or going on to 0 from the last node."""
    if not append_zero:
        return Levels(nodes, inner)
    zero = torch.zeros_like(nodes[:1])
    return Levels(torch.cat([nodes, zero]), torch.cat([inner, zero]))


def at(nodes: Float[Tensor, "n b j"], append_zero: bool = False) -> Levels:
    """Levels at these nodes; inner points at geometric means."""
    return levels(nodes, (nodes[1:] * nodes[:-1]).sqrt(), append_zero)
