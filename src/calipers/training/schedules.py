"""Values that change over a training, as functions of the epoch (a real number: step / steps per epoch).

A schedule is a frozen dataclass, so that it prints, pickles and compares; the state of a training is the step alone.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

Schedule = Callable[[float], float]


@dataclass(frozen=True)
class Piecewise:
    """Linear between ``points`` (epoch, value), constant before the first and after the last.

    At each given epoch the value is the given one, exactly. Two points at one epoch are a jump, taken at it.
    """

    points: tuple[tuple[float, float], ...]

    def __post_init__(self) -> None:
        if not self.points:
            raise ValueError("points: a schedule needs at least one (epoch, value)")
        if any(b[0] < a[0] for a, b in pairwise(self.points)):
            raise ValueError(f"points: epochs {[e for e, _ in self.points]} do not rise")

    def __call__(self, epoch: float) -> float:
        after = bisect_right(self.points, epoch, key=lambda point: point[0])
        if after == 0:
            return self.points[0][1]
        (start, first), rest = self.points[after - 1], self.points[after:]
        if not rest or epoch == start:
            return first
        end, last = rest[0]
        return first + (last - first) * (epoch - start) / (end - start)


@dataclass(frozen=True)
class Multistep:
    """``value``, multiplied by ``factor`` at each epoch of ``at``."""

    value: float
    at: tuple[float, ...]
    factor: float = 0.2

    def __call__(self, epoch: float) -> float:
        return self.value * self.factor ** sum(epoch >= e for e in self.at)


@dataclass(frozen=True)
class SmoothRamp:
    """0 up to epoch ``start``, ``value`` from epoch ``end`` on, and a smooth rise between.

        a·(t − start)^beta up to start + middle·(end − start), then a straight line

    with ``a`` such that value and slope are continuous. At the switch it is value·m/((1 − m)·beta + m).

    Reference: Gowal et al. 2018 (their published code); Shi et al. 2021.
    """

    value: float
    start: float
    end: float
    middle: float = 0.25
    beta: float = 4.0

    def __post_init__(self) -> None:
        if not self.end > self.start:
            raise ValueError(f"end: {self.end} is not after start: {self.start}")
        if not 0 < self.middle <= 1:
            raise ValueError(f"middle: {self.middle} is not in (0, 1]")

    def __call__(self, epoch: float) -> float:
        if epoch <= self.start:
            return 0.0
        if epoch >= self.end:
            return self.value
        at = (epoch - self.start) / (self.end - self.start)
        m, beta = self.middle, self.beta
        bend = self.value * m / ((1 - m) * beta + m)
        if at < m:
            return float(bend * (at / m) ** beta)
        return bend + (self.value - bend) * (at - m) / (1 - m)


def constant(value: float) -> Piecewise:
    """Always ``value``."""
    return Piecewise(((0.0, value),))


def linear(first: float, last: float, *, start: float = 0.0, end: float) -> Piecewise:
    """``first`` until epoch ``start``, ``last`` from epoch ``end`` on."""
    return Piecewise(((start, first), (end, last)))


def piecewise(*points: tuple[float, float]) -> Piecewise:
    """Linear between the points (epoch, value)."""
    return Piecewise(points)


def by_epoch(*values: float) -> Piecewise:
    """A value for each epoch, held until it ends; the last one stays."""
    points = [(0.0, values[0])]
    for epoch, (before, value) in enumerate(pairwise(values), 1):
        points += [(float(epoch), before), (float(epoch), value)]
    return Piecewise(tuple(points))


def cyclic(peak: float, *, epochs: float, at: float = 0.5, last: float = 0.0) -> Piecewise:
    """A triangle: from 0 up to ``peak`` at ``at``·``epochs``, then down to ``last``."""
    return Piecewise(((0.0, 0.0), (at * epochs, peak), (epochs, last)))


def one_cycle(
    peak: float, *, epochs: float, at: float = 0.25, first: float = 0.04, last: float = 0.0
) -> Piecewise:
    """From ``first``·``peak`` up to ``peak`` at ``at``·``epochs``, then down to ``last``·``peak``."""
    return Piecewise(((0.0, first * peak), (at * epochs, peak), (epochs, last * peak)))


def multistep(value: float, *at: float, factor: float = 0.2) -> Multistep:
    """``value``, multiplied by ``factor`` at each of the epochs ``at``."""
    return Multistep(value, at, factor)


def smooth_ramp(value: float, *, start: float = 0.0, end: float) -> SmoothRamp:
    """The smooth rise from 0 to ``value`` that interval training needs; see `SmoothRamp`."""
    return SmoothRamp(value, start, end)
