"""Published files: fetched with resume and retries, hashed, and put in place in one move."""

import contextlib
import fcntl
import hashlib
import importlib.util
import json
import os
import re
import shutil
import socket
import stat
import time
import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, parse_qsl, unquote, urljoin, urlsplit

from anisodiff.data.sources import EXTENSIONS
from anisodiff.errors import StageError
from anisodiff.storage.files import digest, write_text

ATTEMPTS = 6
LATER = {408, 425, 429, 500, 502, 503, 504}  # answers that may be another one in a while
SECRET = re.compile(r"token|passw|secret|signature|credential|api_?key|^sig$", re.IGNORECASE)
LOOPBACK = ("localhost", "127.0.0.1", "::1")
LONGEST = 200  # bytes of a name in a place; file systems take 255, and stages add endings


class _Unfinished(Exception):
    """A transfer broke off; what has come is kept."""


def scheme(url: str) -> str:
    """The scheme of an address in small letters; empty for a path on this machine."""
    return url.partition("://")[0].lower() if "://" in url else ""


def address_path(url: str) -> Path:
    """Where a file belongs in a mirror: host and path of its address, or `local` and its path on this machine.

    An address that cannot be read off host and path (a query, `..`, a leading `/`, an escape, a very long name) has a
    hash of the whole of it before the file's name: no two addresses share a place.

    Raises:
        StageError: the address names no file or no host, or holds a secret.
    """
    if scheme(url):
        parts = _split(url)
        host, path = parts.netloc, unquote(parts.path)
    else:
        host, path = "local", url
    # braces are wildcards to Snakemake
    names = [re.sub(r"[\x00-\x1f\x7f{}]", "_", name) for name in path.split("/") if name not in ("", ".", "..")]
    if not names:
        raise StageError(f"{url}: names no file: mend the url in the configuration")
    if scheme(url) and host in ("", "local", "logs"):  # folders of ours, and no hosts
        host, names = "local", [scheme(url), host, *names]
    made = Path(*[name if len(name.encode()) <= LONGEST else name[-LONGEST // 4 :] for name in (host, *names[-16:])])
    if url in (f"http://{made}", f"https://{made}", f"package://{made}") or f"local/{url}" == str(made):
        return made
    whole = hashlib.sha256(url.encode("utf-8", "surrogatepass")).hexdigest()[:12]
    return made.parent / whole / made.name


def is_pickle(url: str) -> bool:
    """Whether a network is one of EDM's pickles, by the name of its file."""
    return address_path(url).suffix.lower() == ".pkl"


def to_fetch(files: Iterable[tuple[str, dict[str, Any]]]) -> dict[str, dict[str, str | None]]:
    """Addresses of published files, each once, with `sha256` and `md5` where one is given.

    Images on this machine are not among them: they are read where they are.

    Args:
        files: the key of each in the configuration, and its `url`, `sha256` and `md5`.

    Raises:
        StageError: an address has no place, two share one, or one has two hashes; its key is named.
    """
    found: dict[str, dict[str, str | None]] = {}
    keys: dict[tuple[str, ...], tuple[str, str]] = {}  # of places, as a file system that ignores case sees them
    for key, entry in files:
        url = entry["url"]
        if key.endswith(".images") and not scheme(url):
            continue
        try:
            parts = tuple(unicodedata.normalize("NFC", part).casefold() for part in address_path(url).parts)
        except StageError as error:
            raise StageError(f"{key}.url: {error}") from error
        if (other := keys.setdefault(parts, (url, key)))[0] != url:
            raise StageError(f"{key}.url: {url} and {other[0]} ({other[1]}) would be one file: rename one")
        hashes = found.setdefault(url, {"sha256": None, "md5": None})
        for kind, before in hashes.items():
            if before and entry.get(kind) and entry[kind] != before:
                raise StageError(f"{key}.{kind}: {url} has another {kind} in another dataset: one of them is wrong")
            hashes[kind] = before or entry.get(kind)
    for parts, (url, key) in keys.items():
        for count in range(1, len(parts)):
            if other := keys.get(parts[:count]):
                raise StageError(f"{key}.url: {url} would lie below the file {other[0]} ({other[1]}): rename one")
    return found


def _split(url: str) -> SplitResult:
    try:
        parts = urlsplit(url)
        host = parts.hostname or ""
    except ValueError as error:
        raise StageError(f"{url}: is no address ({error}): mend the url in the configuration") from error
    secrets = [name for name, _ in parse_qsl(parts.query, keep_blank_values=True) if SECRET.search(name)]
    if "@" in parts.netloc or secrets:
        found = f"a {secrets[0]} in it" if secrets else "a user or a password in it"
        raise StageError(
            f"{parts.scheme}://{host}{parts.path}: an address with {found} would end up in logs and results: leave it "
            "out and give the password in ~/.netrc, or put the file into the mirror folder"
        )
    if parts.scheme != "file" and host.strip(".") == "":
        raise StageError(f"{url}: names no host: mend the url in the configuration")
    return parts


def on_this_machine(url: str) -> Path | None:
    """The path that an address without a host means, whether or not there is anything; None for others.

    Raises:
        StageError: a file address that names a host.
    """
    if scheme(url) == "file":
        parts = _split(url)
        if parts.netloc not in ("", "localhost"):
            raise StageError(f"{url}: names the host {parts.netloc!r}: three slashes begin a path, file:///data/x.zip")
        return Path(unquote(parts.path))
    return None if scheme(url) else Path(url)


def file_state(path: Path) -> str:
    """Sixteen hex digits of the size and time of a file, or of the names, sizes and times of a folder's images.

    Args:
        path: file or folder, also one that is not there.
    """
    found = hashlib.sha256()
    with contextlib.suppress(OSError, ValueError):  # what cannot be read is for the stage to say
        for file in _images_below(path, set()) if path.is_dir() else [path]:
            state = os.stat(file)
            found.update(f"{file}\0{state.st_size}\0{state.st_mtime_ns}\0".encode("utf-8", "surrogateescape"))
    return found.hexdigest()[:16]


def _images_below(folder: Path | str, above: set[tuple[int, int]]) -> Iterator[str]:
    """Images below a folder and its list of labels, through links but not in circles, hidden ones left out."""
    state = os.stat(folder)
    above = above | {(state.st_dev, state.st_ino)}
    for each in sorted(os.scandir(folder), key=lambda each: each.name):
        if each.name.startswith("."):
            continue
        if each.is_dir():
            inside = each.stat()
            if (inside.st_dev, inside.st_ino) not in above:
                yield from _images_below(each.path, above)
        elif each.name.lower().endswith(EXTENSIONS) or each.name == "dataset.json":
            yield each.path


def check(
    file: Path, name: str, sha256: str | None = None, md5: str | None = None, mend: str = "change the hash"
) -> None:
    """Refuse a file whose hash is another.

    Args:
        file: to read.
        name: of the file in the message.
        sha256: hex digest it must have; None does not look.
        md5: likewise.
        mend: what to do about a wrong hash, where the file can be trusted.

    Raises:
        StageError: it differs, or is no single file.
    """
    for algorithm, expected in (("md5", md5), ("sha256", sha256)):
        if expected and not file.is_file():
            raise StageError(f"{name}: is no single file, so it has no {algorithm}: leave the hash out")
        if expected and (found := digest(file, algorithm)) != expected:
            raise StageError(
                f"{name}: {algorithm} is {found}, not {expected}: the file is corrupt or another one; "
                f"fetch it again, or {mend} if you trust it"
            )


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

    Processes that fetch to one output go one after another; what one has left unfinished the next goes on with.

    Args:
        url: https or file address, a path on this machine, or `package://module/file` of an installed package.
        output: where it is put, once complete and checked.
        sha256: hex digest the file must have.
        md5: hex digest the file must have, where only that is published.
        lock: JSON file of digests by url: enforced, and written at the first sight of a url that has none.
        mirror: folder looked into before the network, laid out as `address_path` says.
        offline: do not use the network.
        timeout: seconds without a byte after which a transfer counts as stalled.
        pause: seconds before the second attempt; doubled before every further one.

    Raises:
        StageError: it cannot be had, or its hash differs.
    """
    where = address_path(url)
    locked = _locked(lock).get(url)
    local = _local(url, mirror)
    if local is None:
        if scheme(url) not in ("http", "https"):
            raise StageError(f"{url}: addresses begin with https://, file:// or package://: mend the url")
        if offline:
            where = f"{mirror or 'a mirror folder'}/{where}"
            raise StageError(f"offline: get {url} on another machine and put it at {where}")
        if scheme(url) == "http" and not (sha256 or md5 or locked) and _split(url).hostname not in LOOPBACK:
            raise StageError(f"{url}: plain http can be changed on its way: use https, or give a sha256")
    output.parent.mkdir(parents=True, exist_ok=True)
    with _alone(output.with_name(f".{output.name}.part")) as part:
        if local is not None:
            shutil.copyfile(local, part)
        else:
            _download(url, part, timeout, pause)
        try:
            check(part, url, sha256, md5)
            if not sha256:
                check(part, url, locked, mend=f"remove its line from {lock}, written when it was first seen,")
        except StageError:
            part.unlink()
            raise
        if not (sha256 or md5 or locked) and lock is not None:
            _write_lock(lock, url, digest(part))
        part.replace(output)


@contextlib.contextmanager
def _alone(part: Path) -> Iterator[Path]:
    """Hold an unfinished file against other processes, until the block or the process ends; an empty one is removed."""
    while True:
        with part.open("ab") as held:
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f"{part}: another process writes it: waiting for its end", flush=True)
                fcntl.flock(held, fcntl.LOCK_EX)
            except OSError:
                pass  # a file system without locks
            # the other one has moved it to its place, or removed it
            if not part.exists() or not os.path.samestat(os.fstat(held.fileno()), part.stat()):
                continue
            try:
                yield part
            finally:
                if part.exists() and part.stat().st_size == 0:
                    part.unlink()
                    _tag(part).unlink(missing_ok=True)
            return


def _local(url: str, mirror: Path | None) -> Path | None:
    """The file on this machine that an address means; None for one of a host that the mirror does not have."""
    match scheme(url):
        case "package":
            candidates = _in_package(url)
        case "http" | "https":
            candidates = [] if mirror is None else [mirror / address_path(url)]
        case _:
            path = on_this_machine(url)
            candidates = [] if path is None else [path]
    for candidate in candidates:
        try:
            kind = candidate.stat().st_mode
        except (FileNotFoundError, NotADirectoryError, ValueError):  # the last: a NUL in it
            continue
        except OSError as error:
            raise StageError(f"{url}: {error.strerror}: mend the url in the configuration") from error
        if stat.S_ISREG(kind):
            return candidate
        what = "a folder" if stat.S_ISDIR(kind) else "no regular file"
        raise StageError(f"{candidate}: is {what}: mend the url, it must name one file")
    if scheme(url) in ("", "file", "package"):
        raise StageError(f"{url}: no such file: mend the url in the configuration")
    return None


def _in_package(url: str) -> list[Path]:
    """Where the file of an installed package may be."""
    parts = _split(url)
    name, inside = parts.netloc, Path(parts.path.lstrip("/"))
    if not name.isidentifier() or ".." in inside.parts:
        raise StageError(f"{url}: is no file inside a package: mend the url, as package://module/folder/file")
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        spec = None
    if spec is None:
        raise StageError(f"{url}: the Python package {name} is not installed: run `make .venv/made`")
    if not spec.submodule_search_locations:
        raise StageError(f"{url}: {name} is a single module and holds no files: mend the url")
    return [Path(folder) / inside for folder in spec.submodule_search_locations]


def _download(url: str, part: Path, timeout: float, pause: float) -> None:
    """Bring `part` to its full length, going on where an earlier attempt, or an earlier run, left it."""
    import requests

    problem = ""
    for attempt in range(ATTEMPTS):
        if attempt:
            print(f"{url}: attempt {attempt + 1} of {ATTEMPTS} after {pause * 2 ** (attempt - 1):.0f} s: {problem}")
            time.sleep(pause * 2 ** (attempt - 1))
        try:
            _transfer(url, part, timeout)
            _tag(part).unlink(missing_ok=True)
            return
        except (_Unfinished, requests.RequestException) as error:
            # a redirection's query may hold a key
            problem = re.sub(r"\?\S*", "?...", str(error).splitlines()[0])
            if _is_lasting(error):
                break
    raise StageError(
        f"{url}: cannot be downloaded ({problem}): check the address and the network, then run again; "
        "what has come is kept"
    )


def _is_lasting(error: BaseException) -> bool:
    """Whether another attempt would fail alike: no such host, no trusted certificate, no address."""
    import requests

    if isinstance(error, ValueError | requests.TooManyRedirects):
        return True
    if isinstance(error, requests.exceptions.SSLError):
        return "certificate" in str(error).lower()
    cause = error
    while cause is not None and not isinstance(cause, socket.gaierror):
        cause = cause.__cause__ or cause.__context__
    return isinstance(cause, socket.gaierror) and cause.errno == socket.EAI_NONAME


def _tag(part: Path) -> Path:
    """The server's name of the version that an unfinished file is of."""
    return part.with_suffix(".tag")


def _stay_safe(answer, **_) -> None:
    """Refuse a redirection from https to anything else."""
    target = urljoin(answer.url, answer.headers.get("Location", ""))
    if answer.is_redirect and scheme(answer.url) == "https" and scheme(target) != "https":
        raise StageError(
            f"{answer.url.partition('?')[0]}: the server sends on from https to {scheme(target)}: anybody on the way "
            "could change the file; use another address"
        )


def _transfer(url: str, part: Path, timeout: float) -> None:
    import requests
    from tqdm import tqdm

    tag = _tag(part)
    have = part.stat().st_size if tag.exists() else 0
    # a range of the same file only: `If-Range` asks for the whole of another one
    headers = {"Range": f"bytes={have}-", "If-Range": tag.read_text()} if have else {}
    headers["Accept-Encoding"] = "identity"
    hooks = {"response": _stay_safe}
    with requests.get(url, headers=headers, stream=True, timeout=timeout, hooks=hooks) as answer:
        if answer.status_code in LATER:
            raise _Unfinished(f"the server answers {answer.status_code} {answer.reason}")
        begins = answer.headers.get("Content-Range", f"bytes {have}-").startswith(f"bytes {have}-")
        if answer.status_code == 416 or (answer.status_code == 206 and not begins):
            os.truncate(part, 0)  # what is here is no beginning of it
            raise _Unfinished("the server has no such range")
        if answer.status_code not in (200, 206):
            raise StageError(f"{url}: the server answers {answer.status_code} {answer.reason}: mend the url")
        if answer.headers.get("Content-Type", "").startswith("text/html") and address_path(url).suffix != ".html":
            raise StageError(f"{url}: the server sends a web page instead of the file: open the url in a browser")
        if answer.status_code != 206 or not have:
            have = 0
            tag.unlink(missing_ok=True)  # in this order: what is here is never taken for the tag's
            os.truncate(part, 0)
        length = answer.headers.get("Content-Length")
        if length is not None and not re.fullmatch("[0-9]{1,18}", length):
            raise StageError(
                f"{url}: the server says that {length[:40]!r} bytes come: get the file in another way and put it into "
                "the mirror folder"
            )
        total = have + int(length) if length else None
        validator = answer.headers.get("ETag", "")
        if validator and not validator.startswith("W/"):
            tag.write_text(validator)
        else:
            tag.unlink(missing_ok=True)
        bar = tqdm(total=total, initial=have, desc=part.name[1:-5], unit="B", unit_scale=True, mininterval=5)
        with bar, part.open("ab") as file:
            for piece in answer.iter_content(1 << 16):
                file.write(piece)
                bar.update(len(piece))
    if total is not None and part.stat().st_size != total:
        raise _Unfinished(f"{part.stat().st_size} of {total} bytes came")


def _locked(lock: Path | None) -> dict[str, str]:
    if lock is None or not lock.is_file():
        return {}
    try:
        found = json.loads(lock.read_bytes())
    except (ValueError, RecursionError) as error:
        raise StageError(
            f"{lock}: is no JSON of addresses and hashes ({error}): undo the edit, or delete the file and hashes are "
            "written anew"
        ) from error
    if not isinstance(found, dict):
        raise StageError(f"{lock}: holds no addresses with their hashes: delete the file, and they are written anew")
    for url, value in found.items():
        if not isinstance(value, str) or not re.fullmatch("[0-9a-f]{64}", value):
            raise StageError(f"{lock}: {url} has no sha256 of 64 hex digits: remove its line, and it is written anew")
    return found


def _write_lock(lock: Path, url: str, found: str) -> None:
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.with_name(f".{lock.name}.guard").open("w") as guard:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(guard, fcntl.LOCK_EX)  # one download at a time adds its line
        before = _locked(lock)
        if before.get(url, found) != found:
            raise StageError(f"{url}: came in two versions at a time, {before[url]} and {found}: fetch it again")
        write_text(lock, json.dumps(before | {url: found}, indent=1, sort_keys=True) + "\n")
    print(f"{url}: no hash was published; {found} is written to {lock} and holds from now on")
