"""Published files: fetched with resume and retries, hashed, and put in place in one move."""

import fcntl
import importlib.util
import json
import shutil
import time
from pathlib import Path
from urllib.parse import unquote, urlsplit

from anisodiff.files import StageError, digest, write_text

ATTEMPTS = 6
LATER = {408, 425, 429, 500, 502, 503, 504}  # answers that may be another one in a while


class _Unfinished(Exception):
    """A transfer broke off; what has come is kept."""


def place(url: str) -> Path:
    """Where a file belongs in a mirror: host and path of its address, or `local` and its path on this machine.

    Raises:
        StageError: the address names no file.
    """
    parts = urlsplit(url)
    name = Path(parts.netloc or "local", *[each for each in Path(unquote(parts.path)).parts if each not in ("/", "..")])
    if not parts.path.strip("/"):
        raise StageError(f"{url}: names no file: mend the url in the configuration")
    return name


def fetch(
    url: str,
    output: Path,
    sha256: str | None = None,
    md5: str | None = None,
    lock: Path | None = None,
    mirror: Path | None = None,
    offline: bool = False,
    timeout: float = 30.0,
    pause: float = 1.0,
) -> None:
    """Copy or download a file, and refuse it if its hash differs.

    Args:
        url: https or file address, a path on this machine, or `package://module/file` of an installed package.
        output: where it is put, once complete and checked.
        sha256: hex digest the file must have.
        md5: hex digest the file must have, where only that is published.
        lock: JSON file of digests by url: enforced, and written at the first sight of a url that has none.
        mirror: folder looked into before the network, laid out as `place` says.
        offline: do not use the network.
        timeout: seconds without a byte after which a transfer counts as stalled.
        pause: seconds before the second attempt; doubled before every further one.

    Raises:
        StageError: it cannot be had, or its hash differs.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    part = output.with_name(f".{output.name}.part")
    local = _local(url, mirror)
    if local is not None:
        shutil.copyfile(local, part)
    elif not url.startswith(("http://", "https://")):
        raise StageError(f"{url}: no such file: mend the url in the configuration")
    elif offline:
        where = f"{mirror or 'a mirror folder'}/{place(url)}"
        raise StageError(f"offline: get {url} on another machine and put it at {where}")
    else:
        _download(url, part, timeout, pause)
    locked = _locked(lock).get(url)
    for algorithm, expected in (("md5", md5), ("sha256", sha256 or locked)):
        if expected and (found := digest(part, algorithm)) != expected:
            part.unlink()
            source = f" (written in {lock} when it was first seen)" if expected == locked else ""
            raise StageError(
                f"{url}: {algorithm} is {found}, not {expected}{source}: the file is corrupt or another one; "
                "fetch it again, or change the hash if you trust it"
            )
    if not (sha256 or md5 or locked) and lock is not None:
        _write_lock(lock, url, digest(part))
    part.replace(output)


def _local(url: str, mirror: Path | None) -> Path | None:
    """The file on this machine that an address means, if it is there."""
    parts = urlsplit(url)
    if parts.scheme == "package":
        spec = importlib.util.find_spec(parts.netloc)
        if spec is None:
            raise StageError(f"{url}: the Python package {parts.netloc} is not installed: run `make .venv/made`")
        candidate = Path(spec.submodule_search_locations[0]) / parts.path.lstrip("/")
    elif parts.scheme in ("http", "https"):
        candidate = mirror / place(url) if mirror is not None else None
    else:
        candidate = Path(unquote(parts.path) if parts.scheme == "file" else url)
    return candidate if candidate is not None and candidate.is_file() else None


def _download(url: str, part: Path, timeout: float, pause: float) -> None:
    """Bring `part` to its full length, going on where an earlier attempt, or an earlier run, left it."""
    import requests

    tag = part.with_suffix(".tag")
    for attempt in range(ATTEMPTS):
        if attempt:
            print(f"{url}: attempt {attempt + 1} of {ATTEMPTS} after {pause * 2 ** (attempt - 1):.0f} s: {problem}")
            time.sleep(pause * 2 ** (attempt - 1))
        try:
            _transfer(url, part, tag, timeout)
            tag.unlink(missing_ok=True)
            return
        except (_Unfinished, requests.RequestException) as error:
            problem = str(error).splitlines()[0]
    raise StageError(
        f"{url}: cannot be downloaded ({problem}): check the address and the network, then run again; "
        "what has come is kept"
    )


def _transfer(url: str, part: Path, tag: Path, timeout: float) -> None:
    import requests
    from tqdm import tqdm

    have = part.stat().st_size if part.exists() and tag.exists() else 0
    # a range of the same file only: `If-Range` asks for the whole of another one
    headers = {"Range": f"bytes={have}-", "If-Range": tag.read_text()} if have else {}
    headers["Accept-Encoding"] = "identity"
    with requests.get(url, headers=headers, stream=True, timeout=timeout) as answer:
        if answer.status_code in LATER:
            raise _Unfinished(f"the server answers {answer.status_code} {answer.reason}")
        if answer.status_code == 416:  # what is here is no beginning of it
            part.unlink()
            raise _Unfinished("the server has no such range")
        if answer.status_code not in (200, 206):
            raise StageError(f"{url}: the server answers {answer.status_code} {answer.reason}: mend the url")
        if answer.headers.get("Content-Type", "").startswith("text/html") and not url.endswith(".html"):
            raise StageError(f"{url}: the server sends a web page instead of the file: open the url in a browser")
        have = have if answer.status_code == 206 else 0
        length = answer.headers.get("Content-Length")
        total = have + int(length) if length else None
        validator = answer.headers.get("ETag", "")
        if validator and not validator.startswith("W/"):
            tag.write_text(validator)
        else:
            tag.unlink(missing_ok=True)
        bar = tqdm(total=total, initial=have, desc=part.name[1:-5], unit="B", unit_scale=True, mininterval=5)
        with bar, part.open("ab" if have else "wb") as file:
            for piece in answer.iter_content(1 << 16):
                file.write(piece)
                bar.update(len(piece))
    if total is not None and part.stat().st_size != total:
        raise _Unfinished(f"{part.stat().st_size} of {total} bytes came")


def _locked(lock: Path | None) -> dict[str, str]:
    return json.loads(lock.read_text()) if lock is not None and lock.is_file() else {}


def _write_lock(lock: Path, url: str, found: str) -> None:
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.with_name(f".{lock.name}.guard").open("w") as guard:
        fcntl.flock(guard, fcntl.LOCK_EX)  # one download at a time adds its line
        write_text(lock, json.dumps(_locked(lock) | {url: found}, indent=1, sort_keys=True) + "\n")
    print(f"{url}: no hash was published; {found} is written to {lock} and holds from now on")
