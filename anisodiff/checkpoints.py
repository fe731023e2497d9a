"""Artifacts on disk: safetensors files whose header holds a JSON config and the provenance. Nothing is unpickled."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from anisodiff.files import StageError, atomic, digest, provenance
from anisodiff.networks import RawNetwork, build
from anisodiff.paths import NoisePath, Warp
from anisodiff.pca import PcaSubspaces
from anisodiff.pickles import load_edm
from anisodiff.schedules import FixedSchedule, KnotSchedule, LogLinear
from anisodiff.subspaces import Subspaces


def save(path: Path | str, tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
    """Write tensors and a JSON header atomically."""
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with atomic(path) as temporary:
        try:
            save_file(contiguous, temporary, metadata={"json": json.dumps(header, sort_keys=True)})
        except SafetensorError as error:  # how it reports a full disk
            raise StageError(f"{path}: cannot be written ({error}): free some space, or write elsewhere") from error


@contextlib.contextmanager
def _opened(path: Path | str) -> Iterator[safe_open]:
    if not Path(path).is_file():
        raise StageError(f"{path}: no such file: run the stage that makes it")
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise StageError(
            f"{path}: not a safetensors file of anisodiff ({error}): delete it and run its stage"
        ) from error


def read(path: Path | str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and header of a file written by `save`.

    Raises:
        StageError: the file is missing, truncated or of another kind.
    """
    with _opened(path) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        return tensors, json.loads(file.metadata()["json"])


def header(path: Path | str) -> dict[str, Any]:
    """The header alone, without reading the tensors."""
    with _opened(path) as file:
        return json.loads(file.metadata()["json"])


def save_network(path: Path | str, network: RawNetwork, **about: Any) -> None:
    """Write a network with the arguments that build it; `about` joins the header."""
    save(path, network.state_dict(), {"config": network.config, **about})


def load_network(path: Path | str) -> tuple[RawNetwork, dict[str, Any]]:
    """The network in evaluation mode, and the header."""
    tensors, about = read(path)
    try:
        network = build(**about["config"])
        network.load_state_dict(tensors)
    except (KeyError, TypeError, RuntimeError) as error:
        raise StageError(f"{path}: holds no network ({str(error).splitlines()[0]})") from error
    return network.eval().requires_grad_(False), about


def convert(source: Path | str, output: Path | str) -> None:
    """Turn a pickle of EDM's into a network file. Nothing in the pickle is run, and it is not needed again.

    Args:
        source: network snapshot of NVlabs/edm.
        output: safetensors file.

    Raises:
        StageError: it holds no network that is known here.
    """
    found = load_edm(source)
    network = build(found.model_type, **found.arguments)
    try:
        network.load_state_dict(found.tensors)
    except RuntimeError as error:
        raise StageError(f"{source}: its tensors do not fit its {found.model_type} ({error!s:.200})") from error
    made = provenance({"converted": Path(source).name, "sha256": digest(source)})
    save_network(output, network, kimg=0.0, sigma_data=found.sigma_data, **made)


def save_path(path: Path | str, noise_path: NoisePath, **about: Any) -> None:
    """Write a noise path: its partition, its label weights and its schedule's knots."""
    kind = "knots" if isinstance(noise_path.schedule, KnotSchedule) else "fixed"
    curve = noise_path.schedule.curve
    tensors = {"weights": noise_path.weights, **noise_path.subspaces.state_dict()}
    save(path, {**tensors, "nodes": curve.nodes, "logs": curve.logs}, {"schedule": kind, **about})


def load_path(path: Path | str) -> tuple[NoisePath, dict[str, Any]]:
    """The path, and the header."""
    tensors, about = read(path)
    if about.get("schedule") == "knots":
        schedule = KnotSchedule(tensors["logs"])
    elif about.get("schedule") == "fixed":
        schedule = FixedSchedule(LogLinear(tensors["nodes"], tensors["logs"]))
    else:
        raise StageError(f"{path}: holds no noise path: give the file of a path")
    return NoisePath(_subspaces(tensors), schedule, tensors["weights"]), about


def _subspaces(tensors: dict[str, Tensor]) -> Subspaces | PcaSubspaces:
    return Subspaces(tensors["index"]) if "index" in tensors else PcaSubspaces(tensors["vectors"], tensors["which"])


def save_basis(path: Path | str, subspaces: PcaSubspaces, **about: Any) -> None:
    """Write principal subspaces."""
    save(path, subspaces.state_dict(), {"basis": True, **about})


def load_basis(path: Path | str) -> tuple[PcaSubspaces, dict[str, Any]]:
    """Principal subspaces, and the header."""
    tensors, about = read(path)
    if not about.get("basis"):
        raise StageError(f"{path}: holds no basis: give the file of a basis")
    return _subspaces(tensors), about


def save_warp(path: Path | str, warp: Warp, **about: Any) -> None:
    """Write the warp's knots (mean log-levels)."""
    save(path, {"logs": warp.schedule.curve.logs}, {"warp": True, **about})


def load_warp(path: Path | str, noise_path: NoisePath) -> tuple[Warp, dict[str, Any]]:
    """The warp over a path, and the header."""
    tensors, about = read(path)
    if not about.get("warp"):
        raise StageError(f"{path}: holds no warp: give the file of a warp")
    return Warp(noise_path, tensors["logs"]), about
