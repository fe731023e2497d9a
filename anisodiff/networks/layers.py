"""Layers of EDM's U-Nets (Karras et al. 2022, arXiv:2206.00364, Appendix F.2), with their parameter names.

Written afresh. Parameter and buffer names are those of the published networks, so that their state dicts load strictly.
"""

import math
from collections.abc import Callable, Sequence
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

Resample = Literal["up", "down"]
# how a layer's weights start: Xavier-uniform times a gain with zero bias ("DDPM++"), or torch's default ("ADM")
Gain = float | Literal["torch"]
Weighted = TypeVar("Weighted", bound=nn.Linear | nn.Conv2d)


class PositionalEmbedding(nn.Module):
    """Sines and cosines of the noise label at geometrically spaced frequencies, `[B]` -> `[B, channels]`.

    Args:
        channels: width of the embedding.
        endpoint: let the last frequency be 1/10,000 itself (DDPM++) instead of stopping short of it (ADM).
        sines_first: order of the two halves.
    """

    angular: Tensor

    def __init__(self, channels: int, endpoint: bool, sines_first: bool):
        super().__init__()
        half = channels // 2
        exponents = torch.arange(half, dtype=torch.float32) / (half - int(endpoint))
        self.register_buffer("angular", 10_000.0**-exponents, persistent=False)
        self.sines_first = sines_first

    def forward(self, label: Tensor) -> Tensor:
        return _waves(label[:, None] * self.angular.to(label.dtype), self.sines_first)


