"""What a network is made of, what each method can read of it, and where its numbers are delicate."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from calipers.graph import primitives as prim
from calipers.graph.graph import Graph, Network, Node, Ref, bind, evaluate

METHODS = ("attack", "bounds")
MAX_RATIO, MAX_WEIGHT, MAX_GAP = 1e8, 1e6, 1e-3


@dataclass(frozen=True)
class Layer:
    """One node of the graph. ``shape`` is its output's, without the batch; ``parameters`` are those it reads first."""

    name: str
    op: str
    path: str
    shape: tuple[int, ...]
    parameters: int


@dataclass(frozen=True)
class Inspection:
    """The facts about a network.

    Args:
        parameters: numbers the output depends on; running statistics do not count.
        relu_neurons: outputs of all ReLU nodes, per example.
        operators: op name -> how many nodes.
        support: method -> "yes", or the ops that the method cannot read and where they are.
        warnings: what may make float32 results, or tolerances, misleading.
    """

    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    layers: tuple[Layer, ...]
    parameters: int
    relu_neurons: int
    operators: Mapping[str, int]
    support: Mapping[str, str]
    warnings: tuple[str, ...]

    def lines(self) -> list[str]:
        """A plain table, one string per line."""
        rows = [
            ("name", "op", "path", "output", "parameters"),
            *((x.name, x.op, x.path, _shape(x.shape), f"{x.parameters:,}") for x in self.layers),
        ]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        table = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ]
        counts = ", ".join(f"{name} {count}" for name, count in self.operators.items())
        return [
            *table,
            "",
            f"input         {_shape(self.input_shape)}",
            f"output        {_shape(self.output_shape)}",
            f"parameters    {self.parameters:,}",
            f"ReLU neurons  {self.relu_neurons:,}",
            f"operators     {counts}",
            *(f"{method:<12}  {answer}" for method, answer in self.support.items()),
            *(f"warning       {text}" for text in self.warnings),
        ]


def inspect(network: Network) -> Inspection:
    """The layers, counts, support per method and numerical warnings of a network.

    Nothing of the network is changed; layers count as being in evaluation mode.
    Cost: two forward passes on 16 examples.
    """
    graph = network.graph
    env = _evaluating(network, None)
    layers = _layers(graph, env)
    relus = (
        math.prod(n.shape) for n in graph.nodes if n.op is torch.relu and n.name in graph.active
    )
    output = graph.node.get(graph.output)
    return Inspection(
        input_shape=tuple(network.input_shape),
        output_shape=output.shape if output else tuple(network.input_shape),
        layers=layers,
        parameters=sum(layer.parameters for layer in layers),
        relu_neurons=sum(relus),
        operators=dict(Counter(layer.op for layer in layers).most_common()),
        support=_support(graph),
        warnings=(*_ranges(graph, env), *_gap(network, env)),
    )


def render(inspection: Inspection) -> str:
    """`Inspection.lines` as one string."""
    return "\n".join(inspection.lines())


def _shape(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "scalar"


def _op(node: Node) -> str:
    if isinstance(node.op, torch._ops.OpOverload):  # noqa: SLF001 - an operator that kept its ATen name
        return str(node.op)
    return str(getattr(node.op, "__name__", node.op)).rstrip("_")


def _evaluating(network: Network, dtype: torch.dtype | None) -> dict[str, Any]:
    """The network's values with every layer in evaluation mode; the module itself stays as it is."""
    env = bind(network.graph, network.module, dtype=dtype)
    return {name: False if isinstance(value, bool) else value for name, value in env.items()}


def _layers(graph: Graph, env: Mapping[str, Any]) -> tuple[Layer, ...]:
    seen: set[str] = set()
    layers = []
    for node in graph.nodes:
        skipped = node.args[3:5] if node.op is prim.batch_norm else ()
        statistics = {arg.name for arg in skipped if isinstance(arg, Ref)}
        count = 0
        for name in node.operands:
            value = env.get(name)
            if name in seen or name in statistics or not isinstance(value, Tensor):
                continue
            seen.add(name)
            count += value.numel() if value.is_floating_point() else 0
        layers.append(Layer(node.name, _op(node), node.path, node.shape, count))
    return tuple(layers)


def _support(graph: Graph) -> dict[str, str]:
    """Attacks run whatever evaluates; the bounds need an entry of the op table for every active node."""
    from calipers.ops import facts

    missing = Counter(
        f"{_op(node)} (in {node.path!r})" if node.path else _op(node)
        for node in facts(graph).unsupported
    )
    names = ", ".join(f"{k} x{n}" if n > 1 else k for k, n in missing.items())
    bounds = f"no: {names}" if names else "yes"
    return {method: "yes" if method == "attack" else bounds for method in METHODS}


# -- warnings --------------------------------------------------------------------------------------------


def _ranges(graph: Graph, env: Mapping[str, Any]) -> list[str]:
    found = []
    for value, tensor in env.items():
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point() or not tensor.numel():
            continue
        name = graph.params.get(value, value)
        if tensor.dtype in (torch.float16, torch.bfloat16):
            found.append(f"{name}: stored as {str(tensor.dtype).removeprefix('torch.')}")
        size = tensor.detach().abs().double()
        largest = float(size.max())
        if not largest <= MAX_WEIGHT:
            found.append(
                f"{name}: values up to {largest:.3g}; float32 loses small changes beside them"
            )
        nonzero = size[size > 0]
        ratio = largest / float(nonzero.min()) if len(nonzero) else 1.0
        if not ratio <= MAX_RATIO:
            found.append(f"{name}: largest over smallest nonzero value is {ratio:.3g}")
    return found


def _gap(network: Network, env: Mapping[str, Any]) -> list[str]:
    """Float32 against float64 on 16 random inputs in [0, 1]."""
    dtype = network.dtype
    if dtype == torch.float64:
        return []
    seed = torch.Generator().manual_seed(0)
    x = torch.rand(16, *network.input_shape, generator=seed, dtype=torch.float64)
    x = x.to(network.device).to(dtype)
    with torch.no_grad():
        y = evaluate(network.graph, env, x).double()
        exact = evaluate(network.graph, _evaluating(network, torch.float64), x.double())
    gap = float((y - exact).abs().max() / exact.abs().max().clamp_min(torch.finfo(dtype).tiny))
    if gap <= MAX_GAP:
        return []
    name = str(dtype).removeprefix("torch.")
    return [
        f"{name} and float64 outputs differ by {gap:.3g} of the largest; verdicts near 0 mean little"
    ]
