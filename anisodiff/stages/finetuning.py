"""The training stages: a base network from nothing, finetuning on a path, and the warp of a path."""

from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from anisodiff.compute import CPU, Compute
from anisodiff.data import image_sets
from anisodiff.data.augmentation import LABELS
from anisodiff.errors import StageError, naming
from anisodiff.experiment.settings import ImageSpace, PretrainSettings, RunSettings, TrainingSettings, WarpSettings
from anisodiff.methods import check_dataset, check_images, subspaces_of
from anisodiff.networks.turned import Turned, turned_in_planes
from anisodiff.networks.unets import RawNetwork, build
from anisodiff.objectives.registry import LOSSES
from anisodiff.paths.noise_path import NoisePath, edm_path
from anisodiff.paths.rotated import RotatedBasis
from anisodiff.paths.splitting import split_path
from anisodiff.storage import checkpoints
from anisodiff.storage.files import Metadata, digest, fingerprint, provenance
from anisodiff.training import parallel
from anisodiff.training.jobs import BatchSampler, drive, network_work, saved_network, saved_path, warp_work


@dataclass(frozen=True)
class TrainingInputs:
    """Files that a training starts from.

    Attributes:
        images: folder of the training images.
        network: weights to start from.
        path: path to start from, or whose time is warped.
        basis: principal subspaces, for subspaces "basis:NAME".
    """

    images: Path
    network: Path
    path: Path
    basis: Path | None = None

    @property
    def files(self) -> list[Path]:
        """All of them, as they name a piece of work."""
        described = image_sets.metadata_file(self.images)
        return [described, self.network, self.path, *([] if self.basis is None else [self.basis])]


def pretrain(space: ImageSpace, settings: PretrainSettings, images: Path, output: Path, compute: Compute = CPU) -> None:
    """Train a base network from random weights with EDM's loss.

    Args:
        space: what the dataset says of its images.
        settings: of the training.
        images: folder of the training images.
        output: the averaged weights.
        compute: where, and in which precision.
    """
    compute = compute.begin()
    batches = BatchSampler(space, images, compute.device, settings.augment)
    torch.manual_seed(settings.seed)
    channels, size, _ = batches.shape
    image = {"img_resolution": size, "in_channels": channels, "out_channels": channels}
    network = build(
        label_dim=batches.images.classes if space.class_conditional else 0,
        augment_dim=LABELS if settings.augment else 0,
        **image,
        **settings.network.arguments(),
    )
    path = edm_path(size)
    _train_network(space, settings, network, path, batches, [image_sets.metadata_file(images)], output, None, compute)


def finetune(
    space: ImageSpace,
    settings: RunSettings,
    inputs: TrainingInputs,
    output: Path,
    output_path: Path,
    compute: Compute = CPU,
) -> None:
    """Finetune a network, and learn its path where the loss is TLSM.

    Args:
        space: what the dataset says of its images.
        settings: of the run: loss, rates, batch, ...
        inputs: images, network and path to start from, basis.
        output: the averaged weights (setting `ema_kimg`); kimg counts from the base network.
        output_path: the path as last trained, or its average where `path_ema_kimg` is not 0; a schedule that does not
            learn is as it was given.
        compute: where, and in which precision.
    """
    compute = compute.begin()
    network, metadata = checkpoints.load_network(inputs.network)
    start, path_metadata = checkpoints.load_path(inputs.path)
    batches = BatchSampler(space, inputs.images, compute.device)
    check_images(network, batches.shape, inputs.network)
    path = _path_to_learn(space, settings, start, network, inputs) if LOSSES[settings.loss].learns_path else start
    if settings.planes and not isinstance(network, Turned):
        with naming("planes", "give fewer"):
            network = turned_in_planes(network, settings.planes, settings.seed)
    headers = metadata, path_metadata
    _train_network(space, settings, network, path, batches, inputs.files, output, output_path, compute, *headers)


