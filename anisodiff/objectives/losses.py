"""Training losses, one value an image: EDM's, trajectory-level score matching (TLSM), and the warp's.

Noise, times and levels are arguments, so a loss is a function and its randomness belongs to the caller. Sums run over
all coefficients; callers take the mean over the batch.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from anisodiff.denoiser import Denoiser
from anisodiff.errors import InvalidArgument
from anisodiff.objectives.path_gradient import flow_derivative
from anisodiff.paths.noise_path import NoisePath, Warp


def edm_loss(
    denoiser: Denoiser,
    x0: Float[Tensor, "b c h w"],
    eps: Float[Tensor, "b c h w"],
    sigma: Float[Tensor, " b"],
    labels: Float[Tensor, "b k"] | None = None,
) -> Float[Tensor, " b"]:
    """EDM's loss (arXiv:2206.00364, Table 1), isotropic: `(sigma^2 + s^2) / (sigma s)^2 ||D(x_t) - x0||^2`.

    Args:
        denoiser: over a path of any schedule.
        x0: clean images in [-1, 1].
        eps: standard normal noise.
        sigma: standard deviation for each image; EDM draws `exp(-1.2 + 1.2 N(0, 1))`.
        labels: one-hot classes.
    """
    path = denoiser.path.for_labels(labels)
    g = sigma.square()[:, None].expand(-1, path.subspaces.count)
    eps = path.from_pixels(eps)
    flow = denoiser.flow(path.from_pixels(x0) + path.scale(eps, g.sqrt()), g, labels)
    weight = (sigma.square() + denoiser.sigma_data**2) / denoiser.sigma_data**2
    return weight * (flow + eps).square().flatten(1).sum(1)


def tlsm_loss(
    denoiser: Denoiser,
    x0: Float[Tensor, "b c h w"],
    eps: Float[Tensor, "b c h w"],
    t: Float[Tensor, " b"],
    labels: Float[Tensor, "b k"] | None = None,
    c: float = 1.0,
    probes: Float[Tensor, "p n c h w"] | None = None,
    through_level: bool = False,
) -> Float[Tensor, " b"]:
    """Trajectory-level score matching `||(M + c I)^{-1/2} Mdot M^{-1/2} (flow(x_t, t) + eps)||^2` (paper, Eq. 15).

    The gradient in the path's parameters passes through x_t and through the weights in front; the flow's direct
    dependence on them is held constant, and supplied by `flow_derivative` where probes are given ("full" gradient).
    With one subspace nothing need be held constant ("level" gradient): the network knows every level that such a path
    can have, so that the loss's own gradient is sound, whether the network is exact or not.

    Args:
        denoiser: network over the path that is trained.
        x0: clean images in [-1, 1].
        eps: standard normal noise, in the path's coefficients.
        t: times in [0, 1].
        labels: one-hot classes.
        c: scale of the data's variance in the weight.
        probes: random probes with `E[e e^T] = I` for the first n images of the batch, whose gradient in the path gets
            the flow's derivative, scaled up to the whole batch; its value is zero. None leaves it out ("envelope").
        through_level: nothing is held constant; one subspace and no probes.
    """
    path = denoiser.path.for_labels(labels)
    if through_level and (path.subspaces.count > 1 or probes is not None):
        raise InvalidArgument("the gradient passes through the level of one subspace only, and takes no probes")
    noise = path.at(t)
    z = path.from_pixels(x0) + path.scale(eps, noise.sigma)
    weight = (noise.g_dot.square() / ((noise.g + c) * noise.g)).to(z.dtype)
    g = noise.g if through_level else noise.g.detach()

    flow = denoiser.flow(z, g, labels)
    error = flow + eps
    losses = (path.inner(error, error) * weight).sum(1)
    if probes is None:
        return losses
    head = slice(0, probes.shape[1])
    cotangent = 2 * path.scale(error, weight)[head]
    head_labels = None if labels is None else labels[head]
    derivative = flow_derivative(denoiser, z[head], g[head], head_labels, flow[head], cotangent, probes)
    log_g = noise.g[head].log()
    correction = ((log_g - log_g.detach()) * derivative).sum(1) * (len(z) / len(derivative))
    return torch.cat([losses[head] + correction.to(z.dtype), losses[head.stop :]])


def warp_loss(
    denoiser: Denoiser,
    path: NoisePath,
    warp: Warp,
    x0: Float[Tensor, "b c h w"],
    eps: Float[Tensor, "b c h w"],
    start: Float[Tensor, " b"],
    end: Float[Tensor, " b"],
    test: Float[Tensor, " b"],
    labels: Float[Tensor, "b k"] | None = None,
    c: float = 0.5,
) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"]]:
    """Discretisation loss H of one midpoint step in warped time, and the score-matching loss L_hat at its start.

    Paper, Section 5.2 and Eq. 20; the warp minimises their sum. Nothing is held constant: the network
    is evaluated at the warped levels.

    Args:
        denoiser: network over the path; its parameters are not trained here.
        path: the path whose time is warped.
        warp: r(t; gamma).
        x0: clean images in [-1, 1].
        eps: standard normal noise, in the path's coefficients.
        start: time at which the step starts, in [0, 1].
        end: time at which it ends, at most `start`; the evaluation point is half-way. Where both coincide, H is 0.
        test: time between the two at which velocities are compared.
        labels: one-hot classes.
        c: scale of the data's variance in the weight.
    """

    def at(t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Variance, standard deviation, and the weight of a velocity `(M + c)^{-1/2} Mdot M^{-1/2}` at warped time."""
        r, rate = warp(t)
        noise = path.at(r)
        return noise.g, noise.sigma, noise.g_dot * rate[:, None] * ((noise.g + c) * noise.g).rsqrt()

    g, sigma, weight = at(start)
    z = path.from_pixels(x0) + path.scale(eps, sigma)
    flow = denoiser.flow(z, g, labels)
    score_matching = path.inner(2 * flow, flow + eps) * weight.square().to(z.dtype)

    g_hat, sigma_hat, _ = at((start + end) / 2)
    delta = sigma_hat - sigma
    flow_hat = denoiser.flow(z - path.scale(flow, delta), g_hat, labels)

    g_test, sigma_test, weight_test = at(test)
    step = sigma_test - sigma
    change = flow_hat - flow
    share = step / torch.where(delta == 0, 1.0, delta)  # in the limit start = end there is no change to share out
    reached = z - path.scale(flow, step) - path.scale(change, share * step / 2)
    interpolated = flow + path.scale(change, share)
    error = denoiser.flow(reached, g_test, labels) - interpolated
    discretisation = path.inner(error, error) * weight_test.square().to(z.dtype)
    return discretisation.sum(1), score_matching.sum(1)
