"""interval <= CROWN-IBP <= CROWN <= exact <= attack, on generated networks; methods join by being in the tables."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import geometry as g
import networks
import rationals
from calipers.attacks import fgsm, pgd
from calipers.bounds import BOUNDS, crown, interval
from calipers.graph import primitives as prim
from calipers.graph.capture import capture
from calipers.graph.graph import Network
from calipers.sets import Region
from calipers.spec import Spec
from networks import ARCHITECTURES, Builder
from patterns import exact_minima
from sandwiches import (
    F32,
    F64,
    PASSES,
    QUICK,
    check_affine_is_exact,
    check_solvers,
    check_sound,
    exact_affine_minimum,
    points,
)

INF = math.inf
RADIUS = {1.0: 0.8, 2.0: 0.4, INF: 0.15}


def region_of(network: Network, p: float, box: bool, eps: float | None = None, count: int = 4):
    x = networks.inputs(network, count, seed=7)
    sides = (0.0, 1.0) if box else (-INF, INF)
    return Region.ball(x, RADIUS[p] if eps is None else eps, p, *sides)


def labels(network: Network, count: int = 4) -> Spec:
    return Spec.label(torch.arange(count) % 3, network.num_classes)


@pytest.mark.parametrize("box", [True, False])
@pytest.mark.parametrize("p", [1.0, 2.0, INF])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_bounds_lie_under_every_point(name: str, p: float, box: bool) -> None:
    network = ARCHITECTURES[name](0)
    check_sound(network, region_of(network, p, box), labels(network))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_bounds_lie_under_every_point_of_large_regions(name: str) -> None:
    network = ARCHITECTURES[name](2)
    check_sound(network, region_of(network, INF, False, 3.0), labels(network))


@pytest.mark.parametrize("p", [1.0, 2.0, INF])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_bounds_lie_under_every_point_of_small_regions(name: str, p: float) -> None:
    """Where bounds are all but exact, so that nothing hides in their looseness."""
    network = ARCHITECTURES[name](3)
    region = region_of(network, p, True, 1e-3)
    check_sound(network, region, labels(network), [(F64, True)])


CAPTURED = {
    "conv": lambda: nn.Sequential(
        nn.Conv2d(1, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)
    ),
    "pool": lambda: nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.Tanh(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(27, 3)
    ),
}


@pytest.mark.parametrize("name", CAPTURED)
def test_captured_networks(name: str) -> None:
    module = CAPTURED[name]()
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.normal_(layer.weight)
            layer.running_mean = torch.randn(4)
            layer.running_var = torch.rand(4) + 0.2
    network = capture(module.eval(), torch.rand(2, 1, 8, 8))
    for p in (1.0, 2.0, INF):
        check_sound(network, region_of(network, p, True), labels(network))


# -- random chains of ops ---------------------------------------------------------------------------

LAYERS: dict[str, Any] = {
    "linear": lambda b, h: b(prim.reshape, b.linear(h, 12), (2, 3, 2)),
    "conv": lambda b, h: b.conv(h, 2),
    "deconv": lambda b, h: b(
        torch.conv_transpose2d, h, b.rand(b.size(h)[0], 2, 2, 2), None, [2, 1], [1, 0]
    ),
    "norm": lambda b, h: b.norm(h),
    "relu": lambda b, h: b.relu(h),
    "leaky": lambda b, h: b(F.leaky_relu, h, 0.2),
    "abs": lambda b, h: b(torch.abs, h),
    "tanh": lambda b, h: b(torch.tanh, h),
    "sigmoid": lambda b, h: b(torch.sigmoid, h),
    "clamp": lambda b, h: b(torch.clamp, h, -0.4, 0.6),
    "skip": lambda b, h: b(torch.add, h, b.relu(b.conv(h, b.size(h)[0]))),
    "gate": lambda b, h: b(torch.mul, h, b(torch.sigmoid, h)),
    "minus": lambda b, h: b(torch.add, b(torch.neg, h), -0.3),
    "cat": lambda b, h: b(torch.cat, [h, b(torch.mul, h, 0.5)], 1),
    "pool": lambda b, h: b(prim.max_pool, h, (2, 2), (1, 1), (1, 1), (1, 1)),
    "average": lambda b, h: b(prim.average_pool, h, (2, 2), (1, 1), (1, 1)),
    "crop": lambda b, h: b(prim.slice_, b(prim.pad, h, (1, 1, 1, 1)), 2, 1, b.size(h)[1] + 1, 1),
    "turn": lambda b, h: b(torch.permute, h, (0, 1, 3, 2)),
}


@settings(max_examples=40)
@given(
    names=st.lists(st.sampled_from(sorted(LAYERS)), min_size=1, max_size=5),
    seed=st.integers(0, 10**6),
    p=st.sampled_from([1.0, 2.0, INF]),
    box=st.booleans(),
)
def test_random_chains_of_ops(names: list[str], seed: int, p: float, box: bool) -> None:
    b = Builder((2, 3, 2), seed)
    h = b.x
    for name in names:
        h = LAYERS[name](b, h)
    b.linear(h, 3)
    network = b.network()
    check_sound(network, region_of(network, p, box, count=2), labels(network, 2), [(F64, True)])


# -- exact minima ------------------------------------------------------------------------------------


@pytest.mark.parametrize("box", [True, False])
@pytest.mark.parametrize("p", [1.0, INF])
@pytest.mark.parametrize("sizes", [(2, 5, 3), (2, 3, 3, 3)])
def test_exact_minimum_lies_between(sizes: tuple[int, ...], p: float, box: bool) -> None:
    network = networks.mlp(3, sizes)
    region = region_of(network, p, box, 0.4, count=2)
    spec = labels(network, 2)
    exact = exact_minima(network, region, spec)
    assert torch.isfinite(exact).all()
    tolerance = 1e-6  # of HiGHS: feasibility 1e-7, times slopes of a few units
    check_solvers(network, region, spec, spec.margin(exact))
    for name, bound in BOUNDS.items():
        for dtype in (F32, F64):
            low = bound(network, region, spec, dtype=dtype, rigorous=True)
            assert (low.double() <= exact + tolerance).all(), (name, dtype)
    forward = network.in_double()
    seeds = torch.arange(2)
    for name, attack in QUICK.items():
        x = attack(network, region, spec, seeds=seeds)
        values = spec.values(forward(x))
        assert (values >= exact - tolerance).all(), name
        for row, found in zip(
            rationals.functionals(network, spec, x), values.tolist(), strict=True
        ):
            assert [float(v) for v in row] == pytest.approx(found, abs=1e-12)
    # two inputs and five neurons: from 20 starts the steepest search must all but find the minimum
    x = pgd(network, region, spec, restarts=20, loss="margin", seeds=seeds)
    gap = spec.margin(spec.values(forward(x))) - spec.margin(exact)
    assert (gap <= 0.02 * (1 + spec.margin(exact).abs())).all(), gap


# -- cases with a known answer --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_point_region_gives_the_value(name: str) -> None:
    network = ARCHITECTURES[name](4)
    spec = labels(network)
    for p in (1.0, 2.0, INF):
        region = region_of(network, p, True, 0.0)
        value = spec.values(network.in_double()(region.center))
        for method, bound in PASSES.items():
            for dtype in (F64, F32):
                low = bound(network, region, spec, dtype=dtype).double()
                error = (low - value).abs().max().item()
                # S-shaped ops: tangents are found by bisection, and a point may use any of them
                assert error <= 2e4 * torch.finfo(dtype).eps, (method, p, dtype, error)


@pytest.mark.parametrize("box", [True, False])
@pytest.mark.parametrize("p", [1.0, 2.0, INF])
def test_an_affine_network_is_bounded_exactly(p: float, box: bool) -> None:
    network = networks.affine(0)
    module: Any = network.module
    region, spec = region_of(network, p, box), labels(network)
    forward = network.in_double()
    exact = exact_affine_minimum(network, region, spec, p, RADIUS[p], box)
    assert (exact - spec.values(forward(region.center))).max() < -0.01  # the region matters
    check_affine_is_exact(network, region, spec, exact)
    for m in range(2):
        one = Spec.functional(spec.C[:, m : m + 1])
        x = fgsm(module.double(), region, one, dtype=F64, loss="margin")
        gap = one.values(forward(x))[:, 0] - exact[:, m]
        assert gap.abs().max() <= 1e-5
        # coordinate steps of l1 take more of them to settle between the faces of the box
        steps = 100 if p == 1 else 40
        x = pgd(module.double(), region, one, dtype=F64, loss="margin", steps=steps)
        gap = one.values(forward(x))[:, 0] - exact[:, m]
        assert gap.abs().max() <= 1e-5


def test_steepest_pgd_in_l1_leaves_the_faces_of_the_box() -> None:
    module = nn.Linear(3, 2, bias=False).double()
    module.weight.data = torch.tensor([[-3.0, -2.0, -1.0], [0.0, 0.0, 0.0]], dtype=F64)
    region = Region.ball(torch.full((1, 3), 0.9, dtype=F64), 0.3, 1.0, 0.0, 1.0)
    spec = Spec.label(torch.tensor([0]), 2)
    x = pgd(module, region, spec, dtype=F64, loss="margin")
    # 0.1 up in each coordinate spends the radius
    assert spec.values(module(x)).item() == pytest.approx(-6.0, abs=1e-5)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_interval_bounds_are_monotone_in_the_region(name: str) -> None:
    network = ARCHITECTURES[name](5)
    spec = labels(network)
    for p in (1.0, 2.0, INF):
        before = torch.full((4, 2), INF, dtype=F64)
        for eps in (0.0, 1e-3, 0.03, 0.1, 0.4, 1.0):
            low = interval(network, region_of(network, p, True, eps), spec, dtype=F64)
            assert (low <= before + 1e-12 * (1 + low.abs())).all()
            before = low
        wider = interval(network, region_of(network, p, False, 1.0), spec, dtype=F64)
        assert (wider <= before + 1e-12 * (1 + before.abs())).all()


# -- batches ----------------------------------------------------------------------------------------------


def close(a: Tensor, b: Tensor, tolerance: float = 1e-11) -> bool:
    """Equal up to the order of float64 sums."""
    return bool(((a - b).abs() <= tolerance * (1 + b.abs())).all())


@pytest.mark.parametrize("method", PASSES)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_batch_chunks_and_order_do_not_matter(name: str, method: str) -> None:
    network, bound = ARCHITECTURES[name](6), PASSES[method]
    count = 3
    region = region_of(network, 2.0, True, count=count)
    spec = labels(network, count)
    # ascent divides gradients by their size: what is rounding in them is magnified
    same = partial(close, tolerance=1e-3 if method == "alpha_crown" else 1e-11)
    whole = bound(network, region, spec, dtype=F64, rigorous=True)
    for memory in (1, 50_000):
        chunked = bound(network, region, spec, dtype=F64, rigorous=True, memory=memory)
        assert same(chunked, whole), memory
    single = [
        bound(network, region[i : i + 1], spec[i : i + 1], dtype=F64, rigorous=True)
        for i in range(count)
    ]
    assert same(torch.cat(single), whole)
    order = torch.tensor([2, 0, 1])
    permuted = bound(network, region[order], spec[order], dtype=F64, rigorous=True)
    assert same(permuted, whole[order])
    turned = Spec(spec.C.flip(1), spec.d.flip(1), spec.clause)
    assert same(bound(network, region, turned, dtype=F64, rigorous=True), whole.flip(1))


@pytest.mark.parametrize("method", PASSES)
def test_permuting_classes_permutes_the_bounds(method: str) -> None:
    network, order = networks.conv(8), torch.tensor([2, 0, 1])
    region = region_of(network, INF, True)
    y = torch.tensor([0, 1, 2, 0])
    eye = torch.eye(3)
    C = eye[y].unsqueeze(1) - eye.expand(4, 3, 3)  # all classes, the label's own row is zero
    low = PASSES[method](network, region, Spec.functional(C), dtype=F64)
    module: Any = network.module
    last = network.graph.nodes[-1]
    for parameter in last.args[1:]:
        setattr(module, parameter.name, getattr(module, parameter.name)[order])
    place = torch.argsort(order)  # class k is now at place[k]
    C = eye[place[y]].unsqueeze(1) - eye.expand(4, 3, 3)
    permuted = PASSES[method](network, region, Spec.functional(C), dtype=F64)
    assert close(permuted, low[:, order])


def test_crown_is_tighter_than_intervals_where_it_should_be() -> None:
    """The oracle of looseness: on small regions a deep network's CROWN bound is near the exact value."""
    network = networks.mlp(3, (2, 3, 3, 3))
    region = region_of(network, INF, False, 0.02, count=3)
    spec = labels(network, 3)
    low = crown(network, region, spec, dtype=F64)
    exact = exact_minima(network, region, spec)
    spread = spec.values(network.in_double()(region.center)) - exact
    assert (exact - low <= 0.2 * spread + 1e-9).all(), (exact - low, spread)


def test_the_oracle_itself_sees_members_only() -> None:
    network = networks.mlp(0)
    for p in (1.0, 2.0, INF):
        region = region_of(network, p, True)
        for name, x in points(network, region, labels(network)).items():
            assert all(g.member(region, i, x) for i in range(4)), name
