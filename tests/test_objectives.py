"""The family of training objectives: identities between members, computations by hand, gradients by differences."""

from __future__ import annotations

import copy
import math
from functools import partial
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from calipers import Spec, ThreatModel
from calipers.bounds import crown_ibp, dual, interval
from calipers.bounds.interval import propagate
from calipers.bounds.losses import cross_entropy as margin_entropy
from calipers.graph.capture import capture
from calipers.training import latent, margins, objectives, points
from calipers.training.normalisation import fixed
from calipers.training.objectives import OBJECTIVES
from calipers.training.regions import around
from calipers.training.step import Step, combined, family, multiplied, small_box, summed

EPS = 0.08
THREAT = ThreatModel(math.inf, EPS)
SEEDS = torch.arange(6)


def build(norm: bool) -> nn.Sequential:
    torch.manual_seed(1)
    layers = [
        nn.Conv2d(1, 4, 3, 2, 1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(36, 8),
        nn.ReLU(),
        nn.Linear(8, 4),
    ]
    if norm:
        layers.insert(1, nn.BatchNorm2d(4))
        layers.insert(5, nn.BatchNorm1d(8))
    return nn.Sequential(*layers).double()


CAPTURED = {
    norm: capture(build(norm), torch.rand(2, 1, 6, 6, dtype=torch.float64))
    for norm in (False, True)
}
X = torch.rand(6, 1, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
Y = torch.tensor([0, 1, 2, 3, 1, 2])


@pytest.fixture
def plain():
    """The network without normalisation, its weights as they were."""
    return restored(False)


@pytest.fixture
def normed():
    return restored(True)


def restored(norm):
    network = CAPTURED[norm]
    network.module.load_state_dict(build(norm).state_dict())
    network.module.train()
    network.module.zero_grad()
    return network


def total(network, objective, **options):
    options.setdefault("seeds", SEEDS)
    threat = options.pop("threat", THREAT)
    return objective(network, X, Y, threat, **options).total


def value(network, objective, **options):
    return total(network, objective, **options).item()


def gradients(network, objective, **options):
    parameters = list(network.module.parameters())
    return torch.autograd.grad(
        total(network, objective, **options), parameters, materialize_grads=True, allow_unused=True
    )


KNOBS = {
    name: {"others": ((2.0, 0.5), (1.0, 1.0)), "steps": 3}
    for name in OBJECTIVES
    if name.startswith("multi")
}


# -- identities ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mtl_ibp", "cc_ibp", "exp_ibp"])
@pytest.mark.parametrize("norm", [False, True])
def test_the_ends_of_expressive_losses_are_ibp_and_pgd_bitwise(name, norm):
    network = restored(norm)
    states = copy.deepcopy(network.module.state_dict())

    def of(objective, **options):
        network.module.load_state_dict(states)
        loss = objective(network, X, Y, THREAT, seeds=SEEDS, weight=0.6, **options)
        grads = torch.autograd.grad(loss.total, list(network.module.parameters()))
        return [loss.total.detach(), *grads]

    for alpha, same in ((1.0, objectives.ibp), (0.0, objectives.pgd)):
        ours, theirs = of(OBJECTIVES[name], alpha=alpha), of(same)
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("name", ["mtl_ibp", "cc_ibp", "exp_ibp"])
def test_expressive_losses_rise_with_alpha(plain, name):
    shares = [0.0, 0.01, 0.1, 0.3, 0.6, 0.9, 0.99, 1.0]
    values = [value(plain, OBJECTIVES[name], alpha=a) for a in shares]
    assert all(a <= b + 1e-12 for a, b in pairwise(values))
    assert values[0] < values[-1]


@pytest.mark.parametrize("alpha", [0.05, 0.3, 0.5, 0.8, 0.97])
def test_cc_and_exp_are_below_mtl_example_by_example(plain, alpha):
    """Jensen for the convex cross-entropy; means."""

    def each(mix):
        step = Step(plain, X, Y, THREAT, SEEDS, point=points.pgd)
        return mix(step, alpha=alpha)

    sums = each(summed)
    assert (each(combined) <= sums + 1e-12).all()
    assert (each(multiplied) <= sums + 1e-12).all()


def test_sabr_ends_in_ibp_and_in_adversarial_training(plain):
    ibp, pgd = value(plain, objectives.ibp), value(plain, objectives.pgd, steps=8)
    assert value(plain, objectives.sabr, share=1.0) == pytest.approx(ibp, rel=1e-12)
    assert value(plain, objectives.sabr, share=0.0) == pytest.approx(pgd, rel=1e-12)
    for a, b in zip(
        gradients(plain, objectives.sabr, share=0.0),
        gradients(plain, objectives.pgd, steps=8),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_ibp_is_above_sabr_above_its_point(plain):
    values = [value(plain, objectives.sabr, share=s) for s in (1.0, 0.7, 0.4, 0.1, 0.0)]
    assert values == sorted(values, reverse=True)
    assert (
        value(plain, objectives.ibp)
        >= value(plain, objectives.pgd)
        >= value(plain, objectives.standard)
    )


def test_small_boxes_lie_in_the_region_and_hold_the_point(plain):
    """In float32, where the region's own ends are rounded."""
    network = capture(copy.deepcopy(plain.module).float(), X[:2].float())
    x = X.float()
    x[0, 0, 0] = EPS + 1e-8 * torch.arange(
        6
    )  # lower ends so small that differences with upper ones lose them
    for share in (0.0, 0.3, 0.7, 1.0):
        box = partial(small_box, share=share)
        step = Step(network, x, Y, THREAT, SEEDS, point=points.pgd, region=box)
        whole, small = THREAT.around(x), step.region
        assert whole.contains(small.lower).all()
        assert whole.contains(small.upper).all()
        assert ((small.lower <= step.point + 1e-6) & (step.point <= small.upper + 1e-6)).all()


def test_trades_without_divergence_is_standard(plain):
    assert value(plain, objectives.trades, beta=0.0) == value(plain, objectives.standard)
    assert value(plain, objectives.trades, beta=2.0) > value(plain, objectives.standard)


def test_n_fgsm_without_noise_is_fgsm(plain):
    fgsm = value(plain, objectives.pgd, steps=1, step_size=1.0, random_start=False)
    assert value(plain, objectives.n_fgsm, noise=0.0) == pytest.approx(fgsm, rel=1e-6)


def test_radius_zero_is_standard_training(plain):
    point = ThreatModel(math.inf, 0.0)
    standard = value(plain, objectives.standard)
    for name in (
        "pgd",
        "fgsm_rs",
        "n_fgsm",
        "mtl_ibp",
        "cc_ibp",
        "exp_ibp",
        "ibp",
        "crown_ibp",
        "sabr",
    ):
        assert value(plain, OBJECTIVES[name], threat=point) == pytest.approx(standard, rel=1e-9), (
            name
        )


def test_weights_mix_with_the_clean_loss(plain):
    clean, robust = value(plain, objectives.standard), value(plain, objectives.ibp)
    mixed = value(plain, objectives.ibp, weight=0.3)
    assert mixed == pytest.approx(0.7 * clean + 0.3 * robust, rel=1e-12)
    assert value(plain, objectives.ibp, weight=0.0) == pytest.approx(clean, rel=1e-12)


# -- free ----------------------------------------------------------------------------------------------------


def test_free_starts_at_the_example_and_then_takes_fgsms_step(plain):
    first = objectives.free(plain, X, Y, THREAT, seeds=SEEDS)
    assert first.total.item() == pytest.approx(value(plain, objectives.standard), rel=1e-12)
    first.total.backward()
    second = objectives.free(plain, X, Y, THREAT, seeds=SEEDS, carry=first.carry)
    fgsm = value(plain, objectives.pgd, steps=1, step_size=1.0, random_start=False)
    assert second.total.item() == pytest.approx(fgsm, rel=1e-6)
    assert THREAT.around(X).contains(second.carry.detach()).all()


def test_free_needs_the_last_replays_gradient(plain):
    carry = objectives.free(plain, X, Y, THREAT, seeds=SEEDS).carry
    with pytest.raises(ValueError, match="backward"):
        objectives.free(plain, X, Y, THREAT, seeds=SEEDS, carry=carry)


# -- by hand -------------------------------------------------------------------------------------------------


def adversarial_by_hand(module, x, y, eps, steps, size):
    """Example by example, from the example itself, without a line of the package."""
    found = []
    for i in range(len(x)):
        point = x[i : i + 1].clone()
        for _ in range(steps):
            point.requires_grad_()
            (g,) = torch.autograd.grad(F.cross_entropy(module(point), y[i : i + 1]), point)
            point = point.detach() + size * g.sign()
            point = torch.min(torch.max(point, x[i : i + 1] - eps), x[i : i + 1] + eps).clamp(0, 1)
        found.append(point)
    return torch.cat(found)


def test_the_batch_update_is_the_loop_over_examples(plain):
    module = plain.module
    point = adversarial_by_hand(module, X, Y, EPS, 3, EPS / 4)
    losses = [F.cross_entropy(module(point[i : i + 1]), Y[i : i + 1]) for i in range(len(X))]
    expected = torch.autograd.grad(sum(losses) / len(X), list(module.parameters()))
    ours = gradients(plain, objectives.pgd, steps=3, step_size=0.25, random_start=False)
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


def test_mart_by_hand(plain):
    module = plain.module
    point = adversarial_by_hand(module, X, Y, EPS, 2, EPS / 4)
    clean, attacked = module(X).softmax(1), module(point).softmax(1)
    expected = 0.0
    for i, label in enumerate(Y.tolist()):
        p, q = clean[i], attacked[i]
        rival = max(q[j] for j in range(4) if j != label)
        kl = sum(p[j] * torch.log(p[j] / q[j]) for j in range(4))
        expected += -torch.log(q[label]) - torch.log(1.0001 - rival) + 5 * kl * (1 - p[label])
    ours = value(plain, objectives.mart, steps=2, random_start=False)
    assert ours == pytest.approx(expected.item() / len(X), rel=1e-6)


def test_trades_by_hand(plain):
    step = Step(plain, X, Y, THREAT, SEEDS, point=points.trades)
    clean, attacked = plain.module(X).softmax(1), plain.module(step.point).softmax(1)
    kl = (clean * (clean.log() - attacked.log())).sum(1).mean()
    expected = F.cross_entropy(plain.module(X), Y) + 6 * kl
    assert value(plain, objectives.trades) == pytest.approx(expected.item(), rel=1e-9)


def test_trades_is_finite_where_probabilities_underflow(plain):
    with torch.no_grad():
        plain.module[-1].weight.mul_(1e6)
    assert all(torch.isfinite(g).all() for g in gradients(plain, objectives.trades))


def test_ibp_by_hand(plain):
    """Ends of boxes through each layer, the last one merged with the differences of logits."""
    conv, linear, last = (plain.module[i] for i in (0, 3, 5))
    low, high = (X - EPS).clamp_min(0), (X + EPS).clamp_max(1)

    center, half = (low + high) / 2, (high - low) / 2
    middle = F.conv2d(center, conv.weight, conv.bias, 2, 1)
    size = F.conv2d(half, conv.weight.abs(), None, 2, 1)
    low, high = (middle - size).relu().flatten(1), (middle + size).relu().flatten(1)
    center, half = (low + high) / 2, (high - low) / 2
    middle, size = F.linear(center, linear.weight, linear.bias), F.linear(half, linear.weight.abs())
    low, high = (middle - size).relu(), (middle + size).relu()
    center, half = (low + high) / 2, (high - low) / 2
    losses = []
    for i, label in enumerate(Y.tolist()):
        w = last.weight[label] - last.weight
        b = last.bias[label] - last.bias
        margin = w @ center[i] + b - w.abs() @ half[i]  # 0 for the label itself
        losses.append(torch.logsumexp(-margin, 0))
    expected = sum(losses) / len(losses)
    assert value(plain, objectives.ibp) == pytest.approx(expected.item(), rel=1e-6)
    grads = torch.autograd.grad(expected, list(plain.module.parameters()))
    for a, b in zip(gradients(plain, objectives.ibp), grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_merged_margins_are_never_below_differences_of_ends(plain):
    region = around(THREAT, X)
    spec = Spec.label(Y, 4)
    found = margins.interval(fixed(plain), region, spec)
    state = margins.begin(fixed(plain), region)
    propagate(state)
    low, high = state.boxes[plain.graph.output]
    ends = (
        spec.C.clamp_min(0).double() @ low.unsqueeze(2)
        + spec.C.clamp_max(0).double() @ high.unsqueeze(2)
    ).squeeze(2)
    assert (found.margins >= ends - 1e-12).all()
    assert (found.margins > ends + 1e-6).any()


# -- the same bounds as the verifier's -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [(margins.interval, interval), (margins.crown_ibp, crown_ibp), (margins.dual, dual)],
)
@pytest.mark.parametrize("norm", [False, True])
def test_training_margins_are_the_verifiers(ours, theirs, norm):
    network = restored(norm)
    network.module.eval()
    spec = Spec.label(Y, 4)
    found = ours(fixed(network), around(THREAT, X), spec).margins
    torch.testing.assert_close(found, theirs(network, THREAT.around(X), spec), rtol=1e-6, atol=1e-8)


def test_the_dual_is_crown_with_parallel_lines(plain):
    """With one hidden layer, whose intervals are exact, the bound is Wong and Kolter's formula with the slope of the
    chord on both sides."""
    torch.manual_seed(0)
    first, second = nn.Linear(5, 7), nn.Linear(7, 3)
    module = nn.Sequential(first, nn.ReLU(), second).double()
    x, y = torch.rand(4, 5, dtype=torch.float64), torch.tensor([0, 1, 2, 0])
    network, spec = capture(module, x), Spec.label(y, 3)
    module.train()
    found = margins.dual(fixed(network), around(THREAT, x), spec).margins
    low, high = (x - EPS).clamp(0, 1), (x + EPS).clamp(0, 1)
    center, half = (low + high) / 2, (high - low) / 2
    middle, size = first(center), F.linear(half, first.weight.abs())
    l, u = middle - size, middle + size
    slope = torch.where(u <= 0, 0.0, torch.where(l >= 0, 1.0, u / (u - l)))
    for m in range(2):
        nu_hat = torch.einsum("bk,kn->bn", spec.C[:, m].double(), second.weight)
        nu = slope * nu_hat
        row = nu @ first.weight
        value = spec.C[:, m].double() @ second.bias + nu @ first.bias
        value += (row * center).sum(1) - (row.abs() * half).sum(1)
        value += (torch.where((l < 0) & (u > 0), l, 0.0) * slope * (-nu_hat).relu()).sum(1)
        weak = margins.interval(fixed(network), around(THREAT, x), spec).margins[:, m]
        torch.testing.assert_close(found[:, m], torch.maximum(value, weak), rtol=1e-6, atol=1e-8)


def test_crown_ibp_fades_into_ibp(plain):
    ibp = value(plain, objectives.ibp)
    values = [value(plain, objectives.crown_ibp, beta=b) for b in (0.0, 0.5, 1.0)]
    assert values[0] == ibp
    assert values[0] > values[1] > values[2]
    spec, view = Spec.label(Y, 4), fixed(plain)
    weak, half, strong = (
        margins.crown_ibp(view, around(THREAT, X), spec, beta=b).margins for b in (0.0, 0.5, 1.0)
    )
    torch.testing.assert_close(half, (weak + strong) / 2)


# -- latent attacks ------------------------------------------------------------------------------------------


def test_latent_margins_are_between_interval_margins_and_the_boxs_centre(plain):
    step = Step(plain, X, Y, THREAT, SEEDS)
    name = latent.cut(plain.graph, 1)
    found = step.latent(1, steps=10, step_size=0.2)
    assert (found >= step.certified.margins - 1e-12).all()
    box = step.certified.boxes[name]
    middle = latent.behind(plain.graph, step.view.bound(), name)((box.lower + box.upper) / 2)
    assert (found <= step.spec.values(middle) + 1e-9).all()


def test_latent_attack_on_a_linear_part_is_exact(plain):
    """Behind the last activation the network is affine, its minimum on a box a corner's."""
    step = Step(plain, X, Y, THREAT, SEEDS)
    found = step.latent(0, steps=20, step_size=0.5)
    torch.testing.assert_close(found, step.certified.margins)


def test_taps_is_a_product_whose_first_factor_has_a_larger_gradient(plain):
    step = Step(plain, X, Y, THREAT, SEEDS)
    inner = margin_entropy(step.latent(1, steps=10, step_size=0.2))
    expected = (inner * step.certified_loss).mean()
    assert value(plain, objectives.taps) == pytest.approx(expected.item(), rel=1e-12)
    parameters = list(plain.module.parameters())
    product = (
        5 * inner * step.certified_loss.detach() + inner.detach() * step.certified_loss
    ).mean()
    grads = torch.autograd.grad(product, parameters)
    for a, b in zip(gradients(plain, objectives.taps, boost=5.0), grads, strict=True):
        torch.testing.assert_close(a, b)


def test_taps_is_ibp_while_the_radius_rises(plain):
    assert value(plain, objectives.taps, eps_max=0.2) == value(plain, objectives.ibp)
    assert value(plain, objectives.taps, eps_max=EPS) != value(plain, objectives.ibp)


def test_the_connector_moves_the_near_end(plain):
    low, high = (torch.tensor([[0.0, 0.0, 0.0, 0.0, 0.3]]).requires_grad_() for _ in range(2))
    with torch.no_grad():
        high += torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0])
    point = torch.tensor([[0.0, 0.25, 0.5, 1.0, 0.3]])
    out = latent.connect(point, margins.Interval(low, high))
    assert torch.equal(out, point)
    out.sum().backward()
    assert low.grad.tolist() == [[1.0, 0.5, 0.0, 0.0, 0.5]]
    assert high.grad.tolist() == [[0.0, 0.0, 0.0, 1.0, 0.5]]


def test_a_cut_that_does_not_separate_is_refused(plain):
    with pytest.raises(ValueError, match="split: 2 of 2"):
        objectives.taps(plain, X, Y, THREAT, seeds=SEEDS, split=2)


# -- gradients -----------------------------------------------------------------------------------------------


def test_danskins_gradient_is_the_derivative_of_the_worst_loss():
    """On a linear model the inner maximum is known: the gradient at the maximiser is the maximum's own."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Flatten(), nn.Linear(36, 2)).double()
    network = capture(module, X[:2])
    y = Y % 2
    objective = partial(objectives.pgd, steps=1, step_size=2.0, random_start=False)
    free = ThreatModel(math.inf, EPS, -1.0, 2.0)
    (ours,) = torch.autograd.grad(
        objective(network, X, y, free, seeds=SEEDS).total, [module[1].weight]
    )

    def worst(weight):
        w = weight[1] - weight[0]
        sign = 1 - 2 * y
        gain = X.flatten(1) @ w + module[1].bias[1] - module[1].bias[0]
        return F.softplus(sign * gain + EPS * w.abs().sum()).mean()

    weight = module[1].weight.detach()
    for i, j in ((0, 3), (1, 17), (0, 35), (1, 0)):
        step = torch.zeros_like(weight)
        step[i, j] = 1e-5
        slope = (worst(weight + step) - worst(weight - step)) / 2e-5
        assert ours[i, j].item() == pytest.approx(slope.item(), abs=1e-6)


@pytest.mark.parametrize("name", ["ibp", "crown_ibp", "standard"])
@pytest.mark.parametrize("norm", [False, True])
def test_gradients_by_differences(name, norm):
    network = restored(norm)
    options = {"regularise": 0.5, "eps_max": 0.3, "weight": 0.7} if name != "standard" else {}
    threat = ThreatModel(math.inf, 0.01)
    ours = gradients(network, OBJECTIVES[name], threat=threat, **options)
    generator = torch.Generator().manual_seed(0)
    parameters = list(network.module.parameters())
    for _ in range(2):
        direction = [torch.randn(p.shape, dtype=p.dtype, generator=generator) for p in parameters]
        ends = []
        for sign in (1, -1):
            with torch.no_grad():
                for p, d in zip(parameters, direction, strict=True):
                    p.add_(d, alpha=sign * 1e-6)
            ends.append(value(network, OBJECTIVES[name], threat=threat, **options))
            with torch.no_grad():
                for p, d in zip(parameters, direction, strict=True):
                    p.sub_(d, alpha=sign * 1e-6)
        slope = (ends[0] - ends[1]) / 2e-6
        along = sum((g * d).sum() for g, d in zip(ours, direction, strict=True)).item()
        assert along == pytest.approx(slope, rel=1e-5, abs=1e-6)


# -- what every objective leaves alone -----------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in OBJECTIVES if n != "dual"])
@pytest.mark.parametrize("norm", [False, True])
def test_an_objective_changes_nothing_but_running_statistics_once(name, norm):
    network = restored(norm)
    module, before = network.module, copy.deepcopy(network.module.state_dict())
    random = torch.get_rng_state()
    loss = OBJECTIVES[name](network, X, Y, THREAT, seeds=SEEDS, **KNOBS.get(name, {}))
    assert torch.equal(torch.get_rng_state(), random)
    assert all(p.grad is None for p in module.parameters())  # the attack leaves no gradients behind
    assert all(m.training for m in module.modules())
    for key, old in before.items():
        new = module.state_dict()[key]
        if "num_batches" in key:
            assert int(new - old) == 1
        elif "running" not in key:
            assert torch.equal(new, old), key
    assert torch.isfinite(loss.total)
    assert not any(m.requires_grad for m in loss.measures.values())
    loss.total.backward()
    used = [p.grad is not None and bool(p.grad.abs().sum() > 0) for p in module.parameters()]
    assert sum(used) >= len(used) - 2  # a bias before normalisation has none


def test_draws_depend_on_seeds_alone(plain):
    """Not on the batch, nor on the order in it."""
    order = torch.tensor([3, 0, 5])
    for name in ("fgsm_rs", "pgd", "n_fgsm", "trades", "smoothing"):
        alone = OBJECTIVES[name](plain, X[order], Y[order], THREAT, seeds=SEEDS[order]).total
        each = [
            OBJECTIVES[name](
                plain, X[i : i + 1], Y[i : i + 1], THREAT, seeds=SEEDS[i : i + 1]
            ).total
            for i in order.tolist()
        ]
        assert alone.item() == pytest.approx(sum(e.item() for e in each) / 3, rel=1e-9)


def test_random_starts_are_random(plain):
    """A fixed start would be the same for all seeds."""
    a = points.pgd(plain.module, THREAT, X, Y, SEEDS, steps=1, step_size=0.1)
    b = points.pgd(plain.module, THREAT, X, Y, SEEDS + 100, steps=1, step_size=0.1)
    assert (a - b).abs().max() > EPS / 4


@pytest.mark.parametrize("p", [math.inf, 2.0, 1.0])
def test_points_are_strictly_in_the_region(plain, p):
    threat = ThreatModel(p, {math.inf: 0.1, 2.0: 0.7, 1.0: 2.0}[p])
    region = threat.around(X.float())
    model = copy.deepcopy(plain.module).float()
    for find in (
        points.pgd,
        partial(points.pgd, steps=1, step_size=1.25),
        partial(points.pgd, steps=3, restarts=3, random_start=False),
        points.trades,
    ):
        assert region.contains(find(model, threat, X.float(), Y, SEEDS)).all()


@pytest.mark.parametrize(("low", "high"), [(0.35, 0.6), ("0.35", "0.6")])
def test_points_at_the_domains_edge_stay_inside(plain, low, high):
    # these bounds' float32 neighbours lie outside
    threat = ThreatModel(math.inf, "0.3", low, high)
    x = torch.rand(6, 1, 6, 6) * 0.2 + 0.37
    x[0] = torch.tensor(0.6).nextafter(torch.tensor(0.0))
    x[1] = torch.tensor(0.35).nextafter(torch.tensor(1.0))
    found = points.pgd(copy.deepcopy(plain.module).float(), threat, x, Y, SEEDS)
    assert threat.around(x).contains(found).all()


def test_several_norms(plain):
    others = ((2.0, 0.5), (1.0, 1.5))
    models = points.norms(THREAT, others)
    knobs = {"others": others, "steps": 5}
    apart = points.every(plain.module, THREAT, X, Y, SEEDS, **knobs)
    for threat, point in zip(models, apart, strict=True):
        assert threat.around(X).contains(point).all()
    losses = torch.stack([F.cross_entropy(plain.module(p), Y, reduction="none") for p in apart])
    assert value(plain, objectives.multi_norm_max, **knobs) == pytest.approx(
        losses.amax(0).mean().item()
    )
    assert value(plain, objectives.multi_norm_avg, **knobs) == pytest.approx(losses.mean().item())
    steep = points.steepest_of_several(plain.module, THREAT, X, Y, SEEDS, **knobs)
    inside = torch.stack([t.around(X).contains(steep) for t in models])
    assert inside.any(0).all()


def test_the_worst_of_several_starts_is_at_least_as_bad(plain):
    one = points.pgd(plain.module, THREAT, X, Y, SEEDS, steps=2)
    four = points.pgd(plain.module, THREAT, X, Y, SEEDS, steps=2, restarts=4)
    loss = [F.cross_entropy(plain.module(p), Y, reduction="none") for p in (one, four)]
    assert (loss[1] >= loss[0] - 1e-12).all()


def test_a_larger_search_radius_serves_the_attack_alone(plain):
    wide = points.pgd(plain.module, THREAT, X, Y, SEEDS, scale=2.0)
    assert ThreatModel(math.inf, 2 * EPS).around(X).contains(wide).all()
    assert not THREAT.around(X).contains(wide).any()
    assert value(plain, objectives.mtl_ibp, alpha=1.0, scale=2.0) == value(plain, objectives.ibp)


# -- measures, and bad input ---------------------------------------------------------------------------------


def test_measures_are_ordered(plain):
    measures = objectives.mtl_ibp(plain, X, Y, THREAT, seeds=SEEDS, weight=0.5).measures
    assert measures["certified"] <= measures["attacked"] <= measures["clean"]
    assert measures["certified_loss"] >= measures["attacked_loss"]


def test_small_boxes_certify_nothing(plain):
    for name in ("sabr", "staps"):
        assert "certified" not in OBJECTIVES[name](plain, X, Y, THREAT, seeds=SEEDS).measures


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight": 1.5}, "weight: 1.5"),
        ({"policy": "clean"}, "policy: unknown name 'clean'"),
        ({"policy": "adversarial_batch"}, "needs an objective with an attack"),
        ({"regularise": 0.5}, "eps_max: None"),
        ({"precision": "int8"}, "precision: 'int8'"),
    ],
)
def test_bad_options_are_named(plain, options, message):
    with pytest.raises(ValueError, match=message):
        objectives.ibp(plain, X, Y, THREAT, seeds=SEEDS, **options)


def test_unknown_options_are_refused(plain):
    for name, f in OBJECTIVES.items():
        with pytest.raises(TypeError, match="stesp"):
            f(plain, X, Y, THREAT, seeds=SEEDS, stesp=3, **KNOBS.get(name, {}))


def test_labels_outside_the_classes_are_refused(plain):
    with pytest.raises(ValueError, match=r"labels 0\.\.4 are outside"):
        objectives.ibp(plain, X, torch.tensor([0, 1, 2, 3, 4, 0]), THREAT, seeds=SEEDS)


def test_small_boxes_need_linf(plain):
    with pytest.raises(ValueError, match="small boxes need p = inf"):
        objectives.sabr(plain, X, Y, ThreatModel(2.0, 0.1), seeds=SEEDS)


def test_attacks_under_autocast(plain):
    module = copy.deepcopy(plain.module).float()
    network = capture(module, X[:2].float())
    module.train()
    loss = objectives.pgd(network, X.float(), Y, THREAT, seeds=SEEDS, precision="bfloat16")
    full = objectives.pgd(network, X.float(), Y, THREAT, seeds=SEEDS)
    assert loss.total.dtype == torch.float32
    assert loss.total.item() == pytest.approx(full.total.item(), rel=0.02)


def test_the_family_takes_a_mix_of_ones_own(plain):
    loss = family(
        plain, X, Y, THREAT, seeds=SEEDS, mix=lambda step: -step.certified.margins.amin(1)
    )
    worst = interval(plain, THREAT.around(X), Spec.label(Y, 4)).amin(1)
    assert loss.total.item() == pytest.approx(-worst.mean().item(), rel=1e-6)
