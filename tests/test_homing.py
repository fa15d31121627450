"""Frank-Wolfe steps over the boundary and back: members only, and what ascent from inside misses."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import attack_checks as checks
from attack_checks import EPS, NORMS, K, N, batch, margins, network
from calipers import Region, Spec, ThreatModel, apgd, search
from calipers.attacks import homing
from calipers.attacks.cascade import Stage
from calipers.seeds import seeds


def homed(
    model: Callable[[Tensor], Tensor],
    region: Region,
    spec: Spec,
    *,
    steps: int = 30,
    dtype: torch.dtype,
    seeds: Tensor | None = None,
    **stage: object,
) -> Tensor:
    """The search alone, as an attack like any other."""
    level = (Stage(steps, "home", **stage),)  # type: ignore[arg-type]
    return search(model, region, spec, level=level, dtype=dtype, seeds=seeds).points


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("p", NORMS)
def test_members_of_every_kind_of_region(p: float, dtype: torch.dtype) -> None:
    """`contains` is exact; among the regions are radii 0, sides that are points and radii that are no floats."""
    checks.check_membership(homed, p, dtype)


@pytest.mark.parametrize("p", NORMS)
def test_the_margin_is_that_of_the_point_and_repeats(p: float) -> None:
    net = network()
    x, y = batch(net, 40)
    region, spec = ThreatModel(p, 0.6 * EPS[p]).around(x), Spec.label(y, K)
    level = (Stage(30, "home", targets=2, starts=2),)
    runs = [
        search(net, region, spec, level=level, dtype=x.dtype, seeds=seeds(x, 0, "t"))
        for _ in range(2)
    ]
    torch.testing.assert_close(
        runs[0].margin, margins(net, spec, runs[0].points), rtol=0, atol=1e-12
    )
    assert torch.equal(runs[0].points, runs[1].points)
    assert torch.equal(runs[0].passes, runs[1].passes)
    plain = margins(net, spec, apgd(net, region, spec, dtype=x.dtype)) <= 0
    assert runs[0].broken.sum() >= plain.sum() - 1


@pytest.mark.parametrize("options", [{}, {"targets": 2, "starts": 3, "start": "random"}])
@pytest.mark.parametrize("p", NORMS)
def test_results_do_not_depend_on_the_batch(p: float, options: dict[str, object]) -> None:
    checks.check_batch_independence(homed, p, **options)


@pytest.mark.parametrize("p", NORMS)
def test_the_first_full_step_is_the_optimum_of_affine_models(p: float) -> None:
    """A model without a boundary near by: the search stays in the region, and its vertex is the maximum."""
    slopes = torch.randn(2, N, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    x = torch.rand(8, N, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    region, spec = ThreatModel(p, EPS[p]).around(x), Spec.label(torch.zeros(8, dtype=torch.long), 2)

    def model(z: Tensor) -> Tensor:
        return z @ slopes.T + torch.tensor([100.0, 0.0], dtype=torch.float64)

    points = homed(model, region, spec, dtype=x.dtype, steps=40, step=1.0, loss="cross_entropy")
    slope = (slopes[1] - slopes[0]).expand(8, N)
    best = region.support(slope)
    torch.testing.assert_close((slope * points).sum(1), best, rtol=1e-9, atol=1e-9)


def test_frozen_features_stay() -> None:
    net = network()
    x, y = batch(net)
    mask = torch.arange(N) % 3 > 0
    for p in NORMS:
        region = ThreatModel(p, EPS[p], mask=mask).around(x)
        points = homed(net, region, Spec.label(y, K), dtype=x.dtype)
        assert region.contains(points).all()
        assert torch.equal(points[:, ~mask], x[:, ~mask])
        assert (points != x).any()


@pytest.mark.parametrize("p", [1, 2])
def test_on_a_grid_only_its_points_count(p: float) -> None:
    net = network(torch.float32)
    x = (batch(net, 40)[0] * 16).round() / 16
    with torch.no_grad():
        y = net(x).argmax(1)
    region, spec = ThreatModel(p, EPS[p], grid="1/16").around(x), Spec.label(y, K)
    found = search(net, region, spec, level=(Stage(30, "home"),), seeds=seeds(x, 0, "t"))
    assert region.contains(found.points).all()
    assert found.broken.any()


@pytest.mark.parametrize("p", [1, 2])
def test_general_specifications(p: float) -> None:
    """Safe iff y0 > 0 or y1 > 0, and y2 < 5: a clause of several functionals lies behind a surface with corners."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 16), nn.ReLU(), nn.Linear(16, 3)).double()
    x = torch.full((6, 3), 0.5, dtype=torch.float64)
    region = Region.ball(x, torch.arange(1.0, 7.0, dtype=torch.float64) / 2, p)
    C = torch.tensor([[1.0, 0, 0], [0, 1.0, 0], [0, 0, -1.0]], dtype=torch.float64)
    d = torch.tensor([0.1, 0.1, 5.0], dtype=torch.float64)
    spec = Spec(C.expand(6, 3, 3), d.expand(6, 3), torch.tensor([0, 0, 1]))
    level = (Stage(40, "home"), Stage(40, "home", targets=2, starts=3))
    found = search(net, region, spec, level=level, dtype=torch.float64, seeds=seeds(x, 0, "t"))
    assert region.contains(found.points).all()
    sampled = torch.stack([region.sample(torch.arange(6) + 6 * i) for i in range(500)]).double()
    with torch.no_grad():
        lowest = torch.stack([spec.margin_at(net(points)) for points in sampled]).amin(0)
    assert found.broken[lowest <= 0].all()


