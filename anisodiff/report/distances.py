"""Distances of the cells of a table to the data: one row a seed range, and how sure they are of their images."""

import functools
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm

from anisodiff.errors import StageError
from anisodiff.experiment.files import cells_of
from anisodiff.experiment.training_seeds import without_seed
from anisodiff.metrics import fidelity, frechet, spread
from anisodiff.metrics.cells import Cell, Reference, load_reference, read_cell
from anisodiff.storage import checkpoints
from anisodiff.storage.files import write_text

LEFT_OUT = ["method", "nfe", "training_seed", "range", "group", "distance"]


@dataclass(frozen=True)
class _Range:
    """A seed range of a method at a budget, from its shards."""

    dataset: str
    method: str
    nfe: int
    number: int
    features_kind: str
    shards: Sequence[Cell]

    @property
    def key(self) -> dict[str, Any]:
        name, seed = without_seed(self.method)
        return {"method": name, "nfe": self.nfe, "training_seed": seed, "range": self.number}

    @functools.cached_property
    def total(self) -> frechet.FeatureStatistics:
        return functools.reduce(operator.add, (cell.statistics for cell in self.shards))

    @property
    def features(self) -> Tensor | None:
        """Features of all images, where all shards kept them."""
        kept = [cell.features for cell in self.shards if cell.features is not None]
        return torch.cat(kept) if len(kept) == len(self.shards) else None

    def measured(self, truth: Reference) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """The row of the range, and the distances without each group of its images."""
        total, features = self.total, self.features
        groups = [cell.statistics for cell in self.shards] if features is None else spread.in_groups(features)
        value, left = frechet.distance(total.gaussian, truth.gaussian), spread.without_each(groups, truth.gaussian)
        row = self.key | {"images": total.count, "distance": value, "features": self.features_kind}
        row |= {"dataset": self.dataset, "error": np.nan, "corrected": np.nan}
        row |= {"floor": truth.floor, "floor_images": 0 if truth.features is None else len(truth.features)}
        row |= {"rest": truth.rest}
        if left:
            row["error"] = spread.error(np.array(left))
            if total.count > len(total.sum):  # of fewer images the bias is no straight line
                row["corrected"] = spread.corrected(value, np.array(left))
        if features is not None and truth.features is not None and fidelity.is_enough(features, truth.features):
            kernel = fidelity.kernel_distance(features, truth.features)
            row |= {"kid": kernel.value, "kid_error": kernel.error}
            row |= fidelity.precision_recall(features, truth.features)._asdict()
        return row | self._made(), [self.key | {"group": at, "distance": each} for at, each in enumerate(left)]

    def _made(self) -> dict[str, Any]:
        """What the headers of the cells say."""
        headers = [cell.metadata for cell in self.shards]
        last = headers[0].get("last_step", (float("nan"), float("nan")))  # cells of early versions do not say it
        return {
            "evaluations": max(metadata["evaluations"] for metadata in headers),
            "last_from": last[0],
            "last_to": last[1],
            "kimg": headers[0]["kimg"],
            "stopped_early": any(metadata["stopped_early"] for metadata in headers),
            "seconds": sum(metadata["seconds"] for metadata in headers),
            "training_seconds": headers[0]["device_seconds"],
            "device": ", ".join(sorted({metadata["environment"]["device"] for metadata in headers})),
            "host": " ".join(sorted({metadata["environment"]["host"] for metadata in headers})),
            "version": " ".join(sorted({each for metadata in headers for each in metadata["versions"]})),
            "commit": " ".join(sorted({each for metadata in headers for each in metadata["commits"]})),
        }


def distances(
    dataset: str, reference: Path, manifests: Sequence[Path], images: int, features: str, output: Path, left_out: Path
) -> None:
    """One row a method, budget, training seed and seed range: the distance of its summed shards to the reference.

    Where the cells kept their features: KID, precision and recall besides, and errors over images from groups of them;
    elsewhere the shards are the groups.

    Args:
        dataset: its name.
        reference: feature statistics of the data.
        manifests: files of the sampling jobs, one a method and shard, in folders named by method.
        images: images of a seed range; shards are summed in the order of their seeds.
        features: kind of the feature network.
        output: CSV file.
        left_out: CSV file of the distances without each group of a range's images, which differences are tested by.
    """
    truth = load_reference(reference, features)
    shards: dict[tuple[str, int, int], list[tuple[int, Path]]] = {}
    for manifest in manifests:
        for cell in cells_of(manifest):
            metadata = checkpoints.header(cell)
            try:
                nfe, first = int(metadata["settings"]["nfe"]), int(metadata["settings"]["seeds"][0])
            except (LookupError, TypeError, ValueError) as error:
                raise StageError(f"{cell}: holds no cell of a budget and seeds: {checkpoints.MEND}") from error
            shards.setdefault((manifest.parent.name, nfe, first // images), []).append((first, cell))
    rows, without = [], []
    for (method, nfe, number), parts in tqdm(sorted(shards.items()), desc="distance", unit="range", mininterval=5):
        found = _Range(dataset, method, nfe, number, features, [read_cell(cell) for _, cell in sorted(parts)])
        if (count := found.total.count) != images:
            raise StageError(f"{method}, nfe {nfe}, range {number}: {count} of {images} images: sample the rest")
        row, left = found.measured(truth)
        rows.append(row)
        without += left
    write_text(left_out, pd.DataFrame(without, columns=LEFT_OUT).to_csv(index=False))
    write_text(output, pd.DataFrame(rows).to_csv(index=False))
