"""What every stage needs of the file system: atomic writes, hashes and provenance."""

import contextlib
import functools
import hashlib
import json
import os
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import anisodiff

Metadata = dict[str, Any]  # the JSON header of a file: settings, versions, what was measured
PACKAGE = Path(anisodiff.__file__).resolve().parent


@contextlib.contextmanager
def atomic(path: Path | str) -> Iterator[Path]:
    """Yield a temporary path beside `path`, moved over it if the block succeeds and removed if it does not."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o644)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path | str, text: str) -> None:
    """Write a text file atomically."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def digest(path: Path | str, algorithm: str = "sha256") -> str:
    """Hex digest of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest()


def fingerprint(settings: Any, inputs: list[str]) -> str:
    """Sixteen hex digits that name a piece of work: its settings and the digests of its inputs."""
    named = {"settings": _plain(settings), "inputs": inputs}
    return hashlib.sha256(json.dumps(named, sort_keys=True).encode()).hexdigest()[:16]


def _plain(settings: Any) -> Any:
    """Settings as JSON holds them: sections that know how become plain data."""
    if hasattr(settings, "model_dump"):
        return settings.model_dump()
    return {name: _plain(each) for name, each in settings.items()} if isinstance(settings, dict) else settings


@functools.cache
def version() -> str:
    """The package's version and eight hex digits of its source text, so that an uncommitted edit shows."""
    source = hashlib.sha256()
    for path in sorted(PACKAGE.rglob("*.py")):
        source.update(path.relative_to(PACKAGE).as_posix().encode() + path.read_bytes())
    return f"{anisodiff.__version__}+{source.hexdigest()[:8]}"


@functools.cache
def commit() -> str:
    """The git commit the package was run from (`-dirty` if its tree was changed), or "unknown" outside a checkout.

    A copy inside somebody else's repository is outside: that repository's commit says nothing of this code.
    """

    def git(*arguments: str) -> str:
        command = ["git", *arguments]
        return subprocess.run(command, cwd=PACKAGE, capture_output=True, text=True, check=True).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")) != PACKAGE.parent:
            return "unknown"
        git("ls-files", "--error-unmatch", "__init__.py")
        return git("describe", "--always", "--dirty", "--abbrev=12", "--exclude=*")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def provenance(settings: Any, inputs: Sequence[Metadata] = ()) -> Metadata:
    """What travels with every result: settings, this code's version and commit, and those of all that it was made from.

    Args:
        settings: the resolved settings of the stage.
        inputs: the provenance of the artifacts it read.
    """
    return {
        "settings": _plain(settings),
        "versions": sorted({version()}.union(*(each.get("versions", []) for each in inputs))),
        "commits": sorted({commit()}.union(*(each.get("commits", []) for each in inputs))),
    }
