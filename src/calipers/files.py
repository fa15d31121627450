"""Files that are the old one or the whole new one, never a part; archives that are bombs; cells of tables."""

from __future__ import annotations

import os
import tempfile
import zipfile
from contextlib import suppress
from pathlib import Path

RATIO = 200  # how much larger than its file what an archive holds may be
SMALL = 1 << 24  # bytes that any archive may hold
FORMULA = ("=", "+", "-", "@", "\t", "\r")  # what a spreadsheet program takes for one


def bomb(path: str | Path) -> int:
    """The bytes that a zip archive would have unpacked, if they are far more than honest contents compress to; else 0.

    The sizes are those that the archive declares, beyond which its readers do not read.
    """
    file = Path(path)
    try:
        with zipfile.ZipFile(file) as archive:
            size = sum(entry.file_size for entry in archive.infolist())
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return 0  # no archive, or a damaged one: its reader has better words for it
    return size if size > max(SMALL, RATIO * file.stat().st_size) else 0


def cell(value: object) -> object:
    """A value for a CSV file: text that a spreadsheet program would run as a formula gets an apostrophe before it."""
    return f"'{value}" if isinstance(value, str) and value.startswith(FORMULA) else value


def text_of(cell: str) -> str:
    """What `cell` made into a cell."""
    return cell[1:] if cell[:1] == "'" and cell[1:].startswith(FORMULA) else cell


def write_atomically(path: str | Path, content: str | bytes) -> None:
    """``content`` in ``path``, on the disk when this returns; if it fails (a full disk) the old file is still there."""
    target = Path(path)
    raw = content.encode() if isinstance(content, str) else content
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(raw)
            file.flush()
            os.fsync(file.fileno())
        Path(name).chmod(0o644)
        Path(name).replace(target)
    except BaseException:
        with suppress(OSError):
            Path(name).unlink()
        raise
