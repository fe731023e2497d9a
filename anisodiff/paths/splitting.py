"""Paths that start from others: on the same subspaces, or on finer ones."""

import copy

import torch
from jaxtyping import Float
from torch import Tensor

from anisodiff.errors import InvalidArgument
from anisodiff.paths.noise_path import NoisePath
from anisodiff.paths.rotated import RotatedBasis
from anisodiff.paths.schedules import ExponentSchedule, KnotSchedule, LogLinear
from anisodiff.paths.subspaces import Basis, Subspaces


def label_weights(subspaces: Basis, kind: str) -> Tensor | None:
    """Weights of the mean log-level: "rank", or "equal" per subspace as the paper's J = 2."""
    if kind == "equal":
        return torch.full((subspaces.count,), 1 / subspaces.count, dtype=torch.float64)
    return None


def _continued(old: Basis, new: Basis) -> Basis | None:
    """The basis of a path that goes on where its schedules are: turned as it was, or one that spans the same."""
    if isinstance(new, RotatedBasis) and new.turns_from(old):
        return copy.deepcopy(old)
    if isinstance(new, RotatedBasis) and isinstance(old, Subspaces):
        unturned = new.start == "dct" and not new.turn.any()
        same = unturned and new.size == old.size and torch.equal(new.index, old.index.expand_as(new.index))
        return new if same else None
    before, after = old.state_dict(), new.state_dict()
    same = before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in after)
    return new if same else None


def _resampled(curve: LogLinear, knots: int) -> Float[Tensor, "*l j k"]:
    """Log variances at uniform knots."""
    t = torch.linspace(0, 1, knots, dtype=torch.float64, device=curve.nodes.device)
    classes = curve.logs if curve.logs.ndim == 3 else curve.logs[None]
    logs = torch.stack([LogLinear(curve.nodes, each)(t).g.log().T for each in classes])
    return logs if curve.logs.ndim == 3 else logs[0]


def split_path(
    path: NoisePath, subspaces: Basis, weights: str, classes: int = 0, knots: int = 32, held: bool = False
) -> NoisePath:
    """A path that learns on from another: on its own subspaces, or on finer ones that all start as the isotropic one.

    Args:
        path: the one to start from.
        subspaces: those that the new path is on. A path whose basis has turned from where this one starts goes on with
            its own; a basis at the DCT takes up the schedules of a path on the same modes.
        weights: how its mean log-level weighs subspaces, by "rank" or "equal".
        classes: number of classes that get a schedule each; 0 is one for all.
        knots: of the new schedule where the old one has no uniform knots.
        held: the schedule will not learn: on its own subspaces it stays what it is, whatever its knots.

    Raises:
        InvalidArgument: the path cannot be split so.
    """
    basis = _continued(path.subspaces, subspaces)
    if basis is None and path.subspaces.count != 1:
        raise InvalidArgument(f"subspaces: a path of {path.subspaces.count} subspaces cannot start one on others")
    if held and basis is not None and classes == path.classes:
        return NoisePath(basis, path.schedule, label_weights(basis, weights))
    basis = subspaces if basis is None else basis
    if isinstance(path.schedule, ExponentSchedule):
        if classes:
            raise InvalidArgument("schedules: exponents are shared by all classes: use knots for one a class")
        rates = path.schedule.log_lambda.expand(basis.count)
        return NoisePath(basis, ExponentSchedule(rates, path.schedule.ends), label_weights(basis, weights))
    logs = path.curve.logs.detach() if isinstance(path.schedule, KnotSchedule) else _resampled(path.curve, knots)
    logs = logs.expand(*logs.shape[:-2], basis.count, -1)
    if classes and logs.ndim == 2:
        logs = logs.expand(classes, -1, -1)
    elif bool(classes) != (logs.ndim == 3):
        raise InvalidArgument("schedules: a path with a schedule a class cannot start a shared one")
    return NoisePath(basis, KnotSchedule(logs), label_weights(basis, weights))
