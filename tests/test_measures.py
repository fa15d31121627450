"""Sparsity of changes, loss curves and restarts against closed forms."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from attack_checks import NORMS, K, batch, network
from calipers import Spec, ThreatModel, apgd, fgsm, gini, loss_curve, pgd, restart_losses
from calipers import data as datasets
from calipers.attacks.losses import LOSSES
from calipers.models import load_model
from calipers.seeds import seeds
from calipers.sets import equivalent_eps

INF = math.inf


@given(st.integers(1, 40), st.data())
def test_the_gini_index_has_its_closed_forms(n: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, n))
    scale = data.draw(st.floats(1e-6, 1e6))
    equal_parts = torch.zeros(1, n, dtype=torch.float64)
    equal_parts[0, torch.randperm(n)[:k]] = scale
    ramp = scale * torch.arange(1.0, n + 1, dtype=torch.float64).view(1, n)
    signs = torch.where(torch.rand(1, n) < 0.5, -1.0, 1.0)
    torch.testing.assert_close(gini(equal_parts * signs), torch.tensor([1 - k / n]).double())
    torch.testing.assert_close(gini(ramp * signs), torch.tensor([(n - 1) / (3 * n)]).double())


@given(st.integers(1, 12))
def test_the_gini_index_is_the_mean_difference_over_twice_the_mean(n: int) -> None:
    change = torch.randn(3, n, 2, dtype=torch.float64)
    a = change.flatten(1).abs()
    differences = (a.unsqueeze(1) - a.unsqueeze(2)).abs().mean((1, 2))
    torch.testing.assert_close(gini(change), differences / (2 * a.mean(1)))


def test_no_change_is_not_sparse() -> None:
    assert torch.equal(gini(torch.zeros(2, 3, 4)), torch.zeros(2).double())


def test_on_an_affine_model_linf_is_dense_l2_follows_the_weights_and_l1_takes_one_feature() -> None:
    n = 50
    weight = torch.randn(2, n, dtype=torch.float64)
    x = torch.rand(4, n, dtype=torch.float64)
    spec = Spec.label(torch.tensor([0, 1, 0, 1]), 2)
    found = {
        p: gini(fgsm(lambda z: z @ weight.T, region, spec, dtype=x.dtype) - x)
        for p in NORMS
        for region in [ThreatModel(p, 0.1, -INF, INF).around(x)]
    }
    everywhere = torch.ones(4, dtype=torch.float64)
    torch.testing.assert_close(found[INF], 0 * everywhere, rtol=0, atol=1e-7)
    torch.testing.assert_close(found[2], gini((weight[0] - weight[1]).view(1, n)) * everywhere)
    torch.testing.assert_close(found[1], (1 - 1 / n) * everywhere)


@pytest.mark.parametrize("name", ["digits_standard", "digits_pgd"])
def test_on_digits_linf_changes_are_dense_l2_sparser_and_l1_sparsest(name: str) -> None:
    model, test = load_model(name).module, datasets.load("digits")
    x, y = test.x[:50], test.y[:50]
    dense, middle, sparse = (
        gini(
            pgd(model, ThreatModel(p, equivalent_eps(p, 64, 0.1)).around(x), Spec.label(y, 10)) - x
        )
        for p in (INF, 2, 1)
    )
    assert (dense < middle).all()
    assert (middle < sparse).double().mean() > 0.9


def linear() -> tuple[Tensor, Tensor, Spec]:
    weight = torch.randn(2, 10, dtype=torch.float64)
    x = torch.rand(6, 10, dtype=torch.float64)
    return weight, x, Spec.label(torch.arange(6) % 2, 2)


def test_a_curve_on_an_affine_model_is_the_closed_form_after_each_step() -> None:
    weight, x, spec = linear()
    region = ThreatModel(INF, 0.5, -INF, INF).around(x)
    attack = partial(pgd, steps=12, step_size=0.1, loss="margin", dtype=x.dtype)
    curve = loss_curve(lambda z: z @ weight.T, region, spec, attack=attack, loss="margin")
    y = torch.arange(6) % 2
    slope = weight[1 - y] - weight[y]
    reach = 0.5 * (torch.arange(13.0, dtype=torch.float64) / 10).clamp_max(1)
    expected = (slope * x).sum(1) + reach.view(-1, 1) * slope.abs().sum(1)
    torch.testing.assert_close(curve, expected)


def test_a_curve_is_that_of_the_run_and_changes_nothing_about_it() -> None:
    net = network()
    x, y = batch(net)
    region, spec = ThreatModel(2, 0.5).around(x), Spec.label(y, K)
    for attack, evaluations in ((partial(pgd, steps=9), 10), (partial(apgd, steps=9), 9)):
        whole = partial(attack, drop=False, dtype=x.dtype)
        curve = loss_curve(net, region, spec, attack=whole, loss="margin")
        assert curve.shape == (evaluations, len(x))
        with torch.no_grad():
            best = LOSSES["margin"](spec.values(net(whole(net, region, spec))), spec)
        torch.testing.assert_close(curve.amax(0), best)
    with pytest.raises(ValueError, match="drop=False"):
        loss_curve(net, region, spec, attack=partial(apgd, dtype=x.dtype))


def test_restarts_of_an_affine_model_all_end_at_the_optimum_and_of_others_they_spread() -> None:
    weight, x, spec = linear()
    region, s = ThreatModel(INF, 0.1).around(x), seeds(x, 0, "t")
    attack = partial(pgd, dtype=x.dtype)
    losses = restart_losses(
        lambda z: z @ weight.T, region, spec, attack=attack, restarts=20, loss="margin", seeds=s
    )
    assert losses.shape == (20, 6)
    assert losses.std(0).max() < 1e-12
    net = network()
    x, y = batch(net)
    region, spec, s = ThreatModel(INF, 0.4).around(x), Spec.label(y, K), seeds(x, 0, "t")
    losses = restart_losses(net, region, spec, attack=attack, restarts=20, loss="margin", seeds=s)
    assert losses.std(0).max() > 0.01
    again = restart_losses(net, region, spec, attack=attack, restarts=3, loss="margin", seeds=s)
    torch.testing.assert_close(again, losses[:3])
    with pytest.raises(ValueError, match="restarts: 0"):
        restart_losses(net, region, spec, restarts=0, seeds=s)
