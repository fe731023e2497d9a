"""What is stored is what was computed: damage is noticed where a file is read, and made again or named."""

import os
import re
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from runs import ROOT, method_of
from safetensors.torch import save_file

from anisodiff import cli
from anisodiff.errors import StageError
from anisodiff.experiment.settings import MethodSettings
from anisodiff.metrics import cells
from anisodiff.metrics.registry import FeatureFile
from anisodiff.report.distances import distances
from anisodiff.stages import sampling, verifying
from anisodiff.storage import checkpoints, files
from anisodiff.training.loop import ResumeStore, TrainingState

FEATURES = FeatureFile("digits-cnn", ROOT / "config/checkpoints/digits/features.safetensors")
METHOD = MethodSettings(network="base", path="edm", grid="karras", solver="euler")


def flip(file: Path, byte: int, bit: int = 0) -> None:
    content = bytearray(file.read_bytes())
    content[byte] ^= 1 << bit
    replace(file, content)


def replace(file: Path, content: bytes) -> None:
    """As another file of the same name: tensors that were read before stay what they were."""
    file.unlink()
    file.write_bytes(content)


def flip_tensors(file: Path) -> None:
    """One bit of the last tensor."""
    flip(file, file.stat().st_size - 1)


def example(file: Path) -> dict[str, torch.Tensor]:
    tensors = {"half": torch.ones(1, 2, dtype=torch.bfloat16), "count": torch.tensor(7), "none": torch.zeros(0, 3)}
    checkpoints.save(file, tensors, {"kimg": 128.0, "stopped_early": False})
    return tensors


def test_a_bit_that_flips_is_noticed_wherever_it_is(tmp_path):
    file = tmp_path / "file.safetensors"
    tensors = example(file)
    content = file.read_bytes()
    refused = []
    for place in range(len(content)):
        flip(file, place, 5 * place % 8)
        try:
            found, about = checkpoints.read(file)
            assert about == {"kimg": 128.0, "stopped_early": False}
            assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
        except StageError as error:
            refused.append(str(error))
        replace(file, content)
    assert len(refused) > 0.98 * len(content)  # the rest are spaces at the end of the header
    assert all(": delete it and run again" in said for said in refused)


def test_a_number_that_changed_in_the_header_is_refused(tmp_path):
    file = tmp_path / "file.safetensors"
    example(file)
    content = file.read_bytes()
    replace(file, content.replace(b"128.0", b"129.0"))
    assert content != file.read_bytes()
    for read in (checkpoints.header, checkpoints.read):
        with pytest.raises(
            StageError, match=r"file\.safetensors: damaged: its header is not what was written: delete it"
        ):
            read(file)


def test_a_tensor_of_another_file_is_refused(tmp_path):
    """Header and tensors belong together, even if each of them is whole."""
    file = tmp_path / "file.safetensors"
    example(file)
    with checkpoints.safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    save_file({"count": torch.tensor(7)}, file, metadata=metadata)
    with pytest.raises(StageError, match="damaged: its tensors are not what was written"):
        checkpoints.read(file)
    assert checkpoints.header(file)["kimg"] == 128


def test_the_same_content_is_the_same_file(tmp_path):
    files = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for file in files:
        example(file)
    assert files[0].read_bytes() == files[1].read_bytes()


def test_files_without_a_digest_are_read(tmp_path):
    file = tmp_path / "old.safetensors"
    save_file({"weights": torch.ones(2)}, file, metadata={"json": '{"kimg": 3.0}'})
    tensors, about = checkpoints.read(file)
    assert about == checkpoints.header(file) == {"kimg": 3.0}
    assert torch.equal(tensors["weights"], torch.ones(2))
    assert not checkpoints.has_digest(file)
    example(file)
    assert checkpoints.has_digest(file)


def test_a_file_that_is_replaced_while_it_is_read_is_one_of_the_two(tmp_path, monkeypatch):
    file, other, opened = tmp_path / "file.safetensors", tmp_path / "other.safetensors", checkpoints.safe_open
    checkpoints.save(file, {"x": torch.zeros(3)}, {"is": "the old"})
    checkpoints.save(other, {"x": torch.ones(3)}, {"is": "the new"})

    def replaced(*arguments, **options):
        os.replace(other, file)
        return opened(*arguments, **options)

    monkeypatch.setattr(checkpoints, "safe_open", replaced)
    tensors, about = checkpoints.read(file)
    assert about == {"is": "the old"}
    assert torch.equal(tensors["x"], torch.zeros(3))


