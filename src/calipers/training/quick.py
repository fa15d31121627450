"""The same graph with operators that are quicker for what attacks need: gradients of inputs, on a CPU."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor

from calipers.graph.graph import Graph, Node, Ref
from calipers.ops.affine import pull_back

FEW = 4  # input channels up to which the library's transposed convolution is several times slower than a product


class _Image(torch.autograd.Function):
    """A 2-D convolution whose backward pass goes to its input alone."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w: Tensor, b: Tensor | None, stride: Any, padding: Any, dilation: Any
    ) -> Tensor:
        ctx.save_for_backward(w)
        ctx.geometry = tuple(x.shape[2:]), stride, padding, dilation
        return torch.conv2d(x, w, b, stride, padding, dilation)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        (w,) = ctx.saved_tensors
        size, stride, padding, dilation = ctx.geometry
        sizes = zip(size, gradient.shape[2:], w.shape[2:], stride, padding, dilation, strict=True)
        extra = tuple(n - ((out - 1) * s - 2 * p + d * (k - 1) + 1) for n, out, k, s, p, d in sizes)
        back = pull_back(gradient, w, tuple(stride), tuple(padding), extra, tuple(dilation))
        return back, None, None, None, None, None


def image_convolution(
    x: Tensor,
    w: Tensor,
    b: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor:
    """``torch.conv2d`` of constant parameters."""
    plain = x.device.type != "cpu" or not x.requires_grad or w.shape[1] > FEW or groups > 1
    if plain or isinstance(padding, str) or w.requires_grad or torch.is_autocast_enabled("cpu"):
        return torch.conv2d(x, w, b, stride, padding, dilation, groups)
    pairs = [(v, v) if isinstance(v, int) else tuple(v) for v in (stride, padding, dilation)]
    y: Tensor = _Image.apply(x, w, b, *pairs)  # type: ignore[no-untyped-call]
    return y


_KNOWN: WeakKeyDictionary[Graph, Graph] = WeakKeyDictionary()


def quick(graph: Graph) -> Graph:
    """The same function where parameters are constants: convolutions of the image, and ReLUs in place."""
    known = _KNOWN.get(graph)
    if known is None:
        readers = Counter(name for node in graph.nodes for name in node.operands)
        known = _KNOWN[graph] = replace(
            graph, nodes=tuple(_quick(graph, node, readers) for node in graph.nodes)
        )
    return known


def _quick(graph: Graph, node: Node, readers: Counter[str]) -> Node:
    first = node.args[0] if node.args else None
    if not isinstance(first, Ref):
        return node
    if node.op is torch.conv2d and first.name in graph.inputs:
        return replace(node, op=image_convolution)
    source = graph.node.get(first.name)
    linear = source is not None and source.op in (
        torch.conv2d,
        F.linear,
    )  # which need not remember their output
    if node.op is torch.relu and linear and readers[first.name] == 1:
        return replace(node, op=torch.relu_)
    return node
