"""The flexible forward process `dx = 1/2 beta' (-A x - 2 omega x) dt + sqrt(beta' A) dW` with constant A and omega.

Du et al. 2022 (arXiv:2206.10365), Eq. 12, for toys and tests. With omega = 0 the process is a noise path, with A = I a
turned view of the network (`networks/turned.py`): of both, `ProcessCoordinates` has what is seen from the process.
Where both are there and do not commute it is neither; `FlexibleProcess` has the dense matrices, in float64, and
`factor_heun` integrates it.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from anisodiff.denoiser import Denoiser
from anisodiff.errors import InvalidArgument
from anisodiff.networks.turned import PlaneFrame
from anisodiff.objectives.losses import turning, velocity_factors
from anisodiff.paths.noise_path import NoisePath
from anisodiff.paths.schedules import Variance

Score = Callable[[Float[Tensor, "b d"], float], Float[Tensor, "b d"]]


@dataclass(frozen=True)
class FlexibleProcess:
    """A linear process whose stationary distribution is N(0, I), in time beta.

    Attributes:
        noise: A = R^-1, symmetric; where it has no noise, omega must bring some (Corollary 3.4).
        drift: omega, antisymmetric, of any dimension.

    Raises:
        InvalidArgument: they are not.
    """

    noise: Float[Tensor, "d d"]
    drift: Float[Tensor, "d d"]

    def __post_init__(self) -> None:
        if not torch.allclose(self.noise, self.noise.T) or (torch.linalg.eigvalsh(self.noise) < -1e-12).any():
            raise InvalidArgument("process: the noise's matrix is not symmetric and positive semidefinite")
        if not torch.allclose(self.drift, -self.drift.T):
            raise InvalidArgument("process: the drift's matrix is not antisymmetric")

    def transition(self, beta: float) -> tuple[Float[Tensor, "d d"], Float[Tensor, "d d"]]:
        """Phi and the covariance of `x_t | x_0 ~ N(Phi x_0, I - Phi Phi^T)`.

        Theorem 3.5 prints `I - exp(-beta A)`, which holds only where A and omega commute.
        """
        phi = torch.linalg.matrix_exp(-beta * (self.noise / 2 + self.drift).to(torch.float64))
        return phi, torch.eye(len(phi), dtype=phi.dtype) - phi @ phi.T

    def additive(self, beta: float) -> tuple[Float[Tensor, "d d"], Float[Tensor, "d d"]]:
        """E and M of the change of variables `y = E x_t = x_0 + N(0, M)`: `E = Phi^-1`, `M = E E^T - I`.

        M grows with beta in every direction, so y is what a noise path adds its noise to.
        """
        unrolled = torch.linalg.matrix_exp(beta * (self.noise / 2 + self.drift).to(torch.float64))
        return unrolled, unrolled @ unrolled.T - torch.eye(len(unrolled), dtype=unrolled.dtype)


def critically_damped(dimensions: int, friction: float = 2.0) -> FlexibleProcess:
    """Langevin dynamics of positions and velocities, noise on the velocities alone (Eq. 25, of unit mass).

    Args:
        dimensions: of the positions, which come first; as many velocities follow.
        friction: 2 is critical.
    """
    each = torch.eye(dimensions, dtype=torch.float64)
    noise = torch.tensor([[0, 0], [0, 2 * friction]], dtype=torch.float64)
    drift = torch.tensor([[0, -1], [1, 0]], dtype=torch.float64)
    return FlexibleProcess(torch.kron(noise, each), torch.kron(drift, each))


def factor_heun(
    process: FlexibleProcess, score: Score, y: Float[Tensor, "b d"], betas: Float[Tensor, " n"]
) -> Float[Tensor, "b d"]:
    """Integrate `dy = -dN N^T score` with any factor `N N^T = M_t`, here Cholesky's, by Heun's method.

    `dN N^T` differs from `1/2 dM` by an antisymmetric matrix of beta alone, whose flux has no divergence: the marginals
    are those of the probability flow. Levels in the eigenvectors of M_t would not do, since these turn with beta.

    Args:
        process: with noise in every direction.
        score: gradient of y's log density, at y and beta.
        y: at the first beta.
        betas: times, falling, the last above 0.
    """
    for now, after in itertools.pairwise(betas.tolist()):
        factor, factor_after = (torch.linalg.cholesky(process.additive(beta)[1]) for beta in (now, after))
        change = factor_after - factor
        flow = score(y, now) @ factor
        flow_after = score(y - flow @ change.T, after) @ factor_after
        y = y - (flow + flow_after) @ change.T / 2
    return y


@dataclass(frozen=True)
class ProcessCoordinates:
    """The flexible process's own coordinates `x = Q (1 + M)^{-1/2} z`, in pixels, of a path's coefficients z.

    Data are `x = z` at the start, where M is 0, and the noise is N(0, I) at the end.

    Attributes:
        path: FP-Noise's.
        frame: FP-Drift's, whose Q is `exp(-omega beta)`; None is omega = 0.
    """

    path: NoisePath
    frame: PlaneFrame | None = None

    def of(self, z: Float[Tensor, "b c h w"], noise: Variance) -> Float[Tensor, "b c h w"]:
        """The coordinates x of noisy coefficients."""
        x = self.path.to_pixels(self.path.scale(z, (1 + noise.g).rsqrt()))
        return x if self.frame is None else self.frame.turn(x, turning(self.path, noise)[0])

    def back(self, x: Float[Tensor, "b c h w"], noise: Variance) -> Float[Tensor, "b c h w"]:
        """Noisy coefficients of x."""
        x = x if self.frame is None else self.frame.turn(x, -turning(self.path, noise)[0])
        return self.path.scale(self.path.from_pixels(x), (1 + noise.g).sqrt())

    def velocity(
        self, denoiser: Denoiser, z: Float[Tensor, "b c h w"], t: Float[Tensor, "#b"]
    ) -> Float[Tensor, "b c h w"]:
        """dx/dt of the probability flow (Eq. 20), which `kinetic` measures, in pixels a unit of t.

        Args:
            denoiser: over the path; in the frame, or exact.
            z: noisy coefficients.
            t: times in [0, 1].
        """
        noise = self.path.at(t)
        of_z, of_flow = velocity_factors(noise)
        flow = denoiser.flow(z, noise.g)
        v = self.path.to_pixels(self.path.scale(z, of_z) + self.path.scale(flow, of_flow))
        if self.frame is None:
            return v
        beta, rate = turning(self.path, noise)
        return self.frame.turn(v, beta) - rate.to(z.dtype)[:, None, None, None] * self.frame.omega(self.of(z, noise))
