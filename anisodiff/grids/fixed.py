"""Grids: the levels (standard deviations) at which a solver evaluates a path."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from anisodiff.errors import StageError
from anisodiff.paths.noise_path import NoisePath, Warp
from anisodiff.paths.schedules import LogLinear, karras_sigmas


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
            raise StageError(
                f"grid: {len(self.nodes)} nodes and {len(self.inner)} inner points: a step needs two nodes"
            )
        change = self.nodes.diff(dim=0)
        if (wrong := ~(change <= 0)).any():  # NaN too
            k, _, j = wrong.nonzero()[0].tolist()
            raise StageError(f"grid: levels must fall: step {k} of subspace {j} rises: check the path and the grid")
        if (still := (change == 0).all(2)).any():
            k = int(still.nonzero()[0, 0])
            raise StageError(f"grid: levels must fall: in step {k} no subspace does: check the path and the grid")
        if (self.nodes[:-1] <= 0).any() or (self.nodes[-1] < 0).any() or len((self.nodes[-1] == 0).unique()) > 1:
            raise StageError("grid: levels must be above 0, but for a last one of 0 in all subspaces: check the grid")

    def for_labels(self, labels: Float[Tensor, "b k"] | None) -> "Levels":
        """Each image's levels, by its one-hot label, from levels of every class."""
        if self.nodes.shape[1] == 1:
            return self
        if labels is None:
            raise StageError(
                "grid: has levels for each class, but the images have no labels: use a network with classes"
            )
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


def levels(nodes: Tensor, inner: Tensor, append_zero: bool) -> Levels:
    """Levels as they are, or going on to 0 from the last node."""
    if not append_zero:
        return Levels(nodes, inner)
    zero = torch.zeros_like(nodes[:1])
    return Levels(torch.cat([nodes, zero]), torch.cat([inner, zero]))


def _spread(points: int, subspaces: int, append_zero: bool, at: Callable[[Tensor], Tensor]) -> Levels:
    """Levels `at` shares from 1 (first node) to 0 (last), the same in every subspace; inner points half-way."""
    share = torch.linspace(1, 0, 2 * points - 1, dtype=torch.float64)
    sigmas = at(share).to(torch.float64)[:, None, None].expand(-1, 1, subspaces)
    return levels(sigmas[::2], sigmas[1::2], append_zero)


def karras(
    points: int, subspaces: int, sigma_min: float, sigma_max: float, rho: float = 7.0, append_zero: bool = True
) -> Levels:
    """EDM's polynomial grid; inner points half-way in the index (arXiv:2206.00364, Eq. 5).

    Args:
        points: nodes above 0.
        subspaces: J; every subspace gets the same level.
        sigma_min: last node before 0.
        sigma_max: first node.
        rho: the grid's exponent; 1 is uniform in sigma.
        append_zero: go on to 0.
    """
    return _spread(points, subspaces, append_zero, lambda share: karras_sigmas(share, sigma_min, sigma_max, rho))


def log_snr(points: int, subspaces: int, sigma_min: float, sigma_max: float, append_zero: bool = True) -> Levels:
    """Uniform in log sigma; see `karras`."""
    return _spread(points, subspaces, append_zero, lambda share: sigma_min * (sigma_max / sigma_min) ** share)


def time_uniform(
    points: int, subspaces: int, sigma_min: float, sigma_max: float, append_zero: bool = True, rho: float = 1.0
) -> Levels:
    """Uniform in a root of the variance-preserving process's time: with rho 1 DDPM's usual grid, with rho 2 DEIS's.

    Args:
        points: nodes above 0.
        subspaces: J; every subspace gets the same level.
        sigma_min: last node before 0.
        sigma_max: first node.
        append_zero: go on to 0.
        rho: uniform in `time ** (1 / rho)`.
    """
    time = VpTime(sigma_min, sigma_max)
    first = time.first ** (1 / rho)
    return _spread(points, subspaces, append_zero, lambda share: time.sigma((first + (1 - first) * share) ** rho))


