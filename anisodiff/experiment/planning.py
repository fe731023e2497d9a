"""What a configuration will take, before anything is submitted: jobs, evaluations, device hours, disk."""

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from anisodiff.experiment.budgets import budgets, warp_budgets
from anisodiff.experiment.files import ranges
from anisodiff.experiment.settings import DatasetSettings, ExperimentSettings
from anisodiff.experiment.training_seeds import replicated, without_seed
from anisodiff.metrics.registry import FEATURES

STATE = 8  # weights, average, last good state of both and two moments, in two states (bytes of a network)


def needed(dataset: DatasetSettings) -> dict[str, set[str]]:
    """Runs and warps that the methods, the geometry and the likelihoods of a dataset reach."""
    runs: set[str] = set()

    def want(name: str) -> None:
        """A network or a path; a run makes both, and no path has a run's name."""
        if name in dataset.runs and name not in runs:
            runs.add(name)
            want(dataset.runs[name].start)
            want(dataset.runs[name].path)

    warps, searches = set(dataset.used("warp")), dataset.used("search")
    users = [
        *dataset.methods.values(), *dataset.geometry.values(), *dataset.likelihoods.values(),
        *(dataset.warps[name] for name in warps), *(dataset.searches[name] for name in searches),
    ]  # fmt: skip
    for user in users:
        want(user.network)
        want(user.path)
    return {"runs": runs, "warps": warps}


def tuning_evaluations(dataset: DatasetSettings) -> int:
    """Evaluations that tunings take, their teachers' included; a gradient with recomputation costs four."""
    asked = [dataset.tunings[name] for name in dataset.used("tuning")]
    teachers = {(each.teacher, each.teacher_nfe, each.first_seed, each.pairs + each.heldout) for each in asked}
    learned = sum(4 * each.steps * each.batch * nfe for each in asked for nfe in each.nfe)
    return learned + sum(nfe * images for _, nfe, _, images in teachers)


def jobs_of(dry_run: str) -> dict[str, int]:
    """Rule -> number of jobs, from what a dry run of Snakemake prints."""
    table = dry_run.split("Job stats:")[-1]
    return {rule: int(count) for rule, count in re.findall(r"^(\w[\w-]*) +(\d+)$", table, re.M) if rule != "total"}


def work(dataset: DatasetSettings, measured: dict[str, Any] | None) -> dict[str, int | float | None]:
    """Counts, device hours and bytes of a dataset; None is what nobody has measured.

    Args:
        dataset: its settings, an entry for each training seed.
        measured: speeds, as `throughput.measure_throughput` writes them.
    """
    used, sampling = needed(dataset), dataset.sampling
    runs = {name: dataset.runs[name].kimg * 1000 for name in used["runs"]}
    warps = {name: dataset.warps[name].kimg * 1000 for name in used["warps"]}
    for name in warps:
        warps[name] *= len(warp_budgets(dataset, name)) if dataset.warps[name].steps == "per_nfe" else 1
    cells = [(nfe, ranges(dataset, nfe)) for method in dataset.methods for nfe in budgets(dataset, method)]
    images = sampling.images * sum(count for _, count in cells)
    evaluations = sampling.images * sum(nfe * count for nfe, count in cells)
    features = FEATURES[dataset.features.kind].dimension
    files = -(-sampling.images // sampling.shard) * sum(count for _, count in cells)
    found: dict[str, int | float | None] = {
        "images": images, "evaluations": evaluations, "training images": sum(runs.values()) + sum(warps.values()),
        "sampling hours": None, "training hours": None, "bytes": None,
        "cell bytes": files * features * (features + 1) / 2 * 8
        + (images * features * 4 if sampling.keep != "statistics" else 0),
    }  # fmt: skip
    if measured is not None:
        seconds = evaluations / measured["evaluations_per_second"] + images / measured["features_per_second"]
        found["sampling hours"] = seconds / 3600
        speeds = measured["training_images_per_second"] | {
            f"warp {k}": v for k, v in measured["warp_images_per_second"].items()
        }
        wanted = runs | {f"warp {name}": count for name, count in warps.items()}
        if {without_seed(name)[0] for name in wanted} <= speeds.keys():
            tuned = tuning_evaluations(dataset) / measured["evaluations_per_second"]
            found["training hours"] = (
                sum(count / speeds[without_seed(name)[0]] for name, count in wanted.items()) + tuned
            ) / 3600
        pixels = math.prod(measured["shape"])
        kept = images * (pixels + 200) if sampling.keep == "images" else 0
        networks = measured["network_bytes"] * (2 + (1 + STATE) * len(runs))
        found["bytes"] = found["cell bytes"] + measured["images"] * pixels + networks + kept
    return found


def page(config: ExperimentSettings, jobs: Mapping[str, Mapping[str, int]], results: Path) -> str:
    """The plan, for people.

    Args:
        config: the settings.
        jobs: of every dataset, all it needs made from nothing: rule -> number, as Snakemake counts them.
        results: folder in which throughputs were measured, `<dataset>/throughput.json`.
    """
    head = [
        "dataset",
        "jobs",
        "images",
        "evaluations",
        "training images",
        "sampling h",
        "training h",
        "disk GB",
        "measured on",
    ]
    rows, total, every = [], Counter[str](), []
    for name, dataset in config.datasets.items():
        file = results / name / "throughput.json"
        measured = json.loads(file.read_text()) if file.is_file() else None
        found, counted = work(replicated(dataset), measured), Counter(jobs[name])
        total += counted
        every.append(found)
        rows.append(_row(name, counted.total(), found, measured["environment"]["device"] if measured else "not yet"))
    parts = {key: [each[key] for each in every] for key in every[0]}
    whole = {key: None if None in values else sum(values) for key, values in parts.items()}
    rows.append(_row("all", total.total(), whole, ""))
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    lines = [_line(row, widths) for row in [head, *rows]]
    by_rule = ", ".join(f"{rule} {number}" for rule, number in sorted(total.items()))
    notes = [
        "",
        f"Jobs from nothing: {by_rule}; datasets share downloads.",
        "Hours are of one device, summed over devices; each job adds its start (about a minute on a cluster).",
        "Disk: cells, networks with their resume states, training images, and the samples where they are kept.",
    ]
    statistics = whole["cell bytes"]
    if statistics is not None and None in whole.values():
        notes.append(
            f"Hours and disk are known for a dataset when its speed is: make the target `throughput` (a few minutes a "
            f"dataset, on the device that will do the work). Cells alone take {statistics / 1e9:.1f} GB."
        )
    return "\n".join([*lines, *notes])


def _line(row: list[str], widths: list[int]) -> str:
    numbers = [text.rjust(width) for text, width in zip(row[1:-1], widths[1:-1], strict=True)]
    return "  ".join([row[0].ljust(widths[0]), *numbers, row[-1]])


def _row(name: str, count: int, found: Mapping[str, int | float | None], device: str) -> list[str]:
    shown = lambda value, unit=1.0: "?" if value is None else f"{value / unit:,.1f}"  # noqa: E731
    numbers = [f"{found[key]:,.0f}" for key in ("images", "evaluations", "training images")]
    return [name, str(count), *numbers, shown(found["sampling hours"]), shown(found["training hours"]),
            shown(found["bytes"], 1e9), device]  # fmt: skip
