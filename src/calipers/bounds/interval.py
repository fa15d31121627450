"""Interval bounds (IBP): the smallest box around each value, one op at a time.

One rule per kind: an affine op with L >= 0 maps ends to ends, any other maps centre and radius, an activation
its exact image, a maximum ends to ends. With ``rigorous`` every result is rounded outwards, at no extra
product: the radius's own map carries gamma_n·|centre| along.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from calipers.bounds.state import State, absolute_number
from calipers.graph.graph import Node, Ref
from calipers.ops.kinds import Activation, Affine, Bilinear, Extremum
from calipers.sets import Interval


def propagate(
    state: State,
    *,
    tighten: Callable[[State, Node], None] | None = None,
    until: str | None = None,
    keep: Collection[str] | None = None,
) -> None:
    """Fill ``state.boxes``, and the reference with the boxes' centres, for all active nodes in order.

    What an earlier call left stays, unless ``tighten`` has since refined something that it depends on.

    Args:
        tighten: may improve a node's operands before it is read.
        until: stop at this node; if it is affine only its reference is filled, which is cheaper.
        keep: if given, forget every other value after its last use.
    """
    graph = state.network.graph
    for node in graph.nodes:
        if node.name in graph.active:
            if tighten is not None:
                tighten(state, node)
            if state.outdated(node):
                if node.name == until and isinstance(state.kind(node), Affine):
                    args, kwargs = state.arguments(node)
                    state.env[node.name] = node.op(*args, **kwargs)
                else:
                    _visit(state, node)
        if keep is not None:
            for name in graph.last_use[node.name]:
                if name not in keep and name in state.boxes:
                    del state.boxes[name], state.env[name]
        if node.name == until:
            return


def _visit(state: State, node: Node) -> None:
    args = list(node.args)
    for i in node.slots:
        args[i] = _lookup(state, args[i])
    kwargs = {k: _lookup(state, v) for k, v in node.kwargs.items()} if node.kwargs else {}
    kind = state.kind(node)
    if isinstance(kind, Affine):
        box, center = _affine(state, kind, node, args, kwargs)
    else:
        box = RULES[type(kind)](state, kind, node, args, kwargs)
        center = _center(box)
    state.boxes[node.name], state.env[node.name] = box, center


def _lookup(state: State, value: Any) -> Any:
    if type(value) is Ref:
        box = state.boxes.get(value.name)
        return state.env[value.name] if box is None else box
    if type(value) is list or type(value) is tuple:
        return type(value)(_lookup(state, v) for v in value)
    return value


def _each(args: Sequence[Any], f: Callable[[Interval], Tensor]) -> list[Any]:
    """``args`` with ``f`` of each interval, also inside lists."""

    def visit(item: Any) -> Any:
        if type(item) is Interval:
            return f(item)
        if type(item) is list and any(type(i) is Interval for i in item):
            return [visit(i) for i in item]
        return item

    return [visit(a) for a in args]


def _affine(
    state: State, kind: Affine, node: Node, args: list[Any], kwargs: Mapping[str, Any]
) -> tuple[Interval, Tensor]:
    """The box, and the reference: exactly the op of its operands' references."""
    op = node.op
    active = [name for name in node.operands if name in state.network.graph.active]
    references = node.fill(state.env)
    reference = op(*references, **kwargs)
    terms = kind.terms(*references, **kwargs) if state.rigorous else 0
    if not state.off_centre.isdisjoint(active):  # nor will what follows be centred on its reference
        state.off_centre.add(node.name)
    if kind.magnitude is None:
        gamma = state.gamma(terms)
        low = op(*_each(args, lambda x: x.lower), **kwargs)
        high = op(*_each(args, lambda x: x.upper), **kwargs)
        if not gamma:
            return Interval(low, high), reference
        size = op(*_magnitudes(args), **kwargs) * gamma
        return Interval(low - size, high + size), reference
    # a refined operand is no longer centred on its reference, and is narrower around its own centre
    centred = state.off_centre.isdisjoint(active)
    center = reference if centred else op(*_each(args, _center), **kwargs)
    gamma = state.gamma(max(terms, 1))  # centre and radius round even where the op does not
    radius = kind.magnitude(gamma, *_each(args, lambda x: _radius(x, gamma)), **kwargs)
    return Interval(center - radius, center + radius), reference


def _center(x: Interval) -> Tensor:
    return torch.lerp(x.lower, x.upper, 0.5)


def _radius(x: Interval, gamma: float) -> Tensor:
    """Half the width; with ``gamma`` also the rounding of the centre and of the product with it."""
    half = (x.upper - x.lower).mul_(0.5)
    return half + gamma * torch.maximum(x.lower.abs(), x.upper.abs()) if gamma else half


def _magnitudes(args: Sequence[Any]) -> list[Any]:
    """Every tensor or number by absolute value, intervals by their largest."""

    def visit(item: Any) -> Any:
        if isinstance(item, Interval):
            return torch.maximum(item.lower.abs(), item.upper.abs())
        if isinstance(item, list):
            return [visit(i) for i in item]
        return item.abs() if isinstance(item, Tensor) else absolute_number(item)

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
    Activation: _activation,
    Bilinear: _bilinear,
    Extremum: _extremum,
}


def exactness(state: State) -> dict[str, str]:
    """How good interval bounds are at each value, for a box region: "free" (elements vary independently),
    "exact" (each element's range is exact), or "loose"."""
    graph = state.network.graph
    status = dict.fromkeys(graph.inputs, "free")
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
