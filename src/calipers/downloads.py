"""MNIST and CIFAR-10 fetched on request: every byte is checked before a file appears, and nothing else is touched.

Checksums are of the contents, so that a file compressed again elsewhere still counts. `cache` is where data are looked
for when no folder is given. Nothing here runs unless it is asked for: reading data never starts a download.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import tarfile
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

from calipers.errors import DataError, unknown_name
from calipers.files import write_atomically

PATIENCE = 60.0  # seconds without an answer
BLOCK = 2**18


class File(NamedTuple):
    """What is fetched, its largest size in bytes, and a SHA-256: of an archive, else of the unpacked contents."""

    name: str
    limit: int
    digest: str


class Source(NamedTuple):
    url: str
    files: tuple[File, ...]
    members: tuple[str, ...] = ()  # of an archive: these are kept, the archive is not


SOURCES: dict[str, Source] = {
    "mnist": Source(
        "https://ossci-datasets.s3.amazonaws.com/mnist",
        (
            File(
                "train-images-idx3-ubyte.gz",
                12_000_000,
                "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
            ),
            File(
                "train-labels-idx1-ubyte.gz",
                60_000,
                "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
            ),
            File(
                "t10k-images-idx3-ubyte.gz",
                2_000_000,
                "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
            ),
            File(
                "t10k-labels-idx1-ubyte.gz",
                10_000,
                "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
            ),
        ),
    ),
    "cifar10": Source(
        "https://www.cs.toronto.edu/~kriz",
        (
            File(
                "cifar-10-binary.tar.gz",
                170_052_171,
                "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
            ),
        ),
        tuple(
            f"cifar-10-batches-bin/{name}.bin"
            for name in ("test_batch", *(f"data_batch_{i}" for i in range(1, 6)))
        ),
    ),
}


def cache(name: str) -> Path:
    """Where the data set ``name`` is kept: in CALIPERS_DATA, or in the user's cache folder."""
    root = os.environ.get("CALIPERS_DATA")
    if root:
        return Path(root) / name
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "calipers" / name


def download(
    name: str,
    folder: str | Path | None = None,
    *,
    source: str | None = None,
    progress: Callable[[str, int], None] | None = None,
) -> Path:
    """The files of ``mnist`` or ``cifar10`` in ``folder`` (`cache` if None), fetched unless they are there and right.

    Args:
        source: another address that has the files: http, https or file.
        progress: called with a file's name and the bytes so far.

    Raises:
        DataError: the address does not answer, or sends something else: a web page, a part, other bytes. The folder
            has whole, checked files or none.
        ValueError: an unknown name, or an address of another kind.
    """
    if name not in SOURCES:
        raise unknown_name("data", name, SOURCES)
    given = SOURCES[name]
    url = (source or given.url).rstrip("/")
    if urlsplit(url).scheme not in ("http", "https", "file"):
        raise ValueError(f"source: {url!r} is no http, https or file address")
    target = cache(name) if folder is None else Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    for file in given.files:
        if not _there(target, file, given.members):
            body = _fetch(f"{url}/{file.name}", file, progress)
            _require(f"{url}/{file.name}", body, file, archive=bool(given.members))
            if given.members:
                _unpack(target, file, body, given.members)
            else:
                write_atomically(target / file.name, body)
    return target


def _there(target: Path, file: File, members: tuple[str, ...]) -> bool:
    """Whether earlier work left this file; an archive's members are only written after the archive was checked."""
    if members:
        return all((target / member).is_file() for member in members)
    path = target / file.name
    return path.is_file() and _digest(path.read_bytes(), archive=False) == file.digest


def _fetch(url: str, file: File, progress: Callable[[str, int], None] | None) -> bytes:
    body = io.BytesIO()
    try:
        with urllib.request.urlopen(url, timeout=PATIENCE) as answer:  # noqa: S310 - the scheme was checked
            declared = answer.headers.get("Content-Length")
            while block := answer.read(BLOCK):
                body.write(block)
                if body.tell() > file.limit:
                    raise DataError(
                        f"{url}: sends more than {file.limit:,} bytes, so it is not this file; use another source"
                    )
                if progress is not None:
                    progress(file.name, body.tell())
    except (urllib.error.URLError, OSError, ValueError) as error:
        raise DataError(
            f"{url}: cannot be fetched ({error}); try again, name another address (--source), or put the file into "
            "the folder by hand"
        ) from None
    if declared is not None and declared.isdigit() and body.tell() < int(declared):
        raise DataError(f"{url}: {body.tell():,} of {int(declared):,} bytes came; try again")
    return body.getvalue()


def _require(url: str, body: bytes, file: File, *, archive: bool) -> None:
    """Raises DataError for anything but the file itself."""
    if body[:64].lstrip().lower().startswith((b"<!doc", b"<html", b"<?xml")):
        raise DataError(f"{url}: sends a web page instead of data; name another address (--source)")
    found = _digest(body, archive=archive)
    if found is None:
        raise DataError(
            f"{url}: {len(body):,} bytes came that are cut short or no gzip file; try again"
        )
    if found != file.digest:
        raise DataError(
            f"{url}: wrong checksum (SHA-256 {found[:16]}..., expected {file.digest[:16]}...); the file was changed or "
            "damaged and is not kept; name another address (--source)"
        )


def _digest(body: bytes, *, archive: bool) -> str | None:
    """The SHA-256 of an archive, or of what a gzip file holds; None if it cannot be unpacked.

    Unpacked in blocks: a file that is not the right one cannot fill memory.
    """
    if archive:
        return hashlib.sha256(body).hexdigest()
    state = hashlib.sha256()
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(body)) as file:
            while block := file.read(BLOCK):
                state.update(block)
    except (OSError, EOFError, zlib.error):
        return None
    return state.hexdigest()


def _unpack(target: Path, file: File, body: bytes, members: tuple[str, ...]) -> None:
    """These members alone, by name, read as bytes."""
    try:
        with tarfile.open(fileobj=io.BytesIO(body)) as archive:
            for name in members:
                content = archive.extractfile(name)
                if content is None:
                    raise DataError(f"{file.name}: {name} is no file in the archive")
                (target / name).parent.mkdir(exist_ok=True)
                write_atomically(target / name, content.read())
    except (tarfile.TarError, KeyError) as error:
        raise DataError(f"{file.name}: not the archive that it should be ({error})") from None
