"""Paths that start from others: on the same subspaces, or on finer ones."""

import torch
from torch import Tensor

from anisodiff.errors import InvalidArgument
from anisodiff.paths.noise_path import NoisePath
from anisodiff.paths.principal import PcaSubspaces
from anisodiff.paths.schedules import KnotSchedule
from anisodiff.paths.subspaces import Subspaces


def label_weights(subspaces: Subspaces | PcaSubspaces, kind: str) -> Tensor | None:
    """Weights of the mean log-level: "rank", or "equal" per subspace as the paper's J = 2."""
    if kind == "equal":
        return torch.full((subspaces.count,), 1 / subspaces.count, dtype=torch.float64)
    return None


def split_path(path: NoisePath, subspaces: Subspaces | PcaSubspaces, weights: str, classes: int = 0) -> NoisePath:
    """A path that learns on from another: on its own subspaces, or on finer ones that all start as the isotropic one.

    Args:
        path: the one to start from.
        subspaces: those that the new path is on.
        weights: how its mean log-level weighs subspaces, by "rank" or "equal".
        classes: number of classes that get a schedule each; 0 is one for all.

    Raises:
        InvalidArgument: the path cannot be split so.
    """
    logs = path.curve.logs.detach()
    old, new = path.subspaces.state_dict(), subspaces.state_dict()
    if old.keys() != new.keys() or not all(torch.equal(old[key], new[key]) for key in new):
        if logs.shape[-2] != 1:
            raise InvalidArgument(f"subspaces: a path of {logs.shape[-2]} subspaces cannot start one on others")
        logs = logs.expand(*logs.shape[:-2], subspaces.count, -1)
    if classes and logs.ndim == 2:
        logs = logs.expand(classes, -1, -1)
    elif bool(classes) != (logs.ndim == 3):
        raise InvalidArgument("schedules: a path with a schedule a class cannot start a shared one")
    return NoisePath(subspaces, KnotSchedule(logs), label_weights(subspaces, weights))
