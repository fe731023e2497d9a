"""Denoisers in closed form: the optimum for the images of a data set, and for Gaussians fitted to them.

They have the face of `Denoiser`, over any path that all images share, and compute in float64.
"""

from collections.abc import Iterator
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from anisodiff.denoiser import Denoiser
from anisodiff.networks.unets import RawNetwork
from anisodiff.paths.noise_path import NoisePath
from anisodiff.pixels import to_unit

CHUNK = 4096  # images at a time in double precision


@runtime_checkable
class ImageSet(Protocol):
    """Images that are read a part at a time."""

    def parts(self, size: int) -> Iterator[tuple[UInt8[Tensor, "b c h w"], Float[Tensor, "b k"]]]:
        """All images in order, `size` at a time, with their one-hot labels."""
        ...


class ClosedForm(Denoiser):
    """A denoiser given by its estimate; levels are the same for all images of a batch.

    Args:
        path: without schedules or bases of single classes.
    """

    def __init__(self, path: NoisePath):
        super().__init__(RawNetwork(), path)

    def estimate(self, z: Float[Tensor, "b c h w"], g: Float[Tensor, "1 j"], labels: Tensor | None) -> Tensor:
        """Mean of the clean coefficients given noisy ones, all in float64."""
        raise NotImplementedError

    def denoise(
        self, z: Float[Tensor, "b c h w"], g: Float[Tensor, "1 j"], labels: Float[Tensor, "b k"] | None = None
    ) -> Float[Tensor, "b c h w"]:
        self.evaluations += 1
        return self.estimate(z.to(torch.float64), g.to(torch.float64), labels).to(z.dtype)

    def flow(
        self,
        z: Float[Tensor, "b c h w"],
        g: Float[Tensor, "1 j"],
        labels: Float[Tensor, "b k"] | None = None,
        augment_labels: Float[Tensor, "b a"] | None = None,
    ) -> Float[Tensor, "b c h w"]:
        exact = z.to(torch.float64)
        return self.path.scale(self.denoise(exact, g, labels) - exact, g.rsqrt()).to(z.dtype)


class KernelDenoiser(ClosedForm):
    """The optimal denoiser for the images as they are: their mean, weighted by their likelihoods given the noisy image
    (arXiv:2506.10177, Eq. 9; a mean shift whose bandwidth is the noise). With labels, over the images of the class.

    Args:
        path: the noise path.
        images: the data; kept in memory in float32.
        device: where.
    """

    def __init__(self, path: NoisePath, images: ImageSet, device: str = "cpu"):
        super().__init__(path)
        self.to(device)
        parts = [(path.from_pixels(to_unit(pixels.to(device))), labels) for pixels, labels in images.parts(CHUNK)]
        self.images = torch.cat([part for part, _ in parts])
        self.classes = torch.cat([labels for _, labels in parts]).to(device, torch.float64)
        self.energies = torch.cat([path.inner(part, part) for part in self._exact()])  # squared norms [N, J]

    def _exact(self) -> Iterator[Tensor]:
        return (part.to(torch.float64) for part in self.images.split(CHUNK))

    def log_weights(
        self, z: Float[Tensor, "b c h w"], g: Float[Tensor, "1 j"], labels: Float[Tensor, "b k"] | None = None
    ) -> Float[Tensor, "b n"]:
        """Log of each image's share in the estimate."""
        scaled = self.path.scale(z.to(torch.float64), 1 / g).flatten(1)
        products = torch.cat([scaled @ part.flatten(1).T for part in self._exact()], dim=1)
        logits = products - (self.energies @ (1 / g.to(torch.float64)).T / 2).T
        if labels is not None:
            logits = logits.masked_fill(labels.to(torch.float64) @ self.classes.T == 0, -torch.inf)
        return logits.log_softmax(1)

    def mean(self, log_weights: Float[Tensor, "b n"]) -> Float[Tensor, "b c h w"]:
        """The images' mean with these weights."""
        weights = log_weights.exp().split(CHUNK, dim=1)
        parts = (share @ part.flatten(1) for share, part in zip(weights, self._exact(), strict=True))
        return sum(parts, log_weights.new_zeros(())).reshape(-1, *self.images.shape[1:])

    def estimate(self, z: Tensor, g: Tensor, labels: Tensor | None) -> Tensor:
        return self.mean(self.log_weights(z, g, labels))

    def log_density(self, x: Float[Tensor, "b c h w"], sigma: float) -> Float[Tensor, " b"]:
        """Log of the data's kernel density with this bandwidth, but for a constant (Proposition 3's `p_h`)."""
        return (-self._distances(x).square() / (2 * sigma**2)).logsumexp(1)

    def nearest(self, x: Float[Tensor, "b c h w"], count: int) -> Float[Tensor, "b k c h w"]:
        """The data's nearest images, in coefficients."""
        return self.images[self._distances(x).topk(count, dim=1, largest=False).indices]

    def _distances(self, x: Tensor) -> Tensor:
        """Distances to each of the images, `[B, N]`."""
        flat = x.to(torch.float64).flatten(1)
        return torch.cat([torch.cdist(flat, part.flatten(1)) for part in self._exact()], dim=1)


