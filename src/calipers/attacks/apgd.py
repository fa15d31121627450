"""APGD: projected gradient ascent that finds its own step size (Croce and Hein 2020; for l1 Croce and Hein 2021)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from calipers.attacks.losses import Loss, suited
from calipers.attacks.search import Model, Record, Rows, look, repeated, required
from calipers.sets import Region
from calipers.spec import Spec

MOMENTUM = 0.75  # the share of the new step in each move
PROGRESS = 0.75  # the share of steps that must improve the loss for the step size to stay
SPARSE = 0.2  # for l1: the share of features that the first steps move
FINEST = 10.0  # for l1: the smallest step is eps over this
WIDE = ((3.0, 0.3), (2.0, 0.3))  # for l1: the shares of the steps that first go to larger balls
OFTEN = 0.1  # for l1: the share of the steps between two checkpoints


def apgd(
    model: Model,
    region: Region,
    spec: Spec,
    *,
    steps: int = 100,
    restarts: int = 1,
    random_start: bool = False,
    loss: str | Loss = "margin",
    target: Tensor | None = None,
    drop: bool = True,
    dtype: torch.dtype = torch.float32,
    seeds: Tensor | None = None,
) -> Tensor:
    """For each example the point of lowest margin met by gradient ascent with momentum and adaptive steps: (B, *x).

        u ← P(x + η·argmax_{‖d‖_p ≤ 1} ⟨g, d⟩),   x ← P(x + 0.75 (u − x) + 0.25 (x − x_before))

    η starts at 2 eps and is halved, going back to the best point, at checkpoints where less than three quarters of the
    steps since the last one improved the loss, or where neither η nor the best loss has changed. For l1 a step moves
    the features of largest gradient, 1.5 times fewer than the best point has changed, without momentum.

    Args:
        restarts: the first starts at the centre (unless ``random_start``), the others at random points.
        loss: what is maximised, by name (`LOSSES`) or a function; "dlr" needs three classes, with a target four.
        target: (B,) the clause to break (for labels: the rival, counted without the label); None: any.
        drop: stop working on an example once its margin is <= 0.
        seeds: (B,) one seed per example; needed for random starts.

    Raises:
        ValueError: an argument is out of range.

    Cost: ``steps`` forward and backward passes per restart.
    """
    if steps < 1 or restarts < 1:
        raise ValueError(f"steps: {steps} and restarts: {restarts} must be at least 1")
    seeds = required(seeds, len(region), random=random_start or restarts > 1)
    if target is not None:
        if target.shape != (len(region),) or target.is_floating_point():
            raise ValueError(
                f"target: {target.dtype} of shape {tuple(target.shape)} is not one clause for each of {len(region)} "
                "examples"
            )
        if not bool(((target >= 0) & (target < spec.count)).all()):
            raise ValueError(
                f"target: clauses must be in 0..{spec.count - 1}, got {target.tolist()}"
            )
    objective = suited(loss, spec, targeted=target is not None)
    center = region.project(region.center.to(dtype))
    best = Record.at(center)
    for restart in range(restarts):
        x = region.sample(seeds + restart, dtype) if random_start or restart else center
        rows = start(region, spec, x, target)
        if drop and restart:
            rows.keep(best.alive())
        ascend(model, rows, objective, best, steps=steps, drop=drop)
    return best.points


@dataclass
class Climb(Rows):
    """One row per search. ``best``, ``uphill`` and ``peak``: the row's best point, its gradient and loss."""

    region: Region
    spec: Spec
    target: Tensor | None
    x: Tensor
    before: Tensor
    gradient: Tensor
    loss: Tensor
    best: Tensor
    uphill: Tensor
    peak: Tensor
    step: Tensor  # in units of eps
    improved: Tensor  # steps since the last checkpoint that raised the loss
    known: Tensor  # the peak at the last checkpoint
    halved: Tensor
    sparsity: Tensor  # l1: how many features a step moves


def start(
    region: Region,
    spec: Spec,
    x: Tensor,
    target: Tensor | None = None,
    owner: Tensor | None = None,
    *,
    step: float | None = None,
) -> Climb:
    """Searches from ``x`` (R, *x), one per row of ``region`` and ``spec``; the first step is ``step``·eps."""
    rows = len(x)
    never = x.new_full((rows,), -torch.inf)
    size = x.shape[1:].numel()
    return Climb(
        owner, region, spec, target, x, x, x, never, x, x, never,
        x.new_full((rows,), step or (1.0 if region.p == 1 else 2.0)),
        x.new_zeros(rows), never, torch.ones(rows, dtype=torch.bool, device=x.device),
        x.new_full((rows,), max(SPARSE * size, 1.0)),
    )  # fmt: skip


def checkpoints(steps: int, *, sparse: bool = False) -> list[int]:
    """After how many steps the step size is reconsidered: first 22 % of all, then intervals shorter by 3 % each;
    for l1 every tenth."""
    if sparse:
        return list(range(0, steps, max(round(OFTEN * steps), 1)))
    marks, gap = [0], max(int(0.22 * steps), 1)
    while marks[-1] + gap < steps:
        marks.append(marks[-1] + gap)
        gap = max(gap - max(int(0.03 * steps), 1), int(0.06 * steps), 1)
    return marks


