"""Charts of audits as SVG: the curve over the radius, classes, costs, runs side by side, surfaces.

Colours are classes of the page's style sheet (`calipers.evaluate.figures` has them for files). Names come from outside:
each passes `label`, which escapes it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from markupsafe import Markup, escape

from calipers.evaluate.pictures import Array, as_svg, data_uri, ticks

LEFT, RIGHT, TOP, BASE = 64.0, 646.0, 12.0, 250.0  # the frame of the curve
SHADES = ("robust", "unknown", "broken")


def label(text: object, longest: int = 40) -> str:
    """``text`` escaped, without control characters, shortened."""
    plain = "".join(c if c.isprintable() else "\ufffd" for c in str(text))
    return str(escape(plain if len(plain) <= longest else f"{plain[: longest - 1]}…"))


def accuracy_curve(
    eps: Sequence[float],
    certified: Sequence[float],
    empirical: Sequence[float],
    clean: float,
    around: Sequence[tuple[float, float]] | None = None,
) -> Markup:
    """Certified and empirical accuracy at each radius, the unknown between them, and what both say about the radii
    between: no less certified than at the next radius, no more than the empirical share at the one before.

    Args:
        clean: accuracy at radius 0.
        around: limits for the whole data set, where a sample was audited.
    """
    radii = [0.0, *eps] if eps[0] > 0 else list(eps)
    low = [clean, *certified] if eps[0] > 0 else list(certified)
    high = [clean, *empirical] if eps[0] > 0 else list(empirical)
    across, up = _across(radii[-1] or 1.0), _up
    out = _frame(across, radii[-1] or 1.0, "radius eps")
    steps_low = [(radii[i], low[min(i + k, len(low) - 1)]) for i in range(len(low)) for k in (0, 1)]
    steps_high = [(radii[i], high[max(i - k, 0)]) for i in range(len(high)) for k in (1, 0)]
    out.append(_area(steps_low, steps_high, across, "faint"))
    out.append(
        _area(
            list(zip(radii, low, strict=True)),
            list(zip(radii, high, strict=True)),
            across,
            "unknown band",
        )
    )
    for kind, values in (("broken", high), ("robust", low)):
        points = " ".join(
            f"{across(e):.1f},{up(v):.1f}" for e, v in zip(radii, values, strict=True)
        )
        out.append(f'<polyline class="line {kind}-line" points="{points}"/>')
        out += [
            f'<circle class="{kind}" cx="{across(e):.1f}" cy="{up(v):.1f}" r="3.5"/>'
            for e, v in zip(radii, values, strict=True)
        ]
    for e, (a, b) in zip(eps, around or (), strict=False):
        x = across(e)
        out.append(f'<path class="ink" d="M{x - 4:.1f} {up(a):.1f}h8m-4 0V{up(b):.1f}m-4 0h8"/>')
    said = "; ".join(
        f"eps {e:.4g}: {100 * a:.1f} to {100 * b:.1f} %"
        for e, a, b in zip(eps, certified, empirical, strict=True)
    )
    return as_svg(664, 296, out, f"robust accuracy over the radius, {said}")


def curves(series: Mapping[str, Sequence[tuple[float, float, float]]]) -> Markup:
    """Several runs' brackets (eps, certified, empirical) in one frame: a band each; names stand below."""
    last = max(e for points in series.values() for e, _, _ in points) or 1.0
    across = _across(last)
    out = _frame(across, last, "radius eps")
    for i, (name, points) in enumerate(series.items()):
        kind = f"run{i % 6}"
        low, high = ([(p[0], p[k]) for p in points] for k in (1, 2))
        out.append(_area(low, high, across, f"{kind} band"))
        for values in (low, high):
            line = " ".join(f"{across(e):.1f},{_up(v):.1f}" for e, v in values)
            out.append(f'<polyline class="line {kind}-line" points="{line}"/>')
            out += [
                f'<circle class="{kind}" cx="{across(e):.1f}" cy="{_up(v):.1f}" r="3"/>'
                for e, v in values
            ]
        y = BASE + 60 + 20 * i
        out.append(f'<rect class="{kind}" x="{LEFT:g}" y="{y - 9:g}" width="10" height="10"/>')
        out.append(f'<text x="{LEFT + 16:g}" y="{y:g}">{label(name, 80)}</text>')
    return as_svg(664, BASE + 60 + 20 * len(series), out, "robust accuracy over the radius, by run")


class Bar(NamedTuple):
    """A bar of parts (class, share of the width), its name, and what stands behind it."""

    name: str
    parts: Sequence[tuple[str, float]]
    note: str = ""


def bars(rows: Sequence[Bar], about: str) -> Markup:
    """Horizontal bars, one below the other."""
    longest = max([len(r.name) for r in rows], default=0)
    left = 12 + min(8.6 * longest, 240.0)
    width, out = 540 - left, []
    for i, row in enumerate(rows):
        y, x = 4 + 24 * i, left
        out.append(
            f'<text x="{left - 8:.1f}" y="{y + 13}" text-anchor="end">{label(row.name, 28)}</text>'
        )
        for kind, share in row.parts:
            out.append(
                f'<rect class="{kind}" x="{x:.2f}" y="{y}" width="{max(share * width, 0):.2f}" height="18"/>'
            )
            x += share * width
        out.append(f'<text x="{max(x, left) + 6:.1f}" y="{y + 13}">{label(row.note)}</text>')
    return as_svg(664, 24 * len(rows) + 6, out, about)


