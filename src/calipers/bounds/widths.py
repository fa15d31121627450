"""Where bounds widen: the intervals that each nonlinear layer reads, by interval propagation and by CROWN."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from calipers.bounds.interval import candidates
from calipers.bounds.ladder import INTERMEDIATE, preactivations
from calipers.graph.graph import Graph, Network, Node, bind, resolve
from calipers.ops import kind_of
from calipers.ops.kinds import Activation, Affine, Extremum
from calipers.sets import Interval, Region


@dataclass(frozen=True)
class Width:
    """What one rung knows of the values that a layer reads: means over examples and neurons, and the largest width.

    Args:
        unstable: the share of neurons that are not linear on their interval: a relaxation costs something there.
    """

    mean: float
    largest: float
    unstable: float


@dataclass(frozen=True)
class LayerWidths:
    """One nonlinear layer, or the output (``op`` is then empty).

    Args:
        name: the value that it reads.
        path: the module that the layer belongs to.
        neurons: per example; of a maximum, its windows.
        rungs: by name, loosest first.
    """

    name: str
    op: str
    path: str
    neurons: int
    rungs: Mapping[str, Width]


def layer_widths(
    network: Network,
    region: Region,
    *,
    dtype: torch.dtype | None = None,
    memory: int | None = None,
) -> tuple[LayerWidths, ...]:
    """Why a network cannot be certified, and where: a row per value that a nonlinear op reads, then the output.

    CROWN refines only what can bend; where a neuron is stable, and at the output, its width is one interval step from
    the layers before.

    Raises:
        UnsupportedOp, ValueError: as the bounds.

    Cost: CROWN's, without the functionals.
    """
    graph = network.graph
    with torch.no_grad():
        known = {
            rung: preactivations(network, region, tight=tight, dtype=dtype, memory=memory)
            for rung, tight in INTERMEDIATE.items()
        }
        env = bind(graph, network.module, dtype=dtype or network.dtype)
        rows = [
            _row(graph, env, node, name, known)
            for node in graph.nodes
            if node.name in graph.active and not isinstance(kind_of(graph, node), Affine)
            for name in dict.fromkeys(node.operands)
            if name in graph.active
        ]
    last = {rung: _width(boxes[graph.output]) for rung, boxes in known.items()}
    neurons = known["crown"][graph.output].lower[0].numel()
    return (*rows, LayerWidths(graph.output, "", "", neurons, last))


def _row(
    graph: Graph,
    env: Mapping[str, Any],
    node: Node,
    name: str,
    known: Mapping[str, Mapping[str, Interval]],
) -> LayerWidths:
    open_ = {rung: _unstable(graph, env, node, name, boxes) for rung, boxes in known.items()}
    rungs = {rung: _width(boxes[name], open_[rung]) for rung, boxes in known.items()}
    op = str(getattr(node.op, "__name__", node.op)).rstrip("_")
    return LayerWidths(name, op, node.path, open_["crown"][0].numel(), rungs)


def _width(box: Interval, unstable: Tensor | None = None) -> Width:
    size = (box.upper - box.lower).double()
    share = 0.0 if unstable is None else float(unstable.double().mean())
    return Width(float(size.mean()), float(size.max()), share)


def _unstable(
    graph: Graph, env: Mapping[str, Any], node: Node, name: str, boxes: Mapping[str, Interval]
) -> Tensor:
    """Of an activation, the neurons that are not linear; of a maximum, the windows with more than one candidate; of a
    product, the factors that vary."""
    kind, box = kind_of(graph, node), boxes[name]
    values = {**env, **{k: v.lower for k, v in boxes.items()}}
    args = node.fill(values)[1:]
    kwargs = {k: resolve(v, values) for k, v in node.kwargs.items()}
    if isinstance(kind, Activation):
        return ~kind.linear(box, *args, **kwargs)
    if isinstance(kind, Extremum):
        return candidates(kind, box, *args, **kwargs)[1].sum(-1) > 1
    return box.lower < box.upper
