"""Boxes that cover a region: cut in halves, trimmed by linear bounds, kept in a frontier.

Corners are float64 and halves share them, so that a box is the union of its halves exactly.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Boxes(NamedTuple):
    """N boxes over flat inputs.

    Args:
        lower, upper: (N, n) float64.
        open: (N, clauses): what is not yet proved on the box.
        bound: (N,) a lower bound on the margin of the open clauses, from the box that it was cut from.
        hope: (N,) an estimate of that margin's bound on the box itself.
        node: (N,) its number in the search's `Record`, if there is one.
    """

    lower: Tensor
    upper: Tensor
    open: Tensor
    bound: Tensor
    hope: Tensor
    node: Tensor

    def at(self, index: Tensor | slice) -> Boxes:
        return Boxes(*(v[index] for v in self))

    @property
    def number(self) -> int:
        return len(self.lower)

    @property
    def bytes(self) -> int:
        return sum(v.nbytes for v in self)


def joined(parts: list[Boxes]) -> Boxes:
    return (
        Boxes(*(torch.cat(column) for column in zip(*parts, strict=True)))
        if len(parts) != 1
        else parts[0]
    )


class Frontier:
    """Boxes still to be bounded, last in first out, so that there are never many."""

    def __init__(self) -> None:
        self.parts: list[Boxes] = []

    def push(self, boxes: Boxes) -> None:
        if boxes.number:
            self.parts.append(boxes)

    def pop(self, count: int) -> Boxes:
        taken: list[Boxes] = []
        while self.parts and count:
            last = self.parts.pop()
            if last.number > count:
                self.parts.append(last.at(slice(0, last.number - count)))
                last = last.at(slice(last.number - count, last.number))
            taken.append(last)
            count -= last.number
        return joined(taken)

    @property
    def count(self) -> int:
        return sum(p.number for p in self.parts)

    @property
    def bytes(self) -> int:
        return sum(p.bytes for p in self.parts)

    @property
    def bound(self) -> float:
        return min((p.bound.min().item() for p in self.parts), default=math.inf)


def halves(boxes: Boxes, dim: Tensor) -> tuple[Boxes, Boxes]:
    """Each box cut in the middle of its dimension ``dim`` (N,)."""
    index = dim.unsqueeze(1)
    middle = middles(boxes.lower.gather(1, index), boxes.upper.gather(1, index))
    return (
        boxes._replace(upper=boxes.upper.scatter(1, index, middle)),
        boxes._replace(lower=boxes.lower.scatter(1, index, middle)),
    )


def middles(lower: Tensor, upper: Tensor) -> Tensor:
    return torch.minimum(torch.maximum(lower / 2 + upper / 2, lower), upper)


def divisible(lower: Tensor, upper: Tensor) -> Tensor:
    """Where both halves would be smaller by far more than rounding."""
    size = torch.maximum(lower.abs(), upper.abs())
    return upper - lower > 64 * torch.finfo(torch.float64).eps * size + 1e-300


class Planes(NamedTuple):
    """Linear functions below functionals: value r of clause[r] is at least slopes[r]·(x − center) + values[r] on a box.

    Args:
        slopes: (R, N, n).
        values: (R, N), what rounding of the sum can cost subtracted.
        clause: (R,).
        center, radius: (N, n): the box lies in center ± radius.
    """

    slopes: Tensor
    values: Tensor
    clause: Tensor
    center: Tensor
    radius: Tensor

    @property
    def lows(self) -> Tensor:
        """(R, N)"""
        return self.values - _dot(self.slopes.abs(), self.radius)

    def clauses(self, count: int) -> Tensor:
        """The best bound of each clause: (N, clauses)."""
        lows = self.lows.T
        start = torch.full((len(lows), count), -math.inf, dtype=lows.dtype)
        return start.scatter_reduce(1, self.clause.expand_as(lows), lows, "amax")

    def mean(self, rows: Tensor, weights: Tensor) -> Planes:
        """The planes ``rows`` of one clause as one, with weights (len(rows), N); rounding is not accounted for."""
        return self._replace(
            slopes=(weights.unsqueeze(2) * self.slopes[rows]).sum(0, keepdim=True),
            values=(weights * self.values[rows]).sum(0, keepdim=True),
            clause=self.clause[rows[:1]],
        )


def _dot(slopes: Tensor, vector: Tensor) -> Tensor:
    return (slopes * vector).sum(-1)


def trimmed(boxes: Boxes, planes: Planes, cut: Tensor, rounds: int = 2) -> Boxes:
    """The boxes less slabs on which all open clauses exceed ``cut`` (N,); clauses that do so everywhere are closed.

    Where a clause fails, none of its functionals exceeds ``cut``; with a plane below it, slope a > 0 and lowest
    value l in the corner, x must stay within (cut − l)/a of that corner. The clauses' remainders are covered by one
    box; several functionals of one clause trim for each other, in ``rounds``.
    """
    low = torch.full_like(boxes.lower, math.inf)
    high = -low
    still = boxes.open.clone()
    for clause in range(boxes.open.shape[1]):
        rows = torch.nonzero(planes.clause == clause).flatten().tolist()
        l, u, alive = boxes.lower, boxes.upper, boxes.open[:, clause]
        for _ in range(rounds if len(rows) > 1 else 1):
            for r in rows:
                l, u, met = _trim(l, u, planes, r, cut)
                alive = alive & met
        still[:, clause] = alive
        keep = alive.unsqueeze(1)
        low = torch.where(keep, torch.minimum(low, l), low)
        high = torch.where(keep, torch.maximum(high, u), high)
    some = still.any(1, keepdim=True)
    low, high = torch.where(some, low, boxes.lower), torch.where(some, high, boxes.upper)
    return boxes._replace(lower=low, upper=high, open=still)


def _trim(
    l: Tensor, u: Tensor, planes: Planes, r: int, cut: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The part of [l, u] where plane r can be at most ``cut``, and whether there is any."""
    slope, shift = planes.slopes[r], middles(l, u) - planes.center
    middle = planes.center + shift
    radius = torch.maximum(u - middle, middle - l) * (1 + 1e-15) + 2.0**-51 * middle.abs()
    size = planes.values[r].abs() + _dot(slope.abs(), shift.abs() + radius)
    lowest = planes.values[r] + _dot(slope, shift) - _dot(slope.abs(), radius)
    lowest = lowest - (8 + 4 * slope.shape[1]) * 2.0**-53 * size
    met = ~(lowest > cut)
    room = (cut - lowest).unsqueeze(1) / slope.abs() * (1 + 1e-12)
    room = torch.where(met.unsqueeze(1) & (room >= 0), room, math.inf)  # NaN trims nothing
    up = torch.nextafter(l + room, torch.full_like(u, math.inf))
    down = torch.nextafter(u - room, torch.full_like(l, -math.inf))
    new_u = torch.where(slope > 0, torch.minimum(u, up), u)
    new_l = torch.where(slope < 0, torch.maximum(l, down), l)
    return new_l, new_u, met


def blend(planes: Planes, rows: Tensor, steps: int) -> Tensor:
    """Weights on the simplex (len(rows), N) of functionals ``rows`` of one clause, for which the lowest value of the
    weighted plane is as high as mirror ascent finds it: the functionals' maximum is at least their weighted mean."""
    slopes, values = planes.slopes[rows], planes.values[rows]
    scale = (_dot(slopes.abs(), planes.radius) + values.abs()).amax(0) + 1e-300
    weights = torch.full_like(values, 1 / len(rows))
    best, low = weights, torch.full_like(values[0], -math.inf)
    for step in range(steps):
        mean = (weights.unsqueeze(2) * slopes).sum(0)
        corner = mean.sign() * planes.radius
        at_corner = values - _dot(slopes, corner)
        value = (weights * at_corner).sum(0)
        better = value > low
        best, low = torch.where(better, weights, best), torch.where(better, value, low)
        weights = (
            weights.clamp_min(1e-12).log() + at_corner / scale * (8 / (1 + step) ** 0.5)
        ).softmax(0)
    return best
