"""Every attack returns members of its region and keeps the best; PGD and targeted attacks in detail."""

from __future__ import annotations

import math
from functools import partial
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

import attack_checks as checks
from attack_checks import EPS, INF, NORMS, K, N, batch, margins, network
from calipers import ATTACKS, Region, Spec, ThreatModel, auto, fgsm, pgd, square, targeted, witness
from calipers.attacks import LOSSES
from calipers.seeds import seeds

DTYPES = (torch.float32, torch.float64)
VARIANTS = {
    **ATTACKS,
    "square": partial(square, queries=100),
    "auto": partial(auto, level="quick"),  # the other levels: test_cascade.py
    "pgd_gradient": partial(pgd, direction="gradient", step_size=3.0),
    "pgd_restarts": partial(pgd, steps=4, restarts=3, drop=True),
    "pgd_random": partial(pgd, steps=4, random_start=True, loss="margin"),
}


def problem(p: float = INF, *, outputs: int = K) -> tuple[nn.Sequential, Tensor, Spec, Region]:
    net = network(outputs=outputs)
    x, y = batch(net)
    return net, x, Spec.label(y, outputs), ThreatModel(p, EPS[p]).around(x)


# -- every attack --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("p", NORMS)
@pytest.mark.parametrize("name", VARIANTS)
def test_points_are_strictly_inside(name: str, p: float, dtype: torch.dtype) -> None:
    checks.check_membership(VARIANTS[name], p, dtype)


@pytest.mark.parametrize("p", NORMS)
@pytest.mark.parametrize("name", VARIANTS)
def test_results_do_not_depend_on_the_batch(name: str, p: float) -> None:
    # rounding grows with every step of a search, so the long ones are cut
    options = {"apgd": {"steps": 20}}.get(name, {})
    checks.check_batch_independence(VARIANTS[name], p, **options)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", [name for name in VARIANTS if name != "auto"])
def test_images_and_general_models(name: str, loss: str) -> None:
    """Any callable is a model; inputs of any shape; parameters are left alone."""
    conv = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 3))
    conv[0].bias.requires_grad_(False)
    conv[3].weight.grad = torch.ones_like(conv[3].weight)
    before = [p.requires_grad for p in conv.parameters()]
    x, y = torch.rand(4, 2, 6, 6), torch.tensor([0, 1, 2, 0])
    region = ThreatModel(2, 0.5).around(x)
    attack = partial(VARIANTS[name], loss=loss, seeds=seeds(x, 0, "test"))
    with torch.no_grad():  # gradients are taken all the same
        points = attack(lambda z: conv(2 * z - 1), region, Spec.label(y, 3))
    assert region.contains(points).all()
    assert not torch.equal(points, x)
    assert [p.requires_grad for p in conv.parameters()] == before
    assert torch.equal(conv[3].weight.grad, torch.ones_like(conv[3].weight))
    assert all(p.grad is None for p in conv.parameters() if p is not conv[3].weight)
    assert conv.training


@pytest.mark.parametrize("name", VARIANTS)
def test_a_model_without_gradient_does_not_crash(name: str) -> None:
    x = torch.rand(5, N)
    region, spec = ThreatModel(2, 0.5).around(x), Spec.label(torch.zeros(5, dtype=torch.long), 3)
    flat = torch.tensor([[1.0, 0.5, 0.0]])
    points = VARIANTS[name](lambda z: flat + 0 * z[:, :3], region, spec, seeds=seeds(x, 0, "test"))
    assert region.contains(points).all()
    assert not (witness(lambda z: flat + 0 * z[:, :3], region, spec, points).upper <= 0).any()


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("poison", [math.nan, INF])
def test_outputs_that_are_not_finite_never_count_as_success(name: str, poison: float) -> None:
    net, x, spec, region = problem()

    def broken(z: Tensor) -> Tensor:
        return net(z) + torch.where(z.sum(1, keepdim=True) > 0, poison, 0.0)

    points = VARIANTS[name](broken, region, spec, dtype=x.dtype, seeds=seeds(x, 0, "test"))
    found = witness(broken, region, spec, points)
    assert region.contains(points).all()
    assert torch.isposinf(found.upper).all()


def test_nan_away_from_the_centre_does_not_hide_a_better_point() -> None:
    """One side of the input space gives NaN: what was found before it is kept."""
    net, x, spec, region = problem()
    limit = x.sum(1, keepdim=True) + 0.05

    def half(z: Tensor) -> Tensor:
        return torch.where(z.sum(1, keepdim=True) > limit[: len(z)], math.nan, net(z))

    points = pgd(half, region, spec, dtype=x.dtype)
    found = margins(half, spec, points)
    assert torch.isfinite(found).all()
    assert (found <= margins(net, spec, x)).all()
    assert (found < margins(net, spec, x)).any()


