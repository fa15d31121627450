"""Frank-Wolfe steps in a ball that grows until the decision boundary is crossed, and homes in on the region from there.

Where a network hides its gradients near an example, ascent from inside the region sees nothing; from beyond the
boundary the way back is plain. Each step goes a share of the way to the point of the current ball, within the region's
box, that maximises the linearised loss: an exact formula, which uses the whole radius at once. The radius follows the
side that the search is on, as in DDN, but is never less than the region's own: where nothing is hidden, this is
Frank-Wolfe ascent inside it.

References: Chen, Zhou, Yi and Gu 2020 (Frank-Wolfe attacks with momentum); Rony et al. 2019 (the radius of DDN).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from calipers.attacks.losses import Loss
from calipers.attacks.search import Model, Record, Rows, look
from calipers.searches import norm
from calipers.sets import Region
from calipers.spec import Spec

STEP = 0.4  # the first share of the way; it falls to 0 linearly
MOMENTUM = 0.7  # how much counts of the gradients before
GROWTH = 3.0  # of the radius, each step until the boundary is first crossed
RATE = 0.6  # by which the radius changes from then on, times the share of the way


@dataclass
class Homing(Rows):
    """One row per search. ``drift``: the sum of the gradients so far, each scaled to a largest entry of 1."""

    region: Region
    spec: Spec
    target: Tensor | None
    x: Tensor
    drift: Tensor
    radius: Tensor
    crossed: Tensor


def home(
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
    step: float | None = None,
) -> None:
    """Searches from ``x`` (R, *x), one per row; the members of the region that they meet go to ``record``.

        m ← g + 0.7 m,   x ← P(x + γ (argmax_{z in ball} ⟨m, z⟩ − x))

    with P the projection onto the ball and γ falling from ``step`` (0.4) to 0. The first radius reaches the boundary of
    the linearised loss. For linf the ball is always the region. While all gradients are exactly 0 a search stays.

    Cost: ``steps`` forward and backward passes per row, fewer where the example is broken before.
    """
    if owner is None:
        owner = torch.arange(len(x), device=x.device)
    never = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    rows = Homing(owner, region, spec, target, x, torch.zeros_like(x), region.eps, never)
    for done in range(steps):
        gradient, margin, loss = look(model, objective, rows.spec, rows.x, rows.target)
        inside = rows.region.contains(rows.x)
        record.update(rows.owner, rows.x, torch.where(inside, margin, torch.inf), first=True)
        peak = _wide(gradient.flatten(1).abs().amax(1), x)
        rows.drift = MOMENTUM * rows.drift + (gradient / peak).nan_to_num(0.0)
        share = (STEP if step is None else step) * (1 - done / steps)
        if region.p != math.inf:
            if not done:
                rows.radius = _reach(region.eps, region.p, gradient, loss())
            else:
                rows.radius = _radius(rows, margin <= 0, RATE * share)
            rows.crossed = rows.crossed | (margin <= 0)
        if not rows.shrink(record, margin):
            return
        rows.x = _moved(rows, share)


def _reach(eps: Tensor, p: float, gradient: Tensor, loss: Tensor) -> Tensor:
    """The radius at which the linearised loss is 0; at least eps."""
    dual = norm(gradient.flatten(1), 2.0 if p == 2 else math.inf)
    return torch.maximum(torch.where(dual > 0, -loss / dual, 0.0).to(eps), eps)


def _radius(rows: Homing, broken: Tensor, rate: float) -> Tensor:
    """The next radius: larger on the safe side, smaller beyond."""
    p, eps = rows.region.p, rows.region.eps
    size = norm((rows.x.to(eps) - rows.region.center).flatten(1), p)
    shrunk = torch.minimum(size, rows.radius) * (1 - rate)
    grown = rows.radius * torch.where(rows.crossed, 1 + rate, GROWTH)
    return torch.maximum(torch.where(broken, shrunk, grown), eps)


def _moved(rows: Homing, share: float) -> Tensor:
    """The next points: members of the balls, and of the region where those are no larger."""
    region = ball = rows.region
    if region.p != math.inf:
        eps = rows.radius
        ball = replace(region, eps=eps, outer_eps=eps, levels=None, _cache={})
    ahead = ball.project(torch.lerp(rows.x, ball.maximizer(rows.drift), share))
    if region.grid is not None:
        back = _wide(rows.radius <= region.eps, ahead)
        ahead = torch.where(back, region.snap(ahead), ahead)
    moving = _wide((rows.drift != 0).flatten(1).any(1), ahead)
    return torch.where(moving, ahead, rows.x)


def _wide(value: Tensor, like: Tensor) -> Tensor:
    return value.view(-1, *[1] * (like.ndim - 1))
