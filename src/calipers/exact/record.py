"""What a search leaves behind, so that all that it proved can be proved again.

A search is given an empty `Record`, or none, and notes its tree and the numbers behind every bound that closed
something, as it goes. It notes what it has at hand and computes nothing for it. `calipers.exact.certificate` makes a
certificate of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from calipers.bounds.state import State, flat
from calipers.ops.kinds import Activation
from calipers.sets import Interval


def as_bytes(numbers: Tensor) -> Tensor:
    """Numbers in [0, 1] as the nearest 255ths."""
    return (numbers * 255).round_().to(torch.uint8)


class Rows(NamedTuple):
    """Rows that bound elements of the value ``name``, which an activation reads, over the whole region.

    Args:
        element: (R,) flat positions.
        side: 0, bounds from below, or 1, from above.
        bound: (R,) what they gave.
        numbers: (R, columns) uint8, line numbers in 255ths; 0 for columns behind ``name``.
    """

    name: str
    element: Tensor
    side: int
    bound: Tensor
    numbers: Tensor


class Proof(NamedTuple):
    """Closed sub-problems, one a row.

    Args:
        node: (n,).
        clause: (n,).
        weights: (n, members) of the clause's functionals, 0 beyond their number.
        numbers: (n, U) uint8, line numbers in 255ths of the elements that can be split.
        depth: (n,) how many splits the path has.
        multipliers: (n, D) of the path's splits, from the root down, 0 beyond their number.
    """

    node: Tensor
    clause: Tensor
    weights: Tensor
    numbers: Tensor
    depth: Tensor
    multipliers: Tensor


@dataclass(eq=False)
class Record:
    """A search over one region. Nodes are numbered in the order in which they were made, roots first.

    Args:
        clauses: of each root, the clauses that its tree is to prove.
        of_inputs: whether inputs are split, not the operands of activations.
        columns: activation -> flat positions of the elements that line numbers are stored for.
        elements: activation -> those of them that can be split, in the order of split numbers.
        rows: optimised intermediate bounds of the whole region.
        region: functionals proved over the whole region: functional -> line numbers of all columns.
        parent, element, point: of all nodes but the roots, in pairs of children, the one below the split's point first.
        renewed: nodes whose intervals were computed again.
        proofs: what closed the leaves.
        tried: nodes at which the planes of all functionals were computed.
    """

    clauses: list[list[int]] = field(default_factory=list)
    of_inputs: bool = False
    columns: dict[str, Tensor] = field(default_factory=dict)
    elements: dict[str, Tensor] = field(default_factory=dict)
    rows: list[Rows] = field(default_factory=list)
    region: dict[int, Tensor] = field(default_factory=dict)
    parent: list[Tensor] = field(default_factory=list)
    element: list[Tensor] = field(default_factory=list)
    point: list[Tensor] = field(default_factory=list)
    renewed: list[Tensor] = field(default_factory=list)
    proofs: list[Proof] = field(default_factory=list)
    tried: list[Tensor] = field(default_factory=list)
    count: int = 0

    def plant(self, clauses: Sequence[Sequence[int]]) -> Tensor:
        """The numbers of the roots."""
        self.clauses = [list(c) for c in clauses]
        self.count = len(clauses)
        return torch.arange(self.count)

    def split(self, node: Tensor, element: Tensor, point: Tensor) -> tuple[Tensor, Tensor]:
        """The numbers of the children of each ``node`` (n,), below and above."""
        self.parent.append(node)
        self.element.append(element)
        self.point.append(point.double())
        below = self.count + 2 * torch.arange(len(node))
        self.count += 2 * len(node)
        return below, below + 1

    def begin(self, state: State, low: Tensor) -> None:
        """Note the columns, and the default lines of the functionals (M,) that these prove."""
        numbers = {}
        for step in state.facts.steps:
            kind, name = step.kind, step.node.name
            if isinstance(kind, Activation) and kind.tuned is not None:
                args, _ = state.arguments(step.node)
                box = state.boxes[step.reads[0]]
                self.columns[name] = torch.nonzero(flat(~kind.linear(box, *args[1:]))[0]).flatten()
                numbers[name] = as_bytes(flat(kind.tuned.start(box, *args[1:])[0]))
        proved = torch.nonzero(low > 0).flatten()
        if len(proved):
            self.keep_region(proved, {k: v.expand(len(proved), -1) for k, v in numbers.items()})

    def keep_rows(
        self, name: str, element: Tensor, box: Interval, numbers: Mapping[str, Tensor]
    ) -> None:
        """Note rows of both sides: ``element`` (R,), their bounds, ``numbers`` (2R, elements) by activation."""
        table, count = self._table(numbers, 2 * len(element)), len(element)
        for side, bound in enumerate(box):
            own = table[side * count : (side + 1) * count]
            self.rows.append(Rows(name, element, side, bound, own))

    def keep_region(self, functionals: Tensor, numbers: Mapping[str, Tensor]) -> None:
        """Note lines of ``functionals`` (S,): ``numbers`` (S, elements) by activation."""
        table = self._table(numbers, len(functionals))
        self.region |= dict(zip(functionals.tolist(), table, strict=True))

    def _table(self, numbers: Mapping[str, Tensor], rows: int) -> Tensor:
        """``numbers`` (rows, elements) by activation, of all columns side by side."""
        parts = [
            numbers[name].index_select(1, column)
            if name in numbers
            else torch.zeros(rows, len(column), dtype=torch.uint8)
            for name, column in self.columns.items()
        ]
        return torch.cat(parts, 1) if parts else torch.zeros(rows, 0, dtype=torch.uint8)
