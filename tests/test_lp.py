"""The linear relaxation and the encoding below it, against programs written out by hand and solved by scipy."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import linprog
from torch import Tensor

import networks
import rationals
from calipers.bounds import crown, lp, lp_points, lp_preactivations, preactivations, relaxation
from calipers.bounds.encode import encode, prepare
from calipers.errors import RegionError, UnsupportedOp
from calipers.graph.graph import Network
from calipers.programs import Program, dual_value, solver
from calipers.sets import Interval, Region
from calipers.spec import Spec
from calipers_check.table import Table
from networks import ARCHITECTURES, Builder
from patterns import layers
from sandwiches import PASSES, check_sound

F32, F64, INF = torch.float32, torch.float64, math.inf
RADIUS = {1.0: 0.8, 2.0: 0.4, INF: 0.15}


def setting(network: Network, p: float = INF, count: int = 1, eps: float | None = None):
    x = networks.inputs(network, count, 11)
    region = Region.ball(x, RADIUS[p] if eps is None else eps, p, 0.0, 1.0)
    return region, Spec.label(torch.arange(count) % network.num_classes, network.num_classes)


def dense_relaxation(
    network: Network, region: Region, c: np.ndarray, bounds: list[Interval], *, big_m: bool
) -> float:
    """The lectures' LP of a ReLU network by hand: columns [x, z_1 …, (v_1 …), (p, q)], dense rows, scipy's solver."""
    weights = layers(network)
    sizes = [len(weights[0][0][0]), *(len(b) for _, b in weights[:-1])]
    at = np.cumsum([0, *sizes])
    n, hidden = at[-1], sum(sizes[1:])
    ball = region.p == 1
    width = n + hidden * big_m + 2 * sizes[0] * ball
    rows, rhs, equal, right = [], [], [], []

    def row(
        entries: dict[int, Any], limit: float, into: list[np.ndarray], ends: list[float]
    ) -> None:
        r = np.zeros(width)
        for start, value in entries.items():
            r[start : start + np.size(value)] += value
        into.append(r)
        ends.append(limit)

    for i, (W, b) in enumerate(weights[:-1]):
        low, high = (end[0].double().numpy() for end in bounds[i])
        for j in range(len(b)):
            z, x, l, u = at[i + 1] + j, at[i], low[j], high[j]
            row({x: W[j], z: -1.0}, -b[j], rows, rhs)  # z >= Wx + b
            if big_m:
                v = n + at[i + 1] - at[1] + j
                row({z: 1.0, v: -u}, 0.0, rows, rhs)
                row({z: 1.0, x: -W[j], v: -l}, b[j] - l, rows, rhs)
            elif u <= 0:
                row({z: 1.0}, 0.0, rows, rhs)
            elif l >= 0:
                row({z: 1.0, x: -W[j]}, b[j], rows, rhs)
            else:
                s = u / (u - l)
                row({z: 1.0, x: -s * W[j]}, s * (b[j] - l), rows, rhs)
    hull = region.hull()
    sides = list(zip(*(end[0].flatten().tolist() for end in hull), strict=True))
    limits: list[tuple[float, float | None]] = [*sides, *[(0.0, None)] * (n - sizes[0])]
    limits += [(0.0, 1.0)] * (hidden * big_m)
    if ball:
        p, d = width - 2 * sizes[0], sizes[0]
        limits += [(0.0, None)] * (2 * d)
        row({p: np.ones(2 * d)}, region.outer_eps[0].item(), rows, rhs)
        for k, center in enumerate(region.center[0].tolist()):
            row({k: 1.0, p + k: -1.0, p + d + k: 1.0}, center, equal, right)
    W, b = weights[-1]
    cost = np.zeros(width)
    cost[at[-2] : at[-1]] = c @ W
    found = linprog(
        cost, np.stack(rows), rhs, np.stack(equal) if equal else None, right or None, limits
    )
    assert found.status == 0, found.message
    return float(found.fun + c @ b)


def read(network: Network, region: Region, *, tight: bool = False) -> list[Interval]:
    boxes = preactivations(network, region, tight=tight, dtype=F64, rigorous=True)
    return [boxes[n.operands[0]] for n in network.graph.nodes if n.op is torch.relu]


@pytest.mark.parametrize("p", [INF, 1.0])
@pytest.mark.parametrize("seed", range(4))
def test_equals_the_dense_program_and_its_big_m_form(seed: int, p: float) -> None:
    """Under interval bounds the column bounds that we add are implied, so all forms have one value."""
    network = networks.mlp(seed, (4, 7, 6, 3))
    region, spec = setting(network, p)
    if p == 1:  # intervals of the ball's box
        assert (region.hull().upper <= 1).all()
    ours = lp(network, region, spec, intermediate="interval", raw=True, dtype=F64)[0]
    state = prepare(network, region, "interval")
    exact = encode(state, relaxed=False)
    costs, _ = exact.costs(spec.C[0].double().numpy(), spec.d[0].double().numpy())
    solve = solver(exact.program.relaxed())
    for value, c, cost in zip(ours.tolist(), spec.C[0].double().numpy(), costs, strict=True):
        bounds = read(network, region)
        for big_m in (False, True):
            dense = dense_relaxation(network, region, c, bounds, big_m=big_m)
            assert value == pytest.approx(dense, rel=1e-7, abs=1e-7)
        assert solve(cost).upper == pytest.approx(value, rel=1e-7, abs=1e-7)


@pytest.mark.parametrize(
    "name", ["mlp", "conv", "max_pool", "product", "mixed", "sigmoid", "clamp", "abs"]
)
def test_lies_under_every_point_and_above_crown(name: str) -> None:
    network = ARCHITECTURES[name](0)
    for p in (1.0, 2.0, INF):
        region, spec = setting(network, p)
        check_sound(network, region, spec, [(F64, True)], {"crown": PASSES["crown"], "lp": lp})


@pytest.mark.parametrize(
    "name", [n for n in ARCHITECTURES if n not in ("product", "ends_nonlinear")]
)
def test_raw_values_are_not_below_the_lines_that_crown_chose(name: str) -> None:
    network = ARCHITECTURES[name](1)
    region, spec = setting(network)
    options: dict[str, Any] = {"raw": True, "dtype": F64}
    assert (
        lp(network, region, spec, **options) >= crown(network, region, spec, **options) - 1e-7
    ).all()


def test_bounds_and_values_of_affine_networks_are_exact() -> None:
    network = networks.affine(0)
    for p in (INF, 1.0):
        region, spec = setting(network, p)
        ours = lp(network, region, spec, raw=True, dtype=F64)
        assert torch.allclose(ours, crown(network, region, spec, dtype=F64), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("eps", [0.0, 1e-3])
def test_rigorous_values_hold_in_rational_arithmetic(eps: float) -> None:
    for seed in range(4):
        network = networks.mlp(seed, (3, 4, 4, 3))
        region, spec = setting(network, eps=eps)
        low = lp(network, region, spec, raw=True, dtype=F64, rigorous=True)[0].tolist()
        ends = region.inner(F32)
        for mask in itertools.product([False, True], repeat=3):
            x = torch.where(torch.tensor(mask), ends.upper, ends.lower)
            for value, lower in zip(rationals.functionals(network, spec, x)[0], low, strict=True):
                assert Fraction(lower) <= value


@pytest.mark.parametrize("seed", range(6))
def test_the_rounding_of_composed_coefficients_is_paid_for(seed: int) -> None:
    """Affine layers whose product nearly cancels: W₃W₂W₁ − V with V its float32 rounding."""
    b = Builder((2,), seed)
    W1, W2, W3 = b.rand(3, 2), b.rand(3, 3), b.rand(3, 3)
    V = (W3.double() @ W2.double() @ W1.double()).float()
    h = b(F.linear, b.x, torch.cat([W1, torch.eye(2)]), None)
    for W in (W2, W3):
        h = b(F.linear, h, torch.block_diag(W, torch.eye(2)), None)
    h = b.relu(b(F.linear, h, torch.cat([torch.eye(3), -V], 1), None))
    b(F.linear, h, torch.tensor([[1.0, 1, 1], [-1, -1, -1], [1, -1, 0]]), None)
    network = b.network()
    region, _ = setting(network, eps=0.0)
    spec = Spec.functional(torch.eye(3)[None])
    low = lp(network, region, spec, raw=True, dtype=F64, rigorous=True)[0].tolist()
    exact = rationals.functionals(network, spec, region.center.float())[0]
    assert all(Fraction(a) <= v for a, v in zip(low, exact, strict=True))


def test_any_dual_vector_gives_a_bound() -> None:
    """Weak duality does the proving: random vectors, infinities and NaN included, never exceed the optimum."""
    network = networks.mlp(0)
    region, spec = setting(network)
    encoding = encode(prepare(network, region, "crown"), relaxed=True)
    costs, _ = encoding.costs(spec.C[0].double().numpy(), spec.d[0].double().numpy())
    solution = solver(encoding.program)(costs[0])
    assert solution.dual is not None
    best = dual_value(encoding.program, costs[0], solution.dual)
    assert best == pytest.approx(solution.upper, abs=1e-7)
    generator = np.random.default_rng(0)
    for scale in (0.0, 1e-9, 1e-2, 1.0, 100.0):
        y = solution.dual + scale * generator.standard_normal(len(solution.dual))
        assert dual_value(encoding.program, costs[0], y) <= solution.upper + 1e-7
    y[:3] = [math.nan, math.inf, -math.inf]
    assert dual_value(encoding.program, costs[0], y) <= solution.upper + 1e-7
    assert dual_value(encoding.program, costs[0], np.zeros_like(y)) <= solution.upper


def test_a_dual_value_in_rational_arithmetic() -> None:
    """The bound of a dual vector never exceeds the same sum without rounding; badly scaled numbers included."""
    generator = np.random.default_rng(1)
    for _ in range(50):
        A = generator.standard_normal((4, 5)) * 10.0 ** generator.integers(-6, 7, (4, 5))
        b, cost, y = (generator.standard_normal(k) * 1e3 for k in (4, 5, 4))
        low = -generator.random(5)
        matrix = Table.of(A)
        program = Program(
            low, -low, np.zeros(5, bool), b, np.full(4, math.inf),
            matrix.starts, matrix.column, matrix.value, np.zeros(4),
        )  # fmt: skip
        y = np.abs(y)
        f = np.vectorize(Fraction, otypes=[object])
        reduced = f(cost) - f(y) @ f(A)
        ends = np.minimum(reduced * f(low), reduced * f(-low))
        assert Fraction(dual_value(program, cost, y)) <= f(y) @ f(b) + ends.sum()
        # no row has an upper side: a multiplier of the wrong sign counts as none
        assert dual_value(program, cost, -y) == dual_value(program, cost, np.zeros(4))


def test_points_are_members_and_show_the_gap() -> None:
    network = ARCHITECTURES["conv"](0)
    for p in (1.0, 2.0, INF):
        region, spec = setting(network, p, count=2)
        found = relaxation(network, region, spec)
        assert (found.gap >= -1e-5).all()
        ((points, rows, clauses),) = list(lp_points(network, region, spec))
        assert region[rows].contains(points).all()
        assert points.dtype == F32
        assert len(points) == len(clauses) == 2 * spec.C.shape[1]
        whole = lp(network, region, spec, raw=True, dtype=F64, rigorous=True)
        assert torch.equal(found.lower, whole)
        one = torch.cat(
            [relaxation(network, region[i : i + 1], spec[i : i + 1]).lower for i in (0, 1)]
        )
        assert torch.allclose(one, whole, rtol=1e-9, atol=1e-9)


def test_bounds_by_programs_are_nested_and_hold() -> None:
    network = networks.mlp(2, (3, 6, 6, 3))
    region, spec = setting(network, eps=0.5)
    by_lp, by_crown = lp_preactivations(network, region), preactivations(network, region, dtype=F64)
    points = torch.cat([region.sample(torch.tensor([s]), F64) for s in range(200)])
    x, values = points, []
    for W, b in layers(network):
        x = x @ torch.from_numpy(W).T + torch.from_numpy(b)
        values.append(x)
        x = x.clamp_min(0)
    names = [n.name for n in network.graph.nodes if n.op is F.linear][:-1]
    for name, value in zip(names, values, strict=False):
        assert (by_lp[name].lower <= value).all()
        assert (by_lp[name].upper >= value).all()
        assert (by_lp[name].lower >= by_crown[name].lower - 1e-9).all()
        assert (by_lp[name].upper <= by_crown[name].upper + 1e-9).all()
    tighter = lp(network, region, spec, raw=True, dtype=F64, intermediate=by_lp)
    assert (tighter >= lp(network, region, spec, raw=True, dtype=F64) - 1e-7).all()
    assert (by_lp[names[1]].upper - by_lp[names[1]].lower).sum() < 0.999 * (
        by_crown[names[1]].upper - by_crown[names[1]].lower
    ).sum()


# -- the encoding ---------------------------------------------------------------------------------------------------


def one_neuron(op: Any = torch.relu, *extra: Any) -> Network:
    b = Builder((1,))
    h = b(op, b(F.linear, b.x, torch.eye(1), None), *extra)
    b(F.linear, h, torch.eye(1), None)
    return b.network()


def feasible(program: Program, x: np.ndarray) -> bool:
    matrix = Table(
        np.repeat(np.arange(len(program.row_lower)), np.diff(program.starts)),
        program.index, program.value, len(program.row_lower),
    ).dense(program.columns)  # fmt: skip
    activity = matrix @ x
    rows = (activity >= program.row_lower - 1e-12) & (activity <= program.row_upper + 1e-12)
    return bool(
        rows.all() & (x >= program.lower - 1e-12).all() & (x <= program.upper + 1e-12).all()
    )


def test_the_five_constraints_are_the_relu_and_a_tie_admits_both_signs() -> None:
    """By enumeration: for each z the admitted (y, v) are (max(z, 0), [z > 0]), and at z = 0 both v with y = 0."""
    network = one_neuron()
    region = Region.box(torch.tensor([[-1.0]]), torch.tensor([[2.0]]))
    program = encode(prepare(network, region, "interval"), relaxed=False).program
    own = program.columns == 5  # one, x, perhaps z beside x, y, v
    for z, y, v in itertools.product(np.linspace(-1, 2, 13), np.linspace(-1, 2, 13), (0.0, 1.0)):
        point = np.array([1.0, z, *([z] if own else []), y, v])
        signs = {0.0: z <= 0, 1.0: z >= 0}
        assert feasible(program, point) == (y == max(z, 0.0) and signs[v]), (z, y, v)


def test_stable_neurons_take_no_binary() -> None:
    network = one_neuron()
    for low, high, kinks in ((0.0, 1.0, 0), (-1.0, 0.0, 0), (-1e-9, 1.0, 1)):
        region = Region.box(torch.tensor([[low]]), torch.tensor([[high]]))
        encoding = encode(prepare(network, region, "interval", rigorous=False), relaxed=False)
        assert encoding.kinks == kinks == encoding.program.integral.sum()


@pytest.mark.parametrize(
    "name", ["mlp", "conv", "residual", "max_pool", "mixed", "leaky_negative", "clamp", "abs"]
)
def test_the_network_s_own_values_satisfy_the_program(name: str) -> None:
    """Fix the input at a member: the exact program then has one value, the network's."""
    network = ARCHITECTURES[name](3)
    region, spec = setting(network, eps=0.05)
    encoding = encode(prepare(network, region, "crown"), relaxed=False)
    C, d = spec.C[0].double().numpy(), spec.d[0].double().numpy()
    costs, _ = encoding.costs(C, d)
    x = region.sample(torch.tensor([3]), F64)
    flat = x.reshape(-1).numpy()
    column = encoding.input.matrix.column
    lower, upper = encoding.program.lower.copy(), encoding.program.upper.copy()
    lower[column], upper[column] = flat, flat
    fixed = Program(**{**encoding.program.__dict__, "lower": lower, "upper": upper})
    value = spec.values(network.in_double()(x))[0].tolist()
    solve = solver(fixed)
    for cost, expected in zip(costs, value, strict=True):
        found = solve(cost)
        assert found.status == "optimal"
        assert found.upper == pytest.approx(expected, abs=1e-6)


