"""Data sets in every format that is read, and what is refused."""

import io
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import standin
import torch
from PIL import Image

from anisodiff import data, datasets
from anisodiff.files import StageError

REAL = Path(__file__).parents[2] / "shared/data/cifar10-32x32.zip"


def write(file: Path, image: np.ndarray) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(file)


def load(source, tmp_path, **options) -> data.Images:
    datasets.make_images(str(source), tmp_path / "images", **options)
    return data.load(tmp_path / "images")


def test_edms_zip_is_read(tmp_path):
    images = load(standin.save_zip(tmp_path / "set.zip", 23, 8, labels=True), tmp_path, workers=2)
    assert images.shape == (3, 8, 8)
    assert images.classes == 10
    assert images.labels.tolist() == [index % 10 for index in range(23)]
    assert np.array_equal(images.pixels.permute(0, 2, 3, 1).numpy(), standin.pictures(23, 8, 1))


def test_a_written_zip_is_read_back(tmp_path):
    source = standin.save_cifar(tmp_path / "cifar-10-python.tar.gz", 50)
    datasets.make_zip(str(source), tmp_path / "written.zip")
    with zipfile.ZipFile(tmp_path / "written.zip") as archive:
        assert all(each.compress_type == zipfile.ZIP_STORED for each in archive.infolist())
        assert archive.namelist()[0] == "00000/img00000000.png"
        assert json.loads(archive.read("dataset.json"))["labels"][3] == ["00000/img00000003.png", 3]
    images = load(tmp_path / "written.zip", tmp_path)
    assert np.array_equal(images.pixels.permute(0, 2, 3, 1).numpy(), standin.pictures(50, 32))
    assert images.labels[:12].tolist() == [*range(10), 0, 1]


def test_cifars_archive_is_read(tmp_path):
    images = load(standin.save_cifar(tmp_path / "cifar-10-python.tar.gz", 20), tmp_path)
    assert np.array_equal(images.pixels.permute(0, 2, 3, 1).numpy(), standin.pictures(20, 32))


def test_labels_of_a_folder_are_its_top_folders(tmp_path):
    for index, name in enumerate(("dog/b.png", "cat/a.png", "cat/deep/c.png")):
        write(tmp_path / "set" / name, np.full((4, 4, 3), index, np.uint8))
    images = load(tmp_path / "set", tmp_path)
    assert images.pixels[:, 0, 0, 0].tolist() == [1, 2, 0]  # in the order of their names
    assert images.labels.tolist() == [0, 0, 1]
    (tmp_path / "set/dataset.json").write_text(
        json.dumps({"labels": [["cat/a.png", 4], ["cat/deep/c.png", 2], ["dog/b.png", 0]]})
    )
    assert load(tmp_path / "set", tmp_path).labels.tolist() == [4, 2, 0]


def test_a_flat_folder_has_no_labels(tmp_path):
    write(tmp_path / "set/a.png", np.zeros((4, 4), np.uint8))
    images = load(tmp_path / "set", tmp_path)
    assert images.classes == 0
    assert images.shape == (1, 4, 4)
    assert images.take(torch.tensor([0]))[1].shape == (1, 0)


def test_crop_and_resize_are_edms():
    """The rules of EDM's tool written out: the centred square, Lanczos, and grey made RGB by the crop alone."""
    rgb = standin.pictures(1, 64)[0][:, :41]  # 64 high, 41 wide
    expected = Image.fromarray(rgb[11:52]).resize((16, 16), Image.Resampling.LANCZOS)
    assert np.array_equal(datasets.fit(rgb, 16, "center-crop"), np.array(expected))
    squeezed = Image.fromarray(rgb).resize((16, 16), Image.Resampling.LANCZOS)
    assert np.array_equal(datasets.fit(rgb, 16, "none"), np.array(squeezed))
    assert datasets.fit(rgb[:, :, 0], 16, "center-crop").shape == (16, 16, 3)
    assert datasets.fit(rgb[:, :, 0], 16, "none").shape == (16, 16)
    assert datasets.fit(rgb, None, "none") is rgb


def test_images_of_mixed_sizes(tmp_path):
    write(tmp_path / "set/a.png", np.zeros((4, 4, 3), np.uint8))
    write(tmp_path / "set/b.png", np.zeros((6, 4, 3), np.uint8))
    with pytest.raises(StageError, match=r"b\.png is \(3, 6, 4\), the first image \(3, 4, 4\).*set a resolution"):
        load(tmp_path / "set", tmp_path)
    assert not (tmp_path / "images").exists()
    assert load(tmp_path / "set", tmp_path, resolution=4).shape == (3, 4, 4)


def test_images_that_are_not_square(tmp_path):
    write(tmp_path / "set/a.png", np.zeros((4, 6, 3), np.uint8))
    with pytest.raises(StageError, match="set transform to center-crop"):
        load(tmp_path / "set", tmp_path)


def corrupted(tmp_path, damage) -> Path:
    """A zip of five images whose fourth is damaged."""
    whole = standin.save_zip(tmp_path / "whole.zip", 5, 8, labels=True)
    with zipfile.ZipFile(whole) as archive, zipfile.ZipFile(tmp_path / "set.zip", "w") as broken:
        for name in archive.namelist():
            content = archive.read(name)
            broken.writestr(name, damage(content) if "3.png" in name else content)
    return tmp_path / "set.zip"


