"""A GPU that is pretended: tensors said to be on it are on the CPU, and what a real one refuses is refused.

A tensor's storage is on one device or the other, as a real one's is; an operation takes tensors of one device, but for
scalars of the CPU, and its result is there. So a path of the code that mixes devices fails here, where there is no GPU.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
MOVING = (Tensor.copy_, Tensor.data.__set__, Tensor.grad.__set__, torch._has_compatible_shallow_copy_type)
INDEXING = (Tensor.__getitem__, Tensor.__setitem__)


def _tensors(given: Any) -> Iterator[Tensor]:
    """All tensors in nested arguments or results."""
    if isinstance(given, Tensor):
        yield given
    elif isinstance(given, dict):
        yield from _tensors(list(given.values()))
    elif isinstance(given, list | tuple):
        for each in given:
            yield from _tensors(each)


def _storage(tensor: Tensor) -> torch.UntypedStorage:
    """The storage below torch.func's wrappers."""
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor.untyped_storage()


class PretendGpu(TorchFunctionMode):
    """Inside the block, "cuda" is a device of its own.

    Raises:
        RuntimeError: an operation mixes devices, as torch does on a GPU.
    """

    def __init__(self) -> None:
        super().__init__()
        self.there: dict[int, StorageWeakRef] = {}  # held, so that no other storage gets the address

    def is_there(self, tensor: Tensor) -> bool:
        return _storage(tensor)._cdata in self.there

    def mark(self, results: Any) -> Any:
        """Put results there."""
        for each in _tensors(results):
            storage = _storage(each)
            self.there[storage._cdata] = StorageWeakRef(storage)
        return results

    def moved(self, tensor: Tensor, device: torch.device) -> Tensor:
        if self.is_there(tensor) == (device.type == "cuda"):
            return tensor
        copied = tensor.clone()
        return self.mark(copied) if device.type == "cuda" else copied

    def __torch_function__(self, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func == Tensor.device.__get__:
            return GPU if self.is_there(args[0]) else CPU
        if func == Tensor.is_cuda.__get__:
            return self.is_there(args[0])
        if func in (Tensor.to, Tensor.cpu, Tensor.cuda):
            return self._to(func, args, kwargs)
        if func in (Tensor.numpy, Tensor.__array__) and self.is_there(args[0]):
            raise TypeError("can't convert a tensor on cuda to numpy")
        wanted = kwargs.pop("device", None)
        if wanted is not None:
            return self._made(func, args, kwargs, torch.device(wanted))
        given = list(_tensors((args, kwargs)))
        on_gpu = any(map(self.is_there, given))
        self._check(func, args, kwargs, given, on_gpu)
        result = func(*args, **kwargs)
        if func in MOVING:
            return result
        return self.mark(result) if on_gpu else result

    def _to(self, func: Callable, args: Any, kwargs: dict[str, Any]) -> Tensor:
        """Move, and convert."""
        tensor, *others = args
        device = {Tensor.cpu: CPU, Tensor.cuda: GPU}.get(func)
        if func is Tensor.to:
            chosen = kwargs.pop("device", None)
            kept = []
            for each in others:
                if isinstance(each, str | torch.device):
                    chosen = each
                elif isinstance(each, Tensor):
                    chosen = GPU if self.is_there(each) else CPU
                    kept.append(each.dtype)
                else:
                    kept.append(each)
            device = None if chosen is None else torch.device(chosen)
            on_gpu = self.is_there(tensor)
            dtype = [each for each in kept if isinstance(each, torch.dtype)]
            tensor = tensor.to(*dtype, **kwargs) if dtype or kwargs else tensor
            if on_gpu:
                self.mark(tensor)
        return tensor if device is None else self.moved(tensor, device)

    def _made(self, func: Callable, args: Any, kwargs: dict[str, Any], device: torch.device) -> Any:
        """A tensor that is made on a device, or copied there."""
        generator = kwargs.get("generator")
        if generator is not None and device.type != generator.device.type:
            raise RuntimeError(f"Expected a '{device.type}' device type for generator but found 'cpu'")
        if func in (torch.as_tensor, torch.tensor) and isinstance(args[0], Tensor):
            return self.moved(func(*args, **kwargs), device)
        result = func(*args, **kwargs)
        return self.mark(result) if device.type == "cuda" else result

    def _check(self, func: Callable, args: Any, kwargs: Any, given: list[Tensor], on_gpu: bool) -> None:
        """Refuse what mixes devices."""
        if not on_gpu or func in MOVING:
            return
        if func in INDEXING:  # places may be on the CPU
            given = [args[0], *_tensors(args[2:])]
            if not self.is_there(args[0]):
                raise RuntimeError("indices should be either on cpu or on the same device as the indexed tensor (cpu)")
        if kwargs.get("generator") is not None:
            raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")
        if any(each.dim() > 0 and not self.is_there(each) for each in given):
            name = getattr(func, "__name__", str(func))
            raise RuntimeError(f"{name}: expected all tensors to be on the same device, found cuda:0 and cpu")
