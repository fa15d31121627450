"""Branch and bound over input boxes against enumeration, linear programs and planted pockets."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import networks
import rationals
from calipers.exact import Outcome, split_inputs
from calipers.exact import boxes as geometry
from calipers.exact import inputs as search
from calipers.exact.boxes import Boxes, Planes, blend, halves, trimmed
from calipers.graph.graph import Network
from calipers.sets import Region
from calipers.spec import Spec
from exact_checks import pattern_minimum

F64 = torch.float64
CLAUSES = {
    "one": [0],
    "disjunction": [0, 1, 2],
    "conjunction": [0, 0, 0],
    "both": [0, 0, 1, 1],
}


def decide(network: Network, region: Region, spec: Spec, seconds: float = 20, **kw: Any) -> Outcome:
    return split_inputs(network, region, spec, deadline=time.perf_counter() + seconds, **kw)


def shallow(seed: int, hidden: int = 5) -> Network:
    return networks.mlp(seed, (2, hidden, 3))


def unit_box(n: int = 2) -> Region:
    return Region.box(torch.full((1, n), -1.0), torch.ones(1, n))


def some_spec(seed: int, clause: list[int]) -> Spec:
    generator = torch.Generator().manual_seed(seed)
    C = torch.randn(1, len(clause), 3, generator=generator)
    return Spec(C, torch.zeros(1, len(clause)), torch.tensor(clause))


def shifted(spec: Spec, by: float) -> Spec:
    return Spec(spec.C, spec.d + by, spec.clause)


@pytest.mark.parametrize("kind", CLAUSES)
@pytest.mark.parametrize("seed", range(3))
def test_agrees_with_a_linear_program_for_every_activation_pattern(seed: int, kind: str) -> None:
    network, spec = shallow(seed), some_spec(seed, CLAUSES[kind])
    least = pattern_minimum(network, unit_box(), spec)
    robust = shifted(spec, 0.01 - least)
    outcome = decide(network, unit_box(), robust)
    assert outcome.robust
    assert outcome.reason == ""
    assert 0 < outcome.lower <= 0.01 + 1e-5
    broken = shifted(spec, -0.01 - least)
    outcome = decide(network, unit_box(), broken)
    assert not outcome.robust
    assert outcome.point is not None
    values = rationals.functionals(network, broken, outcome.point.unsqueeze(0))[0]
    worst = [
        max(v for v, c in zip(values, broken.clause.tolist(), strict=True) if c == k)
        for k in range(broken.count)
    ]
    assert min(worst) <= 0


def pocket(at: tuple[float, ...], width: float) -> tuple[Network, Region, Spec]:
    """y = 1 − 2·relu(1 − Σ|x − at|/width): unsafe only in a tiny pocket."""
    n = len(at)
    b = networks.Builder((n,), 0)
    eye = torch.eye(n)
    a = torch.tensor(at)
    first = torch.cat([eye, -eye])
    h = b.relu(b(F.linear, b.x, first, torch.cat([-a, a])))
    h = b.relu(b(F.linear, h, torch.full((1, 2 * n), -1 / width), torch.ones(1)))
    b(F.linear, h, torch.tensor([[-2.0]]), torch.ones(1))
    spec = Spec.functional(torch.ones(1, 1, 1))
    return b.network(), unit_box(n), spec


POCKETS = [
    ((0.3125, -0.7), 1e-4),
    ((0.999, 0.999, -1.0), 1e-3),
    ((-0.123, 0.456, 0.789), 1e-3),
    ((0.0, 0.0), 1e-6),
]


def check_pockets() -> None:
    for at, width in POCKETS:
        network, region, spec = pocket(at, width)
        outcome = decide(network, region, spec, 3)
        assert not outcome.robust, (at, width)
        if outcome.point is not None:
            exact = rationals.functionals(network, spec, outcome.point.unsqueeze(0))
            assert exact[0][0] <= 0


def test_a_planted_pocket_is_never_robust() -> None:
    check_pockets()
    network, region, spec = pocket((0.3125, -0.7), 1e-3)
    assert decide(network, region, spec).point is not None  # and this one is found
    shallow_pocket = Spec(spec.C, spec.d + 1.001, spec.clause)
    assert decide(network, region, shallow_pocket).robust


def _gap(boxes: Boxes, dim: Tensor) -> tuple[Boxes, Boxes]:
    first, second = halves(boxes, dim)
    index = dim.unsqueeze(1)
    lower = second.lower.gather(1, index)
    moved = lower + 0.05 * (second.upper.gather(1, index) - lower)
    return first, second._replace(lower=second.lower.scatter(1, index, moved))


def _greedy(boxes: Boxes, planes: Planes, cut: Tensor) -> Boxes:
    return trimmed(boxes, planes._replace(slopes=1.2 * planes.slopes), cut)


def _hopeful(self: Any, boxes: Boxes, *, thorough: bool) -> tuple[Boxes, Tensor]:
    left, points = REAL_BOUND(self, boxes, thorough=thorough)
    return left.at(~(left.hope > -0.5)), points


REAL_BOUND = search._Search.bound


def check_enumeration() -> None:
    for seed, kind in itertools.product(range(3), CLAUSES):
        test_agrees_with_a_linear_program_for_every_activation_pattern(seed, kind)


def check_cover() -> None:
    with pytest.MonkeyPatch.context() as patch:
        test_proved_boxes_cover_the_region_exactly(patch)


def check_trimming() -> None:
    for kind in CLAUSES:
        test_trimming_keeps_every_point_that_may_fail(kind)


@pytest.mark.parametrize(
    ("where", "name", "fault", "check"),
    [
        (search, "halves", _gap, check_cover),
        (geometry, "trimmed", _greedy, check_trimming),
        (search._Search, "bound", _hopeful, check_enumeration),
    ],
)
def test_planted_faults_are_caught(
    monkeypatch: pytest.MonkeyPatch,
    where: Any,
    name: str,
    fault: Callable[..., Any],
    check: Callable[[], None],
) -> None:
    check()
    monkeypatch.setattr(where, name, fault)
    with pytest.raises(AssertionError):
        check()


# -- geometry -----------------------------------------------------------------------------------------------------


def volume(boxes: Boxes) -> Fraction:
    total = Fraction(0)
    for low, high in zip(boxes.lower.tolist(), boxes.upper.tolist(), strict=True):
        sides = (Fraction(h) - Fraction(l) for l, h in zip(low, high, strict=True))
        total += math.prod(sides, start=Fraction(1))
    return total


def test_proved_boxes_cover_the_region_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without trimming, the boxes that are proved have the region's volume, in rational arithmetic."""
    network, spec = shallow(1, 6), some_spec(1, CLAUSES["both"])
    spec = shifted(spec, 0.003 - pattern_minimum(network, unit_box(), spec))
    region = Region.box(
        torch.tensor([[-0.9, -1.0]], dtype=F64), torch.tensor([[0.7, 1 / 3]], dtype=F64)
    )
    proved = Fraction(0)

    def bound(self: Any, boxes: Boxes, *, thorough: bool) -> tuple[Boxes, Tensor]:
        nonlocal proved
        left, points = REAL_BOUND(self, boxes, thorough=thorough)
        proved += volume(boxes) - volume(left)
        return left, points

    monkeypatch.setattr(search, "trimmed", lambda boxes, _planes, _cut: boxes)
    monkeypatch.setattr(search._Search, "bound", bound)
    outcome = decide(network, region, spec)
    assert outcome.robust
    assert outcome.domains >= 5
    lower, upper = region.hull()
    whole = Boxes(lower, upper, *(torch.empty(0),) * 4)
    assert proved == volume(whole)


