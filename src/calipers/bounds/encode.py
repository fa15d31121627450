"""A network over one region as a program: exactly, with integers, or its linear relaxation.

Columns are the input's elements, and for every nonlinear node what it reads and what it makes; affine nodes are rows of
numbers over them. A piecewise-linear function is written with its kinks p_i as

    f(z) = s·z + t + Σ_i (s_i − s_{i−1})·r_i,    r_i = max(z − p_i, 0)

and each r with l < z − p < u is r ≥ 0 and, exactly or relaxed (v eliminated: the same set once 0 ≤ v ≤ 1),

    r ≥ z − p,   r ≤ u·v,   r ≤ z − p − l·(1 − v),   v ∈ {0, 1}          or          r ≤ u/(u − l)·(z − p − l).

A maximum m of e_k is m ≥ e_k, m ≤ e_k + M_k·(1 − v_k), Σ v_k = 1. What has no pieces (a sigmoid, a product of two
values) is relaxed by the op table's own lines, McCormick's planes for a product, and has no exact form.

Sound: column bounds hold for every point of the region if the given intervals do; each row holds once loosened by its
`Program.slack`, which counts the rounding of the composed coefficients (0 where rounding is not accounted for).
Reference: Tjeng et al. 2019 (MIP), section 4; Ehlers 2017 for the relaxation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from calipers.bounds.interval import propagate
from calipers.bounds.ladder import INTERMEDIATE, Statistics, preactivations
from calipers.bounds.linear import transposed
from calipers.bounds.state import State, absolute, at, describe, start
from calipers.errors import RegionError, UnsupportedOp, unknown_name
from calipers.graph.graph import Network, Node
from calipers.ops import Step
from calipers.ops.kinds import Activation, Affine, Bilinear, Extremum, Pieces
from calipers.programs import Program
from calipers.rounding import add
from calipers.sets import Interval, Region
from calipers_check.table import Array, Table

EXACT = "an exact program takes piecewise-linear ops only; ask for the linear relaxation, or for branch and bound"
CHUNK = 1 << 22  # numbers of a Jacobian at a time
ONE = 0  # the column that is fixed at 1: constants of objectives


@dataclass(frozen=True, eq=False)
class Form:
    """Affine functions of the columns, one for each element of a value.

    Args:
        size: at least Σ|matrix|·|columns| + |offset|, for each.
        rate: their matrix and offset are exact up to this share of ``size``.
    """

    matrix: Table
    offset: Array
    size: Array
    rate: float

    def at(self, x: Array) -> Array:
        values: Array = self.offset + np.bincount(
            self.matrix.row, self.matrix.value * x[self.matrix.column], self.matrix.rows
        )
        return values


@dataclass(frozen=True, eq=False)
class Encoding:
    """A program, and where the network's values are in it.

    Args:
        value: the value asked for, normally the output.
        kinks: how many r (and maxima) it has: as many binaries where it is exact.
    """

    program: Program
    input: Form
    value: Form
    kinks: int

    def costs(self, C: Array, d: Array) -> tuple[Array, Array]:
        """C·value + d as objectives (M, columns), constants in the column `ONE`, and their rounding (M,)."""
        units = (C.shape[1] + 3) * 2.0**-52 if self.value.rate else 0.0
        with np.errstate(invalid="ignore", over="ignore"):
            rows = Table.of(C) @ self.value.matrix
            costs = rows.dense(self.program.columns)
            costs[:, ONE] += C @ self.value.offset + d
            size = np.abs(C) @ self.value.size + np.abs(d)
            return costs, size * (self.value.rate + units)


def prepare(
    network: Network,
    region: Region,
    intermediate: str | Mapping[str, Interval],
    *,
    rigorous: bool = True,
    memory: int | None = None,
    statistics: Statistics | None = None,
) -> State:
    """The intervals that a program is made of, in float64.

    Args:
        intermediate: "interval", "crown", or intervals by value name, which then count as they are: a program is sound
            if they are. Values that it leaves out get interval bounds.

    Raises:
        ValueError: no such rung, or an interval that does not fit its value.
    """
    options: dict[str, Any] = {
        "dtype": torch.float64,
        "rigorous": rigorous,
        "memory": memory,
        "statistics": statistics,
    }
    state = start(network, region, **options)
    if isinstance(intermediate, str):
        if intermediate not in INTERMEDIATE:
            raise unknown_name("intermediate", intermediate, INTERMEDIATE)
        tight = INTERMEDIATE[intermediate]
        intermediate = preactivations(network, region, tight=tight, **options)
    else:
        _require_fit(state, intermediate)
    propagate(state, tighten=_placer(intermediate))
    return state


def _require_fit(state: State, given: Mapping[str, Interval]) -> None:
    for name, box in given.items():
        known = name in state.network.graph.active
        expected = (state.batch, *state.shape(name)) if known else None
        if tuple(box.lower.shape) != expected or not bool((box.lower <= box.upper).all()):
            raise ValueError(
                f"intermediate: {name!r} needs lower <= upper of shape {expected}, "
                f"not {tuple(box.lower.shape)}; pass what calipers.bounds.preactivations returns"
            )


def _placer(given: Mapping[str, Interval]) -> Callable[[State, Node], None]:
    placed: set[str] = set()

    def place(state: State, node: Node) -> None:
        for name in node.operands:
            if name in given and name not in placed and name not in state.network.graph.inputs:
                placed.add(name)
                state.replace(name, Interval(*(end.double() for end in given[name])))

    return place


@torch.no_grad()
def encode(state: State, *, relaxed: bool, until: str | None = None) -> Encoding:
    """The program of a state of one example, whose intervals are known (see `prepare`), up to a value of its graph.

    Args:
        relaxed: the linear relaxation; else exactly, which needs finite intervals.
        until: the value asked for; None is the output.

    Raises:
        UnsupportedOp: exactly, and an op has no pieces.
        RegionError: exactly, and an interval is unbounded.
        ValueError: the state has more than one example.

    Cost: for each affine op one row of its transpose per output element.
    """
    if state.batch != 1:
        raise ValueError(f"region: {state.batch} examples; a program takes one, region[i : i + 1]")
    graph = state.network.graph
    until = until or graph.output
    builder = _Builder(state, relaxed=relaxed)
    needed = _ancestors(state, until)
    with np.errstate(invalid="ignore", over="ignore"):  # rows that come out infinite are left out
        builder.place_region()
        for step in state.facts.steps:
            if step.node.name in needed:
                builder.forms[step.node.name] = RULES[type(step.kind)](builder, step)
    forms = builder.forms
    return Encoding(builder.program(), forms[graph.inputs[0]], forms[until], builder.kinks)


def _ancestors(state: State, name: str) -> set[str]:
    wanted = {name}
    for step in reversed(state.facts.steps):
        if step.node.name in wanted:
            wanted |= set(step.reads)
    return wanted


def _flat(value: Tensor) -> Array:
    flat: Array = value[0].detach().reshape(-1).cpu().numpy()
    return flat


class _Builder:
    """Columns and rows so far; ``forms`` of the values."""

    def __init__(self, state: State, *, relaxed: bool) -> None:
        self.state, self.relaxed = state, relaxed
        self.forms: dict[str, Form] = {}
        self.known: dict[str, Array] = {}  # value -> column of each element, -1 where it has none
        self.count = self.kinks = 0
        self._columns: list[tuple[Array, Array, Array]] = []
        self._rows: list[tuple[Table, Array, Array, Array]] = []
        self.columns(np.ones(1), np.ones(1))

    def columns(self, lower: Array, upper: Array, *, integral: bool = False) -> Array:
        """New columns: their numbers."""
        self._columns.append((lower, upper, np.full(len(lower), integral)))
        self.count += len(lower)
        return np.arange(self.count - len(lower), self.count)

    def rows(
        self,
        entries: list[tuple[Array, Array | float]],
        lower: Array | float,
        upper: Array | float,
        slack: Array | float = 0.0,
    ) -> None:
        """One row for each position of the ``entries``, (columns, coefficients): columns that meet are summed."""
        n = len(entries[0][0])
        parts = [
            Table(np.arange(n), column, np.broadcast_to(np.asarray(value, float), n), n)
            for column, value in entries
        ]
        self.add(Table.total(parts), lower, upper, slack)

    def add(
        self,
        matrix: Table,
        lower: Array | float,
        upper: Array | float,
        slack: Array | float = 0.0,
    ) -> None:
        """Rows; those that bind nothing, or whose numbers are infinite, are left out."""
        ends = [np.broadcast_to(np.asarray(v, float), matrix.rows) for v in (lower, upper, slack)]
        bad = np.bincount(matrix.row, ~np.isfinite(matrix.value), matrix.rows) > 0
        binds = (np.isfinite(ends[0]) | np.isfinite(ends[1])) & np.isfinite(ends[2]) & ~bad
        if not binds.all():
            keep = np.flatnonzero(binds)
            matrix, ends = matrix.take(keep), [e[keep] for e in ends]
        if matrix.rows:
            self._rows.append((matrix, ends[0], ends[1], ends[2]))

    def program(self) -> Program:
        lower, upper, integral = (np.concatenate(part) for part in zip(*self._columns, strict=True))
        none = np.zeros(0)
        rows = self._rows or [(Table.units(np.zeros(0, int)), none, none, none)]
        matrix = Table.stack([r[0] for r in rows])
        ends = [np.concatenate([r[i] for r in rows]) for i in (1, 2, 3)]
        index, starts = matrix.column.astype(np.int32), matrix.starts.astype(np.int32)
        return Program(
            lower, upper, integral, ends[0], ends[1], starts, index, matrix.value, ends[2]
        )

    # -- values ----------------------------------------------------------------------------------------------

    def place_region(self) -> None:
        """The box as column bounds; an l1 ball as x = centre + p − q with Σ p + q ≤ eps; an l2 ball's box alone."""
        state, region = self.state, self.state.region
        name = state.network.graph.inputs[0]
        low, high = (_flat(end) for end in region.hull())
        if region.p != 1:
            self.forms[name] = self.own(self.columns(low, high), low, high)
            return
        center = region.center
        above = _flat(add(region.outer_upper, -center, math.inf))
        below = _flat(add(center, -region.outer_lower, math.inf))
        zero = np.zeros(len(above))
        up, down = self.columns(zero, above), self.columns(zero, below)
        eps = region.outer_eps[0].item()
        both = np.concatenate([up, down])
        self.add(Table(both * 0, both, np.ones(len(both)), 1), -math.inf, eps)
        matrix = Table.total([Table.units(up), -Table.units(down)])
        self.forms[name] = Form(matrix, _flat(center), above + below + np.abs(_flat(center)), 0.0)

    def own(self, column: Array, lower: Array, upper: Array) -> Form:
        """Values that are columns themselves."""
        return Form(
            Table.units(column),
            np.zeros(len(column)),
            np.maximum(np.abs(lower), np.abs(upper)),
            0.0,
        )

    def box(self, name: str) -> tuple[Array, Array]:
        low, high = self.state.boxes[name]
        return _flat(low), _flat(high)

    def variables(self, name: str, need: Array) -> Array:
        """The column of each element of ``name`` that is needed; -1 for others. A new one is a row of its own."""
        form = self.forms[name]
        if name not in self.known:
            self.known[name] = _own_columns(form)
        column = self.known[name]
        new = np.flatnonzero(need & (column < 0))
        if len(new):
            low, high = (end[new] for end in self.box(name))
            column[new] = self.columns(low, high)
            offset = form.offset[new]
            total = Table.total([Table.units(column[new]), -form.matrix.take(new)])
            self.add(total, offset, offset, form.rate * form.size[new])
        return column


