"""The training loop: steps, checkpoints, what is measured when. Everything is a function of the run and the step."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from calipers import __version__
from calipers.attacks import pgd
from calipers.bounds import interval
from calipers.data import SIZES, SOURCES, Data, checked, load
from calipers.errors import DataError, TrainingError
from calipers.files import write_atomically
from calipers.graph.capture import capture
from calipers.graph.graph import Network
from calipers.graph.onnx import save_onnx
from calipers.models import save_weights
from calipers.training import checkpoints, health
from calipers.training.allocation import keep_freed_memory
from calipers.training.distributed import Group, group
from calipers.training.examples import require_fit, split, stored
from calipers.training.logs import Log, Status
from calipers.training.measures import Measured, measure, unstable
from calipers.training.run import Run
from calipers.training.session import (
    Objective,
    Session,
    part_loss,
    restore,
    snapshot,
    state_of,
    step,
)
from calipers.training.weights import copied, holding

SAVE_EVERY = 300.0  # seconds; besides the end of every epoch
MONITORED = 1000  # validation examples that the monitor attacks
PROBE = 100  # training examples that the health monitor attacks
QUICK = partial(pgd, steps=10, step_size=0.25, random_start=True)  # what both attack with
TRIED = 8  # examples of the step that an estimate rests on
RESULT = "result.json"


@dataclass(frozen=True, eq=False)
class Trained:
    """A finished training.

    Args:
        network: with the selected weights, in evaluation mode.
        epoch: whose end the weights are from, counted from 1.
        test: accuracy on the test examples, which nothing else has looked at; None without any.
        history: a record per epoch.
        findings: what the health monitor said.
        seconds: of the steps and the monitor, without the final evaluation.
    """

    run: Run
    network: Network
    epoch: int
    test: Measured | None
    history: tuple[Mapping[str, Any], ...]
    findings: tuple[health.Finding, ...]
    seconds: float
    directory: Path | None = None

    def json(self) -> dict[str, Any]:
        return {
            "name": self.run.name,
            "run": self.run.describe(),
            "epoch": self.epoch,
            "test": None if self.test is None else self.test.json(),
            "parameters": sum(p.numel() for p in self.network.module.parameters()),
            "seconds": round(self.seconds, 3),
            "findings": [f._asdict() for f in self.findings],
            "on": {
                "calipers": __version__,
                "torch": torch.__version__,
                "threads": torch.get_num_threads(),
                "device": self.network.device.type,
                "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            },
        }


def train(
    run: Run,
    *,
    directory: str | Path | None = None,
    data_dir: str | Path | None = None,
    data: tuple[Data, Data | None] | None = None,
    progress: Callable[[Status], None] | None = None,
    resume: bool = True,
    tensorboard: bool = False,
    anyway: bool = False,
) -> Trained:
    """The network that ``run`` describes, trained, selected on validation examples and measured once on test examples.

    With a directory it keeps a checkpoint there after each epoch (and every five minutes); started again with the same
    run it goes on, and on the same machine, thread count and torch the CPU's result is bitwise the same as without the
    interruption. It leaves ``run.json``, ``log.jsonl``, ``model.safetensors``, ``model.onnx`` and ``result.json``.

    Under ``torchrun`` each process takes its share of every batch; the result is the one process's up to rounding.

    Args:
        data: training and test examples, instead of those that ``run.data`` names.
        resume: False refuses a directory that has a checkpoint.
        anyway: train without a GPU what needs one.

    Raises:
        DataError: examples that do not fit the model or the threat's domain.
        TrainingError: a GPU is needed and not there, a step is not finite, a checkpoint cannot be written.
        StoreMismatch: the directory holds another training; the message names the differences.
    """
    where = None if directory is None else Path(directory)
    device = torch.device("cuda" if run.device == "gpu" and torch.cuda.is_available() else "cpu")
    processes = group()
    keep_freed_memory()
    with _generators(), _exact_products():
        if run.device == "gpu" and device.type == "cpu" and not anyway:
            raise TrainingError(_needs_gpu(run, data, data_dir))
        examples, test = _examples(run, data, data_dir)
        session, identity = _session(run, examples, device, processes)
        del examples  # the session has them, as bytes where it can
        state = None
        if where is not None:
            where.mkdir(parents=True, exist_ok=True)
            state = checkpoints.load(where / checkpoints.FILE, identity)
            if state is not None and not resume:
                raise TrainingError(
                    f"{where}: holds a checkpoint of this training; resume it, or use another directory"
                )
        say = progress if progress is not None and processes.first else _silent
        if state is not None:
            restore(session, state)
            say(_status(session, "train", f"goes on at epoch {session.epoch:.2f}"))
        keep = where if processes.first else None
        if keep is not None:
            write_atomically(keep / "run.json", json.dumps(identity, indent=2) + "\n")
        log = Log(keep, step=session.step, tensorboard=tensorboard and processes.first)
        earlier = _earlier(where) if session.finished else None
        _epochs(session, log, say, keep, identity)
        return _finish(session, test, keep, say, earlier)


# -- setting up --------------------------------------------------------------------------------------------------------


def _examples(
    run: Run, data: tuple[Data, Data | None] | None, data_dir: str | Path | None
) -> tuple[Data, Data | None]:
    if data is not None:
        return data
    if run.data in SOURCES:
        return (
            load(run.data, data_dir=data_dir, split="train"),
            load(run.data, data_dir=data_dir, split="test"),
        )
    return load(run.data), None if run.test is None else load(run.test)


def _session(
    run: Run, data: Data, device: torch.device, processes: Group
) -> tuple[Session, dict[str, Any]]:
    torch.manual_seed(run.seed)
    module = run.model()
    if run.initialise is not None:
        run.initialise(module)
    network = capture(module.to(device), data.x[:2].to(device))
    require_fit(data, run.threat, network.num_classes)
    module.train()
    rows, held = split(len(data), run.validation)
    objective: nn.Module = Objective(network)
    if processes.size > 1:
        objective = DistributedDataParallel(objective)
    session = Session(
        run,
        network,
        run.optimiser(list(module.parameters()), lr=run.lr(0.0)),
        objective,
        stored(data, rows, device),
        stored(data, held, device),
        processes,
        mean=None if run.ema is None else copied(module),
    )
    identity = {"name": run.name, **run.describe(), "digest": data.digest}
    if processes.size > 1:
        identity["processes"] = processes.size
    return session, identity


@contextlib.contextmanager
def _generators() -> Iterator[None]:
    """The caller's global generators, as they were."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        yield