class FourierEmbedding(nn.Module):
    """Sines and cosines of the noise label at fixed random frequencies, `[B]` -> `[B, channels]` (NCSN++)."""

    freqs: Tensor

    def __init__(self, channels: int):
        super().__init__()
        self.register_buffer("freqs", torch.randn(channels // 2) * 16)

    def forward(self, label: Tensor) -> Tensor:
        return _waves(label[:, None] * (2 * math.pi * self.freqs.to(label.dtype)), sines_first=True)


def _waves(angles: Tensor, sines_first: bool) -> Tensor:
    halves = (angles.sin(), angles.cos())
    return torch.cat(halves if sines_first else halves[::-1], dim=1)


def initialise(layer: Weighted, gain: Gain) -> Weighted:
    """Weights of a new layer: Xavier-uniform times `gain` and zero bias, or left as torch drew them."""
    if gain != "torch":
        nn.init.xavier_uniform_(layer.weight)
        with torch.no_grad():
            layer.weight.mul_(gain)
            if layer.bias is not None:
                layer.bias.zero_()
    return layer


def zeroed(layer: nn.Module) -> nn.Module:
    """A layer that outputs 0 until it is trained."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


def norm(channels: int, eps: float) -> nn.GroupNorm:
    """Group normalisation with at most 32 groups of at least 4 channels."""
    return nn.GroupNorm(min(32, channels // 4), channels, eps=eps)


def _filter(taps: Sequence[int]) -> Tensor:
    """The separable filter of these taps, sum one, `[1, 1, k, k]`."""
    line = torch.tensor(taps, dtype=torch.float32)
    return torch.outer(line, line)[None, None] / line.sum() ** 2


def _resampled(x: Tensor, resample: Resample | None, kernel: Tensor | None) -> Tensor:
    """Filtered and resampled by two. The box filter has kernels of its own, which are faster."""
    if resample is None or kernel is None:
        return x
    if kernel.shape[-1] == 2:
        return functional.avg_pool2d(x, 2) if resample == "down" else functional.interpolate(x, scale_factor=2)
    each = kernel.to(x.dtype).expand(x.shape[1], 1, -1, -1)
    convolve = functional.conv2d if resample == "down" else functional.conv_transpose2d
    gain = 1 if resample == "down" else 4
    return convolve(x, gain * each, stride=2, padding=(kernel.shape[-1] - 1) // 2, groups=x.shape[1])


class Resampling(nn.Module):
    """Resampling by two with a low-pass filter.

    Args:
        resample: "up" or "down".
        taps: of the separable filter, (1, 1) or (1, 3, 3, 1).
    """

    resample_filter: Tensor

    def __init__(self, resample: Resample, taps: Sequence[int]):
        super().__init__()
        self.resample: Resample = resample
        self.register_buffer("resample_filter", _filter(taps))

    def forward(self, x: Tensor) -> Tensor:
        return _resampled(x, self.resample, self.resample_filter)


class Conv2d(nn.Conv2d):
    """Convolution of an image that is resampled first.

    Args:
        fan_in: input channels.
        fan_out: output channels.
        kernel: side, odd.
        gain: of the initial weights.
        resample: "up", "down" or None.
        taps: of the resampling filter.
    """

    resample_filter: Tensor | None

    def __init__(
        self,
        fan_in: int,
        fan_out: int,
        kernel: int,
        gain: Gain = 1.0,
        resample: Resample | None = None,
        taps: Sequence[int] = (1, 1),
    ):
        super().__init__(fan_in, fan_out, kernel, padding=kernel // 2)
        initialise(self, gain)
        self.resample: Resample | None = resample
        self.register_buffer("resample_filter", _filter(taps) if resample else None)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(_resampled(input, self.resample, self.resample_filter))


class FilteredConv2d(Conv2d):
    """Convolution, then filter and downsampling; the edge is padded once, for both (NCSN++'s residual input)."""

    def __init__(self, fan_in: int, fan_out: int, kernel: int, taps: Sequence[int]):
        super().__init__(fan_in, fan_out, kernel, resample="down", taps=taps)

    def forward(self, input: Tensor) -> Tensor:
        kernel = self.get_buffer("resample_filter")
        padding = self.weight.shape[-1] // 2 + (kernel.shape[-1] - 1) // 2
        x = functional.conv2d(input, self.weight, self.bias, padding=padding)
        each = kernel.to(x.dtype).expand(x.shape[1], 1, -1, -1)
        return functional.conv2d(x, each, stride=2, groups=x.shape[1])


class UNetBlock(nn.Module):
    """Residual block with optional resampling by two and optional self-attention.

    Args:
        fan_in: input channels.
        fan_out: output channels.
        emb: channels of the noise and label embedding.
        resample: "up", "down" or None.
        heads: attention heads; 0 leaves attention out.
        dropout: probability, while training.
        taps: of the resampling filter.
        adm: ADM's variant: the embedding scales and shifts, the skip is resampled without weights, sums are not
            rescaled.
    """

    def __init__(
        self,
        fan_in: int,
        fan_out: int,
        emb: int,
        resample: Resample | None = None,
        heads: int = 0,
        dropout: float = 0.0,
        taps: Sequence[int] = (1, 1),
        adm: bool = False,
    ):
        super().__init__()
        self.heads, self.dropout, self.adaptive = heads, dropout, adm
        self.fan_in, self.fan_out, self.rescale = fan_in, fan_out, 1.0 if adm else math.sqrt(0.5)
        gain, small, eps = ("torch", "torch", 1e-5) if adm else (1.0, 1e-5, 1e-6)
        last: Callable[[nn.Module], nn.Module] = zeroed if adm else nn.Identity()
        self.norm0 = norm(fan_in, eps)
        self.conv0 = Conv2d(fan_in, fan_out, 3, gain, resample, taps)
        self.affine = initialise(nn.Linear(emb, fan_out * (2 if adm else 1)), gain)
        self.norm1 = norm(fan_out, eps)
        self.conv1 = last(Conv2d(fan_out, fan_out, 3, small))
        self.skip = None
        if fan_in != fan_out or (resample and not adm):
            self.skip = Conv2d(fan_in, fan_out, 1, gain, resample, taps)
        elif resample:
            self.skip = Resampling(resample, taps)
        if heads:
            self.norm2 = norm(fan_out, eps)
            self.qkv = Conv2d(fan_out, 3 * fan_out, 1, "torch" if adm else math.sqrt(0.2))
            self.proj = last(Conv2d(fan_out, fan_out, 1, small))

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.conv0(functional.silu(self.norm0(x)))
        shift = self.affine(emb)[:, :, None, None].to(h.dtype)
        if self.adaptive:
            scale, shift = shift.chunk(2, dim=1)
            h = torch.addcmul(shift, self.norm1(h), scale + 1)
        else:
            h = self.norm1(h.add_(shift))
        h = self.conv1(functional.dropout(functional.silu(h), self.dropout, self.training))
        x = h.add_(x if self.skip is None else self.skip(x)).mul_(self.rescale)
        return self._attended(x) if self.heads else x

    def _attended(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        qkv = self.qkv(self.norm2(x)).reshape(batch, self.heads, channels // self.heads, 3, height * width)
        # the fused kernels want each pixel's channels side by side
        q, k, v = qkv.permute(3, 0, 1, 4, 2).contiguous().unbind(0)
        a = functional.scaled_dot_product_attention(q, k, v).transpose(2, 3).reshape(x.shape)
        # in x's memory layout: another one would spread to every convolution from here on
        layout = torch.contiguous_format if x.is_contiguous() else torch.channels_last
        return self.proj(a.contiguous(memory_format=layout)).add_(x).mul_(self.rescale)
