"""The S-shaped functions: images and lines, rounded outward.

Both functions are increasing, convex below 0 and concave above, and f(−v) differs from −f(v) by a constant. NumPy's
`exp` and `tanh` are trusted to `ERROR`, some 45 units in the last place.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Array = np.ndarray
ERROR = 1e-14
HALVINGS = 12


def _sigmoid(v: Array) -> Array:
    small = np.exp(-np.abs(v))
    return np.where(v >= 0, 1 / (1 + small), small / (1 + small))


def _slope_of_sigmoid(v: Array) -> Array:
    small = np.exp(-np.abs(v))
    return small / (1 + small) ** 2


def _slope_of_tanh(v: Array) -> Array:
    return 4 * _slope_of_sigmoid(2 * v)


Function = Callable[[Array], Array]
# f, its slope, and f(v) + f(−v)
FUNCTIONS: dict[str, tuple[Function, Function, float]] = {
    "sigmoid": (_sigmoid, _slope_of_sigmoid, 1.0),
    "tanh": (np.tanh, _slope_of_tanh, 0.0),
}


def image(name: str, low: Array, high: Array) -> tuple[Array, Array]:
    """The range over [low, high]."""
    f = FUNCTIONS[name][0]
    return f(low) - ERROR, f(high) + ERROR


def lines(name: str, low: Array, high: Array) -> tuple[Array, Array, Array, Array]:
    """Slope and offset of a line below and of one above f on [low, high].

    The line above touches where that helps; its offset is right for any slope. The one below is that above the mirrored
    function −f(−v), mirrored.
    """
    above, over = _above(name, low, high, 0.0)
    below, under = _above(name, -high, -low, FUNCTIONS[name][2])
    return below, -under, above, over


def _above(name: str, low: Array, high: Array, shift: float) -> tuple[Array, Array]:
    """Slope and offset of a line above f − shift."""
    base, slope_of, _ = FUNCTIONS[name]
    slope = _good_slope(base, slope_of, low, high)
    # for v <= 0 the difference f − slope·v is convex, so largest at an end; for v >= 0 it is below its tangents
    ends = [base(v) - slope * v for v in (low, np.minimum(high, 0), high)]
    ends[1] = np.where(low < 0, ends[1], ends[0])
    first, last = np.maximum(low, 0), np.maximum(high, 0)
    touch = np.clip(_where_slope(slope_of, slope, high), first, last)
    turn = slope_of(touch) - slope
    margin = ERROR * (1 + np.abs(slope) * np.maximum(np.abs(low), np.abs(high)))
    tangent = (
        base(touch) - slope * touch + np.maximum(turn * (first - touch), turn * (last - touch))
    )
    tangent = tangent + ERROR * (last - first)
    offset = np.maximum(np.maximum(ends[0], ends[1]), np.where(high > 0, tangent, ends[2]))
    return slope, offset - shift + 4 * margin


def _good_slope(f: Function, slope_of: Function, low: Array, high: Array) -> Array:
    """The chord's where f is convex; else the tangent's at the middle, or through (low, f(low))."""
    wide = high > low
    chord = np.where(wide, (f(high) - f(low)) / np.where(wide, high - low, 1), slope_of(low))
    left, right = np.zeros_like(low), np.maximum(high, 0)
    for _ in range(HALVINGS):
        middle = (left + right) / 2
        short = slope_of(middle) * (middle - low) > f(middle) - f(low)
        left, right = np.where(short, middle, left), np.where(short, right, middle)
    reached = slope_of(high) * (high - low) <= f(high) - f(low)
    through = np.where(reached, slope_of(right), chord)
    slope = np.where(low >= 0, slope_of(low / 2 + high / 2), np.where(high <= 0, chord, through))
    return np.clip(slope, 0, 1)


def _where_slope(slope_of: Function, slope: Array, high: Array) -> Array:
    """About where f has this slope, above 0."""
    left, right = np.zeros_like(slope), np.maximum(high, 0)
    for _ in range(4 * HALVINGS):
        middle = (left + right) / 2
        steep = slope_of(middle) > slope
        left, right = np.where(steep, middle, left), np.where(steep, right, middle)
    return (left + right) / 2
