"""Exact flows: a Gaussian and a Gaussian mixture under anisotropic noise, with the face of `Denoiser`, and examples."""

import torch
from torch import Tensor

from anisodiff.denoiser import Denoiser
from anisodiff.grids.levels import Levels
from anisodiff.networks.unets import RawNetwork
from anisodiff.paths.noise_path import NoisePath
from anisodiff.paths.schedules import KnotSchedule
from anisodiff.paths.subspaces import Subspaces, partition

SIDE = 4


class Exact(Denoiser):
    """A denoiser that is given by its flow."""

    def __init__(self, path: NoisePath):
        super().__init__(RawNetwork(), path)

    def denoise(self, z: Tensor, g: Tensor, labels: Tensor | None = None) -> Tensor:
        return z + self.path.scale(self.flow(z, g, labels), g.sqrt())


class ExactGaussian(Exact):
    """The flow for `x0 ~ N(0, diag(spectrum))` in the path's coefficients."""

    def __init__(self, path: NoisePath, spectrum: Tensor):
        super().__init__(path)
        self.spectrum = spectrum  # [C, H, W]

    def variances(self, g: Tensor) -> Tensor:
        return self.path.scale(torch.ones_like(self.spectrum).expand(len(g), -1, -1, -1), g)

    def flow(self, z: Tensor, g: Tensor, labels: Tensor | None = None) -> Tensor:
        self.evaluations += 1
        m = self.variances(g)
        return -m.sqrt() * z / (self.spectrum + m)


class ExactMixture(Exact):
    """The flow for a mixture of Gaussians `sum_i weight_i N(mean_i, covariance_i)` in the path's coefficients."""

    def __init__(self, path: NoisePath, weights: Tensor, means: Tensor, covariances: Tensor):
        super().__init__(path)
        self.mixture = weights, means, covariances  # [M], [M, D], [M, D, D]

    def log_density(self, z: Tensor, m: Tensor) -> Tensor:
        """`[B, D]` under noise of variances `m [B, D]`."""
        weights, means, covariances = self.mixture
        total = covariances[None] + torch.diag_embed(m)[:, None]  # [B, M, D, D]
        difference = z[:, None] - means
        solved = torch.linalg.solve(total, difference[..., None])[..., 0]
        exponent = -(difference * solved).sum(-1) / 2 - torch.logdet(total) / 2
        return torch.logsumexp(exponent + weights.log(), dim=1)

    def flow(self, z: Tensor, g: Tensor, labels: Tensor | None = None) -> Tensor:
        m = self.path.scale(torch.ones_like(z), g).flatten(1)
        with torch.enable_grad():
            point = z if z.requires_grad else z.detach().requires_grad_()
            flat = point.flatten(1)
            density = self.log_density(flat, m).sum()
            (score,) = torch.autograd.grad(density, point, create_graph=True)
        return self.path.scale(score, g.sqrt())


def unequal_path() -> NoisePath:
    """Smooth (no knot inside) and different in each subspace."""
    logs = torch.tensor([[-6.0, 4.0], [-3.0, 3.0]], dtype=torch.float64)
    return NoisePath(Subspaces(partition(SIDE, "block")), KnotSchedule(logs))


def gaussian(path: NoisePath) -> ExactGaussian:
    spectrum = torch.linspace(0.05, 2.0, SIDE * SIDE, dtype=torch.float64).flip(0).reshape(1, SIDE, SIDE)
    return ExactGaussian(path, spectrum)


def solution(model: ExactGaussian, z: Tensor, levels: Levels) -> Tensor:
    first, last = (model.variances(levels.nodes[k].square()) for k in (0, -1))
    return z * ((model.spectrum + last) / (model.spectrum + first)).sqrt()


def measured_orders(errors: list[float]) -> Tensor:
    errors = torch.tensor(errors)
    return (errors[:-1] / errors[1:]).log2()


def mixture_over(path: NoisePath, batch: int = 3) -> tuple[ExactMixture, Tensor, Tensor]:
    """A mixture in the four coefficients of 2x2 images, with noisy images and cotangents."""
    generator = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    factors = normal(3, 4, 4) / 2
    covariances = factors @ factors.mT + 0.1 * torch.eye(4, dtype=torch.float64)
    model = ExactMixture(path, torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64), normal(3, 4), covariances)
    return model, normal(batch, 1, 2, 2), normal(batch, 1, 2, 2)


class Flat(Subspaces):
    """Any orthonormal basis of D pixels, images `[B, D, 1, 1]`: rows of U, and the subspace of each."""

    def __init__(self, vectors: Tensor, index: Tensor):
        torch.nn.Module.__init__(self)
        self.register_buffer("vectors", vectors)
        self.register_buffer("index", index[:, None, None])
        self.count = int(index.max()) + 1

    @property
    def size(self) -> int:
        return 1

    @property
    def ranks(self) -> Tensor:
        return torch.bincount(self.index.flatten(), minlength=self.count).double()

    def from_pixels(self, x: Tensor) -> Tensor:
        return (x.flatten(1) @ self.vectors.T.to(x.dtype)).reshape(x.shape)

    def to_pixels(self, z: Tensor) -> Tensor:
        return (z.flatten(1) @ self.vectors.to(z.dtype)).reshape(z.shape)

    def scale(self, z: Tensor, values: Tensor) -> Tensor:
        return z * values.to(z.dtype)[:, self.index]

    def inner(self, a: Tensor, b: Tensor) -> Tensor:
        return a.new_zeros(len(a), self.count).index_add(1, self.index.flatten(), (a * b).flatten(1))


def flat_path(logs: Tensor, index: Tensor, seed: int | None = None) -> NoisePath:
    """A path over a random basis, or over the coordinates themselves; its log variances at uniform times `[J, K]`."""
    size = len(index)
    normal = torch.randn(size, size, generator=torch.Generator().manual_seed(seed or 0), dtype=torch.float64)
    vectors = torch.eye(size, dtype=torch.float64) if seed is None else torch.linalg.qr(normal)[0]
    return NoisePath(Flat(vectors, index), KnotSchedule(logs))
