"""Hostile and broken pickles: refused with one clear line, and without any effect."""

import collections
import io
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from anisodiff import checkpoints
from anisodiff.files import StageError
from anisodiff.pickles import load_edm, load_plain

EDM = Path(__file__).parent / "data/edm"
GOOD = EDM / "ddpmpp-uncond-16.pkl"


class Call:
    """Pickles as a call of `function(*arguments)`."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


class Named:
    """Pickles as a call of a name that need not exist here."""

    def __init__(self, module: str, name: str, *arguments):
        self.module, self.name, self.arguments = module, name, arguments


class Pickler(pickle._Pickler):
    """Writes `Named` as a call by name; the protocol of old files, which names modules as text."""

    def save(self, obj, save_persistent_id=True):
        if isinstance(obj, Named):
            self.write(pickle.GLOBAL + f"{obj.module}\n{obj.name}\n".encode())
            super().save(tuple(obj.arguments))
            self.write(pickle.REDUCE)
        else:
            super().save(obj, save_persistent_id)


def dumped(content) -> bytes:
    file = io.BytesIO()
    Pickler(file, protocol=2).dump(content)
    return file.getvalue()


def persistent(class_name: str, source: str = "", **state) -> Named:
    meta = {"type": "class", "version": 6, "module_src": source, "class_name": class_name, "state": state}
    return Named("torch_utils.persistence", "_reconstruct_persistent_obj", meta)


def layer(parameters: dict, **children) -> dict:
    return {"_parameters": parameters, "_buffers": {}, "_modules": children}


def network(class_name="EDMPrecond", model_type="SongUNet", parameters=None, source="") -> dict:
    model = persistent(model_type, source, **layer(parameters or {}), _init_args=(8, 3, 3), _init_kwargs={})
    return {"ema": persistent(class_name, source, **layer({}, model=model), sigma_data=0.5)}


@pytest.fixture
def mark(tmp_path) -> Path:
    """A file that exists only if something was run."""
    return tmp_path / "was-run"


def hostile(mark: Path) -> dict[str, tuple[bytes, str]]:
    """Name -> pickle, and what the refusal must say."""
    touch = f"touch {mark}"
    nested = torch.nn.Parameter(torch.zeros(2))
    payload = pickle.dumps(Call(os.system, touch), protocol=2)
    whole = GOOD.read_bytes()
    huge = Named("torch._utils", "_rebuild_tensor_v2", torch.FloatStorage(4), 0, (10**9, 10**9), (0, 0))
    return {
        "os.system": (pickle.dumps({"ema": Call(os.system, touch)}), "refused, not run"),
        "eval": (pickle.dumps(Call(eval, f"__import__('os').system('{touch}')")), "refused, not run"),
        "nested payload": (
            dumped(network(parameters={"w": Named("torch.storage", "_load_from_bytes", payload)})),
            "a tensor that is not one",
        ),
        "embedded source": (
            dumped(network(source=f"import os\nos.system('{touch}')\nclass EDMPrecond: pass")),
            "do not fit",
        ),
        "attribute of a module": (pickle.dumps(collections.ChainMap()), "refused, not run"),
        "truncated": (whole[: len(whole) // 2], "not a readable pickle"),
        "empty": (b"", "not a readable pickle"),
        "text": (b"<html>404</html>", "not a readable pickle"),
        "another preconditioning": (dumped(network("VPPrecond")), "only EDM's preconditioning"),
        "another network": (dumped(network(model_type="Generator")), "is unknown"),
        "no network": (pickle.dumps({"ema": 3}), "no network under 'ema'"),
        "plain module": (dumped({"ema": persistent("EDMPrecond", **layer({}))}), "holds no EDM network"),
        "absurd size": (dumped(network(parameters={"w": huge})), "the file is corrupt"),
        "absurd string": (b"\x80\x04\x8e" + (2**60).to_bytes(8, "little") + b"x.", "not a readable pickle"),
        "object array": (
            dumped({"ema": Named("numpy", "dtype", "O")}), "Python objects"
        ),
        "weights of another shape": (dumped(network(parameters={"w": nested.data})), "do not fit"),
    }  # fmt: skip


@pytest.mark.parametrize("name", hostile(Path("unused")))
def test_is_refused_without_effect(name, mark, tmp_path):
    content, says = hostile(mark)[name]
    file, output = tmp_path / "snapshot.pkl", tmp_path / "network.safetensors"
    file.write_bytes(content)
    with pytest.raises(StageError, match=says):
        checkpoints.convert(file, output)
    assert not mark.exists()
    assert not output.exists()


def test_the_hostile_pickle_would_have_run(mark):
    """The test above can fail: the plain unpickler runs the same bytes."""
    pickle.loads(hostile(mark)["os.system"][0])
    assert mark.exists()


def test_one_line_on_the_command_line(mark, tmp_path):
    file = tmp_path / "snapshot.pkl"
    file.write_bytes(hostile(mark)["os.system"][0])
    command = [sys.executable, "-m", "anisodiff", "convert", str(file), str(tmp_path / "network.safetensors")]
    finished = subprocess.run(command, capture_output=True, text=True)
    assert finished.returncode != 0
    assert finished.stderr.count("\n") == 1
    assert "refused, not run" in finished.stderr


def test_embedded_source_is_dropped_unread(tmp_path):
    """A good network whose source is hostile is read; the source is not."""
    source, evil = b"# source text left out", b"raise SystemExit(1)   "
    content = GOOD.read_bytes()
    assert source in content
    file = tmp_path / "evil.pkl"
    file.write_bytes(content.replace(source, evil))
    assert set(load_edm(file).tensors) == set(load_edm(GOOD).tensors)


@pytest.mark.parametrize("module", ["numpy.core.multiarray", "numpy._core.multiarray"])
def test_arrays_of_old_and_new_numpy(module):
    array = np.arange(6, dtype=">i2").reshape(2, 3)
    plain = pickle.dumps({"data": array, "count": np.float64(2.5)}, protocol=2)
    for each in (b"numpy._core.multiarray", b"numpy.core.multiarray"):
        plain = plain.replace(each, module.encode())
    found = load_plain(plain, "batch")
    assert np.array_equal(found["data"], array)
    assert found["count"] == 2.5


def test_nothing_of_one_file_reaches_the_next():
    """A file may set attributes of what it names; the next file sees names made anew."""
    poisoned = pickle.GLOBAL + b"numpy\nndarray\n" + pickle.EMPTY_DICT + b"(U\x05valueK\x01u" + pickle.BUILD + b"."
    with pytest.raises(StageError):
        load_plain(poisoned, "poison")
    array = np.arange(3)
    assert np.array_equal(load_plain(pickle.dumps([array]), "clean")[0], array)
