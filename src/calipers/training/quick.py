"""The same graph with operators that are quicker for what attacks need: gradients of inputs, on a CPU."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor

from calipers.graph import primitives as prim
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


def from_image(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    """A linear layer of the images ``x`` (B, C, H, W), which need not be copied where channels are innermost.

    Args:
        w: its matrix as `innermost` has it.
    """
    return F.linear(x.permute(0, 2, 3, 1).flatten(1), w, b)


def innermost(w: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A matrix whose columns belong to pixels (C, H, W), for ones in the order (H, W, C)."""
    return w.view(-1, *shape).permute(0, 2, 3, 1).flatten(1)


class Quick(NamedTuple):
    """The graph, and what its nodes read besides the original's values: name -> the matrix, the shape of an image."""

    graph: Graph
    matrices: Mapping[str, tuple[str, tuple[int, ...]]]

    def evaluable(self, env: dict[str, Any]) -> dict[str, Any]:
        """``env``, what `bind` gives for the original graph, with the matrices."""
        return env | {k: innermost(env[w], shape) for k, (w, shape) in self.matrices.items()}


_KNOWN: WeakKeyDictionary[Graph, Quick] = WeakKeyDictionary()


def quick(graph: Graph) -> Quick:
    """The same function where parameters are constants: convolutions of the image, linear layers of images, and ReLUs
    in place."""
    known = _KNOWN.get(graph)
    if known is None:
        readers = Counter(name for node in graph.nodes for name in node.operands)
        nodes, matrices = _flattened(graph, readers)
        nodes = tuple(_quick(graph, node, readers) for node in nodes)
        known = _KNOWN[graph] = Quick(replace(graph, nodes=nodes), matrices)
    return known


def _flattened(
    graph: Graph, readers: Counter[str]
) -> tuple[tuple[Node, ...], dict[str, tuple[str, tuple[int, ...]]]]:
    """The nodes, with linear layers that read images themselves in place of their flattened copies."""
    nodes = dict(graph.node)
    matrices: dict[str, tuple[str, tuple[int, ...]]] = {}
    for node in graph.nodes:
        if node.op is not F.linear or len(node.args) < 2 or node.args[1].name not in graph.params:
            continue
        source = graph.node.get(node.args[0].name)
        image = None if source is None else graph.node.get(source.operands[0])
        if source is None or image is None or not _flat(graph, source, image, readers):
            continue
        name = f"{node.args[1].name} of {image.name}"
        matrices[name] = node.args[1].name, image.shape
        args = (Ref(image.name), Ref(name), *node.args[2:])
        nodes[node.name] = replace(node, op=from_image, args=args)
        del nodes[source.name]
    return tuple(nodes.values()), matrices


def _flat(graph: Graph, node: Node, image: Node, readers: Counter[str]) -> bool:
    """Whether ``node`` lays an image's pixels in a row, for one reader."""
    flat = node.op is prim.reshape and node.shape == (math.prod(image.shape),)
    return flat and len(image.shape) == 3 and image.name in graph.active and readers[node.name] == 1


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
