"""What a training reports: one JSON object per epoch or event in ``log.jsonl``, and TensorBoard where asked for."""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from calipers.files import write_atomically

FILE = "log.jsonl"


@dataclass(frozen=True)
class Status:
    """Where a training is, for a progress callback.

    Args:
        phase: ``train``, ``validate`` or ``test``.
        done, total: steps, or examples.
        values: the latest measures by name.
        message: something to say besides: what the health monitor found, where it goes on.
    """

    phase: str
    epoch: int
    epochs: int
    done: int
    total: int
    values: Mapping[str, float] = field(default_factory=dict)
    message: str = ""


class Log:
    """Records of a run; without a directory it does nothing."""

    def __init__(self, directory: Path | None, *, step: int = 0, tensorboard: bool = False) -> None:
        """Args:
            step: records of later steps are from a run that was killed after its checkpoint; they are dropped.
        Raises:
            ValueError: TensorBoard is asked for and not there.
        """
        self.file = None if directory is None else directory / FILE
        self.writer = _writer(directory) if tensorboard else None
        if self.file is not None:
            kept = [r for r in read(self.file) if r["step"] <= step] if self.file.exists() else []
            write_atomically(self.file, "".join(map(_line, kept)))

    def write(self, record: Mapping[str, Any]) -> None:
        """One more line; it has a ``step``."""
        if self.file is not None:
            with self.file.open("a", encoding="utf-8") as file:
                file.write(_line(record))
        if self.writer is not None:
            for name, value in record.items():
                if isinstance(value, float | int):
                    self.writer.add_scalar(name, value, record["step"])
            self.writer.flush()


def _line(record: Mapping[str, Any]) -> str:
    safe = {
        k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()
    }
    return json.dumps(safe) + "\n"


def read(path: str | Path) -> list[dict[str, Any]]:
    """The records of a log; a last line that a kill cut short does not count."""
    return list(_records(Path(path).read_text(encoding="utf-8").splitlines()))


def _records(lines: Iterable[str]) -> Iterable[dict[str, Any]]:
    for line in lines:
        try:
            yield json.loads(line)
        except ValueError:
            return


def _writer(directory: Path | None) -> Any:
    if directory is None:
        raise ValueError("tensorboard: needs a directory to write to; give one (--run DIR)")
    try:
        module = importlib.import_module("torch.utils.tensorboard")
    except ImportError:
        raise ValueError(
            "tensorboard: the package is not installed; pip install tensorboard, or read log.jsonl"
        ) from None
    return module.SummaryWriter(str(directory / "tensorboard"))