def _path_to_learn(
    space: ImageSpace, settings: RunSettings, start: NoisePath, network: RawNetwork, inputs: TrainingInputs
) -> NoisePath:
    """The path that a run goes on from, on the run's own subspaces."""
    classes = network.classes if settings.schedules == "class" else 0
    if settings.schedules == "class" and not (classes and space.class_conditional):
        raise StageError("schedules: one a class needs a class-conditional network and labels: set it to shared")
    kept = isinstance(start.subspaces, RotatedBasis) and start.subspaces.kind == settings.subspaces
    subspaces = start.subspaces if kept else subspaces_of(settings.subspaces, network.shape, inputs.basis)
    held = LOSSES[settings.loss].learns_network and settings.path_learning_rate == 0
    with naming(inputs.path, "start from a shared path of one subspace"):
        return split_path(start, subspaces, settings.label_weights, classes, held=held)


def _train_network(
    space: ImageSpace,
    settings: PretrainSettings | RunSettings,
    network: RawNetwork,
    path: NoisePath,
    batches: BatchSampler,
    inputs: list[Path],
    output: Path,
    output_path: Path | None,
    compute: Compute,
    *headers: Metadata,
) -> None:
    work = network_work(space, settings, network, path, batches, compute)
    training, path = work.training, work.path
    if headers:
        check_dataset(network, headers[0], space, "network")

    def finish() -> None:
        seen = training.kept_step * work.schedule.batch / 1000
        since_base = {"kimg": 0.0, "device_seconds": 0.0, "pretraining_kimg": seen}
        if headers:
            spent = training.seconds * parallel.size()
            since_base = {"kimg": headers[0]["kimg"] + seen}
            since_base["device_seconds"] = headers[0].get("device_seconds", 0.0) + spent
        metadata = provenance({"dataset": space, "run": settings, "compute": asdict(compute)}, list(headers))
        metadata |= since_base | {"seconds": training.seconds, "processes": parallel.size()}
        checked = dict(training.heldout)
        metadata |= {"heldout": checked.get(training.kept_step)}  # of what is saved
        metadata |= {"stopped_early": training.stopped_early, "environment": compute.environment()}
        if output_path is not None:
            checkpoints.save_path(output_path, saved_path(training, path), **metadata)
        checkpoints.save_network(output, saved_network(training), sigma_data=space.sigma_data, **metadata)

    drive(work, _key(space, settings, inputs, compute), settings.save_seconds, output, compute, finish)


def _key(space: ImageSpace, settings: TrainingSettings, inputs: list[Path], compute: Compute) -> str:
    """Names a training by its settings and the dataset's, the precision and its inputs."""
    named = {"dataset": space, "training": settings, "dtype": compute.dtype}
    return fingerprint(named, [digest(each) for each in inputs])


def learn_warp(
    space: ImageSpace,
    settings: WarpSettings,
    inputs: TrainingInputs,
    output: Path,
    compute: Compute = CPU,
) -> None:
    """Learn the time warp of a path under a network (paper, Section 5.2).

    The window between two grid points is T/K, or uniform in (0, T/K), with K the setting `steps`. The warp is saved as
    last trained, or averaged where `ema_kimg` is not 0.

    Args:
        space: what the dataset says of its images.
        settings: of the warp.
        inputs: images, network and path.
        output: the warp.
        compute: where, and in which precision.
    """
    compute = compute.begin()
    network, metadata = checkpoints.load_network(inputs.network)
    path, path_metadata = checkpoints.load_path(inputs.path)
    check_dataset(network, metadata, space, inputs.network)
    batches = BatchSampler(space, inputs.images, compute.device)
    check_images(network, batches.shape, inputs.network)
    work = warp_work(space, settings, network, path, batches, compute)

    def finish() -> None:
        made = provenance({"dataset": space, "warp": settings, "compute": asdict(compute)}, [metadata, path_metadata])
        seconds = work.training.seconds
        made |= {"seconds": seconds, "processes": parallel.size(), "environment": compute.environment()}
        made |= {"device_seconds": seconds * parallel.size()}
        checkpoints.save_warp(output, work.training.ema["warp"], **made)

    drive(work, _key(space, settings, inputs.files, compute), settings.save_seconds, output, compute, finish)
