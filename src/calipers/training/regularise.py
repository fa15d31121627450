"""Shi's regulariser: intervals that do not widen, and as much weight on active as on inactive neurons."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from calipers.sets import Interval


def shi(
    input_box: Interval,
    boxes: Mapping[str, Interval],
    preactivations: Sequence[str],
    *,
    tolerance: float = 0.5,
) -> Tensor:
    """The mean over layers of what their pre-activation intervals lack:

        relu(τ − Δ0/Δ)/τ + relu(τ − ρ(a))/τ + relu(τ − ρ(b))/τ

    with Δ the mean half-width of the layer and Δ0 of the input box, ρ(v) = min(v, 1/v), a the ratio of the sums of
    centres, b that of their squared deviations from the layer's mean, over the neurons that are always active and those
    that never are. The last two count only where there are neurons of both kinds. Differentiable.

    Args:
        input_box: the box that was propagated, whatever the radius in use.

    Reference: Shi et al. 2021, section 3.3, eqs. 9-12.
    """
    first = (input_box.upper - input_box.lower).mean() / 2
    total = first.new_zeros(())
    for name in preactivations:
        low, high = boxes[name]
        sums: Tensor = _Sums.apply(low, high)  # type: ignore[no-untyped-call]
        half, above, below, spread_above, spread_below = sums.unbind()
        total = total + torch.relu(tolerance - first / half.clamp_min(1e-12))
        total = total + _unbalanced(above, -below, tolerance)
        total = total + _unbalanced(spread_above, spread_below, tolerance)
    return total / (tolerance * max(len(preactivations), 1))


def _unbalanced(above: Tensor, below: Tensor, tolerance: float) -> Tensor:
    """relu(τ − min(above/below, below/above)); 0 where one of them is missing."""
    both = (above > 0) & (below > 0)
    one = torch.ones_like(above)
    a, b = torch.where(both, above, one), torch.where(both, below, one)
    return torch.relu(tolerance - torch.minimum(a / b, b / a))


class _Sums(torch.autograd.Function):
    """The five numbers of a layer: mean half-width; over active and over inactive neurons the sum of the centres c; and
    of (c − mean c)². One node, because its passes over memory cost more than the products of a small network."""

    @staticmethod
    def forward(ctx: Any, low: Tensor, high: Tensor) -> Tensor:
        active, inactive = (low > 0).to(low.dtype), (high < 0).to(low.dtype)
        center = torch.add(low, high).mul_(0.5)
        mean = center.mean()
        away = center - mean
        above, below = _dot(away, active), _dot(away, inactive)
        counts = active.sum(), inactive.sum()
        ctx.save_for_backward(active, inactive, away, above, below)
        square = away.square()
        return torch.stack([
            (high.mean() - low.mean()) / 2,
            above + mean * counts[0], below + mean * counts[1], _dot(square, active), _dot(square, inactive),
        ])  # fmt: skip

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        active, inactive, away, above, below = ctx.saved_tensors
        half, up, down, spread_up, spread_down = (
            gradient / 2
        ).unbind()  # each end is half of the centre
        # the mean moves with every centre, and the squares with it
        shift = -2 * (spread_up * above + spread_down * below) / away.numel()
        center = (2 * spread_up * away).add_(up).mul_(active)
        center.add_((2 * spread_down * away).add_(down).mul_(inactive)).add_(shift)
        side = half / away.numel()
        return center - side, center + side


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return torch.dot(a.flatten(), b.flatten())
