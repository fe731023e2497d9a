"""Metrics of sets of images beside the Frechet distance, from their features: KID, precision and recall."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from anisodiff.metrics.spread import GROUPS

NEIGHBOURS = 3


class KernelDistance(NamedTuple):
    """A kernel distance (KID).

    Attributes:
        value: mean over groups of images; 0 where the two sets are of one distribution, and below it by chance.
        error: standard error of this mean.
    """

    value: float
    error: float


def kernel_distance(features: Float[Tensor, "n d"], real: Float[Tensor, "m d"]) -> KernelDistance:
    """Squared maximum mean discrepancy with the kernel `(x y / d + 1)^3` (Binkowski et al., arXiv:1801.01401).

    Its unbiased estimate in each of ten disjoint groups of images, which are independent: their mean has an error.

    Args:
        features: those of drawn images.
        real: those of images of the data.
    """
    from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, kid_features_to_metric

    size = min(len(features), len(real)) // GROUPS
    values = []
    for group in range(GROUPS):
        rows = slice(group * size, (group + 1) * size)
        sets = features[rows].double(), real[rows].double()
        found = kid_features_to_metric(*sets, kid_subsets=1, kid_subset_size=size, verbose=False)
        values.append(found[KEY_METRIC_KID_MEAN])
    of_groups = torch.tensor(values, dtype=torch.float64)
    return KernelDistance(float(of_groups.mean()), float(of_groups.std() / GROUPS**0.5))


def is_enough(features: Float[Tensor, "n d"], real: Float[Tensor, "m d"]) -> bool:
    """Whether there are images enough for these metrics: two in each group, and neighbours for each."""
    return min(len(features), len(real)) >= max(2 * GROUPS, NEIGHBOURS + 1)


class PrecisionRecall(NamedTuple):
    """How much of one set lies in the other's support.

    Attributes:
        precision: share of the drawn images among the real ones: how good they are.
        recall: share of the real images among the drawn ones: how many kinds there are.
    """

    precision: float
    recall: float


def precision_recall(features: Float[Tensor, "n d"], real: Float[Tensor, "m d"]) -> PrecisionRecall:
    """Precision and recall with balls up to the third neighbour (Kynkaanniemi et al., arXiv:1904.06991).

    Both depend on the numbers of images: values compare at equal ones.

    Args:
        features: those of drawn images.
        real: those of images of the data.
    """
    from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric

    found = prc_features_to_metric(features, real, prc_neighborhood=NEIGHBOURS, save_cpu_ram=True, verbose=False)
    return PrecisionRecall(found[KEY_METRIC_PRECISION], found[KEY_METRIC_RECALL])