def _own_columns(form: Form) -> Array:
    """The column that each element is, -1 where it is none."""
    matrix, starts = form.matrix, form.matrix.starts
    single = np.flatnonzero((np.diff(starts) == 1) & (form.offset == 0) & (form.rate == 0))
    entry = starts[single]
    same = matrix.value[entry] == 1
    column = np.full(matrix.rows, -1)
    column[single[same]] = matrix.column[entry[same]]
    return column


# -- one rule per kind ---------------------------------------------------------------------------------------------


def _affine(builder: _Builder, step: Step) -> Form:
    state, node = builder.state, step.node
    kind: Affine = step.kind  # type: ignore[assignment]
    args, kwargs = state.arguments(node)
    forms = {i: builder.forms[node.operands[i]] for i in step.perturbed}
    matrices = [_jacobian(state, step, i) @ form.matrix for i, form in forms.items()]

    def put(part: str) -> list[Any]:
        def value(i: int) -> Tensor:
            flat = torch.from_numpy(getattr(forms[i], part))
            return flat.reshape(1, *state.shape(node.operands[i]))

        return at(args, {i: value(i) for i in forms})

    sizes = put("size")
    if kind.magnitude is None:
        size: Tensor = node.op(*absolute(sizes), **kwargs)
    else:
        size = kind.magnitude(1.0, *sizes, **kwargs)
    gamma = state.gamma(kind.terms(*args, **kwargs))
    rate = (1 + max(f.rate for f in forms.values())) * (1 + gamma) - 1
    offset = _flat(node.op(*put("offset"), **kwargs))
    return Form(Table.total(matrices), offset, _flat(size) * (1 + gamma), rate)


