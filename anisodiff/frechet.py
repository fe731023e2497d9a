"""Feature networks, streaming feature statistics, and the Frechet distance (through clean-fid)."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.nn import functional

from anisodiff import checkpoints
from anisodiff.data import to_unit
from anisodiff.files import StageError

Features = Callable[[UInt8[Tensor, "b c h w"]], Float[Tensor, "b d"]]


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


def _digits_cnn(file: Path, device: str) -> Features:
    tensors, about = checkpoints.read(file)
    network = DigitsCNN(**about["config"])
    network.load_state_dict(tensors)
    network = network.to(device).eval().requires_grad_(False)
    return lambda images: network.features(to_unit(images.to(device)))


def _inception(file: Path, device: str) -> Features:
    from cleanfid.inception_torchscript import InceptionV3W

    if file.name != "inception-2015-12-05.pt":
        raise StageError(f"{file}: clean-fid asks for the name inception-2015-12-05.pt: rename it")
    network = InceptionV3W(str(file.parent), download=False, resize_inside=True).to(device).eval()

    def features(images: Tensor) -> Tensor:
        rgb = images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images
        return network(rgb.to(device, torch.float32))

    return features


FEATURES: dict[str, Callable[[Path, str], Features]] = {"digits-cnn": _digits_cnn, "inception": _inception}
TITLES = {"digits-cnn": "Frechet distance, digits-cnn features", "inception": "FID"}


class FeatureStatistics:
    """Count, sum and outer products of features in float64; statistics of shards add up, in the order given.

    Args:
        dimension: of the features.
    """

    def __init__(self, dimension: int):
        self.count = 0
        self.sum = torch.zeros(dimension, dtype=torch.float64)
        self.outer = torch.zeros(dimension, dimension, dtype=torch.float64)

    def add(self, features: Float[Tensor, "b d"]) -> None:
        features = features.detach().to("cpu", torch.float64)
        self.count += len(features)
        self.sum += features.sum(0)
        self.outer += features.T @ features

    def __add__(self, other: "FeatureStatistics") -> "FeatureStatistics":
        total = FeatureStatistics(len(self.sum))
        total.count = self.count + other.count
        total.sum, total.outer = self.sum + other.sum, self.outer + other.outer
        return total

    @property
    def mean(self) -> Float[Tensor, " d"]:
        return self.sum / self.count

    @property
    def covariance(self) -> Float[Tensor, "d d"]:
        """With N - 1, as `np.cov`."""
        if self.count < 2:
            raise StageError(f"{self.count} images have no covariance: use two or more")
        return (self.outer - torch.outer(self.sum, self.sum) / self.count) / (self.count - 1)

    def tensors(self) -> dict[str, Tensor]:
        return {"count": torch.tensor(self.count), "sum": self.sum, "outer": self.outer}

    @staticmethod
    def of(tensors: dict[str, Tensor]) -> "FeatureStatistics":
        statistics = FeatureStatistics(len(tensors["sum"]))
        statistics.count = int(tensors["count"])
        statistics.sum, statistics.outer = tensors["sum"], tensors["outer"]
        return statistics


def distance(a: FeatureStatistics, b: FeatureStatistics) -> float:
    """Frechet distance between the Gaussians of two sets of features, by clean-fid's `frechet_distance`."""
    from cleanfid.fid import frechet_distance

    return float(frechet_distance(a.mean.numpy(), a.covariance.numpy(), b.mean.numpy(), b.covariance.numpy()))


def train_digits_cnn(settings: dict[str, Any], folder: Path) -> tuple[DigitsCNN, float]:
    """Train the digits classifier; returns it and its accuracy on held-out images.

    Args:
        settings: seed, steps, batch, learning_rate, heldout.
        folder: images of the digits.
    """
    from anisodiff.data import load

    torch.manual_seed(settings["seed"])
    images, heldout = load(folder).split(settings["heldout"])
    network = DigitsCNN()
    optimizer = torch.optim.AdamW(network.parameters(), lr=settings["learning_rate"], weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, settings["learning_rate"], total_steps=settings["steps"])
    for step in range(settings["steps"]):
        generator = torch.Generator().manual_seed((settings["seed"] << 32) + step)
        index = torch.randint(len(images), (settings["batch"],), generator=generator)
        shift = torch.randint(-1, 2, (2,), generator=generator).tolist()
        pixels, labels = images.take(index)
        x = torch.roll(to_unit(pixels), shift, dims=(2, 3))
        value = functional.cross_entropy(network(x), labels.argmax(1), label_smoothing=0.1)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        pixels, labels = heldout.take(torch.arange(len(heldout)))
        right = network(to_unit(pixels)).argmax(1) == labels.argmax(1)
    return network.eval(), float(right.float().mean())
