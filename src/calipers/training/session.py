"""A training between two steps, and the step: one joint batch in, gradients, weights and averages out."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from calipers.errors import TrainingError
from calipers.graph.graph import Network
from calipers.seeds import mixed
from calipers.training import health
from calipers.training.distributed import Group
from calipers.training.examples import Examples, per_epoch, rows_of, seeds_of
from calipers.training.run import Run
from calipers.training.step import Loss
from calipers.training.weights import average, l1, perturbed


class Objective(nn.Module):
    """A module whose forward is the objective, so that `DistributedDataParallel` sees exactly one pass per step."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network
        self.module = network.module  # so that its parameters are seen

    def forward(self, objective: Callable[..., Any], *args: Any, **knobs: Any) -> Any:
        return objective(self.network, *args, **knobs)


@dataclass(eq=False)
class Session:
    """What a training is made of, and what its steps change (the fields from ``step`` on)."""

    run: Run
    network: Network
    optimiser: torch.optim.Optimizer
    objective: nn.Module
    data: Examples
    valid: Examples
    group: Group
    step: int = 0
    fallen: bool = False  # on the fallback objective
    mean: dict[str, Tensor] | None = None  # averaged weights
    best: dict[str, Any] | None = None
    sums: dict[str, float] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    findings: list[tuple[str, str]] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def per_epoch(self) -> int:
        return per_epoch(len(self.data), self.run.batch)

    @property
    def epoch(self) -> float:
        return self.step / self.per_epoch

    @property
    def finished(self) -> bool:
        return self.step >= self.run.epochs * self.per_epoch

    @property
    def device(self) -> torch.device:
        return self.network.device


STATE = ("step", "fallen", "mean", "best", "sums", "history", "findings", "seconds")


# -- steps -------------------------------------------------------------------------------------------------------------


def step(session: Session) -> None:
    """One step on one joint batch (or ``replays`` of them), then the averages."""
    run, module = session.run, session.network.module
    batch = rows_of(session.step, count=len(session.data), batch=run.batch, seed=run.seed)
    rows = session.group.share(batch)
    for options in session.optimiser.param_groups:
        options["lr"] = run.lr(session.epoch)
    carry: Tensor | None = None
    for replay in range(run.replays):
        torch.manual_seed(int(mixed(torch.tensor([run.seed]), session.step * run.replays + replay)))
        measures, carry = _gradients(session, rows, carry)
        if run.awp:
            with perturbed(module, run.awp):
                _gradients(session, rows)
        _clip(session, measures)
        session.optimiser.step()
        if session.mean is not None and run.ema is not None:
            average(session.mean, module, run.ema)
    for name, value in {**measures, "steps": 1.0}.items():
        session.sums[name] = session.sums.get(name, 0.0) + value
    session.step += 1


def _gradients(
    session: Session, rows: Tensor, carry: Tensor | None = None
) -> tuple[dict[str, float], Tensor | None]:
    """The gradient of the loss on ``rows`` in the parameters' ``grad``; measures, and what a next replay needs."""
    run = session.run
    session.optimiser.zero_grad(set_to_none=True)
    parts = rows.chunk(run.accumulate)
    found: dict[str, Tensor] = {}
    for i, part in enumerate(parts):
        with _unsynchronised(session.objective, i + 1 < len(parts)):
            loss = part_loss(session, part, session.epoch, carry)
            weight = len(part) / len(rows)
            total = loss.total
            if run.l1:
                total = total + run.l1 * l1(session.network.module)
            torch.autograd.backward(weight * total)
        for name, value in {**loss.measures, "loss": total.detach()}.items():
            found[name] = found.get(name, value.new_zeros(())) + weight * value
    values = torch.stack([v.double() for v in found.values()]).tolist()  # one transfer
    return dict(zip(found, values, strict=True)), loss.carry


def _unsynchronised(module: nn.Module, wanted: bool) -> contextlib.AbstractContextManager[None]:
    if wanted and isinstance(module, DistributedDataParallel):
        return module.no_sync()
    return contextlib.nullcontext()


def part_loss(session: Session, rows: Tensor, epoch: float, carry: Tensor | None = None) -> Loss:
    run = session.run
    x, y = session.data[rows]
    seeds = seeds_of(rows, seed=run.seed, step=session.step)
    if run.augment is not None:
        x = run.augment(x, seeds=mixed(seeds, 1))
    knobs: dict[str, Any] = {name: schedule(epoch) for name, schedule in run.knobs.items()}
    if carry is not None:
        knobs["carry"] = carry
    objective = run.fallback if session.fallen else run.objective
    threat = replace(run.threat, eps=run.eps(epoch))
    found: Loss = session.objective(objective, x, y, threat, seeds=mixed(seeds, 2), **knobs)
    return found


def _clip(session: Session, measures: Mapping[str, float]) -> None:
    """Gradients of norm ``clip`` at most.

    Raises:
        TrainingError: loss or gradient is NaN or infinite; no step was taken.
    """
    gradients = [p.grad for p in session.network.module.parameters() if p.grad is not None]
    norm = nn.utils.get_total_norm(gradients)
    if not (math.isfinite(norm) and math.isfinite(measures["loss"])):
        raise TrainingError(health.not_finite(session.epoch, measures["loss"], float(norm)))
    if session.run.clip is not None:
        nn.utils.clip_grads_with_norm_(
            list(session.network.module.parameters()), session.run.clip, norm
        )


# -- states ------------------------------------------------------------------------------------------------------------


def state_of(session: Session) -> dict[str, Any]:
    """Everything that `restore` needs, in plain values and tensors."""
    return {
        **{name: getattr(session, name) for name in STATE},
        "module": session.network.module.state_dict(),
        "optimiser": session.optimiser.state_dict(),
        "generator": torch.get_rng_state(),
    }


def snapshot(session: Session) -> dict[str, Any]:
    return copy.deepcopy(state_of(session))


def restore(session: Session, state: Mapping[str, Any]) -> None:
    for name in STATE:
        setattr(session, name, _moved(state[name], session.device))
    session.findings = [(kind, message) for kind, message in session.findings]
    session.network.module.load_state_dict(state["module"])
    session.optimiser.load_state_dict(state["optimiser"])
    torch.set_rng_state(state["generator"])


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {k: _moved(v, device) for k, v in value.items()}
    return value