class GaussianDenoiser(ClosedForm):
    """The optimal denoiser for a mixture of Gaussians of low rank, `sum_k share_k N(mean_k, W_k^T W_k)`
    (arXiv:2506.10177, Proposition 4 for one of them). With labels, that of the class alone.

    Args:
        path: the noise path.
        means: in pixels, `[K, C, H, W]`.
        factors: rows of W_k in pixels: principal directions, as long as their standard deviations, `[K, r, C, H, W]`.
        shares: of the components, `[K]`.
    """

    def __init__(
        self,
        path: NoisePath,
        means: Float[Tensor, "k c h w"],
        factors: Float[Tensor, "k r c h w"],
        shares: Float[Tensor, " k"],
    ):
        super().__init__(path)
        self.to(means.device)
        self.means, self.log_shares = path.from_pixels(means.to(torch.float64)), shares.to(torch.float64).log()
        self.factors = torch.stack([path.from_pixels(rows) for rows in factors.to(torch.float64)])
        only = torch.eye(path.subspaces.count, dtype=torch.float64, device=means.device)
        # W_k W_k^T of each subspace, [K, J, r, r]: with them a level costs a factorisation of r x r
        self.products = torch.stack(
            [
                torch.stack([path.scale(rows, each[None]).flatten(1) @ rows.flatten(1).T for each in only])
                for rows in self.factors
            ]
        )

    def estimate(self, z: Tensor, g: Tensor, labels: Tensor | None) -> Tensor:
        found, logits = [], []
        for mean, rows, products, log_share in zip(
            self.means, self.factors, self.products, self.log_shares, strict=True
        ):
            # Woodbury: S (S + M)^-1 = W^T (1 + W M^-1 W^T)^-1 W M^-1
            scaled = self.path.scale(z - mean, 1 / g)
            inner = (products / g[0, :, None, None]).sum(0)
            root = torch.linalg.cholesky(inner + torch.eye(len(inner), dtype=inner.dtype, device=inner.device))
            projected = scaled.flatten(1) @ rows.flatten(1).T
            solved = torch.cholesky_solve(projected.T, root).T
            found.append(mean + (solved @ rows.flatten(1)).reshape(z.shape))
            square = ((z - mean) * scaled).flatten(1).sum(1) - (projected * solved).sum(1)
            logits.append(log_share - square / 2 - root.diagonal().log().sum())
        logit = torch.stack(logits, dim=1)
        if labels is not None and len(found) > 1:
            logit = logit.masked_fill(labels == 0, -torch.inf)
        return torch.einsum("bk,bkchw->bchw", logit.softmax(1), torch.stack(found, dim=1))
