"""Derivative of the flow with respect to the path's parameters (paper, Lemma 5, with exponent -1/2 in its middle term).

    d_theta flow = 1/2 sum_i d_r d_s flow(x + r e_i + s (d_theta M) e_i)
                 + d_s flow(x + s (d_theta M) M^{-1/2} flow) + 1/2 M^{-1} (d_theta M) flow

It is contracted with the loss's gradient in the flow, G, held constant. With `h(z) = <G, flow(z)>` and d_theta M
diagonal, `<G, d_theta flow> = sum_k (d_theta log g_k) [g e (Hess h e)/2 + sqrt(g) (grad h) flow + G flow / 2]_k` for a
random probe e: one gradient in z and one Hessian-vector product, whatever the number of parameters.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from anisodiff.denoiser import Denoiser


def flow_derivative(
    denoiser: Denoiser,
    z: Float[Tensor, "b c h w"],
    g: Float[Tensor, "b j"],
    labels: Float[Tensor, "b k"] | None,
    probes: Float[Tensor, "p b c h w"],
    cotangent: Callable[[Tensor], Tensor],
) -> tuple[Float[Tensor, "b c h w"], Float[Tensor, "b j"]]:
    """The flow, and `<G, d flow / d log g_j>` for an exact network, in each subspace.

    Args:
        denoiser: network over the path.
        z: noisy coefficients; may carry a gradient.
        g: variances, held constant.
        labels: one-hot classes.
        probes: random probes with `E[e e^T] = I` in z's coefficients; their estimates are averaged.
        cotangent: G as a function of the flow; what it returns is held constant.

    Returns:
        The flow, with its graph to the network's parameters and to z; and the derivative, without a graph.
    """
    path = denoiser.path
    if not z.requires_grad:
        z = z.detach().requires_grad_()
    with sdpa_kernel(SDPBackend.MATH):  # the fused kernels cannot be differentiated twice
        flow = denoiser.flow(z, g, labels)
        fixed, gradient = flow.detach(), cotangent(flow).detach()
        (slope,) = torch.autograd.grad(flow, z, gradient, create_graph=True)
        bends = torch.zeros_like(fixed)
        for probe in probes if slope.requires_grad else ():  # a flow linear in z does not bend
            (bend,) = torch.autograd.grad(slope, z, probe, retain_graph=True)
            bends += probe * bend / len(probes)
    terms = path.scale(bends, g / 2) + path.scale(slope.detach() * fixed, g.sqrt()) + gradient * fixed / 2
    return flow, path.subspaces.reduce(terms)