def test_a_damaged_resume_state_is_skipped_for_the_one_before(tmp_path):
    store, training = ResumeStore(tmp_path, "key"), TrainingState({"layer": torch.nn.Linear(2, 2)}, {"layer": 0.1})
    for training.step in (1, 2):
        store.save(training)
    newest = max((tmp_path / "key").iterdir())
    flip_tensors(newest)
    again = TrainingState({"layer": torch.nn.Linear(2, 2)}, {"layer": 0.1})
    assert store.load(again)
    assert again.step == 1
    assert torch.equal(again.modules["layer"].weight, training.modules["layer"].weight)


@pytest.fixture(scope="module")
def sampled(tmp_path_factory, start) -> Path:
    """Results of one method at two budgets, and a reference."""
    folder = tmp_path_factory.mktemp("results") / "digits"
    sample(folder, start)
    sampling.reference(start[2], FEATURES, None, 8, folder / "reference.safetensors")
    return folder


@pytest.fixture
def results(tmp_path, sampled) -> Path:
    return Path(shutil.copytree(sampled, tmp_path / "digits"))


def sample(folder: Path, start, method: MethodSettings = METHOD) -> None:
    output = folder / "samples" / "edm" / "0-15.json"
    sampling.sample(method_of(start, method), sampling.Drawing([3, 4], 0, 15, 16), FEATURES, output)


def cell(results: Path, nfe: int = 3) -> Path:
    return results / "samples" / "edm" / f"nfe{nfe}" / "0-15.safetensors"


@pytest.mark.parametrize(
    "damage", [flip_tensors, lambda file: flip(file, 200), Path.unlink, lambda file: replace(file, b"")]
)
def test_a_damaged_cell_is_made_again(results, start, damage):
    file, kept = cell(results), cell(results, 4)
    before, whole = kept.stat().st_mtime_ns, checkpoints.read(file)[0]
    damage(file)
    sample(results, start)
    again = checkpoints.read(file)[0]
    assert all(torch.equal(again[name], tensor) for name, tensor in whole.items())
    assert kept.stat().st_mtime_ns == before


def test_images_of_another_cell_are_made_again(results, start):
    """They were kept once, and then the cell was made again without them."""
    output = results / "samples/edm/0-15.json"

    def zipped(keep: str, **changes) -> bytes:
        method = method_of(start, METHOD.changed(**changes))
        sampling.sample(method, sampling.Drawing([3], 0, 15, 16, keep), FEATURES, output)
        return cell(results).with_suffix(".zip").read_bytes()

    first = zipped("images")
    assert zipped("features", solver="heun") == first
    second = zipped("images", solver="heun")
    assert second != first
    assert zipped("images") == first


def test_a_damaged_cell_is_named_by_the_distance(results):
    flip_tensors(cell(results))
    arguments = ("toy", results / "reference.safetensors", [results / "samples/edm/0-15.json"], 16, "digits-cnn")
    with pytest.raises(StageError, match=r"nfe3/0-15\.safetensors: damaged: .*: delete it and run again"):
        distances(*arguments, results / "distances.csv", results / "left.csv")
    (results / "samples/edm/0-15.json").write_text("[")
    with pytest.raises(StageError, match=r"0-15\.json: no manifest of cells .*: delete it and run again"):
        distances(*arguments, results / "distances.csv", results / "left.csv")


@pytest.mark.parametrize("name", ["network", "path", "reference"])
def test_damaged_inputs_are_named(results, start, name, tmp_path):
    network, path = (Path(shutil.copy(file, tmp_path)) for file in start[:2])
    file = {"network": network, "path": path, "reference": results / "reference.safetensors"}[name]
    flip_tensors(file)
    read = cells.load_reference if name == "reference" else sample
    arguments = (file, "digits-cnn") if name == "reference" else (tmp_path / "made", (network, path))
    with pytest.raises(StageError, match=rf"{file.name}: damaged: its tensors are not what was written"):
        read(*arguments)


def verified(folder: Path, capsys) -> tuple[bool, list[str], dict[str, int]]:
    """Whether all is whole, the lines of findings with paths below the folder, and the counts that are not 0."""
    whole = verifying.verify(folder)
    *lines, summary = capsys.readouterr().out.splitlines()
    counts = (each.split(" ", 1) for each in summary.split(": ")[-1].split(", "))
    return whole, [line.replace(f"{folder}/", "") for line in lines], {kind: int(n) for n, kind in counts if n != "0"}


