"""Maxima and minima that a network builds from ReLUs, as maxima.

A row p·x + v·ReLU(q·x) is the larger (v > 0) or smaller of p·x and (p + v·q)·x, and a tournament of such rows is one
maximum over all that it compares. Lattice networks, which are maxima of minima of affine functions, become that again:
bounds see what cancels, and a few comparisons in the place of thousands of ReLUs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from calipers.bounds.sparse import Array, Sparse
from calipers.graph import primitives as prim
from calipers.graph.graph import Graph, Network, Node, Ref, bind

FEW = 16  # ReLUs that a row may read: two pairs of opposite ones, and the same again, are usual
EXACT = 2.0**53  # multiples of a unit up to so many of it are float64 numbers


def with_maxima(network: Network) -> Network:
    """The same function with maxima in the place of ReLUs that build them; the network itself if there are none.

    Weights are added and multiplied only where that is exact in float64.
    """
    graph = network.graph
    values = bind(graph, network.module)
    if not any(_narrow(node, graph, values) for node in graph.nodes):
        return network
    rewriting = _Rewriting(network, values)
    for node in graph.nodes:
        rewriting.take(node)
    if not rewriting.maxima:
        return network
    rewriting.emit(graph.output)
    output = Node(
        ":output",
        prim.identity,
        (Ref(rewriting.place[graph.output]),),
        {},
        graph.node[graph.output].shape,
    )
    nodes, constants = (*rewriting.nodes, output), {**graph.constants, **rewriting.constants}
    return replace(network, graph=Graph(nodes, graph.params, graph.inputs, output.name, constants))


def _narrow(node: Node, graph: Graph, values: Mapping[str, Any]) -> bool:
    """Whether this is a linear layer of few ReLUs in each row."""
    if not _linear(node) or node.operands[0] not in graph.node:
        return False
    weight = values.get(node.operands[1])
    return (
        graph.node[node.operands[0]].op is torch.relu
        and weight is not None
        and int((weight != 0).sum(1).max()) <= FEW
    )


def _linear(node: Node) -> bool:
    return node.op is F.linear and not node.kwargs and len(node.shape) == 1


class _Rows(NamedTuple):
    """Affine rows over the value ``base`` of ``width`` elements; the last column, number ``width``, is the constant."""

    base: str
    width: int
    table: Sparse


class _Maximum(NamedTuple):
    """Of rows ``elements``, over the windows (n, k) of their numbers."""

    elements: _Rows
    windows: Array


@dataclass(eq=False)
class _Rewriting:
    """The graph so far.

    Args:
        rows: what values are affine in.
        maxima: values that are maxima, by name.
        place: which node holds a value.
    """

    network: Network
    values: Mapping[str, Any]
    rows: dict[str, _Rows] = field(default_factory=dict)
    maxima: dict[str, _Maximum] = field(default_factory=dict)
    place: dict[str, str] = field(default_factory=dict)
    nodes: list[Node] = field(default_factory=list)
    constants: dict[str, torch.Tensor] = field(default_factory=dict)
    relu: set[str] = field(default_factory=set)

    def take(self, node: Node) -> None:
        """Read one node of the network."""
        if node.op is torch.relu and len(node.shape) == 1:
            self.relu.add(node.name)  # until somebody needs it
        elif self._known(node):
            self.rows[node.name] = self._through(node)
        else:
            self._keep(node)

    def _known(self, node: Node) -> bool:
        """Whether it is a linear layer of a value, with weights at hand."""
        return (
            _linear(node)
            and node.operands[0] in self.network.graph.active
            and all(name in self.values for name in node.operands[1:])
        )

    def _through(self, node: Node) -> _Rows:
        source, weight = node.operands[0], self._table(node)
        if source in self.relu and (found := self._compared(source, weight, node)) is not None:
            return found
        if source not in self.relu:
            rows = self._over(source)
            table = _product(weight, _homogeneous(rows))
            if table is not None:
                return rows._replace(table=table)
        self._keep(node)
        return self._own(node.name)

    def _compared(self, relu: str, weight: Sparse, node: Node) -> _Rows | None:
        """The rows of a linear layer after ReLUs, as maxima of two rows each up to sign; None if they are not."""
        rows = self._over(self.network.graph.node[relu].operands[0])
        head, opposite = _families(rows.table)
        inputs = np.flatnonzero(head >= 0)
        # ReLU(−z) = ReLU(z) − z
        bent = _product(weight, Sparse.units(np.append(head, -1)))
        past = _product(
            weight,
            Sparse(inputs[opposite], head[opposite], -np.ones(int(opposite.sum())), len(head) + 1),
        )
        if bent is None or past is None:
            return None
        bent = _nonzero(bent)
        if len(bent.row) != len(np.unique(bent.row)):
            return None
        sign = np.ones(node.shape[0])
        sign[bent.row] = np.sign(bent.value)
        constant = Sparse.units(np.where(np.arange(len(head) + 1) == len(head), rows.width, -1))
        first = _sum(_product(past, rows.table), _product(weight, constant))
        second = _sum(first, _product(bent, rows.table))
        if first is None or second is None:
            return None
        both = Sparse.stack([_scaled(first, sign), _scaled(second, sign)])
        count = len(sign)
        pairs = np.stack([np.arange(count), count + np.arange(count)], 1)
        self.maxima[node.name] = self._joined(rows._replace(table=both), pairs)
        turned = Sparse(np.arange(count), np.arange(count), sign, count)
        return _Rows(node.name, count, turned)

    def _joined(self, elements: _Rows, windows: Array) -> _Maximum:
        """The maximum, of what its elements are maxima of if they all are."""
        table, known = _nonzero(elements.table), self.maxima.get(elements.base)
        unit = len(table.row) == table.rows == len(np.unique(table.row)) and bool(
            (table.value == 1).all()
        )
        if known is not None and unit and bool((table.column < elements.width).all()):
            elements, windows = (
                known.elements,
                known.windows[table.column][windows].reshape(len(windows), -1),
            )
            table = elements.table
        head, opposite = _families(table)
        keys, number = np.unique(2 * head + opposite, return_inverse=True)
        place = np.zeros(len(keys), int)
        place[number[::-1]] = np.arange(len(number))[::-1]
        windows = np.sort(number[windows], 1)
        windows = np.where(np.diff(windows, axis=1, prepend=-1) > 0, windows, windows[:, :1])
        windows = np.sort(windows, 1)
        repeats = int((windows == windows[:, :1]).sum(1).min()) - 1
        return _Maximum(elements._replace(table=table.take(place)), windows[:, repeats:])

    # -- values as rows, and rows as nodes ------------------------------------------------------------------------

    def _over(self, name: str) -> _Rows:
        if name not in self.rows:
            self.emit(name)
            return self._own(name)
        return self.rows[name]

    def _own(self, name: str) -> _Rows:
        graph = self.network.graph
        shape = graph.node[name].shape if name in graph.node else self.network.input_shape
        (count,) = shape
        self.rows[name] = _Rows(name, count, Sparse.units(np.arange(count)))
        return self.rows[name]

    def _table(self, node: Node) -> Sparse:
        weight, *bias = node.fill({**self.values, node.operands[0]: None})[1:]
        constant = bias[0] if bias and bias[0] is not None else weight.new_zeros(len(weight))
        return Sparse.of(torch.cat([weight, constant.unsqueeze(1)], 1).double())

    def _keep(self, node: Node) -> None:
        for name in node.operands:
            self.emit(name)
        self.place[node.name] = node.name
        self.nodes.append(_renamed(node, self.place))

    def emit(self, name: str) -> None:
        """Have a node that holds the value ``name``, in ``place``."""
        graph = self.network.graph
        if name in self.place or name not in graph.node:
            self.place.setdefault(name, name)
        elif name in self.relu:
            self._keep(graph.node[name])
        else:
            self.place[name] = self._linear_node(name, self.rows[name])

    def _linear_node(self, name: str, rows: _Rows) -> str:
        base = self._maximum_node(rows.base) if rows.base in self.maxima else rows.base
        dense = torch.from_numpy(rows.table.dense(rows.width + 1))
        weight, bias = f"{name}:weight", f"{name}:bias"
        self.constants |= {weight: dense[:, :-1].contiguous(), bias: dense[:, -1].contiguous()}
        return self._node(
            f"{name}:rows", F.linear, (Ref(base), Ref(weight), Ref(bias)), (len(dense),)
        )

    def _maximum_node(self, name: str) -> str:
        if (done := f"{name}:largest") in self.place:
            return done
        maximum = self.maxima[name]
        elements = self._linear_node(f"{name}:compared", maximum.elements)
        count, k = maximum.windows.shape
        windows = f"{name}:windows"
        self.constants[windows] = torch.from_numpy(maximum.windows.flatten())
        picked = self._node(
            f"{name}:picked", torch.index_select, (Ref(elements), 1, Ref(windows)), (count * k,)
        )
        shaped = self._node(f"{name}:shaped", prim.reshape, (Ref(picked), (count, k)), (count, k))
        self.place[done] = self._node(done, prim.maximum, (Ref(shaped), (2,), False), (count,))
        return done

    def _node(self, name: str, op: Any, args: tuple[Any, ...], shape: tuple[int, ...]) -> str:
        self.nodes.append(Node(name, op, args, {}, shape))
        return name


def _renamed(node: Node, place: Mapping[str, str]) -> Node:
    def visit(item: Any) -> Any:
        if isinstance(item, Ref):
            return Ref(place.get(item.name, item.name))
        return type(item)(map(visit, item)) if type(item) in (list, tuple) else item

    return replace(
        node, args=visit(node.args), kwargs={k: visit(v) for k, v in node.kwargs.items()}
    )


# -- exact sums -------------------------------------------------------------------------------------------------------


def _homogeneous(rows: _Rows) -> Sparse:
    """With one more row, for the constant."""
    return Sparse.stack([rows.table, Sparse.units(np.array([rows.width]))])


def _product(left: Sparse, right: Sparse) -> Sparse | None:
    """Where it is exact."""
    terms = max(np.bincount(left.row, minlength=1).max(), 1)
    return left @ right if _quanta(left.value) * _quanta(right.value) * terms <= EXACT else None


def _sum(left: Sparse | None, right: Sparse | None) -> Sparse | None:
    if left is None or right is None:
        return None
    exact = 2 * _quanta(np.concatenate([left.value, right.value])) <= EXACT
    return Sparse.total([left, right]) if exact else None


def _scaled(table: Sparse, factors: Array) -> Sparse:
    return Sparse(table.row, table.column, table.value * factors[table.row], table.rows)


def _nonzero(table: Sparse) -> Sparse:
    keep = table.value != 0
    return Sparse(table.row[keep], table.column[keep], table.value[keep], table.rows)


def _quanta(numbers: Array) -> float:
    """The largest of the numbers, in units of the largest power of two that all are multiples of; inf where one is not
    finite."""
    numbers = np.abs(numbers[numbers != 0])
    if not len(numbers):
        return 0.0
    if not np.isfinite(numbers).all():
        return math.inf
    mantissa, exponent = np.frexp(numbers)
    digits = (mantissa * EXACT).astype("i8")
    unit = (digits & -digits) * np.exp2(exponent - 53)
    return float(numbers.max() / unit.min())


def _families(table: Sparse) -> tuple[Array, Array]:
    """For each row the number of one that is equal to it up to sign, the same for all of them, and whether the signs
    differ. Rows are told apart exactly; sums with random weights only say which to compare."""
    table = _nonzero(table)
    weights = np.random.default_rng(0).random(int(table.column.max(initial=0)) + 1)
    sums = np.bincount(table.row, table.value * weights[table.column], table.rows)
    order = np.argsort(np.abs(sums), kind="stable")
    upright = np.where(sums < 0, -1.0, 1.0)
    ordered = _scaled(table.take(order), upright[order])
    later = _scaled(ordered.take(np.arange(1, table.rows)), -np.ones(table.rows))
    change = _nonzero(Sparse.total([ordered.take(np.arange(table.rows - 1)), later]))
    fresh = np.ones(table.rows, bool)
    fresh[1:] = np.bincount(change.row, minlength=table.rows - 1) > 0
    head = np.empty(table.rows, int)
    head[order] = order[fresh][np.cumsum(fresh) - 1]
    return head, upright != upright[head]
