"""Robust accuracy against the radius: an audit at each, every one of which saves the others work."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from calipers.bracket import Model, Verdict
from calipers.data import Data
from calipers.evaluate.audit import as_data, audit, evaluations, inputs, predictions
from calipers.evaluate.fold import Progress
from calipers.evaluate.nested import CLOSING, carried, keep, radius, row
from calipers.evaluate.result import Audit
from calipers.evaluate.store import Store
from calipers.graph.capture import capture
from calipers.graph.graph import Network, evaluating
from calipers.rounding import Number, exact
from calipers.sets import ThreatModel

if TYPE_CHECKING:
    from rich.console import Group


@dataclass(frozen=True, eq=False)
class Curve:
    """certified <= robust <= empirical accuracy at each radius; neither end rises with the radius.

    Args:
        audits: by rising radius.
        main: the radius that was named first: reports show its examples.
        stopped: None, ``time`` or ``interrupted``.
        left: the radii that this left without an audit.
    """

    audits: tuple[Audit, ...]
    main: Audit
    seconds: float
    stopped: str | None = None
    left: tuple[Number, ...] = ()

    @cached_property
    def eps(self) -> tuple[float, ...]:
        return tuple(float(radius(a.threat)) for a in self.audits)

    @property
    def certified(self) -> tuple[float, ...]:
        return tuple(a.certified for a in self.audits)

    @property
    def empirical(self) -> tuple[float, ...]:
        return tuple(a.empirical for a in self.audits)

    @cached_property
    def confidence(self) -> list[tuple[float, float]] | None:
        """If a sample was audited: between which shares of the whole data set certified (first) and empirical accuracy
        (second) lie, at all radii at once with 95 % confidence (Clopper-Pearson, Bonferroni)."""
        if not self.main.sampled:
            return None
        return [one.sampling.beyond for one in self.audits if one.sampling is not None]

    def spans(self) -> list[tuple[str, str]]:
        """For each example the largest radius at which it is certified, and the smallest at which it is broken; empty
        where there is none."""
        found = []
        for i in range(len(self.main)):
            said = [(str(a.threat.eps), a.verdicts[i]) for a in self.audits]
            proved = [eps for eps, v in said if v is Verdict.ROBUST]
            broken = [eps for eps, v in said if v is Verdict.VULNERABLE]
            found.append((proved[-1] if proved else "", broken[0] if broken else ""))
        return found

    def each(self, change: Callable[[Audit], Audit]) -> Curve:
        """The curve of the changed audits."""
        audits = tuple(map(change, self.audits))
        return replace(self, audits=audits, main=audits[self.audits.index(self.main)])

    def json(self) -> dict[str, Any]:
        """The audits as plain values, and the curve."""
        return {
            "curve": [
                {"eps": str(a.threat.eps), "certified_accuracy": a.certified, "empirical_accuracy": a.empirical,
                 "unknown": a.unknown}
                for a in self.audits
            ],
            "confidence_95_of_all": self.confidence and [list(c) for c in self.confidence],
            "seconds": self.seconds,
            "stopped": self.stopped,
            "left": [str(e) for e in self.left],
            "audits": [a.json() for a in self.audits],
        }  # fmt: skip

    def table(self) -> Group:
        """The curve for a terminal (a rich renderable)."""
        from calipers.evaluate.tables import curve_table

        return curve_table(self)

    def report(self, path: str | Path) -> None:
        """One self-contained HTML file, written whole or not at all."""
        from calipers.evaluate.report import render
        from calipers.files import write_atomically

        write_atomically(path, render(self.main, self, Path(path).parent))

    def figures(self, folder: str | Path) -> str:
        """The report's figures as SVG, PNG and PDF; why the last two are missing, or nothing."""
        from calipers.evaluate.figures import figures, save

        return save(folder, figures(self.main, self))


