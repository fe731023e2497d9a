"""A noise path: the covariance M_t of `x_t = x0 + M_t^{1/2} eps` (paper, Eq. 2 and 9)."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from anisodiff.schedules import FixedSchedule, KnotSchedule, LogLinear, Variance, karras_logs
from anisodiff.subspaces import Subspaces, partition


class NoisePath(nn.Module):
    """Subspaces with a variance schedule for each.

    Args:
        subspaces: the orthonormal basis and its partition.
        schedule: variances over time in [0, 1], one row a subspace (or one row for all).
        weights: share of each subspace in the mean log-level that the network is told; must sum to one. None weighs by
            rank, so that splitting a subspace changes nothing; the paper's J = 2 uses equal weights.
    """

    def __init__(
        self,
        subspaces: Subspaces,
        schedule: KnotSchedule | FixedSchedule,
        weights: Float[Tensor, " j"] | None = None,
    ):
        super().__init__()
        self.subspaces, self.schedule = subspaces, schedule
        ranks = subspaces.ranks
        weights = ranks / ranks.sum() if weights is None else weights.to(torch.float64)
        if len(schedule.curve.logs) != subspaces.count:
            raise ValueError(f"{len(schedule.curve.logs)} schedules for {subspaces.count} subspaces")
        if len(weights) != subspaces.count or abs(float(weights.sum()) - 1) > 1e-9:
            raise ValueError("label weights must be one a subspace and sum to one")
        self.register_buffer("weights", weights)

    def forward(self, t: Float[Tensor, " b"]) -> Variance:
        """Variances and rates at times `t` in [0, 1], `[B]` -> `[B, J]`."""
        return self.schedule.curve(t)

    @property
    def mean(self) -> LogLinear:
        """The schedule of the geometric-mean variance, whose inverse is exact."""
        return self.schedule.curve.mean(self.weights)

    def mean_log(self, g: Float[Tensor, "b j"]) -> Float[Tensor, " b"]:
        """Log of the geometric-mean variance of `g`."""
        return g.log() @ self.weights.to(g.dtype)

    def scale(self, z: Float[Tensor, "b c h w"], values: Float[Tensor, "#b j"]) -> Float[Tensor, "b c h w"]:
        """`F(M) z` for `values = F(g)`."""
        return self.subspaces.scale(z, values)

    def to_pixels(self, z: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        return self.subspaces.to_pixels(z)

    def from_pixels(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        return self.subspaces.from_pixels(x)


def edm_path(
    size: int, sigma_min: float = 0.002, sigma_max: float = 80.0, g_min: float = 1e-9, knots: int = 32
) -> NoisePath:
    """EDM's isotropic path: its Karras grid, linear in log between knots.

    Args:
        size: image side.
        sigma_min: smallest level of EDM's grid.
        sigma_max: level at t = 1.
        g_min: variance at t = 0.
        knots: nodes of the schedule.
    """
    logs = karras_logs(knots, g_min, sigma_min, sigma_max)
    return NoisePath(Subspaces(partition(size, "whole")), KnotSchedule(logs))


class Warp(nn.Module):
    """The time warp r(t; gamma), parameterised by the mean log-level that it should reach at t.

    Args:
        path: the path whose time is warped; held fixed.
        logs: mean log variances at uniform knots, `[1, K]`; None starts at r(t) = t.
    """

    def __init__(self, path: NoisePath, logs: Float[Tensor, "1 k"] | None = None, knots: int = 32):
        super().__init__()
        mean = path.mean
        self.register_buffer("path_nodes", mean.nodes.clone(), persistent=False)
        self.register_buffer("path_logs", mean.logs.detach().clone(), persistent=False)
        if logs is None:
            logs = self._path(torch.linspace(0, 1, knots, dtype=torch.float64)).g.log().T
        self.schedule = KnotSchedule(logs)

    @property
    def _path(self) -> LogLinear:
        """The mean log-level of the path before the warp."""
        return LogLinear(self.path_nodes, self.path_logs)

    def forward(self, t: Float[Tensor, " b"]) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"]]:
        """r(t) and its derivative, `[B]` each, float64."""
        target = self.schedule.curve(t)
        r = self._path.time_of(target.g[:, 0].log())
        there = self._path(r)
        rate = (target.g_dot / target.g) / (there.g_dot / there.g)
        return r, rate[:, 0]
