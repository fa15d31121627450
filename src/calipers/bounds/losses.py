"""The worst loss over a region, from above: what certified training descends on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from calipers.bounds.ladder import crown_ibp
from calipers.graph.graph import Network
from calipers.sets import Region
from calipers.spec import Spec


def cross_entropy(margins: Tensor, *, rigorous: bool = False) -> Tensor:
    """The cross-entropy of a classifier whose label leads each rival by ``margins`` (..., K − 1): (...,).

        log(1 + Σ_j exp(−margin_j))

    It falls in every margin, so lower bounds of the margins give an upper bound of the loss. Differentiable. NaN stays
    NaN, which is below no threshold.

    Args:
        rigorous: also add this computation's rounding.
    """
    size = torch.logsumexp(-margins, -1)
    loss = torch.logaddexp(size, torch.zeros_like(size))
    if not rigorous:
        return loss
    # logsumexp is off by a few units of its own size, and the loss changes relatively no more than that
    finfo = torch.finfo(margins.dtype)
    slack = (margins.shape[-1] + 32 + size.detach().abs()) * finfo.eps
    return loss * (1 + slack) + finfo.tiny


def worst_cross_entropy(
    network: Network,
    region: Region,
    y: Tensor,
    *,
    method: Callable[..., Tensor] = crown_ibp,
    rigorous: bool = False,
    **keywords: Any,
) -> Tensor:
    """An upper bound of max over x in the region of the cross-entropy at label ``y``, per example: (B,).

    Differentiable in the parameters and the centre, as the bound is.

    Args:
        method: the bound whose margins are used; ``keywords`` go to it.
        rigorous: account for all rounding, the loss's own included.

    Raises:
        UnsupportedOp, ValueError: as the bound.

    Sound: each rival's margin is bounded by itself; no single point need attain them all.
    Cost: the bound's.
    Reference: Wong and Kolter 2018, theorem 2; Gowal et al. 2018, eq. 12.
    """
    spec = Spec.label(y, network.num_classes)
    margins = method(network, region, spec, rigorous=rigorous, **keywords)
    return cross_entropy(margins, rigorous=rigorous)
