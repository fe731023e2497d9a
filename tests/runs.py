"""A small finetuning run on the digits, for the tests that stop it, start it again and share it out."""

import json
import sys
from pathlib import Path

import torch

from anisodiff.storage import checkpoints

ROOT = Path(__file__).parents[1]
DATASET = {
    "class_conditional": True, "flips": True, "heldout": 64,
    "sigma_data": 0.75, "sigma_min": 0.002, "sigma_max": 80.0, "g_min": 1e-9,
}  # fmt: skip
NETWORK = {
    "model_type": "SongUNet", "model_channels": 8, "channel_mult": [1], "channel_mult_emb": 2, "num_blocks": 1,
    "attn_resolutions": None, "dropout": 0.1,
}  # fmt: skip
RUN = {
    "loss": "tlsm", "kimg": 2.56, "batch": 32, "micro_batch": None,
    "learning_rate": 1e-3, "path_learning_rate": 1e-2, "ramp_kimg": 0.5, "decay": "continuous",
    "ema_kimg": 1.0, "path_ema_kimg": 0.0, "ema_ramp": 0.05, "seed": 3, "save_seconds": 1e-3, "subspaces": "block",
    "schedules": "shared", "label_weights": "equal",
    "c": 1.0, "path_gradient": "full", "probes": 2, "probe_fraction": 0.25, "guard_kimg": 0.5, "guard_tolerance": 10.0,
}  # fmt: skip


def command(start, folder: Path, settings: dict) -> list[str]:
    return [
        sys.executable, "-m", "anisodiff", "finetune", "--dataset", json.dumps(DATASET),
        "--settings", json.dumps(settings), "--network", str(start[0]), "--path", str(start[1]),
        "--images", str(start[2]),
        "--output-network", str(folder / "network.safetensors"), "--output-path", str(folder / "path.safetensors"),
    ]  # fmt: skip


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {f"{kind}/{key}": value for kind in ("network", "path")
            for key, value in checkpoints.read(folder / f"{kind}.safetensors")[0].items()}  # fmt: skip
