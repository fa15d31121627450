"""Plots of a report: SVG built from numbers, PNG from arrays, with nothing but the standard library and numpy.

Colours are CSS classes of the report's style sheet, so that light and dark share one drawing. No text from outside gets
in here: labels are numbers, and names stay in the template, where they are escaped.
"""

from __future__ import annotations

import base64
import math
import struct
import zlib
from collections.abc import Sequence

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

Array = NDArray[np.float64]


def png(image: NDArray[np.uint8]) -> bytes:
    """A PNG file of ``image`` (H, W, 3), 8 bits a channel."""
    height, width, _ = image.shape
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    lines = b"".join(b"\0" + row.tobytes() for row in image)  # filter 0 before each line
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(lines, 9)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in chunks
    )


def data_uri(image: NDArray[np.uint8]) -> str:
    return "data:image/png;base64," + base64.b64encode(png(image)).decode()


def as_image(x: Array) -> NDArray[np.uint8]:
    """Values in [0, 1], (1 or 3, H, W), as (H, W, 3) bytes."""
    colour = np.repeat(x, 3, 0) if len(x) == 1 else x
    pixels: NDArray[np.uint8] = np.round(colour.clip(0, 1) * 255).astype(np.uint8)
    return pixels.transpose(1, 2, 0)


def as_change(delta: Array, limit: float) -> NDArray[np.uint8]:
    """Signed values, (C, H, W), as (H, W, 3) bytes: blue at −limit, white at 0, orange at +limit; channels averaged."""
    t = (delta.mean(0) / limit if limit > 0 else delta.mean(0) * 0).clip(-1, 1)[..., None]
    white, blue, orange = (
        np.array(c, float) for c in ((255, 255, 255), (0, 90, 181), (213, 94, 0))
    )
    mixed = white + np.abs(t) * (np.where(t < 0, blue, orange) - white)
    pixels: NDArray[np.uint8] = np.round(mixed).astype(np.uint8)
    return pixels


def stacked_bar(
    parts: Sequence[tuple[str, float]], intervals: Sequence[tuple[float, float]]
) -> Markup:
    """Shares (class name, share) side by side, with a whisker below for each interval of a border; a scale 0..100 %."""
    width, left, out = 640.0, 12.0, []
    x = left
    for kind, share in parts:
        out.append(
            f'<rect class="{kind}" x="{x:.2f}" y="4" width="{share * width:.2f}" height="34"/>'
        )
        x += share * width
    for i, (low, high) in enumerate(intervals):
        a, b, y = left + low * width, left + high * width, 46 + 8 * i
        out.append(
            f'<path class="ink" d="M{a:.2f} {y - 3}v6M{a:.2f} {y}H{b:.2f}M{b:.2f} {y - 3}v6"/>'
        )
    base = 44 + 8 * len(intervals)
    for percent in range(0, 101, 20):
        at = left + percent / 100 * width
        out.append(f'<path class="ink" d="M{at:.2f} {base}v4"/>')
        out.append(f'<text x="{at:.2f}" y="{base + 17}" text-anchor="middle">{percent}</text>')
    return as_svg(664, base + 24, out, "the bracket as a bar")


def margin_histogram(
    lower: Array, upper: Array, bins: int = 28
) -> tuple[Markup, list[tuple[float, float, int, int]]]:
    """Both ends of the brackets on one axis (lower ends up, upper ends down), zero marked, and the counts per bin.

    Infinite ends are left out; the caller says how many. The axis covers the middle 98 % of the values and zero.
    """
    finite = np.concatenate([lower[np.isfinite(lower)], upper[np.isfinite(upper)], [0.0]])
    first, last = np.quantile(finite, [0.01, 0.99])
    first, last = min(first, 0.0), max(last, 0.0)
    if last - first < 1e-9:
        first, last = first - 1, last + 1
    # zero is a border of two bins, so that no bar mixes both signs
    step = (last - first) / bins
    edges = np.arange(math.floor(first / step), math.ceil(last / step) + 1) * step
    below, above = (
        np.histogram(v[np.isfinite(v)].clip(edges[0], edges[-1]), edges)[0] for v in (lower, upper)
    )
    table = [
        (float(a), float(b), int(m), int(n))
        for a, b, m, n in zip(edges[:-1], edges[1:], below, above, strict=True)
    ]
    return _mirrored(table), table


