"""Figures as SVG text that stands alone: what attacks change, how losses climb, how restarts spread, lines and points.

The numbers come from `calipers.gini`, `calipers.loss_curve` and `calipers.restart_losses`; nothing here is computed
by other packages, and every name is escaped. Write the text to a file that ends in ``.svg``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from markupsafe import escape
from numpy.typing import NDArray
from torch import Tensor

from calipers.attacks import gini
from calipers.evaluate.pictures import Array, as_change, as_image, data_uri

TILE, GAP = 96.0, 14.0
WIDTH, HEIGHT = 480.0, 260.0
LEFT, BOTTOM = 72.0, 40.0
STYLE = (
    "text{font:12px sans-serif;fill:#333}image{image-rendering:pixelated}.frame{fill:none;stroke:#bbb}"
    ".ink{fill:none;stroke:#333}.each{fill:none;stroke:#005ab5;opacity:.25}.middle{fill:none;stroke:#d55e00;"
    "stroke-width:2.5}.dot{fill:#005ab5;opacity:.35}.best{fill:#d55e00}"
)


def changes(x: Tensor, points: Mapping[str, Tensor]) -> str:
    """Each image in its row, beside each attack's change and its Gini index: blue down, orange up, white unchanged.

    Colours are scaled to each change's own largest value: a dense change fills the tile, a sparse one does not.

    Args:
        x: (B, C, H, W) images in [0, 1], one or three channels; a few.
        points: (B, C, H, W) for each attack by name.

    Raises:
        ValueError: ``x`` are no images, or points have another shape.
    """
    if x.ndim != 4 or x.shape[1] not in (1, 3):
        raise ValueError(f"x: shape {tuple(x.shape)} is no batch of images (B, 1 or 3, H, W)")
    wrong = [name for name, point in points.items() if point.shape != x.shape]
    if wrong:
        raise ValueError(
            f"points: {wrong[0]} has shape {tuple(points[wrong[0]].shape)}, x {tuple(x.shape)}"
        )
    out = [_text(GAP + TILE / 2, 14, "input")]
    for row, image in enumerate(_array(x)):
        out.append(_tile(0, row, as_image(image)))
    for column, (name, point) in enumerate(points.items(), 1):
        out.append(_text(GAP + column * (TILE + GAP) + TILE / 2, 14, name))
        change = point - x
        for row, (delta, index) in enumerate(
            zip(_array(change), gini(change).tolist(), strict=True)
        ):
            out.append(_tile(column, row, as_change(delta, float(np.abs(delta).max()))))
            middle, below = GAP + column * (TILE + GAP) + TILE / 2, 34 + row * (TILE + 30) + TILE
            out.append(_text(middle, below, f"Gini {index:.2f}"))
    width = GAP + (len(points) + 1) * (TILE + GAP)
    return _svg(width, 24 + len(x) * (TILE + 30), out, "inputs and what attacks changed")


def curves(losses: Tensor, label: str = "loss") -> str:
    """The loss of each example at each evaluation, (evaluations, B), and their median in orange."""
    values = _array(losses)
    steps = np.arange(len(values), dtype=float)
    lines = [("each", steps, column) for column in values.T]
    lines.append(("middle", steps, np.median(values, axis=1)))
    across, up = _scale(steps, LEFT, WIDTH - GAP), _scale(values, HEIGHT - BOTTOM, GAP)
    out = [
        f'<polyline class="{kind}" points="'
        + " ".join(f"{across(a):.1f},{up(b):.1f}" for a, b in zip(at, column, strict=True))
        + '"/>'
        for kind, at, column in lines
    ]
    return _framed(out, values, "evaluation", label, f"0 to {len(values) - 1}")


def spread(losses: Tensor, label: str = "final loss") -> str:
    """The final losses of restarts, (restarts, B): a column of dots per example, the best in orange."""
    values = _array(losses)
    values = values[:, values.max(0).argsort()]
    columns = np.arange(values.shape[1], dtype=float)
    across, up = _scale(columns, LEFT + GAP, WIDTH - 2 * GAP), _scale(values, HEIGHT - BOTTOM, GAP)
    best = values.max(0)
    out = [
        f'<circle class="{kind}" cx="{across(float(i)):.1f}" cy="{up(float(value)):.1f}" r="2.5"/>'
        for kind, rows in (("dot", values), ("best", best[None]))  # the best on top
        for row in rows
        for i, value in enumerate(row)
    ]
    return _framed(out, values, "example", label, f"{len(values)} restarts of each")


COLOURS = ("#005ab5", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#b58900", "#000000", "#8a2be2")
DASHES = ("", "6 3", "2 3", "8 3 2 3")
Series = Mapping[str, Sequence[tuple[float, float]]]


def lines(series: Series, across: str, up: str, *, log: str = "", joined: bool = True) -> str:
    """Named series of points (x, y), joined by lines or on their own; names stand in a legend beside them.

    Args:
        log: which axes are logarithmic: "", "x", "y" or "xy". Points that are not positive there are left out.

    Raises:
        ValueError: no point is left to draw.
    """
    kept = {name: _drawable(points, log) for name, points in series.items()}
    xs, ys = ([p[i] for points in kept.values() for p in points] for i in (0, 1))
    if not xs:
        raise ValueError("series: no finite point to draw")
    right, top = WIDTH - GAP, GAP
    to_x, x_ticks = _axis(xs, LEFT + GAP, right - GAP, "x" in log)
    to_y, y_ticks = _axis(ys, HEIGHT - BOTTOM - 8, top + 8, "y" in log)
    out = [f'<path class="ink" d="M{LEFT} {top}V{HEIGHT - BOTTOM}H{right}"/>']
    for tick in x_ticks:
        out.append(f'<path class="frame" d="M{to_x(tick):.1f} {HEIGHT - BOTTOM}V{top}"/>')
        out.append(_text(to_x(tick), HEIGHT - BOTTOM + 15, f"{tick:.4g}"))
    for tick in y_ticks:
        out.append(f'<path class="frame" d="M{LEFT} {to_y(tick):.1f}H{right}"/>')
        out.append(_text(LEFT - 5, to_y(tick) + 4, f"{tick:.4g}", "end"))
    for i, (name, points) in enumerate(kept.items()):
        paint = COLOURS[i % len(COLOURS)]
        places = [(to_x(x), to_y(y)) for x, y in points]
        if joined:
            dash = DASHES[i // len(COLOURS) % len(DASHES)]
            path = " ".join(f"{a:.1f},{b:.1f}" for a, b in places)
            out.append(
                f'<polyline points="{path}" fill="none" stroke="{paint}" stroke-width="1.8" '
                f'stroke-dasharray="{dash}"/>'
            )
        out += [f'<circle cx="{a:.1f}" cy="{b:.1f}" r="2.6" fill="{paint}"/>' for a, b in places]
        height = top + 12 + 17 * i
        out.append(f'<circle cx="{WIDTH + 6:g}" cy="{height - 4:g}" r="4" fill="{paint}"/>')
        out.append(_text(WIDTH + 15, height, name, "start"))
    out.append(_text((LEFT + right) / 2, HEIGHT - 6, across))
    middle = (HEIGHT - BOTTOM) / 2
    out.append(f'<g transform="rotate(-90 14 {middle:g})">{_text(14, middle, up)}</g>')
    width = WIDTH + 30 + 7.2 * max(map(len, kept))
    return _svg(width, max(HEIGHT, top + 20 + 17 * len(kept)), out, f"{up} by {across}")


def _drawable(points: Sequence[tuple[float, float]], log: str) -> list[tuple[float, float]]:
    return [
        (x, y)
        for x, y in points
        if np.isfinite(x)
        and np.isfinite(y)
        and (x > 0 or "x" not in log)
        and (y > 0 or "y" not in log)
    ]


def _axis(
    values: Sequence[float], first: float, last: float, log: bool
) -> tuple[Callable[[float], float], list[float]]:
    """From values to a coordinate, and the round numbers on the way: powers of ten, or multiples of 1, 2 or 5."""
    low, high = min(values), max(values)
    if log:
        to = _scale(np.log10(np.array([low, high])), first, last)
        powers = range(int(np.floor(np.log10(low))), int(np.ceil(np.log10(high))) + 1)
        step = 1 + len(powers) // 8
        digits = (1, 2, 5) if len(powers) <= 4 else (1,)
        ticks = [d * 10.0**k for k in powers if k % step == 0 for d in digits]
        ticks = [tick for tick in ticks if low / 1.01 <= tick <= high * 1.01]
        return lambda value: to(float(np.log10(value))), ticks
    span = high - low if high > low else 1.0
    unit = 10.0 ** np.floor(np.log10(span / 4))
    step_ = next(unit * k for k in (1, 2, 5, 10) if span / (unit * k) <= 5)
    ticks = [step_ * k for k in range(int(np.ceil(low / step_)), int(np.floor(high / step_)) + 1)]
    return _scale(np.array([low, high]), first, last), ticks


COLORS = ("#005ab5", "#d55e00", "#333333", "#228833", "#aa3377", "#66ccee")
FASTEST = 1e-2  # seconds; what is faster is drawn there


def cactus(series: Mapping[str, Sequence[float]]) -> str:
    """How many instances each tool solves within which time, on a logarithmic scale: further right and lower is better.

    Args:
        series: seconds of the solved instances, by tool.

    Raises:
        ValueError: no tool, or none of them solved anything.
    """
    curves = {name: np.sort(np.maximum(seconds, FASTEST)) for name, seconds in series.items()}
    if not any(len(c) for c in curves.values()):
        raise ValueError("series: nothing was solved, so there is nothing to draw")
    seconds = np.concatenate([np.array([FASTEST]), *curves.values()])
    count = max(len(c) for c in curves.values())
    x = _scale(np.array([0.0, count]), LEFT, WIDTH - GAP)
    y = _scale(np.log10(seconds), HEIGHT - BOTTOM, GAP)
    out = []
    for place, (name, curve) in enumerate(curves.items()):
        color = COLORS[place % len(COLORS)]
        points = " ".join(
            f"{x(i + 1):.1f},{y(float(np.log10(t))):.1f}" for i, t in enumerate(curve)
        )
        out.append(f'<polyline fill="none" stroke="{color}" stroke-width="2" points="{points}"/>')
        row = GAP + 12 + 16 * place
        out.append(f'<path stroke="{color}" stroke-width="2" d="M{LEFT + 10} {row - 4}h18"/>')
        out.append(_text(LEFT + 34, row, f"{name}: {len(curve)}", "start"))
    return _framed(out, seconds, f"instances solved, of at most {count}", "seconds", "log scale")


def _array(values: Tensor) -> Array:
    array: Array = values.detach().double().cpu().numpy()
    return array


def _scale(values: Array, first: float, last: float) -> Callable[[float], float]:
    """From values to a coordinate, linearly: the smallest to ``first``, the largest to ``last``."""
    low, high = float(values.min()), float(values.max())
    slope = (last - first) / (high - low if high > low else 1.0)
    return lambda value: first + (value - low) * slope


def _tile(column: int, row: int, image: NDArray[np.uint8]) -> str:
    x, y = GAP + column * (TILE + GAP), 20 + row * (TILE + 30)
    place = f'x="{x:g}" y="{y:g}" width="{TILE:g}" height="{TILE:g}"'
    return f'<image {place} href="{data_uri(image)}"/><rect class="frame" {place}/>'


def _text(x: float, y: float, text: str, anchor: str = "middle") -> str:
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}">{escape(text)}</text>'


def _framed(parts: Sequence[str], values: Array, across: str, up: str, note: str) -> str:
    low, high = float(values.min()), float(values.max())
    out = [
        f'<path class="ink" d="M{LEFT} {GAP}V{HEIGHT - BOTTOM}H{WIDTH - GAP}"/>',
        _text(LEFT - 6, GAP + 8, f"{high:.3g}", "end"),
        _text(LEFT - 6, HEIGHT - BOTTOM, f"{low:.3g}", "end"),
        _text(LEFT - 6, (HEIGHT - BOTTOM) / 2 + GAP, up, "end"),
        _text((LEFT + WIDTH) / 2, HEIGHT - BOTTOM + 20, f"{across} ({note})"),
    ]
    return _svg(WIDTH, HEIGHT, [*out, *parts], f"{up} by {across}")


def _svg(width: float, height: float, parts: Sequence[str], label: str) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" width="{width:g}" '
        f'height="{height:g}" role="img" aria-label="{escape(label)}"><style>{STYLE}</style>'
        f'<rect width="100%" height="100%" fill="#fff"/>{"".join(parts)}</svg>'
    )
