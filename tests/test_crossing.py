"""Searches across the boundary: the shortest way onto a hyperplane, and what ascent from inside misses."""

from __future__ import annotations

import sys

import pytest
import torch
from scipy.optimize import linprog
from torch import Tensor, nn

from attack_checks import EPS, INF, K, batch, margins, network
from calipers import Spec, ThreatModel, apgd, search
from calipers.attacks.cascade import Found, Stage
from calipers.attacks.crossing import Crossing
from calipers.searches import norm, shortest
from calipers.seeds import seeds


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


@pytest.mark.parametrize("p", [1, 2])
def test_members_only_and_the_true_margin(p: float) -> None:
    net = network()
    x, y = batch(net, 40)
    region, spec = ThreatModel(p, 0.6 * EPS[p]).around(x), Spec.label(y, K)
    found = search(
        net,
        region,
        spec,
        level=(Stage(60, "cross", targets=2),),
        dtype=x.dtype,
        seeds=seeds(x, 0, "t"),
    )
    assert region.contains(found.points).all()
    torch.testing.assert_close(found.margin, margins(net, spec, found.points), rtol=0, atol=1e-12)
    plain = margins(net, spec, apgd(net, region, spec, dtype=x.dtype)) <= 0
    assert found.broken.sum() >= plain.sum() - 1


def crossed(p: float) -> Found:
    net = network()
    x, y = batch(net, 40)
    region, spec = ThreatModel(p, 0.6 * EPS[p]).around(x), Spec.label(y, K)
    level = (Stage(80, "cross", targets=1),)
    return search(net, region, spec, level=level, dtype=x.dtype, seeds=seeds(x, 0, "t"))


@pytest.mark.parametrize("p", [1, 2])
def test_only_searches_without_hope_are_given_up(p: float, monkeypatch: pytest.MonkeyPatch) -> None:
    near = crossed(p)
    monkeypatch.setattr(sys.modules[Crossing.__module__], "REACH", float("inf"))
    everything = crossed(p)
    assert near.broken.sum() >= everything.broken.sum() - 2
    assert near.passes.sum() < 0.8 * everything.passes.sum()


class Masked(nn.Module):
    """Thresholds as robust MNIST networks learn them: flat around the examples, plain beyond."""

    def forward(self, x: Tensor) -> Tensor:
        seen = torch.relu((x - 0.2).abs() - 0.15).sum(1, keepdim=True)
        return torch.cat([torch.full_like(seen, 0.3), seen], 1)


def test_flat_surroundings_hide_nothing_from_beyond() -> None:
    x = torch.full((3, 12), 0.2)
    region, spec = ThreatModel(2, 1.0).around(x), Spec.label(torch.zeros(3, dtype=torch.long), 2)
    assert (margins(Masked(), spec, apgd(Masked(), region, spec)) > 0).all()
    level = (Stage(60, "cross", start="random"),)
    found = search(Masked(), region, spec, level=level, seeds=seeds(x, 0, "t"))
    assert found.broken.all()
