"""Derivative of the flow with respect to the path's parameters (paper, Lemma 5, with exponent -1/2 in its middle term).

    d_theta flow = 1/2 sum_i d_r d_s flow(x + r e_i + s (d_theta M) e_i)
                 + d_s flow(x + s (d_theta M) M^{-1/2} flow) + 1/2 M^{-1} (d_theta M) flow

It is contracted with the loss's gradient in the flow, G, held constant. With `h(z) = <G, flow(z)>` and d_theta M
diagonal, `<G, d_theta flow> = sum_k (d_theta log g_k) [g e (Hess h e) / 2 + sqrt(g) (grad h) flow + G flow / 2]_k`
for a random probe e: a gradient in z and a Hessian-vector product, whatever the number of parameters.

Both come from two gradients, at z + d and z - d along the probe: their mean is the gradient, their difference the
product. The error is of order h^2 with h the cube root of the precision (1e-10 in float64, 1e-4 in float32), far below
the probes' own noise; in return no second derivative of the network is needed, so that any attention kernel serves, and
it takes about half the time of a double backward pass (measured on a CPU).

With one subspace, the level that the network is told gives a derivative for nothing (`tlsm_loss`, `through_level`).
Measured with the digits' base network on EDM's path (c = 0.5, 300 batches of 256, one core of a CPU): the gradient in
theta has a standard deviation of 128 with this derivative on 1/8 of the batch, 93 on all of it, 81 through the level,
at 228, 510 and 177 ms a step (175 for the envelope). The means, of length 85 and 78, are 59 +- 3 apart: this derivative
is that of an exact network, the other that of the network at hand.
"""

import contextlib
from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from anisodiff.denoiser import Denoiser


@contextlib.contextmanager
def _frozen(denoiser: Denoiser) -> Iterator[None]:
    """No dropout, which would differ between the two sides, no graph to the weights, no rounding to half precision."""
    network, body = denoiser.network, denoiser.body
    training, learning = network.training, [each for each in network.parameters() if each.requires_grad]
    network.eval().requires_grad_(False)
    denoiser.body = torch.float32
    try:
        yield
    finally:
        denoiser.body = body
        network.train(training)
        for parameter in learning:
            parameter.requires_grad_(True)


def flow_derivative(
    denoiser: Denoiser,
    z: Float[Tensor, "b c h w"],
    g: Float[Tensor, "b j"],
    labels: Float[Tensor, "b k"] | None,
    flow: Float[Tensor, "b c h w"],
    cotangent: Float[Tensor, "b c h w"],
    probes: Float[Tensor, "p b c h w"],
) -> Float[Tensor, "b j"]:
    """`<G, d flow / d log g_j>` for an exact network, in each subspace; without a graph.

    Args:
        denoiser: network over the path.
        z: noisy coefficients.
        g: variances.
        labels: one-hot classes.
        flow: the flow at z.
        cotangent: G, the loss's gradient in the flow.
        probes: random probes with `E[e e^T] = I` in z's coefficients; their estimates are averaged.
    """
    path = denoiser.path.for_labels(labels)
    z, g, flow, cotangent = (each.detach() for each in (z, g, flow, cotangent))
    h = torch.finfo(z.dtype).eps ** (1 / 3)
    # a probe moves z by h of the noise, or of a twentieth of the data where the noise is less than the rounding of z
    width = (g + (denoiser.sigma_data / 20) ** 2).sqrt()

    def gradient(at: Tensor) -> Tensor:
        at.requires_grad_()
        with torch.enable_grad():
            return torch.autograd.grad(denoiser.flow(at, g, labels), at, cotangent)[0]

    slopes, bends = torch.zeros_like(z), torch.zeros_like(g)
    with _frozen(denoiser):
        for probe in probes:
            shift = path.scale(probe, h * width)
            up, down = gradient(z + shift), gradient(z - shift)
            slopes += (up + down) / (2 * len(probes))
            bends += path.inner(probe, up - down) / (2 * h * width * len(probes))  # trace of Hess h
    return g / 2 * bends + g.sqrt() * path.inner(slopes, flow) + path.inner(cotangent, flow) / 2
