"""Whether one row of a table is better than another: differences on shared noises, with their errors."""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats

from anisodiff.errors import StageError
from anisodiff.metrics.spread import error_of_mean
from anisodiff.report.plain_tables import markdown, read

LEVEL = 0.05


@dataclass(frozen=True)
class Difference:
    """A difference between two means, with what is known of its error.

    Attributes:
        value: first less second.
        error: standard error; NaN where nothing is known of it.
        degrees_of_freedom: how much the standard error rests on (Welch and Satterthwaite).
    """

    value: float
    error: float
    degrees_of_freedom: float

    @property
    def interval(self) -> float:
        """Half-width of the 95 % confidence interval; NaN where the error is."""
        return float(stats.t.ppf(1 - LEVEL / 2, self.degrees_of_freedom) * self.error)

    def __format__(self, spec: str) -> str:
        """The difference, and half of its interval where one is known, as numbers of the format `spec`."""
        return f"{self.value:+{spec}}" + ("" if np.isnan(self.error) else f" ± {self.interval:{spec}}")

    @property
    def is_above(self) -> bool:
        """Whether the first is larger by a one-sided t-test at 5 %; where no error is known, whether it is at all."""
        if np.isnan(self.error):
            return not self.value <= 0  # what is not comparable is not best
        return bool(self.value > stats.t.ppf(1 - LEVEL, self.degrees_of_freedom) * self.error)


class Comparisons:
    """Differences between rows of a table at one budget.

    The variance of a difference is a sum of two. Over images: both rows draw theirs from the same noises, so the
    jackknife leaves the same group of noises out of both, and what the rows share cancels. Over trainings: of the
    difference between trainings of equal seed where both rows have these seeds, else of each row by itself. The two
    overlap, so the sum is conservative. A row that was trained once adds nothing to the second: its interval says
    nothing of another training.

    Args:
        rows: rows of `distances`.
        left_out: its distances without each group of images.
    """

    def __init__(self, rows: pd.DataFrame, left_out: pd.DataFrame):
        self._ranges = {key: each for key, each in rows.groupby(["method", "nfe"])}
        self._groups = {key: each for key, each in left_out.groupby(["method", "nfe"])}

    def difference(self, first: str, second: str, nfe: int) -> Difference:
        """Distance of one row less that of another, with its error.

        Args:
            first: method.
            second: method.
            nfe: a budget that both have.
        """
        a, b = (self._ranges[name, nfe] for name in (first, second))
        shared = sorted(set(a["range"]) & set(b["range"]))
        a, b = (each[each["range"].isin(shared)].groupby("training_seed")["distance"].mean() for each in (a, b))
        parts = [part for part in (self._of_images(first, second, nfe, shared), *_of_trainings(a, b)) if part]
        return _difference(float(a.mean() - b.mean()), [] if first == second else parts)

    def _of_images(self, first: str, second: str, nfe: int, shared: list[int]) -> tuple[float, float] | None:
        """Variance of the difference over images, and its degrees of freedom; None where nothing is known of it."""
        if not {(first, nfe), (second, nfe)} <= self._groups.keys():
            return None
        means = [self._groups[name, nfe].groupby(["range", "group"])["distance"].mean() for name in (first, second)]
        apart = means[0] - means[1]
        if not set(shared) <= set(apart.index.get_level_values("range")):  # a range of one shard has no groups
            return None
        if apart.loc[shared].isna().any():  # the rows' groups differ, so that theirs cannot be paired
            return None
        found = [apart[number].to_numpy() for number in shared]
        if min(map(len, found), default=0) < 2:
            return None
        return error_of_mean(found) ** 2, float(sum(len(each) - 1 for each in found))


def bits_difference(images: pd.DataFrame, first: str, second: str) -> Difference:
    """Bits per dimension of one likelihood less those of another, by one estimator: mean over trainings, then over the
    images that both have, paired.

    Args:
        images: rows of `likelihood-images.csv` of the estimator.
        first: likelihood.
        second: likelihood.
    """
    a, b = (
        images[images["likelihood"] == name].pivot(index="image", columns="training_seed", values="bits_per_dim")
        for name in (first, second)
    )
    apart = (a.mean(axis=1) - b.mean(axis=1)).dropna()
    parts = [_of_mean(apart)] if len(apart) > 1 else []
    return _difference(float(apart.mean()), [] if first == second else [*parts, *_of_trainings(a.mean(), b.mean())])