def some_boxes(generator: torch.Generator, count: int, n: int, clauses: int) -> Boxes:
    ends = torch.randn(2, count, n, generator=generator, dtype=F64).sort(0).values
    zeros = torch.zeros(count, dtype=F64)
    open_ = torch.ones(count, clauses, dtype=torch.bool)
    return Boxes(ends[0], ends[1], open_, zeros, zeros, torch.arange(count))


def test_halves_share_their_corner() -> None:
    boxes = some_boxes(torch.Generator().manual_seed(0), 50, 3, 1)
    dim = torch.arange(50) % 3
    first, second = halves(boxes, dim)
    index = dim.unsqueeze(1)
    assert torch.equal(first.upper.gather(1, index), second.lower.gather(1, index))
    assert torch.equal(first.lower, boxes.lower)
    assert torch.equal(second.upper, boxes.upper)
    assert volume(first) + volume(second) == volume(boxes)


def some_planes(generator: torch.Generator, boxes: Boxes, clause: list[int]) -> Planes:
    count, n = boxes.lower.shape
    return Planes(
        torch.randn(len(clause), count, n, generator=generator, dtype=F64),
        torch.randn(len(clause), count, generator=generator, dtype=F64),
        torch.tensor(clause),
        (boxes.lower + boxes.upper) / 2,
        (boxes.upper - boxes.lower) / 2,
    )


