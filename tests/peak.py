"""The most memory that this process has held, as the kernel counts it.

`resource.getrusage` starts a child at its parent's peak, so what a child took would vanish under it.
"""

from __future__ import annotations

import resource
from pathlib import Path

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak() -> int:
    """Bytes since the start or since `restart`."""
    if not STATUS.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    lines = STATUS.read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def restart() -> None:
    """The peak is what is held now, where the kernel can do that."""
    if CLEAR.exists():
        CLEAR.write_text("5")
