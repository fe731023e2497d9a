"""The training stages: a base network from nothing, finetuning on a path, and the warp of a path."""

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anisodiff import checkpoints, data, parallel
from anisodiff.compute import CPU, Compute
from anisodiff.denoiser import Denoiser
from anisodiff.files import StageError, digest, key_of, provenance
from anisodiff.losses import edm_loss, tlsm_loss, warp_loss
from anisodiff.networks import RawNetwork, build
from anisodiff.paths import NoisePath, Warp, edm_path
from anisodiff.pca import PcaSubspaces, principal_subspaces
from anisodiff.schedules import FixedSchedule, KnotSchedule, karras_logs, spectral_curve
from anisodiff.subspaces import Subspaces, partition
from anisodiff.training import Draws, Guard, ResumeStore, Schedule, Training, run, train


def schedule_of(settings: dict[str, Any]) -> Schedule:
    """The training schedule among a stage's settings."""
    names = ("kimg", "batch", "micro_batch", "ramp_kimg", "ema_kimg", "ema_ramp", "seed")
    return Schedule(**{name: settings[name] for name in names})


class _Batches:
    """Draws of one dataset, each from the CPU generator that it is given, and their way to the device."""

    def __init__(self, dataset: dict[str, Any], folder: Path, device: str):
        self.images, self.heldout = data.load(folder).split(dataset["heldout"])
        self.flips, self.use_labels, self.device = dataset["flips"], dataset["labels"], device
        if self.use_labels and not self.images.classes:
            raise StageError(f"{folder}: the images have no labels: set labels to false, or give a labelled source")

    def draw(self, count: int, generator: torch.Generator) -> Draws:
        """Images in uint8, and labels where the network has them."""
        return self._shown(*self.images.batch(count, generator, self.flips))

    def fixed(self, index: Tensor) -> Draws:
        """Held-out images by their place."""
        return self._shown(*self.heldout.take(index))

    def _shown(self, images: Tensor, labels: Tensor) -> Draws:
        return {"images": images} | ({"labels": labels} if self.use_labels else {})

    def moved(self, drawn: Draws) -> Draws:
        """To the device; the images in [-1, 1] as `x0`."""
        there = {name: each.to(self.device, non_blocking=True) for name, each in drawn.items()}
        return {"x0": data.to_unit(there.pop("images")), **there}


def initial_path(
    dataset: dict[str, Any], settings: dict[str, Any], images_folder: Path, basis: Path | None = None
) -> NoisePath:
    """A path that is not learned: EDM's ("karras") or the closed form for the data's spectrum ("spectral").

    Args:
        dataset: settings of the dataset.
        settings: of the path: kind, subspaces, schedules, label weights, c, knots.
        images_folder: the training images.
        basis: file of principal subspaces, for subspaces "basis:NAME".
    """
    images, _ = data.load(images_folder).split(dataset["heldout"])
    subspaces = subspaces_of(settings["subspaces"], images.shape[-1], basis)
    per_class = settings["schedules"] == "class"
    if per_class and not images.classes:
        raise StageError(f"{images_folder}: the images have no labels: set schedules to shared")
    g_min, g_max = dataset["g_min"], dataset["sigma_max"] ** 2
    if settings["kind"] == "karras":
        logs = karras_logs(settings["knots"], g_min, dataset["sigma_min"], dataset["sigma_max"])
        logs = logs.expand(subspaces.count, -1)
        schedule = KnotSchedule(logs.expand(images.classes, -1, -1) if per_class else logs)
    elif per_class or isinstance(subspaces, PcaSubspaces):
        raise StageError("kind: spectral is a closed form for one schedule a subspace of the DCT: use karras here")
    else:
        variances = coefficient_variances(images, subspaces)
        members = [variances[:, subspaces.index == j].flatten() for j in range(subspaces.count)]
        schedule = FixedSchedule(spectral_curve(members, settings["c"], g_min, g_max))
    return NoisePath(subspaces, schedule, label_weights(subspaces, settings["label_weights"]))


