"""Sets of which only the points on a grid count: images as 8-bit files hold them, k/255 with whole k.

A *level* is a whole number k; it stands for the number that k·grid is rounded to in the dtype of the inputs (the
quotient is formed in float64 and rounded once more). Both usual loaders of 8-bit images give exactly these numbers:
``x.float() / 255`` and ``(x / 255.0)`` in float64 cast to float32; multiplying by a rounded 1/255 does not.

The set is exact on the levels, where a radius is a count: with k the levels of a point and c those of the centre,

    p = inf: |k_i − c_i| ≤ ⌊eps/grid⌋       p = 1: Σ|k_i − c_i| ≤ ⌊eps/grid⌋       p = 2: Σ(k_i − c_i)² ≤ ⌊(eps/grid)²⌋

and lower ≤ k_i·grid ≤ upper. So 8/255 allows exactly 8 levels of 1/255, whatever the floats beside them round to.
A float (or a tensor's entry) for a radius or a side of the box means the level that it is the rounding of, if there is
one: the closest float to 8/255 is eight levels too, even where it lies below 8/255.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from calipers.errors import DataError, RegionError
from calipers.rounding import Number, exact
from calipers.searches import fill_l1, level_l2

LIMIT = 2**17  # levels on either side of 0: 16-bit files, and sums of squares that fit into 64 bits
_FAR = 2**20  # stands for infinitely many
_LARGEST = 2**62


def spacing(grid: Number) -> Fraction:
    """The distance of neighbouring grid points, exactly; a float is read as the simplest ratio that rounds to it.

    Raises:
        ValueError: not a positive number.
    """
    try:
        value = exact(grid)
    except ValueError as error:
        raise ValueError(f"grid: {error}") from None
    if value <= 0:
        raise ValueError(f"grid: {grid!r} is not positive; 8-bit images need '1/255'")
    if isinstance(grid, float):
        simple = value.limit_denominator(2**16)
        value = simple if simple and float(simple) == grid else value
    return value


def stored(levels: Tensor, grid: Fraction, dtype: torch.dtype) -> Tensor:
    """The numbers in ``dtype`` that whole ``levels`` stand for."""
    return (levels.double() * grid.numerator / grid.denominator).to(dtype)


def to_grid(x: Tensor, grid: Number) -> Tensor:
    """The grid points nearest to ``x``, in its dtype: for inputs that a loader has left slightly off the grid."""
    space = spacing(grid)
    return stored(_position(x, space).round(), space, x.dtype)


def _position(x: Tensor, grid: Fraction) -> Tensor:
    """x in units of the grid, float64; what is not finite or far outside becomes ±_FAR."""
    units = x.detach().double() * grid.denominator / grid.numerator
    return torch.nan_to_num(units, nan=_FAR).clamp(-_FAR, _FAR)


@dataclass(frozen=True, eq=False)
class Levels:
    """The members of one set per example, by their levels.

    Args:
        dtype: of the numbers that levels stand for.
        center, lower, upper: (B, *x) int64; for p = inf the last two are the whole set.
        budget: (B,) int64, the limit on Σ|k − center| (p = 1) or Σ(k − center)² (p = 2).
    """

    grid: Fraction
    p: float
    dtype: torch.dtype
    center: Tensor
    lower: Tensor
    upper: Tensor
    budget: Tensor

    @classmethod
    def around(
        cls,
        x: Tensor,
        grid: Number,
        p: float,
        eps: Number | Tensor,
        lower: Number | Tensor,
        upper: Number | Tensor,
        free: Tensor | None,
    ) -> Levels:
        """The levels around ``x`` (B, *x): ``eps`` a number, (B,) or, for p = inf, per feature; ``free`` is the mask.

        Raises:
            DataError: ``x`` is not on the grid.
            ValueError: the grid is too fine for the dtype of ``x``.
        """
        space = spacing(grid)
        center = _centers(x, space)
        floor = _whole(lower, space, x.dtype, math.ceil).to(x.device)
        roof = _whole(upper, space, x.dtype, math.floor).to(x.device)
        per_example = isinstance(eps, Tensor) and eps.ndim == 1 and len(eps) == len(x)
        reach = _whole(eps, space, x.dtype, math.floor).to(x.device)
        if per_example:
            reach = reach.reshape(-1, *[1] * (x.ndim - 1))
        if free is not None:
            reach = reach * free.to(x.device)
        low = torch.maximum(center - reach, torch.minimum(floor, center))
        high = torch.minimum(center + reach, torch.maximum(roof, center))
        most = min(LIMIT, int(1 / torch.finfo(x.dtype).eps))
        widest = max(int(low.abs().max()), int(high.abs().max())) if low.numel() else 0
        if widest > most:
            raise ValueError(
                f"grid: {space} needs levels up to {'infinity' if widest >= _FAR - LIMIT else widest}, {x.dtype} tells "
                f"{most} apart; use a coarser grid, a wider dtype, or a bounded domain"
            )
        budget = torch.tensor(_budgets(eps, space, p, x.dtype), device=x.device).expand(len(x))
        return cls(space, float(p), x.dtype, center, low, high, budget)

    def __getitem__(self, index: Tensor | slice) -> Levels:
        parts = (self.center[index], self.lower[index], self.upper[index], self.budget[index])
        return Levels(self.grid, self.p, self.dtype, *parts)

    def values(self, levels: Tensor) -> Tensor:
        """The numbers that ``levels`` stand for, in the set's own dtype."""
        return stored(levels, self.grid, self.dtype)

    def numbers(self, levels: Tensor, dtype: torch.dtype) -> Tensor:
        """`values` in a dtype that holds them.

        Raises:
            RegionError: ``dtype`` is too narrow.
        """
        if torch.finfo(dtype).eps > torch.finfo(self.dtype).eps:
            raise RegionError(
                f"the grid's points are {self.dtype} numbers, which {dtype} cannot hold; use {self.dtype}"
            )
        return self.values(levels).to(dtype)

    def radius(self) -> Tensor:
        """(B,) float64, for p = 1 and 2: no member's stored numbers are further from the centre's."""
        farthest = torch.maximum(self.lower.abs(), self.upper.abs()).double().flatten(1)
        moves = (self.lower < self.upper).flatten(1)
        slack = torch.where(moves, farthest, 0.0) * torch.finfo(self.dtype).eps
        tiny = torch.finfo(self.dtype).tiny * moves.sum(1)
        counts = self.budget.double() ** (1 / self.p)
        rounding: Tensor = torch.linalg.vector_norm(slack, ord=self.p, dim=1)
        return (counts + rounding) * float(self.grid) * (1 + 2.0**-40) + tiny

    def contains(self, x: Tensor) -> Tensor:
        """Whether each row of ``x`` is a member, by whole numbers alone: (B,) bool."""
        levels = _position(x, self.grid).round().long()
        inside = (levels >= self.lower) & (levels <= self.upper)
        inside &= self.values(levels).double() == x.detach().double()
        rows: Tensor = inside.flatten(1).all(1)
        if self.p == math.inf:
            return rows
        gap = (levels - self.center).clamp(-2 * _FAR, 2 * _FAR).flatten(1)
        return rows & (self._cost(gap).sum(1) <= self.budget)

    def snap(self, x: Tensor) -> Tensor:
        """The levels (B, *x) of a member near ``x``.

        p = inf: the nearest one. p = 1, 2, for ``x`` in the ball: each coordinate's level on either side of it, towards
        the centre by default and away from it for the largest remainders, as long as the norm of the change does not
        grow: so small changes of many features become whole ones of some, rather than none. A member stays.
        """
        units = _position(x, self.grid)
        if self.p == math.inf:
            return torch.minimum(torch.maximum(units.round().long(), self.lower), self.upper)
        gap = units - self.center
        size, cap = gap.abs().flatten(1), self._cap(gap)
        size = torch.minimum(size, cap.double())
        rounding = 2 * torch.finfo(self.dtype).eps * (units.abs() + self.center.abs()).flatten(1)
        base, rest = self._split(size, rounding)
        spent = self._cost(base + rest).sum(1).round().long()
        return self._moved(gap, self._fill(base, rest, cap, torch.minimum(self.budget, spent)))

    def maximizer(self, a: Tensor) -> Tensor:
        """The levels of a member that maximises ⟨a, x⟩: exact for p = 1 and inf; for p = 2 the rounded maximiser of the
        ball, with what is left of the radius spent where it gains most."""
        slope = a.detach().double()
        if self.p == math.inf:
            return torch.where(
                slope > 0, self.upper, torch.where(slope < 0, self.lower, self.center)
            )
        size = slope.abs().flatten(1)
        cap = torch.where(size > 0, self._cap(slope), 0)
        if self.p == 1:
            length = fill_l1(size, cap.double(), self.budget.double()).round().long()
            return self._moved(slope, length)
        exact_length = level_l2(size, cap.double(), self.budget.double().sqrt())
        base, _ = self._split(exact_length, torch.full_like(size, 1e-9))
        return self._moved(slope, self._fill(base, size / (2 * base + 1), cap, self.budget))

    def sample(self, noise: Tensor) -> Tensor:
        """For p = inf, levels uniform in the set from ``noise`` uniform in [0, 1)."""
        count = (self.upper - self.lower + 1).double()
        return torch.minimum(self.lower + (noise * count).floor().long(), self.upper)

    def _cap(self, direction: Tensor) -> Tensor:
        """How many levels there are towards ``direction``, flat."""
        cap = torch.where(direction > 0, self.upper - self.center, self.center - self.lower)
        return cap.flatten(1)

    def _cost(self, length: Tensor) -> Tensor:
        return length.abs() if self.p == 1 else length.square()

    def _split(self, size: Tensor, rounding: Tensor) -> tuple[Tensor, Tensor]:
        """Whole levels within the budget, and what is left of ``size``; up to ``rounding`` counts as a whole level."""
        nearest = size.round()
        near = (size - nearest).abs() <= rounding
        whole = torch.where(near, nearest, size.floor())
        over = self._cost(whole).sum(1) > self.budget
        if bool(over.any()):  # the rounding led out: shrink into the ball, then towards the centre
            total = self._cost(size[over]).sum(1, keepdim=True)
            share = (self.budget[over].unsqueeze(1) / total.clamp_min(1e-300)) ** (1 / self.p)
            whole[over] = (size[over] * share.clamp_max(1.0) * (1 - 1e-12)).floor()
        return whole.long(), torch.where(near, 0.0, (size - whole).clamp_min(0.0))

    def _fill(self, length: Tensor, gain: Tensor, cap: Tensor, budget: Tensor) -> Tensor:
        """``length`` plus one level each for the features of the largest positive ``gain`` that the budget pays for."""
        left = budget - self._cost(length).sum(1)
        open_ = (gain > 1e-9) & (length < cap)
        price = self._cost(length + 1) - self._cost(length)
        order = torch.where(open_, gain, -1.0).argsort(dim=1, descending=True, stable=True)
        ordered = torch.where(open_, price, 0).gather(1, order)
        taken = open_.gather(1, order) & (ordered.cumsum(1) <= left.unsqueeze(1))
        return length + torch.zeros_like(length).scatter(1, order, taken.long())

    def _moved(self, direction: Tensor, length: Tensor) -> Tensor:
        return self.center + direction.sign().long() * length.view_as(self.center)


