"""The audit: robust accuracy as an interval, with a bracket per example."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn

from calipers import __version__
from calipers.attacks.diagnostics import Finding
from calipers.bracket import Bracket, Model
from calipers.data import Data, checked
from calipers.evaluate.cascade import Stage, default_cascade
from calipers.evaluate.checks import OVERLAP_MEMORY, batches, check, onnxruntime_replica, overlaps
from calipers.evaluate.diagnosis import diagnosis
from calipers.evaluate.fold import CHUNK, Job, Progress, fold, interruptible
from calipers.evaluate.limits import bytes_of
from calipers.evaluate.nested import carried, keep, require_related, row
from calipers.evaluate.result import Audit, threat_identity
from calipers.evaluate.sampling import history, sample
from calipers.evaluate.spread import Spread, team
from calipers.evaluate.store import Store, code_digest, model_digest
from calipers.graph.capture import capture
from calipers.graph.graph import Network, evaluating
from calipers.grid import to_grid
from calipers.sets import ThreatModel, require_tensor

DEPLOYED = (
    "certified (deployed): also of the network as it runs in {}, whatever the order of its sums"
)
SEEN = (
    "the same examples were measured otherwise in {} runs before ({}): confidence is for what was chosen before the "
    "examples were seen"
)


def audit(
    model: Network | nn.Module,
    data: Data | tuple[Tensor, Tensor],
    threat: ThreatModel,
    *,
    seconds: float | None = None,
    samples: int | None = None,
    seed: int = 0,
    run: str | Path | None = None,
    cascade: Sequence[Stage] | None = None,
    progress: Callable[[Progress], None] | None = None,
    replicas: Sequence[Model] = (),
    allow_softmax: bool = False,
    deployed: bool = False,
    memory: int | str | None = None,
    chunk: int = CHUNK,
    name: str = "",
    workers: int | None = None,
    threads: int = 1,
    worker_memory: int | str | None = None,
    loader: Callable[[], Network] | None = None,
    precision: float = 0.0,
    diagnose: bool = False,
    ray: str | None = None,
    comparisons: int = 1,
    known: Sequence[Audit] = (),
) -> Audit:
    """certified accuracy <= robust accuracy <= empirical accuracy, with a bracket per example.

    The model is evaluated in evaluation mode and left as it was. Bounds run in float64 with rounding accounted for; an
    attack counts only through `witness`, replayed alone, in float64 and in onnxruntime. Whatever goes wrong in a
    method (an operator without a rule, too little memory, NaN) leaves its examples unknown, with the reason in its row.

    Args:
        data: examples in the threat's domain and their labels; a pair is converted to float32.
        seconds: time limit; rows that it leaves undecided are marked in `Audit.cut`. Ctrl-C does the same.
        samples: audit this many examples, drawn at random by ``seed``; `Audit.sampling` then says what follows for all.
        comparisons: audits of this sample (several eps, recipes) for which its confidence is to hold together.
        run: a directory that keeps finished work; a second call with the same arguments goes on there.
        cascade: the stages, in this order; `default_cascade(network)` if None.
        progress: called after each batch.
        replicas: further evaluations that must agree before an example counts as broken.
        allow_softmax: see `calipers.evaluate.checks.check`.
        deployed: certify the network as it runs, not only its parameters: from every lower bound the forward pass's
            worst rounding is subtracted (`calipers.bounds.deployed`).
        memory: working memory to plan for, in bytes or as "2GB"; it cuts bounds into pieces and attacks into batches.
            One example at a time is the least; the network, the data and the results come on top.
        chunk: examples a batch at most.
        name: what to call the model in the report.
        workers: processes that measure at the same time; None measures in this one. The results are the same. A script
            that asks for workers needs its calls below ``if __name__ == "__main__"``.
        threads: of each worker.
        worker_memory: bytes, or as "2GB", that a worker may take before it fails, on top of the network and libraries;
            an equal share of the machine's memory if None.
        loader: makes the same network again, for workers to which ``model`` cannot be sent.
        precision: stop when certified and empirical accuracy are no further apart than this share.
        diagnose: also check, on at most 60 of the examples, whether the attacks' failures should be believed
            (`calipers.diagnose`); after the time limit, which does not count it.
        ray: measure on a Ray cluster: "auto" for the one that RAY_ADDRESS names or, without it, a new one on this
            machine; or "HOST:PORT" of the head of one that this machine belongs to. ``workers`` is then by default as
            many as it has processors for. Its machines need the same version of Calipers, and files at the same place.
        known: audits of the same model and data at other radii of the same threat model, which `calipers.curve` makes:
            certificates of larger sets and witnesses from smaller ones hold here, too, and cost nothing.

    Raises:
        ModelError, DataError: a check before measuring failed.
        CaptureError: the module cannot be captured.
        StoreMismatch: ``run`` belongs to another model, data, threat, cascade, seed or code.
        StoreError: ``run`` cannot be written, or another process writes there.
        SoundnessError: two methods contradict each other.
        WorkerError: workers do not start, or what is measured cannot be sent to them.
        ValueError: an argument is out of range, or an audit in ``known`` is of something else.
    """
    begin = time.perf_counter()
    limit = None if memory is None else bytes_of(memory)
    if seconds is not None and not seconds > 0:
        raise ValueError(f"seconds: {seconds!r} is no time limit; give a positive number")
    if chunk < 1:
        raise ValueError(f"chunk: {chunk} is not at least 1")
    if comparisons < 1:
        raise ValueError(f"comparisons: {comparisons} is not at least 1")
    if not 0 <= precision <= 1:
        raise ValueError(f"precision: {precision} is no share between 0 and 1")
    cap = None if worker_memory is None else bytes_of(worker_memory, "worker_memory")
    whole = as_data(data)
    part, positions = sample(whole, samples, seed)
    network = model if isinstance(model, Network) else capture(model, part.x[:1])
    stages = tuple(default_cascade(network) if cascade is None else cascade)
    with evaluating(network.module):
        agreeing, alone = evaluations(network, replicas)
        x, y = inputs(part.x, network, threat), part.y.to(network.device)
        checks = check(network, x, y, threat, replicas=agreeing, allow_softmax=allow_softmax)
        overlap = overlaps(x, y, threat, memory=min(limit or OVERLAP_MEMORY, OVERLAP_MEMORY))
        identity = {
            "calipers": __version__,
            "code": code_digest(),
            "model": model_digest(network),
            "data": part.digest,
            "threat": threat_identity(threat),
            "seed": seed,
            "replicas": list(agreeing),
            "deployed": deployed,
            "cascade": [stage.describe() for stage in stages],
        }
        require_related(known, identity, positions, threat)
        deadline = math.inf if seconds is None else begin + seconds
        before = history(run, identity)
        budget = {
            "seconds": seconds, "precision": precision, "samples": samples, "comparisons": comparisons,
            "earlier": before,
        }  # fmt: skip
        directory = nullcontext() if run is None else Store(run, identity, budget)
        others = nullcontext() if workers is None and ray is None else team(
            workers, network, stages, threat, seed=seed, replicas=replicas, deployed=deployed, memory=limit,
            threads=threads, cap=cap, loader=loader, ray=ray,
        )  # fmt: skip
        with directory as store, interruptible() as pressed, others as staff:
            job = Job(
                network, x, y, threat, seed, tuple(agreeing.values()), chunk, deadline, progress, pressed,
                deployed, limit, None if staff is None else Spread(staff, stages),
                1 if staff is None else staff.count, precision,
            )  # fmt: skip
            given = carried(known, threat, network, x, y, job.replicas) if known else None
            bracket, rows, stopped, cut = fold(job, stages, store, given)
            if given is not None:
                rows = [row(given), *rows]
                if store is not None:
                    keep(store, given)
            mended = () if store is None else tuple(store.notes)
            shared = () if staff is None else staff.notes
        adversarial = predictions(network, bracket, checks.logits)
        findings: tuple[Finding, ...] = ()
        if diagnose and stopped != "interrupted":
            findings = diagnosis(network, part, threat, seed)
    earlier = sum(r.stored for r in rows)
    seen = len(before) >= comparisons and len(part) < len(whole)  # more than the confidence is for
    notes = (
        *checks.notes,
        *alone,
        *((overlap.note(part.y, threat, positions),) if overlap else ()),
        *mended,
        *shared,
        *((SEEN.format(len(before), ", ".join(b["run"] for b in before[:5])),) if seen else ()),
        *((DEPLOYED.format(str(x.dtype).removeprefix("torch.")),) if deployed else ()),
    )
    return Audit(
        threat=threat,
        data=part,
        positions=positions,
        name=name or Path(network.source or type(network.module).__name__).name,
        logits=checks.logits,
        bracket=bracket,
        adversarial=adversarial,
        methods=tuple(rows),
        seconds=time.perf_counter() - begin + earlier,
        population=len(whole),
        seed=seed,
        stopped=stopped,
        cut=cut,
        notes=notes,
        differences=dict(checks.differences),
        identity=identity,
        deployed=deployed,
        findings=findings,
        comparisons=comparisons,
        earlier=tuple(before),
    )


def as_data(data: Data | tuple[Tensor, Tensor]) -> Data:
    """A pair (x, y) as checked `Data` (float32); the threat model brings the domain."""
    if isinstance(data, Data):
        return data
    return checked(*data, name="data", lower=-math.inf, upper=math.inf)


def inputs(x: Tensor, network: Network, threat: ThreatModel) -> Tensor:
    """``x`` as the network takes it: on its device, in its dtype, grid points as grid points of that dtype.

    Raises:
        DataError: no tensor, or the threat model has a grid and ``x`` is not on it.
    """
    require_tensor(x)
    moved = x.to(network.device, network.dtype)
    if threat.grid is None or moved.dtype == x.dtype:
        return moved
    for part in batches(x):
        threat.around(part)
    return to_grid(moved, threat.grid)


def evaluations(
    network: Network, replicas: Sequence[Model]
) -> tuple[dict[str, Model], tuple[str, ...]]:
    """What must agree before an example counts as broken, by name; and a note if onnxruntime is not among them."""
    agreeing = {f"replica {i + 1}": replica for i, replica in enumerate(replicas)}
    runtime = onnxruntime_replica(network)
    if isinstance(runtime, str):
        return agreeing, (runtime,)
    return {**agreeing, "onnxruntime": runtime}, ()


@torch.no_grad()
def predictions(network: Network, bracket: Bracket, logits: Tensor) -> Tensor:
    """The class that the network predicts at each example's worst point, (N,); the clean class where there is none."""
    classes = logits.argmax(1)
    if bracket.witness is not None:
        points = bracket.witness.to(network.device)
        worst = torch.cat([network(part).argmax(1).cpu() for part in batches(points)])
        classes = torch.where(torch.isfinite(bracket.upper), worst, classes)
    return classes
