"""Where a linear bound is lowest: corners of the region to start attacks from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from calipers.bounds.interval import propagate
from calipers.bounds.ladder import chunked, crown, functionals, neurons, tightener
from calipers.bounds.linear import linear_bounds
from calipers.bounds.state import State, check_spec
from calipers.graph.graph import Network
from calipers.sets import Region
from calipers.spec import Spec

SMALL = 4000  # nonlinear neurons up to which gradients through all bounds are quickly had


def corners(
    network: Network, region: Region, spec: Spec, *, limit: int = 16
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """For each of the functionals of lowest bound a corner of the box where CROWN says that it may be lowest.

    Yields batches: points (R, *x) in the network's dtype, their rows of the region, and their clauses (R,). Nothing is
    guaranteed of them but membership. First the corners where CROWN's linear functions are lowest; then, of networks
    of at most `SMALL` neurons, those towards which the bounds fall as the box's sides move, intermediate bounds and
    all: often another witness's basin.

    Raises:
        UnsupportedOp: an op of the network has no entry in the op table.
        ValueError: the region is no box.

    Cost: one CROWN pass and a backward pass for each functional; twice as much, with gradients, for the second batch.
    """
    if region.p != float("inf"):
        raise ValueError(f"region: corners need a box, not an l{region.p:g} ball")
    run = partial(_planes, limit=limit)
    with torch.no_grad():
        found = chunked(run, network, region, spec, None, False, None, None)
    count = found.shape[1]
    slopes = found[..., 1:].reshape(len(region) * count, *network.input_shape)
    rows = torch.arange(len(region), device=found.device).repeat_interleave(count)
    points = region[rows].maximizer(-slopes.to(network.dtype))
    yield points, rows, spec.clause[found[..., 0].long().flatten()]
    if neurons(network) <= SMALL:
        yield _by_sides(network, region, spec, limit)


def _by_sides(
    network: Network, region: Region, spec: Spec, limit: int
) -> tuple[Tensor, Tensor, Tensor]:
    """By the envelope theorem the bound's derivative with respect to a side is the slope where it counts."""
    low = region.outer_lower.clone().requires_grad_()
    high = region.outer_upper.clone().requires_grad_()
    with torch.enable_grad():
        free = replace(region, outer_lower=low, outer_upper=high, _cache={})
        bounds = crown(network, free, spec)
    inner = region.inner(network.dtype)
    points, clauses = [], []
    for m in bounds.detach().amin(0).argsort()[:limit].tolist():
        slopes = torch.autograd.grad(bounds[:, m].sum(), (low, high), retain_graph=True)
        points.append(torch.where(slopes[0] + slopes[1] > 0, inner.lower, inner.upper))
        clauses.append(spec.clause[m].expand(len(region)))
    rows = torch.arange(len(region), device=low.device).repeat(len(points))
    return torch.cat(points), rows, torch.cat(clauses)


def _planes(state: State, spec: Spec, *, limit: int) -> Tensor:
    """The numbers of the functionals of lowest bound, each with the slopes of its plane: (B, limit, 1 + inputs)."""
    C, d = check_spec(state, spec)
    output = state.network.graph.output
    propagate(state, tighten=tightener(state), until=output)
    lowest = functionals(state, C, d).argsort(1)[:, :limit]
    picked = C.gather(1, lowest.unsqueeze(2).expand(-1, -1, C.shape[2]))
    slopes, _ = linear_bounds(state, output, picked.transpose(0, 1))
    return torch.cat([lowest.unsqueeze(2).to(slopes), slopes.transpose(0, 1).flatten(2)], 2)
