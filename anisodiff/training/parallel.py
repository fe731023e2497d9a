"""Processes that train together under torchrun, a GPU each: their meeting, and what they must agree on.

Alone, a process is rank 0 of one, and nothing here does anything. Images are shared out in fixed pieces of the batch
(see `training.train`), so that the number of ranks changes no result but for the order of a sum.
"""

import os
from collections.abc import Iterable
from typing import TypeVar

import torch
from torch import Tensor, distributed, nn

Plain = TypeVar("Plain")


def join(device: str) -> str:
    """Meet the other ranks, if there are any; the device of this one."""
    if "LOCAL_RANK" not in os.environ:
        return device
    if device.startswith("cuda"):
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    if not distributed.is_initialized():
        distributed.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    return device


def leave() -> None:
    """Wait for the other ranks to come here, and part."""
    if distributed.is_initialized():
        distributed.barrier()
        distributed.destroy_process_group()


def size() -> int:
    """Number of ranks."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def rank() -> int:
    """This process among them; 0 writes files."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def sum_gradients(parameters: Iterable[nn.Parameter], loss: Tensor) -> Tensor:
    """Sum gradients (in place) and a loss over all ranks; the sum of the losses."""
    if size() == 1:
        return loss
    loss = loss.clone()
    by_type: dict[torch.dtype, list[Tensor]] = {}
    for gradient in [parameter.grad for parameter in parameters if parameter.grad is not None] + [loss]:
        by_type.setdefault(gradient.dtype, []).append(gradient)
    for gradients in by_type.values():
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        distributed.all_reduce(flat)
        for gradient, summed in zip(gradients, flat.split([each.numel() for each in gradients]), strict=True):
            gradient.copy_(summed.view_as(gradient))
    return loss


def of_first(value: Plain) -> Plain:
    """Rank 0's value of something small, for all."""
    if size() == 1:
        return value
    shared = [value]
    distributed.broadcast_object_list(shared)
    return shared[0]


def any_rank(flag: bool, device: str) -> bool:
    """Whether any rank says so."""
    if size() == 1:
        return flag
    said = torch.tensor([float(flag)], device=device)
    distributed.all_reduce(said)
    return bool(said.item())
