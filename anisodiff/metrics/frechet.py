"""Streaming feature statistics, and the Frechet distance."""

import functools
import itertools
import zipfile
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from anisodiff.errors import StageError, one_line
from anisodiff.metrics.registry import FEATURES
from anisodiff.storage import checkpoints


@dataclass(frozen=True)
class Gaussian:
    """Mean and covariance of features, all that a Frechet distance asks of a set of images.

    Attributes:
        mean: `[D]`, float64.
        covariance: `[D, D]`, float64, with N - 1.
    """

    mean: Float[Tensor, " d"]
    covariance: Float[Tensor, "d d"]

    @staticmethod
    def from_tensors(tensors: dict[str, Tensor], name: Path | str) -> "Gaussian":
        """The Gaussian of these tensors, from the file `name`.

        Raises:
            StageError: they are no mean and covariance, or not finite.
        """
        kinds: dict[str, Any] = {"mean": Float[Tensor, " d"], "covariance": Float[Tensor, "rows columns"]}
        if not all(isinstance(tensors.get(key), kind) for key, kind in kinds.items()):
            raise StageError(f"{name}: holds no reference statistics: give the file of the stage `reference`")
        mean, covariance = tensors["mean"], tensors["covariance"]
        if covariance.shape != (len(mean), len(mean)):
            sizes = f"{len(mean)} features in its mean, {list(covariance.shape)} in its covariance"
            raise StageError(f"{name}: {sizes}: make it again")
        if not (mean.isfinite().all() and covariance.isfinite().all()):
            raise StageError(f"{name}: its statistics are NaN or infinite: make or fetch it again")
        return Gaussian(mean.to(torch.float64), covariance.to(torch.float64))

    @functools.cached_property
    def root(self) -> Float[Tensor, "d d"]:
        """Symmetric square root of the covariance."""
        values, vectors = torch.linalg.eigh(self.covariance)
        return (vectors * values.clamp(min=0).sqrt()) @ vectors.T

    def tensors(self) -> dict[str, Tensor]:
        return {"mean": self.mean, "covariance": self.covariance}


def published_statistics(file: Path) -> Gaussian:
    """Reference statistics as EDM publishes them: an npz of `mu` and `sigma` of Inception's features.

    Raises:
        StageError: it is no such file, or one of other features.
    """
    dimension = FEATURES["inception"].dimension
    largest = 2 * 8 * dimension**2  # bytes of an array; no more is unpacked
    try:
        with zipfile.ZipFile(file) as held:
            if any(each.file_size > largest for each in held.infolist()):
                raise ValueError("its arrays are too large")
        with np.load(file, allow_pickle=False) as arrays:
            mean, covariance = (torch.from_numpy(arrays[key].astype(np.float64)) for key in ("mu", "sigma"))
    except (
        OSError, ValueError, LookupError, EOFError, MemoryError, RuntimeError, zipfile.BadZipFile, zlib.error,
    ) as error:  # fmt: skip
        said = one_line(error)
        raise StageError(f"{file}: no reference statistics ({said}): it should hold mu and sigma") from error
    if mean.shape != (dimension,) or covariance.shape != (dimension,) * 2:
        raise StageError(
            f"{file}: statistics of {mean.numel()} features, Inception has {dimension}: "
            "give statistics of the same feature network"
        )
    return Gaussian.from_tensors({"mean": mean, "covariance": covariance}, file)


