"""The attacks alone: empirical accuracy over a data set, and a witness for every example that is not robust.

Stage by stage over all examples, so that a time limit or Ctrl-C leaves every example with the cheap searches' results.
After each stage `witness` decides what is broken; a point that it refuses (broken in float32 alone, say) is no success,
and the search goes on there.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from calipers import __version__
from calipers.attacks import ATTACKS, Found, search
from calipers.attacks.cascade import Stage, stages_of
from calipers.bracket import Bracket, Evidence, Model, witness
from calipers.confidence import clopper_pearson
from calipers.data import Data
from calipers.describe import describe
from calipers.errors import DataError, unknown_name
from calipers.evaluate.audit import as_data, inputs
from calipers.evaluate.certified import read_certified
from calipers.evaluate.checks import batches, check, onnxruntime_replica
from calipers.evaluate.fold import Progress, interruptible
from calipers.evaluate.result import environment, threat_identity, threat_json
from calipers.evaluate.sampling import sample
from calipers.evaluate.store import code_digest, model_digest
from calipers.evaluate.witnesses import Witnesses
from calipers.graph.capture import capture
from calipers.graph.graph import Network, evaluating
from calipers.seeds import seeds as seeds_of
from calipers.sets import Region, ThreatModel
from calipers.spec import Spec
from calipers.work import counted, counting

if TYPE_CHECKING:
    from rich.console import Group


@dataclass(frozen=True)
class Tally:
    """What one stage did.

    Args:
        tried, broken: examples; ``refused`` were broken for the search, but not for `witness`.
        passes: of the network per example tried, the median; the replays by `witness` come on top.
    """

    name: str
    tried: int
    broken: int
    passes: float
    seconds: float
    refused: int = 0


@dataclass(frozen=True, eq=False)
class Empirical:
    """Robust accuracy is at most ``accuracy``: the share of examples that no attack broke.

    Args:
        data: the examples that were attacked (the sample, if one was drawn).
        positions: where they stand in the data set, (N,).
        bracket: the upper end of each example's minimal margin, with the point that attains it.
        clean: the margins without any change, (N,).
        passes: passes of the network spent on each example, (N,).
        certified: examples known to be robust, (N,) bool; nothing was spent on them.
        stopped: None, ``time`` or ``interrupted``.
        method: the attack and its options.
        witnesses: the broken examples.
    """

    threat: ThreatModel
    data: Data
    positions: Tensor
    name: str
    bracket: Bracket
    clean: Tensor
    passes: Tensor
    certified: Tensor
    stages: tuple[Tally, ...]
    seconds: float
    population: int
    seed: int
    stopped: str | None
    method: str
    notes: tuple[str, ...]
    differences: Mapping[str, float]
    identity: Mapping[str, Any]
    witnesses: Witnesses

    def __len__(self) -> int:
        return len(self.data)

    @cached_property
    def broken(self) -> int:
        """How many examples have a witness; those misclassified without any change are among them."""
        return len(self.witnesses)

    @property
    def clean_accuracy(self) -> float:
        """The share classified correctly without any change; a tie is an error."""
        return (self.clean > 0).double().mean().item()

    @property
    def accuracy(self) -> float:
        """Empirical accuracy."""
        return 1 - self.broken / len(self)

    @property
    def confidence(self) -> dict[str, tuple[float, float]] | None:
        """95 % intervals for the whole data set, if a sample was attacked."""
        if len(self) == self.population:
            return None
        right = int((self.clean > 0).sum())
        return {
            "clean": clopper_pearson(right, len(self)),
            "empirical": clopper_pearson(len(self) - self.broken, len(self)),
        }

    @property
    def median_passes(self) -> float:
        """Passes of the network per example, the median over all that were attacked."""
        return _median(self.passes[~self.certified])

    def json(self) -> dict[str, Any]:
        """The result as plain values, stable across versions of the package."""
        return {
            "n": len(self),
            "population": self.population,
            "clean_accuracy": self.clean_accuracy,
            "empirical_accuracy": self.accuracy,
            "vulnerable": self.broken,
            "certified": int(self.certified.sum()),
            "broken_examples": self.witnesses.index.tolist(),
            "confidence_95": self.confidence and {k: list(v) for k, v in self.confidence.items()},
            "median_passes": self.median_passes,
            "seconds": self.seconds,
            "stopped": self.stopped,
            "threat": threat_json(self.threat),
            "method": self.method,
            "stages": [vars(stage) for stage in self.stages],
            "model": self.name,
            "data": self.data.name,
            "seed": self.seed,
            "notes": list(self.notes),
            "largest_difference_of_outputs": dict(self.differences),
            "identity": dict(self.identity),
            "environment": environment(),
        }

    def table(self) -> Group:
        """The result for a terminal (a rich renderable)."""
        from calipers.evaluate.attack_tables import empirical_table

        return empirical_table(self)


def empirical(
    model: Network | nn.Module,
    data: Data | tuple[Tensor, Tensor],
    threat: ThreatModel,
    *,
    method: str | Callable[..., Tensor] = "auto",
    level: str | Sequence[Stage] | None = None,
    passes: float = math.inf,
    seconds: float | None = None,
    samples: int | None = None,
    seed: int = 0,
    certified: Tensor | str | Path | None = None,
    progress: Callable[[Progress], None] | None = None,
    allow_softmax: bool = False,
    name: str = "",
) -> Empirical:
    """Robust accuracy is at most this; every broken example comes with a point that `witness` accepted.

    The network is checked as in an audit, points are replayed alone, in float64 and in onnxruntime where the network
    can be written as ONNX. Ctrl-C and the time limit end it with what was found so far.

    Args:
        method: a name of `ATTACKS`, or an attack. "auto" is the cascade, `calipers.search`.
        level: of the cascade; "standard" if None.
        passes: of the cascade: no example starts another stage once it has cost so many passes of the network.
        seconds: no further searches are started after so many seconds.
        samples: attack this many examples, drawn at random by ``seed`` as `calipers.audit` does.
        certified: which examples are known to be robust, see `read_certified`; nothing is spent on them.
        progress: called after each batch.
        allow_softmax: see `calipers.evaluate.checks.check`.
        name: what to call the model.

    Raises:
        ModelError, DataError, CaptureError: as `calipers.audit`; a misclassified example is flagged as certified.
        ValueError: an argument is out of range, or does not belong to the method.
    """
    begin = time.perf_counter()
    if seconds is not None and not seconds > 0:
        raise ValueError(f"seconds: {seconds!r} is no time limit; give a positive number")
    if not passes > 0:
        raise ValueError(f"passes: {passes!r} is no limit; give a positive number")
    plan, described = _plan(method, level, passes, threat.p)
    whole = as_data(data)
    part, positions = sample(whole, samples, seed)
    network = model if isinstance(model, Network) else capture(model, part.x[:1])
    identity: dict[str, Any] = {
        "calipers": __version__,
        "code": code_digest(),
        "model": model_digest(network),
        "data": part.digest,
        "threat": threat_identity(threat),
        "seed": seed,
        "method": described,
    }
    skip = read_certified(certified, identity, positions, len(whole))
    with evaluating(network.module), interruptible() as pressed:
        runtime = onnxruntime_replica(network)
        replicas = {} if isinstance(runtime, str) else {"onnxruntime": runtime}
        x, y = inputs(part.x, network, threat), part.y.to(network.device)
        checks = check(network, x, y, threat, replicas=replicas, allow_softmax=allow_softmax)
        deadline = math.inf if seconds is None else begin + seconds
        job = _Job(network, threat, tuple(replicas.values()), deadline, pressed, progress)
        chunks, first = _start(job, x, y, seed, skip)
        tallies, stopped = _run(job, chunks, plan)
        bracket = _joined(job, chunks)
        broken = torch.nonzero(bracket.upper <= 0).flatten()
        best = torch.cat([c.found.points for c in chunks])
        points = best[broken.to(x.device)]
        outputs = [network(point).detach().cpu() for point in batches(points, 1)]
    if bool((skip & (bracket.upper <= 0)).any()):
        row = int(torch.nonzero(skip & (bracket.upper <= 0))[0])
        raise DataError(
            f"certified: example {int(positions[row])} is flagged as robust, but misclassified without any change; "
            "the flags belong to another model, other data or another order"
        )
    return Empirical(
        threat=threat,
        data=part,
        positions=positions,
        name=name or Path(network.source or type(network.module).__name__).name,
        bracket=bracket,
        clean=torch.cat([c.found.clean for c in chunks]).double().cpu(),
        passes=torch.cat([c.found.passes for c in chunks]).cpu(),
        certified=skip,
        stages=(first, *tallies),
        seconds=time.perf_counter() - begin,
        population=len(whole),
        seed=seed,
        stopped=stopped,
        method=described,
        notes=(
            *checks.notes,
            *((runtime,) if isinstance(runtime, str) else ()),
            *_out_of_passes(chunks, len(plan), stopped),
        ),
        differences=dict(checks.differences),
        identity=identity,
        witnesses=Witnesses(
            x=points.cpu(),
            y=part.y[broken],
            clean=x[broken.to(x.device)].cpu(),
            index=positions[broken],
            margin=bracket.upper[broken],
            outputs=torch.cat(outputs) if outputs else checks.logits[:0],
            threat=threat,
            model=identity["model"],
            data=whole.digest,
            model_name=name or Path(network.source or type(network.module).__name__).name,
            data_name=whole.name,
        ),
    )


# -- the run ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Job:
    """What all stages share."""

    network: Network
    threat: ThreatModel
    replicas: tuple[Model, ...]
    deadline: float
    pressed: Callable[[], bool]
    progress: Callable[[Progress], None] | None

    def late(self) -> str | None:
        """Why no more work may be started, or None."""
        if self.pressed():
            return "interrupted"
        return "time" if time.perf_counter() > self.deadline else None


@dataclass(eq=False)
class _Chunk:
    """Examples that share a region and a specification, what was found of them, and what `witness` says of that."""

    x: Tensor
    y: Tensor
    seeds: Tensor
    skip: Tensor
    found: Found
    bracket: Bracket

    def todo(self) -> Tensor:
        """(n,) bool: not broken, not known to be robust."""
        return ~(self.found.broken | self.skip)


# runs a stage on a chunk, calling the last argument after each batch; returns why it stopped early, or None
Step = Callable[[_Job, _Chunk, Region, Spec, Callable[[], None]], str | None]


def _plan(
    method: str | Callable[..., Tensor],
    level: str | Sequence[Stage] | None,
    passes: float,
    p: float,
) -> tuple[list[tuple[str, Step]], str]:
    """The stages of a method by name, and its description."""
    if isinstance(method, str) and method not in ATTACKS:
        raise unknown_name("method", method, ATTACKS)
    if method != "auto":
        given = [n for n, v in (("level", level is not None), ("passes", passes < math.inf)) if v]
        if given:
            raise ValueError(f"{given[0]}: only the cascade (method auto) has it, not {method}")
        attack = ATTACKS[method] if isinstance(method, str) else method
        short = method if isinstance(method, str) else describe(attack).rpartition(".")[2]
        return [(short, partial(_once, attack))], describe(attack)
    level = "standard" if level is None else level
    stages = stages_of(level, p)
    steps: list[tuple[str, Step]] = [
        (f"{i + 1}: {title(stage)}", partial(_searched, tuple(stages[: i + 1]), passes))
        for i, stage in enumerate(stages)
    ]
    limit = f", passes={passes:g}" if passes < math.inf else ""
    shown = repr(level) if isinstance(level, str) else f"{len(stages)} stages"
    return steps, f"calipers.attacks.cascade.search(level={shown}{limit})"


KINDS = {"ascend": "steps", "home": "steps homing in", "square": "queries of Square"}


def title(stage: Stage) -> str:
    """A stage of the cascade in a few words."""
    parts = [f"{stage.targets} target{'s' * (stage.targets > 1)}" if stage.targets else ""]
    if stage.starts > 1 or stage.start != "center":
        parts.append(f"{stage.starts} {stage.start} start{'s' if stage.starts > 1 else ''}")
    text = " x ".join([*filter(None, parts), f"{stage.steps} {KINDS[stage.search]}"])
    return f"{text}, if close" if stage.close < math.inf else text


def _start(job: _Job, x: Tensor, y: Tensor, seed: int, skip: Tensor) -> tuple[list[_Chunk], Tally]:
    """The examples in chunks, those that are misclassified without any change broken."""
    begin = time.perf_counter()
    chunks, broken, refused = [], 0, 0
    for a, b, c in zip(batches(x), batches(y), batches(skip.to(x.device)), strict=True):
        region, spec = job.threat.around(a), Spec.label(b, job.network.num_classes)
        found = search(counted(job.network), region, spec, level=(), dtype=a.dtype)
        chunk = _Chunk(a, b, seeds_of(a, seed, "attack"), c, found, Bracket.unknown(len(a)))
        won, lost = _judge(job, chunk, region, spec, "clean")
        broken, refused = broken + won, refused + lost
        chunks.append(chunk)
    return chunks, Tally("clean", len(x), broken, 1.0, time.perf_counter() - begin, refused)


def _run(
    job: _Job, chunks: Sequence[_Chunk], plan: Sequence[tuple[str, Step]]
) -> tuple[list[Tally], str | None]:
    """All stages over all chunks, with their tallies, and why that ended early."""
    tallies: list[Tally] = []
    for name, step in plan:
        begin = time.perf_counter()
        waiting = [int(c.todo().sum()) for c in chunks]
        stopped, spent = None, []
        done = broken = refused = 0
        for chunk, count in zip(chunks, waiting, strict=True):
            if not count:
                continue
            before = chunk.found.passes.clone()
            region, spec = _sets(job, chunk)
            tick = partial(_tick, job, chunks, name, chunk, before, done, sum(waiting))
            stopped = job.late() or step(job, chunk, region, spec, tick)
            won, lost = _judge(job, chunk, region, spec, name)
            broken, refused = broken + won, refused + lost
            cost = (chunk.found.passes - before).cpu()
            spent.append(cost[cost > 0])
            if stopped:
                break
            done += count
            _report(job, chunks, name, done, sum(waiting))
        cost = torch.cat(spent) if spent else torch.zeros(0)
        seconds = time.perf_counter() - begin
        tallies.append(Tally(name, len(cost), broken, _median(cost), seconds, refused))
        if stopped:
            return tallies, stopped
    return tallies, None


def _tick(
    job: _Job, chunks: Sequence[_Chunk], name: str,
    chunk: _Chunk, before: Tensor, done: int, total: int,
) -> None:  # fmt: skip
    """After each batch: report progress, and hand Ctrl-C to the search, which ends with what it has."""
    if job.pressed():
        raise KeyboardInterrupt
    moved = int((chunk.found.passes > before).sum())
    if done + moved < total:
        _report(job, chunks, name, done + moved, total)


def _report(job: _Job, chunks: Sequence[_Chunk], name: str, done: int, total: int) -> None:
    if job.progress is None:
        return
    broken = sum(int((c.bracket.upper <= 0).sum()) for c in chunks)
    robust = sum(int(c.skip.sum()) for c in chunks)
    unknown = sum(len(c.x) for c in chunks) - robust - broken
    job.progress(Progress(name, done, total, robust, broken, unknown))


def _sets(job: _Job, chunk: _Chunk) -> tuple[Region, Spec]:
    return job.threat.around(chunk.x), Spec.label(chunk.y, job.network.num_classes)


def _searched(
    stages: Sequence[Stage],
    passes: float,
    job: _Job,
    chunk: _Chunk,
    region: Region,
    spec: Spec,
    tick: Callable[[], None],
) -> str | None:
    """The last of ``stages``, the chunk having gone through the others."""
    chunk.found = search(
        counted(job.network),
        region,
        spec,
        level=stages,
        passes=passes,
        seconds=job.deadline - time.perf_counter(),
        certified=chunk.skip,
        found=chunk.found,
        dtype=chunk.x.dtype,
        seeds=chunk.seeds,
        progress=lambda *_: tick(),
    )
    reasons = {"stopped by time": "time", "interrupted": "interrupted"}
    return reasons.get(chunk.found.stopped or "")


def _once(
    method: Callable[..., Tensor],
    job: _Job,
    chunk: _Chunk,
    region: Region,
    spec: Spec,
    tick: Callable[[], None],  # noqa: ARG001 - one batch
) -> str | None:
    """Any other attack on what is not broken."""
    found = chunk.found
    index = torch.nonzero(chunk.todo()).flatten()
    region, spec = region[index], spec[index]
    try:
        with counting() as work:
            points = method(
                counted(job.network),
                region,
                spec,
                dtype=chunk.x.dtype,
                seeds=chunk.seeds[index.cpu()],
            )
    except KeyboardInterrupt:
        return "interrupted"
    with torch.no_grad():
        margin = spec.margin_at(job.network(points))
    better = margin < found.margin[index]
    found.points[index[better]], found.margin[index[better]] = points[better], margin[better]
    found.passes[index] += round(work.passes / len(index))
    found.stage[index] += 1
    return None


def _judge(job: _Job, chunk: _Chunk, region: Region, spec: Spec, name: str) -> tuple[int, int]:
    """What `witness` says of the newly broken examples: how many it accepts, how many it refuses."""
    found = chunk.found
    known = (chunk.bracket.upper <= 0).to(found.margin.device)
    index = torch.nonzero(found.broken & ~known).flatten()
    if not len(index):
        return 0, 0
    _replay(job, chunk, region, spec, index, name)
    upper = chunk.bracket.upper[index.cpu()]
    # a refused point's margin is positive in one evaluation: the search shall look for a lower one
    least = torch.finfo(found.margin.dtype).tiny
    refused = index[(upper > 0).to(index.device)]
    found.margin[refused] = upper[upper > 0].clamp_min(least).to(found.margin)
    return len(index) - len(refused), len(refused)


def _replay(job: _Job, chunk: _Chunk, region: Region, spec: Spec, index: Tensor, name: str) -> None:
    """Meet the chunk's bracket with `witness` at the best points of the rows ``index``."""
    part = witness(
        counted(job.network),
        region[index],
        spec[index],
        chunk.found.points[index],
        replicas=job.replicas,
        evidence=Evidence(name),
    )
    chunk.bracket = chunk.bracket.scatter(index.cpu(), part)


def _joined(job: _Job, chunks: Sequence[_Chunk]) -> Bracket:
    """The bracket of all examples: those that are not broken get the margin at their best point."""
    for chunk in chunks:
        region, spec = _sets(job, chunk)
        index = torch.nonzero((chunk.bracket.upper > 0).to(chunk.x.device)).flatten()
        if len(index):
            _replay(job, chunk, region, spec, index, "best point")
    parts = [c.bracket for c in chunks]
    return Bracket(
        torch.cat([p.lower for p in parts]),
        torch.cat([p.upper for p in parts]),
        torch.cat([p.witness for p in parts if p.witness is not None]),
        torch.cat([p.rounding for p in parts if p.rounding is not None]),
        upper_evidence=tuple(e for p in parts for e in p.upper_evidence),
    )


def _out_of_passes(chunks: Sequence[_Chunk], stages: int, stopped: str | None) -> tuple[str, ...]:
    left = sum(int((c.todo() & (c.found.stage < stages)).sum()) for c in chunks)
    if stopped or not left:
        return ()
    return (f"the limit on passes ended the search early on {left} examples",)


def _median(values: Tensor) -> float:
    return values.double().quantile(0.5).item() if len(values) else 0.0
