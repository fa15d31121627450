"""The worst-case cross-entropy from above: over sampled and attacked losses, exact for two classes and one layer."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import networks
from calipers.attacks import fgsm, pgd
from calipers.bounds import BOUNDS, losses
from calipers.bounds.losses import cross_entropy, worst_cross_entropy
from calipers.sets import Region
from calipers.spec import Spec
from networks import ARCHITECTURES
from rationals import exponential, logarithm
from sandwiches import PASSES, PRECISIONS

F32, F64 = torch.float32, torch.float64
INF = math.inf


def setting(network: Any, p: float = INF, eps: float = 0.1, count: int = 3):
    x = networks.inputs(network, count, 11)
    return Region.ball(x, eps, p, 0.0, 1.0), torch.arange(count) % 3


def test_it_is_torchs_cross_entropy_of_the_margins() -> None:
    logits = torch.randn(50, 10, dtype=F64) * 20
    y = torch.arange(50) % 10
    margins = Spec.label(y, 10).values(logits)
    expected = F.cross_entropy(logits, y, reduction="none")
    torch.testing.assert_close(cross_entropy(margins), expected, rtol=1e-12, atol=1e-12)
    stacked = torch.cat([torch.zeros(50, 1, dtype=F64), -margins], 1)
    again = F.cross_entropy(stacked, torch.zeros(50, dtype=torch.int64), reduction="none")
    torch.testing.assert_close(cross_entropy(margins), again, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [F32, F64])
def test_small_losses_are_accurate_and_rigorous_ones_above(dtype: torch.dtype) -> None:
    """Against log(1 + Σ exp) in rational arithmetic with 60 digits; log(1 + tiny) must not vanish."""
    finfo = torch.finfo(dtype)
    for margins in ([30.0, 40.0], [0.1, -0.2, 3.0], [-500.0, 20.0], [700.0], [80.0, 81.0, 82.0]):
        given = torch.tensor(margins, dtype=dtype)
        found = cross_entropy(given)
        exact = logarithm(1 + sum((exponential(-Fraction(m)) for m in given.tolist()), Fraction(0)))
        assert abs(Fraction(found.item()) - exact) <= exact * Fraction(64 * finfo.eps) + Fraction(
            finfo.tiny
        )
        above = Fraction(cross_entropy(given, rigorous=True).item())
        assert exact < above <= exact * (1 + Fraction(1, 1000)) + Fraction(finfo.tiny)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_no_point_has_a_larger_loss(name: str) -> None:
    network = ARCHITECTURES[name](0)
    methods = BOUNDS if name in ("mlp", "clamp", "sigmoid") else PASSES  # a program takes long
    for p in (2.0, INF):
        region, y = setting(network, p, 0.3)
        spec = Spec.label(y, 3)
        seeds = torch.arange(3)
        points = [
            fgsm(network, region, spec, seeds=seeds),
            pgd(network, region, spec, steps=15, loss="cross_entropy", seeds=seeds),
            *(region.sample(seeds + 3 * i, F64) for i in range(10)),
        ]
        forward = network.in_double()
        reached = [F.cross_entropy(forward(x), y, reduction="none") for x in points]
        most = torch.stack(reached).amax(0)
        for (method, bound), (dtype, rigorous) in itertools.product(methods.items(), PRECISIONS):
            worst = worst_cross_entropy(
                network, region, y, method=bound, dtype=dtype, rigorous=rigorous
            )
            assert (most <= worst * (1 + 1e-12) + 1e-14).all(), (method, p, dtype, rigorous)


@pytest.mark.parametrize("p", [1.0, 2.0, INF])
def test_two_classes_and_one_layer_are_exact(p: float) -> None:
    """One margin, affine: the bound is the loss at the worst point, which FGSM finds."""
    b = networks.Builder((6,), 4)
    b.linear(b.x, 2)
    network = b.network()
    x = networks.inputs(network, 5, 2)
    y = torch.arange(5) % 2
    region = Region.ball(x, 0.3, p, 0.0, 1.0)
    spec = Spec.label(y, 2)
    weight: Any = network.module
    slope = torch.einsum("bk,ki->bi", spec.C[:, 0].double(), weight.p0.double())
    worst = region.maximizer(-slope)
    reached = F.cross_entropy(network.in_double()(worst), y, reduction="none")
    found = worst_cross_entropy(network, region, y, dtype=F64)
    torch.testing.assert_close(found, reached, rtol=1e-9, atol=1e-12)


def test_several_classes_against_the_corners() -> None:
    """The loss of an affine network is convex, so its maximum over a box lies at a corner."""
    b = networks.Builder((5,), 4)
    b.linear(b.x, 4)
    network = b.network()
    x = networks.inputs(network, 6, 2)
    y = torch.arange(6) % 4
    region = Region.ball(x, 0.2, INF, 0.0, 1.0)
    low, high = region.hull()
    forward = network.in_double()
    corners = [
        torch.where(torch.tensor(mask), high, low)
        for mask in itertools.product([False, True], repeat=5)
    ]
    exact = torch.stack([F.cross_entropy(forward(c), y, reduction="none") for c in corners]).amax(0)
    found = worst_cross_entropy(network, region, y, dtype=F64)
    assert (found >= exact - 1e-12).all()
    assert (found <= 3 * exact).all()
    point = Region.ball(x, 0.0, INF)
    torch.testing.assert_close(
        worst_cross_entropy(network, point, y, dtype=F64),
        F.cross_entropy(forward(x), y, reduction="none"),
    )


@pytest.mark.parametrize("method", ["interval", "crown_ibp", "dual", "crown"])
def test_gradients(method: str) -> None:
    network = networks.mlp(3, (2, 3, 3))
    module: Any = network.module.double()
    x = networks.inputs(network, 2, 5).double() * 0.5 + 0.25
    y = torch.tensor([0, 1])

    def loss(center: torch.Tensor, *values: torch.Tensor) -> torch.Tensor:
        for name, value in zip(network.graph.params, values, strict=True):
            setattr(module, name, value)
        region = Region.ball(center, 0.05, INF, -1.0, 2.0)
        return worst_cross_entropy(network, region, y, method=BOUNDS[method])

    weights = [getattr(module, n) for n in network.graph.params]
    leaves = [v.detach().clone().requires_grad_() for v in (x, *weights)]
    assert torch.autograd.gradcheck(loss, leaves)


def test_descending_on_it_certifies() -> None:
    """The lower jaw drives the outer minimisation: some steps of gradient descent certify more examples."""
    network = networks.mlp(5, (4, 10, 10, 3))
    module: Any = network.module
    x = networks.inputs(network, 30, 1)
    y = x[:, :3].argmax(1)
    region, spec = Region.ball(x, 0.05, INF, 0.0, 1.0), Spec.label(y, 3)
    weights = [torch.nn.Parameter(getattr(module, n)) for n in network.graph.params]
    for name, weight in zip(network.graph.params, weights, strict=True):
        delattr(module, name)
        module.register_parameter(name, weight)
    optimiser = torch.optim.Adam(weights, lr=0.02)

    def certified() -> int:
        with torch.no_grad():
            low = BOUNDS["interval"](network, region, spec, dtype=F64, rigorous=True)
        return int((spec.margin(low) > 0).sum())

    before = certified()
    for _ in range(60):
        optimiser.zero_grad()
        loss = worst_cross_entropy(network, region, y, method=BOUNDS["interval"]).mean()
        loss.backward()
        optimiser.step()
    assert certified() >= before + 10


def test_nothing_known_is_no_small_loss() -> None:
    for value in (math.nan, -INF):
        loss = cross_entropy(torch.tensor([[1.0, value]]))
        assert not (loss < 1e30).any()
    assert cross_entropy(torch.tensor([[INF, INF]])).item() == 0.0


def test_a_planted_fault_is_seen(monkeypatch: Any) -> None:
    """Margins with the wrong sign, and softplus's shortcut for large arguments."""
    real = losses.cross_entropy
    for fault in (lambda m, **k: real(-m, **k), lambda m, **k: F.softplus(torch.logsumexp(-m, -1))):
        monkeypatch.setattr(losses, "cross_entropy", fault)
        monkeypatch.setitem(globals(), "cross_entropy", partial(fault))
        with pytest.raises(AssertionError):
            test_small_losses_are_accurate_and_rigorous_ones_above(F64)
