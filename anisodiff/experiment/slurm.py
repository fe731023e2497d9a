"""What Slurm says in text: limits of partitions, and in a job's own log why it ended."""

import re
from collections.abc import Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

# lines of slurmstepd and srun, with and without cgroups; what a program says of a GPU's memory is not among them
OURS = r"^(?:slurmstepd|srun)\b.*"
MEMORY = re.compile(OURS + r"(?:oom[-_]kill|out[ _]of[ _]memory|exceeded \w+ memory limit)", re.I | re.M)
TIME = re.compile(OURS + r" CANCELLED AT \S+ DUE TO TIME LIMIT\b", re.M)
# the warning before a limit stops a job's steps; who cancels or preempts a job stops the job, or says why
WARNING = re.compile(OURS + r"\*\*\* STEP \S+ ON \S+ CANCELLED AT (\S+) \*\*\*", re.M)
WHOLE = re.compile(OURS + r"(?:\*\*\* JOB \S+ ON \S+ CANCELLED AT |CANCELLED AT \S+ DUE TO)", re.M)
STARTED = re.compile(r"^\[(\w{3} \w{3} [ \d]\d \d\d:\d\d:\d\d \d{4})\]", re.M)
EARLY = timedelta(minutes=2)  # Slurm warns up to a minute early, and Snakemake starts in less


def minutes(text: str) -> int | None:
    """Whole minutes of a time limit; None where there is none, or it is not known.

    Args:
        text: as `sinfo --format=%l` prints it: `infinite`, `n/a`, `MM:SS`, `HH:MM:SS` or `D-HH:MM:SS`.
    """
    found = re.fullmatch(r"(?:(?:(\d+)-)?(\d+):)?(\d+):(\d\d)", text.strip())
    if found is None:
        return None
    days, hours, whole, _ = (int(each or 0) for each in found.groups())
    return (days * 24 + hours) * 60 + whole


def log_folders(folder: Path, rule: str, wildcards: Sequence[str]) -> list[Path]:
    """Where the executor has Slurm write the logs of a job: alone, or as one of a group, which shares a folder."""
    return [folder / f"rule_{rule}" / "_".join(wildcards).replace("/", "_"), folder / f"group_paths_{rule}"]


def ended_by(log: str, limit: int, warning: int | None) -> str | None:
    """Why a job ended: "time", "memory", or None for anything else.

    Args:
        log: Slurm's log of the job, with what Snakemake prints in it.
        limit: minutes that the job had.
        warning: seconds before the limit at which it was told to stop; None if it was not.
    """
    if MEMORY.search(log):
        return "memory"
    if TIME.search(log):
        return "time"
    began, stopped = STARTED.search(log), WARNING.search(log)
    if warning is None or began is None or stopped is None or WHOLE.search(log):
        return None
    ran = datetime.fromisoformat(stopped[1]) - datetime.strptime(began[1], "%a %b %d %H:%M:%S %Y")
    return "time" if ran >= timedelta(minutes=limit, seconds=-warning) - EARLY else None


def asked(
    first: dict[str, Any], logs: Sequence[str], growth: float, most: dict[str, int], warning: int | None
) -> dict[str, int]:
    """Memory (MB) and minutes of a job's next attempt: more of what the earlier ones ran out of, and of that alone.

    Args:
        first: `memory` and `minutes` of the first attempt.
        logs: Slurm's, of the attempts made, in order.
        growth: factor for each attempt that ran out of one.
        most: of both, where `first` is not above it.
        warning: as `ended_by` takes it.
    """
    now, times = {key: first[key] for key in ("memory", "minutes")}, {"memory": 0, "minutes": 0}
    for log in logs:
        ended = ended_by(log, now["minutes"], warning)
        if ended is not None:
            key = {"time": "minutes", "memory": "memory"}[ended]
            times[key] += 1
            now[key] = min(round(first[key] * growth ** times[key]), max(most[key], first[key]))
    return now
