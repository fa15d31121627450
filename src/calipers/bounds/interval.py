"""Interval bounds (IBP): the smallest box around each value, one op at a time.

One rule per kind: an affine op with L >= 0 maps ends to ends, any other maps centre and radius, an activation
its exact image, a maximum ends to ends. With ``rigorous`` every result is rounded outwards, at no extra
product: the radius's own map carries gamma_n·|centre| along.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from calipers.bounds.state import State
from calipers.graph.graph import Node, Ref
from calipers.ops.kinds import Activation, Affine, Bilinear, Extremum
from calipers.sets import Interval


def interval_of(state: State, node: Node) -> Interval:
    """The interval of a node from the intervals of its operands."""
    args = [_lookup(state, a) for a in node.args]
    kwargs = {k: _lookup(state, v) for k, v in node.kwargs.items()}
    kind = state.kind(node)
    return RULES[type(kind)](state, kind, node, args, kwargs)


def propagate(
    state: State, *, tighten: Callable[[State, Node], None] | None = None, until: str | None = None
) -> None:
    """Fill ``state.boxes`` for all active nodes in order (up to ``until``); ``tighten`` may improve a
    node's operands before it is read."""
    graph = state.network.graph
    for node in graph.nodes:
        if node.name in graph.active:
            if tighten is not None:
                tighten(state, node)
            state.boxes[node.name] = interval_of(state, node)
        if node.name == until:
            return


def _lookup(state: State, value: Any) -> Any:
    if isinstance(value, Ref):
        return state.boxes[value.name] if value.name in state.boxes else state.env[value.name]
    if type(value) is list or type(value) is tuple:
        return type(value)(_lookup(state, v) for v in value)
    return value


def _each(args: Sequence[Any], f: Callable[[Interval], Tensor]) -> list[Any]:
    def visit(item: Any) -> Any:
        if isinstance(item, Interval):
            return f(item)
        return [visit(i) for i in item] if isinstance(item, list) else item

    return [visit(a) for a in args]


def _affine(
    state: State, kind: Affine, node: Node, args: list[Any], kwargs: Mapping[str, Any]
) -> Interval:
    op = node.op
    if kind.magnitude is None:
        low = op(*_each(args, lambda x: x.lower), **kwargs)
        high = op(*_each(args, lambda x: x.upper), **kwargs)
        gamma = state.gamma(kind.terms(*_each(args, lambda x: x.lower), **kwargs))
        if not gamma:
            return Interval(low, high)
        size = op(*_magnitudes(args), **kwargs) * gamma
        return Interval(low - size, high + size)
    center = op(*_each(args, _center), **kwargs)
    gamma = state.gamma(kind.terms(*_each(args, _center), **kwargs))
    radius = kind.magnitude(gamma, *_each(args, lambda x: _radius(x, gamma)), **kwargs)
    return Interval(center - radius, center + radius)


def _center(x: Interval) -> Tensor:
    return (x.lower + x.upper) * 0.5


def _radius(x: Interval, gamma: float) -> Tensor:
    half = (x.upper - x.lower) * 0.5
    return half + gamma * torch.maximum(x.lower.abs(), x.upper.abs()) if gamma else half


def _magnitudes(args: Sequence[Any]) -> list[Any]:
    """Every tensor argument by absolute value, intervals by their largest."""

    def visit(item: Any) -> Any:
        if isinstance(item, Interval):
            return torch.maximum(item.lower.abs(), item.upper.abs())
        if isinstance(item, list):
            return [visit(i) for i in item]
        return item.abs() if isinstance(item, Tensor) else item

    return [visit(a) for a in args]


def _activation(
    state: State, kind: Activation, _node: Node, args: list[Any], kwargs: Mapping[str, Any]
) -> Interval:
    image = kind.image(*args, **kwargs)
    gamma = state.gamma(1) * kind.ulps
    if not gamma:
        return image
    return Interval(
        image.lower - gamma * image.lower.abs(), image.upper + gamma * image.upper.abs()
    )


def _bilinear(
    state: State, _kind: Bilinear, _node: Node, args: list[Any], _kwargs: Mapping[str, Any]
) -> Interval:
    x, y = args
    products = [a * b for a in x for b in y]
    low, high = products[0], products[0]
    for product in products[1:]:
        low, high = torch.minimum(low, product), torch.maximum(high, product)
    gamma = state.gamma(1)
    return (
        Interval(low - gamma * low.abs(), high + gamma * high.abs())
        if gamma
        else Interval(low, high)
    )


def _extremum(
    _state: State, _kind: Extremum, node: Node, args: list[Any], kwargs: Mapping[str, Any]
) -> Interval:
    low = node.op(*_each(args, lambda x: x.lower), **kwargs)
    return Interval(low, node.op(*_each(args, lambda x: x.upper), **kwargs))


RULES: dict[type, Callable[..., Interval]] = {
    Affine: _affine,
    Activation: _activation,
    Bilinear: _bilinear,
    Extremum: _extremum,
}


def exactness(state: State) -> dict[str, str]:
    """How good interval bounds are at each value, for a box region: "free" (elements vary independently),
    "exact" (each element's range is exact), or "loose"."""
    graph = state.network.graph
    status = {name: "free" for name in graph.inputs}
    for node in graph.nodes:
        sources = [status[name] for name in node.operands if name in status]
        if not sources:
            continue
        kind = state.kind(node)
        simple = isinstance(kind, Activation) or (isinstance(kind, Affine) and kind.separable)
        if len(sources) > 1:
            status[node.name] = "loose"
        elif simple:
            status[node.name] = sources[0]
        else:
            status[node.name] = "exact" if sources[0] == "free" else "loose"
    return status
