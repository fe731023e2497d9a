"""How sure a distance is of its images: the delete-a-group jackknife.

A Frechet distance is no mean over images, and no formula gives its error. Leaving out one group of images after another
does (Efron 1982, "The Jackknife, the Bootstrap and Other Resampling Plans", Section 3), and where two rows of a table
leave out the same seeds, also the error of their difference.
"""

import itertools
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from torch import Tensor

from anisodiff.metrics.frechet import FeatureStatistics, Gaussian, distance

GROUPS = 10


def in_groups(features: Float[Tensor, "n d"]) -> list[FeatureStatistics]:
    """Feature statistics of ten groups of images, in their order, equal but for one image; one group of fewer than 20.

    Args:
        features: one row an image, in the order of seeds.
    """
    return [
        FeatureStatistics.of([part]) for part in features.tensor_split(GROUPS if len(features) >= 2 * GROUPS else 1)
    ]


def without_each(groups: Sequence[FeatureStatistics], truth: Gaussian) -> list[float]:
    """Distance to the data without each of the groups; none of one group, or of groups of several sizes.

    Args:
        groups: statistics of the groups of one seed range.
        truth: the data.
    """
    sizes = [group.count for group in groups]
    if len(groups) < 2 or max(sizes) > min(sizes) + 1:
        return []
    nothing = FeatureStatistics(len(truth.mean))
    before = itertools.accumulate(groups[:-1], initial=nothing)
    after = [*itertools.accumulate(reversed(groups[1:]), lambda total, group: group + total, initial=nothing)][::-1]
    return [distance((first + last).gaussian, truth) for first, last in zip(before, after, strict=True)]


def error(left_out: Float[np.ndarray, " groups"]) -> float:
    """Standard error of a distance, or of a difference of two, from its values without each group.

    Args:
        left_out: two or more values.
    """
    groups = len(left_out)
    return float(np.sqrt((groups - 1) / groups * np.square(left_out - np.mean(left_out)).sum()))


def error_of_mean(ranges: Sequence[Float[np.ndarray, " groups"]]) -> float:
    """Standard error of the mean over seed ranges, whose images are independent.

    Args:
        ranges: values without each group, of every range.
    """
    return float(np.sqrt(sum(error(left_out) ** 2 for left_out in ranges)) / len(ranges))


def corrected(value: float, left_out: Float[np.ndarray, " groups"]) -> float:
    """A distance less its bias of few images, which falls as one over their number (Quenouille 1956).

    It is the straight line through the distances of all images and of all but a group, at infinitely many: FID-infinity
    (arXiv:1911.07023) with two counts.

    Args:
        value: the distance of all images.
        left_out: distances without each group, two or more.
    """
    groups = len(left_out)
    return float(groups * value - (groups - 1) * np.mean(left_out))
