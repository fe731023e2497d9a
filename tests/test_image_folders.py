"""The folder that training maps: made by any number of processes, whole or not at all, and what its hashes tell."""

import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from anisodiff.data import image_sets
from anisodiff.errors import StageError

SHAPE = (1, 4, 4)


def write(folder: Path, value: int, count: int = 3) -> None:
    with image_sets.writing(folder, count, SHAPE) as (add, described):
        fill(add, described, value, count)


def fill(add, described: dict, value: int, count: int = 3) -> None:
    for _ in range(count):
        add(np.full(SHAPE, value, np.uint8))
    described |= {"labels": [value] * count, "classes": value + 1}


def test_writers_of_one_folder_do_not_meet(tmp_path):
    """The orphan of a killed run and its successor: each is whole when it is done, and the last one stays."""
    folder = tmp_path / "images"
    with image_sets.writing(folder, 3, SHAPE) as (add, described):
        add(np.full(SHAPE, 1, np.uint8))
        write(folder, 2)
        assert (image_sets.load(folder).pixels == 2).all()
        add(np.full(SHAPE, 1, np.uint8))
        add(np.full(SHAPE, 1, np.uint8))
        described |= {"labels": [1, 1, 1], "classes": 2}
    assert (image_sets.load(folder).pixels == 1).all()
    assert [each.name for each in tmp_path.iterdir()] == ["images"]


def test_processes_that_finish_at_once_leave_one_whole_folder(tmp_path):
    """Two processes put their folders into one place over and over; all succeed, and the end is one of theirs."""
    folder = tmp_path / "images"
    context = multiprocessing.get_context("fork")
    together = context.Barrier(2)

    def race(value: int) -> None:
        for _ in range(20):
            together.wait()
            write(folder, value)

    racing = [context.Process(target=race, args=(value,)) for value in (1, 2)]
    for each in racing:
        each.start()
    for each in racing:
        each.join(60)
    assert [each.exitcode for each in racing] == [0, 0]
    images = image_sets.load(folder)
    assert images.pixels.unique().tolist() == images.labels.unique().tolist()
    assert [each.name for each in tmp_path.iterdir()] == ["images"]


def test_what_a_killed_writer_left_is_removed_when_it_is_old(tmp_path):
    folder = tmp_path / "images"
    killed = image_sets.writing(folder, 3, SHAPE)
    killed.__enter__()  # and never left
    (left,) = tmp_path.iterdir()
    with pytest.raises(StageError, match="run the stage `images`"):
        image_sets.load(folder)
    write(folder, 1)
    assert left.is_dir()  # it may be somebody's
    for each in (left, *left.rglob("*")):
        os.utime(each, (time.time() - 2 * image_sets.ABANDONED,) * 2)
    write(folder, 2)
    assert not left.exists()


def test_a_writer_whose_place_is_removed_says_so(tmp_path):
    def write_and_remove() -> None:
        with image_sets.writing(tmp_path / "images", 3, SHAPE) as (add, described):
            fill(add, described, 1)
            shutil.rmtree(next(tmp_path.iterdir()))

    with pytest.raises(StageError, match="images: the place it was made in is gone: run again"):
        write_and_remove()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["pixels", "labels"])
@pytest.mark.parametrize("large", [False, True])
def test_a_flipped_bit_is_noticed(tmp_path, monkeypatch, name, large):
    folder = tmp_path / "images"
    if large:
        monkeypatch.setattr(image_sets, "ALWAYS_HASHED", 0)
    write(folder, 1)
    image_sets.load(folder)
    with (folder / f"{name}.npy").open("r+b") as file:
        file.seek(-8, os.SEEK_END)
        file.write(b"\3")
    with pytest.raises(StageError, match=rf"images: {name}\.npy is not what the stage .*: delete it and run again"):
        image_sets.load(folder)


def test_a_large_file_is_hashed_once(tmp_path, monkeypatch):
    monkeypatch.setattr(image_sets, "ALWAYS_HASHED", 0)
    folder = tmp_path / "images"
    write(folder, 1)
    image_sets.load(folder)
    monkeypatch.setattr(image_sets, "digest", lambda _: pytest.fail("hashed again"))
    assert (image_sets.load(folder).pixels == 1).all()


@pytest.mark.parametrize(
    "described", ["{", "[]", "{}", "[" * 10**5, '{"sha256": 3}', '{"sha256": ["0"]}', b"\xff"]
)  # fmt: skip
def test_a_folder_that_is_described_wrongly(tmp_path, described):
    folder = tmp_path / "images"
    write(folder, 1)
    image_sets.metadata_file(folder).write_bytes(described if isinstance(described, bytes) else described.encode())
    with pytest.raises(StageError, match=r"images: .*run"):
        image_sets.load(folder)


def test_a_disk_that_will_be_full_is_said_at_the_start(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 60, 40))
    with pytest.raises(OSError, match=r"No space left on device: .*images"):
        write(tmp_path / "images", 1)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_while_images_are_written(tmp_path):
    """As under a quota, which does not show in the free space: an error and no signal, and nothing is left."""
    mount = ["unshare", "--user", "--map-root-user", "--mount", "bash", "-c",
             f'mount -t tmpfs -o size=64k none {tmp_path} && "$@" && ls -A {tmp_path}', "bash"]  # fmt: skip
    if shutil.which("unshare") is None or subprocess.run([*mount, "true"], capture_output=True).returncode:
        pytest.skip("may not mount a small disk")
    full = """
import pathlib, shutil
shutil.disk_usage = lambda _: shutil._ntuple_diskusage(10**9, 0, 10**9)
from anisodiff.data import image_sets
try:
    with image_sets.writing(pathlib.Path(FOLDER), 100, (3, 32, 32)) as (add, _):
        for _ in range(100):
            add([[[0] * 32] * 32] * 3)
except OSError as error:
    print(error)
""".replace("FOLDER", repr(str(tmp_path / "images")))
    ended = subprocess.run([*mount, sys.executable, "-c", full], capture_output=True, text=True, check=False)
    assert (ended.stdout, ended.returncode) == ("[Errno 28] No space left on device\n", 0), ended.stderr
