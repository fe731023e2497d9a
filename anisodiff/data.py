"""Training images: uint8 `[N, C, H, W]` with integer labels."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor
from torch.nn import functional

from anisodiff.files import StageError


def to_unit(images: UInt8[Tensor, "..."]) -> Float[Tensor, "..."]:
    """uint8 in 0..255 to float32 in [-1, 1]."""
    return images.to(torch.float32) / 127.5 - 1


def to_uint8(x: Float[Tensor, "..."]) -> UInt8[Tensor, "..."]:
    """Float in [-1, 1] to uint8, rounded as EDM does."""
    return (x * 127.5 + 128).clip(0, 255).to(torch.uint8)


@dataclass(frozen=True)
class Images:
    """A set of images in memory.

    Attributes:
        pixels: uint8 `[N, C, H, W]`.
        labels: class of each image, `[N]`.
        classes: number of classes.
    """

    pixels: UInt8[Tensor, "n c h w"]
    labels: Int[Tensor, " n"]
    classes: int

    def __post_init__(self) -> None:
        if len(self.pixels) != len(self.labels):
            raise StageError(f"{len(self.pixels)} images with {len(self.labels)} labels: give one label an image")
        if self.pixels.shape[-1] != self.pixels.shape[-2]:
            raise StageError(f"images are {tuple(self.pixels.shape[-2:])}: crop them square first")

    def __len__(self) -> int:
        return len(self.pixels)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height, width."""
        return tuple(self.pixels.shape[1:])

    def split(self, heldout: int, seed: int = 0) -> tuple["Images", "Images"]:
        """Images to train on and `heldout` images never trained on, by a seeded permutation."""
        if not 0 <= heldout < len(self):
            raise StageError(f"heldout: {heldout} of {len(self)} images leaves none to train on: lower it")
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        pick = lambda chosen: Images(self.pixels[chosen], self.labels[chosen], self.classes)  # noqa: E731
        return pick(order[heldout:]), pick(order[:heldout])

    def one_hot(self, index: Int[Tensor, " b"]) -> Float[Tensor, "b classes"]:
        return functional.one_hot(self.labels[index], self.classes).to(torch.float32)

    def batch(
        self, size: int, generator: torch.Generator, flips: bool = False
    ) -> tuple[Float[Tensor, "b c h w"], Float[Tensor, "b classes"]]:
        """Images in [-1, 1] drawn with replacement, and their one-hot labels.

        Args:
            size: how many.
            generator: a CPU generator; the draw depends on it alone.
            flips: mirror every other image at random.
        """
        index = torch.randint(len(self), (size,), generator=generator)
        x = to_unit(self.pixels[index])
        if flips:
            mirrored = torch.rand(size, generator=generator) < 0.5
            x = torch.where(mirrored[:, None, None, None], x.flip(-1), x)
        return x, self.one_hot(index)


def digits() -> Images:
    """scikit-learn's `load_digits`: 1,797 scanned handwritten digits, 8x8, 17 grey levels, ten classes."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    pixels = torch.from_numpy(np.rint(bunch.images * (255 / 16)).astype(np.uint8))[:, None]
    return Images(pixels, torch.from_numpy(bunch.target.astype(np.int64)), 10)


BUILT_IN: dict[str, Callable[[], Images]] = {"digits": digits}


def load(source: str) -> Images:
    """The images that a dataset's `source` setting names.

    Raises:
        StageError: no such source.
    """
    if source not in BUILT_IN:
        raise StageError(f"source: {source!r} is not a dataset this version reads: use one of {', '.join(BUILT_IN)}")
    return BUILT_IN[source]()
