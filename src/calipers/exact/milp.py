"""Exact answers from a mixed-integer program: the lectures' big-M formulation over the captured graph.

    min  (e_label − e_target)ᵀ z_{d+1}    over  z_1 … z_{d+1}, v    (`calipers.bounds.encode`, integers kept)

The solver runs in a process of its own, to zero gap, and is believed in one direction alone: a point counts once the
network itself fails at it, and a lower bound is called solver-trusted, because nothing but the solver's own floating
point stands behind its tree. `TOLERANCE` is taken off it.
Reference: Tjeng et al. 2019; Kolter and Madry, Adversarial Robustness, chapter 3.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from calipers.bounds.encode import Encoding, encode, prepare
from calipers.bounds.lp import CUTS, Row, ball_cut, minima, tightened
from calipers.bounds.state import State, check_spec
from calipers.bracket import witness
from calipers.exact.outcome import Outcome
from calipers.graph.graph import Network
from calipers.programs import Limits, Program, Solution, apart, require
from calipers.sets import Interval, Region
from calipers.spec import Spec

TOLERANCE = 1e-5  # relative to 1 + |bound|: what a solver's feasibility tolerances may be worth
Array = np.ndarray[Any, np.dtype[Any]]
Attack = Callable[[Region, Spec], Tensor]


def safe(bound: float) -> float:
    """A solver's bound less `TOLERANCE`."""
    return bound - TOLERANCE * (1 + abs(bound)) if math.isfinite(bound) else bound


@dataclass(frozen=True, eq=False)
class Optimum:
    """The minimum of one functional over the region, as far as the solver came.

    Args:
        lower: the solver's dual bound; with ``status`` "optimal" it equals ``upper`` to the solver's tolerances.
        upper: the value the solver claims for its point.
        point: (*x) that point, projected onto the region, in the network's dtype.
        value: what the network itself gives there, float64: ``upper`` unless the program or the solver is off.
        status: "optimal", or in words what stopped it.
        kinks: binaries of the program (unstable neurons and contested maxima).
    """

    lower: float
    upper: float
    point: Tensor | None
    value: float
    status: str
    nodes: int
    seconds: float
    kinks: int

    @property
    def safe_lower(self) -> float:
        """``lower`` less `TOLERANCE`: what a verdict goes by."""
        return safe(self.lower)

    @property
    def replayed(self) -> bool:
        """Whether the network gives what the solver claims, to its tolerance."""
        return abs(self.value - self.upper) <= 1e-4 * (1 + abs(self.upper))


@dataclass(frozen=True, eq=False)
class Certification:
    """Which classes the adversary can reach from ``label``.

    Args:
        optima: min of y_label − y_target for each target.
        reachable: the targets at whose point the network itself prefers them (a tie counts).
        excluded: those whose lower bound is positive: solver-trusted.
        undecided: the others.
    """

    label: int
    optima: Mapping[int, Optimum]
    reachable: tuple[int, ...]
    excluded: tuple[int, ...]
    undecided: tuple[int, ...]

    @property
    def robust(self) -> bool:
        """Whether no class can be reached, if the solver is right."""
        return not self.reachable and not self.undecided


def milp(
    network: Network,
    region: Region,
    spec: Spec,
    *,
    deadline: float = math.inf,
    memory: int | None = None,
    attack: Attack | None = None,
    progress: Callable[[Outcome], None] | None = None,
    intermediate: str | Mapping[str, Interval] = "crown",
    backend: str = "highs",
) -> Outcome:
    """Decide one region clause by clause: min over the region of a clause's largest functional.

    Stops at a point where the network fails, or once every clause is bounded above 0. ``lower`` rests on the solver
    (`Outcome.trusts`), less `TOLERANCE`; on a ball in l2 it is the bound over the tangent planes cut so far.

    Args:
        intermediate: the intervals for big M: "interval", "crown", or a mapping by value name.
        backend: "highs", "scip" or "gurobi".

    Raises:
        UnsupportedOp: an op is not piecewise linear.
        RegionError: the region, and with it some pre-activation, is unbounded.
        SolverError: the back-end is not installed.

    Cost: a program with a binary per unstable neuron for each clause; exponential in the worst case.
    """
    require(backend)
    _require_single(region, spec)
    with torch.no_grad():
        if (
            attack is not None
            and (point := _failing(network, region, spec, attack(region, spec))) is not None
        ):
            return Outcome(point=point)
        state = prepare(network, region, intermediate, memory=memory)
        encoding, program, costs = _clauses(state, spec)
        lower, point, domains, reason = [-math.inf] * len(costs), None, 0, ""
        for c, cost in enumerate(costs):
            found, reason, nodes, point = _decide(
                network, region, spec, encoding, program, cost, deadline, memory, backend
            )
            lower[c], domains = found, domains + nodes
            if point is not None:
                return Outcome(min(lower), point, domains)
            if not found > 0:
                return Outcome(min(lower), None, domains, reason, backend)
            if progress is not None:
                progress(Outcome(min(lower), None, domains, "running", backend))
        return Outcome(min(lower), None, domains, "", backend)


