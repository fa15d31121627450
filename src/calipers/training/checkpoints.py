"""Checkpoints: all that a training is at a step, written whole or not at all, read without running code.

A checkpoint goes on bit for bit where it was saved (on the same machine, thread count and torch): weights, optimiser,
averages, the best weights so far, the step (which alone decides data order, draws and schedules), the global generator,
and what the log had. It also holds the description of its run, and only that run can go on with it.
"""

from __future__ import annotations

import io
import json
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from calipers.errors import StoreMismatch, TrainingError
from calipers.files import bomb, write_atomically

FILE = "checkpoint.pt"
_DAMAGE = (
    pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError, TypeError, AttributeError,
    IndexError, zipfile.BadZipFile,
)  # fmt: skip


def save(path: Path, identity: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    """``state`` in ``path``, on the disk when this returns; if that fails the checkpoint before it is still there.

    Raises:
        TrainingError: it cannot be written, the disk being full, say.
    """
    buffer = io.BytesIO()
    torch.save({"identity": json.dumps(identity), "state": dict(state)}, buffer)
    try:
        write_atomically(path, buffer.getvalue())
    except OSError as error:
        kept = "the previous checkpoint is intact" if path.exists() else "there is no earlier one"
        raise TrainingError(
            f"{path}: cannot be written ({error}); {kept}. Make room, then start the same training again to go on"
        ) from error


def load(path: Path, identity: Mapping[str, Any]) -> dict[str, Any] | None:
    """What `save` wrote, tensors on the CPU; None if there is no file.

    Raises:
        StoreMismatch: the file is damaged, or another run's; the message names every difference.
    """
    if not path.exists():
        return None
    if size := bomb(path):
        raise StoreMismatch(f"{path}: {size:,} bytes once unpacked; not a checkpoint of ours")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        stored, state = json.loads(content["identity"]), dict(content["state"])
    except _DAMAGE as error:
        lines = str(error).splitlines() or [type(error).__name__]
        raise StoreMismatch(
            f"{path}: not a checkpoint that can be read ({lines[0][:120]}); delete it to start again, or use another "
            "directory"
        ) from None
    found = differences(stored, json.loads(json.dumps(identity)))
    if found:
        raise StoreMismatch(
            f"{path} belongs to another training ({'; '.join(found)}). Give the same recipe and settings, or another "
            "directory"
        )
    return state


def differences(stored: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Which entries differ, and how."""
    return [
        f"{key}: stored {_short(stored.get(key))}, now {_short(now.get(key))}"
        for key in {**stored, **now}
        if stored.get(key) != now.get(key)
    ]


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 160 else f"{text[:157]}..."
