"""Every instance of VNN-COMP's suites decided strictly: verdicts, certificates and what they cost, witnesses replayed.

    python benchmarks/certificates.py FOLDER [SUITE ...] --out rows.csv [--seconds 20] [--each 1000] [--cpu]

``FOLDER`` holds one folder per suite with ``instances.csv``; one thread, one process. What is proved is decided once
more without notes of the search and without a certificate: ``check/solve`` and ``overhead`` (notes and writing) are
relative to that, with reading the files. Medians are over all accepted instances, and over those that took a search.
With ``--cpu`` all limits and seconds are this process's CPU time, which other processes do not change. Rows are
written as they come; those that ``--out`` has are kept.
"""

from __future__ import annotations

import argparse
import csv
import signal
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import median
from typing import Any

import torch

from calipers.errors import CalipersError, NoInputs
from calipers.evaluate.bench import OPPOSITE, Task, save, tasks
from calipers.evaluate.queries import read
from calipers.evaluate.replay import replay_assignment
from calipers.evaluate.strict import coverable, decide_strictly
from calipers.evaluate.verify import decide


@dataclass
class Row:
    """One instance.

    Args:
        seconds: reading the files and the strict decision.
        piecewise: whether the format is meant to cover the network.
        reason: why it is undecided, or there is no accepted certificate.
        witness: the class of a counterexample that was written to a file, read and replayed.
        solving: reading the files and deciding, without notes and certificate.
        writing, checking: of the certificate that was decisive.
    """

    suite: str
    onnx: str
    vnnlib: str
    expected: str = ""
    verdict: str = ""
    seconds: float = 0.0
    piecewise: bool = False
    accepted: bool = False
    reason: str = ""
    witness: str = ""
    domains: int = 0
    bytes: int = 0
    solving: float = 0.0
    writing: float = 0.0
    checking: float = 0.0

    @property
    def proved(self) -> bool:
        return self.solving > 0

    @property
    def share(self) -> float:
        return self.checking / self.solving

    @property
    def overhead(self) -> float:
        return (self.seconds - self.checking) / self.solving - 1


def timed(call: Callable[[], Any]) -> tuple[Any, float]:
    begin = time.perf_counter()
    return call(), time.perf_counter() - begin


def measure(task: Task, seconds: float) -> Row:
    files = task.folder / task.onnx, task.folder / task.vnnlib
    row = Row(*task.key, task.expected)
    (network, query), reading = timed(lambda: read(*files))
    left = seconds - reading
    (found, made), took = timed(lambda: decide_strictly(network, query, files, seconds=left))
    row.verdict, row.reason, row.seconds = found.verdict, found.reason, reading + took
    row.domains = sum(b.domains for b in found.boxes)
    if found.verdict == "sat":
        with tempfile.TemporaryDirectory() as folder:
            save(Path(folder), task, query, found)
            file = next(Path(folder).rglob("*.gz"))
            row.witness = replay_assignment(file, query, network)[0].verdict
    if made is not None:  # proved, whether the certificate was accepted or not
        plain, took = timed(lambda: decide(network, query, seconds=seconds))
        row.solving = reading + took if plain.verdict == "unsat" else 0.0
        row.piecewise, row.accepted = coverable(network, query), made.accepted
        row.reason = "" if made.accepted else made.reason
        row.bytes, row.writing, row.checking = len(made.data or b""), made.making, made.checking
    return row


def known(out: Path) -> list[Row]:
    if not out.exists():
        return []
    kinds = {f.name: f.type for f in fields(Row)}
    read_as: dict[Any, Callable[[str], Any]] = {
        "str": str, "int": int, "float": float, "bool": lambda v: v == "True",
    }  # fmt: skip
    with out.open(newline="") as lines:
        return [
            Row(**{k: read_as[kinds[k]](v) for k, v in row.items()})
            for row in csv.DictReader(lines)
        ]


def add(out: Path, row: Row) -> None:
    fresh = not out.exists()
    with out.open("a", newline="") as lines:
        writer = csv.DictWriter(lines, [f.name for f in fields(Row)])
        if fresh:
            writer.writeheader()
        writer.writerow(asdict(row))


