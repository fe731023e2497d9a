"""Tuned solvers in files: the numbers of every budget, and what they were tuned for."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor

from anisodiff.errors import StageError, naming
from anisodiff.grids.levels import at
from anisodiff.paths.noise_path import NoisePath
from anisodiff.solvers.tuned import Cells, TunedStep
from anisodiff.storage import checkpoints
from anisodiff.storage.files import Metadata


def save_tuning(file: Path | str, steps: Mapping[int, TunedStep], subspaces: str, **metadata: Any) -> None:
    """Write the solvers of several budgets.

    Args:
        file: the file to write.
        steps: one a budget (NFE).
        subspaces: kind of the solver's own, as `Cells` takes it.
        metadata: more of the header.
    """
    tensors = {}
    for nfe, step in steps.items():
        tensors |= {f"{nfe}/nodes": step.levels.nodes, f"{nfe}/told": step.told, f"{nfe}/weights": step.weights}
    of_flows = any(step.of_flows for step in steps.values())
    header = {"tuning": True, "subspaces": subspaces, "of_flows": of_flows, "budgets": list(steps)}
    checkpoints.save(file, {name: each.detach().cpu() for name, each in tensors.items()}, header | metadata)


def load_tuning(path: Path | str, noise_path: NoisePath, nfe: int) -> tuple[TunedStep, Metadata]:
    """Read the solver of a budget, and the header.

    Args:
        path: the file, from `save_tuning`.
        noise_path: that it was tuned on; only its subspaces are compared.
        nfe: the budget, evaluations an image.

    Raises:
        StageError: the file holds no tuning, or none for this budget or for paths of such subspaces.
    """
    tensors, metadata = checkpoints.read(path)
    budgets = metadata.get("budgets")
    if not metadata.get("tuning") or not isinstance(budgets, list):
        raise StageError(f"{path}: holds no tuning: give the file of a tuning")
    if nfe not in budgets:
        known = ", ".join(map(str, budgets))
        raise StageError(f"{path}: not tuned for {nfe} evaluations: use one of {known}, or add it to the tuning's nfe")
    try:
        nodes = checkpoints.taken(tensors, f"{nfe}/nodes", Float[Tensor, "n l j"])
        told = checkpoints.taken(tensors, f"{nfe}/told", Float[Tensor, "n l j"])
        weights = checkpoints.taken(tensors, f"{nfe}/weights", Float[Tensor, "n w l m"])
        with naming(path, "tune on this path, or take the path of the tuning"):
            cells = Cells(noise_path.subspaces, str(metadata.get("subspaces")))
        append_zero = bool((nodes[-1] == 0).all())
        levels = at(nodes[:-1] if append_zero else nodes, append_zero)
        count, per_class, subspaces = nodes.shape
        if subspaces != noise_path.subspaces.count:
            raise StageError(
                f"{path}: tuned on a path of {subspaces} subspaces, this one has {noise_path.subspaces.count}: "
                "take the path of the tuning"
            )
        wanted = (count - 1, per_class, subspaces), (count - 1, per_class, len(cells.band))
        if (told.shape, (len(weights), *weights.shape[2:])) != wanted or weights.shape[1] < 2:
            raise ValueError(f"labels {list(told.shape)} and weights {list(weights.shape)} for levels {wanted[0]}")
    except ValueError as error:
        raise StageError(f"{path}: holds no tuned solver for {nfe} ({error}): tune again") from error
    return TunedStep(levels, told, weights, cells, bool(metadata.get("of_flows"))), metadata


def save_pairs(path: Path | str, noise: Tensor, labels: Tensor | None, images: Tensor, **metadata: Any) -> None:
    """Write noises and a teacher's images of them.

    Args:
        path: the file to write.
        noise: standard normal, in pixels, `[N, C, H, W]`.
        labels: one-hot classes, `[N, K]`, or None.
        images: the teacher's, in pixels, `[N, C, H, W]`.
        metadata: more of the header.
    """
    tensors = {"noise": noise, "images": images} | ({} if labels is None else {"labels": labels})
    checkpoints.save(path, tensors, {"pairs": True} | metadata)


def load_pairs(path: Path | str) -> tuple[tuple[Tensor, Tensor | None, Tensor], Metadata]:
    """Read noises, labels and images, shaped as `save_pairs` takes them, and the header.

    Raises:
        StageError: the file holds none, or images that are not finite.
    """
    tensors, metadata = checkpoints.read(path)
    try:
        if not metadata.get("pairs"):
            raise ValueError("it does not say that it is some")
        noise, images = (checkpoints.taken(tensors, name, Float[Tensor, "n c h w"]) for name in ("noise", "images"))
        labels = checkpoints.taken(tensors, "labels", Float[Tensor, "n k"]) if "labels" in tensors else None
        if noise.shape != images.shape or (labels is not None and len(labels) != len(noise)):
            raise ValueError(f"{len(noise)} noises and {len(images)} images")
        return (noise, labels, images), metadata
    except ValueError as error:
        raise StageError(f"{path}: holds no pairs ({error}): make them again") from error
