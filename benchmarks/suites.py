"""Interval and CROWN bounds of every network of the benchmarks of VNN-COMP, on the box of its first property.

    python benchmarks/suites.py FOLDER [SUITE ...] [--samples 1000] [--each]

``FOLDER`` holds one folder per benchmark with ``instances.csv``. Bounds are of every output, both ways, in the
network's own precision, accounting for rounding; one thread. For each benchmark: networks, seconds of CPU for
interval and CROWN bounds, the width of both and of the sampled outputs (mean over outputs, median over networks), ops,
and what failed: bounds that are not finite, that a sampled output leaves, or CROWN bounds looser than interval bounds.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

import calipers as cp
from calipers.bounds import crown, interval
from calipers.vnnlib import Instance, instances, load

METHODS: dict[str, Callable[..., Tensor]] = {"interval": interval, "crown": crown}


@dataclass
class Row:
    """One network."""

    name: str
    ops: set[str]
    seconds: dict[str, float] = field(default_factory=dict)
    width: dict[str, float] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)


def first_of_each(folder: Path) -> Iterator[Instance]:
    """The first instance of each network."""
    seen: set[Path] = set()
    for instance in instances(folder):
        if instance.onnx not in seen:
            seen.add(instance.onnx)
            yield instance


def measure(instance: Instance, samples: int) -> Row:
    net = cp.load_onnx(instance.onnx)
    query = load(instance.vnnlib, input_shape=net.input_shape, dtype=net.dtype)
    region = query.cases[0][0][:1]
    count = net.num_classes
    spec = cp.Spec.functional(torch.cat([torch.eye(count), -torch.eye(count)])[None])
    row = Row(instance.onnx.name, {node.op.__name__ for node in net.graph.nodes})
    y = sampled(net, region, samples)
    row.width["sampled"] = (y.amax(0) - y.amin(0)).mean().item()
    found: dict[str, Tensor] = {}
    for name, method in METHODS.items():
        start = time.process_time()
        low = method(net, region, spec, rigorous=True)[0].double()
        row.seconds[name] = time.process_time() - start
        found[name] = low
        row.width[name] = -(low[:count] + low[count:]).mean().item()
        if not bool(torch.isfinite(low).all()):
            row.wrong.append(f"{name}: not finite")
        if not bool((low <= torch.cat([y, -y], 1).amin(0)).all()):
            row.wrong.append(f"{name}: an output lies outside")
    if not bool((found["crown"] >= found["interval"]).all()):
        row.wrong.append("crown: looser than interval")
    return row


def sampled(net: cp.Network, region: cp.Region, samples: int) -> Tensor:
    """Outputs in float64 at random points and corners."""
    generator = torch.Generator().manual_seed(0)
    t = torch.rand(samples, *region.center.shape[1:], generator=generator, dtype=torch.float64)
    t[samples // 2 :] = t[samples // 2 :].round()
    run = net.in_double()
    points = region.lower + t * (region.upper - region.lower)
    return torch.cat([run(part) for part in points.split(100)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("suites", nargs="*")
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--each", action="store_true", help="one line per network")
    given = parser.parse_args()
    torch.set_num_threads(1)
    head = (
        "suite",
        "networks",
        "interval s",
        "crown s",
        "interval width",
        "crown width",
        "sampled",
        "ops",
    )
    print("| " + " | ".join(head) + " |")
    print("|" + " --- |" * len(head))
    failed = False
    for folder in sorted(p for p in given.folder.iterdir() if p.is_dir()):
        if given.suites and folder.name not in given.suites:
            continue
        rows = []
        for instance in first_of_each(folder):
            with torch.no_grad():
                row = measure(instance, given.samples)
            rows.append(row)
            if given.each:
                show(f"{folder.name} {row.name}", [row])
            for line in row.wrong:
                failed = True
                print(f"{folder.name} {row.name}: {line}", flush=True)
        show(folder.name, rows)
    raise SystemExit(failed)


def show(name: str, rows: list[Row]) -> None:
    def middle(values: list[float]) -> str:
        return f"{torch.tensor(values).median().item():.3g}"

    cells = [name, str(len(rows))]
    cells += [f"{sum(r.seconds[m] for r in rows):.2f}" for m in METHODS]
    cells += [middle([r.width[m] for r in rows]) for m in (*METHODS, "sampled")]
    cells.append(", ".join(sorted(set().union(*(r.ops for r in rows)))))
    print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