def curve(
    model: Network | nn.Module,
    data: Data | tuple[Tensor, Tensor],
    threat: ThreatModel,
    eps: Sequence[Number],
    *,
    seconds: float | None = None,
    run: str | Path | None = None,
    progress: Callable[[Progress], None] | None = None,
    replicas: Sequence[Model] = (),
    diagnose: bool = False,
    **options: Any,
) -> Curve:
    """`audit` at each radius of ``eps`` in the place of that of ``threat``; with ``run`` in a directory each below it.

    The middle radius comes first, then those between: what is certified there needs no work at smaller radii, what is
    broken none at larger ones. In the end every audit has what the others found.

    Args:
        seconds: time limit for all; each radius has an equal share of what is left.
        diagnose: as in `audit`, at the radius that is named first.
        options: further arguments of `audit`.

    Raises:
        ValueError: no radius, or one twice.
        CalipersError: as `audit`.
    """
    begin = time.perf_counter()
    options = {"comparisons": len(eps), **options}
    if len({exact(e) for e in eps}) < len(eps) or not eps:
        raise ValueError(f"eps: {', '.join(map(str, eps)) or 'no radius'}; give different radii")
    whole = as_data(data)
    network = model if isinstance(model, Network) else capture(model, whole.x[:1])
    threats = sorted((replace(threat, eps=e) for e in eps), key=radius)
    order = halving(len(threats))
    done: dict[int, Audit] = {}
    stopped: str | None = None
    for turn, place in enumerate(order):
        if stopped == "interrupted":
            break
        now = threats[place]
        left = None if seconds is None else seconds - (time.perf_counter() - begin)
        done[place] = audit(
            network, whole, now, run=run and folder(run, now), replicas=replicas,
            seconds=None if left is None else max(left, 1e-3) / (len(order) - turn),
            progress=progress and _named(progress, now), known=[done[i] for i in order[:turn]],
            diagnose=diagnose and radius(now) == exact(eps[0]), **options,
        )  # fmt: skip
        stopped = done[place].stopped or stopped
    agreeing, _ = evaluations(network, replicas)
    for turn, place in enumerate(order):
        later = [done[i] for i in order[turn + 1 :] if i in done]
        if place in done and later:
            now = threats[place]
            done[place] = closed(
                done[place], later, network, tuple(agreeing.values()), run and folder(run, now)
            )
    found = tuple(done[i] for i in sorted(done))
    main = next((a for a in found if radius(a.threat) == exact(eps[0])), found[0])
    missing = tuple(e for e in eps if all(radius(a.threat) != exact(e) for a in found))
    return Curve(found, main, time.perf_counter() - begin, stopped, missing)


def halving(count: int) -> list[int]:
    """0 to count − 1: the middle, then the middles of both halves, and so on."""
    found, parts = [], deque([(0, count)])
    while parts:
        first, end = parts.popleft()
        if first < end:
            middle = (first + end) // 2
            found.append(middle)
            parts += [(first, middle), (middle + 1, end)]
    return found


def folder(run: str | Path, threat: ThreatModel) -> Path:
    """Where the audit of a radius is kept."""
    return Path(run) / f"eps-{str(threat.eps).replace('/', '_')}"


def closed(
    one: Audit,
    later: Sequence[Audit],
    network: Network,
    replicas: Sequence[Model],
    run: str | Path | None,
) -> Audit:
    """The audit met with what ``later`` ones say about it; kept in its run directory."""
    x, y = inputs(one.x, network, one.threat), one.y.to(network.device)
    with evaluating(network.module):
        given = carried(later, one.threat, network, x, y, replicas, one.bracket)
        bracket = one.bracket.meet(given)
        worst = predictions(network, bracket, one.logits)
    before = sum(v is Verdict.UNKNOWN for v in one.verdicts)
    after = [v is Verdict.UNKNOWN for v in bracket.verdict()]
    if run is not None:
        with Store(run, one.identity) as store:
            keep(store, given, CLOSING)
    extra = replace(row(given, CLOSING), decided=before - sum(after))
    return replace(
        one,
        bracket=bracket,
        adversarial=worst,
        methods=(*one.methods, extra),
        cut=one.cut & torch.tensor(after),
    )


def _named(progress: Callable[[Progress], None], threat: ThreatModel) -> Callable[[Progress], None]:
    return lambda at: progress(replace(at, stage=f"eps {threat.eps} {at.stage}"))
