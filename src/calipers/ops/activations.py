"""Elementwise functions: exact ranges, sound lines, pieces."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from calipers.ops.kinds import Activation, Lines, Pieces, Tuned
from calipers.sets import Interval


def _chord(f: Callable[[Tensor], Tensor], x: Interval, flat: Tensor) -> tuple[Tensor, Tensor]:
    """Slope and offset of the line through both ends; ``flat`` is the slope where the interval is a point."""
    width = x.upper - x.lower
    low = f(x.lower)
    slope = torch.where(width > 0, (f(x.upper) - low) / torch.where(width > 0, width, 1.0), flat)
    return slope, low - slope * x.lower


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
        choice = (x.upper > -x.lower).to(x.lower.dtype)
        return choice, choice

    return Tuned(lines, start)


def _leaky_tuned() -> Tuned:
    def lines(x: Interval, lower: Tensor, upper: Tensor, slope: float = 0.01) -> Lines:
        return _kink_tuned(slope, 1.0).lines(x, lower, upper)

    return Tuned(lines, lambda x, *_: _kink_tuned(0.0, 1.0).start(x))


def _one_sided(x: Interval, *_: Any) -> Tensor:
    return (x.lower >= 0) | (x.upper <= 0)


def _relu_relax(x: Interval) -> Lines:
    """The chord above; below, slope 1 where u > −l and 0 elsewhere. Stable neurons fall out as 1 or 0."""
    l, u = x
    down = -l
    below, above = down.clamp_min(0.0), u.clamp_min(0.0)
    slope = above / (above + below).clamp_min(torch.finfo(l.dtype).tiny)
    return Lines((u > down).to(l.dtype), torch.zeros_like(l), slope, slope * below)


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


def _clamp_relax(x: Interval, low: Any = None, high: Any = None) -> Lines:
    """Each side has two candidate lines (a constant and one through a corner); the one with less area is taken."""
    a, b = _limits(low, high)
    l, u = x

    def f(z: Tensor) -> Tensor:
        return z.clamp(a, b)

    fl, fu = f(l), f(u)
    inner = ((l >= a) & (u <= b)).to(l.dtype)
    slope, offset = _chord(f, x, inner)
    zero = torch.zeros_like(l)
    # upper side: the constant f(u), or the line from (l, f(l)) to the corner (b, b) if that comes before u
    corner = torch.where(u > b, b if math.isfinite(b) else 0.0, u)
    rise = corner - l
    up_slope = torch.where(
        u > b, torch.where(rise > 0, (corner - fl) / torch.where(rise > 0, rise, 1.0), zero), slope
    )
    up_slope = torch.where((u > b) & (up_slope * (u - l) > 2 * (fu - fl)), zero, up_slope)
    up_offset = torch.where(u > b, fu - up_slope * corner, offset)
    # lower side: the constant f(l), or the line from the corner (a, a) to (u, f(u))
    corner = torch.where(l < a, a if math.isfinite(a) else 0.0, l)
    rise = u - corner
    lo_slope = torch.where(
        l < a, torch.where(rise > 0, (fu - corner) / torch.where(rise > 0, rise, 1.0), zero), slope
    )
    lo_slope = torch.where((l < a) & (lo_slope * (u - l) > 2 * (fu - fl)), zero, lo_slope)
    lo_offset = torch.where(l < a, fl - lo_slope * corner, offset)
    constant = fl == fu
    return Lines(
        torch.where(constant, zero, lo_slope),
        torch.where(constant, fl, lo_offset),
        torch.where(constant, zero, up_slope),
        torch.where(constant, fu, up_offset),
    )


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


# -- S-shaped: convex left of 0, concave right of it, f(z) + f(-z) constant ---------------------------------


def _s_shaped(
    f: Callable[[Tensor], Tensor],
    slope_at: Callable[[Tensor], Tensor],
    bend_at: Callable[[Tensor], Tensor],
) -> Callable[[Interval], Lines]:
    """``slope_at`` and ``bend_at``: the first two derivatives."""

    def touching(l: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        """The smallest d >= 0 found whose tangent passes above (l, f(l)), and whether u is already before it."""
        with torch.no_grad():
            near, far = torch.zeros_like(l), u.clamp_min(0.0)
            fl = f(l)

            def above(d: Tensor) -> Tensor:
                return f(d) + slope_at(d) * (l - d) >= fl

            chord = (u <= 0) | ~above(far)
            for _ in range(40):
                middle = (near + far) / 2
                ok = above(middle)
                near, far = torch.where(ok, near, middle), torch.where(ok, middle, far)
        if l.requires_grad and torch.is_grad_enabled():
            # the derivative of d by the implicit function theorem; the value stays as it is
            residual = f(far) + slope_at(far) * (l - far) - f(l)
            steep = (bend_at(far) * (l - far)).detach()
            far = far - torch.where(
                steep > 0, (residual - residual.detach()) / torch.where(steep > 0, steep, 1.0), 0.0
            )
        return far, chord

    def upper(l: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        """An upper line on [l, u] by its slope and a point where it meets f: the chord where f lies below it, else
        the tangent at a point d >= 0 that passes above (l, f(l)); any such tangent is an upper bound."""
        point, chord = touching(l, u)
        # a tangent point nearer the middle is tighter on average where both are sound
        middle = (l + u) / 2
        point = torch.where((l >= 0) | (middle > point), middle, point)
        steep, _ = _chord(f, Interval(l, u), slope_at(l))
        return torch.where(chord, steep, slope_at(point)), torch.where(chord, l, point)

    def relax(x: Interval) -> Lines:
        up_slope, up_at = upper(x.lower, x.upper)
        lo_slope, lo_at = upper(-x.upper, -x.lower)  # f(z) + f(-z) is constant
        lo_offset = f(-lo_at) + lo_slope * lo_at  # from f itself: near 0 it is far more accurate
        return Lines(lo_slope, lo_offset, up_slope, f(up_at) - up_slope * up_at)

    return relax


def _sigmoid_slope(z: Tensor) -> Tensor:
    s = torch.sigmoid(z)
    return s * torch.sigmoid(-z)


def _tanh_slope(z: Tensor) -> Tensor:
    return (
        1
        / torch.cosh(
            z.clamp(-350.0, 350.0) if z.dtype == torch.float64 else z.clamp(-44.0, 44.0)
        ).square()
    )


def _sigmoid_bend(z: Tensor) -> Tensor:
    return _sigmoid_slope(z) * (1 - 2 * torch.sigmoid(z))


def _tanh_bend(z: Tensor) -> Tensor:
    return -2 * torch.tanh(z) * _tanh_slope(z)


def _point(x: Interval) -> Tensor:
    return x.lower == x.upper


ACTIVATIONS: dict[Callable[..., Any], Activation] = {
    torch.relu: Activation(
        lambda x: Interval(x.lower.clamp_min(0), x.upper.clamp_min(0)),
        _relu_relax,
        _one_sided,
        lambda: Pieces((0.0,), (0.0, 1.0), 0.0),
        tuned=_kink_tuned(0.0, 1.0),
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
    ),
    torch.sigmoid: Activation(
        _monotone(torch.sigmoid),
        _s_shaped(torch.sigmoid, _sigmoid_slope, _sigmoid_bend),
        _point,
        ulps=16.0,
    ),
    torch.tanh: Activation(
        _monotone(torch.tanh), _s_shaped(torch.tanh, _tanh_slope, _tanh_bend), _point, ulps=16.0
    ),
}
