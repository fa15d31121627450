"""Run directories read back: what was measured, how far it came, how two differ, and tables for other programs.

Reading never changes a directory. A run that another process is writing is refused by name.
"""

from __future__ import annotations

import csv
import io
import json
import math
import re
import sqlite3
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from calipers.errors import DataError, StoreMismatch
from calipers.evaluate.store import record_of
from calipers.files import cell

QUERY = "SELECT stage, example, lower, upper, seconds, work FROM unit ORDER BY example"
VERDICTS = ("robust", "vulnerable", "unknown")


class Record(NamedTuple):
    """One example of a run: the bracket of its margin, and the methods that moved its ends last.

    ``example`` counts within the audited sample. An end that nothing moved is infinite, with no method.
    """

    example: int
    verdict: str
    lower: float
    upper: float
    lower_by: str
    upper_by: str
    seconds: float
    work: float


class Total(NamedTuple):
    """What a stage did in a run."""

    stage: str
    examples: int
    seconds: float
    work: float


@dataclass(frozen=True)
class Stored:
    """A run directory of an audit.

    Args:
        starts: when and where it was begun and gone on with.
        failures: (stage, example, reason) of each unit without a result.
    """

    directory: Path
    identity: dict[str, Any]
    records: tuple[Record, ...]
    stages: tuple[Total, ...]
    starts: tuple[Any, ...] = ()
    failures: tuple[tuple[str, int, str], ...] = ()

    @property
    def counts(self) -> dict[str, int]:
        found = Counter(r.verdict for r in self.records)
        return {v: found[v] for v in VERDICTS}


def read(directory: str | Path) -> Stored:
    """The audit in ``directory``.

    Raises:
        DataError: no run directory.
        StoreMismatch: its results are damaged, or being written.
    """
    directory = Path(directory)
    identity, starts = _record(directory)
    file = directory / "run.sqlite"
    if identity is None or not file.is_file():
        raise DataError(
            f"{directory}: not the run directory of an audit (calipers audit --run DIR makes one)"
        )
    try:
        connection = sqlite3.connect(f"{file.absolute().as_uri()}?mode=ro", uri=True, timeout=1.0)
        try:
            units = connection.execute(QUERY).fetchall()
            failures = _failures(connection)
        finally:
            connection.close()
    except sqlite3.DatabaseError as error:
        raise StoreMismatch(
            f"{file}: {error}; an audit is writing there, or the file is damaged: wait for it, or "
            "start the audit again, which keeps what can be read"
        ) from None
    order = [str(s).partition(":")[0] for s in identity.get("cascade", [])]
    place = {name: i for i, name in enumerate(order)}
    units.sort(key=lambda u: (u[1], place.get(u[0], len(place))))
    records: dict[int, Record] = {}
    totals: dict[str, Total] = {name: Total(name, 0, 0.0, 0.0) for name in order}
    for stage, example, lower, upper, seconds, work in units:
        known = records.get(
            example, Record(example, "unknown", -math.inf, math.inf, "", "", 0.0, 0.0)
        )
        records[example] = _met(known, stage, lower, upper, seconds, work)
        total = totals.get(stage, Total(stage, 0, 0.0, 0.0))
        totals[stage] = Total(stage, total.examples + 1, total.seconds + seconds, total.work + work)
    return Stored(
        directory,
        identity,
        tuple(records.values()),
        tuple(totals.values()),
        tuple(starts),
        tuple(failures),
    )


def _failures(connection: sqlite3.Connection) -> list[tuple[str, int, str]]:
    """Empty for runs of versions that did not note them."""
    if ("failure",) not in connection.execute("SELECT name FROM sqlite_master").fetchall():
        return []
    return connection.execute(
        "SELECT stage, example, reason FROM failure ORDER BY stage, example"
    ).fetchall()


def _met(
    known: Record, stage: str, lower: float, upper: float, seconds: float, work: float
) -> Record:
    low, low_by = (lower, stage) if lower > known.lower else (known.lower, known.lower_by)
    high, high_by = (upper, stage) if upper < known.upper else (known.upper, known.upper_by)
    proved, broken = low > 0, high <= 0
    verdict = "unknown" if proved == broken else "robust" if proved else "vulnerable"
    return Record(
        known.example,
        verdict,
        low,
        high,
        low_by,
        high_by,
        known.seconds + seconds,
        known.work + work,
    )


