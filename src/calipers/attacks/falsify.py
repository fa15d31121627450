"""Any violated point at all: the search for one witness of a query, as VNN-LIB poses them.

Other than for images, regions may have few dimensions and be wide, the clauses several functionals, and the networks
be slow to evaluate. What finds witnesses there, in rising order of cost: a few random points; one run of PGD; many
samples of which the best few descend; starting points that somebody else suggests (the corners where a linear bound
is lowest, say), and descents from them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from calipers.attacks.gradient import pgd
from calipers.attacks.losses import lacks, shortfall
from calipers.attacks.search import Model, look
from calipers.sets import Region
from calipers.spec import Spec

FIRST = (1, 4, 16, 64, 256)  # random points before any gradient
LIMIT = 200_000  # samples at once
MANY = 16_384  # of a dive
NUMBERS = 1 << 26  # of all samples together


class Suggestion(NamedTuple):
    """Points (R, *x), the row of the region that each is a member of, and the clause to break from there (R,)."""

    points: Tensor
    rows: Tensor
    clause: Tensor


def falsify(
    model: Model,
    region: Region,
    spec: Spec,
    *,
    seconds: float = math.inf,
    suggest: Callable[[], Iterable[Suggestion]] = tuple,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    pace: float | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of points (R, *x), each with the row of ``region`` it is a member of, until time is up.

    The caller judges them (`calipers.witness`) and stops asking once one is accepted; without a limit it never ends.

    Args:
        suggest: called once, after the first round of descents; its points are tried, then descended from.
        pace: seconds that the model takes for a point, by which batches are sized; measured if None. Given, it makes
            the points independent of the machine.

    Raises:
        RegionError: the region is unbounded, so that there is no uniform draw.

    Cost: rounds of about 0.1 s of samples and 100 to 300 gradients of at most 128 points.
    """
    end = time.perf_counter() + seconds
    draw = _draws(region, dtype, torch.Generator().manual_seed(seed))
    low = region.center
    given, pace = pace, pace or 0.0
    for count in FIRST:
        points, rows = draw(count)
        begin = time.perf_counter()
        with torch.no_grad():
            model(points)
        pace = given or max((time.perf_counter() - begin) / count, 1e-9)
        yield points, rows
        if pace * count > 0.02:
            break
    yield (
        pgd(model, region, spec, loss="margin", drop=True, dtype=dtype),
        torch.arange(len(region), device=low.device),
    )
    few = int(min(128, max(16, 0.005 / pace)))
    sizes: tuple[float, ...] = (0.3,)
    while time.perf_counter() < end:
        many = int(min(LIMIT, max(few, 0.1 / pace), max(NUMBERS // low[0].numel(), few)))
        points, rows = draw(many)
        top, clause = _best(model, spec, points, rows, few)
        for size in sizes:
            yield descend(model, region, spec, points[top], rows[top], clause, size, end), rows[top]
        if len(sizes) == 1:
            sizes = (0.3, 0.1, 0.03)
            for points, rows, clause in suggest():
                yield points, rows
                for size in (0.1, 0.3):
                    yield descend(model, region, spec, points, rows, clause, size, end), rows


def dive(
    model: Model,
    region: Region,
    spec: Spec,
    generator: torch.Generator,
    *,
    dtype: torch.dtype,
    seconds: float = 0.03,
    few: int = 256,
    steps: int = 30,
) -> tuple[Tensor, Tensor]:
    """Short descents from the best of many samples: points, and the row of the region that each is a member of.

    Where few inputs vary, many samples and few steps find more witnesses in the same time than few and many.

    Args:
        seconds: that the samples may take, about, by the time that the first 64 take.
    """
    draw = _draws(region, dtype, generator)
    begin = time.perf_counter()
    points, rows = draw(64)
    with torch.no_grad():
        model(points)
    pace = (time.perf_counter() - begin) / 64
    many = int(min(MANY, seconds / pace, max(NUMBERS // points[0].numel(), few)))
    if many > len(points):
        points, rows = draw(many)
    top, clause = _best(model, spec, points, rows, few)
    return descend(model, region, spec, points[top], rows[top], clause, 0.3, steps=steps), rows[top]


Draw = Callable[[int], tuple[Tensor, Tensor]]


def _draws(region: Region, dtype: torch.dtype, generator: torch.Generator) -> Draw:
    """A function that draws so many points of the region, and says from which row each is."""
    low, high = region.inner(dtype)
    region.sample(torch.zeros(len(region), dtype=torch.int64), dtype)  # refuses what has no draw

    def draw(count: int) -> tuple[Tensor, Tensor]:
        rows = torch.randint(len(region), (count,), generator=generator)
        unit = torch.rand((count, *low.shape[1:]), generator=generator, dtype=dtype).to(low.device)
        rows = rows.to(low.device)
        points = (low[rows] + unit * (high - low)[rows]).clamp(low[rows], high[rows])
        return (points if math.isinf(region.p) else region[rows].project(points)), rows

    return draw


@torch.no_grad()
def _best(
    model: Model, spec: Spec, points: Tensor, rows: Tensor, few: int
) -> tuple[Tensor, Tensor]:
    """The samples nearest to breaking each clause, and those clauses."""
    own = spec[rows]
    lacking = lacks(own.values(model(points)), spec)
    each = min(max(2, few // spec.count), len(points))
    top = lacking.topk(each, dim=0, largest=False).indices.T.flatten()
    return top, torch.arange(spec.count, device=points.device).repeat_interleave(each)


def descend(
    model: Model,
    region: Region,
    spec: Spec,
    points: Tensor,
    rows: Tensor,
    clause: Tensor,
    size: float,
    end: float = math.inf,
    steps: int = 100,
) -> Tensor:
    """Adam on what each point's clause lacks, in units of the box, the length along a cosine; the first success or
    the time ``end`` (of `time.perf_counter`) stops it.

    Reference: Kingma and Ba 2015; β = (0.9, 0.99).
    """
    region, spec = region[rows], spec[rows]
    unit = region.unit.to(points.dtype)
    mean, square = torch.zeros_like(points), torch.zeros_like(points)
    for t in range(steps):
        seen = look(model, shortfall, spec, points, clause)
        if bool((seen.margin <= 0).any()) or time.perf_counter() > end:
            break
        gradient = seen.gradient * unit
        mean = 0.9 * mean + 0.1 * gradient
        square = 0.99 * square + 0.01 * gradient.square()
        step = (mean / (1 - 0.9 ** (t + 1))) / ((square / (1 - 0.99 ** (t + 1))).sqrt() + 1e-12)
        length = size * 0.5 * (1 + math.cos(math.pi * t / steps))
        points = region.project(points + length * unit * step)
    return points
