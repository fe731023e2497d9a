"""Where images come from: EDM's dataset zips, folders and zips of images, CIFAR archives, and a built-in set.

A source is read in the order of its sorted names, as EDM's dataset tool reads it, with that tool's labels
(`dataset.json`, or else a folder's top folders) and its rules for cropping and resizing (arXiv:2206.00364).
"""

import contextlib
import io
import itertools
import json
import multiprocessing
import os
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from anisodiff.files import StageError, atomic

Transform = Literal["none", "center-crop"]
EXTENSIONS = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm", ".tif", ".tiff")


@dataclass(frozen=True)
class Source:
    """Images that can be read one by one.

    Attributes:
        names: of the images, in order.
        labels: class of each, or None.
        read: the image of a name as uint8, `[H, W]` or `[H, W, C]`.
    """

    names: Sequence[str]
    labels: Sequence[int] | None
    read: Callable[[str], np.ndarray]


def _decoded(content: bytes, name: str) -> np.ndarray:
    from PIL import Image

    try:
        image = Image.open(io.BytesIO(content))
        image.load()
    except Exception as error:  # every codec fails in its own way
        raise StageError(f"{name}: cannot be decoded as an image ({error}): replace it, or leave it out") from error
    return np.array(image if image.mode in ("L", "RGB") else image.convert("RGB"))


def _labels(names: Sequence[str], listed: str | None, where: str) -> list[int] | None:
    """Labels from the text of `dataset.json`, or from the top folders of the names; None where neither tells."""
    try:
        found: Any = json.loads(listed).get("labels") if listed is not None else None
        by_name = dict(found or {})
    except (ValueError, AttributeError, TypeError) as error:
        raise StageError(f"{where}: dataset.json is not EDM's list of labels ({error}): mend it") from error
    if found:
        if missing := [name for name in names if name not in by_name]:
            raise StageError(f"{where}: dataset.json has no label for {missing[0]}: complete it")
        return [by_name[name] for name in names]
    tops = [name.split("/")[0] if "/" in name else "" for name in names]
    if listed is None and len(set(tops)) > 1:
        order = {top: label for label, top in enumerate(sorted(set(tops)))}
        return [order[top] for top in tops]
    return None


def _open_zip(path: Path) -> Source:
    try:
        archive = zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
        raise StageError(f"{path}: not a zip file ({error}): fetch it again") from error
    inside = archive.namelist()
    names = sorted(name for name in inside if name.lower().endswith(EXTENSIONS))
    listed = archive.read("dataset.json").decode() if "dataset.json" in inside else None

    def read(name: str) -> np.ndarray:
        try:
            content = archive.read(name)
        except zipfile.BadZipFile as error:
            raise StageError(f"{path}: {name} is corrupt ({error}): replace it, or leave it out") from error
        return _decoded(content, f"{path}: {name}")

    # EDM's own zips number their images in folders of 1,000: those are no classes
    return Source(names, _labels(names, listed if listed is not None else "{}", str(path)), read)


def _open_folder(path: Path) -> Source:
    found = (each for each in path.rglob("*") if each.suffix.lower() in EXTENSIONS)
    names = sorted(each.relative_to(path).as_posix() for each in found)
    listed = (path / "dataset.json").read_text() if (path / "dataset.json").is_file() else None
    return Source(names, _labels(names, listed, str(path)), lambda name: _decoded((path / name).read_bytes(), name))


def _from_arrays(images: np.ndarray, labels: np.ndarray) -> Source:
    return Source([str(index) for index in range(len(images))], labels.tolist(), lambda name: images[int(name)])


