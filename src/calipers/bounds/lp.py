"""The linear relaxation solved: the best that triangles around each activation can prove.

Over the program of `encode` the solver minimises each functional. Its answer is not believed: the value is worked out
again from its dual vector, which is a lower bound whatever the vector (weak duality), and its point is run through the
network, which shows how far the relaxation is from the truth and where an attack may start.
Reference: Ehlers 2017; Salman et al. 2019 (the convex barrier).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from calipers.bounds.encode import Encoding, encode, prepare
from calipers.bounds.interval import propagate
from calipers.bounds.ladder import Statistics, crown, undecided
from calipers.bounds.state import State, check_spec, met, stacked, start, working_dtype
from calipers.graph.graph import Network, Node
from calipers.ops.kinds import Affine
from calipers.programs import Program, Solution, dual_value, solver
from calipers.sets import Interval, Region, cast
from calipers.spec import Spec
from calipers_check.table import Array

CUTS = 40  # tangent planes of an l2 ball, at most
TOUCHING = 1e-6  # a point this near the ball, relative to its radius, asks for no further plane
PAYS = 1e-4  # nor does one after a plane that lifted the value by less, relative to 1 + |value|
Row = tuple[Array, Array, float, float]


@dataclass(frozen=True, eq=False)
class Relaxation:
    """What the relaxation says of each functional of each example.

    Args:
        lower: (B, M) float64, worked out from the dual: never above the minimum of the functional.
        claimed: (B, M) the solver's own value.
        points: (B, M, *x) its points, projected onto the region, in the network's dtype.
        values: (B, M) the network's functionals at these points, float64.
    """

    lower: Tensor
    claimed: Tensor
    points: Tensor
    values: Tensor

    @property
    def gap(self) -> Tensor:
        """How far the relaxation's point is from being an adversary of that value: (B, M)."""
        return self.values - self.lower


def lp(
    network: Network,
    region: Region,
    spec: Spec,
    *,
    intermediate: str | Mapping[str, Interval] = "crown",
    raw: bool = False,
    dtype: torch.dtype | None = None,
    rigorous: bool = False,
    memory: int | None = None,
    statistics: Statistics | None = None,
) -> Tensor:
    """Lower bounds by the linear (triangle) relaxation, never below `crown`'s unless ``raw`` asks for it alone.

        min C·y + d   over the relaxation of `calipers.bounds.encode`

    Always solved in float64; ``dtype`` is the result's. Not differentiable. Further arguments as in `interval`.

    Args:
        intermediate: the intervals it is built on: "interval", "crown", or a mapping by value name
            (`preactivations`, `lp_preactivations`).

    Sound: the solver is not trusted, see `calipers.programs.dual_value`. An l2 ball is cut out of its box by tangent
        planes, so the value is that of a slightly larger set.
    Cost: one linear program per functional, one example after the other.
    """
    with torch.no_grad():
        result = relaxation(
            network,
            region,
            spec,
            intermediate=intermediate,
            rigorous=rigorous,
            memory=memory,
            statistics=statistics,
        )
        dtype = working_dtype(network, spec, dtype, rigorous=rigorous)
        lower = cast(result.lower, dtype, -math.inf)
        if raw:
            return lower
        weak = crown(
            network,
            region,
            spec,
            dtype=dtype,
            rigorous=rigorous,
            memory=memory,
            statistics=statistics,
        )
        return torch.maximum(lower, weak)


@torch.no_grad()
def relaxation(
    network: Network,
    region: Region,
    spec: Spec,
    *,
    intermediate: str | Mapping[str, Interval] = "crown",
    rigorous: bool = True,
    memory: int | None = None,
    statistics: Statistics | None = None,
) -> Relaxation:
    """The relaxation's values, points and gaps. Arguments and guarantee as in `lp`.

    Raises:
        UnsupportedOp: an op has no entry in the op table.
        ValueError: ``intermediate`` or the specification does not fit.
    """
    if len(spec) != len(region):
        raise ValueError(f"spec: {len(spec)} examples for {len(region)} regions")
    state = prepare(
        network, region, intermediate, rigorous=rigorous, memory=memory, statistics=statistics
    )
    check_spec(state, spec)
    shape = network.input_shape
    if not len(region):
        none = spec.d.double()
        points = region.center.to(network.dtype).new_empty(*none.shape, *shape)
        return Relaxation(none, none, points, none)
    rows = [_example(state.part(slice(i, i + 1)), spec[i : i + 1]) for i in range(len(region))]
    lower, claimed, inputs = (torch.stack(part) for part in zip(*rows, strict=True))
    # an example's points are members of its region each, and run as one batch
    spots = inputs.to(network.dtype).reshape(len(region), -1, *shape).transpose(0, 1)
    members = torch.stack([region.project(x) for x in spots], 1)
    y = network(members.flatten(0, 1)).double().reshape(*members.shape[:2], -1)
    C, d = spec.C.double(), spec.d.double()
    return Relaxation(lower, claimed, members, (C * y).sum(-1) + d)


def _example(state: State, spec: Spec) -> tuple[Tensor, Tensor, Tensor]:
    encoding = encode(state, relaxed=True)
    costs, noise = encoding.costs(spec.C[0].double().numpy(), spec.d[0].double().numpy())
    lower, found = minima(encoding.program, costs, state, encoding)
    center = state.region.center.reshape(-1)
    points = [center if s.x is None else torch.from_numpy(encoding.input.at(s.x)) for s in found]
    claimed = [s.upper for s in found]
    return torch.from_numpy(lower - noise), torch.tensor(claimed).double(), torch.stack(points)


