"""Results of many queries as tables for a terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.console import Group
from rich.table import Table
from rich.text import Text

from calipers.evaluate.bench import Result, summaries
from calipers.evaluate.peers import Pair, compared
from calipers.evaluate.vnncomp import Checked, Scored, totals

SHOWN = 20  # contradictions that are listed


def bench_table(results: Sequence[Result]) -> Group:
    """A row per suite, then every contradiction."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("suite")
    for name in (
        "instances",
        "sat",
        "unsat",
        "unknown",
        "timed out",
        "error",
        "median s",
        "total s",
    ):
        table.add_column(name, justify="right")
    table.add_column("contradicted", justify="right")
    for s in summaries(results):
        half = "–" if math.isnan(s.median) else f"{s.median:.3f}"
        against = f"{s.contradictions} of {s.expected}" if s.expected else "–"
        numbers = (s.instances, s.sat, s.unsat, s.unknown, s.timed_out, s.error)
        table.add_row(
            Text(s.suite), *map(str, numbers), half, f"{s.total:.1f}",
            Text(against, style="bold red" if s.contradictions else ""),
        )  # fmt: skip
    wrong = [r for r in results if r.contradicts]
    lines = [
        Text(
            f"CONTRADICTION {instance(r)}: {r.result}, expected {r.expected}; {r.reason}",
            style="bold red",
        )
        for r in wrong[:SHOWN]
    ]
    return Group(table, *lines)


def instance(result: Result) -> str:
    """The instance in one line."""
    return f"{result.suite} {result.onnx} {result.vnnlib}"


def _table(first: str, *numbers: str) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column(first)
    for name in numbers:
        table.add_column(name, justify="right")
    return table


def score_table(scored: Sequence[Scored]) -> Group:
    """Points by category in both readings, then every counterexample that earns none."""
    table = _table(
        "category", "rows", "sat", "unsat", "tolerated", "incorrect", "points", "incorrect (exact)", "points (exact)"
    )  # fmt: skip
    for t in totals(scored):
        table.add_row(
            Text(t.category), str(t.rows), str(t.sat), str(t.unsat), str(t.tolerated),
            Text(str(t.incorrect), style="bold red" if t.incorrect else ""), str(t.points),
            str(t.incorrect_exact), str(t.points_exact),
        )  # fmt: skip
    lines = []
    for s in [s for s in scored if s.rounded < 0 or (s.checked and s.checked.rounded != "correct")][
        :SHOWN
    ]:
        kind = s.checked.rounded if s.checked else "incorrect"
        lines.append(Text(f"{kind} ({s.rounded:+d}) {' '.join(s.row.key)}: {s.result}; {s.reason}"))
    return Group(table, *lines)


def peer_table(pairs: Sequence[Pair], theirs: str) -> Group:
    """Who solves what, and every contradiction with the replay of the other tool's counterexample."""
    table = _table(
        "category", "instances", "both", "ours only", f"{theirs} only", "neither", "contradictions",
        "our s", f"{theirs} s",
    )  # fmt: skip
    for c in compared(pairs):
        counts = (c.instances, c.both, c.ours_only, c.theirs_only, c.neither)
        wrong = Text(str(c.contradictions), style="bold red" if c.contradictions else "")
        table.add_row(
            Text(c.category), *map(str, counts), wrong, f"{c.ours_seconds:.1f}", f"{c.theirs_seconds:.1f}"
        )  # fmt: skip
    lines = []
    for p in [p for p in pairs if p.contradicts][:SHOWN]:
        said = (
            p.replayed.rounded if isinstance(p.replayed, Checked) else p.replayed or "not replayed"
        )
        text = f"CONTRADICTION {' '.join(p.key)}: ours {p.ours.result}, {theirs} {p.theirs.result}; its witness: {said}"
        lines.append(Text(text, style="bold red"))
    return Group(table, *lines)
