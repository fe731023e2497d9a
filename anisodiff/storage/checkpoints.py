"""Artifacts on disk: safetensors files whose header holds a JSON config and the provenance. Nothing is unpickled.

Header and tensors carry their sha256, checked when they are read: a file is what was written, or it is refused.
"""

import contextlib
import hashlib
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from anisodiff.errors import InvalidArgument, StageError, naming, one_line
from anisodiff.networks.turned import PlaneFrame, Turned
from anisodiff.networks.unets import RawNetwork, restore
from anisodiff.paths.noise_path import NoisePath, Warp
from anisodiff.paths.principal import PcaSubspaces
from anisodiff.paths.rotated import LARGEST_DENSE, STARTS, DenseBasis, RotatedBasis, SeparableBasis
from anisodiff.paths.schedules import ExponentSchedule, FixedSchedule, KnotSchedule, LogLinear, Schedule
from anisodiff.paths.subspaces import Subspaces
from anisodiff.storage.files import Metadata, atomic, digest, provenance
from anisodiff.storage.pickles import load_edm

MEND = "delete it and run again, or get it again"
LARGEST_PARTITION = 2**27  # modes times subspaces: a gigabyte


def save(path: Path | str, tensors: dict[str, Tensor], header: Metadata) -> None:
    """Write tensors and a JSON header atomically, with their digests."""
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    text, held = json.dumps(header, sort_keys=True), _digest_of(contiguous)
    lines = "\n".join([text, held, _seal(text, held)])
    with atomic(path) as temporary:
        try:
            # one entry: several would be written in any order, and the same content must be the same file
            save_file(contiguous, temporary, metadata={"json": lines})
        except SafetensorError as error:  # how it reports a full disk
            raise StageError(f"{path}: cannot be written ({error}): free some space, or write elsewhere") from error


def _digest_of(tensors: dict[str, Tensor]) -> str:
    """Hex digest of names, dtypes, shapes and bytes, without a copy."""
    found = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        found.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        content = tensor.reshape(-1).view(torch.uint8).numpy()
        found.update(memoryview(content))  # pyright: ignore[reportArgumentType] - an array is a buffer
    return found.hexdigest()


def _seal(text: str, held: str) -> str:
    """Hex digest of the header's text and the tensors' digest."""
    return hashlib.sha256(f"{held}\n{text}".encode()).hexdigest()


@contextlib.contextmanager
def _opened(path: Path | str) -> Iterator[safe_open]:
    if not Path(path).is_file():
        raise StageError(f"{path}: no such file: run the stage that makes it")
    try:
        # header and tensors by one handle: by name, a file that is replaced meanwhile would give one of each
        with open(path, "rb") as held, safe_open(f"/dev/fd/{held.fileno()}", framework="pt") as file:
            yield file
    except (SafetensorError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise StageError(f"{path}: not a safetensors file of anisodiff ({one_line(error)}): {MEND}") from error


def _read_header(file: safe_open, path: Path | str) -> tuple[Metadata, str | None]:
    """The header, and the digest of the tensors; None in files of version 0.1, which have none."""
    text, *digests = file.metadata()["json"].split("\n")
    if digests and digests[1:] != [_seal(text, digests[0])]:
        raise StageError(f"{path}: damaged: its header is not what was written: {MEND}")
    metadata = json.loads(text)
    if not isinstance(metadata, dict):
        raise ValueError("its header is no JSON object")
    if "made_on" in metadata:  # its name in version 0.1
        metadata["environment"] = metadata.pop("made_on")
    for name, fits in _FIELDS.items():
        if name in metadata and not fits(metadata[name]):
            raise ValueError(f"{name} is {metadata[name]!r:.60}")
    return metadata, digests[0] if digests else None


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and 0 <= value < 1e18


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(each, str) for each in value)


