"""Downloads from a server that misbehaves in every way seen: the file is right or refused, and never half there."""

import hashlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import requests

from anisodiff import cli
from anisodiff.data import download
from anisodiff.data.download import address_path, check, fetch, file_state, to_fetch
from anisodiff.errors import StageError

ROOT = Path(__file__).parents[1]
CONTENT = bytes(range(256)) * 4096  # 1 MiB
DIGEST = hashlib.sha256(CONTENT).hexdigest()


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_GET(self):
        server, behaviour = self.server, self.path.split("/")[1]
        server.asked.append((behaviour, self.headers.get("Range")))
        times = sum(each[0] == behaviour for each in server.asked)
        if behaviour.isdecimal():
            return self.send_error(int(behaviour))
        if behaviour == "broken" or (behaviour == "busy" and times < 3):
            return self.send_error(500 if behaviour == "broken" else 503)
        first = 0
        if (wanted := self.headers.get("Range")) and self.headers.get("If-Range") == '"one"':
            first = int(wanted.removeprefix("bytes=").rstrip("-"))
        body = CONTENT[first:] if behaviour != "wrong" else b"something else"
        self.send_response(206 if first else 200)
        self.send_header("Content-Type", "text/html" if behaviour == "page" else "application/octet-stream")
        self.send_header("Content-Length", "abc" if behaviour == "wordy" else str(len(body)))
        self.send_header("ETag", f'"{times}"' if behaviour == "changing" else '"one"')
        self.end_headers()
        if behaviour in ("truncating", "changing") and times < 3:
            self.wfile.write(body[: len(body) // 3])
            self.wfile.flush()
            return self.connection.close()
        if behaviour == "slow":
            self.wfile.write(body[: 1 << 16])
            self.wfile.flush()
            server.go_on.wait(20)
            body = body[1 << 16 :]
        if behaviour == "stalling" and times < 2:
            self.wfile.write(body[:1000])
            self.wfile.flush()
            return time.sleep(3)
        self.wfile.write(body)


@pytest.fixture(scope="module")
def server():
    made = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    made.asked, made.go_on = [], threading.Event()
    thread = threading.Thread(target=made.serve_forever, daemon=True)
    thread.start()
    yield made
    made.shutdown()


@pytest.fixture
def get(server, tmp_path):
    """Fetch with a behaviour of the server; returns the output."""
    server.asked.clear()

    def run(behaviour, **options):
        output = tmp_path / "files" / "network.pkl"
        options = {"sha256": DIGEST, "timeout": 0.5, "pause": 0.01} | options
        fetch(f"http://127.0.0.1:{server.server_port}/{behaviour}/network.pkl", output, **options)
        return output

    return run


def nothing_left(folder):
    return [each.name for each in folder.rglob("*") if each.is_file()] == []


@pytest.mark.parametrize("behaviour", ["good", "busy", "truncating", "stalling", "changing"])
def test_the_file_arrives(get, behaviour):
    output = get(behaviour)
    assert output.read_bytes() == CONTENT
    assert [each.name for each in output.parent.iterdir()] == ["network.pkl"]


def test_what_has_come_is_not_asked_for_again(get, server):
    get("truncating")
    ranges = [wanted for _, wanted in server.asked]
    starts = [int(wanted.removeprefix("bytes=").rstrip("-")) for wanted in ranges[1:]]
    third, piece = len(CONTENT) // 3, 1 << 16
    assert ranges[0] is None
    assert third - piece < starts[0] <= third < starts[1]


def test_a_file_that_changed_meanwhile_starts_again(get, server):
    assert get("changing").read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("behaviour", "says"),
    [("404", "404"), ("broken", "500"), ("page", "a web page instead of the file"), ("wrong", "not " + DIGEST),
     ("wordy", "the server says that 'abc' bytes come")],
)  # fmt: skip
def test_is_refused(get, tmp_path, behaviour, says):
    with pytest.raises(StageError, match=says) as refused:
        get(behaviour)
    assert "\n" not in str(refused.value)
    assert nothing_left(tmp_path)


def test_a_hash_seen_once_holds(get, tmp_path, server):
    lock = tmp_path / "lock.json"
    get("good", sha256=None, lock=lock)
    assert list(json.loads(lock.read_text()).values()) == [DIGEST]
    url = next(iter(json.loads(lock.read_text())))
    lock.write_text(json.dumps({url: "0" * 64}))
    with pytest.raises(StageError, match="when it was first seen"):
        get("good", sha256=None, lock=lock)


def test_md5_where_only_that_is_published(get):
    get("good", sha256=None, md5=hashlib.md5(CONTENT).hexdigest())
    with pytest.raises(StageError, match="md5 is"):
        get("good", sha256=None, md5="0" * 32)


def test_offline_says_which_file_to_put_where(get, tmp_path, server):
    mirror = tmp_path / "mirror"
    where = mirror / f"127.0.0.1:{server.server_port}" / "good/network.pkl"
    with pytest.raises(StageError, match=f"put it at {where}"):
        get("good", mirror=mirror, offline=True)
    assert server.asked == []
    where.parent.mkdir(parents=True)
    where.write_bytes(CONTENT)
    assert get("good", mirror=mirror, offline=True).read_bytes() == CONTENT


def test_a_file_of_the_mirror_is_checked_too(get, tmp_path, server):
    where = tmp_path / "mirror" / f"127.0.0.1:{server.server_port}" / "good/network.pkl"
    where.parent.mkdir(parents=True)
    where.write_bytes(b"tampered")
    with pytest.raises(StageError, match="corrupt or another one"):
        get("good", mirror=tmp_path / "mirror")


def test_addresses_and_their_places(tmp_path):
    """Plain ones by host and path; others have a hash before the name."""
    for url in ("a.org/b/c.pkl", "a.org:8000/b/c d.pkl"):
        assert str(address_path(f"https://{url}")) == url
    assert str(address_path("package://module/folder/x.pth")) == "module/folder/x.pth"
    assert str(address_path("data/my x.zip")) == "local/data/my x.zip"
    for url, made in (
        ("https://a.org/b/c%20d.pkl?x=1", r"a\.org/b/[0-9a-f]{12}/c d\.pkl"),
        ("file:///data/x.zip", r"local/file/data/[0-9a-f]{12}/x\.zip"),
        ("../up/x.zip", r"local/up/[0-9a-f]{12}/x\.zip"),
    ):
        assert re.fullmatch(made, str(address_path(url)))
    with pytest.raises(StageError, match="names no file"):
        address_path("https://a.org/")
    (tmp_path / "x").write_bytes(CONTENT)
    for url in (str(tmp_path / "x"), f"file://{tmp_path}/x"):
        fetch(url, tmp_path / "copy", sha256=DIGEST)
        assert (tmp_path / "copy").read_bytes() == CONTENT
    fetch("package://anisodiff/__init__.py", tmp_path / "init", sha256=None)
    assert b"__version__" in (tmp_path / "init").read_bytes()
    with pytest.raises(StageError, match="not installed"):
        fetch("package://no_such_package/x", tmp_path / "y")


def test_different_addresses_have_different_places():
    urls = [
        "m/net.pkl", "../m/net.pkl", "/m/net.pkl", "../../m/net.pkl", "file:///m/net.pkl", "m/net.pkl?a",
        "m#1/net.pkl", "m#2/net.pkl", "m/net%2e.pkl", "https://a/m/net.pkl", "https://a/m/net.pkl?a=1",
        "https://a/m/net.pkl?a=2", "https://a/m/net.pkl#a", "https://a/m/../net.pkl", "https://a/net.pkl",
        "https://a//net.pkl", "https://a/%6eet.pkl", "https://a/%2e%2e/net.pkl", "https://a/m%2fnet.pkl",
        "https://a/net.pkl/", "https://a/x\0net.pkl", "https://a/x{net.pkl", "https://local/m/net.pkl",
        "https://logs/m/net.pkl", "https://a/" + "x" * 3000 + ".pkl", "https://a/y" + "x" * 3000 + ".pkl",
        "https://a/" + "x/" * 3000 + ".pkl", "https://" + "a" * 3000 + "/net.pkl",
    ]  # fmt: skip
    places = [address_path(url) for url in urls]
    assert len(set(places)) == len(urls)
    for made in places:
        assert not made.is_absolute()
        assert made.parts[0] != "logs"
        assert ".." not in made.parts
        assert max(len(part.encode()) for part in made.parts) <= 200
        assert len(str(made)) < 3600
        assert not set("\0\n{}") & set(str(made))


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("https://../x", "names no host"),
        ("https:///x", "names no host"),
        ("https://[::1/x", "is no address"),
        ("https://a.org/..", "names no file"),
        ("https://somebody:hunter2@a.org/x.pkl", "a user or a password in it"),
        ("https://a.org/x.pkl?X-Amz-Signature=hunter2", "an address with a X-Amz-Signature in it"),
        ("file://host/x", "names the host 'host'"),
        ("s3://bucket/x", "addresses begin with"),
        ("package://os/x", "a single module"),
        ("package://anisodiff/../README.md", "no file inside a package"),
        ("package://anisodiff/none", "no such file"),
        ("package://a.b/x", "no file inside a package"),
        ("package://__main__/x", "not installed|a single module"),
        ("x" * 5000, "mend the url"),
        ("a\0b", "no such file"),
    ],
)
def test_an_address_that_is_none_is_one_line(tmp_path, url, says):
    with pytest.raises(StageError, match=says) as refused:
        fetch(url, tmp_path / "x")
    assert "hunter2" not in str(refused.value)
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_file_is_no_download(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name, says in (("pipe", "is no regular file"), (".", "is a folder")):
        with pytest.raises(StageError, match=says):
            fetch(f"{tmp_path}/{name}", tmp_path / "x")


def test_a_package_in_many_folders_has_its_files(tmp_path, monkeypatch):
    for folder in ("one", "two"):
        (tmp_path / folder / "scattered").mkdir(parents=True)
        monkeypatch.syspath_prepend(tmp_path / folder)
    (tmp_path / "two/scattered/x").write_bytes(CONTENT)
    fetch("package://scattered/x", tmp_path / "x", sha256=DIGEST)


@pytest.mark.parametrize("status", ["400", "401", "403", "404", "410"])
def test_an_answer_that_stays_is_asked_for_once(get, server, status):
    with pytest.raises(StageError, match=status):
        get(status)
    assert len(server.asked) == 1


@pytest.mark.parametrize(
    "error",
    [requests.exceptions.SSLError("[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed: self-signed"),
     requests.exceptions.InvalidURL("label too long"), requests.exceptions.TooManyRedirects("30 redirects")],
)  # fmt: skip
def test_an_error_that_stays_is_met_once(tmp_path, monkeypatch, error):
    asked = []

    def fail(*_, **__):
        asked.append(1)
        raise error

    monkeypatch.setattr(requests, "get", fail)
    with pytest.raises(StageError, match="cannot be downloaded"):
        fetch("https://a.invalid/x.pkl", tmp_path / "x", pause=0.0)
    assert len(asked) == 1


def test_a_host_that_is_none_is_asked_for_once(tmp_path, monkeypatch):
    asked = []

    def unknown(*_, **__):
        asked.append(1)
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with pytest.raises(StageError, match="cannot be downloaded"):
        fetch("https://host.invalid/x.pkl", tmp_path / "x", pause=0.0)
    assert len(asked) == 1
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: _no_answer(asked))
    with pytest.raises(StageError, match="cannot be downloaded"):
        fetch("https://host.invalid/x.pkl", tmp_path / "x", pause=0.0)
    assert len(asked) == 1 + download.ATTEMPTS


