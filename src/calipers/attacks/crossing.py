"""Searches that cross the decision boundary outside the region and come back (after FAB, Croce and Hein 2020).

Where a network hides its gradients near an example, ascent from inside the region sees nothing; from beyond the
boundary the way back is plain. A search steps onto the linearised boundary, by the shortest way in the region's norm
and inside its box, drawn a little towards the example; beyond the boundary it goes back part of the way.

How near its best point beyond the boundary is tells early whether a search can still come inside: each doubling of
the steps mostly gains less than the one before, so one that lacks far more than the last doubling gained is given up.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from calipers.attacks.apgd import climb, start
from calipers.attacks.losses import Loss
from calipers.attacks.search import Model, Record, Rows, look
from calipers.searches import norm, shortest
from calipers.sets import Region
from calipers.spec import Spec

OVERSHOOT = 1.05  # beyond the linearised boundary
DRAWN = 0.1  # the largest weight of the example's own projection
BACK = 0.9  # the share of the way that is kept once the boundary is crossed
FIRST = 4  # steps before searches are first compared with the radius
REACH = 4.0  # how many times the gain of the last doubling a search may lack


@dataclass
class Crossing(Rows):
    """One row per search; ``best`` is its nearest point beyond the boundary, ``size`` that point's distance and
    ``known`` what it was when half the steps were done."""

    region: Region
    spec: Spec
    target: Tensor | None
    origin: Tensor
    lower: Tensor
    upper: Tensor
    eps: Tensor
    x: Tensor
    best: Tensor
    size: Tensor
    known: Tensor


def cross(
    model: Model,
    region: Region,
    spec: Spec,
    x: Tensor,
    target: Tensor | None,
    owner: Tensor | None,
    objective: Loss,
    record: Record,
    *,
    steps: int,
) -> None:
    """Searches from ``x`` (R, *x), one per row, those without hope given up early; the last fifth of the steps ascends
    inside the region from the member nearest to each search's best. What they find inside goes to ``record``.

    For linf the region is its own box, so that there is no outside: searches stay within.
    """
    flat = x.flatten(1)
    far = flat.new_full((len(x),), torch.inf)
    low, high = (side.flatten(1) for side in region.inner(x.dtype))
    center = region.center.to(x.dtype).flatten(1)
    rows = Crossing(
        owner, region, spec, target, center, low, high, region.eps.to(x.dtype), flat, flat, far, far
    )
    tail = steps // 5
    if not _walk(model, rows, objective, record, steps=steps - tail) or not tail:
        return
    inside = rows.region.project(rows.best.view(-1, *x.shape[1:]))
    last = start(rows.region, rows.spec, inside, rows.target, rows.owner, step=0.5)
    climb(model, last, objective, record, steps=tail, drop=True)


def _walk(model: Model, rows: Crossing, objective: Loss, record: Record, *, steps: int) -> bool:
    """The walk itself; whether rows are left that may still come inside."""
    shape, p = rows.region.center.shape[1:], rows.region.p
    for done in range(1, steps + 1):
        point = rows.x.view(-1, *shape)
        gradient, margin, loss = look(model, objective, rows.spec, point, rows.target)
        broken = margin <= 0
        offset = rows.x - rows.origin
        size = norm(offset, p)
        nearer = broken & (size < rows.size)
        rows.best = torch.where(nearer.unsqueeze(1), rows.x, rows.best)
        rows.size = torch.where(nearer, size, rows.size)
        _offer(model, rows, record, point, margin, nearer & (size <= rows.eps * (1 - 1e-6)))
        g, gap = gradient.flatten(1), -loss()  # the loss is negative on the safe side
        ahead = _onto(rows, rows.x, g, gap, p)
        home = _onto(rows, rows.origin, g, gap + (g * offset).sum(1), p)
        far_step, far_home = norm(ahead - rows.x, p), norm(home - rows.origin, p)
        share = (far_step / (far_step + far_home).clamp_min(1e-30)).clamp_max(DRAWN).unsqueeze(1)
        step = torch.lerp(
            rows.x + OVERSHOOT * (ahead - rows.x),
            rows.origin + OVERSHOOT * (home - rows.origin),
            share,
        ).clamp(rows.lower, rows.upper)
        back = rows.origin + BACK * offset
        rows.x = torch.where(broken.unsqueeze(1), back, step)
        if not rows.shrink(record, margin):
            return False
        if done >= FIRST and not done & (done - 1) and not _hopeful(rows):
            return False
    return True


def _hopeful(rows: Crossing) -> bool:
    """Give up the searches that cannot come inside at the rate of the last doubling; whether any is left.

    One that has not crossed the boundary at all has no rate, and goes on.
    """
    lacks = rows.size - rows.eps
    index = torch.nonzero(~(lacks > REACH * (rows.known - rows.size))).flatten()
    rows.known = rows.size
    if 0 < len(index) < len(lacks):
        rows.keep(index)
    return len(index) > 0


def _onto(rows: Crossing, x: Tensor, g: Tensor, gap: Tensor, p: float) -> Tensor:
    """The nearest point to ``x`` in the box where the linearised loss has risen by ``gap`` (fallen, if negative)."""
    g = torch.where((gap < 0).unsqueeze(1), -g, g)
    cap = torch.where(g > 0, rows.upper - x, x - rows.lower).clamp_min(0.0)
    return x + g.sign() * shortest(g.abs(), cap, gap.abs(), p)


def _offer(
    model: Model, rows: Crossing, record: Record, point: Tensor, margin: Tensor, inside: Tensor
) -> None:
    """Count the look, and hand over the members of the region."""
    members = torch.full_like(margin, torch.inf)
    index = torch.nonzero(inside).flatten()
    if len(index):
        point = point.index_copy(0, index, rows.region[index].project(point[index]))
        record.query(index if rows.owner is None else rows.owner[index])
        with torch.no_grad():
            members[index] = rows.spec[index].margin_at(model(point[index]))
    record.update(rows.owner, point, members, first=True)
