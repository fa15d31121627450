"""Finished work on disk, so that an interrupted audit goes on where it stopped.

A run directory holds ``run.json`` (what is being measured, for people and for the identity check; where and when, which
is not compared) and ``run.sqlite`` (write-ahead log, one writer). A unit is one example in one stage, one row with its
checksum; a finished batch of units is one transaction, so a kill at any moment loses at most the batches in progress.
Points are stored as raw numbers, nothing is unpickled. A damaged file is set aside, and what can be read of it kept.
"""

from __future__ import annotations

import hashlib
import json
import platform
import sqlite3
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryFile
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from calipers.bracket import Bracket, Evidence
from calipers.data import digest
from calipers.errors import StoreError, StoreMismatch
from calipers.evaluate.salvage import salvaged
from calipers.files import write_atomically
from calipers.graph.graph import Network

FORMAT = 2
SCHEMA = (
    """
CREATE TABLE IF NOT EXISTS unit (
    stage TEXT NOT NULL, example INTEGER NOT NULL,
    lower REAL NOT NULL, upper REAL NOT NULL, rounding REAL NOT NULL, point BLOB, seconds REAL NOT NULL,
    work REAL NOT NULL, checksum INTEGER NOT NULL,
    PRIMARY KEY (stage, example)
) WITHOUT ROWID
""",
    """
CREATE TABLE IF NOT EXISTS failure (
    stage TEXT NOT NULL, example INTEGER NOT NULL, reason TEXT NOT NULL,
    PRIMARY KEY (stage, example)
) WITHOUT ROWID
""",
)
UNITS = "SELECT stage, example, lower, upper, rounding, point, seconds, work, checksum FROM unit"
INSERT = "INSERT OR REPLACE INTO unit VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)"
COLUMNS = UNITS.count(",") + 1
BUSY = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)
DAMAGED = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
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

    Args:
        identity: what is measured; a directory that holds another one is refused.
        settings: what may differ from start to start (a budget, say); kept with each start, not compared.

    `notes` says what was found damaged. `failures` are units that have no result, with the reason; they are tried
    again.

    Raises:
        StoreMismatch: the directory belongs to another identity or a newer version, or is no run directory.
        StoreError: it cannot be written, or another process is writing there.
    """

    def __init__(
        self,
        directory: str | Path,
        identity: Mapping[str, Any],
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        self.directory = Path(directory)
        self.notes: list[str] = []
        plain = json.loads(json.dumps(identity))
        with _named(self.directory):
            self.directory.mkdir(parents=True, exist_ok=True)
            _claim(self.directory, plain)
            _require_writable(self.directory)
            self.connection = self._open()
        try:
            with _named(self.directory):
                _claim(self.directory, plain)  # again, now that nobody else can write
                self._mend()
                (seen,) = self.connection.execute("SELECT count(*) FROM unit").fetchone()
                _claim(self.directory, plain, {"results": seen, **(settings or {})})
        except BaseException:
            self.connection.close()
            raise

    @property
    def file(self) -> Path:
        return self.directory / "run.sqlite"

    def _open(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self.file, timeout=1.0, isolation_level=None)
        try:
            connection.execute("PRAGMA locking_mode=EXCLUSIVE")
            connection.execute("PRAGMA journal_mode=WAL")
            # a kill loses nothing; a power cut may lose the last transactions, which are measured again
            connection.execute("PRAGMA synchronous=NORMAL")
            connection.execute("BEGIN IMMEDIATE")  # takes the lock and finds a read-only directory
            for table in SCHEMA:
                connection.execute(table)
            connection.execute("COMMIT")
        except sqlite3.DatabaseError as error:
            if _code(error) not in DAMAGED:
                connection.close()
                raise
            with suppress(sqlite3.Error):
                connection.execute("ROLLBACK")
        return connection

    def _mend(self) -> None:
        """Set a damaged file aside and keep what can be read of it."""
        if _sound(self.connection):
            return
        self.connection.close()
        aside = self.file.with_suffix(".sqlite.damaged")
        self.file.replace(aside)
        for ending in ("-wal", "-shm"):
            self.file.with_name(self.file.name + ending).unlink(missing_ok=True)
        self.connection = self._open()
        with self._transaction():
            whole = (u for u in salvaged(aside) if len(u) == COLUMNS and _checksum(u[:-1]) == u[-1])
            self.connection.executemany(INSERT, whole)
        (kept,) = self.connection.execute("SELECT count(*) FROM unit").fetchone()
        self.notes.append(
            f"{self.file.name} was damaged: {kept} results of it were kept, the others are measured again "
            f"(the damaged file is now {aside.name})"
        )

    def __enter__(self) -> Store:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.connection.close()

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        """All or nothing. A full disk is named; what was stored before stays."""
        with _named(self.directory):
            try:
                self.connection.execute("BEGIN IMMEDIATE")
                yield
                self.connection.execute("COMMIT")
            except BaseException:
                with suppress(sqlite3.Error):  # there may be nothing to roll back
                    self.connection.execute("ROLLBACK")
                raise

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
        units: list[tuple[Any, ...]] = [
            (stage, row, low, high, radius, None if p is None else p.numpy().tobytes(), share, passes)
            for row, low, high, radius, p in numbers
        ]  # fmt: skip
        with self._transaction():
            self.connection.executemany(INSERT, [(*u, _checksum(u)) for u in units])
            self._forget(stage, rows)

    def _forget(self, stage: str, rows: Sequence[int]) -> None:
        self.connection.executemany(
            "DELETE FROM failure WHERE stage = ? AND example = ?", [(stage, r) for r in rows]
        )

    def fail(self, stage: str, rows: Sequence[int], reason: str) -> None:
        """``rows`` have no result in ``stage``, and why."""
        with self._transaction():
            self.connection.executemany(
                "INSERT OR REPLACE INTO failure VALUES (?, ?, ?)",
                [(stage, row, reason) for row in rows],
            )

    @property
    def failures(self) -> list[tuple[str, int, str]]:
        """(stage, example, reason) of each unit that failed and was not measured since."""
        return self.connection.execute(
            "SELECT stage, example, reason FROM failure ORDER BY stage, example"
        ).fetchall()

    def get(self, stage: str, like: Tensor) -> tuple[list[int], Bracket, float] | None:
        """The finished units of ``stage``: rows, their brackets, seconds; None if there are none. Units that do not
        fit their checksum are removed, so that they are measured again.

        Args:
            like: one example, (*x): the shape and dtype of stored points.
        """
        count = "SELECT count(*), count(point) FROM unit WHERE stage = ?"
        units, pointed = self.connection.execute(count, (stage,)).fetchone()
        kind = like.cpu().numpy().dtype
        points = np.empty((units if pointed else 0, *like.shape), kind)
        found: list[tuple[Any, ...]] = []
        wrong: list[int] = []
        for unit in self.connection.execute(f"{UNITS} WHERE stage = ? ORDER BY example", (stage,)):
            if _checksum(unit[:-1]) != unit[-1]:
                wrong.append(unit[1])
                continue
            _, row, low, high, radius, point, spent, passes, _ = unit
            if pointed:
                points[len(found)] = np.frombuffer(point, kind).reshape(like.shape)
            found.append((row, low, high, radius, spent, passes))
        if wrong:
            self._drop(stage, wrong)
        if not found:
            return None
        rows, lower, upper, rounding, seconds, work = zip(*found, strict=True)
        witness = torch.from_numpy(points[: len(found)]).to(like.device) if pointed else None
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

    def _drop(self, stage: str, rows: Sequence[int]) -> None:
        with self._transaction():
            self.connection.executemany(
                "DELETE FROM unit WHERE stage = ? AND example = ?", [(stage, r) for r in rows]
            )
        self.notes.append(
            f"{len(rows)} stored results of {stage} do not fit their checksums and are measured again"
        )


# -- damage ------------------------------------------------------------------------------------------------------


def _code(error: sqlite3.Error) -> int:
    """SQLite's primary result code."""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF


