"""Toys: data of three numbers whose exact flow is known, as images of three channels and one pixel."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from anisodiff.errors import InvalidArgument
from anisodiff.exact.closed_forms import GaussianDenoiser
from anisodiff.paths.noise_path import NoisePath


@dataclass(frozen=True)
class Plane:
    """A Gaussian on a plane of R^3 (Du et al. 2022, arXiv:2206.10365, Section 4.1: the plane z = 2).

    The plane's normal is the z axis, turned by `tilt` towards the x axis. The paper does not give its variances; with
    unit ones the exact flow of isotropic noise is along the normal everywhere.

    Attributes:
        distance: of the mean from the origin, along the normal.
        variances: in the plane: first in the direction that tilts, then along the y axis.
        tilt: in radians.
        thickness: standard deviation along the normal.

    Raises:
        InvalidArgument: a negative variance or thickness.
    """

    distance: float = 2.0
    variances: tuple[float, float] = (1.0, 1.0)
    tilt: float = 0.0
    thickness: float = 0.0

    def __post_init__(self) -> None:
        if min(*self.variances, self.thickness) < 0:
            raise InvalidArgument("plane: its variances and its thickness must be 0 or more")

    @property
    def normal(self) -> Float[Tensor, "3"]:
        """Unit vector."""
        return torch.tensor([math.sin(self.tilt), 0, math.cos(self.tilt)], dtype=torch.float64)

    @property
    def mean(self) -> Float[Tensor, "3"]:
        return self.distance * self.normal

    @property
    def factors(self) -> Float[Tensor, "3 3"]:
        """W, whose rows are principal directions as long as their standard deviations: the covariance is `W^T W`."""
        along = torch.tensor([math.cos(self.tilt), 0, -math.sin(self.tilt)], dtype=torch.float64)
        across = torch.tensor([0, 1, 0], dtype=torch.float64)
        lengths = torch.tensor([*map(math.sqrt, self.variances), self.thickness], dtype=torch.float64)
        return lengths[:, None] * torch.stack([along, across, self.normal])

    def draw(self, count: int, generator: torch.Generator) -> Float[Tensor, "n 3 1 1"]:
        """Images."""
        return as_images(self.mean + torch.randn(count, 3, generator=generator, dtype=torch.float64) @ self.factors)

    def denoiser(self, path: NoisePath) -> GaussianDenoiser:
        """The exact denoiser, score and flow over a path of images of three channels and one pixel."""
        share = torch.ones(1, dtype=torch.float64)
        return GaussianDenoiser(path, as_images(self.mean[None]), as_images(self.factors)[None], share)


def as_images(points: Float[Tensor, "n 3"]) -> Float[Tensor, "n 3 1 1"]:
    """Points of R^3 as images."""
    return points[:, :, None, None]
