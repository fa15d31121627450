"""The op table: every op described once, read by every method.

``OPS[op]`` is one of the four kinds. Register an op of your own with `register`, a nondecreasing function in one line:
``register(torch.ops.aten.asinh.default, monotone(torch.asinh))``, under the name that the graph has for it (`calipers
inspect`); the contract test in ``tests/test_ops.py`` shows what an entry must satisfy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
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
from calipers.ops.kinds import Tuned as Tuned
from calipers.ops.piecewise import monotone as monotone

OPS: dict[Callable[..., Any], Kind] = {
    **AFFINE,
    **ACTIVATIONS,
    **EXTREMA,
    torch.mul: Bilinear(AFFINE[torch.mul]),
}


_KNOWN: WeakKeyDictionary[Graph, Facts] = WeakKeyDictionary()


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


@dataclass(frozen=True)
class Step:
    """An active node as bounds read it.

    Args:
        perturbed: the numbers of the operands that depend on the input.
        reads: their names.
        places: where they stand among the node's arguments; None where one is in a list.
    """

    node: Node
    kind: Kind | None
    perturbed: tuple[int, ...]
    reads: tuple[str, ...]
    places: tuple[int, ...] | None = None


@dataclass(frozen=True, eq=False)
class Facts:
    """What the table says about one graph, for as long as no op is registered.

    Args:
        steps: every active node in order.
        fixed: the other nodes.
        kinds: of every active node, by name.
        unsupported: the nodes that bounds cannot read.
        tail: the active values from which only affine ops lead to the output.
        kept: the tail, and what it reads; with the input and the output, all that interval bounds need to keep.
    """

    steps: tuple[Step, ...]
    fixed: tuple[Node, ...]
    kinds: Mapping[str, Kind | None]
    unsupported: tuple[Node, ...]
    tail: frozenset[str]
    kept: frozenset[str]

    @cached_property
    def exactness(self) -> dict[str, str]:
        """How good interval bounds are at each active value but the input, for a box region: "free" (elements vary
        independently), "exact" (each element's range is exact), or "loose"."""
        status: dict[str, str] = {}
        for step in self.steps:
            kind, sources = step.kind, [status.get(name, "free") for name in step.reads]
            simple = isinstance(kind, Activation) or (isinstance(kind, Affine) and kind.separable)
            if len(sources) > 1:
                status[step.node.name] = "loose"
            elif simple:
                status[step.node.name] = sources[0]
            else:
                status[step.node.name] = "exact" if sources[0] == "free" else "loose"
        return status


def _step(graph: Graph, node: Node) -> Step:
    perturbed = tuple(i for i, name in enumerate(node.operands) if name in graph.active)
    reads = tuple(node.operands[i] for i in perturbed)
    places = tuple(i for i, name in node.slots if name in graph.active)
    whole = len(places) == len(reads)
    return Step(node, kind_of(graph, node), perturbed, reads, places if whole else None)


def facts(graph: Graph) -> Facts:
    """Looked up once per graph (and again after `register`)."""
    known = _KNOWN.get(graph)
    if known is None:
        active = graph.active
        steps = tuple(_step(graph, node) for node in graph.nodes if node.name in active)
        fixed = tuple(node for node in graph.nodes if node.name not in active)
        kinds = {step.node.name: step.kind for step in steps}
        missing = tuple(graph.node[name] for name, kind in kinds.items() if kind is None)
        tail: set[str] = set()
        wanted = {graph.output}
        for node in reversed(graph.nodes):
            if node.name in wanted and isinstance(kinds.get(node.name), Affine):
                tail.add(node.name)
                wanted |= set(node.operands) & active
        kept = frozenset(wanted | set(graph.inputs))
        known = _KNOWN[graph] = Facts(steps, fixed, kinds, missing, frozenset(tail), kept)
    return known
