"""Pickles read without running them: EDM's published networks, and CIFAR's batches.

Unpickling calls whatever the file names. Here every name is looked up in a list of harmless stand-ins and anything else
is refused, so a file can build dicts, lists, numbers, arrays and tensors, and nothing more. EDM's files carry Python
source, which its own loader runs; here it is dropped unread.

A small file can also ask for endless work: a memo of billions of entries, containers that hold one another twice on
each of a hundred levels, the same bytes copied again and again. So the unpickler is Python's own in Python, whose memo
is a dict; keys are what hashes at once; shared containers are gone through once; and copies are counted.
"""

import io
import math
import pickle
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from anisodiff.errors import StageError

MALFORMED = (
    pickle.UnpicklingError, EOFError, MemoryError, OverflowError, RecursionError, AttributeError, LookupError,
    TypeError, ValueError, RuntimeError, struct.error,
)  # fmt: skip
MOST_OPERATIONS = 5_000_000  # of the pickle machine; CIFAR-100 takes 0.4 million
STORAGES = {
    "FloatStorage": torch.float32, "DoubleStorage": torch.float64, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
}  # fmt: skip


@dataclass
class Persistent:
    """What EDM's persistence records of an object, less the source: the name of its class, and its attributes."""

    class_name: str
    state: dict[str, Any]


class _Operations(dict):
    """What the pickle machine can do, less what only hostile files need, and no more often than `MOST_OPERATIONS`."""

    REFUSED = (pickle.EXT1, pickle.EXT2, pickle.EXT4, pickle.INST, pickle.OBJ, pickle.NEWOBJ_EX, pickle.LONG4,
               pickle.FROZENSET, pickle.BYTEARRAY8, pickle.NEXT_BUFFER, pickle.READONLY_BUFFER)  # fmt: skip

    def __init__(self):
        super().__init__(pickle._Unpickler.dispatch)
        self.left = MOST_OPERATIONS
        for code in self.REFUSED:
            del self[code[0]]
        self[pickle.SETITEM[0]] = lambda machine: _put(machine, [machine.stack.pop() for _ in range(2)][::-1])
        self[pickle.SETITEMS[0]] = lambda machine: _put(machine, machine.pop_mark())
        self[pickle.DICT[0]] = lambda machine: _put(machine, machine.pop_mark(), onto={})
        self[pickle.ADDITEMS[0]] = _add

    def __getitem__(self, code: int) -> Callable:
        self.left -= 1
        if self.left < 0:
            raise pickle.UnpicklingError(f"more than {MOST_OPERATIONS:,} operations")
        if code not in self:
            raise pickle.UnpicklingError(f"operation {code:#04x} is unknown, or not for checkpoints")
        return super().__getitem__(code)


def _key(key: Any) -> Any:
    if type(key) not in (str, bytes, int):  # the hash of a tuple of tuples can take for ever
        raise pickle.UnpicklingError(f"a key is a {type(key).__name__}")
    return key


def _put(machine: Any, items: list, onto: dict | None = None) -> None:
    """Add keys and values, one after the other, to the dict on top of the stack, or to one that is put there."""
    if onto is not None:
        machine.append(onto)
    for key, value in zip(items[::2], items[1::2], strict=True):
        machine.stack[-1][_key(key)] = value


def _add(machine: Any) -> None:
    items = [_key(each) for each in machine.pop_mark()]
    machine.stack[-1].update(items)


def _is_size(value: Any) -> bool:
    """Whether it is a size or stride of a tensor: a few whole numbers, none of them negative."""
    return type(value) is tuple and len(value) < 9 and all(type(each) is int and each >= 0 for each in value)


