"""U-Nets that predict the raw output F of EDM's preconditioned denoiser.

The module and parameter names are those of the published DDPM++ networks ("SongUNet", Karras et al. 2022,
arXiv:2206.00364, Appendix F.2), so that state dicts keep their meaning across code bases. Written afresh.
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional


class PositionalEmbedding(nn.Module):
    """Sines and cosines of the noise label at geometrically spaced frequencies, `[B]` -> `[B, channels]`."""

    def __init__(self, channels: int, max_positions: float = 10_000.0):
        super().__init__()
        exponents = torch.arange(channels // 2, dtype=torch.float32) / (channels // 2 - 1)
        self.register_buffer("freqs", max_positions**-exponents, persistent=False)

    def forward(self, label: Tensor) -> Tensor:
        angles = label[:, None] * self.freqs.to(label.dtype)
        return torch.cat([angles.sin(), angles.cos()], dim=1)


def _initialised(layer: nn.Module, gain: float = 1.0) -> nn.Module:
    """Xavier-uniform weights times `gain`, zero bias."""
    nn.init.xavier_uniform_(layer.weight)
    with torch.no_grad():
        layer.weight.mul_(gain)
        layer.bias.zero_()
    return layer


def _conv(fan_in: int, fan_out: int, kernel: int, gain: float = 1.0) -> nn.Module:
    return _initialised(nn.Conv2d(fan_in, fan_out, kernel, padding=kernel // 2), gain)


def _norm(channels: int) -> nn.Module:
    return nn.GroupNorm(min(32, channels // 4), channels, eps=1e-6)


class UNetBlock(nn.Module):
    """Residual block with optional resampling by two and optional self-attention.

    Args:
        fan_in: input channels.
        fan_out: output channels.
        emb: channels of the noise and label embedding.
        resample: "up", "down" or None.
        heads: attention heads; 0 leaves attention out.
        dropout: probability, while training.
    """

    def __init__(
        self, fan_in: int, fan_out: int, emb: int, resample: str | None = None, heads: int = 0, dropout: float = 0.0
    ):
        super().__init__()
        self.resample, self.heads, self.dropout = resample, heads, dropout
        self.norm0 = _norm(fan_in)
        self.conv0 = _conv(fan_in, fan_out, 3)
        self.affine = _initialised(nn.Linear(emb, fan_out))
        self.norm1 = _norm(fan_out)
        self.conv1 = _conv(fan_out, fan_out, 3, gain=1e-5)
        self.skip = _conv(fan_in, fan_out, 1) if fan_in != fan_out or resample else None
        if heads:
            self.norm2 = _norm(fan_out)
            self.qkv = _conv(fan_out, 3 * fan_out, 1, gain=math.sqrt(0.2))
            self.proj = _conv(fan_out, fan_out, 1, gain=1e-5)

    def _resampled(self, x: Tensor) -> Tensor:
        if self.resample == "down":
            return functional.avg_pool2d(x, 2)
        if self.resample == "up":
            return functional.interpolate(x, scale_factor=2, mode="nearest")
        return x

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.conv0(self._resampled(functional.silu(self.norm0(x))))
        h = functional.silu(self.norm1(h + self.affine(emb)[:, :, None, None]))
        h = self.conv1(functional.dropout(h, self.dropout, self.training))
        x = self._resampled(x)
        x = (h + (x if self.skip is None else self.skip(x))) * math.sqrt(0.5)
        return self._attended(x) if self.heads else x

    def _attended(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        qkv = self.qkv(self.norm2(x)).reshape(batch, self.heads, channels // self.heads, 3, height * width)
        q, k, v = qkv.transpose(2, 4).unbind(3)
        a = functional.scaled_dot_product_attention(q, k, v).transpose(2, 3).reshape(x.shape)
        return (self.proj(a) + x) * math.sqrt(0.5)


class UNet(nn.Module):
    """A DDPM++-style U-Net: raw output F of the input scaled by c_in, the noise label and the class.

    Args:
        image_size: side of the square image.
        channels: image channels.
        classes: number of classes; 0 for an unconditional network.
        model_channels: width at full resolution.
        channel_mult: width at each resolution, in units of `model_channels`; each resolution halves the one before.
        emb_mult: width of the embedding, in units of `model_channels`.
        num_blocks: residual blocks a resolution in the encoder (the decoder has one more).
        attention: resolutions with self-attention.
        dropout: probability, while training.
    """

    def __init__(
        self,
        image_size: int,
        channels: int,
        classes: int = 0,
        model_channels: int = 128,
        channel_mult: Sequence[int] = (2, 2, 2),
        emb_mult: int = 4,
        num_blocks: int = 4,
        attention: Sequence[int] = (16,),
        dropout: float = 0.1,
    ):
        super().__init__()
        self.config = {
            "image_size": image_size,
            "channels": channels,
            "classes": classes,
            "model_channels": model_channels,
            "channel_mult": list(channel_mult),
            "emb_mult": emb_mult,
            "num_blocks": num_blocks,
            "attention": list(attention),
            "dropout": dropout,
        }
        emb = model_channels * emb_mult
        self.map_noise = PositionalEmbedding(model_channels)
        self.map_label = _initialised(nn.Linear(classes, model_channels)) if classes else None
        self.map_layer0 = _initialised(nn.Linear(model_channels, emb))
        self.map_layer1 = _initialised(nn.Linear(emb, emb))

        def block(fan_in: int, fan_out: int, resolution: int, resample: str | None = None) -> UNetBlock:
            heads = 1 if resolution in attention and resample is None else 0
            return UNetBlock(fan_in, fan_out, emb, resample, heads, dropout)

        widths = [model_channels * mult for mult in channel_mult]
        sides = [image_size >> level for level in range(len(widths))]
        self.enc, self.dec = nn.ModuleDict(), nn.ModuleDict()
        width, skips = model_channels, [model_channels]
        self.enc[f"{image_size}x{image_size}_conv"] = _conv(channels, model_channels, 3)
        for level, (side, wide) in enumerate(zip(sides, widths, strict=True)):
            if level > 0:
                self.enc[f"{side}x{side}_down"] = block(width, width, side, "down")
                skips.append(width)
            for index in range(num_blocks):
                self.enc[f"{side}x{side}_block{index}"] = block(width, wide, side)
                skips.append(width := wide)
        for level, (side, wide) in reversed(list(enumerate(zip(sides, widths, strict=True)))):
            if level == len(sides) - 1:
                self.dec[f"{side}x{side}_in0"] = UNetBlock(width, width, emb, None, int(bool(attention)), dropout)
                self.dec[f"{side}x{side}_in1"] = UNetBlock(width, width, emb, None, 0, dropout)
            else:
                self.dec[f"{side}x{side}_up"] = block(width, width, side, "up")
            for index in range(num_blocks + 1):
                # attention closes a resolution in the decoder, as in the published networks
                last = side if index == num_blocks else 0
                self.dec[f"{side}x{side}_block{index}"] = block(width + skips.pop(), wide, last)
                width = wide
        self.dec[f"{image_size}x{image_size}_aux_norm"] = _norm(width)
        self.dec[f"{image_size}x{image_size}_aux_conv"] = _conv(width, channels, 3, gain=1e-5)

    def forward(
        self,
        x: Float[Tensor, "b c h w"],
        noise_label: Float[Tensor, " b"],
        labels: Float[Tensor, "b k"] | None = None,
    ) -> Float[Tensor, "b c h w"]:
        emb = self.map_noise(noise_label)
        if self.map_label is not None and labels is not None:
            emb = emb + self.map_label(labels * math.sqrt(self.map_label.in_features))
        emb = functional.silu(self.map_layer0(emb))
        emb = functional.silu(self.map_layer1(emb))
        skips = []
        for layer in self.enc.values():
            x = layer(x, emb) if isinstance(layer, UNetBlock) else layer(x)
            skips.append(x)
        for name, layer in self.dec.items():
            if "_block" in name:
                x = torch.cat([x, skips.pop()], dim=1)
            if isinstance(layer, UNetBlock):
                x = layer(x, emb)
            elif name.endswith("aux_norm"):
                x = functional.silu(layer(x))
            else:
                x = layer(x)
        return x
