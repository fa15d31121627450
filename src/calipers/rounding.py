"""Numbers rounded in a chosen direction: exact rationals, the floats around them, and sums that never cross."""

from __future__ import annotations

import math
import re
from fractions import Fraction
from typing import NamedTuple

import torch
from torch import Tensor

Number = float | int | str | Fraction
_NUMBER = re.compile(r"[+-]?\d{1,40}(\.\d{0,60})?([eE][+-]?\d{1,3})?(/\d{1,40})?")


class Interval(NamedTuple):
    """Two tensors of one shape, lower <= upper elementwise."""

    lower: Tensor
    upper: Tensor


def exact(value: Number) -> Fraction:
    """The exact rational that ``value`` denotes: ``"0.1"`` is 1/10, ``"8/255"`` is 8/255, a float its binary value.

    Raises:
        ValueError: not a finite number, or a string that is not a plain decimal or ratio.
    """
    if isinstance(value, str):
        if not _NUMBER.fullmatch(value.strip()):
            raise ValueError(
                f"number: cannot read {value[:80]!r}; write a decimal or a ratio such as 8/255"
            )
        numerator, _, denominator = value.strip().partition("/")
        if denominator and int(denominator) == 0:
            raise ValueError(f"number: {value!r} divides by zero")
        return Fraction(numerator) / Fraction(denominator or "1")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"number: {value!r} is not finite")
    return Fraction(value)


def enclose(value: Number | Tensor, name: str) -> Interval:
    """The tightest float64 numbers around ``value``; a tensor's entries are exact already."""
    if isinstance(value, Tensor):
        if torch.isnan(value).any():
            raise ValueError(f"{name}: contains NaN")
        double = value.to(torch.float64)
        return Interval(double, double)
    if isinstance(value, float) and math.isinf(value):
        bound = torch.tensor(value, dtype=torch.float64)
        return Interval(bound, bound)
    try:
        fraction = exact(value)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    try:
        nearest = float(fraction)
    except OverflowError:
        raise ValueError(f"{name}: {value!r} exceeds the largest float64") from None
    below = nearest if Fraction(nearest) <= fraction else math.nextafter(nearest, -math.inf)
    above = nearest if Fraction(nearest) >= fraction else math.nextafter(nearest, math.inf)
    return Interval(
        torch.tensor(below, dtype=torch.float64), torch.tensor(above, dtype=torch.float64)
    )


def step(value: Tensor, towards: float, where: Tensor) -> Tensor:
    """``value``, moved to its neighbour where asked; differentiable as the identity."""
    fixed = value.detach()
    neighbour = torch.nextafter(fixed, torch.full_like(fixed, towards))
    move = torch.where(where & torch.isfinite(fixed), neighbour - fixed, torch.zeros_like(fixed))
    return value + move


def add(a: Tensor, b: Tensor, towards: float) -> Tensor:
    """a + b in float64, rounded towards ``towards`` (±inf) exactly, by the error term of the sum."""
    total = a + b
    with torch.no_grad():
        part = total - a
        error = (a - (total - part)) + (b - part)
        off = error < 0 if towards < 0 else error > 0
    return step(total, towards, off & torch.isfinite(error))


def cast(value: Tensor, dtype: torch.dtype, towards: float) -> Tensor:
    """A float64 tensor in ``dtype``, rounded towards ±inf."""
    if dtype == value.dtype:
        return value
    rounded = value.to(dtype)
    with torch.no_grad():
        back = rounded.to(value.dtype)
        off = back > value if towards < 0 else back < value
        overflow = off & torch.isinf(rounded)  # a finite value beyond the dtype's range
    largest = math.copysign(torch.finfo(dtype).max, -towards)
    return torch.where(overflow, largest, step(rounded, towards, off))
