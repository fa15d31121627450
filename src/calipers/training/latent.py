"""Attacks on an inner box (TAPS): the first part of a network by intervals, the second by an attack.

The margins found are not below the interval bounds, and not below the truth of the second part either: they are no
bounds. Trained together with interval bounds they cost less accuracy.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from calipers.graph.graph import Graph, resolve
from calipers.ops import facts
from calipers.ops.kinds import Activation
from calipers.seeds import mixed
from calipers.sets import Interval
from calipers.spec import Spec
from calipers.training.normalisation import View
from calipers.training.points import uniform

EDGE = 0.5  # the share of a box, at each end, in which that end moves with a point


def cut(graph: Graph, activations: int) -> str:
    """The value before the last part of the graph, which holds so many layers of activations.

    Raises:
        ValueError: there are not that many, or values from before the cut are used behind it.
    """
    known = facts(graph).steps
    places = [s for s in known if isinstance(s.kind, Activation)]
    if not 0 <= activations < len(places):
        raise ValueError(
            f"split: {activations} of {len(places)} activation layers cannot be the last part; give 0 to "
            f"{len(places) - 1}"
        )
    name = places[len(places) - activations - 1].node.name
    later = graph.position[name]
    for step in known:
        early = [r for r in step.reads if r != name and graph.position.get(r, -1) < later]
        if graph.position[step.node.name] > later and early:
            raise ValueError(
                f"split: {step.node.path or step.node.name} also reads a value from before the cut; choose "
                "another number"
            )
    return name


def behind(graph: Graph, env: dict[str, Any], name: str) -> Callable[[Tensor], Tensor]:
    """The function from the value ``name`` to the output."""
    nodes = [
        s.node for s in facts(graph).steps if graph.position[s.node.name] > graph.position[name]
    ]

    def run(h: Tensor) -> Tensor:
        values = {**env, name: h}
        for node in nodes:
            kwargs = {k: resolve(v, values) for k, v in node.kwargs.items()}
            values[node.name] = node.op(*node.fill(values), **kwargs)
        y: Tensor = values[graph.output]
        return y

    return run


class _Connect(torch.autograd.Function):
    """A point of a box; its gradient moves the end of the box that it is near to.

        ∂x/∂u = clip((x − (u − c(u − l))) / (c(u − l)), 0, 1),   ∂x/∂l its mirror image

    A side of width 0 moves with both ends by half.
    """

    @staticmethod
    def forward(ctx: Any, point: Tensor, low: Tensor, high: Tensor) -> Tensor:
        edge = EDGE * (high - low)
        flat = edge <= 0
        size = torch.where(flat, 1.0, edge)
        up = torch.where(flat, 0.5, ((point - (high - edge)) / size).clamp_(0, 1))
        down = torch.where(flat, 0.5, ((low + edge - point) / size).clamp_(0, 1))
        ctx.save_for_backward(down, up)
        return point.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor, Tensor]:
        down, up = ctx.saved_tensors
        return None, gradient * down, gradient * up


def connect(point: Tensor, box: Interval) -> Tensor:
    """``point`` (B, *h), constant, as a function of the box's ends.

    Reference: Mao et al. 2023 (TAPS), section 3.3.
    """
    y: Tensor = _Connect.apply(point, box.lower, box.upper)  # type: ignore[no-untyped-call]
    return y


def margins(
    view: View,
    box: Interval,
    name: str,
    spec: Spec,
    seeds: Tensor,
    *,
    steps: int = 10,
    step_size: float = 0.2,
) -> Tensor:
    """The margin over each rival (B, K − 1) at a point that an attack on that rival found in the box of value ``name``.

    Args:
        step_size: relative to the box's width; halved after half of the steps.

    Cost: ``steps`` times K − 1 forward and backward passes of the part behind ``name``.
    """
    graph, count = view.network.graph, spec.C.shape[1]
    env = view.bound()
    with view.evaluating():
        fixed = {k: v.detach() if isinstance(v, Tensor) else v for k, v in view.bound().items()}
    run, frozen = behind(graph, env, name), behind(graph, fixed, name)
    low, high = (end.detach().repeat(count, *[1] * (end.ndim - 1)) for end in box)
    rows = spec.C.transpose(0, 1).flatten(0, 1)  # rival by rival
    width = high - low
    draws = mixed(seeds.to(low.device), 7).repeat(count) + torch.arange(
        count, device=low.device
    ).repeat_interleave(len(seeds))
    h = low + width * uniform(draws, low)
    for i in range(steps):
        with torch.enable_grad():
            leaf = h.detach().requires_grad_()
            (g,) = torch.autograd.grad(frozen(leaf), leaf, -rows)
        length = step_size * (0.5 if 2 * i >= steps else 1.0)
        h = torch.addcmul(h, width, g.sign_(), value=length).clamp(low, high)
    ends = Interval(*(end.repeat(count, *[1] * (end.ndim - 1)) for end in box))
    values = (run(connect(h.detach(), ends)) * rows).sum(1)
    return values.reshape(count, -1).T
