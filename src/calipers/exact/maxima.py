"""Maxima as sums of ReLUs, which a search can split."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from calipers.graph import primitives as prim
from calipers.graph.graph import Graph, Network, Node, Ref
from calipers.ops import kind_of
from calipers.ops.kinds import Extremum


def without_maxima(network: Network) -> Network:
    """The same function as a graph without maxima; the network itself if it has none.

    The elements v₀ … v_{k−1} of a window play a tournament: with h = ⌊k/2⌋,

        v_i ← v_i + ReLU(v_{i+h} − v_i)   for i < h,

    and v_{2h}, if there is one, goes on beside them.
    """
    graph = network.graph
    kinds = {n.name: kind_of(graph, n) for n in graph.nodes if n.name in graph.active}
    if not any(isinstance(kind, Extremum) for kind in kinds.values()):
        return network
    nodes: list[Node] = []
    constants = dict(graph.constants)
    for node in graph.nodes:
        kind = kinds.get(node.name)
        if isinstance(kind, Extremum):
            (operand,) = node.operands
            known = graph.node.get(operand)
            shape = known.shape if known else network.input_shape
            nodes += _tournament(node, kind, shape, constants)
        else:
            nodes.append(node)
    return replace(
        network,
        graph=Graph(tuple(nodes), graph.params, graph.inputs, graph.output, constants),
    )


def _tournament(
    node: Node, kind: Extremum, shape: tuple[int, ...], constants: dict[str, Tensor]
) -> list[Node]:
    """The nodes in the place of ``node``, whose operand has ``shape``; its windows become constants."""
    windows = kind.windows(shape, *node.args[1:], **node.kwargs).reshape(math.prod(node.shape), -1)
    inside = windows >= 0
    first = windows.gather(1, inside.to(torch.int8).argmax(1, keepdim=True))
    windows = torch.where(inside, windows, first)  # an element again instead of padding
    nodes: list[Node] = []

    def add(op: Any, *args: Any, size: tuple[int, ...]) -> Ref:
        name = f"{node.name}:{len(nodes)}"
        nodes.append(Node(name, op, args, {}, size, node.path, node.source))
        return Ref(name)

    count, k = windows.shape
    constants[f"{node.name}:windows"] = windows.T.flatten()
    value = add(prim.reshape, Ref(node.operands[0]), (math.prod(shape),), size=(math.prod(shape),))
    value = add(torch.index_select, value, 1, Ref(f"{node.name}:windows"), size=(k * count,))
    while k > 1:
        half = k // 2
        size = (half * count,)
        cut = [half * i * count for i in (0, 1, 2)]
        left, right = (
            add(prim.slice_, value, 1, a, b, size=size) for a, b in itertools.pairwise(cut)
        )
        more = add(torch.add, right, add(torch.neg, left, size=size), size=size)
        larger = add(torch.add, left, add(torch.relu, more, size=size), size=size)
        if k % 2:
            rest = add(prim.slice_, value, 1, cut[2], k * count, size=(count,))
            larger = add(torch.cat, [larger, rest], 1, size=((half + 1) * count,))
        value, k = larger, k - half
    last = Node(
        node.name, prim.reshape, (value, node.shape), {}, node.shape, node.path, node.source
    )
    return [*nodes, last]
