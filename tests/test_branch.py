"""Complete searches against exact minima: rational arithmetic, enumeration with linear programs, fine grids."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import networks
from calipers.exact import Outcome, milp, split_inputs
from calipers.exact.branch import SCORES, branch
from calipers.exact.record import Record
from calipers.graph import primitives as prim
from calipers.graph.graph import Network
from calipers.sets import Region
from calipers.spec import Spec
from exact_checks import (
    check_decided,
    check_verdict,
    deadline,
    dense,
    drawn,
    integral,
    pattern_minimum,
    plane_minimum,
    shifted,
)

INF = math.inf
OPS: dict[str, tuple[Any, ...]] = {
    "relu": (torch.relu,),
    "leaky": (F.leaky_relu, 0.1),
    "leaky_negative": (F.leaky_relu, -0.3),
    "abs": (torch.abs,),
    "clamp": (torch.clamp, -0.3, 0.4),
}
CLAUSES = [[0, 1, 2], [0, 0, 1], [0, 0, 0], [0, 1, 0, 2], [0]]


SOLVERS: dict[float, list[Callable[..., Outcome]]] = {INF: [branch, split_inputs], 1.0: [branch]}


def ball(network: Network, p: float, eps: float, seed: int = 11) -> Region:
    return Region.ball(networks.inputs(network, 1, seed), eps, p, 0.0, 1.0)


def search(network: Network, region: Region, spec: Spec, **options: Any) -> Outcome:
    return branch(network, region, spec, **{"deadline": deadline(), **options})


# -- agreement --------------------------------------------------------------------------------------------------------


@settings(max_examples=40, derandomize=True)
@given(
    seed=st.integers(0, 10**6),
    op=st.sampled_from(sorted(OPS)),
    sizes=st.sampled_from([(2, 5, 3), (2, 4, 4, 3), (2, 3, 3, 3, 3)]),
    p=st.sampled_from([INF, 1.0]),
    eps=st.sampled_from([0.1, 0.5]),
    clause=st.sampled_from(CLAUSES),
    shift=st.sampled_from([0.3, 0.02, 0.001, -0.001, -0.02, -0.3]),
)
def test_two_inputs_agree_with_rational_arithmetic(
    seed: int,
    op: str,
    sizes: tuple[int, ...],
    p: float,
    eps: float,
    clause: list[int],
    shift: float,
) -> None:
    """On networks whose minimal margin was moved to ``shift``."""
    network = dense(seed, sizes, *OPS[op])
    region, spec = ball(network, p, eps, seed), drawn(seed, clause, sizes[-1])
    spec = shifted(spec, shift - plane_minimum(network, region, spec))
    exact = plane_minimum(network, region, spec)
    assert float(exact) == pytest.approx(shift, abs=1e-12)
    for solve in SOLVERS[p]:
        found = solve(network, region, spec, deadline=deadline())
        check_verdict(found, network, region, spec, exact)
        check_decided(found, exact)


def convolutional(seed: int) -> Network:
    b = networks.Builder((1, 3, 3), seed)
    h = b.relu(b.conv(b.x, 2, 2, 1, 0))
    b.linear(b.relu(b.linear(h, 3)), 3)
    return b.network()


def skipping(seed: int) -> Network:
    b = networks.Builder((3,), seed)
    h = b.relu(b.linear(b.x, 4))
    h = b.relu(b(torch.add, h, b.linear(b.relu(b.linear(h, 3)), 4)))
    b.linear(h, 3)
    return b.network()


def pooled(seed: int) -> Network:
    b = networks.Builder((1, 3, 3), seed)
    h = b(prim.max_pool, b.conv(b.x, 2, 2, 1, 0), (2, 2), (1, 1), (0, 0), (1, 1), False)
    b.linear(b.relu(b.linear(h, 3)), 3)
    return b.network()


NETS: dict[str, Callable[[int], Network]] = {
    "convolutional": convolutional,
    "skipping": skipping,
    "pooled": pooled,
}


CASES = [
    ("convolutional", INF, 0.25),
    ("skipping", INF, 0.5),
    ("skipping", 2.0, 0.4),
    ("skipping", 1.0, 0.5),
    ("pooled", INF, 0.1),
]


@pytest.mark.parametrize(("name", "p", "eps"), CASES)
@pytest.mark.parametrize("clause", [[0, 1, 1, 2], [0, 0, 0]])
def test_agreement_with_linear_programs_over_patterns(
    name: str, p: float, eps: float, clause: list[int]
) -> None:
    noise = 1e-3 if p == 2 else 1e-7  # of the oracle
    for seed in range(2):
        network = NETS[name](seed)
        region, spec = ball(network, p, eps), drawn(seed, clause, 3)
        exact = pattern_minimum(network, region, spec)
        for shift in (0.02, -0.02):
            moved = shifted(spec, shift - exact)
            found = search(network, region, moved)
            check_verdict(found, network, region, moved, shift, noise)
            check_decided(found, shift, 1e-3)


def test_the_oracles_agree_with_each_other_and_with_the_exact_program() -> None:
    for seed, clause in enumerate(CLAUSES[:3]):
        network = dense(seed, (2, 4, 3, 3), *OPS["leaky_negative"])
        for p in (INF, 1.0):
            region, spec = ball(network, p, 0.5), drawn(seed, clause, 3)
            exact = plane_minimum(network, region, spec)
            assert pattern_minimum(network, region, spec) == pytest.approx(float(exact), abs=1e-7)
        for shift in (0.02, -0.02):
            moved = shifted(spec, shift - exact)
            for solve in (*SOLVERS[p], milp):
                found = solve(network, region, moved, deadline=deadline())
                check_verdict(found, network, region, moved, shift, 1e-9)
                check_decided(found, shift)


@pytest.mark.parametrize("op", [torch.sigmoid, torch.tanh])
@pytest.mark.parametrize("p", [INF, 2.0, 1.0])
def test_smooth_activations_lie_on_the_side_a_fine_grid_shows(op: Any, p: float) -> None:
    """Two inputs; between the grid's points a Lipschitz constant bounds the rest."""
    for seed, clause in enumerate(CLAUSES[:2]):
        network = dense(seed, (2, 5, 4, 3), op)
        region, spec = ball(network, p, 0.5), drawn(seed, clause, 3)
        least, most = bracket(network, region, spec)
        assert most - least < 0.05
        found = search(network, region, shifted(spec, 0.02 - least))
        assert found.robust, found
        found = search(network, region, shifted(spec, -0.02 - most), deadline=deadline(0.3))
        assert not found.robust, found


