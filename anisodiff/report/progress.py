"""How far jobs are, read off the bars in their logs: one line for all that go on."""

import re
from collections.abc import Iterable
from pathlib import Path

BAR = re.compile(r"(\d+)%\|[^|\r\n]*\| [^\[\r\n]*\[[\d:]+<([\d:]+|\?)")  # tqdm's
TAIL = 4096  # bytes of a log that are read: many states of its bar
SHOWN = 5  # jobs in a line


def state(log: Path) -> tuple[int, str] | None:
    """Percent done and the time left (`H:MM:SS` or `M:SS`, or `?`) of a log's last bar; None without one."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - TAIL))
        found = BAR.findall(file.read().decode(errors="replace"))
    if not found:
        return None
    percent, left = found[-1]
    return int(percent), re.sub(r"^0(?=\d)", "", left)


def label(log: Path) -> str:
    """Dataset, stage and name of a job, from `results/DATASET/logs/STAGE/NAME.log`; a download by its file's name."""
    _, owner, _, *rest = log.with_suffix("").parts
    return f"download {rest[-1]}" if owner == "fetched" else " ".join([owner, *rest])


def line(logs: Iterable[Path], since: float) -> str:
    """Where jobs are, those with most time left first; empty if none has a bar that is under way.

    Args:
        logs: of the jobs that go on.
        since: a log that has not been written since then (seconds of the epoch) is an earlier run's.
    """
    found = []
    for log in logs:
        if not log.is_file() or log.stat().st_mtime < since:
            continue
        at = state(log)
        if at is not None and at[0] < 100:
            found.append((_seconds(at[1]), label(log), *at))
    found.sort(key=lambda job: (-job[0], job[1]))
    parts = [f"{name} {percent} %" + ("" if left == "?" else f" ({left} left)") for _, name, percent, left in found]
    more = [f"{len(parts) - SHOWN} more"] if len(parts) > SHOWN else []
    return ", ".join([*parts[:SHOWN], *more])


def _seconds(left: str) -> int:
    if left == "?":
        return -1
    total = 0
    for part in left.split(":"):
        total = 60 * total + int(part)
    return total
