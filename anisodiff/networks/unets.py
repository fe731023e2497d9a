"""U-Nets that predict the raw output F of EDM's preconditioned denoiser: DDPM++, NCSN++ and ADM.

Karras et al. 2022 (arXiv:2206.00364, Appendix F.2), with the argument, module and parameter names of the published
networks, so that their state dicts load strictly and keep their meaning across code bases. Written afresh.
"""

import math
import types
import typing
from collections.abc import Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from anisodiff.errors import InvalidArgument, one_line
from anisodiff.networks.layers import (
    Conv2d,
    FilteredConv2d,
    FourierEmbedding,
    PositionalEmbedding,
    Resample,
    Resampling,
    UNetBlock,
    initialise,
    norm,
    zeroed,
)
from anisodiff.networks.registry import NETWORKS


class RawNetwork(nn.Module):
    """What the denoiser asks of a network: `F(x, noise_label, labels)`, and the arguments that build it again."""

    config: dict[str, Any]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height, width of its images."""
        return self.config["in_channels"], self.config["img_resolution"], self.config["img_resolution"]

    @property
    def classes(self) -> int:
        """Number of classes; 0 for an unconditional network."""
        return self.config["label_dim"]

    def embedding(self, noise_label: Tensor, labels: Tensor | None, augment_labels: Tensor | None) -> Tensor:
        """`[B, channels]`, in full precision whatever the body runs in."""
        raise NotImplementedError

    def body(self, x: Tensor, emb: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(
        self,
        x: Float[Tensor, "b c h w"],
        noise_label: Float[Tensor, " b"],
        labels: Float[Tensor, "b k"] | None = None,
        augment_labels: Float[Tensor, "b a"] | None = None,
    ) -> Float[Tensor, "b c h w"]:
        """Raw output.

        Args:
            x: noisy images times c_in.
            noise_label: a quarter of the log of sigma.
            labels: one-hot classes; None is no class.
            augment_labels: parameters of training-time augmentations; None, as in sampling, is none.

        Raises:
            InvalidArgument: labels of other classes than the network has.
        """
        if labels is not None and not self.classes:
            raise InvalidArgument(f"labels: {labels.shape[1]} classes for an unconditional network: give none")
        if labels is not None and labels.shape[1] != self.classes:
            raise InvalidArgument(f"labels: {labels.shape[1]} classes for a network of {self.classes}: give its own")
        with torch.autocast(x.device.type, enabled=False):
            emb = self.embedding(noise_label, labels, augment_labels)
        return self.body(x, emb)

    def _kept(self, labels: Tensor) -> Tensor:
        """Labels, of which training drops a share."""
        share = self.config["label_dropout"]
        if not (self.training and share):
            return labels
        return labels * (torch.rand(len(labels), 1, device=labels.device) >= share).to(labels.dtype)


class SongUNet(RawNetwork):
    """DDPM++ (the defaults) and NCSN++ (embedding "fourier", encoder "residual", filter 1-3-3-1, noise width 2).

    Args:
        img_resolution: side of the square image.
        in_channels: image channels.
        out_channels: channels of the output.
        label_dim: number of classes; 0 for an unconditional network.
        augment_dim: width of the augmentation labels; 0 for none.
        model_channels: width at full resolution.
        channel_mult: width at each resolution, in units of `model_channels`; each resolution halves the one before.
        channel_mult_emb: width of the embedding, in units of `model_channels`.
        num_blocks: residual blocks a resolution in the encoder (the decoder has one more).
        attn_resolutions: resolutions with self-attention; the middle always has it, but for None, which is none.
        dropout: probability, while training.
        label_dropout: share of the labels dropped while training.
        embedding_type: of the noise label.
        channel_mult_noise: width of the noise embedding, in units of `model_channels`.
        encoder_type: "standard", or with the downsampled image added ("skip", "residual").
        decoder_type: "standard", or with an output at every resolution ("skip").
        resample_filter: taps of the resampling filter.
    """

    def __init__(
        self,
        img_resolution: int,
        in_channels: int,
        out_channels: int,
        label_dim: int = 0,
        augment_dim: int = 0,
        model_channels: int = 128,
        channel_mult: Sequence[int] = (1, 2, 2, 2),
        channel_mult_emb: int = 4,
        num_blocks: int = 4,
        attn_resolutions: Sequence[int] | None = (16,),
        dropout: float = 0.1,
        label_dropout: float = 0.0,
        embedding_type: Literal["positional", "fourier"] = "positional",
        channel_mult_noise: int = 1,
        encoder_type: Literal["standard", "skip", "residual"] = "standard",
        decoder_type: Literal["standard", "skip"] = "standard",
        resample_filter: Sequence[int] = (1, 1),
    ):
        super().__init__()
        self.config = _config(locals())
        emb, noise = model_channels * channel_mult_emb, model_channels * channel_mult_noise
        fourier = embedding_type == "fourier"
        self.map_noise = FourierEmbedding(noise) if fourier else PositionalEmbedding(noise, True, sines_first=True)
        self.map_label = initialise(nn.Linear(label_dim, noise), 1.0) if label_dim else None
        self.map_augment = initialise(nn.Linear(augment_dim, noise, bias=False), 1.0) if augment_dim else None
        self.map_layer0 = initialise(nn.Linear(noise, emb), 1.0)
        self.map_layer1 = initialise(nn.Linear(emb, emb), 1.0)

        def block(fan_in: int, fan_out: int, attended: bool = False, resample: Resample | None = None) -> UNetBlock:
            return UNetBlock(fan_in, fan_out, emb, resample, int(attended), dropout, resample_filter)

        attended_sides = () if attn_resolutions is None else attn_resolutions
        levels = _levels(img_resolution, model_channels, channel_mult)
        self.enc, self.dec = nn.ModuleDict(), nn.ModuleDict()
        width, auxiliary = model_channels, in_channels
        self.enc[f"{img_resolution}x{img_resolution}_conv"] = Conv2d(in_channels, width, 3)
        skips = [width]
        for level, (side, wide) in levels:
            name = f"{side}x{side}"
            if level > 0:
                self.enc[f"{name}_down"] = block(width, width, resample="down")
                skips.append(width)
                if encoder_type == "skip":
                    self.enc[f"{name}_aux_down"] = Resampling("down", resample_filter)
                    self.enc[f"{name}_aux_skip"] = Conv2d(auxiliary, width, 1)
                if encoder_type == "residual":
                    self.enc[f"{name}_aux_residual"] = FilteredConv2d(auxiliary, width, 3, resample_filter)
                    auxiliary = width
            for index in range(num_blocks):
                self.enc[f"{name}_block{index}"] = block(width, wide, side in attended_sides)
                skips.append(width := wide)
        for level, (side, wide) in reversed(levels):
            name = f"{side}x{side}"
            if level == len(levels) - 1:
                self.dec[f"{name}_in0"] = block(width, width, attn_resolutions is not None)
                self.dec[f"{name}_in1"] = block(width, width)
            else:
                self.dec[f"{name}_up"] = block(width, width, resample="up")
            for index in range(num_blocks + 1):
                attended = index == num_blocks and side in attended_sides
                self.dec[f"{name}_block{index}"] = block(width + skips.pop(), wide, attended)
                width = wide
            if decoder_type == "skip" or level == 0:
                if decoder_type == "skip" and level < len(levels) - 1:
                    self.dec[f"{name}_aux_up"] = Resampling("up", resample_filter)
                self.dec[f"{name}_aux_norm"] = norm(width, 1e-6)
                self.dec[f"{name}_aux_conv"] = Conv2d(width, out_channels, 3, gain=1e-5)

    def embedding(self, noise_label: Tensor, labels: Tensor | None, augment_labels: Tensor | None) -> Tensor:
        emb = self.map_noise(noise_label)
        if self.map_label is not None and labels is not None:
            emb = emb + self.map_label(self._kept(labels) * math.sqrt(self.classes))
        elif self.map_label is not None:
            emb = emb + self.map_label.bias  # no class: a label of zeros
        if self.map_augment is not None and augment_labels is not None:
            emb = emb + self.map_augment(augment_labels)
        return functional.silu(self.map_layer1(functional.silu(self.map_layer0(emb))))

    def body(self, x: Tensor, emb: Tensor) -> Tensor:
        skips, image = [], x
        for name, layer in self.enc.items():
            if name.endswith("aux_down"):
                image = layer(image)
            elif name.endswith("aux_skip"):
                x = skips[-1] = x + layer(image)
            elif name.endswith("aux_residual"):
                x = skips[-1] = image = (x + layer(image)) * math.sqrt(0.5)
            else:
                x = layer(x, emb) if isinstance(layer, UNetBlock) else layer(x)
                skips.append(x)
        output, normed = None, None
        for name, layer in self.dec.items():
            if name.endswith("aux_up"):
                output = layer(output)
            elif name.endswith("aux_norm"):
                normed = functional.silu(layer(x))
            elif name.endswith("aux_conv"):
                output = layer(normed) if output is None else output + layer(normed)
            else:
                x = torch.cat([x, skips.pop()], dim=1) if "_block" in name else x
                x = layer(x, emb)
        if output is None:
            raise InvalidArgument("network: its decoder has no output")
        return output


class DhariwalUNet(RawNetwork):
    """ADM (Dhariwal and Nichol 2021), as EDM builds it.

    Args:
        img_resolution: side of the square image.
        in_channels: image channels.
        out_channels: channels of the output.
        label_dim: number of classes; 0 for an unconditional network.
        augment_dim: width of the augmentation labels; 0 for none.
        model_channels: width at full resolution.
        channel_mult: width at each resolution, in units of `model_channels`; each resolution halves the one before.
        channel_mult_emb: width of the embedding, in units of `model_channels`.
        num_blocks: residual blocks a resolution in the encoder (the decoder has one more).
        attn_resolutions: resolutions with self-attention, 64 channels a head.
        dropout: probability, while training.
        label_dropout: share of the labels dropped while training.
    """

    def __init__(
        self,
        img_resolution: int,
        in_channels: int,
        out_channels: int,
        label_dim: int = 0,
        augment_dim: int = 0,
        model_channels: int = 192,
        channel_mult: Sequence[int] = (1, 2, 3, 4),
        channel_mult_emb: int = 4,
        num_blocks: int = 3,
        attn_resolutions: Sequence[int] = (32, 16, 8),
        dropout: float = 0.1,
        label_dropout: float = 0.0,
    ):
        super().__init__()
        self.config = _config(locals())
        emb = model_channels * channel_mult_emb
        self.map_noise = PositionalEmbedding(model_channels, endpoint=False, sines_first=False)
        self.map_augment = zeroed(nn.Linear(augment_dim, model_channels, bias=False)) if augment_dim else None
        self.map_layer0 = nn.Linear(model_channels, emb)
        self.map_layer1 = nn.Linear(emb, emb)
        self.map_label = nn.Linear(label_dim, emb, bias=False) if label_dim else None
        if self.map_label is not None:
            nn.init.normal_(self.map_label.weight)

        def block(fan_in: int, fan_out: int, attended: bool = False, resample: Resample | None = None) -> UNetBlock:
            return UNetBlock(fan_in, fan_out, emb, resample, fan_out // 64 * attended, dropout, adm=True)

        levels = _levels(img_resolution, model_channels, channel_mult)
        self.enc, self.dec = nn.ModuleDict(), nn.ModuleDict()
        width = levels[0][1][1]
        self.enc[f"{img_resolution}x{img_resolution}_conv"] = Conv2d(in_channels, width, 3, "torch")
        skips = [width]
        for level, (side, wide) in levels:
            if level > 0:
                self.enc[f"{side}x{side}_down"] = block(width, width, resample="down")
                skips.append(width)
            for index in range(num_blocks):
                self.enc[f"{side}x{side}_block{index}"] = block(width, wide, side in attn_resolutions)
                skips.append(width := wide)
        for level, (side, wide) in reversed(levels):
            if level == len(levels) - 1:
                self.dec[f"{side}x{side}_in0"] = block(width, width, True)
                self.dec[f"{side}x{side}_in1"] = block(width, width)
            else:
                self.dec[f"{side}x{side}_up"] = block(width, width, resample="up")
            for index in range(num_blocks + 1):
                self.dec[f"{side}x{side}_block{index}"] = block(width + skips.pop(), wide, side in attn_resolutions)
                width = wide
        self.out_norm = norm(width, 1e-5)
        self.out_conv = zeroed(Conv2d(width, out_channels, 3, "torch"))

    def embedding(self, noise_label: Tensor, labels: Tensor | None, augment_labels: Tensor | None) -> Tensor:
        emb = self.map_noise(noise_label)
        if self.map_augment is not None and augment_labels is not None:
            emb = emb + self.map_augment(augment_labels)
        emb = self.map_layer1(functional.silu(self.map_layer0(emb)))
        if self.map_label is not None and labels is not None:
            emb = emb + self.map_label(self._kept(labels))
        return functional.silu(emb)

    def body(self, x: Tensor, emb: Tensor) -> Tensor:
        skips = []
        for layer in self.enc.values():
            x = layer(x, emb) if isinstance(layer, UNetBlock) else layer(x)
            skips.append(x)
        for name, layer in self.dec.items():
            x = layer(torch.cat([x, skips.pop()], dim=1) if "_block" in name else x, emb)
        return self.out_conv(functional.silu(self.out_norm(x)))


def _levels(img_resolution: int, model_channels: int, channel_mult: Sequence[int]) -> list[tuple[int, tuple[int, int]]]:
    """Depth of each resolution of a U-Net, with its side and width."""
    return [(level, (img_resolution >> level, model_channels * mult)) for level, mult in enumerate(channel_mult)]


def _config(arguments: dict[str, Any]) -> dict[str, Any]:
    """Constructor arguments as JSON."""
    own = {key: value for key, value in arguments.items() if key not in ("self", "__class__")}
    return {key: list(value) if isinstance(value, (tuple, list)) else value for key, value in own.items()}


LARGEST = 2**20  # of a whole number among the arguments
LONGEST = 64  # list among them
LARGEST_SIDE = 2048  # of images: a basis of a side's length has as many rows


def _fits(value: Any, hint: Any) -> bool:
    """Whether an argument is what the constructor's annotation says; numbers that are not whole are probabilities."""
    if hint is None or hint is types.NoneType:
        return value is None
    if isinstance(value, bool):
        return False
    if hint is int:
        return isinstance(value, int) and 0 <= value <= LARGEST
    if hint is float:
        return isinstance(value, (int, float)) and 0 <= value <= 1
    kinds = typing.get_args(hint)
    if typing.get_origin(hint) is Literal:
        return isinstance(value, str) and value in kinds
    if typing.get_origin(hint) is Sequence:
        return (
            isinstance(value, (list, tuple)) and len(value) <= LONGEST and all(_fits(each, kinds[0]) for each in value)
        )
    return any(_fits(value, kind) for kind in kinds)  # a union


