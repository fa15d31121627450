"""Interval bounds (IBP): the smallest box around each value, one op at a time.

One rule per kind: an affine op with L >= 0 maps ends to ends, any other maps centre and width, an activation
its exact image, a maximum ends to ends. With ``rigorous`` every result is rounded outwards, at no extra
product: the width's own map carries gamma_n·|centre| along.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from calipers.bounds.state import State, absolute, flat
from calipers.graph import primitives as prim
from calipers.graph.graph import Node
from calipers.ops import Step
from calipers.ops.kinds import Activation, Affine, Bilinear, Extremum
from calipers.sets import Interval

MOVERS = (prim.reshape, prim.identity, torch.permute)  # of one argument, each of its numbers once


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
    last_use = state.network.graph.last_use
    for step in state.facts.steps:
        node = step.node
        if tighten is not None:
            tighten(state, node)
        if state.outdated(node):
            state.spend(2 * state.batch)  # centre and width
            args, kwargs = state.arguments(node)
            if node.name == until and isinstance(step.kind, Affine):
                state.env[node.name] = (step.kind.run or node.op)(*args, **kwargs)
            else:
                _visit(state, step, args, kwargs)
        if keep is not None:
            for name in last_use[node.name]:
                if name not in keep and name in state.boxes:
                    state.forget(name)
        if node.name == until:
            return


def _visit(state: State, step: Step, args: list[Any], kwargs: Mapping[str, Any]) -> None:
    """``args`` at the reference."""
    name = step.node.name
    if isinstance(step.kind, Affine):
        center = (step.kind.run or step.node.op)(*args, **kwargs)
        box = _affine(state, step.kind, step, args, kwargs, center)
        width = state.widths.get(step.reads[0]) if step.node.op in MOVERS else None
        if width is not None:
            state.widths[name] = step.node.op(width, *args[1:], **kwargs)
    else:
        box = RULES[type(step.kind)](state, step, args, kwargs)
        center, state.widths[name] = _middle(box)
    state.boxes[name], state.env[name] = box, center


def _with(state: State, step: Step, args: list[Any], values: Iterable[Tensor]) -> list[Any]:
    """``args``, with ``values`` for the perturbed ones."""
    if step.places is not None:
        changed = list(args)
        for place, value in zip(step.places, values, strict=True):
            changed[place] = value
        return changed
    env = dict(state.env)
    env.update(zip(step.reads, values, strict=True))
    return step.node.fill(env)


def _affine(
    state: State,
    kind: Affine,
    step: Step,
    args: list[Any],
    kwargs: Mapping[str, Any],
    reference: Tensor,
) -> Interval:
    """The box; ``reference`` is the op of its operands' references."""
    op, boxes = kind.run or step.node.op, [state.boxes[name] for name in step.reads]
    terms = kind.terms(*args, **kwargs) if state.rigorous else 0
    centred = state.off_centre.isdisjoint(step.reads)
    if not centred:  # nor will what follows be centred on its reference
        state.off_centre.add(step.node.name)
    if kind.magnitude is None:
        gamma = state.gamma(terms)
        low = op(*_with(state, step, args, [x.lower for x in boxes]), **kwargs)
        high = op(*_with(state, step, args, [x.upper for x in boxes]), **kwargs)
        if not gamma:
            return Interval(low, high)
        sizes = absolute(_with(state, step, args, map(magnitude, boxes)))
        size = op(*sizes, **kwargs) * gamma
        size = size + state.tiny
        return Interval(low - size, high + size)
    # a refined operand is no longer centred on its reference, and is narrower around its own centre
    center = reference if centred else op(*_with(state, step, args, map(_center, boxes)), **kwargs)
    gamma = state.gamma(max(terms, 1))  # centre and radius round even where the op does not
    widths = [_width(state, name, gamma) for name in step.reads]
    width = kind.magnitude(2 * gamma, *_with(state, step, args, widths), **kwargs)
    if gamma:
        width = width + 4 * state.tiny
    return _ends(center, width)


def _center(x: Interval) -> Tensor:
    return torch.add(x.lower, x.upper - x.lower, alpha=0.5)


# The two changes of form, as one autograd node each: on small networks passes over memory are half of a training step.