def test_whole_results_are_whole(results, start, capsys, monkeypatch):
    shutil.copytree(start[2], results / "images")
    assert verified(results, capsys) == (True, [], {})
    monkeypatch.setattr(verifying, "version", lambda: "9.9")
    whole, lines, counts = verified(results, capsys)
    assert whole
    assert counts == {"of another version": len(lines)}
    assert re.fullmatch(r"\d files, .* the first: made by .*, this is 9\.9: go on with that, or run again", lines[0])
    (results / "fetched").mkdir()
    for file in results.rglob("*.safetensors"):
        shutil.move(file, results / "fetched" / f"{file.parent.name}-{file.name}")
    shutil.rmtree(results / "samples")
    assert verified(results, capsys)[1] == []  # what was made elsewhere is of any version


@pytest.mark.parametrize(
    ("name", "damage", "says"),
    [
        ("samples/edm/nfe3/0-15.safetensors", flip_tensors, "damaged: its tensors are not what was written: delete it"),
        ("reference.safetensors", lambda file: flip(file, 300), "damaged|not a safetensors file"),
        ("images/pixels.npy", flip_tensors, "^images: damaged: its images are not what was written: delete it and run"),
        ("images/about.json", lambda file: replace(file, b"["), "images/about.json: cannot be read"),
        (
            "samples/edm/0-15.json",
            lambda file: replace(file, b"{}"),
            "0-15.json: no manifest of cells: delete it and run",
        ),
        ("samples/edm/nfe3/0-15.zip", lambda file: flip(file, 60), "0-15.zip: (damaged at|cannot be read).*delete it"),
        (".state/base/key/step-000000001.safetensors", flip_tensors, "step-000000001.safetensors: damaged"),
    ],
)
def test_damage_is_found_anywhere_in_a_tree(results, start, capsys, name, damage, says):
    shutil.copytree(start[2], results / "images")
    with zipfile.ZipFile(results / "samples/edm/nfe3/0-15.zip", "w") as images:
        images.writestr("0.png", bytes(range(200)))
    checkpoints.save(
        results / ".state/base/key/step-000000001.safetensors", {"x": torch.ones(3)}, {"version": files.version()}
    )
    assert verified(results, capsys) == (True, [], {})
    damage(results / name)
    whole, lines, counts = verified(results, capsys)
    assert not whole
    assert counts["damaged"] == 1
    assert len([line for line in lines if re.search(says, line)]) == 1


def test_missing_orphaned_and_left_over_files_are_told(results, capsys):
    cell(results).unlink()
    shutil.copy(cell(results, 4), cell(results, 4).with_name("16-31.safetensors"))
    (results / ".images.part").mkdir()
    state = ".state/base/key/.step-000000001.safetensors.abc.safetensors"
    (results / state).parent.mkdir(parents=True)
    for name in (
        ".table.csv.abc.csv",
        ".images.part/pixels.npy",
        ".images.part/labels.npy",
        ".snakemake_timestamp",
        state,
    ):
        (results / name).write_text("half")
    save_file({"x": torch.ones(2)}, results / "old.safetensors", metadata={"json": "{}"})
    (results / "table.csv").write_text("method,version\na,1\nb,2\n")
    whole, lines, counts = verified(results, capsys)
    assert not whole
    assert counts == {
        "missing": 1, "orphaned": 1, "left over": 3, "without a digest": 1, "of mixed versions": 1,
    }  # fmt: skip
    edm = "samples/edm"
    assert f"{edm}/nfe3/0-15.safetensors: missing, 0-15.json names it: delete {edm}/0-15.json and run again" in lines
    assert any(line.startswith(f"{edm}/nfe4/16-31.safetensors: no manifest names it") for line in lines)
    assert next(line for line in lines if "left over" in line).startswith(".images.part: left over by a job")
    assert len(lines) == sum(counts.values())


def test_verify_on_the_command_line(results, capsys, monkeypatch):
    def run(*arguments: str) -> int:
        monkeypatch.setattr("sys.argv", ["anisodiff", "verify", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return ended.value.code

    assert run(str(results)) == 0
    flip_tensors(cell(results))
    assert run(str(results)) == 1
    assert re.search(r"1 damaged, 0 missing", capsys.readouterr().out)
    assert run(str(results / "none")).endswith("none: no such folder: give a folder of results")
