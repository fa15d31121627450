"""Rows of a damaged SQLite file, read from its pages one by one: where the tree above a page is gone, SQLite itself
reads nothing of it.

Only tables ``WITHOUT ROWID`` are read (their rows lie in index pages). What comes back may be old or wrong: the caller
checks it.

Reference: https://www.sqlite.org/fileformat2.html, sections 1.6 (b-tree pages), 2.1 (records).
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

INTERIOR, LEAF = 2, 10  # index pages: the length of their headers is 12 and 8
SIZES = {1 << k for k in range(9, 17)}
PAGE = 4096  # SQLite's default, should the header be gone
LENGTHS = {
    1: 1,
    2: 2,
    3: 3,
    4: 4,
    5: 6,
    6: 8,
    7: 8,
}  # serial type -> bytes; 7 is a float, the others integers


def salvaged(file: Path) -> Iterator[tuple[Any, ...]]:
    """Every record that lies whole in ``file``, some perhaps more than once."""
    if not file.stat().st_size:
        return
    with file.open("rb") as handle, mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as data:
        size = int.from_bytes(data[16:18], "big")
        size = 65536 if size == 1 else size
        size = size if data[:15] == b"SQLite format 3" and size in SIZES else PAGE
        for start in range(0, len(data), size):
            yield from _rows(data, start, size)


def _rows(data: mmap.mmap, start: int, size: int) -> Iterator[tuple[Any, ...]]:
    kind = data[start]
    if kind not in (INTERIOR, LEAF):
        return
    count = int.from_bytes(data[start + 3 : start + 5], "big")
    first, skipped = start + (12 if kind == INTERIOR else 8), 4 if kind == INTERIOR else 0
    for place in range(first, min(first + 2 * count, start + size), 2):
        cell = int.from_bytes(data[place : place + 2], "big")
        try:
            yield tuple(_record(_payload(data, start + cell + skipped, size)))
        except (IndexError, ValueError, struct.error):
            continue


def _varint(data: Any, at: int) -> tuple[int, int]:
    """A big-endian number in groups of seven bits (nine bytes at most), and where it ends."""
    value = 0
    for i in range(8):
        byte = data[at + i]
        value = value << 7 | byte & 0x7F
        if byte < 0x80:
            return value, at + i + 1
    return value << 8 | data[at + 8], at + 9


def _payload(data: mmap.mmap, at: int, size: int) -> bytes:
    """A cell's bytes: those on its page, then those of its chain of overflow pages."""
    length, at = _varint(data, at)
    most, least = (size - 12) * 64 // 255 - 23, (size - 12) * 32 // 255 - 23
    local = length
    if length > most:
        local = least + (length - least) % (size - 4)
        local = local if local <= most else least
    if length > len(data):
        raise ValueError
    found = bytearray(data[at : at + local])
    following = int.from_bytes(data[at + local : at + local + 4], "big")
    while len(found) < length:
        start = (following - 1) * size
        if following < 1 or start + size > len(data):
            raise ValueError
        following = int.from_bytes(data[start : start + 4], "big")
        found += data[start + 4 : start + min(size, 4 + length - len(found))]
    return bytes(found)


def _record(payload: bytes) -> Iterator[Any]:
    """The columns of a record."""
    body, at = _varint(payload, 0)
    end = body
    while at < end:
        kind, at = _varint(payload, at)
        length = LENGTHS.get(kind, max(kind - 12, 0) // 2)
        part = payload[body : body + length]
        if len(part) < length:
            raise ValueError
        body += length
        yield _value(kind, part)


def _value(kind: int, part: bytes) -> Any:
    if kind == 0:
        return None
    if kind == 7:
        return struct.unpack(">d", part)[0]
    if kind in LENGTHS:
        return int.from_bytes(part, "big", signed=True)
    if kind in (8, 9):
        return kind - 8
    if kind < 12:
        raise ValueError
    return part if kind % 2 == 0 else part.decode()