@contextmanager
def _named(directory: Path) -> Iterator[None]:
    """What the system says about a run directory, as a `StoreError` with the remedy."""
    try:
        yield
    except sqlite3.DatabaseError as error:
        code, remedy = _code(error), "use another --run directory"
        if code in BUSY:
            remedy = "another audit is writing there: wait for it, or use another --run directory"
        elif code in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR):
            remedy = "everything finished before is kept: make room (or mend the disk) and start the same command again"
        raise StoreError(f"{directory / 'run.sqlite'}: {error}; {remedy}") from None
    except OSError as error:
        raise StoreError(
            f"{directory}: cannot be written ({error.strerror or error}); make room there or allow writing, or use "
            "another --run directory"
        ) from None


def _require_writable(directory: Path) -> None:
    """Raises: OSError: before anything is measured, naming the cause (SQLite would say "disk I/O error")."""
    for file in directory.glob("run.sqlite*"):
        file.open("r+b").close()
    TemporaryFile(dir=directory).close()


def _checksum(unit: Sequence[Any]) -> int:
    """63 bits over the columns of a unit."""
    stage, example, lower, upper, rounding, point, seconds, work = unit
    try:
        numbers = struct.pack("<q5d", example, lower, upper, rounding, seconds, work)
    except (struct.error, TypeError):  # a damaged row may hold anything
        return -1
    state = hashlib.blake2b(numbers, digest_size=8)
    state.update(str(stage).encode(errors="replace") + b"\0")
    state.update(b"-" if point is None else point if isinstance(point, bytes) else b"?")
    return int.from_bytes(state.digest(), "little") >> 1


