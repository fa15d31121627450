"""What ``calipers bench`` and ``calipers vnncomp`` do."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from calipers.cli.commands import console
from calipers.cli.options import seconds_of, writable
from calipers.evaluate.bench import Result, Settings, bench, summaries, tasks
from calipers.evaluate.bench_tables import bench_table, peer_table, score_table
from calipers.evaluate.limits import bytes_of
from calipers.evaluate.peers import compare, compared
from calipers.evaluate.plots import cactus
from calipers.evaluate.vnncomp import score, totals
from calipers.evaluate.vnncomp_scripts import write_scripts
from calipers.files import write_atomically

SOLVED, CONTRADICTED, INTERRUPTED = 0, 1, 130


def run(
    path: Path,
    *,
    cap: str | None,
    out: Path | None,
    workers: int,
    threads: int,
    memory: str | None,
    domains: int | None,
    exact: bool,
    fast: bool,
    save: Path | None,
    plot: Path | None,
    json_file: Path | None,
) -> int:
    """Decide all, print, write; returns the exit code."""
    for option, file in (("--out", out), ("--plot", plot), ("--json", json_file)):
        if file is not None:
            writable(option, file.absolute())
    limit = math.inf if cap is None else seconds_of(cap, "--timeout-cap")
    settings = Settings(
        None if memory is None else bytes_of(memory), domains, exact, threads,
        None if save is None else save.absolute(), fast,
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


def scripts(folder: Path) -> None:
    """Write the competition's scripts and say where."""
    for file in write_scripts(folder):
        sys.stdout.write(f"{file}\n")


def rescore(
    folder: Path, *, benchmarks: Path, against: Sequence[Path], json_file: Path | None
) -> int:
    """Check, print, write; returns the exit code."""
    if json_file is not None:
        writable("--json", json_file.absolute())
    found = score(folder, benchmarks, against=against)
    console().print(score_table(found))
    if json_file is not None:
        rows = [
            {**s.row._asdict(), "counts_as": s.result, "points": s.rounded, "points_exact": s.exact,
             "counterexample": s.checked._asdict() if s.checked else None, "reason": s.reason}
            for s in found
        ]  # fmt: skip
        content = {"categories": [t._asdict() for t in totals(found)], "rows": rows}
        write_atomically(json_file, json.dumps(content, indent=2, allow_nan=False) + "\n")
    return CONTRADICTED if any(s.rounded < 0 for s in found) else SOLVED


def peer(ours: Path, theirs: Path, *, benchmarks: Path | None, plot: Path | None) -> int:
    """Compare, print, draw; returns the exit code."""
    if plot is not None:
        writable("--plot", plot.absolute())
    name = theirs.name if theirs.is_dir() else theirs.resolve().parent.name
    pairs = compare(ours, theirs, benchmarks=benchmarks)
    console().print(peer_table(pairs, name))
    sides = {"calipers": [p.ours for p in pairs], name: [p.theirs for p in pairs]}
    series = {
        k: [r.seconds for r in rows if r.result in ("sat", "unsat")] for k, rows in sides.items()
    }
    if plot is not None and any(series.values()):
        write_atomically(plot, cactus(series))
    return CONTRADICTED if any(c.contradictions for c in compared(pairs)) else SOLVED


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
