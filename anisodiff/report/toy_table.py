"""The table of the toy: a row a process, mean and standard deviation over seeds, a part a plane."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from anisodiff.errors import StageError
from anisodiff.report.plain_tables import markdown
from anisodiff.storage import checkpoints
from anisodiff.storage.files import Metadata, write_text

Files = Mapping[str, Mapping[str, Sequence[str]]]  # plane -> row -> a file a seed
COLUMNS = (  # of the page: of what, head, digits
    (("exact",), "exact flow", 4),
    (("energy",), "energy", 2),
    (("horizontal",), "along the plane", 3),
    (("length",), "length / chord", 3),
    (("rate_1", "rate_2", "rate_3"), "rates", 2),
    (("rate_normal",), "rate, normal", 2),
    (("angle",), "normal off by", 0),
    (("angle_start",), "off at the start", 0),
    (("omega",), "omega", 3),
    (("omega_start",), "omega at the start", 2),
)
NOTES = """\
Mean ± standard deviation over {seeds} trainings of {kimg:g} kimg; {images:,} samples a distance, by {solver} in steps
that are uniform in the process's time. Everything is measured in the process's own coordinates, where the noise is
N(0, I) at the end; learned rates are those of the last step, the network's weights are averaged.

W_2^2, by the number of steps: squared Wasserstein distance between the plane's Gaussian and the Gaussian that has the
samples' mean and covariance, with a noise of about {floor:.1g}. Exact flow: the same of the row's own process with the
flow in closed form, at the most steps: what it has above the noise is the ends' (sampling starts from N(0, M), which
the noisy data are not quite), and what the row has above it is its network's. Energy: kinetic energy of the flow, int
E|v|^2 dt; along the plane: the share of it that does not point along the normal. Length / chord: of sampling
trajectories of the most steps, lengths and chords summed over them. Rates: eigenvalues of R^-1, in rising order, and
that of the vector nearest to the plane's normal, with its angle to it in degrees, now and at the start (the nearest of
three random directions); with drift, the angle of omega's axis. Omega: its turn, in radians a unit of beta, which
starts at a draw from N(0, 1).

The row exact is the flow in closed form on the fixed process (VP), which no training enters. Rows are described in
config/fp-toy.yaml."""


def write(files: Files, output: Path) -> None:
    """Write `table.csv`, a line a seed, and `table.md`.

    Args:
        files: files of the stage `toy`, by plane and row.
        output: folder.
    """
    headers = [
        (plane, row, header(file)) for plane, rows in files.items() for row, found in rows.items() for file in found
    ]
    tidy = pd.DataFrame([_line(plane, row, each) for plane, row, each in headers])
    write_text(output / "table.csv", tidy.to_csv(index=False, float_format="%.6g"))
    distances = sorted((name for name in map(str, tidy) if name.startswith("w2_")), key=lambda name: int(name[3:]))
    columns = [*(((name,), f"W_2^2, {name[3:]} steps", 4) for name in distances), *COLUMNS]
    parts = []
    for plane, rows in files.items():
        lines = [["row", *(head for _, head, _ in columns)]]
        for row in rows:
            of_row = tidy[(tidy["plane"] == plane) & (tidy["row"] == row)].dropna(axis="columns")
            cells = [[_cell(of_row[name], digits) for name in names if name in of_row] for names, _, digits in columns]
            lines.append([row, *map(", ".join, cells)])
        parts += [f"**{plane}**: {_described(headers, plane)}", markdown(lines)]
    settings = headers[0][2]["settings"]["toy"]
    notes = NOTES.format(
        seeds=tidy["seed"].nunique(), kimg=settings["kimg"], images=settings["images"], solver=settings["solver"],
        floor=3 / settings["images"],
    )  # fmt: skip
    write_text(output / "table.md", "\n\n".join([*parts, notes]) + "\n")


def header(file: str | Path) -> Metadata:
    """The header of a file of the toy.

    Raises:
        StageError: it is another file.
    """
    metadata = checkpoints.header(file)
    if not metadata.get("toy"):
        raise StageError(f"{file}: holds no toy: give a file of the stage `toy`")
    return metadata


def _line(plane: str, row: str, metadata: Metadata) -> dict[str, Any]:
    """A file's columns as a line of the tidy table."""
    summary = dict(metadata["summary"])
    rates = {f"rate_{k}": rate for k, rate in enumerate(sorted(summary.pop("rates")), start=1)}
    made = {f"{key[:-1]}": " ".join(metadata[key]) for key in ("versions", "commits")}
    seed = metadata["settings"]["toy"]["seed"]
    return {"plane": plane, "row": row, "seed": seed, **summary, **rates, "seconds": metadata["seconds"], **made}


def _cell(values: pd.Series, digits: int) -> str:
    """Mean ± standard deviation, where there is any to speak of."""
    mean, spread = values.mean(), values.std() if len(values) > 1 else 0.0
    return f"{mean:.{digits}f}" + (f" ± {spread:.{digits}f}" if spread > 0.5 * 10**-digits else "")


def _described(headers: Sequence[tuple[str, str, Metadata]], plane: str) -> str:
    """What a plane is, in words."""
    about = next(each["settings"]["plane"] for name, _, each in headers if name == plane)
    tilt = f", tilted by {about['tilt']:g} rad" if about["tilt"] else ""
    variances = " and ".join(f"{each:g}" for each in about["variances"])
    return f"a plane at a distance of {about['distance']:g}{tilt}, variances in it {variances}"
