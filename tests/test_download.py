"""Downloads from a server that misbehaves in every way seen: the file is right or refused, and never half there."""

import hashlib
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from anisodiff.download import fetch, place
from anisodiff.files import StageError

CONTENT = bytes(range(256)) * 4096  # 1 MiB
DIGEST = hashlib.sha256(CONTENT).hexdigest()


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_GET(self):
        server, behaviour = self.server, self.path.split("/")[1]
        server.asked.append((behaviour, self.headers.get("Range")))
        times = sum(each[0] == behaviour for each in server.asked)
        if behaviour == "missing":
            return self.send_error(404)
        if behaviour == "broken" or (behaviour == "busy" and times < 3):
            return self.send_error(500 if behaviour == "broken" else 503)
        first = 0
        if (wanted := self.headers.get("Range")) and self.headers.get("If-Range") == '"one"':
            first = int(wanted.removeprefix("bytes=").rstrip("-"))
        body = CONTENT[first:] if behaviour != "wrong" else b"something else"
        self.send_response(206 if first else 200)
        self.send_header("Content-Type", "text/html" if behaviour == "page" else "application/octet-stream")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{times}"' if behaviour == "changing" else '"one"')
        self.end_headers()
        if behaviour in ("truncating", "changing") and times < 3:
            self.wfile.write(body[: len(body) // 3])
            self.wfile.flush()
            return self.connection.close()
        if behaviour == "stalling" and times < 2:
            self.wfile.write(body[:1000])
            self.wfile.flush()
            return time.sleep(3)
        self.wfile.write(body)


@pytest.fixture(scope="module")
def server():
    made = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    made.asked = []
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
    [("missing", "404"), ("broken", "500"), ("page", "a web page instead of the file"), ("wrong", "not " + DIGEST)],
)
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
    assert str(place("https://a.org/b/c%20d.pkl?x=1")) == "a.org/b/c d.pkl"
    assert str(place("file:///data/x.zip")) == "local/data/x.zip"
    assert str(place("../up/x.zip")) == "local/up/x.zip"
    with pytest.raises(StageError, match="names no file"):
        place("https://a.org/")
    (tmp_path / "x").write_bytes(CONTENT)
    for url in (str(tmp_path / "x"), f"file://{tmp_path}/x"):
        fetch(url, tmp_path / "copy", sha256=DIGEST)
        assert (tmp_path / "copy").read_bytes() == CONTENT
    fetch("package://anisodiff/__init__.py", tmp_path / "init", sha256=None)
    assert b"__version__" in (tmp_path / "init").read_bytes()
    with pytest.raises(StageError, match="not installed"):
        fetch("package://no_such_package/x", tmp_path / "y")
