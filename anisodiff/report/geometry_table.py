"""The table of the geometry stage: a row for each denoiser over each path."""

from pathlib import Path

import pandas as pd

from anisodiff.errors import StageError
from anisodiff.metrics.geometry import DENOISERS
from anisodiff.report.plain_tables import markdown
from anisodiff.storage import checkpoints
from anisodiff.storage.files import Metadata, write_text

HEAD = [
    "name", "denoiser", "trajectories", "deviation", "of the chord", "at level", "one peak", "in one direction",
    "in two", "residual", "residual at level", "residual in one", "residual in two", "left in 3-D", "unlike",
    "turning", "length", "noise, mean", "noise, last",
]  # fmt: skip
NOTES = """\
Trajectories by Euler's steps, at times when the path's mean level is on EDM's polynomial grid; pixel values. Kernel:
the optimal denoiser for the training images; gaussian: for one Gaussian fitted to them; mixture: for one a class.

Deviation: largest distance from the chord between the ends, mean ± standard deviation over trajectories; as a share of
the chord; the mean level where it is largest (median). One peak: trajectories that leave the chord and come back once.
In one, two directions: squared deviation explained by principal directions perpendicular to the chord. Residual: the
deviation without the curve that the path alone would make between the same ends, were all data one point, which is
straight where all subspaces fall together. Left in 3-D: largest distance to the chord and two directions, as a share of
the largest deviation. Unlike: distance from the mean shape, of curves scaled to their largest deviation and turned onto
one another. Turning: of the curve in 3-D, from end to end. Length: of the trajectory, in sigma_max sqrt(d). Noise: size
of the noise prediction in sqrt(d), over the trajectory and at its last step."""


def write(files: dict[str, Path], output: Path) -> None:
    """Write `geometry.csv` and `geometry.md`.

    Args:
        files: of the stage `geometry`, by name.
        output: folder.
    """
    summaries = {name: _summary(file) for name, file in files.items()}
    rows = [
        {"name": name, "denoiser": kind, **summary[kind]}
        for name, summary in summaries.items()
        for kind in DENOISERS
        if kind in summary
    ]
    write_text(output / "geometry.csv", pd.DataFrame(rows).to_csv(index=False, float_format="%.6g"))
    lines = [
        [row["name"], row["denoiser"], str(row["trajectories"]),
         f"{row['deviation']:.2f} ± {row['deviation_std']:.2f}", f"{100 * row['deviation_of_chord']:.2f} %",
         f"{row['level_of_deviation']:.2f}", f"{100 * row['single_peak']:.0f} %",
         f"{100 * row['explained_1']:.1f} %", f"{100 * row['explained_2']:.1f} ± {100 * row['explained_2_std']:.1f} %",
         f"{row['residual']:.2f} ± {row['residual_std']:.2f}", f"{row['residual_level']:.2f}",
         f"{100 * row['residual_explained_1']:.1f} %", f"{100 * row['residual_explained_2']:.1f} %",
         f"{100 * row['left_in_3d']:.1f} %", f"{100 * row['unlike']:.0f} ± {100 * row['unlike_std']:.0f} %",
         f"{row['turning']:.0f}°", f"{row['length']:.3f} ± {row['length_std']:.3f}",
         f"{row['norm']:.3f}", f"{row['norm_last']:.3f}"]
        for row in rows
    ]  # fmt: skip
    shares = [[row["name"], row["denoiser"], *(f"{100 * row[f'plain_{k}']:.6f} %" for k in (1, 2, 3))] for row in rows]
    near = [
        f"{name}: the network is no farther from the optimum for {summary['kernel']['data']:,} training images than "
        f"the noisy image is, at {100 * summary['network']['close_to_optimum']:.1f} % of the steps (the assumption of "
        "Proposition 3)."
        for name, summary in summaries.items()
        if "kernel" in summary
    ]
    pages = [
        markdown([HEAD, *lines]),
        NOTES,
        "Variance of the points themselves in their principal directions (GITS, Table 7):",
        markdown([["name", "denoiser", "Top-1", "Top-2", "Top-3"], *shares]),
        *near,
    ]
    write_text(output / "geometry.md", "\n\n".join(pages) + "\n")


def _summary(file: Path) -> Metadata:
    metadata = checkpoints.header(file)
    if not metadata.get("geometry"):
        raise StageError(f"{file}: holds no geometry: give a file of the stage `geometry`")
    return metadata["summary"]
