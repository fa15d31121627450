"""Results as tables for a terminal (rich renderables)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Group
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from calipers.attacks.diagnostics import lines
from calipers.bracket import Verdict

if TYPE_CHECKING:
    from calipers.bounds.widths import LayerWidths
    from calipers.evaluate.curve import Curve
    from calipers.evaluate.explain import Explanation
    from calipers.evaluate.result import Audit

WIDTH = 48  # of the bar
SIDES = {
    "attack": "upper (attack)",
    "bound": "lower (bound)",
    "exact": "both (search)",
    "carried": "both (other radii)",
}


def audit_table(audit: Audit) -> Group:
    """Headline, bar, and a row per method."""
    counts = audit.counts
    robust, broken = counts[Verdict.ROBUST], counts[Verdict.VULNERABLE]
    numbers = Table.grid(padding=(0, 2))
    for label, value, key in (
        ("clean accuracy", audit.clean_accuracy, "clean"),
        ("certified accuracy", audit.certified, "certified"),
        ("empirical accuracy", audit.empirical, "empirical"),
    ):
        around = audit.confidence[key] if audit.confidence else None
        interval = f"95 % interval {percent(around[0])} .. {percent(around[1])}" if around else ""
        numbers.add_row(label, Text(percent(value), style="bold"), Text(interval, style="dim"))
    title = f"{audit.name} on {audit.data.name}, {audit.threat.describe()}"
    drawn = f"{len(audit)} of {audit.population} examples, drawn at random (seed {audit.seed})"
    size = drawn if audit.sampled else f"{len(audit)} examples"
    verdicts = Text.assemble(
        (f"{robust} certified", "blue"),
        " · ",
        (f"{audit.unknown} unknown", "dim"),
        " · ",
        (f"{broken} broken", "yellow"),
        f" of {size}, {audit.seconds:.1f} s",
    )
    parts: list[Text | Table] = [
        Text(title, style="bold"),
        Text(bracket_line(audit)),
        _bar(robust, audit.unknown, broken),
        verdicts,
        numbers,
        *(map(Text, audit.sampling.lines()) if audit.sampling else ()),
        _methods(audit),
    ]
    if audit.stopped:
        parts.append(
            Text(
                f"stopped early ({audit.stopped}): {int(audit.cut.sum())} examples were left undecided by that"
            )
        )
    parts += [Text(note, style="italic") for note in audit.notes]
    parts += [Text(line) for line in lines(audit.findings)]
    return Group(*parts)


def curve_table(curve: Curve) -> Group:
    """A row per radius, then what did it at each."""
    main = curve.main
    drawn = f"{len(main)} of {main.population} examples, drawn at random (seed {main.seed})"
    size = drawn if main.sampled else f"{len(main)} examples"
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in ("eps", "certified", "empirical", "unknown", "seconds"):
        table.add_column(column, justify="right")
    table.add_column("")
    for one in curve.audits:
        robust, broken = one.counts[Verdict.ROBUST], one.counts[Verdict.VULNERABLE]
        cells = (percent(one.certified), percent(one.empirical), str(one.unknown))
        seconds = f"{one.seconds:.1f}"
        table.add_row(str(one.threat.eps), *cells, seconds, _bar(robust, one.unknown, broken))
    parts: list[Text | Table] = [
        Text(f"{main.name} on {main.data.name}, {size}, {curve.seconds:.1f} s", style="bold"),
        Text(f"clean accuracy {percent(main.clean_accuracy)}; robust accuracy lies between:"),
        table,
    ]
    if curve.confidence:
        ends = ", ".join(
            f"{a.threat.eps}: {percent(low)} .. {percent(high)}"
            for a, (low, high) in zip(curve.audits, curve.confidence, strict=True)
        )
        parts.append(Text(f"of all examples, with 95 % confidence at all radii at once: {ends}"))
    if curve.stopped:
        left = f"; without an audit: {', '.join(map(str, curve.left))}" if curve.left else ""
        parts.append(Text(f"stopped early ({curve.stopped}){left}"))
    for one in curve.audits:
        parts += [Text(f"eps {one.threat.eps}", style="bold"), _methods(one)]
    parts += [
        Text(note, style="italic")
        for note in dict.fromkeys(n for a in curve.audits for n in a.notes)
    ]
    return Group(*parts)


def bracket_line(audit: Audit) -> str:
    """The result in one line."""
    return f"robust accuracy between {percent(audit.certified)} and {percent(audit.empirical)}"


def percent(share: float) -> str:
    return f"{100 * share:.2f} %"


def _bar(robust: int, unknown: int, broken: int) -> Text:
    total = max(robust + unknown + broken, 1)
    first, second = round(WIDTH * robust / total), round(WIDTH * (robust + unknown) / total)
    return Text.assemble(
        ("█" * first, "blue"),
        ("▒" * (second - first), "dim"),
        ("░" * (WIDTH - second), "yellow"),
    )


def _methods(audit: Audit) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in ("method", "end"):
        table.add_column(column)
    for column in ("tried", "decided", "seconds", "passes each"):
        table.add_column(column, justify="right")
    notes = any(row.note for row in audit.methods)
    if notes:
        table.add_column("note", style="dim")
    seen: set[str] = set()
    for row in audit.methods:
        counts = [str(row.tried), str(row.decided), f"{row.seconds:.2f}", row.passes]
        cells = [row.name, SIDES[row.side], *counts]
        repeated = len(row.note) > 20 and row.note in seen
        seen.add(row.note)
        cells += ["as above" if repeated else row.note] if notes else []
        table.add_row(*map(escape, cells))
    return table


def explain_table(explanation: Explanation) -> Group:
    """A row per method, nested: bounds ascending, then attacks, down to the same number."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("method")
    table.add_column("end")
    for column in ("margin", "seconds", "passes"):
        table.add_column(column, justify="right")
    table.add_column("note", style="dim")
    for value in explanation.values:
        sign = "≥" if value.side == "bound" else "≤"
        shown = "–" if math.isinf(value.margin) else f"{sign} {value.margin:+.6f}"
        numbers = (shown, f"{value.seconds:.4f}", f"{value.work:.0f}" if value.work else "–")
        table.add_row(escape(value.name), SIDES[value.side], *numbers, escape(value.note))
    lower, upper = explanation.bracket.lower.item(), explanation.bracket.upper.item()
    verdict = explanation.bracket.verdict()[0]
    return Group(
        Text(f"{explanation.title}, {explanation.threat.describe()}", style="bold"),
        Text(f"{lower:+.6f} ≤ minimal margin ≤ {upper:+.6f} (gap {upper - lower:.3g})"),
        Text(verdict.value),
        table,
    )


