"""Feature networks by name."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from anisodiff.registry import Entry


@dataclass(frozen=True)
class FeatureNetwork(Entry):
    """A feature network of the Frechet distance.

    Attributes:
        source: the function `(file, device) -> (images in uint8 -> features [B, D])` (`metrics/feature_networks.py`).
        dimension: D.
        title: what the distance is called; only Inception's is an FID.
    """

    dimension: int
    title: str

    @property
    def is_fid(self) -> bool:
        """Whether the distance is the published FID, to which published values and statistics compare."""
        return self.title == "FID"


Keep = Literal["statistics", "features", "images"]  # what stays of drawn images, each with what is before it


class FeatureFile(NamedTuple):
    """A feature network and its file.

    Attributes:
        kind: one of `FEATURES`.
        file: its weights.
    """

    kind: str
    file: Path


FEATURES = {
    "inception": FeatureNetwork("metrics.feature_networks:inception", 2048, "FID"),
    "efficientnet-lite0": FeatureNetwork(
        "metrics.feature_networks:efficientnet_lite0", 1280, "Frechet distance, EfficientNet-Lite0 features"
    ),
    "dinov2-vit-l14": FeatureNetwork("metrics.feature_networks:dinov2_vit_l14", 1024, "FD-DINOv2"),
    "digits-cnn": FeatureNetwork("metrics.feature_networks:digits_cnn", 64, "Frechet distance, digits-cnn features"),
}
