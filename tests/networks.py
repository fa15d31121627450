"""Small networks built straight as graphs (no torch.export), shared by the tests of bounds, attacks and solvers.

`Builder` adds one op at a time and finds its shape by running it. `ARCHITECTURES` maps a name to a function of a
seed; parameters are float32 numbers, so that float32 and float64 speak of the same network.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from calipers.graph import primitives as prim
from calipers.graph.graph import Graph, GraphModule, Network, Node, Ref


class Builder:
    """A graph in the making: ``h = b(op, *args)`` returns the `Ref` of a new node; tensors become parameters."""

    def __init__(self, shape: tuple[int, ...], seed: int = 0) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.shape = shape
        self.nodes: list[Node] = []
        self.tensors: dict[str, Tensor] = {}
        self.values: dict[str, Tensor] = {"x": torch.zeros(2, *shape, dtype=torch.float64)}
        self.x = Ref("x")

    def __call__(self, op: Callable[..., Any], *args: Any, **kwargs: Any) -> Ref:
        args = tuple(self._named(a) for a in args)
        resolved = [self._value(a) for a in args]
        name = f"n{len(self.nodes)}"
        self.values[name] = y = op(*resolved, **kwargs)
        self.nodes.append(Node(name, op, args, kwargs, tuple(y.shape[1:])))
        return Ref(name)

    def _named(self, item: Any) -> Any:
        if isinstance(item, list):
            return [self._named(i) for i in item]
        if not isinstance(item, Tensor):
            return item
        name = f"p{len(self.tensors)}"
        self.tensors[name] = item
        return Ref(name)

    def _value(self, item: Any) -> Any:
        if isinstance(item, list):
            return [self._value(i) for i in item]
        if not isinstance(item, Ref):
            return item
        value = self.values.get(item.name)
        if value is not None:
            return value
        tensor = self.tensors[item.name]
        return tensor.double() if tensor.is_floating_point() else tensor

    def size(self, h: Ref) -> tuple[int, ...]:
        return tuple(self.values[h.name].shape[1:])

    def rand(self, *shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=self.generator) * scale

    # -- layers ------------------------------------------------------------------------------------

    def flat(self, h: Ref) -> Ref:
        n = self.values[h.name][0].numel()
        return h if self.size(h) == (n,) else self(prim.reshape, h, (n,))

    def linear(self, h: Ref, out: int, *, bias: bool = True) -> Ref:
        h = self.flat(h)
        (n,) = self.size(h)
        b = self.rand(out, scale=0.3) if bias else None
        return self(F.linear, h, self.rand(out, n, scale=n**-0.5), b)

    def conv(self, h: Ref, out: int, k: int = 3, stride: int = 1, padding: int = 1) -> Ref:
        c = self.size(h)[0]
        w = self.rand(out, c, k, k, scale=(c * k * k) ** -0.5)
        return self(
            torch.conv2d, h, w, self.rand(out, scale=0.3), [stride, stride], [padding, padding]
        )

    def norm(self, h: Ref) -> Ref:
        """Batch normalisation in evaluation mode with statistics far from (0, 1), and some negative scales."""
        n = self.size(h)[0]
        var = self.rand(n).abs() + 0.1
        return self(prim.batch_norm, h, self.rand(n), self.rand(n), self.rand(n), var, False, 1e-5)

    def relu(self, h: Ref) -> Ref:
        return self(torch.relu, h)

    def network(self, dtype: torch.dtype = torch.float32) -> Network:
        tensors = {k: v.to(dtype) if v.is_floating_point() else v for k, v in self.tensors.items()}
        graph = Graph(tuple(self.nodes), {k: k for k in tensors}, ("x",), self.nodes[-1].name)
        return Network(graph, GraphModule(graph, tensors), self.shape)


def mlp(seed: int, sizes: tuple[int, ...] = (4, 8, 7, 3)) -> Network:
    b = Builder(sizes[:1], seed)
    h = b.x
    for n in sizes[1:-1]:
        h = b.relu(b.linear(h, n))
    b.linear(h, sizes[-1])
    return b.network()


def affine(seed: int) -> Network:
    """A composition of affine maps: everything about it has a closed form."""
    b = Builder((2, 4, 3), seed)
    h = b.norm(b.conv(b.x, 3))
    h = b(torch.mul, b(torch.neg, h), b.rand(3, 1, 1))
    h = b(torch.add, h, -0.75)
    h = b(torch.add, h, b.conv(b.x, 3, 1, padding=0))
    h = b(prim.average_pool, h, (2, 2), (1, 1), (1, 1))
    b.linear(b.linear(h, 5), 3)
    return b.network()


def conv(seed: int) -> Network:
    b = Builder((2, 5, 6), seed)
    h = b.relu(b.conv(b.x, 4, 3, 2))
    h = b.relu(b.conv(h, 3, 2, 1, 0))
    b.linear(b.relu(b.linear(h, 6)), 3)
    return b.network()


def residual(seed: int) -> Network:
    """Post-activation blocks with a 1x1 skip of stride 2, batch norm between, on a non-square map."""
    b = Builder((2, 6, 8), seed)
    h = b.relu(b.norm(b.conv(b.x, 3)))
    main = b.norm(b.conv(b.relu(b.norm(b.conv(h, 4, 3, 2))), 4))
    h = b.relu(b(torch.add, main, b.norm(b.conv(h, 4, 1, 2, 0))))
    h = b(prim.average_pool, h, (3, 4), (3, 4), (0, 0))
    b.linear(h, 3)
    return b.network()


def preactivation(seed: int) -> Network:
    """Values that are read by an activation and, untouched, by what comes after it."""
    b = Builder((4,), seed)
    h = b.linear(b.relu(b.linear(b.x, 6)), 5)
    for _ in range(2):
        h = b(torch.add, h, b.linear(b.relu(h), 5))
    h = b.relu(b.linear(b(torch.add, h, -0.5), 4))
    b.linear(h, 3)
    return b.network()


def bottleneck(seed: int) -> Network:
    """Convolutions without an activation between (their padding overlaps), batch norm and negation between."""
    b = Builder((1, 6, 7), seed)
    h = b.relu(b.conv(b.norm(b.conv(b.x, 3)), 2))
    h = b.relu(b.conv(b(torch.neg, b.conv(h, 2, 3, 2)), 2))
    b.linear(h, 3)
    return b.network()


def max_pool(seed: int) -> Network:
    b = Builder((2, 6, 5), seed)
    h = b(prim.max_pool, b.conv(b.x, 3), (2, 2), (2, 2), (1, 1), (1, 1), True)
    h = b(prim.max_pool, b.relu(b.conv(h, 2)), (2, 2), (1, 1), (0, 0), (1, 1))
    b.linear(b.relu(b.linear(h, 5)), 3)
    return b.network()


def product(seed: int) -> Network:
    """A product of two branches (gating), and a square."""
    b = Builder((4,), seed)
    h = b(torch.mul, b(torch.sigmoid, b.linear(b.x, 5)), b(torch.tanh, b.linear(b.x, 5)))
    h = b.linear(h, 4)
    b.linear(b(torch.mul, h, h), 3)
    return b.network()


def mixed(seed: int) -> Network:
    """Movers and clamps: slices, concatenation, permutation, padding, one-sided limits."""
    b = Builder((2, 3, 4), seed)
    h = b(torch.permute, b.conv(b.x, 2), (0, 3, 1, 2))
    left, right = b(prim.slice_, h, 1, 0, 3, 2), b(prim.slice_, h, 1, 1, 4, 1)
    right = b(F.leaky_relu, right, -0.3)
    h = b(prim.pad, b(torch.cat, [left, right], 1), (1, 0, 0, 1), -0.25)
    h = b(torch.clamp, b(torch.div, h, 1.5), None, 0.7)
    h = b(torch.clamp, b.linear(h, 6), -0.6, 0.4)
    h = b(prim.maximum, b(prim.reshape, b.linear(h, 6), (3, 2)), (2,), False)
    b.linear(h, 3)
    return b.network()


def ends_nonlinear(seed: int) -> Network:
    """The output itself is an activation."""
    b = Builder((3,), seed)
    b(torch.sigmoid, b.linear(b.relu(b.linear(b.x, 5)), 3))
    return b.network()


def _with(op: Callable[..., Any], *extra: Any) -> Callable[[int], Network]:
    def make(seed: int) -> Network:
        b = Builder((4,), seed)
        h = b(op, b.linear(b.x, 7), *extra)
        h = b(op, b.linear(h, 6), *extra)
        b.linear(h, 3)
        return b.network()

    return make


ARCHITECTURES: dict[str, Callable[[int], Network]] = {
    "mlp": mlp,
    "affine": affine,
    "conv": conv,
    "residual": residual,
    "preactivation": preactivation,
    "bottleneck": bottleneck,
    "max_pool": max_pool,
    "product": product,
    "mixed": mixed,
    "ends_nonlinear": ends_nonlinear,
    "sigmoid": _with(torch.sigmoid),
    "tanh": _with(torch.tanh),
    "leaky": _with(F.leaky_relu, 0.01),
    "leaky_steep": _with(F.leaky_relu, 2.5),
    "leaky_negative": _with(F.leaky_relu, -0.4),
    "clamp": _with(torch.clamp, -0.3, 0.5),
    "clamp_below": _with(torch.clamp, -0.2, None),
    "abs": _with(torch.abs),
}


def inputs(network: Network, count: int, seed: int) -> Tensor:
    """Float32 points of [0, 1], some of them on its border."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(count, *network.input_shape, generator=generator)
    return torch.where(torch.rand(x.shape, generator=generator) < 0.15, x.round(), x)
