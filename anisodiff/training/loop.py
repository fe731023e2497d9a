"""One resumable training loop, as a generator of records; EMA, learning-rate schedule, resume state, runaway guard."""

import contextlib
import copy
import fcntl
import json
import math
import os
import platform
import shutil
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from anisodiff.errors import StageError, Stopped
from anisodiff.storage import checkpoints
from anisodiff.storage.files import Metadata, version, write_text
from anisodiff.training import parallel

FORWARD = ("path", "basis", "frame")  # modules of the forward process


@dataclass(frozen=True)
class TrainingPlan:
    """How long to train, and how fast.

    Attributes:
        kimg: thousands of images to see.
        batch: images a step.
        ramp_kimg: linear learning-rate warm-up.
        ema_kimg: half-life of the average of a network's or a warp's parameters; 0 keeps the last ones.
        ema_ramp: half-life of every average as a share of what was seen, where that is shorter; None never shortens it.
        seed: of the draws; those of a piece depend on seed, step and its place in the batch alone.
        micro_batch: images whose gradient is taken at a time; a step adds up such pieces. None is the whole batch.
        path_ema_kimg: half-life of the average of a path's parameters; 0 keeps the last ones (as published).
        freeze_after: share of the run after which the forward process (`FORWARD`) is held as it is.
        decay: of the rates in the second half: "continuous" halves them smoothly in every eighth of the run, as the
            published code does; "steps" at once, at half the run and at every further eighth; "cosine" is half a
            cosine down to 0 over the whole run.
    """

    kimg: float
    batch: int
    ramp_kimg: float
    ema_kimg: float
    ema_ramp: float | None
    seed: int
    micro_batch: int | None = None
    path_ema_kimg: float = 0.0
    freeze_after: float = 1.0
    decay: str = "continuous"

    @property
    def steps(self) -> int:
        return math.ceil(self.kimg * 1000 / self.batch)

    @property
    def piece(self) -> int:
        """Images of a piece."""
        return self.micro_batch or self.batch

    @property
    def pieces(self) -> int:
        """Pieces of a batch."""
        return self.batch // self.piece

    def piece_seed(self, step: int, piece: int) -> int:
        """Seed of a piece's draws. Torch's CPU generator sees its low 32 bits only."""
        return (self.seed * 0x9E3779B1 + step * self.pieces + piece) % 2**32

    def rate(self, step: int, module: str = "network") -> float:
        """Factor on a module's rate: warm-up, then a cosine, or constant to half the run and halved every eighth."""
        if module in FORWARD and step >= self.freeze_after * self.steps:
            return 0.0
        ramp = min(1.0, (step + 1) * self.batch / max(self.ramp_kimg * 1000, 1e-8))
        if self.decay == "cosine":
            return ramp * (1 + math.cos(math.pi * step / self.steps)) / 2
        if self.decay == "steps":
            return ramp * 0.5 ** max(0, math.floor(8 * step / self.steps) - 3)
        return ramp * 0.5 ** max(0.0, 8 * step * self.batch / (self.kimg * 1000) - 4)

    def ema_beta(self, step: int, module: str = "network") -> float:
        """Share of a module's average that a step leaves as it was; 0 where nothing is averaged."""
        halflife = (self.path_ema_kimg if module in FORWARD else self.ema_kimg) * 1000
        if self.ema_ramp is not None:
            halflife = min(halflife, self.ema_ramp * (step + 1) * self.batch)
        return 0.5 ** (self.batch / max(halflife, 1e-8))


@dataclass
class EarlyStop:
    """Stops a run whose loss on fixed held-out data rises, and goes back to its best state.

    Attributes:
        loss: the held-out loss of what would be saved now, the averages; or another error of it.
        every: steps between checks; there is one more at the end of the run.
        tolerance: relative rise over the best that is still good.
        keep_best: at the end of the run too, go back to the best state.
    """

    loss: Callable[[], float]
    every: int
    tolerance: float
    keep_best: bool = False
    best: float = math.inf


