"""Orthonormal bases of image space and their partition into subspaces (paper, Section 2.2 and Appendix A)."""

import math
from collections.abc import Sequence
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from anisodiff.errors import InvalidArgument

T = TypeVar("T")


@runtime_checkable
class Basis(Protocol):
    """An orthonormal basis of image space, its vectors shared out to subspaces: what paths are made of."""

    @property
    def count(self) -> int:
        """Number of subspaces J."""
        ...

    @property
    def channels(self) -> int | None:
        """Number of channels of the images; None where it serves any number."""
        ...

    @property
    def size(self) -> int:
        """Side of the images."""
        ...

    @property
    def ranks(self) -> Float[Tensor, " j"]:
        """Dimensions of each subspace, or what is proportional to them."""
        ...

    @property
    def classes(self) -> int:
        """Number of classes with a basis of their own; 0 if all share one."""
        ...

    @property
    def learnable(self) -> bool:
        """Whether it has parameters that are trained."""
        ...

    def for_classes(self, index: Int[Tensor, " b"]) -> "Basis":
        """Take each image's basis, by its class."""
        ...

    def formed(self) -> "Basis":
        """The basis at its present parameters, formed once; their gradient passes through it."""
        ...

    def detached(self) -> "Basis":
        """The basis at its present parameters, without a gradient."""
        ...

    def from_pixels(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Coefficients of pixels."""
        ...

    def to_pixels(self, z: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Pixels of coefficients."""
        ...

    def scale(self, z: Float[Tensor, "b c h w"], values: Float[Tensor, "#b j"]) -> Float[Tensor, "b c h w"]:
        """`F(M) z` for `values = F(g)`."""
        ...

    def inner(self, a: Float[Tensor, "b c h w"], b: Float[Tensor, "b c h w"]) -> Float[Tensor, "b j"]:
        """Inner product in each subspace."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What a file keeps of it."""
        ...


class FixedBasis(nn.Module):
    """A basis without parameters."""

    learnable = False
    channels = None

    def formed(self: T) -> T:
        """Return the same."""
        return self

    def detached(self: T) -> T:
        """Return the same."""
        return self


def dct_matrix(size: int) -> Float[Tensor, "h h"]:
    """Orthonormal DCT-II in float64: row p is the one-dimensional mode of frequency p (paper, Appendix A)."""
    n = torch.arange(size, dtype=torch.float64)
    modes = torch.cos((2 * n[None, :] + 1) * n[:, None] * math.pi / (2 * size)) * math.sqrt(2 / size)
    modes[0] /= math.sqrt(2)
    return modes


def partition(size: int, kind: str | Sequence[Sequence[int]]) -> Int[Tensor, "h h"]:
    """The subspace that each DCT mode (p, q) belongs to, from 0 (lowest frequencies) to J - 1.

    Args:
        size: image side H.
        kind: "whole" (J = 1); "block" (the paper's J = 2: both frequencies below H/2, and the rest); "radial:J" (bands
            of near-equal rank by distance from the constant mode); or the table itself, H rows of H integers.

    Raises:
        InvalidArgument: an unknown kind, or a table that does not cover the basis.
    """
    p = torch.arange(size)
    if kind == "whole":
        return torch.zeros(size, size, dtype=torch.int64)
    if kind == "block":
        low = p < size / 2
        return (~(low[:, None] & low[None, :])).to(torch.int64)
    if isinstance(kind, str) and kind.startswith("radial:") and kind[7:].isdigit():
        count = int(kind[7:])
        radius = p[:, None] ** 2 + p[None, :] ** 2
        below = (radius.flatten()[:, None] > radius.flatten()[None, :]).sum(1)  # modes of lower frequency
        return _covering((count * below // size**2).reshape(size, size), count, kind)
    if isinstance(kind, str):
        raise InvalidArgument(
            f"subspaces: {kind!r} is unknown: use whole, block, radial:J, or a table of {size}x{size}"
        )
    rows = [len(row) for row in kind]
    if rows != [size] * size:
        raise InvalidArgument(f"subspaces: the table's rows have lengths {rows}: give {size} rows of {size} integers")
    table = torch.tensor(kind, dtype=torch.int64)
    return _covering(table, int(table.max()) + 1, "the table")


def _covering(index: Tensor, count: int, name: str) -> Tensor:
    if (index < 0).any():
        p, q = (index < 0).nonzero()[0].tolist()
        raise InvalidArgument(f"subspaces: {name} leaves mode ({p}, {q}) in no subspace: number every mode from 0")
    empty = sorted(set(range(count)) - set(index.unique().tolist()))
    if empty or count < 1:
        raise InvalidArgument(f"subspaces: {name} has no mode in subspace {empty}: use fewer subspaces")
    return index


class Subspaces(FixedBasis):
    """A partition of the two-dimensional DCT basis, the same on every colour channel.

    Functions of the covariance are diagonal here: `scale` multiplies each coefficient by its subspace's value. With
    one subspace every orthonormal basis serves, and coefficients are pixels.

    Args:
        index: subspace of each mode, `[H, H]`, from `partition`.
    """

    classes = 0  # with a basis of their own
    index: Tensor
    dct_modes: Tensor
    members: Tensor

    def __init__(self, index: Int[Tensor, "h h"]):
        super().__init__()
        self.register_buffer("index", index)
        self.count = int(index.max()) + 1
        self.register_buffer("dct_modes", dct_matrix(len(index)), persistent=False)
        one_hot = nn.functional.one_hot(index.flatten(), self.count).to(torch.float64)
        self.register_buffer("members", one_hot, persistent=False)

    @property
    def size(self) -> int:
        """Side of the images."""
        return len(self.index)

    @property
    def ranks(self) -> Float[Tensor, " j"]:
        """Modes in each subspace."""
        return self.members.sum(0)

    def dct(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """DCT coefficients of pixels: two H x H products a channel."""
        modes = self.dct_modes.to(x.dtype)
        return modes @ x @ modes.T

    def from_pixels(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Coefficients of pixels."""
        return x if self.count == 1 else self.dct(x)

    def to_pixels(self, z: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Pixels of coefficients."""
        if self.count == 1:
            return z
        modes = self.dct_modes.to(z.dtype)
        return modes.T @ z @ modes

    def scale(self, z: Float[Tensor, "b c h w"], values: Float[Tensor, "#b j"]) -> Float[Tensor, "b c h w"]:
        """Multiply every coefficient by the value of its subspace: `F(M_t) z` for `values = F(g)`."""
        values = values.to(z.dtype)
        mask = values[:, :, None, None] if self.count == 1 else values[:, None, self.index]
        return z * mask

    def inner(self, a: Float[Tensor, "b c h w"], b: Float[Tensor, "b c h w"]) -> Float[Tensor, "b j"]:
        """Inner product in each subspace."""
        return (a * b).sum(1).flatten(1) @ self.members.to(a.dtype)

    def for_classes(self, index: Int[Tensor, " b"]) -> "Subspaces":
        """Return the same: all classes share a basis."""
        return self
