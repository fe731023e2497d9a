"""Files of feature statistics: the cells of a table, and references."""

from dataclasses import dataclass
from pathlib import Path

from jaxtyping import Float
from torch import Tensor

from anisodiff.errors import StageError
from anisodiff.metrics import frechet
from anisodiff.metrics.registry import FEATURES
from anisodiff.storage import checkpoints
from anisodiff.storage.files import Metadata


@dataclass(frozen=True)
class Cell:
    """A cell of a table.

    Attributes:
        statistics: sums over the features of its images.
        features: `[N, D]`, in the order of seeds; None where they were not kept.
        metadata: its header.
    """

    statistics: frechet.FeatureStatistics
    features: Float[Tensor, "n d"] | None
    metadata: Metadata


def read_cell(file: Path) -> Cell:
    """A cell from its file.

    Raises:
        StageError: the cell is missing, damaged or of another kind.
    """
    tensors, metadata = checkpoints.read(file)
    statistics = frechet.FeatureStatistics.from_tensors(tensors, file)
    features = tensors.get("features")
    if features is not None and features.shape != (statistics.count, len(statistics.sum)):
        raise StageError(f"{file}: holds features of other images than its statistics: {checkpoints.MEND}")
    return Cell(statistics, features, metadata)


@dataclass(frozen=True)
class Reference:
    """What distances are measured to.

    Attributes:
        gaussian: mean and covariance of the features of the data.
        features: `[M, D]` of some of its images, drawn at random; None where none were kept.
        floor: distance of these images to the rest of the data; None where it is not known.
        rest: number of the others.
    """

    gaussian: frechet.Gaussian
    features: Float[Tensor, "m d"] | None = None
    floor: float | None = None
    rest: int = 0


def load_reference(file: Path, features: str) -> Reference:
    """The reference of a file made by the stage `reference`, or of a published npz.

    Raises:
        StageError: it is of another feature network.
    """
    if file.suffix == ".npz":
        if not FEATURES[features].is_fid:
            raise StageError(f"{file}: published statistics are of Inception's features, not of {features}")
        return Reference(frechet.published_statistics(file))
    tensors, metadata = checkpoints.read(file)
    if metadata.get("features") != features:
        raise StageError(
            f"{file}: statistics of {metadata.get('features')} features, not of {features}: make them again"
        )
    gaussian, kept = frechet.Gaussian.from_tensors(tensors, file), tensors.get("features")
    if kept is not None and kept.shape[1:] != gaussian.mean.shape:
        raise StageError(f"{file}: holds features of another network than its statistics: make it again")
    if kept is None or metadata.get("floor") is None:
        return Reference(gaussian, kept)
    return Reference(gaussian, kept, metadata["floor"], metadata["images"] - len(kept))
