"""Another tool's verdicts beside ours: its results imported, its witnesses replayed, every contradiction named."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from calipers.errors import CalipersError
from calipers.evaluate.bench import HEADER, OPPOSITE, read_results
from calipers.evaluate.vnncomp import Checked, Row, check, counterexample, results, source, word

Key = tuple[str, str, str]


class Pair(NamedTuple):
    """An instance with both verdicts.

    Args:
        replayed: the other tool's counterexample, replayed where the verdicts contradict each other; or why not.
    """

    key: Key
    ours: Row
    theirs: Row
    replayed: Checked | str | None = None

    @property
    def contradicts(self) -> bool:
        return OPPOSITE.get(self.ours.result) == self.theirs.result


class Compared(NamedTuple):
    """A category's counts; seconds are sums over what both solve."""

    category: str
    instances: int
    both: int
    ours_only: int
    theirs_only: int
    neither: int
    contradictions: int
    ours_seconds: float
    theirs_seconds: float


def load_rows(path: Path) -> list[Row]:
    """The rows of a results file: `calipers.evaluate.bench`'s, or the competition's (or its folder).

    Raises:
        SpecError: neither.
    """
    if path.is_file() and path.read_text(encoding="utf-8").startswith(",".join(HEADER)):
        return [
            Row(r.suite, r.onnx, r.vnnlib, word(r.result), r.seconds) for r in read_results(path)
        ]
    return results(path)


def compare(ours: Path, theirs: Path, *, benchmarks: Path | None = None) -> list[Pair]:
    """The instances that stand in both.

    Args:
        benchmarks: where networks and queries are; the other tool's counterexamples are replayed with them where
            verdicts contradict each other.

    Raises:
        SpecError: a results file that cannot be read.
    """
    known = {row.key: row for row in load_rows(ours)}
    found = []
    for row in load_rows(theirs):
        if row.key not in known:
            continue
        pair = Pair(row.key, known[row.key], row)
        if pair.contradicts and row.result == "sat" and benchmarks is not None:
            pair = pair._replace(replayed=_replayed(theirs, benchmarks, row))
        found.append(pair)
    return found


def _replayed(theirs: Path, benchmarks: Path, row: Row) -> Checked | str:
    try:
        model = source(benchmarks, row, row.network, "onnx")
        query = source(benchmarks, row, row.query, "vnnlib")
        return check(counterexample(theirs, row), model, query)
    except (CalipersError, OSError) as error:
        return " ".join(str(error).split())


def compared(pairs: Sequence[Pair]) -> list[Compared]:
    """One per category, and one of all where there are several."""
    by: Mapping[str, list[Pair]] = defaultdict(list)
    for pair in pairs:
        by[pair.key[0]].append(pair)
    found = [_compared(name, part) for name, part in by.items()]
    return [*found, _compared("together", pairs)] if len(by) > 1 else found


def _compared(name: str, pairs: Sequence[Pair]) -> Compared:
    solved = [(p.ours.result in OPPOSITE, p.theirs.result in OPPOSITE) for p in pairs]
    both = [p for p, (a, b) in zip(pairs, solved, strict=True) if a and b]
    return Compared(
        name,
        len(pairs),
        len(both),
        sum(a and not b for a, b in solved),
        sum(b and not a for a, b in solved),
        sum(not a and not b for a, b in solved),
        sum(p.contradicts for p in pairs),
        sum(p.ours.seconds for p in both),
        sum(p.theirs.seconds for p in both),
    )
