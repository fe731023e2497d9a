"""Images of a data set: uint8 `[N, C, H, W]` with integer labels, in a memory-mapped folder."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from anisodiff.files import StageError, digest

ARRAYS = ("pixels", "labels")


def to_unit(images: UInt8[Tensor, "..."]) -> Float[Tensor, "..."]:
    """uint8 in 0..255 to float32 in [-1, 1]."""
    return images.to(torch.float32) / 127.5 - 1


def to_uint8(x: Float[Tensor, "..."]) -> UInt8[Tensor, "..."]:
    """Float in [-1, 1] to uint8, rounded as EDM does."""
    return (x * 127.5 + 128).clip(0, 255).to(torch.uint8)


@dataclass(frozen=True)
class Images:
    """A set of images, in memory or mapped from a file.

    Attributes:
        pixels: uint8 `[N, C, H, W]`.
        labels: class of each image, `[N]`.
        classes: number of classes; 0 where there are no labels.
        rows: which of the N belong to the set; None is all of them.
    """

    pixels: UInt8[Tensor, "n c h w"]
    labels: Int[Tensor, " n"]
    classes: int
    rows: Int[Tensor, " m"] | None = None

    def __post_init__(self) -> None:
        if len(self.pixels) != len(self.labels):
            raise StageError(f"{len(self.pixels)} images with {len(self.labels)} labels: give one label an image")
        if self.pixels.shape[-1] != self.pixels.shape[-2]:
            raise StageError(f"images are {tuple(self.pixels.shape[-2:])}: crop them square first")

    def __len__(self) -> int:
        return len(self.pixels) if self.rows is None else len(self.rows)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height, width."""
        return tuple(self.pixels.shape[1:])

    def split(self, heldout: int, seed: int = 0) -> tuple["Images", "Images"]:
        """Images to train on and `heldout` images never trained on, by a seeded permutation."""
        if not 0 <= heldout < len(self):
            raise StageError(f"heldout: {heldout} of {len(self)} images leaves none to train on: lower it")
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        if self.rows is not None:
            order = self.rows[order]
        pick = lambda rows: Images(self.pixels, self.labels, self.classes, rows)  # noqa: E731
        return pick(order[heldout:]), pick(order[:heldout])

    def take(self, index: Int[Tensor, " b"]) -> tuple[UInt8[Tensor, "b c h w"], Float[Tensor, "b classes"]]:
        """Images of the set by their place in it, and their one-hot labels."""
        rows = index if self.rows is None else self.rows[index]
        return self.pixels[rows], (self.labels[rows][:, None] == torch.arange(self.classes)).to(torch.float32)

    def parts(self, size: int = 256) -> Iterator[tuple[UInt8[Tensor, "b c h w"], Float[Tensor, "b classes"]]]:
        """All images in order, `size` at a time, with their one-hot labels."""
        for index in torch.arange(len(self)).split(size):
            yield self.take(index)

    def batch(
        self, size: int, generator: torch.Generator, flips: bool = False
    ) -> tuple[UInt8[Tensor, "b c h w"], Float[Tensor, "b classes"]]:
        """Images drawn with replacement, and their one-hot labels.

        Args:
            size: how many.
            generator: a CPU generator; the draw depends on it alone.
            flips: mirror every other image at random.
        """
        images, labels = self.take(torch.randint(len(self), (size,), generator=generator))
        if flips:
            mirrored = torch.rand(size, generator=generator) < 0.5
            images = torch.where(mirrored[:, None, None, None], images.flip(-1), images)
        return images, labels


def load(folder: Path | str) -> Images:
    """The images of a folder made by the stage `images`, mapped from the file.

    Raises:
        StageError: it is no such folder.
    """
    folder = Path(folder)
    try:
        described = json.loads(about(folder).read_text())
        pixels = torch.from_numpy(np.load(folder / "pixels.npy", mmap_mode="c"))  # copy-on-write: never written to
        labels = torch.from_numpy(np.load(folder / "labels.npy"))
    except (OSError, ValueError) as error:
        raise StageError(f"{folder}: holds no images ({error}): run the stage `images`") from error
    return Images(pixels, labels, described["classes"])


def about(folder: Path | str) -> Path:
    """The file that stands for the folder in keys and provenance: it holds the hashes of the arrays."""
    return Path(folder) / "about.json"


@contextmanager
def writing(folder: Path, count: int, shape: tuple[int, int, int]) -> Iterator[tuple[np.ndarray, dict[str, Any]]]:
    """Write a folder of images in one move: yields the pixels to fill, and a dict for `labels`, `classes` and more.

    Args:
        folder: replaced when the block succeeds.
        count: images.
        shape: channels, height, width.
    """
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        mapped = np.lib.format.open_memmap(part / "pixels.npy", "w+", np.uint8, (count, *shape))
        described: dict[str, Any] = {}
        yield mapped, described
        mapped.flush()
        del mapped
        np.save(part / "labels.npy", np.asarray(described.pop("labels"), dtype=np.int64))
        described |= {"images": count, "shape": shape, "sha256": [digest(part / f"{each}.npy") for each in ARRAYS]}
        about(part).write_text(json.dumps(described, indent=1) + "\n")
        shutil.rmtree(folder, ignore_errors=True)
        part.replace(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
