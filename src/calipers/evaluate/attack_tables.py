"""Attacks, replays and transfers as tables for a terminal (rich renderables)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Group
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from calipers.evaluate.tables import percent

if TYPE_CHECKING:
    from calipers.evaluate.empirical import Empirical
    from calipers.evaluate.replay import Replayed
    from calipers.evaluate.transfer import Transfer
    from calipers.evaluate.witnesses import Witnesses

STYLE = {"strict": "blue", "tolerant": "yellow", "fails": "red"}
LISTED = 20  # replays shown one by one


def empirical_table(result: Empirical) -> Group:
    """Headline, both accuracies, and a row per stage."""
    n, right = len(result), int((result.clean > 0).sum())
    left = n - result.broken
    sampled = n < result.population
    size = f"{n} of {result.population} examples, drawn at random (seed {result.seed})"
    numbers = Table.grid(padding=(0, 2))
    for label, key, share, count in (
        ("clean accuracy", "clean", result.clean_accuracy, right),
        ("empirical accuracy", "empirical", result.accuracy, left),
    ):
        around = result.confidence[key] if result.confidence else None
        interval = f"95 % interval {percent(around[0])} .. {percent(around[1])}" if around else ""
        numbers.add_row(
            label,
            Text(percent(share), style="bold"),
            f"{count} of {n}",
            Text(interval, style="dim"),
        )
    known = int(result.certified.sum())
    parts: list[Text | Table] = [
        Text(f"{result.name} on {result.data.name}, {result.threat.describe()}", style="bold"),
        Text(f"robust accuracy at most {percent(result.accuracy)}"),
        Text.assemble(
            *((((f"{known} known to be robust", "blue"), " · ")) if known else ()),
            f"{left - known} not broken · ",
            (f"{result.broken} broken", "yellow"),
            f" of {size if sampled else f'{n} examples'}, {result.seconds:.1f} s, median of "
            f"{result.median_passes:g} passes each",
        ),
        numbers,
        _stages(result),
    ]
    if result.stopped:
        parts.append(Text(f"stopped early ({result.stopped}): this is what was found so far"))
    return Group(*parts, *(Text(note, style="italic") for note in result.notes))


def _stages(result: Empirical) -> Table:
    table = _table("stage", "tried", "broken", "accuracy", "median passes", "seconds")
    refused = any(stage.refused for stage in result.stages)
    if refused:
        table.add_column("refused by replay", justify="right")
    left = len(result)
    for stage in result.stages:
        left -= stage.broken
        cells = [
            str(stage.tried),
            str(stage.broken),
            percent(left / len(result)),
            f"{stage.passes:g}" if stage.tried else "–",
            f"{stage.seconds:.2f}",
            *([str(stage.refused or "")] if refused else []),
        ]
        table.add_row(escape(stage.name), *cells)
    return table


def _table(first: str, *numbers: str) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column(first)
    for column in numbers:
        table.add_column(column, justify="right")
    return table


def replay_table(replayed: Sequence[Replayed], title: str, notes: Sequence[str]) -> Group:
    """How many of each class, and a row for each one that is not strict (all of them if there are few)."""
    counts: Counter[str] = Counter(r.verdict for r in replayed)
    line: list[str | tuple[str, str]] = []
    for kind, style in STYLE.items():
        line += [" · " if line else "", (f"{counts[kind]} {kind}", style if counts[kind] else "")]
    rows = (
        list(replayed)
        if len(replayed) <= LISTED
        else [r for r in replayed if r.verdict != "strict"]
    )
    table = _table("")
    for column in ("class", "margin", "reason"):
        table.add_column(column, justify="right" if column == "margin" else "left")
    for row in rows[:LISTED]:
        margin = f"{max(row.margins.values()):+.4g}"
        table.add_row(
            escape(row.name), Text(row.verdict, STYLE[row.verdict]), margin, escape(row.reason)
        )
    parts: list[Text | Table] = [
        Text(title, style="bold"),
        Text.assemble(*line, f" of {len(replayed)}"),
    ]
    parts += [table] if rows else []
    if len(rows) > LISTED:
        parts.append(Text(f"and {len(rows) - LISTED} more; --json has all", style="dim"))
    return Group(*parts, *(Text(note, style="italic") for note in notes))


def transfer_table(
    result: Transfer, witnesses: Witnesses, name: str, notes: Sequence[str]
) -> Group:
    """Both accuracies of the second model, and how many of the first one's witnesses break it too."""
    numbers = Table.grid(padding=(0, 2))
    n = len(result.right)
    clean = int(result.clean.sum()) if result.clean is not None else 0
    for label, count in (
        ("accuracy, clean", clean),
        ("accuracy, adversarial", int(result.right.sum())),
    ):
        numbers.add_row(label, Text(percent(count / max(n, 1)), style="bold"), f"{count} of {n}")
    share = percent(result.transferred / max(result.eligible, 1))
    return Group(
        Text(
            f"{n} witnesses of {witnesses.model_name or 'a model'} on {name}, {witnesses.threat.describe()}",
            style="bold",
        ),
        Text(
            f"{result.transferred} of {result.eligible} that {name} gets right when clean transfer ({share})"
        ),
        numbers,
        *(Text(note, style="italic") for note in notes),
    )
