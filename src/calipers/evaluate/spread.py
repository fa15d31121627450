"""An audit's batches, measured by worker processes: the same numbers, several at a time.

A worker gets the network once and then batches of examples; it answers with plain arrays, and only the process that
started it writes. A batch whose worker dies is tried again, then halved, down to the example that kills its worker
twice: that one stays unknown, with the reason.
"""

from __future__ import annotations

import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from calipers.bounds.planner import out_of_memory
from calipers.bracket import Bracket, Model
from calipers.errors import WorkerError
from calipers.evaluate.cascade import Stage
from calipers.evaluate.checks import onnxruntime_replica
from calipers.evaluate.fold import Batches, Job, Unit, evident, measured
from calipers.evaluate.limits import TimeIsUp
from calipers.evaluate.store import code_digest, model_digest
from calipers.evaluate.workers import Lost, Raised, Team
from calipers.graph.graph import Network
from calipers.sets import ThreatModel

GRACE = 5.0  # seconds after its limit until a worker that has not answered is ended


class Setup(NamedTuple):
    """What a worker is sent when it starts.

    Args:
        network: the network, or what makes it.
        digest: of the network that is audited: the worker's must have the same.
        replicas: evaluations that must agree, besides onnxruntime's.
        gpus: whether a worker measures on a GPU, if it sees one.
        code: digest of the sources that measure: the worker's must be the same.
        cap: bytes of address space that measuring may take on top of what the worker has when it is ready.
    """

    network: Network | Callable[[], Network]
    digest: str
    code: str
    stages: tuple[Stage, ...]
    threat: ThreatModel
    seed: int
    replicas: tuple[Model, ...]
    deployed: bool
    memory: int | None
    threads: int
    cap: int | None
    gpus: bool = False


class Task(NamedTuple):
    """A batch to measure: the stage's place in the cascade, examples and labels, seconds until the audit's deadline
    and for a search."""

    stage: int
    x: np.ndarray[Any, Any]
    y: np.ndarray[Any, Any]
    deadline: float
    search: float


class Answer(NamedTuple):
    """What a worker measured: lower, upper and rounding (B,), points (B, *x) or None, seconds and work."""

    ends: tuple[np.ndarray[Any, Any], ...]
    points: np.ndarray[Any, Any] | None
    seconds: float
    work: float


class Failed(NamedTuple):
    """Why there is no answer: no memory, or, if empty, no time."""

    reason: str


class Batch(NamedTuple):
    """Rows on their way: how often their worker died."""

    rows: Tensor
    until: float
    deaths: int = 0

    def halves(self) -> list[Batch]:
        middle = len(self.rows) // 2
        parts = [rows for rows in (self.rows[:middle], self.rows[middle:]) if len(self.rows) > 1]
        # a single example gets a second chance: something else may have ended its worker
        return [Batch(rows, self.until, int(len(rows) > 1)) for rows in parts]


def team(
    count: int | None,
    network: Network,
    stages: Sequence[Stage],
    threat: ThreatModel,
    *,
    seed: int,
    replicas: Sequence[Model],
    deployed: bool,
    memory: int | None,
    threads: int,
    cap: int | None,
    loader: Callable[[], Network] | None,
    ray: str | None = None,
) -> Team:
    """Workers that measure `stages`, here or, with ``ray``, in the cluster there. Each may take ``cap`` bytes; here, an
    equal share of the machine's memory by default."""
    for name, number in (("workers", 1 if count is None else count), ("threads", threads)):
        if number < 1:
            raise ValueError(f"{name}: {number} is not at least 1")
    if network.device.type != "cpu":
        raise ValueError(
            f"workers: the network is on {network.device}; leave workers out, or move it to the CPU"
        )
    setup = Setup(
        loader or network, model_digest(network), code_digest(), tuple(stages), threat, seed, tuple(replicas), deployed,
        memory, threads, cap,
    )  # fmt: skip
    if ray is not None:
        from calipers.evaluate.cluster import Cluster

        # what the rounding of a deployed network may be is known of a processor only
        return Cluster(
            count, prepare, setup._replace(gpus=not deployed), address=ray, threads=threads
        )
    number = count or 1
    return Team(number, prepare, setup._replace(cap=cap or _share(number)))


