"""Sub-problems of branch and bound, as rows of tensors, and the lines and multipliers that bound them.

A sub-problem is the region where some neurons' operands are known to lie on one side of a point: its *splits*. One
linear functional of the output is bounded over it: CROWN with lines chosen for the sub-problem's own intervals and with
a multiplier for every split, all optimised together (alpha and beta). All sub-problems of a search share the region,
the reference and the intermediate bounds of the root; they are rows of one backward pass.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor

from calipers.bounds.ladder import at_reference
from calipers.bounds.linear import at_the_input, deviations
from calipers.bounds.patches import Rows
from calipers.bounds.state import State, flat
from calipers.graph.graph import Node
from calipers.ops.kinds import Activation, Lines
from calipers.sets import Interval


class Layer(NamedTuple):
    """The elements of one activation that are not linear on their interval at the root."""

    node: Node
    kind: Activation
    columns: Tensor  # (U,) flat positions
    box: Interval  # (U,) their intervals
    z: Tensor
    out: Tensor
    base: Lines  # of all elements, (N,)
    span: slice  # of these elements among all undecided ones
    sides: int  # numbers to choose for each: one where the same serves both lines


@dataclass(frozen=True, eq=False)
class Domains:
    """Sub-problems, one a row.

    Args:
        bound: (n,) the best lower bound known of the functional.
        clause: (n,) which clause of the specification must hold.
        weights: (n, members) of the clause's functionals; the combination is what is bounded.
        choice: (n, T) the lines' numbers in [0, 1], kept in half precision.
        where: (n, D) which element each split is of, −1 for none.
        point: (n, D) where it was split.
        side: (n, D) +1: above the point, −1: below.
        scale: (n, D) the size of the row where it was split: the unit of its multiplier.
        multiplier: (n, D) of the split's constraint, in that unit; not negative.
    """

    bound: Tensor
    clause: Tensor
    weights: Tensor
    choice: Tensor
    where: Tensor
    point: Tensor
    side: Tensor
    scale: Tensor
    multiplier: Tensor

    def __len__(self) -> int:
        return len(self.bound)

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
    """

    def __init__(self, state: State, C: Tensor, d: Tensor, members: Tensor) -> None:
        self.state, self.members = state, members
        self.C, self.d = C, d
        self.layers: dict[str, Layer] = {}
        start = 0
        for step in state.facts.steps:
            kind, node = step.kind, step.node
            if not isinstance(kind, Activation) or kind.tuned is None:
                continue
            args, _ = state.arguments(node)
            box, out = state.boxes[node.operands[0]], state.env[node.name]
            columns = torch.nonzero(flat(~kind.linear(box, *args[1:]))[0]).flatten()
            if not len(columns):
                continue
            first, second = kind.tuned.start(box, *args[1:])
            base = deviations(state, kind, node, box, args[0], out, None)
            self.layers[node.name] = Layer(
                node,
                kind,
                columns,
                Interval(*(flat(v)[0, columns] for v in box)),
                flat(args[0])[0, columns],
                flat(out)[0, columns],
                Lines(*(flat(v.expand_as(out))[0] for v in base)),
                slice(start, start + len(columns)),
                1 if first is second else 2,
            )
            start += len(columns)
        self.count = start
        self.choices = sum(len(v.columns) * v.sides for v in self.layers.values())

    def root(self, clauses: Tensor, weights: Tensor, bound: Tensor) -> Domains:
        """The whole region, once for each of ``clauses``."""
        n = len(clauses)
        starts = []
        for layer in self.layers.values():
            start = layer.kind.tuned.start(layer.box, *self.arguments(layer))  # type: ignore[union-attr]
            starts += list(start[: layer.sides])
        choice = torch.cat(starts) if starts else self.C.new_zeros(0)
        none = torch.zeros(n, 0, dtype=self.C.dtype, device=self.C.device)
        return Domains(
            bound,
            clauses,
            weights,
            choice.expand(n, -1).to(torch.float16),
            none.long(),
            none,
            none.to(torch.int8),
            none,
            none,
        )

    def intervals(self, domains: Domains) -> Interval:
        """Of every undecided element in every sub-problem: (n, U)."""
        if not self.layers:
            empty = self.C.new_zeros(len(domains), 0)
            return Interval(empty, empty)
        low, high = (
            torch.cat([layer.box[i] for layer in self.layers.values()]).repeat(len(domains), 1)
            for i in (0, 1)
        )
        if domains.where.shape[1]:
            index, point = domains.where.clamp_min(0), domains.point.to(low)
            real = domains.where >= 0
            above = torch.where(real & (domains.side > 0), point, -torch.inf)
            below = torch.where(real & (domains.side < 0), point, torch.inf)
            low = low.scatter_reduce(1, index, above, "amax")
            high = high.scatter_reduce(1, index, below, "amin")
        return Interval(low, high)

    def rows(self, clause: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """The functionals to bound: rows (n, K), and their value at the reference output, rounded down: (n,)."""
        numbers = self.members[clause]  # (n, members)
        share = weights.clamp_min(0) * (numbers >= 0)
        share = share / share.sum(1, keepdim=True)
        C, d = self.C[numbers.clamp_min(0)], self.d[numbers.clamp_min(0)]
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
    elements: what `branch` picks its splits by.
    """

    def __init__(self, problem: Problem, domains: Domains, *, watch: bool = False) -> None:
        self.problem, self.domains = problem, domains
        like = problem.C
        self.choice = domains.choice.to(like.dtype, copy=True)
        self.multiplier = domains.multiplier.to(like.dtype, copy=True)
        self.weights = domains.weights.to(like.dtype, copy=True)
        self.box = problem.intervals(domains)
        self.sign = domains.side.to(like.dtype) * domains.scale.to(like.dtype)
        self.at = domains.point.to(like.dtype)
        self.watch = watch
        self.seen: dict[str, Tensor] = {}
        self.chosen: dict[str, Lines] = {}

    def __getitem__(self, index: Tensor) -> Batch:
        other = Batch(self.problem, self.domains[index])
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

    def lines(self, state: State, kind: Activation, node: Node, A: Rows) -> Lines:
        layer = self.problem.layers.get(node.name)
        out = state.env[node.name]
        if layer is None or not isinstance(A, Tensor):
            z = state.env[node.operands[0]]
            return deviations(state, kind, node, state.boxes[node.operands[0]], z, out, None)
        box = Interval(*(v[:, layer.span] for v in self.box))
        lines = deviations(state, kind, node, box, layer.z, layer.out, self._numbers(layer))
        n = len(box.lower)
        if self.watch:
            self.seen[node.name] = flat(A, 2)[:, 0].index_select(1, layer.columns)
            self.chosen[node.name] = lines
        shape = (n, 1, *out.shape[1:])
        return Lines(
            *(
                base.expand(n, -1).index_copy(1, layer.columns, v.expand(n, -1)).reshape(shape)
                for base, v in zip(layer.base, lines, strict=True)
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

    def constraint(self, state: State, node: Node) -> tuple[Tensor, Tensor] | None:
        """Σ multiplier·side·(v − point) over the splits of this node's operand."""
        layer = self.problem.layers.get(node.name)
        where = self.domains.where
        if layer is None or not where.shape[1]:
            return None
        here = (where >= layer.span.start) & (where < layer.span.stop)
        local = torch.where(here, where - layer.span.start, 0)
        m = torch.where(here, self.multiplier * self.sign, 0.0)
        z = layer.z[local]
        constant = (m * (z - self.at)).sum(1)
        if state.rigorous:
            size = (m.abs() * (z.abs() + self.at.abs())).sum(1)
            constant = constant + state.gamma(where.shape[1] + 4) * size
        columns = layer.columns[local]
        dense = m.new_zeros(len(m), state.env[node.operands[0]][0].numel())
        dense = dense.scatter_add(1, columns, m)
        return dense.reshape(len(m), 1, *state.env[node.operands[0]].shape[1:]), constant.unsqueeze(
            1
        )
