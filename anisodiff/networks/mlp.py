"""A small fully connected network for toys, with the face of the U-Nets."""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from anisodiff.networks.layers import PositionalEmbedding
from anisodiff.networks.unets import RawNetwork

NOISE = 32  # width of the noise label's sines and cosines


class Mlp(RawNetwork):
    """Two hidden layers over all pixels together, each shifted by the embedding of noise label and class.

    Args:
        img_resolution: side of the square image.
        in_channels: image channels.
        label_dim: number of classes; 0 for an unconditional network.
        width: of the hidden layers.
    """

    def __init__(self, img_resolution: int, in_channels: int, label_dim: int = 0, width: int = 96):
        super().__init__()
        self.config = {
            "img_resolution": img_resolution, "in_channels": in_channels, "label_dim": label_dim, "width": width,
        }  # fmt: skip
        dimensions = math.prod(self.shape)
        self.map_noise = PositionalEmbedding(NOISE, endpoint=True, sines_first=True)
        self.embed = nn.Linear(NOISE + label_dim, width)
        self.layers = nn.ModuleList([nn.Linear(dimensions, width), nn.Linear(width, width)])
        self.shifts = nn.ModuleList([nn.Linear(width, width) for _ in self.layers])
        self.last = nn.Linear(width, dimensions)

    def embedding(
        self, noise_label: Tensor, labels: Tensor | None, augment_labels: Tensor | None
    ) -> Float[Tensor, "b e"]:
        emb = self.map_noise(4 * noise_label)  # log sigma
        if self.classes:
            none = emb.new_zeros(len(emb), self.classes)
            emb = torch.cat([emb, none if labels is None else labels.to(emb.dtype)], dim=1)
        return functional.silu(self.embed(emb))

    def body(self, x: Tensor, emb: Tensor) -> Tensor:
        h = x.flatten(1)
        for layer, shift in zip(self.layers, self.shifts, strict=True):
            h = functional.silu(layer(h) + shift(emb))
        return self.last(h).reshape(x.shape)
