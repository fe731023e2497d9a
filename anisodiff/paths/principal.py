"""Principal subspaces: the span of r orthonormal images and its complement, for all images, per class or clustered.

States stay pixels here: `F(M) z = F(g_2) z + (F(g_1) - F(g_2)) V^T V z`, so a basis of low rank is all that is stored.
A basis is of the channel-mean image and acts on every colour channel alike.
"""

import copy
import math
from collections.abc import Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor

from anisodiff.errors import InvalidArgument
from anisodiff.paths.subspaces import FixedBasis


class PcaSubspaces(FixedBasis):
    """Two subspaces of pixel space: the span of principal components (first), and the rest.

    Args:
        vectors: orthonormal rows of each basis, `[M, r, H * W]`.
        which: the basis of each class, `[classes]`; one entry if all images share a basis.

    Raises:
        InvalidArgument: the rows are not orthonormal.
    """

    count = 2
    vectors: Tensor
    which: Tensor

    def __init__(self, vectors: Float[Tensor, "m r p"], which: Int[Tensor, " k"]):
        super().__init__()
        identity = torch.eye(vectors.shape[1], dtype=vectors.dtype)
        if not all(torch.allclose(each @ each.T, identity, atol=1e-4) for each in vectors):
            raise InvalidArgument("basis: its vectors are not orthonormal")
        self.register_buffer("vectors", vectors)
        self.register_buffer("which", which)
        self._rows: Tensor | None = None  # basis of each image of a batch, see `for_classes`

    @property
    def classes(self) -> int:
        """Number of classes with a basis of their own; 0 if all share one."""
        return len(self.which) if len(self.which) > 1 else 0

    @property
    def size(self) -> int:
        """Side of the images."""
        return math.isqrt(self.vectors.shape[-1])

    @property
    def ranks(self) -> Float[Tensor, " j"]:
        """Dimensions of each subspace, a channel."""
        rank, pixels = self.vectors.shape[1:]
        return torch.tensor([rank, pixels - rank], dtype=torch.float64)

    def for_classes(self, index: Int[Tensor, " b"]) -> "PcaSubspaces":
        """Take each image's basis, by its class."""
        if not self.classes:
            return self
        chosen = copy.copy(self)
        object.__setattr__(chosen, "_rows", self.which[index])
        return chosen

    def _components(self, z: Tensor) -> Iterator[tuple[Tensor | slice, Tensor, Tensor]]:
        """For each basis in use: the images that have it, the basis, and their components `[b, C, r]`."""
        flat = z.flatten(2)
        if self.classes and self._rows is None:
            raise InvalidArgument("path: it has one basis a class, and there are no labels")
        if self._rows is None:
            vectors = self.vectors[0].to(z.dtype)
            yield slice(None), vectors, flat @ vectors.T
            return
        for basis in self._rows.unique().tolist():
            rows, vectors = (self._rows == basis).nonzero()[:, 0], self.vectors[basis].to(z.dtype)
            yield rows, vectors, flat[rows] @ vectors.T

    def from_pixels(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        return x

    def to_pixels(self, z: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        return z

    def scale(self, z: Float[Tensor, "b c h w"], values: Float[Tensor, "#b j"]) -> Float[Tensor, "b c h w"]:
        """`F(M) z` for `values = F(g)`."""
        values = values.to(z.dtype).expand(len(z), -1)
        first = torch.zeros_like(z).flatten(2)
        for rows, vectors, components in self._components(z):
            first = first.index_copy(0, _index(rows, z), components @ vectors)
        gap = (values[:, 0] - values[:, 1])[:, None, None, None]
        return values[:, 1, None, None, None] * z + gap * first.reshape(z.shape)

    def inner(self, a: Float[Tensor, "b c h w"], b: Float[Tensor, "b c h w"]) -> Float[Tensor, "b j"]:
        """Inner product in each subspace."""
        whole = (a * b).flatten(1).sum(1)
        first = torch.zeros_like(whole)
        for (rows, _, of_a), (_, _, of_b) in zip(self._components(a), self._components(b), strict=True):
            first = first.index_copy(0, _index(rows, a), (of_a * of_b).flatten(1).sum(1))
        return torch.stack([first, whole - first], dim=1)


def _index(rows: Tensor | slice, z: Tensor) -> Tensor:
    return torch.arange(len(z), device=z.device) if isinstance(rows, slice) else rows


def cluster(bases: Float[Tensor, "k r p"], clusters: int, seed: int = 0, rounds: int = 50) -> Int[Tensor, " k"]:
    """Assign subspaces to clusters: Lloyd's rounds in the chordal distance `r - ||V U^T||^2` to a mean subspace.

    Args:
        bases: orthonormal rows of each subspace.
        clusters: how many.
        seed: of the first means, drawn as k-means++ draws them.
        rounds: at most so many.
    """
    count, rank, _ = bases.shape
    generator = torch.Generator().manual_seed(seed)

    def overlap(means: Tensor) -> Tensor:
        """`||V U^T||^2` of every subspace with every mean, `[K, clusters]`."""
        products = bases.flatten(0, 1) @ means.flatten(0, 1).T
        return products.square().reshape(count, rank, len(means), rank).sum((1, 3))

    means = bases[torch.randint(count, (1,), generator=generator)]
    while len(means) < clusters:
        far = (rank - overlap(means)).min(1).values.clamp(min=1e-12)
        means = torch.cat([means, bases[torch.multinomial(far, 1, generator=generator)]])
    assigned = torch.full((count,), -1)
    for _ in range(rounds):
        nearest = overlap(means).argmax(1)
        if torch.equal(nearest, assigned):
            break
        assigned = nearest
        for index in assigned.unique().tolist():
            stacked = bases[assigned == index].flatten(0, 1)
            means[index] = torch.linalg.svd(stacked, full_matrices=False)[2][:rank]
    return assigned.unique(return_inverse=True)[1]