class FeatureStatistics:
    """Count, sum and outer products of features in float64; statistics of shards add up, in the order given.

    Sums are of features less the mean of the first batch: products of numbers far from zero would cancel in the
    covariance (Chan, Golub and LeVeque 1983, "Algorithms for computing the sample variance", shifted data).

    Args:
        dimension: of the features.
    """

    def __init__(self, dimension: int):
        self.count = 0
        self.shift = torch.zeros(dimension, dtype=torch.float64)
        self.sum = torch.zeros(dimension, dtype=torch.float64)
        self.outer = torch.zeros(dimension, dimension, dtype=torch.float64)

    def add(self, features: Float[Tensor, "b d"]) -> None:
        """Add a batch.

        Raises:
            StageError: a feature is NaN or infinite.
        """
        features = features.detach().to("cpu", torch.float64)
        if not features.isfinite().all():
            raise StageError("features: are NaN or infinite: fetch the feature network again, or make it again")
        if not self.count:
            self.shift = features.mean(0)
        centred = features - self.shift
        self.count += len(features)
        self.sum += centred.sum(0)
        self.outer += centred.T @ centred

    @staticmethod
    def of(parts: Iterable[Float[Tensor, "b d"]]) -> "FeatureStatistics":
        """Statistics of features that come in one part or more."""
        parts = iter(parts)
        first = next(parts)
        statistics = FeatureStatistics(first.shape[1])
        for part in itertools.chain([first], parts):
            statistics.add(part)
        return statistics

    def __add__(self, other: "FeatureStatistics") -> "FeatureStatistics":
        if not self.count:
            return other
        moved = other.shift - self.shift
        cross = torch.outer(other.sum, moved)
        total = FeatureStatistics(len(self.sum))
        total.count, total.shift = self.count + other.count, self.shift
        total.sum = self.sum + (other.sum + other.count * moved)
        total.outer = self.outer + (other.outer + (cross + cross.T) + other.count * torch.outer(moved, moved))
        return total

    @property
    def gaussian(self) -> Gaussian:
        """Mean, and covariance with N - 1, as `np.cov`."""
        if self.count < 2:
            raise StageError(f"{self.count} images have no covariance: use two or more")
        covariance = (self.outer - torch.outer(self.sum, self.sum) / self.count) / (self.count - 1)
        return Gaussian(self.shift + self.sum / self.count, covariance)

    def tensors(self) -> dict[str, Tensor]:
        """For a file: of the symmetric products, the half that says all."""
        rows, columns = torch.triu_indices(*self.outer.shape)
        sums = {"count": torch.tensor(self.count), "shift": self.shift, "sum": self.sum}
        return sums | {"outer": self.outer[rows, columns]}

    @staticmethod
    def from_tensors(tensors: dict[str, Tensor], name: Path | str = "cell") -> "FeatureStatistics":
        """The statistics of these tensors, from the file `name`.

        Raises:
            StageError: they are no statistics.
        """
        kinds: dict[str, Any] = {
            "count": Int[Tensor, ""],
            "sum": Float64[Tensor, " d"],
            "outer": Float64[Tensor, " products"],
        }
        if not all(isinstance(tensors.get(key), kind) for key, kind in kinds.items()):
            raise StageError(f"{name}: holds no feature statistics: {checkpoints.MEND}")
        dimension = len(tensors["sum"])
        shift = tensors.get("shift", torch.zeros_like(tensors["sum"]))  # version 0.1 did not shift
        if len(tensors["outer"]) != dimension * (dimension + 1) // 2 or shift.shape != (dimension,):
            raise StageError(f"{name}: holds feature statistics of several sizes: {checkpoints.MEND}")
        statistics = FeatureStatistics(dimension)
        statistics.count, statistics.shift, statistics.sum = int(tensors["count"]), shift, tensors["sum"]
        rows, columns = torch.triu_indices(*statistics.outer.shape)
        statistics.outer[rows, columns] = statistics.outer[columns, rows] = tensors["outer"]
        return statistics


def distance(a: Gaussian, b: Gaussian) -> float:
    """Frechet distance `|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_b^{1/2} C_a C_b^{1/2})^{1/2})`.

    The trace of the root comes from eigenvalues of a symmetric matrix: clean-fid's value to rounding, several times
    faster at 2,048 features, and without its offset where a covariance is singular.

    Raises:
        StageError: they are of different feature networks.
    """
    if a.mean.shape != b.mean.shape:
        raise StageError(
            f"features: {len(a.mean)} against {len(b.mean)} of the reference: take both from the same feature network"
        )
    product = b.root @ a.covariance @ b.root
    cross = torch.linalg.eigvalsh((product + product.T) / 2).clamp(min=0).sqrt().sum()
    traces = a.covariance.trace() + b.covariance.trace()
    return float((a.mean - b.mean).square().sum() + traces - 2 * cross)