@contextlib.contextmanager
def _exact_products() -> Iterator[None]:
    """Float32 products in float32 on GPUs, too: radii of boxes are sums that TF32 would round to three digits."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def _needs_gpu(run: Run, data: tuple[Data, Data | None] | None, data_dir: str | Path | None) -> str:
    """What to say without one: how long this machine would take, from a step on a few made-up examples."""
    if data is None and run.data in SIZES:
        shape, count = SIZES[run.data]
    else:
        examples = _examples(run, data, data_dir)[0]
        shape, count = tuple(examples.x.shape[1:]), len(examples)
    x = torch.rand(TRIED, *shape, generator=torch.Generator().manual_seed(0))
    few = checked(x, torch.zeros(TRIED, dtype=torch.int64), name="made up")
    session, _ = _session(
        replace(run, validation=0, select=None), few, torch.device("cpu"), Group()
    )
    for _ in range(2):  # the first one warms up
        begin = time.perf_counter()
        torch.autograd.backward(part_loss(session, torch.arange(TRIED), run.epochs).total)
        seconds = time.perf_counter() - begin
    hours = seconds / TRIED * (count - run.validation) * run.epochs * run.replays / 3600
    said = f"about {hours:.1f} hours" if hours < 72 else f"about {hours / 24:.0f} days"
    there = f" ({run.minutes:g} minutes on {run.hardware})" if run.minutes else ""
    return (
        f"{run.name}: needs a GPU{there} and torch sees none. On this machine ({torch.get_num_threads()} threads) it "
        f"would take {said}, from a step on {TRIED} examples. To train all the same: --anyway (anyway=True); for "
        "fewer epochs: --set epochs=N"
    )


def _silent(_: Status) -> None:
    pass


# -- epochs ------------------------------------------------------------------------------------------------------------


def _epochs(
    session: Session,
    log: Log,
    say: Callable[[Status], None],
    directory: Path | None,
    identity: Mapping[str, Any],
) -> None:
    """All steps that are left."""
    good = snapshot(session) if session.run.fallback is not None else None
    saved = begin = time.perf_counter()
    while not session.finished:
        step(session)
        say(_status(session, "train"))
        now = time.perf_counter()
        session.seconds, begin = session.seconds + now - begin, now
        at_end = session.step % session.per_epoch == 0
        if at_end:
            record = session.group.agree(_record(session) if session.group.first else None)
            kinds = _examine(session, record, log, say)
            if "overfitting" in kinds and good is not None and not session.fallen:
                findings, spent = session.findings, session.seconds
                restore(session, copy.deepcopy(good))
                session.fallen, session.findings, session.seconds = True, findings, spent
                say(
                    _status(
                        session, "train", f"back to epoch {session.epoch:.0f}, on with the fallback"
                    )
                )
                continue
            _choose(session, record)
            session.sums = {}
            log.write(record)
            say(replace(_status(session, "validate"), values=record))
            now = time.perf_counter()
            session.seconds, begin = session.seconds + now - begin, now
            good = snapshot(session) if good is not None else None
        between = now - saved > SAVE_EVERY and (
            good is None or session.fallen
        )  # else it may have to go back
        if directory is not None and (at_end or between):
            checkpoints.save(directory / checkpoints.FILE, identity, state_of(session))
            saved = time.perf_counter()


def _record(session: Session) -> dict[str, Any]:
    """The epoch's measures: means over its batches, the probe, and every ``check`` epochs the validation examples."""
    run, epoch = session.run, session.step // session.per_epoch
    steps = session.sums["steps"]
    record: dict[str, Any] = {
        "epoch": epoch,
        "step": session.step,
        "eps": run.eps(session.epoch),
        "lr": run.lr(session.epoch),
        "full": run.full(session.epoch),
        **{k: v / steps for k, v in session.sums.items() if k != "steps"},
    }
    last = session.finished
    if epoch % run.check and not last:
        return record
    with holding(session.network.module, session.mean):
        x, y = session.data[torch.arange(min(PROBE, len(session.data)))]
        if "attacked" in record and run.fallback is not None:
            current = replace(run.threat, eps=record["eps"])
            probe = measure(session.network, x, y, current, attack=QUICK, final=False)
            record["probe"] = probe.shares()["attacked"]
        if run.select == "certified":
            record["unstable"] = unstable(
                session.network, x, replace(run.threat, eps=record["eps"])
            )
        if len(session.valid):
            record |= {f"valid_{k}": v for k, v in _validated(session).items()}
    record["seconds"] = round(session.seconds, 3)
    return record


