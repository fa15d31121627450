"""The shortest way onto a hyperplane inside a box, against a linear program and bisection."""

from __future__ import annotations

import pytest
import torch
from scipy.optimize import linprog
from torch import Tensor

from attack_checks import INF
from calipers.searches import norm, shortest


def linear_program(weight: list[float], cap: list[float], gain: float, p: float) -> float:
    """The least l1 or linf norm of lengths in [0, cap] with Σ weight·length = gain, by HiGHS."""
    n = len(weight)
    top = p != 1  # one variable more: the largest length
    cost = [0.0] * n + [1.0] if top else [1.0] * n
    rows = [[float(i == j) for j in range(n)] + [-1.0] for i in range(n)] if top else None
    result = linprog(
        cost,
        A_ub=rows,
        b_ub=[0.0] * n if top else None,
        A_eq=[weight + [0.0] * top],
        b_eq=[gain],
        bounds=[(0.0, c) for c in cap] + [(0.0, None)] * top,
        method="highs",
    )
    return float(result.fun)


def bisected(weight: Tensor, cap: Tensor, gain: float) -> float:
    """The same in l2: lengths min(t·weight, cap), the multiplier by bisection."""
    low, high = 0.0, float((cap / weight.clamp_min(1e-12)).max()) + 1.0
    for _ in range(200):
        t = (low + high) / 2
        reached = float((weight * torch.minimum(t * weight, cap)).sum())
        low, high = (t, high) if reached < gain else (low, t)
    return float(torch.minimum(high * weight, cap).norm())


@pytest.mark.parametrize("p", [1.0, 2.0, INF])
def test_the_shortest_way_onto_a_hyperplane(p: float) -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(30):
        weight, cap = (torch.rand(7, dtype=torch.float64, generator=generator) for _ in range(2))
        weight[torch.rand(7, generator=generator) < 0.2] = 0.0
        share = torch.rand((), dtype=torch.float64, generator=generator)
        gain = share * (weight * cap).sum()
        length = shortest(weight.unsqueeze(0), cap.unsqueeze(0), gain.unsqueeze(0), p).squeeze(0)
        assert (length >= 0).all()
        assert (length <= cap).all()
        assert (weight * length).sum().item() == pytest.approx(gain.item(), rel=1e-5, abs=1e-12)
        expected = (
            bisected(weight, cap, gain.item())
            if p == 2
            else linear_program(weight.tolist(), cap.tolist(), gain.item(), p)
        )
        assert norm(length, p).item() == pytest.approx(expected, rel=1e-5, abs=1e-7)


def test_what_cannot_be_reached_is_approached() -> None:
    weight, cap = torch.tensor([[1.0, 2.0, 0.0]]), torch.tensor([[0.5, 0.25, 1.0]])
    for p in (1.0, 2.0, INF):
        assert shortest(weight, cap, torch.tensor([9.0]), p).tolist() == [[0.5, 0.25, 0.0]]
