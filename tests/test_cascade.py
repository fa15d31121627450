"""The cascade of attacks: what it finds, what it spends, and that it can be stopped and resumed."""

from __future__ import annotations

import time
from functools import cache, partial

import pytest
import torch
from torch import Tensor, nn

import attack_checks as checks
from attack_checks import EPS, INF, NORMS, K, N, batch, margins, network
from calipers import Region, Spec, ThreatModel, apgd, pgd, search
from calipers import data as datasets
from calipers.attacks import LEVELS, Found, calibrated
from calipers.attacks.cascade import Stage
from calipers.models import load_model
from calipers.seeds import mixed, seeds

TABLE = (Stage(4), Stage(5, targets=2), Stage(6, starts=3, start="random"))


class Counting(nn.Module):
    """Counts the rows that pass forward and backward."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.passes = net, 0

    def forward(self, x: Tensor) -> Tensor:
        self.passes += len(x)
        y: Tensor = self.net(x)
        if y.requires_grad:
            y.register_hook(self.count)
        return y

    def count(self, gradient: Tensor) -> None:
        self.passes += len(gradient)


def problem(p: float = INF, scale: float = 0.6) -> tuple[nn.Module, Tensor, Tensor, ThreatModel]:
    """A network of which some examples break early, some late and some not at all."""
    net = network()
    x, y = batch(net, 40)
    return net, x, y, ThreatModel(p, EPS[p] * scale)


def run(p: float = INF, **options: object) -> Found:
    net, x, y, threat = problem(p)
    model = options.pop("model", net)
    return search(
        model, threat.around(x), Spec.label(y, K), dtype=x.dtype, seeds=seeds(x, 0, "t"), **options
    )  # type: ignore[arg-type]


@cache
def of_level(p: float, level: str) -> Found:
    return run(p, level=level)


@pytest.mark.parametrize("p", NORMS)
@pytest.mark.parametrize("level", LEVELS)
def test_every_level_finds_members_and_the_true_margin(level: str, p: float) -> None:
    found = of_level(p, level)
    net, x, y, threat = problem(p)
    assert threat.around(x).contains(found.points).all()
    torch.testing.assert_close(
        found.margin, margins(net, Spec.label(y, K), found.points), rtol=0, atol=1e-12
    )
    assert 0 < found.broken.sum() < len(x)


@pytest.mark.parametrize("p", NORMS)
def test_no_weaker_than_pgd_and_dearer_levels_no_weaker_than_cheaper_ones(p: float) -> None:
    net, x, y, threat = problem(p)
    region, spec = threat.around(x), Spec.label(y, K)
    plain = margins(net, spec, pgd(net, region, spec, steps=40, dtype=x.dtype)) <= 0
    quick, standard, thorough = (of_level(p, level).broken for level in LEVELS)
    assert standard.sum() >= plain.sum()
    assert standard[quick].all()
    assert thorough[standard].all()


@pytest.mark.parametrize("p", NORMS)
def test_passes_are_those_of_the_model(p: float) -> None:
    model = Counting(problem()[0])
    found = run(p, model=model, level=TABLE)
    assert int(found.passes.sum()) == model.passes
    # a clean pass; a stage's gradients are two passes each, its choice of targets one
    assert int(found.passes.max()) <= 1 + 2 * 4 + 1 + 2 * 5 * 2 + 2 * 6 * 3


@pytest.mark.parametrize("precision", [None, torch.bfloat16])
@pytest.mark.parametrize("p", NORMS)
def test_passes_of_every_kind_of_search_are_counted(
    p: float, precision: torch.dtype | None
) -> None:
    table = (Stage(4), Stage(30, "home", targets=2), Stage(40, "square"))
    model = Counting(problem()[0])
    found = run(p, model=model, level=table, precision=precision)
    queries = len(
        found.passes
    )  # those of Square are shared among a chunk's examples, and rounded up
    assert model.passes <= int(found.passes.sum()) <= model.passes + queries


def test_the_black_box_sees_what_has_no_gradient() -> None:
    """Rounded inputs: the gradient is 0 everywhere."""
    net, x, y, threat = problem(scale=2.0)

    def rounded(z: Tensor) -> Tensor:
        steps: Tensor = net(torch.round(8 * z) / 8 + 0 * z)
        return steps

    with torch.no_grad():
        y = rounded(x).argmax(1)
    region, spec, s = threat.around(x), Spec.label(y, K), seeds(x, 0, "t")
    blind = search(rounded, region, spec, level=(Stage(10),), dtype=x.dtype, seeds=s)
    seen = search(
        rounded, region, spec, level=(Stage(10), Stage(500, "square")), dtype=x.dtype, seeds=s
    )
    assert seen.broken.sum() > blind.broken.sum() + 5


def test_broken_and_certified_examples_cost_nothing_more() -> None:
    net, x, _, threat = problem()
    with torch.no_grad():
        wrong = (net(x).argmax(1) + 1) % K
    region, spec, s = threat.around(x), Spec.label(wrong, K), seeds(x, 0, "t")
    found = search(net, region, spec, dtype=x.dtype, seeds=s)
    assert found.broken.all()
    assert (found.passes == 1).all()
    assert torch.equal(found.points, x)
    certified = torch.arange(len(x)) % 2 == 0
    found = run(certified=certified)
    assert (found.passes[certified] == 1).all()
    assert torch.equal(found.points[certified], x[certified])
    others = run()
    assert torch.equal(found.broken[~certified], others.broken[~certified])
    with pytest.raises(ValueError, match=r"certified: \(3,\)"):
        run(certified=certified[:3])


@pytest.mark.parametrize("p", NORMS)
def test_results_do_not_depend_on_how_many_searches_run_side_by_side(p: float) -> None:
    whole = run(p, level=TABLE)
    for rows in (1, 7):
        parts = run(p, level=TABLE, rows=rows)
        torch.testing.assert_close(parts.points, whole.points, rtol=1e-9, atol=1e-9)
        assert torch.equal(parts.passes, whole.passes)


def test_a_budget_of_passes_ends_before_the_stage_that_would_follow() -> None:
    found = run(level=TABLE, passes=9)
    assert found.stopped == "stopped by passes"
    left = ~found.broken
    assert (found.stage[left] == 1).all()
    assert (found.passes[left] == 9).all()


@pytest.mark.parametrize("limit", ["passes", "time", "interrupt"])
def test_what_is_resumed_is_what_was_never_stopped(limit: str) -> None:
    whole = run(level=TABLE, rows=8)
    calls = 0

    def stop(_number: int, found: Found) -> None:
        nonlocal calls
        calls += 1
        if calls == 6:
            assert (found.stage > 0).any()
            raise KeyboardInterrupt

    options: dict[str, dict[str, object]] = {
        "passes": {"passes": 9},
        "time": {"seconds": 0.0},
        "interrupt": {"progress": stop},
    }
    part = run(level=TABLE, rows=8, **options[limit])
    assert part.stopped
    assert not torch.equal(part.passes, whole.passes)
    rest = run(level=TABLE, rows=8, found=part)
    assert rest.stopped is None
    torch.testing.assert_close(rest.points, whole.points, rtol=1e-9, atol=1e-9)
    assert torch.equal(rest.passes, whole.passes)
    assert torch.equal(rest.broken, whole.broken)


def test_a_search_in_bfloat16_claims_nothing_that_float32_does_not_confirm() -> None:
    model, test = load_model("digits_pgd").module, datasets.load("digits")
    x, y = test.x[:200], test.y[:200]
    region, spec = ThreatModel(INF, "0.1").around(x), Spec.label(y, 10)
    s = seeds(x, 0, "t")
    coarse = search(model, region, spec, seeds=s, precision=torch.bfloat16)
    own = search(model, region, spec, seeds=s)
    assert region.contains(coarse.points).all()
    torch.testing.assert_close(coarse.margin, margins(model, spec, coarse.points))
    assert abs(int(coarse.broken.sum()) - int(own.broken.sum())) <= 2


def test_general_specifications_and_boxes_without_radius() -> None:
    """Safe iff y0 > 0 or y1 > 0, and y2 < 5: broken where both of the first are <= 0."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 16), nn.ReLU(), nn.Linear(16, 3)).double()
    x = torch.zeros(6, 3, dtype=torch.float64)
    region = Region.box(x - torch.arange(1.0, 7.0).view(6, 1), x + 1.0)
    C = torch.tensor([[1.0, 0, 0], [0, 1.0, 0], [0, 0, -1.0]], dtype=torch.float64)
    d = torch.tensor([0.1, 0.1, 5.0], dtype=torch.float64)
    spec = Spec(C.expand(6, 3, 3), d.expand(6, 3), torch.tensor([0, 0, 1]))
    found = search(net, region, spec, dtype=torch.float64, seeds=seeds(x, 0, "t"))
    assert region.contains(found.points).all()
    grid = torch.rand(4000, 6, 3, dtype=torch.float64)
    points = region.lower + grid * (region.upper - region.lower)
    with torch.no_grad():
        sampled = torch.stack([spec.margin_at(net(p)) for p in points]).amin(0)
    assert (found.margin <= sampled + 1e-9)[sampled > 0].all()
    assert found.broken[sampled <= 0].all()


