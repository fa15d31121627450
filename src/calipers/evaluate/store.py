"""Finished work on disk, so that an interrupted audit goes on where it stopped.

A run directory holds ``run.json`` (what is being measured, for people and for the identity check) and ``run.sqlite``
(write-ahead log, one writer). A unit is one example in one stage, one row; a finished batch of units is one
transaction, so a kill at any moment loses at most the batch in progress. Points are stored as raw numbers, nothing is
unpickled.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from calipers.bracket import Bracket, Evidence
from calipers.data import digest
from calipers.errors import StoreMismatch
from calipers.files import write_atomically
from calipers.graph.graph import Network

SCHEMA = """
CREATE TABLE IF NOT EXISTS unit (
    stage TEXT NOT NULL, example INTEGER NOT NULL,
    lower REAL NOT NULL, upper REAL NOT NULL, rounding REAL NOT NULL, point BLOB, seconds REAL NOT NULL,
    work REAL NOT NULL,
    PRIMARY KEY (stage, example)
) WITHOUT ROWID
"""
# the sources that decide what a stored number means; reports and the command line may change freely
_MEASURING = (
    *(
        "attacks",
        "bounds",
        "exact",
        "graph",
        "ops",
        "vnnlib",
        "bracket.py",
        "grid.py",
        "rounding.py",
    ),
    *("searches.py", "seeds.py", "sets.py", "spec.py", "evaluate/solvers.py", "evaluate/verify.py"),
)


def code_digest() -> str:
    """A short hash of the sources that measure."""
    root = Path(__file__).parents[1]
    state = hashlib.blake2b(digest_size=8)
    for part in _MEASURING:
        path = root / part
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            state.update(file.relative_to(root).as_posix().encode() + b"\0" + file.read_bytes())
    return state.hexdigest()


def model_digest(network: Network) -> str:
    """A short hash of graph, parameters, buffers and constants: equal for equal functions written alike."""
    graph = network.graph
    lines = [
        f"{n.name}={getattr(n.op, '__name__', n.op)}{n.args}{dict(n.kwargs)}" for n in graph.nodes
    ]
    text = "\n".join([*lines, *graph.inputs, graph.output])
    named = {**network.module.state_dict(), **graph.constants}
    state = hashlib.blake2b(text.encode(), digest_size=16)
    for name in sorted(named):
        state.update(f"\n{name} {digest(named[name])}".encode())
    return state.hexdigest()


class Store:
    """The units of one run. Use as a context manager.

    Raises:
        StoreMismatch: the directory belongs to another identity, is no run directory, or is in use.
    """

    def __init__(self, directory: str | Path, identity: Mapping[str, Any]) -> None:
        self.directory = Path(directory)
        self.directory.mkdir(parents=True, exist_ok=True)
        _claim(self.directory, json.loads(json.dumps(identity)))
        self.connection = sqlite3.connect(
            self.directory / "run.sqlite", timeout=1.0, isolation_level=None
        )
        try:
            self.connection.execute("PRAGMA locking_mode=EXCLUSIVE")
            self.connection.execute("PRAGMA journal_mode=WAL")
            self.connection.execute(SCHEMA)
        except sqlite3.DatabaseError as error:
            self.connection.close()
            raise StoreMismatch(
                f"{self.directory / 'run.sqlite'}: {error}; another audit is writing there, or the file is damaged: "
                "wait for it, or use another --run directory"
            ) from None

    def __enter__(self) -> Store:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.connection.close()

    def add(
        self, stage: str, rows: Sequence[int], part: Bracket, seconds: float, work: float = 0.0
    ) -> None:
        """The units of ``rows`` in ``stage``, in one transaction; they share seconds and work equally."""
        share, passes = seconds / max(len(rows), 1), work / max(len(rows), 1)
        rounding = torch.zeros(len(part)) if part.rounding is None else part.rounding
        points: Sequence[Tensor | None] = (
            [None] * len(part) if part.witness is None else part.witness.cpu().unbind()
        )
        numbers = zip(
            rows, part.lower.tolist(), part.upper.tolist(), rounding.tolist(), points, strict=True
        )
        records = [
            (
                stage,
                row,
                low,
                high,
                radius,
                None if p is None else p.numpy().tobytes(),
                share,
                passes,
            )
            for row, low, high, radius, p in numbers
        ]
        self.connection.execute("BEGIN IMMEDIATE")
        try:
            self.connection.executemany(
                "INSERT OR REPLACE INTO unit VALUES (?, ?, ?, ?, ?, ?, ?, ?)", records
            )
            self.connection.execute("COMMIT")
        except BaseException:
            self.connection.execute("ROLLBACK")
            raise

    def get(self, stage: str, like: Tensor) -> tuple[list[int], Bracket, float] | None:
        """The finished units of ``stage``: rows, their brackets, seconds; None if there are none.

        Args:
            like: one example, (*x): the shape and dtype of stored points.
        """
        found = self.connection.execute(
            "SELECT example, lower, upper, rounding, point, seconds, work FROM unit WHERE stage = ? ORDER BY example",
            (stage,),
        ).fetchall()
        if not found:
            return None
        rows, lower, upper, rounding, points, seconds, work = zip(*found, strict=True)
        kind = like.cpu().numpy().dtype
        witness = None
        if points[0] is not None:
            arrays = np.stack([np.frombuffer(p, kind).reshape(like.shape) for p in points])
            witness = torch.from_numpy(arrays).to(like.device)
        evidence = tuple(Evidence(stage, s, w) for s, w in zip(seconds, work, strict=True))
        part = Bracket(
            torch.tensor(lower, dtype=torch.float64),
            torch.tensor(upper, dtype=torch.float64),
            witness,
            torch.tensor(rounding, dtype=torch.float64),
            evidence,
            evidence,
        )
        return list(rows), part, float(sum(seconds))


def _claim(directory: Path, identity: Mapping[str, Any]) -> None:
    """Write the identity into an empty directory, or compare it with the one that is there."""
    record = directory / "run.json"
    if not record.exists():
        if (directory / "run.sqlite").exists():
            raise StoreMismatch(f"{directory}: has results but no run.json; use another directory")
        write_atomically(record, json.dumps(identity, indent=2) + "\n")
        return
    try:
        stored = json.loads(record.read_text(encoding="utf-8"))
    except ValueError:
        raise StoreMismatch(f"{record}: not a run record; use another directory") from None
    stored = stored if isinstance(stored, dict) else {}
    differing = [k for k in {**stored, **identity} if stored.get(k) != identity.get(k)]
    if differing:
        shown = "; ".join(
            f"{k}: stored {_short(stored.get(k))}, now {_short(identity.get(k))}" for k in differing
        )
        raise StoreMismatch(
            f"{directory} holds another run ({shown}). Use another --run directory, or delete this one"
        )


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 90 else f"{text[:87]}..."