def heatmap(values: Array, reach: float, limits: tuple[float, float], about: str) -> Markup:
    """A square of values, the first axis upwards, with its scale at the right; both axes run from −reach to reach."""
    low, high = limits
    scaled = (values[::-1] - low) / (high - low) if high > low else values * 0
    side, x, y = 240.0, 44.0, 10.0
    fine = max(1, 240 // len(scaled))  # whole pixels, because converters blur small pictures
    uri = data_uri(colours(scaled).repeat(fine, 0).repeat(fine, 1))
    scale = data_uri(colours(np.linspace(1, 0, 240)[:, None]).repeat(14, 1))
    fill = 'preserveAspectRatio="none"'
    out = [
        f'<image x="{x:g}" y="{y:g}" width="{side:g}" height="{side:g}" {fill} href="{uri}"/>',
        f'<rect class="frame" x="{x:g}" y="{y:g}" width="{side:g}" height="{side:g}"/>',
        f'<image x="{x + side + 14:g}" y="{y:g}" width="14" height="{side:g}" {fill} href="{scale}"/>',
        f'<path class="cross" d="M{x + side / 2:g} {y:g}v{side:g}M{x:g} {y + side / 2:g}h{side:g}"/>',
    ]
    for value, at in ((high, y + 10), (low, y + side)):
        out.append(f'<text x="{x + side + 34:g}" y="{at:g}">{value:.2g}</text>')
    for value, at in ((-reach, 0.0), (0.0, side / 2), (reach, side)):
        out.append(
            f'<text x="{x + at:g}" y="{y + side + 16:g}" text-anchor="middle">{value:.3g}</text>'
        )
        out.append(
            f'<text x="{x - 5:g}" y="{y + side - at + 4:g}" text-anchor="end">{value:.3g}</text>'
        )
    out.append(
        f'<text x="{x + side / 2:g}" y="{y + side + 34:g}" text-anchor="middle">random direction</text>'
    )
    middle = y + side / 2
    out.append(
        f'<g transform="rotate(-90 9 {middle:g})"><text x="9" y="{middle:g}" text-anchor="middle">'
        "gradient's signs</text></g>"
    )
    return as_svg(372, 292, out, about)


def profiles(
    steps: Array, series: Mapping[str, Array], limits: tuple[float, float], about: str
) -> Markup:
    """Lines over one axis on a given scale, with a legend below."""
    low, high = limits
    span = (high - low) or 1.0
    start, end, top, base = 60.0, 350.0, 10.0, 200.0

    def at(i: int, value: float) -> str:
        x = start + (end - start) * i / max(len(steps) - 1, 1)
        return f"{x:.1f},{base - (value - low) / span * (base - top):.1f}"

    out = [f'<path class="ink" d="M{start:g} {top:g}V{base:g}H{end:g}"/>']
    for value in (low, high):
        y = base - (value - low) / span * (base - top)
        out.append(f'<text x="{start - 5:g}" y="{y + 4:.1f}" text-anchor="end">{value:.2g}</text>')
    for value, x in ((float(steps[0]), start), (float(steps[-1]), end)):
        out.append(f'<text x="{x:g}" y="{base + 16:g}" text-anchor="middle">{value:.3g}</text>')
    for i, (name, values) in enumerate(series.items()):
        line = " ".join(at(j, float(v)) for j, v in enumerate(values))
        y = base + 36 + 18 * i
        out.append(f'<polyline class="line run{i % 6}-line" points="{line}"/>')
        out.append(f'<rect class="run{i % 6}" x="{start:g}" y="{y - 9:g}" width="10" height="10"/>')
        out.append(f'<text x="{start + 16:g}" y="{y:g}">{label(name, 60)}</text>')
    return as_svg(364, base + 40 + 18 * len(series), out, about)


def colours(shares: Array) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """Shares (H, W) of a scale as bytes (H, W, 3): dark blue over green to yellow, of rising lightness."""
    stops = np.array(
        [[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]], float
    )
    place = np.nan_to_num(shares).clip(0, 1) * (len(stops) - 1)
    first = np.minimum(place.astype(int), len(stops) - 2)
    part = (place - first)[..., None]
    mixed = np.round(stops[first] * (1 - part) + stops[first + 1] * part)
    pixels: np.ndarray[tuple[int, ...], np.dtype[np.uint8]] = mixed.astype(np.uint8)
    return pixels


def _across(last: float) -> Callable[[float], float]:
    return lambda e: LEFT + e / last * (RIGHT - LEFT)


def _up(share: float) -> float:
    return BASE - share * (BASE - TOP)


def _frame(across: Callable[[float], float], last: float, below: str) -> list[str]:
    out = []
    for percent in range(0, 101, 20):
        y = _up(percent / 100)
        out.append(f'<path class="grid-line" d="M{LEFT:g} {y:.1f}H{RIGHT:g}"/>')
        out.append(f'<text x="{LEFT - 6:g}" y="{y + 4:.1f}" text-anchor="end">{percent} %</text>')
    for value in ticks(0.0, last):
        x = across(value)
        out.append(f'<path class="ink" d="M{x:.1f} {BASE:g}v4"/>')
        out.append(f'<text x="{x:.1f}" y="{BASE + 17:g}" text-anchor="middle">{value:.4g}</text>')
    out.append(
        f'<text x="{(LEFT + RIGHT) / 2:g}" y="{BASE + 40:g}" text-anchor="middle">{below}</text>'
    )
    return out


def _area(
    low: Sequence[tuple[float, float]],
    high: Sequence[tuple[float, float]],
    across: Callable[[float], float],
    kind: str,
) -> str:
    ring = [*low, *reversed(high)]
    points = " ".join(f"{across(e):.1f},{_up(v):.1f}" for e, v in ring if math.isfinite(v))
    return f'<polygon class="{kind}" points="{points}"/>'
