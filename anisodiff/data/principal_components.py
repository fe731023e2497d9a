"""Principal subspaces of a set of images: for all of them, per class, or per cluster of classes."""

from collections.abc import Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor

from anisodiff.data.image_sets import Images
from anisodiff.errors import StageError
from anisodiff.paths.principal import PcaSubspaces, cluster


def _channel_means(images: Images, index: Int[Tensor, " n"]) -> Iterator[Float[Tensor, "b p"]]:
    """Channel-mean images in float64 and from 0 to 2, a few at a time."""
    for part in index.split(1024):
        yield (images.take(part)[0].to(torch.float64) / 127.5).mean(1).flatten(1)


def components(images: Images, index: Int[Tensor, " n"], rank: int) -> Float[Tensor, "r p"]:
    """Leading principal components of some images' channel means, from a streamed covariance, float64.

    Sums are of differences from the first images' mean: those of the images themselves lose digits where it is large.
    Fewer images than pixels are decomposed through their Gram matrix instead, which is smaller.

    Args:
        images: the training set.
        index: places of the images in it.
        rank: how many components.

    Raises:
        StageError: there are not more images than components.
    """
    pixels = images.shape[1] * images.shape[2]
    if not 0 < rank < min(len(index), pixels):
        raise StageError(f"basis: {len(index)} images of {pixels} pixels have no {rank} components: lower the rank")
    if len(index) < pixels:
        x = torch.cat(list(_channel_means(images, index)))
        x -= x.mean(0)
        _, left = torch.linalg.eigh(x @ x.T)
        found = torch.linalg.qr(x.T @ left[:, -rank:].flip(1))[0].T
    else:
        total, outer = torch.zeros(pixels, dtype=torch.float64), torch.zeros(pixels, pixels, dtype=torch.float64)
        centre = next(_channel_means(images, index)).mean(0)
        for x in _channel_means(images, index):
            x -= centre
            total += x.sum(0)
            outer += x.T @ x
        covariance = (outer - torch.outer(total, total) / len(index)) / (len(index) - 1)
        found = torch.linalg.eigh(covariance)[1][:, -rank:].flip(1).T
    largest = found.gather(1, found.abs().argmax(1, keepdim=True))
    return found * largest.sign()  # eigenvectors have no sign of their own


def principal_subspaces(images: Images, rank: int, per: str, clusters: int = 1) -> PcaSubspaces:
    """Principal subspaces of a training set.

    Args:
        images: the training set.
        rank: dimension of the first subspace, a channel.
        per: "all" images one basis, one a "class", or one a "cluster" of classes with similar subspaces.
        clusters: how many, for "cluster".

    Raises:
        StageError: images without labels have no bases per class.
    """
    if per == "all":
        return PcaSubspaces(
            components(images, torch.arange(len(images)), rank)[None], torch.zeros(1, dtype=torch.int64)
        )
    if not images.classes:
        raise StageError(f"basis: one per {per} needs labels, the images have none: take one for all")
    labels = images.labels if images.rows is None else images.labels[images.rows]
    members = [(labels == label).nonzero()[:, 0] for label in range(images.classes)]
    which = torch.arange(images.classes)
    if per == "cluster":
        if not 0 < clusters <= images.classes:
            raise StageError(f"basis: {clusters} clusters of {images.classes} classes: use at most one a class")
        which = cluster(torch.stack([components(images, each, rank) for each in members]), clusters)
        groups = [
            torch.cat([members[label] for label in (which == each).nonzero()[:, 0].tolist()]) for each in which.unique()
        ]
    else:
        groups = members
    return PcaSubspaces(torch.stack([components(images, group, rank) for group in groups]).float(), which)
