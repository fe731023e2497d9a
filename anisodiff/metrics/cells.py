"""Files of feature statistics: the cells of a table, and references."""

from pathlib import Path

from anisodiff.errors import StageError
from anisodiff.metrics import frechet
from anisodiff.metrics.registry import FEATURES
from anisodiff.storage import checkpoints
from anisodiff.storage.files import Metadata


def read_cell(cell: Path) -> tuple[frechet.FeatureStatistics, Metadata]:
    """The statistics of a cell, and its header.

    Raises:
        StageError: the cell is missing, damaged or of another kind.
    """
    tensors, metadata = checkpoints.read(cell)
    return frechet.FeatureStatistics.from_tensors(tensors, cell), metadata


def load_reference(file: Path, features: str) -> frechet.Gaussian:
    """The Gaussian of a file made by `reference`, or of a published npz.

    Raises:
        StageError: it is of another feature network.
    """
    if file.suffix == ".npz":
        if not FEATURES[features].is_fid:
            raise StageError(f"{file}: published statistics are of Inception's features, not of {features}")
        return frechet.published_statistics(file)
    tensors, metadata = checkpoints.read(file)
    if metadata.get("features") != features:
        raise StageError(
            f"{file}: statistics of {metadata.get('features')} features, not of {features}: make them again"
        )
    return frechet.Gaussian.from_tensors(tensors, file)
