"""The Square attack: random search over windows of the input, from forward passes alone.

The model is any callable, differentiable or not (`calipers.from_numpy`, `calipers.session` for onnxruntime).
Randomness is a hash of (the example's seed, the query's number), computed for the whole batch at once, so that what
happens to an example depends neither on its neighbours nor on the order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from calipers.attacks.inputs import outputs_of
from calipers.attacks.losses import Loss, loss_named, margin_loss
from calipers.attacks.search import Model
from calipers.attacks.windows import Layout, bumps_of, mix, random_words, unit_of
from calipers.errors import RegionError
from calipers.sets import Region
from calipers.spec import Spec

Write = tuple[Tensor, Tensor]  # where (B, k) and what (B, k)
Proposal = tuple[
    Tensor, list[Write], Tensor
]  # points, what they change, how much of the radius they use

HALVINGS = (
    10,
    50,
    200,
    1000,
    2000,
    4000,
    6000,
    8000,
)  # of 10,000 queries: the window's area halves after each


@torch.no_grad()
def square(
    model: Model,
    region: Region,
    spec: Spec,
    *,
    queries: int = 5000,
    p_init: float = 0.8,
    loss: str | Loss = "margin",
    drop: bool = True,
    dtype: torch.dtype = torch.float32,
    seeds: Tensor | None = None,
) -> Tensor:
    """For each example the best point met by random search over windows, never worse than the centre: (B, *x).

        x ← x with one window redrawn, kept if the loss grows

    For linf a window takes corners of the set, one side per channel. For l2 and l1 a window gives up part of its
    share of Σ|δ|^p, and a second one takes all that is then free, along its own direction plus a bump of random
    sign. The window's area is ``p_init`` of the input and halves on a fixed schedule.
    Images (C, H, W) or (H, W) have square windows through all channels, other inputs random subsets of features.

    Works with forward passes only, for any specification and any box, one per feature and without eps included.
    A point that breaks the specification is never given up for one that does not.

    Args:
        queries: forward passes per example; the first is the centre.
        p_init: share of the features in the first windows, in (0, 1].
        drop: stop working on an example once it is broken.
        dtype: of the points, normally the model's.
        seeds: (B,) one seed per example.

    Raises:
        ValueError: an argument is out of range, or ``seeds`` are missing.
        RegionError: the region is unbounded.

    Cost: ``queries`` forward passes.
    Reference: Andriushchenko et al. 2020 (linf, l2); Croce and Hein 2021 for l1. Other than there, a window may give
    up a random part of its share instead of all of it, and its direction counts by a random weight, so that the search
    does not end in corners of the ball; it is
    chosen where there is something to give; and what the box cuts off stays available.
    """
    if queries < 1:
        raise ValueError(f"queries: {queries} must be at least 1")
    if not 0 < p_init <= 1:
        raise ValueError(f"p_init: {p_init} is a share of the features, so it must be in (0, 1]")
    if seeds is None:
        raise ValueError("seeds: random search needs one seed per example (calipers.seeds.seeds)")
    if len(seeds) != len(region):
        raise ValueError(f"seeds: {len(seeds)} for {len(region)} examples; one each is needed")
    score = _scorer(model, loss_named(loss), region.center.shape[1:])
    key = mix(seeds.to(region.center.device).long())
    layout = Layout.of(region.center.shape[1:], region.center.device)
    best = region.project(region.center.to(dtype)).flatten(1)
    gain, broken = score(best.clone(), spec)
    if queries == 1:
        return best.view_as(region.center)
    start = _start(region, layout, key, dtype)
    search = _Search.at(region, start, key)
    search.gain, search.broken = score(start.clone(), spec)
    rows = torch.arange(len(region), device=best.device)
    if drop:
        search, spec, rows = _without(broken, search, spec, rows)
    propose = _corners if region.p == math.inf else _exchanges
    query = 2
    while query < queries and len(rows):
        halvings = sum(query * 10_000 > h * queries for h in HALVINGS)
        next_halving = [*(h * queries // 10_000 + 1 for h in HALVINGS), queries][halvings]
        size = layout.size(p_init / 2**halvings)
        count = min(next_halving, queries) - query
        for trial, writes, used in propose(search, layout, size, query, count, region.p):
            search.accept(writes, used, *score(trial, spec), region.p, drop)
            query += 1
            if drop and int(search.broken.sum()) > 0.1 * len(rows):
                break
        if drop and bool(search.broken.any()):
            _settle(best, gain, broken, rows[search.broken], search[search.broken])
            search, spec, rows = _without(search.broken, search, spec, rows)
    _settle(best, gain, broken, rows, search)
    points = best.view_as(region.center)
    inside = region.contains(points)  # by construction; projection is for what rounding may do
    if not bool(inside.all()):
        points[~inside] = region[~inside].project(points[~inside])
    return points


def _scorer(
    model: Model, objective: Loss, shape: torch.Size
) -> Callable[[Tensor, Spec], tuple[Tensor, Tensor]]:
    """Of flat points (B, n): the loss, and whether they break the specification. NaN is never better."""

    def score(points: Tensor, spec: Spec) -> tuple[Tensor, Tensor]:
        y = outputs_of(model(points.view(-1, *shape)), spec, len(points))
        margin = spec.margin_at(y)
        gain = -margin if objective is margin_loss else objective(spec.values(y), spec)
        broken = margin <= 0
        if bool(
            broken.any()
        ):  # what counts there: ties of clauses that allow them, infinite outputs
            broken = broken & spec.violated(y)
        return torch.where(torch.isfinite(gain), gain, -math.inf), broken

    return score


# -- state ---------------------------------------------------------------------------------------------------------


@dataclass
class _Search:
    """What the search knows of each example: flat points ``x`` (B, n), their scores, and the set around them.

    For l2 and l1: ``used`` = Σ|x − center|^p, never above ``limit``, and ``mass`` its cumulative sum over features.
    ``free`` lists the features with room, first ``count`` of each row.
    """

    x: Tensor
    gain: Tensor
    broken: Tensor
    key: Tensor
    low: Tensor
    high: Tensor
    center: Tensor
    free: Tensor
    count: Tensor
    used: Tensor
    limit: Tensor
    mass: Tensor

    @classmethod
    def at(cls, region: Region, x: Tensor, key: Tensor) -> _Search:
        low, high = (side.flatten(1) for side in region.inner(x.dtype))
        center = region.center.detach().flatten(1)
        room = high > low
        free = room.to(torch.int8).argsort(dim=1, descending=True, stable=True)
        zero = torch.zeros_like(center[:, 0])
        used, limit, mass = zero, zero, center[:, :0]
        if region.p != math.inf:
            mass = (x - center).abs().pow(region.p).cumsum(1)
            # the room that the sums' rounding needs
            used, limit = mass[:, -1], region.eps.detach() ** region.p * (1 - 1e-10)
        gain = x.new_full((len(x),), -math.inf)
        broken = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        count = room.sum(1).clamp_min(1)
        return cls(x, gain, broken, key, low, high, center, free, count, used, limit, mass)

    def __getitem__(self, index: Tensor) -> _Search:
        return _Search(*(getattr(self, f.name)[index] for f in fields(self)))

    def accept(
        self,
        writes: list[Write],
        used: Tensor,
        gain: Tensor,
        broken: Tensor,
        p: float,
        drop: bool,
    ) -> None:
        """Keep the better proposals; built anew, because a model may change its argument.

        With ``drop`` the first point that breaks an example stays: others decide when its row leaves the batch.
        """
        better = _better(gain, broken, self.gain, self.broken) & (used <= self.limit)
        better = better & ~self.broken if drop else better
        rows = torch.nonzero(better).flatten()
        if not len(rows):
            return
        x = self.x[rows]
        for where, what in writes:
            x.scatter_(1, where[rows], what[rows])
        self.x[rows], self.gain[rows], self.broken[rows] = x, gain[rows], broken[rows]
        if p != math.inf:
            self.used[rows] = used[rows]
            self.mass[rows] = (x - self.center[rows]).abs().pow(p).cumsum(1)


def _better(gain: Tensor, broken: Tensor, known: Tensor, known_broken: Tensor) -> Tensor:
    return (broken & ~known_broken) | ((broken == known_broken) & (gain > known))


def _settle(best: Tensor, gain: Tensor, broken: Tensor, rows: Tensor, found: _Search) -> None:
    """The centre's points are replaced by what was found, unless the centre is better."""
    better = _better(found.gain, found.broken, gain[rows], broken[rows])
    best[rows[better]] = found.x[better]


