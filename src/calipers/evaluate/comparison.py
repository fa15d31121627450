"""Runs side by side: brackets, curves over the radius, what was measured, and which examples changed sides."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from calipers.errors import DataError
from calipers.evaluate.charts import Bar, bars, curves
from calipers.evaluate.pages import page
from calipers.evaluate.runs import VERDICTS, Record, Stored, difference, radius_given, read
from calipers.evaluate.tables import percent
from calipers.files import write_atomically
from calipers.rounding import exact

SHOWN = 200  # examples of another verdict, of each pair of runs
WORDS = {"robust": "certified", "vulnerable": "broken", "unknown": "unknown"}


@dataclass(frozen=True)
class Side:
    """A run, or the runs of a curve by rising radius.

    Args:
        name: the directory's, made longer until it is no other's.
    """

    name: str
    runs: tuple[Stored, ...]

    @property
    def curved(self) -> bool:
        return len(self.runs) > 1


class Pair(NamedTuple):
    """The first run against another at one radius.

    Args:
        identity: what differs in what was measured: (name, first, other).
        counts: (verdict of the first, of the other) -> examples; empty if they measured different examples.
        changed: the examples with another verdict, at most `SHOWN`.
        contradictions: those that one proves and the other breaks though both measured the same thing.
    """

    first: str
    other: str
    eps: str
    identity: list[tuple[str, str, str]]
    counts: dict[tuple[str, str], int]
    changed: list[tuple[Record, Record]]
    contradictions: int


def sides(directories: Sequence[str | Path], least: int = 2) -> list[Side]:
    """The runs in ``directories``: run directories, or those that hold one for each radius of a curve.

    Raises:
        ValueError: fewer than ``least``, or one twice.
        DataError, StoreMismatch: one is no run directory, or damaged.
    """
    paths = [Path(d) for d in directories]
    if len(paths) < least or len({p.resolve() for p in paths}) < len(paths):
        raise ValueError(
            f"runs: {', '.join(map(str, paths)) or 'none'}; name two or more different ones"
        )
    return [Side(name, _runs(path)) for name, path in zip(_names(paths), paths, strict=True)]


def _names(paths: Sequence[Path]) -> list[str]:
    parts = [p.resolve().parts for p in paths]
    count = 1
    while len({p[-count:] for p in parts}) < len(parts):
        count += 1
    return [Path(*p[-count:]).as_posix() for p in parts]


def _runs(path: Path) -> tuple[Stored, ...]:
    if (path / "run.sqlite").is_file():
        return (read(path),)
    found = [read(file.parent) for file in sorted(path.glob("eps-*/run.sqlite"))]
    if not found:
        raise DataError(
            f"{path}: not the run directory of an audit (calipers audit --run DIR makes one)"
        )
    return tuple(sorted(found, key=radius))


def radius(run: Stored) -> float:
    """The radius of a run; 0 where it is no single number."""
    given = radius_given(run)
    try:
        return 0.0 if given is None else float(exact(given))
    except ValueError:
        return 0.0


def eps_of(run: Stored) -> str:
    """The radius as it was given."""
    given = radius_given(run)
    return "" if given is None else str(given)


def shares(run: Stored) -> tuple[float, float]:
    """Certified and empirical accuracy of the examples of a run."""
    n = max(len(run.records), 1)
    return run.counts["robust"] / n, 1 - run.counts["vulnerable"] / n


def pairs(found: Sequence[Side]) -> list[Pair]:
    """The first side against each other one, at every radius that both have."""
    first, *others = found
    out = []
    for other in others:
        by_radius = {radius(r): r for r in other.runs}
        matched = [(r, by_radius[radius(r)]) for r in first.runs if radius(r) in by_radius]
        if not matched and not first.curved and not other.curved:
            matched = [(first.runs[0], other.runs[0])]
        out += [_pair(first.name, other.name, a, b) for a, b in matched]
    return out


def _pair(first: str, other: str, a: Stored, b: Stored) -> Pair:
    said = difference(a, b)
    known = {r.example: r for r in b.records}
    same = a.identity.get("data") == b.identity.get("data")
    both = [(r, known[r.example]) for r in a.records if r.example in known] if same else []
    free = {"cascade", "seed", "calipers", "code"}
    alike = not set(said.identity) - free
    return Pair(
        first,
        other,
        eps_of(a) if eps_of(a) == eps_of(b) else f"{eps_of(a)} and {eps_of(b)}",
        [(name, _plain(x), _plain(y)) for name, (x, y) in said.identity.items()],
        dict(Counter((x.verdict, y.verdict) for x, y in both)),
        [(x, y) for x, y in both if x.verdict != y.verdict][:SHOWN],
        len(said.contradictions) if alike else 0,
    )


def _plain(value: Any) -> str:
    return "; ".join(map(str, value)) if isinstance(value, list) else str(value)


def render(found: Sequence[Side]) -> str:
    """The comparison as a page."""
    rows = [(side, run, *shares(run)) for side in found for run in side.runs]
    brackets = [
        Bar(
            f"{side.name}, {eps_of(run)}",
            [("robust", low), ("unknown", high - low), ("broken", 1 - high)],
            f"{percent(low)} to {percent(high)}",
        )
        for side, run, low, high in rows
    ]
    series = {
        side.name: [(radius(run), *shares(run)) for run in side.runs]
        for side in found
        if side.curved
    }
    return page(
        "comparison.html",
        sides=found,
        rows=[
            (side.name, eps_of(run), str(run.identity.get("threat", "")), len(run.records), low, high,
             run.counts["unknown"], sum(s.seconds for s in run.stages), sum(s.work for s in run.stages))
            for side, run, low, high in rows
        ],
        brackets=bars(brackets, "the bracket of each run: certified, unknown, broken"),
        curve=curves(series) if series else "",
        pairs=pairs(found),
        verdicts=VERDICTS,
        words=WORDS,
        shown=SHOWN,
    )  # fmt: skip


def compare(directories: Sequence[str | Path], file: str | Path) -> list[Pair]:
    """Write the comparison of the runs in ``directories`` as one HTML file, whole or not at all.

    Raises:
        ValueError, DataError, StoreMismatch: as `sides`.
    """
    found = sides(directories)
    write_atomically(file, render(found))
    return pairs(found)
