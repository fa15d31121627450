"""The record of an attack: what a trail keeps, a few steps at a time, is what a record keeps step by step."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor, nn

from attack_checks import EPS, INF, NORMS, K, batch, network
from calipers import Spec, ThreatModel, pgd
from calipers.attacks.losses import suited
from calipers.attacks.search import Record, Trail, look
from calipers.sets import Region


def stepwise(net: nn.Module, region: Region, spec: Spec, steps: int, loss: str) -> Tensor:
    """PGD with a record that looks after every step."""
    x = region.project(region.center)
    best, objective = Record.at(x), suited(loss, spec)
    for _ in range(steps):
        gradient, margin, _ = look(net, objective, spec, x)
        best.update(None, x, margin)
        x = region.ascend(x, gradient, 0.1 * float(region.eps[0]))
    best.update(None, x, look(net, objective, spec, x).margin)
    return best.points


@pytest.mark.parametrize("steps", [1, 8, 19])
@pytest.mark.parametrize("p", [2, INF])
def test_pgd_is_bit_by_bit_the_one_that_records_every_step(p: float, steps: int) -> None:
    net = network()
    x, y = batch(net, 20)
    region = ThreatModel(p, EPS[p]).around(x)
    label = Spec.label(y, K)
    for spec in (label, Spec(label.C, label.d, label.clause)):  # closed form and none
        for loss in ("cross_entropy", "margin"):
            expected = stepwise(net, region, spec, steps, loss)
            assert torch.equal(
                pgd(net, region, spec, steps=steps, loss=loss, dtype=x.dtype), expected
            )


@pytest.mark.parametrize("room", [0, 2**24])
def test_a_trail_keeps_the_first_of_the_lowest_and_no_nan(
    room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Margins from {-1, 0, 1, 2, nan, inf}, so with many ties; the model's memory is used again for every output."""
    monkeypatch.setattr(sys.modules[Trail.__module__], "TRAIL_BYTES", room)
    generator = torch.Generator().manual_seed(0)
    choices = torch.tensor([-1.0, 0.0, 1.0, 2.0, torch.nan, torch.inf])
    spec = Spec.functional(torch.ones(6, 1, 1))
    start = torch.zeros(6, 1)
    one, several = Record.at(start), Record.at(start)
    trail = Trail(several, spec, start)
    memory = torch.empty(6, 1)
    for step in range(21):
        margins = choices[torch.randint(6, (6,), generator=generator)]
        one.update(None, torch.full((6, 1), float(step)), margins)
        trail.here.fill_(step)
        memory.copy_(margins.unsqueeze(1))
        trail.note(memory)
    trail.settle()
    assert torch.equal(one.points, several.points)
    assert torch.equal(one.margin, several.margin)


@pytest.mark.parametrize("p", NORMS)
def test_steps_into_given_memory_are_the_same(p: float) -> None:
    x, _ = batch(network())
    region = ThreatModel(p, EPS[p]).around(x)
    g = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(2))
    out = torch.empty_like(x)
    expected = region.ascend(x, g.clone(), 0.05)
    assert torch.equal(region.ascend(x, g.clone(), 0.05, out=out), expected)
    assert torch.equal(out, expected)