# -- PGD -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", NORMS)
def test_never_worse_than_the_start_nor_than_fewer_steps(p: float) -> None:
    checks.check_never_worse_than_its_start(pgd, p)
    checks.check_best_of_more_steps(pgd, p)
    checks.check_ascends(partial(pgd, steps=1, step_size=0.1), p)
    checks.check_ascends(fgsm, p)


@pytest.mark.parametrize("random_start", [False, True])
@pytest.mark.parametrize("p", NORMS)
def test_the_margin_is_monotone_in_restarts(p: float, random_start: bool) -> None:
    net, x, spec, region = problem(p)
    run = partial(pgd, net, region, spec, steps=3, step_size=0.3, dtype=x.dtype)
    found = [
        margins(net, spec, run(restarts=r, random_start=random_start, seeds=seeds(x, 0, "test")))
        for r in range(1, 6)
    ]
    for fewer, more in pairwise(found):
        assert (more <= fewer).all()
    assert (found[-1] < found[0]).any()


@pytest.mark.parametrize("restarts", [1, 3])
@pytest.mark.parametrize("p", NORMS)
def test_early_drop_breaks_the_same_examples(p: float, restarts: int) -> None:
    net = network()
    x, y = batch(net, 200)
    spec, region = Spec.label(y, K), ThreatModel(p, EPS[p] / 2).around(x)
    run = partial(pgd, net, region, spec, restarts=restarts, seeds=seeds(x, 0, "t"), dtype=x.dtype)
    kept, dropped = (margins(net, spec, run(drop=drop)) for drop in (False, True))
    assert 0.1 < (kept <= 0).double().mean() < 0.9
    assert torch.equal(dropped <= 0, kept <= 0)
    torch.testing.assert_close(dropped[dropped > 0], kept[kept > 0])


def test_early_drop_works_less() -> None:
    net = network()
    x, y = batch(net, 50)
    rows = []

    def counted(z: Tensor) -> Tensor:
        rows.append(len(z))
        return net(z)

    region = ThreatModel(INF, 0.5).around(x)
    pgd(counted, region, Spec.label(y, K), drop=True, dtype=x.dtype)
    assert sum(rows) < 41 * 50 / 2
    rows.clear()
    pgd(counted, region, Spec.label(y, K), dtype=x.dtype)
    assert rows == [50] * 41


def test_seeds_make_random_starts_reproducible() -> None:
    net, x, spec, region = problem()
    run = partial(pgd, net, region, spec, steps=1, step_size=1e-9, random_start=True, dtype=x.dtype)
    first, again, other = (run(seeds=seeds(x, s, "test")) for s in (0, 0, 1))
    assert torch.equal(first, again)
    assert (first != other).any(1).all()


