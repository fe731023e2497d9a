"""Feature networks, streaming feature statistics, and the Frechet distance."""

import functools
import pickle
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float64, Int, UInt8
from torch import Tensor, nn
from torch.nn import functional

from anisodiff.errors import StageError, one_line
from anisodiff.metrics.registry import FEATURES
from anisodiff.pixels import to_unit
from anisodiff.storage import checkpoints

Features = Callable[[UInt8[Tensor, "b c h w"] | Float[Tensor, "b c h w"]], Float[Tensor, "b d"]]


class DigitsCNN(nn.Module):
    """A small classifier of 8x8 digits; its features are the inputs of the last layer.

    Args:
        width: channels of the first convolution.
        features: dimension of the features.
    """

    def __init__(self, width: int = 32, features: int = 64):
        super().__init__()
        self.config = {"width": width, "features": features}
        self.conv0 = nn.Conv2d(1, width, 3, padding=1)
        self.conv1 = nn.Conv2d(width, 2 * width, 3, padding=1)
        self.hidden = nn.Linear(2 * width * 16, features)
        self.classes = nn.Linear(features, 10)

    def features(self, x: Float[Tensor, "b 1 8 8"]) -> Float[Tensor, "b d"]:
        x = functional.silu(self.conv0(x))
        x = functional.silu(self.conv1(functional.avg_pool2d(x, 2)))
        return functional.silu(self.hidden(x.flatten(1)))

    def forward(self, x: Float[Tensor, "b 1 8 8"]) -> Float[Tensor, "b 10"]:
        return self.classes(self.features(x))