def bracket(network: Network, region: Region, spec: Spec, count: int = 400) -> tuple[float, float]:
    """The minimal margin lies between these: over grid points of the set, less what may lie between them."""
    low, high = (end[0] for end in region.hull())
    axes = [
        torch.linspace(0, 1, count, dtype=torch.float64) * (b - a) + a
        for a, b in zip(low, high, strict=True)
    ]
    grid = torch.cartesian_prod(*axes)
    away = torch.linalg.vector_norm(grid - region.center, region.p, dim=1)
    step = ((high - low) / (count - 1)).norm().item()
    eps = region.outer_eps[0].item()
    near = grid[away <= eps + step]  # whatever is in the set has one of these within half a step
    values = spec.margin((network.in_double()(near) @ spec.C[0].double().T) + spec.d[0].double())
    size = 1.0
    for value in network.module.parameters():
        if value.ndim == 2:
            size *= torch.linalg.matrix_norm(value.double(), 2).item()
    constant = size * spec.C[0].double().norm(dim=1).amax().item()  # slopes of both are at most 1
    inside = values[away[away <= eps + step] <= eps]
    return values.amin().item() - constant * step / 2, inside.amin().item()


@pytest.mark.parametrize("op", ["relu", "tanh"])
def test_a_failure_away_from_all_corners_is_found(op: str) -> None:
    """A pit in the middle of an interval: sub-problems close in on it, and its point must be tried."""
    network = {"relu": spike((0.3125,), 2**-10, 1.25), "tanh": pit()}[op]
    found = search(network, UNIT, Spec.functional(torch.ones(1, 1, 1)), deadline=deadline(20.0))
    assert found.point is not None, found


UNIT = Region.box(torch.zeros(1, 1), torch.ones(1, 1))


def maximum() -> Network:
    """max(x, 1 − x)."""
    b = networks.Builder((1,))
    h = b(F.linear, b.x, torch.tensor([[1.0], [-1.0]]), torch.tensor([0.0, 1.0]))
    h = b(prim.max_pool, b(prim.reshape, h, (1, 1, 2)), (1, 2), (1, 2), (0, 0), (1, 1), False)
    b(F.linear, b.flat(h), torch.ones(1, 1))
    return b.network()


def pit() -> Network:
    """1 + tanh(20x − 8) − tanh(20x − 6): −0.5 at 0.35."""
    b = networks.Builder((1,))
    h = b(torch.tanh, b(F.linear, b.x, torch.full((2, 1), 20.0), torch.tensor([-8.0, -6.0])))
    b(F.linear, h, torch.tensor([[1.0, -1.0]]), torch.ones(1))
    return b.network()


