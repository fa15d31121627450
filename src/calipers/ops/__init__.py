"""The op table: every op described once, read by every method.

``OPS[op]`` is one of the four kinds. Register an op of your own with `register`; the contract test in
``tests/test_ops.py`` shows what an entry must satisfy.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch

from calipers.graph.graph import Graph, Node
from calipers.ops.activations import ACTIVATIONS
from calipers.ops.affine import AFFINE
from calipers.ops.extremum import EXTREMA
from calipers.ops.kinds import Activation as Activation
from calipers.ops.kinds import Affine as Affine
from calipers.ops.kinds import Bilinear as Bilinear
from calipers.ops.kinds import Extremum as Extremum
from calipers.ops.kinds import Kind as Kind
from calipers.ops.kinds import Lines as Lines

OPS: dict[Callable[..., Any], Kind] = {
    **AFFINE,
    **ACTIVATIONS,
    **EXTREMA,
    torch.mul: Bilinear(AFFINE[torch.mul]),
}


_KNOWN: WeakKeyDictionary[Graph, dict[str, Kind | None]] = WeakKeyDictionary()


def register(op: Callable[..., Any], kind: Kind) -> None:
    """Add or replace the description of ``op``."""
    OPS[op] = kind
    _KNOWN.clear()


def kind_of(graph: Graph, node: Node) -> Kind | None:
    """The kind that ``node`` has in its graph, or None if no method but evaluation can read it.

    A product counts as affine while one factor is constant; an op whose parameters are themselves
    perturbed (a linear layer with computed weights) has no kind.
    """
    kind = OPS.get(node.op)
    perturbed = [i for i, name in enumerate(node.operands) if name in graph.active]
    if isinstance(kind, Bilinear):
        return kind if len(perturbed) > 1 else kind.affine
    if isinstance(kind, Affine):
        fits = {"first": perturbed == [0], "one": len(perturbed) == 1, "any": True}
        return kind if fits[kind.perturbed] else None
    return kind if perturbed == [0] else None


def kinds(graph: Graph) -> dict[str, Kind | None]:
    """The kind of every active node by name, looked up once per graph."""
    known = _KNOWN.get(graph)
    if known is None:
        known = {n.name: kind_of(graph, n) for n in graph.nodes if n.name in graph.active}
        _KNOWN[graph] = known
    return known


def unsupported(graph: Graph) -> list[Node]:
    """The nodes that bounds cannot read."""
    return [graph.node[name] for name, kind in kinds(graph).items() if kind is None]
