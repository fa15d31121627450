"""One example under every method: how the two jaws close on its minimal margin."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from calipers.bracket import Bracket
from calipers.data import Data
from calipers.errors import UnsupportedOp
from calipers.evaluate.audit import as_data, inputs
from calipers.evaluate.cascade import Side, Stage, default_cascade
from calipers.evaluate.checks import check
from calipers.evaluate.fold import Job, measure
from calipers.graph.capture import capture
from calipers.graph.graph import Network, evaluating
from calipers.sets import ThreatModel
from calipers.work import counting

if TYPE_CHECKING:
    from rich.console import Group


@dataclass(frozen=True)
class Value:
    """What one method says: a lower end (``bound``) or an upper end (``attack``), ∓inf where it says nothing.

    ``work`` counts passes of the network (`calipers.work`), 0 where the method does not count.
    """

    name: str
    side: Side
    margin: float
    seconds: float
    note: str = ""
    work: float = 0.0


@dataclass(frozen=True, eq=False)
class Explanation:
    """Every method's value, nested: bounds ascending, then attacks ascending, and the bracket they give together."""

    title: str
    threat: ThreatModel
    values: tuple[Value, ...]
    bracket: Bracket

    def table(self) -> Group:
        """The values for a terminal (a rich renderable)."""
        from calipers.evaluate.tables import explain_table

        return explain_table(self)


def explain(
    model: Network | nn.Module,
    data: Data | tuple[Tensor, Tensor],
    threat: ThreatModel,
    *,
    index: int = 0,
    seed: int = 0,
    cascade: Sequence[Stage] | None = None,
) -> Explanation:
    """Each method of the cascade on example ``index`` of ``data``, whether or not an earlier one decided it.

    Raises:
        ModelError, DataError, CaptureError: as `calipers.audit`.
        ValueError: no such example.
        SoundnessError: two methods contradict each other.
    """
    whole = as_data(data)
    if not 0 <= index < len(whole):
        raise ValueError(f"index: {index} is outside 0..{len(whole) - 1}")
    x, y = whole.x[index : index + 1], whole.y[index : index + 1]
    network = model if isinstance(model, Network) else capture(model, x)
    x, y = inputs(x, network, threat), y.to(network.device)
    with evaluating(network.module):
        checks = check(network, x, y, threat, allow_softmax=True)
        job = Job(network, x, y, threat, seed)
        values, bracket = [], Bracket.unknown(1)
        stages = default_cascade(network) if cascade is None else cascade
        for stage in (s for s in stages if s.side != "exact"):
            value, part = _value(job, stage)
            values.append(value)
            bracket = bracket.meet(part)
    values.sort(key=lambda v: (v.side == "attack", v.margin))
    label, said = int(y), int(checks.logits.argmax(1))
    names = (
        whole.classes
        if max(label, said) < len(whole.classes)
        else tuple(map(str, range(checks.logits.shape[1])))
    )
    title = f"{whole.name} example {index}: label {names[label]}, predicted {names[said]}"
    return Explanation(title, threat, tuple(values), bracket)


def _value(job: Job, stage: Stage) -> tuple[Value, Bracket]:
    begin = time.perf_counter()
    note = ""
    with counting() as work:
        try:
            part = measure(job, stage, torch.tensor([0], device=job.x.device))
        except UnsupportedOp as error:
            part, note = Bracket.unknown(1), f"skipped: {error}"
    took = time.perf_counter() - begin
    margin = (part.lower if stage.side == "bound" else part.upper).item()
    if math.isinf(margin) and not note:
        note = "no statement"
    return Value(stage.name, stage.side, margin, took, note, work.passes), part
