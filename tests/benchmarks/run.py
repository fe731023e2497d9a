"""What the method costs over EDM, as ratios measured in one run: `make bench`. Prints a table; asserts nothing."""

import argparse
import multiprocessing
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from anisodiff.denoiser import Denoiser
from anisodiff.grids.fixed import karras, uniform
from anisodiff.grids.learned import FreeLevels
from anisodiff.networks.unets import SongUNet
from anisodiff.objectives.losses import edm_loss, tlsm_loss
from anisodiff.objectives.tuning import squared_error, student_images
from anisodiff.paths.noise_path import NoisePath
from anisodiff.paths.rotated import rotated_basis
from anisodiff.paths.schedules import KnotSchedule, karras_logs
from anisodiff.paths.subspaces import Subspaces, dct_matrix, partition
from anisodiff.solvers.generation import start
from anisodiff.solvers.loop import solve
from anisodiff.solvers.registry import SOLVERS
from anisodiff.solvers.singlestep import midpoint
from anisodiff.solvers.tuned import TunedSolver

SHAPE = (3, 32, 32)


def denoiser(kind: str, device: str) -> Denoiser:
    torch.manual_seed(0)
    network = SongUNet(
        32, 3, 3, model_channels=64, channel_mult=(1, 2), num_blocks=1, attn_resolutions=(16,), dropout=0.0
    )
    subspaces = rotated_basis(kind, SHAPE) if kind.startswith("separable") else Subspaces(partition(32, kind))
    logs = karras_logs(32, 1e-9, 0.002, 80.0).expand(subspaces.count, -1)
    return Denoiser(network, NoisePath(subspaces, KnotSchedule(logs))).to(device)


