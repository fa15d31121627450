"""A linear classifier against an adversary, in closed form: margins, worst points, and the module it is."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import nn

from calipers.sets import ThreatModel
from calipers.training.linear_losses import Array
from calipers.training.linear_sets import dense, slices


def margins(x: Any, label: Array, coef: Array, intercept: Array, threat: ThreatModel) -> Array:
    """The least value in each example's set of the label's score minus each rival's, (n, K); inf for the label itself.

    Exact up to float64 rounding: the difference of two scores is linear, so this is a support function.
    An example is robust iff all its entries are positive: rivals have worst points of their own, and one breaks it.
    """
    found = np.full((x.shape[0], len(coef)), math.inf)
    free = not np.isfinite([_ends(threat.lower), _ends(threat.upper)]).any()
    for rows in slices(x.shape):
        block, here = dense(x, rows), label[rows]
        region = None if free else threat.around(torch.from_numpy(block))
        scores = block @ coef.T + intercept
        for rival in range(len(coef)):
            slope = coef[here] - coef[rival]
            offset = intercept[here] - intercept[rival]
            if region is None:
                plain = scores[np.arange(len(here)), here] - scores[:, rival]
                least = plain - reduction(slope, threat)
            else:
                least = offset - region.support(torch.from_numpy(-slope)).numpy()
            found[rows, rival] = np.where(here == rival, math.inf, least)
    return found


def _ends(value: Any) -> float:
    """A number that is finite iff some bound of the domain is."""
    ends = (
        torch.as_tensor(value, dtype=torch.float64)
        if not isinstance(value, str)
        else torch.zeros(1)
    )
    finite = ends[torch.isfinite(ends)]
    return float(finite.flatten()[0]) if finite.numel() else math.inf


def reduction(slope: Array, threat: ThreatModel) -> Array:
    """eps times the dual norm of each row: how far a ball without a box lowers ⟨slope, x⟩."""
    from calipers.rounding import enclose

    eps = enclose(threat.eps, "eps").upper.numpy()
    if threat.p == math.inf:
        total: Array = (abs(slope) * eps).sum(1)
        return total
    size: Array = eps * np.linalg.norm(slope, np.inf if threat.p == 1 else 2, axis=1)
    return size


def worst(x: Any, label: Array, rival: Array, coef: Array, threat: ThreatModel) -> Array:
    """For each example the point of its set where the label's score exceeds the rival's least, (n, d)."""
    found = np.empty(x.shape)
    for rows in slices(x.shape):
        region = threat.around(torch.from_numpy(dense(x, rows)))
        slope = torch.from_numpy(coef[rival[rows]] - coef[label[rows]])
        found[rows] = region.maximizer(slope).numpy()
    return found


def module(coef: Array, intercept: Array, dtype: torch.dtype) -> nn.Linear:
    """The classifier as ``nn.Linear``; two classes take half each, so that their scores differ by w·x + b."""
    if len(coef) == 1:
        coef, intercept = (
            np.concatenate([-coef, coef]) / 2,
            np.concatenate([-intercept, intercept]) / 2,
        )
    layer = nn.Linear(coef.shape[1], len(coef), dtype=dtype)
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(coef))
        layer.bias.copy_(torch.from_numpy(intercept))
    return layer.eval()
