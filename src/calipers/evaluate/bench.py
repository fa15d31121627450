"""Many queries, decided one after the other in worker processes, each row of the results on disk before the next.

A worker that dies, or does not come back, costs its own instance only: that row says so, and a new worker goes on. The
results file grows by one synchronised line per finished instance, so that a killed run goes on where it stopped; once
all are there it is rewritten in the order of the instances.
"""

from __future__ import annotations

import csv
import gzip
import io
import math
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, fields, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch

from calipers import __version__
from calipers.errors import CalipersError, NoInputs, SpecError, StoreMismatch
from calipers.evaluate.queries import read
from calipers.evaluate.store import code_digest
from calipers.evaluate.strict import decide_strictly
from calipers.evaluate.verify import Decision, decide
from calipers.evaluate.workers import Lost, Raised, Team
from calipers.files import cell, text_of, write_atomically
from calipers.graph.graph import Network
from calipers.graph.onnx import load_onnx
from calipers.vnnlib import Query, instances

OPPOSITE = {"sat": "unsat", "unsat": "sat"}
GRACE = 5.0  # seconds after its limit until a worker that has not answered is ended


class Task(NamedTuple):
    """One instance to decide."""

    suite: str
    onnx: str
    vnnlib: str
    folder: Path
    limit: float
    expected: str = ""

    @property
    def key(self) -> tuple[str, str, str]:
        return self.suite, self.onnx, self.vnnlib


class Settings(NamedTuple):
    """What all instances share."""

    memory: int | None = None
    domains: int | None = None
    exact: bool = False
    threads: int = 1
    save: Path | None = None
    fast: bool = False


@dataclass(frozen=True)
class Result:
    """A row of the results: the instance, its verdict (or ``error``), and how it came about.

    Args:
        limit: seconds allowed.
        expected: what ``expected.csv`` says, if anything.
        seconds: from reading the files to the verdict, inside the worker.
        version: of Calipers, with a digest of its code: rows of two versions are not mixed.
    """

    suite: str
    onnx: str
    vnnlib: str
    limit: float
    result: str
    expected: str = ""
    seconds: float = 0.0
    method: str = ""
    lower: float = -math.inf
    domains: int = 0
    rounded: bool = False
    reason: str = ""
    version: str = ""

    @property
    def key(self) -> tuple[str, str, str]:
        return self.suite, self.onnx, self.vnnlib

    @property
    def contradicts(self) -> bool:
        """Whether the verdict is the opposite of the expected one."""
        return OPPOSITE.get(self.result) == self.expected

    @property
    def solved(self) -> bool:
        return self.result in OPPOSITE


HEADER = [f.name for f in fields(Result)]
_TYPES: dict[str, Callable[[str], Any]] = {
    **dict.fromkeys(HEADER, str),
    **dict.fromkeys(("limit", "seconds", "lower"), float),
    "domains": int,
    "rounded": lambda text: text == "True",
}


# -- what there is to do -----------------------------------------------------------------------------------------


def tasks(path: str | Path, *, cap: float = math.inf) -> list[Task]:
    """The instances of a list, of a benchmark's folder, or of all benchmarks in a folder.

    Args:
        cap: seconds; the limit of an instance is the smaller of its own and this.

    Raises:
        SpecError: no list of instances, or a malformed one.
    """
    path = Path(path)
    lists = [path] if path.is_file() or (path / "instances.csv").is_file() else []
    if not lists and path.is_dir():
        lists = sorted(p.parent for p in path.glob("*/instances.csv"))
    if not lists:
        raise SpecError(
            f"{path}: no instances.csv there; give a list of instances or the folder of a benchmark"
        )
    found = []
    for one in lists:
        folder = (one.parent if one.is_file() else one).resolve()
        truth = expected(folder)
        for onnx, vnnlib, seconds in instances(one):
            net, prop = (
                os.path.relpath(p, one.parent if one.is_file() else one) for p in (onnx, vnnlib)
            )
            verdict = truth.get((_plain(net), _plain(prop)), "")
            found.append(Task(folder.name, net, prop, folder, min(seconds, cap), verdict))
    return found


def expected(folder: Path) -> dict[tuple[str, str], str]:
    """What ``expected.csv`` says, by network and property without ``.gz``; empty without such a file."""
    file = folder / "expected.csv"
    if not file.is_file():
        return {}
    with file.open(newline="", encoding="utf-8") as lines:
        rows = csv.DictReader(lines)
        try:
            return {(_plain(r["onnx"]), _plain(r["vnnlib"])): r["expected"] for r in rows}
        except KeyError as error:
            raise SpecError(
                f"{file}: has no column {error}; expected onnx,vnnlib,...,expected"
            ) from None