def principal_basis(dataset: dict[str, Any], settings: dict[str, Any], images_folder: Path) -> PcaSubspaces:
    """Principal subspaces of the images that are trained on.

    Args:
        dataset: settings of the dataset.
        settings: rank, per, clusters.
        images_folder: the training images.
    """
    images, _ = data.load(images_folder).split(dataset["heldout"])
    return principal_subspaces(images, settings["rank"], settings["per"], settings["clusters"])


def subspaces_of(kind: str | list, size: int, basis: Path | None) -> Subspaces | PcaSubspaces:
    """A partition of the DCT basis, or the principal subspaces of a file."""
    if not (isinstance(kind, str) and kind.startswith("basis:")):
        return Subspaces(partition(size, kind))
    if basis is None:
        raise StageError(f"subspaces: {kind} needs the file of that basis: give --basis")
    return checkpoints.load_basis(basis)[0]


def coefficient_variances(images: data.Images, subspaces: Subspaces) -> Tensor:
    """Variance of every DCT coefficient over the images, in float64, `[C, H, W]`."""
    total, squares = 0.0, 0.0
    for part, _ in images.parts():
        z = subspaces.dct(data.to_unit(part).to(torch.float64))
        total, squares = total + z.sum(0), squares + z.square().sum(0)
    return (squares - total.square() / len(images)) / (len(images) - 1)


def label_weights(subspaces: Subspaces | PcaSubspaces, kind: str) -> Tensor | None:
    """Weights of the mean log-level: "rank", or "equal" per subspace as the paper's J = 2."""
    if kind == "equal":
        return torch.full((subspaces.count,), 1 / subspaces.count, dtype=torch.float64)
    return None


