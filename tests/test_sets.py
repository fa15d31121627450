"""Norm balls intersected with boxes, against rational arithmetic, HiGHS, SLSQP and bisection in extended precision."""

from __future__ import annotations

import math
import time
from fractions import Fraction

import numpy as np
import pytest
import scipy.optimize
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import geometry as g
from calipers.errors import DataError, RegionError
from calipers.sets import Region, ThreatModel, cast, exact
from geometry import INF, Case

NORMS = [1, 2, INF]
DTYPES = [torch.float32, torch.float64]

# -- numbers -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("0.1", Fraction(1, 10)),
        ("8/255", Fraction(8, 255)),
        (" 8/255 ", Fraction(8, 255)),
        ("-0.5", Fraction(-1, 2)),
        ("+3", Fraction(3)),
        ("1e-3", Fraction(1, 1000)),
        ("2.5E2/10", Fraction(25)),
        ("1.", Fraction(1)),
        (0.1, Fraction(3602879701896397, 2**55)),
        (3, Fraction(3)),
        (Fraction(1, 3), Fraction(1, 3)),
    ],
)
def test_exact(value: object, expected: Fraction) -> None:
    assert exact(value) == expected  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "abc",
        "1/0",
        "8/2/3",
        "nan",
        "inf",
        "-inf",
        "1e",
        "0x10",
        "1_000",
        "1,5",
        "1 / 2",
        "8/2.5",
        "--1",
        "1e9999",
        "9" * 41,
        "1/-3",
    ],
)
def test_exact_refuses(text: str) -> None:
    with pytest.raises(ValueError, match="number"):
        exact(text)
    with pytest.raises(ValueError, match="eps"):
        ThreatModel(INF, text)


@pytest.mark.parametrize("value", [math.nan, INF, -INF])
def test_exact_refuses_floats_that_are_no_numbers(value: float) -> None:
    with pytest.raises(ValueError, match="not finite"):
        exact(value)


@pytest.mark.parametrize(
    "text", ["1e999999999", "1e-999999999", "1" * 100_000, "1e400", "9" * 10**6 + "/3"]
)
def test_hostile_numbers_are_refused_fast(text: str) -> None:
    start = time.perf_counter()
    with pytest.raises(ValueError, match="eps") as caught:
        ThreatModel(INF, text)
    assert time.perf_counter() - start < 0.5
    assert len(str(caught.value)) < 300


def test_a_radius_below_the_smallest_float_is_enclosed() -> None:
    g.check_enclosure(Case(torch.tensor([[0.5]], dtype=torch.float64), INF, "1e-400"))
    g.check_enclosure(Case(torch.tensor([[0.5]], dtype=torch.float64), INF, "1e-320"))


EPS = ["0.1", "8/255", "1/3", 0.1, Fraction(2, 7), "0.5", "1e-17", "3", 0]


@pytest.mark.parametrize("p", NORMS)
@pytest.mark.parametrize("eps", EPS)
@pytest.mark.parametrize(
    "box", [("0", "1"), ("-0.1", "1.1"), (-INF, INF), ("-1/3", "100"), (-INF, "1")]
)
def test_directed_rounding_against_fractions(
    p: float, eps: object, box: tuple[object, object]
) -> None:
    x = torch.rand(4, 5, dtype=torch.float64)
    x[0] = torch.tensor([0.0, 1.0, 0.1, 0.5, 1 / 3], dtype=torch.float64)
    x[1] = x[1].float().double()
    g.check_enclosure(Case(x, p, eps, *box))


@given(st.floats(0, 1), st.fractions(0, 2, max_denominator=10**6))
def test_directed_rounding_property(c: float, eps: Fraction) -> None:
    g.check_enclosure(Case(torch.tensor([[c]], dtype=torch.float64), INF, eps))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@given(value=st.floats(allow_nan=False))
def test_cast_is_the_tightest_directed_rounding(dtype: torch.dtype, value: float) -> None:
    below, above = (cast(torch.tensor([value], dtype=torch.float64), dtype, t) for t in (-INF, INF))
    assert below.dtype == above.dtype == dtype
    assert below.item() <= value <= above.item()
    if below.item() != above.item():  # neighbours
        assert torch.nextafter(below, torch.full_like(below, INF)).item() == above.item()
    else:
        assert below.item() == value


