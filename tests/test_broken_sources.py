"""Sources that are damaged or meant to harm: one line that names the file, in little time and memory."""

import gzip
import io
import json
import os
import pickle
import struct
import subprocess
import sys
import tarfile
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from anisodiff.data import sources
from anisodiff.errors import StageError


def png(side: int = 8) -> bytes:
    content = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (side, side, 3), np.uint8)).save(content, "png")
    return content.getvalue()


def zipped(file: Path, members: dict[str, bytes], packing: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(file, "w", packing) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return file


def refused(source: Path, tmp_path: Path, says: str, workers: int = 1) -> None:
    with pytest.raises(StageError, match=says) as error:
        sources.make_images(str(source), tmp_path / "images", workers=workers)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "images").exists()


def patched(file: Path, in_member: int, in_directory: int, value: bytes) -> None:
    """Write over the first member's own header and its entry in the directory."""
    content = bytearray(file.read_bytes())
    for signature, place in ((b"PK\3\4", in_member), (b"PK\1\2", in_directory)):
        at = content.find(signature) + place
        content[at : at + len(value)] = value
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        ((6, 8, b"\1"), r"set\.zip: a\.png is not unpacked .*encrypted"),
        ((8, 10, b"\x09"), r"set\.zip: a\.png is not unpacked .*compression"),
        ((8, 10, b"\x63"), r"set\.zip: a\.png is not unpacked .*compression"),
        ((14, 16, b"\0\0\0\0"), r"set\.zip: a\.png is corrupt .*CRC"),
        ((4, 6, b"\xff"), r"set\.zip: .* \(zip file version 25\.5\)"),
        ((22, 24, struct.pack("<I", 2**31)), r"set\.zip: a\.png is of 2,147,483,648 bytes, above 268,435,456: leave"),
        ((22, 24, struct.pack("<I", 90)), r"set\.zip: a\.png is corrupt"),
    ],
)
def test_zips_that_are_not_unpacked(tmp_path, damage, says):
    file = zipped(tmp_path / "set.zip", {"a.png": png()})
    patched(file, *damage)
    refused(file, tmp_path, says)


@pytest.mark.parametrize("place", range(35, 335, 20))
def test_damaged_deflate_is_named(tmp_path, place):
    file = zipped(tmp_path / "set.zip", {"a.png": png(32)})
    content = bytearray(file.read_bytes())
    content[place] ^= 255
    file.write_bytes(content)
    refused(file, tmp_path, r"set\.zip: a\.png is (corrupt|not unpacked)")


@pytest.mark.parametrize("packing", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_member_that_is_larger_than_it_says(tmp_path, packing, monkeypatch):
    """The sizes that a zip declares are its author's; no more than they say is unpacked at once."""
    file = zipped(tmp_path / "set.zip", {"a.png": bytes(2**25)}, packing)
    patched(file, 22, 24, struct.pack("<I", 100))
    taken = []
    real = sources.shutil.copyfileobj
    monkeypatch.setattr(sources.shutil, "copyfileobj", lambda *each: taken.append(each[1]) or real(*each))
    refused(file, tmp_path, r"set\.zip: a\.png is corrupt")
    assert len(taken[0].getvalue()) <= 100


def test_a_zip_that_holds_a_name_twice(tmp_path):
    zipped(tmp_path / "set.zip", {"a.png": png(), "b.png": png()})
    content = (tmp_path / "set.zip").read_bytes()
    (tmp_path / "set.zip").write_bytes(content.replace(b"b.png", b"a.png"))
    refused(tmp_path / "set.zip", tmp_path, r"set\.zip: holds a\.png twice: make it again")


@pytest.mark.parametrize("damage", [lambda b: b"[" * 10**6, lambda b: b + b"\xe9", lambda b: b[:-3]])
def test_a_broken_list_in_a_zip(tmp_path, damage):
    listed = damage(json.dumps({"labels": [["a.png", 0]]}).encode())
    file = zipped(tmp_path / "set.zip", {"a.png": png(), "dataset.json": listed})
    refused(file, tmp_path, r"set\.zip: dataset\.json is not EDM's list of labels")


def bomb(side: int) -> bytes:
    """A PNG that says it is `side` wide and high, and holds next to nothing."""
    chunks = (
        (b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(b"")),
        (b"IEND", b""),
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        for kind, content in chunks
    )


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n8 8 moveto\nshowpage\n%%EOF\n"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (EPS, r"cannot be decoded as an image \(it is none of BMP, GIF, JPEG"),
        (bomb(10_000), "cannot be decoded .*decompression bomb"),
        (bomb(100_000), "cannot be decoded .*decompression bomb"),
        (b"", "cannot be decoded"),
        (png()[:-30], "cannot be decoded"),
        (None, "is of 268,435,457 bytes, above 268,435,456: leave it out"),
    ],
)
def test_files_that_are_no_sound_images(tmp_path, content, says, monkeypatch):
    """Pillow starts Ghostscript for an EPS, whatever the file is called."""
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *_, **__: pytest.fail("was run"))
    (tmp_path / "set").mkdir()
    with (tmp_path / "set/a.png").open("wb") as file:
        file.write(content or b"")
        if content is None:
            file.truncate(sources.LARGEST + 1)
    refused(tmp_path / "set", tmp_path, rf"set/a\.png: {says}")