def minima(
    program: Program,
    costs: Array,
    state: State,
    encoding: Encoding,
    cuts: list[Row] | None = None,
) -> tuple[Array, list[Solution]]:
    """For each objective a bound from its dual and the solution, cutting an l2 ball out of its box on the way.

    Args:
        cuts: gains the planes cut.
    """
    cuts = [] if cuts is None else cuts
    lower, found = [], []
    solve = solver(program)
    for cost in costs:
        bound, solution = _proved(program, cost, solve(cost), state)
        while solution.x is not None and len(cuts) < CUTS:
            row = ball_cut(state.region, encoding, solution.x)
            if row is None:
                break
            cuts.append(row)
            program = program.with_rows([row])
            solve = solver(program)
            new, solution = _proved(program, cost, solve(cost), state)
            gain, bound = new - bound, max(bound, new)
            if gain < PAYS * (1 + abs(bound)):
                break
        lower.append(bound)
        found.append(solution)
    return np.array(lower), found


def _proved(
    program: Program, cost: Array, solution: Solution, state: State
) -> tuple[float, Solution]:
    if solution.dual is None:
        return -math.inf, solution
    return dual_value(program, cost, solution.dual, rigorous=state.rigorous), solution


def ball_cut(region: Region, encoding: Encoding, x: Array) -> Row | None:
    """The tangent plane ⟨g, x − centre⟩ ≤ eps·‖g‖ that parts a point outside the l2 ball from it; None inside."""
    if region.p != 2:
        return None
    g = encoding.input.at(x) - region.center.reshape(-1).numpy()
    length, eps = float(np.linalg.norm(g)), region.outer_eps[0].item()
    if not length > eps * (1 + TOUCHING):
        return None
    g = g / length
    size = float(np.abs(g) @ encoding.input.size) + eps
    limit = eps * float(np.linalg.norm(g)) + float(g @ region.center.reshape(-1).numpy())
    column = encoding.input.matrix.column
    return column.astype(np.int32), g, -math.inf, limit + 2 * len(g) * 2.0**-52 * size


def lp_points(
    network: Network, region: Region, spec: Spec, *, limit: int = 16
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """For each of the functionals of lowest bound the relaxation's point: where an attack may start.

    Yields one batch as `calipers.bounds.corners` does: points (R, *x), their rows of the region, their clauses (R,).
    """
    found = relaxation(network, region, spec, rigorous=False)
    rows = torch.arange(len(region), device=region.center.device)
    chosen = found.lower.amin(0).argsort()[:limit].tolist()
    points = torch.cat([found.points[:, m] for m in chosen])
    clauses = torch.cat([spec.clause[m].expand(len(region)) for m in chosen])
    yield points, rows.repeat(len(chosen)), clauses


@torch.no_grad()
def lp_preactivations(
    network: Network,
    region: Region,
    *,
    rigorous: bool = True,
    memory: int | None = None,
    statistics: Statistics | None = None,
) -> dict[str, Interval]:
    """The interval of every value of the graph, from two linear programs for each element that can be unstable.

    Sound: as `lp`. Never wider than `calipers.bounds.preactivations`.
    Cost: two linear programs per unstable neuron, each over all layers before it.
    """
    options: dict[str, Any] = {"rigorous": rigorous, "memory": memory, "statistics": statistics}
    each = [region[i : i + 1] for i in range(len(region))]
    parts = [tightened(network, one, _by_relaxation, **options) for one in each]
    return {name: stacked([p[name] for p in parts]) for name in parts[0]}


def _by_relaxation(state: State, name: str, unit_rows: Array) -> Any:
    encoding = encode(state, relaxed=True, until=name)
    costs, noise = encoding.costs(unit_rows, np.zeros(len(unit_rows)))
    lower, _ = minima(encoding.program, costs, state, encoding)
    return lower - noise


def tightened(
    network: Network,
    region: Region,
    minimum: Any,
    *,
    rigorous: bool,
    memory: int | None,
    statistics: Statistics | None,
) -> dict[str, Interval]:
    """The intervals of one example, element by element better by ``minimum(state, name, rows) -> lower bounds``.

    Layer by layer, from CROWN's; ``rows`` (R, n) are functionals of the value ``name``.
    """
    options: dict[str, Any] = {"rigorous": rigorous, "memory": memory, "statistics": statistics}
    known = dict(prepare(network, region, "crown", **options).boxes)
    state = start(network, region, dtype=torch.float64, **options)
    done = set(network.graph.inputs)

    def tighten(state: State, node: Node) -> None:
        kind = state.kind(node)
        for name in node.operands:
            if isinstance(kind, Affine) or name not in network.graph.active or name in done:
                continue
            done.add(name)
            box = met(state.boxes[name], known[name])
            state.replace(name, box)
            wanted = np.flatnonzero(undecided(state, node, kind, name)[0].numpy())
            if len(wanted):
                found = minimum(state, name, _sides(wanted, box))
                state.replace(name, _narrowed(box, wanted, found))

    propagate(state, tighten=tighten)
    return state.boxes


def _sides(wanted: Array, box: Interval) -> Array:
    """Each element, then each element's negative."""
    units = np.zeros((len(wanted), box.lower.numel()))
    units[np.arange(len(wanted)), wanted] = 1.0
    return np.concatenate([units, -units])


def _narrowed(box: Interval, wanted: Array, found: Array) -> Interval:
    low, high = (end.reshape(-1).clone() for end in box)
    lower, negated = torch.from_numpy(found).chunk(2)
    low[wanted], high[wanted] = met(Interval(low[wanted], high[wanted]), Interval(lower, -negated))
    return Interval(low.reshape(box.lower.shape), high.reshape(box.upper.shape))
