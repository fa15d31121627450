"""Certified margins of a training step: the bounds of `calipers.bounds`, with the intervals behind them kept.

Each function takes (view, region, spec) and returns lower bounds of the margins over the rivals, (B, K − 1), and the
intervals they were made from, differentiable in parameters and statistics. Nothing here rounds outwards: certified
figures come from `calipers.bounds` on the finished network.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from calipers.bounds.interval import propagate
from calipers.bounds.ladder import crown_ibp_bounds, interval_bounds
from calipers.bounds.slopes import dual_bounds
from calipers.bounds.state import State, start
from calipers.graph.graph import Node
from calipers.ops.kinds import Activation
from calipers.sets import Interval, Region
from calipers.spec import Spec
from calipers.training.normalisation import View


class Certified(NamedTuple):
    """Lower bounds of margins (B, K − 1), the intervals behind them by value name, and the values that activations
    read, in order."""

    margins: Tensor
    boxes: Mapping[str, Interval]
    preactivations: tuple[str, ...]


Bound = Callable[[View, Region, Spec], Certified]


def begin(view: View, region: Region) -> State:
    """A computation over the regions, with the view's parameters bound."""
    with view.evaluating():
        state = start(
            view.network, region, dtype=None, rigorous=False, memory=None, statistics=view.values
        )
    state.whole = True
    return state


def interval(view: View, region: Region, spec: Spec, *, shrink: float = 1.0) -> Certified:
    """Interval bounds, the functionals merged into the last affine layers.

    Args:
        shrink: factor for the upper ends of unstable activations' inputs; below 1 the result is *no* bound (SABR uses
            it to regularise less).

    Cost: two forward passes.
    Reference: Gowal et al. 2018, eqs. 6-12.
    """
    state = begin(view, region)
    boxes = propagated(state, shrink)
    return Certified(interval_bounds(state, spec), boxes, preactivations(state))


def crown_ibp(view: View, region: Region, spec: Spec, *, beta: float = 1.0) -> Certified:
    """(1 − beta)·interval + beta·CROWN-IBP bounds: sound for beta in [0, 1].

    Cost: as `interval`, and one backward pass of K − 1 rows.
    Reference: Zhang et al. 2020, eq. 10.
    """
    if beta <= 0:
        return interval(view, region, spec)
    state = begin(view, region)
    boxes = propagated(state)
    margins = crown_ibp_bounds(state, spec)
    if beta < 1:
        weak = interval_bounds(state, spec)
        margins = weak + beta * (margins - weak)
    return Certified(margins, boxes, preactivations(state))


def dual(view: View, region: Region, spec: Spec) -> Certified:
    """The dual bound, never below `interval`'s.

    Cost: a backward row for every unstable neuron: for small networks.
    Reference: Wong and Kolter 2018.
    """
    state = begin(view, region)
    boxes = propagated(state)
    margins = dual_bounds(state, spec, raw=False)
    return Certified(margins, boxes, preactivations(state))


def preactivations(state: State) -> tuple[str, ...]:
    """The values that activations read, in order."""
    steps = state.facts.steps
    return tuple(dict.fromkeys(s.reads[0] for s in steps if isinstance(s.kind, Activation)))


def propagated(state: State, shrink: float = 1.0) -> dict[str, Interval]:
    """Propagate intervals up to the output, and all that were met."""

    def shrunk(state: State, node: Node) -> None:
        if isinstance(state.kind(node), Activation):
            name = node.operands[0]
            low, high = state.boxes[name]
            state.boxes[name] = Interval(
                low, torch.where((low < 0) & (high > 0), shrink * high, high)
            )

    tighten = shrunk if shrink < 1 else None
    propagate(state, until=state.network.graph.output, tighten=tighten)
    return dict(state.boxes)
