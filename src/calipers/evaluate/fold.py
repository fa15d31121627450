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
from collections import Counter
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
from calipers.evaluate.result import Row, Units
from calipers.evaluate.solvers import harder
from calipers.evaluate.store import Store
from calipers.graph.graph import Network
from calipers.seeds import seeds as example_seeds
from calipers.sets import ThreatModel
from calipers.spec import Spec
from calipers.work import counted, counting

CHUNK = 100  # examples a batch at most
TRIAL = 200  # examples, the nearest to a proof, of which a bound must decide one to go on under a time limit
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
    fresh: int = 0
    seconds: float = 0.0

    @property
    def rate(self) -> float:
        """Examples a second in this stage, in this call."""
        return self.fresh / self.seconds if self.seconds > 0 else 0.0

    @property
    def eta(self) -> float:
        """Seconds until the stage is through, at this rate."""
        return (self.total - self.done) / self.rate if self.rate else math.inf


@dataclass(frozen=True, eq=False)
class Unit:
    """A batch of examples in one stage, measured: a bracket, or why there is none.

    Args:
        rows: which examples, (B,).
        reason: why ``part`` is None; empty if time was up.
    """

    rows: Tensor
    part: Bracket | None
    seconds: float = 0.0
    work: float = 0.0
    reason: str = ""


Batches = Iterator[tuple[Tensor, float]]  # rows, and until when a search of them may go on


@dataclass(frozen=True, eq=False)
class Job:
    """What every stage of one audit shares.

    Args:
        spread: measures batches as they come, here or elsewhere; None measures here.
        workers: how many batches ``spread`` measures at a time.
        precision: the share of unknown examples that is good enough.
    """

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
    spread: Callable[[Job, Stage, Batches], Iterator[Unit]] | None = None
    workers: int = 1
    precision: float = 0.0


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
    job: Job, stages: Sequence[Stage], store: Store | None, known: Bracket | None = None
) -> tuple[Bracket, list[Row], str | None, Tensor]:
    """The bracket, a row per stage, why it stopped early (or None), and the rows (N,) cut off by that.

    A row that fails in a stage goes on to the next ones. ``known`` is where it starts.
    """
    bracket = Bracket.unknown(len(job.x)) if known is None else known
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
    """One stage over the rows ``todo``: stored units first, then batch by batch, here or by workers.

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
        self.failed: list[tuple[Tensor, str]] = []
        self.open = int(_unknown(bracket).sum())  # before this stage
        self.begin = time.perf_counter()

    def result(self) -> tuple[Bracket, Row, Tensor]:
        """The bracket met with this stage, its row, and the rows it did not get to."""
        search = self.stage.side == "exact"
        try:
            self._restore()
            for unit in (self.job.spread or here)(self.job, self.stage, self._planned()):
                self._keep(unit)
        except KeyboardInterrupt:
            self.stopped = "interrupted"
        except TimeIsUp:
            self.stopped = "time"
        except UnsupportedOp as error:
            self._fail(f"skipped: {error}")
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
            self._fail("stopped: out of memory")
        tried = torch.cat([r for r, _ in self.done]) if self.done else self.todo[:0]
        failed = torch.cat([self.todo[:0], *(r for r, _ in self.failed)])
        bracket, units = self.before, None
        if self.done:
            part = _join([part for _, part in self.done])
            bracket, units = bracket.scatter(tried, part), _units(tried, part)
        decided = len(self.todo) - int(_unknown(bracket).sum())
        row = Row(
            self.stage.name,
            self.stage.side,
            seconds=self.seconds,
            tried=len(tried),
            decided=decided,
            note=self.note or _said(self.stopped, self.failed),
            stored=self.stored,
            work=self.work,
            units=units,
        )  # fmt: skip
        return (
            bracket,
            row,
            self.todo[~torch.isin(self.todo, torch.cat([tried, failed])) | torch.tensor(search)],
        )

    def _restore(self) -> None:
        found = self.store.get(self.stage.name, self.job.x[0]) if self.store else None
        if found:
            rows, part, self.stored = found
            self.seconds += self.stored
            self.work += sum(e.work for e in part.lower_evidence if e)
            self.done.append((torch.tensor(rows), part))
            self._count(part)
            self.restored = self.tried = len(rows)

    def _planned(self) -> Batches:
        if self.stage.side == "exact":
            return self._searches()
        return self._batches() if self.job.spread is None or self._timed else self._blocks()

    @property
    def _timed(self) -> bool:
        return not math.isinf(self.job.deadline)

    def _left(self, todo: Tensor) -> Tensor:
        """The rows of ``todo`` that have no stored result."""
        return todo[~torch.isin(todo, self.done[0][0])] if self.restored else todo

    def _halted(self) -> bool:
        """Whether no batch may be begun any more; `stopped` says why."""
        unknown = self.open - self.robust - self.vulnerable
        if self.job.pressed():
            self.stopped = "interrupted"
        elif time.perf_counter() >= self.job.deadline:
            self.stopped = "time"
        elif self.job.precision > 0 and unknown <= self.job.precision * len(self.before):
            self.stopped = "precision"
        elif self._hopeless():
            self.note = (
                f"set aside: none of the {self.tried - self.restored} most promising decided"
            )
            return True
        return self.stopped is not None

    def _hopeless(self) -> bool:
        """Whether a bound that decided none of the rows nearest to a proof should leave the time to other stages."""
        fresh = self.tried - self.restored
        return self._timed and self.stage.side == "bound" and fresh >= TRIAL and not self.robust

    def _batches(self) -> Batches:
        """The rows left: one first, then as many as SLICE seconds (or half the time left) hold at the speed so far."""
        plain = self.job.spread is None and not self._timed
        left = self._left(self.todo if plain else self._promising())
        size, largest = 1, _examples(self.job, self.stage)
        while len(left) and not self._halted():
            yield left[:size], math.inf
            left = left[size:]
            remaining = max(self.job.deadline - time.perf_counter(), 0.0)
            fresh = self.tried - self.restored
            rate = (time.perf_counter() - self.begin) * self.job.workers / max(fresh, 1)
            fits = int(min(SLICE, remaining / 2) / max(rate, 1e-9))
            size = max(1, min(largest, 8 * size, fits)) if fresh else 1

    def _blocks(self) -> Batches:
        """The rows left in batches that neither the clock nor what is stored has a say in, so that a run that was
        killed works out the same numbers, bit by bit. Small enough that no worker waits long for the others."""
        fair = -(-len(self.todo) // (8 * self.job.workers))
        size = max(1, min(_examples(self.job, self.stage), fair))
        todo = self._promising()
        for place in range(0, len(todo), size):
            rows = self._left(todo[place : place + size])
            if self._halted():
                return
            if len(rows):
                yield rows, math.inf

    def _promising(self) -> Tensor:
        """The rows, those first that this stage is likeliest to decide: the nearest to 0 on its side."""
        attack = self.stage.side == "attack"
        ends = self.before.upper if attack else -self.before.lower
        return self.todo[ends[self.todo].argsort(stable=True)]

    def _searches(self) -> Batches:
        """The rows left one by one, the largest lower bound first, each with an equal share of the time left."""
        if not self._timed:
            self.note = "not tried: needs a time limit"
            return
        left = self._left(self.todo)
        left = left[self.before.lower[left].argsort(descending=True, stable=True)]
        for place in range(len(left)):
            if self._halted():
                return
            now = time.perf_counter()
            share = (self.job.deadline - now) * min(1.0, self.job.workers / (len(left) - place))
            yield left[place : place + 1], now + share

    def _fail(self, reason: str) -> None:
        """The rows left have no result."""
        self.note = reason
        tried = torch.cat([self.todo[:0], *(r for r, _ in self.done)])
        rows = self.todo[~torch.isin(self.todo, tried)]
        if self.store:
            self.store.fail(self.stage.name, rows.tolist(), reason)

    def _keep(self, unit: Unit) -> None:
        """Store a measured batch, or why it failed."""
        rows, part = unit.rows, unit.part
        if part is None:
            self.stopped = self.stopped or (None if unit.reason else "time")
            if unit.reason:
                self.failed.append((rows, unit.reason))
                if self.store:
                    self.store.fail(self.stage.name, rows.tolist(), unit.reason)
            return
        if self.stage.side == "exact" and bool(_unknown(part).any()):
            late = time.perf_counter() >= self.job.deadline
            self.stopped = self.stopped or ("time" if late else None)
        elif self.store:
            self.store.add(self.stage.name, rows.tolist(), part, unit.seconds, unit.work)
        self.done.append((rows, part))
        self.seconds += unit.seconds
        self.work += unit.work
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
        done = self.tried + sum(len(r) for r, _ in self.failed)
        fresh, took = self.tried - self.restored, time.perf_counter() - self.begin
        progress(
            Progress(
                self.stage.name,
                done,
                len(self.todo),
                robust,
                vulnerable,
                unknown,
                fresh,
                took,
            )
        )


def _said(stopped: str | None, failed: Sequence[tuple[Tensor, str]]) -> str:
    """A row's note: why the stage stopped, and what failed."""
    counts = Counter[str]()
    for rows, reason in failed:
        counts[reason] += len(rows)
    first = {"time": "stopped by time", "precision": "stopped: narrow enough"}
    notes = [first.get(stopped, stopped)] if stopped else []
    return "; ".join([*notes, *(f"{n} failed: {r}" for r, n in counts.items())])


