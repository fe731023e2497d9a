"""A small finetuning run on the digits, for the tests that stop it, start it again and share it out."""

import sys
from pathlib import Path

import torch

from anisodiff.experiment.settings import (
    ImageSpace,
    MethodSettings,
    NetworkSettings,
    PathSettings,
    RunSettings,
    TrainingSettings,
    WarpSettings,
)
from anisodiff.methods import Method, MethodFiles
from anisodiff.stages.finetuning import TrainingInputs
from anisodiff.storage import checkpoints

ROOT = Path(__file__).parents[1]
SPACE = ImageSpace(class_conditional=True, heldout=64, sigma_data=0.75)
NETWORK = NetworkSettings(
    model_channels=8, channel_mult=[1], channel_mult_emb=2, num_blocks=1, attn_resolutions=None, dropout=0.1
)
RUN = RunSettings(
    start="base", loss="tlsm", kimg=2.56, batch=32, learning_rate=1e-3, path_learning_rate=1e-2, ramp_kimg=0.5,
    ema_kimg=1.0, seed=3, save_seconds=1e-3, subspaces="block", label_weights="equal", probes=2, probe_fraction=0.25,
    guard_kimg=0.5, guard_tolerance=10.0,
)  # fmt: skip
WARP = WarpSettings(
    network="base", path="edm", knots=8,
    **RUN.model_dump(include=set(TrainingSettings.model_fields)),
)  # fmt: skip
EDM = PathSettings(kind="karras", knots=8)


def inputs_of(start) -> TrainingInputs:
    """What a training starts from."""
    network, path, images = start
    return TrainingInputs(images, network, path)


def command(start, folder: Path, settings: RunSettings) -> list[str]:
    return [
        sys.executable, "-m", "anisodiff", "finetune", "--dataset", SPACE.as_json(),
        "--settings", settings.as_json(), "--network", str(start[0]), "--path", str(start[1]),
        "--images", str(start[2]),
        "--output-network", str(folder / "network.safetensors"), "--output-path", str(folder / "path.safetensors"),
    ]  # fmt: skip


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {f"{kind}/{key}": value for kind in ("network", "path")
            for key, value in checkpoints.read(folder / f"{kind}.safetensors")[0].items()}  # fmt: skip


def method_of(start, settings: MethodSettings) -> Method:
    """A method of the base network on EDM's path."""
    return Method(SPACE, settings, MethodFiles(*start[:2]))