def _sound(connection: sqlite3.Connection) -> bool:
    try:
        return bool(connection.execute("PRAGMA quick_check(1)").fetchone() == ("ok",))
    except sqlite3.DatabaseError as error:
        if _code(error) not in DAMAGED:
            raise
        return False


# -- the record --------------------------------------------------------------------------------------------------


def record_of(content: Any) -> tuple[dict[str, Any], list[Any], int]:
    """The identity in a parsed ``run.json``, the starts, and its format (1: the identity alone)."""
    content = content if isinstance(content, dict) else {}
    if "format" not in content:
        return content, [], 1
    identity, starts = content.get("identity"), content.get("starts")
    kind = content["format"]
    return (
        identity if isinstance(identity, dict) else {},
        starts if isinstance(starts, list) else [],
        kind if isinstance(kind, int) else FORMAT + 1,
    )


def _claim(
    directory: Path, identity: Mapping[str, Any], settings: Mapping[str, Any] | None = None
) -> None:
    """Compare the identity with the one that is there, if any; then, given settings, note the start."""
    record = directory / "run.json"
    starts: list[Any] = []
    if record.exists():
        try:
            content = json.loads(record.read_text(encoding="utf-8"))
        except (ValueError, RecursionError):
            raise StoreMismatch(f"{record}: not a run record; use another directory") from None
        stored, starts, kind = record_of(content)
        if kind > FORMAT:
            raise StoreMismatch(
                f"{directory}: was written by a newer version of Calipers ({_short(stored.get('calipers'))}, store "
                f"format {kind}; this one reads {FORMAT}): upgrade, or use another --run directory"
            )
        differing = [k for k in {**stored, **identity} if stored.get(k) != identity.get(k)]
        if differing or kind < FORMAT:
            shown = "; ".join(
                f"{k}: stored {_short(stored.get(k))}, now {_short(identity.get(k))}"
                for k in differing or ["store format"]
            )
            raise StoreMismatch(
                f"{directory} holds another run ({shown}). Use another --run directory, or delete this one"
            )
    elif (directory / "run.sqlite").exists() and _has_units(directory / "run.sqlite"):
        raise StoreMismatch(f"{directory}: has results but no run.json; use another directory")
    if settings is not None:
        start = {**_start(), **settings}
        content = {"format": FORMAT, "identity": identity, "starts": [*starts, start]}
        write_atomically(record, json.dumps(content, indent=2) + "\n")


def _has_units(file: Path) -> bool:
    """Whether anything but an empty store is in ``file``: a kill may have come between it and run.json."""
    try:
        connection = sqlite3.connect(f"{file.absolute().as_uri()}?mode=ro", uri=True, timeout=1.0)
        try:
            tables = connection.execute("SELECT name FROM sqlite_master").fetchall()
            return ("unit",) in tables and bool(
                connection.execute("SELECT EXISTS (SELECT 1 FROM unit)").fetchone()[0]
            )
        finally:
            connection.close()
    except sqlite3.DatabaseError as error:
        return _code(error) not in BUSY


def _start() -> dict[str, Any]:
    """When and where a process began to measure."""
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "host": platform.node(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "sqlite": sqlite3.sqlite_version,
    }


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 90 else f"{text[:87]}..."
