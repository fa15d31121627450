"""Rigorous bounds hold in exact arithmetic: for every kind of layer, whatever the magnitudes, underflow included."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable
from fractions import Fraction
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import networks
import rationals
from calipers.bounds import BOUNDS
from calipers.bounds.losses import worst_cross_entropy
from calipers.bounds.state import State
from calipers.bracket import Bracket, Evidence, Verdict
from calipers.graph import primitives as prim
from calipers.graph.graph import Network
from calipers.sets import Region
from calipers.spec import Spec
from networks import Builder

F32, F64 = torch.float32, torch.float64
INF = math.inf


def conv(seed: int) -> Network:
    b = Builder((1, 4, 4), seed)
    h = b.relu(b.conv(b.x, 2, 3, 2))
    b.linear(b.relu(b.conv(h, 2, 2, 1, 0)), 3)
    return b.network()


def residual(seed: int) -> Network:
    b = Builder((1, 3, 3), seed)
    h = b.relu(b.norm(b.conv(b.x, 2)))
    h = b.relu(b(torch.add, b.norm(b.conv(h, 2)), h))
    b.linear(b(prim.average_pool, h, (3, 3), (3, 3), (0, 0)), 3)
    return b.network()


def normalised(seed: int) -> Network:
    b = Builder((3,), seed)
    b.linear(b.relu(b.norm(b.linear(b.relu(b.norm(b.linear(b.x, 4))), 4))), 3)
    return b.network()


def pooled(seed: int) -> Network:
    b = Builder((1, 4, 4), seed)
    h = b(prim.max_pool, b.conv(b.x, 2), (2, 2), (2, 2), (0, 0), (1, 1))
    h = b(prim.average_pool, b.relu(h), (2, 2), (1, 1), (0, 0))
    b.linear(h, 3)
    return b.network()


def smooth(seed: int) -> Network:
    b = Builder((3,), seed)
    h = b(torch.tanh, b.linear(b(torch.sigmoid, b.linear(b.x, 4)), 4))
    b.linear(h, 3)
    return b.network()


def leaky(seed: int) -> Network:
    b = Builder((3,), seed)
    h = b(F.leaky_relu, b.linear(b(torch.abs, b.linear(b.x, 4)), 4), 0.1)
    b.linear(h, 3)
    return b.network()


def gated(seed: int) -> Network:
    b = Builder((3,), seed)
    b.linear(b(torch.mul, b.linear(b.x, 4), b.relu(b.linear(b.x, 4))), 3)
    return b.network()


SMALL: dict[str, Callable[[int], Network]] = {
    "dense": lambda seed: networks.mlp(seed, (3, 5, 4, 3)),
    "conv": conv,
    "residual": residual,
    "normalised": normalised,
    "pooled": pooled,
    "smooth": smooth,
    "leaky": leaky,
    "gated": gated,
}


def scaled(network: Network, factors: list[float], dtype: torch.dtype) -> Network:
    """The network with its weights (not the statistics of normalisation) multiplied by ``factors`` in turn."""
    module: Any = network.module.to(dtype)
    turn = itertools.cycle(factors)
    for node in network.graph.nodes:
        if node.op in (F.linear, torch.conv2d):
            weight = getattr(module, node.args[1].name)
            weight.mul_(next(turn))
    return network


def members(region: Region, dtype: torch.dtype, corners: int = 4) -> list[Tensor]:
    """The centre, corners (of a ball: extreme points) and samples."""
    generator = torch.Generator().manual_seed(0)
    found = [region.project(region.center.to(dtype))]
    for i in range(corners):
        direction = torch.randn(region.center.shape, generator=generator, dtype=F64)
        found.append(region.maximizer(direction.to(dtype)))
        found.append(region.sample(torch.arange(len(region)) + 10 * i, dtype))
    return found


def check_exactly(
    network: Network, region: Region, spec: Spec, dtypes: Iterable[torch.dtype]
) -> None:
    """No rigorous bound exceeds the exact value at a member; one that says nothing (−inf, NaN) does not."""
    exact = []
    for x in members(region, network.dtype):
        assert region.contains(x).all()
        exact.append(rationals.functionals(network, spec, x))
    for method, bound in BOUNDS.items():
        for dtype in dtypes:
            low = bound(network, region, spec, dtype=dtype, rigorous=True).tolist()
            for values in exact:
                for row, ends in zip(values, low, strict=True):
                    for value, lower in zip(row, ends, strict=True):
                        slack = abs(value) * rationals.PLACES
                        assert not math.isfinite(lower) or Fraction(lower) <= value + slack, (
                            method,
                            dtype,
                            lower,
                            float(value),
                        )


def setting(network: Network, p: float, eps: float, count: int = 2) -> tuple[Region, Spec]:
    x = networks.inputs(network, count, 11)
    return Region.ball(x, eps, p, 0.0, 1.0), Spec.label(torch.arange(count) % 3, 3)


@pytest.mark.parametrize("name", SMALL)
def test_random_networks(name: str) -> None:
    """Points, hair-thin boxes, balls and wide boxes; both precisions."""
    for seed, (p, eps) in enumerate(
        ((INF, 0.0), (INF, 1e-7), (2.0, 1e-3), (1.0, 1e-6), (INF, 0.2))
    ):
        network = SMALL[name](seed)
        region, spec = setting(network, p, eps)
        check_exactly(network, region, spec, (F32, F64))


# products of neighbours that leave the range of float32 (or float64), or only just stay inside, and return
RANGES = {
    F32: ([1e-30, 1e-20, 1e30], [1e-38, 1e30, 1e8], [1e-22, 1e-22, 1e36], [1e18, 1e-20, 1e-30],
          [1e-44, 1.0, 1e36]),
    F64: ([1e-200, 1e-150, 1e300], [1e-300, 1e-200, 1e305], [1e150, 1e-200, 1e-300], [1e-320, 1.0, 1e305]),
}  # fmt: skip


@pytest.mark.parametrize("dtype", RANGES)
@pytest.mark.parametrize("name", ["dense", "conv", "normalised", "smooth", "leaky", "gated"])
def test_extreme_magnitudes(name: str, dtype: torch.dtype) -> None:
    for seed, factors in enumerate(RANGES[dtype]):
        network = scaled(SMALL[name](seed), factors, dtype)
        for p, eps in ((INF, 0.1), (2.0, 1e-3) if seed % 2 else (INF, 0.0)):
            region, spec = setting(network, p, eps)
            check_exactly(network, region, spec, (dtype,))


@pytest.mark.parametrize("eps", [1e-8, 1e-15, 1e-18, 1e-21, 1e-30])
def test_balls_whose_squares_underflow(eps: float) -> None:
    """An l2 radius whose square float32 cannot hold, around the origin, where differences as small count."""
    for seed in range(3):
        b = Builder((6,), seed)
        b.linear(b.x, 3, bias=False)
        network = scaled(b.network(), [1e-6 if seed else 1e6], F32)
        region = Region.ball(torch.zeros(2, 6, dtype=F64), eps, 2.0)
        spec = Spec.label(torch.tensor([0, 1]), 3)
        check_exactly(network, region, spec, (F32, F64))


def chain(factors: list[float], dtype: torch.dtype) -> Network:
    """x·f·g·..., with a ReLU after each factor, so that none of them merge, and the sign turned at the end."""
    b = Builder((1,), 0)
    h = b.x
    for factor in factors:
        h = b.relu(b(F.linear, h, torch.tensor([[factor]], dtype=F64)))
    b(F.linear, h, torch.tensor([[-1.0]], dtype=F64))
    return b.network(dtype)


@pytest.mark.parametrize("method", BOUNDS)
@pytest.mark.parametrize("dtype", [F32, F64])
def test_values_that_underflow_and_come_back(dtype: torch.dtype, method: str) -> None:
    """x·w·w·W·W·W with w·w below the smallest number and W·W·W as large again: computed 0, in truth −1."""
    small, large = (2.0**-81, 2.0**54) if dtype == F32 else (2.0**-600, 2.0**400)
    network = chain([small, small, large, large, large], dtype)
    region = Region.box(torch.tensor([[0.5]]), torch.tensor([[1.0]]))
    spec = Spec.functional(torch.ones(1, 1, 1))
    assert rationals.functionals(network, spec, torch.ones(1, 1))[0][0] == -1
    plain = BOUNDS[method](network, region, spec, dtype=dtype)
    assert not plain.item() < -0.5  # the construction bites
    low = BOUNDS[method](network, region, spec, dtype=dtype, rigorous=True)
    assert not low.item() > -1.0


@pytest.mark.parametrize("method", BOUNDS)
@pytest.mark.parametrize("dtype", [F32, F64])
def test_rows_that_underflow(dtype: torch.dtype, method: str) -> None:
    """The same from behind: tiny weights last, so that the product of rows vanishes where that of values does not."""
    large, small, far = (
        (2.0**60, 2.0**-80, 2.0**-100) if dtype == F32 else (2.0**500, 2.0**-600, 2.0**-900)
    )
    network = chain([large, large, small, small], dtype)
    x = torch.tensor([[far]], dtype=F64)
    region = Region.box(x * 0.5, x)
    spec = Spec.functional(torch.ones(1, 1, 1))
    exact = rationals.functionals(network, spec, x.to(dtype))[0][0]
    low = BOUNDS[method](network, region, spec, dtype=dtype, rigorous=True)
    assert not Fraction(low.item()) > exact


def backdoor(dtype: torch.dtype) -> tuple[Network, Tensor]:
    """A network in which every x of [0, 1] is of class 1, and float arithmetic says class 0.

    s = relu(x + 1)·σ is in truth cancelled by −(x + 1)·σ; a small switch rides on top: relu(σ·(x + 1) + 1) −
    relu(σ·(x + 1)) is 1 in truth, and 0 where σ swallows the 1. The classes are told apart by that switch.
    """
    size = 2.0**30 if dtype == F32 else 2.0**60
    b = Builder((1,), 0)
    first = torch.tensor([[size], [size]], dtype=F64)
    h = b.relu(b(F.linear, b.x, first, torch.tensor([size + 0.0, size], dtype=F64)))
    h = b(F.linear, h, torch.eye(2, dtype=F64), torch.tensor([1.0, 0.0], dtype=F64))
    switch = b.relu(b(F.linear, h, torch.tensor([[1.0, -1.0]], dtype=F64)))
    b(
        F.linear,
        switch,
        torch.tensor([[-1.0], [1.0]], dtype=F64),
        torch.tensor([0.5, -0.5], dtype=F64),
    )
    return b.network(dtype), torch.tensor([[0.5]])


@pytest.mark.parametrize("method", BOUNDS)
@pytest.mark.parametrize("dtype", [F32, F64])
def test_a_backdoor_in_the_rounding_is_refused(dtype: torch.dtype, method: str) -> None:
    """Zombori et al. 2021: a bound that ignores rounding proves the wrong class; a rigorous one says unknown."""
    network, x = backdoor(dtype)
    spec = Spec.label(torch.tensor([0]), 2)
    region = Region.ball(x, 0.0, INF, 0.0, 1.0)
    assert rationals.functionals(network, spec, x)[0][0] == -1  # in truth class 1
    assert network(x.to(dtype))[0].argmax() == 0  # as executed class 0
    naive = BOUNDS[method](network, region, spec, dtype=dtype)
    assert (naive > 0).all()
    for precision in (F32, F64):
        low = BOUNDS[method](network, region, spec, dtype=precision, rigorous=True)
        verdict = Bracket.from_bound(spec.margin(low), Evidence(method)).verdict()
        assert verdict == [Verdict.UNKNOWN]
        assert not (low > -1).any()


def test_the_worst_loss_holds_in_exact_arithmetic() -> None:
    for seed in range(4):
        network = SMALL["dense"](seed)
        region, _ = setting(network, INF, 1e-6)
        y = torch.arange(2)
        spec = Spec.label(y, 3)
        worst = worst_cross_entropy(network, region, y, dtype=F32, rigorous=True).tolist()
        for x in members(region, F32, 2):
            for row, bound in zip(rationals.functionals(network, spec, x), worst, strict=True):
                total = 1 + sum((rationals.exponential(-v) for v in row), Fraction(0))
                exact = rationals.logarithm(total)
                assert exact <= Fraction(bound) * (1 + rationals.PLACES)


@pytest.mark.parametrize("dtype", [F32, F64])
def test_flushed_subnormals_are_refused(dtype: torch.dtype) -> None:
    network = networks.mlp(0)
    region, spec = setting(network, INF, 0.1)
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor does not flush")
    try:
        with pytest.raises(ValueError, match="subnormal"):
            BOUNDS["interval"](network, region, spec, dtype=dtype, rigorous=True)
    finally:
        torch.set_flush_denormal(False)
    BOUNDS["interval"](network, region, spec, dtype=dtype, rigorous=True)


# -- planted faults ----------------------------------------------------------------------------------------------


def test_no_allowance_is_seen(monkeypatch: Any) -> None:
    monkeypatch.setattr(State, "gamma", lambda self, n: 0.0)
    with pytest.raises(AssertionError):
        test_random_networks("dense")
    with pytest.raises(AssertionError):
        test_a_backdoor_in_the_rounding_is_refused(F32, "crown")


def test_no_allowance_for_underflow_is_seen(monkeypatch: Any) -> None:
    monkeypatch.setattr(State, "tiny", property(lambda self: 0.0))
    with pytest.raises(AssertionError):
        test_values_that_underflow_and_come_back(F64, "interval")
    with pytest.raises(AssertionError):
        test_rows_that_underflow(F64, "crown")