@dataclass(frozen=True)
class VpTime:
    """Time of the variance-preserving process with sigma_min at 0.001 and sigma_max at 1 (arXiv:2206.00364, Table 1).

    Attributes:
        sigma_min: the noise at `first`.
        sigma_max: the noise at time 1.
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    first = 1e-3

    @property
    def betas(self) -> tuple[float, float]:
        """Coefficients of time and of half its square in `log(1 + sigma^2)`."""
        low, high = math.log1p(self.sigma_min**2), math.log1p(self.sigma_max**2)
        spread = 2 * (high - low / self.first) / (1 - self.first)
        return high - spread / 2, spread

    def sigma(self, time: Tensor) -> Tensor:
        """The noise at a time."""
        least, spread = self.betas
        return torch.expm1(spread / 2 * time.square() + least * time).sqrt()

    def time_at(self, sigma: Tensor) -> Tensor:
        """The time at which the noise is `sigma`."""
        least, spread = self.betas
        return ((least**2 + 2 * spread * torch.log1p(sigma.square())).sqrt() - least) / spread

    def rate(self, time: Tensor) -> Tensor:
        """Derivative of `sigma`."""
        least, spread = self.betas
        sigma = self.sigma(time)
        return (spread * time + least) * (1 + sigma.square()) / (2 * sigma)


def at(nodes: Float[Tensor, "n b j"], append_zero: bool = False) -> Levels:
    """Levels at these nodes; inner points at geometric means."""
    return levels(nodes, (nodes[1:] * nodes[:-1]).sqrt(), append_zero)


def given(nodes: Sequence[float], subspaces: int) -> Levels:
    """Levels by hand, falling."""
    return at(torch.tensor(nodes, dtype=torch.float64)[:, None, None].expand(-1, 1, subspaces))


def uniform(
    path: NoisePath, points: int, warp: Warp | None = None, append_zero: bool = True, last: float | None = None
) -> Levels:
    """Points uniform in (warped) time from t = 1 down; inner points half-way in time (paper, Algorithm 1).

    Args:
        path: whose levels are taken.
        points: nodes above 0.
        warp: r(t; gamma); None takes t itself.
        append_zero: go on to 0 with a last Euler step.
        last: geometric-mean level, over classes too, of the last node above 0; None ends at t = 0, as does a level that
            the path does not go down to.

    Raises:
        StageError: the path starts below the level `last`.
    """
    end = 0.0
    if last is not None:
        mean = path.mean if warp is None else warp.schedule.curve
        shared = LogLinear(mean.nodes, mean.logs.detach().flatten(0, -2).mean(0, keepdim=True))
        level = torch.tensor([2 * math.log(last)], dtype=torch.float64, device=mean.logs.device)
        if level >= shared.logs[0, -1]:
            raise StageError(f"grid: a last level of {last:g} is above the whole path: lower last_level")
        end = float(shared.time_of(level).clamp(min=0))
    t = torch.linspace(1, end, 2 * points - 1, dtype=torch.float64)
    with torch.no_grad():
        sigmas = path.table(t if warp is None else warp(t)[0])
    return levels(sigmas[::2], sigmas[1::2], append_zero)


def at_mean_levels(path: NoisePath, points: int, sigma_min: float, sigma_max: float) -> tuple[Levels, Tensor]:
    """Times of a path at which its geometric-mean level is on EDM's polynomial grid: its levels, and those means.

    Args:
        path: one that all classes share.
        points: nodes.
        sigma_min: the last mean level.
        sigma_max: the first.
    """
    means = karras(points, 1, sigma_min, sigma_max, append_zero=False).nodes[:, 0, 0]
    with torch.no_grad():
        nodes = path.table(path.mean.time_of(2 * means.log()))
    return at(nodes), means