def _centers(x: Tensor, grid: Fraction) -> Tensor:
    center = _position(x, grid).round().long()
    off = (stored(center, grid, x.dtype) != x.detach()).flatten(1).any(1)
    if bool(off.any()):
        row = int(torch.nonzero(off)[0])
        wrong = x[row][stored(center[row], grid, x.dtype) != x[row]].flatten()[0].item()
        raise DataError(
            f"x: {int(off.sum())} of {len(x)} examples are off the grid of {grid} (example {row} holds {wrong!r}); "
            "load 8-bit images as x.float() / 255, round them with calipers.grid.to_grid(x, grid), or leave out grid"
        )
    return center


def _ratio(value: Number, grid: Fraction, dtype: torch.dtype) -> Fraction:
    """value/grid; a whole number if ``value`` is a float within its rounding in ``dtype`` of one."""
    ratio = exact(value) / grid
    near = abs(ratio - round(ratio)) <= Fraction(torch.finfo(dtype).eps) * abs(ratio)
    return Fraction(round(ratio)) if isinstance(value, float) and near else ratio


def _whole(
    value: Number | Tensor, grid: Fraction, dtype: torch.dtype, side: Callable[[Fraction], int]
) -> Tensor:
    """How many levels ``value`` is, rounded to ``side`` (math.floor or math.ceil)."""
    if isinstance(value, Tensor):
        units = _position(value, grid)
        nearest = units.round()
        near = (units - nearest).abs() <= torch.finfo(dtype).eps * units.abs()
        rounded = units.floor() if side is math.floor else units.ceil()
        return torch.where(near, nearest, rounded).long()
    if isinstance(value, float) and math.isinf(value):
        return torch.tensor(int(math.copysign(_FAR, value)))
    return torch.tensor(max(-_FAR, min(_FAR, side(_ratio(value, grid, dtype)))))


def _budgets(eps: Number | Tensor, grid: Fraction, p: float, dtype: torch.dtype) -> list[int]:
    """⌊(eps/grid)^p⌋ for each entry of ``eps``."""
    if p == math.inf:
        return [0]
    entries = eps.flatten().tolist() if isinstance(eps, Tensor) else [eps]
    return [min(math.floor(_ratio(e, grid, dtype) ** int(p)), _LARGEST) for e in entries]