def _fresh_names(where: str, length: int) -> dict[tuple[str, str], Any]:
    """Stand-ins for the names that a file may use. Made anew for every file, so that none can reach the next.

    Args:
        where: name of the file, for messages.
        length: of the file in bytes; copies of its parts may be twice that.
    """
    copied = 0

    def copying(size: int) -> None:
        nonlocal copied
        copied += size
        if copied > 2 * length:
            raise StageError(f"{where}: asks for more copies of its parts than a checkpoint has: refused")

    class Module:
        """A torch container without its code: its attributes alone."""

        def __setstate__(self, state: Any) -> None:
            self.state = {**state}

    class DType:
        def __init__(self, name: Any = "", *_: Any):
            self.type = np.dtype(_text(name))
            if self.type.hasobject:
                raise StageError(f"{where}: holds an array of Python objects: refused")

        def __setstate__(self, state: Any) -> None:
            if state[1] in ("<", ">"):
                self.type = self.type.newbyteorder(state[1])

    class Array:
        """Turned into an array of its own in `plain`."""

        value: np.ndarray | None = None

        def __setstate__(self, state: Any) -> None:
            _, shape, dtype, fortran, content = state
            flat = np.frombuffer(encoded(content) if isinstance(content, str) else content, dtype.type)
            copying(flat.nbytes)
            self.value = flat.reshape(shape, order="F" if fortran else "C").copy()

    class EasyDict(dict):
        """Filled by the operations on dicts alone, which look at the keys."""

        def __init__(self):
            super().__init__()

    def encoded(text: Any, *_: Any) -> bytes:
        copying(len(_text(text)))
        return text.encode("latin1")

    def persistent(meta: Any) -> Persistent:
        if _text(meta["type"]) != "class":
            raise StageError(f"{where}: holds a persistent {meta['type']!r:.40}: refused")
        return Persistent(_text(meta["class_name"]), {**meta["state"]})

    def storage(content: Any) -> Tensor:
        copying(len(content))
        try:
            return _storage(content, where)
        except (*MALFORMED, StageError) as error:
            raise StageError(f"{where}: holds a tensor that is not one ({_first_line(error)})") from error

    def tensor(stored: Any, offset: Any, size: Any, stride: Any, *_: Any) -> Tensor:
        whole = isinstance(stored, Tensor) and all(map(_is_size, (size, stride, (offset,))))
        if not whole or math.prod(size) > stored.numel():
            raise StageError(f"{where}: holds a tensor that its storage does not: the file is corrupt")
        return stored.as_strided(size, stride, offset)

    names: dict[tuple[str, str], Any] = {
        ("collections", "OrderedDict"): EasyDict,
        ("dnnlib.util", "EasyDict"): EasyDict,
        ("torch_utils.persistence", "_reconstruct_persistent_obj"): persistent,
        ("torch.nn.modules.container", "ModuleDict"): Module,
        ("torch.nn.modules.container", "ModuleList"): Module,
        ("torch._utils", "_rebuild_tensor_v2"): tensor,
        ("torch._utils", "_rebuild_parameter"): lambda data, *_: data,
        ("torch.storage", "_load_from_bytes"): storage,
        ("_codecs", "encode"): encoded,
        ("numpy", "dtype"): DType,
        ("numpy", "ndarray"): Array,
    }
    for module in ("numpy.core.multiarray", "numpy._core.multiarray"):  # before and since NumPy 2
        names[module, "_reconstruct"] = lambda *_: Array()
        names[module, "scalar"] = lambda dtype, content: np.frombuffer(content, dtype.type)[0].item()
    return names


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"a {type(value).__name__} where a name is due")
    return value


class _Restricted(pickle._Unpickler):  # in Python: the one in C allocates its memo as large as a file says
    def __init__(self, file: io.BytesIO, where: str, names: dict[tuple[str, str], Any], **options: Any):
        super().__init__(file, **options)
        self.where, self.names = where, names
        self.dispatch = _Operations()  # pyright: ignore[reportAttributeAccessIssue] - each counts its own

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.names:
            raise StageError(f"{self.where}: asks for {module}.{name}, which no checkpoint needs: refused, not run")
        return self.names[module, name]

    def persistent_load(self, pid: Any) -> Any:
        if "storage" not in self.names:
            raise pickle.UnpicklingError("an object of another file")
        return pid


