"""Limits: a time limit that holds inside of any computation, sizes as texts."""

from __future__ import annotations

import inspect
import math
import re
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch

AGAIN = 2.0  # seconds until the next interrupt, should one have been swallowed
SOON = 0.05  # seconds until the next look, where an interrupt would do harm


class TimeIsUp(BaseException):
    """The deadline of an `alarm` has passed. No `Exception`, so that nothing takes it for a failure of its own."""


@contextmanager
def alarm(deadline: float) -> Iterator[None]:
    """Raise `TimeIsUp` in the block once ``time.perf_counter()`` reaches ``deadline``.

    It comes between two steps of the interpreter, so a single operation is never cut short; nor is an import, which
    would leave half a module for whoever asks for it next. Outside of the main thread, and where the system has no
    interval timer, nothing happens: what runs inside should look at the clock itself too. A timer that was set before
    goes on afterwards, and torch's gradient mode is what it was: an interrupt inside `no_grad`'s own code would leave
    it changed.

    Raises:
        TimeIsUp: also at once, if the deadline has passed already.
    """
    begin = time.perf_counter()
    if deadline <= begin:
        raise TimeIsUp
    main = threading.current_thread() is threading.main_thread()
    if math.isinf(deadline) or not main or not hasattr(signal, "setitimer"):
        yield
        return

    own = inspect.currentframe()
    since = own.f_back.f_back if own and own.f_back else None  # behind the context manager's entry

    def ring(_signal: int, frame: FrameType | None) -> None:
        if _importing(frame, since):
            signal.setitimer(signal.ITIMER_REAL, SOON, AGAIN)
            return
        raise TimeIsUp

    mode = torch.is_grad_enabled()
    usual = signal.signal(signal.SIGALRM, ring)
    left, interval = signal.setitimer(signal.ITIMER_REAL, deadline - begin, AGAIN)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, usual)
        torch.set_grad_enabled(mode)
        if left:
            rest = max(left - (time.perf_counter() - begin), 1e-3)
            signal.setitimer(signal.ITIMER_REAL, rest, interval)


def _importing(frame: FrameType | None, since: FrameType | None) -> bool:
    """Whether an import is under way that began after the frame ``since``."""
    while frame is not None and frame is not since:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


def bytes_of(memory: int | str, name: str = "memory") -> int:
    """A number of bytes, or text such as ``2GB``, ``500MB`` or ``1.5GiB``.

    Raises:
        ValueError: anything else, or less than a byte.
    """
    found = re.fullmatch(
        r"(\d{1,18}(?:\.\d{1,9})?)\s*(?:([KMGT])(I?))?B?", str(memory).strip().upper()
    )
    size = 0
    if found:
        number, prefix, binary = found.groups()
        size = int(float(number) * (1024 if binary else 1000) ** " KMGT".index(prefix or " "))
    if size < 1:
        raise ValueError(f"{name}: {memory!r} is no size; give bytes, or text such as 500MB or 2GB")
    return size
