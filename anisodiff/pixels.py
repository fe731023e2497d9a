"""Pixels in bytes, and in [-1, 1]."""

import torch
from jaxtyping import Float, UInt8
from torch import Tensor


def to_unit(images: UInt8[Tensor, "..."] | Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Pixels in 0..255 to float32 in [-1, 1]."""
    return images.to(torch.float32) / 127.5 - 1


def to_uint8(x: Float[Tensor, "..."]) -> UInt8[Tensor, "..."]:
    """Float in [-1, 1] to uint8, rounded as EDM does."""
    return (x * 127.5 + 128).clip(0, 255).to(torch.uint8)


def to_grey_scale(x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Float in [-1, 1] to 0..255, not rounded: what feature networks take, with gradients."""
    return x.clip(-1, 1) * 127.5 + 127.5
