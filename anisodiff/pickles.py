"""Pickles read without running them: EDM's published networks, and CIFAR's batches.

Unpickling calls whatever the file names. Here every name is looked up in a list of harmless stand-ins and anything else
is refused, so a file can build dicts, lists, numbers, arrays and tensors, and nothing more. EDM's files carry Python
source, which its own loader runs; here it is dropped unread.
"""

import collections
import io
import math
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from anisodiff.files import StageError

MALFORMED = (
    pickle.UnpicklingError, EOFError, MemoryError, OverflowError, RecursionError, AttributeError, LookupError,
    TypeError, ValueError, RuntimeError,
)  # fmt: skip


@dataclass
class Persistent:
    """What EDM's persistence records of an object, less the source: the name of its class, and its attributes."""

    class_name: str
    state: dict[str, Any]


def _fresh_names(where: str) -> dict[tuple[str, str], Any]:
    """Stand-ins for the names that a file may use. Made anew for every file, so that none can reach the next."""

    class Module:
        """A torch container without its code: its attributes alone."""

        def __setstate__(self, state: dict[str, Any]) -> None:
            self.state = dict(state)

    class DType:
        def __init__(self, name: str = "", *_: Any):
            self.type = np.dtype(str(name))
            if self.type.hasobject:
                raise StageError(f"{where}: holds an array of Python objects: refused")

        def __setstate__(self, state: tuple) -> None:
            if state[1] in ("<", ">"):
                self.type = self.type.newbyteorder(state[1])

    class Array:
        """Turned into an array of its own in `plain`."""

        value: np.ndarray | None = None

        def __setstate__(self, state: tuple) -> None:
            _, shape, dtype, fortran, content = state
            flat = np.frombuffer(content.encode("latin1") if isinstance(content, str) else content, dtype.type)
            self.value = flat.reshape(shape, order="F" if fortran else "C").copy()

    class EasyDict(dict):
        pass

    def persistent(meta: dict[str, Any]) -> Persistent:
        if meta.get("type") != "class":
            raise StageError(f"{where}: holds a persistent {meta.get('type')!r}: refused")
        return Persistent(str(meta["class_name"]), dict(meta["state"]))

    def storage(content: bytes) -> Any:
        try:
            return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        except (*MALFORMED, OSError) as error:
            raise StageError(f"{where}: holds a tensor that is not one ({str(error).splitlines()[0]})") from error

    def tensor(stored: Any, offset: int, size: tuple, stride: tuple, *_: Any) -> Tensor:
        if not isinstance(stored, torch.storage.TypedStorage) or math.prod(size) > stored._size():
            raise StageError(f"{where}: holds a tensor of {size} that its storage does not: the file is corrupt")
        return torch._utils._rebuild_tensor(stored, offset, size, stride)

    names: dict[tuple[str, str], Any] = {
        ("collections", "OrderedDict"): collections.OrderedDict,
        ("dnnlib.util", "EasyDict"): EasyDict,
        ("torch_utils.persistence", "_reconstruct_persistent_obj"): persistent,
        ("torch.nn.modules.container", "ModuleDict"): Module,
        ("torch.nn.modules.container", "ModuleList"): Module,
        ("torch._utils", "_rebuild_tensor_v2"): tensor,
        ("torch._utils", "_rebuild_parameter"): lambda data, *_: data,
        ("torch.storage", "_load_from_bytes"): storage,
        ("_codecs", "encode"): lambda text, *_: text.encode("latin1"),
        ("numpy", "dtype"): DType,
        ("numpy", "ndarray"): Array,
    }
    for module in ("numpy.core.multiarray", "numpy._core.multiarray"):  # before and since NumPy 2
        names[module, "_reconstruct"] = lambda *_: Array()
        names[module, "scalar"] = lambda dtype, content: np.frombuffer(content, dtype.type)[0].item()
    return names


class _Restricted(pickle.Unpickler):
    def __init__(self, content: bytes, where: str, **options: Any):
        super().__init__(io.BytesIO(content), **options)
        self.where, self.names = where, _fresh_names(where)

    def find_class(self, module: str, name: str) -> Callable:
        if (module, name) not in self.names:
            raise StageError(f"{self.where}: asks for {module}.{name}, which no checkpoint needs: refused, not run")
        return self.names[module, name]


def load_plain(content: bytes, where: str) -> Any:
    """The containers, numbers, strings, arrays and tensors of a pickle.

    Args:
        content: the pickle.
        where: its name, for messages.

    Raises:
        StageError: it is malformed, or names something that is not on the list.
    """
    try:
        return _plain(_Restricted(content, where, encoding="latin1").load())
    except MALFORMED as error:
        lines = str(error).splitlines() or [type(error).__name__]
        raise StageError(f"{where}: not a readable pickle ({lines[0]}): fetch the file again") from error


def _plain(node: Any) -> Any:
    """Arrays for their stand-ins, throughout the containers."""
    if isinstance(node, dict):
        return {key: _plain(value) for key, value in node.items()}
    if isinstance(node, (list, tuple)):
        return type(node)(_plain(each) for each in node)
    return getattr(node, "value", node) if type(node).__name__ == "Array" else node


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
        return EdmNetwork(raw.class_name, arguments, dict(_tensors(raw, "")), sigma_data)
    except (*MALFORMED,) as error:
        raise StageError(f"{path}: holds no EDM network ({error!r}): fetch the file again") from error


def _arguments(raw: Persistent) -> dict[str, Any]:
    positional = ("img_resolution", "in_channels", "out_channels", "label_dim", "augment_dim", "model_channels")
    given = raw.state["_init_args"]
    if len(given) > len(positional):
        raise ValueError(f"{len(given)} positional arguments")
    return dict(zip(positional, given, strict=False)) | dict(raw.state["_init_kwargs"])


def _tensors(module: Any, prefix: str) -> collections.abc.Iterator[tuple[str, Tensor]]:
    """The state dict of a module: parameters and persistent buffers, in depth."""
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
            yield from _tensors(child, f"{prefix}{name}.")