def _record(directory: Path) -> tuple[dict[str, Any] | None, list[Any]]:
    try:
        found = json.loads((directory / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None, []
    identity, starts, _ = record_of(found)
    return (identity if isinstance(found, dict) else None), starts


def find(root: str | Path) -> list[Path]:
    """All run directories of audits at or below ``root``, in the order of their names.

    Raises:
        DataError: no such folder.
    """
    root = Path(root)
    if not root.is_dir():
        raise DataError(f"{root}: no such folder")
    return sorted(file.parent for file in root.rglob("run.sqlite") if file.is_file())


def radius_given(run: Stored) -> str | float | None:
    """The radius as it was given to the audit, a text or a float; None where it is no single number."""
    text = str(run.identity.get("threat", ""))
    found = re.search(
        r"\beps=(?:'([^']+)'|Fraction\((\d+), (\d+)\)|([-+.\de]+)(?: |$))", text, re.ASCII
    )
    if not found:
        return None
    quoted, top, bottom, number = found.groups()
    try:
        return quoted or (f"{top}/{bottom}" if top else float(number))
    except ValueError:
        return None


class Difference(NamedTuple):
    """How two runs differ.

    Args:
        identity: what was measured: name -> (first, second).
        verdicts: the examples of both whose verdicts differ.
        contradictions: those that one run proves robust and the other breaks. Where the runs measured the same thing,
            that is an error of one of them.
        alone: examples that only the first, or only the second, run has.
    """

    identity: dict[str, tuple[Any, Any]]
    verdicts: list[tuple[Record, Record]]
    contradictions: list[tuple[Record, Record]]
    alone: tuple[int, int]


def difference(first: Stored, second: Stored) -> Difference:
    names = dict.fromkeys([*first.identity, *second.identity])
    pairs = {n: (first.identity.get(n), second.identity.get(n)) for n in names}
    other = {r.example: r for r in second.records}
    both = [(r, other[r.example]) for r in first.records if r.example in other]
    changed = [(a, b) for a, b in both if a.verdict != b.verdict]
    opposite = [(a, b) for a, b in changed if "unknown" not in (a.verdict, b.verdict)]
    return Difference(
        {n: p for n, p in pairs.items() if p[0] != p[1]},
        changed,
        opposite,
        (len(first.records) - len(both), len(second.records) - len(both)),
    )


# -- exports -----------------------------------------------------------------------------------------------------------


def exported(run: Stored, kind: str) -> bytes:
    """The run's examples as a file of the ending ``kind``: .csv, .json, .tex or .parquet.

    Infinities are written as ``inf`` in text, as null in JSON.

    Raises:
        ValueError: another ending.
        DataError: .parquet needs pyarrow.
    """
    if kind not in EXPORTS:
        raise ValueError(f"{kind or 'a file without an ending'}: write one of {', '.join(EXPORTS)}")
    return EXPORTS[kind](run)


def _csv(run: Stored) -> bytes:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(Record._fields)
    writer.writerows(map(cell, record) for record in run.records)
    return out.getvalue().encode()


def _json(run: Stored) -> bytes:
    def plain(value: Any) -> Any:
        return None if isinstance(value, float) and not math.isfinite(value) else value

    rows = [{k: plain(v) for k, v in r._asdict().items()} for r in run.records]
    return (json.dumps({"run": run.identity, "examples": rows}, indent=1) + "\n").encode()


def _tex(run: Stored) -> bytes:
    """A row per stage and the counts, for a paper."""
    rows = [
        f"{_escaped(t.stage)} & {t.examples} & {t.seconds:.2f} & {t.work:.0f} \\\\"
        for t in run.stages
    ]
    counts = ", ".join(f"{n} {v}" for v, n in run.counts.items())
    lines = [
        f"% {_escaped(str(run.identity.get('threat', '')))}",
        r"\begin{tabular}{lrrr}",
        r"\hline",
        r"stage & examples & seconds & passes \\",
        r"\hline",
        *rows,
        r"\hline",
        rf"\multicolumn{{4}}{{l}}{{{counts} of {len(run.records)} examples}} \\",
        r"\end{tabular}",
    ]
    return ("\n".join(lines) + "\n").encode()


def _escaped(text: str) -> str:
    special = {c: f"\\{c}" for c in "&%$#_{}"} | {
        "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "\n": " ",
    }  # fmt: skip
    return "".join(special.get(c, c) for c in text)


def _parquet(run: Stored) -> bytes:
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ImportError:
        raise DataError(
            "--out: .parquet needs pyarrow; pip install 'calipers[parquet]', or write .csv"
        ) from None
    columns = {name: [getattr(r, name) for r in run.records] for name in Record._fields}
    out = io.BytesIO()
    parquet.write_table(pa.table(columns), out)
    return out.getvalue()


EXPORTS: dict[str, Callable[[Stored], bytes]] = {
    ".csv": _csv,
    ".json": _json,
    ".tex": _tex,
    ".parquet": _parquet,
}


def overview(directories: Sequence[Path]) -> list[tuple[Path, Stored | str]]:
    """Every run, or in one line why it cannot be read."""
    found: list[tuple[Path, Stored | str]] = []
    for directory in directories:
        try:
            found.append((directory, read(directory)))
        except (DataError, StoreMismatch) as error:
            found.append((directory, str(error)))
    return found
