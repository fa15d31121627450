"""Reading a certificate file: bytes, header, arrays, document. Nothing is allocated that the file does not hold."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from calipers_check.errors import Refused, Unusable

MAX_BYTES = 1 << 31  # of a file, decompressed
MAX_HEADER = 1 << 26
CHUNK = 1 << 20
MAX_MEMBERS = 100  # of a gzip file
DTYPES = {"U8": "u1", "I32": "<i4", "I64": "<i8", "F16": "<f2", "F32": "<f4", "F64": "<f8"}


class Certificate(NamedTuple):
    """What the file holds."""

    document: dict[str, Any]
    arrays: dict[str, np.ndarray]


def read_bytes(path: Path, limit: int = MAX_BYTES) -> bytes:
    """A file's bytes, gunzipped if it is gzip's, never more than ``limit``.

    Raises:
        Unusable: there is no such file.
        Refused: it is too large, or gzip's and damaged.
    """
    try:
        with path.open("rb") as file:
            data = _read(file, limit + 1)
    except OSError as error:
        raise Unusable(f"{path}: {error.strerror}") from None
    if len(data) > limit:
        raise Refused(f"{path.name}: more than {limit} bytes")
    return _gunzipped(data, limit, path.name) if data[:2] == b"\x1f\x8b" else data


def _read(file: BinaryIO, limit: int) -> bytes:
    """At most ``limit`` bytes; asked for at once they would be allocated at once."""
    parts: list[bytes] = []
    while limit > 0 and (part := file.read(min(limit, CHUNK))):
        parts.append(part)
        limit -= len(part)
    return b"".join(parts)


def _gunzipped(data: bytes, limit: int, name: str) -> bytes:
    parts: list[bytes] = []
    left = limit + 1
    while data:  # one round for each member
        if len(parts) == MAX_MEMBERS:
            raise Refused(f"{name}: more than {MAX_MEMBERS} members of gzip")
        stream = zlib.decompressobj(31)
        try:
            part = stream.decompress(data, left)
        except zlib.error as error:
            raise Refused(f"{name}: not readable as gzip: {error}") from None
        left -= len(part)
        if left <= 0:
            raise Refused(f"{name}: more than {limit} bytes when decompressed")
        if not stream.eof:
            raise Refused(f"{name}: gzip data end too early")
        parts.append(part)
        data = stream.unused_data
    return b"".join(parts)


def parse(data: bytes) -> Certificate:
    """The document and the arrays of a file in the safetensors layout.

    Raises:
        Refused: anything is not as docs/certificates.md, section 2, says.
    """
    if len(data) < 8:
        raise Refused("the file is too short to be a certificate")
    length = int.from_bytes(data[:8], "little")
    if length > MAX_HEADER or 8 + length > len(data):
        raise Refused(f"the header is said to have {length} bytes; the file has {len(data)}")
    header = _object(data[8 : 8 + length], "the header")
    metadata = header.pop("__metadata__", None)
    if not isinstance(metadata, dict) or not isinstance(metadata.get("certificate"), str):
        raise Refused('the header has no text __metadata__["certificate"]')
    document = _object(metadata["certificate"], "the document")
    return Certificate(document, _arrays(header, memoryview(data)[8 + length :]))


def _object(text: bytes | str, what: str) -> dict[str, Any]:
    try:
        value = json.loads(text if isinstance(text, str) else text.decode())
    except (ValueError, RecursionError) as error:
        raise Refused(f"{what} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise Refused(f"{what} is not a JSON object")
    return value


def _arrays(header: Mapping[str, Any], body: memoryview) -> dict[str, np.ndarray]:
    arrays: dict[str, np.ndarray] = {}
    end = 0
    for name, entry in header.items():
        if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
            raise Refused(f"array {name}: expected dtype, shape and data_offsets")
        shape, offsets = _naturals(name, entry["shape"]), _naturals(name, entry["data_offsets"])
        if not isinstance(entry["dtype"], str) or entry["dtype"] not in DTYPES:
            raise Refused(f"array {name}: its dtype is not one of {list(DTYPES)}")
        dtype = np.dtype(DTYPES[entry["dtype"]])
        if len(shape) > 2 or len(offsets) != 2 or offsets[0] != end:
            raise Refused(f"array {name}: its place or its number of dimensions is wrong")
        end += math.prod(shape) * dtype.itemsize
        if offsets[1] != end or end > len(body):
            raise Refused(f"array {name}: its place does not fit its shape, or the file ends early")
        arrays[name] = np.frombuffer(body[offsets[0] : end], dtype).reshape(shape)
    if end != len(body):
        raise Refused(f"{len(body) - end} bytes behind the last array")
    return arrays


def _naturals(name: str, value: Any) -> list[int]:
    if not isinstance(value, list) or any(type(v) is not int or v < 0 for v in value):
        raise Refused(f"array {name}: a shape or an offset that is no list of sizes")
    return value