def digits_cnn(file: Path, device: str) -> Features:
    """Features of a `DigitsCNN`."""
    tensors, metadata = checkpoints.read(file)
    try:
        with torch.device("meta"):  # sizes first, without memory
            DigitsCNN(**metadata["config"]).load_state_dict(tensors, assign=True)
        network = DigitsCNN(**metadata["config"])
        network.load_state_dict(tensors)
    except (KeyError, TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise StageError(f"{file}: holds no digits-cnn ({one_line(error)}): give the file of one") from error
    network = network.to(device).eval().requires_grad_(False)

    def features(images: Tensor) -> Tensor:
        if images.shape[1:] != (1, 8, 8):
            raise StageError(f"features: digits-cnn takes grey 8x8 images, not {_described(images)}: take another kind")
        return network.features(to_unit(images.to(device)))

    return features


def inception(file: Path, device: str) -> Features:
    """Features of the Inception network that published FIDs use."""
    from cleanfid.inception_torchscript import InceptionV3W

    if file.name != "inception-2015-12-05.pt":
        raise StageError(f"{file}: clean-fid asks for the name inception-2015-12-05.pt: rename it")
    try:
        network = InceptionV3W(str(file.parent), download=False, resize_inside=True).to(device).eval()
    except (RuntimeError, ValueError) as error:
        raise StageError(f"{file}: holds no Inception network ({one_line(error)}): fetch it again") from error
    return lambda images: network(_rgb(images).to(device, torch.float32))


def efficientnet_lite0(file: Path, device: str) -> Features:
    """Average-pooled last features (1,280) of the ImageNet classifier; images resized to 128x128, `(x - 127) / 128`."""
    from efficientnet_lite_pytorch import EfficientNet

    network = EfficientNet.from_name("efficientnet-lite0")
    try:
        network.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    except (pickle.UnpicklingError, RuntimeError, EOFError, TypeError, ValueError, LookupError) as error:
        raise StageError(f"{file}: holds no EfficientNet-Lite0 ({one_line(error)}): fetch it again") from error
    network = network.to(device).to(memory_format=torch.channels_last).eval().requires_grad_(False)

    def features(images: Tensor) -> Tensor:
        x = _rgb(images).to(device, torch.float32, memory_format=torch.channels_last)
        x = functional.interpolate(x, (128, 128), mode="bilinear", antialias=True)
        return network.extract_features((x - 127) / 128).mean((2, 3))

    return features


def _described(images: Tensor) -> str:
    channels, height, width = images.shape[1:]
    return f"{channels}-channel {height}x{width} ones"


def _rgb(images: Tensor) -> Tensor:
    if images.shape[1] not in (1, 3):
        raise StageError(f"features: take grey or RGB images, not {_described(images)}: convert them first")
    return images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images


def extractor(kind: str, file: Path, device: str) -> Features:
    """The features of a network.

    Args:
        kind: one of `FEATURES`.
        file: of the network.
        device: as torch names it.

    Raises:
        StageError: an unknown kind, no file, or a file of another kind.
    """
    if kind not in FEATURES:
        raise StageError(f"features: kind {kind!r} is unknown: use one of {', '.join(FEATURES)}")
    if not Path(file).is_file():
        raise StageError(f"{file}: no such file: give the file of {kind}")
    return FEATURES[kind].load()(file, device)


@dataclass(frozen=True)
class Gaussian:
    """Mean and covariance of features, all that a Frechet distance asks of a set of images.

    Attributes:
        mean: `[D]`, float64.
        covariance: `[D, D]`, float64, with N - 1.
    """

    mean: Float[Tensor, " d"]
    covariance: Float[Tensor, "d d"]

    @staticmethod
    def from_tensors(tensors: dict[str, Tensor], name: Path | str) -> "Gaussian":
        """The Gaussian of these tensors, from the file `name`.

        Raises:
            StageError: they are no mean and covariance, or not finite.
        """
        kinds: dict[str, Any] = {"mean": Float[Tensor, " d"], "covariance": Float[Tensor, "rows columns"]}
        if not all(isinstance(tensors.get(key), kind) for key, kind in kinds.items()):
            raise StageError(f"{name}: holds no reference statistics: give the file of the stage `reference`")
        mean, covariance = tensors["mean"], tensors["covariance"]
        if covariance.shape != (len(mean), len(mean)):
            sizes = f"{len(mean)} features in its mean, {list(covariance.shape)} in its covariance"
            raise StageError(f"{name}: {sizes}: make it again")
        if not (mean.isfinite().all() and covariance.isfinite().all()):
            raise StageError(f"{name}: its statistics are NaN or infinite: make or fetch it again")
        return Gaussian(mean.to(torch.float64), covariance.to(torch.float64))

    @functools.cached_property
    def root(self) -> Float[Tensor, "d d"]:
        """Symmetric square root of the covariance."""
        values, vectors = torch.linalg.eigh(self.covariance)
        return (vectors * values.clamp(min=0).sqrt()) @ vectors.T

    def tensors(self) -> dict[str, Tensor]:
        return {"mean": self.mean, "covariance": self.covariance}


def published_statistics(file: Path) -> Gaussian:
    """Reference statistics as EDM publishes them: an npz of `mu` and `sigma` of Inception's features.

    Raises:
        StageError: it is no such file, or one of other features.
    """
    dimension = FEATURES["inception"].dimension
    largest = 2 * 8 * dimension**2  # bytes of an array; no more is unpacked
    try:
        with zipfile.ZipFile(file) as held:
            if any(each.file_size > largest for each in held.infolist()):
                raise ValueError("its arrays are too large")
        with np.load(file, allow_pickle=False) as arrays:
            mean, covariance = (torch.from_numpy(arrays[key].astype(np.float64)) for key in ("mu", "sigma"))
    except (
        OSError, ValueError, LookupError, EOFError, MemoryError, RuntimeError, zipfile.BadZipFile, zlib.error,
    ) as error:  # fmt: skip
        said = one_line(error)
        raise StageError(f"{file}: no reference statistics ({said}): it should hold mu and sigma") from error
    if mean.shape != (dimension,) or covariance.shape != (dimension,) * 2:
        raise StageError(
            f"{file}: statistics of {mean.numel()} features, Inception has {dimension}: "
            "give statistics of the same feature network"
        )
    return Gaussian.from_tensors({"mean": mean, "covariance": covariance}, file)


class FeatureStatistics:
    """Count, sum and outer products of features in float64; statistics of shards add up, in the order given.

    Sums are of features less the mean of the first batch: products of numbers far from zero would cancel in the
    covariance (Chan, Golub and LeVeque 1983, "Algorithms for computing the sample variance", shifted data).

    Args:
        dimension: of the features.
    """

    def __init__(self, dimension: int):
        self.count = 0
        self.shift = torch.zeros(dimension, dtype=torch.float64)
        self.sum = torch.zeros(dimension, dtype=torch.float64)
        self.outer = torch.zeros(dimension, dimension, dtype=torch.float64)

    def add(self, features: Float[Tensor, "b d"]) -> None:
        """Add a batch.

        Raises:
            StageError: a feature is NaN or infinite.
        """
        features = features.detach().to("cpu", torch.float64)
        if not features.isfinite().all():
            raise StageError("features: are NaN or infinite: fetch the feature network again, or make it again")
        if not self.count:
            self.shift = features.mean(0)
        centred = features - self.shift
        self.count += len(features)
        self.sum += centred.sum(0)
        self.outer += centred.T @ centred

    def __add__(self, other: "FeatureStatistics") -> "FeatureStatistics":
        if not self.count:
            return other
        moved = other.shift - self.shift
        cross = torch.outer(other.sum, moved)
        total = FeatureStatistics(len(self.sum))
        total.count, total.shift = self.count + other.count, self.shift
        total.sum = self.sum + (other.sum + other.count * moved)
        total.outer = self.outer + (other.outer + (cross + cross.T) + other.count * torch.outer(moved, moved))
        return total

    @property
    def gaussian(self) -> Gaussian:
        """Mean, and covariance with N - 1, as `np.cov`."""
        if self.count < 2:
            raise StageError(f"{self.count} images have no covariance: use two or more")
        covariance = (self.outer - torch.outer(self.sum, self.sum) / self.count) / (self.count - 1)
        return Gaussian(self.shift + self.sum / self.count, covariance)

    def tensors(self) -> dict[str, Tensor]:
        """For a file: of the symmetric products, the half that says all."""
        rows, columns = torch.triu_indices(*self.outer.shape)
        sums = {"count": torch.tensor(self.count), "shift": self.shift, "sum": self.sum}
        return sums | {"outer": self.outer[rows, columns]}

    @staticmethod
    def from_tensors(tensors: dict[str, Tensor], name: Path | str = "cell") -> "FeatureStatistics":
        """The statistics of these tensors, from the file `name`.

        Raises:
            StageError: they are no statistics.
        """
        kinds: dict[str, Any] = {
            "count": Int[Tensor, ""],
            "sum": Float64[Tensor, " d"],
            "outer": Float64[Tensor, " products"],
        }
        if not all(isinstance(tensors.get(key), kind) for key, kind in kinds.items()):
            raise StageError(f"{name}: holds no feature statistics: {checkpoints.MEND}")
        dimension = len(tensors["sum"])
        shift = tensors.get("shift", torch.zeros_like(tensors["sum"]))  # version 0.1 did not shift
        if len(tensors["outer"]) != dimension * (dimension + 1) // 2 or shift.shape != (dimension,):
            raise StageError(f"{name}: holds feature statistics of several sizes: {checkpoints.MEND}")
        statistics = FeatureStatistics(dimension)
        statistics.count, statistics.shift, statistics.sum = int(tensors["count"]), shift, tensors["sum"]
        rows, columns = torch.triu_indices(*statistics.outer.shape)
        statistics.outer[rows, columns] = statistics.outer[columns, rows] = tensors["outer"]
        return statistics


def distance(a: Gaussian, b: Gaussian) -> float:
    """Frechet distance `|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_b^{1/2} C_a C_b^{1/2})^{1/2})`.

    The trace of the root comes from eigenvalues of a symmetric matrix: clean-fid's value to rounding, several times
    faster at 2,048 features, and without its offset where a covariance is singular.

    Raises:
        StageError: they are of different feature networks.
    """
    if a.mean.shape != b.mean.shape:
        raise StageError(
            f"features: {len(a.mean)} against {len(b.mean)} of the reference: take both from the same feature network"
        )
    product = b.root @ a.covariance @ b.root
    cross = torch.linalg.eigvalsh((product + product.T) / 2).clamp(min=0).sqrt().sum()
    traces = a.covariance.trace() + b.covariance.trace()
    return float((a.mean - b.mean).square().sum() + traces - 2 * cross)


def train_digits_cnn(
    folder: Path, seed: int, steps: int, batch: int, learning_rate: float, heldout: int
) -> tuple[DigitsCNN, float]:
    """Train the digits classifier; returns it and its accuracy on held-out images.

    Args:
        folder: images of the digits.
        seed: number that every draw follows from.
        steps: steps of AdamW.
        batch: images a step.
        learning_rate: peak rate.
        heldout: images for the accuracy, never trained on.
    """
    from anisodiff.data.image_sets import load

    torch.manual_seed(seed)
    images, unseen = load(folder).split(heldout)
    network = DigitsCNN()
    optimizer = torch.optim.AdamW(network.parameters(), lr=learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps)
    for step in range(steps):
        generator = torch.Generator().manual_seed((seed * 0x9E3779B1 + step) % 2**32)
        index = torch.randint(len(images), (batch,), generator=generator)
        shift = torch.randint(-1, 2, (2,), generator=generator).tolist()
        pixels, labels = images.take(index)
        x = torch.roll(to_unit(pixels), shift, dims=(2, 3))
        value = functional.cross_entropy(network(x), labels.argmax(1), label_smoothing=0.1)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        pixels, labels = unseen.take(torch.arange(len(unseen)))
        right = network(to_unit(pixels)).argmax(1) == labels.argmax(1)
    return network.eval(), float(right.float().mean())