_FIELDS: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("kimg", "sigma_data", "device_seconds", "seconds", "evaluations"), _is_number),
    **dict.fromkeys(("versions", "commits"), _are_texts),
    **dict.fromkeys(("config", "environment"), lambda value: isinstance(value, dict)),
    "stopped_early": lambda value: isinstance(value, bool),
    "last_step": lambda value: isinstance(value, list) and len(value) == 2 and all(map(_is_number, value)),
}  # what stages take from the headers of files that may come from outside


def read(path: Path | str) -> tuple[dict[str, Tensor], Metadata]:
    """Tensors and header of a file written by `save`.

    Raises:
        StageError: the file is missing, truncated, damaged or of another kind.
    """
    with _opened(path) as file:
        metadata, held = _read_header(file, path)
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        if held is not None and _digest_of(tensors) != held:
            raise StageError(f"{path}: damaged: its tensors are not what was written: {MEND}")
        return tensors, metadata


def header(path: Path | str) -> Metadata:
    """The header alone, without reading the tensors.

    Raises:
        StageError: the file is missing, truncated or of another kind, or its header is damaged.
    """
    with _opened(path) as file:
        return _read_header(file, path)[0]


def has_digest(path: Path | str) -> bool:
    """Whether damage to the file would show: files of version 0.1 carry no digest."""
    with _opened(path) as file:
        return _read_header(file, path)[1] is not None


def save_network(path: Path | str, network: RawNetwork, **metadata: Any) -> None:
    """Write a network with the arguments that build it, and its frame if it turns; `metadata` joins the header."""
    if isinstance(network, Turned):
        frame = {f"frame.{name}": each for name, each in network.frame.state_dict().items()}
        save(path, network.network.state_dict() | frame, {"config": network.network.config, "frame": True, **metadata})
    else:
        save(path, network.state_dict(), {"config": network.config, **metadata})


def load_network(path: Path | str) -> tuple[RawNetwork, Metadata]:
    """The network in evaluation mode, and the header.

    Raises:
        StageError: there is none in the file, or its weights are not finite or not those its config asks for.
    """
    tensors, metadata = read(path)
    try:
        own = {name: each for name, each in tensors.items() if not name.startswith("frame.")}
        network = restore(own, **metadata["config"])
        if metadata.get("frame"):
            coordinates = taken(tensors, "frame.coordinates", Int[Tensor, " n"]).tolist()
            network = Turned(network, PlaneFrame(coordinates, taken(tensors, "frame.rates", Float[Tensor, " p"])))
    except (KeyError, TypeError, ValueError) as error:
        raise StageError(f"{path}: holds no network ({one_line(error)}): give the file of a network") from error
    return network.eval().requires_grad_(False), metadata


def sigma_data_of(metadata: Metadata) -> float | None:
    """Standard deviation of the data that a network was trained for, by its header; None if that does not say."""
    found = metadata.get("sigma_data")
    if found is None:  # networks that version 0.1 trained
        settings = metadata.get("settings")
        dataset = settings.get("dataset") if isinstance(settings, dict) else None
        found = dataset.get("sigma_data") if isinstance(dataset, dict) else None
    return float(found) if isinstance(found, int | float) and _is_number(found) and found > 0 else None


def convert(source: Path | str, output: Path | str) -> None:
    """Turn a pickle of EDM's into a network file. Nothing in the pickle is run, and it is not needed again.

    Args:
        source: network snapshot of NVlabs/edm.
        output: safetensors file.

    Raises:
        StageError: it holds no network that is known here, or weights that are NaN or infinite.
    """
    found = load_edm(source)
    try:
        network = restore(found.tensors, found.model_type, **found.arguments)
    except (TypeError, InvalidArgument) as error:
        raise StageError(f"{source}: holds no {found.model_type} ({error}): fetch the file again") from error
    if not 0 < found.sigma_data < math.inf:
        raise StageError(f"{source}: sigma_data is {found.sigma_data}: fetch the file again")
    made = provenance({"converted": Path(source).name, "sha256": digest(source)})
    save_network(output, network, kimg=0.0, sigma_data=found.sigma_data, **made)