def _plain(name: str) -> str:
    return name.removesuffix(".gz")


# -- the results file --------------------------------------------------------------------------------------------


def version() -> str:
    """What decides a verdict: the version and a digest of the code."""
    return f"{__version__} {code_digest()}"


def read_results(file: Path) -> list[Result]:
    """The finished rows of a results file; a last line that a kill cut short is left out.

    Raises:
        SpecError: not a results file of `bench`.
    """
    text = file.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    rows = csv.reader(io.StringIO(whole))
    if next(rows, None) != HEADER:
        raise SpecError(f"{file}: not a results file of calipers bench; name another one")
    found = []
    for row in rows:
        try:
            values = {k: _TYPES[k](text_of(v)) for k, v in zip(HEADER, row, strict=True)}
        except ValueError:
            raise SpecError(
                f"{file}, line {rows.line_num}: cannot be read; delete the line"
            ) from None
        found.append(Result(**values))
    return found


def _cell(value: object) -> object:
    return cell(" ".join(value.split())) if isinstance(value, str) else value


def _line(values: Sequence[object]) -> str:
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerow(map(_cell, values))
    return out.getvalue()


class _Log:
    """The results file: what is in it, and lines added one by one."""

    def __init__(self, file: Path | None, todo: Sequence[Task], now: str) -> None:
        self.file = file
        self.done: dict[tuple[str, str, str], Result] = {}
        if file is None:
            return
        if file.exists() and file.stat().st_size:
            self._resume(file, {t.key: t for t in todo}, now)
        else:
            self._append(_line(HEADER))

    def _resume(self, file: Path, todo: Mapping[tuple[str, str, str], Task], now: str) -> None:
        for row in read_results(file):
            if row.version != now:
                raise StoreMismatch(
                    f"{file}: has results of version {row.version!r}, this is {now!r}; name another file"
                )
            task = todo.get(row.key)
            if task is None or task.limit != row.limit:
                raise StoreMismatch(
                    f"{file}: has results of other instances or limits ({row.suite} {row.onnx} {row.vnnlib}, "
                    f"{row.limit:g} s); name another file"
                )
            self.done[row.key] = replace(row, expected=task.expected)
        text = file.read_bytes()
        with file.open("rb+") as handle:  # a line that a kill cut short goes
            handle.truncate(text.rfind(b"\n") + 1)

    def add(self, row: Result) -> None:
        self.done[row.key] = row
        self._append(_line(astuple(row)))

    def _append(self, line: str) -> None:
        if self.file is None:
            return
        with self.file.open("a", encoding="utf-8") as handle:
            handle.write(line)
            handle.flush()
            os.fsync(handle.fileno())

    def finish(self, todo: Sequence[Task]) -> None:
        """All rows in the instances' order."""
        if self.file is not None:
            rows = [_line(astuple(self.done[t.key])) for t in todo]
            write_atomically(self.file, _line(HEADER) + "".join(rows))


# -- deciding ----------------------------------------------------------------------------------------------------


def bench(
    todo: Sequence[Task],
    *,
    out: str | Path | None = None,
    workers: int = 1,
    settings: Settings = Settings(),  # noqa: B008 - immutable
    progress: Callable[[Result, int, int], None] = lambda *_: None,
) -> list[Result]:
    """A result for each instance, in their order.

    Args:
        out: the results file; finished rows in it are kept, the others are decided.
        workers: processes that decide at the same time, each with ``settings.threads`` threads.
        progress: called with each new result, and how many of how many there are.

    Raises:
        StoreMismatch: the results file is one of other instances, limits, or another version.
        ValueError: no worker.
    """
    for name, count in (("workers", workers), ("threads", settings.threads)):
        if count < 1:
            raise ValueError(f"{name}: {count} is not at least 1")
    now = version()
    log = _Log(None if out is None else Path(out), todo, now)
    left = [t for t in dict.fromkeys(todo) if t.key not in log.done]
    for row in _decided(left, min(workers, len(left)), settings):
        row = replace(row, version=now)
        log.add(row)
        progress(row, len(log.done), len(todo))
    log.finish(todo)
    return [log.done[t.key] for t in todo]


def _decided(left: Sequence[Task], count: int, settings: Settings) -> Iterator[Result]:
    """Results as they come."""
    queue = iter(left)

    def take() -> tuple[Task, float] | None:
        return next(((t, t.limit + GRACE) for t in queue), None)

    with Team(count, prepare, settings) as team:
        for task, found in team.answers(take):
            yield found if isinstance(found, Result) else _lost(task, found)


