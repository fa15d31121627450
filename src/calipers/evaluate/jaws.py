"""One example's two jaws as pictures: over the radius, and method by method."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from markupsafe import Markup

from calipers.evaluate.charts import label
from calipers.evaluate.pictures import as_svg, ticks


class Jaw(NamedTuple):
    """What one method says of one example: an end, or both; infinite where it says nothing."""

    name: str
    lower: float
    upper: float


def over_radius(
    eps: Sequence[float], lower: Sequence[float], upper: Sequence[float], now: float
) -> Markup:
    """Both ends of the margin at each radius, zero and the radius ``now`` marked."""
    left, right, top, base = 64.0, 646.0, 12.0, 220.0
    low, high = _range([*lower, *upper])
    last = max([*eps, now]) or 1.0

    def across(value: float) -> float:
        return left + value / last * (right - left)

    def up(value: float) -> float:
        return base - (min(max(value, low), high) - low) / (high - low) * (base - top)

    out = [f'<path class="ink" d="M{left:g} {top:g}V{base:g}H{right:g}"/>']
    out += [
        f'<text x="{left - 6:g}" y="{up(value) + 4:.1f}" text-anchor="end">{value:.3g}</text>'
        for value in ticks(low, high)
    ]
    out += [
        f'<text x="{across(value):.1f}" y="{base + 17:g}" text-anchor="middle">{value:.4g}</text>'
        for value in ticks(0.0, last)
    ]
    band = [(e, v) for e, v in zip(eps, lower, strict=True)]
    band += [(e, v) for e, v in zip(reversed(eps), reversed(upper), strict=True)]
    points = " ".join(f"{across(e):.1f},{up(v):.1f}" for e, v in band)
    out.append(f'<polygon class="unknown band" points="{points}"/>')
    for kind, values in (("broken", upper), ("robust", lower)):
        line = " ".join(f"{across(e):.1f},{up(v):.1f}" for e, v in zip(eps, values, strict=True))
        out.append(f'<polyline class="line {kind}-line" points="{line}"/>')
    out.append(f'<path class="zero" d="M{left:g} {up(0):.1f}H{right:g}"/>')
    out.append(f'<path class="ink" d="M{across(now):.1f} {top:g}V{base:g}"/>')
    out.append(
        f'<text x="{(left + right) / 2:g}" y="{base + 38:g}" text-anchor="middle">radius eps</text>'
    )
    return as_svg(664, base + 46, out, "the margin's lower and upper end over the radius")


def nested(jaws: Sequence[Jaw]) -> Markup:
    """Each method's end as a bar that reaches to it: bounds from the left, attacks from the right, zero marked."""
    left, right = 130.0, 590.0
    low, high = _range([end for j in jaws for end in (j.lower, j.upper)])

    def across(value: float) -> float:
        return left + (min(max(value, low), high) - low) / (high - low) * (right - left)

    out = []
    for i, jaw in enumerate(jaws):
        y = 4 + 24 * i
        out.append(
            f'<text x="{left - 8:g}" y="{y + 13}" text-anchor="end">{label(jaw.name, 17)}</text>'
        )
        if math.isfinite(jaw.lower):
            out.append(_bar("robust", left, across(jaw.lower), y))
        if math.isfinite(jaw.upper):
            out.append(_bar("broken", across(jaw.upper), right, y))
    base = 24 * len(jaws) + 4
    out += [
        f'<text x="{across(value):.1f}" y="{base + 14}" text-anchor="middle">{value:.3g}</text>'
        for value in ticks(low, high)
    ]
    out.append(f'<path class="zero" d="M{across(0):.1f} 0V{base}"/>')
    return as_svg(
        664,
        base + 20,
        out,
        "each method's end of the margin: bounds from the left, attacks from the right",
    )


def _bar(kind: str, start: float, end: float, y: float) -> str:
    width = max(end - start, 0.5)
    return f'<rect class="{kind}" x="{start:.1f}" y="{y}" width="{width:.1f}" height="18"/>'


def _range(values: Sequence[float]) -> tuple[float, float]:
    """What an axis covers: zero, all finite values, and a little room."""
    finite = [v for v in values if math.isfinite(v)] + [0.0]
    low, high = min(finite), max(finite)
    room = 0.06 * (high - low) or 1.0
    return low - room, high + room