def save_path(path: Path | str, noise_path: NoisePath, **metadata: Any) -> None:
    """Write a noise path: its partition, its label weights and its schedule's knots or exponents.

    Of a basis that was learned, the angles, and the name of what they start from, or its vectors where it has none.
    """
    schedule, basis = noise_path.schedule, noise_path.subspaces
    tensors = {"weights": noise_path.weights, **basis.state_dict()}
    if isinstance(schedule, ExponentSchedule):
        kind = {"schedule": "exponent", "ends": schedule.ends and list(schedule.ends)}
        tensors["log_lambda"] = schedule.log_lambda
    else:
        kind = {"schedule": "knots" if isinstance(schedule, KnotSchedule) else "fixed"}
        tensors |= {"nodes": schedule.curve.nodes, "logs": schedule.curve.logs}
    if isinstance(basis, RotatedBasis):
        kind |= {"turned": "separable" if isinstance(basis, SeparableBasis) else "dense", "turned_from": basis.start}
    save(path, tensors, {**kind, **metadata})


def load_path(path: Path | str) -> tuple[NoisePath, Metadata]:
    """The path, and the header.

    Raises:
        StageError: the file holds no path, or tensors that are none.
    """
    tensors, metadata = read(path)
    try:
        schedule, weights = _schedule(tensors, metadata), taken(tensors, "weights", Float[Tensor, " j"])
        count = schedule.curve.logs.shape[-2]
        rotated = "turned" in metadata
        basis = _rotated(tensors, metadata, count) if rotated else _subspaces(tensors, count)
        return NoisePath(basis, schedule, weights), metadata
    except ValueError as error:
        raise StageError(f"{path}: holds no noise path ({error}): give the file of a path") from error


def _schedule(tensors: dict[str, Tensor], metadata: Metadata) -> Schedule:
    """The schedule among a path's tensors."""
    kind = metadata.get("schedule")
    if kind == "exponent":
        ends = metadata.get("ends")
        if ends is not None and not (isinstance(ends, list) and len(ends) == 2 and all(map(_is_number, ends))):
            raise ValueError(f"ends is {ends!r:.60}")
        rates = taken(tensors, "log_lambda", Float[Tensor, " j"])
        return ExponentSchedule(rates, None if ends is None else (ends[0], ends[1]))
    logs = _rising(tensors)
    if kind == "knots":
        return KnotSchedule(logs)
    if kind != "fixed":
        raise ValueError("no schedule")
    nodes = taken(tensors, "nodes", Float[Tensor, " k"])
    if len(nodes) != logs.shape[-1]:
        raise ValueError(f"{len(nodes)} nodes for {logs.shape[-1]} knots")
    return FixedSchedule(LogLinear(nodes, logs))


def _rotated(tensors: dict[str, Tensor], metadata: Metadata, count: int) -> SeparableBasis | DenseBasis:
    """The basis that was learned, among a path's tensors: of so many subspaces as the path has schedules."""
    index = taken(tensors, "index", Int[Tensor, "c h h"]).to(torch.int64)
    turn = taken(tensors, "turn", Float[Tensor, " n"])
    if index.unique().tolist() != list(range(count)):
        raise ValueError(f"index does not number {count} subspaces from 0")
    kind, start = metadata["turned"], metadata.get("turned_from")
    if kind == "separable" and start == SeparableBasis.start:
        return SeparableBasis(index, turn)
    if kind != "dense" or start not in (*STARTS, "data"):
        raise ValueError(f"a basis that is {kind!r:.30} and turned from {start!r:.30}")
    if start == "data" and index.numel() <= LARGEST_DENSE:
        start = taken(tensors, "vectors", Float[Tensor, "d d"])
    return DenseBasis(index, start, turn)


