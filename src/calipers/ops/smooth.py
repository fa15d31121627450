"""Curved functions: ranges, sound lines and lines to optimise, all derived from a function's shape.

A `Curve` says where f bends which way. On a convex stretch f less a line is largest at its ends; on a concave one a
tangent lies above f everywhere. So an upper line on [l, u] is a tangent at a point d of a concave stretch, if it passes
above both ends, or else the chord. The points d that do so form one interval, found by bisection, since the tangent's
height at l grows with d and its height at u falls. Lower lines are the upper ones of −f.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from calipers.ops.kinds import Activation, Lines, Tuned
from calipers.sets import Interval

Function = Callable[[Tensor], Tensor]
Stretch = tuple[Any, Any]  # numbers, or one per neuron
STEPS = (28, 40)  # of a bisection in single and in double precision
FAR = 8192.0  # from there on the place within a period of a sine is not known well enough


@dataclass(frozen=True)
class Curve:
    """A continuous function by its shape.

    Two concave stretches are allowed if no slope on the left one exceeds one on the right one; likewise two convex
    ones with no slope on the left below one on the right: then a line that is above (below) at the ends
    and touches one stretch is so on the other.

    Args:
        slope: the derivative; at a kink the one of the stretch that holds the point.
        concave, convex: closed stretches that together cover the domain; functions of the interval where they repeat.
        turns: where f has an extremum; a function of the interval to range where they repeat.
        domain: ends of where f is defined, which need not belong to it.
        hole: a point where f is not defined.
        wide: lines for intervals of the width ``widest`` or more, which hold more than these stretches.
    """

    f: Function
    slope: Function
    concave: tuple[Stretch, ...] | Callable[[Interval], tuple[Stretch, ...]] = ()
    convex: tuple[Stretch, ...] | Callable[[Interval], tuple[Stretch, ...]] = ()
    turns: tuple[float, ...] | Callable[[Interval], Interval] = ()
    domain: tuple[float, float] = (-math.inf, math.inf)
    hole: float | None = None
    widest: float = math.inf
    wide: Callable[[Interval, Tensor, Tensor], list[Tensor]] | None = None

    @property
    def everywhere(self) -> bool:
        return self.domain == (-math.inf, math.inf) and self.hole is None


class _Touching(NamedTuple):
    """Where tangents are sound: at the points from ``first`` to ``last`` if ``found``; otherwise the chord is."""

    found: Tensor
    first: Tensor
    last: Tensor


def chord(f: Function, x: Interval, flat: Tensor) -> tuple[Tensor, Tensor]:
    """Slope and offset of the line through both ends; ``flat`` is the slope where the interval is a point."""
    width = x.upper - x.lower
    low = f(x.lower)
    slope = torch.where(width > 0, (f(x.upper) - low) / torch.where(width > 0, width, 1.0), flat)
    return slope, low - slope * x.lower


def undefined(curve: Curve, x: Interval) -> Tensor:
    """Whether the interval leaves the function's domain (or is NaN): nothing is known of its values then."""
    outside = ~((x.lower >= curve.domain[0]) & (x.upper <= curve.domain[1]))
    return (
        outside
        if curve.hole is None
        else outside | ((x.lower <= curve.hole) & (x.upper >= curve.hole))
    )


def image(curve: Curve, x: Interval) -> Interval:
    """The exact range; everything where the interval leaves the domain."""
    if callable(curve.turns):
        return curve.turns(x)
    l, u = x
    first, last = curve.f(l), curve.f(u)
    low, high = torch.minimum(first, last), torch.maximum(first, last)
    for turn in curve.turns:
        value = curve.f(l.new_tensor(turn))
        inside = (l < turn) & (u > turn)
        low = torch.where(inside, torch.minimum(low, value), low)
        high = torch.where(inside, torch.maximum(high, value), high)
    if curve.everywhere:
        return Interval(low, high)
    lost = undefined(curve, x)
    return Interval(torch.where(lost, -math.inf, low), torch.where(lost, math.inf, high))


