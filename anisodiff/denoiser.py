"""EDM's preconditioned denoiser, per subspace of a noise path (paper, Section 4.3; arXiv:2206.00364, Table 1)."""

from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from anisodiff.compute import Compute
from anisodiff.errors import StageError
from anisodiff.networks.unets import RawNetwork
from anisodiff.paths.noise_path import BatchPath, NoisePath, edm_path


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
            StageError: as many levels as there are no images, or labels that the network does not take.
        """
        sigma = torch.as_tensor(sigma, dtype=None if isinstance(sigma, Tensor) else torch.float64, device=x.device)
        if sigma.numel() not in (1, len(x)):
            raise StageError(f"sigma: {sigma.numel()} levels for {len(x)} images: give one for all, or one an image")
        g = sigma.reshape(-1, 1).square().expand(len(x), self.path.subspaces.count)
        return self.path.to_pixels(self.denoise(self.path.from_pixels(x), g, labels))


def check_dataset(network: RawNetwork, about: dict[str, Any], dataset: dict[str, Any], name: Path | str) -> None:
    """Refuse a network that was trained for other data than those it is used for.

    Args:
        network: the network.
        about: header of its file.
        dataset: settings of the dataset: sigma_data, labels.
        name: of the network, for the message.

    Raises:
        StageError: the network has another sigma_data, or does not say which; it has classes and the dataset no labels,
            or the reverse.
    """
    own = _own_sigma_data(about, name)
    if own != dataset["sigma_data"]:
        raise StageError(
            f"{name}: is for data of sigma_data {own:g}, the dataset's is {dataset['sigma_data']:g}: "
            f"set sigma_data to {own:g}, or take another checkpoint"
        )
    if bool(network.classes) != dataset["labels"]:
        has = f"has {network.classes} classes" if network.classes else "has no classes"
        raise StageError(
            f"{name}: {has}, the dataset says labels: {str(dataset['labels']).lower()}: "
            f"set labels to {str(bool(network.classes)).lower()}, or take another checkpoint"
        )


def _own_sigma_data(about: dict[str, Any], name: Path | str) -> float:
    from anisodiff.storage import checkpoints

    found = checkpoints.sigma_data_of(about)
    if found is None:
        raise StageError(f"{name}: does not say its sigma_data: convert it or train it again")
    return found


def read_denoiser(
    network_file: Path, path_file: Path, dataset: dict[str, Any], compute: Compute
) -> tuple[Denoiser, list[dict[str, Any]]]:
    """The denoiser of a network over a path, where a stage computes, and the headers of the two files.

    Args:
        network_file: the network.
        path_file: the path.
        dataset: settings of the dataset that it is used for.
        compute: where, and in which precision.

    Raises:
        StageError: the network is for images of another size, or for other data (see `check_dataset`).
    """
    from anisodiff.storage import checkpoints

    network, about = checkpoints.load_network(network_file)
    path, path_about = checkpoints.load_path(path_file)
    if path.subspaces.size != network.shape[-1]:
        raise StageError(
            f"{network_file}: makes images of side {network.shape[-1]}, the path is for {path.subspaces.size}: "
            "set the dataset's resolution, or take another checkpoint"
        )
    check_dataset(network, about, dataset, network_file)
    denoiser = Denoiser(compute.place(network), path, dataset["sigma_data"], compute.body)
    return denoiser.to(compute.device), [about, path_about]


def load_denoiser(path: Path | str, device: str = "cpu") -> Denoiser:
    """The denoiser `D(x, sigma, labels=None)` of a network file, with the sigma_data that the network was trained with.

    Args:
        path: safetensors file of a network, as `anisodiff convert` and the training stages write it.
        device: as torch names it.

    Raises:
        StageError: there is no such file, or it holds no network, or it does not say its sigma_data.
    """
    from anisodiff.storage import checkpoints

    network, about = checkpoints.load_network(path)
    return Denoiser(network, edm_path(network.shape[-1]), _own_sigma_data(about, path)).to(device).eval()