def taken(tensors: dict[str, Tensor], name: str, kind: Any) -> Tensor:
    """The tensor of this name, finite and of this kind, which names dtype and axes.

    Raises:
        ValueError: it is missing, or another.
    """
    found = tensors.get(name)
    if found is None or not isinstance(found, kind):
        given = "missing" if found is None else f"{str(found.dtype).removeprefix('torch.')} {list(found.shape)}"
        raise ValueError(f"{name} is {given}")
    if not found.isfinite().all():
        raise ValueError(f"{name} holds NaN or infinite values")
    return found


def _rising(tensors: dict[str, Tensor]) -> Float[Tensor, "*l j k"]:
    """Log variances that rise from knot to knot."""
    logs = taken(tensors, "logs", Float[Tensor, "*l j k"])
    if logs.ndim > 3 or logs.shape[-1] < 2 or 0 in logs.shape or not (logs.diff(dim=-1) > 0).all():
        raise ValueError(f"logs {list(logs.shape)} do not rise from knot to knot")
    return logs


def _subspaces(tensors: dict[str, Tensor], count: int) -> Subspaces | PcaSubspaces:
    """The partition among a path's tensors, or its principal subspaces: so many as the path has schedules.

    What it takes is bounded by what the file holds before anything is made of it.
    """
    if "index" not in tensors:
        vectors, which = taken(tensors, "vectors", Float[Tensor, "m r p"]), taken(tensors, "which", Int[Tensor, " c"])
        bases, rank, pixels = vectors.shape
        if not 0 < rank <= pixels or math.isqrt(pixels) ** 2 != pixels:
            raise ValueError(f"vectors {list(vectors.shape)} are no basis of square images")
        if not len(which) or not ((which >= 0) & (which < bases)).all():
            raise ValueError(f"which names bases that are none of the {bases}")
        return PcaSubspaces(vectors, which)
    index = taken(tensors, "index", Int[Tensor, "h h"]).to(torch.int64)
    if index.numel() * count > LARGEST_PARTITION:
        raise ValueError(f"{count} subspaces of images of side {len(index)} are too many")
    if index.unique().tolist() != list(range(count)):
        raise ValueError(f"index does not number {count} subspaces from 0")
    return Subspaces(index)


def save_basis(path: Path | str, subspaces: PcaSubspaces, **metadata: Any) -> None:
    """Write principal subspaces."""
    save(path, subspaces.state_dict(), {"basis": True, **metadata})


def load_basis(path: Path | str) -> tuple[PcaSubspaces, Metadata]:
    """Principal subspaces, and the header.

    Raises:
        StageError: the file holds none.
    """
    tensors, metadata = read(path)
    try:
        if not metadata.get("basis") or "index" in tensors:
            raise ValueError("it does not say that it is one")
        found = _subspaces(tensors, PcaSubspaces.count)
        if not isinstance(found, PcaSubspaces):
            raise ValueError("it holds a partition")
        return found, metadata
    except ValueError as error:
        raise StageError(f"{path}: holds no basis ({error}): give the file of a basis") from error


def save_warp(path: Path | str, warp: Warp, **metadata: Any) -> None:
    """Write the warp's knots (mean log-levels)."""
    save(path, {"logs": warp.schedule.curve.logs}, {"warp": True, **metadata})


def load_warp(path: Path | str, noise_path: NoisePath) -> tuple[Warp, Metadata]:
    """The warp over a path, and the header.

    Raises:
        StageError: the file holds none.
    """
    tensors, metadata = read(path)
    try:
        if not metadata.get("warp"):
            raise ValueError("it does not say that it is one")
        logs = _rising(tensors)
        if logs.shape[:-1] != (1,):
            raise ValueError(f"logs are {list(logs.shape)}")
    except ValueError as error:
        raise StageError(f"{path}: holds no warp ({error}): give the file of a warp") from error
    with naming(path, "take a path that all classes share"):
        return Warp(noise_path, logs), metadata


def load_search(path: Path | str) -> dict[str, Tensor]:
    """The fine grid of a search and the ways through it.

    Raises:
        StageError: the file holds none.
    """
    tensors, metadata = read(path)
    if not metadata.get("search"):
        raise StageError(f"{path}: holds no search: give the file of a search")
    return tensors