def middle(values: Sequence[float]) -> str:
    return f"{median(values):.2f}" if values else ""


def verdicts(rows: Sequence[Row], suites: Sequence[str]) -> None:
    print("| suite | instances | sat | unsat | undecided | median s | total s of the decided |")
    print("| --- " * 7 + "|")
    for suite in suites:
        own = [r for r in rows if suite in (r.suite, "all")]
        sat, unsat = ([r.seconds for r in own if r.verdict == v] for v in ("sat", "unsat"))
        print(
            f"| {suite} | {len(own)} | {len(sat)} | {len(unsat)} | {len(own) - len(sat) - len(unsat)} "
            f"| {middle(sat + unsat)} | {sum(sat + unsat):.1f} |"
        )


def certificates(rows: Sequence[Row], suites: Sequence[str]) -> None:
    print(
        "| suite | proved | accepted | searches | size kB, median (largest) | check/solve | overhead "
        "| (searches) check/solve | overhead |"
    )
    print("| --- " * 9 + "|")
    for suite in suites:
        proved = [r for r in rows if suite in (r.suite, "all") and r.proved and r.piecewise]
        if not proved:
            continue
        good = [r for r in proved if r.accepted]
        parts = [good, [r for r in good if r.domains]]
        sizes = [r.bytes / 1000 for r in good]
        size = f"{median(sizes):.1f} ({max(sizes):.0f})" if sizes else ""
        costs = [
            f"{middle([r.share for r in p])} | {middle([r.overhead for r in p])}" for p in parts
        ]
        counts = " | ".join(str(len(p)) for p in parts)
        print(f"| {suite} | {len(proved)} | {counts} | {size} | {' | '.join(costs)} |")


def tables(rows: Sequence[Row]) -> None:
    suites = [*sorted({r.suite for r in rows}), "all"]
    verdicts(rows, suites)
    certificates(rows, suites)
    for r in rows:
        what = f"{r.suite} {r.onnx} {r.vnnlib}"
        if r.proved and not r.accepted:
            print(f"no certificate: {what}{'' if r.piecewise else ' (smooth)'}: {r.reason}")
        if OPPOSITE.get(r.verdict) == r.expected:
            print(f"CONTRADICTION: {what}: {r.verdict}")
    classes = [r.witness for r in rows if r.witness]
    print("witnesses:", {c: classes.count(c) for c in sorted(set(classes))})


def count_cpu_time() -> None:
    """From now on clocks and timers go by the CPU time of the one thread."""
    clock: Any = time
    clock.perf_counter = clock.monotonic = time.thread_time
    timers: Any = signal
    timers.ITIMER_REAL, timers.SIGALRM = signal.ITIMER_PROF, signal.SIGPROF


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("suites", nargs="*")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--seconds", type=float, default=20.0, help="for each decision, at most the suite's own"
    )
    parser.add_argument("--each", type=int, default=1000, help="instances of a suite, at most")
    parser.add_argument("--cpu", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.cpu:
        count_cpu_time()
    rows = known(arguments.out)
    done = {(r.suite, r.onnx, r.vnnlib) for r in rows}
    for name in arguments.suites or sorted(
        p.parent.name for p in arguments.folder.glob("*/instances.csv")
    ):
        todo = tasks(arguments.folder / name)
        for task in todo[: arguments.each]:
            if task.key in done:
                continue
            try:
                row = measure(task, min(arguments.seconds, task.limit))
            except NoInputs as error:
                row = Row(*task.key, task.expected, "unsat", reason=str(error))
            except CalipersError as error:
                row = Row(*task.key, task.expected, "error", reason=str(error))
            add(arguments.out, row)
            rows.append(row)
            what = f"{row.onnx} {row.vnnlib} {row.verdict} {row.witness}"
            print(f"{what} {row.seconds:.2f} s {row.reason}", flush=True)
    tables(rows)


if __name__ == "__main__":
    main()
