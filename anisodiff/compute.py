"""Where and how a stage computes: device, precision of the network's body, compilation."""

import platform
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from anisodiff.errors import StageError
from anisodiff.training import parallel

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
Module = TypeVar("Module", bound=nn.Module)


@dataclass(frozen=True)
class Compute:
    """Device, precision and compilation of a stage.

    Attributes:
        device: as torch names it.
        dtype: precision of the network's body; paths, losses and solvers always run in float32 or better.
        compile: let torch compile the network on its first call.
        threads: of the CPU.
    """

    device: str = "cpu"
    dtype: str = "float32"
    compile: bool = False
    threads: int = 1

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise StageError(f"dtype: {self.dtype!r} is unknown: use one of {', '.join(DTYPES)}")
        if self.device.startswith("mps"):
            raise StageError(f"device: {self.device!r} has no float64, which paths are in: set device to cpu or cuda")
        if self.device.startswith("cuda") and not torch.cuda.is_available():
            raise StageError(f"device: {self.device!r}, but torch sees no GPU here: set device to cpu")

    @property
    def body(self) -> torch.dtype:
        return DTYPES[self.dtype]

    def begin(self) -> "Compute":
        """Set this process's threads, and keep float32 what it says on a GPU (no TF32), with kernels that repeat.

        Returns:
            The same, on this process's own device where torchrun started several.
        """
        torch.set_num_threads(self.threads)
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.deterministic = True
        return replace(self, device=parallel.join(self.device))

    def environment(self) -> dict[str, str | int]:
        """The machine, for the provenance of what is made: host, device by its model, torch, threads."""
        gpu = self.device.startswith("cuda")
        model = torch.cuda.get_device_name(self.device) if gpu else processor()
        return {"host": platform.node(), "device": model, "torch": torch.__version__, "threads": self.threads}

    def prepare(self, network: Module) -> Module:
        """The network on the device: in the memory layout that is fast there, and compiled if that is asked for."""
        network = network.to(self.device)
        if self.device.startswith("cuda"):
            network = network.to(memory_format=torch.channels_last)
        if self.compile:
            network.compile()  # in place: the names of its parameters stay
        return network


CPU = Compute()


def processor() -> str:
    """Model of the CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()
