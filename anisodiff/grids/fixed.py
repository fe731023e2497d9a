"""Grids in closed form, from sigma_min and sigma_max or from a path's own time."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from anisodiff.errors import InvalidArgument
from anisodiff.grids.levels import GridRequest, Levels, at, levels
from anisodiff.paths.noise_path import NoisePath, Warp
from anisodiff.paths.schedules import LogLinear, karras_sigmas

LAST_LEVEL = 0.03  # mean level from which a path's grid takes its step to 0, where no other is asked for


def _spread(points: int, subspaces: int, append_zero: bool, sigma_at: Callable[[Tensor], Tensor]) -> Levels:
    """Levels `sigma_at` shares from 1 (first node) to 0 (last), the same in every subspace; inner points half-way."""
    share = torch.linspace(1, 0, 2 * points - 1, dtype=torch.float64)
    sigmas = sigma_at(share).to(torch.float64)[:, None, None].expand(-1, 1, subspaces)
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


def karras_grid(request: GridRequest) -> Levels:
    """EDM's polynomial grid; see `karras`."""
    ends = request.sigma_min, request.sigma_max
    return karras(request.points, request.path.subspaces.count, *ends, request.rho or 7.0, request.append_zero)


def log_snr_grid(request: GridRequest) -> Levels:
    """Grid uniform in log sigma; see `log_snr`."""
    ends = request.sigma_min, request.sigma_max
    return log_snr(request.points, request.path.subspaces.count, *ends, request.append_zero)


def vp_time_grid(request: GridRequest) -> Levels:
    """Grid uniform in a root of the variance-preserving process's time; see `time_uniform`."""
    ends = request.sigma_min, request.sigma_max
    return time_uniform(request.points, request.path.subspaces.count, *ends, request.append_zero, request.rho or 1.0)


def path_time_grid(request: GridRequest) -> Levels:
    """Grid uniform in the path's time, or in its warped time; see `uniform`."""
    last = (request.last_level or LAST_LEVEL) if request.append_zero else None
    return uniform(request.path, request.points, request.warp, request.append_zero, last)


def mean_karras_grid(request: GridRequest) -> Levels:
    """Times at which the path's geometric-mean level is on EDM's polynomial grid; inner points at geometric means.

    Raises:
        InvalidArgument: the path has a schedule a class, and no common time.
    """
    found, _ = at_mean_levels(
        request.path, request.points, request.sigma_min, request.sigma_max, request.rho or 7.0, request.append_zero
    )
    return found


def given_grid(request: GridRequest) -> Levels:
    """Levels by hand; see `given`."""
    if request.by_hand is None:
        raise InvalidArgument("grid: there are no levels for this budget")
    return given(request.by_hand, request.path.subspaces.count)


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
        InvalidArgument: the path starts below the level `last`.
    """
    end = 0.0
    if last is not None:
        mean = path.mean if warp is None else warp.schedule.curve
        shared = LogLinear(mean.nodes, mean.logs.detach().flatten(0, -2).mean(0, keepdim=True))
        level = torch.tensor([2 * math.log(last)], dtype=torch.float64, device=mean.logs.device)
        if level >= shared.logs[0, -1]:
            raise InvalidArgument(f"grid: a last level of {last:g} is above the whole path")
        end = float(shared.time_of(level).clamp(min=0))
    t = torch.linspace(1, end, 2 * points - 1, dtype=torch.float64)
    with torch.no_grad():
        sigmas = path.table(t if warp is None else warp(t)[0])
    return levels(sigmas[::2], sigmas[1::2], append_zero)


def at_mean_levels(
    path: NoisePath,
    points: int,
    sigma_min: float,
    sigma_max: float,
    rho: float = 7.0,
    append_zero: bool = False,
) -> tuple[Levels, Tensor]:
    """Times of a path at which its geometric-mean level is on EDM's polynomial grid: its levels, and those means.

    Args:
        path: one that all classes share.
        points: nodes.
        sigma_min: the last mean level.
        sigma_max: the first.
        rho: exponent of the polynomial grid.
        append_zero: go on to 0.

    Raises:
        InvalidArgument: the path has a schedule a class, and no common time.
    """
    if path.classes:
        raise InvalidArgument("grid: a path with a schedule a class has no common mean level")
    means = karras(points, 1, sigma_min, sigma_max, rho, append_zero=False).nodes[:, 0, 0]
    with torch.no_grad():
        nodes = path.table(path.mean.time_of(2 * means.log()))
    return at(nodes, append_zero), means