def test_masked_gradients_need_the_random_starts() -> None:
    """A flat neighbourhood of the example: from there no step is uphill."""

    def masked(x: Tensor) -> Tensor:
        away = (x - 0.5).abs().amax(1, keepdim=True)
        return torch.cat([torch.relu(away - 0.05), torch.full_like(away, 0.03)], 1)

    x = torch.full((4, 5), 0.5)
    region, spec = ThreatModel(INF, 0.1).around(x), Spec.label(torch.ones(4, dtype=torch.long), 2)
    assert (margins(masked, spec, pgd(masked, region, spec)) > 0).all()
    assert search(masked, region, spec, seeds=seeds(x, 0, "t")).broken.all()


@pytest.mark.parametrize("p", NORMS)
def test_apgd_reaches_the_optimum_of_affine_models(p: float) -> None:
    for loss in ("margin", "cross_entropy"):
        checks.check_linear_optimum(partial(apgd, loss=loss, drop=False), p, 1 + 1e-5)


@pytest.mark.parametrize("p", NORMS)
def test_apgd_drives_towards_its_target(p: float) -> None:
    net, x, y, threat = problem(p, scale=2.0)
    region, spec = threat.around(x), Spec.label(y, K)
    values = []
    for target in range(K - 1):
        aim = torch.full_like(y, target)
        points = apgd(net, region, spec, steps=30, target=aim, drop=False, dtype=x.dtype)
        with torch.no_grad():
            values.append(spec.values(net(points)))
    table = torch.stack(values)  # (aim, B, clause)
    own = table.diagonal(dim1=0, dim2=2)
    assert (own <= table.amin(0) + 0.1).float().mean() > 0.8
    with pytest.raises(ValueError, match=r"target: clauses must be in 0\.\.2"):
        apgd(net, region, spec, target=y + 9)