@pytest.mark.parametrize("damage", [lambda b: b[:60], lambda b: b"", lambda b: b"GIF" + b[3:]])
def test_a_corrupt_image_in_a_zip_is_named(tmp_path, damage):
    with pytest.raises(StageError, match=r"set\.zip: 00000/img00000003\.png: cannot be decoded"):
        load(corrupted(tmp_path, damage), tmp_path)
    assert not (tmp_path / "images").exists()


def test_flipped_bits_in_a_zip_are_named(tmp_path):
    file = standin.save_zip(tmp_path / "set.zip", 5, 8, labels=True)
    content = bytearray(file.read_bytes())
    content[content.find(b"IDAT", 900) + 40] ^= 255
    file.write_bytes(content)
    with pytest.raises(StageError, match=r"img0000000\d\.png is corrupt"):
        load(file, tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("set.zip", b"no zip", "not a zip file"),
        ("none.zip", None, "is not here, or not a zip"),
        ("set.txt", b"text", "is not here, or not a zip"),
        ("cifar.tar.gz", b"no archive", "holds no CIFAR training batches"),
    ],
)
def test_what_is_no_source_is_refused(tmp_path, name, content, says):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(StageError, match=says):
        load(tmp_path / name, tmp_path)


def test_an_empty_zip_and_missing_labels(tmp_path):
    with zipfile.ZipFile(tmp_path / "empty.zip", "w") as archive:
        archive.writestr("readme.txt", "nothing")
    with pytest.raises(StageError, match="no image inside"):
        load(tmp_path / "empty.zip", tmp_path)
    with zipfile.ZipFile(tmp_path / "part.zip", "w") as archive:
        png = io.BytesIO()
        Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(png, "png")
        archive.writestr("a.png", png.getvalue())
        archive.writestr("dataset.json", json.dumps({"labels": [["b.png", 1]]}))
    with pytest.raises(StageError, match=r"no label for a\.png"):
        load(tmp_path / "part.zip", tmp_path)


@pytest.mark.parametrize("listed", ["{", "[]", '{"labels": 3}', '{"labels": [1]}'])
def test_broken_lists_of_labels(tmp_path, listed):
    write(tmp_path / "set/a.png", np.zeros((4, 4, 3), np.uint8))
    (tmp_path / "set/dataset.json").write_text(listed)
    with pytest.raises(StageError, match=r"dataset\.json is not EDM's list of labels"):
        load(tmp_path / "set", tmp_path)


def test_a_truncated_archive(tmp_path):
    file = standin.save_cifar(tmp_path / "cifar-10-python.tar.gz", 20)
    file.write_bytes(file.read_bytes()[:2000])
    with pytest.raises(StageError, match="holds no CIFAR training batches"):
        load(file, tmp_path)


def test_the_folder_is_mapped_and_replaced_in_one_move(tmp_path):
    first = load("digits", tmp_path)
    assert len(first) == 1797
    hashes = json.loads(data.about(tmp_path / "images").read_text())["sha256"]
    with pytest.raises(StageError), data.writing(tmp_path / "images", 3, (1, 8, 8)):
        raise StageError("stopped")
    assert json.loads(data.about(tmp_path / "images").read_text())["sha256"] == hashes
    assert [each.name for each in tmp_path.iterdir()] == ["images"]
    with pytest.raises(StageError, match="run the stage `images`"):
        data.load(tmp_path / "other")


def test_subsets_hold_rows_not_copies(tmp_path):
    images = load("digits", tmp_path)
    train, heldout = images.split(100)
    assert train.pixels.data_ptr() == heldout.pixels.data_ptr() == images.pixels.data_ptr()
    assert len(train) + len(heldout) == len(images)
    assert not set(train.rows.tolist()) & set(heldout.rows.tolist())
    pixels, labels = train.take(torch.tensor([5]))
    assert torch.equal(pixels[0], images.pixels[train.rows[5]])
    assert labels.argmax(1) == images.labels[train.rows[5]]


def test_flips_mirror_about_half(tmp_path):
    images = load("digits", tmp_path)
    plain, _ = images.batch(400, torch.Generator().manual_seed(0))
    flipped, _ = images.batch(400, torch.Generator().manual_seed(0), flips=True)
    same = (plain == flipped).flatten(1).all(1)
    mirrored = (plain.flip(-1) == flipped).flatten(1).all(1)
    assert (same | mirrored).all()
    assert 150 < mirrored.sum() < 250


def test_conversion_on_the_command_line(tmp_path):
    source = standin.save_zip(tmp_path / "set.zip", 7, 12, labels=False)
    command = [sys.executable, "-m", "anisodiff"]
    written = tmp_path / "small.zip"
    subprocess.run(
        [*command, "archive", "--source", source, "--resolution", "8", "--output", written], check=True
    )  # fmt: skip
    subprocess.run([*command, "images", "--source", written, "--output", tmp_path / "images"], check=True)
    assert data.load(tmp_path / "images").shape == (3, 8, 8)


@pytest.mark.skipif(not REAL.is_file(), reason="needs the real CIFAR-10 zip in shared/data beside the checkout")
def test_the_real_cifar10(tmp_path):
    images = load(REAL, tmp_path, workers=2)
    assert len(images) == 50_000
    assert torch.bincount(images.labels).tolist() == [5000] * 10
    means = data.to_unit(images.pixels[:5000]).mean((0, 2, 3))
    assert torch.allclose(means, torch.tensor([-0.017, -0.036, -0.107]), atol=0.02)
