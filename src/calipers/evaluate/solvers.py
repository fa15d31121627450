"""Which complete search decides which problem: the only table of solvers.

A solver is a function ``(network, region, spec, *, deadline, memory, attack, progress, record) -> Outcome`` (see
`calipers.exact.outcome`). Those that suit a problem are tried in the table's order, each with its share of the time.
"""

from __future__ import annotations

import importlib
import math
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from calipers.attacks import pgd
from calipers.attacks.falsify import dive
from calipers.errors import CalipersError, RegionError
from calipers.exact import Outcome
from calipers.exact.record import Record
from calipers.graph.graph import Network
from calipers.ops import kind_of
from calipers.ops.kinds import Activation, Affine, Extremum
from calipers.rounding import step
from calipers.sets import Region
from calipers.spec import Spec

FEW = 16  # inputs that vary, up to which splitting them pays
SOME = 32  # up to which it may help where splits of neurons do not
MEMORY = 2 << 30  # bytes a search may work in, unless told otherwise


class Problem(NamedTuple):
    """What the choice of a solver looks at.

    Args:
        varying: inputs whose interval has a width.
        piecewise: whether the network is piecewise linear.
        box: whether the set is a box.
    """

    varying: int
    piecewise: bool
    box: bool


class Entry(NamedTuple):
    """A solver of the table.

    Args:
        where: its module and name, imported at first use.
        suits: whether it can decide such a problem.
        share: the part of the time left that it may take, unless it is the last to try.
    """

    where: str
    suits: Callable[[Problem], bool]
    share: float

    @property
    def name(self) -> str:
        return self.where.rpartition(".")[2]

    def load(self) -> Callable[..., Outcome] | None:
        """The function; None where this version has none, or what it needs is not installed."""
        module, _, name = self.where.rpartition(".")
        try:
            found: Callable[..., Outcome] = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError):
            return None
        return found


SOLVERS: tuple[Entry, ...] = (
    Entry("calipers.exact.inputs.split_inputs", lambda p: p.box and p.varying <= FEW, 0.7),
    Entry("calipers.exact.branch.branch", lambda _: True, 0.7),
    Entry("calipers.exact.inputs.split_inputs", lambda p: p.box and FEW < p.varying <= SOME, 0.7),
)


class Complete(NamedTuple):
    """What the searches together say: the best outcome, the solver that it comes from, and its record if one was asked
    for."""

    outcome: Outcome
    method: str
    record: Record | None = None


def problem(network: Network, region: Region) -> Problem:
    """What kind of problem it is."""
    width = (region.outer_upper - region.outer_lower).flatten(1).amax(0)
    graph = network.graph
    active = [n for n in graph.nodes if n.name in graph.active]
    return Problem(
        int((width > 0).sum()),
        all(_piecewise(kind_of(graph, node)) for node in active),
        math.isinf(region.p),
    )


def _piecewise(kind: Any) -> bool:
    if isinstance(kind, Activation):
        return kind.pieces is not None
    return isinstance(kind, Affine | Extremum)


def complete(
    network: Network,
    region: Region,
    spec: Spec,
    *,
    deadline: float,
    memory: int | None = None,
    progress: Callable[[Outcome], None] | None = None,
    accept: Callable[[Tensor], bool] = lambda _: True,
    record: bool = False,
    midway: Callable[[], None] | None = None,
) -> Complete:
    """The outcome of the table's searches on one region (B = 1); the first that decides ends it.

    A solver that fails, in whatever way, leaves the problem undecided, with the reason; it never decides it.

    Args:
        accept: judges the point (1, *x) that a search returns; after one that it refuses the next solver is asked.
        record: have the searches note how they prove what they prove.
        midway: called once, before sub-regions are first looked at for counterexamples.
    """
    kind = problem(network, region)
    ready = [(e, f) for e in SOLVERS if e.suits(kind) and (f := e.load()) is not None]
    best = Complete(Outcome(reason="no complete search of this version suits the problem"), "")
    reasons: list[str] = []
    look = partial(_attack, network, torch.Generator().manual_seed(0), kind.varying <= SOME)
    before = [] if midway is None else [midway]

    def attack(region: Region, spec: Spec) -> Tensor:
        with torch.enable_grad():  # which searches do without
            while before:
                before.pop()()
        return look(region, spec)

    for place, (entry, solve) in enumerate(ready):
        now = time.perf_counter()
        if now >= deadline:
            break
        last = place == len(ready) - 1
        until = deadline if last else now + entry.share * (deadline - now)
        notes = Record() if record else None
        try:
            found = solve(
                network, region, spec, deadline=until, memory=memory or MEMORY, attack=attack,
                progress=progress, record=notes,
            )  # fmt: skip
        except (CalipersError, MemoryError, RuntimeError, ValueError, ArithmeticError) as error:
            found = Outcome(reason=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
        if found.point is not None and not accept(found.point.reshape(region.center.shape)):
            found = replace(found, point=None, reason="its counterexample does not stand a replay")
        reasons.append(f"{entry.name}: {found.reason or 'undecided'}")
        if not best.method or found.lower > best.outcome.lower or found.point is not None:
            best = Complete(found, entry.name, notes)
        if found.robust or found.point is not None:
            return best
    if reasons:
        best = best._replace(outcome=replace(best.outcome, reason="; ".join(reasons)))
    return best


def _attack(
    network: Network, generator: torch.Generator, few: bool, region: Region, spec: Spec
) -> Tensor:
    """Points of low margin in the sub-regions of a search; ``few``: inputs vary."""
    try:
        if few:
            return dive(network, region, spec, generator, dtype=network.dtype)[0]
        return pgd(network, region, spec, steps=10, loss="margin", drop=True, dtype=network.dtype)
    except RegionError:  # a sub-region between two numbers of the network's precision
        return region.center.to(network.dtype)


def harder(spec: Spec, radius: Tensor) -> Spec:
    """The specification whose functionals are smaller by ``radius`` (B, M): if it holds of the real outputs, ``spec``
    holds of all outputs that are at most that far from them.

    Raises:
        ValueError: a radius is infinite.
    """
    if not bool(torch.isfinite(radius).all()):
        raise ValueError("the rounding of the network's forward pass is unbounded")
    d = spec.d.double() - radius.to(spec.d.device)
    d = step(d, -math.inf, torch.ones_like(d, dtype=torch.bool))
    return Spec(spec.C.double(), d, spec.clause, spec.strict)
