"""The report: one HTML file without outside references, that anyone can open and keep.

Every string of the result (names of models, data, classes, methods, notes) reaches the page through an escaping
template; the page's policy forbids remote content, and styles and scripts other than its own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from markupsafe import Markup
from torch import Tensor

from calipers.bracket import Verdict
from calipers.evaluate.charts import Bar, accuracy_curve, bars
from calipers.evaluate.curve import Curve
from calipers.evaluate.examples import KIND, Look, class_name, gallery, nearest, shown
from calipers.evaluate.pages import page
from calipers.evaluate.pictures import margin_histogram, stacked_bar
from calipers.evaluate.result import Audit, environment
from calipers.evaluate.tables import SIDES, percent

GRID = 8  # broken examples shown
EACH = 100  # rows of the example table for each verdict
ORDER = (Verdict.ROBUST, Verdict.UNKNOWN, Verdict.VULNERABLE)
SHADE = {"bound": "robust", "attack": "broken"}  # the others are drawn as unknown


def render(audit: Audit, curve: Curve | None = None, folder: Path | None = None) -> str:
    """The page, as text.

    Args:
        curve: of which ``audit`` is one.
        folder: where the page will be; certificates beside or below it become links.
    """
    chosen = gallery(audit, GRID)
    limit = _largest_change(audit, chosen)
    spans = curve.spans() if curve else ()
    rows = shown(Look(audit, None, folder, spans), nearest(audit, EACH))
    _, table = margins(audit)
    return page(
        "report.html",
        audit=audit,
        curve=curve,
        eps=str(audit.threat.eps),
        limits=curve.confidence if curve else None,
        curve_plot=curve_plot(curve) if curve else "",
        threat=audit.threat.describe(),
        robust=audit.counts[Verdict.ROBUST],
        broken=audit.counts[Verdict.VULNERABLE],
        bar=bracket_bar(audit),
        costs=cost_bars(audit),
        histogram=margins(audit)[0],
        bins=table,
        outside=_outside(audit),
        classes=classes(audit),
        class_plot=class_bars(audit),
        sides=SIDES,
        shown=shown(Look(audit, limit, folder), chosen),
        factor=1 / limit if limit > 0 else 1.0,
        rows=rows,
        left_out=len(audit) - len(rows),
        diagnostics=list(diagnostics(audit, curve)),
        environment=environment(),
    )


# -- plots, which files show, too (`calipers.evaluate.figures`) ------------------------------------------------------


def bracket_bar(audit: Audit) -> Markup:
    """The bracket as one bar."""
    around = audit.confidence
    intervals = [around["certified"], around["empirical"]] if around else []
    return stacked_bar([(KIND[v], audit.counts[v] / len(audit)) for v in ORDER], intervals)


def curve_plot(curve: Curve) -> Markup:
    """Both ends over the radius."""
    return accuracy_curve(
        curve.eps, curve.certified, curve.empirical, curve.main.clean_accuracy, curve.confidence
    )


def margins(audit: Audit) -> tuple[Markup, list[tuple[float, float, int, int]]]:
    """Both jaws' histogram and its numbers."""
    lower, upper = _ends(audit)
    return margin_histogram(lower.numpy(), upper.numpy())


def cost_bars(audit: Audit) -> Markup:
    """Seconds by method."""
    total = sum(r.seconds for r in audit.methods) or 1.0
    most = max((r.seconds for r in audit.methods), default=0.0) or 1.0
    rows = [
        Bar(
            r.name,
            [(SHADE.get(r.side, "unknown"), r.seconds / most)],
            f"{r.seconds:.2f} s, {percent(r.seconds / total)}",
        )
        for r in audit.methods
        if r.tried or r.seconds
    ]
    return bars(rows, "seconds by method")


def class_bars(audit: Audit) -> Markup:
    """The bracket of each class."""
    rows = [
        Bar(
            row["name"],
            [("robust", row["certified"]), ("unknown", row["empirical"] - row["certified"]),
             ("broken", 1 - row["empirical"])],
            f"{percent(row['certified'])} to {percent(row['empirical'])}",
        )
        for row in classes(audit)
    ]  # fmt: skip
    return bars(rows, "the bracket of each class: certified, unknown, broken")


# -- numbers ----------------------------------------------------------------------------------------------------------


def _ends(audit: Audit) -> tuple[Tensor, Tensor]:
    """The lower ends of examples that are not broken (nobody raised the others'), and all upper ends."""
    return audit.bracket.lower[audit.bracket.upper > 0], audit.bracket.upper


def _outside(audit: Audit) -> tuple[int, int]:
    """How many of the ends shown are infinite."""
    low, high = (int((~torch.isfinite(end)).sum()) for end in _ends(audit))
    return low, high


def _largest_change(audit: Audit, rows: list[int]) -> float:
    points = audit.bracket.witness
    if points is None or not rows:
        return 0.0
    return (points[rows].cpu().double() - audit.x[rows].double()).abs().max().item()


def classes(audit: Audit) -> list[dict[str, Any]]:
    """The bracket per class, in class order."""
    verdicts = np.array([KIND[v] for v in audit.verdicts])
    labels, right = audit.y.numpy(), (audit.margins > 0).numpy()
    rows = []
    for index in np.unique(labels).tolist():
        mask = labels == index
        counts = {kind: int((verdicts[mask] == kind).sum()) for kind in KIND.values()}
        n = int(mask.sum())
        rows.append(
            {
                "name": class_name(audit, index),
                "n": n,
                "clean": float(right[mask].mean()),
                "certified": counts["robust"] / n,
                "empirical": 1 - counts["broken"] / n,
                "unknown": counts["unknown"],
            }
        )
    return rows


def diagnostics(audit: Audit, curve: Curve | None = None) -> Iterator[tuple[str, str]]:
    """What speaks for the numbers and against them."""
    for name, value in audit.differences.items():
        yield f"outputs, {name}", f"largest difference {value:.3g}"
    bracket = audit.bracket
    broken = audit.counts[Verdict.VULNERABLE]
    yield (
        "witnesses",
        f"{broken} points, each inside its set and run alone in every evaluation above",
    )
    gap = (bracket.upper - bracket.lower)[[v is Verdict.UNKNOWN for v in audit.verdicts]]
    finite = gap[torch.isfinite(gap)]
    if len(finite):
        yield "unknown examples", f"median distance of the two ends {finite.median().item():.4g}"
    radius = 0.0 if bracket.rounding is None else bracket.rounding.max().item()
    yield "rounding", f"at most {radius:.3g} of a margin; verdicts within it count as unknown"
    for verdict, ends in (
        (Verdict.ROBUST, bracket.lower_evidence),
        (Verdict.VULNERABLE, bracket.upper_evidence),
    ):
        counts = Counter(
            e.method for e, v in zip(ends, audit.verdicts, strict=True) if e and v is verdict
        )
        if counts:
            said = ", ".join(f"{name} {n}" for name, n in counts.most_common())
            yield "certified by" if verdict is Verdict.ROBUST else "broken by", said
    for finding in audit.findings:
        remedy = f" Remedy: {finding.remedy}" if finding.warning else ""
        state = "warning: " if finding.warning else ""
        yield f"attacks, {finding.name}", f"{state}{finding.message}{remedy}"
    for row in audit.methods:
        if row.note:
            yield f"{row.name}: note", row.note
    if curve:
        yield (
            "radii",
            "certificates carried to smaller, witnesses to larger ones and judged again there",
        )
