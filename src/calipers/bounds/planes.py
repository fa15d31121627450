"""Linear bounds of products and maxima: the planes that a backward pass puts in their place."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from calipers.bounds.interval import windowed
from calipers.bounds.patches import Parts
from calipers.bounds.state import State, dot, flat
from calipers.graph.graph import Node
from calipers.ops import Step
from calipers.ops.kinds import Extremum


def bilinear(state: State, step: Step, A: Tensor) -> tuple[Parts, Tensor]:
    """McCormick: of the two planes on each side, the one that is clearly tighter at the reference.

    At the middle of the box they tie, and rounding must not decide.
    """
    node = step.node
    (x, y), _ = state.arguments(node)
    out = state.env[node.name]
    xl, xu = state.boxes[node.operands[0]]
    yl, yu = state.boxes[node.operands[1]]

    def plane(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """a·x + b·y − a·b, as slopes and the value at the reference less the output."""
        return a, b, a * x + b * y - a * b - out

    low, low2 = plane(yl, xl), plane(yu, xu)
    high, high2 = plane(yu, xl), plane(yl, xu)
    clearly = (xu - xl) * (yu - yl) / 64
    better, lower = low2[2] > low[2] + clearly, high2[2] < high[2] - clearly
    low = tuple(torch.where(better, q, p) for p, q in zip(low, low2, strict=True))  # type: ignore[assignment]
    high = tuple(torch.where(lower, q, p) for p, q in zip(high, high2, strict=True))  # type: ignore[assignment]
    plus, minus = A.clamp_min(0), A.clamp_max(0)
    bias = dot(plus, low[2]) + dot(minus, high[2])
    gamma = state.gamma(out[0].numel() + 16)
    if gamma:
        xm, ym = torch.maximum(xl.abs(), xu.abs()), torch.maximum(yl.abs(), yu.abs())
        bias = bias - dot(A, gamma * 4 * (xm * ym + out.abs()) + 4 * state.tiny, size=True)
    parts: Parts = {}
    for i, slope in enumerate((0, 1)):
        rows = plus * low[slope] + minus * high[slope]
        shape = state.shape(node.operands[i])
        wide = [d + 2 for d, n in enumerate(shape) if n == 1 and rows.shape[d + 2] != 1]
        parts[i] = rows.sum(wide, keepdim=True) if wide else rows
    return parts, bias


class _Windows(NamedTuple):
    """For each window: where its best lower end lies, and an upper line slope·x_j + offset."""

    low_at: Tensor
    low_gap: Tensor
    high_at: Tensor
    high_slope: Tensor
    high_gap: Tensor


def _windows(state: State, kind: Extremum, node: Node) -> _Windows:
    args, kwargs = state.arguments(node)
    z, out = flat(args[0]), flat(state.env[node.name])
    index, (low, high) = windowed(kind, state.boxes[node.operands[0]], *args[1:], **kwargs)
    places = index.clamp_min(0).expand(len(z), -1, -1)

    def position(pick: Tensor) -> Tensor:
        return places.gather(2, pick.unsqueeze(2)).squeeze(2)

    best = low.argmax(2)
    top, pick = high.max(2)
    rest = (
        high.scatter(2, pick.unsqueeze(2), -math.inf).amax(2)
        if high.shape[2] > 1
        else torch.full_like(top, -math.inf)
    )
    bottom = low.gather(2, pick.unsqueeze(2)).squeeze(2)
    # max(x_j, rest) lies under its chord on [l_j, u_j]; where rest <= l_j it is x_j itself
    crossing = rest > bottom
    slope = torch.where(crossing, (top - rest) / torch.where(crossing, top - bottom, 1.0), 1.0)
    offset = torch.where(crossing, rest - slope * bottom, 0.0)
    low_at, high_at = position(best), position(pick)
    low_gap = z.gather(1, low_at) - out
    high_gap = slope * z.gather(1, high_at) + offset - out
    gamma = state.gamma(out.shape[1] + 16)
    if gamma:
        slack = gamma * (
            top.abs() + bottom.abs() + torch.where(crossing, rest.abs(), 0.0) + out.abs()
        )
        slack = slack + 4 * state.tiny
        low_gap, high_gap = low_gap - slack, high_gap + slack
    return _Windows(low_at, low_gap, high_at, slope, high_gap)


def extremum(state: State, step: Step, A: Tensor) -> tuple[Parts, Tensor]:
    node = step.node
    kind: Extremum = step.kind  # type: ignore[assignment]
    w = state.once("windows", node.name, lambda s, _: _windows(s, kind, node))
    rows = flat(A, 2)
    plus, minus = rows.clamp_min(0), rows.clamp_max(0)
    bias = dot(plus, w.low_gap) + dot(minus, w.high_gap)
    shape = state.shape(node.operands[0])
    out = rows.new_zeros(*rows.shape[:2], math.prod(shape))
    out = out.scatter_add(2, w.low_at.expand_as(rows), plus)
    out = out.scatter_add(2, w.high_at.expand_as(rows), minus * w.high_slope)
    return {0: out.reshape(*A.shape[:2], *shape)}, bias
