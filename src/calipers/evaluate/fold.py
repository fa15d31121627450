"""The fold: a cascade's stages, one after the other, each on the rows that are still UNKNOWN.

    bracket = reduce(meet) over the stages

Work goes stage by stage, so that a time limit leaves every example with the cheap methods' results. Within a stage
it goes in batches; results do not depend on the batches, because every example has its own seed.
"""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import FrameType

import torch
from torch import Tensor

from calipers.bounds.deployed import deviation
from calipers.bounds.planner import out_of_memory
from calipers.bracket import Bracket, Evidence, Model, Verdict, witness
from calipers.errors import UnsupportedOp
from calipers.evaluate.cascade import Stage
from calipers.evaluate.limits import TimeIsUp, alarm
from calipers.evaluate.result import Row
from calipers.evaluate.solvers import harder
from calipers.evaluate.store import Store
from calipers.graph.graph import Network
from calipers.seeds import seeds as example_seeds
from calipers.sets import ThreatModel
from calipers.spec import Spec
from calipers.work import counted, counting

CHUNK = 100  # examples a batch at most
SLICE = 5.0  # seconds a batch should last at most: what a kill can lose, and how often progress is reported


@dataclass(frozen=True)
class Progress:
    """Where an audit stands, after each batch of a stage."""

    stage: str
    done: int
    total: int
    robust: int
    vulnerable: int
    unknown: int


@dataclass(frozen=True, eq=False)
class Job:
    """What every stage of one audit shares."""

    network: Network
    x: Tensor
    y: Tensor
    threat: ThreatModel
    seed: int
    replicas: tuple[Model, ...] = ()
    chunk: int = CHUNK
    deadline: float = math.inf
    progress: Callable[[Progress], None] | None = None
    pressed: Callable[[], bool] = lambda: False
    deployed: bool = False
    memory: int | None = None


def _unknown(bracket: Bracket) -> Tensor:
    """Which rows have no verdict: (N,) bool."""
    flags = [verdict is Verdict.UNKNOWN for verdict in bracket.verdict()]
    return torch.tensor(flags, dtype=torch.bool)


@contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Whether Ctrl-C was pressed: the first press only sets the flag, so that no finished work is lost on the way;
    the second interrupts as usual. Outside the main thread nothing changes."""
    pressed = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield pressed.is_set
        return
    usual = signal.getsignal(signal.SIGINT) or signal.default_int_handler

    def press(_signal: int, _frame: FrameType | None) -> None:
        pressed.set()
        signal.signal(signal.SIGINT, usual)

    signal.signal(signal.SIGINT, press)
    try:
        yield pressed.is_set
    finally:
        signal.signal(signal.SIGINT, usual)


def fold(
    job: Job, stages: Sequence[Stage], store: Store | None
) -> tuple[Bracket, list[Row], str | None, Tensor]:
    """The bracket, a row per stage, why it stopped early (or None), and the rows (N,) cut off by that."""
    bracket = Bracket.unknown(len(job.x))
    rows: list[Row] = []
    cut = torch.zeros(len(job.x), dtype=torch.bool)
    stopped: str | None = None
    for stage in stages:
        todo = torch.nonzero(_unknown(bracket)).flatten()
        if stopped or not len(todo):
            rows.append(Row(stage.name, stage.side, note="not reached" if stopped else ""))
            cut[todo] = stopped is not None
            continue
        run = _Run(job, stage, store, bracket, todo)
        bracket, row, left = run.result()
        rows.append(row)
        stopped = run.stopped
        cut[left] = stopped is not None
    return bracket, rows, stopped, cut & _unknown(bracket)


class _Run:
    """One stage over the rows ``todo``: stored units first, then batch by batch.

    Complete searches take one example at a time, the most promising first. What they leave undecided is not stored, so
    that another call goes on with it.
    """

    def __init__(
        self, job: Job, stage: Stage, store: Store | None, bracket: Bracket, todo: Tensor
    ) -> None:
        self.job, self.stage, self.store, self.before, self.todo = job, stage, store, bracket, todo
        self.done: list[tuple[Tensor, Bracket]] = []
        self.seconds = self.stored = self.work = 0.0
        self.tried = self.restored = 0
        self.note = ""
        self.stopped: str | None = None
        self.robust = self.vulnerable = 0
        self.until = math.inf  # of the search in progress

    def result(self) -> tuple[Bracket, Row, Tensor]:
        """The bracket met with this stage, its row, and the rows it did not get to."""
        search = self.stage.side == "exact"
        try:
            self._restore()
            for rows in self._searches() if search else self._batches():
                self._measure(rows)
        except KeyboardInterrupt:
            self.stopped = "interrupted"
        except TimeIsUp:
            self.stopped = "time"
        except UnsupportedOp as error:
            self.note = f"skipped: {error}"
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
            self.note = "stopped: out of memory"
        tried = torch.cat([r for r, _ in self.done]) if self.done else self.todo[:0]
        bracket = self.before
        if self.done:
            bracket = bracket.scatter(tried, _join([part for _, part in self.done]))
        decided = len(self.todo) - int(_unknown(bracket).sum())
        row = Row(
            self.stage.name,
            self.stage.side,
            seconds=self.seconds,
            tried=len(tried),
            decided=decided,
            note=self.note or {"time": "stopped by time"}.get(str(self.stopped), self.stopped or ""),
            stored=self.stored,
            work=self.work,
        )  # fmt: skip
        return bracket, row, self.todo[~torch.isin(self.todo, tried) | torch.tensor(search)]

    def _restore(self) -> None:
        found = self.store.get(self.stage.name, self.job.x[0]) if self.store else None
        if found:
            rows, part, self.stored = found
            self.seconds += self.stored
            self.work += sum(e.work for e in part.lower_evidence if e)
            self.done.append((torch.tensor(rows), part))
            self._count(part)
            self.restored = self.tried = len(rows)

    def _batches(self) -> Iterator[Tensor]:
        """The rows left: one first, then as many as SLICE seconds (or half the time left) hold at the speed so far."""
        restored = self.done[0][0] if self.done else self.todo[:0]
        left = self.todo[~torch.isin(self.todo, restored)]
        size, largest = 1, _examples(self.job, self.stage)
        begin = time.perf_counter()
        while len(left):
            remaining = self.job.deadline - time.perf_counter()
            if self.job.pressed() or remaining <= 0:
                self.stopped = "interrupted" if self.job.pressed() else "time"
                return
            yield left[:size]
            left = left[size:]
            rate = (time.perf_counter() - begin) / max(self.tried - self.restored, 1)
            fits = int(min(SLICE, max(remaining, 0.0) / 2) / max(rate, 1e-9))
            size = max(1, min(largest, 8 * size, fits))

    def _searches(self) -> Iterator[Tensor]:
        """The rows left one by one, the largest lower bound first, each with an equal share of the time left."""
        if math.isinf(self.job.deadline):
            self.note = "not tried: needs a time limit"
            return
        restored = self.done[0][0] if self.done else self.todo[:0]
        left = self.todo[~torch.isin(self.todo, restored)]
        left = left[self.before.lower[left].argsort(descending=True, stable=True)]
        for place in range(len(left)):
            now = time.perf_counter()
            if self.job.pressed() or now >= self.job.deadline:
                self.stopped = "interrupted" if self.job.pressed() else "time"
                return
            self.until = now + (self.job.deadline - now) / (len(left) - place)
            yield left[place : place + 1]

    def _measure(self, rows: Tensor) -> None:
        begin = time.perf_counter()
        place = rows.to(self.job.x.device)
        with counting() as work, alarm(self.job.deadline):
            if self.stage.side == "exact":
                part = search(self.job, self.stage, place, self.until)
            else:
                part = measure(self.job, self.stage, place)
        took = time.perf_counter() - begin
        share = Evidence(self.stage.name, took / len(rows), work.passes / len(rows))
        evidence = (share,) * len(rows)
        part = replace(part, lower_evidence=evidence, upper_evidence=evidence)
        if self.stage.side == "exact" and bool(_unknown(part).any()):
            late = time.perf_counter() >= self.job.deadline
            self.stopped = self.stopped or ("time" if late else None)
        elif self.store:
            self.store.add(self.stage.name, rows.tolist(), part, took, work.passes)
        self.done.append((rows, part))
        self.seconds += took
        self.work += work.passes
        self.tried += len(rows)
        self._count(part)
        if self.job.progress:
            self._report(self.job.progress)

    def _count(self, part: Bracket) -> None:
        verdicts = part.verdict()
        self.robust += sum(v is Verdict.ROBUST for v in verdicts)
        self.vulnerable += sum(v is Verdict.VULNERABLE for v in verdicts)

    def _report(self, progress: Callable[[Progress], None]) -> None:
        before = self.before.verdict()
        robust = sum(v is Verdict.ROBUST for v in before) + self.robust
        vulnerable = sum(v is Verdict.VULNERABLE for v in before) + self.vulnerable
        unknown = len(before) - robust - vulnerable
        progress(Progress(self.stage.name, self.tried, len(self.todo), robust, vulnerable, unknown))


def _examples(job: Job, stage: Stage) -> int:
    """The largest batch: an attack's must fit into the memory, bounds divide theirs themselves."""
    if job.memory is None or stage.side == "bound":
        return job.chunk
    return max(1, min(job.chunk, job.memory // attack_bytes(job.network, job.x)))


def attack_bytes(network: Network, x: Tensor) -> int:
    """What one example of an attack takes, roughly: every value of the graph with its gradient (twice that, as some
    ops keep copies), and the region and the attack's own points in float64."""
    values = sum(math.prod(n.shape) for n in network.graph.nodes if n.name in network.graph.active)
    return 4 * values * x.element_size() + 24 * 8 * math.prod(x.shape[1:])


def measure(job: Job, stage: Stage, rows: Tensor) -> Bracket:
    """What one stage says about ``rows``: the only place where a method is called."""
    x = job.x[rows]
    region, spec = job.threat.around(x), Spec.label(job.y[rows], job.network.num_classes)
    if stage.side == "bound":
        limit = {} if job.memory is None else {"memory": job.memory}
        with torch.no_grad():
            # float32 sums have a known error bound on a CPU only
            dtype = stage.dtype if x.device.type == "cpu" else torch.float64
            values = stage.method(job.network, region, spec, dtype=dtype, rigorous=True, **limit)
            if job.deployed:
                radius = deviation(job.network, region, spec, dtype=x.dtype, **limit)
                values = values.double() - radius
        return Bracket.from_bound(spec.margin(values), Evidence(stage.name))
    seeds = example_seeds(x, job.seed, stage.name)
    model = counted(job.network)
    points = stage.method(model, region, spec, dtype=x.dtype, seeds=seeds)
    return witness(model, region, spec, points, replicas=job.replicas)


def search(job: Job, stage: Stage, rows: Tensor, until: float) -> Bracket:
    """What a complete search says about one example: a proof, or a point that `witness` judges."""
    x = job.x[rows]
    region, spec = job.threat.around(x), Spec.label(job.y[rows], job.network.num_classes)
    asked = spec
    if job.deployed:
        radius = deviation(job.network, region, spec, dtype=x.dtype, memory=job.memory)
        if not bool(torch.isfinite(radius).all()):
            return Bracket.unknown(1)
        asked = harder(spec, radius)
    bracket = Bracket.unknown(1)

    def accept(point: Tensor) -> bool:
        nonlocal bracket
        judged = witness(job.network, region, spec, point.to(x), replicas=job.replicas)
        bracket = bracket.meet(judged)
        return bool((judged.upper <= 0).all())

    found = stage.method(
        job.network, region, asked, deadline=until, memory=job.memory, accept=accept
    )
    lower = torch.tensor([found.outcome.lower], dtype=torch.float64)
    return bracket.meet(Bracket.from_bound(lower, Evidence(found.method or stage.name)))


def _join(parts: Sequence[Bracket]) -> Bracket:
    points = [p.witness for p in parts if p.witness is not None]
    return Bracket(
        torch.cat([p.lower for p in parts]),
        torch.cat([p.upper for p in parts]),
        torch.cat(points) if points else None,
        torch.cat([p.rounding for p in parts if p.rounding is not None]),
        tuple(e for p in parts for e in p.lower_evidence),
        tuple(e for p in parts for e in p.upper_evidence),
    )
