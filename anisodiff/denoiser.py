"""EDM's preconditioned denoiser, per subspace of a noise path (paper, Section 4.3; arXiv:2206.00364, Table 1)."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from anisodiff.errors import InvalidArgument
from anisodiff.networks.unets import RawNetwork
from anisodiff.paths.noise_path import BatchPath, NoisePath


class Denoiser(nn.Module):
    """A raw network F seen as denoiser D, score or flow over a noise path.

    States are coefficients `z` of the path's basis and levels are variances `g [B, J]`, so it serves any grid and any
    solver. The basis is a constant here: no gradient reaches its parameters. `evaluations` counts the calls of the
    network.

    Args:
        network: `F(x [B, C, H, W], noise_label [B], class_labels [B, classes] or None)`, of x's shape.
        path: gives basis and label weights. Its schedule is not used here.
        sigma_data: standard deviation of the data.
        body: precision of the network's body; everything else is in the precision of the states.
    """

    def __init__(
        self, network: RawNetwork, path: NoisePath, sigma_data: float = 0.5, body: torch.dtype = torch.float32
    ):
        super().__init__()
        self.network, self.path, self.sigma_data, self.body = network, path, sigma_data, body
        self.evaluations = 0

    def _raw(
        self,
        path: NoisePath | BatchPath,
        z: Tensor,
        g: Tensor,
        labels: Tensor | None,
        augment_labels: Tensor | None = None,
    ) -> Tensor:
        """Coefficients of F's output."""
        self.evaluations += 1
        basis = path.subspaces.detached()
        x_in = basis.to_pixels(path.scale(z, (g + self.sigma_data**2).rsqrt()))
        told = (labels,) if augment_labels is None else (labels, augment_labels)
        noise_label = (path.mean_log(g) / 8).to(z.dtype).expand(len(z))
        with torch.autocast(z.device.type, self.body, enabled=self.body != torch.float32):
            raw = self.network(x_in, noise_label, *told)
        return basis.from_pixels(raw.to(z.dtype))

    def flow(
        self,
        z: Float[Tensor, "b c h w"],
        g: Float[Tensor, "#b j"],
        labels: Float[Tensor, "b k"] | None = None,
        augment_labels: Float[Tensor, "b a"] | None = None,
    ) -> Float[Tensor, "b c h w"]:
        """`M^{1/2} score = -eps_hat`, without the cancellation in `D - x` (paper, Eq. 4).

        Args:
            z: noisy coefficients.
            g: variance in each subspace.
            labels: one-hot classes.
            augment_labels: what the network is told of an augmentation of its images; None is that there is none.
        """
        s, path = self.sigma_data, self.path.for_labels(labels)
        g = g.to(torch.promote_types(z.dtype, torch.float32))
        raw = self._raw(path, z, g, labels, augment_labels)
        return path.scale(raw, s * (g + s**2).rsqrt()) - path.scale(z, g.sqrt() / (g + s**2))

    def denoise(
        self, z: Float[Tensor, "b c h w"], g: Float[Tensor, "#b j"], labels: Float[Tensor, "b k"] | None = None
    ) -> Float[Tensor, "b c h w"]:
        """Coefficients of D, the estimate of x0's mean given the noisy coefficients: `c_skip z + c_out F`.

        It is `z + M^{1/2} flow`, without the cancellation between the two at large g.
        """
        s, path = self.sigma_data, self.path.for_labels(labels)
        g = g.to(torch.promote_types(z.dtype, torch.float32))
        raw = self._raw(path, z, g, labels)
        return path.scale(z, s**2 / (g + s**2)) + path.scale(raw, s * (g / (g + s**2)).sqrt())

    def forward(
        self,
        x: Float[Tensor, "b c h w"],
        sigma: Float[Tensor, "..."] | float,
        labels: Float[Tensor, "b k"] | None = None,
    ) -> Float[Tensor, "b c h w"]:
        """D in pixels at isotropic standard deviations: EDM's denoiser.

        Args:
            x: noisy images.
            sigma: standard deviation of the noise: one for all images, or one an image.
            labels: one-hot classes; None is no class, which EDM's networks take as labels of zeros.

        Raises:
            InvalidArgument: neither one level nor one an image, or labels that the network does not take.
        """
        sigma = torch.as_tensor(sigma, dtype=None if isinstance(sigma, Tensor) else torch.float64, device=x.device)
        if sigma.numel() not in (1, len(x)):
            raise InvalidArgument(
                f"sigma: {sigma.numel()} levels for {len(x)} images: give one for all, or one an image"
            )
        g = sigma.reshape(-1, 1).square().expand(len(x), self.path.subspaces.count)
        basis = self.path.subspaces.detached()
        return basis.to_pixels(self.denoise(basis.from_pixels(x), g, labels))