def _no_answer(asked):
    asked.append(1)
    raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")


def test_nobody_on_the_way_can_change_a_file(tmp_path):
    with pytest.raises(StageError, match="use https, or give a sha256"):
        fetch("http://a.invalid/x.pkl", tmp_path / "x", lock=tmp_path / "lock.json")
    answer = requests.Response()
    answer.url, answer.status_code, answer.headers["Location"] = "https://a.org/x?id=1", 302, "http://b.org/x"
    with pytest.raises(StageError, match=r"https://a\.org/x: the server sends on from https to http"):
        download._stay_safe(answer)
    for place_again in ("/y", "https://b.org/x", "//b.org/x"):
        answer.headers["Location"] = place_again
        download._stay_safe(answer)


@pytest.mark.parametrize(
    "content",
    ['{\n<<<<<<< HEAD\n "a": "b"\n=======\n}\n', "", "[]", '{"a": 1}', '{"a": "b"}', "\xff", "[" * 100_000],
)
def test_a_damaged_lock_is_one_line_before_anything_is_fetched(get, server, tmp_path, content):
    lock = tmp_path / "lock.json"
    lock.write_bytes(content.encode("latin1"))
    with pytest.raises(StageError, match=r"lock\.json: .*(delete the file|remove its line)") as refused:
        get("good", sha256=None, lock=lock)
    assert "\n" not in str(refused.value)
    assert server.asked == []


