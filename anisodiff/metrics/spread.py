"""How sure a distance is of its images: the delete-a-group jackknife.

A Frechet distance is no mean over images, and no formula gives its error. Leaving out one group of images after another
does (Efron 1982, "The Jackknife, the Bootstrap and Other Resampling Plans", Section 3), and where two rows of a table
leave out the same seeds, also the error of their difference.
"""

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
    groups = []
    for part in features.tensor_split(GROUPS if len(features) >= 2 * GROUPS else 1):
        statistics = FeatureStatistics(features.shape[1])
        statistics.add(part)
        groups.append(statistics)
    return groups


def without_each(groups: Sequence[FeatureStatistics], truth: Gaussian) -> list[float]:
    """Distance to the data without each of the groups; none of one group, or of groups of several sizes.

    Args:
        groups: of one seed range.
        truth: the data.
    """
    sizes = [group.count for group in groups]
    if len(groups) < 2 or max(sizes) > min(sizes) + 1:
        return []
    found = []
    for left in range(len(groups)):
        total = FeatureStatistics(len(truth.mean))
        for index, group in enumerate(groups):
            total = total if index == left else total + group
        found.append(distance(total.gaussian, truth))
    return found


def error(left_out: Float[np.ndarray, " groups"]) -> float:
    """Standard error of a distance, or of a difference of two, from its values without each group.

    Args:
        left_out: two or more values.
    """
    groups = len(left_out)
    return float(np.sqrt((groups - 1) / groups * np.square(left_out - np.mean(left_out)).sum()))


def corrected(value: float, left_out: Float[np.ndarray, " groups"]) -> float:
    """A distance less its bias of few images, which falls as one over their number (Quenouille 1956).

    It is the straight line through the distances of all images and of all but a group, at infinitely many: FID-infinity
    (arXiv:1911.07023) with two counts.

    Args:
        value: of all images.
        left_out: without each group, two or more.
    """
    groups = len(left_out)
    return float(groups * value - (groups - 1) * np.mean(left_out))