def steepest(curve: Curve, x: Interval) -> Tensor:
    """The largest |f'| on the interval: it lies at an end or where two stretches meet."""
    if callable(curve.concave) or callable(curve.convex):
        return torch.ones_like(x.lower)  # sine and cosine
    ends = {e for piece in (*curve.concave, *curve.convex) for e in piece if math.isfinite(e)}
    points = [x.lower, x.upper, *(x.lower.clamp_min(e).minimum(x.upper) for e in sorted(ends))]
    slopes = torch.stack([curve.slope(p).abs() for p in points]).amax(0)
    return torch.where(undefined(curve, x), math.inf, slopes)


def _bisected(f: Function, slope: Function, near: Tensor, far: Tensor, end: Tensor) -> Tensor:
    """A point whose tangent passes above (end, f(end)), as that at ``far`` does, next to ones that do not."""
    value = f(end)
    for _ in range(STEPS[end.dtype.itemsize > 4]):
        middle = (near + far) / 2
        good = f(middle) + slope(middle) * (end - middle) >= value
        near, far = torch.where(good, near, middle), torch.where(good, middle, far)
    return far


def _touch(
    f: Function, slope: Function, near: Tensor, far: Tensor, end: Tensor, wanted: Tensor
) -> tuple[Tensor, Tensor]:
    """The point nearest to ``near``, on the way from there to ``far``, whose tangent passes above (end, f(end)), and
    whether there is one; where it is ``wanted``."""
    with torch.no_grad():
        at_once = f(near) + slope(near) * (end - near) >= f(end)
        known = f(far) + slope(far) * (end - far) >= f(end)
        needed = wanted & known & ~at_once
        point = far.clone()
        if bool(needed.any()):
            point[needed] = _bisected(f, slope, near[needed], far[needed], end[needed])
    if not (end.requires_grad and torch.is_grad_enabled()):
        return torch.where(at_once, near, point), at_once | known
    # the derivative of the point by the implicit function theorem; its value stays as it is
    with torch.enable_grad():
        probe = point.detach().requires_grad_()
        (bend,) = torch.autograd.grad(slope(probe).sum(), probe)
    point = point.detach()
    residual = f(point) + slope(point) * (end - point) - f(end)
    steep = (bend * (end - point)).detach()
    change = (residual - residual.detach()) / torch.where(steep != 0, steep, 1.0)
    point = point - torch.where(steep != 0, change, 0.0)
    return torch.where(at_once, near, point), at_once | known


def _tangents(
    f: Function, slope: Function, stretches: tuple[Stretch, ...], x: Interval
) -> _Touching:
    """The sound tangents from above."""
    l, u = x
    known = _Touching(torch.zeros_like(l, dtype=torch.bool), l, u)
    for start, stop in stretches:
        first = torch.maximum(l, torch.as_tensor(start, dtype=l.dtype, device=l.device))
        last = torch.minimum(u, torch.as_tensor(stop, dtype=l.dtype, device=l.device))
        found = first <= last
        first, last = torch.minimum(first, u), torch.maximum(last, l)
        low, high = first, last
        if isinstance(start, Tensor) or math.isfinite(start):
            low, good = _touch(f, slope, first, last, l, found)
            found = found & good
        if isinstance(stop, Tensor) or math.isfinite(stop):
            high, good = _touch(f, slope, last, first, u, found)
            found = found & good
        found = found & (low <= high)
        known = _Touching(
            known.found | found,
            torch.where(found, low, known.first),
            torch.where(found, high, known.last),
        )
    return known


def _sides(curve: Curve, x: Interval) -> tuple[_Touching, _Touching]:
    """The tangents below and above."""
    concave = curve.concave(x) if callable(curve.concave) else curve.concave
    convex = curve.convex(x) if callable(curve.convex) else curve.convex
    below = _tangents(lambda z: -curve.f(z), lambda z: -curve.slope(z), convex, x)
    return below, _tangents(curve.f, curve.slope, concave, x)


