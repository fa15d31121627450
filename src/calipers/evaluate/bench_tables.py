"""Results of many queries as tables for a terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.console import Group
from rich.table import Table
from rich.text import Text

from calipers.evaluate.bench import Result, summaries

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
