"""EDM's preconditioned denoiser, per subspace of a noise path (paper, Section 4.3; arXiv:2206.00364, Table 1)."""

from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from anisodiff.compute import Compute
from anisodiff.files import StageError
from anisodiff.paths import BatchPath, NoisePath, edm_path


class Denoiser(nn.Module):
    """A raw network F seen as denoiser D, score or flow over a noise path.

    States are coefficients `z` of the path's basis and levels are variances `g [B, J]`, so it serves any grid and any
    solver. `evaluations` counts the calls of the network.

    Args:
        network: `F(x [B, C, H, W], noise_label [B], class_labels [B, classes] or None)`, of x's shape.
        path: gives basis and label weights. Its schedule is not used here.
        sigma_data: standard deviation of the data.
        body: precision of the network's body; everything else is in the precision of the states.
    """

    def __init__(self, network: nn.Module, path: NoisePath, sigma_data: float = 0.5, body: torch.dtype = torch.float32):
        super().__init__()
        self.network, self.path, self.sigma_data, self.body = network, path, sigma_data, body
        self.evaluations = 0

    def _raw(self, path: NoisePath | BatchPath, z: Tensor, g: Tensor, labels: Tensor | None) -> Tensor:
        """Coefficients of F's output."""
        self.evaluations += 1
        x_in = path.to_pixels(path.scale(z, (g + self.sigma_data**2).rsqrt()))
        noise_label = (path.mean_log(g) / 8).to(z.dtype).expand(len(z))
        with torch.autocast(z.device.type, self.body, enabled=self.body != torch.float32):
            raw = self.network(x_in, noise_label, labels)
        return path.from_pixels(raw.to(z.dtype))

    def flow(
        self, z: Float[Tensor, "b c h w"], g: Float[Tensor, "#b j"], labels: Float[Tensor, "b k"] | None = None
    ) -> Float[Tensor, "b c h w"]:
        """`M^{1/2} score = -eps_hat`, without the cancellation in `D - x` (paper, Eq. 4).

        Args:
            z: noisy coefficients.
            g: variance in each subspace.
            labels: one-hot classes.
        """
        s, path = self.sigma_data, self.path.of(labels)
        g = g.to(torch.promote_types(z.dtype, torch.float32))
        raw = self._raw(path, z, g, labels)
        return path.scale(raw, s * (g + s**2).rsqrt()) - path.scale(z, g.sqrt() / (g + s**2))

    def denoise(
        self, z: Float[Tensor, "b c h w"], g: Float[Tensor, "#b j"], labels: Float[Tensor, "b k"] | None = None
    ) -> Float[Tensor, "b c h w"]:
        """Coefficients of D, the estimate of x0's mean given the noisy coefficients: `c_skip z + c_out F`.

        It is `z + M^{1/2} flow`, without the cancellation between the two at large g.
        """
        s, path = self.sigma_data, self.path.of(labels)
        g = g.to(torch.promote_types(z.dtype, torch.float32))
        raw = self._raw(path, z, g, labels)
        return path.scale(z, s**2 / (g + s**2)) + path.scale(raw, s * (g / (g + s**2)).sqrt())

    def forward(
        self, x: Float[Tensor, "b c h w"], sigma: Float[Tensor, "b"], labels: Float[Tensor, "b k"] | None = None
    ) -> Float[Tensor, "b c h w"]:
        """D in pixels at isotropic standard deviations: EDM's denoiser.

        Args:
            x: noisy images.
            sigma: standard deviation of each image's noise.
            labels: one-hot classes; None is no class.
        """
        g = sigma.square()[:, None].expand(-1, self.path.subspaces.count)
        return self.path.to_pixels(self.denoise(self.path.from_pixels(x), g, labels))


def read_denoiser(
    network_file: Path, path_file: Path, sigma_data: float, compute: Compute
) -> tuple[Denoiser, list[dict[str, Any]]]:
    """The denoiser of a network over a path, where a stage computes, and the headers of the two files.

    Raises:
        StageError: the network is for images of another size.
    """
    from anisodiff import checkpoints

    network, about = checkpoints.load_network(network_file)
    path, path_about = checkpoints.load_path(path_file)
    if path.subspaces.size != network.shape[-1]:
        raise StageError(
            f"{network_file}: makes images of side {network.shape[-1]}, the path is for {path.subspaces.size}: "
            "set the dataset's resolution, or take another checkpoint"
        )
    denoiser = Denoiser(compute.place(network), path, sigma_data, compute.body)
    return denoiser.to(compute.device), [about, path_about]


def load_denoiser(path: Path | str, device: str = "cpu") -> Denoiser:
    """The denoiser `D(x, sigma, labels=None)` of a network file.

    Args:
        path: safetensors file of a network, as `anisodiff convert` and the training stages write it.
        device: as torch names it.

    Raises:
        StageError: there is no such file, or it holds no network.
    """
    from anisodiff import checkpoints

    network, about = checkpoints.load_network(path)
    return Denoiser(network, edm_path(network.shape[-1]), about.get("sigma_data", 0.5)).to(device).eval()
