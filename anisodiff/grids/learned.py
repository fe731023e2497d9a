"""Learnable levels of a budget under a solver: a fall for every step, or places on a curve that budgets share."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from anisodiff.errors import InvalidArgument
from anisodiff.grids.levels import GridRequest, Levels, at
from anisodiff.paths.schedules import KnotSchedule, LogLinear


class FreeLevels(nn.Module):
    """Levels of one budget with a learnable fall in every step but one to 0; the first level stays.

    `log sigma_{k+1} = log sigma_k - softplus(start's + correction)`: without corrections they are the start's.

    Args:
        start: levels to start from; those of every class, if classes differ.
        per_subspace: each subspace of the path has corrections of its own; or else all share them.
    """

    first: Tensor
    start: Tensor

    def __init__(self, start: Levels, per_subspace: bool = False):
        super().__init__()
        nodes = start.nodes.to(torch.float64)
        self.append_zero = start.ends_at_zero(start.steps - 1)
        logs = nodes[: len(nodes) - self.append_zero].log()
        falls = -logs.diff(dim=0)
        self.register_buffer("first", logs[:1])
        self.register_buffer("start", falls + torch.log(-torch.expm1(-falls)))  # inverse of softplus
        self.corrections = nn.Parameter(torch.zeros(len(falls), 1, falls.shape[2] if per_subspace else 1).to(falls))

    def forward(self) -> Levels:
        """The levels at the present corrections."""
        falls = functional.softplus(self.start + self.corrections)
        return at(torch.cat([self.first, self.first - falls.cumsum(0)]).exp(), self.append_zero)


class CurveLevels(nn.Module):
    """Levels of one budget on a learnable curve that all budgets share, as BezierFlow's (arXiv:2512.13255), on knots.

    Args:
        curve: log variances over [0, 1], from `curve_through`; nodes are uniform in its argument.
        points: nodes above 0.
        append_zero: go on to 0.
    """

    places: Tensor

    def __init__(self, curve: KnotSchedule, points: int, append_zero: bool = False):
        super().__init__()
        self.curve, self.append_zero = curve, append_zero
        self.register_buffer("places", torch.linspace(1, 0, points, dtype=torch.float64), persistent=False)

    def forward(self) -> Levels:
        """The levels at the curve's present parameters."""
        curve = self.curve.curve
        classes = curve.logs if curve.logs.ndim == 3 else curve.logs[None]
        nodes = torch.stack([LogLinear(curve.nodes, logs)(self.places).sigma for logs in classes], dim=1)
        return at(nodes, self.append_zero)


def curve_through(levels: Levels) -> KnotSchedule:
    """Curve through fine levels above 0, a knot a level: what `CurveLevels` of all budgets share.

    Raises:
        InvalidArgument: a subspace stands still, or the levels go on to 0.
    """
    if levels.ends_at_zero(levels.steps - 1):
        raise InvalidArgument("curve: levels that go on to 0 have no logarithm: leave out the step to 0")
    logs = 2 * levels.nodes.to(torch.float64).flip(0).log().permute(1, 2, 0)
    return KnotSchedule(logs if len(logs) > 1 else logs[0])


def resampled(levels: Levels, steps: int) -> Levels:
    """Levels of another budget, log-linear between those of this one: a start from what was tuned before.

    Args:
        levels: those of this budget.
        steps: of the other one, a step to 0 among them where this has one.

    Raises:
        InvalidArgument: there are too few steps, here or there, to lie between.
    """
    append_zero = levels.ends_at_zero(levels.steps - 1)
    logs = levels.nodes[: len(levels.nodes) - append_zero].log()
    if steps - append_zero < 1 or len(logs) < 2:
        raise InvalidArgument(f"levels: {levels.steps} steps give no levels for {steps}")
    place = torch.linspace(0, len(logs) - 1, steps + 1 - append_zero, dtype=logs.dtype, device=logs.device)
    before = place.long().clamp(max=len(logs) - 2)
    return at(torch.lerp(logs[before], logs[before + 1], (place - before)[:, None, None]).exp(), append_zero)


def tuned_grid(request: GridRequest) -> Levels:
    """Levels that a tuning found for a budget.

    Raises:
        InvalidArgument: there is no tuning.
    """
    if request.tuned is None:
        raise InvalidArgument("tuned levels are a tuning's: give its file")
    return request.tuned