def _share(count: int) -> int | None:
    """An equal part of the machine's memory, where the system says how much there is."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // count
    except (AttributeError, ValueError, OSError):
        return None


class Spread:
    """Measures an audit's batches with a team; see `Job.spread`."""

    def __init__(self, workers: Team, stages: Sequence[Stage]) -> None:
        self.team = workers
        self.place = {id(stage): i for i, stage in enumerate(stages)}

    def __call__(self, job: Job, stage: Stage, batches: Batches) -> Iterator[Unit]:
        """Units in the order in which they are done."""
        again: deque[Batch] = deque()

        def take() -> tuple[Batch, float] | None:
            batch = again.popleft() if again else next((Batch(*b) for b in batches), None)
            if batch is None:
                return None
            limit = min(job.deadline, batch.until) - time.perf_counter()
            return batch, max(limit, 0.0) + GRACE

        def send(batch: Batch) -> Task:
            now = time.perf_counter()
            rows = batch.rows.to(job.x.device)
            return Task(
                self.place[id(stage)], job.x[rows].numpy(), job.y[rows].numpy(), job.deadline - now,
                batch.until - now,
            )  # fmt: skip

        deadline = time.monotonic() + job.deadline - time.perf_counter()
        for batch, answer in self.team.answers(take, send, deadline):
            if isinstance(answer, Raised):
                raise answer.error
            if isinstance(answer, Answer):
                yield _unit(batch.rows, stage, answer)
                continue
            over = isinstance(answer, Lost) and answer.late and time.monotonic() >= deadline
            smaller, reason = _after(batch, Failed("") if over else answer)
            again.extend(smaller)
            if not smaller:
                yield Unit(batch.rows, None, reason=reason)


def _after(batch: Batch, answer: Lost | Failed) -> tuple[list[Batch], str]:
    """What to try next, or why nothing: empty if time was up."""
    if isinstance(answer, Failed) and not answer.reason:
        return [], ""
    if isinstance(answer, Lost) and answer.late:
        return [], answer.reason
    if isinstance(answer, Lost) and not batch.deaths:
        return [batch._replace(deaths=1)], ""
    return batch.halves(), answer.reason


def _unit(rows: Tensor, stage: Stage, answer: Answer) -> Unit:
    lower, upper, rounding = map(
        torch.tensor, answer.ends
    )  # copies: Ray shares its memory read-only
    points = None if answer.points is None else torch.tensor(answer.points)
    part = Bracket(lower, upper, points, rounding)
    part = evident(part, stage.name, answer.seconds, answer.work)
    return Unit(rows, part, answer.seconds, answer.work)


# -- inside a worker ---------------------------------------------------------------------------------------------


def prepare(setup: Setup) -> Callable[[Task], Answer | Failed]:
    """What measures batches in a worker.

    Raises:
        WorkerError: the network made here is not the one that is audited.
    """
    torch.set_num_threads(setup.threads)
    if code_digest() != setup.code:
        raise WorkerError(
            "a worker has other sources of Calipers than the process that drives the audit"
        )
    network = setup.network if isinstance(setup.network, Network) else setup.network()
    network.module.eval()
    if setup.gpus and torch.cuda.is_available():
        network.module.to("cuda")
    if model_digest(network) != setup.digest:
        raise WorkerError("the network that a worker has is not the one that is audited")
    runtime = onnxruntime_replica(network)
    replicas = (*setup.replicas, *(() if isinstance(runtime, str) else (runtime,)))
    nothing = torch.empty(0)
    job = Job(
        network, nothing, nothing, setup.threat, setup.seed, replicas, deployed=setup.deployed,
        memory=setup.memory,
    )  # fmt: skip
    limit_memory(setup.cap)

    def handle(task: Task) -> Answer | Failed:
        now = time.perf_counter()
        x, y = (torch.tensor(part, device=network.device) for part in (task.x, task.y))
        current = replace(job, x=x, y=y, deadline=now + task.deadline)
        rows = torch.arange(len(x))
        try:
            return _answer(measured(current, setup.stages[task.stage], rows, now + task.search))
        except TimeIsUp:
            return Failed("")
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
            return Failed("out of memory")

    return handle


def _answer(unit: Unit) -> Answer:
    part = unit.part or Bracket.unknown(len(unit.rows))
    rounding = torch.zeros(len(part)) if part.rounding is None else part.rounding
    ends = tuple(end.double().cpu().numpy() for end in (part.lower, part.upper, rounding))
    points = None if part.witness is None else part.witness.cpu().numpy()
    return Answer(ends, points, unit.seconds, unit.work)


def limit_memory(cap: int | None) -> None:
    """At most ``cap`` bytes of address space more than now, where the system can limit that."""
    try:
        import resource

        with open("/proc/self/statm", encoding="ascii") as file:  # noqa: PTH123
            now = int(file.read().split()[0]) * resource.getpagesize()
    except (ImportError, OSError):
        return
    if cap is not None and not math.isinf(cap):
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        limit = now + cap if hard == resource.RLIM_INFINITY else min(now + cap, hard)
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
