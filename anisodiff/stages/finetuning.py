"""The training stages: a base network from nothing, finetuning on a path, and the warp of a path."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from anisodiff.compute import CPU, Compute
from anisodiff.data import image_sets
from anisodiff.errors import StageError, naming
from anisodiff.methods import check_dataset, subspaces_of
from anisodiff.networks.unets import RawNetwork, build
from anisodiff.paths.noise_path import NoisePath, edm_path
from anisodiff.paths.splitting import split_path
from anisodiff.storage import checkpoints
from anisodiff.storage.files import digest, fingerprint, provenance
from anisodiff.training import parallel
from anisodiff.training.jobs import BatchSampler, TrainingJob, network_work, warp_work
from anisodiff.training.loop import ResumeStore, run


def pretrain(
    dataset: dict[str, Any], settings: dict[str, Any], images: Path, output: Path, compute: Compute = CPU
) -> None:
    """Train a base network from random weights with EDM's loss.

    Args:
        dataset: settings of the dataset.
        settings: of the training.
        images: folder of the training images.
        output: the averaged weights.
        compute: where, and in which precision.
    """
    compute = compute.begin()
    batches = BatchSampler(dataset, images, compute.device)
    torch.manual_seed(settings["seed"])
    channels, size, _ = batches.images.shape
    image = {"img_resolution": size, "in_channels": channels, "out_channels": channels}
    network = build(
        label_dim=batches.images.classes if dataset["class_conditional"] else 0, **image, **settings["network"]
    )
    path = edm_path(size)
    _train_network(dataset, settings, network, path, batches, [image_sets.metadata_file(images)], output, None, compute)


def finetune(
    dataset: dict[str, Any],
    settings: dict[str, Any],
    images: Path,
    start_network: Path,
    start_path: Path,
    basis: Path | None,
    output: Path,
    output_path: Path,
    compute: Compute = CPU,
) -> None:
    """Finetune a network, and learn its path where the loss is TLSM.

    Args:
        dataset: settings of the dataset.
        settings: of the run: loss, rates, batch, ...
        images: folder of the training images.
        start_network: weights to start from.
        start_path: path to start from.
        basis: file of principal subspaces, for subspaces "basis:NAME".
        output: the averaged weights (setting `ema_kimg`); kimg counts from the base network.
        output_path: the path as last trained, or its average where `path_ema_kimg` is not 0; with EDM's loss,
            as it was given.
        compute: where, and in which precision.
    """
    compute = compute.begin()
    network, about = checkpoints.load_network(start_network)
    start, path_about = checkpoints.load_path(start_path)
    batches = BatchSampler(dataset, images, compute.device)
    classes = network.classes if settings["schedules"] == "class" else 0
    if settings["schedules"] == "class" and not (classes and dataset["class_conditional"]):
        raise StageError("schedules: one a class needs a class-conditional network and labels: set it to shared")
    subspaces = subspaces_of(settings["subspaces"], network.shape[-1], basis)
    with naming(start_path, "start from a shared path of one subspace"):
        path = split_path(start, subspaces, settings["label_weights"], classes)
    inputs = [image_sets.metadata_file(images), start_network, start_path, *([] if basis is None else [basis])]
    _train_network(dataset, settings, network, path, batches, inputs, output, output_path, compute, about, path_about)


def _train_network(
    dataset: dict[str, Any],
    settings: dict[str, Any],
    network: RawNetwork,
    path: NoisePath,
    batches: BatchSampler,
    inputs: list[Path],
    output: Path,
    output_path: Path | None,
    compute: Compute,
    *abouts: dict[str, Any],
) -> None:
    work = network_work(dataset, settings, network, path, batches, compute)
    training, path = work.training, work.path
    if abouts:
        check_dataset(network, abouts[0], dataset, "network")

    def finish() -> None:
        seen = training.step * work.schedule.batch / 1000
        since_base = {"kimg": 0.0, "device_seconds": 0.0, "pretraining_kimg": seen}
        if abouts:
            spent = training.seconds * parallel.size()
            since_base = {"kimg": abouts[0]["kimg"] + seen}
            since_base["device_seconds"] = abouts[0].get("device_seconds", 0.0) + spent
        about = provenance({"dataset": dataset, "run": settings, "compute": asdict(compute)}, list(abouts))
        about |= since_base | {"seconds": training.seconds, "processes": parallel.size()}
        about |= {"stopped_early": training.stopped_early, "made_on": compute.environment()}
        if output_path is not None:
            learned = training.ema.get("path", path.schedule)
            checkpoints.save_path(output_path, NoisePath(path.subspaces, learned, path.weights), **about)
        checkpoints.save_network(output, training.ema["network"], sigma_data=dataset["sigma_data"], **about)

    _drive(work, settings, inputs, output, compute, finish)


def _drive(
    work: TrainingJob,
    settings: dict[str, Any],
    inputs: list[Path],
    output: Path,
    compute: Compute,
    finish: Callable[[], None],
) -> None:
    """Run to the end from the newest resume state; then rank 0 writes what was made, and drops the states."""
    key = fingerprint(settings | {"dtype": compute.dtype}, [digest(each) for each in inputs])
    store = ResumeStore(output.parent / ".state" / output.stem, key)
    with store.locked():
        store.load(work.training)
        log, device = output.with_suffix(".jsonl"), compute.device
        with naming(output.stem, "train with a lower rate of the path"):
            run(work.records, work.training, work.schedule, store, log, settings["save_seconds"], output.stem, device)
        if parallel.rank() == 0:
            finish()
            store.clear()
    parallel.leave()


def learn_warp(
    dataset: dict[str, Any],
    settings: dict[str, Any],
    images: Path,
    network_file: Path,
    path_file: Path,
    output: Path,
    compute: Compute = CPU,
) -> None:
    """Learn the time warp of a path under a network (paper, Section 5.2).

    The window between two grid points is T/K, or uniform in (0, T/K), with K the setting `steps`. The warp is saved as
    last trained, or averaged where `ema_kimg` is not 0.
    """
    compute = compute.begin()
    network, about = checkpoints.load_network(network_file)
    path, path_about = checkpoints.load_path(path_file)
    check_dataset(network, about, dataset, network_file)
    work = warp_work(dataset, settings, network, path, BatchSampler(dataset, images, compute.device), compute)

    def finish() -> None:
        made = provenance({"dataset": dataset, "warp": settings, "compute": asdict(compute)}, [about, path_about])
        seconds = work.training.seconds
        made |= {"seconds": seconds, "processes": parallel.size(), "made_on": compute.environment()}
        made |= {"device_seconds": seconds * parallel.size()}
        checkpoints.save_warp(output, work.training.ema["warp"], **made)

    inputs = [image_sets.metadata_file(images), network_file, path_file]
    _drive(work, settings, inputs, output, compute, finish)
