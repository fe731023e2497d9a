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

from anisodiff.errors import StageError
from anisodiff.storage import checkpoints, pickles
from anisodiff.storage.pickles import load_edm, load_plain

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
        if isinstance(obj, Named) and id(obj) in self.memo:
            self.write(self.get(self.memo[id(obj)][0]))
        elif isinstance(obj, Named):
            self.write(pickle.GLOBAL + f"{obj.module}\n{obj.name}\n".encode())
            super().save(tuple(obj.arguments))
            self.write(pickle.REDUCE)
            self.memoize(obj)
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


def doubled(levels: int, one, of=lambda inner: [inner, inner]):
    """Something that holds the same thing twice, which holds the same thing twice, and so on."""
    for _ in range(levels):
        one = of(one)
    return one


def endless() -> dict[str, tuple[bytes, str]]:
    """Small pickles that ask for more time or memory than there is, and what the refusal must say."""
    tuples = pickle.EMPTY_TUPLE + 100 * (pickle.DUP + pickle.TUPLE2)
    name = pickle.GLOBAL + b"numpy\ndtype\n"
    module = lambda inner: persistent("Block", **layer({}, first=inner, second=inner))  # noqa: E731
    modules = doubled(40, persistent("Block", **layer({})), module)
    model = persistent("SongUNet", **layer({}, only=modules), _init_args=(8, 3, 3), _init_kwargs={})
    whole = {"ema": persistent("EDMPrecond", **layer({}, model=model), sigma_data=0.5)}
    size = ((), 10**12)
    text = "x" * 10**5
    return {
        "nested lists": (pickle.dumps(doubled(100, [])), "no network under 'ema'"),
        "nested dicts": (pickle.dumps(doubled(100, {}, lambda inner: {1: inner, 2: inner})), "no network under 'ema'"),
        "a list in itself": (pickle.EMPTY_LIST + pickle.DUP + pickle.APPEND + pickle.STOP, "not a readable pickle"),
        "deep lists": (5000 * pickle.EMPTY_LIST + 4999 * pickle.APPEND + pickle.STOP, "not a readable pickle"),
        "a tuple as a key": (pickle.EMPTY_DICT + tuples + b"K\1s.", "a key is a tuple"),
        "tuples as keys": (pickle.EMPTY_DICT + pickle.MARK + tuples + b"K\1u.", "a key is a tuple"),
        "a dict of tuples": (pickle.MARK + tuples + b"K\1d.", "a key is a tuple"),
        "a set of tuples": (pickle.EMPTY_SET + pickle.MARK + tuples + pickle.ADDITEMS + b".", "a key is a tuple"),
        "pairs for a dict": (
            pickle.GLOBAL + b"collections\nOrderedDict\n(](" + tuples + b"K\1tatR.", "not a readable pickle"
        ),
        "tuples as a name": (name + tuples + pickle.TUPLE1 + pickle.REDUCE + b".", "a tuple where a name is due"),
        "a memo of billions": (b"Nr\xff\xff\xff\x7f.", "no network under 'ema'"),
        "a gap in bytes": (b"\x96" + (2**45).to_bytes(8, "little") + b"x.", "is unknown, or not for checkpoints"),
        "a size of tuples": (
            dumped(network(parameters={"w": Named("torch._utils", "_rebuild_tensor_v2", torch.FloatStorage(4), 0,
                                                  size, (0, 0))})), "the file is corrupt"
        ),
        "many copies": (dumped([Named("_codecs", "encode", text) for _ in range(100)]), "more copies of its parts"),
        "a storage of terabytes": (dumped(network(parameters={"w": stored(2**40)})), "a tensor that is not one"),
        "modules in modules": (dumped(whole), "a module that was met before"),
    }  # fmt: skip


def stored(length: int) -> Named:
    """A storage that says it is so long, and holds one number."""
    file = io.BytesIO()
    torch.save(torch.zeros(1).untyped_storage(), file, _use_new_zipfile_serialization=False)
    content = file.getvalue().replace((1).to_bytes(8, "little"), length.to_bytes(8, "little"))
    return Named("torch.storage", "_load_from_bytes", content)


@pytest.mark.parametrize("name", endless())
def test_endless_work_is_refused(name, tmp_path):
    content, says = endless()[name]
    assert len(content) < 300_000
    (tmp_path / "snapshot.pkl").write_bytes(content)
    with pytest.raises(StageError, match=says) as error:
        load_edm(tmp_path / "snapshot.pkl")
    assert len(str(error.value)) < 500


def test_what_is_shared_stays_shared():
    found = load_plain(pickle.dumps(doubled(100, [np.arange(3)])), "lists")
    assert found[0] is found[1]


def test_operations_are_counted(monkeypatch):
    monkeypatch.setattr(pickles, "MOST_OPERATIONS", 100)
    assert load_plain(48 * b"N0" + b"N.", "few") is None
    with pytest.raises(StageError, match=r"many: not a readable pickle .more than 100 operations"):
        load_plain(200 * b"N0" + b"N.", "many")


@pytest.mark.parametrize("dtype", pickles.STORAGES.values(), ids=str)
def test_tensors_are_those_that_were_saved(dtype):
    """Every type, a part of a storage, an order of axes, and nothing at all."""
    whole = torch.arange(24).reshape(2, 3, 4).to(dtype)
    saved = [whole, whole[1:, :, ::2], whole.permute(2, 0, 1), whole[:0]]
    found = load_plain(dumped(saved), "tensors")
    assert all(torch.equal(one, other) and one.dtype == dtype for one, other in zip(found, saved, strict=True))


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