def widths_table(rows: Sequence[LayerWidths], title: str) -> Group:
    """A row per nonlinear layer: how wide its inputs' intervals are, and what share of its neurons may bend."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in ("layer", "reads"):
        table.add_column(column)
    table.add_column("neurons", justify="right")
    for rung in rows[0].rungs:
        for column in ("unstable", "mean width", "largest"):
            table.add_column(f"{rung}\n{column}", justify="right")
    for row in rows:
        name = f"{row.op} {row.path}".strip() if row.op else "output"
        cells = []
        for width in row.rungs.values():
            share = percent(width.unstable) if row.op else ""
            cells += [share, f"{width.mean:.3g}", f"{width.largest:.3g}"]
        table.add_row(escape(name), escape(row.name), f"{row.neurons:,}", *cells)
    return Group(Text(title, style="bold"), table, Text(widest(rows), style="italic"))


def widest(rows: Sequence[LayerWidths]) -> str:
    """Where most of what can bend lies, in one sentence."""
    bending = [(row, row.rungs["crown"].unstable * row.neurons) for row in rows if row.op]
    total = sum(count for _, count in bending)
    if not total:
        return "No neuron is unstable: linear bounds lose nothing but by rounding."
    row, most = max(bending, key=lambda pair: pair[1])
    return (
        f"{total:,.1f} neurons of an example are unstable for CROWN, {percent(most / total)} of them in "
        f"{row.op} {row.path}".rstrip()
        + "."
    )
