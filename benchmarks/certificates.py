"""How many proved instances of VNN-COMP's suites have a certificate that the checker accepts, and what it costs.

    python benchmarks/certificates.py FOLDER [SUITE ...] [--seconds 10] [--each 20]

``FOLDER`` holds one folder per suite with ``instances.csv``; one thread, one process. Each instance is decided twice,
without and with notes of the search, and its certificate written and checked; all seconds are CPU time, with reading
the files. ``check/solve`` and ``overhead`` (notes and writing) are relative to the undisturbed decision; medians over
the accepted instances, and over those that took a search.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

from calipers.errors import CalipersError, NoInputs
from calipers.evaluate.bench import tasks
from calipers.evaluate.queries import read
from calipers.evaluate.strict import checked
from calipers.evaluate.verify import decide
from calipers.exact.certificate import of_query

HEADER = "suite | proved | accepted | searches | size kB | check/solve | overhead | (searches) check/solve | overhead"


def timed(call: Callable[[], Any]) -> tuple[Any, float]:
    begin = time.process_time()
    return call(), time.process_time() - begin


def measure(files: tuple[Path, Path], seconds: float) -> tuple[str, bool, int, float, float] | None:
    """(why refused, whether a search was needed, bytes, check/solve, overhead); None where nothing is proved."""
    (network, query), reading = timed(lambda: read(*files))
    plain, solving = timed(lambda: decide(network, query, seconds=seconds))
    solving += reading
    if plain.verdict != "unsat":
        return None
    noted, noting = timed(lambda: decide(network, query, seconds=2 * seconds, record=True))
    if noted.verdict != "unsat":
        return "the search with notes did not end", True, 0, 0.0, 0.0
    try:
        data, writing = timed(lambda: of_query(network, files, query.cases, noted.proofs))
    except CalipersError as error:
        return str(error), True, 0, 0.0, 0.0
    reason, checking = timed(lambda: checked(data, files, 300.0))
    search = any(b.domains for b in plain.boxes)
    overhead = (reading + noting + writing) / solving - 1
    return reason, search, len(data), checking / solving, overhead


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("suites", nargs="*")
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--each", type=int, default=20)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(HEADER)
    for folder in sorted(p.parent for p in arguments.folder.glob("*/instances.csv")):
        if arguments.suites and folder.name not in arguments.suites:
            continue
        found = []
        todo = [t for t in tasks(folder) if t.expected != "sat"][: arguments.each]
        for task in todo:
            try:
                row = measure(
                    (task.folder / task.onnx, task.folder / task.vnnlib), arguments.seconds
                )
            except (NoInputs, CalipersError) as error:
                print(f"  {task.vnnlib}: {error}")
                continue
            if row is not None:
                found.append(row)
                if row[0]:
                    print(f"  {task.onnx} {task.vnnlib}: {row[0]}", flush=True)
        good = [r for r in found if not r[0]]
        hard = [r for r in good if r[1]]

        def middle(rows: list[Any], place: int) -> str:
            return f"{median(r[place] for r in rows):.2f}" if rows else "-"

        size = f"{median(r[2] for r in good) / 1000:.1f}" if good else "-"
        print(
            f"{folder.name} | {len(found)} | {len(good)} | {len(hard)} | {size} | {middle(good, 3)} | {middle(good, 4)}"
            f" | {middle(hard, 3)} | {middle(hard, 4)}",
            flush=True,
        )


if __name__ == "__main__":
    main()