def test_a_process_waits_for_another_and_goes_on_where_that_was_killed(server, tmp_path):
    """What a killed one has left is not asked for again, and no two write at a time."""
    server.asked.clear()
    server.go_on.clear()
    output = tmp_path / "files" / "network.pkl"
    url = f"http://127.0.0.1:{server.server_port}/slow/network.pkl"
    command = [sys.executable, "-m", "anisodiff", "download", "--url", url, "--output", output, "--sha256", DIGEST]
    start = lambda: subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)  # noqa: E731
    part = output.with_name(".network.pkl.part")
    first = start()
    _until(lambda: part.exists() and part.stat().st_size == 1 << 16)
    second = start()
    assert "waiting" in second.stdout.readline()
    assert [wanted for _, wanted in server.asked] == [None]
    first.send_signal(signal.SIGKILL)
    first.communicate()
    server.go_on.set()
    assert second.wait(30) == 0, second.stderr.read()
    assert [wanted for _, wanted in server.asked] == [None, f"bytes={1 << 16}-"]
    assert output.read_bytes() == CONTENT
    assert [each.name for each in output.parent.iterdir()] == ["network.pkl"]
    second.communicate()


def _until(true, seconds=30):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_hash_is_of_one_file(tmp_path):
    (tmp_path / "x").write_bytes(CONTENT)
    check(tmp_path / "x", "x", sha256=DIGEST, md5=hashlib.md5(CONTENT).hexdigest())
    with pytest.raises(StageError, match=r"x: sha256 is .* not 000"):
        check(tmp_path / "x", "x", sha256="0" * 64)
    with pytest.raises(StageError, match="digits: is no single file, so it has no sha256"):
        check(Path("digits"), "digits", sha256=DIGEST)