def here(job: Job, stage: Stage, batches: Batches) -> Iterator[Unit]:
    """The batches measured one after the other, in this process."""
    for rows, until in batches:
        yield measured(job, stage, rows, until)


def measured(job: Job, stage: Stage, rows: Tensor, until: float) -> Unit:
    """One batch, with what it took.

    Raises:
        TimeIsUp: the deadline of ``job`` came first.
    """
    begin = time.perf_counter()
    place = rows.to(job.x.device)
    with counting() as work, alarm(job.deadline):
        exact = stage.side == "exact"
        part = search(job, stage, place, until) if exact else measure(job, stage, place)
    took = time.perf_counter() - begin
    return Unit(rows, evident(part, stage.name, took, work.passes), took, work.passes)


def evident(part: Bracket, stage: str, seconds: float, work: float) -> Bracket:
    """``part`` with its seconds and work shared equally."""
    evidence = (Evidence(stage, seconds / len(part), work / len(part)),) * len(part)
    return replace(part, lower_evidence=evidence, upper_evidence=evidence)


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


def _units(rows: Tensor, part: Bracket) -> Units:
    spent = [(e.seconds, e.work) if e else (0.0, 0.0) for e in part.upper_evidence]
    seconds, work = torch.tensor(spent, dtype=torch.float64).reshape(-1, 2).unbind(1)
    return Units(rows, part.lower, part.upper, seconds, work)


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