def test_what_has_no_exact_form_is_refused() -> None:
    for name in ("sigmoid", "product"):
        network = ARCHITECTURES[name](0)
        region, _ = setting(network)
        with pytest.raises(UnsupportedOp, match="piecewise-linear"):
            encode(prepare(network, region, "interval"), relaxed=False)
    network = networks.mlp(0)
    x = networks.inputs(network, 1, 0)
    free = Region.ball(x, INF, INF)
    with pytest.raises(RegionError, match="unbounded"):
        encode(prepare(network, free, "interval"), relaxed=False)
    assert not (lp(network, free, Spec.label(torch.tensor([0]), 3)) > 0).any()


def test_intermediate_bounds_are_checked() -> None:
    network = networks.mlp(0)
    region, spec = setting(network)
    with pytest.raises(ValueError, match=r"intermediate.*'crow'.*Did you mean 'crown'"):
        lp(network, region, spec, intermediate="crow")
    bad: Tensor = torch.ones(1, 2)
    with pytest.raises(ValueError, match=r"intermediate.*'n0'"):
        lp(network, region, spec, intermediate={"n0": Interval(bad, bad)})
    with pytest.raises(ValueError, match="one"):
        encode(prepare(*[network, setting(network, count=2)[0]], "crown"), relaxed=True)


def test_sparse_products_are_the_dense_ones() -> None:
    generator = torch.Generator().manual_seed(0)
    for shape in ((3, 4, 5), (1, 6, 2), (5, 1, 1)):
        a, b = (
            torch.randn(m, n, generator=generator, dtype=F64) for m, n in (shape[:2], shape[1:])
        )
        a, b = (t * (torch.rand(t.shape, generator=generator) < 0.5) for t in (a, b))
        dense = (Table.of(a.numpy()) @ Table.of(b.numpy())).dense(shape[2])
        assert np.allclose(dense, (a @ b).numpy(), rtol=1e-14)
        rows = np.array([0, shape[0] - 1, 0])
        assert np.array_equal(Table.of(a.numpy()).take(rows).dense(shape[1]), a.numpy()[rows])
