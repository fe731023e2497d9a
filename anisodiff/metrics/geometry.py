"""The shape of sampling trajectories (arXiv:2506.10177, Section 3).

Points are `[N, B, D]`, from the first node to the last. Coefficients of an orthonormal basis serve as well as pixels.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from anisodiff.grids.gits import from_chord
from anisodiff.paths.noise_path import NoisePath

# whose trajectories are measured, in this order
DENOISERS: tuple[str, ...] = ("network", "kernel", "gaussian", "mixture")
DIRECTIONS = 5  # beside the chord, that shapes are described in


@dataclass(frozen=True)
class Shape:
    """Trajectories seen along their chord and in principal directions perpendicular to it (Sections 3.1 and 3.2).

    The directions are of each trajectory alone and pass through the chord, where both ends lie: nothing is centred.

    Attributes:
        deviation: distance from the chord, `[N, B]`.
        to_end: distance to the last point, `[N, B]`.
        length: of the polygon, `[B]`.
        explained: share of the squared deviation in the leading 1, 2, ... directions, `[B, 5]`.
        error: distance to the projection on the chord and 0, 1, 2, ... directions, `[N, B, 6]`.
        plain: share of the variance in the leading 1, 2, 3 directions of the points themselves, centred, `[B, 3]`
            (Table 7).
        curve: coordinates along the chord and the first two directions, `[N, B, 3]`.
        directions: `[B, 5, D]`.
    """

    deviation: Float[Tensor, "n b"]
    to_end: Float[Tensor, "n b"]
    length: Float[Tensor, " b"]
    explained: Float[Tensor, "b k"]
    error: Float[Tensor, "n b m"]
    plain: Float[Tensor, "b p"]
    curve: Float[Tensor, "n b q"]
    directions: Float[Tensor, "b k d"]


def shape(points: Float[Tensor, "n b d"]) -> Shape:
    """Measure trajectories, in float64."""
    points = points.to(torch.float64)
    along, away = from_chord(points, points[0], points[-1])
    deviation = away.norm(dim=2)
    values, directions = _principal(away)
    coordinates = torch.einsum("nbd,bkd->nbk", away, directions)
    beyond = (deviation.square()[..., None] - coordinates.square().cumsum(2)).clamp(min=0).sqrt()
    plain, _ = _principal(points - points.mean(0))
    return Shape(
        deviation,
        (points - points[-1]).norm(dim=2),
        points.diff(dim=0).norm(dim=2).sum(0),
        _shares(values)[:, :DIRECTIONS],
        torch.cat([deviation[..., None], beyond], dim=2),
        _shares(plain)[:, :3],
        torch.cat([along[..., None], coordinates[..., :2]], dim=2),
        directions,
    )


def without_kinematics(
    states: Float[Tensor, "n b c h w"], levels: Float[Tensor, "n 1 j"], path: NoisePath
) -> Float[Tensor, "n b c h w"]:
    """Trajectories less the curve that their path makes of itself, whatever the data.

    Were all data one point a, a trajectory would be `a + M_t^{1/2} M_T^{-1/2} (x_T - a)`: a straight line where all
    subspaces fall together, bent where they do not. The curve of this kind between a trajectory's ends is taken from
    it, and their chord put in its place, at the path's geometric-mean level: on an isotropic path nothing changes.

    Args:
        states: coefficients at every node.
        levels: standard deviations there.
        path: whose coefficients they are.
    """
    first, last = states[0].to(torch.float64), states[-1].to(torch.float64)
    levels = levels.to(torch.float64)
    shares = levels / levels[0]
    mean = path.mean_log(levels[:, 0].square()).div(2).exp()
    even = (mean / mean[0])[:, None, None].expand_as(shares)

    def curve(falls: Tensor) -> Tensor:
        ends = falls[-1]
        point = path.scale(last - path.scale(first, ends), 1 / (1 - ends))
        return torch.stack([point + path.scale(first - point, share) for share in falls])

    return states.to(torch.float64) - curve(shares) + curve(even)


def _principal(points: Tensor) -> tuple[Tensor, Tensor]:
    """Squared singular values `[B, min(N, D)]` and leading right singular vectors of every trajectory."""
    _, values, vectors = torch.linalg.svd(points.transpose(0, 1), full_matrices=False)
    return values.square(), vectors[:, :DIRECTIONS]


def _shares(values: Tensor) -> Tensor:
    return values.cumsum(1) / values.sum(1, keepdim=True)


def single_peak(deviation: Float[Tensor, "n b"], prominence: float = 0.05) -> Float[Tensor, " b"]:
    """1 where a trajectory leaves its chord and comes back once, as a boomerang does; 0 where it does so more often.

    Args:
        deviation: of a `Shape`.
        prominence: of a maximum that counts, as a share of the largest deviation.
    """
    from scipy.signal import find_peaks  # half as long to import as torch, and every sampling job imports this file

    curves = deviation.T.numpy()
    found = [len(find_peaks(curve, prominence=prominence * curve.max())[0]) for curve in curves]
    return torch.tensor([float(count == 1) for count in found], dtype=torch.float64)


def aligned(curve: Float[Tensor, "n b 3"]) -> tuple[Float[Tensor, "n b 3"], Float[Tensor, " b"]]:
    """Turn and mirror curves about their chords onto one another (orthogonal Procrustes, Eq. 13).

    Returns:
        the turned curves, and how far each is from their mean perpendicular to the chord: a share of the mean's size,
        each curve in units of its own largest deviation.
    """
    from scipy.linalg import orthogonal_procrustes

    planes = curve[..., 1:].numpy()
    sizes = np.linalg.norm(planes, axis=2).max(0)
    unit = planes / np.where(sizes > 0, sizes, 1)[:, None]
    turned, reference = [], unit[:, 0]
    for _ in range(3):  # to the mean, which the turns change
        turned = [unit[:, b] @ orthogonal_procrustes(unit[:, b], reference)[0] for b in range(unit.shape[1])]
        reference = np.mean(turned, axis=0)
    away = np.array([np.linalg.norm(each - reference) / np.linalg.norm(reference) for each in turned])
    peak = np.abs(reference[:, 0]).argmax()
    way_there = [reference[peak, 0], reference[:peak, 1].sum()]
    upright = np.where(np.less(way_there, 0), -1.0, 1.0)  # so that those of other denoisers look alike
    back = torch.from_numpy(np.stack(turned, axis=1) * sizes[:, None] * upright)
    return torch.cat([curve[..., :1], back], dim=2), torch.from_numpy(away)


@dataclass(frozen=True)
class Bending:
    """Curvature and torsion of curves in three dimensions, at every node (Section 3.3).

    Attributes:
        arc: length of the curve up to the node, `[N, B]`.
        curvature: `[N, B]`, a pixel value's inverse.
        torsion: `[N, B]`, the same unit; where the curvature is next to nothing, so is its meaning.
    """

    arc: Float[Tensor, "n b"]
    curvature: Float[Tensor, "n b"]
    torsion: Float[Tensor, "n b"]


def bending(curve: Float[Tensor, "n b 3"], half: int) -> Bending:
    """Curvature and torsion by cubics fitted to the nodes around each by least squares (Eq. 15; Lewiner et al. 2005).

    Args:
        curve: from `shape`, in float64.
        half: nodes on either side; at the ends of the curve the window stays inside.
    """
    count, curves = curve.shape[:2]
    steps = curve.diff(dim=0).norm(dim=2)
    arc = torch.cat([torch.zeros(1, curves, dtype=curve.dtype), steps.cumsum(0)])
    starts = (torch.arange(count) - half).clamp(0, count - 2 * half - 1)
    window = starts[:, None] + torch.arange(2 * half + 1)
    offset = (arc[window] - arc[:, None]).permute(0, 2, 1)  # [N, B, W]
    unit = offset.abs().amax(2, keepdim=True)
    h = offset / unit
    terms = torch.stack([torch.ones_like(h), h, h.square() / 2, h**3 / 6], dim=3)
    points = (curve[window] - curve[:, None]).permute(0, 2, 1, 3)
    fitted = torch.linalg.lstsq(terms, points).solution
    first, second, third = (fitted[..., k, :] / unit**k for k in (1, 2, 3))
    cross = torch.linalg.cross(first, second)
    area = cross.square().sum(2)
    torsion = (cross * third).sum(2) / area.clamp(min=torch.finfo(area.dtype).tiny)
    return Bending(arc, area.sqrt() / first.norm(dim=2) ** 3, torsion)