def _open_cifar(path: Path) -> Source:
    """CIFAR-10 or CIFAR-100 as published for Python: pickles, read without running them."""
    from anisodiff.pickles import load_plain

    images, labels = [], []
    try:
        with tarfile.open(path, "r:gz") as archive:
            wanted = sorted(name for name in archive.getnames() if "/data_batch_" in name or name.endswith("/train"))
            for name in wanted:
                batch = load_plain(archive.extractfile(name).read(), f"{path}: {name}")
                batch = {key.decode() if isinstance(key, bytes) else key: value for key, value in batch.items()}
                images.append(batch["data"].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
                labels.append(batch["labels"] if "labels" in batch else batch["fine_labels"])
        return _from_arrays(np.concatenate(images), np.concatenate(labels))
    except (tarfile.TarError, OSError, EOFError, zlib.error, LookupError, ValueError, AttributeError) as error:
        raise StageError(f"{path}: holds no CIFAR training batches ({error}): fetch cifar-10-python.tar.gz") from error


def _open_digits(_: Path) -> Source:
    """scikit-learn's `load_digits`: 1,797 scanned handwritten digits, 8x8, 17 grey levels, ten classes."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    return _from_arrays(np.rint(bunch.images * (255 / 16)).astype(np.uint8), bunch.target)


BUILT_IN: dict[str, Callable[[Path], Source]] = {"digits": _open_digits}


def open_source(source: str) -> Source:
    """The images that a data set's `source` names: a built-in set, a zip, a CIFAR archive or a folder.

    Raises:
        StageError: there is no such thing, or no image in it.
    """
    path = Path(source)
    if source in BUILT_IN:
        opener = BUILT_IN[source]
    elif path.is_dir():
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
    if not opened.names:
        raise StageError(f"{source}: no image inside: it should hold files like {', '.join(EXTENSIONS[:3])}")
    return opened


def fit(image: np.ndarray, resolution: int | None, transform: Transform) -> np.ndarray:
    """Crop and resize as EDM's dataset tool (`--transform`, `--resolution`), Lanczos filter.

    Args:
        image: uint8 `[H, W]` or `[H, W, C]`.
        resolution: side of the result; None leaves the size.
        transform: "center-crop" cuts the largest square and makes it RGB; "none" squeezes to a square.
    """
    from PIL import Image

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


_source: Source | None = None  # a worker's own


def _open_in_worker(source: str) -> None:
    global _source
    _source = open_source(source)


def _read_in_worker(names: Sequence[str], resolution: int | None, transform: Transform) -> list[np.ndarray]:
    return [_planes(fit(_source.read(name), resolution, transform)) for name in names]


@contextlib.contextmanager
def _mapping(source: str, workers: int) -> Iterator[Callable]:
    """`map` in this process, or over several that have each opened the source."""
    if workers == 1:
        _open_in_worker(source)
        yield map
    else:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(workers, context, _open_in_worker, (source,)) as pool:
            yield pool.map


def read_all(
    source: str, resolution: int | None = None, transform: Transform = "none", workers: int = 1
) -> Iterator[np.ndarray]:
    """Every image of a source as `[C, H, W]`, in order, decoded and fitted by several processes.

    Raises:
        StageError: an image cannot be decoded, or differs in size from the first.
    """
    from tqdm import tqdm

    names = open_source(source).names
    chunks = [names[first : first + 256] for first in range(0, len(names), 256)]
    work = partial(_read_in_worker, resolution=resolution, transform=transform)
    shape = None
    with (
        _mapping(source, workers) as parallel_map,
        tqdm(total=len(names), desc="images", unit="img", unit_scale=True, mininterval=5) as bar,
    ):
        for chunk, images in zip(chunks, parallel_map(work, chunks), strict=True):
            for name, image in zip(chunk, images, strict=True):
                shape = shape or image.shape
                if image.shape != shape:
                    raise StageError(
                        f"{source}: {name} is {image.shape}, the first image {shape} (channels, height, width): "
                        "set a resolution, and center-crop for grey images among coloured ones"
                    )
                yield image
            bar.update(len(chunk))


def make_images(
    source: str, output: Path, resolution: int | None = None, transform: Transform = "none", workers: int = 1
) -> None:
    """Read a source into a memory-mapped folder for training.

    Args:
        source: see `open_source`.
        output: folder.
        resolution: side of the images; None leaves the size.
        transform: see `fit`.
        workers: processes.
    """
    from anisodiff import data  # and torch, which the processes that decode do without

    opened = open_source(source)
    images = read_all(source, resolution, transform, workers)
    first = next(images)
    if first.shape[1] != first.shape[2]:
        raise StageError(f"{source}: images are {first.shape[1:]}: set transform to center-crop, or a resolution")
    with data.writing(output, len(opened.names), first.shape) as (add, described):
        for image in itertools.chain([first], images):
            add(image)
        described["labels"] = np.zeros(len(opened.names)) if opened.labels is None else opened.labels
        described["classes"] = 0 if opened.labels is None else int(max(opened.labels)) + 1
        described |= {"source": os.path.basename(source), "resolution": resolution, "transform": transform}


def make_zip(
    source: str, output: Path, resolution: int | None = None, transform: Transform = "none", workers: int = 1
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
        for index, image in enumerate(read_all(source, resolution, transform, workers)):
            add(index, image, opened.labels[index] if opened.labels else None)


@contextlib.contextmanager
def writing_zip(output: Path) -> Iterator[Callable[[int, np.ndarray, int | None], None]]:
    """Write EDM's dataset zip atomically: yields a function of the number, the image `[C, H, W]` and its label."""
    from PIL import Image

    labels = []
    with atomic(output) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:

        def add(number: int, image: np.ndarray, label: int | None = None) -> None:
            name = f"{number // 1000:05d}/img{number:08d}.png"
            png = io.BytesIO()
            pixels = Image.fromarray(image[0] if len(image) == 1 else image.transpose(1, 2, 0))
            pixels.save(png, "png", compress_level=0)
            archive.writestr(name, png.getvalue())
            if label is not None:
                labels.append([name, label])

        yield add
        archive.writestr("dataset.json", json.dumps({"labels": labels or None}))