@pytest.mark.parametrize("name", ["clamp", "pool"])
def test_every_piecewise_linear_op_is_split(name: str) -> None:
    network = dense(2, (2, 5, 4, 3), *OPS["clamp"]) if name == "clamp" else maximum()
    region, spec = ball(network, INF, 0.5), drawn(2, [0, 1, 2], 3)
    if name == "pool":  # max(x, 1 − x) >= 1/2
        region, spec = UNIT, Spec.functional(torch.ones(1, 1, 1))
    by = 0.01 - plane_minimum(network, region, spec) if name == "clamp" else -0.49
    found = search(network, region, shifted(spec, by))
    assert found.robust, found


# -- near ties --------------------------------------------------------------------------------------------------------


def tied(seed: int, clause: list[int], op: str) -> tuple[Network, Region, Spec] | None:
    """A network of small integers with a specification whose minimal margin is 0 exactly, if there is a small one."""
    network = integral(seed, (2, 4, 3, 3), *OPS[op])
    region = Region.ball(torch.tensor([[0.25, -0.5]]), 0.75, INF)
    generator = torch.Generator().manual_seed(seed)
    C = torch.randint(-3, 4, (1, len(clause), 3), generator=generator).double()
    spec = Spec(C, torch.zeros(1, len(clause)).double(), torch.tensor(clause))
    least = plane_minimum(network, region, spec)
    if least.denominator > 100:
        return None
    whole = Spec(C * least.denominator, spec.d - least.numerator, spec.clause)
    assert plane_minimum(network, region, whole) == 0
    return network, region, whole


@pytest.mark.parametrize("op", ["relu", "abs"])
@pytest.mark.parametrize("clause", [[0, 1, 2], [0, 0, 1]])
def test_near_ties(op: str, clause: list[int]) -> None:
    for network, region, spec in filter(None, (tied(seed, clause, op) for seed in range(2))):
        for by in (1e-3, 1e-6, 0.0, -1e-9, -1e-6, -1e-3):
            moved = shifted(spec, by)
            exact = plane_minimum(network, region, moved)
            assert (exact > 0) == (by > 0)
            seconds = 0.1 if abs(by) < 1e-3 else 10.0  # there it need not decide
            for solve in SOLVERS[INF]:
                found = solve(network, region, moved, deadline=deadline(seconds))
                check_verdict(found, network, region, moved, exact)
                if seconds > 1:
                    check_decided(found, exact)


@pytest.mark.parametrize("op", ["relu", "abs"])
def test_noted_searches_decide_near_ties_too(op: str) -> None:
    """What has less to spare than noted proofs ask for is split until nothing depends on intervals."""
    found = tied(0, [0, 0, 1], op)
    assert found
    network, region, spec = found
    for by in (1e-3, -1e-3):
        moved = shifted(spec, by)
        outcome = search(network, region, moved, record=Record())
        check_verdict(outcome, network, region, moved, plane_minimum(network, region, moved))
        check_decided(outcome, plane_minimum(network, region, moved))


# -- planted counterexamples ------------------------------------------------------------------------------------------


def spike(at: tuple[float, ...], width: float, depth: float) -> Network:
    """1 − depth·relu(Σ tent((x_i − at_i)/width) − (n − 1)): below 1 only within ``width`` of one point."""
    n = len(at)
    b = networks.Builder((n,))
    eye, place = torch.eye(n), torch.tensor(at)
    shifts = torch.cat([place - width, place, place + width])
    h = b.relu(b(F.linear, b.x, torch.cat([eye, eye, eye]), -shifts))
    tents = torch.tensor([1.0, -2.0, 1.0]).repeat_interleave(n) / width
    h = b.relu(b(F.linear, h, tents[None], torch.tensor([1.0 - n])))
    b(F.linear, h, torch.tensor([[-depth]]), torch.ones(1))
    return b.network()


def cap(n: int, depth: float) -> Network:
    """1 − depth·relu(Σ x_i − n + 1/2)·2: below 1 only near one corner of the unit box."""
    b = networks.Builder((n,))
    h = b.relu(b(F.linear, b.x, torch.ones(1, n), torch.tensor([0.5 - n])))
    b(F.linear, h, torch.tensor([[-2 * depth]]), torch.ones(1))
    return b.network()


PLANTED: dict[str, Callable[[float], Network]] = {
    "interval": lambda depth: spike((0.3125,), 2**-10, depth),
    "square": lambda depth: spike((0.3125, 0.71875), 2**-8, depth),
    "cube": lambda depth: spike((0.3125, 0.71875, 0.5), 2**-6, depth),
    "corner": lambda depth: cap(12, depth),
}


@pytest.mark.parametrize("name", PLANTED)
def test_planted_counterexamples(name: str) -> None:
    positive = Spec.functional(torch.ones(1, 1, 1))
    for depth in (1.25, 1.0, 1 - 2**-10):
        network = PLANTED[name](depth)
        region = Region.box(
            torch.zeros(1, *network.input_shape), torch.ones(1, *network.input_shape)
        )
        seen = torch.cat([region.sample(torch.tensor([s])) for s in range(100)])
        assert (network(seen) > 0).all()  # nothing shows at random
        for solve in SOLVERS[INF]:
            seconds = 0.3 if depth == 1 else 10.0
            found = solve(network, region, positive, deadline=deadline(seconds))
            check_verdict(found, network, region, positive, 1 - Fraction(depth))
            check_decided(found, 1 - depth)