@pytest.mark.parametrize("options", [{"restarts": 2}, {"random_start": True}])
def test_random_starts_need_seeds(options: dict[str, int]) -> None:
    net, _, spec, region = problem()
    with pytest.raises(ValueError, match=r"seeds: .*one seed per example"):
        pgd(net, region, spec, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"loss": "cross_entropi"},
            "loss: unknown name 'cross_entropi'. Did you mean 'cross_entropy'",
        ),
        ({"loss": "margins"}, "Did you mean 'margin'"),
        ({"direction": "steep"}, "direction: unknown name 'steep'. Did you mean 'steepest'"),
        ({"steps": 0}, "steps: 0"),
        ({"restarts": 0}, "restarts: 0"),
        ({"step_size": 0.0}, "step_size: 0.0"),
        ({"step_size": math.nan}, "step_size: nan"),
    ],
)
def test_wrong_arguments_are_named(options: dict[str, object], message: str) -> None:
    net, x, spec, region = problem()
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        pgd(net, region, spec, dtype=x.dtype, seeds=seeds(x, 0, "t"), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("p", NORMS)
def test_affine_models_reach_the_closed_form(p: float) -> None:
    checks.check_linear_optimum(fgsm, p, 1 + 1e-5)
    # the exact maximum over ball and box for linf; l1 steps move one feature each, so they need some of them
    checks.check_linear_optimum(partial(pgd, steps=400, loss="margin"), p, 1 + 1e-5)
    raw = partial(pgd, steps=100, loss="margin", direction="gradient", step_size=0.05)
    checks.check_linear_optimum(raw, p, 1.25)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("p", NORMS)
def test_two_classes(p: float, loss: str) -> None:
    net, x, spec, region = problem(p, outputs=2)
    points = pgd(net, region, spec, loss=loss, dtype=x.dtype)
    assert spec.C.shape[1] == 1
    assert (margins(net, spec, points) < margins(net, spec, x)).all()


@pytest.mark.parametrize("loss", LOSSES)
def test_general_specifications_are_attacked(loss: str) -> None:
    """(y0 > y1 or y0 > y2) and y3 < 0.5: the attack drives the margin of this, not of a label, below zero."""
    net = network()
    x, _ = batch(net, 40)
    rows = torch.tensor([[1.0, -1, 0, 0], [1, 0, -1, 0], [0, 0, 0, -1]])
    offsets = torch.tensor([0.0, 0.0, 0.5])
    spec = Spec(rows.expand(40, 3, 4), offsets.expand(40, 3), torch.tensor([0, 0, 1]))
    region = ThreatModel(INF, 0.3).around(x)
    points = pgd(net, region, spec, loss=loss, dtype=x.dtype)
    before, after = margins(net, spec, x), margins(net, spec, points)
    assert (after <= before).all()
    assert int((after <= 0).sum()) > int((before <= 0).sum())
    with torch.no_grad():
        y = net(points)
    fails = ((y[:, 0] <= y[:, 1]) & (y[:, 0] <= y[:, 2])) | (y[:, 3] >= 0.5)
    assert torch.equal(after <= 0, fails)
    assert torch.equal(witness(net, region, spec, points).upper <= 0, fails)


def test_a_loss_of_ones_own() -> None:
    net, x, spec, region = problem()
    points = pgd(net, region, spec, loss=lambda v, s: -s.margin(v), dtype=x.dtype)
    assert torch.equal(points, pgd(net, region, spec, loss="margin", dtype=x.dtype))


def test_points_of_a_box_without_radius_take_steps_relative_to_its_width() -> None:
    net, x, spec, _ = problem()
    region = Region.box(x - torch.linspace(0, 0.2, N), x + torch.linspace(0, 0.2, N))
    points = pgd(net, region, spec, steps=1, step_size=0.5, dtype=x.dtype)
    moved = (points - region.center).abs()
    changed = moved.any(1)
    assert changed.any()
    half = (region.upper - region.lower) / 2
    torch.testing.assert_close(moved[changed], 0.5 * half[changed])


def test_a_single_example_and_a_single_feature() -> None:
    x = torch.tensor([[0.5]])
    spec = Spec.label(torch.tensor([1]), 2)
    for p in NORMS:
        region = ThreatModel(p, 0.25).around(x)
        points = pgd(lambda z: torch.cat([0.6 - z, z - 0.6 + 0.2], 1), region, spec)
        assert points.item() == pytest.approx(0.25)


# -- targeted ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", ["label", "others"])
def test_targeted_bookkeeping(objective: str) -> None:
    net = network()
    x, y = batch(net, 60)
    target = (y + 1 + torch.arange(60) % (K - 1)) % K
    region = ThreatModel(INF, 0.2).around(x)
    attack = partial(pgd, dtype=x.dtype)
    found = targeted(net, region, y, target, num_classes=K, objective=objective, attack=attack)
    with torch.no_grad():
        predicted = net(found.points).argmax(1)
    assert region.contains(found.points).all()
    assert torch.equal(found.fooled, predicted != y)
    assert torch.equal(found.hit, predicted == target)
    assert not (found.hit & ~found.fooled).any()
    assert 0 < int(found.hit.sum()) <= int(found.fooled.sum()) < 60


def test_targeted_objectives_are_those_of_the_lectures() -> None:
    """On a linear model: target minus label, and target minus the sum of all others, each at its maximiser."""
    weight = torch.randn(3, N, dtype=torch.float64)
    x, y = torch.rand(6, N, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1, 2])
    target = (y + 1) % 3
    region = ThreatModel(2, 0.3, -INF, INF).around(x)
    attack = partial(fgsm, dtype=x.dtype)
    slopes = {
        "label": weight[target] - weight[y],
        "others": 2 * weight[target] - weight.sum(0),
    }
    for objective, slope in slopes.items():
        found = targeted(
            lambda z: z @ weight.T,
            region,
            y,
            target,
            num_classes=3,
            objective=objective,
            attack=attack,
        )
        expected = x + 0.3 * slope / slope.norm(dim=1, keepdim=True)
        torch.testing.assert_close(found.points, expected)


def test_targeted_refuses_wrong_arguments() -> None:
    net, x, _, region = problem()
    y = torch.zeros(len(x), dtype=torch.long)
    with pytest.raises(ValueError, match=r"objective: unknown name 'lable'\. Did you mean 'label'"):
        targeted(net, region, y, y + 1, num_classes=K, objective="lable")
    with pytest.raises(ValueError, match=r"t: labels 9\.\.9 are outside"):
        targeted(net, region, y, y + 9, num_classes=K)
