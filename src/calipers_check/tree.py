"""A tree's arrays, checked: whatever passes here is a binary tree with rules and rows of the right sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from calipers_check.errors import Refused
from calipers_check.layers import Array, Network

MAX_NODES = 20_000_000
ROWS_EACH = 10  # for each clause of a tree, and ten times more, at one node
INTEGERS, NUMBERS, SHARES = "iu", "f", "fu"
NODES = {"layer": 0, "element": 0, "point": 0, "bounds": 3, "proof": 2, "trim": 1}
ROWS = (
    "column.layer",
    "column.element",
    "bound.node",
    "bound.layer",
    "bound.element",
    "bound.side",
    "bound.choice",
)
LINES = ("line.node", "line.clause", "line.choice", "choice", "multiplier", "weight")
NAMES = {"child", *NODES, *ROWS, *LINES}


class Columns(NamedTuple):
    """Elements that have line numbers: for each activation their positions, and the number of columns before it."""

    elements: dict[int, Array]
    before: Array  # (activations + 1,)


class Tree:
    """One tree of a certificate.

    Args:
        arrays: its own, by the names of docs/certificates.md.
        clauses: the numbers of the clauses that it is to prove.
        counts: how many functionals each clause of the property has.
        columns: of the tree whose root it shares.
    """

    def __init__(
        self,
        arrays: Mapping[str, Array],
        network: Network,
        clauses: Sequence[int],
        counts: Sequence[int],
        columns: Columns | None,
    ) -> None:
        self.arrays, self.network = arrays, network
        self.clauses = clauses
        self.steps = np.array(network.activations, dtype=np.int64)
        widths = [network.sizes[network.steps[k].sources[0]] for k in network.activations]
        self.widths = np.array([*widths, network.inputs], dtype=np.int64)  # the last is for −1
        self._nodes()
        if columns is not None and {"column.layer", "column.element"} & set(arrays):
            raise Refused("a tree with a root of another has columns of its own")
        self.columns = self._columns() if columns is None else columns
        self._bound_rows()
        self._line_rows(counts)

    def __len__(self) -> int:
        return len(self.child)

    def array(self, name: str, kinds: str, size: int | None = None, dimensions: int = 1) -> Array:
        """An array as float64 or int64, empty where there is none, after the checks that all arrays pass."""
        found = self.arrays.get(name)
        if found is None:
            found = np.zeros((0,) * dimensions, dtype=np.int64 if kinds == INTEGERS else np.float64)
        if found.dtype.kind not in kinds or found.ndim != dimensions:
            raise Refused(f"array {name}: wrong type or number of dimensions")
        if size is not None and len(found) != size:
            raise Refused(f"array {name}: {len(found)} entries; expected {size}")
        if found.dtype.kind == "f" and not np.isfinite(found).all():
            raise Refused(f"array {name}: a number is not finite")
        return found.astype(np.int64) if kinds == INTEGERS else found

    def ranged(self, name: str, low: int, high: int | Array, size: int | None = None) -> Array:
        """Integers from ``low`` up to, and without, ``high``."""
        found = self.array(name, INTEGERS, size)
        if ((found < low) | (found >= high)).any():
            raise Refused(f"array {name}: an entry is out of range")
        return found

    # -- nodes ------------------------------------------------------------------------------------------------------

    def _nodes(self) -> None:
        child = self.array("child", INTEGERS)
        child = child if len(child) else np.zeros(1, dtype=np.int64)
        n = len(child)
        if n > MAX_NODES:
            raise Refused(f"{n} nodes; at most {MAX_NODES} are checked")
        parents = np.flatnonzero(child)
        pairs = child[parents]
        ordered = n % 2 == 1 and bool((pairs > parents).all())
        if not ordered or not np.array_equal(np.sort(pairs), np.arange(1, n, 2)):
            raise Refused("array child: not a tree in which children follow their parents in pairs")
        self.child, self.parent = child, np.zeros(n, dtype=np.int64)
        self.parent[pairs] = self.parent[pairs + 1] = parents
        self.layer, self.element, self.point, self.bounds, self.proof, self.trim = (
            self._per_node(name, most, n) for name, most in NODES.items()
        )
        self._check_splits(parents)
        # how many splits of neurons lie above each node, by doubling the stride
        self.depth = np.where(np.arange(n) > 0, self.layer[self.parent] >= 0, 0).astype(np.int64)
        above = self.parent
        while above.any():
            self.depth = self.depth + self.depth[above]
            above = above[above]

    def _per_node(self, name: str, most: int, n: int) -> Array:
        found = self.array(name, NUMBERS if name == "point" else INTEGERS)
        if not len(found):
            found = np.zeros(1, dtype=found.dtype)
        if len(found) not in (1, n):
            raise Refused(f"array {name}: {len(found)} entries for {n} nodes")
        if most and ((found < 0) | (found > most)).any():
            raise Refused(f"array {name}: a rule that does not exist")
        found = found.astype(np.float64) if name == "point" else found
        return np.broadcast_to(found, n)

    def _check_splits(self, parents: Array) -> None:
        layer, element = self.layer[parents], self.element[parents]
        if ((layer < -1) | (layer >= len(self.steps))).any():
            raise Refused("array layer: no such activation")
        if ((element < 0) | (element >= self.widths[layer])).any():
            raise Refused("array element: no such element")

    # -- rows -------------------------------------------------------------------------------------------------------

    def _columns(self) -> Columns:
        layer = self.ranged("column.layer", 0, len(self.steps))
        element = self.ranged("column.element", 0, self.widths[layer], len(layer))
        ordered = (np.diff(layer) > 0) | ((np.diff(layer) == 0) & (np.diff(element) > 0))
        if not ordered.all():
            raise Refused("array column.element: columns are not in order")
        before = np.searchsorted(layer, np.arange(len(self.steps) + 1))
        elements = {int(a): element[before[a] : before[a + 1]] for a in np.unique(layer)}
        return Columns(elements, before)

    def _shares(self, name: str, size: int | None = None, dimensions: int = 1) -> Array:
        found = self.array(name, SHARES, size, dimensions)
        if found.dtype.kind == "u" and found.dtype.itemsize > 1:
            raise Refused(f"array {name}: wrong type")
        if found.dtype.kind == "f" and ((found < 0) | (found > 1)).any():
            raise Refused(f"array {name}: a line number outside of [0, 1]")
        return found

    def _bound_rows(self) -> None:
        node = self.ranged("bound.node", 0, len(self))
        size = len(node)
        layer = self.ranged("bound.layer", 0, len(self.steps), size)
        element = self.ranged("bound.element", 0, self.widths[layer], size)
        side = self.ranged("bound.side", 0, 2, size)
        if (np.diff(node) < 0).any() or (self.bounds[node] != 3).any():
            raise Refused("array bound.node: out of order, or a node whose rule has no rows")
        start = np.concatenate([[0], np.cumsum(self.columns.before[layer])])
        self.bound_node, self.bound_layer, self.bound_element = node, layer, element
        self.bound_sign, self.bound_start = 1.0 - 2.0 * side, start
        self.bound_choice = self._shares("bound.choice", int(start[-1]))

    def _line_rows(self, counts: Sequence[int]) -> None:
        node = self.ranged("line.node", 0, len(self))
        size = len(node)
        clause = self.array("line.clause", INTEGERS, size)
        if (np.diff(node) < 0).any():
            raise Refused("array line.node: out of order")
        if np.bincount(node, minlength=1).max() > ROWS_EACH * (10 + len(self.clauses)):
            raise Refused("array line.node: too many rows of one node")
        if not np.isin(clause, [-1, *self.clauses]).all():
            raise Refused("array line.clause: a clause that is not the tree's")
        self.choice = self._shares("choice", dimensions=2)
        columns = int(self.columns.before[-1])
        if len(self.choice) and self.choice.shape[1] != columns:
            raise Refused(f"array choice: {self.choice.shape[1]} columns; expected {columns}")
        self.line_choice = self.ranged("line.choice", -1, len(self.choice), size)
        self.line_node, self.line_clause = node, clause
        self.line_start = np.concatenate([[0], np.cumsum(self.depth[node])])
        self.multiplier = self._not_negative("multiplier", int(self.line_start[-1]))
        own = np.array([*counts, 0], dtype=np.int64)[clause]  # −1: no functional
        self.weight_start = np.concatenate([[0], np.cumsum(np.where(own > 1, own, 0))])
        self.weight: Any = self._not_negative("weight", int(self.weight_start[-1]))
        if self.weight is None and self.weight_start[-1]:
            raise Refused("array weight: missing")

    def _not_negative(self, name: str, size: int) -> Array | None:
        if name not in self.arrays:
            return None
        found = self.array(name, NUMBERS, size)
        if (found < 0).any():
            raise Refused(f"array {name}: a negative number")
        return found

    def shares(self, values: Array) -> Array:
        """Line numbers in float64."""
        return values / 255.0 if values.dtype.kind == "u" else values.astype(np.float64)