def _decide(
    network: Network,
    region: Region,
    spec: Spec,
    encoding: Encoding,
    program: Program,
    cost: Array,
    deadline: float,
    memory: int | None,
    backend: str,
) -> tuple[float, str, int, Tensor | None]:
    """(lower bound less the tolerance, why it is not positive, nodes, a failing point) of one clause."""
    nodes, best, reason = 0, -math.inf, ""
    for _ in range(CUTS + 1):
        limits = Limits(deadline - time.perf_counter(), memory, 2 * TOLERANCE, -TOLERANCE)
        (solution,) = apart(program, cost[None], limits, backend=backend)
        nodes += solution.nodes
        optimum = _optimum(network, region, spec, 0, encoding, solution)
        best, reason = max(best, optimum.safe_lower), solution.status
        if best > 0 or solution.x is None:
            return best, reason, nodes, None
        if optimum.point is not None:
            point = _failing(network, region, spec, optimum.point[None])
            if point is not None:
                return best, "", nodes, point
        row = ball_cut(region, encoding, solution.x)
        if row is None:
            if reason in ("optimal", "stopped"):
                reason = "the solver's point does not fail when the network runs it"
            return best, reason, nodes, None
        program = program.with_rows([row])
    return best, f"{CUTS} tangent planes of the l2 ball do not decide it", nodes, None


def optima(
    network: Network,
    region: Region,
    spec: Spec,
    *,
    deadline: float = math.inf,
    memory: int | None = None,
    intermediate: str | Mapping[str, Interval] = "crown",
    backend: str = "highs",
    done: Callable[[int, Optimum], None] | None = None,
) -> tuple[Optimum, ...]:
    """The minimum of each functional of one region to zero gap, with the point that attains it.

    The box and l1 balls are exact; an l2 ball is the box cut by the tangent planes of its relaxation, so ``lower`` is a
    bound and ``point`` (projected) need not attain it. Arguments and errors as in `milp`.

    Args:
        done: told the number of each functional and its optimum as it comes.
    """
    require(backend)
    _require_single(region, spec)
    with torch.no_grad():
        state = prepare(network, region, intermediate, memory=memory)
        check_spec(state, spec)
        encoding = encode(state, relaxed=False)
        costs, _ = encoding.costs(spec.C[0].double().numpy(), spec.d[0].double().numpy())
        program = _cut(state, encoding, costs)
        found: list[Optimum] = []

        def note(i: int, solution: Solution) -> None:
            found.append(_optimum(network, region, spec, i, encoding, solution))
            if done is not None:
                done(i, found[-1])

        limits = Limits(deadline - time.perf_counter(), memory)
        apart(program, costs, limits, backend=backend, done=note)
    return tuple(found)


def certify(
    network: Network,
    region: Region,
    label: int,
    *,
    targets: Sequence[int] | None = None,
    **options: Any,
) -> Certification:
    """The exact margin of ``label`` over each target class, and which of them can be reached; options as `optima`.

    Args:
        targets: None is every other class.

    Raises:
        ValueError: the network has no such class.
    """
    count = network.num_classes
    chosen = [j for j in range(count) if j != label] if targets is None else list(targets)
    y = torch.full((len(chosen),), label)
    C = Spec.target(y, torch.tensor(chosen), count).C.transpose(0, 1)
    found = dict(zip(chosen, optima(network, region, Spec.functional(C), **options), strict=True))
    reachable = tuple(j for j, o in found.items() if _reaches(network, region, label, j, o))
    excluded = tuple(j for j, o in found.items() if j not in reachable and o.safe_lower > 0)
    rest = tuple(j for j in chosen if j not in reachable and j not in excluded)
    return Certification(label, found, reachable, excluded, rest)


