"""Variance schedules g_j(t) of the subspaces (paper, Section 2.2 and Appendix C), from t = 0 (data) to 1 (noise).

Everything here is float64: the tensors are small, and levels must be exact.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from anisodiff.errors import InvalidArgument


@dataclass(frozen=True)
class Variance:
    """The noise of a path at some times.

    Attributes:
        g: variance in each subspace, `[B, J]`.
        g_dot: its derivative in t, `[B, J]`.
    """

    g: Float[Tensor, "b j"]
    g_dot: Float[Tensor, "b j"]

    @property
    def sigma(self) -> Float[Tensor, "b j"]:
        return self.g.sqrt()


def _segment(points: Float[Tensor, "... k"], values: Float[Tensor, "... b"]) -> Tensor:
    """Index of the interval of rising `points` that holds each value."""
    last = points.shape[-1] - 2
    return (torch.searchsorted(points.contiguous(), values.contiguous(), right=True) - 1).clamp(0, last)


def _require_rise(logs: Float[Tensor, "*l j k"]) -> None:
    """Refuse log variances that do not rise from knot to knot, by the first place where they do not."""
    bad = ~(logs.detach().diff(dim=-1) > 0)  # nan does not rise
    if bad.any():
        *row, subspace, knot = bad.nonzero()[0].tolist()
        of_class = f" of class {row[0]}" if row else ""
        raise InvalidArgument(
            f"path: the log variance of subspace {subspace}{of_class} does not rise from knot {knot} to {knot + 1}"
        )


@dataclass(frozen=True)
class LogLinear:
    """Variances whose logs are linear between nodes shared by all subspaces, so the mean log-level is too.

    Attributes:
        nodes: times, rising from 0 to 1, `[K]`.
        logs: log variance at each node, rising, `[J, K]`; with a leading axis, one schedule a class or an image.

    Raises:
        InvalidArgument: the logs do not rise.
    """

    nodes: Float[Tensor, " k"]
    logs: Float[Tensor, "*l j k"]

    def __post_init__(self) -> None:
        if not (self.nodes.diff() > 0).all() or self.nodes[0] != 0 or self.nodes[-1] != 1:
            raise InvalidArgument("knots must rise from 0 to 1")
        _require_rise(self.logs)

    def __call__(self, t: Float[Tensor, " b"]) -> Variance:
        """Variances and rates at times `t`, `[B]` -> `[B, J]`. A leading axis of the logs must be the batch's."""
        t = t.to(self.nodes)
        k = _segment(self.nodes, t)
        width = (self.nodes[k + 1] - self.nodes[k])[:, None]
        share = (t - self.nodes[k])[:, None] / width
        left, right = self._at(k), self._at(k + 1)
        g = torch.lerp(left, right, share).exp()
        return Variance(g, g * (right - left) / width)

    def _at(self, k: Int[Tensor, " b"]) -> Float[Tensor, "b j"]:
        """Log variances at these nodes."""
        if self.logs.ndim == 2:
            return self.logs[:, k].T
        return self.logs[torch.arange(len(k), device=k.device), :, k]

    def mean(self, weights: Float[Tensor, " j"]) -> "LogLinear":
        """The schedule of the weighted geometric-mean variance, J = 1."""
        return LogLinear(self.nodes, (weights.to(self.logs) @ self.logs)[..., None, :])

    def time_of(self, log_variance: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        """Exact inverse, for J = 1: the time at which the log variance has these values."""
        if self.logs.shape[:-1] != (1,):
            raise InvalidArgument("only one subspace can be inverted: take the mean first")
        logs, log_variance = self.logs[0], log_variance.to(self.logs.device)
        k = _segment(logs.detach(), log_variance.detach())
        share = (log_variance - logs[k]) / (logs[k + 1] - logs[k])
        return torch.lerp(self.nodes[k], self.nodes[k + 1], share)


def _classes_of(logs: Float[Tensor, "*l j k"]) -> int:
    return len(logs) if logs.ndim == 3 else 0


class KnotSchedule(nn.Module):
    """Learnable `LogLinear` schedule with uniform knots and fixed end points (paper, Appendix C).

    The parameters `theta [J, K-1]` give positive increments softplus(theta), rescaled to fill the range.

    Args:
        logs: log variances at uniformly spaced knots, rising, `[J, K]`, or `[classes, J, K]` for a schedule a class;
            the parameters are set to reproduce them.

    Raises:
        InvalidArgument: they do not rise.
    """

    ends: Tensor
    nodes: Tensor

    def __init__(self, logs: Float[Tensor, "*l j k"]):
        super().__init__()
        logs = logs.to(torch.float64)
        _require_rise(logs)
        self.register_buffer("ends", logs[..., [0, -1]].clone())
        steps = logs.diff(dim=-1)
        steps = steps / steps.mean(dim=-1, keepdim=True)
        self.theta = nn.Parameter(steps + torch.log(-torch.expm1(-steps)))  # inverse of softplus
        nodes = torch.linspace(0, 1, logs.shape[-1], dtype=torch.float64, device=logs.device)
        self.register_buffer("nodes", nodes, persistent=False)

    @property
    def curve(self) -> LogLinear:
        """The schedule at the present parameters; theta's gradient passes through it."""
        rise = functional.softplus(self.theta).cumsum(-1)
        share = rise / rise[..., -1:]
        start, end = self.ends[..., :1], self.ends[..., 1:]
        logs = torch.cat([start, start + (end - start) * share[..., :-1], end], dim=-1)
        return LogLinear(self.nodes, logs)

    @property
    def classes(self) -> int:
        """Number of classes with a schedule of their own; 0 if all share one."""
        return _classes_of(self.ends)


class FixedSchedule(nn.Module):
    """A `LogLinear` schedule without parameters, on knots of its own.

    Args:
        curve: the schedule.
    """

    nodes: Tensor
    logs: Tensor

    def __init__(self, curve: LogLinear):
        super().__init__()
        self.register_buffer("nodes", curve.nodes.to(torch.float64))
        self.register_buffer("logs", curve.logs.detach().to(torch.float64))

    @property
    def curve(self) -> LogLinear:
        return LogLinear(self.nodes, self.logs)

    @property
    def classes(self) -> int:
        """Number of classes with a schedule of their own; 0 if all share one."""
        return _classes_of(self.logs)


FIRST_TIME = 1e-3  # of the flexible process, where its noise begins; its paper does not say
EXPONENT_NODES = 400


def integrated_rate(time: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """`beta(t)`, the integral of the flexible process's rate `0.1 + 19.9 t` (arXiv:2206.10365, B.2)."""
    return 0.1 * time + 9.95 * time.square()


class ExponentSchedule(nn.Module):
    """The flexible process's variances `g_j = exp(lambda_j beta) - 1` (FP-Noise; arXiv:2206.10365, B.2).

    They are exact at 400 nodes at which log beta rises evenly, and log-linear between.

    Args:
        log_lambda: log rate of each subspace, `[J]`.
        ends: variances at t = 0 and t = 1 of all subspaces, onto which the logs are mapped linearly ("fixed" ends);
            None leaves them as they come out at beta(0.001) and beta(1), the paper's ("moving" ends).

    Raises:
        InvalidArgument: the ends do not rise.
    """

    classes = 0  # with a schedule of their own
    beta: Tensor
    nodes: Tensor

    def __init__(self, log_lambda: Float[Tensor, " j"], ends: tuple[float, float] | None = None):
        super().__init__()
        if ends is not None and not 0 < ends[0] < ends[1] < math.inf:
            raise InvalidArgument(f"ends: variances {ends[0]:g} and {ends[1]:g} do not rise from above 0")
        self.ends = ends
        self.log_lambda = nn.Parameter(log_lambda.detach().to(torch.float64).clone())
        first, last = integrated_rate(torch.tensor([FIRST_TIME, 1.0], dtype=torch.float64)).log()
        share = torch.linspace(0, 1, EXPONENT_NODES, dtype=torch.float64)
        beta = torch.lerp(first, last, share).exp()
        time = ((0.01 + 39.8 * beta).sqrt() - 0.1) / 19.9  # inverse of `integrated_rate`
        nodes = (time - FIRST_TIME) / (1 - FIRST_TIME)
        nodes[0], nodes[-1] = 0.0, 1.0
        self.register_buffer("beta", beta, persistent=False)
        self.register_buffer("nodes", nodes, persistent=False)

    @property
    def curve(self) -> LogLinear:
        """The schedule at the present parameters; their gradient passes through it."""
        exponent = self.log_lambda.exp()[:, None] * self.beta
        logs = exponent + torch.log(-torch.expm1(-exponent))  # log(exp(exponent) - 1), where that overflows too
        if self.ends is not None:
            low, high = logs.new_tensor(self.ends).log()
            logs = torch.lerp(low, high, (logs - logs[:, :1]) / (logs[:, -1:] - logs[:, :1]))
        return LogLinear(self.nodes, logs)


Schedule = KnotSchedule | FixedSchedule | ExponentSchedule


def karras_sigmas(
    share: Float[Tensor, " n"], sigma_min: float, sigma_max: float, rho: float = 7.0
) -> Float[Tensor, " n"]:
    """EDM's noise levels (arXiv:2206.00364, Eq. 5): `share` 0 gives sigma_min, 1 sigma_max; linear in sigma^(1/rho)."""
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    return torch.lerp(torch.full_like(share, low), torch.full_like(share, high), share) ** rho


def karras_logs(knots: int, g_min: float, sigma_min: float, sigma_max: float, rho: float = 7.0) -> Float[Tensor, "1 k"]:
    """Log variances of EDM's grid at uniform knots: the start of every learned schedule. The first is log g_min."""
    share = torch.linspace(0, 1, knots, dtype=torch.float64)
    logs = 2 * karras_sigmas(share, sigma_min, sigma_max, rho).log()
    logs[0] = torch.tensor(g_min, dtype=torch.float64).log()
    return logs[None]


def speed(g: Float[Tensor, " n"], spectrum: Float[Tensor, " k"], c: float) -> Float[Tensor, " n"]:
    """`sqrt(w(g))` of Gaussian data: an exact network's TLSM loss is the integral of `(sqrt(w(g)) dg/dt)^2` dt.

    Args:
        g: variances of the noise.
        spectrum: variances of the data's coefficients in the subspace, all channels.
        c: the loss's constant in `(M + c I)^{-1/2}`.
    """
    return torch.stack([(spectrum / ((each + c) * each * (spectrum + each))).sum().sqrt() for each in g])


MOST_ENTRIES = 2**22  # of a closed form's table, nodes by subspaces


def spectral_curve(
    spectra: list[Float[Tensor, " _"]], c: float, g_min: float, g_max: float, resolution: int = 400
) -> LogLinear:
    """The path of least TLSM loss for Gaussian data: each subspace moves at constant `speed`.

    Each subspace's curve is computed at times of its own; the table has the times of all. Where it would be too large,
    evenly spaced ones of them are kept (one in a hundred for MNIST's 1,024 subspaces of one mode: log g is off by 8e-4
    at most).

    Args:
        spectra: for each subspace, the variances of the data's coefficients.
        c: the loss's constant.
        g_min: variance at t = 0.
        g_max: variance at t = 1.
        resolution: quadrature points a subspace, uniform in log g.

    Raises:
        InvalidArgument: the data does not vary in a subspace, so that no level there is better than another.
    """
    largest = max(float(spectrum.max()) for spectrum in spectra)
    for j, spectrum in enumerate(spectra):
        if not spectrum.max() > 1e-12 * largest:  # what is left of a zero by rounding
            raise InvalidArgument(f"the data do not vary in subspace {j}, so no closed form has a schedule for it")
    ends = torch.tensor([g_min, g_max], dtype=torch.float64).log()
    logs = torch.lerp(ends[0], ends[1], torch.linspace(0, 1, resolution, dtype=torch.float64))
    times = []
    for spectrum in spectra:
        rate = speed(logs.exp(), spectrum.to(torch.float64), c) * logs.exp()  # sqrt(w) dg = rate dlog g
        travelled = torch.cat(
            [torch.zeros(1, dtype=torch.float64), ((rate[1:] + rate[:-1]) / 2 * logs.diff()).cumsum(0)]
        )
        times.append(travelled / travelled[-1])
    nodes = torch.cat(times).unique()
    nodes = nodes[torch.cat([torch.ones(1, dtype=torch.bool), nodes.diff() > 1e-12])]
    nodes[-1] = 1.0
    kept = max(resolution, MOST_ENTRIES // len(spectra))
    if len(nodes) > kept:
        nodes = nodes[torch.linspace(0, len(nodes) - 1, kept).round().long()]
    per_subspace = [LogLinear(time, logs[None])(nodes) for time in times]
    return LogLinear(nodes, torch.cat([each.g.T for each in per_subspace]).log())


@dataclass(frozen=True)
class ScheduleRequest:
    """What a schedule is made from before any training.

    Attributes:
        subspaces: J.
        g_min: variance at t = 0.
        sigma_min: smallest level of EDM's grid.
        sigma_max: level at t = 1.
        knots: nodes of the schedule.
        c: constant of the loss that a closed form minimises.
        classes: number of classes with a schedule each; 0 is one for all.
        spectra: for each subspace, the variances of the data's coefficients; None where they are not known.
        fixed_ends: exponents move the variances between the ends alone.
    """

    subspaces: int
    g_min: float
    sigma_min: float
    sigma_max: float
    knots: int
    c: float
    classes: int = 0
    spectra: Callable[[], list[Tensor]] | None = None
    fixed_ends: bool = True


def karras_schedule(request: ScheduleRequest) -> KnotSchedule:
    """EDM's schedule in every subspace, to learn from."""
    logs = karras_logs(request.knots, request.g_min, request.sigma_min, request.sigma_max)
    logs = logs.expand(request.subspaces, -1)
    return KnotSchedule(logs.expand(request.classes, -1, -1) if request.classes else logs)


def spectral_schedule(request: ScheduleRequest) -> FixedSchedule:
    """The path of least TLSM loss for Gaussian data of the images' spectrum; see `spectral_curve`.

    Raises:
        InvalidArgument: the spectra are not known, or a subspace has none.
    """
    if request.classes or request.spectra is None:
        raise InvalidArgument("a closed form is for one schedule a subspace of the DCT")
    return FixedSchedule(spectral_curve(request.spectra(), request.c, request.g_min, request.sigma_max**2))


def exponent_schedule(request: ScheduleRequest) -> ExponentSchedule:
    """The flexible process's schedule, at rate 1 in every subspace, to learn from.

    Raises:
        InvalidArgument: a schedule a class is asked for.
    """
    if request.classes:
        raise InvalidArgument("exponents are shared by all classes")
    ends = (request.g_min, request.sigma_max**2) if request.fixed_ends else None
    return ExponentSchedule(torch.zeros(request.subspaces), ends)