@pytest.mark.parametrize("kind", CLAUSES)
def test_trimming_keeps_every_point_that_may_fail(kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    clause = CLAUSES[kind]
    boxes = some_boxes(generator, 200, 3, max(clause) + 1)
    planes = some_planes(generator, boxes, clause)
    cut = torch.full((200,), 0.01, dtype=F64)
    left = geometry.trimmed(boxes, planes, cut)
    assert (left.lower >= boxes.lower).all()
    assert (left.upper <= boxes.upper).all()
    smaller = ((left.upper - left.lower) < (boxes.upper - boxes.lower)).any()
    assert smaller
    for _ in range(300):
        unit = torch.rand(boxes.lower.shape, generator=generator, dtype=F64)
        x = boxes.lower + unit.mul(1.4).sub(0.2).clamp(0, 1) * (boxes.upper - boxes.lower)
        x = x.clamp(boxes.lower, boxes.upper)
        value = planes.values + (planes.slopes * (x - planes.center)).sum(-1)
        for number in range(max(clause) + 1):
            fails = (value[planes.clause == number] <= 0.01).all(0)
            inside = ((x >= left.lower) & (x <= left.upper)).all(1) & left.open[:, number]
            assert inside[fails].all()


def test_weights_come_near_the_linear_program() -> None:
    from scipy.optimize import linprog

    generator = torch.Generator().manual_seed(0)
    boxes = some_boxes(generator, 20, 3, 1)
    planes = some_planes(generator, boxes, [0, 0, 0])
    rows = torch.arange(3)
    weights = blend(planes, rows, 200)
    assert (weights >= 0).all()
    assert torch.allclose(weights.sum(0), torch.ones(20, dtype=F64))
    low = planes.mean(rows, weights).lows[0]
    for i in range(20):
        slopes, values = planes.slopes[:, i].numpy(), planes.values[:, i].numpy()
        radius = planes.radius[i].numpy()
        exact = linprog(
            [0, 0, 0, 1],
            np.hstack([slopes, -np.ones((3, 1))]),
            -values,
            bounds=[*((-r, r) for r in radius), (None, None)],
        ).fun
        assert low[i] <= exact + 1e-9
        assert low[i] >= exact - 0.05 * (np.abs(slopes) @ radius).max()


# -- behaviour ----------------------------------------------------------------------------------------------------


def test_the_bound_holds_in_rational_arithmetic() -> None:
    for seed in range(3):
        network = networks.mlp(seed, (3, 6, 5, 3))
        spec = some_spec(seed, CLAUSES["disjunction"])
        grid = torch.tensor(list(itertools.product((-1.0, 0.0, 1.0), repeat=3)))
        repeated = spec[torch.zeros(len(grid), dtype=torch.long)]
        values = [min(row) for row in rationals.functionals(network, repeated, grid)]
        shift = float(0.5 - min(values))
        outcome = decide(network, unit_box(3), shifted(spec, shift), 2)
        assert outcome.lower <= min(values) + Fraction(shift) + Fraction(1, 10**6)


def test_a_tie_is_no_proof() -> None:
    b = networks.Builder((1,), 0)
    b(F.linear, b.relu(b.x), torch.ones(1, 1), torch.zeros(1))
    outcome = decide(
        b.network(),
        Region.box(torch.zeros(1, 1), torch.ones(1, 1)),
        Spec.functional(torch.ones(1, 1, 1)),
    )
    assert not outcome.robust
    assert outcome.point is not None
    assert outcome.point.item() == 0.0


def test_nan_is_no_proof() -> None:
    network = shallow(0)
    next(iter(network.module.state_dict().values()))[0, 0] = math.nan
    outcome = decide(network, unit_box(), shifted(some_spec(0, [0]), 100.0), 0.5)
    assert not outcome.robust
    assert outcome.point is None
    assert outcome.reason


def test_the_deadline_is_kept_and_nothing_is_claimed() -> None:
    begin = time.perf_counter()
    network, region, spec = pocket((0.3, -0.7, 0.2, 0.1, 0.6, 0.5), 1e-9)
    told: list[Outcome] = []
    outcome = decide(network, region, spec, 1.5, progress=told.append)
    assert time.perf_counter() - begin < 5  # generous: other processes run too
    assert outcome.reason.startswith("time is up")
    assert outcome.lower <= 0
    assert told
    assert not any(t.robust for t in told)
    late = decide(network, region, spec, -1)
    assert late.domains == 0
    assert not late.robust


def test_memory_is_bounded() -> None:
    network = networks.mlp(0, (6, 60, 60, 60, 3))
    outcome = decide(network, unit_box(6), shifted(some_spec(0, [0, 1]), 8.0), 20, memory=300)
    assert outcome.reason.startswith("memory is up")
    assert not outcome.robust


def test_an_attack_is_asked_and_its_points_are_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "SHARE", math.inf)
    network, region, spec = pocket((0.3125, -0.7), 1e-6)
    asked: list[Region] = []

    def attack(box: Region, _: Spec) -> Tensor:
        asked.append(box)
        return torch.tensor([[0.5, 0.5], [7.0, 7.0], [0.3125, -0.7]])

    outcome = decide(network, region, spec, attack=attack)
    assert asked
    assert outcome.point is not None
    assert torch.equal(outcome.point, torch.tensor([0.3125, -0.7]))


