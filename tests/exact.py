"""Exact flows: a Gaussian and a Gaussian mixture under anisotropic noise, with the face of `Denoiser`."""

import torch
from torch import Tensor

from anisodiff.denoiser import Denoiser
from anisodiff.paths.noise_path import NoisePath


class Exact(Denoiser):
    """A denoiser that is given by its flow."""

    def __init__(self, path: NoisePath):
        super().__init__(torch.nn.Identity(), path)

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
