"""The lectures' experiments, on a small network trained here by attacks."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from calipers import Spec, ThreatModel, data
from calipers.attacks.surface import surface
from calipers.graph.capture import capture
from calipers.training import objectives
from calipers.training.experiments import cross_norm, exact_step, interval_reach

EPS = 0.1
LINF = ThreatModel(math.inf, EPS)


def trained(objective, steps=250):
    """A 64-64-64-10 network on the digits."""
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)
    )
    digits = data.load("digits", split="train")
    network = capture(module, digits.x[:2])
    optimiser = torch.optim.Adam(module.parameters(), lr=4e-3)
    generator = torch.Generator().manual_seed(0)
    module.train()
    for step in range(steps):
        rows = torch.randint(len(digits), (64,), generator=generator)
        threat = ThreatModel(math.inf, EPS * min(1.0, 2 * step / steps))
        loss = objective(network, digits.x[rows], digits.y[rows], threat, seeds=rows + step)
        optimiser.zero_grad()
        loss.total.backward()
        optimiser.step()
    module.eval()
    return network


@pytest.fixture(scope="module")
def networks():
    def attacked(*args, **options):
        return objectives.pgd(*args, steps=4, step_size=0.5, **options)

    return {
        "standard": trained(objectives.standard),
        "pgd": trained(attacked),
        "ibp": trained(objectives.ibp, steps=400),
    }


@pytest.fixture(scope="module")
def test_set():
    digits = data.load("digits")
    return digits.x[:200], digits.y[:200]


def test_adversarial_training_defends_its_own_norm(networks, test_set):
    x, y = test_set
    threats = {"linf": LINF, "l2": ThreatModel(2.0, 1.6), "none": ThreatModel(math.inf, 0.0)}
    shares = {
        name: cross_norm(networks[name], x, y, threats, num_classes=10, seeds=torch.arange(len(y)))
        for name in ("standard", "pgd")
    }
    assert shares["pgd"]["linf"] > shares["standard"]["linf"] + 0.1
    assert shares["pgd"]["none"] > 0.9
    assert (
        shares["pgd"]["l2"] < shares["pgd"]["linf"] - 0.2
    )  # an l2 ball of another size is another matter
    for of in shares.values():
        assert of["none"] >= of["linf"]


def around(network, x, y, i, size):
    return surface(network, x[i : i + 1], Spec.label(y[i : i + 1], 10), EPS, size=size)


def test_robust_losses_are_flat(networks, test_set):
    x, y = test_set
    rises = {
        name: torch.tensor([around(network, x, y, i, size=11).rise for i in range(30)]).median()
        for name, network in networks.items()
    }
    assert rises["pgd"] < rises["standard"] / 2


def test_the_surface_has_the_example_in_its_middle(networks, test_set):
    x, y = test_set
    found = around(networks["standard"], x, y, 0, size=5)
    loss = nn.functional.cross_entropy(networks["standard"](x[:1]), y[:1])
    assert found.loss[2, 2].item() == pytest.approx(loss.item(), rel=1e-5)
    assert found.loss[4, 2] >= found.loss[2, 2]  # along the gradient
    assert found.steps.tolist() == pytest.approx([-EPS, -EPS / 2, 0.0, EPS / 2, EPS])
    with pytest.raises(ValueError, match="size: 4 is even"):
        around(networks["standard"], x, y, 0, size=4)


def test_interval_bounds_of_an_attack_trained_network_are_vacuous(networks, test_set):
    """What PGD leaves standing, intervals cannot certify; trained for it, they can."""
    x, y = test_set
    radii = [0.001, 0.02, EPS]
    shares = {name: interval_reach(networks[name], x, y, LINF, radii) for name in ("pgd", "ibp")}
    seeds = torch.arange(len(y))
    empirical = {
        name: cross_norm(networks[name], x, y, {"linf": LINF}, num_classes=10, seeds=seeds)["linf"]
        for name in ("pgd", "ibp")
    }
    assert empirical["pgd"] > 0.5
    assert shares["pgd"][EPS] == 0.0
    assert shares["pgd"][0.001] > 0.5
    assert 0.3 < shares["ibp"][EPS] <= empirical["ibp"]
    for of in shares.values():
        values = [of[r] for r in radii]
        assert values == sorted(values, reverse=True)


def test_a_step_on_the_exact_inner_maximum():
    """Two moons' worth of points in the plane: never a lower loss than an attack's, and slower."""
    torch.manual_seed(0)
    angle = torch.rand(12) * math.pi
    side = torch.arange(12) % 2
    x = (
        torch.stack([angle.cos() + side * 1.0, angle.sin() * (1 - 2 * side) + side * 0.3], 1) / 4
        + 0.4
    )
    module = nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, 2))
    network = capture(module, x[:2])
    optimiser = torch.optim.SGD(module.parameters(), lr=0.5)
    before = module[0].weight.clone()
    step = exact_step(
        network, x, side, ThreatModel(math.inf, 0.1, -1.0, 2.0), optimiser, seeds=torch.arange(12)
    )
    assert step.exact_loss >= step.attacked_loss - 1e-6
    assert step.exact_seconds > step.attacked_seconds
    assert not torch.equal(module[0].weight, before)


def test_the_exact_step_needs_two_classes(networks, test_set):
    x, y = test_set
    optimiser = torch.optim.SGD(networks["pgd"].module.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="10 classes"):
        exact_step(networks["pgd"], x[:1], y[:1], LINF, optimiser, seeds=torch.arange(1))
