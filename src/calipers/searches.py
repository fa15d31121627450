"""The one-dimensional searches behind balls in boxes; rows of nonnegative ``size``, caps, and one radius per row.

Shapes throughout: (..., n), (..., n) and (...).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def norm(rows: Tensor, p: float) -> Tensor:
    size: Tensor = torch.linalg.vector_norm(rows, ord=p, dim=-1)
    return size


def _level(size: Tensor, cap: Tensor, eps: Tensor) -> Tensor:
    """t with Σ min(t·size, cap)² = eps²; inf where all caps fit into the ball. Shapes (..., n), (..., n), (...).

    Newton from below: with the capped set of the current t the equation is a plain square root, each step
    raises t and only adds to the capped set, so it ends after finitely many steps (in practice under ten).
    """
    square, limit = size.square(), cap.square()
    budget = eps.square()
    fits = torch.where(size > 0, limit, 0.0).sum(-1) <= budget
    t = (budget / square.sum(-1).clamp_min(1e-300)).sqrt()
    for _ in range(size.shape[-1]):
        capped = t.unsqueeze(-1) * size >= cap
        rest = (budget - torch.where(capped, limit, 0.0).sum(-1)).clamp_min(0.0)
        free = torch.where(capped, 0.0, square).sum(-1)
        better = torch.where(free > 0, (rest / free.clamp_min(1e-300)).sqrt(), t)
        tiny = ~fits & (free < 1e-30)
        if bool(tiny.any()):  # the squares of what is not capped underflow: rescale
            loose = torch.where(capped, 0.0, size)
            peak = loose.amax(-1)
            unit = loose / torch.where(peak > 0, peak, 1.0).unsqueeze(-1)
            rescaled = (rest / unit.square().sum(-1).clamp_min(1.0)).sqrt() / peak
            better = torch.where(tiny & (peak > 0), rescaled, better)
        if bool((fits | (better <= t * (1 + 1e-14))).all()):
            break
        t = torch.maximum(t, better)
    return torch.where(fits, math.inf, t)


def level_l2(size: Tensor, cap: Tensor, eps: Tensor) -> Tensor:
    scale = size.amax(-1, keepdim=True)
    unit = size / torch.where(scale > 0, scale, 1.0)
    t = _level(unit, cap, eps).unsqueeze(-1)
    length = torch.where(unit > 0, torch.minimum(t * unit, cap), torch.zeros_like(cap))
    over: Tensor = torch.linalg.vector_norm(length, dim=-1, keepdim=True)
    return length * (eps.unsqueeze(-1) / over.clamp_min(1e-300)).clamp_max(1.0)


def shrink_l1(size: Tensor, cap: Tensor, eps: Tensor) -> Tensor:
    """clip(size − μ, 0, cap) with sum eps: the l1 projection inside caps, by sorting the 2n breakpoints of μ.

    No cap exceeds eps, so a gap between two sizes that is wider than eps only tells which is larger: it is
    narrowed first, and points far away are projected as accurately as near ones.
    """
    ordered, place = size.sort(-1, descending=True)
    gaps = ordered - torch.cat([ordered[..., 1:], torch.zeros_like(ordered[..., :1])], -1)
    gaps = torch.minimum(gaps, 2 * eps.unsqueeze(-1))
    size = torch.zeros_like(size).scatter(-1, place, gaps.flip(-1).cumsum(-1).flip(-1))
    points = torch.cat([size, (size - cap).clamp_min(0.0)], -1)
    turns = torch.cat([torch.ones_like(size), -torch.ones_like(size)], -1)
    points, order = points.sort(-1, descending=True)
    slope = turns.gather(-1, order).cumsum(-1)
    ends = torch.cat([points[..., 1:], torch.zeros_like(points[..., :1])], -1)
    total = (slope * (points - ends)).cumsum(-1)
    index = (total < eps.unsqueeze(-1)).sum(-1, keepdim=True).clamp_max(points.shape[-1] - 1)
    excess = total.gather(-1, index) - eps.unsqueeze(-1)
    mu = ends.gather(-1, index) + excess / slope.gather(-1, index).clamp_min(1.0)
    length = torch.minimum((size - mu).clamp_min(0.0), cap)
    return length * (eps.unsqueeze(-1) / length.sum(-1, keepdim=True).clamp_min(1e-300)).clamp_max(
        1.0
    )


def fill_l1(size: Tensor, cap: Tensor, eps: Tensor) -> Tensor:
    """Spend the radius on the largest entries first, each up to its cap."""
    order = size.argsort(dim=-1, descending=True, stable=True)
    room = cap.gather(-1, order)
    before = room.cumsum(-1) - room
    spent = torch.minimum((eps.unsqueeze(-1) - before).clamp_min(0.0), room)
    length = torch.zeros_like(cap).scatter(-1, order, spent)
    return length * (eps.unsqueeze(-1) / length.sum(-1, keepdim=True).clamp_min(1e-300)).clamp_max(
        1.0
    )


def dual_l2(a: Tensor, below: Tensor, above: Tensor, eps: Tensor) -> Tensor:
    """min over the multiplier λ of max over the box of ⟨a, δ⟩ − λ/2·(‖δ‖² − eps²), evaluated at λ = 1/t."""
    with torch.no_grad():
        size = a.abs()
        scale = size.amax(-1, keepdim=True)
        unit = size / torch.where(scale > 0, scale, 1.0)
        cap = torch.where(a > 0, above, below)
        t = _level(unit, cap, eps.expand(unit.shape[:-1]))
        multiplier = torch.where(
            torch.isinf(t), 0.0, scale.squeeze(-1) / t.clamp_min(1e-30)
        ).unsqueeze(-1)
        corner = multiplier == 0
    free = a / torch.where(corner, 1.0, multiplier)
    best = torch.where(
        corner, torch.where(a > 0, above, -below), torch.minimum(torch.maximum(free, -below), above)
    )
    best = torch.where(a == 0, torch.zeros_like(best), best)
    quadratic = best.square().sum(-1) - eps.square()
    return (a * best).sum(-1) - multiplier.squeeze(-1) / 2 * quadratic


def dual_l1(a: Tensor, below: Tensor, above: Tensor, eps: Tensor) -> Tensor:
    """min over λ of λ·eps + Σ (a − λ)₊·above + (−a − λ)₊·below, at the entry where the radius is used up."""
    size = a.abs()
    with torch.no_grad():
        cap = torch.where(a > 0, above, below)
        # how many entries, largest first, are filled to their cap before the radius is used up
        entry = size.argmax(-1, keepdim=True)
        spent = torch.zeros_like(entry, dtype=torch.bool)
        tight = cap.gather(-1, entry).squeeze(-1) < eps
        if tight.any():
            order = size[tight].argsort(-1, descending=True)
            room = cap[tight].gather(-1, order).cumsum(-1)
            used = (room < eps.expand(tight.shape)[tight].unsqueeze(-1)).sum(-1, keepdim=True)
            spent[tight] = used == size.shape[-1]
            entry[tight] = order.gather(-1, used.clamp_max(size.shape[-1] - 1))
    # differentiable: the entry at the level takes what is left of the radius
    level = torch.where(spent, 0.0, size.gather(-1, entry))
    gain = torch.relu(a - level) * above + torch.relu(-a - level) * below
    return level.squeeze(-1) * eps + gain.sum(-1)
