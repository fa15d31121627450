"""The cascade `auto`: cheap searches first, dearer ones only on what they leave unbroken.

A level is a table of stages. Each stage runs several searches per surviving example side by side: all clauses at once,
or one search for each of the most promising ones (for labels: the rivals nearest to winning), from the example, from
the best point so far, from random points or random corners. On networks that hide their gradients many short searches
from far apart find more than few long ones; in l2 and l1 Frank-Wolfe steps in a ball that may grow beyond the boundary
find in tens of steps what ascent inside it does not. Work is counted in passes of the network: a gradient is two, a
query one.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from calipers.attacks.apgd import ascend, start
from calipers.attacks.homing import home
from calipers.attacks.inputs import outputs_of, require_pairs
from calipers.attacks.losses import Loss, suited
from calipers.attacks.search import Model, Record, required
from calipers.attacks.square import square
from calipers.errors import unknown_name
from calipers.seeds import mixed
from calipers.sets import Region
from calipers.spec import Spec

ROWS = 128  # searches side by side: more leave the cache


@dataclass(frozen=True)
class Stage:
    """Searches from several starts or towards several targets.

    Args:
        steps: of each search; queries for "square".
        search: "ascend" (APGD), "home" (Frank-Wolfe steps over the boundary and back: `calipers.attacks.homing`) or
            "square" (one search for each example by `calipers.square`, without gradients).
        targets: how many clauses get a search of their own, the most promising first; 0: one for all clauses.
        starts: searches per target, or for all clauses.
        start: where the first of them begins: "center", "best" (the best point so far), "random" or "corner"; the
            others begin at random points, or corners.
        step: the first step: of "ascend" in units of eps, of "home" the share of the way.
        close: only for examples whose margin has come down to this share of the clean one: what is going to break
            after many more searches is nearly always among the few that already came close.
        loss: by name.
    """

    steps: int
    search: str = "ascend"
    targets: int = 0
    starts: int = 1
    start: str = "center"
    step: float | None = None
    close: float = math.inf
    loss: str = "margin"


_SHORT = (Stage(10), Stage(20, targets=2))
_LINF = (
    Stage(10),
    Stage(20, targets=2),
    Stage(20, starts=4, start="corner", step=1.0),
    Stage(100, starts=32, start="corner", step=0.5, close=0.15),
)
_L2 = (
    Stage(10, "home", step=1.0, loss="cross_entropy"),
    Stage(30, "home"),
    Stage(25, "home", targets=9),
)
_L1 = (
    Stage(20, "home", step=1.0, loss="cross_entropy"),
    Stage(40, "home"),
    Stage(30, "home", targets=4),
    Stage(100, targets=2, close=0.15),
    Stage(50, "home", targets=3, starts=3, start="corner", step=1.0, close=0.15),
)

LEVELS: dict[str, dict[float, tuple[Stage, ...]]] = {
    "quick": {math.inf: _SHORT, 2.0: _L2[:2], 1.0: _L1[:2]},
    "standard": {math.inf: _LINF, 2.0: _L2, 1.0: _L1},
    "thorough": {
        math.inf: (
            *_LINF,
            Stage(100, targets=9),
            Stage(25, starts=40, start="corner", step=1.0),
            Stage(50, targets=3, starts=10, start="random"),
            Stage(5000, "square"),
        ),
        2.0: (
            *_L2,
            Stage(100, targets=9),
            Stage(100, "home", targets=9, starts=3),
            Stage(50, starts=30, start="random"),
            Stage(5000, "square"),
        ),
        1.0: (
            *_L1,
            Stage(100, targets=9),
            Stage(100, "home", targets=9, starts=3),
            Stage(100, targets=3, starts=5, start="random"),
            Stage(5000, "square"),
        ),
    },
}


@dataclass(eq=False)
class Found:
    """What a search has found so far, example by example; hand it back to `search` to go on.

    Args:
        points: (B, *x) the point of lowest margin found, a member of the region.
        margin: (B,) its margin, in the model's own precision.
        clean: (B,) the margin of the example itself.
        passes: (B,) passes of the network spent: forward and backward ones count one each.
        stage: (B,) how many stages are done.
        stopped: why it ended early, or None.
    """

    points: Tensor
    margin: Tensor
    clean: Tensor
    passes: Tensor
    stage: Tensor
    stopped: str | None = None

    @property
    def broken(self) -> Tensor:
        """(B,) bool; `calipers.witness` has the last word."""
        return self.margin <= 0


def search(
    model: Model,
    region: Region,
    spec: Spec,
    *,
    level: str | Sequence[Stage] = "standard",
    passes: float = math.inf,
    seconds: float = math.inf,
    certified: Tensor | None = None,
    rows: int = ROWS,
    precision: torch.dtype | None = None,
    found: Found | None = None,
    dtype: torch.dtype = torch.float32,
    seeds: Tensor | None = None,
    progress: Callable[[int, Found], None] | None = None,
) -> Found:
    """For each example the point of lowest margin that the stages of ``level`` find, and what it cost.

    Results do not depend on batch or order up to rounding. Ctrl-C and time limits end it with what was found so far;
    examples whose stage was not finished keep what the stage before left.

    Args:
        level: "quick", "standard" or "thorough", or stages of one's own.
        passes: no example starts another stage once it has cost so many passes of the network.
        seconds: no further searches are started after so many seconds.
        certified: (B,) bool: examples that are known to be robust; nothing is spent on them.
        rows: searches side by side; memory is proportional to it.
        precision: search with autocast to this dtype (bfloat16 is about twice as fast on processors that have it).
            What counts is decided in the model's own precision either way.
        found: what an earlier call with the same arguments returned: go on from there.
        seeds: (B,) one seed per example; all zero if not given.
        progress: called after each batch of searches with the number of the stage and what is found.

    Raises:
        ValueError: unknown level, or an argument of the wrong shape.

    Cost: per example 1 + Σ 2·steps·searches over its stages, less what breaking it early saves.
    """
    stages = stages_of(level, region.p)
    deadline = time.perf_counter() + seconds
    count = len(region)
    if certified is not None and certified.shape != (count,):
        raise ValueError(
            f"certified: {tuple(certified.shape)} is not one flag for each of {count} examples"
        )
    if rows < 1:
        raise ValueError(f"rows: {rows} must be at least 1")
    require_pairs(spec, count)
    seeds = required(seeds, count, random=False)
    fast = model if precision is None else _lowered(model, precision, region.center.device.type)
    if found is None:
        found = _clean(model, region, spec, rows, dtype)
    found.stopped = None
    try:
        for number, stage in enumerate(stages):
            todo = ~found.broken & (found.stage == number)
            if certified is not None:
                todo &= ~certified.to(todo.device)
            hopeless = todo & (found.margin > stage.close * found.clean)
            found.stage[hopeless] += 1
            todo &= ~hopeless
            later = todo & (found.passes >= passes)
            index = torch.nonzero(todo & ~later).flatten()
            found.stopped = "stopped by passes" if bool(later.any()) else found.stopped
            for part in _parts(index, max(rows // searches(stage, spec), 1)):
                if time.perf_counter() > deadline:
                    found.stopped = "stopped by time"
                    return found
                own = mixed(seeds[part.cpu()], number)
                _run(model, fast, region[part], spec[part], stage, found, part, own)
                if progress:
                    progress(number, found)
    except KeyboardInterrupt:
        found.stopped = "interrupted"
    return found


def auto(
    model: Model,
    region: Region,
    spec: Spec,
    *,
    level: str | Sequence[Stage] = "standard",
    dtype: torch.dtype = torch.float32,
    seeds: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """For each example the point of lowest margin that a cascade of searches finds: (B, *x).

    `search` without its accounts, as an attack like any other; ``options`` are `search`'s.

    Raises:
        KeyboardInterrupt: only `search` can say that what it returns is a part.
    """
    found = search(model, region, spec, level=level, dtype=dtype, seeds=seeds, **options)
    if found.stopped == "interrupted":
        raise KeyboardInterrupt
    return found.points


def stages_of(level: str | Sequence[Stage], p: float) -> Sequence[Stage]:
    """The stages of a level for one norm.

    Raises:
        ValueError: unknown level; the nearest one is suggested.
    """
    if not isinstance(level, str):
        return level
    if level not in LEVELS:
        raise unknown_name("level", level, LEVELS)
    return LEVELS[level][p]


def searches(stage: Stage, spec: Spec) -> int:
    """Searches side by side for one example."""
    return max(min(stage.targets, spec.count), 1) * stage.starts


def _parts(index: Tensor, size: int) -> Sequence[Tensor]:
    parts: Sequence[Tensor] = torch.split(index, size) if len(index) else ()
    return parts


def _lowered(model: Model, precision: torch.dtype, device: str) -> Model:
    def forward(x: Tensor) -> Tensor:
        with torch.autocast(device, dtype=precision):
            return model(x).to(x.dtype)

    return forward


@torch.no_grad()
def _clean(model: Model, region: Region, spec: Spec, rows: int, dtype: torch.dtype) -> Found:
    points = region.project(region.center.to(dtype))
    count = len(points)
    margin = points.new_full((count,), math.inf)
    for part in _parts(torch.arange(count, device=points.device), rows):
        y = outputs_of(model(points[part]), spec[part], len(part))
        margin[part] = spec[part].margin_at(y).to(margin)
    nothing = torch.zeros(count, dtype=torch.int64, device=points.device)
    return Found(points, margin, margin.clone(), nothing + 1, nothing)


def _run(
    model: Model, fast: Model, region: Region, spec: Spec,
    stage: Stage, found: Found, part: Tensor, seeds: Tensor,
) -> None:  # fmt: skip
    """One stage for the examples ``part``; ``found`` changes only once it is done."""
    count = len(part)
    looks, queries = torch.zeros(2, count, dtype=torch.int64, device=part.device)
    record = Record(
        found.points[part], found.margin[part], shared=False, looks=looks, queries=queries
    )
    if stage.search == "square":
        queries += _square(model, region, spec, stage, record, seeds)
    else:
        _searches(model, fast, region, spec, stage, record, seeds)
    found.points[part], found.margin[part] = record.points, record.margin
    found.passes[part] += 2 * looks + queries
    found.stage[part] += 1


def _square(
    model: Model, region: Region, spec: Spec, stage: Stage, record: Record, seeds: Tensor
) -> int:
    """Square for every example; returns the passes of each, shared equally and rounded up."""
    spent = 0

    def forward(x: Tensor) -> Tensor:
        nonlocal spent
        spent += len(x)
        return model(x)

    dtype = record.points.dtype
    points = square(forward, region, spec, queries=stage.steps, dtype=dtype, seeds=seeds)
    with torch.no_grad():
        margin = spec.margin_at(forward(points))
    record.looks = None  # its passes are counted here
    record.update(None, points, margin, first=True)
    return -(-spent // len(region))


def _searches(
    model: Model,
    fast: Model,
    region: Region,
    spec: Spec,
    stage: Stage,
    record: Record,
    seeds: Tensor,
) -> None:
    """All searches of a stage side by side."""
    count, each = len(region), searches(stage, spec)
    everyone = torch.arange(count, device=record.points.device)
    target = None
    if stage.targets and spec.count > 1:
        record.query(everyone)
        target = _promising(model, spec, record.points, stage)
    owner = everyone.repeat_interleave(each)
    number = torch.arange(count * each) % each
    near, own = region[owner], spec[owner]
    x = _starts(near, record.points[owner], stage, mixed(seeds[owner.cpu()], number), number)
    if fast is not model:
        record.judge = lambda index, points: spec[index].margin_at(model(points))
    loss = suited(stage.loss, spec, targeted=target is not None)
    run = SEARCHES[stage.search]
    run(fast, near, own, x, target, owner, loss, record, steps=stage.steps, step=stage.step)
    if fast is not model:
        record.query(everyone)
        with torch.no_grad():
            record.margin = spec.margin_at(model(record.points))


def _ascend(
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
    step: float | None,
) -> None:
    """APGD, as `SEARCHES` call it."""
    rows = start(region, spec, x, target, owner, step=step)
    ascend(model, rows, objective, record, steps=steps)


SEARCHES: Mapping[str, Callable[..., None]] = {"ascend": _ascend, "home": home}  # with gradients


@torch.no_grad()
def _promising(model: Model, spec: Spec, points: Tensor, stage: Stage) -> Tensor:
    """The clauses nearest to breaking at ``points``, one for each search of each example."""
    clauses = spec.clauses(spec.values(model(points)))
    first = clauses.argsort(dim=-1, stable=True)[:, : stage.targets]
    return first.repeat_interleave(stage.starts, 1).flatten()


def _starts(region: Region, best: Tensor, stage: Stage, seeds: Tensor, number: Tensor) -> Tensor:
    """Where each search begins; of several for one target only the first may begin elsewhere than at random."""
    first = FIRST[stage.start](region, best)
    drawn = (number % stage.starts > 0).to(best.device)
    if first is not None and not bool(drawn.any()):
        return first
    away = region.sample(seeds, best.dtype)
    if stage.start == "corner":
        away = region.maximizer(away - region.center.to(best.dtype))
    if first is None:
        return away
    return torch.where(drawn.view(-1, *[1] * (best.ndim - 1)), away, first)


FIRST: Mapping[str, Callable[[Region, Tensor], Tensor | None]] = {
    "center": lambda region, best: region.project(region.center.to(best.dtype)),
    "best": lambda _, best: best,
    "random": lambda *_: None,
    "corner": lambda *_: None,
}
