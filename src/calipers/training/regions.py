"""Regions of a training step: one pass over the batch where `ThreatModel.around` takes twenty in float64."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction

import torch
from torch import Tensor

from calipers.rounding import Number, exact
from calipers.sets import Frame, Interval, Region, ThreatModel


def radius(threat: ThreatModel) -> float:
    """``eps`` as a float, the largest of a tensor's; infinite where only the box limits."""
    eps = threat.eps
    if isinstance(eps, Tensor):
        return float(eps.max())
    return eps if isinstance(eps, float) else float(exact(eps))


def scaled(threat: ThreatModel, factor: float) -> ThreatModel:
    """The same set at ``factor`` times the radius."""
    if factor == 1:
        return threat
    eps: Number | Tensor = threat.eps
    new = eps * factor if isinstance(eps, (Tensor, float)) else exact(eps) * Fraction(factor)
    return replace(threat, eps=new)


def around(threat: ThreatModel, x: Tensor) -> Region:
    """The regions around ``x`` (B, *x), which must lie in the domain: every member of them is one of ``threat``'s.

    For linf they are boxes in the dtype of ``x`` whose radius is smaller by a few units in the last place, so that no
    rounding leads out; bounds over them are for training, never for a verdict. Other sets are `ThreatModel.around`'s.
    """
    low, high = (_inside(end, x, way) for end, way in ((threat.lower, 1), (threat.upper, -1)))
    plain = threat.p == math.inf and threat.grid is None and threat.mask is None
    if not plain or isinstance(threat.eps, Tensor) or low is None or high is None:
        return threat.around(x)
    eps = radius(threat)
    if not math.isfinite(eps):
        return threat.around(x)
    bounded = math.isfinite(low) and math.isfinite(high)
    size = max(abs(low), abs(high)) if bounded else float(x.abs().amax())
    eps = max(0.0, eps - 2 * torch.finfo(x.dtype).eps * (size + eps))
    return box((x - eps).clamp_min(low), (x + eps).clamp_max(high), x, eps)


def _inside(bound: Number | Tensor, x: Tensor, way: int) -> float | None:
    """A domain's bound in the dtype of ``x``, rounded inwards (up for ``way`` 1), infinite where there is none; None
    for a tensor."""
    if isinstance(bound, Tensor):
        return None
    if isinstance(bound, float) and math.isinf(bound):
        return bound
    value = exact(bound)
    near = torch.tensor(float(value), dtype=x.dtype)
    if (Fraction(float(near)) - value) * way < 0:
        near = torch.nextafter(near, torch.tensor(way * math.inf, dtype=x.dtype))
    return float(near)


def box(
    lower: Tensor, upper: Tensor, center: Tensor | None = None, eps: float = math.inf
) -> Region:
    """The boxes [lower, upper] (B, *x), unchecked, with what bounds and attacks ask of them at hand."""
    middle = torch.add(lower, upper).mul_(0.5)
    half = torch.sub(upper, lower).mul_(0.5)
    radii = lower.new_full((len(lower),), eps)
    hull = Interval(lower, upper)
    return Region(
        middle if center is None else center,
        radii, math.inf, lower, upper, radii, lower, upper,
        _cache={lower.dtype: hull, ("frame", lower.dtype): Frame(middle, half, half, hull, True)},
    )  # fmt: skip
