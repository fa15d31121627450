"""Local Lipschitz constants: exact where activation patterns can be enumerated, above every sampled gradient."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import linprog
from torch import Tensor

import networks
from calipers.attacks import pgd
from calipers.bounds import lipschitz as module
from calipers.bounds.lipschitz import certified_radius, jacobian, lipschitz
from calipers.errors import UnsupportedOp
from calipers.graph import primitives as prim
from calipers.graph.graph import Network
from calipers.ops import OPS, Activation, register
from calipers.sets import Region
from calipers.spec import Spec
from networks import ARCHITECTURES, Builder

F32, F64 = torch.float32, torch.float64
INF = math.inf
DUAL = {1.0: INF, 2.0: 2.0, INF: 1.0}


def setting(network: Network, p: float = INF, eps: float = 0.1, count: int = 3):
    x = networks.inputs(network, count, 11)
    return Region.ball(x, eps, p, 0.0, 1.0), Spec.label(torch.arange(count) % 3, 3)


def gradients(network: Network, spec: Spec, x: Tensor) -> Tensor:
    """Of every functional at the points ``x``, by automatic differentiation: (B, M, *x)."""
    forward = network.in_double()
    point = x.double().requires_grad_()
    values = spec.values(forward(point))
    rows = [
        torch.autograd.grad(values[:, m].sum(), point, retain_graph=True)[0]
        for m in range(values.shape[1])
    ]
    return torch.stack(rows, 1)


def members(region: Region, count: int = 40) -> list[Tensor]:
    seeds = torch.arange(len(region)) + 1
    generator = torch.Generator().manual_seed(3)
    points = [region.sample(seeds + 100 * i, F64) for i in range(count)]
    for _ in range(count):
        direction = torch.randn(region.center.shape, generator=generator, dtype=F64)
        points.append(region.maximizer(direction))
    return points


@pytest.mark.parametrize("p", [1.0, 2.0, INF])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_sampled_gradient_is_inside(name: str, p: float) -> None:
    network = ARCHITECTURES[name](0)
    for eps in (1e-3, 0.3):
        region, spec = setting(network, p, eps)
        loose = jacobian(network, region, spec, dtype=F64, tight=False)
        for dtype, rigorous in ((F64, True), (F64, False), (F32, True)):
            low, high = jacobian(network, region, spec, dtype=dtype, rigorous=rigorous)
            size = 1e-9 if rigorous and dtype == F64 else 1e-3
            assert (low >= loose.lower - size * (1 + loose.lower.abs())).all()
            assert (high <= loose.upper + size * (1 + loose.upper.abs())).all()
            constant = lipschitz(network, region, spec, dtype=dtype, rigorous=rigorous)
            for x in members(region, 4):
                found = gradients(network, spec, x)
                slack = 1e-12 * (1 + found.abs())
                assert (found >= low - slack).all(), (eps, dtype)
                assert (found <= high + slack).all(), (eps, dtype)
                norms = torch.linalg.vector_norm(found.flatten(2), ord=DUAL[p], dim=-1)
                assert (norms <= constant * (1 + 1e-12)).all()


@pytest.mark.parametrize("p", [1.0, 2.0, INF])
def test_differences_of_values_obey_it(p: float) -> None:
    """The statement itself, without gradients: |f(x) − f(x')| ≤ L·‖x − x'‖."""
    for name in ("mlp", "conv", "max_pool", "product", "mixed"):
        network = ARCHITECTURES[name](4)
        region, spec = setting(network, p, 0.4)
        constant = lipschitz(network, region, spec, dtype=F64, rigorous=True)
        forward = network.in_double()
        points = members(region, 10)
        for x, z in itertools.pairwise(points):
            change = (spec.values(forward(x)) - spec.values(forward(z))).abs()
            far = torch.linalg.vector_norm((x - z).flatten(1), ord=p, dim=1)
            assert (change <= constant * far.unsqueeze(1) + 1e-12).all(), name


def feasible_patterns(w1: np.ndarray, b1: np.ndarray, low: np.ndarray, high: np.ndarray):
    """The activation patterns of one hidden layer that occur in the interior of a box, by linear programs."""
    n = len(b1)
    for pattern in itertools.product([0, 1], repeat=n):
        sign = np.where(np.array(pattern) == 1, -1.0, 1.0)
        # sign·(w·x + b) <= −t, maximise t
        A = np.hstack([sign[:, None] * w1, np.ones((n, 1))])
        limits = [*zip(low, high, strict=True), (0, 1)]
        cost = [0.0] * w1.shape[1] + [-1.0]
        solved = linprog(cost, A_ub=A, b_ub=-sign * b1, bounds=limits)
        if solved.status == 0 and -solved.fun > 1e-9:
            yield np.array(pattern, dtype=float)


@pytest.mark.parametrize("p", [1.0, 2.0, INF])
def test_against_all_activation_patterns(p: float) -> None:
    """Above the exact constant, equal to it where one neuron is unstable."""
    exact_hits = 0
    for seed in range(12):
        network = networks.mlp(seed, (2, 5, 3))
        parameters: Any = network.module
        w1, b1, w2 = (getattr(parameters, n).double().numpy() for n in ("p0", "p1", "p2"))
        x = networks.inputs(network, 1, seed)
        for eps in (0.02, 0.1, 0.5):
            region = Region.ball(x, eps, INF, 0.0, 1.0)  # the set; p is the norm that measures
            spec = Spec.label(torch.tensor([seed % 3]), 3)
            low, high = (end[0].numpy() for end in region.hull())
            patterns = list(feasible_patterns(w1, b1, low, high))
            rows = spec.C[0].double().numpy() @ w2
            exact = max(
                np.linalg.norm((row * pattern) @ w1, ord=DUAL[p])
                for row in rows[:1]
                for pattern in patterns
            )
            found = lipschitz(network, region, spec, p=p, dtype=F64)[0, 0].item()
            assert found >= exact * (1 - 1e-12)
            if len(patterns) == 1:
                assert found <= exact * (1 + 1e-9) + 1e-12
                exact_hits += 1
    assert exact_hits >= 5


@pytest.mark.parametrize("p", [1.0, 2.0, INF])
def test_an_affine_network_has_its_own_norm(p: float) -> None:
    network = networks.affine(1)
    region, spec = setting(network, p, 0.3)
    expected = torch.linalg.vector_norm(
        gradients(network, spec, region.center).flatten(2), ord=DUAL[p], dim=-1
    )
    torch.testing.assert_close(lipschitz(network, region, spec, dtype=F64), expected)


@pytest.mark.parametrize("p", [1.0, 2.0, INF])
def test_no_point_within_the_certified_radius_breaks(p: float) -> None:
    broken = 0
    for seed in range(6):
        network = networks.mlp(seed, (3, 8, 6, 3))
        x = networks.inputs(network, 4, seed)
        y = network(x).argmax(1)
        spec = Spec.label(y, 3)
        region = Region.ball(x, 0.5, p, 0.0, 1.0)
        radius = certified_radius(network, region, spec)
        assert (radius >= 0).all()
        inside = Region.ball(x, radius.clamp_max(0.5), p, 0.0, 1.0)
        for points in (pgd(network, inside, spec, steps=20), *members(inside, 10)):
            assert (spec.margin(spec.values(network.in_double()(points))) > 0).all()
        # and it is not vacuous: a few times farther some do break
        outside = Region.ball(x, radius * 8, p, -INF, INF)
        points = pgd(network, outside, spec, steps=20)
        broken += int((spec.margin(spec.values(network.in_double()(points))) <= 0).sum())
        assert (radius > 0).all()
    assert broken >= 2


def test_the_certified_radius_is_that_of_the_affine_network() -> None:
    """distance to the nearest hyperplane: margin / dual norm, exactly."""
    network = networks.affine(3)
    x = networks.inputs(network, 4, 5)
    y = network(x).argmax(1)
    spec = Spec.label(y, 3)
    slope = gradients(network, spec, x).flatten(2)
    value = spec.values(network.in_double()(x.double()))
    for p in (1.0, 2.0, INF):
        expected = (value / torch.linalg.vector_norm(slope, ord=DUAL[p], dim=-1)).amin(1)
        found = certified_radius(network, Region.ball(x, 0.1, p, 0.0, 1.0), spec)
        assert (found <= expected).all()
        torch.testing.assert_close(found, expected.detach(), rtol=1e-9, atol=0)


def test_a_misclassified_centre_has_radius_zero_and_nan_no_radius() -> None:
    network = networks.mlp(1)
    x = networks.inputs(network, 2, 5)
    wrong = (network(x).argmax(1) + 1) % 3
    region = Region.ball(x, 0.1, INF, 0.0, 1.0)
    assert (certified_radius(network, region, Spec.label(wrong, 3)) == 0).all()
    parameters: Any = network.module
    parameters.p2.view(-1)[0] = math.nan
    assert (certified_radius(network, region, Spec.label(network(x).argmax(1), 3)) == 0).all()
    assert not (lipschitz(network, region, Spec.label(wrong, 3)) < 1e30).any()


def test_chunks_do_not_change_it() -> None:
    for name in ("conv", "max_pool", "residual"):
        network = ARCHITECTURES[name](2)
        region, spec = setting(network, 2.0, 0.2)
        whole = lipschitz(network, region, spec, dtype=F64)
        torch.testing.assert_close(lipschitz(network, region, spec, dtype=F64, memory=1), whole)
        rows = [lipschitz(network, region[i : i + 1], spec[i : i + 1], dtype=F64) for i in range(3)]
        torch.testing.assert_close(torch.cat(rows), whole)


def test_what_has_no_range_of_slopes_is_named() -> None:
    """A step has no Lipschitz constant."""
    b = Builder((3,))
    b.linear(b(torch.sign, b.linear(b.x, 4)), 3)
    network = b.network()
    region, spec = setting(network)
    with pytest.raises(UnsupportedOp, match=r"sign.*range of its slope"):
        lipschitz(network, region, spec)
    with pytest.raises(ValueError, match="p: 3 is not one of 1, 2, inf"):
        lipschitz(network, region, spec, p=3)
    far = replace(region, center=region.center + 5.0, _cache={})
    with pytest.raises(ValueError, match="centre lies outside"):
        certified_radius(network, far, spec)


CURVED = [op for op, kind in OPS.items() if isinstance(kind, Activation) and kind.pieces is None]
BEFORE: dict[Any, tuple[Any, ...]] = {torch.pow: (3,), prim.elu: (1.5, 1.0, 0.7)}


@pytest.mark.parametrize("op", CURVED)
def test_ranges_of_slopes_hold_every_slope(op: Any) -> None:
    """Against finite grids of autograd's own derivative, over intervals of all sizes."""
    kind: Any = OPS[op]
    args = BEFORE.get(op, ())
    ends = torch.tensor([-30.0, -3.0, -1.0, -0.1, 0.0, 0.2, 0.9, 2.5, 28.0], dtype=F64)
    known = 0
    for l, u in itertools.combinations(ends.tolist(), 2):
        grid = torch.linspace(l, u, 201, dtype=F64).requires_grad_()
        try:
            y = op(grid, *args)
            (slope,) = torch.autograd.grad(y.sum(), grid)
        except (RuntimeError, TypeError):
            return  # not differentiable at all
        box = module.Interval(*torch.tensor([[l], [u]], dtype=F64))
        found = module.slopes(op, kind, box, *args)
        if found is None or not torch.isfinite(y).all() or torch.isnan(found.lower).any():
            continue
        known += 1
        slack = 1e-13 * (1 + slope.abs().max())
        assert (slope >= found.lower - slack).all(), (l, u)
        assert (slope <= found.upper + slack).all(), (l, u)
    unit = module.Interval(*torch.tensor([[0.25], [0.75]], dtype=F64))
    assert known or module.slopes(op, kind, unit, *args) is None


# -- planted faults ----------------------------------------------------------------------------------------------


def left_slope_only(real: Any):
    def slopes(op: Any, kind: Any, x: Any, *args: Any):
        found = real(op, kind, x, *args)
        return module.Interval(found.lower, torch.minimum(found.upper, found.lower + 0.9))

    return slopes


def no_radius(real: Any):
    def back(*args: Any):
        return real(*args) * 0.5

    return back


def several_checks() -> None:
    for p in (1.0, 2.0, INF):
        test_against_all_activation_patterns(p)
        for net in ("mlp", "conv", "residual"):
            test_every_sampled_gradient_is_inside(net, p)


@pytest.mark.parametrize(
    ("name", "fault"), [("slopes", left_slope_only), ("_magnitude_back", no_radius)]
)
def test_planted_faults_are_seen(monkeypatch: Any, name: str, fault: Any) -> None:
    monkeypatch.setattr(module, name, fault(getattr(module, name)))
    with pytest.raises(AssertionError):
        several_checks()


def test_negative_matrices_keep_their_size() -> None:
    """|L|'r from the table's own |L|, at a point where |x| is differentiable."""
    for op, extra in ((torch.mul, -2.0), (torch.matmul, -torch.eye(4) * 3)):
        b = Builder((4,))
        h = b(op, b.relu(b.linear(b.x, 4)), extra)
        b.linear(h, 3)
        network = b.network()
        region, spec = setting(network, INF, 0.3)
        low, high = jacobian(network, region, spec, dtype=F64)
        assert ((high - low) > 1e-3).any()
        for x in members(region, 10):
            found = gradients(network, spec, x)
            assert (found >= low - 1e-12).all()
            assert (found <= high + 1e-12).all()


def test_the_table_may_be_replaced() -> None:
    """Slopes come from the op table's pieces."""
    network = networks.mlp(0)
    region, spec = setting(network)
    before = lipschitz(network, region, spec)
    relu: Any = OPS[torch.relu]
    try:
        register(
            torch.relu, replace(relu, pieces=lambda: relu.pieces()._replace(slopes=(0.0, 2.0)))
        )
        assert (lipschitz(network, region, spec) > before).all()
    finally:
        register(torch.relu, relu)
    assert F.relu is not torch.relu
