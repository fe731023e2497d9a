"""Files of feature statistics: the cells of a table, and references."""

import json
from pathlib import Path
from typing import Any

from anisodiff.errors import StageError, one_line
from anisodiff.metrics import frechet
from anisodiff.storage import checkpoints


def read_cell(cell: Path) -> tuple[frechet.FeatureStatistics, dict[str, Any]]:
    """The statistics of a cell, and its header.

    Raises:
        StageError: the cell is missing, damaged or of another kind.
    """
    tensors, about = checkpoints.read(cell)
    return frechet.FeatureStatistics.from_tensors(tensors, cell), about


def cells_of(manifest: Path) -> list[Path]:
    """The cells that a manifest names.

    Raises:
        StageError: it is missing or damaged.
    """
    try:
        named = json.loads(manifest.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise StageError(f"{manifest}: no manifest of cells ({one_line(error)}): delete it and run again") from error
    if not isinstance(named, list) or not all(isinstance(each, str) for each in named):
        raise StageError(f"{manifest}: no manifest of cells: delete it and run again")
    return [manifest.parent / each for each in named]


def load_reference(file: Path, features: str) -> frechet.Gaussian:
    """The Gaussian of a file made by `reference`, or of a published npz.

    Raises:
        StageError: it is of another feature network.
    """
    if file.suffix == ".npz":
        if features != "inception":
            raise StageError(f"{file}: published statistics are of Inception's features, not of {features}")
        return frechet.published_statistics(file)
    tensors, about = checkpoints.read(file)
    if about.get("features") != features:
        raise StageError(f"{file}: statistics of {about.get('features')} features, not of {features}: make them again")
    return frechet.Gaussian.from_tensors(tensors, file)
