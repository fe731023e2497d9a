"""Derivative of the flow with respect to the path's parameters, and of functions of M in a basis that turns.

The flow is `f = N^T score` for a root `N N^T = M`; here `N = M^{1/2}`, symmetric. At fixed z, for an exact network

    d f = 1/2 sum_i D^2 f[e_i, (d M) e_i] + D f[(d M) score] + (d N)^T score

(paper, Lemma 5, with exponent -1/2 in its middle term, covers a fixed basis; for a moving one its last term,
`1/2 M^{-1} (d M) f`, differs). It is contracted with the loss's gradient in the flow, G, held constant: with
`h(z) = <G, flow(z)>` it is the derivative of

    1/2 <M e, Hess h e> + <M grad h, score> + <N G, score>,    E[e e^T] = I,

in M and N: a gradient in z and a Hessian-vector product, whatever the number of parameters.

Both come from two gradients, at z + d and z - d along the probe e: their mean is the gradient, their difference the
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
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from anisodiff.denoiser import Denoiser
from anisodiff.paths.noise_path import BatchPath, NoisePath


@contextlib.contextmanager
def frozen(denoiser: Denoiser) -> Iterator[None]:
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


class MovingFrame:
    """Functions of the covariance in coefficients of the present basis, with the gradient of the basis that turns.

    With `R = U_now U(theta)^T`, of value 1, they are `F(M) = R F(D) R^T = F_0 + R (F(D) - F_0) R^T` for any multiple
    F_0 of the identity: the first subspace's value is taken, so that where all levels are equal the gradient is 0
    exactly. A basis that is fixed costs nothing.

    Args:
        path: the path, as the images of the batch see it.
    """

    def __init__(self, path: NoisePath | BatchPath):
        self.path, self.now, self.moves = path, path.subspaces.detached(), False
        if path.subspaces.learnable and torch.is_grad_enabled():
            self.moving, self.moves = path.subspaces.formed(), True

    def scale(self, z: Float[Tensor, "b c h w"], values: Float[Tensor, "#b j"]) -> Float[Tensor, "b c h w"]:
        """`F(M) z` for `values = F(g)`, with the gradients of `z`, of the values and of the basis."""
        scaled = self.path.scale(z, values)
        return scaled + self._turn(z, values) if self.moves else scaled

    def form(
        self, a: Float[Tensor, "b c h w"], b: Float[Tensor, "b c h w"], values: Float[Tensor, "#b j"]
    ) -> Float[Tensor, " b"]:
        """A term of value 0, whose gradient is that of `<a, F(M) b>` in the basis alone."""
        return (a.detach() * self._turn(b, values)).flatten(1).sum(1) if self.moves else a.new_zeros(len(a))

    def _turn(self, z: Tensor, values: Tensor) -> Tensor:
        """`R F(D) R^T z` less its own value, so that rounding in R mixes no small level with a large one."""
        apart = (values - values[:, :1]).detach()
        turned = self.moving.scale(self.moving.from_pixels(self.now.to_pixels(z.detach())), apart)
        back = self.now.from_pixels(self.moving.to_pixels(turned))
        return back - back.detach()


@dataclass(frozen=True)
class FlowResponse:
    """`<G, d flow>` of an exact network as a function of dM and dN, without a graph.

    Attributes:
        g: variances.
        sides: left and right sides of `1/2 <left, (d M) right>`, one pair a probe.
        slope: gradient of h, for `<slope, (d M) score>`.
        flow: `M^{1/2} score`.
        cotangent: G, for `<G, (d N) score>`.
    """

    g: Float[Tensor, "b j"]
    sides: list[tuple[Float[Tensor, "b c h w"], Float[Tensor, "b c h w"]]]
    slope: Float[Tensor, "b c h w"]
    flow: Float[Tensor, "b c h w"]
    cotangent: Float[Tensor, "b c h w"]

    def in_levels(self, path: NoisePath | BatchPath) -> Float[Tensor, "b j"]:
        """The derivative in `log g_j`, in each subspace."""
        bends = sum(path.inner(left, right) for left, right in self.sides) / len(self.sides)
        slopes, ends = path.inner(self.slope, self.flow), path.inner(self.cotangent, self.flow)
        return self.g / 2 * bends + self.g.sqrt() * slopes + ends / 2

    def in_basis(self, frame: MovingFrame) -> Float[Tensor, " b"]:
        """A term of value 0 with the derivative in the basis as its gradient."""
        if not frame.moves:
            return self.flow.new_zeros(len(self.flow))
        score = frame.path.scale(self.flow, self.g.rsqrt())
        bends = sum(frame.form(left, right, self.g) for left, right in self.sides) / len(self.sides)
        return bends / 2 + frame.form(self.slope, score, self.g) + frame.form(self.cotangent, score, self.g.sqrt())


def flow_response(
    denoiser: Denoiser,
    z: Float[Tensor, "b c h w"],
    g: Float[Tensor, "b j"],
    labels: Float[Tensor, "b k"] | None,
    flow: Float[Tensor, "b c h w"],
    cotangent: Float[Tensor, "b c h w"],
    probes: Float[Tensor, "p b c h w"],
) -> FlowResponse:
    """Evaluate how `<G, flow>` follows the covariance, for an exact network.

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

    slope, sides = torch.zeros_like(z), []
    with frozen(denoiser):
        for probe in probes:
            shift = path.scale(probe, h * width)
            up, down = gradient(z + shift), gradient(z - shift)
            slope += (up + down) / (2 * len(probes))
            sides.append((path.scale(probe, 1 / width), (up - down) / (2 * h)))
    return FlowResponse(g, sides, slope, flow, cotangent)


def flow_derivative(
    denoiser: Denoiser,
    z: Float[Tensor, "b c h w"],
    g: Float[Tensor, "b j"],
    labels: Float[Tensor, "b k"] | None,
    flow: Float[Tensor, "b c h w"],
    cotangent: Float[Tensor, "b c h w"],
    probes: Float[Tensor, "p b c h w"],
) -> Float[Tensor, "b j"]:
    """`<G, d flow / d log g_j>` for an exact network, in each subspace; without a graph. See `flow_response`."""
    response = flow_response(denoiser, z, g, labels, flow, cotangent, probes)
    return response.in_levels(denoiser.path.for_labels(labels))