def test_images_are_not_read_before_their_hash(tmp_path):
    (tmp_path / "set.zip").write_bytes(CONTENT)
    with pytest.raises(StageError, match=r"set\.zip: sha256 is"):
        cli.images(str(tmp_path / "set.zip"), tmp_path / "images", sha256="0" * 64)


def test_a_fingerprint_is_of_names_sizes_and_times(tmp_path):
    """Of the images that are read, links followed, and of a lone file; another hidden file changes nothing."""
    folder = tmp_path / "set"
    (folder / "cat").mkdir(parents=True)
    (folder / "cat/a.png").write_bytes(b"1")
    (tmp_path / "elsewhere").mkdir()
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    (folder / "circle").symlink_to(folder)
    seen = {file_state(folder)}

    def changed(change) -> bool:
        change()
        before = len(seen)
        seen.add(file_state(folder))
        return len(seen) > before

    assert changed(lambda: (folder / "cat/b.PNG").write_bytes(b"1"))
    assert changed(lambda: (folder / "cat/b.PNG").write_bytes(b"12"))
    assert changed(lambda: os.utime(folder / "cat/a.png", (1, 1)))
    assert changed(lambda: (folder / "cat/a.png").rename(folder / "cat/c.png"))
    assert changed(lambda: (tmp_path / "elsewhere/d.jpg").write_bytes(b"1"))
    assert changed(lambda: (folder / "dataset.json").write_text("{}"))
    assert not changed(lambda: (folder / ".hidden.png").write_bytes(b"1"))
    assert not changed(lambda: (folder / "cat/notes.txt").write_bytes(b"1"))
    assert len({file_state(tmp_path / "none"), file_state(folder / "cat/c.png"), file_state(folder)}) == 3


def named(dataset: str, **entries) -> list[tuple[str, dict]]:
    files = {"images": {"url": "digits"}, "base": {"url": "b.pkl"}, "features": {"url": "f.pt"}} | entries
    return [(f"datasets.{dataset}.{key}", file) for key, file in files.items()]


def test_files_of_all_datasets_are_fetched_once_with_the_hash_that_any_gives():
    files = [*named("one"), *named("two", base={"url": "b.pkl", "sha256": DIGEST, "md5": None})]
    none = {"sha256": None, "md5": None}
    assert to_fetch(files) == {"b.pkl": none | {"sha256": DIGEST}, "f.pt": none}
    assert "https://a/x.zip" in to_fetch(named("one", images={"url": "https://a/x.zip"}))


@pytest.mark.parametrize(
    ("entries", "says"),
    [
        ({"base": {"url": "b.pkl", "sha256": "0" * 64}}, r"datasets\.two\.base\.sha256: b\.pkl has another sha256"),
        ({"base": {"url": "https://a/b.pkl"}, "features": {"url": "http://a/b.pkl"}}, "would be one file"),
        ({"base": {"url": "https://a/B.pkl"}, "features": {"url": "https://a/b.pkl"}}, "would be one file"),
        (
            {"base": {"url": "https://a/b"}, "features": {"url": "https://a/b/c"}},
            "would lie below the file https://a/b",
        ),
        ({"base": {"url": "https://me:hunter2@a/b"}}, r"datasets\.two\.base\.url: https://a/b: an address with a user"),
    ],
)
def test_two_files_do_not_share_a_place(entries, says):
    files = [*named("one", base={"url": "b.pkl", "sha256": DIGEST}), *named("two", **entries)]
    with pytest.raises(StageError, match=says) as refused:
        to_fetch(files)
    assert "hunter2" not in str(refused.value)