def _start(curve: Curve, side: _Touching, x: Interval) -> Tensor:
    """The share of the way at which the tangent point is nearest to the middle: tighter on average."""
    reach = side.last - side.first
    middle = x.lower + (x.upper - x.lower) / 2
    share = (middle - side.first) / torch.where(reach > 0, reach, 1.0)
    share = torch.where(reach > 0, share, 0.0).clamp(0.0, 1.0)
    return torch.where(x.upper - x.lower < curve.widest, share, 0.5)


def _lines(
    curve: Curve, x: Interval, sides: tuple[_Touching, _Touching], lower: Tensor, upper: Tensor
) -> Lines:
    l, u = x
    steep, _ = chord(curve.f, x, curve.slope(l))
    ends = []
    for side, share in zip(sides, (lower, upper), strict=True):
        point = torch.where(side.found, torch.lerp(side.first, side.last, share), l)
        if math.isfinite(curve.domain[0]):  # the slope may be infinite at the edge
            inside = torch.maximum(point, l + (u - l) / 256)
            point = torch.where(side.found, inside, point)
        slope = torch.where(side.found, curve.slope(point), steep)
        ends += [slope, curve.f(point) - slope * point]
    if curve.wide is not None and bool((wide := u - l >= curve.widest).any()):
        others = curve.wide(x, lower, upper)
        ends = [torch.where(wide, w, e) for w, e in zip(others, ends, strict=True)]
    good = torch.isfinite(ends[0] + ends[1] + ends[2] + ends[3])
    if not curve.everywhere:
        good = good & ~undefined(curve, x)
    if math.isfinite(curve.widest):
        good = good & _near(x)
    return Lines(*(ends if bool(good.all()) else _constant(curve, x, ends, good)))


def _constant(curve: Curve, x: Interval, ends: list[Tensor], good: Tensor) -> list[Tensor]:
    """The range where ``good`` does not hold."""
    low, high = image(curve, x)
    flat = torch.zeros_like(x.lower)
    return [torch.where(good, e, c) for e, c in zip(ends, (flat, low, flat, high), strict=True)]


def activation(
    curve_of: Callable[..., Curve],
    *,
    ulps: float,
    linear: Callable[..., Tensor] | None = None,
    relative: bool = True,
) -> Activation:
    """The entry of the op table for ``curve_of(*args)``.

    Args:
        relative: whether the op itself, as networks run it, has a small relative error.
    """

    def relax(x: Interval, *args: Any) -> Lines:
        curve = curve_of(*args)
        sides = _sides(curve, x)
        return _lines(curve, x, sides, *(_start(curve, side, x) for side in sides))

    def lines(x: Interval, lower: Tensor, upper: Tensor, *args: Any) -> Lines:
        curve = curve_of(*args)
        return _lines(curve, x, _sides(curve, x), lower, upper)

    def start(x: Interval, *args: Any) -> tuple[Tensor, Tensor]:
        curve = curve_of(*args)
        below, above = _sides(curve, x)
        return _start(curve, below, x), _start(curve, above, x)

    def point(x: Interval, *args: Any) -> Tensor:
        same = x.lower == x.upper
        return same & _near(x) if math.isfinite(curve_of(*args).widest) else same

    return Activation(
        lambda x, *args: image(curve_of(*args), x),
        relax,
        linear or point,
        ulps=ulps,
        tuned=Tuned(lines, start),
        steepest=(lambda x, *args: steepest(curve_of(*args), x)) if relative else None,
    )


# -- functions that repeat ---------------------------------------------------------------------------------


def _near(x: Interval) -> Tensor:
    return torch.maximum(x.lower.abs(), x.upper.abs()) <= FAR


TURN = 2 * math.pi