def _mirrored(table: Sequence[tuple[float, float, int, int]]) -> Markup:
    width, half, left = 640.0, 90.0, 12.0
    start, end = table[0][0], table[-1][1]
    peak = max(1, *(max(m, n) for *_, m, n in table))

    def at(value: float) -> float:
        return left + (value - start) / (end - start) * width

    out = []
    for a, b, m, n in table:
        x, w = at(a) + 0.5, max(at(b) - at(a) - 1, 0.5)
        up, down = half * m / peak, half * n / peak
        out.append(
            f'<rect class="robust" x="{x:.2f}" y="{100 - up:.2f}" width="{w:.2f}" height="{up:.2f}"/>'
        )
        out.append(
            f'<rect class="broken" x="{x:.2f}" y="104" width="{w:.2f}" height="{down:.2f}"/>'
        )
    out.append(f'<path class="ink" d="M{left} 102H{left + width}"/>')
    out.append(f'<path class="zero" d="M{at(0):.2f} 4V200"/>')
    out += [
        f'<text x="{at(value):.2f}" y="216" text-anchor="middle">{value:g}</text>'
        for value in ticks(start, end)
    ]
    return as_svg(664, 224, out, "margins: lower ends above the line, upper ends below it")


def ticks(start: float, end: float) -> list[float]:
    """Round numbers from start to end, about eight of them, zero among them."""
    raw = (end - start) / 8
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw)
    return [i * step for i in range(math.ceil(start / step), math.floor(end / step) + 1)]


def vector_bars(values: Array, limit: float, signed: bool) -> Markup:
    """A short vector as bars: from the bottom, or from the middle line if signed."""
    width, height = 96.0, 96.0
    step = width / len(values)
    zero = height / 2 if signed else height
    out = []
    for i, value in enumerate(values):
        size = abs(value) / limit * zero if limit > 0 else 0.0
        top = zero - size if value >= 0 else zero
        kind = "plus" if value >= 0 else "minus"
        out.append(
            f'<rect class="{kind if signed else "plain"}" x="{i * step:.2f}" y="{top:.2f}" '
            f'width="{max(step - 0.5, 0.3):.2f}" height="{size:.2f}"/>'
        )
    return as_svg(96, 96, out, "values of the input")


def as_svg(width: float, height: float, parts: Sequence[str], label: str) -> Markup:
    """The parts as one picture; whoever builds them has escaped what came from outside."""
    body = "".join(parts)
    return Markup(  # noqa: S704 - numbers, constants and escaped names
        f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{label}">{body}</svg>'
    )


# digits of 3 x 5 pixels, a line per row from the top, the leftmost pixel the highest bit
_FONT = dict(
    zip(
        "0123456789",
        (
            *((7, 5, 5, 5, 7), (2, 6, 2, 2, 7), (7, 1, 7, 4, 7), (7, 1, 7, 1, 7), (5, 5, 7, 1, 1)),
            *((7, 4, 7, 1, 7), (7, 4, 7, 5, 7), (7, 1, 2, 2, 2), (7, 5, 7, 5, 7), (7, 5, 7, 1, 7)),
        ),
        strict=True,
    )
)


def labelled(
    images: Sequence[NDArray[np.uint8]], above: str, below: str, side: int = 96, gap: int = 6
) -> NDArray[np.uint8]:
    """A column of ``images`` (H, W, 3), enlarged to about ``side`` pixels, with a class number above and one below."""
    factor = max(1, side // max(images[0].shape[:2]))
    large = [image.repeat(factor, 0).repeat(factor, 1) for image in images]
    width = max(large[0].shape[1], 30)
    parts = [_number(above, width), *large, _number(below, width)]
    framed = [
        np.pad(p, ((gap, gap), (gap, gap + width - p.shape[1]), (0, 0)), constant_values=255)
        for p in parts
    ]
    return np.concatenate(framed)


def _number(text: str, width: int, scale: int = 3) -> NDArray[np.uint8]:
    """Digits in black on white, (5·scale, width, 3)."""
    canvas = np.full((5 * scale, width, 3), 255, np.uint8)
    for place, letter in enumerate(text[: width // (4 * scale)]):
        bits = [[not row >> (2 - i) & 1 for i in range(3)] for row in _FONT[letter]]
        glyph = np.kron(np.array(bits, np.uint8) * 255, np.ones((scale, scale), np.uint8))
        left = 4 * scale * place
        canvas[:, left : left + 3 * scale] = glyph[..., None]
    return canvas