def test_seeds_for_many_purposes_are_all_different() -> None:
    s = seeds(torch.rand(50, N), 0, "t")
    all_of_them = torch.cat([mixed(s, number) for number in range(100)])
    assert len(all_of_them.unique()) == 5000
    assert (all_of_them >= 0).all()
    assert all_of_them.bitwise_and(1).double().mean().sub(0.5).abs() < 0.03


def test_unknown_levels_and_absurd_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match=r"standrd.*standard"):
        run(level="standrd")
    with pytest.raises(ValueError, match="rows: 0"):
        run(rows=0)
    net, x, y, threat = problem()
    few = torch.zeros(3, dtype=torch.int64)
    with pytest.raises(ValueError, match="seeds: shape"):
        search(net, threat.around(x), Spec.label(y, K), seeds=few)


def test_calibration_names_the_cheapest_size() -> None:
    """A model that is slow beyond 64 rows, and one whose calls cost more than its rows."""

    def slow(x: Tensor) -> Tensor:
        time.sleep(0.001 + (0.05 if len(x) > 64 else 0.0))
        return 2 * x

    def calls(x: Tensor) -> Tensor:
        time.sleep(0.002)
        return 2 * x

    x = torch.rand(10, 3)
    assert calibrated(slow, x, seconds=9.0) == 64
    assert calibrated(calls, x, seconds=9.0) == 512
    assert calibrated(slow, x, seconds=0.0) == 32