def _crest_line(
    f: Function, slope: Function, peak: float, x: Interval, share: Tensor
) -> tuple[Tensor, Tensor]:
    """Slope and offset of a line above f(z) = cos(z − peak) on an interval of any width.

    For a slope m the largest f(z) − m·z lies at an end, or where f' = m on the first crest (on the last one if m < 0):
    so any slope has its exact offset. At ``share`` 1/2 it is that of the concave hull at the middle, whose line is
    the lowest on average; towards 0 and 1 it turns by one.
    """
    l, u = x
    middle = l + (u - l) / 2

    def crest(m: Tensor) -> Tensor:
        lean = peak - torch.asin(m)
        first = lean + TURN * torch.ceil((l - lean) / TURN)
        last = lean + TURN * torch.floor((u - lean) / TURN)
        return torch.minimum(torch.maximum(torch.where(m >= 0, first, last), l), u)

    with torch.no_grad():
        low, high = torch.full_like(l, -1.0), torch.ones_like(l)
        left, right = l.clone(), u.clone()  # where lines of too small and too large a slope touch
        for _ in range(STEPS[l.dtype.itemsize > 4]):
            m = (low + high) / 2
            points = torch.stack([l, crest(m), u])
            best = (f(points) - m * points).argmax(0, keepdim=True)
            point = points.gather(0, best)[0]
            after = point > middle
            low, high = torch.where(after, m, low), torch.where(after, high, m)
            left, right = torch.where(after, left, point), torch.where(after, point, right)
    # both points are ends, or touched by the line, so that its slope does not move with them
    left, right = torch.where(left <= l, l, left), torch.where(right >= u, u, right)
    apart = right - left > 1e-3
    span = torch.where(apart, right - left, 1.0)
    m = torch.where(apart, (f(right) - f(left)) / span, slope(middle))
    m = (m + (2 * share - 1)).clamp(-1.0, 1.0)
    point = crest(m.detach()).detach()
    inside = torch.where((point > l) & (point < u), f(point) - m * point, -math.inf)
    return m, torch.maximum(torch.maximum(f(l) - m * l, f(u) - m * u), inside)


def _wave(f: Function, slope: Function, peak: float) -> Curve:
    """A function of period 2π between −1 and 1, largest at ``peak`` and symmetric about it."""

    def stretch(x: Interval, middle: float) -> tuple[Stretch, ...]:
        center = middle + TURN * torch.round(((x.lower + x.upper) / 2 - middle) / TURN)
        return ((center - math.pi / 2, center + math.pi / 2),)

    def holds(x: Interval, at: float) -> Tensor:
        """Whether some at + 2πk lies in the interval, or within rounding of it."""
        eps = 4 * torch.finfo(x.lower.dtype).eps
        low, high = (x.lower - at) / TURN, (x.upper - at) / TURN
        return torch.ceil(low - eps * (1 + low.abs())) <= torch.floor(high + eps * (1 + high.abs()))

    def wide(x: Interval, lower: Tensor, upper: Tensor) -> list[Tensor]:
        below = _crest_line(lambda z: -f(z), lambda z: -slope(z), peak + math.pi, x, lower)
        return [-below[0], -below[1], *_crest_line(f, slope, peak, x, upper)]

    def turns(x: Interval) -> Interval:
        first, last = f(x.lower), f(x.upper)
        far = ~_near(x)
        low = torch.where(far | holds(x, peak + math.pi), -1.0, torch.minimum(first, last))
        return Interval(low, torch.where(far | holds(x, peak), 1.0, torch.maximum(first, last)))

    return Curve(
        f,
        slope,
        partial(stretch, middle=peak),
        partial(stretch, middle=peak + math.pi),
        turns,
        widest=math.pi,
        wide=wide,
    )


SINE = _wave(torch.sin, torch.cos, math.pi / 2)
COSINE = _wave(torch.cos, lambda z: -torch.sin(z), 0.0)
