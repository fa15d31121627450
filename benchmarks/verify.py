"""Exact verification, measured: the tutorial's small network, and the instances of VNN-COMP beside alpha-beta-CROWN.

    python benchmarks/verify.py tutorial [--eps 0.05 0.1] [--seconds 30] [--repeat 3]
    python benchmarks/verify.py suites [SUITE ...] [--cap 60] [--threads 1] [--workers 1] [--out results.csv]

``tutorial``: every target of one image, one by one and jointly; an attack first (projected gradient descent, one
start), then branch and bound on what it leaves. CPU seconds on one thread, the least of some repetitions; the first
call of a process is not counted. ``suites``: what `calipers bench` decides within the smaller of an instance's limit
and the cap, and what alpha-beta-CROWN had solved within the cap on its GPU machine (the columns of expected.csv). With
--out a killed run goes on where it was. Both read --data (../shared/data).
"""

from __future__ import annotations

import argparse
import csv
import math
import statistics
import time
from pathlib import Path

import torch

from calipers import Network, Region, Spec, ThreatModel, pgd, witness
from calipers.data import load
from calipers.evaluate.bench import Result, Settings, bench, tasks
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


def tutorial(args: argparse.Namespace) -> None:
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


def peer(folder: Path, cap: float) -> tuple[int, float]:
    """How many of a suite's instances alpha-beta-CROWN solved within the cap, and its median seconds."""
    with (folder / "expected.csv").open(newline="") as lines:
        rows = [r for r in csv.DictReader(lines) if r["abcrown_result"] in ("sat", "unsat")]
    seconds = [float(r["abcrown_s"]) for r in rows if float(r["abcrown_s"]) <= cap]
    return len(seconds), statistics.median(seconds) if seconds else math.nan


def told(row: Result, done: int, total: int) -> None:
    names = f"{Path(row.onnx).name} {Path(row.vnnlib).name}"
    print(f"[{done}/{total}] {names} {row.result} {row.seconds:.2f} s {row.reason}", flush=True)


def suites(args: argparse.Namespace) -> None:
    root = args.data / "vnncomp"
    names = args.suites or sorted(p.parent.name for p in root.glob("*/instances.csv"))
    settings = Settings(threads=args.threads)
    todo = [task for name in names for task in tasks(root / name, cap=args.cap)]
    results = bench(todo, out=args.out, workers=args.workers, settings=settings, progress=told)
    print(
        "| suite | instances | sat | unsat | unknown | alpha-beta-CROWN solved | median s | its | total s |"
    )
    print("| --- " * 9 + "|")
    for name in names:
        rows = [r for r in results if r.suite == name]
        solved = [r.seconds for r in rows if r.solved]
        sat, unsat = (sum(r.result == k for r in rows) for k in ("sat", "unsat"))
        theirs, half = peer(root / name, args.cap)
        median = statistics.median(solved) if solved else math.nan
        total = sum(r.seconds for r in rows)
        print(
            f"| {name} | {len(rows)} | {sat} | {unsat} | {len(rows) - sat - unsat} | {theirs} | {median:.2f} "
            f"| {half:.2f} | {total:.0f} |"
        )
    wrong = [r for r in results if r.contradicts]
    if wrong:
        raise SystemExit("\n".join(f"CONTRADICTION: {r}" for r in wrong))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("tutorial")
    one.add_argument("--eps", type=float, nargs="+", default=[0.05, 0.1])
    one.add_argument("--seconds", type=float, default=30.0, help="per search, wall time")
    one.add_argument("--repeat", type=int, default=3)
    one.set_defaults(run=tutorial)
    many = commands.add_parser("suites")
    many.add_argument("suites", nargs="*")
    many.add_argument("--cap", type=float, default=60.0, help="seconds per instance, at most")
    many.add_argument("--threads", type=int, default=1, help="of each process")
    many.add_argument("--workers", type=int, default=1, help="instances at a time")
    many.add_argument("--out", type=Path)
    many.set_defaults(run=suites)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
