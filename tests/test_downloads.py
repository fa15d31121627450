"""Downloads from a local server and a folder: whole, checked files or a clear error."""

import gzip
import hashlib
import io
import tarfile
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest

from calipers import downloads
from calipers.data import load
from calipers.downloads import File, Source, cache, download
from calipers.errors import DataError

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data" / "mnist"
PLAIN = bytes(range(256)) * 40
PACKED = gzip.compress(PLAIN, mtime=0)


@pytest.fixture
def served(monkeypatch):
    """A server whose answers a test sets: path -> (status, declared length or None, body)."""
    answers = {}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            status, length, body = answers.get(self.path, (404, None, b"<html>not here</html>"))
            self.send_response(status)
            if length is not None:
                self.send_header("Content-Length", str(length))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    monkeypatch.setattr(downloads, "PATIENCE", 5.0)
    for proxy in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(proxy, raising=False)
    yield answers, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def one_file(monkeypatch):
    file = File("a.gz", 100_000, hashlib.sha256(PLAIN).hexdigest())
    monkeypatch.setitem(downloads.SOURCES, "mnist", Source("http://127.0.0.1:9", (file,)))


def test_a_file_is_fetched_once_and_repaired_if_damaged(served, one_file, tmp_path):
    answers, url = served
    answers["/a.gz"] = (200, len(PACKED), PACKED)
    seen = []
    where = download("mnist", tmp_path / "m", source=url, progress=lambda *a: seen.append(a))
    assert where == tmp_path / "m"
    assert (where / "a.gz").read_bytes() == PACKED
    assert seen[-1] == ("a.gz", len(PACKED))
    answers.clear()
    download("mnist", where, source=url)  # nothing is asked for
    (where / "a.gz").write_bytes(PACKED[:50])
    with pytest.raises(DataError, match="404"):
        download("mnist", where, source=url)
    again = gzip.compress(PLAIN, 1)  # compressed otherwise, the same contents
    answers["/a.gz"] = (200, None, again)
    download("mnist", where, source=url)
    assert (where / "a.gz").read_bytes() == again


@pytest.mark.parametrize(
    ("status", "declared", "body", "message"),
    [
        (404, None, b"", "404"),
        (500, None, b"", "500"),
        (200, None, b"<!DOCTYPE html><html>log in</html>", "web page"),
        (200, None, PACKED[:200], "cut short"),
        (200, len(PACKED), PACKED[:200], r"of .* bytes came|IncompleteRead|cannot be fetched"),
        (200, None, gzip.compress(PLAIN + b"x"), "wrong checksum"),
        (200, None, bytes(100_001), "sends more than 100,000 bytes"),
        (200, None, b"", "cut short|wrong checksum"),
    ],
)
def test_anything_else_is_refused_and_leaves_nothing(
    served, one_file, tmp_path, status, declared, body, message
):
    answers, url = served
    answers["/a.gz"] = (status, declared, body)
    with pytest.raises(DataError, match=message):
        download("mnist", tmp_path, source=url)
    assert list(tmp_path.iterdir()) == []


def test_no_server_no_scheme_no_name(one_file, tmp_path):
    with pytest.raises(DataError, match=r"cannot be fetched.*--source"):
        download("mnist", tmp_path)
    with pytest.raises(ValueError, match="no http, https or file address"):
        download("mnist", tmp_path, source="ftp://x")
    with pytest.raises(ValueError, match="Did you mean 'mnist'"):
        download("mnis", tmp_path)


def archive(**files: bytes) -> bytes:
    body = io.BytesIO()
    with tarfile.open(fileobj=body, mode="w:gz") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return body.getvalue()


def test_an_archive_gives_its_members_and_nothing_else(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    names = downloads.SOURCES["cifar10"].members
    parts = {n: rng.integers(0, 10, (3, 3073), dtype=np.uint8).tobytes() for n in names}
    body = archive(**parts, **{"../evil": b"x"})
    (tmp_path / "from").mkdir()
    (tmp_path / "from" / "c.tar.gz").write_bytes(body)
    file = File("c.tar.gz", len(body), hashlib.sha256(body).hexdigest())
    monkeypatch.setitem(downloads.SOURCES, "cifar10", Source("https://x", (file,), names))
    source = (tmp_path / "from").as_uri()
    monkeypatch.setenv("CALIPERS_DATA", str(tmp_path / "kept"))
    with pytest.raises(DataError, match="calipers download cifar10"):
        load("cifar10")
    assert download("cifar10", source=source) == cache("cifar10") == tmp_path / "kept" / "cifar10"
    assert len(load("cifar10", split="train")) == 15
    assert len(load("cifar10")) == 3
    assert not (tmp_path / "kept" / "evil").exists()
    (tmp_path / "from" / "c.tar.gz").unlink()
    download("cifar10", source=source)  # all there
    part = archive(**{names[0]: b"1"})
    (tmp_path / "from" / "c.tar.gz").write_bytes(part)
    file = File("c.tar.gz", len(body), hashlib.sha256(part).hexdigest())
    monkeypatch.setitem(downloads.SOURCES, "cifar10", Source("https://x", (file,), names))
    with pytest.raises(DataError, match="not the archive"):
        download("cifar10", tmp_path / "other", source=source)


@pytest.mark.skipif(not SHARED.exists(), reason="no shared MNIST files")
def test_the_checksums_are_the_real_files(run, tmp_path, monkeypatch):
    monkeypatch.setenv("CALIPERS_DATA", str(tmp_path))
    code, out, _ = run("download", "mnist", "--source", SHARED.as_uri())
    assert code == 0
    assert str(tmp_path) in out
    assert len(load("mnist")) == 10_000
