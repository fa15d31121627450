"""Where a linear bound is lowest: corners of the region to start attacks from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from calipers.bounds.ladder import crown
from calipers.graph.graph import Network
from calipers.sets import Region
from calipers.spec import Spec


def corners(
    network: Network, region: Region, spec: Spec, *, limit: int = 16
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """For each of the functionals of lowest bound the corner of the box where CROWN's linear function is lowest.

    Yields one batch: points (R, *x) in the network's dtype, their rows of the region, and their clauses (R,). Nothing
    is guaranteed of them but membership. By the envelope theorem the bound's derivative with respect to a side of the
    box is the slope where it counts: the corner is read off the gradient.

    Raises:
        UnsupportedOp: an op of the network has no entry in the op table.
        ValueError: the region is no box.

    Cost: one CROWN pass, and a backward pass for each functional.
    """
    if region.p != float("inf"):
        raise ValueError(f"region: corners need a box, not an l{region.p:g} ball")
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
    yield torch.cat(points), rows, torch.cat(clauses)