def _without(
    done: Tensor, search: _Search, spec: Spec, rows: Tensor
) -> tuple[_Search, Spec, Tensor]:
    keep = torch.nonzero(~done).flatten()
    return (
        (search, spec, rows) if len(keep) == len(rows) else (search[keep], spec[keep], rows[keep])
    )


# -- proposals -----------------------------------------------------------------------------------------


def _corners(
    search: _Search, layout: Layout, size: int, query: int, count: int, _p: float
) -> Iterator[Proposal]:
    """linf: the window at the lower or the upper side of the set, one sign per channel."""
    count = _at_once(count, len(search.x) * size * (1 if layout.vector else layout.channels * size))
    words = random_words(search.key, query, count)
    where = layout.window(size, _free(search, words[..., 0]), words[..., 1:3])
    high, low = _at(search.high, where), _at(search.low, where)
    what = torch.where(layout.signs(size, words[..., 3]), high, low)
    for write in zip(where, what, strict=True):
        yield search.x.scatter(1, *write), [write], search.used


def _exchanges(
    search: _Search, layout: Layout, size: int, query: int, count: int, p: float
) -> Iterator[Proposal]:
    """l2, l1: one window gives part of what it uses of eps^p, another takes all that is then free."""
    channels = 1 if layout.vector else layout.channels
    count = _at_once(count, len(search.x) * size * (1 if layout.vector else channels * size))
    words = random_words(search.key, query, count)
    unit = unit_of(words)
    keep = (2 * unit[..., 1:2] - 1).clamp_min(0.0)  # nothing in one case of two
    weight = 2 * unit[..., 9:10]  # of the taker's own direction
    takers = layout.window(size, _free(search, words[..., 4]), words[..., 5:7])
    middles, lows, highs = (_at(t, takers) for t in (search.center, search.low, search.high))
    bumps = bumps_of(size, square=not layout.vector).repeat(1, channels).to(words.device)
    bumps = _normal(bumps, p)[(3 * unit[..., 7]).long()]
    bumps = torch.where(layout.signs(size, words[..., 8]), bumps, -bumps)
    for i in range(count):
        drawn = unit[i, :, 0:1] * search.mass[:, -1:]
        giver = torch.searchsorted(search.mass, drawn).squeeze(1).clamp_max(search.x.shape[1] - 1)
        first = layout.window(size, giver, words[i, :, 2:4])
        middle = search.center.gather(1, first)
        before = search.x.gather(1, first) - middle
        low, high = search.low.gather(1, first), search.high.gather(1, first)
        after = (middle + keep[i] * before).to(low.dtype).clamp(low, high)
        used = search.used - _sum(before, p) + _sum(after - middle, p)

        second, middle = takers[i], middles[i]
        trial = search.x.scatter(1, first, after)
        own = trial.gather(1, second) - middle
        used = used - _sum(own, p)
        toward = _normal(weight[i] * _normal(own, p) + bumps[i], p)
        length = (search.limit - used).clamp_min(0.0) ** (1 / p) * (1 - 1e-6)
        taken = (middle + length.unsqueeze(1) * toward).to(low.dtype).clamp(lows[i], highs[i])
        trial.scatter_(1, second, taken)
        yield trial, [(first, after), (second, taken)], used + _sum(taken - middle, p)


