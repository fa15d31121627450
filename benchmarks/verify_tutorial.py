"""How long branch and bound takes for the tutorial's small network: every target of one image, one by one and jointly.

    python benchmarks/verify_tutorial.py [--data ../shared/data] [--eps 0.05 0.1] [--seconds 30] [--repeat 3]

An attack comes first (projected gradient descent, one start); the search takes what it leaves. Times are CPU seconds
on one thread, the least of some repetitions; the first call of a process is not counted.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import torch

from calipers import Network, Region, Spec, ThreatModel, pgd, witness
from calipers.data import load
from calipers.exact import Outcome
from calipers.exact.branch import branch
from calipers.models import load_model


def decide(network: Network, region: Region, spec: Spec, seconds: float) -> Outcome:
    x = pgd(network, region, spec, seeds=torch.zeros(1, dtype=torch.long))
    if witness(network, region, spec, x).upper.item() <= 0:
        return Outcome(point=x[0])
    return branch(network, region, spec, deadline=time.perf_counter() + seconds)


def verdict(found: Outcome) -> str:
    if found.robust:
        return "robust"
    return "vulnerable" if found.point is not None else f"unknown: {found.reason}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--eps", type=float, nargs="+", default=[0.05, 0.1])
    parser.add_argument("--seconds", type=float, default=30.0, help="per search, wall time")
    parser.add_argument("--repeat", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    network = load_model("tutorial_small", weights=args.data / "tutorial" / "ch3_model_small.pt")
    data = load("mnist", data_dir=args.data / "mnist")
    label = data.y[:1]
    rivals = [j for j in range(10) if j != label]
    specs = {str(j): Spec.target(label, torch.tensor([j]), 10) for j in rivals}
    specs["all, jointly"] = Spec.label(label, 10)
    decide(network, ThreatModel(math.inf, 0.01).around(data.x[:1]), specs["all, jointly"], 1.0)
    print("| eps | target | verdict | sub-problems | s |")
    print("| --- " * 5 + "|")
    for eps in args.eps:
        region = ThreatModel(math.inf, eps).around(data.x[:1])
        total = 0.0
        for name, spec in specs.items():
            took = math.inf
            for _ in range(args.repeat):
                begin = time.process_time()
                found = decide(network, region, spec, args.seconds)
                took = min(took, time.process_time() - begin)
            total += took if name.isdigit() else 0.0
            print(
                f"| {eps} | {name} | {verdict(found)} | {found.domains} | {took:.2f} |", flush=True
            )
        print(f"| {eps} | all, one by one | | | {total:.2f} |", flush=True)


if __name__ == "__main__":
    main()