# -- limits and bad input ---------------------------------------------------------------------------------------------


def hard() -> tuple[Network, Region, Spec]:
    """Minutes of search."""
    network = dense(1, (12, 40, 40, 40, 3))
    region = ball(network, INF, 0.5)
    seen = torch.cat([region.sample(torch.tensor([s])) for s in range(300)])
    y = network(seen)
    spec = Spec.functional(torch.tensor([[[1.0, -1.0, 0.0]]]))
    return network, region, shifted(spec, 0.5 - (y[:, 0] - y[:, 1]).amin().item())


def test_the_deadline_is_kept() -> None:
    network, region, spec = hard()
    calls: list[Outcome] = []
    begin = time.perf_counter()
    found = search(network, region, spec, deadline=deadline(0.7), progress=calls.append)
    assert time.perf_counter() - begin < 0.7 + 0.5 + 0.5
    assert not found.robust
    assert found.point is None
    assert found.reason == "the time is up"
    assert found.domains > 0
    assert calls
    assert calls[-1].domains <= found.domains
    assert all(not c.robust for c in calls)


@pytest.mark.parametrize("passed", [0.0, -100.0, -INF])
def test_no_time_at_all(passed: float) -> None:
    network, region, spec = hard()
    begin = time.perf_counter()
    found = search(network, region, spec, deadline=time.perf_counter() + passed)
    assert time.perf_counter() - begin < 0.5
    assert (found.robust, found.point) == (False, None)
    assert found.reason == "the time is up"


def test_an_interrupt_passes() -> None:
    def interrupt(_: Outcome) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        search(*hard(), progress=interrupt)


@pytest.mark.parametrize("name", ["p0", "p1", "p3", "p5"])
@pytest.mark.parametrize("value", [math.nan, INF])
def test_weights_that_are_no_numbers_are_never_robust(name: str, value: float) -> None:
    network = dense(0, (2, 4, 3, 3))
    with torch.no_grad():
        getattr(network.module, name).view(-1)[0] = value
    region = ball(network, INF, 0.2)
    spec = shifted(Spec.label(torch.tensor([0]), 3), 100.0)
    found = search(network, region, spec, deadline=deadline(0.3))
    assert (found.robust, found.point) == (False, None)
    assert found.reason


def undecided_at_the_root(seed: int) -> tuple[Network, Region, Spec, Fraction]:
    network = dense(seed, (2, 5, 4, 3))
    region, spec = ball(network, INF, 0.5), drawn(seed, [0, 1, 1], 3)
    spec = shifted(spec, (0.005 if seed % 2 else -0.005) - plane_minimum(network, region, spec))
    return network, region, spec, plane_minimum(network, region, spec)


@pytest.mark.parametrize(
    "options",
    [
        {"batch": 1},
        {"batch": 7},
        {"batch": 128},
        {"steps": 1},
        {"steps": 30},
        {"candidates": 1},
        {"candidates": 100},
        {"memory": 1 << 16},
        *({"score": name} for name in SCORES),
    ],
    ids=str,
)
def test_verdicts_do_not_depend_on_how_it_is_searched(options: dict[str, Any]) -> None:
    for seed in (0, 1, 5):
        network, region, spec, exact = undecided_at_the_root(seed)
        found = search(network, region, spec, **options)
        check_verdict(found, network, region, spec, exact)
        check_decided(found, exact)


def test_permuted_classes_have_the_same_verdict() -> None:
    order = torch.tensor([2, 0, 1])
    for seed in (0, 1, 4, 5):
        _, region, spec, exact = undecided_at_the_root(seed)
        other = dense(seed, (2, 5, 4, 3))
        with torch.no_grad():
            for name in ("p4", "p5"):
                value = getattr(other.module, name)
                value.copy_(value[order].clone())
        moved = Spec(spec.C[:, :, order], spec.d, spec.clause)
        assert plane_minimum(other, region, moved) == exact
        check_verdict(found := search(other, region, moved), other, region, moved, exact)
        check_decided(found, exact)


def test_bad_arguments_are_named() -> None:
    network, region, spec, _ = undecided_at_the_root(0)
    with pytest.raises(ValueError, match=r"score: 'gaps'"):
        search(network, region, spec, score="gaps")
    two = Region.ball(networks.inputs(network, 2, 0), 0.1, INF)
    with pytest.raises(ValueError, match=r"region.*2 examples"):
        search(network, two, spec)