def _validated(session: Session) -> dict[str, float]:
    """Accuracy on the validation examples at the evaluation's radius; under attack on the first of them."""
    run, (x, y) = session.run, session.valid[torch.arange(len(session.valid))]
    bounds = (interval,) if run.select == "certified" else ()
    shares = measure(session.network, x, y, run.threat, bounds=bounds, final=False).shares()
    few = measure(
        session.network, x[:MONITORED], y[:MONITORED], run.threat, attack=QUICK, final=False
    )
    return {**shares, "attacked": few.shares()["attacked"]}


def _examine(
    session: Session, record: dict[str, Any], log: Log, say: Callable[[Status], None]
) -> set[str]:
    """The kinds of what is wrong now; each is said once."""
    session.history.append(record)
    full = session.run.full(session.epoch)
    found = health.examine(session.history, session.network.num_classes, full=full)
    for finding in found:
        if finding.kind not in {kind for kind, _ in session.findings}:
            session.findings.append((finding.kind, finding.message))
            log.write({"step": session.step, "finding": finding.kind, "message": finding.message})
            say(_status(session, "train", finding.message))
    return {f.kind for f in found}


def _choose(session: Session, record: Mapping[str, Any]) -> None:
    """Keep these weights if they are the best so far on the validation examples, at the full radius."""
    name = f"valid_{session.run.select}"
    if name not in record or not record["full"]:
        return
    if session.best is None or record[name] >= session.best["value"]:
        state = session.mean or session.network.module.state_dict()
        session.best = {
            "value": record[name],
            "epoch": record["epoch"],
            "state": {k: v.detach().clone() for k, v in state.items()},
        }


def _status(session: Session, phase: str, message: str = "") -> Status:
    run, per = session.run, session.per_epoch
    steps = session.sums.get("steps", 0.0)
    values = {k: v / steps for k, v in session.sums.items() if k != "steps"} if steps else {}
    epoch = min(run.epochs, (session.step - 1) // per + 1)
    return Status(phase, epoch, run.epochs, session.step, run.epochs * per, values, message)


# -- the end -----------------------------------------------------------------------------------------------------------


def _finish(
    session: Session,
    test: Data | None,
    directory: Path | None,
    say: Callable[[Status], None],
    earlier: Measured | None,
) -> Trained:
    """Put the selected weights in, look at the test examples once, write everything down.

    Args:
        earlier: what a call before found on the test examples.
    """
    run, module = session.run, session.network.module
    chosen = session.best["state"] if session.best is not None else session.mean
    if chosen is not None:
        module.load_state_dict(chosen)
    module.eval()
    result = Trained(
        run,
        session.network,
        run.epochs if session.best is None else session.best["epoch"],
        None,
        tuple(session.history),
        tuple(health.Finding(*f) for f in session.findings),
        session.seconds,
        directory,
    )
    if not session.group.first:
        return result
    if earlier is None and test is not None:
        earlier = _tested(session, test, say)
    result = replace(result, test=earlier)
    if directory is not None:
        save_weights(module, directory / "model.safetensors")
        save_onnx(session.network, directory / "model.onnx")
        write_atomically(directory / RESULT, json.dumps(result.json(), indent=2) + "\n")
    return result


def _tested(session: Session, test: Data, say: Callable[[Status], None]) -> Measured:
    run = session.run
    if test.x.shape[1:] != session.network.input_shape:
        raise DataError(
            f"{test.name}: examples have shape {tuple(test.x.shape[1:])}, the training's {session.network.input_shape}"
        )
    require_fit(test, run.threat, session.network.num_classes)

    def show(done: int) -> None:
        say(Status("test", run.epochs, run.epochs, done, len(test)))

    return measure(
        session.network, test.x, test.y, run.threat,
        bounds=run.bounds, attack=run.attack, seed=run.seed, progress=show,
    )  # fmt: skip


def _earlier(directory: Path | None) -> Measured | None:
    """What the call that finished this training measured on the test examples, if it came to that."""
    try:
        stored = json.loads((directory / RESULT).read_text(encoding="utf-8")) if directory else {}
        return Measured(**{k: v for k, v in stored["test"].items() if k != "unknown"})
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
