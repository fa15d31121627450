"""Sub-problems of branch and bound, as rows of tensors, and the lines and multipliers that bound them.

A sub-problem is the region where some neurons' operands are known to lie on one side of a point: its *splits*. One
linear functional of the output is bounded over it: CROWN with lines chosen for the sub-problem's own intervals and with
a multiplier for every split, all optimised together (alpha and beta). All sub-problems of a search share the region,
the reference and the intermediate bounds of the root; they are rows of one backward pass.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from calipers.bounds.ladder import at_reference
from calipers.bounds.linear import (
    Bend,
    activation,
    at_the_input,
    both_bounds,
    deviation,
    deviations,
)
from calipers.bounds.patches import Patch, Rows
from calipers.bounds.state import State, flat
from calipers.exact.record import as_bytes
from calipers.graph.graph import Node
from calipers.ops.kinds import Activation, Lines
from calipers.rounding import cast
from calipers.sets import Interval


class Layer(NamedTuple):
    """The elements of one activation that are not linear on their interval at the root, and the line of all others."""

    node: Node
    kind: Activation
    columns: Tensor  # (U,) flat positions
    z: Tensor
    out: Tensor
    slope: Tensor  # (N,) of the others, 0 at the columns
    offset: Tensor | None  # (N,) likewise, in deviations from the reference; None: zero
    gap: Tensor | None  # (N,) between their lines, for rounding; None: zero
    span: slice  # of the columns among all undecided elements
    sides: int  # numbers to choose for each: one where the same serves both lines
    affine: bool  # as of `Tuned`


@dataclass(frozen=True, eq=False)
class Domains:
    """Sub-problems, one a row.

    Args:
        bound: (n,) the best lower bound known of the functional.
        clause: (n,) which clause of the specification must hold.
        weights: (n, members) of the clause's functionals; the combination is what is bounded.
        choice: (n, T) the lines' numbers in [0, 1], as bytes: 255ths.
        low, high: (n, U) the interval of every undecided element's operand, in float32.
        where: (n, D) which element each split is of, −1 for none.
        point: (n, D) where it was split.
        side: (n, D) +1: above the point, −1: below.
        scale: (n, D) the size of the row where it was split: the unit of its multiplier.
        multiplier: (n, D) of the split's constraint, in that unit; not negative.
        fresh: (n,) how many splits there were when the intervals were last computed.
        node: (n,) its number in the search's `Record`, if there is one.
    """

    bound: Tensor
    clause: Tensor
    weights: Tensor
    choice: Tensor
    low: Tensor
    high: Tensor
    where: Tensor
    point: Tensor
    side: Tensor
    scale: Tensor
    multiplier: Tensor
    fresh: Tensor
    node: Tensor

    def __len__(self) -> int:
        return len(self.bound)

    @property
    def depth(self) -> Tensor:
        """(n,) the number of splits."""
        return (self.where >= 0).sum(1)

    @property
    def bytes_each(self) -> float:
        """Memory of one sub-problem."""
        size: int = sum(getattr(self, f.name).nbytes for f in fields(self))
        return size / max(len(self), 1)

    def __getitem__(self, index: Tensor | slice) -> Domains:
        return Domains(*(getattr(self, f.name)[index] for f in fields(self)))

    def deeper(self, depth: int) -> Domains:
        """With room for ``depth`` splits."""
        more = depth - self.where.shape[1]
        if more <= 0:
            return self
        shape = (len(self), more)
        pads = {
            "where": self.where.new_full(shape, -1),
            **{
                k: getattr(self, k).new_zeros(shape)
                for k in ("point", "side", "scale", "multiplier")
            },
        }
        parts = (getattr(self, f.name) for f in fields(self))
        return Domains(
            *(
                torch.cat([v, pads[f.name]], 1) if f.name in pads else v
                for f, v in zip(fields(self), parts, strict=True)
            )
        )


def joined(parts: list[Domains]) -> Domains:
    """All rows of ``parts``."""
    depth = max(p.where.shape[1] for p in parts)
    parts = [p.deeper(depth) for p in parts]
    return Domains(*(torch.cat([getattr(p, f.name) for p in parts]) for f in fields(Domains)))


class Problem:
    """What the sub-problems of one search share, in one precision.

    Args:
        state: of the whole region (one example), with the root's intermediate bounds and reference.
        C, d: (M, K) and (M,), the functionals; ``members`` (clauses, members) their numbers by clause, −1 for none.
        like: the same problem in another precision, whose undecided elements are taken over.

    ``slack`` (M,), not negative, is subtracted from all bounds: who wants them to be positive wants so much more.
    """

    def __init__(
        self, state: State, C: Tensor, d: Tensor, members: Tensor, like: Problem | None = None
    ) -> None:
        self.state, self.members = state, members
        self.C, self.d, self.slack = C, d, torch.zeros_like(d)
        self.layers: dict[str, Layer] = {}
        start = 0
        for step in state.facts.steps:
            kind, node = step.kind, step.node
            if not isinstance(kind, Activation) or kind.tuned is None:
                continue
            args, _ = state.arguments(node)
            box, out = state.boxes[node.operands[0]], state.env[node.name]
            lines = deviations(state, kind, node, box, args[0], out, None)
            lower_slope, low, upper_slope, high = (flat(v.expand_as(out))[0] for v in lines)
            if like is None:
                bent = flat(~kind.linear(box, *args[1:]))[0] | (lower_slope != upper_slope)
                columns = torch.nonzero(bent).flatten()
            elif node.name in like.layers:
                columns = like.layers[node.name].columns
            else:
                continue
            if not len(columns):
                continue
            first, second = kind.tuned.start(box, *args[1:])
            gap = (high - low).index_fill(0, columns, 0.0)
            offset = (low + 0.5 * gap).index_fill(0, columns, 0.0)
            self.layers[node.name] = Layer(
                node,
                kind,
                columns,
                flat(args[0])[0, columns],
                flat(out)[0, columns],
                lower_slope.index_fill(0, columns, 0.0),
                offset if bool(offset.any()) else None,
                gap if bool(gap.any()) else None,
                slice(start, start + len(columns)),
                1 if first is second else 2,
                kind.tuned.affine,
            )
            start += len(columns)
        self.count = start
        self.choices = sum(len(v.columns) * v.sides for v in self.layers.values())

    def root(self, clauses: Tensor, weights: Tensor, bound: Tensor) -> Domains:
        """The whole region, once for each of ``clauses``."""
        n, like = len(clauses), self.C
        ends = [
            [
                flat(self.state.boxes[v.node.operands[0]][i])[0, v.columns]
                for v in self.layers.values()
            ]
            for i in (0, 1)
        ]
        low, high = (torch.cat(v) if v else like.new_zeros(0) for v in ends)
        box = Interval(
            cast(low, torch.float32, -math.inf).expand(n, -1),
            cast(high, torch.float32, math.inf).expand(n, -1),
        )
        none = like.new_zeros(n, 0)
        return Domains(
            bound,
            clauses,
            weights,
            as_bytes(self.starts(box)),
            *box,
            none.long(),
            none,
            none.to(torch.int8),
            none,
            none,
            torch.zeros(n, dtype=torch.long),
            torch.zeros(n, dtype=torch.long),
        )

    @property
    def first(self) -> int:
        """How many undecided elements the first layer has: their intervals do not change."""
        return next((v.span.stop for v in self.layers.values()), 0)

    @property
    def numbers(self) -> Tensor:
        """Where every undecided element's first number is among the choices: (U,)."""
        found, start = [], 0
        for layer in self.layers.values():
            found.append(torch.arange(start, start + len(layer.columns)))
            start += len(layer.columns) * layer.sides
        return torch.cat(found)

    def starts(self, box: Interval) -> Tensor:
        """Where to start the lines' numbers on intervals (n, U): (n, T)."""
        found = [box.lower[:, :0]]
        for layer in self.layers.values():
            own = Interval(box.lower[:, layer.span], box.upper[:, layer.span])
            both = layer.kind.tuned.start(own, *self.arguments(layer))  # type: ignore[union-attr]
            found += both[: layer.sides]
        return torch.cat(found, 1)

    def undecided(self, domains: Domains) -> Tensor:
        """Which elements are not linear on their interval: (n, U)."""
        found = torch.zeros_like(domains.low, dtype=torch.bool)
        for layer in self.layers.values():
            box = Interval(domains.low[:, layer.span], domains.high[:, layer.span])
            found[:, layer.span] = ~layer.kind.linear(box, *self.arguments(layer))
        return found

    def refreshed(self, domains: Domains, rows: int) -> tuple[Domains, Tensor]:
        """The intervals again, each layer's from those before it, and which sub-problems turn out empty: (n,).

        Only a problem that accounts for rounding may do this: the intervals stay with the sub-problem.

        Args:
            rows: how many elements to bound at a time.
        """
        empty = torch.zeros(len(domains), dtype=torch.bool)
        for layer in list(self.layers.values())[1:]:
            low, high = domains.low.clone(), domains.high.clone()
            item, column = torch.nonzero(self.undecided(domains)[:, layer.span], as_tuple=True)
            for i in range(0, len(item), rows):
                at, to = item[i : i + rows], column[i : i + rows]
                found = both_bounds(
                    self.state,
                    layer.node.operands[0],
                    layer.columns[to].unsqueeze(1),
                    Batch(self, domains[at], fresh=True),
                )
                to = to + layer.span.start
                ends = (
                    cast(found.lower[:, 0], torch.float32, -math.inf),
                    cast(found.upper[:, 0], torch.float32, math.inf),
                )
                low[at, to] = torch.fmax(low[at, to], ends[0])
                high[at, to] = torch.fmin(high[at, to], ends[1])
            crossed = (low > high).any(1)
            empty |= crossed
            known = crossed.unsqueeze(1)  # an empty one keeps intervals that are intervals
            low, high = torch.where(known, domains.low, low), torch.where(known, domains.high, high)
            domains = replace(domains, low=low, high=high)
        return replace(domains, fresh=domains.depth), empty

    def share(self, clause: Tensor, weights: Tensor) -> Tensor:
        """The weights (n, members) of the clause's functionals, with sum 1."""
        share = weights.clamp_min(0) * (self.members[clause] >= 0)
        return share / share.sum(1, keepdim=True)

    def rows(self, clause: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """The functionals to bound: rows (n, K), and their value at the reference output, rounded down: (n,)."""
        numbers, share = self.members[clause], self.share(clause, weights)  # (n, members)
        own = numbers.clamp_min(0)
        C, d = self.C[own], (self.d - self.slack)[own]
        A, offset = (share.unsqueeze(2) * C).sum(1), (share * d).sum(1)
        value = at_reference(self.state, A.unsqueeze(0), offset.unsqueeze(0))[0]
        gamma = self.state.gamma(numbers.shape[1] + 2) if numbers.shape[1] > 1 else 0.0
        if gamma:
            box = self.state.boxes[self.state.network.graph.output]
            most = torch.maximum(box.lower.abs(), box.upper.abs())[0]
            size = (share * (C.abs() @ most + d.abs())).sum(1)
            value = value - 2 * gamma * size
        return A, value

    def points(self, box: Interval) -> Tensor:
        """Where the elements would be split on their intervals (n, U): at a kink, or else in the middle."""
        low, high = box
        point = low / 2 + high / 2
        for layer in self.layers.values():
            if layer.kind.pieces is None:
                continue
            l, u, own = (v[:, layer.span] for v in (low, high, point))
            for kink in layer.kind.pieces(*self.arguments(layer)).points:
                own = torch.where((l < kink) & (kink < u), kink, own)
            point[:, layer.span] = own
        return point

    def arguments(self, layer: Layer) -> list[Any]:
        """The activation's arguments after the first."""
        return self.state.arguments(layer.node)[0][1:]


class Batch:
    """`linear.Chosen` for sub-problems: rows (n, 1, ...) of one backward pass.

    ``leaves`` are what may be optimised. With ``watch`` it remembers the rows that reach each activation's undecided
    elements: what `branch` picks its splits by. ``fresh`` is for rows of other values than the output: lines start
    anew, multipliers do not count, and a second half of rows may mirror the first.
    """

    def __init__(
        self, problem: Problem, domains: Domains, *, watch: bool = False, fresh: bool = False
    ) -> None:
        self.problem, self.domains, self.fresh = problem, domains, fresh
        like = problem.C
        self.box = Interval(domains.low.to(like.dtype), domains.high.to(like.dtype))
        self.choice = (
            problem.starts(self.box)
            if fresh
            else domains.choice.to(like.dtype, copy=True).div_(255)
        )
        self.multiplier = domains.multiplier.to(like.dtype, copy=True)
        self.weights = domains.weights.to(like.dtype, copy=True)
        self.sign = domains.side.to(like.dtype) * domains.scale.to(like.dtype)
        self.at = domains.point.to(like.dtype)
        self.watch = watch
        self.seen: dict[str, Tensor] = {}
        self.chosen: dict[str, Lines] = {}
        self.ends: dict[str, list[tuple[Tensor, Tensor | None]]] = {}

    windows = False

    def __getitem__(self, index: Tensor) -> Batch:
        other = Batch(self.problem, self.domains[index])
        other.ends = {
            name: [(a[index], d if d is None else d[index]) for a, d in pairs]
            for name, pairs in self.ends.items()
        }
        for name in ("choice", "multiplier", "weights"):
            setattr(other, name, getattr(self, name).detach()[index])
        return other

    @property
    def leaves(self) -> list[Tensor]:
        return [self.choice, self.multiplier, self.weights]

    def evaluate(self) -> tuple[Tensor, Tensor]:
        """Lower bounds of the functionals (n,), and their rows at the input (n, *shape)."""
        A, value = self.problem.rows(self.domains.clause, self.weights)
        state = self.problem.state
        rows, bound = at_the_input(state, state.network.graph.output, A.unsqueeze(1), self)
        return value + bound[:, 0], rows[:, 0]

    def pulled(self, state: State, kind: Activation, node: Node, A: Rows) -> tuple[Rows, Tensor]:
        layer = self.problem.layers.get(node.name)
        if layer is None or isinstance(A, Patch):
            parts, bias = activation(state, kind, node, A, split=False)
            return parts[0], bias
        lines, every = self.lines(layer), flat(A, 2)[:, 0]
        if self.watch:
            self.seen[node.name] = every.index_select(1, layer.columns)
            self.chosen[node.name] = lines
        if len(every) > len(self.domains):
            lines = Lines(*(v.repeat(len(every) // len(self.domains), 1) for v in lines))
        rows, bias = Bend.apply(every, *lines, layer.columns, layer.slope)  # type: ignore[no-untyped-call]
        if layer.offset is not None:
            bias = bias + every @ layer.offset
        if layer.gap is not None:
            bias = bias - every.abs() @ (0.5 * layer.gap)
        bias = self._constrain(layer, rows, bias)
        return rows.reshape(A.shape), bias.unsqueeze(1)

    def lines(self, layer: Layer) -> Lines:
        """The lines of a layer's undecided elements, (n, U) each."""
        first, second = self._numbers(layer)
        state = self.problem.state
        box = Interval(*(v[:, layer.span] for v in self.box))

        def at(lower: Tensor, upper: Tensor) -> Lines:
            return deviations(
                state, layer.kind, layer.node, box, layer.z, layer.out, (lower, upper)
            )

        if state.rigorous or not layer.affine or not torch.is_grad_enabled():
            return at(first, second)
        name = layer.node.name
        if name not in self.ends:  # the same for every step
            with torch.no_grad():
                zero = torch.zeros_like(box.lower)
                pairs = zip(at(zero, zero), at(zero + 1, zero + 1), strict=True)
                self.ends[name] = [
                    (start, None if torch.equal(start, end) else end - start)
                    for start, end in pairs
                ]
        numbers = (first, first, second, second)
        return Lines(
            *(
                start if change is None else torch.addcmul(start, change, number)
                for (start, change), number in zip(self.ends[name], numbers, strict=True)
            )
        )

    def _numbers(self, layer: Layer) -> tuple[Tensor, Tensor]:
        start = 0
        for other in self.problem.layers.values():
            if other is layer:
                break
            start += len(other.columns) * other.sides
        width = len(layer.columns)
        first = self.choice[:, start : start + width]
        second = self.choice[:, start + width : start + 2 * width]
        return first, first if layer.sides == 1 else second

    def _constrain(self, layer: Layer, rows: Tensor, bias: Tensor) -> Tensor:
        """Take Σ multiplier·side·(v − point) over the splits of this layer's operand v from ``rows``, in place, and its
        constant from ``bias``."""
        where = self.domains.where
        if self.fresh or not where.shape[1]:
            return bias
        here = (where >= layer.span.start) & (where < layer.span.stop)
        local = torch.where(here, where - layer.span.start, 0)
        m = torch.where(here, self.multiplier * self.sign, 0.0)
        z, columns, state = layer.z[local], layer.columns[local], self.problem.state
        bias = bias - (m * (z - self.at)).sum(1)
        rows.scatter_add_(1, columns, -m)
        if state.rigorous:
            depth = where.shape[1]
            size = (m.abs() * (z.abs() + self.at.abs())).sum(1)
            far = flat(state.once("deviation", layer.node.operands[0], deviation))[0]
            lost = rows.abs() @ far + (m.abs() * far[columns]).sum(1)
            bias = bias - state.gamma(depth + 4) * size - state.gamma(depth + 2) * lost
        return bias