@dataclass
class TrainingState:
    """What a run carries from step to step, and can be stopped and started with.

    Attributes:
        modules: name -> module being trained.
        rates: name -> learning rate.
        ema: name -> the module's average, in evaluation mode: what is saved.
        step: steps made.
        stopped_early: the guard has ended it.
        heldout: step and held-out loss of every check.
        losses: of the steps since the last mean of a group.
        seconds: spent so far, those of earlier processes included.
        kept: step of the best state, where the run has gone back to it.
    """

    modules: dict[str, nn.Module]
    rates: dict[str, float]
    step: int = 0
    stopped_early: bool = False
    heldout: list[tuple[int, float]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0
    kept: int | None = None

    def __post_init__(self) -> None:
        # each of its module's own class
        self.ema: dict[str, Any] = {
            name: copy.deepcopy(module).requires_grad_(False).eval() for name, module in self.modules.items()
        }
        self.good: dict[str, Tensor] = {}
        groups = [
            {"params": list(self.modules[name].parameters()), "peak": rate, "name": name}
            for name, rate in self.rates.items()
        ]
        self.optimizer = torch.optim.Adam([group for group in groups if group["params"]], lr=0.0)

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def weights(self) -> dict[str, Tensor]:
        """Every module's weights and their average, by name; what modules share has the first of its names."""
        named = {
            f"{kind}/{name}/{key}": value
            for kind, modules in (("now", self.modules), ("ema", self.ema))
            for name, module in modules.items()
            for key, value in module.state_dict().items()
        }
        first = {(value.data_ptr(), value.shape): name for name, value in reversed(named.items())}
        return {
            name: value
            for name, value in named.items()
            if not value.numel() or first[value.data_ptr(), value.shape] == name
        }

    def restore(self, weights: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for name, value in self.weights().items():
                value.copy_(weights[name])

    def go_back(self) -> None:
        """Restore the best state that was checked."""
        self.restore(self.good)
        self.kept, _ = min(self.heldout, key=lambda check: math.inf if math.isnan(check[1]) else check[1])

    @property
    def kept_step(self) -> int:
        """Steps that the weights have seen: those made, or fewer where the run went back."""
        return self.step if self.kept is None else self.kept

    def tensors(self) -> dict[str, Tensor]:
        """All tensors of the state; the weights of the last good state under `good/`."""
        named = self.weights() | {f"good/{name}": value for name, value in self.good.items()}
        for index, parameter in enumerate(self.parameters):
            for key, value in self.optimizer.state.get(parameter, {}).items():
                named[f"adam/{index}/{key}"] = value
        return named

    def load(self, tensors: dict[str, Tensor], metadata: Metadata) -> None:
        self.restore(tensors)
        self.good = {name.removeprefix("good/"): value for name, value in tensors.items() if name.startswith("good/")}
        for index, parameter in enumerate(self.parameters):
            prefix = f"adam/{index}/"
            state = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
            if state:
                moved = {key: value if key == "step" else value.to(parameter.device) for key, value in state.items()}
                self.optimizer.state[parameter] = moved
        self.step, self.stopped_early = metadata["step"], metadata["stopped_early"]
        self.heldout, self.losses = [tuple(each) for each in metadata["heldout"]], metadata["losses"]
        self.seconds, self.kept = metadata["seconds"], metadata.get("kept")

    def metadata(self) -> Metadata:
        return {
            "step": self.step, "stopped_early": self.stopped_early, "heldout": self.heldout, "losses": self.losses,
            "seconds": self.seconds, "kept": self.kept,
        }  # fmt: skip


Batch = dict[str, Tensor]


def _drawn(draw: Callable[[torch.Generator], Batch], seeds: Iterator[int]) -> Iterator[tuple[int, Batch]]:
    """Each seed and its draws, made in a thread while those before it are used."""
    with ThreadPoolExecutor(1) as ahead:
        submit = lambda seed: (seed, ahead.submit(draw, torch.Generator().manual_seed(seed)))  # noqa: E731
        coming = submit(next(seeds))
        for following in seeds:
            seed, ready = coming[0], coming[1].result()
            coming = submit(following)
            yield seed, ready
        yield coming[0], coming[1].result()


def train(
    training: TrainingState,
    schedule: TrainingPlan,
    draw: Callable[[torch.Generator], Batch],
    loss: Callable[[Batch], Tensor],
    guard: EarlyStop | None = None,
    group: int = 20,
) -> Iterator[Metadata]:
    """Train from `training.step` on; yield a record after every step, with the mean loss every `group` steps.

    Args:
        training: the state; changed in place.
        schedule: length, batch, rates.
        draw: everything random of a piece but dropout, from the CPU generator it is given; run ahead in a thread.
        loss: mean loss of a piece, of its draws.
        guard: optional watch on a held-out loss.
        group: steps a record's mean loss runs over.

    Raises:
        StageError: the loss is not finite, or not from the start that the guard checks, or there are more ranks than
            pieces.
    """
    mine = range(parallel.rank(), schedule.pieces, parallel.size())
    if parallel.size() > schedule.pieces:
        raise StageError(
            f"micro_batch: {parallel.size()} processes for {schedule.pieces} pieces of a batch of {schedule.batch}: "
            f"set it to {schedule.batch // parallel.size()} or less"
        )
    if guard is not None and training.heldout:
        guard.best = min(value for _, value in training.heldout)
    if training.stopped_early or training.step >= schedule.steps:
        return
    steps = range(training.step, schedule.steps)
    drawn = _drawn(draw, (schedule.piece_seed(step, piece) for step in steps for piece in mine))
    for _ in steps:
        if guard is not None and training.step % guard.every == 0:
            _check(training, guard)
            if training.stopped_early:
                yield {"step": training.step, "stopped_early": True, "heldout": training.heldout[-1][1]}
                return
        for each in training.optimizer.param_groups:
            each["lr"] = each["peak"] * schedule.rate(training.step, each["name"])
        training.optimizer.zero_grad(set_to_none=True)
        values = []
        for _ in mine:
            seed, draws = next(drawn)
            torch.manual_seed(seed)  # dropout
            value = loss(draws) / schedule.pieces
            value.backward()
            values.append(value.detach())
        value = parallel.sum_gradients(training.parameters, torch.stack(values).sum())
        if not value.isfinite():
            raise StageError(f"the loss is {float(value)} at step {training.step}: lower the learning rates")
        training.optimizer.step()
        with torch.no_grad():
            for name, module in training.modules.items():
                beta = schedule.ema_beta(training.step, name)
                for average, now in zip(training.ema[name].parameters(), module.parameters(), strict=True):
                    average.lerp_(now, 1 - beta)
        training.step += 1
        if guard is not None and training.step == schedule.steps:
            _check(training, guard)
            if guard.keep_best and not training.stopped_early:
                training.go_back()
        training.losses.append(float(value))
        record = {"step": training.step, "kimg": training.step * schedule.batch / 1000}
        if training.step % group == 0 or training.step == schedule.steps:
            record["loss"] = statistics.fmean(training.losses)
            training.losses = []
            if training.heldout:
                record["heldout"] = training.heldout[-1][1]
            if training.stopped_early:
                record["stopped_early"] = True
        yield record


def _check(training: TrainingState, guard: EarlyStop) -> None:
    value = parallel.of_first(guard.loss())
    if not training.good and not math.isfinite(value):
        raise StageError(f"the held-out loss is {value} at the start: start from another network or path")
    training.heldout.append((training.step, value))
    highest = guard.best + guard.tolerance * abs(guard.best) if training.good else math.inf
    if not value <= highest:  # NaN counts as a rise
        training.go_back()
        training.stopped_early = True
    elif value <= guard.best:
        guard.best = value
        training.good = {name: tensor.clone() for name, tensor in training.weights().items()}


class ResumeStore:
    """Resume states of one piece of work, in a folder named by its key; the last two are kept.

    Args:
        folder: where states of all keys lie that make one output.
        key: of settings and inputs: a state of another key is never seen.
    """

    def __init__(self, folder: Path, key: str):
        self.folder, self.lock = folder / key, folder / "lock"

    def save(self, training: TrainingState) -> None:
        state = self.folder / f"step-{training.step:09d}.safetensors"
        checkpoints.save(state, training.tensors(), training.metadata() | {"version": version()})
        states = self._states()
        kept = [each for each in states if each <= state][-2:]  # a later one is damaged: `load` has passed it over
        for other in set(states).difference(kept):
            other.unlink()

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes from making the same output inside the block, from whatever settings.

        A lock ends with its process; file systems without locks keep nobody out.

        Raises:
            StageError: another process is inside.
        """
        with contextlib.ExitStack() as opened:
            other = None
            if parallel.rank() == 0:
                other = self._take(opened)
            if (other := parallel.of_first(other)) is not None:
                folder = self.lock.parent
                raise StageError(f"{folder}: {other} trains here: wait until it ends, or end it, and start again")
            yield

    def _take(self, opened: contextlib.ExitStack) -> str | None:
        """Lock the file for as long as the block is open; who holds it, if somebody else does."""
        while True:
            self.lock.parent.mkdir(parents=True, exist_ok=True)
            try:
                lock = opened.enter_context(self.lock.open("a+"))
            except FileNotFoundError:  # another one has ended meanwhile, and removed the folder
                continue
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                lock.seek(0)
                return lock.read() or "another process"
            except OSError:  # there are no locks here
                return None
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(lock.fileno()), self.lock.stat()):  # not one that was removed meanwhile
                    lock.truncate(0)
                    lock.write(f"process {os.getpid()} on {platform.node()}")
                    lock.flush()
                    return None

    def load(self, training: TrainingState) -> bool:
        """Take up the newest readable state, all ranks the same; False if there is none.

        Raises:
            StageError: it was written by another version of the code.
        """
        newest, found = self._newest() if parallel.rank() == 0 else (None, None)
        newest = parallel.of_first(newest)
        if newest is None:
            return False
        tensors, metadata = found or checkpoints.read(newest)
        if metadata["version"] != version():
            raise StageError(
                f"{newest}: a resume state of version {metadata['version']}, this is {version()}: go on with that, "
                f"or delete {self.folder} to start this stage again"
            )
        training.load(tensors, metadata)
        return True

    def clear(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        self.lock.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self.lock.parent.rmdir()

    def _newest(self) -> tuple[Path, tuple[dict[str, Tensor], Metadata]] | tuple[None, None]:
        for path in reversed(self._states()):
            try:
                return path, checkpoints.read(path)
            except StageError:
                mend = "going on from the state before it, or from the start if there is none"
                print(f"anisodiff: {path}: a damaged resume state: {mend}", file=sys.stderr)
        return None, None

    def _states(self) -> list[Path]:
        return sorted(self.folder.glob("step-*.safetensors"))


@contextlib.contextmanager
def stop_requests() -> Iterator[Callable[[], bool]]:
    """Inside the block SIGTERM and Ctrl-C do not end the process: the callable tells whether one has come."""
    asked = []
    caught = (signal.SIGTERM, signal.SIGINT)
    previous = [signal.signal(each, lambda *_: asked.append(True)) for each in caught]
    try:
        yield lambda: bool(asked)
    finally:
        for each, handler in zip(caught, previous, strict=True):
            signal.signal(each, handler)


def _lines_to(log: Path, training: TrainingState) -> list[str]:
    """Lines of an earlier process up to the present step; what it wrote past its last save is made again."""
    kept = []
    if log.is_file():
        for line in log.read_text().splitlines(keepends=True):
            with contextlib.suppress(json.JSONDecodeError):  # cut off when the process was killed
                record = json.loads(line)
                again = record["step"] > training.step or ("stopped_early" in record and not training.stopped_early)
                kept += [] if again else [line]
    return kept


def run(
    records: Iterator[Metadata],
    training: TrainingState,
    schedule: TrainingPlan,
    store: ResumeStore,
    log: Path,
    save_seconds: float,
    label: str,
    device: str = "cpu",
) -> None:
    """Drive `train` with a progress bar, a log of JSON lines, saves, and a graceful stop.

    Args:
        records: from `train`, over the same `training`.
        training: the state, loaded from `store` where there was one.
        schedule: for the length of the bar.
        store: where states are saved.
        log: file of JSON lines, one a step group; lines past the resumed step are dropped.
        save_seconds: longest time between two saves.
        label: name in the progress bar.
        device: of this rank.

    Raises:
        Stopped: after SIGTERM or Ctrl-C, with the state saved.
    """
    from tqdm import tqdm

    writes = parallel.rank() == 0
    log = log if writes else Path(os.devnull)
    if writes:
        write_text(log, "".join(_lines_to(log, training)))
    saved = time.monotonic()
    began = saved - training.seconds
    bar = tqdm(
        total=schedule.steps * schedule.batch, initial=training.step * schedule.batch,
        desc=label, unit="img", unit_scale=True, mininterval=5, disable=not writes,
    )  # fmt: skip
    with bar, stop_requests() as stopping, log.open("a") as lines:
        for record in records:
            bar.update(schedule.batch)
            if len(record) > 2:
                lines.write(json.dumps(record) + "\n")
                lines.flush()
            stop, now = parallel.any_rank(stopping(), device), time.monotonic()
            training.seconds = round(now - began, 1)
            if stop or now - saved > save_seconds:
                if writes:
                    store.save(training)
                saved = now
                if stop:
                    raise Stopped(f"{label}: stopped at step {training.step}, state saved; start again to go on")