def seconds(calls: dict[str, Callable[[], object]], device: str, repeats: int) -> dict[str, float]:
    """Median time of each call; calls take turns, so that a slow moment of the machine meets all."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(repeats + 1):
        for name, call in calls.items():
            began = time.perf_counter()
            call()
            if device.startswith("cuda"):
                torch.cuda.synchronize()
            if turn:  # the first warms up
                times[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in times.items()}


def sampler(device: str, repeats: int, batch: int = 64) -> list[tuple[str, float, str]]:
    """One evaluation inside a sampler over one forward of the bare network."""
    rows = []
    models = {kind: denoiser(kind, device) for kind in ("whole", "block", "radial:8", "separable:8")}
    noise = torch.randn(batch, *SHAPE, device=device)
    label = torch.zeros(batch, device=device)

    def bare() -> None:
        with torch.no_grad():
            for _ in range(5):
                models["whole"].network(noise, label)

    calls = {"bare": bare}
    for kind, model in models.items():
        levels = uniform(model.path, 3)
        calls[kind] = lambda model=model, levels=levels: solve(model, start(model, noise, levels), levels, midpoint)
    times = seconds(calls, device, repeats)
    for kind in ("whole", "block", "radial:8"):
        name = f"sampler evaluation, {models[kind].path.subspaces.count} subspaces / bare forward"
        rows.append((name, times[kind] / times["bare"], "<= 1.05"))
    rows.append(("sampler on separable:8 / on radial:8", times["separable:8"] / times["radial:8"], "<= 1.1"))
    return rows


def tuned_solver(model: Denoiser, steps: int, kind: str, device: str) -> TunedSolver:
    levels = karras(steps + 1, model.path.subspaces.count, 0.002, 80.0, append_zero=False)
    return TunedSolver(model.path, FreeLevels(levels), subspaces=kind).to(device)


def tuned_sampler(device: str, repeats: int, batch: int = 8, steps: int = 6) -> list[tuple[str, float, str]]:
    """A tuned solver over DPM-Solver++(3M), at equal evaluations."""
    noise, rows = 80 * torch.randn(batch, *SHAPE, device=device), []
    for path_kind, kind in (("whole", "whole"), ("whole", "radial:4"), ("block", "radial:4")):
        model = denoiser(path_kind, device)
        with torch.no_grad():
            step = tuned_solver(model, steps, kind, device)()
        levels = step.levels
        calls = {
            "dpmpp": lambda model=model, levels=levels: solve(model, noise, levels, SOLVERS["dpmpp"].with_order()),
            "tuned": lambda model=model, levels=levels, step=step: solve(model, noise, levels, step),
        }
        times = seconds(calls, device, repeats)
        name = f"tuned sampler in {kind} on a path in {path_kind} / dpmpp, {steps} evaluations"
        rows.append((name, times["tuned"] / times["dpmpp"], "<= 1.02"))
    return rows


def transform(device: str, repeats: int, batch: int = 64) -> list[tuple[str, float, str]]:
    """Separable basis transform over the dense projection on `[K, H, W]` vectors, both of the low-frequency block."""
    subspaces = Subspaces(partition(32, "block")).to(device)
    modes = dct_matrix(32).float().to(device)
    vectors = torch.einsum("ph,qw->pqhw", modes[:16], modes[:16]).reshape(256, 32, 32)
    x = torch.randn(batch, *SHAPE, device=device)
    values = torch.tensor([[2.0, 3.0]], device=device)

    def dense() -> torch.Tensor:
        low = torch.einsum("bck,khw->bchw", torch.einsum("bchw,khw->bck", x, vectors), vectors)
        return 2.0 * low + 3.0 * (x - low)

    def separable() -> torch.Tensor:
        return subspaces.to_pixels(subspaces.scale(subspaces.from_pixels(x), values))

    assert torch.allclose(dense(), separable(), atol=1e-3)
    times = seconds({"dense": dense, "separable": separable}, device, 5 * repeats)
    return [("separable transform / dense projection", times["separable"] / times["dense"], "< 1")]


STEPS = {
    "edm": None,
    "tlsm, envelope": 0.0,
    "tlsm, default share (1/8)": 0.125,
    "tlsm, full estimate (share 1)": 1.0,
}


def training_step(name: str, device: str, batch: int = 32) -> Callable[[], None]:
    model = denoiser("whole" if name == "edm" else "block", device)
    parameters = [*model.network.parameters(), *([] if name == "edm" else model.path.parameters())]
    optimizer = torch.optim.Adam(parameters, lr=1e-4)
    x0, eps = torch.randn(2, batch, *SHAPE, device=device)
    t = torch.rand(batch, device=device, dtype=torch.float64)
    sigma = torch.rand(batch, device=device) + 0.1
    share = STEPS[name]

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        if share is None:
            loss = edm_loss(model, x0, eps, sigma)
        else:
            count = round(share * batch)
            probes = torch.randn(1, count, *SHAPE, device=device).sign() if count else None
            loss = tlsm_loss(model, x0, eps, t, probes=probes)
        loss.mean().backward()
        optimizer.step()

    return step


def steps(device: str, repeats: int) -> list[tuple[str, float, str]]:
    """A TLSM step over a plain EDM step, on the same network and batch."""
    times = seconds({name: training_step(name, device) for name in STEPS}, device, repeats)
    targets = {"tlsm, default share (1/8)": "<= 1.5", "tlsm, full estimate (share 1)": "<= 2.7"}
    return [
        (f"step time: {name} / edm", times[name] / times["edm"], targets.get(name, ""))
        for name in STEPS
        if name != "edm"
    ]


def tuning_step(steps: int, recompute: bool, device: str, batch: int = 8) -> Callable[[], None]:
    model = denoiser("whole", device).requires_grad_(False)
    solver = tuned_solver(model, steps, "radial:4", device)
    noise, images = torch.randn(2, batch, *SHAPE, device=device)
    return lambda: squared_error(student_images(model, solver(), noise, None, recompute), images).mean().backward()


def _peak(make: Callable[..., Callable[[], None]], device: str, results: "multiprocessing.Queue") -> None:
    torch.set_num_threads(1)
    step = make(device=device)
    Path("/proc/self/clear_refs").write_text("5")  # start the peak anew
    before = _status("VmRSS")
    for _ in range(2):
        step()
    results.put(torch.cuda.max_memory_allocated() / 2**20 if device.startswith("cuda") else _status("VmHWM") - before)


def _status(key: str) -> float:
    """Of this process on Linux, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(key))


def memory(device: str) -> list[tuple[str, float, str]]:
    """Peak memory of two steps over that of EDM's, and of a tuning's, each in a process of its own."""
    context = multiprocessing.get_context("spawn")

    def peak(make: Callable[..., Callable[[], None]]) -> float:
        results = context.Queue()
        process = context.Process(target=_peak, args=(make, device, results))
        process.start()
        found = results.get()
        process.join()
        return found

    peaks = {name: peak(partial(training_step, name)) for name in STEPS}
    rows = [("peak memory: edm, MiB above start", peaks["edm"], "")]
    rows += [(f"peak memory: {name} / edm", peaks[name] / peaks["edm"], "") for name in STEPS if name != "edm"]
    for how, recompute in (("kept", False), ("recomputed", True)):
        few, many = (peak(partial(tuning_step, steps, recompute)) for steps in (2, 6))
        target = "<= 1.2" if recompute else ""
        rows.append((f"peak memory: tuning 6 evaluations / 2, activations {how}", many / few, target))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"torch {torch.__version__}, {options.device}, {options.threads} threads, median of {options.repeats}\n")
    print("| measured | ratio | target |\n| --- | --- | --- |", flush=True)
    for rows in (sampler, tuned_sampler, transform, steps):
        for name, ratio, target in rows(options.device, options.repeats):
            print(f"| {name} | {ratio:.2f} | {target} |", flush=True)
    for name, value, target in memory(options.device):
        print(f"| {name} | {value:.2f} | {target} |", flush=True)


if __name__ == "__main__":
    main()
