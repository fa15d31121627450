"""How many of the instances known to be violated an attack finds, by benchmark of VNN-COMP, within a few seconds each.

    python benchmarks/vnncomp_attack.py FOLDER [SUITE ...] [--attack pgd] [--seconds 5]

``FOLDER`` holds one folder per benchmark with ``instances.csv`` and ``expected.csv``; one thread. A point counts
if `calipers.witness` accepts it with onnxruntime as a second opinion and the query's exact tree is true at it with
onnxruntime's outputs; ``rounded`` are those where only the reading of the competition's checker is (a bound such as
X_0 = 0.1, which no float meets), ``late`` those found after the limit (networks that are slow to read). Times are
wall-clock and include reading the network and the query.
"""

from __future__ import annotations

import argparse
import csv
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

import calipers as cp
from calipers.errors import CalipersError
from calipers.graph.onnx import session
from calipers.vnnlib import Instance, Query, instances, load

# From (model, region, spec, seconds) to points, row i of each batch a member of row rows[i]; it may stop when it likes,
# and is not asked again once a point is accepted.
Found = tuple[Tensor, Tensor]
Attack = Callable[[cp.Network, cp.Region, cp.Spec, float], Iterator[Found]]


def pgd(
    model: cp.Network, region: cp.Region, spec: cp.Spec, seconds: float, *, steps: int = 40
) -> Iterator[Found]:
    """Margin-loss PGD from the centre and then from random points, in batches of restarts."""
    end = time.perf_counter() + seconds
    batch = max(1, min(256, 2**16 // region.center[0].numel()))
    rows = torch.arange(len(region))
    start = 0
    while time.perf_counter() < end:
        chosen = rows[torch.arange(start, start + batch) % len(rows)]
        seeds = torch.arange(start, start + batch)
        yield (
            cp.pgd(
                model,
                region[chosen],
                spec[chosen],
                steps=steps,
                loss="margin",
                drop=True,
                random_start=start > 0,
                dtype=model.dtype,
                seeds=seeds,
            ),
            chosen,
        )
        start += batch


def tactics(model: cp.Network, region: cp.Region, spec: cp.Spec, seconds: float) -> Iterator[Found]:
    """Few random points, PGD, descents from the best of many samples and from CROWN's minimisers, in this order.

    What the plain restarts miss, and what finds it: slow networks with large violated sets (two forward passes instead
    of a thousand), clauses of several functionals (the sum of what is missing instead of the worst), needles in low
    dimension (many samples, few descents), needles in high dimension (where CROWN's linear bound is lowest).
    """
    end = time.perf_counter() + seconds
    generator = torch.Generator().manual_seed(0)
    low, high = region.inner(model.dtype)

    def draw(count: int) -> tuple[Tensor, Tensor]:
        rows = torch.randint(len(region), (count,), generator=generator)
        unit = torch.rand((count, *low.shape[1:]), generator=generator, dtype=model.dtype)
        return (low[rows] + unit * (high - low)[rows]).clamp(low[rows], high[rows]), rows

    pace = 0.0
    for count in (1, 4, 16, 64, 256):
        points, rows = draw(count)
        begin = time.perf_counter()
        with torch.no_grad():
            model(points)
        pace = (time.perf_counter() - begin) / count
        yield points, rows
        if pace * count > 0.02:
            break
    few = int(min(128, max(16, 0.005 / pace)))
    yield first(model, region, spec)
    crown = False
    while time.perf_counter() < end:
        many = int(min(200_000, max(few, 0.1 / pace), 2**26 // low[0].numel()))
        points, rows = draw(many)
        with torch.no_grad():
            missing = lacks(model(points), spec[rows])
        count = missing.shape[1]
        top = missing.topk(
            min(max(2, few // count), many), dim=0, largest=False
        ).indices.T.flatten()
        clause = torch.arange(count).repeat_interleave(len(top) // count)
        for size in (0.3, 0.1, 0.03) if crown else (0.3,):
            x = descend(model, region, spec, points[top], rows[top], clause, size, end)
            yield x, rows[top]
        if not crown:
            yield from starts_of_crown(model, region, spec, end)
        crown = True


def first(model: cp.Network, region: cp.Region, spec: cp.Spec) -> Found:
    points = cp.pgd(
        model, region, spec, steps=40, loss="margin", drop=True, dtype=model.dtype,
    )  # fmt: skip
    return points, torch.arange(len(region))


def starts_of_crown(
    model: cp.Network, region: cp.Region, spec: cp.Spec, end: float
) -> Iterator[Found]:
    """For each functional the corner where CROWN's bound is lowest, by its gradient in the box; then descents."""
    low = region.outer_lower.clone().requires_grad_()
    high = region.outer_upper.clone().requires_grad_()
    try:
        bounds = cp.crown(
            model, replace(region, outer_lower=low, outer_upper=high, _cache={}), spec
        )
    except CalipersError:
        return
    rows = torch.arange(len(region))
    inner = region.inner(model.dtype)
    corners, clauses = [], []
    for m in bounds.detach().amin(0).argsort()[:16].tolist():
        slopes = torch.autograd.grad(bounds[:, m].sum(), (low, high), retain_graph=True)
        corners.append(torch.where(slopes[0] + slopes[1] > 0, inner.lower, inner.upper))
        clauses.append(spec.clause[m].expand(len(region)))
    points, rows, clause = torch.cat(corners), rows.repeat(len(corners)), torch.cat(clauses)
    yield points, rows
    for size in (0.1, 0.3):
        yield descend(model, region, spec, points, rows, clause, size, end), rows


def lacks(y: Tensor, spec: cp.Spec) -> Tensor:
    """How much every clause is from being violated: the sum of its positive values, (B, clauses)."""
    values = spec.values(y).clamp_min(0)
    zero = values.new_zeros(len(values), int(spec.clause.max()) + 1)
    return zero.scatter_add(1, spec.clause.expand_as(values), values)


def descend(
    model: cp.Network,
    region: cp.Region,
    spec: cp.Spec,
    points: Tensor,
    rows: Tensor,
    clause: Tensor,
    size: float,
    end: float,
    steps: int = 100,
) -> Tensor:
    """Adam on what each point's clause lacks, in units of the box, with a cosine's steps; the first success ends it."""
    region, spec = region[rows], spec[rows]
    unit = region.unit.to(points.dtype)
    mean, square = torch.zeros_like(points), torch.zeros_like(points)
    for t in range(steps):
        with torch.enable_grad():
            leaf = points.detach().requires_grad_()
            y = model(leaf)
            (gradient,) = torch.autograd.grad(lacks(y, spec).gather(1, clause[:, None]).sum(), leaf)
        if bool((spec.margin_at(y.detach()) <= 0).any()) or time.perf_counter() > end:
            break
        gradient = gradient * unit
        mean = 0.9 * mean + 0.1 * gradient
        square = 0.99 * square + 0.01 * gradient.square()
        step = (mean / (1 - 0.9 ** (t + 1))) / ((square / (1 - 0.99 ** (t + 1))).sqrt() + 1e-12)
        length = size * 0.5 * (1 + math.cos(math.pi * t / steps))
        points = region.project(points - length * unit * step)
    return points


ATTACKS: dict[str, Attack] = {"pgd": pgd, "tactics": tactics}


def solve(instance: Instance, attack: Attack, seconds: float) -> str:
    """``exact``, ``rounded`` or ``none``: how the first accepted point meets the query."""
    end = time.perf_counter() + seconds
    net = cp.load_onnx(instance.onnx)
    query = load(instance.vnnlib, input_shape=net.input_shape, dtype=net.dtype)
    replica = cache(lambda: session(instance.onnx))  # made when there is something to replay
    for region, spec, _ in query.cases:
        for points, rows in attack(net, region, spec, end - time.perf_counter()):
            margin = spec[rows].margin_at(net(points).double())
            for i in torch.nonzero(margin <= 0).flatten()[:4].tolist():
                one = rows[i : i + 1]
                verdict = judge(net, replica(), query, region[one], spec[one], points[i : i + 1])
                if verdict != "none":
                    return verdict
            if time.perf_counter() > end:
                break
    return "none"


def judge(
    net: cp.Network,
    replica: Callable[[Tensor], Tensor],
    query: Query,
    region: cp.Region,
    spec: cp.Spec,
    x: Tensor,
) -> str:
    if not bool((cp.witness(net, region, spec, x, replicas=[replica]).upper <= 0).all()):
        return "none"
    y = replica(x)
    if query.holds(x, y):
        return "exact"
    return "rounded" if query.holds(x, y, dtype=net.dtype) else "none"


def expected(folder: Path) -> dict[tuple[str, str], str]:
    with (folder / "expected.csv").open(newline="") as file:
        return {(r["onnx"], r["vnnlib"]): r["expected"] for r in csv.DictReader(file)}


def suite(folder: Path, attack: Attack, seconds: float) -> tuple[int, int]:
    truth = expected(folder)
    counts = {"exact": 0, "rounded": 0, "none": 0}
    times: list[float] = []
    missed: list[str] = []
    for instance in instances(folder):
        names = tuple(p.relative_to(folder).as_posix() for p in (instance.onnx, instance.vnnlib))
        if truth.get((names[0], names[1])) != "sat":
            continue
        begin = time.perf_counter()
        verdict = solve(instance, attack, seconds)
        counts[verdict] += 1
        if verdict == "none":
            missed.append(" ".join(Path(n).name for n in names))
        else:
            times.append(time.perf_counter() - begin)
    total = sum(counts.values())
    if total:
        print(
            f"{folder.name:20} {total - counts['none']:4} of {total:<4} {counts['rounded']:4} rounded"
            f" {sum(t > seconds for t in times):3} late"
            f"   slowest {max(times, default=0):6.2f} s   median {median(times or [0]):6.3f} s"
            f"   total {sum(times):7.2f} s",
            flush=True,
        )
    for name in missed:
        print(f"    not found: {name}", flush=True)
    return total - counts["none"], total


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("suites", nargs="*")
    parser.add_argument("--attack", choices=sorted(ATTACKS), default="pgd")
    parser.add_argument("--seconds", type=float, default=5.0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    folders = [args.folder / s for s in args.suites] or sorted(args.folder.iterdir())
    results = [
        suite(f, ATTACKS[args.attack], args.seconds)
        for f in folders
        if (f / "expected.csv").is_file()
    ]
    found, total = (sum(r) for r in zip(*results, strict=True))
    print(f"{'together':20} {found:4} of {total:<4} {100 * found / max(total, 1):.1f} %")


if __name__ == "__main__":
    main()