def _lost(task: Task, found: Lost | Raised) -> Result:
    if isinstance(found, Lost) and found.late:
        reason = f"no answer {GRACE:g} s after the limit, so the worker was ended"
        return _row(task, Decision("timed-out", reason))
    reason = found.reason if isinstance(found, Lost) else str(found.error)
    return _row(task, Decision("unknown", reason), "error")


def _row(task: Task, found: Decision, result: str = "") -> Result:
    return Result(
        *task.key,
        task.limit,
        result or found.verdict,
        task.expected,
        round(found.seconds, 4),
        found.method,
        found.lower,
        sum(b.domains for b in found.boxes),
        found.rounded,
        found.reason,
    )


# -- inside a worker ---------------------------------------------------------------------------------------------


def prepare(settings: Settings) -> Callable[[Task], Result]:
    """What decides tasks in a worker; the network of the last one is kept."""
    torch.set_num_threads(settings.threads)
    return partial(solve, settings=settings, known={})


def _decision(
    network: Network, query: Query, files: tuple[Path, Path], seconds: float, settings: Settings
) -> Decision:
    options: dict[str, Any] = {
        "seconds": seconds,
        "memory": settings.memory,
        "domains": settings.domains,
        "exact": settings.exact,
    }
    if settings.fast:
        return decide(network, query, **options)
    return decide_strictly(network, query, files, **options)[0]


def solve(task: Task, settings: Settings, known: dict[Path, Network] | None = None) -> Result:
    """The result of one instance; a file that cannot be read is an ``error``."""
    begin = time.perf_counter()
    known = {} if known is None else known
    file = task.folder / task.onnx
    query: Query | None = None
    result = ""
    try:
        if file not in known:
            known.clear()
            known[file] = load_onnx(file)
        network, query = read(file, task.folder / task.vnnlib, network=known[file])
        left = task.limit - (time.perf_counter() - begin)
        found = Decision("timed-out", "time was up before query and network were read")
        if left > 0:
            found = _decision(network, query, (file, task.folder / task.vnnlib), left, settings)
    except NoInputs as error:
        found = Decision("unsat", str(error), "reader")
    except (CalipersError, ValueError, OSError, MemoryError) as error:
        found, result = Decision("unknown", " ".join(str(error).split())), "error"
    except Exception as error:  # noqa: BLE001 - one instance must not end the others
        found, result = Decision("unknown", f"{type(error).__name__}: {error}"), "error"
    found = replace(found, seconds=time.perf_counter() - begin)
    if settings.save is not None:
        save(settings.save, task, query, found)
    return _row(task, found, result)


def save(folder: Path, task: Task, query: Query | None, found: Decision) -> None:
    """The counterexample of a ``sat``, where the competition's checker looks for it."""
    text = found.counterexample(query) if query is not None else ""
    if not text:
        return
    target = folder / task.suite / counterexample_name(task.onnx, task.vnnlib)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(gzip.compress(text.encode("ascii"), mtime=0))


def counterexample_name(onnx: str, vnnlib: str) -> str:
    """``NET_PROPERTY.counterexample.gz``."""
    net, prop = (Path(_plain(n)).stem for n in (onnx, vnnlib))
    return f"{net}_{prop}.counterexample.gz"


# -- together ----------------------------------------------------------------------------------------------------


class Summary(NamedTuple):
    """A suite's counts and seconds (median and total of the solved ones)."""

    suite: str
    instances: int
    sat: int
    unsat: int
    unknown: int
    timed_out: int
    error: int
    median: float
    total: float
    expected: int
    contradictions: int


def summaries(results: Sequence[Result]) -> list[Summary]:
    """One per suite, and one of all where there are several."""
    suites = list(dict.fromkeys(r.suite for r in results))
    found = [_summary(s, [r for r in results if r.suite == s]) for s in suites]
    return [*found, _summary("together", results)] if len(suites) > 1 else found


def _summary(suite: str, rows: Sequence[Result]) -> Summary:
    counts = Counter(r.result for r in rows)
    seconds = [r.seconds for r in rows if r.solved]
    return Summary(
        suite,
        len(rows),
        counts["sat"],
        counts["unsat"],
        counts["unknown"],
        counts["timed-out"],
        counts["error"],
        median(seconds) if seconds else math.nan,
        sum(seconds),
        sum(r.expected in OPPOSITE for r in rows),
        sum(r.contradicts for r in rows),
    )
