"""Likelihoods of images under a denoiser over any path, one value an image, in nats; two ways.

`ode_log_likelihood` follows the probability flow and integrates its divergence: the log of a density, of images that
are dequantised. `bound` is a lower bound of the log probability of grey levels (arXiv:2206.10365, Eq. 17), without an
equation to solve, a trace or dequantisation. Both with sums over all coefficients; `bits_per_dimension` makes them
comparable.

Chance comes from one CPU generator an image (`seeded`), drawn from in the order of the calls.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from anisodiff.denoiser import Denoiser
from anisodiff.errors import InvalidArgument
from anisodiff.grids.levels import Levels
from anisodiff.paths.noise_path import BatchPath, NoisePath
from anisodiff.paths.principal import PcaSubspaces

MOST_EXACT = 64  # dimensions whose trace is taken exactly, one product each


@dataclass(frozen=True)
class Moments:
    """Moments of the data, for the prior at the last level: `N(mean, M_T + variance)`.

    Attributes:
        mean: of every coefficient, float64.
        variance: of every coefficient, float64.
    """

    mean: Float[Tensor, "c h w"]
    variance: Float[Tensor, "c h w"]


def data_moments(path: NoisePath, parts: Iterable[Float[Tensor, "_ c h w"]]) -> Moments:
    """Moments of a path's coefficients over images in pixels, in one pass.

    Args:
        path: whose coefficients they are.
        parts: images in [-1, 1], some at a time.

    Raises:
        InvalidArgument: there are no images, or the path keeps no coefficients (`PcaSubspaces`).
    """
    _require_coefficients(path)
    count, total, square = 0, 0.0, 0.0
    for part in parts:
        z = path.from_pixels(part.to(path.weights.device, torch.float64))
        count, total, square = count + len(z), total + z.sum(0), square + z.square().sum(0)
    if not isinstance(total, Tensor) or not isinstance(square, Tensor):
        raise InvalidArgument("moments: there are no images")
    mean = total / count
    return Moments(mean, (square / count - mean.square()).clamp(min=0))


def seeded(seeds: Sequence[int]) -> list[torch.Generator]:
    """One CPU generator an image, from its seed."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def dequantised(
    x0: Float[Tensor, "b c h w"], grey_levels: int, generators: Sequence[torch.Generator]
) -> Float[Tensor, "b c h w"]:
    """Add uniform noise as wide as a grey level, centred: `x0 + (u - 1/2) 2 / (grey_levels - 1)`.

    Args:
        x0: images in [-1, 1].
        grey_levels: of a pixel, evenly spaced from -1 to 1.
        generators: one an image.

    Raises:
        InvalidArgument: images outside [-1, 1].
    """
    _require_unit(x0)
    u = torch.stack([torch.rand(x0.shape[1:], generator=each) for each in generators]).to(x0)
    return x0 + (u - 0.5) * (2 / (grey_levels - 1))


def rademacher(
    count: int, shape: tuple[int, int, int], generators: Sequence[torch.Generator]
) -> Float[Tensor, "p b c h w"]:
    """Random signs, the probes of `ode_log_likelihood`.

    Args:
        count: probes an image.
        shape: channels, height, width.
        generators: one an image.
    """
    signs = [torch.randint(2, (count, *shape), generator=each) for each in generators]
    return 2 * torch.stack(signs, dim=1).to(torch.float32) - 1