def _jacobian(state: State, step: Step, index: int) -> Table:
    def make(state: State, _: str) -> Table:
        shape = step.node.shape
        n = math.prod(shape)
        rows = max(1, CHUNK // max(n, math.prod(state.shape(step.node.operands[index]))))
        parts = []
        for first in range(0, n, rows):
            units = torch.zeros(min(rows, n - first), n, dtype=torch.float64)
            units[:, first:].fill_diagonal_(1.0)
            back = transposed(state, step, index, units.reshape(-1, *shape))
            parts.append(Table.of(back.reshape(len(units), -1).numpy()))
        return Table.stack(parts)

    return state.once(f"jacobian {index}", step.node.name, make)


def _activation(builder: _Builder, step: Step) -> Form:
    kind: Activation = step.kind  # type: ignore[assignment]
    args, kwargs = builder.state.arguments(step.node)
    if kind.pieces is not None:
        return _piecewise(builder, step, kind.pieces(*args[1:], **kwargs))
    if not builder.relaxed:
        raise UnsupportedOp([describe(step.node)], EXACT)
    z = builder.variables(step.reads[0], np.ones(math.prod(step.node.shape), bool))
    low, high = builder.box(step.node.name)
    y = builder.columns(low, high)
    _lines(builder, step, np.arange(len(z)), [(y, 1.0)], z, np.maximum(np.abs(low), np.abs(high)))
    return builder.own(y, low, high)


def _lines(
    builder: _Builder,
    step: Step,
    where: Array,
    y: list[tuple[Array, Array | float]],
    z: Array,
    size: Array,
) -> None:
    """Rows of the op table's own lines for the elements ``where``; ``y`` are the entries of the output."""
    state, kind = builder.state, step.kind
    args, kwargs = state.arguments(step.node)
    name = step.reads[0]
    lines = kind.relax(state.boxes[name], *args[1:], **kwargs)  # type: ignore[union-attr]
    a, b, c, d = (_flat(part)[where] for part in lines)
    low, high = builder.box(name)
    far = np.maximum(np.abs(low), np.abs(high))[where]
    gamma = state.gamma(16 + int(kind.ulps))  # type: ignore[union-attr]
    slack = gamma * ((np.abs(a) + np.abs(c)) * far + np.abs(b) + np.abs(d) + size[where])
    entries = [(col[where], v[where] if isinstance(v, np.ndarray) else v) for col, v in y]
    builder.rows([*entries, (z[where], -a)], b, math.inf, slack)
    builder.rows([*entries, (z[where], -c)], -math.inf, d, slack)


def _piecewise(builder: _Builder, step: Step, pieces: Pieces) -> Form:
    low, high = builder.box(step.reads[0])
    points, slopes = np.array(pieces.points), np.array(pieces.slopes)
    # the line of each piece: slope·z + cut, continuous at the kinks
    cuts = pieces.value - slopes[0] * points[0] + np.cumsum([0, *(-np.diff(slopes) * points)])
    inside = [(low < p) & (p < high) for p in points]
    first = np.searchsorted(points, low, side="right")
    bent = sum(inside)
    z = builder.variables(step.reads[0], (slopes[first] != 0) | (bent > 0))
    entries: list[tuple[Array, Array]] = [(z, slopes[first])]
    far = np.maximum(np.abs(low), np.abs(high))
    size = np.where(slopes[first] == 0, 0.0, np.abs(slopes[first]) * far) + np.abs(cuts[first])
    for p, bend, mask in zip(points, np.diff(slopes), inside, strict=True):
        where = np.flatnonzero(mask & (bend != 0))
        r = np.full(len(low), -1)
        r[where] = _kink(builder, z[where], float(p), low[where], high[where])
        entries.append((r, np.full(len(low), bend)))
        size[where] += abs(bend) * (high[where] - p)
    if builder.relaxed and (several := np.flatnonzero(bent > 1)).size:
        _whole_lines(builder, step, several, entries, z, cuts[first], size)
    matrix = Table.total([_scaled(column, value) for column, value in entries])
    return Form(matrix, cuts[first], size, builder.state.gamma(2 * len(points)))


def _scaled(column: Array, value: Array) -> Table:
    keep = np.where(value != 0, column, -1)
    units = Table.units(keep)
    return Table(units.row, units.column, value[units.row], units.rows)


def _kink(builder: _Builder, z: Array, p: float, low: Array, high: Array) -> Array:
    """Columns r = max(z − p, 0) where low < p < high."""
    l, u = low - p, high - p
    if p:  # these differences round: outwards
        l, u = np.nextafter(l, -math.inf), np.nextafter(u, math.inf)
    r = builder.columns(np.zeros(len(z)), u)
    builder.kinks += len(z)
    builder.rows([(r, 1.0), (z, -1.0)], -p, math.inf)
    gamma = builder.state.gamma(8)
    if builder.relaxed:
        slope = u / (u - l)
        slack = gamma * (slope * (np.maximum(-low, high) + abs(p) - l) + u)
        builder.rows([(r, 1.0), (z, -slope)], -math.inf, -slope * (p + l), slack)
        return r
    _require_finite(l, u)
    v = builder.columns(np.zeros(len(z)), np.ones(len(z)), integral=True)
    builder.rows([(r, 1.0), (v, -u)], -math.inf, 0.0)
    builder.rows(
        [(r, 1.0), (z, -1.0), (v, -l)], -math.inf, -p - l, gamma * (abs(p) - l) if p else 0.0
    )
    return r


def _require_finite(*bounds: Array) -> None:
    if not all(np.isfinite(b).all() for b in bounds):
        raise RegionError(
            "region: values in the network are unbounded over it, so it has no exact program; bound the box"
        )


def _whole_lines(
    builder: _Builder,
    step: Step,
    where: Array,
    entries: list[tuple[Array, Array]],
    z: Array,
    cut: Array,
    size: Array,
) -> None:
    """With several kinks the sum of their hulls is wider than the function's lines: a column for it, and those."""
    low, high = builder.box(step.node.name)
    y = np.full(len(z), -1)
    y[where] = builder.columns(low[where], high[where])
    gamma = builder.state.gamma(8)
    parts = [_scaled(c, v).take(where) for c, v in entries]
    total = Table.total([Table.units(y[where]), *(-p for p in parts)])
    builder.add(total, cut[where], cut[where], gamma * (size[where] + np.abs(cut[where])))
    _lines(builder, step, where, [(y, 1.0)], z, size)


def _bilinear(builder: _Builder, step: Step) -> Form:
    """McCormick: y_l·x + x_l·y − x_l·y_l and three more planes."""
    node = step.node
    if not builder.relaxed:
        raise UnsupportedOp([describe(node)], EXACT)
    ends, columns = [], []
    for name in node.operands:
        shape = builder.state.shape(name)
        place = torch.arange(math.prod(shape)).reshape(shape).expand(node.shape).reshape(-1).numpy()
        low, high = builder.box(name)
        columns.append(builder.variables(name, np.ones(len(low), bool))[place])
        ends.append((low[place], high[place]))
    out_low, out_high = builder.box(node.name)
    out = builder.columns(out_low, out_high)
    (xl, xu), (yl, yu) = ends
    xm, ym = (np.maximum(np.abs(a), np.abs(b)) for a, b in ends)
    slack = builder.state.gamma(8) * xm * ym
    for a, b, above in ((xl, yl, True), (xu, yu, True), (xu, yl, False), (xl, yu, False)):
        sides = (-a * b, math.inf) if above else (-math.inf, -a * b)
        builder.rows([(out, 1.0), (columns[0], -b), (columns[1], -a)], sides[0], sides[1], slack)
    return builder.own(out, out_low, out_high)


def _extremum(builder: _Builder, step: Step) -> Form:
    kind: Extremum = step.kind  # type: ignore[assignment]
    args, kwargs = builder.state.arguments(step.node)
    name = step.reads[0]
    windows = kind.windows(tuple(args[0].shape[1:]), *args[1:], **kwargs)
    index = windows.reshape(-1, windows.shape[-1]).numpy()
    lows, highs = builder.box(name)
    low = np.where(index >= 0, lows[index], -math.inf)
    high = np.where(index >= 0, highs[index], -math.inf)
    # only what can exceed the best lower end counts, and the element that has it
    best = low.argmax(1)
    live = high > low.max(1, keepdims=True)
    live[np.arange(len(live)), best] = True
    ahead = np.where(live, high, -math.inf)
    rest = np.stack(
        [np.delete(ahead, k, 1).max(1, initial=-math.inf) for k in range(ahead.shape[1])], 1
    )
    need = np.zeros(len(lows), bool)
    need[index[live]] = True
    x = builder.variables(name, need)
    floor, top = low.max(1), ahead.max(1)
    m = builder.columns(floor, top)
    builder.kinks += int((live.sum(1) > 1).sum())
    owner, k = np.nonzero(live)
    e, l, u, r = x[index[owner, k]], low[owner, k], high[owner, k], rest[owner, k]
    builder.rows([(m[owner], 1.0), (e, -1.0)], 0.0, math.inf)
    if builder.relaxed:
        _chords(builder, m[owner], e, l, u, r)
    else:
        _choose(builder, m, owner, e, np.maximum(r - l, 0.0))
    return builder.own(m, floor, top)


def _chords(builder: _Builder, m: Array, e: Array, l: Array, u: Array, rest: Array) -> None:
    """max(e, rest) lies under its chord on [l, u]; it is e itself where rest ≤ l, and says nothing where rest ≥ u."""
    bends = (rest > l) & (rest < u)
    where = np.flatnonzero(bends | (rest <= l))
    m, e, l, u, rest, bends = (v[where] for v in (m, e, l, u, rest, bends))
    slope = np.where(bends, (u - rest) / np.where(bends, u - l, 1.0), 1.0)
    offset = np.where(bends, rest - slope * l, 0.0)
    size = np.where(bends, np.abs(rest) + slope * np.maximum(np.abs(l), np.abs(u)), 0.0)
    builder.rows([(m, 1.0), (e, -slope)], -math.inf, offset, builder.state.gamma(8) * size)


def _choose(builder: _Builder, m: Array, owner: Array, e: Array, big: Array) -> None:
    """m ≤ e + big·(1 − v), and one v of each maximum is 1."""
    _require_finite(big)
    v = builder.columns(np.zeros(len(e)), np.ones(len(e)), integral=True)
    big = np.nextafter(big, math.inf)
    builder.rows([(m[owner], 1.0), (e, -1.0), (v, big)], -math.inf, big)
    builder.add(Table(owner, v, np.ones(len(v)), len(m)), 1.0, 1.0)


RULES: dict[type, Callable[[_Builder, Step], Form]] = {
    Affine: _affine,
    Activation: _activation,
    Bilinear: _bilinear,
    Extremum: _extremum,
}
