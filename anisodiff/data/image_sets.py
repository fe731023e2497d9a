"""Images of a data set: uint8 `[N, C, H, W]` with integer labels, in a memory-mapped folder."""

import contextlib
import errno
import glob
import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor
from tqdm import tqdm

from anisodiff.errors import StageError
from anisodiff.storage.files import digest, write_text

ARRAYS = ("pixels", "labels")
ALWAYS_HASHED = 2**30  # bytes; a larger file is hashed when it is first taken up, and again when it looks changed
ABANDONED = 3600  # seconds; a writer adds images all the time, so a place that none was added to for so long has none


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
        channels, height, width = self.pixels.shape[1:]
        return channels, height, width

    def split(self, heldout: int, seed: int = 0) -> tuple["Images", "Images"]:
        """Images to train on and `heldout` images never trained on, by a seeded permutation."""
        if not 0 <= heldout < len(self):
            raise StageError(f"heldout: {heldout} of {len(self)} images leaves none to train on: lower it")
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        if self.rows is not None:
            order = self.rows[order]
        pick = lambda rows: Images(self.pixels, self.labels, self.classes, rows)  # noqa: E731
        return pick(order[heldout:]), pick(order[:heldout])

    def in_order(self) -> "Images":
        """The same images in the order of the file, which reads faster."""
        return self if self.rows is None else Images(self.pixels, self.labels, self.classes, self.rows.sort().values)

    def take(self, index: Int[Tensor, " b"]) -> tuple[UInt8[Tensor, "b c h w"], Float[Tensor, "b classes"]]:
        """Images of the set by their place in it, and their one-hot labels."""
        rows = index if self.rows is None else self.rows[index]
        return self.pixels[rows], (self.labels[rows][:, None] == torch.arange(self.classes)).to(torch.float32)

    def parts(
        self, size: int = 256, bar: str | None = None
    ) -> Iterator[tuple[UInt8[Tensor, "b c h w"], Float[Tensor, "b classes"]]]:
        """All images in order, with their one-hot labels.

        Args:
            size: images at a time.
            bar: name of the progress bar that is shown; None shows none.
        """
        with tqdm(total=len(self), desc=bar, unit="img", unit_scale=True, mininterval=5, disable=bar is None) as shown:
            for index in torch.arange(len(self)).split(size):
                yield self.take(index)
                shown.update(len(index))

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
        StageError: it is no such folder, or its arrays are not those that the stage wrote.
    """
    folder = Path(folder)
    try:
        described = json.loads(metadata_file(folder).read_text())
        for name, expected in zip(ARRAYS, described["sha256"], strict=True):
            _check(folder, name, expected)
        pixels = torch.from_numpy(np.load(folder / "pixels.npy", mmap_mode="c"))  # copy-on-write: never written to
        labels = torch.from_numpy(np.load(folder / "labels.npy"))
        return Images(pixels, labels, described["classes"])
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise StageError(f"{folder}: holds no images ({error}): run the stage `images`") from error


def _check(folder: Path, name: str, expected: str) -> None:
    """Compare an array of a folder with its hash; a large one only where it is not the file that was compared last."""
    file, stamp = folder / f"{name}.npy", folder / f".{name}.checked"
    status = file.stat()
    looks = f"{expected} {status.st_size} {status.st_mtime_ns} {status.st_ino}\n"
    large = status.st_size > ALWAYS_HASHED
    if large and stamp.is_file() and stamp.read_text() == looks:
        return
    if digest(file) != expected:
        raise StageError(f"{folder}: {name}.npy is not what the stage `images` wrote: delete it and run again")
    if large:
        with contextlib.suppress(OSError):  # a folder that cannot be written to is compared each time
            write_text(stamp, looks)


def metadata_file(folder: Path | str) -> Path:
    """The file that stands for the folder in keys and provenance: it holds the hashes of the arrays."""
    return Path(folder) / "about.json"


@contextlib.contextmanager
def writing(
    folder: Path, count: int, shape: tuple[int, int, int]
) -> Iterator[tuple[Callable[[np.ndarray], int], dict[str, Any]]]:
    """Write a folder of images: yields a function that adds the next, and a dict for `labels`, `classes` and more.

    Several processes may write one folder: each has a place of its own, and the folder is that of the last to finish.

    Args:
        folder: replaced when the block succeeds.
        count: images.
        shape: channels, height, width.

    Raises:
        OSError: the disk is full, or will be.
        StageError: the place it is made in was removed.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    for left in folder.parent.glob(f".{glob.escape(folder.name)}.*.part"):
        _remove_if_abandoned(left)
    if count * math.prod(shape) > shutil.disk_usage(folder.parent).free:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))
    place = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".part", dir=folder.parent))
    made = place / "made"
    made.mkdir()
    described: dict[str, Any] = {}
    try:
        with (made / "pixels.npy").open("wb") as file:
            header = {"descr": "|u1", "fortran_order": False, "shape": (count, *shape)}
            np.lib.format.write_array_header_1_0(file, header)
            # written, not mapped: a write to a full disk is an error, a store to a mapped page the end of the process
            yield lambda image: file.write(np.asarray(image, dtype=np.uint8).tobytes()), described
            file.flush()
            os.fsync(file.fileno())
        if not made.is_dir():
            raise StageError(f"{folder}: the place it was made in is gone: run again, and in one process at a time")
        np.save(made / "labels.npy", np.asarray(described.pop("labels"), dtype=np.int64))
        described |= {"images": count, "shape": shape, "sha256": [digest(made / f"{each}.npy") for each in ARRAYS]}
        metadata_file(made).write_text(json.dumps(described, indent=1) + "\n")
        _put(made, folder, place / "old")
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _remove_if_abandoned(place: Path) -> None:
    """Remove what a killed writer left; one that lives, but stood still for so long, fails."""
    with contextlib.suppress(OSError):
        changed = max(each.stat().st_mtime for each in (place, *place.rglob("*")))
        if time.time() - changed > ABANDONED:
            shutil.rmtree(place, ignore_errors=True)


def _put(made: Path, folder: Path, old: Path) -> None:
    """Move a folder to where another may be, and that one to `old`."""
    while True:
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(old, ignore_errors=True)
            folder.rename(old)
        try:
            made.rename(folder)
            return
        except OSError as error:  # another process put its own there in between
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