def test_a_name_that_breaks_lines(tmp_path):
    file = zipped(tmp_path / "set.zip", {"a\n\x1b[2Jb.png": png()})
    refused(file, tmp_path, r"'a\\n\\x1b\[2Jb\.png': a name of an image with a line break or the like: rename it")


def test_what_is_no_file(tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set/b.png").symlink_to("/nowhere/b.png")
    refused(tmp_path / "set", tmp_path, r"set/b\.png: cannot be read \(No such file or directory\): mend or remove it")
    (tmp_path / "set/b.png").unlink()
    (tmp_path / "set/b.png").symlink_to("b.png")
    refused(tmp_path / "set", tmp_path, r"set/b\.png: cannot be read \(Too many levels of symbolic links\)")
    (tmp_path / "set/b.png").unlink()
    os.mkfifo(tmp_path / "set/b.png")
    refused(tmp_path / "set", tmp_path, r"set/b\.png: is not a file: remove it, or rename it")
    (tmp_path / "set/b.png").unlink()
    (tmp_path / "set/a.png").write_bytes(png())
    os.mkfifo(tmp_path / "set/dataset.json")
    refused(tmp_path / "set", tmp_path, r"set/dataset\.json: is not a file")


def cifar(file: Path, members: list[tuple[str, dict]], contents: dict[str, bytes] | None = None) -> Path:
    with tarfile.open(file, "w:gz") as archive:
        for name, attributes in members:
            member = tarfile.TarInfo(name)
            content = (contents or {}).get(name, b"")
            member.size = len(content)
            for key, value in attributes.items():
                setattr(member, key, value)
            archive.addfile(member, io.BytesIO(content))
    return file


BATCH = "cifar-10-batches-py/data_batch_1"
BAD_BATCHES = {
    "no images": {"labels": [0]},
    "no labels": {"data": np.zeros((1, 3072), np.uint8)},
    "fractions": {"data": np.zeros((1, 3072)), "labels": [0]},
    "other sizes": {"data": np.zeros((1, 3000), np.uint8), "labels": [0]},
    "too few labels": {"data": np.zeros((2, 3072), np.uint8), "labels": [0]},
    "no classes": {"data": np.zeros((1, 3072), np.uint8), "labels": ["cat"]},
    "vectors": {"data": np.zeros((2, 3072), np.uint8), "labels": [[0, 1], [1]]},
    "text": {"data": "pixels", "labels": [0]},
    "a list": [],
    "numbers": {1: 2},
}


@pytest.mark.parametrize("name", BAD_BATCHES)
def test_batches_that_are_no_cifar(tmp_path, name):
    contents = {BATCH: pickle.dumps(BAD_BATCHES[name], protocol=2)}
    file = cifar(tmp_path / "cifar-10-python.tar.gz", [(BATCH, {})], contents)
    refused(file, tmp_path, r"cifar-10-python\.tar\.gz: ")


@pytest.mark.parametrize(
    "members",
    [
        [(BATCH, {"type": tarfile.LNKTYPE, "linkname": BATCH})],
        [(BATCH, {"type": tarfile.SYMTYPE, "linkname": "data_batch_2"}),
         (BATCH[:-1] + "2", {"type": tarfile.SYMTYPE, "linkname": "data_batch_1"})],
        [(BATCH, {"type": tarfile.DIRTYPE})],
        [(BATCH, {"type": tarfile.FIFOTYPE})],
        [(BATCH, {"type": tarfile.CHRTYPE})],
    ],
)  # fmt: skip
def test_members_of_cifar_that_are_no_files(tmp_path, members):
    file = cifar(tmp_path / "cifar-10-python.tar.gz", members)
    refused(file, tmp_path, "holds no CIFAR training batches")


def test_an_archive_that_unpacks_to_too_much(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "LARGEST", 10**6)
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(gzip.compress(bytes(10**7)))
    refused(tmp_path / "cifar-10-python.tar.gz", tmp_path, "unpacked, it has more than 1,000,000 bytes")


def test_an_error_in_a_worker_is_one_line(tmp_path):
    file = zipped(tmp_path / "set.zip", {"a.png": png(), "b.png": b"no image"})
    command = [sys.executable, "-m", "anisodiff", "images", "--source", file, "--output", tmp_path / "images"]
    failed = subprocess.run([*command, "--workers", "2"], capture_output=True, text=True, check=False)
    assert failed.returncode == 1
    (line,) = (each for each in failed.stderr.splitlines() if each.strip() and "img/s" not in each)
    assert f"anisodiff: {file}: b.png: cannot be decoded as an image" in line
    assert list(tmp_path.iterdir()) == [file]


def die(_: str) -> np.ndarray:
    os._exit(137)


def test_a_worker_that_dies_is_named(tmp_path):
    source = sources.Source("set", ["a.png"], None, die)
    with pytest.raises(StageError, match=r"set: a worker died \(out of memory\?\): give fewer workers, or more memory"):
        list(sources.read_all(source, workers=2))
