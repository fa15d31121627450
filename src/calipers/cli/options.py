"""Options as texts, read: times, shapes, files to write."""

from __future__ import annotations

import math
import os
import re
from pathlib import Path

from calipers.errors import ModelError

UNITS = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0}


def writable(option: str, file: Path) -> None:
    """Refuse an output that cannot be written before the work, not after it."""
    if not file.parent.is_dir():
        raise ValueError(f"{option}: the folder {file.parent} does not exist")
    if file.is_dir() or not os.access(file.parent, os.W_OK):
        raise ValueError(f"{option}: {file} is a folder, or its folder cannot be written to")


def seconds_of(text: str, option: str = "--budget") -> float:
    """``90``, ``90s``, ``10m`` or ``1.5h`` in seconds.

    Raises:
        ValueError: anything else, or zero.
    """
    found = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?)([smh]?)", text.strip())
    if not found or not float(found[1]):
        raise ValueError(f"{option}: cannot read {text!r}; write a time such as 90s, 10m or 1.5h")
    return float(found[1]) * UNITS[found[2]]


def shape_of(text: str | None) -> tuple[int, ...] | None:
    """``1,28,28`` as a tuple.

    Raises:
        ModelError: not positive integers, or more numbers than memory would hold.
    """
    if text is None:
        return None
    parts = re.split(r"[,x]", text.strip())
    if not all(re.fullmatch(r"[1-9]\d{0,8}", p.strip()) for p in parts) or not parts:
        raise ModelError(f"--input-shape: cannot read {text!r}; write positive numbers, as 1,28,28")
    shape = tuple(map(int, parts))
    if math.prod(shape) > 2**28:
        raise ModelError(
            f"--input-shape: {text} has {math.prod(shape):,} numbers; at most {2**28:,}"
        )
    return shape


def share_of(text: str, option: str) -> float:
    """``85%`` or ``0.85`` as a share.

    Raises:
        ValueError: anything else, or not between 0 and 1.
    """
    found = re.fullmatch(r"(\d{1,3}(?:\.\d{1,9})?|\.\d{1,9})\s?(%?)", text.strip())
    share = float(found[1]) / (100 if found[2] else 1) if found else math.nan
    if not 0 <= share <= 1:
        raise ValueError(f"{option}: cannot read {text!r}; write a share such as 85% or 0.85")
    return share
