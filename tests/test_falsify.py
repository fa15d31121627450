"""The search for one witness: needles in low dimension, conjunctions, suggested starts, limits."""

from __future__ import annotations

import time
from itertools import islice

import pytest
import torch
from torch import Tensor

from attack_checks import INF, K, batch, network
from calipers import Region, Spec, ThreatModel, capture, crown, falsify
from calipers.attacks.falsify import Suggestion, descend, dive
from calipers.attacks.losses import LOSSES, read, shortfall
from calipers.bounds.corners import corners
from calipers.errors import RegionError

F64 = torch.float64


def needle(width: float) -> tuple[Region, Spec]:
    """y = |x − 0.7| in each of four coordinates; unsafe where all are at most ``width``: one clause of four."""
    region = Region.box(torch.zeros(1, 4, dtype=F64), torch.ones(1, 4, dtype=F64))
    C = torch.eye(4, dtype=F64).unsqueeze(0)
    d = torch.full((1, 4), -width, dtype=F64)
    return region, Spec(C, d, torch.zeros(4, dtype=torch.int64))


def distances(x: Tensor) -> Tensor:
    return (x - 0.7).abs()


def test_a_needle_in_a_conjunction_is_found() -> None:
    region, spec = needle(1e-3)
    tried = 0
    for points, rows in falsify(distances, region, spec, seconds=20.0, dtype=F64):
        assert region[rows].contains(points).all()
        tried += 1
        if bool(spec[rows].violated(distances(points)).any()):
            break
    else:
        pytest.fail("not found")
    assert tried > 1  # not by luck: the set is 1e-11 of the box


@pytest.mark.parametrize("p", [1, 2, INF])
def test_all_points_are_members_of_their_rows(p: float) -> None:
    net = network()
    x, y = batch(net, 5)
    region, spec = ThreatModel(p, 0.05).around(x), Spec.label(y, K)
    batches = list(islice(falsify(net, region, spec, dtype=x.dtype), 9))
    assert len(batches) == 9
    for points, rows in batches:
        assert region[rows].contains(points).all()


def test_a_dive_finds_the_needle_too() -> None:
    region, spec = needle(1e-3)
    points, rows = dive(distances, region, spec, torch.Generator().manual_seed(0), dtype=F64)
    assert region[rows].contains(points).all()
    assert distances(points).amax(1).min() < 0.05  # its thirty steps are short of 1e-3
    both = Region.box(torch.zeros(2, 4, dtype=F64), torch.tensor([[1.0] * 4, [0.5] * 4]).double())
    points, rows = dive(
        distances, both, spec[torch.tensor([0, 0])], torch.Generator().manual_seed(0), dtype=F64
    )
    assert both[rows].contains(points).all()
    assert set(rows.tolist()) <= {0, 1}


def test_time_ends_it_and_nothing_is_lost() -> None:
    region, spec = needle(-1.0)  # cannot be broken
    begin = time.perf_counter()
    batches = list(falsify(distances, region, spec, seconds=0.5, dtype=F64))
    assert len(batches) >= 3
    assert time.perf_counter() - begin < 10.0


def test_suggestions_are_tried_and_descended_from() -> None:
    region, spec = needle(-1.0)  # cannot be broken
    start = torch.tensor([[0.1, 0.2, 0.3, 0.4]], dtype=F64)
    given = [Suggestion(start, torch.tensor([0]), torch.tensor([0]))]
    seen = [
        p for p, _ in islice(falsify(distances, region, spec, suggest=lambda: given, dtype=F64), 14)
    ]
    at = next(i for i, points in enumerate(seen) if torch.equal(points, start))
    for points in seen[at + 1 : at + 3]:
        assert (distances(points) < distances(start)).all()


def test_an_unbounded_region_has_no_draw() -> None:
    region = Region.box(torch.full((1, 2), -INF), torch.ones(1, 2))
    spec = Spec.functional(torch.ones(1, 1, 2))
    with pytest.raises(RegionError, match="unbounded"):
        next(falsify(lambda x: x, region, spec))


def test_descent_moves_along_all_that_is_missing() -> None:
    """The worst functional alone would leave the three others where they are."""
    region, spec = needle(0.05)
    x = torch.tensor([[0.1, 0.2, 0.3, 0.35]], dtype=F64)
    zero = torch.tensor([0])
    first = read(shortfall, distances(x), spec, zero)
    assert (first.toward < 0).all()
    found = descend(distances, region, spec, x, zero, zero, 0.3)
    assert spec.violated(distances(found)).all()


def test_shortfall_is_zero_exactly_where_a_clause_is_broken() -> None:
    C = torch.eye(3, dtype=F64).unsqueeze(0).expand(3, 3, 3)
    spec = Spec(C, torch.zeros(3, 3, dtype=F64), torch.tensor([0, 0, 1]))
    y = torch.tensor([[1.0, 2.0, 5.0], [-1.0, 0.0, 5.0], [1.0, 1.0, -1.0]], dtype=F64)
    values = spec.values(y)
    assert LOSSES["shortfall"](values, spec).tolist() == [-3.0, 0.0, 0.0]
    assert shortfall(values, spec, torch.tensor([1, 1, 0])).tolist() == [-5.0, -5.0, -2.0]


def test_corners_are_the_minimisers_of_affine_models() -> None:
    torch.manual_seed(0)
    net = torch.nn.Linear(6, 3).double()
    x = torch.rand(4, 6, dtype=F64)
    captured = capture(net, x[:2])
    region, spec = ThreatModel(INF, 0.2).around(x), Spec.label(torch.tensor([0, 1, 2, 0]), 3)
    bounds = crown(captured, region, spec).detach()
    batches = list(corners(captured, region, spec))
    assert len(batches) == 2
    for points, rows, clause in batches:
        assert region[rows].contains(points).all()
        with torch.no_grad():
            values = spec[rows].values(net(points)).gather(1, clause.unsqueeze(1)).squeeze(1)
        expected = bounds[rows].gather(1, clause.unsqueeze(1)).squeeze(1)
        torch.testing.assert_close(values, expected, rtol=1e-9, atol=1e-9)
    ball = ThreatModel(2, 0.2).around(x)
    with pytest.raises(ValueError, match="need a box"):
        next(corners(captured, ball, spec))