def _middle(box: Interval) -> tuple[Tensor, Tensor]:
    """Centre and width."""
    if torch.is_grad_enabled() and (box.lower.requires_grad or box.upper.requires_grad):
        center, width = _Middle.apply(*box)  # type: ignore[no-untyped-call]
        return center, width
    width = box.upper - box.lower
    return torch.add(box.lower, width, alpha=0.5), width


def _ends(center: Tensor, width: Tensor) -> Interval:
    if torch.is_grad_enabled() and (center.requires_grad or width.requires_grad):
        return Interval(*_Ends.apply(center, width))  # type: ignore[no-untyped-call]
    return Interval(torch.sub(center, width, alpha=0.5), torch.add(center, width, alpha=0.5))


class _Middle(torch.autograd.Function):
    @staticmethod
    def forward(_ctx: Any, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        width = high - low
        return torch.add(low, width, alpha=0.5), width

    @staticmethod
    def backward(_ctx: Any, center: Tensor, width: Tensor) -> tuple[Tensor, Tensor]:
        high = torch.add(width, center, alpha=0.5)
        return torch.sub(high, width, alpha=2), high


class _Ends(torch.autograd.Function):
    @staticmethod
    def forward(_ctx: Any, center: Tensor, width: Tensor) -> tuple[Tensor, Tensor]:
        return torch.sub(center, width, alpha=0.5), torch.add(center, width, alpha=0.5)

    @staticmethod
    def backward(_ctx: Any, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        return low + high, (high - low).mul_(0.5)


def magnitude(x: Interval) -> Tensor:
    return torch.maximum(x.lower.abs(), x.upper.abs())


def _width(state: State, name: str, gamma: float) -> Tensor:
    """Upper less lower; with ``gamma`` also the rounding of the centre and of the product with it, on both sides."""
    box, width = state.boxes[name], state.widths.get(name)
    if width is None:
        width = box.upper - box.lower
    return width + (2 * gamma * magnitude(box) + 2 * state.tiny) if gamma else width


def _activation(state: State, step: Step, args: list[Any], kwargs: Mapping[str, Any]) -> Interval:
    kind: Activation = step.kind  # type: ignore[assignment]
    args[0] = state.boxes[step.reads[0]]
    image = kind.image(*args, **kwargs)
    gamma = state.gamma(1) * kind.ulps
    if not gamma:
        return image
    return _outward(image.lower, image.upper, gamma, state.tiny)


def _outward(low: Tensor, high: Tensor, gamma: float, tiny: float) -> Interval:
    return Interval(low - (gamma * low.abs() + tiny), high + (gamma * high.abs() + tiny))


def _bilinear(state: State, step: Step, _args: list[Any], _kwargs: Mapping[str, Any]) -> Interval:
    x, y = (state.boxes[name] for name in step.reads)
    products = [a * b for a in x for b in y]
    low, high = products[0], products[0]
    for product in products[1:]:
        low, high = torch.minimum(low, product), torch.maximum(high, product)
    gamma = state.gamma(1)
    return _outward(low, high, gamma, state.tiny) if gamma else Interval(low, high)


def _extremum(state: State, step: Step, args: list[Any], kwargs: Mapping[str, Any]) -> Interval:
    x, rest = state.boxes[step.reads[0]], args[1:]
    return Interval(step.node.op(x.lower, *rest, **kwargs), step.node.op(x.upper, *rest, **kwargs))


def windowed(kind: Extremum, box: Interval, *args: Any, **kwargs: Any) -> tuple[Tensor, Interval]:
    """The flat positions (windows, k) of a maximum's windows, padding at -1, and what is known of the elements there,
    (B, windows, k); padding is -inf."""
    index = kind.windows(tuple(box.lower.shape[1:]), *args, **kwargs).to(box.lower.device)
    index = index.reshape(-1, index.shape[-1])
    ends = (torch.where(index >= 0, flat(end)[:, index.clamp_min(0)], -math.inf) for end in box)
    return index, Interval(*ends)


def candidates(kind: Extremum, box: Interval, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """The flat positions (windows, k) of a maximum's windows, padding at 0, and which elements can be their window's
    largest, (B, windows, k); an unknown one can."""
    index, (low, high) = windowed(kind, box, *args, **kwargs)
    return index.clamp_min(0), ~(high < low.amax(-1, keepdim=True)) & (index >= 0)


RULES: dict[type, Callable[..., Interval]] = {
    Activation: _activation,
    Bilinear: _bilinear,
    Extremum: _extremum,
}
