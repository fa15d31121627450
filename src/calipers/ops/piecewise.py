"""Piecewise linear functions, and steps: exact ranges, sound lines, pieces."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from calipers.graph import primitives as prim
from calipers.ops.kinds import Activation, Lines, Pieces, Tuned
from calipers.ops.smooth import chord
from calipers.sets import Interval


def _monotone(f: Callable[..., Tensor]) -> Callable[..., Interval]:
    return lambda x, *args: Interval(f(x.lower, *args), f(x.upper, *args))


# -- one kink: max(a·z, z) or min(a·z, z), relu, |z| ----------------------------------------------------


def _kink(x: Interval, left: float, right: float) -> Lines:
    """Lines for f(z) = left·z (z < 0), right·z (z >= 0): the chord on the far side, and through the
    origin the slope of whichever end is further away (CROWN's adaptive choice)."""
    l, u = x
    below, above = l.clamp(max=0.0), u.clamp(min=0.0)
    crossing = (l < 0) & (u > 0)
    width = torch.where(crossing, above - below, 1.0)
    slope = (right * above - left * below) / width
    offset = below * (left - slope)  # the chord meets (l, left·l)
    # tensors, because torch.where of two numbers rounds them to the default dtype
    slope_left, slope_right = l.new_tensor(left), l.new_tensor(right)
    one_side = torch.where(l >= 0, slope_right, slope_left)
    tangent = torch.where(u > -l, slope_right, slope_left)
    zero = torch.zeros_like(l)
    chord_slope = torch.where(crossing, slope, one_side)
    chord_offset = torch.where(crossing, offset, zero)
    tangent_slope = torch.where(crossing, tangent, one_side)
    if right >= left:  # convex
        return Lines(tangent_slope, zero, chord_slope, chord_offset)
    return Lines(chord_slope, chord_offset, tangent_slope, zero)


def _kink_tuned(left: float, right: float) -> Tuned:
    """The line through the origin may have any slope between the two sides' (left at 0, right at 1)."""

    def lines(x: Interval, lower: Tensor, upper: Tensor) -> Lines:
        known = _kink(x, left, right)
        crossing = (x.lower < 0) & (x.upper > 0)
        if right >= left:
            slope = torch.where(crossing, left + (right - left) * lower, known.lower_slope)
            return known._replace(lower_slope=slope)
        slope = torch.where(crossing, left + (right - left) * upper, known.upper_slope)
        return known._replace(upper_slope=slope)

    def start(x: Interval) -> tuple[Tensor, Tensor]:
        choice = _number(torch.gt, x.upper, -x.lower)
        return choice, choice

    return Tuned(lines, start, affine=True)


def _leaky_tuned() -> Tuned:
    def lines(x: Interval, lower: Tensor, upper: Tensor, slope: float = 0.01) -> Lines:
        return _kink_tuned(slope, 1.0).lines(x, lower, upper)

    return Tuned(lines, lambda x, *_: _kink_tuned(0.0, 1.0).start(x), affine=True)


def _one_sided(x: Interval, *_: Any) -> Tensor:
    return (x.lower >= 0) | (x.upper <= 0)


def _relu_relax(x: Interval) -> Lines:
    """The chord above; below, slope 1 where u > −l and 0 elsewhere. Stable neurons fall out as 1 or 0."""
    l, u = x
    down = -l
    below, above = down.clamp_min(0.0), u.clamp_min(0.0)
    slope = above / (above + below).clamp_min(torch.finfo(l.dtype).tiny)
    return Lines(_number(torch.gt, u, down), torch.zeros_like(l), slope, slope * below)


def _number(compare: Callable[..., Tensor], a: Tensor, b: Tensor | float) -> Tensor:
    """1 where it holds, 0 elsewhere, written as numbers: to convert truth values takes several times as long."""
    a, b = a.detach(), b.detach() if isinstance(b, Tensor) else b
    return compare(a, b, out=torch.empty_like(a))


def _relu_lines(x: Interval, lower: Tensor, _upper: Tensor) -> Lines:
    """`_kink_tuned` for a relu, in fewer operations."""
    l, u = x
    known = _relu_relax(x)
    active, alive = _number(torch.ge, l, 0.0), _number(torch.gt, u, 0.0)
    return known._replace(lower_slope=lower.clamp(active, alive))


def _leaky_image(x: Interval, slope: float = 0.01) -> Interval:
    low, high = F.leaky_relu(x.lower, slope), F.leaky_relu(x.upper, slope)
    if slope >= 0:
        return Interval(low, high)
    spans = (x.lower <= 0) & (x.upper >= 0)
    return Interval(torch.where(spans, 0.0, torch.minimum(low, high)), torch.maximum(low, high))


def _abs_image(x: Interval) -> Interval:
    low, high = x.lower.abs(), x.upper.abs()
    spans = (x.lower <= 0) & (x.upper >= 0)
    return Interval(torch.where(spans, 0.0, torch.minimum(low, high)), torch.maximum(low, high))


# -- clamp: two kinks -----------------------------------------------------------------------------------


def _limits(low: Any, high: Any) -> tuple[float, float]:
    return -math.inf if low is None else float(low), math.inf if high is None else float(high)


def _clamp_steepest(
    x: Interval, a: float, b: float
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The steepest sound line of the lower and of the upper side, by slope and a point where it meets the function.

    Beyond a limit that is the line through the limit's corner and the other end, and every flatter one through the
    corner down to the constant is sound too; elsewhere the chord.
    """
    l, u = x
    fl, fu = l.clamp(a, b), u.clamp(a, b)
    slope, _ = chord(lambda z: z.clamp(a, b), x, ((l >= a) & (u <= b)).to(l.dtype))

    def through(rise: Tensor, height: Tensor, beyond: Tensor) -> Tensor:
        steep = torch.where(rise > 0, height / torch.where(rise > 0, rise, 1.0), 0.0)
        return torch.where(beyond, steep, slope)

    low_at = torch.where(l < a, a if math.isfinite(a) else 0.0, l)
    high_at = torch.where(u > b, b if math.isfinite(b) else 0.0, u)
    low = through(u - low_at, fu - low_at, l < a)
    high = through(high_at - l, high_at - fl, u > b)
    return (low, low_at), (high, high_at)


def _clamp_lines(
    x: Interval, lower: Tensor, upper: Tensor, low: Any = None, high: Any = None
) -> Lines:
    """Lines through the corners, ``lower`` and ``upper`` times as steep as they may be."""
    a, b = _limits(low, high)
    l, u = x
    fl, fu = l.clamp(a, b), u.clamp(a, b)
    (low_slope, low_at), (high_slope, high_at) = _clamp_steepest(x, a, b)
    low_slope = torch.where(l < a, lower * low_slope, low_slope)
    high_slope = torch.where(u > b, upper * high_slope, high_slope)
    constant, zero = fl == fu, torch.zeros_like(l)
    return Lines(
        torch.where(constant, zero, low_slope),
        torch.where(constant, fl, low_at.clamp(a, b) - low_slope * low_at),
        torch.where(constant, zero, high_slope),
        torch.where(constant, fu, high_at.clamp(a, b) - high_slope * high_at),
    )


def _clamp_start(x: Interval, low: Any = None, high: Any = None) -> tuple[Tensor, Tensor]:
    """On each side the steepest line or the constant, whichever leaves less area."""
    a, b = _limits(low, high)
    l, u = x
    rise = 2 * (u.clamp(a, b) - l.clamp(a, b))
    (low_slope, _), (high_slope, _) = _clamp_steepest(x, a, b)
    return tuple((s * (u - l) <= rise).to(l.dtype) for s in (low_slope, high_slope))  # type: ignore[return-value]


def _clamp_relax(x: Interval, low: Any = None, high: Any = None) -> Lines:
    return _clamp_lines(x, *_clamp_start(x, low, high), low, high)


def _clamp_linear(x: Interval, low: Any = None, high: Any = None) -> Tensor:
    a, b = _limits(low, high)
    return (x.upper <= a) | (x.lower >= b) | ((x.lower >= a) & (x.upper <= b))


def _clamp_pieces(low: Any = None, high: Any = None) -> Pieces:
    points = tuple(p for p in _limits(low, high) if math.isfinite(p))
    if not points:
        return Pieces((0.0,), (1.0, 1.0), 0.0)
    slopes = (
        (0.0, 1.0, 0.0) if len(points) == 2 else ((0.0, 1.0) if low is not None else (1.0, 0.0))
    )
    return Pieces(points, slopes, points[0])


# -- steps ------------------------------------------------------------------------------------------------


def _jump(f: Callable[..., Tensor]) -> tuple[Callable[..., Lines], Tuned]:
    """Lines for a step at 0: constants, or lines that turn about the step's far corner, up to the far end."""

    def lines(x: Interval, lower: Tensor, upper: Tensor, *args: Any) -> Lines:
        first, last = f(x.lower, *args), f(x.upper, *args)
        rise = last - first
        least = (x.upper - x.lower) * 1e-6  # a slope may be less than it could be
        right = torch.where(rise > 0, torch.maximum(x.upper, least), 1.0)
        left = torch.where(rise > 0, torch.maximum(-x.lower, least), 1.0)
        return Lines(lower * rise / right, first, upper * rise / left, last)

    def start(x: Interval, *_: Any) -> tuple[Tensor, Tensor]:
        right = _number(torch.gt, x.upper, -x.lower)
        return right, 1 - right

    return lambda x, *args: lines(x, *start(x), *args), Tuned(lines, start)


def _step(f: Callable[..., Tensor]) -> Activation:
    relax, tuned = _jump(f)
    return Activation(_monotone(f), relax, _steady(f), tuned=tuned)


def _steady(f: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda x, *args: f(x.lower, *args) == f(x.upper, *args)


def _staircase(f: Callable[[Tensor], Tensor], below: float, above: float) -> Activation:
    """A function between z − below and z + above: its range where that is narrower."""

    def relax(x: Interval) -> Lines:
        low, high = f(x.lower), f(x.upper)
        wide = high - low > below + above
        slope = wide.to(low.dtype)
        return Lines(slope, torch.where(wide, -below, low), slope, torch.where(wide, above, high))

    return Activation(_monotone(f), relax, _steady(f))


def monotone(f: Callable[..., Tensor], *, ulps: float = 16.0) -> Activation:
    """An entry for any nondecreasing function: its range, and constant lines. Good enough to be sound."""

    def relax(x: Interval, *args: Any) -> Lines:
        flat = torch.zeros_like(x.lower)
        return Lines(flat, f(x.lower, *args), flat, f(x.upper, *args))

    return Activation(_monotone(f), relax, lambda x, *_: x.lower == x.upper, ulps=ulps)


PIECEWISE: dict[Callable[..., Any], Activation] = {
    torch.relu: Activation(
        lambda x: Interval(torch.relu(x.lower), torch.relu(x.upper)),
        _relu_relax,
        _one_sided,
        lambda: Pieces((0.0,), (0.0, 1.0), 0.0),
        tuned=Tuned(_relu_lines, _kink_tuned(0.0, 1.0).start, affine=True),
    ),
    F.leaky_relu: Activation(
        _leaky_image,
        lambda x, slope=0.01: _kink(x, slope, 1.0),
        _one_sided,
        lambda slope=0.01: Pieces((0.0,), (slope, 1.0), 0.0),
        ulps=1.0,
        tuned=_leaky_tuned(),
    ),
    torch.abs: Activation(
        _abs_image,
        lambda x: _kink(x, -1.0, 1.0),
        _one_sided,
        lambda: Pieces((0.0,), (-1.0, 1.0), 0.0),
        tuned=_kink_tuned(-1.0, 1.0),
    ),
    torch.clamp: Activation(
        _monotone(torch.clamp),
        _clamp_relax,
        _clamp_linear,
        _clamp_pieces,
        ulps=1.0,  # its limits are rounded to the dtype
        tuned=Tuned(_clamp_lines, _clamp_start),
    ),
    torch.sign: _step(torch.sign),
    prim.step: _step(prim.step),
    torch.round: _staircase(torch.round, 0.5, 0.5),
    torch.floor: _staircase(torch.floor, 1.0, 0.0),
    torch.ceil: _staircase(torch.ceil, 0.0, 1.0),
}