def ode_log_likelihood(
    denoiser: Denoiser,
    x0: Float[Tensor, "b c h w"],
    levels: Levels,
    moments: Moments,
    labels: Float[Tensor, "b k"] | None = None,
    probes: Float[Tensor, "p b c h w"] | None = None,
) -> Float[Tensor, " b"]:
    """Log density of images at the last level, by the instantaneous change of variables along the probability flow.

    With `n = sqrt(g)`, `dz = -flow dn`; the denoiser's Jacobian without c_skip, whose part is known in closed form:

        log p(z_0) = log N(z_T; mean, M_T + V) + 1/2 sum_k log((g_k(T) + s^2) / (g_k(0) + s^2))
                     - int sum_k c_out c_in (dF_k / din_k) dlog n_k

    by the midpoint method on the grid's own inner points, with the trace there: order 2, two evaluations a step.

    Args:
        denoiser: over the path, in evaluation mode.
        x0: images in pixels, dequantised.
        levels: the grid, which is followed upwards; not down to 0. The density is that of images with the last level's
            noise: compare at one last level, and take it well below the width of a grey level (seen on the digits,
            whose grey levels are 0.125 apart: 103 nats from 0.002, 90.7 from 0.015, 84.0 from 0.03).
        moments: of the data, for the prior.
        labels: one-hot classes.
        probes: random signs in pixels, the same for all steps; their estimates of the trace are averaged. None takes
            the exact trace, with as many products as there are dimensions.

    Returns:
        nats of each image, float64.

    Raises:
        InvalidArgument: levels down to 0, an exact trace of too many dimensions, or a path that keeps no coefficients.
    """
    _require_coefficients(denoiser.path)
    if (levels.nodes[-1] == 0).any():
        raise InvalidArgument("likelihood: the levels go down to 0, where there is no density: end above it")
    dimensions = x0[0].numel()
    if probes is None and dimensions > MOST_EXACT:
        raise InvalidArgument(
            f"likelihood: an exact trace takes {dimensions} products a step, up to {MOST_EXACT} are made: give probes"
        )
    path, levels = denoiser.path.for_labels(labels), levels.to(x0.device).for_labels(labels)
    z = path.from_pixels(x0)
    if probes is None:
        units = torch.eye(dimensions, dtype=z.dtype, device=z.device).reshape(-1, 1, *z.shape[1:])
        directions, share = units.expand(-1, len(z), -1, -1, -1), 1.0
    else:
        directions = torch.stack([path.from_pixels(probe) for probe in probes.to(z)])
        share = 1 / len(probes)

    def flow_and_trace(z: Tensor, sigma: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The flow, and the trace of `weight` times its Jacobian without c_skip."""
        z = z.detach().requires_grad_()
        with torch.enable_grad():
            flow = denoiser.flow(z, sigma.square(), labels)
        skipped = weight * sigma / (sigma.square() + denoiser.sigma_data**2)
        trace = torch.zeros(len(z), dtype=torch.float64, device=z.device)
        for index, each in enumerate(directions):
            last = index == len(directions) - 1
            (product,) = torch.autograd.grad(flow, z, path.scale(each, weight), retain_graph=not last)
            product = product + path.scale(each, skipped)
            trace += (each * product).flatten(1).sum(1).to(torch.float64)
        return flow.detach(), share * trace

    total = torch.zeros(len(z), dtype=torch.float64, device=z.device)
    for k in reversed(range(levels.steps)):
        end, middle, start = levels.nodes[k], levels.inner[k], levels.nodes[k + 1]
        with torch.no_grad():
            half = z - path.scale(denoiser.flow(z, start.square(), labels), middle - start)
        flow, trace = flow_and_trace(half, middle, middle * (end / start).log())
        z = (z - path.scale(flow, end - start)).detach()
        total -= trace
    first, last = levels.nodes[-1].square(), levels.nodes[0].square()
    skip = ((last + denoiser.sigma_data**2) / (first + denoiser.sigma_data**2)).log() / 2
    total += _diagonal(path, z, skip).flatten(1).sum(1)
    variance = _diagonal(path, z, last) + moments.variance
    prior = -((z - moments.mean).square() / variance + (2 * math.pi * variance).log()).flatten(1).sum(1) / 2
    return total + prior


def diffusion_loss(
    denoiser: Denoiser,
    x0: Float[Tensor, "b c h w"],
    eps: Float[Tensor, "b c h w"],
    share: Float[Tensor, " b"],
    decoder_noise: float,
    labels: Float[Tensor, "b k"] | None = None,
) -> Float[Tensor, " b"]:
    """Integrand of the bound's part along the path, whose mean over uniform shares is the integral.

    With `M' = M + s0^2 I` it is `1/2 sum_j int (g_dot_j / g'_j) E|flow_j + eps_j|^2 dt`, over the mean log-level of M'.
    For an exact network the integral depends on the path's ends alone. Source: arXiv:2206.10365, Eq. 17.

    Args:
        denoiser: over the path.
        x0: images in pixels.
        eps: standard normal noise, in the path's coefficients.
        share: place of each image's time in the mean log-level, from 0 (t = 0) to 1 (t = 1).
        decoder_noise: s0, standard deviation of the noise that all levels start from.
        labels: one-hot classes.
    """
    path, least = denoiser.path.for_labels(labels), decoder_noise**2
    t, density = _times(path, share, least)
    noise = path.at(t)
    g = noise.g + least
    z = path.from_pixels(x0) + path.scale(eps, g.sqrt())
    error = denoiser.flow(z, g, labels) + eps
    weight = noise.g_dot / (2 * g * density[:, None])
    return (path.inner(error, error).to(torch.float64) * weight).sum(1)


def _times(path: NoisePath | BatchPath, share: Tensor, least: float) -> tuple[Tensor, Tensor]:
    """Times at shares of the mean log-level of `g + least`, and their density if shares are uniform; no gradient."""
    share = share.to(torch.float64)
    low, high = torch.zeros_like(share), torch.ones_like(share)
    with torch.no_grad():
        bottom, top = (path.mean_log(path.at(each).g + least) for each in (low, high))
        target = torch.lerp(bottom, top, share)
        for _ in range(52):  # bisection, to rounding
            middle = (low + high) / 2
            below = path.mean_log(path.at(middle).g + least) < target
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        t = (low + high) / 2
        noise = path.at(t)
        rate = noise.g_dot / (noise.g + least)
        return t, (rate @ path.weights.to(rate)) / (top - bottom)


def prior_divergence(
    path: NoisePath | BatchPath, x0: Float[Tensor, "b c h w"], moments: Moments, decoder_noise: float
) -> Float[Tensor, " b"]:
    """Kullback-Leibler divergence of `N(x0, M'_T)` from the prior `N(mean, M'_T + variance)`, in nats.

    Args:
        path: as the images see it.
        x0: images in pixels.
        moments: of the data.
        decoder_noise: s0 of `M' = M + s0^2 I`.
    """
    z = path.from_pixels(x0).to(torch.float64)
    m = _diagonal(path, z, path.at(torch.ones(len(z), dtype=torch.float64, device=z.device)).g + decoder_noise**2)
    whole = m + moments.variance
    return ((m + (z - moments.mean).square()) / whole - 1 + (whole / m).log()).flatten(1).sum(1) / 2


def bound(
    denoiser: Denoiser,
    x0: Float[Tensor, "b c h w"],
    moments: Moments,
    decoder_noise: float,
    times: int,
    generators: Sequence[torch.Generator],
    labels: Float[Tensor, "b k"] | None = None,
) -> Float[Tensor, " b"]:
    """Lower bound of the log probability of images of grey levels: an unbiased estimate, without a gradient.

    It is minus the path's part (`diffusion_loss`) minus the prior's (`prior_divergence`; arXiv:2206.10365, Eq. 17). The
    decoder rounds to the nearest grey level: with a `decoder_noise` of 0.12 of the distance between two of them its own
    part is below 1e-4 nats a dimension, and left out.

    Args:
        denoiser: over the path, in evaluation mode.
        x0: images in [-1, 1].
        moments: of the data, for the prior.
        decoder_noise: s0, added to all levels.
        times: times of each image, one in each of as many equal parts of the mean log-level.
        generators: one an image.
        labels: one-hot classes.

    Returns:
        nats of each image, float64.

    Raises:
        InvalidArgument: images outside [-1, 1], or a path that keeps no coefficients.
    """
    _require_unit(x0)
    _require_coefficients(denoiser.path)
    path = denoiser.path.for_labels(labels)
    shares = torch.stack([torch.rand(times, generator=each, dtype=torch.float64) for each in generators])
    shares = ((torch.arange(times) + shares) / times).to(x0.device)
    with torch.no_grad():
        total = prior_divergence(path, x0, moments, decoder_noise)
        for share in shares.T:
            eps = torch.stack([torch.randn(x0.shape[1:], generator=each) for each in generators]).to(x0)
            total += diffusion_loss(denoiser, x0, path.from_pixels(eps), share, decoder_noise, labels) / times
    return -total


def bits_per_dimension(
    log_likelihood: Float[Tensor, " b"], dimensions: int, grey_levels: int | None = None
) -> Float[Tensor, " b"]:
    """Bits a dimension of images of grey levels.

    Args:
        log_likelihood: in nats, of each image.
        dimensions: numbers of an image.
        grey_levels: of a pixel, where the likelihood is a density of images in [-1, 1] (`ode_log_likelihood`); None for
            probabilities (`bound`).
    """
    step = 0.0 if grey_levels is None else math.log2((grey_levels - 1) / 2)
    return -log_likelihood / (dimensions * math.log(2)) + step


def _diagonal(path: NoisePath | BatchPath, z: Tensor, values: Tensor) -> Tensor:
    """Each coefficient's value of its subspace, float64."""
    return path.scale(torch.ones_like(z, dtype=torch.float64), values.to(torch.float64))


def _require_coefficients(path: NoisePath) -> None:
    if isinstance(path.subspaces, PcaSubspaces):
        raise InvalidArgument(
            "likelihood: principal subspaces keep no coefficients: take a path of other subspaces than basis:NAME"
        )


def _require_unit(x0: Tensor) -> None:
    if not x0.abs().max() <= 1 + 1e-6:  # NaN too
        raise InvalidArgument(f"likelihood: images go to {float(x0.abs().max()):g}: scale them to [-1, 1]")
