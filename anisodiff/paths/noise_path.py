"""A noise path: the covariance M_t of `x_t = x0 + M_t^{1/2} eps` (paper, Eq. 2 and 9)."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from anisodiff.errors import InvalidArgument
from anisodiff.paths.schedules import KnotSchedule, LogLinear, Schedule, Variance, karras_logs
from anisodiff.paths.subspaces import Basis, Subspaces, partition


class _Coordinates:
    """What a path offers to denoiser, losses and solvers, from `subspaces`, `curve` and `weights`."""

    subspaces: Basis
    weights: Float[Tensor, " j"]
    curve: Any  # a `LogLinear`: a field of one, a property of the other

    def at(self, t: Float[Tensor, " b"]) -> Variance:
        """Variances and rates at times `t` in [0, 1], `[B]` -> `[B, J]`."""
        return self.curve(t)

    def mean_log(self, g: Float[Tensor, "b j"]) -> Float[Tensor, " b"]:
        """Log of the geometric-mean variance of `g`."""
        return g.log() @ self.weights.to(g.dtype)

    def scale(self, z: Float[Tensor, "b c h w"], values: Float[Tensor, "#b j"]) -> Float[Tensor, "b c h w"]:
        """`F(M) z` for `values = F(g)`."""
        return self.subspaces.scale(z, values)

    def inner(self, a: Float[Tensor, "b c h w"], b: Float[Tensor, "b c h w"]) -> Float[Tensor, "b j"]:
        """Inner product in each subspace."""
        return self.subspaces.inner(a, b)

    def to_pixels(self, z: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        return self.subspaces.to_pixels(z)

    def from_pixels(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        return self.subspaces.from_pixels(x)


@dataclass(frozen=True)
class BatchPath(_Coordinates):
    """A path as the images of a batch see it, each with the schedule and the basis of its own class.

    Attributes:
        subspaces: with each image's basis.
        curve: schedules, one for all or one an image.
        weights: of the mean log-level.
    """

    subspaces: Basis
    curve: LogLinear
    weights: Float[Tensor, " j"]


class NoisePath(nn.Module, _Coordinates):
    """Subspaces with a variance schedule for each.

    Its parameters are those of the schedule and, where the basis is learnable, the basis's: a training takes the path
    as its module. Averages are over parameters (angles), never over bases, which would not stay orthonormal.

    Args:
        subspaces: the orthonormal basis and its partition.
        schedule: variances over time in [0, 1], one row a subspace; with a leading axis, one schedule a class.
        weights: share of each subspace in the mean log-level that the network is told; must sum to one. None weighs by
            rank, so that splitting a subspace changes nothing; the paper's J = 2 uses equal weights.
    """

    def __init__(
        self,
        subspaces: Basis,
        schedule: Schedule,
        weights: Float[Tensor, " j"] | None = None,
    ):
        super().__init__()
        self.subspaces, self.schedule = subspaces, schedule
        ranks = subspaces.ranks
        weights = ranks / ranks.sum() if weights is None else weights.to(torch.float64)
        rows = schedule.curve.logs.shape[-2]
        if rows != subspaces.count:
            raise InvalidArgument(f"{rows} schedules for {subspaces.count} subspaces")
        if len(weights) != subspaces.count or abs(float(weights.sum()) - 1) > 1e-9:
            raise InvalidArgument("label weights must be one a subspace and sum to one")
        self.register_buffer("weights", weights)

    @property
    def curve(self) -> LogLinear:
        """The schedule at the present parameters."""
        return self.schedule.curve

    @property
    def classes(self) -> int:
        """Number of classes with a schedule of their own; 0 if all share one."""
        return self.schedule.classes

    def require_learnable_basis(self) -> None:
        """Refuse to learn a basis that no loss can see: where all levels are equal, M_t is the same in every basis.

        Raises:
            InvalidArgument: the basis is fixed, there is one subspace, or all have the same schedule.
        """
        if not self.subspaces.learnable:
            raise InvalidArgument("basis: it is fixed: take subspaces separable:J or dense:J to learn one")
        if self.subspaces.count == 1:
            raise InvalidArgument("basis: one subspace is the same in every basis: give it two or more")
        logs = self.curve.logs.detach()
        if torch.equal(logs, logs[..., :1, :].expand_as(logs)):
            raise InvalidArgument("basis: it has no gradient until the schedules differ: start from a spectral path")

    def for_labels(self, labels: Float[Tensor, "b k"] | None) -> "NoisePath | BatchPath":
        """The path as images with these one-hot labels see it.

        Raises:
            InvalidArgument: schedules per class, but no labels or those of other classes.
        """
        wanted = self.classes or self.subspaces.classes
        if not wanted:
            return self
        if labels is None or labels.shape[1] != wanted:
            given = "no labels" if labels is None else f"labels of {labels.shape[1]} classes"
            raise InvalidArgument(f"path: differs between its {wanted} classes, but got {given}")
        index = labels.argmax(1)
        curve = self.curve
        mine = LogLinear(curve.nodes, curve.logs[index]) if self.classes else curve
        return BatchPath(self.subspaces.for_classes(index), mine, self.weights)

    def forward(self, t: Float[Tensor, " b"]) -> Variance:
        return self.at(t)

    def table(self, t: Float[Tensor, " n"]) -> Float[Tensor, "n l j"]:
        """Standard deviations at times `t` for every class, or for all alike (L = 1)."""
        curve = self.curve
        classes = curve.logs if self.classes else curve.logs[None]
        return torch.stack([LogLinear(curve.nodes, logs)(t).sigma for logs in classes], dim=1)

    @property
    def mean(self) -> LogLinear:
        """The schedule of the geometric-mean variance, whose inverse is exact."""
        return self.curve.mean(self.weights)


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

    path_nodes: Tensor
    path_logs: Tensor

    def __init__(self, path: NoisePath, logs: Float[Tensor, "1 k"] | None = None, knots: int = 32):
        super().__init__()
        if path.classes:
            raise InvalidArgument("warp: a path with a schedule a class has no common time to warp")
        mean = path.mean
        self.register_buffer("path_nodes", mean.nodes.clone(), persistent=False)
        self.register_buffer("path_logs", mean.logs.detach().clone(), persistent=False)
        if logs is None:
            logs = self._path(torch.linspace(0, 1, knots, dtype=torch.float64)).g.log().T
        self.schedule = KnotSchedule(logs.to(mean.logs.device))

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
