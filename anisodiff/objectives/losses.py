"""Training losses, one value an image: EDM's, score matching along a path (TLSM and others), kinetic, and the warp's.

Noise, times and levels are arguments, so a loss is a function and its randomness belongs to the caller. Sums run over
all coefficients; callers take the mean over the batch.
"""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from anisodiff.denoiser import Denoiser
from anisodiff.errors import InvalidArgument
from anisodiff.networks.turned import Turned
from anisodiff.objectives.path_gradient import MovingFrame, flow_response, frozen
from anisodiff.objectives.registry import WEIGHTS
from anisodiff.paths.noise_path import BatchPath, NoisePath, Warp
from anisodiff.paths.schedules import Variance


def edm_loss(
    denoiser: Denoiser,
    x0: Float[Tensor, "b c h w"],
    eps: Float[Tensor, "b c h w"],
    sigma: Float[Tensor, " b"],
    labels: Float[Tensor, "b k"] | None = None,
    augment_labels: Float[Tensor, "b a"] | None = None,
) -> Float[Tensor, " b"]:
    """EDM's loss (arXiv:2206.00364, Table 1), isotropic: `(sigma^2 + s^2) / (sigma s)^2 ||D(x_t) - x0||^2`.

    Args:
        denoiser: over a path of any schedule.
        x0: clean images in [-1, 1].
        eps: standard normal noise.
        sigma: standard deviation for each image; EDM draws `exp(-1.2 + 1.2 N(0, 1))`.
        labels: one-hot classes.
        augment_labels: what the network is told of the images' augmentation.
    """
    path = denoiser.path.for_labels(labels)
    g = sigma.square()[:, None].expand(-1, path.subspaces.count)
    basis = path.subspaces.detached()
    eps = basis.from_pixels(eps)
    flow = denoiser.flow(basis.from_pixels(x0) + path.scale(eps, g.sqrt()), g, labels, augment_labels)
    weight = (sigma.square() + denoiser.sigma_data**2) / denoiser.sigma_data**2
    return weight * (flow + eps).square().flatten(1).sum(1)


def tlsm_weight(noise: Variance, c: float) -> Float[Tensor, "b j"]:
    """Weight of trajectory-level score matching, `g_dot^2 / ((g + c) g)` (paper, Eq. 15)."""
    return noise.g_dot.square() / ((noise.g + c) * noise.g)


def elbo_weight(noise: Variance, c: float) -> Float[Tensor, "b j"]:
    """Weight `g_dot / (2 g)`, which bounds the likelihood in nats but for a constant (arXiv:2206.10365, Eq. 17)."""
    return noise.g_dot / (2 * noise.g)


def simple_weight(noise: Variance, c: float) -> Float[Tensor, "b j"]:
    """Weight 1, for paths that are fixed or held by `kinetic`: others lower the loss by raising levels without end."""
    return torch.ones_like(noise.g)


def tlsm_loss(
    denoiser: Denoiser,
    x0: Float[Tensor, "b c h w"],
    eps: Float[Tensor, "b c h w"],
    t: Float[Tensor, " b"],
    labels: Float[Tensor, "b k"] | None = None,
    c: float = 1.0,
    probes: Float[Tensor, "p n c h w"] | None = None,
    through_level: bool = False,
    weight: str = "tlsm",
) -> Float[Tensor, " b"]:
    """Trajectory-level score matching `||(M + c I)^{-1/2} Mdot M^{-1/2} (flow(x_t, t) + eps)||^2` (paper, Eq. 15), or
    the same error weighted otherwise.

    The gradient in the path's parameters passes through x_t and through the weights in front; the flow's direct
    dependence on them is held constant, and supplied by `flow_response` where probes are given ("full" gradient).
    A basis that is learnable is among the parameters.

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
        weight: name of the error's weight in each subspace, one of `WEIGHTS`.

    Raises:
        InvalidArgument: `through_level` with several subspaces or with probes, or an unknown weight.
    """
    path = denoiser.path.for_labels(labels)
    if through_level and (path.subspaces.count > 1 or probes is not None):
        raise InvalidArgument("the gradient passes through the level of one subspace only, and takes no probes")
    if weight not in WEIGHTS:
        raise InvalidArgument(f"weight: {weight!r} is unknown: use one of {', '.join(WEIGHTS)}")
    noise, frame = path.at(t), MovingFrame(path)
    z = frame.now.from_pixels(x0) + frame.scale(eps, noise.sigma)
    front = WEIGHTS[weight].load()(noise, c).to(z.dtype)
    g = noise.g if through_level else noise.g.detach()

    flow = denoiser.flow(z, g, labels)
    error = flow + eps
    losses = (path.inner(error, error) * front).sum(1) + frame.form(error, error, front)
    if probes is None:
        return losses
    head = slice(0, probes.shape[1])
    cotangent = 2 * path.scale(error, front)[head]
    head_labels = None if labels is None else labels[head]
    response = flow_response(denoiser, z[head], g[head], head_labels, flow[head], cotangent, probes)
    log_g, of_head = noise.g[head].log(), denoiser.path.for_labels(head_labels)
    in_levels = ((log_g - log_g.detach()) * response.in_levels(of_head)).sum(1)
    correction = (in_levels + response.in_basis(frame)) * (len(z) / len(flow[head]))
    return torch.cat([losses[head] + correction.to(z.dtype), losses[head.stop :]])