def _check_arguments(model_type: str, arguments: dict[str, Any]) -> None:
    """Refuse a type and arguments that no network has."""
    if not isinstance(model_type, str) or model_type not in NETWORKS:
        raise InvalidArgument(f"network: {model_type!r:.60} is unknown: use one of {', '.join(NETWORKS)}")
    hints = typing.get_type_hints(NETWORKS[model_type].load().__init__)
    for name, value in arguments.items():
        if name in hints and not _fits(value, hints[name]):
            raise InvalidArgument(f"network: {name} is {value!r:.60}, which no network has")
    if arguments.get("img_resolution", 0) > LARGEST_SIDE:
        raise InvalidArgument(f"network: img_resolution is {arguments['img_resolution']}: use {LARGEST_SIDE} or less")


def build(model_type: str, **arguments: Any) -> RawNetwork:
    """A network with random weights.

    Args:
        model_type: "SongUNet" or "DhariwalUNet".
        arguments: of its constructor.

    Raises:
        InvalidArgument: an unknown type, or arguments that it does not have or that no network can have.
    """
    _check_arguments(model_type, arguments)
    try:
        network = NETWORKS[model_type].load()(**arguments)
    except (TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        raise InvalidArgument(f"network: {one_line(error)}") from error
    network.config["model_type"] = model_type
    return network


def restore(tensors: dict[str, Tensor], model_type: str, **arguments: Any) -> RawNetwork:
    """A network with these weights. What its arguments ask for is made only if the weights are of that number and size.

    Args:
        tensors: its state dict.
        model_type: see `build`.
        arguments: of its constructor.

    Raises:
        InvalidArgument: the arguments and the weights do not fit, or a weight is NaN or infinite.
    """
    _check_arguments(model_type, arguments)
    levels, blocks = len(arguments.get("channel_mult", [1])), arguments.get("num_blocks", 1)
    # every block has tensors: seen before a million of them are set up, even without memory
    if levels * max(1, blocks) > len(tensors):
        raise InvalidArgument(f"network: {blocks} blocks at {levels} resolutions do not fit its {len(tensors)} tensors")
    with torch.device("meta"):  # sizes without memory
        asked = {name: tuple(each.shape) for name, each in build(model_type, **arguments).state_dict().items()}
    held = {name: tuple(each.shape) for name, each in tensors.items()}
    if asked != held:
        name = min(name for name in asked.keys() | held.keys() if asked.get(name) != held.get(name))
        raise InvalidArgument(
            f"network: its arguments and its tensors do not fit ({name:.60} is {held.get(name, 'missing')}, "
            f"and should be {asked.get(name, 'none')})"
        )
    for name, each in tensors.items():
        if not each.isfinite().all():
            raise InvalidArgument(f"network: {name} holds NaN or infinite weights")
    network = build(model_type, **arguments)
    network.load_state_dict(tensors)
    return network
