"""Minimum-norm attacks: how far is the nearest point that breaks the specification?

`MinimumNorm` = (model, x, spec, *, p, lower, upper, start, ...) -> Tensor "B *x", in the dtype of ``x``. For every one:

- a row is a point of the box [lower, upper] at which the model, run in that dtype, violates the specification
  (`Spec.violated`), or NaN where none was found; `distance` makes that inf;
- an input that violates it already is its own answer, at distance 0;
- no row is farther than the adversarial point in ``start``, if one is given: what a fixed-budget attack proves is
  never lost;
- distances are upper bounds. As everywhere, `calipers.witness` decides in the end, in the region of that radius.

Here: what they share, the final polish, and `closest`, which makes one of any fixed-budget attack. Gradient-based ones
are in `calipers.attacks.boundary`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from calipers.attacks.gradient import pgd
from calipers.attacks.search import Model
from calipers.searches import level_l2, shrink_l1
from calipers.searches import norm as row_norm
from calipers.sets import Number, Region, ThreatModel
from calipers.spec import Spec

MinimumNorm = Callable[..., Tensor]
PGD = partial(pgd, loss="margin", drop=True)
# roundings of the outputs by which points near the boundary are to break the specification
CLEARANCE = 32.0


def distance(x: Tensor, points: Tensor, p: float) -> Tensor:
    """‖points − x‖_p of each example, (B,) float64; inf for rows with NaN. For p = 0 the number of changed features.

    Raises:
        ValueError: p is not one of 0, 1, 2, inf, or the shapes differ.
    """
    _check_norm(p)
    if x.shape != points.shape:
        raise ValueError(f"points: shape {tuple(points.shape)} for inputs {tuple(x.shape)}")
    gap = (points.detach().double() - x.detach().double()).flatten(1)
    size = (gap != 0).sum(1).double() if p == 0 else row_norm(gap, p)
    return torch.where(torch.isfinite(gap).all(1), size, math.inf)


def closest(
    model: Model,
    x: Tensor,
    spec: Spec,
    *,
    attack: Callable[..., Tensor] = PGD,
    p: float,
    lower: Number | Tensor = 0.0,
    upper: Number | Tensor = 1.0,
    radii: Sequence[float] = (),
    rounds: int = 12,
    polish: int = 16,
    start: Tensor | None = None,
    seeds: Tensor | None = None,
) -> Tensor:
    """The nearest point found by a fixed-budget attack under bisection on each example's own radius: (B, *x).

        min eps  such that  attack(ball of radius eps) breaks the example

    Each success is polished (see `polished`) before the next round, so a radius is the distance of a point in hand.
    Where the attack fails in the largest ball, it is tried in balls of half the size, and so on.
    The attack is first run with each of ``radii``, largest first, and the same seeds: no row is farther than any of
    these that it breaks.

    Args:
        attack: any `Attack`: `square`, a ``functools.partial`` of `pgd`, ...; by default pgd on the margin.
        p: 1, 2 or inf.
        radii: in input units.
        rounds: of the attack after ``radii``.
        polish: forward passes per polish.
        start: (B, *x) points; those that break the specification are limits, others (or NaN) are ignored.
        seeds: passed to the attack, (B,).

    Raises:
        ValueError: an argument is out of range, or the box is unbounded and no radius is known.
        DataError: inputs outside the box.

    Cost: at most ``len(radii) + rounds`` runs of the attack, fewer steps of each with ``drop=True``, and polish.
    """
    if p == 0:
        raise ValueError("p: 0 is no norm of a region, so fixed-budget attacks have none; use fmn")
    if rounds < 0:
        raise ValueError(f"rounds: {rounds} must be at least 0")
    if any(not 0 < r < math.inf for r in radii):
        raise ValueError(f"radii: {tuple(radii)} must be positive and finite")
    search = Nearest.around(model, x, spec, p, lower, upper, start)
    failed = torch.zeros_like(search.size)
    reach = search.reach()
    trial = torch.where(torch.isfinite(reach), reach, max(radii, default=math.inf))
    if bool(torch.isinf(torch.minimum(trial, search.size)).any()):
        raise ValueError(
            "upper: the box is unbounded, so there is no largest ball; give radii, or finite lower and upper"
        )

    def attempt(eps: Tensor, rows: Tensor, clearance: float) -> None:
        region = Region.ball(search.x[rows], eps[rows], p, lower, upper)
        own = None if seeds is None else seeds[rows.to(seeds.device)]
        points = attack(model, region, spec[rows], seeds=own, dtype=x.dtype)
        broken = violated(model, spec[rows], points, clearance=clearance)
        search.offer(rows, points, broken)
        failed[rows[~broken]] = eps[rows[~broken]]
        search.polish(model, spec, rows[broken], polish)

    for radius in sorted(radii, reverse=True):
        rows = search.farther_than(radius)
        if len(rows):
            attempt(torch.full_like(failed, radius), rows, 0.0)
    for _ in range(rounds):
        low = torch.where(failed < search.size, failed, 0.0)
        trial = torch.where(torch.isfinite(search.size), (low + search.size) / 2, trial)
        rows = torch.nonzero((search.size > 0) & ~(low > search.size * (1 - 1e-4))).flatten()
        if not len(rows):
            break
        attempt(trial, rows, CLEARANCE)
        trial = trial / 2
    return search.points


@torch.no_grad()
def polished(
    model: Model,
    x: Tensor,
    spec: Spec,
    points: Tensor,
    *,
    p: float,
    lower: Number | Tensor = 0.0,
    upper: Number | Tensor = 1.0,
    steps: int = 16,
) -> Tensor:
    """Adversarial ``points`` drawn in to the decision boundary: never farther, and still adversarial; others NaN.

    Bisection on the radius of the ball onto which a point is projected: scaled for l2, clipped for linf,
    soft-thresholded for l1; for l0 the smallest changes are undone. What is accepted clears the boundary by a few
    roundings of the outputs, so that it holds when evaluated alone or by another runtime.

    Raises:
        ValueError, DataError: as `closest`.

    Cost: ``steps`` + 2 forward passes.
    """
    search = Nearest.around(model, x, spec, p, lower, upper, points)
    search.polish(model, spec, search.farther_than(0.0), steps)
    return search.points


# -- shared by all minimum-norm attacks ----------------------------------------------------------------------------


@dataclass(eq=False)
class Nearest:
    """The nearest adversarial point of each example so far: ``points`` (NaN: none) at distance ``size`` (inf)."""

    x: Tensor
    low: Tensor
    high: Tensor
    p: float
    points: Tensor
    size: Tensor

    @classmethod
    @torch.no_grad()
    def around(
        cls,
        model: Model,
        x: Tensor,
        spec: Spec,
        p: float,
        lower: Number | Tensor,
        upper: Number | Tensor,
        start: Tensor | None,
    ) -> Nearest:
        """Checks all arguments; knows what is broken already and the points of ``start``."""
        _check_norm(p)
        x = x.detach()
        domain = ThreatModel(math.inf, math.inf, lower, upper).around(x)
        if len(spec) != len(x):
            raise ValueError(f"spec: {len(spec)} rows for {len(x)} examples")
        low, high = domain.inner(x.dtype)
        size = torch.full((len(x),), math.inf, dtype=torch.float64, device=x.device)
        search = cls(x, low, high, float(p), torch.full_like(x, math.nan), size)
        everything = torch.arange(len(x), device=x.device)
        search.offer(everything, x, violated(model, spec, x))
        if start is not None:
            if start.shape != x.shape or start.dtype != x.dtype:
                raise ValueError(
                    f"start: {start.dtype} of shape {tuple(start.shape)} for inputs {x.dtype} {tuple(x.shape)}"
                )
            rows = torch.nonzero(~torch.isnan(start).flatten(1).any(1)).flatten()
            given = start.detach()[rows]
            outside = ~domain[rows].contains(given)
            if bool(outside.any()):
                raise ValueError(
                    f"start: {int(outside.sum())} points lie outside the box [lower, upper]; "
                    "clamp them, or give the box that they were found in"
                )
            if len(rows):
                search.offer(rows, given, violated(model, spec[rows], given))
        return search

    def offer(self, rows: Tensor, points: Tensor, broken: Tensor) -> None:
        """Keep those of ``points`` (for ``rows``) that are ``broken`` and nearer than what is known."""
        size = distance(self.x[rows], points, self.p)
        better = broken & (size < self.size[rows])
        chosen = rows[better]
        self.points[chosen], self.size[chosen] = points.detach()[better], size[better]

    def farther_than(self, radius: float) -> Tensor:
        return torch.nonzero(self.size > radius).flatten()

    def reach(self) -> Tensor:
        """The distance to the farthest point of the box, (B,) float64."""
        x = self.x.double()
        far = torch.maximum(self.high.double() - x, x - self.low.double()).flatten(1)
        return (far > 0).sum(1).double() if self.p == 0 else row_norm(far, self.p)

    def member(self, rows: Tensor, step: Tensor, size: Tensor) -> Tensor:
        """The point of the box nearest to x + step in the ball of radius ``size``: (R, *x)."""
        x, low, high = (t[rows].flatten(1) for t in (self.x, self.low, self.high))
        room = torch.where(step > 0, high.double() - x, x - low.double())
        moved = x.double() + step.sign() * shortened(step.abs(), room, size, self.p)
        return moved.to(x.dtype).clamp(low, high).view(-1, *self.x.shape[1:])

    @torch.no_grad()
    def polish(self, model: Model, spec: Spec, rows: Tensor, steps: int) -> None:
        """`polished` for those of ``rows`` that have a point."""
        if steps < 0:
            raise ValueError(f"polish: {steps} passes; at least 0 are needed")
        rows = rows[torch.isfinite(self.size[rows]) & (self.size[rows] > 0)]
        if not len(rows):
            return
        spec = spec[rows]
        step = (self.points[rows].double() - self.x[rows].double()).flatten(1)
        high = self.size[rows]
        low = torch.zeros_like(high)
        for _ in range(steps):
            middle = (low + high) / 2
            middle = middle.floor() if self.p == 0 else middle
            points = self.member(rows, step, middle)
            broken = violated(model, spec, points, clearance=CLEARANCE)
            self.offer(rows, points, broken)
            high, low = torch.where(broken, middle, high), torch.where(broken, low, middle)


def shortened(size: Tensor, room: Tensor, radius: Tensor, p: float) -> Tensor:
    """The lengths nearest to ``size`` (R, n) within ``room`` whose p-norm is at most ``radius`` (R,); float64.

    For p = 0 the longest ones are kept.
    """
    if p != 0:
        room = torch.minimum(room, radius.unsqueeze(1))
    length = torch.minimum(size, room)
    if p == math.inf:
        return length
    if p == 0:
        order = length.argsort(dim=1, descending=True, stable=True)
        kept = torch.arange(size.shape[1], device=size.device) < radius.unsqueeze(1)
        return torch.where(torch.zeros_like(kept).scatter(1, order, kept), length, 0.0)
    over = row_norm(length, p) > radius
    if bool(over.any()):
        shrink = shrink_l1 if p == 1 else level_l2
        length[over] = shrink(size[over], room[over], radius[over])
    return length


@torch.no_grad()
def violated(model: Model, spec: Spec, points: Tensor, *, clearance: float = 0.0) -> Tensor:
    """Whether the model breaks the specification at each point, by ``clearance`` roundings of its outputs."""
    return breaks(spec, model(points.clone()), clearance)  # a model may change its argument


def breaks(spec: Spec, y: Tensor, clearance: float = 0.0) -> Tensor:
    broken = spec.violated(y)
    if clearance:
        rounding = torch.finfo(y.dtype).eps * y.abs().amax(1)
        broken = broken & (spec.margin_at(y) <= -clearance * rounding)
    return broken


def _check_norm(p: float) -> None:
    if p not in (0, 1, 2, math.inf):
        raise ValueError(f"p: {p!r} is not one of 0, 1, 2, inf")
