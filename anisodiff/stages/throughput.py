"""How fast this machine samples and trains: what a plan's hours are computed from."""

import copy
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from anisodiff.compute import Compute
from anisodiff.data import image_sets
from anisodiff.denoiser import Denoiser
from anisodiff.experiment.settings import ImageSpace, RunSettings, WarpSettings
from anisodiff.experiment.settings.base import basis_of
from anisodiff.methods import check_dataset, check_images, subspaces_of
from anisodiff.metrics.feature_networks import extractor
from anisodiff.metrics.registry import FeatureFile
from anisodiff.networks.turned import turned_in_planes
from anisodiff.networks.unets import RawNetwork
from anisodiff.paths.noise_path import NoisePath, edm_path
from anisodiff.paths.schedules import ExponentSchedule
from anisodiff.paths.splitting import split_path
from anisodiff.storage import checkpoints
from anisodiff.storage.files import provenance, write_text
from anisodiff.training.jobs import BatchSampler, TrainingJob, network_work, warp_work

SAME_SPEED = {
    "start",
    "path",
    "seed",
    "seeds",
    "kimg",
    "learning_rate",
    "path_learning_rate",
    "basis_learning_rate",
    "ramp_kimg",
    "decay",
    "ema_kimg",
    "ema_ramp",
    "path_ema_kimg",
    "freeze_after",
    "save_seconds",
    "c",
    "label_weights",
    "guard_tolerance",
}  # settings of a run that do not change how long a step takes
WARM_UP = 2


def measure_throughput(
    space: ImageSpace,
    batch: int,
    runs: Mapping[str, RunSettings],
    warps: Mapping[str, WarpSettings],
    images: Path,
    network_file: Path,
    features: FeatureFile,
    output: Path,
    compute: Compute,
    seconds: float = 10.0,
) -> None:
    """Time the denoiser, the feature network and the steps of every kind of training, on real images.

    Args:
        space: what the dataset says of its images.
        batch: images at a time when sampling.
        runs: settings of the runs; those that cost the same are measured once. Principal subspaces count as DCT blocks.
        warps: settings of the warps.
        images: folder of the training images.
        network_file: the base network.
        features: the feature network.
        output: JSON file.
        compute: where, and in which precision.
        seconds: length of each measurement, after two calls that do not count.
    """
    compute = compute.begin()
    network, metadata = checkpoints.load_network(network_file)
    check_dataset(network, metadata, space, network_file)
    loaded = image_sets.load(images)
    check_images(network, loaded.shape, network_file)
    size = network.shape[-1]
    found: dict[str, Any] = {
        "images": len(loaded),
        "shape": list(loaded.shape),
        "network_bytes": Path(network_file).stat().st_size,
    }
    placed, path = compute.prepare(copy.deepcopy(network)), edm_path(size).to(compute.device)
    denoiser = Denoiser(placed, path, space.sigma_data, compute.body)
    x = torch.randn((batch, *network.shape), generator=torch.Generator().manual_seed(0)).to(compute.device)
    g = torch.ones(batch, 1, dtype=torch.float64, device=compute.device)
    labels = torch.eye(network.classes)[torch.arange(batch) % network.classes] if network.classes else None
    labels = None if labels is None else labels.to(compute.device)
    with torch.no_grad():
        calls = _calls_per_second(lambda: denoiser.denoise(x, g, labels), compute.device, seconds)
    found["evaluations_per_second"] = calls * batch
    extract = extractor(*features, compute.device)
    pixels = loaded.take(torch.arange(batch) % len(loaded))[0]
    with torch.no_grad():
        found["features_per_second"] = _calls_per_second(lambda: extract(pixels), compute.device, seconds) * batch

    batches = BatchSampler(space, images, compute.device)

    def images_per_second(work: TrainingJob) -> float:
        return _calls_per_second(lambda: next(work.records), compute.device, seconds) * work.schedule.batch

    measured: dict[str, float] = {}
    found["training_images_per_second"] = {}
    for name, settings in runs.items():
        cost = settings.as_json(SAME_SPEED)
        if cost not in measured:
            fresh, long = copy.deepcopy(network), settings.changed(kimg=1e6)
            fresh = turned_in_planes(fresh, settings.planes, settings.seed) if settings.planes else fresh
            path = _path_of(space, settings, network)
            measured[cost] = images_per_second(network_work(space, long, fresh, path, batches, compute))
        found["training_images_per_second"][name] = measured[cost]
    found["warp_images_per_second"] = {}
    for name, settings in warps.items():
        steps = 9 // 2 if settings.steps == "per_nfe" else settings.steps  # changes nothing of the speed
        long = settings.changed(kimg=1e6, steps=steps)
        work = warp_work(space, long, copy.deepcopy(network), edm_path(size), batches, compute)
        found["warp_images_per_second"][name] = images_per_second(work)
    made = {"environment": compute.environment(), **provenance({"dataset": space, "batch": batch}, [metadata])}
    write_text(output, json.dumps(found | made, indent=1) + "\n")


def _path_of(space: ImageSpace, settings: RunSettings, network: RawNetwork) -> NoisePath:
    """A path as costly as the one that a run learns: EDM's, or where the basis learns one of unequal schedules."""
    kind = "block" if basis_of(settings.subspaces) else settings.subspaces
    subspaces, classes = subspaces_of(kind, network.shape, None), network.classes * (settings.schedules == "class")
    path = split_path(edm_path(network.shape[-1]), subspaces, settings.label_weights, classes)
    if not settings.learn_basis:
        return path
    ends = space.g_min, space.sigma_max**2
    return NoisePath(subspaces, ExponentSchedule(torch.linspace(-1, 1, subspaces.count), ends), path.weights)


def _calls_per_second(call: Callable[[], Any], device: str, seconds: float) -> float:
    def wait() -> None:
        if device.startswith("cuda"):
            torch.cuda.synchronize(device)

    for _ in range(WARM_UP):
        call()
    wait()
    began, calls = time.perf_counter(), 0
    while (spent := time.perf_counter() - began) < seconds or not calls:
        call()
        wait()
        calls += 1
    return calls / spent