def _storage(content: bytes, where: str) -> Tensor:
    """The one storage that `torch.save` wrote in its older format, flat: five pickles, a length, and bytes."""
    file = io.BytesIO(content)
    names: dict[Any, Any] = {("torch", name): each for name, each in STORAGES.items()} | {"storage": True}
    *_, saved, keys = [_Restricted(file, where, names).load() for _ in range(5)]
    dtype = saved[1]
    if not isinstance(dtype, torch.dtype) or len(keys) != 1:
        raise ValueError("not one storage")
    (length,) = struct.unpack("<q", file.read(8))
    values = bytearray(file.read())
    if length != saved[4] or length * dtype.itemsize != len(values):
        raise ValueError(f"{len(values)} bytes where {length} of {dtype} are due")
    return torch.frombuffer(values, dtype=dtype) if values else torch.empty(0, dtype=dtype)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def load_plain(content: bytes, where: str) -> Any:
    """The containers, numbers, strings, arrays and tensors of a pickle.

    Args:
        content: the pickle.
        where: its name, for messages.

    Raises:
        StageError: it is malformed, or names something that is not on the list.
    """
    try:
        names = _fresh_names(where, len(content))
        return _plain(_Restricted(io.BytesIO(content), where, names, encoding="latin1").load(), {})
    except MALFORMED as error:
        raise StageError(f"{where}: not a readable pickle ({_first_line(error)}): fetch the file again") from error


def _plain(node: Any, done: dict[int, Any]) -> Any:
    """Arrays for their stand-ins, throughout the containers; what was done, by its id, stays shared."""
    if id(node) in done:
        return done[id(node)]
    if isinstance(node, dict):
        made = {key: _plain(value, done) for key, value in node.items()}
    elif isinstance(node, (list, tuple)):
        made = type(node)([_plain(each, done) for each in node])
    else:
        made = getattr(node, "value", node) if type(node).__name__ == "Array" else node
    done[id(node)] = made
    return made


@dataclass(frozen=True)
class EdmNetwork:
    """A network read from EDM's pickle.

    Attributes:
        model_type: class of the raw network.
        arguments: that it was built with.
        tensors: its state dict.
        sigma_data: of the preconditioning.
    """

    model_type: str
    arguments: dict[str, Any]
    tensors: dict[str, Tensor]
    sigma_data: float


def load_edm(path: Path | str) -> EdmNetwork:
    """The network in a pickle of NVlabs/edm (entry `ema`), without running anything.

    Raises:
        StageError: it is missing, malformed, hostile, or another kind of model.
    """
    path = Path(path)
    if not path.is_file():
        raise StageError(f"{path}: no such file: check the path")
    loaded = load_plain(path.read_bytes(), str(path))
    denoiser = loaded.get("ema") if isinstance(loaded, dict) else None
    if not isinstance(denoiser, Persistent):
        raise StageError(f"{path}: has no network under 'ema': give a network snapshot of EDM")
    if denoiser.class_name != "EDMPrecond":
        raise StageError(f"{path}: holds a {denoiser.class_name}: only EDM's preconditioning (EDMPrecond) is read")
    try:
        raw = denoiser.state["_modules"]["model"]
        arguments = {key: list(each) if isinstance(each, tuple) else each for key, each in _arguments(raw).items()}
        sigma_data = float(denoiser.state.get("sigma_data", 0.5))
        return EdmNetwork(raw.class_name, arguments, dict(_tensors(raw, "", set())), sigma_data)
    except (*MALFORMED,) as error:
        raise StageError(f"{path}: holds no EDM network ({error!r}): fetch the file again") from error


def _arguments(raw: Persistent) -> dict[str, Any]:
    positional = ("img_resolution", "in_channels", "out_channels", "label_dim", "augment_dim", "model_channels")
    given = raw.state["_init_args"]
    if len(given) > len(positional):
        raise ValueError(f"{len(given)} positional arguments")
    return dict(zip(positional, given, strict=False)) | {**raw.state["_init_kwargs"]}


def _tensors(module: Any, prefix: str, seen: set[int]) -> Iterator[tuple[str, Tensor]]:
    """The state dict of a module: parameters and persistent buffers, in depth; `seen` are ids of modules before it."""
    if id(module) in seen:
        raise ValueError(f"{prefix} is a module that was met before")
    seen.add(id(module))
    state = module.state
    passing = state.get("_non_persistent_buffers_set", ())
    for kind in ("_parameters", "_buffers"):
        for name, value in state[kind].items():
            if value is not None and name not in passing:
                if not isinstance(value, Tensor):
                    raise TypeError(f"{prefix}{name} is no tensor")
                yield prefix + name, value
    for name, child in state["_modules"].items():
        if child is not None:
            yield from _tensors(child, f"{prefix}{name}.", seen)
