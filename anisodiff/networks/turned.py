"""A network seen from a turning frame: the half of the flexible forward process that is no noise path (FP-Drift).

Du et al. 2022 (arXiv:2206.10365), Eq. 19 with A = I: `dx = 1/2 beta' (-x - 2 omega x) dt + sqrt(beta') dW`. With
`Q = exp(-omega beta)` the process is `x = Q exp(-beta / 2) y`, and y has isotropic noise whatever omega is: only the
network, which sees x, can tell. Solvers and losses stay in y, where no step of theirs has to follow the turn.
"""

import math
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from anisodiff.errors import InvalidArgument
from anisodiff.networks.unets import RawNetwork


@runtime_checkable
class Basis(Protocol):
    """Orthonormal coefficients of images."""

    def from_pixels(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]: ...

    def to_pixels(self, z: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]: ...


class PlaneFrame(nn.Module):
    """Planes that turn, each at a rate of its own: omega has blocks `[[0, rate], [-rate, 0]]` in a basis.

    Args:
        coordinates: the planes' coefficients in pairs, numbered as the images are flattened.
        rates: turns of each plane, in radians a unit of beta; learned.
        basis: whose coefficients they are; None turns pixels.

    Raises:
        InvalidArgument: an odd number of coordinates, one that is named twice or is none, or rates of other planes.
    """

    coordinates: Tensor

    def __init__(self, coordinates: Sequence[int], rates: Float[Tensor, " p"], basis: Basis | None = None):
        super().__init__()
        if len(coordinates) % 2:
            raise InvalidArgument(f"frame: {len(coordinates)} coordinates are no pairs: leave one out, or add one")
        if len(set(coordinates)) < len(coordinates) or min(coordinates, default=0) < 0:
            raise InvalidArgument("frame: the planes' coordinates must differ, and start at 0")
        if 2 * len(rates) != len(coordinates):
            raise InvalidArgument(f"frame: {len(rates)} rates for {len(coordinates) // 2} planes: give one a plane")
        self.register_buffer("coordinates", torch.tensor(coordinates, dtype=torch.int64))
        self.rates = nn.Parameter(rates.detach().to(torch.float64).clone())
        self.basis = basis

    def turn(self, x: Float[Tensor, "b c h w"], beta: Float[Tensor, "#b"]) -> Float[Tensor, "b c h w"]:
        """`exp(-omega beta) x`, in pixels; -beta turns back."""
        angle = beta.to(torch.float64)[:, None] * self.rates
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        z = self._coefficients(x)
        first, second = self._pairs(z)
        return self._pixels(z, cos * first - sin * second, sin * first + cos * second)

    def omega(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """`omega x`, in pixels; minus the turn's derivative in beta, where that is 0."""
        z, rates = self._coefficients(x), self.rates.to(x.dtype)
        first, second = self._pairs(z)
        return self._pixels(torch.zeros_like(z), rates * second, -rates * first)

    def _coefficients(self, x: Tensor) -> Tensor:
        return x if self.basis is None else self.basis.from_pixels(x)

    def _pairs(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """First and second coordinate of every plane, `[B, planes]` each."""
        first, second = z.flatten(1)[:, self.coordinates].unflatten(1, (-1, 2)).unbind(2)
        return first, second

    def _pixels(self, z: Tensor, first: Tensor, second: Tensor) -> Tensor:
        """Pixels of coefficients with other coordinates in the planes."""
        pairs = torch.stack([first, second], dim=2).flatten(1)
        changed = z.flatten(1).index_copy(1, self.coordinates, pairs).reshape(z.shape)
        return changed if self.basis is None else self.basis.to_pixels(changed)


class Turned(RawNetwork):
    """A raw network that sees its images turned, and whose output is turned back: `F -> Q^T F(Q x)`.

    Q is `exp(-omega beta)` at `beta = log(1 + g)` of the noise label's level, `g = exp(8 label)`.

    Args:
        network: the raw network.
        frame: what turns.

    Raises:
        InvalidArgument: the frame's planes are of larger images.
    """

    def __init__(self, network: RawNetwork, frame: PlaneFrame):
        super().__init__()
        self.network, self.frame = network, frame
        last, dimensions = max(frame.coordinates.tolist(), default=0), math.prod(network.shape)
        if last >= dimensions:
            raise InvalidArgument(f"frame: there is no coordinate {last} in images of {dimensions}")

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height, width of its images."""
        return self.network.shape

    @property
    def classes(self) -> int:
        """Number of classes; 0 for an unconditional network."""
        return self.network.classes

    def forward(
        self,
        x: Float[Tensor, "b c h w"],
        noise_label: Float[Tensor, " b"],
        labels: Float[Tensor, "b k"] | None = None,
        augment_labels: Float[Tensor, "b a"] | None = None,
    ) -> Float[Tensor, "b c h w"]:
        """Raw output, see `RawNetwork`."""
        log_g = 8 * noise_label.to(torch.float64)
        beta = torch.logaddexp(log_g, torch.zeros_like(log_g))
        raw = self.network(self.frame.turn(x, beta), noise_label, labels, augment_labels)
        return self.frame.turn(raw.to(x.dtype), -beta)


def turned_in_planes(network: RawNetwork, planes: int, seed: int) -> Turned:
    """A network whose images turn in planes of pixels, at rates drawn from a normal distribution (B.2).

    Args:
        network: the raw network.
        planes: how many; each takes two pixels, in the order of a seeded permutation.
        seed: seed of pixels and rates.

    Raises:
        InvalidArgument: there are fewer pixels.
    """
    dimensions, generator = math.prod(network.shape), torch.Generator().manual_seed(seed)
    if 2 * planes > dimensions:
        raise InvalidArgument(f"frame: {planes} planes take {2 * planes} coordinates, images have {dimensions}")
    pixels = torch.randperm(dimensions, generator=generator)[: 2 * planes].tolist()
    return Turned(network, PlaneFrame(pixels, torch.randn(planes, generator=generator, dtype=torch.float64)))
