"""Check of a tree of results: what is damaged, missing, orphaned, left over, or made by another version of the code."""

import json
import re
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from anisodiff.data import image_sets
from anisodiff.errors import StageError, one_line
from anisodiff.experiment.files import cells_of
from anisodiff.report.plain_tables import read
from anisodiff.storage import checkpoints
from anisodiff.storage.files import digest, version

FAILURES = ("damaged", "missing")
TOLD = ("orphaned", "left over", "without a digest", "of another version", "of mixed versions")
MANIFEST = re.compile(r"\d+-\d+\.json")
CELL = re.compile(r"nfe\d+/\d+-\d+\.(safetensors|zip)")
NOT_OURS = (".snakemake", ".git")

Finding = tuple[str, str]  # its kind, and a line that names the file and the mend


def verify(results: Path) -> bool:
    """Print a line for each finding, then how many there are of each kind.

    Files of text (tables, logs) carry no digest: what they say is not checked, but for cells that manifests name.

    Args:
        results: folder; everything below it is read.

    Returns:
        whether nothing is damaged or missing.

    Raises:
        StageError: there is no such folder.
    """
    from tqdm import tqdm

    if not results.is_dir():
        raise StageError(f"{results}: no such folder: give a folder of results")
    every = [path for path in sorted(results.rglob("*")) if path.is_file()]
    leftovers = {first for path in every if (first := _hidden(path, results)) and not first.name.startswith(NOT_OURS)}
    files = {path: path.stat().st_size for path in every if _hidden(path, results) is None}
    counts, made_by = Counter(), {}

    def tell(findings: Iterable[Finding]) -> None:
        for kind, line in findings:
            counts[kind] += 1
            tqdm.write(line)

    for path in sorted(leftovers):
        tell([("left over", f"{path}: left over by a job that was killed: delete it if no job runs")])
    tell(_cells(files))
    with tqdm(total=sum(files.values()), desc="verify", unit="B", unit_scale=True, mininterval=1) as bar:
        for path, size in files.items():
            tell(_contents(path, made_by))
            bar.update(size)
    tell(_versions(made_by))
    said = ", ".join(f"{counts[kind]} {kind}" for kind in (*FAILURES, *TOLD))
    print(f"{results}: {len(files)} files, {sum(files.values()) / 1e6:.1f} MB: {said}")
    return not any(counts[kind] for kind in FAILURES)


def _hidden(path: Path, results: Path) -> Path | None:
    """The outermost part of a path below the results whose name begins with a dot; resume states are not hidden."""
    parts = path.relative_to(results).parts
    hidden = (k for k, part in enumerate(parts) if part.startswith(".") and part != ".state")
    return next((results.joinpath(*parts[: k + 1]) for k in hidden), None)


def _cells(files: Iterable[Path]) -> Iterator[Finding]:
    """Manifests against the cells beside them."""
    found = {path for path in files if CELL.fullmatch("/".join(path.parts[-2:]))}
    named = set()
    for manifest in (path for path in files if MANIFEST.fullmatch(path.name)):
        try:
            for cell in cells_of(manifest):
                named |= {cell, cell.with_suffix(".zip")}
                if not cell.is_file():
                    yield "missing", f"{cell}: missing, {manifest.name} names it: delete {manifest} and run again"
        except StageError as error:
            yield "damaged", str(error)
    for cell in sorted(found - named):
        yield "orphaned", f"{cell}: no manifest names it: delete it, or run again what made it"


def _contents(path: Path, made_by: dict[tuple[str, ...], list[Path]]) -> Iterator[Finding]:
    """Findings in one file; its versions join `made_by`."""
    try:
        if path.suffix == ".safetensors":
            metadata = checkpoints.read(path)[1]
            if not checkpoints.has_digest(path):
                yield "without a digest", f"{path}: has no digest, damage would not show: make it again to have one"
            versions = metadata.get("versions", [metadata["version"]] if "version" in metadata else [])
            if "fetched" not in path.parts:  # made elsewhere
                made_by.setdefault(tuple(versions), []).append(path)
        elif path == image_sets.metadata_file(path.parent) and path.with_name("pixels.npy").exists():
            held = [digest(path.with_name(f"{name}.npy")) for name in image_sets.ARRAYS]
            if json.loads(path.read_text())["sha256"] != held:
                yield "damaged", f"{path.parent}: damaged: its images are not what was written: delete it and run again"
        elif CELL.fullmatch("/".join(path.parts[-2:])):
            with zipfile.ZipFile(path) as images:
                if (bad := images.testzip()) is not None:
                    yield "damaged", f"{path}: damaged at {bad}: delete it and run again"
        elif path.name == "table.csv" and len(set(read(path)["version"])) > 1:
            yield "of mixed versions", f"{path}: its rows are of several versions: run again what is older, or say so"
    except StageError as error:
        yield "damaged", str(error)
    except (OSError, ValueError, LookupError, TypeError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        yield "damaged", f"{path}: cannot be read ({one_line(error)}): delete it and run again"


def _versions(made_by: dict[tuple[str, ...], list[Path]]) -> Iterator[Finding]:
    """What was made by another version of the code than this, one line a version."""
    for versions, paths in sorted(made_by.items()):
        if versions and version() not in versions:
            files = f"{len(paths)} files, {paths[0]} the first"
            line = f"{files}: made by {' '.join(versions)}, this is {version()}: go on with that, or run again"
            yield "of another version", line