def exact_preactivations(
    network: Network,
    region: Region,
    *,
    deadline: float = math.inf,
    memory: int | None = None,
    backend: str = "highs",
) -> dict[str, Interval]:
    """The exact interval of every value that an activation reads, from two programs for each unstable neuron.

    Solver-trusted, less `TOLERANCE`. After the deadline the bounds found so far stand. What this costs is why nobody
    does it: see PERFORMANCE.md.
    """
    require(backend)

    def minimum(state: State, name: str, rows: Array) -> Array:
        encoding = encode(state, relaxed=False, until=name)
        costs, _ = encoding.costs(rows, np.zeros(len(rows)))
        program = _cut(state, encoding, costs)
        limits = Limits(deadline - time.perf_counter(), memory)
        found = apart(program, costs, limits, backend=backend)
        return np.array([safe(s.lower) for s in found])

    if len(region) != 1:
        raise ValueError(f"region: {len(region)} examples; a program takes one, region[i : i + 1]")
    return tightened(network, region, minimum, rigorous=True, memory=memory, statistics=None)


# -- parts ------------------------------------------------------------------------------------------------------------


def _require_single(region: Region, spec: Spec) -> None:
    if len(region) != 1 or len(spec) != 1:
        raise ValueError(
            f"region: {len(region)} examples and {len(spec)} specifications; a program takes one, region[i : i + 1]"
        )


def _cut(state: State, encoding: Encoding, costs: Array) -> Program:
    """The program, an l2 ball cut by the planes that its relaxation asks for."""
    cuts: list[Row] = []
    if state.region.p == 2:
        minima(encoding.program.relaxed(), costs, state, encoding, cuts)
    return encoding.program.with_rows(cuts)


def _clauses(state: State, spec: Spec) -> tuple[Encoding, Program, Array]:
    """The program and an objective for each clause: its only functional, or a column t ≥ all of them."""
    check_spec(state, spec)
    encoding = encode(state, relaxed=False)
    costs, _ = encoding.costs(spec.C[0].double().numpy(), spec.d[0].double().numpy())
    program = _cut(state, encoding, costs)
    members = [np.flatnonzero(spec.clause.numpy() == c) for c in range(spec.count)]
    largest = {
        c: program.columns + i for i, c in enumerate(c for c, m in enumerate(members) if len(m) > 1)
    }
    free = np.full(len(largest), math.inf)
    program = program.with_columns(-free, free)
    costs = np.pad(costs, ((0, 0), (0, len(largest))))
    units = np.eye(program.columns)[list(largest.values())]
    tops = dict(zip(largest, units, strict=True))
    rows = [top - costs[m] for c, top in tops.items() for m in members[c]]
    program = program.with_rows([(np.flatnonzero(r), r[r != 0], 0.0, math.inf) for r in rows])
    return encoding, program, np.stack([tops.get(c, costs[m[0]]) for c, m in enumerate(members)])


def _optimum(
    network: Network, region: Region, spec: Spec, m: int, encoding: Encoding, solution: Solution
) -> Optimum:
    point, value = None, math.inf
    if solution.x is not None:
        x = torch.from_numpy(encoding.input.at(solution.x)).reshape(1, *network.input_shape)
        point = region.project(x.to(network.dtype))
        y = network(point)[0].double()
        value = (spec.C[0, m].double() @ y + spec.d[0, m]).item()
        point = point[0]
    return Optimum(
        solution.lower,
        solution.upper,
        point,
        value,
        solution.status,
        solution.nodes,
        solution.seconds,
        encoding.kinks,
    )


def _failing(network: Network, region: Region, spec: Spec, points: Tensor) -> Tensor | None:
    """The first of some points of one region where the specification fails, as `witness` decides."""
    return next((p for p in points if witness(network, region, spec, p[None]).upper <= 0), None)


def _reaches(network: Network, region: Region, label: int, target: int, found: Optimum) -> bool:
    if found.point is None:
        return False
    spec = Spec.target(torch.tensor([label]), torch.tensor([target]), network.num_classes)
    return _failing(network, region, spec, found.point[None]) is not None
