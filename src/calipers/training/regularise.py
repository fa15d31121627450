"""Shi's regulariser: intervals that do not widen, and as much weight on active as on inactive neurons."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

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
    centres, b that of their squared deviations, over the neurons that are always active and those that never are. The
    last two count only where there are neurons of both kinds. Differentiable.

    Args:
        input_box: the box that was propagated, whatever the radius in use.

    Reference: Shi et al. 2021, section 3.3, eqs. 9-12.
    """
    first = (input_box.upper - input_box.lower).mean() / 2
    total = first.new_zeros(())
    for name in preactivations:
        low, high = boxes[name]
        half, center = (high - low) / 2, (low + high) / 2
        total = total + torch.relu(tolerance - first / half.mean().clamp_min(1e-12))
        active, inactive = (low > 0).to(low.dtype), (high < 0).to(low.dtype)
        spread = (center - center.mean()).square()
        total = total + _balance((center * active).sum(), -(center * inactive).sum(), tolerance)
        total = total + _balance((spread * active).sum(), (spread * inactive).sum(), tolerance)
    return total / (tolerance * max(len(preactivations), 1))


def _balance(above: Tensor, below: Tensor, tolerance: float) -> Tensor:
    """relu(τ − min(above/below, below/above)); 0 where one of them is missing."""
    both = (above > 0) & (below > 0)
    one = torch.ones_like(above)
    a, b = torch.where(both, above, one), torch.where(both, below, one)
    return torch.relu(tolerance - torch.minimum(a / b, b / a))
