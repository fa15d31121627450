"""How many instances of VNN-COMP's suites with few inputs are decided by splitting the input box, and how fast.

    python benchmarks/inputs.py FOLDER [SUITE ...] [--seconds 60] [--only NAME]

``FOLDER`` holds one folder per suite with ``instances.csv`` and, to check verdicts against, ``expected.csv``; one
thread, one process. Each instance gets the smaller of its own limit and ``--seconds``: a short attack, then the search,
and the attack goes on for a fifth of its time. Seconds are wall-clock and CPU, reading of network and query included;
the first instance of a process also pays for lazy imports. A "sat" is a point that `calipers.witness` accepts.
"""

from __future__ import annotations

import argparse
import csv
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import torch

import calipers as cp
from calipers.errors import CalipersError
from calipers.exact import split_inputs
from calipers.vnnlib import Instance, instances, load

SHORT = 0.1  # seconds for the first attack


def points(net: cp.Network, region: cp.Region, spec: cp.Spec, end: float) -> Iterator[torch.Tensor]:
    """An attack's candidates; none where the region has no point in the network's dtype."""
    with suppress(CalipersError):
        left = max(0.0, end - time.perf_counter())
        for batch, _ in cp.falsify(net, region, spec, seconds=left, dtype=net.dtype):
            yield batch


def broken(net: cp.Network, region: cp.Region, spec: cp.Spec, x: torch.Tensor) -> bool:
    """Whether one of the likeliest points is a witness."""
    y = net(x).double()
    margin = spec.margin(y @ spec.C[0].double().T + spec.d[0].double())
    likely = [i for i in margin.argsort()[:4].tolist() if margin[i] <= 0]
    return any(float(cp.witness(net, region, spec, x[i : i + 1]).upper) <= 0 for i in likely)


def solve(instance: Instance, limit: float) -> tuple[str, int, str]:
    """Verdict, boxes, and why there is none."""
    end = time.perf_counter() + limit
    net = cp.load_onnx(instance.onnx)
    query = load(instance.vnnlib, input_shape=net.input_shape, dtype=net.dtype)
    domains, reasons = 0, []
    examples = [(r[i : i + 1], s[i : i + 1]) for r, s, _ in query.cases for i in range(len(r))]
    for region, spec in examples:
        attack = points(net, region, spec, end)
        stop = min(end, time.perf_counter() + SHORT)
        while time.perf_counter() < stop:
            if broken(net, region, spec, next(attack, region.center.to(net.dtype))):
                return "sat", domains, ""

        def more(
            box: cp.Region, _: cp.Spec, attack: Iterator[torch.Tensor] = attack
        ) -> torch.Tensor:
            """The attack goes on, on the whole box: those of the search are small, and witnesses elsewhere."""
            return next(attack, box.center.to(net.dtype))

        outcome = split_inputs(net, region, spec, deadline=end, attack=more)
        domains += outcome.domains
        if outcome.point is not None:
            return "sat", domains, ""
        if not outcome.robust:
            reasons.append(outcome.reason)
    return ("unknown" if reasons else "unsat"), domains, "; ".join(reasons)


def suite(folder: Path, seconds: float, only: str) -> tuple[int, int, float]:
    truth: dict[str, str] = {}
    if (folder / "expected.csv").is_file():
        with (folder / "expected.csv").open(newline="") as file:
            truth = {r["onnx"] + r["vnnlib"]: r["expected"] for r in csv.DictReader(file)}
    counts = {"sat": 0, "unsat": 0, "unknown": 0}
    times: list[float] = []
    work: list[float] = []
    for instance in instances(folder):
        names = [p.relative_to(folder).as_posix() for p in (instance.onnx, instance.vnnlib)]
        if only not in " ".join(names):
            continue
        begin, worked = time.perf_counter(), time.process_time()
        verdict, domains, reason = solve(instance, min(seconds, instance.seconds))
        times.append(time.perf_counter() - begin)
        work.append(time.process_time() - worked)
        counts[verdict] += 1
        wrong = {verdict, truth.get("".join(names))} == {"sat", "unsat"}
        short = " ".join(Path(n).name.split(".")[0] for n in names)
        print(
            f"{short:70} {verdict:8} {times[-1]:7.2f} s {work[-1]:7.2f} s CPU {domains:7} boxes",
            reason + " CONTRADICTION" * wrong,
            flush=True,
        )
    print(
        f"{folder.name}: {counts}, {sum(times):.1f} s, {sum(work):.1f} s CPU, longest {max(times, default=0):.1f} s\n",
        flush=True,
    )
    return counts["sat"] + counts["unsat"], len(times), sum(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("suites", nargs="*")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--only", default="")
    args = parser.parse_args()
    torch.set_num_threads(1)
    folders = [args.folder / s for s in args.suites] or sorted(args.folder.iterdir())
    for folder in folders:
        suite(folder, args.seconds, args.only)


if __name__ == "__main__":
    main()