def ascend(
    model: Model, rows: Climb, objective: Loss, record: Record, *, steps: int, drop: bool = True
) -> None:
    """All of one search, for l1 with its wide phases."""
    phases = [(factor, round(share * steps)) for factor, share in WIDE]
    if rows.region.p != 1 or not all(count for _, count in phases):
        climb(model, rows, objective, record, steps=steps, drop=drop)
        return
    region, owner, target, spec, x = rows.region, rows.owner, rows.target, rows.spec, rows.x
    for factor, count in phases:
        wide = replace(
            region, eps=region.eps * factor, outer_eps=region.outer_eps * factor, _cache={}
        )
        aside = start(wide, spec, wide.project(x), target, owner)
        ignored = Record(
            record.points, torch.full_like(record.margin, torch.inf), looks=record.looks
        )
        climb(model, aside, objective, ignored, steps=count, drop=False)
        x = aside.best
    rows = start(region, spec, region.project(x), target, owner)
    rest = steps - sum(count for _, count in phases)
    climb(model, rows, objective, record, steps=rest, drop=drop)


def climb(
    model: Model, rows: Climb, objective: Loss, record: Record, *, steps: int, drop: bool
) -> None:
    """Run all rows for ``steps`` steps or until their examples are broken."""
    model = repeated(model)
    sparse = rows.region.p == 1
    marks = {b: b - a for a, b in pairwise(checkpoints(steps, sparse=sparse))}
    for i in range(steps):
        gradient, margin, loss = look(model, objective, rows.spec, rows.x, rows.target)
        record.update(rows.owner, rows.x, margin, first=drop)
        _note(rows, gradient, loss(), first=i == 0)
        if drop and not rows.shrink(record, margin):
            break
        if i + 1 == steps:
            break
        if i in marks:
            (_reconsider_sparse if sparse else _reconsider)(rows, marks[i])
        if sparse and i + 2 == steps:  # the last look: the best vertex by the best point's gradient
            rows.x = rows.region.maximizer(rows.uphill)
        else:
            _move(rows, sparse, first=i == 0)


def _wide(value: Tensor, like: Tensor) -> Tensor:
    return value.view(-1, *[1] * (like.ndim - 1))


def _note(rows: Climb, gradient: Tensor, loss: Tensor, *, first: bool) -> None:
    """Take in what the last look found; NaN is no improvement."""
    rows.improved = rows.improved + (loss > rows.loss)
    rows.gradient, rows.loss = gradient, loss
    better = loss > rows.peak
    if first or bool(better.all()):
        rows.best, rows.uphill, rows.peak = rows.x, gradient, loss
        return
    index = torch.nonzero(better).flatten()
    if len(index):
        rows.best = rows.best.index_copy(0, index, rows.x[index])
        rows.uphill = rows.uphill.index_copy(0, index, gradient[index])
        rows.peak = torch.where(better, loss, rows.peak)


def _move(rows: Climb, sparse: bool, *, first: bool) -> None:
    region, x = rows.region, rows.x
    length = _wide(rows.step, x) * region.unit.to(x.dtype)
    if sparse:
        rows.x = region.project(
            x + length * sparse_direction(region, x, rows.gradient, rows.sparsity)
        )
        return
    ahead = region.ascend(x, rows.gradient.clone(), length)
    if first:
        rows.before, rows.x = x, ahead
        return
    drift = x - rows.before
    rows.before = x
    rows.x = region.project(torch.lerp(x, ahead, MOMENTUM).add_(drift, alpha=1 - MOMENTUM))


def _reconsider(rows: Climb, since: int) -> None:
    """Halve the step where it no longer helps, and go on from the best point there."""
    slow = rows.improved < PROGRESS * since
    stuck = ~rows.halved & (rows.peak <= rows.known)
    rows.halved = slow | stuck
    _return(rows, rows.halved)
    rows.step = torch.where(rows.halved, rows.step / 2, rows.step)
    rows.known, rows.improved = rows.peak, torch.zeros_like(rows.improved)


def _reconsider_sparse(rows: Climb, _since: int) -> None:
    """The sparsity follows the best point's; the step shrinks while that no longer changes."""
    moved = (rows.best - rows.region.center.to(rows.best.dtype)).flatten(1)
    changed = (moved != 0).sum(1).to(rows.sparsity)
    settled = changed >= 0.95 * rows.sparsity * 1.5
    rows.step = torch.where(
        settled, (rows.step / 1.5).clamp_min(1 / FINEST), torch.ones_like(rows.step)
    )
    rows.sparsity = (changed / 1.5).clamp_min(1.0)
    _return(rows, torch.ones_like(settled))


def _return(rows: Climb, where: Tensor) -> None:
    mask = _wide(where, rows.x)
    rows.x = torch.where(mask, rows.best, rows.x)
    rows.gradient = torch.where(mask, rows.uphill, rows.gradient)


def sparse_direction(region: Region, x: Tensor, gradient: Tensor, count: Tensor) -> Tensor:
    """The steepest direction of l1 norm 1 that is spread evenly over the ``count`` (R,) features of largest
    gradient that the box does not stop."""
    low, high = region.inner(x.dtype)
    free = torch.where(gradient > 0, x < high, x > low)
    size = torch.where(free, gradient.abs(), 0.0).flatten(1)
    keep = int(count.max().clamp(1, size.shape[1]))
    top = size.topk(keep).values
    index = (count.long() - 1).clamp(0, keep - 1).unsqueeze(1)
    chosen = (size >= top.gather(1, index)) & (size > 0)
    direction = torch.where(chosen, gradient.flatten(1).sign(), 0.0)
    return (direction / chosen.sum(1, keepdim=True).clamp_min(1)).view_as(gradient)
