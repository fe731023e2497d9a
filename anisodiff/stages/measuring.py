"""The geometry stage: shapes of the trajectories of a network over a path, beside those of closed-form denoisers."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from anisodiff.compute import CPU, Compute
from anisodiff.data import image_sets
from anisodiff.denoiser import Denoiser
from anisodiff.errors import StageError
from anisodiff.exact.closed_forms import GaussianDenoiser, KernelDenoiser
from anisodiff.experiment.settings import GeometrySettings, ImageSpace
from anisodiff.grids import fixed
from anisodiff.grids.levels import Levels
from anisodiff.methods import check_images, read_denoiser
from anisodiff.metrics import geometry
from anisodiff.metrics.gaussians import fit_gaussians
from anisodiff.paths.noise_path import NoisePath
from anisodiff.solvers.generation import draw_for, start
from anisodiff.solvers.loop import solve
from anisodiff.solvers.singlestep import State, euler
from anisodiff.solvers.trajectories import Trajectory, record_trajectory
from anisodiff.storage import checkpoints
from anisodiff.storage.files import provenance

BATCH = 32  # trajectories at a time; those that are looked at one by one are in the first batch
STRIP = 9  # nodes of the pictures
WATCHED = 8  # images of the data whose weights are followed
NEIGHBOURS = 5


@dataclass(frozen=True)
class _Run:
    """What a denoiser is run on.

    Attributes:
        noise: in pixels, one trajectory each.
        labels: one-hot classes.
        levels: of Euler's steps.
        fine: of the steps between which curvature and torsion are fitted.
        shown: trajectories that are looked at one by one.
    """

    noise: Float[Tensor, "b c h w"]
    labels: Float[Tensor, "b k"] | None
    levels: Levels
    fine: Levels
    shown: int

    @property
    def steps(self) -> int:
        """Euler's steps of all batches, and of those that are shown on the fine grid."""
        return -(-len(self.noise) // BATCH) * self.levels.steps + self.fine.steps

    def batches(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Noise and labels, a batch at a time."""
        for first in range(0, len(self.noise), BATCH):
            rows = slice(first, first + BATCH)
            yield self.noise[rows], None if self.labels is None else self.labels[rows]

    def alone(self) -> "_Run":
        """Only what is looked at one by one, in float64: for closed forms."""
        labels = None if self.labels is None else self.labels[: self.shown]
        return replace(self, noise=self.noise[: self.shown].to(torch.float64), labels=labels)


def measure_geometry(
    space: ImageSpace,
    settings: GeometrySettings,
    images: Path,
    network_file: Path,
    path_file: Path,
    output: Path,
    compute: Compute = CPU,
) -> None:
    """Measure trajectories by Euler's steps, at times when the path's geometric-mean level is on EDM's polynomial grid.

    Args:
        space: what the dataset says of its images.
        settings: of the measurement.
        images: made by the stage `images`; the closed forms are for its training images.
        network_file: the network.
        path_file: the path.
        output: safetensors file; its header has a summary of each denoiser.
        compute: where, and in which precision.
    """
    from tqdm import tqdm

    began = time.monotonic()
    compute = compute.begin()
    denoiser, headers = read_denoiser(network_file, path_file, space, compute)
    check_images(denoiser.network, image_sets.load(images).shape, network_file)
    models = {"network": denoiser} | _closed_forms(space, settings, images, denoiser.path, compute.device)
    ends = space.sigma_min, space.sigma_max
    levels, means = fixed.at_mean_levels(denoiser.path, settings.steps + 1, *ends)
    fine, fine_means = fixed.at_mean_levels(denoiser.path, settings.fine_steps + 1, *ends)
    seeds = range(settings.seed, settings.seed + settings.images)
    noise, labels = draw_for(denoiser, seeds, space.class_conditional, compute.device)
    shown = min(settings.shown, settings.images)
    run = _Run(noise, labels, levels.to(compute.device), fine.to(compute.device), shown)
    tensors, summary, trajectories = {"means": means, "levels": levels.nodes[:, 0], "fine_means": fine_means}, {}, {}
    runs = {kind: run if kind == "network" else run.alone() for kind in models}
    with tqdm(total=sum(each.steps for each in runs.values()), desc="geometry", unit="step", mininterval=5) as bar:
        for kind, model in models.items():
            bar.set_postfix_str(kind)
            found, trajectories[kind] = _measured(model, runs[kind], bar.update)
            summary[kind] = _summary(found, means, noise[0].numel())
            tensors |= {f"{kind}.{key}": value for key, value in found.items()}
    kernel, gaussian = models.get("kernel"), models.get("gaussian")
    if isinstance(kernel, KernelDenoiser):
        summary["kernel"]["data"] = len(kernel.images)
        found, summary["network"]["close_to_optimum"] = _against_optimum(
            denoiser, kernel, trajectories["network"], trajectories["kernel"], run.alone().labels
        )
        tensors |= found
    if isinstance(gaussian, GaussianDenoiser):
        tensors |= _residuals(gaussian, trajectories["gaussian"])
    made = provenance({"dataset": space, "geometry": settings}, headers)
    made |= {"geometry": True, "summary": summary, "environment": compute.environment()}
    stored = {key: value.to(torch.float32) for key, value in tensors.items()}
    checkpoints.save(output, stored, made | {"device_seconds": round(time.monotonic() - began, 1)})


def _closed_forms(
    space: ImageSpace, settings: GeometrySettings, folder: Path, path: NoisePath, device: str
) -> dict[str, Denoiser]:
    kinds = settings.exact
    if not kinds:
        return {}
    train, _ = image_sets.load(folder).split(space.heldout)
    made: dict[str, Denoiser] = {}
    if "kernel" in kinds:
        rows = torch.arange(len(train)) if train.rows is None else train.rows
        some = image_sets.Images(train.pixels, train.labels, train.classes, rows[: settings.data])
        made["kernel"] = KernelDenoiser(path, some, device)
    for kind in ("gaussian", "mixture"):
        if kind in kinds:
            if kind == "mixture" and not train.classes:
                raise StageError(f"{folder}: has no classes for a mixture: leave it out of the geometry's exact")
            fitted = fit_gaussians(train, settings.rank, per_class=kind == "mixture")
            made[kind] = GaussianDenoiser(path, *(each.to(device) for each in fitted))
    return made


def _measured(model: Denoiser, run: _Run, told: Callable[[], object]) -> tuple[dict[str, Tensor], Trajectory]:
    """What is measured of every trajectory, and those that are shown.

    Args:
        model: the denoiser.
        run: what it is run on.
        told: called after each step.
    """
    shapes, free, norms, first = [], [], [], None
    for noise, labels in run.batches():
        recorded = record_trajectory(
            model, noise, run.levels, labels, euler, keep_flows=True, told=lambda done, total: told()
        )
        if recorded.flows is None:
            raise StageError("geometry: no flows were kept")
        shapes.append(geometry.shape(recorded.states.flatten(2).cpu()))
        left = geometry.without_kinematics(recorded.states, run.levels.nodes, model.path)
        free.append(geometry.shape(left.flatten(2).cpu()))
        norms.append(recorded.flows.flatten(2).norm(dim=2).cpu() / noise[0].numel() ** 0.5)
        first = first or recorded
    if first is None:
        raise StageError("geometry: has no images: give one or more")
    join = lambda name, dim, of=shapes: torch.cat([getattr(each, name) for each in of], dim)  # noqa: E731
    found = {name: join(name, 1) for name in ("deviation", "to_end", "error")} | {"norm": torch.cat(norms, 1)}
    found |= {name: join(name, 0) for name in ("length", "explained", "plain")}
    found |= {"residual_deviation": join("deviation", 1, free), "residual_explained": join("explained", 0, free)}
    curve, found["unlike"] = geometry.aligned(join("curve", 1))
    found["curve"] = curve[:, : run.shown]
    kept = first.first(run.shown)
    return found | _bent(model, run, kept.states, shapes[0].directions[: run.shown], told), kept


def _summary(found: dict[str, Tensor], means: Tensor, size: int) -> dict[str, int | float]:
    """Means over trajectories of what `_measured` found.

    Args:
        found: from there.
        means: levels of the nodes.
        size: of an image, in pixel values.
    """
    largest, place = found["deviation"].max(0)
    lengths = found["length"] / (float(means[0]) * size**0.5)
    residual, residual_place = found["residual_deviation"].max(0)
    left = found["error"][..., 2].max(0).values / largest
    return {
        "trajectories": len(largest),
        "steps": len(means) - 1,
        "deviation": float(largest.mean()),
        "deviation_std": float(largest.std()),
        "deviation_of_chord": float((largest / found["to_end"][0]).mean()),
        "level_of_deviation": float(means[place].median()),
        "residual": float(residual.mean()),
        "residual_std": float(residual.std()),
        "residual_level": float(means[residual_place].median()),
        "residual_explained_1": float(found["residual_explained"][:, 0].mean()),
        "residual_explained_2": float(found["residual_explained"][:, 1].mean()),
        "single_peak": float(geometry.single_peak(found["deviation"]).mean()),
        "explained_1": float(found["explained"][:, 0].mean()),
        "explained_2": float(found["explained"][:, 1].mean()),
        "explained_2_std": float(found["explained"][:, 1].std()),
        **{f"plain_{k + 1}": float(found["plain"][:, k].mean()) for k in range(3)},
        "left_in_3d": float(left.mean()),
        "unlike": float(found["unlike"].mean()),
        "unlike_std": float(found["unlike"].std()),
        "turning": float(found["turning"].mean()),
        "length": float(lengths.mean()),
        "length_std": float(lengths.std()),
        "norm": float(found["norm"].mean()),
        "norm_last": float(found["norm"][-1].mean()),
    }


def _bent(
    model: Denoiser, run: _Run, states: Tensor, directions: Tensor, told: Callable[[], object]
) -> dict[str, Tensor]:
    """Curvature and torsion of the shown trajectories on the fine grid, in the space that they span on the other.

    Args:
        model: the denoiser.
        run: what it is run on.
        states: the shown trajectories on the coarser grid.
        directions: theirs, from `geometry.shape`.
        told: called after each step.
    """
    points = states[[0, -1]].flatten(2).to("cpu", torch.float64)
    chord = torch.nn.functional.normalize(points[0] - points[1], dim=1)
    frame = torch.cat([chord[:, None], directions[:, :2]], dim=1)
    curve: list[Tensor] = []

    def project(z: Tensor) -> None:
        curve.append(torch.einsum("bd,bkd->bk", z.flatten(1).to("cpu", torch.float64) - points[1], frame))

    noise, labels = run.noise[: run.shown], None if run.labels is None else run.labels[: run.shown]
    first = start(model, noise, run.fine, labels)

    def watch(k: int, state: State) -> None:
        project(state.z)
        told()

    project(first)
    solve(model, first, run.fine, euler, labels, watch)
    bent = geometry.bending(torch.stack(curve), max(2, run.fine.steps // 40))
    turning = torch.rad2deg(torch.trapezoid(bent.curvature, bent.arc, dim=0))
    return {"arc": bent.arc, "curvature": bent.curvature, "torsion": bent.torsion, "turning": turning}


def _residuals(model: GaussianDenoiser, recorded: Trajectory) -> dict[str, Tensor]:
    """What Proposition 4 says of a Gaussian: its variances, the first trajectory's start in its directions, and how far
    all are from the point of the chord with as much of the noise, `[N, S]`.
    """
    rows, first, last = model.factors[0].flatten(1), recorded.states[0], recorded.states[-1]
    variances = rows.square().sum(1)
    shares = recorded.levels.nodes / recorded.levels.nodes[0]
    chord = torch.stack([last + recorded.problem.scale(first - last, share) for share in shares])
    return {
        "gaussian.variances": variances,
        "gaussian.projections": rows @ (first[0] - model.means[0]).flatten() / variances.sqrt(),
        "gaussian.residual": _apart(recorded.states, chord),
    }


def _apart(a: Tensor, b: Tensor) -> Tensor:
    return (a.to(torch.float64) - b).flatten(2).norm(dim=2)


def _against_optimum(
    denoiser: Denoiser,
    kernel: KernelDenoiser,
    sampled: Trajectory,
    optimal: Trajectory,
    labels: Float[Tensor, "b k"] | None,
) -> tuple[dict[str, Tensor], float]:
    """Network and optimum along each other's trajectories (Appendix C.2), and how the optimum's weights settle.

    Returns:
        tensors, and the share of steps at which the network is no farther from the optimum than the point is: the
        assumption of Proposition 3.
    """
    best, learnt, entropies, weights = [], [], {"sampled": [], "optimal": []}, []
    with torch.no_grad():
        for sigma, here, there in zip(sampled.levels.nodes[:-1], sampled.states, optimal.states, strict=False):
            g = sigma.square()
            at = {"sampled": kernel.log_weights(here, g, labels), "optimal": kernel.log_weights(there, g, labels)}
            for name, logs in at.items():
                entropies[name].append(torch.special.entr(logs.exp()).sum(1))
            best.append(kernel.mean(at["sampled"]))
            weights.append(at["optimal"][0].exp())
            learnt.append(denoiser.denoise(there.to(here.dtype), g, labels))
    best, learnt, weights = torch.stack(best), torch.stack(learnt), torch.stack(weights)
    watched = weights.amax(0).topk(min(WATCHED, weights.shape[1])).indices
    off = _apart(sampled.denoised, best)
    within = (off <= _apart(sampled.states[:-1], best)).to(torch.float64).mean()
    rows = [sampled.states[:-1], sampled.denoised, best, optimal.states[:-1], optimal.denoised, learnt]
    chosen = torch.linspace(0, len(best) - 1, STRIP).round().to(torch.int64)
    ends = torch.stack([sampled.states[-1, 0].to(torch.float64), optimal.states[-1, 0]])
    to_pixels = denoiser.path.to_pixels
    found = {
        **{f"entropy.{name}": torch.stack(values) for name, values in entropies.items()},
        "weights": weights[:, watched],
        "score_deviation.sampled": off,
        "score_deviation.optimal": _apart(learnt, optimal.denoised),
        "strips": torch.stack([to_pixels(row[chosen.to(row.device), 0]).to(torch.float32) for row in rows]),
        "strip_nodes": chosen,
        "ends": to_pixels(ends),
        "neighbours": torch.stack([to_pixels(each) for each in kernel.nearest(ends, NEIGHBOURS)]),
    }
    return found, float(within)
