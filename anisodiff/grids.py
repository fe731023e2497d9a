"""Grids: the levels (standard deviations) at which a solver evaluates a path."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from anisodiff.files import StageError
from anisodiff.paths import NoisePath, Warp
from anisodiff.schedules import karras_sigmas


@dataclass(frozen=True)
class Levels:
    """Standard deviations in each subspace, falling. A last node of 0 means one plain Euler step.

    Attributes:
        nodes: where steps begin and end, `[N, B or 1, J]`; before `of`, the middle axis is that of the classes.
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
        if not (self.nodes.diff(dim=0) < 0).all() or (self.nodes < 0).any():
            raise StageError("grid: levels must fall from node to node: check the path and the grid")

    def of(self, labels: Float[Tensor, "b k"] | None) -> "Levels":
        """Each image's levels, by its one-hot label, from levels of every class."""
        if self.nodes.shape[1] == 1:
            return self
        if labels is None:
            raise StageError(
                "grid: has levels for each class, but the images have no labels: use a network with classes"
            )
        index = labels.argmax(1).to(self.nodes.device)
        return Levels(self.nodes[:, index], self.inner[:, index])

    @property
    def steps(self) -> int:
        return len(self.nodes) - 1

    def is_to_zero(self, k: int) -> bool:
        """Whether step k ends at 0."""
        return k + 1 == self.steps and bool((self.nodes[-1] == 0).all())


def _with_zero(nodes: Tensor, inner: Tensor) -> Levels:
    zero = torch.zeros_like(nodes[:1])
    return Levels(torch.cat([nodes, zero]), torch.cat([inner, zero]))


def _spread(points: int, subspaces: int, denoise: bool, at: Callable[[Tensor], Tensor]) -> Levels:
    """Levels `at` shares from 1 (first node) to 0 (last), the same in every subspace; inner points half-way."""
    share = torch.linspace(1, 0, 2 * points - 1, dtype=torch.float64)
    sigmas = at(share).to(torch.float64)[:, None, None].expand(-1, 1, subspaces)
    return _with_zero(sigmas[::2], sigmas[1::2]) if denoise else Levels(sigmas[::2], sigmas[1::2])


def karras(
    points: int, subspaces: int, sigma_min: float, sigma_max: float, rho: float = 7.0, denoise: bool = True
) -> Levels:
    """EDM's polynomial grid; inner points half-way in the index (arXiv:2206.00364, Eq. 5).

    Args:
        points: nodes above 0.
        subspaces: J; every subspace gets the same level.
        sigma_min: last node before 0.
        sigma_max: first node.
        rho: the grid's exponent; 1 is uniform in sigma.
        denoise: go on to 0.
    """
    return _spread(points, subspaces, denoise, lambda share: karras_sigmas(share, sigma_min, sigma_max, rho))


def log_snr(points: int, subspaces: int, sigma_min: float, sigma_max: float, denoise: bool = True) -> Levels:
    """Uniform in log sigma; see `karras`."""
    return _spread(points, subspaces, denoise, lambda share: sigma_min * (sigma_max / sigma_min) ** share)


def time_uniform(points: int, subspaces: int, sigma_min: float, sigma_max: float, denoise: bool = True) -> Levels:
    """Uniform in the time of the variance-preserving process, DDPM's usual grid in EDM's terms; see `karras`."""
    first, last = (vp_time(torch.tensor(sigma, dtype=torch.float64)) for sigma in (sigma_max, sigma_min))
    return _spread(points, subspaces, denoise, lambda share: vp_sigma(last + (first - last) * share)[0])


BETA_MIN, BETA_SPREAD = 0.1, 19.9


def vp_time(sigma: Tensor) -> Tensor:
    """Time of the variance-preserving process at which the noise is `sigma` (arXiv:2206.00364, Table 1)."""
    return ((BETA_MIN**2 + 2 * BETA_SPREAD * torch.log1p(sigma.square())).sqrt() - BETA_MIN) / BETA_SPREAD


def vp_sigma(time: Tensor) -> tuple[Tensor, Tensor]:
    """Its inverse, and the inverse's derivative."""
    exponent = BETA_SPREAD / 2 * time.square() + BETA_MIN * time
    sigma = torch.expm1(exponent).sqrt()
    return sigma, (BETA_SPREAD * time + BETA_MIN) * exponent.exp() / (2 * sigma)


def given(levels: Sequence[float], subspaces: int) -> Levels:
    """Levels by hand, falling; inner points at geometric means."""
    nodes = torch.tensor(levels, dtype=torch.float64)[:, None, None].expand(-1, 1, subspaces)
    return Levels(nodes, (nodes[1:] * nodes[:-1]).sqrt())


def uniform(path: NoisePath, points: int, warp: Warp | None = None, denoise: bool = True) -> Levels:
    """Points uniform in (warped) time from t = 1 to t = 0; inner points half-way in time (paper, Algorithm 1).

    Args:
        path: whose levels are taken.
        points: nodes, t = 0 among them.
        warp: r(t; gamma); None takes t itself.
        denoise: go on from t = 0's level to 0 with a last Euler step.
    """
    t = torch.linspace(1, 0, 2 * points - 1, dtype=torch.float64)
    with torch.no_grad():
        sigmas = path.table(t if warp is None else warp(t)[0])
    nodes, inner = sigmas[::2], sigmas[1::2]
    return _with_zero(nodes, inner) if denoise else Levels(nodes, inner)


def spend(nfe: int, order: int, build: Callable[[int, bool], Levels]) -> Levels:
    """Levels on which a single-step solver of this order spends `nfe` evaluations.

    Args:
        nfe: the budget; each step costs `order` evaluations, but a step to 0 costs one.
        order: evaluations a step.
        build: makes the levels from a number of points above 0 and whether a step to 0 follows.

    Raises:
        StageError: the budget cannot be spent.
    """
    steps, rest = divmod(nfe, order)
    denoise = order == 1 or rest == 1
    points = steps + 1 if order > 1 else steps
    if nfe < 1 or (order > 1 and steps < 1):
        raise StageError(f"nfe: {nfe} is too small for a solver of {order} evaluations a step: use {order} or more")
    return build(points, denoise)
