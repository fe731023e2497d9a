"""A small class-conditional network over EDM's path on any subspaces."""

import torch

from anisodiff.denoiser import Denoiser
from anisodiff.networks.unets import SongUNet
from anisodiff.paths.noise_path import NoisePath
from anisodiff.paths.schedules import KnotSchedule, karras_logs
from anisodiff.paths.subspaces import Subspaces, partition

SIGMA_DATA = 0.7


def network() -> SongUNet:
    torch.manual_seed(0)
    net = SongUNet(
        8, 2, 2, label_dim=3, model_channels=8, channel_mult=(1, 2), num_blocks=1, attn_resolutions=(4,), dropout=0.0
    )
    for parameter in net.parameters():  # the output layers start at almost nothing
        torch.nn.init.normal_(parameter, std=0.2)
    return net.double().eval()


def denoiser(kind: str, weights: torch.Tensor | None = None) -> Denoiser:
    subspaces = Subspaces(partition(8, kind))
    logs = karras_logs(8, 1e-9, 0.002, 80.0).expand(subspaces.count, -1)
    return Denoiser(network(), NoisePath(subspaces, KnotSchedule(logs), weights), SIGMA_DATA)