def _at_once(count: int, entries: int) -> int:
    """Queries that are drawn together: their windows must not need more memory than a few inputs."""
    return max(1, min(count, 64, 2**20 // max(entries, 1)))


def _free(search: _Search, word: Tensor) -> Tensor:
    """A random feature that has room, for words (Q, B)."""
    return _at(search.free, (unit_of(word) * search.count).long().unsqueeze(-1)).squeeze(-1)


def _at(rows: Tensor, where: Tensor) -> Tensor:
    """rows (B, n) at (Q, B, k)."""
    return rows.expand(len(where), -1, -1).gather(2, where)


def _sum(gap: Tensor, p: float) -> Tensor:
    return (gap.square() if p == 2 else gap.abs()).sum(1)


def _normal(rows: Tensor, p: float) -> Tensor:
    size: Tensor = torch.linalg.vector_norm(rows, ord=p, dim=-1, keepdim=True)
    return rows / torch.where(size > 0, size, 1.0)


def _start(region: Region, layout: Layout, key: Tensor, dtype: torch.dtype) -> Tensor:
    """The member furthest along a random pattern: stripes of corners for linf, tiles of bumps for l2 and l1."""
    low, high = region.inner(dtype)
    if not bool(torch.isfinite(low).all() & torch.isfinite(high).all()):
        raise RegionError("square: the region is unbounded, so it has no corners to search")
    channels, height, width = layout.channels, layout.height, layout.width
    rows = 1 if region.p == math.inf or layout.vector else 5
    columns = width if region.p == math.inf or layout.vector else 5
    rows, columns = min(rows, height), min(columns, width)
    word = random_words(~key, 0, 1, channels * rows * columns)[0]
    value = torch.where((word & 1).bool(), 1.0, -1.0) * (0.5 + unit_of(word))
    grid = value.view(-1, channels, rows, 1, columns, 1)
    tall, wide = -(-height // rows), -(-width // columns)
    tile = torch.ones(tall, wide, dtype=torch.float64, device=key.device)
    if region.p != math.inf and not layout.vector:
        side = max(tall, wide)
        tile = bumps_of(side, square=True)[0].view(side, side)[:tall, :wide].to(key.device)
    pattern = (grid * tile.view(1, 1, 1, tall, 1, wide)).reshape(
        -1, channels, rows * tall, columns * wide
    )[..., :height, :width]
    return region.maximizer(pattern.reshape(region.center.shape).to(dtype)).flatten(1)