def split_path(path: NoisePath, subspaces: Subspaces | PcaSubspaces, weights: str, classes: int = 0) -> NoisePath:
    """A path that learns on from another: on its own subspaces, or on finer ones that all start as the isotropic one.

    Args:
        path: to start from.
        subspaces: of the new path.
        weights: of its mean log-level, "rank" or "equal".
        classes: number of classes that get a schedule each; 0 is one for all.

    Raises:
        StageError: the path cannot be split so.
    """
    logs = path.curve.logs.detach()
    old, new = path.subspaces.state_dict(), subspaces.state_dict()
    if old.keys() != new.keys() or not all(torch.equal(old[key], new[key]) for key in new):
        if logs.shape[-2] != 1:
            raise StageError(
                f"subspaces: a path of {logs.shape[-2]} subspaces cannot start one on others: start from J = 1"
            )
        logs = logs.expand(*logs.shape[:-2], subspaces.count, -1)
    if classes and logs.ndim == 2:
        logs = logs.expand(classes, -1, -1)
    elif bool(classes) != (logs.ndim == 3):
        raise StageError("schedules: a path with a schedule a class cannot start a shared one: start from a shared one")
    return NoisePath(subspaces, KnotSchedule(logs), label_weights(subspaces, weights))


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
    batches = _Batches(dataset, images, compute.device)
    torch.manual_seed(settings["seed"])
    channels, size, _ = batches.images.shape
    image = {"img_resolution": size, "in_channels": channels, "out_channels": channels}
    network = build(label_dim=batches.images.classes if dataset["labels"] else 0, **image, **settings["network"])
    path = edm_path(size)
    _train_network(dataset, settings, network, path, batches, [data.about(images)], output, None, compute)


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
        output: the averaged weights; kimg counts from the base network.
        output_path: the averaged path; with EDM's loss, the path it was given.
        compute: where, and in which precision.
    """
    compute = compute.begin()
    network, about = checkpoints.load_network(start_network)
    start, path_about = checkpoints.load_path(start_path)
    batches = _Batches(dataset, images, compute.device)
    classes = network.classes if settings["schedules"] == "class" else 0
    if settings["schedules"] == "class" and not (classes and dataset["labels"]):
        raise StageError("schedules: one a class needs a class-conditional network and labels: set it to shared")
    subspaces = subspaces_of(settings["subspaces"], network.shape[-1], basis)
    path = split_path(start, subspaces, settings["label_weights"], classes)
    inputs = [data.about(images), start_network, start_path, *([] if basis is None else [basis])]
    _train_network(dataset, settings, network, path, batches, inputs, output, output_path, compute, about, path_about)


def _train_network(
    dataset: dict[str, Any],
    settings: dict[str, Any],
    network: RawNetwork,
    path: NoisePath,
    batches: _Batches,
    inputs: list[Path],
    output: Path,
    output_path: Path | None,
    compute: Compute,
    *abouts: dict[str, Any],
) -> None:
    schedule = schedule_of(settings)
    network.train().requires_grad_(True)
    network, path = compute.place(network), path.to(compute.device)
    learns_path = settings["loss"] == "tlsm"
    modules = {"network": network} | ({"path": path.schedule} if learns_path else {})
    rates = {"network": settings["learning_rate"]} | ({"path": settings["path_learning_rate"]} if learns_path else {})
    if network.shape != batches.images.shape:
        raise StageError(
            f"network: it makes images of {network.shape} (channels, height, width), the data's are "
            f"{batches.images.shape}: set the dataset's resolution, or take another checkpoint"
        )
    denoiser = Denoiser(network, path, dataset["sigma_data"], compute.body)
    shape = (schedule.piece, *batches.images.shape)

    def draw_edm(generator: torch.Generator) -> Draws:
        drawn = batches.draw(schedule.piece, generator)
        # EDM's log-normal noise levels
        drawn["sigma"] = (torch.randn(schedule.piece, generator=generator) * 1.2 - 1.2).exp()
        return drawn | {"eps": torch.randn(shape, generator=generator)}

    def draw_tlsm(generator: torch.Generator) -> Draws:
        drawn = batches.draw(schedule.piece, generator)
        drawn["eps"] = torch.randn(shape, generator=generator)
        drawn["t"] = torch.rand(schedule.piece, generator=generator, dtype=torch.float64)
        if settings["gradient"] == "full":
            count = max(1, round(settings["share"] * schedule.piece))
            signs = torch.rand((settings["probes"], count, *shape[1:]), generator=generator) < 0.5
            drawn["probes"] = torch.where(signs, -1.0, 1.0)
        return drawn

    def mean_loss(drawn: Draws) -> Tensor:
        if learns_path:
            return tlsm_loss(denoiser, c=settings["c"], **batches.moved(drawn)).mean()
        return edm_loss(denoiser, **batches.moved(drawn)).mean()

    training = Training(modules, rates)
    guard = _heldout_guard(denoiser, batches, settings, schedule) if learns_path else None
    records = train(training, schedule, draw_tlsm if learns_path else draw_edm, mean_loss, guard)

    def finish() -> None:
        seen = training.step * schedule.batch / 1000
        since_base = {"kimg": 0.0, "device_seconds": 0.0, "pretraining_kimg": seen}
        if abouts:
            spent = training.seconds * parallel.size()
            since_base = {"kimg": abouts[0]["kimg"] + seen}
            since_base["device_seconds"] = abouts[0].get("device_seconds", 0.0) + spent
        about = provenance({"dataset": dataset, "run": settings, "compute": asdict(compute)}, list(abouts))
        about |= since_base | {"seconds": training.seconds, "processes": parallel.size()}
        about |= {"stopped_early": training.stopped_early, "made_on": compute.made_on()}
        if output_path is not None:
            learned = training.ema["path"] if learns_path else path.schedule
            checkpoints.save_path(output_path, NoisePath(path.subspaces, learned, path.weights), **about)
        checkpoints.save_network(output, training.ema["network"], **about)

    outputs = [output] if output_path is None else [output, output_path]
    _drive(records, training, schedule, settings, inputs, outputs, compute, finish)


def _drive(
    records: Iterator[dict[str, Any]],
    training: Training,
    schedule: Schedule,
    settings: dict[str, Any],
    inputs: list[Path],
    outputs: list[Path],
    compute: Compute,
    finish: Callable[[], None],
) -> None:
    """Run to the end from the newest resume state; then rank 0 writes what was made, and drops the states."""
    key, main = key_of(settings | {"dtype": compute.dtype}, [digest(each) for each in inputs]), outputs[0]
    store = ResumeStore(main.parent / ".state" / main.stem, key)
    if not store.bring_back(outputs):
        store.load(training)
        log, device = main.with_suffix(".jsonl"), compute.device
        run(records, training, schedule, store, log, settings["save_seconds"], main.stem, device)
        if parallel.rank() == 0:
            finish()
            store.finish(outputs)
    parallel.leave()


def _heldout_guard(denoiser: Denoiser, batches: _Batches, settings: dict[str, Any], schedule: Schedule) -> Guard:
    """Watch TLSM's loss on fixed held-out images, at stratified times with fixed noise.

    A rise means that the path has run away from what the network knows.
    """
    generator = torch.Generator().manual_seed(settings["seed"])
    repeats = max(1, math.ceil(512 / max(1, len(batches.heldout))))
    index = torch.arange(len(batches.heldout)).repeat(repeats)
    drawn = batches.fixed(index)
    drawn["eps"] = torch.randn(drawn["images"].shape, generator=generator)
    order = torch.randperm(len(index), generator=generator)
    drawn["t"] = ((order + 0.5) / len(index)).to(torch.float64)
    fixed = batches.moved(drawn)

    def loss() -> float:
        denoiser.network.eval()
        with torch.no_grad():
            value = float(tlsm_loss(denoiser, c=settings["c"], **fixed).mean())
        denoiser.network.train()
        return value

    every = max(1, round(settings["guard_kimg"] * 1000 / schedule.batch))
    return Guard(loss, every, settings["guard_tolerance"])


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

    The window between two grid points is T/K, or uniform in (0, T/K), with K the setting `steps`.
    """
    compute = compute.begin()
    network, about = checkpoints.load_network(network_file)
    path, path_about = checkpoints.load_path(path_file)
    batches = _Batches(dataset, images, compute.device)
    path = path.to(compute.device).requires_grad_(False)
    denoiser = Denoiser(compute.place(network), path, dataset["sigma_data"], compute.body)
    warp = Warp(path, knots=settings["knots"]).to(compute.device)
    schedule = schedule_of(settings)
    shape = (schedule.piece, *batches.images.shape)

    def draw(generator: torch.Generator) -> Draws:
        drawn = batches.draw(schedule.piece, generator)
        drawn["eps"] = torch.randn(shape, generator=generator)
        uniform = lambda: torch.rand(schedule.piece, generator=generator, dtype=torch.float64)  # noqa: E731
        drawn["start"] = uniform().clamp(min=1e-6)
        window = (uniform() if settings["window"] == "uniform" else 1.0) / settings["steps"]
        drawn["end"] = (drawn["start"] - window).clamp(min=0)
        drawn["test"] = torch.lerp(drawn["end"], drawn["start"], uniform())
        return drawn

    def mean_loss(drawn: Draws) -> Tensor:
        return sum(warp_loss(denoiser, path, warp, c=settings["c"], **batches.moved(drawn))).mean()

    training = Training({"warp": warp}, {"warp": settings["learning_rate"]})

    def finish() -> None:
        made = provenance({"dataset": dataset, "warp": settings, "compute": asdict(compute)}, [about, path_about])
        made |= {"seconds": training.seconds, "processes": parallel.size(), "made_on": compute.made_on()}
        made |= {"device_seconds": training.seconds * parallel.size()}
        checkpoints.save_warp(output, training.ema["warp"], **made)

    records = train(training, schedule, draw, mean_loss)
    inputs = [data.about(images), network_file, path_file]
    _drive(records, training, schedule, settings, inputs, [output], compute, finish)