def test_cast_is_differentiable_as_the_identity() -> None:
    value = torch.tensor([0.1, 0.2, 1e300], dtype=torch.float64, requires_grad=True)
    cast(value[:2], torch.float32, INF).sum().backward()
    assert value.grad is not None
    assert value.grad.tolist() == [1, 1, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_inner_ends_lie_inside(dtype: torch.dtype) -> None:
    x = torch.rand(20, 5).to(dtype)
    region = ThreatModel(INF, "0.1").around(x)
    low, high = region.inner(dtype)
    for i in range(20):
        for c, lo, hi in zip(x[i].tolist(), low[i].tolist(), high[i].tolist(), strict=True):
            assert max(Fraction(c) - Fraction(1, 10), 0) <= Fraction(lo) <= Fraction(c)
            assert Fraction(c) <= Fraction(hi) <= min(Fraction(c) + Fraction(1, 10), 1)
    assert region.contains(low).all()
    assert region.contains(high).all()


# -- oracles: are they right? --------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(8))
def test_euclidean_projection_against_slsqp(seed: int) -> None:
    """p = 2 by SLSQP; p = 1 as a quadratic programme in the positive and negative part of the step."""
    generator = np.random.default_rng(seed)
    n = 4
    c, z = generator.random(n), generator.standard_normal(n) * 2
    eps, options = 0.6, {"ftol": 1e-10, "maxiter": 500}
    x = torch.from_numpy(c)[None]
    two = scipy.optimize.minimize(
        lambda v: ((v - z) ** 2).sum(), c, jac=lambda v: 2 * (v - z), bounds=[(0, 1)] * n,
        method="SLSQP", options=options,
        constraints=[{"type": "ineq", "fun": lambda v: eps**2 - ((v - c) ** 2).sum(), "jac": lambda v: -2 * (v - c)}],
    )  # fmt: skip
    got = ThreatModel(2, eps).around(x).project(torch.from_numpy(z)[None])[0].numpy()
    assert two.success
    assert np.abs(got - two.x).max() < 1e-6
    assert ((got - z) ** 2).sum() <= two.fun + 1e-9
    one = scipy.optimize.minimize(
        lambda d: ((c + d[:n] - d[n:] - z) ** 2).sum(), np.full(2 * n, 0.01), method="SLSQP", options=options,
        bounds=[(0, v) for v in 1 - c] + [(0, v) for v in c],
        constraints=[{"type": "ineq", "fun": lambda d: eps - d.sum(), "jac": lambda d: -np.ones(2 * n)}],
    )  # fmt: skip
    got = ThreatModel(1, eps).around(x).project(torch.from_numpy(z)[None])[0].numpy()
    assert one.success
    assert np.abs(got - (c + one.x[:n] - one.x[n:])).max() < 1e-5
    assert ((got - z) ** 2).sum() <= one.fun + 1e-8


@pytest.mark.parametrize("p", [1, INF])
@pytest.mark.parametrize("seed", range(8))
def test_support_and_maximizer_against_highs(p: float, seed: int) -> None:
    generator = np.random.default_rng(seed)
    n = 6
    c, a = generator.random(n), generator.standard_normal(n)
    eps = 0.4
    result = scipy.optimize.linprog(
        -np.concatenate([a, -a]), np.ones((1, 2 * n)), [eps if p == 1 else 1e9],
        bounds=[(0, min(v, eps)) for v in 1 - c] + [(0, min(v, eps)) for v in c], method="highs",
    )  # fmt: skip
    best = a @ c - result.fun
    region = ThreatModel(p, eps).around(torch.from_numpy(c)[None])
    slope = torch.from_numpy(a)[None]
    assert abs(region.support(slope).item() - best) < 1e-7
    assert abs((region.maximizer(slope) * slope).sum().item() - best) < 1e-7


@pytest.mark.parametrize("seed", range(8))
def test_support_and_maximizer_against_slsqp(seed: int) -> None:
    generator = np.random.default_rng(seed)
    n = 5
    c, a, eps = generator.random(n), generator.standard_normal(n), 0.7
    result = scipy.optimize.minimize(
        lambda v: -a @ v, c, jac=lambda v: -a, bounds=[(0, 1)] * n,
        method="SLSQP", options={"ftol": 1e-10, "maxiter": 500},
        constraints=[{"type": "ineq", "fun": lambda v: eps**2 - ((v - c) ** 2).sum(), "jac": lambda v: -2 * (v - c)}],
    )  # fmt: skip
    region = ThreatModel(2, eps).around(torch.from_numpy(c)[None])
    slope = torch.from_numpy(a)[None]
    assert result.success
    assert abs(region.support(slope).item() + result.fun) < 1e-6
    assert abs((region.maximizer(slope) * slope).sum().item() + result.fun) < 1e-6


# -- projection, maximiser, support on nasty values ----------------------------------------------

NASTY = [0.0, 1.0, 0.5, 0.1, 0.3, 1e-12, 1 - 1e-7, 2.0**-149, 1 / 3]
FAR = [-1.0, 2.0, 0.1 + 1e-9, 1e-30, -1e-12, 1e4, -3e7, 1e20, -1e30]


@st.composite
def cases(draw: st.DrawFn) -> tuple[Case, Tensor, Tensor]:
    dtype = draw(st.sampled_from(DTYPES))
    n, batch = draw(st.integers(1, 6)), draw(st.integers(1, 3))

    def rows(values: st.SearchStrategy[float], count: int = batch) -> Tensor:
        size = n * count
        return (
            torch.tensor(draw(st.lists(values, min_size=size, max_size=size)), dtype=torch.float64)
            .to(dtype)
            .view(count, n)
        )

    x = rows(st.sampled_from(NASTY) | st.floats(0, 1, width=32))
    eps = draw(st.sampled_from([0, 1e-12, "1e-9", "0.1", "8/255", 0.1, Fraction(1, 3), 1, 2, 1e6]))
    box = draw(st.sampled_from(["unit", "none", "features"]))
    sides: tuple[object, object] = {"unit": (0.0, 1.0), "none": (-INF, INF)}.get(box, (0.0, 1.0))
    if box == "features":
        gap = rows(st.sampled_from([0.0, 0.01, 0.1, 2.0]), 1)[0]
        sides = (x.amin(0) - gap, x.amax(0) + gap.flip(0))
    kind = draw(st.sampled_from(["near", "far", "member"]))
    if kind == "near":
        z = x + rows(st.floats(-2, 2, width=32))
    elif kind == "far":
        z = rows(st.sampled_from(FAR + NASTY))
    else:
        z = x.clone()
    a = rows(
        st.sampled_from([0.0, 1.0, -1.0, 1e-30, 1e-3, 0.5]) | st.floats(-1, 1, width=32), batch * 2
    )
    return Case(x, draw(st.sampled_from(NORMS)), eps, *sides), z, a.view(2, batch, n)


@given(cases())
def test_projection_is_the_nearest_member(drawn: tuple[Case, Tensor, Tensor]) -> None:
    case, z, _ = drawn
    g.check_projection(case, z)
    g.check_projection(case, case.region.project(z))  # and of a member


@given(cases())
def test_maximizer_attains_the_maximum(drawn: tuple[Case, Tensor, Tensor]) -> None:
    case, _, a = drawn
    for row in a:
        g.check_maximizer(case, row)


@given(cases())
def test_support_is_the_maximum(drawn: tuple[Case, Tensor, Tensor]) -> None:
    case, _, a = drawn
    g.check_support(case, a)
    region = case.region
    frame = region.frame(a.dtype)
    inner = (a * frame[0]).sum(-1)
    torch.testing.assert_close(region.support(a), inner + region.reach(a), rtol=0, atol=0)


@given(cases(), st.randoms(use_true_random=False))
def test_contains_is_exact_next_to_the_boundary(
    drawn: tuple[Case, Tensor, Tensor], random: object
) -> None:
    case, z, a = drawn
    region = case.region
    for point in (z, region.project(z), region.maximizer(a[0]), case.x):
        for towards in (z, a[0] * 1e9, case.x):
            g.check_contains(region, point)
            point = torch.nextafter(point, towards.to(point.dtype))
    g.check_contains(region, case.x)
    assert region.contains(case.x).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("small", [1e-15, 1e-20, 1e-30, 1e-38, 1e-42, 1e-200])
@pytest.mark.parametrize("p", NORMS)
def test_slopes_of_very_different_size(p: float, small: float, dtype: torch.dtype) -> None:
    """Once the large slopes are at their caps the small ones share the radius; their squares underflow."""
    a = torch.tensor([[[1.0, small, 0.0, -small, small / 2]]], dtype=dtype)
    case = Case(torch.tensor([[0.5, 0.1, 0.2, 0.9, 0.0]], dtype=dtype), p, 1)
    g.check_support(case, a)
    g.check_maximizer(case, a[0])


@pytest.mark.parametrize("p", NORMS)
def test_contains_on_pythagorean_points(p: float) -> None:
    g.check_contains(*g.edge_points(p))


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("exponent", [-537, -530, -300, 0, 300, 500, 511])
def test_contains_at_extreme_scales(p: float, exponent: int) -> None:
    """Squares that underflow or overflow do not decide."""
    scale = 2.0**exponent
    points = (
        torch.tensor(
            [[3.0, 4.0], [3.0, math.nextafter(4.0, 5)], [3.0, math.nextafter(4.0, 3)]],
            dtype=torch.float64,
        )
        * scale
    )
    region = Region.ball(
        torch.zeros(3, 2, dtype=torch.float64), (5.0 if p == 2 else 7.0) * scale, p
    )
    g.check_contains(region, points)
    assert region.contains(points).tolist() == [True, False, True]


@pytest.mark.parametrize("p", NORMS)
def test_stored_membership_is_true_membership(p: float) -> None:
    """Members of the stored set are members of the exact set: eps = 1/10, which no float is."""
    x = torch.rand(50, 3, dtype=torch.float64)
    region = ThreatModel(p, "0.1").around(x)
    points = region.maximizer(torch.randn(50, 3, dtype=torch.float64))
    eps = Fraction(1, 10)
    for i in range(50):
        gaps = [
            abs(Fraction(v) - Fraction(c))
            for v, c in zip(points[i].tolist(), x[i].tolist(), strict=True)
        ]
        size = sum(gaps) if p == 1 else sum(d * d for d in gaps) if p == 2 else max(gaps)
        assert size <= (eps * eps if p == 2 else eps)
        assert all(0 <= v <= 1 for v in points[i].tolist())


@pytest.mark.parametrize("p", NORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_infinity_are_never_members(p: float, dtype: torch.dtype) -> None:
    x = torch.full((3, 2), 0.5, dtype=dtype)
    for lower, upper in ((0.0, 1.0), (-INF, INF)):
        region = ThreatModel(p, 0.1, lower, upper).around(x)
        z = torch.tensor([[math.nan, 0.5], [INF, 0.5], [-INF, 0.5]], dtype=dtype)
        assert not region.contains(z).any()
        projected = region.project(z)
        assert region.contains(projected).tolist() == [False, True, True]  # a NaN stays visible
        torch.testing.assert_close(
            projected[1:], torch.tensor([[0.6, 0.5], [0.4, 0.5]], dtype=dtype), rtol=0, atol=1e-6
        )
    box = Region.box(torch.full((3, 2), -INF), torch.full((3, 2), INF))
    assert not box.contains(z).any()
    assert box.contains(x).all()


@pytest.mark.parametrize("p", NORMS)
def test_zero_slope_keeps_the_centre(p: float) -> None:
    x = torch.rand(4, 3)
    region = ThreatModel(p, 0.3).around(x)
    assert torch.equal(region.maximizer(torch.zeros(4, 3)), x)
    torch.testing.assert_close(region.support(torch.zeros(2, 4, 3)), torch.zeros(2, 4))


@pytest.mark.parametrize("p", NORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_images_and_many_rows(p: float, dtype: torch.dtype) -> None:
    """Inputs of rank 3 and S rows per example give what each row gives alone."""
    x = torch.rand(3, 2, 4, 5, dtype=dtype)
    region = ThreatModel(p, 0.7).around(x)
    a = torch.randn(6, 3, 2, 4, 5, dtype=dtype)
    values = region.support(a)
    assert values.shape == (6, 3)
    for s in range(6):
        torch.testing.assert_close(values[s], region.support(a[s]))
        point = region.maximizer(a[s])
        assert region.contains(point).all()
        torch.testing.assert_close(
            (point * a[s]).flatten(1).sum(1), values[s], rtol=1e-5, atol=1e-5
        )
    for i in range(3):
        torch.testing.assert_close(region[i : i + 1].support(a[:, i : i + 1]), values[:, i : i + 1])
        assert torch.equal(
            region[i : i + 1].project(a[0, i : i + 1]), region.project(a[0])[i : i + 1]
        )
    nested = region.support(a.view(2, 3, 3, 2, 4, 5))
    torch.testing.assert_close(nested, values.view(2, 3, 3))


@pytest.mark.parametrize("p", NORMS)
def test_high_dimension(p: float) -> None:
    """The one-dimensional searches converge with thousands of caps: primal and dual meet."""
    x = torch.rand(2, 3072, dtype=torch.float64)
    x[:, ::3] = x[:, ::3].round()
    region = ThreatModel(p, {1: 30.0, 2: 4.0, INF: 0.3}[p]).around(x)
    a = torch.randn(2, 3072, dtype=torch.float64) ** 3
    point = region.maximizer(a)
    assert region.contains(point).all()
    torch.testing.assert_close((a * point).sum(1), region.support(a), rtol=1e-11, atol=1e-11)
    # z is projected to P: no member lies further in the direction z − P (variational inequality)
    z = x + torch.randn_like(x)
    projected = region.project(z)
    normal = z - projected
    assert region.contains(projected).all()
    torch.testing.assert_close(
        (normal * projected).sum(1), region.support(normal), rtol=1e-9, atol=1e-9
    )


# -- radii and boxes of other shapes --------------------------------------------------------------


def test_radius_per_feature() -> None:
    x = torch.full((2, 3), 0.5)
    eps = torch.tensor([0.0, 0.1, 0.9])
    region = ThreatModel(INF, eps).around(x)
    low, high = region.inner(torch.float32)
    torch.testing.assert_close(low[0], torch.tensor([0.5, 0.4, 0.0]))
    torch.testing.assert_close(high[1], torch.tensor([0.5, 0.6, 1.0]))
    a = torch.tensor([[1.0, -1.0, 2.0], [-1.0, 1.0, -2.0]])
    torch.testing.assert_close(region.support(a), torch.tensor([0.5 - 0.4 + 2.0, -0.5 + 0.6]))
    draw = region.sample(torch.arange(2))
    assert region.contains(draw).all()
    assert region[1:].contains(draw[1:]).all()


@pytest.mark.parametrize("batch", [1, 2, 3, 4])
def test_radius_per_feature_does_not_depend_on_the_batch_size(batch: int) -> None:
    """Also where the number of examples happens to be the number of features."""
    eps = torch.tensor([0.1, 0.2, 0.3])
    region = ThreatModel(INF, eps).around(torch.full((batch, 3), 0.5))
    torch.testing.assert_close(region.upper, (0.5 + eps.double()).expand(batch, 3))


@pytest.mark.parametrize("p", NORMS)
def test_radius_per_example(p: float) -> None:
    x = torch.rand(4, 3, dtype=torch.float64)
    eps = torch.tensor([0.0, 0.1, 0.5, 2.0], dtype=torch.float64)
    together = Region.ball(x, eps, p, 0.0, 1.0)
    a = torch.randn(4, 3, dtype=torch.float64)
    for i in range(4):
        alone = Region.ball(x[i : i + 1], float(eps[i]), p, 0.0, 1.0)
        assert torch.equal(together.project(3 * a)[i : i + 1], alone.project(3 * a[i : i + 1]))
        torch.testing.assert_close(together.support(a)[i : i + 1], alone.support(a[i : i + 1]))
        assert torch.equal(together[i : i + 1].upper, alone.upper)


def test_mask_is_a_frozen_feature() -> None:
    x = torch.rand(1, 4)
    frozen = torch.tensor([True, False, True, False])
    lower, upper = torch.where(frozen, x[0], 0.0), torch.where(frozen, x[0], 1.0)
    for p in NORMS:
        region = ThreatModel(p, 0.5, lower, upper).around(x)
        moved = region.project(x + torch.randn(1, 4))
        assert torch.equal(moved[0, frozen], x[0, frozen])
        assert not torch.equal(moved[0, ~frozen], x[0, ~frozen])


# -- gradients ------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", NORMS)
@pytest.mark.parametrize("eps", [0.05, 0.4, 1.5])
@pytest.mark.parametrize("box", [(0.0, 1.0), (-INF, INF)])
def test_gradients_of_support(p: float, eps: float, box: tuple[float, float]) -> None:
    """Against finite differences, in the functional and in the centre; and in the functional it is the maximiser."""
    x = torch.rand(3, 5, dtype=torch.float64)
    a = torch.randn(2, 3, 5, dtype=torch.float64)
    region = ThreatModel(p, eps, *box).around(x)
    assert torch.autograd.gradcheck(
        region.support, (a.clone().requires_grad_(),), atol=1e-6, rtol=1e-5
    )
    slope = a.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(region.support(slope).sum(), slope)
    for s in range(2):
        torch.testing.assert_close(gradient[s], region.maximizer(a[s]), rtol=1e-9, atol=1e-9)

    def at(center: Tensor) -> Tensor:
        return Region.ball(center, eps, p, *box).support(a)

    assert torch.autograd.gradcheck(at, (x.clone().requires_grad_(),), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("p", NORMS)
def test_gradients_flow_in_float32_and_points_are_constants(p: float) -> None:
    x = torch.rand(3, 5, requires_grad=True)
    region = ThreatModel(p, 0.3).around(x)
    a = torch.randn(3, 5)
    (gradient,) = torch.autograd.grad(region.support(a).sum(), x)
    assert torch.isfinite(gradient).all()
    assert gradient.abs().sum() > 0
    for point in (region.project(a), region.maximizer(a), region.sample(torch.arange(3))):
        assert not point.requires_grad


@pytest.mark.parametrize("p", NORMS)
def test_cached_frames_do_not_lose_gradients(p: float) -> None:
    """A call without gradients first must not cut those of a later call; sides carry them as centres do."""
    x, side = torch.rand(2, 3), torch.zeros(3, requires_grad=True)
    a = -torch.ones(2, 3)
    region = ThreatModel(p, 5.0, side, 1.0).around(x)
    with torch.no_grad():
        region.support(a)
    (slope,) = torch.autograd.grad(region.support(a).sum(), side)
    torch.testing.assert_close(slope, torch.full((3,), -2.0))  # every lower side is active


# -- steepest -------------------------------------------------------------------------------------


def test_steepest_closed_forms() -> None:
    gradient = torch.tensor([[3.0, -4.0, 0.0], [0.0, 0.0, 0.0], [-1.0, 0.5, 0.25]])
    x = torch.full((3, 3), 0.5)
    steps = {p: ThreatModel(p, 0.1).around(x).steepest(gradient) for p in NORMS}
    assert steps[INF].tolist() == [[1, -1, 0], [0, 0, 0], [-1, 1, 1]]
    assert steps[1].tolist() == [[0, -1, 0], [0, 0, 0], [-1, 0, 0]]
    expected = [[0.6, -0.8, 0], [0, 0, 0], list(np.array([-1, 0.5, 0.25]) / math.sqrt(1.3125))]
    torch.testing.assert_close(steps[2], torch.tensor(expected, dtype=torch.float32))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1e-42, 1e-38, 1e-30, 1e-12, 1.0, 1e12, 1e25, 1e37])
@pytest.mark.parametrize("p", NORMS)
def test_steepest_at_any_scale(p: float, scale: float, dtype: torch.dtype) -> None:
    gradient = torch.randn(4, 2, 6, dtype=dtype) * scale
    step = ThreatModel(p, 0.1).around(torch.rand(4, 2, 6, dtype=dtype)).steepest(gradient)
    size = torch.linalg.vector_norm(step.flatten(1).double(), ord=p, dim=1)
    torch.testing.assert_close(size, torch.ones(4, dtype=torch.float64), rtol=1e-5, atol=1e-5)
    dual = {1: INF, 2: 2, INF: 1}[p]
    unit = gradient.double() / gradient.double().abs().max()
    best = torch.linalg.vector_norm(unit.flatten(1), ord=dual, dim=1)
    torch.testing.assert_close(
        (unit * step.double()).flatten(1).sum(1), best, rtol=1e-3 if scale < 1e-38 else 1e-5, atol=0
    )


# -- sampling -------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", NORMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("eps", ["0.1", 0.7, 0, 1e-12])
def test_samples_are_members_and_depend_on_their_seed_alone(
    p: float, dtype: torch.dtype, eps: object
) -> None:
    x = torch.rand(6, 2, 3, dtype=dtype)
    region = ThreatModel(p, eps).around(x)  # type: ignore[arg-type]
    seeds = torch.tensor([5, 1, 4, 1, 5, 9])
    draw = region.sample(seeds, dtype)
    assert draw.dtype == dtype
    assert region.contains(draw).all()
    order = torch.tensor([3, 0, 5])
    torch.rand(7)  # the global state does not matter
    assert torch.equal(region[order].sample(seeds[order], dtype), draw[order])
    if eps == 0.7:
        assert not torch.equal(draw, region.sample(seeds + 1, dtype))


def test_samples_are_uniform() -> None:
    """Kolmogorov-Smirnov against the exact marginals (the seeds are fixed, so the outcome is too)."""
    count, n = 3000, 3
    x = torch.full((count, n), 0.5, dtype=torch.float64)
    seeds = torch.arange(count)
    box = ThreatModel(INF, 0.7).around(x).sample(seeds, torch.float64)  # clipped to [0, 1]
    for i in range(n):
        assert scipy.stats.kstest(box[:, i].numpy(), "uniform").pvalue > 1e-3
        assert abs(box[:, i].mean().item() - 0.5) < 4 * math.sqrt(1 / 12 / count)
    for p in (1, 2):
        step = (ThreatModel(p, 0.25).around(x).sample(seeds, torch.float64) - 0.5).numpy() / 0.25
        size = np.linalg.norm(step, ord=p, axis=1)
        assert scipy.stats.kstest(size**n, "uniform").pvalue > 1e-3
        first = np.abs(step[:, 0]) / size
        # on the sphere in three dimensions a coordinate is uniform; on the cross-polytope it is Beta(1, 2)
        marginal = scipy.stats.uniform.cdf if p == 2 else scipy.stats.beta(1, 2).cdf
        assert scipy.stats.kstest(first, marginal).pvalue > 1e-3
        assert abs(np.mean(step[:, 1] > 0) - 0.5) < 4 * 0.5 / math.sqrt(count)


def test_an_unbounded_region_has_no_uniform_draw() -> None:
    region = Region.box(torch.tensor([[0.0, 0.0]]), torch.tensor([[1.0, INF]]))
    with pytest.raises(RegionError, match="unbounded"):
        region.sample(torch.tensor([0]))


# -- boxes, indexing, hulls -----------------------------------------------------------------------


def test_box_with_infinite_sides() -> None:
    low = torch.tensor([[0.0, -INF, -INF, 5.0, -1e308]], dtype=torch.float64)
    high = torch.tensor([[1.0, INF, -2.0, INF, 1e308]], dtype=torch.float64)
    region = Region.box(low, high)
    assert torch.isfinite(region.center).all()
    assert region.contains(region.center).all()
    z = torch.tensor([[2.0, 7.0, 0.0, 0.0, 3.0]], dtype=torch.float64)
    assert region.project(z).tolist() == [[1.0, 7.0, -2.0, 5.0, 3.0]]
    slopes = torch.tensor(
        [[[1.0, 0.0, 0.0, 0.0, 0.0]], [[0.0, 0.0, 1.0, 0.0, 0.0]], [[0.0, -1.0, 0.0, 0.0, 0.0]]],
        dtype=torch.float64,
    )
    values = region.support(slopes)
    assert values[0].item() == 1
    assert values[1].item() >= -2
    assert values[2].item() == INF
    assert not torch.isnan(values).any()
    assert torch.equal(region.hull().lower, low)
    assert torch.equal(region.hull().upper, high)


def test_box_geometry() -> None:
    low, high = torch.rand(3, 4), 1 + torch.rand(3, 4)
    region = Region.box(low, high)
    a = torch.randn(3, 4)
    assert torch.equal(region.maximizer(a), torch.where(a > 0, high, low))
    expected = (a.double() * torch.where(a > 0, high, low).double()).sum(1)
    assert (region.support(a.double()) >= expected - 1e-13).all()
    torch.testing.assert_close(region.support(a.double()), expected, rtol=1e-12, atol=1e-12)
    point = Region.box(low, low)
    assert torch.equal(point.project(a), low)
    torch.testing.assert_close(point.support(a), (a * low).sum(1))


@pytest.mark.parametrize(
    ("low", "high"),
    [
        (1.0, 0.0),
        (math.nan, 0.0),
        (0.0, math.nan),
        (INF, INF),
        (-INF, -INF),
        (1.0, math.nextafter(1, 0)),
    ],
)
def test_empty_boxes_are_refused(low: float, high: float) -> None:
    with pytest.raises(RegionError, match="empty"):
        Region.box(
            torch.tensor([[0.0, low]], dtype=torch.float64),
            torch.tensor([[1.0, high]], dtype=torch.float64),
        )


@pytest.mark.parametrize("p", NORMS)
def test_indexing_selects_examples(p: float) -> None:
    x = torch.rand(5, 3)
    region = ThreatModel(p, "0.2").around(x)
    z = torch.randn(5, 3)
    mask = torch.tensor([True, False, True, True, False])
    for index in (slice(1, 4), mask, torch.tensor([4, 0, 0])):
        part = region[index]
        assert len(part) == len(z[index])
        assert part.p == region.p
        assert torch.equal(part.project(z[index]), region.project(z)[index])
        assert torch.equal(part.hull().lower, region.hull().lower[index])


@pytest.mark.parametrize("p", NORMS)
def test_hull_is_the_smallest_box(p: float) -> None:
    x = torch.rand(4, 3, dtype=torch.float64)
    region = ThreatModel(p, 0.3).around(x)
    low, high = region.hull()
    for i in range(3):
        direction = torch.zeros(4, 3, dtype=torch.float64)
        direction[:, i] = 1
        torch.testing.assert_close(high[:, i], region.support(direction), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(-low[:, i], region.support(-direction), rtol=1e-12, atol=1e-12)


# -- other dtypes ---------------------------------------------------------------------------------


@pytest.mark.parametrize("p", NORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_region_without_a_point_in_the_dtype_says_so(p: float, dtype: torch.dtype) -> None:
    region = ThreatModel(p, 1e-12).around(torch.full((2, 3), 0.1, dtype=torch.float64))
    for call in (lambda: region.project(torch.zeros(2, 3, dtype=dtype)),
                 lambda: region.maximizer(torch.ones(2, 3, dtype=dtype)),
                 lambda: region.sample(torch.arange(2), dtype), lambda: region.inner(dtype)):  # fmt: skip
        with pytest.raises(RegionError, match="2 of 2 regions contain no point"):
            call()
    assert region.contains(region.project(torch.zeros(2, 3, dtype=torch.float64))).all()


@pytest.mark.parametrize("p", [1, 2])
def test_each_coordinate_fits_but_the_ball_has_no_point(p: float) -> None:
    gap = abs(float(np.float32(0.1)) - 0.1)
    region = ThreatModel(p, 1.5 * gap).around(torch.full((1, 100), 0.1, dtype=torch.float64))
    with pytest.raises(RegionError, match="no point"):
        region.project(torch.zeros(1, 100))


@pytest.mark.parametrize("p", NORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("share", [1.01, 1.2, 2.0, 50.0])
def test_points_of_a_coarser_dtype_than_the_centre_are_members(
    p: float, dtype: torch.dtype, share: float
) -> None:
    """The centre is no number of the dtype, so rounding towards it may overshoot."""
    x = torch.rand(20, 9, dtype=torch.float64)
    gap = x.to(dtype).double() - x
    eps = share * torch.linalg.vector_norm(gap, ord=p, dim=1).max().item()
    region = ThreatModel(p, eps, -INF, INF).around(x)
    z = x + torch.randn(20, 9, dtype=torch.float64) * eps
    assert region.contains(region.project(z.to(dtype))).all()
    assert region.contains(region.maximizer(torch.randn(20, 9).to(dtype))).all()
    assert region.contains(region.sample(torch.arange(20), dtype)).all()


# -- wrong arguments ------------------------------------------------------------------------------

NAN_BOUND = torch.tensor([0.0, math.nan])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"p": 3}, "p: 3 is not one of"),
        ({"p": 0}, "p: 0"),
        ({"p": math.nan}, "p: nan"),
        ({"eps": -0.1}, "eps: -0.1 is negative"),
        ({"eps": "-1e-400"}, "negative"),
        ({"eps": math.nan}, "eps: .*nan"),
        ({"eps": torch.tensor([0.1, -0.1]), "p": INF}, "negative"),
        ({"eps": torch.tensor([0.1, math.nan]), "p": INF}, "eps: contains NaN"),
        ({"eps": torch.tensor([0.1, 0.1])}, "needs p = inf, not p = 2"),
        ({"eps": torch.tensor([0.1, 0.1]), "p": 1}, "needs p = inf, not p = 1"),
        ({"eps": INF}, "needs p = inf"),
        ({"lower": 1.0, "upper": 0.0}, "lower: 1.0 exceeds upper: 0.0"),
        ({"lower": torch.tensor([0.0, 2.0])}, "exceeds"),
        ({"lower": NAN_BOUND}, "lower: contains NaN"),
        ({"upper": math.nan}, "upper: .*nan"),
        ({"upper": "one"}, "upper: .*cannot read"),
    ],
)
def test_threat_model_refuses(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ThreatModel(**{"p": 2, "eps": 0.1, **arguments})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.tensor([[0.5, 1.5], [0.5, 0.5]]), "1 of 2 examples lie outside"),
        (torch.tensor([[0.5, -1e-9]]), "outside the input domain"),
        (torch.tensor([[1, 0]]), r"dtype torch\.int64 is not floating"),
        (torch.tensor([[1, 0]], dtype=torch.uint8), "not floating"),
        (
            torch.tensor([[0.5, math.nan], [0.1, INF], [0.1, 0.1]]),
            "2 of 3 examples contain NaN or infinite",
        ),
    ],
)
def test_data_outside_the_domain_is_refused(x: Tensor, message: str) -> None:
    for p in NORMS:
        with pytest.raises(DataError, match=message):
            ThreatModel(p, 0.1).around(x)


def test_describe() -> None:
    assert ThreatModel(INF, "8/255").describe() == "linf eps=8/255 in [0, 1]"
    assert ThreatModel(2, 0.5, -INF, INF).describe() == "l2 eps=0.5 in [-inf, inf]"
    assert "per-feature 0.1..0.2" in ThreatModel(INF, torch.tensor([0.1, 0.2])).describe()