def velocity_factors(noise: Variance) -> tuple[Float[Tensor, "b j"], Float[Tensor, "b j"]]:
    """Factors on z and on the flow in the velocity of the flexible process's flow, in units of t.

    In its coordinates `x = (1 + M)^{-1/2} z`, where the noise has variance 1 at the end (arXiv:2206.10365, Eq. 20),
    `v = -1/2 Mdot (1 + M)^{-1} (x + (1 + M)^{1/2} M^{-1/2} flow)`.
    """
    stretch = (1 + noise.g).sqrt()
    return -noise.g_dot / (2 * stretch**3), -noise.g_dot / (2 * noise.sigma * stretch)


def turning(path: NoisePath | BatchPath, noise: Variance) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"]]:
    """The time beta of a turned network's frame, `log(1 + g)` of the mean level, and its rate in t."""
    log_g = path.mean_log(noise.g)
    return torch.logaddexp(log_g, torch.zeros_like(log_g)), log_g.sigmoid() * ((noise.g_dot / noise.g) @ path.weights)


def kinetic(
    denoiser: Denoiser,
    z: Float[Tensor, "b c h w"],
    t: Float[Tensor, " b"],
    probe: Float[Tensor, "b c h w"],
    labels: Float[Tensor, "b k"] | None = None,
) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"]]:
    """Kinetic energy `|v|^2` and `|grad <v, e>|^2` of the flow's velocity v (arXiv:2206.10365, 4.1; Finlay et al.).

    Integrals over t of both are those of the paper's regulariser; see `velocity_factors`. In the frame of a network
    that is `Turned`, the velocity has the part `-beta' omega x` besides. The gradient reaches path and frame alone: the
    flow, its Jacobian, and `z` unless it has a graph, are constants.

    Args:
        denoiser: network over the path.
        z: noisy coefficients.
        t: times in [0, 1].
        probe: random e with `E[e e^T] = I`, in z's coefficients.
        labels: one-hot classes.
    """
    path = denoiser.path.for_labels(labels)
    noise, frame = path.at(t), MovingFrame(path)
    stretch = (1 + noise.g).sqrt()
    of_z, of_flow = velocity_factors(noise)
    # attention's other kernels have no second derivative, with which the Jacobian's product follows its argument
    with frozen(denoiser), sdpa_kernel(SDPBackend.MATH), torch.enable_grad():
        at = z.detach().requires_grad_()
        flow = denoiser.flow(at, noise.g.detach(), labels)
        (pulled,) = torch.autograd.grad(flow, at, frame.scale(probe, of_flow), create_graph=True)
    velocity = frame.scale(z, of_z) + frame.scale(flow.detach(), of_flow)
    slope = frame.scale(probe, of_z * stretch) + frame.scale(pulled, stretch)
    if isinstance(denoiser.network, Turned):
        rate = turning(path, noise)[1].to(z.dtype)[:, None, None, None]
        turns, now = denoiser.network.frame, frame.now
        omega = lambda each: now.from_pixels(turns.omega(now.to_pixels(each)))  # noqa: E731
        velocity = velocity - rate * omega(frame.scale(z, 1 / stretch))
        slope = slope + rate * omega(probe)  # omega^T = -omega
    return velocity.square().flatten(1).sum(1), slope.square().flatten(1).sum(1)


def warp_loss(
    denoiser: Denoiser,
    path: NoisePath,
    warp: Warp | None,
    x0: Float[Tensor, "b c h w"],
    eps: Float[Tensor, "b c h w"],
    start: Float[Tensor, " b"],
    end: Float[Tensor, " b"],
    test: Float[Tensor, " b"],
    labels: Float[Tensor, "b k"] | None = None,
    c: float = 0.5,
) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"]]:
    """Discretisation loss H of one midpoint step in warped time, and the score-matching loss L_hat at its start.

    Paper, Section 5.2 and Eq. 20; the warp, or the path, minimises their sum. Nothing is held constant: the network
    is evaluated at the warped levels.

    Args:
        denoiser: network over the path; its parameters are not trained here.
        path: the path whose time is warped.
        warp: r(t; gamma); None is the path's own time, of a path that learns to be discretised, in all subspaces.
        x0: clean images in [-1, 1].
        eps: standard normal noise, in the path's coefficients.
        start: time at which the step starts, in [0, 1].
        end: time at which it ends, at most `start`; the evaluation point is half-way. Where both coincide, H is 0.
        test: time between the two at which velocities are compared.
        labels: one-hot classes.
        c: scale of the data's variance in the weight.
    """

    seen = path.for_labels(labels)

    def at(t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Variance, standard deviation, and the weight of a velocity `(M + c)^{-1/2} Mdot M^{-1/2}` at warped time."""
        r, rate = (t, torch.ones_like(t)) if warp is None else warp(t)
        noise = seen.at(r)
        return noise.g, noise.sigma, noise.g_dot * rate[:, None] * ((noise.g + c) * noise.g).rsqrt()

    g, sigma, weight = at(start)
    z = seen.from_pixels(x0) + seen.scale(eps, sigma)
    flow = denoiser.flow(z, g, labels)
    score_matching = seen.inner(2 * flow, flow + eps) * weight.square().to(z.dtype)

    g_hat, sigma_hat, _ = at((start + end) / 2)
    delta = sigma_hat - sigma
    flow_hat = denoiser.flow(z - seen.scale(flow, delta), g_hat, labels)

    g_test, sigma_test, weight_test = at(test)
    step = sigma_test - sigma
    change = flow_hat - flow
    share = step / torch.where(delta == 0, 1.0, delta)  # in the limit start = end there is no change to share out
    reached = z - seen.scale(flow, step) - seen.scale(change, share * step / 2)
    interpolated = flow + seen.scale(change, share)
    error = denoiser.flow(reached, g_test, labels) - interpolated
    discretisation = seen.inner(error, error) * weight_test.square().to(z.dtype)
    return discretisation.sum(1), score_matching.sum(1)
