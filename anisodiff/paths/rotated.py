"""Orthonormal bases that can be learned: `U = exp(A) U_0`, A antisymmetric (arXiv:2206.10365, A.4 and B.2).

A basis starts at U_0. Its parameters `turn` are the upper triangle of A: to first order rotations, in radians, in the
planes of two vectors each; 0 at the start. Rows of U are basis vectors; coefficients are `z = U x`.
"""

import copy
import math
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import one_hot

from anisodiff.errors import InvalidArgument
from anisodiff.paths.subspaces import dct_matrix

LARGEST_DENSE = 1024  # dimensions: an exponential of a matrix of 3072 x 3072 is about 1 TFLOP
T = TypeVar("T", bound="RotatedBasis")
STARTS = ("dct", "identity")  # bases that a dense basis can start from by name


def bands(size: int, channels: int, count: int) -> Int[Tensor, "c h h"]:
    """The subspace of each DCT mode of every channel, in bands of near-equal rank by distance from the constant mode.

    They are those of `partition(size, "radial:J")` where that has J bands; otherwise modes of one distance are parted
    in the order of their rows, and beyond H * H also the channels.

    Args:
        size: image side H.
        channels: of the images.
        count: number of subspaces J, at most `channels * H * H`.

    Raises:
        InvalidArgument: more than there are modes, or none.
    """
    modes = size**2
    if not 1 <= count <= channels * modes:
        raise InvalidArgument(f"subspaces: {count} of {channels * modes} modes: use 1 to {channels * modes}")
    p = torch.arange(size)
    radius = (p[:, None] ** 2 + p[None, :] ** 2).flatten()
    index = count * (radius[:, None] > radius[None, :]).sum(1) // modes  # as many modes are of lower frequency
    if len(index.unique()) < count:
        copies = channels if count > modes else 1
        order = radius.repeat_interleave(copies).argsort(stable=True)
        index = torch.empty_like(order).scatter(0, order, count * torch.arange(len(order)) // len(order))
        if copies > 1:
            return index.reshape(size, size, channels).permute(2, 0, 1).contiguous()
    return index.reshape(size, size).expand(channels, -1, -1).contiguous()


def _rotation(turn: Float[Tensor, " n"], size: int) -> Float[Tensor, "d d"]:
    """`exp(A)`, the upper triangle of A given row by row."""
    row, column = torch.triu_indices(size, size, 1, device=turn.device)
    upper = turn.new_zeros(size, size).index_put((row, column), turn)
    return torch.linalg.matrix_exp(upper - upper.T)


class RotatedBasis(nn.Module):
    """What bases that can be learned have in common: a partition of their vectors, and angles.

    Args:
        index: subspace of each vector, `[C, H, H]`, numbered from 0.
        angles: how many angles there are.
        turn: the angles, `[n]`; None is U_0 itself.

    Raises:
        InvalidArgument: the index leaves a subspace out, or `turn` has another length.
    """

    classes = 0  # that have a basis each
    count: int
    index: Tensor
    start = "dct"  # name of U_0; "data" where its vectors are given

    def __init__(self, index: Int[Tensor, "c h h"], angles: int, turn: Float[Tensor, " n"] | None):
        super().__init__()
        self.count = int(index.max()) + 1
        if index.unique().tolist() != list(range(self.count)):
            raise InvalidArgument("subspaces: the index leaves out a number: number subspaces from 0")
        turn = torch.zeros(angles) if turn is None else turn
        if len(turn) != angles:
            raise InvalidArgument(f"turn: {len(turn)} angles, this basis has {angles}")
        self.register_buffer("index", index)
        self.turn = nn.Parameter(turn.detach().to(torch.float64).clone())
        self._formed: list[Tensor] | None = None  # matrices of what `formed` returns
        self._latest: tuple[Any, Any] | None = None  # what `detached` returned last, and for which angles

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_latest": None}  # copies keep no matrices of earlier angles

    @property
    def kind(self) -> str:
        """Name of the basis and number of its subspaces, as `rotated_basis` takes it."""
        return f"{'separable' if isinstance(self, SeparableBasis) else 'dense'}:{self.count}"

    @property
    def channels(self) -> int:
        """Number of channels of the images."""
        return len(self.index)

    @property
    def size(self) -> int:
        """Side of the images."""
        return self.index.shape[-1]

    @property
    def ranks(self) -> Float[Tensor, " j"]:
        """Vectors in each subspace."""
        return torch.bincount(self.index.flatten(), minlength=self.count).to(torch.float64)

    @property
    def learnable(self) -> bool:
        """Whether the angles are trained."""
        return self.turn.requires_grad and (self._formed is None or any(each.requires_grad for each in self._formed))

    def start_matrices(self) -> list[Tensor]:
        """Factors of U_0, float64."""
        raise NotImplementedError

    def from_pixels(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Coefficients of pixels."""
        raise NotImplementedError

    def to_pixels(self, z: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Pixels of coefficients."""
        raise NotImplementedError

    def matrices(self) -> list[Tensor]:
        """Factors of U at the present angles, float64, with the gradient of `turn`."""
        raise NotImplementedError

    def formed(self: T) -> T:
        """The basis at its present angles, its matrices formed once; the gradient of `turn` passes through it."""
        chosen = copy.copy(self)
        chosen._formed = self.matrices()
        return chosen

    def detached(self: T) -> T:
        """The basis at its present angles, without a gradient; formed anew only when they have changed."""
        now = (self.turn._version, self.turn.data_ptr(), self.turn.device, self.turn.dtype)
        if self._latest is None or self._latest[0] != now:
            with torch.no_grad():
                self._latest = now, self.formed()
        return self._latest[1]

    def in_use(self) -> list[Tensor]:
        """The matrices to multiply with: kept ones, or new ones with a gradient where one is asked for."""
        if self._formed is not None:
            return self._formed
        return self.matrices() if torch.is_grad_enabled() and self.turn.requires_grad else self.detached().in_use()

    def turns_from(self, other: Any) -> bool:
        """Whether another basis is of this kind: it starts at the same vectors, in the same subspaces."""
        return (
            type(self) is type(other)
            and torch.equal(self.index, other.index)
            and all(map(torch.equal, self.start_matrices(), other.start_matrices()))
        )

    def for_classes(self: T, index: Int[Tensor, " b"]) -> T:
        """Return the same: all classes share a basis."""
        return self

    def scale(self, z: Float[Tensor, "b c h w"], values: Float[Tensor, "#b j"]) -> Float[Tensor, "b c h w"]:
        """Multiply every coefficient by the value of its subspace: `F(M_t) z` for `values = F(g)`."""
        return z * values.to(z.dtype)[:, self.index]

    def inner(self, a: Float[Tensor, "b c h w"], b: Float[Tensor, "b c h w"]) -> Float[Tensor, "b j"]:
        """Inner product in each subspace."""
        # a product: to add up by index comes out otherwise each time on a GPU
        return (a * b).flatten(1) @ one_hot(self.index.flatten(), self.count).to(a.dtype)


class SeparableBasis(RotatedBasis):
    """Rotations of channels, rows and columns apart, over the DCT: `U = exp(A_c) x exp(A_h) DCT x exp(A_w) DCT`.

    `C(C-1)/2 + H(H-1)` angles, in this order; three small products an image. Without a turn this is `Subspaces`.

    Args:
        index: subspace of each vector, `[C, H, H]`.
        turn: the angles; None is the DCT.

    Raises:
        InvalidArgument: the index leaves a subspace out, or `turn` has another length.
    """

    dct_modes: Tensor

    def __init__(self, index: Int[Tensor, "c h h"], turn: Float[Tensor, " n"] | None = None):
        angles = [math.comb(each, 2) for each in index.shape]
        super().__init__(index, sum(angles), turn)
        self.angles = angles
        self.register_buffer("dct_modes", dct_matrix(self.size), persistent=False)

    def start_matrices(self) -> list[Tensor]:
        channels = torch.eye(self.channels, dtype=torch.float64, device=self.index.device)
        return [channels, self.dct_modes, self.dct_modes]

    def matrices(self) -> list[Tensor]:
        turns = self.turn.split(self.angles)
        return [_rotation(turn, len(start)) @ start for turn, start in zip(turns, self.start_matrices(), strict=True)]

    def from_pixels(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Coefficients of pixels."""
        channels, rows, columns = (each.to(x.dtype) for each in self.in_use())
        return _mix(channels, rows @ x @ columns.T)

    def to_pixels(self, z: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Pixels of coefficients."""
        channels, rows, columns = (each.to(z.dtype) for each in self.in_use())
        return rows.T @ _mix(channels.T, z) @ columns


def _mix(matrix: Float[Tensor, "c c"], x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
    """A product over channels."""
    return x if len(matrix) == 1 else (matrix @ x.flatten(2)).reshape(x.shape)


class DenseBasis(RotatedBasis):
    """One rotation of all D = C * H * H pixels together, `U = exp(A) U_0`: the flexible process's own basis.

    D(D-1)/2 angles.

    Args:
        index: subspace of each vector, `[C, H, H]`: the vectors are U_0's rows, in this order.
        start: U_0: "identity", "dct" (modes of each channel), or its rows, orthonormal, `[D, D]`.
        turn: the angles; None is U_0.

    Raises:
        InvalidArgument: D is too large, the start is unknown or not orthonormal, the index leaves a subspace out, or
            `turn` has another length.
    """

    vectors: Tensor

    def __init__(
        self, index: Int[Tensor, "c h h"], start: str | Float[Tensor, "d d"] = "dct", turn: Tensor | None = None
    ):
        dimensions, (channels, size, _) = index.numel(), index.shape
        if dimensions > LARGEST_DENSE:
            raise InvalidArgument(
                f"basis: {dimensions} dimensions, a dense one takes {LARGEST_DENSE} at most: use separable:J"
            )
        super().__init__(index, math.comb(dimensions, 2), turn)
        self.start = start if isinstance(start, str) else "data"
        if isinstance(start, str):
            if start not in STARTS:
                raise InvalidArgument(f"basis: a start {start!r} is unknown: use {' or '.join(STARTS)}, or its vectors")
            modes = dct_matrix(size) if start == "dct" else torch.eye(size, dtype=torch.float64)
            start = torch.kron(torch.eye(channels, dtype=torch.float64), torch.kron(modes, modes))
        start = start.to(torch.float64)
        if start.shape != (dimensions, dimensions):
            raise InvalidArgument(f"basis: a start of {list(start.shape)} for {dimensions} dimensions")
        if not torch.allclose(start @ start.T, torch.eye(dimensions).to(start), atol=1e-9):
            raise InvalidArgument("basis: the vectors of its start are not orthonormal")
        self.register_buffer("vectors", start, persistent=self.start == "data")

    def start_matrices(self) -> list[Tensor]:
        return [self.vectors]

    def matrices(self) -> list[Tensor]:
        return [_rotation(self.turn, len(self.vectors)) @ self.vectors]

    def from_pixels(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Coefficients of pixels."""
        (basis,) = self.in_use()
        return (x.flatten(1) @ basis.to(x.dtype).T).reshape(x.shape)

    def to_pixels(self, z: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Pixels of coefficients."""
        (basis,) = self.in_use()
        return (z.flatten(1) @ basis.to(z.dtype)).reshape(z.shape)


def random_vectors(dimensions: int, seed: int) -> Float[Tensor, "d d"]:
    """Rows of a uniformly random rotation or reflection, float64: QR of a normal matrix, signs by R's diagonal."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(dimensions, dimensions, generator=generator, dtype=torch.float64)
    q, r = torch.linalg.qr(normal)
    return (q * r.diagonal().sign()).T


def principal_vectors(images: Float[Tensor, "n c h w"]) -> Float[Tensor, "d d"]:
    """All principal directions of images as rows, float64, that of the largest variance first."""
    flat = images.to(torch.float64).flatten(1)
    centred = flat - flat.mean(0)
    return torch.linalg.eigh(centred.T @ centred)[1].flip(1).T.contiguous()


def rotated_basis(
    kind: str, shape: Sequence[int], start: str | Float[Tensor, "d d"] = "dct"
) -> SeparableBasis | DenseBasis:
    """A basis that can be learned, by its name, at its start.

    Args:
        kind: "separable:J" or "dense:J", with J subspaces.
        shape: channels, height and width of the images.
        start: of a dense basis: "dct" or "identity", or the vectors. The DCT's modes are shared out by `bands`, other
            vectors in their order, as many to each subspace.

    Raises:
        InvalidArgument: another kind, images that are not square, too many subspaces, or a start that is none.
    """
    channels, size, width = shape
    name, _, number = kind.partition(":")
    if name not in ("separable", "dense") or not number.isdigit() or size != width:
        raise InvalidArgument(f"subspaces: {kind!r} of {size}x{width}: use separable:J or dense:J, on square images")
    if name == "separable" and start != "dct":
        raise InvalidArgument("basis: a separable one starts at the DCT: use dense:J for another start")
    index, count = bands(size, channels, int(number)), int(number)
    if name == "separable":
        return SeparableBasis(index)
    if isinstance(start, Tensor) or start != "dct":
        index = (count * torch.arange(index.numel()) // index.numel()).reshape(index.shape)
    return DenseBasis(index, start)
