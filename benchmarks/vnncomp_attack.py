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
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

import calipers as cp
from calipers.attacks.falsify import Suggestion
from calipers.bounds.corners import corners
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


def falsify(model: cp.Network, region: cp.Region, spec: cp.Spec, seconds: float) -> Iterator[Found]:
    """Samples, PGD and descents, with the corners of CROWN's bound as further starts."""

    def suggest() -> Iterator[Suggestion]:
        with suppress(CalipersError):
            for batch in corners(model, region, spec):
                yield Suggestion(*batch)

    return cp.falsify(model, region, spec, seconds=seconds, suggest=suggest, dtype=model.dtype)


ATTACKS: dict[str, Attack] = {"pgd": pgd, "falsify": falsify}


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