def compare(folder: Path, baseline: str, others: Sequence[str]) -> str:
    """A Markdown table of how much larger the distances of rows are than a baseline's, at every budget of the
    baseline; and their bits per dimension, where likelihoods of the baseline's name were measured.

    Each difference is over the ranges of images that both have, with half of its 95 % confidence interval, in bold
    where that excludes 0; blank where the row was not measured.

    Args:
        folder: a dataset's finished or published results: `distances.csv` and `distances-left-out.csv` are read, and
            `likelihood-images.csv` where it is.
        baseline: method; its own distances are the first line.
        others: methods.

    Raises:
        StageError: the folder lacks one of these files, or a method is in none of the rows.
    """
    files = [folder / f"{name}.csv" for name in ("distances", "distances-left-out")]
    if lost := [file.name for file in files if not file.is_file()]:
        missing = ", ".join(lost) if folder.is_dir() else "such folder"
        raise StageError(
            f"{folder}: no {missing}: name a dataset's results, published by this version or finished here"
        )
    rows, left_out = (read(file) for file in files)
    known = set(rows["method"])
    if lost := [name for name in (baseline, *others) if name not in known]:
        raise StageError(f"{folder}: no row {', '.join(lost)}: did you mean {_close(lost[0], sorted(known))}?")
    comparisons = Comparisons(rows, left_out)
    mean = {key: float(each.mean()) for key, each in rows.groupby(["method", "nfe"])["distance"]}
    budgets = sorted(set(rows[rows["method"] == baseline]["nfe"]))

    def change(name: str, nfe: int) -> str:
        return _marked(comparisons.difference(name, baseline, nfe), ".2f") if (name, nfe) in mean else ""

    head = ["row", *(f"NFE {nfe}" for nfe in budgets)]
    lines = [[baseline, *(f"{mean[baseline, nfe]:.2f}" for nfe in budgets)]]
    lines += [[f"{name} less {baseline}", *(change(name, nfe) for nfe in budgets)] for name in others]
    bits = folder / "likelihood-images.csv"
    for estimator, images in read(bits).groupby("estimator", sort=False) if bits.is_file() else ():
        measured = images.groupby("likelihood")["bits_per_dim"].mean()
        if baseline in measured:
            head.append(f"bits/dim, {estimator}")
            lines[0].append(f"{measured[baseline]:.3f}")
            for line, name in zip(lines[1:], others, strict=True):
                line.append(_marked(bits_difference(images, name, baseline), ".3f") if name in measured else "")
    legend = "±: half of the 95 % confidence interval, bold where it excludes 0. Lower is better."
    return f"{markdown([head, *lines])}\n\n{legend}"


def _close(name: str, known: Sequence[str]) -> str:
    return " or ".join(difflib.get_close_matches(name, known, n=3, cutoff=0.0))


def _marked(found: Difference, spec: str) -> str:
    text = format(found, spec)
    return f"**{text}**" if abs(found.value) > found.interval else text


def _difference(value: float, parts: Sequence[tuple[float, float]]) -> Difference:
    """A difference with the sum of some variances, each with its degrees of freedom."""
    if not parts:
        return Difference(value, np.nan, np.nan)
    variance = sum(part for part, _ in parts)
    found = variance**2 / sum(part**2 / degrees for part, degrees in parts) if variance > 0 else 1.0
    return Difference(value, float(np.sqrt(variance)), float(found))


def _of_trainings(a: pd.Series, b: pd.Series) -> list[tuple[float, float]]:
    """Variances of a difference over training seeds, with their degrees of freedom.

    Args:
        a: mean of each training seed.
        b: means of the other row.
    """
    if len(a) > 1 and a.index.equals(b.index):
        return [_of_mean(a - b)]
    return [_of_mean(each) for each in (a, b) if len(each) > 1]


def _of_mean(values: pd.Series) -> tuple[float, float]:
    return float(values.var() / len(values)), len(values) - 1.0