class Masked(nn.Module):
    """Thresholds as robust MNIST networks learn them: flat around the examples, plain beyond."""

    def forward(self, x: Tensor) -> Tensor:
        seen = torch.relu((x - 0.2).abs() - 0.15).sum(1, keepdim=True)
        return torch.cat([torch.full_like(seen, 0.3), seen], 1)


def test_flat_surroundings_hide_nothing_from_beyond() -> None:
    x = torch.full((3, 12), 0.2)
    region, spec = ThreatModel(2, 1.0).around(x), Spec.label(torch.zeros(3, dtype=torch.long), 2)
    assert (margins(Masked(), spec, apgd(Masked(), region, spec)) > 0).all()
    level = (Stage(60, "home", start="random"),)
    found = search(Masked(), region, spec, level=level, seeds=seeds(x, 0, "t"))
    assert found.broken.all()


class Decoy(Masked):
    """Flat but for a faint slope that leads astray: all features alike, of which only the first counts for much."""

    def forward(self, x: Tensor) -> Tensor:
        weight = torch.tensor([1.0, *[0.3] * 11])
        seen = (weight * torch.relu((x - 0.2).abs() - 0.15)).sum(1, keepdim=True)
        return torch.cat([torch.full_like(seen, 0.3), seen + 1e-3 * x.sum(1, keepdim=True)], 1)


def test_the_ball_grows_beyond_the_boundary(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.full((3, 12), 0.2)
    region, spec = ThreatModel(2, 0.5).around(x), Spec.label(torch.zeros(3, dtype=torch.long), 2)
    assert (margins(Decoy(), spec, apgd(Decoy(), region, spec)) > 0).all()
    found = homed(Decoy(), region, spec, steps=60, dtype=x.dtype)
    assert (margins(Decoy(), spec, found) <= 0).all()
    for name, value in (("GROWTH", 1.0), ("_reach", lambda eps, *_: eps)):
        monkeypatch.setattr(homing, name, value)
    found = homed(Decoy(), region, spec, steps=60, dtype=x.dtype)
    assert (margins(Decoy(), spec, found) > 0).all()


@pytest.mark.parametrize("p", NORMS)
def test_without_any_gradient_a_search_stays(p: float) -> None:
    def flat(z: Tensor) -> Tensor:
        return torch.cat([1 + 0 * z[:, :1], 0 * z[:, :1]], 1)

    def broken(z: Tensor) -> Tensor:
        return flat(z) * torch.tensor([float("nan"), 1.0], dtype=z.dtype)

    x = torch.full((2, 5), 0.5, dtype=torch.float64)
    region, spec = ThreatModel(p, 0.1).around(x), Spec.label(torch.zeros(2, dtype=torch.long), 2)
    for model in (flat, broken):
        points = homed(model, region, spec, dtype=x.dtype)
        assert region.contains(points).all()
        assert torch.equal(points, x)
