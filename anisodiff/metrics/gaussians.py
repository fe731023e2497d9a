"""Gaussians fitted to images, for the denoisers in closed form."""

import torch
from jaxtyping import Float
from torch import Tensor

from anisodiff.data.image_sets import Images
from anisodiff.metrics.frechet import FeatureStatistics
from anisodiff.pixels import to_unit

CHUNK = 4096  # images at a time in double precision


def fit_gaussians(
    images: Images, rank: int, per_class: bool = False
) -> tuple[Float[Tensor, "k c h w"], Float[Tensor, "k r c h w"], Float[Tensor, " k"]]:
    """Means, factors and shares for `GaussianDenoiser`, float64: one Gaussian for all images, or one a class.

    Args:
        images: the data.
        rank: principal directions that are kept, at most.
        per_class: one a class, in the order of the classes.
    """
    shape = images.shape
    count = images.classes if per_class else 1
    statistics = [FeatureStatistics(shape[0] * shape[1] * shape[2]) for _ in range(count)]
    for pixels, labels in images.parts(CHUNK, "Gaussians"):
        flat = to_unit(pixels).flatten(1)
        for k, each in enumerate(statistics):
            each.add(flat[labels[:, k] > 0] if per_class else flat)
    gaussians = [each.gaussian for each in statistics]
    kept = min(rank, *(each.count - 1 for each in statistics), len(gaussians[0].mean))
    factors = []
    for gaussian in gaussians:
        values, vectors = torch.linalg.eigh(gaussian.covariance)
        largest = slice(len(values) - kept, None)
        factors.append((vectors[:, largest] * values[largest].clamp(min=0).sqrt()).T.flip(0))
    means = torch.stack([gaussian.mean for gaussian in gaussians])
    counts = torch.tensor([each.count for each in statistics], dtype=torch.float64)
    return means.reshape(-1, *shape), torch.stack(factors).reshape(count, kept, *shape), counts / counts.sum()
