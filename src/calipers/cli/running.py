"""What ``calipers runs`` does."""

from __future__ import annotations

from pathlib import Path

from rich.table import Table
from rich.text import Text

from calipers.cli.commands import console
from calipers.cli.options import writable
from calipers.evaluate.runs import (
    EXPORTS,
    VERDICTS,
    Record,
    Stored,
    difference,
    exported,
    find,
    overview,
    read,
)
from calipers.files import write_atomically

SHOWN = 20  # examples that a difference lists


def _table(*names: str, numbers: int) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False, show_header=any(names))
    for i, name in enumerate(names):
        table.add_column(
            name, justify="right" if i >= len(names) - numbers else "left", overflow="fold"
        )
    return table


def listed(root: Path) -> None:
    """A line per run."""
    runs = overview(find(root))
    if not runs:
        console().print(Text(f"no run below {root}; calipers audit --run DIR makes one"))
        return
    table = _table("run", "threat", "model", *VERDICTS, "seconds", numbers=4)
    for directory, run in runs:
        name = Text(str(directory.relative_to(root)) if directory != root else str(directory))
        if isinstance(run, str):
            table.add_row(name, Text(run, style="yellow"))
            continue
        identity = run.identity
        table.add_row(
            name, Text(str(identity.get("threat", ""))), Text(str(identity.get("model", ""))[:10]),
            *(str(run.counts[v]) for v in VERDICTS), f"{sum(s.seconds for s in run.stages):.1f}",
        )  # fmt: skip
    console().print(table)


def shown(directory: Path) -> None:
    """What was measured, and a line per stage."""
    run = read(directory)
    out = console()
    about = _table("", "", numbers=0)
    for name, value in run.identity.items():
        lines = value if isinstance(value, list) else [value]
        for i, line in enumerate(lines):
            about.add_row(Text("" if i else name, style="bold"), Text(str(line)))
    for place, start in enumerate(run.starts):
        about.add_row(Text("" if place else "started", style="bold"), Text(_started(start)))
    out.print(about)
    table = _table("stage", "examples", "seconds", "passes", numbers=3)
    for stage in run.stages:
        table.add_row(
            Text(stage.stage), str(stage.examples), f"{stage.seconds:.2f}", f"{stage.work:.0f}"
        )
    out.print(table)
    for reason, names in _grouped(run).items():
        out.print(Text(f"failed: {', '.join(names)}: {reason}", style="yellow"))
    out.print(Text(_counts(run)))


def _started(start: object) -> str:
    return ", ".join(map(str, start.values())) if isinstance(start, dict) else str(start)


def _grouped(run: Stored) -> dict[str, list[str]]:
    """Failed units by reason; of many the first."""
    found: dict[str, list[str]] = {}
    for stage, example, reason in run.failures:
        found.setdefault(reason, []).append(f"{stage} of example {example}")
    return {
        r: names if len(names) <= SHOWN else [*names[:SHOWN], f"{len(names) - SHOWN} more"]
        for r, names in found.items()
    }


def _counts(run: Stored) -> str:
    parts = ", ".join(f"{n} {v}" for v, n in run.counts.items())
    return f"{parts} of {len(run.records)} examples"


def compared(first: Path, second: Path) -> bool:
    """Print how two runs differ; whether they measured the same thing and contradict each other nowhere."""
    a, b = read(first), read(second)
    found = difference(a, b)
    out = console()
    if not found.identity:
        out.print(Text("both measured the same thing"))
    for name, values in found.identity.items():
        for directory, value in zip((first, second), values, strict=True):
            out.print(Text(f"{name}  {directory}: {value}"))
    for directory, run in ((first, a), (second, b)):
        out.print(Text(f"{directory}: {_counts(run)}"))
    if any(found.alone):
        out.print(Text(f"only in one of them: {found.alone[0]} and {found.alone[1]} examples"))
    table = _table("example", str(first), str(second), numbers=0)
    order = sorted(found.verdicts, key=lambda pair: pair not in found.contradictions)
    for pair in order[:SHOWN]:
        style = "bold red" if pair in found.contradictions else ""
        table.add_row(str(pair[0].example), *(Text(_said(r), style=style) for r in pair))
    if order:
        out.print(Text(f"{len(order)} examples with another verdict"))
        out.print(table)
    return bool(found.identity) or not found.contradictions


def side_by_side(directories: list[Path], report: Path) -> bool:
    """Write the page; whether no two runs contradict each other."""
    from calipers.evaluate.comparison import compare

    writable("--report", report.absolute())
    found = compare(directories, report)
    for pair in found:
        changed = sum(n for (a, b), n in pair.counts.items() if a != b)
        both = sum(pair.counts.values())
        same = (
            f"{changed} of {both} examples have another verdict" if both else "different examples"
        )
        console().print(Text(f"{pair.first} against {pair.other}, eps {pair.eps}: {same}"))
    return not any(pair.contradictions for pair in found)


def _said(record: Record) -> str:
    return f"{record.verdict} ({record.lower:.4g} .. {record.upper:.4g})"


def export(directory: Path, out: Path) -> None:
    """Write the run's examples in the form that the file's ending asks for."""
    writable("--out", out.absolute())
    if out.suffix not in EXPORTS:
        raise ValueError(f"--out: {out} must end in one of {', '.join(EXPORTS)}")
    write_atomically(out, exported(read(directory), out.suffix))
