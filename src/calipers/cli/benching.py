"""What ``calipers bench`` and ``calipers vnncomp`` do."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from calipers.cli.commands import console
from calipers.cli.options import seconds_of, writable
from calipers.evaluate.bench import Result, Settings, bench, summaries, tasks
from calipers.evaluate.bench_tables import bench_table
from calipers.evaluate.limits import bytes_of
from calipers.evaluate.plots import cactus
from calipers.evaluate.store import write_atomically

SOLVED, CONTRADICTED, INTERRUPTED = 0, 1, 130


def run(
    path: Path,
    *,
    cap: str | None,
    out: Path | None,
    workers: int,
    memory: str | None,
    domains: int | None,
    exact: bool,
    save: Path | None,
    plot: Path | None,
    json_file: Path | None,
) -> int:
    """Decide all, print, write; returns the exit code."""
    for option, file in (("--out", out), ("--plot", plot), ("--json", json_file)):
        if file is not None:
            writable(option, file.absolute())
    limit = math.inf if cap is None else seconds_of(cap, "--timeout-cap")
    threads = max(1, (os.cpu_count() or 1) // max(workers, 1))
    settings = Settings(
        None if memory is None else bytes_of(memory), domains, exact, threads,
        None if save is None else save.absolute(),
    )  # fmt: skip
    todo = tasks(path, cap=limit)
    try:
        results = bench(todo, out=out, workers=workers, settings=settings, progress=_told)
    except KeyboardInterrupt:
        ending = (
            f"finished rows are in {out}; the same command goes on there"
            if out
            else "nothing is kept"
        )
        sys.stderr.write(f"calipers: interrupted; {ending}\n")
        return INTERRUPTED
    console().print(bench_table(results))
    if plot is not None and any(r.solved for r in results):
        write_atomically(plot, cactus({"calipers": [r.seconds for r in results if r.solved]}))
    if json_file is not None:
        write_atomically(json_file, json.dumps(_content(results), indent=2, allow_nan=False) + "\n")
    return CONTRADICTED if any(r.contradicts for r in results) else SOLVED


def _content(results: Sequence[Result]) -> dict[str, Any]:
    def plain(values: dict[str, Any]) -> dict[str, Any]:
        return {
            k: str(v) if isinstance(v, float) and not math.isfinite(v) else v
            for k, v in values.items()
        }

    return {
        "suites": [plain(s._asdict()) for s in summaries(results)],
        "results": [plain(dict(vars(r))) for r in results],
    }


def _told(row: Result, done: int, total: int) -> None:
    note = f" (expected {row.expected})" if row.contradicts else ""
    end = f": {row.reason}" if not row.solved else f" by {row.method}"
    sys.stderr.write(
        f"[{done}/{total}] {row.suite} {Path(row.onnx).name} {Path(row.vnnlib).name} {row.result}{note} "
        f"{row.seconds:.2f} s{end}\n"
    )
    sys.stderr.flush()
