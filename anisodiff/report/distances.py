"""Distances of the cells of a table to the data: one row a seed range."""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from anisodiff.errors import StageError
from anisodiff.experiment.files import cells_of
from anisodiff.metrics import frechet
from anisodiff.metrics.cells import load_reference, read_cell
from anisodiff.storage import checkpoints
from anisodiff.storage.files import write_text


def distances(
    dataset: str, reference: Path, manifests: Sequence[Path], images: int, features: str, output: Path
) -> None:
    """One row a method, budget and seed range: the distance of its summed shards to the reference.

    Args:
        dataset: its name.
        reference: feature statistics of the data.
        manifests: of the sampling jobs, one a method and shard, in folders named by method.
        images: images of a seed range; shards are summed in the order of their seeds.
        features: kind of the feature network.
        output: CSV file.
    """
    truth = load_reference(reference, features)
    shards: dict[tuple, list] = {}
    for manifest in manifests:
        for cell in cells_of(manifest):
            metadata = checkpoints.header(cell)
            try:
                nfe, first = int(metadata["settings"]["nfe"]), int(metadata["settings"]["seeds"][0])
            except (LookupError, TypeError, ValueError) as error:
                raise StageError(f"{cell}: holds no cell of a budget and seeds: {checkpoints.MEND}") from error
            shards.setdefault((manifest.parent.name, nfe, first // images), []).append((first, cell))
    rows = []
    for (method, nfe, seed_range), parts in sorted(shards.items(), key=lambda item: (str(item[0][0]), item[0][1:])):
        total, headers = frechet.FeatureStatistics(0), []
        for _, cell in sorted(parts):  # one at a time in memory
            statistics, metadata = read_cell(cell)
            total = total + statistics
            headers.append(metadata)
        if total.count != images:
            raise StageError(
                f"{method}, nfe {nfe}, range {seed_range}: {total.count} of {images} images: sample the rest"
            )
        last = headers[0].get("last_step", (float("nan"), float("nan")))  # cells of early versions do not say it
        rows.append(
            {
                "dataset": dataset,
                "method": method,
                "nfe": nfe,
                "range": seed_range,
                "images": total.count,
                "evaluations": max(metadata["evaluations"] for metadata in headers),
                "last_from": last[0],
                "last_to": last[1],
                "distance": frechet.distance(total.gaussian, truth),
                "features": features,
                "kimg": headers[0]["kimg"],
                "stopped_early": any(metadata["stopped_early"] for metadata in headers),
                "seconds": sum(metadata["seconds"] for metadata in headers),
                "training_seconds": headers[0]["device_seconds"],
                "device": ", ".join(sorted({metadata["environment"]["device"] for metadata in headers})),
                "host": " ".join(sorted({metadata["environment"]["host"] for metadata in headers})),
                "version": " ".join(sorted({each for metadata in headers for each in metadata["versions"]})),
                "commit": " ".join(sorted({each for metadata in headers for each in metadata["commits"]})),
            }
        )
    write_text(output, pd.DataFrame(rows).to_csv(index=False))