def test_an_interrupt_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "SHARE", math.inf)
    network, region, spec = pocket((0.3, -0.7), 1e-6)

    def attack(_box: Region, _spec: Spec) -> Tensor:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        decide(network, region, spec, attack=attack)


def test_a_frozen_input_is_not_cut() -> None:
    network = shallow(2)
    region = Region.box(torch.tensor([[-1.0, 0.25]]), torch.tensor([[1.0, 0.25]]))
    spec = some_spec(2, [0, 0])
    x = torch.stack([torch.linspace(-1, 1, 4001), torch.full((4001,), 0.25)], 1)
    least = spec[torch.zeros(4001, dtype=torch.long)].margin_at(network(x).double()).min().item()
    assert decide(network, region, shifted(spec, 0.01 - least)).robust
    point = region.center.float()
    alone = Region.box(point, point)
    value = spec.margin_at(network(point).double()).item()
    assert decide(network, alone, shifted(spec, 0.1 - value)).robust
    assert decide(network, alone, shifted(spec, -0.1 - value)).point is not None


@pytest.mark.parametrize(
    ("region", "message"),
    [
        (Region.ball(torch.zeros(1, 2), 0.5, 2.0), "ball"),
        (Region.ball(torch.zeros(2, 2), 0.5, math.inf), "2 examples"),
        (Region.box(torch.zeros(1, 2), torch.full((1, 2), math.inf)), "unbounded"),
    ],
)
def test_bad_input(region: Region, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decide(shallow(0), region, some_spec(0, [0]))


def test_too_many_inputs_are_left_to_others() -> None:
    network = networks.mlp(0, (40, 5, 3))
    outcome = decide(network, unit_box(40), some_spec(0, [0]))
    assert not outcome.robust
    assert "40 inputs vary" in outcome.reason
    assert geometry.Frontier().bound == math.inf
