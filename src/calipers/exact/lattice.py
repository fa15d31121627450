"""Maxima and minima that a network builds from ReLUs, as maxima: what `calipers_check.lattice` finds, as a graph."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F

from calipers.graph import primitives as prim
from calipers.graph.graph import Graph, Network, Node, Ref, bind
from calipers_check.lattice import FEW, Part, affine, fold
from calipers_check.table import Table


def with_maxima(network: Network) -> Network:
    """The same function with maxima in the place of ReLUs that build them; the network itself if there are none.

    Weights are added and multiplied only where that is exact in float64.
    """
    graph = network.graph
    values = bind(graph, network.module)
    if not any(_narrow(node, graph, values) for node in graph.nodes):
        return network
    size = {graph.inputs[0]: math.prod(network.input_shape)}
    parts = fold([_part(node, graph, values) for node in graph.nodes], size)
    if parts is None:
        return network
    nodes: list[Node] = []
    constants: dict[str, Any] = {}
    for part in parts:
        size[part.name] = part.size
        old = graph.node.get(part.name)
        if old is not None:
            nodes.append(_renamed(old, dict(zip(old.operands, part.sources, strict=True))))
        elif part.windows is not None:
            _largest(part, part.windows, nodes, constants)
        elif part.rows is not None:
            _rows(part, part.rows, size[part.sources[0]], nodes, constants)
    last = Node(
        ":output", prim.identity, (Ref(nodes[-1].name),), {}, graph.node[graph.output].shape
    )
    here = {name: value.to(network.device) for name, value in constants.items()}
    made = Graph((*nodes, last), graph.params, graph.inputs, last.name, {**graph.constants, **here})
    return replace(network, graph=made)


def _narrow(node: Node, graph: Graph, values: Mapping[str, Any]) -> bool:
    """Whether this is a linear layer of few ReLUs in each row: what the rest is worth looking at for."""
    if node.op is not F.linear or node.operands[0] not in graph.node:
        return False
    weight = values.get(node.operands[1])
    return (
        graph.node[node.operands[0]].op is torch.relu
        and weight is not None
        and int((weight[:1] != 0).sum()) <= FEW
        and int((weight != 0).sum(1).max()) <= FEW
    )


def _part(node: Node, graph: Graph, values: Mapping[str, Any]) -> Part:
    size, flat = math.prod(node.shape), len(node.shape) == 1
    rows = None
    if (
        node.op is F.linear
        and flat
        and not node.kwargs
        and node.operands[0] in graph.active
        and all(name in values for name in node.operands[1:])
    ):
        weight, *bias = (_array(v) for v in node.fill({**values, node.operands[0]: None})[1:])
        rows = Table.of(weight)
        rows = affine(
            replace(rows, value=rows.value.astype("f8")), weight.shape[1], *(bias or [None])
        )
    return Part(node.name, node.operands, size, rows, relu=node.op is torch.relu and flat)


def _array(value: Any) -> Any:
    if value is None:
        return None
    return value.detach().cpu().to(torch.promote_types(value.dtype, torch.float32)).numpy()


def _rows(
    part: Part, rows: Table, width: int, nodes: list[Node], constants: dict[str, Any]
) -> None:
    """A linear layer."""
    dense = torch.from_numpy(rows.dense(width + 1))
    weight, bias = f"{part.name}:weight", f"{part.name}:bias"
    constants |= {weight: dense[:, :-1].contiguous(), bias: dense[:, -1].contiguous()}
    args = (Ref(part.sources[0]), Ref(weight), Ref(bias))
    nodes.append(Node(part.name, F.linear, args, {}, (part.size,)))


def _largest(part: Part, windows: Any, nodes: list[Node], constants: dict[str, Any]) -> None:
    """The windows' elements side by side, and their maxima."""
    index, picked, shaped = [f"{part.name}:{w}" for w in ("windows", "picked", "shaped")]
    constants[index] = torch.from_numpy(windows.flatten())
    shape = windows.shape
    elements = (Ref(part.sources[0]), 1, Ref(index))
    nodes += [
        Node(picked, torch.index_select, elements, {}, (windows.size,)),
        Node(shaped, prim.reshape, (Ref(picked), shape), {}, shape),
        Node(part.name, prim.maximum, (Ref(shaped), (2,), False), {}, (part.size,)),
    ]


def _renamed(node: Node, place: Mapping[str, str]) -> Node:
    def visit(item: Any) -> Any:
        if isinstance(item, Ref):
            return Ref(place.get(item.name, item.name))
        return type(item)(map(visit, item)) if type(item) in (list, tuple) else item

    return replace(
        node, args=visit(node.args), kwargs={k: visit(v) for k, v in node.kwargs.items()}
    )
