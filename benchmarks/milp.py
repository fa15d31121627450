"""Which formulation, which bounds, how long: the exact program of one image of the tutorial's small network.

    python benchmarks/milp.py [--data ../shared/data] [--eps 0.05 0.1] [--targets 2] [--seconds 60]

Each row is one way to choose the constants of the big-M constraints. A value counts where the network, run at the
solver's point, gives it too; with constants of 1e10 it does not, and replay says so. Times are CPU seconds of the
solver's process; ``bounds`` is the time for the constants themselves.
"""

from __future__ import annotations

import argparse
import math
import resource
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from calipers import Network, Region, Spec, ThreatModel
from calipers.bounds import lp_preactivations, preactivations
from calipers.data import load
from calipers.exact import exact_preactivations, optima
from calipers.models import load_model
from calipers.sets import Interval

BoundsOf = Callable[[Network, Region], Mapping[str, Interval]]


def huge(network: Network, region: Region) -> dict[str, Interval]:
    """Constants of 1e10 for whatever an activation reads."""
    boxes = preactivations(network, region, tight=False, dtype=torch.float64)
    read = {node.operands[0] for node in network.graph.nodes if node.op is torch.relu}
    return {k: Interval(boxes[k].lower * 0 - 1e10, boxes[k].upper * 0 + 1e10) for k in read}


FORMULATIONS: dict[str, BoundsOf] = {
    "constants 1e10": huge,
    "interval bounds": lambda n, r: preactivations(n, r, tight=False, dtype=torch.float64),
    "CROWN bounds": lambda n, r: preactivations(n, r, dtype=torch.float64, rigorous=True),
    "LP bounds": lp_preactivations,
    "exact bounds": lambda n, r: exact_preactivations(
        n, r, deadline=time.perf_counter() + LIMIT["seconds"]
    ),
}
LIMIT = {"seconds": 60.0}


def cpu() -> float:
    return sum(
        resource.getrusage(who).ru_utime + resource.getrusage(who).ru_stime
        for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--eps", type=float, nargs="+", default=[0.05, 0.1])
    parser.add_argument("--targets", type=int, nargs="+", default=[2])
    parser.add_argument("--seconds", type=float, default=60.0, help="per program, wall time")
    parser.add_argument("--only", nargs="+", default=[""], help="formulations that contain a word")
    args = parser.parse_args()
    LIMIT["seconds"] = args.seconds
    network = load_model("tutorial_small", weights=args.data / "tutorial" / "ch3_model_small.pt")
    data = load("mnist", data_dir=args.data / "mnist")
    label = int(data.y[0])
    print(
        "| eps | bounds | s | target | binaries | lower | upper | network | replayed | status | nodes | s |"
    )
    print("| --- " * 12 + "|")
    for eps in args.eps:
        region = ThreatModel(math.inf, eps).around(data.x[:1])
        for name, bounds in FORMULATIONS.items():
            if not any(word in name for word in args.only):
                continue
            begin = cpu()
            boxes = bounds(network, region)
            took = cpu() - begin
            for target in args.targets:
                spec = Spec.target(torch.tensor([label]), torch.tensor([target]), 10)
                begin = cpu()
                deadline = time.perf_counter() + args.seconds
                (o,) = optima(network, region, spec, intermediate=boxes, deadline=deadline)
                values = " | ".join(f"{v:.6f}" for v in (o.lower, o.upper, o.value))
                replayed = "yes" if o.replayed else "no"
                row = (
                    eps,
                    name,
                    f"{took:.1f}",
                    target,
                    o.kinks,
                    values,
                    replayed,
                    o.status,
                    o.nodes,
                )
                print("|", *(f"{cell} |" for cell in row), f"{cpu() - begin:.1f} |", flush=True)


if __name__ == "__main__":
    main()
