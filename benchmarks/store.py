"""The run store and the workers, measured.

    python benchmarks/store.py units [--units 100000] [--point 784]
    python benchmarks/store.py overhead [--units 300] [--ray]
    python benchmarks/store.py workers [--samples 64] [--repeat 3] [--ray]

``units``: synthetic units stored in batches of 100 and read back, with points of --point float32 numbers: units a
second, bytes, peak memory of a process of its own. ``overhead``: what a unit of one example costs beyond a measurement
that does nothing, with one worker and a store. ``workers``: a bound-heavy audit (CROWN and alpha-CROWN on a 256-256
network of its own) by one worker and by two, one thread each: wall seconds from the first to the last unit, and
which share of them the workers were measuring; run it on a machine with nothing else to do. ``--ray``: the workers
are those of a Ray cluster started here.
"""

from __future__ import annotations

import argparse
import math
import resource
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from calipers import ThreatModel, audit
from calipers.bounds import alpha_crown, crown
from calipers.bracket import Bracket
from calipers.data import load
from calipers.evaluate.cascade import Stage, clean
from calipers.evaluate.fold import Progress
from calipers.evaluate.store import Store
from calipers.models import load_model
from calipers.sets import Region
from calipers.spec import Spec

BATCH = 100


def peak() -> float:
    """MiB that this process has held at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def units(args: argparse.Namespace) -> None:
    identity = {"cascade": ["a: attack"]}
    points = torch.rand(BATCH, args.point)
    lower = torch.full((BATCH,), -math.inf, dtype=torch.float64)
    base = peak()
    with tempfile.TemporaryDirectory() as folder:
        begin, cpu = time.perf_counter(), time.process_time()
        with Store(folder, identity) as store:
            for i in range(0, args.units, BATCH):
                part = Bracket(lower, torch.rand(BATCH), points)
                store.add("a", range(i, i + BATCH), part, 1.0, 1.0)
        wrote, wrote_cpu, most = (
            time.perf_counter() - begin,
            time.process_time() - cpu,
            peak() - base,
        )
        size = sum(f.stat().st_size for f in Path(folder).iterdir())
        begin, cpu = time.perf_counter(), time.process_time()
        with Store(folder, identity) as store:
            opened = time.perf_counter() - begin
            found = store.get("a", points[0])
        read, read_cpu = time.perf_counter() - begin, time.process_time() - cpu
        rows = len(found[0]) if found else 0
    print(f"stored {rows} units of {4 * args.point} bytes: {size / 1e6:.1f} MB on disk")
    print(
        f"written in {wrote:.1f} s ({wrote_cpu:.1f} CPU): {args.units / wrote_cpu:.0f} units per CPU second, "
        f"{most:.1f} MiB of memory"
    )
    print(
        f"resumed in {read:.1f} s ({read_cpu:.1f} CPU; {opened:.2f} s of it checking the file), "
        f"{peak() - base:.1f} MiB of memory in all, {4e-6 * args.units * args.point:.0f} MB of it points"
    )


def nothing(_network: object, _region: Region, spec: Spec, **_: Any) -> Tensor:
    """The bound that costs nothing and says nothing."""
    return torch.full(spec.d.shape, -math.inf, dtype=torch.float64)


def overhead(args: argparse.Namespace) -> None:
    data, network = load("digits"), load_model("digits_pgd")
    stages = (Stage("clean", "attack", clean), Stage("nothing", "bound", nothing))
    last: dict[str, Progress] = {}
    cpu: dict[str, float] = {}

    def noted(at: Progress) -> None:
        last[at.stage] = at
        cpu[at.stage] = time.process_time()

    for workers in (1,) if args.ray else (None, 1):
        with tempfile.TemporaryDirectory() as folder:
            result = audit(
                network, (data.x[: args.units], data.y[: args.units]), ThreatModel(math.inf, "0.1"),
                cascade=stages, run=folder, chunk=1, workers=workers, progress=noted,
                ray="auto" if args.ray else None,
            )  # fmt: skip
        spent = 1e3 * (cpu["nothing"] - cpu["clean"])
        at, inside = last["nothing"], result.methods[1].seconds
        print(
            f"workers={workers}: {1e3 * at.seconds / at.fresh:.2f} ms a unit (wall), "
            f"{1e3 * inside / at.fresh:.2f} ms of it measuring; {spent / at.fresh:.2f} ms CPU of this process"
        )


def mnist_like(samples: int) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Flatten(), nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(),
        nn.Linear(256, 10),
    )  # fmt: skip
    x = torch.rand(samples, 1, 28, 28)
    with torch.no_grad():
        return net, (x, net(x).argmax(1))


def workers(args: argparse.Namespace) -> None:
    network, data = mnist_like(args.samples)
    stages = (
        Stage("clean", "attack", clean),
        Stage("crown", "bound", crown, 100),
        Stage("alpha_crown", "bound", partial(alpha_crown), 500),
    )
    found: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(args.repeat):
        for count, walls in found.items():
            seconds: dict[str, float] = {}

            def noted(at: Progress, seconds: dict[str, float] = seconds) -> None:
                seconds[at.stage] = at.seconds

            result = audit(
                network, data, ThreatModel(math.inf, "0.02"), cascade=stages, workers=count,
                progress=noted, ray="auto" if args.ray else None,
            )  # fmt: skip
            wall = seconds["crown"] + seconds["alpha_crown"]  # the workers start in "clean"
            walls.append(wall)
            busy = sum(row.seconds for row in result.methods[1:])
            print(
                f"{count} workers: {wall:.1f} s wall, {busy:.1f} s of measuring in all workers: busy "
                f"{busy / wall / count:.0%}", flush=True,
            )  # fmt: skip
    print(f"two workers against one: {min(found[1]) / min(found[2]):.2f}x")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(required=True)
    for command in (units, overhead, workers):
        sub = commands.add_parser(command.__name__)
        sub.set_defaults(run=command)
        if command is units:
            sub.add_argument("--units", type=int, default=100_000)
            sub.add_argument("--point", type=int, default=784)
        elif command is overhead:
            sub.add_argument("--units", type=int, default=300)
            sub.add_argument("--ray", action="store_true")
        else:
            sub.add_argument("--samples", type=int, default=64)
            sub.add_argument("--repeat", type=int, default=3)
            sub.add_argument("--ray", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    given.run(given)
