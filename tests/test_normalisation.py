"""Batch normalisation while training: whose statistics, who updates them, and that folding changes nothing."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from calipers import Spec, ThreatModel
from calipers.bounds import interval
from calipers.graph.capture import capture
from calipers.training import objectives
from calipers.training.normalisation import fixed, normalised, observed, update_running
from calipers.training.objectives import OBJECTIVES
from calipers.training.points import pgd
from calipers.training.step import Step

THREAT = ThreatModel(math.inf, 0.05)
X = torch.rand(6, 2, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
Y = torch.tensor([0, 1, 2, 0, 1, 2])
SEEDS = torch.arange(6)


class Residual(nn.Module):
    """Normalisation behind a convolution, before one, behind a sum, without parameters, by plain averages."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(3)
        self.before = nn.BatchNorm2d(3, affine=False)
        self.inner = nn.Conv2d(3, 3, 3, padding=1)
        self.after = nn.BatchNorm2d(3, momentum=None)
        self.linear = nn.Linear(75, 6)
        self.flat = nn.BatchNorm1d(6, eps=0.01, momentum=0.3)
        self.drop = nn.Dropout(0.5)
        self.last = nn.Linear(6, 3)

    def forward(self, x):
        h = torch.relu(self.norm(self.conv(x)))
        h = torch.relu(self.after(h + self.inner(self.before(h))))
        return self.last(self.drop(torch.relu(self.flat(self.linear(h.flatten(1))))))


def build():
    torch.manual_seed(2)
    module = Residual().double()
    for _ in range(3):  # statistics worth the name
        module(torch.rand(8, 2, 5, 5, dtype=torch.float64) * 1.5)
    return module.train()


CAPTURED = capture(build(), X)


@pytest.fixture
def network():
    CAPTURED.module.load_state_dict(build().state_dict())
    CAPTURED.module.train()
    CAPTURED.module.drop.eval()
    CAPTURED.module.zero_grad()
    return CAPTURED


def buffers(module):
    return {k: v.clone() for k, v in module.named_buffers()}


def assert_same(a, b):
    assert a.keys() == b.keys()
    for key in a:
        torch.testing.assert_close(a[key], b[key], msg=key, rtol=1e-10, atol=1e-12)


def test_an_observed_pass_is_the_modules_own(network):
    twin = copy.deepcopy(network.module)
    expected, before = twin(X), buffers(network.module)
    seen = observed(network, X)
    torch.testing.assert_close(seen.logits, expected, rtol=1e-10, atol=1e-12)
    assert_same(buffers(network.module), before)
    update_running(network, seen)
    assert_same(buffers(network.module), buffers(twin))
    twin(X)
    update_running(network, observed(network, X))  # plain averages need the count
    assert_same(buffers(network.module), buffers(twin))


def test_a_fixed_network_with_running_statistics_is_the_module_evaluating(network):
    view, module = fixed(network), network.module
    names = [n.op.__name__ for n in view.network.graph.nodes]
    assert names.count("batch_norm") == 2  # what cannot be folded stays
    evaluated = copy.deepcopy(module).eval()(X)
    torch.testing.assert_close(view(X), evaluated)
    torch.testing.assert_close(view.frozen()(X), evaluated)
    assert module.training


def test_a_fixed_network_with_a_batchs_statistics_repeats_its_pass(network):
    seen = observed(network, X)
    torch.testing.assert_close(fixed(network, seen.statistics)(X), seen.logits)
    one = fixed(network, seen.statistics)(X[:1])  # and does not depend on the rest of a batch
    torch.testing.assert_close(one, seen.logits[:1])


def test_gradients_flow_through_statistics(network):
    """By differences; and without the statistics' own part they would be wrong."""
    parameter = network.module.conv.weight
    direction = torch.randn(parameter.shape, dtype=torch.float64)

    def loss():
        step = Step(network, X, Y, THREAT, SEEDS)
        return step.certified.margins.square().sum()

    (ours,) = torch.autograd.grad(loss(), [parameter])
    ends = []
    for sign in (1, -1):
        with torch.no_grad():
            parameter.add_(direction, alpha=sign * 1e-6)
        ends.append(loss().item())
        with torch.no_grad():
            parameter.sub_(direction, alpha=sign * 1e-6)
    slope = (ends[0] - ends[1]) / 2e-6
    assert (ours * direction).sum().item() == pytest.approx(slope, rel=1e-5)

    statistics = {k: v.detach() for k, v in observed(network, X).statistics.items()}
    found = interval_margins(fixed(network, statistics)).square().sum()
    (without,) = torch.autograd.grad(found, [parameter])
    assert (without * direction).sum().item() != pytest.approx(slope, rel=1e-2)


def interval_margins(view):
    from calipers.training.margins import interval as of_view
    from calipers.training.regions import around

    return of_view(view, around(THREAT, X), Spec.label(Y, 3)).margins


def test_bounds_take_the_same_statistics_unfolded(network):
    """`calipers.bounds` with statistics= on the network as captured gives what the folded one gives."""
    seen = observed(network, X)
    unfolded = interval(network, THREAT.around(X), Spec.label(Y, 3), statistics=seen.statistics)
    torch.testing.assert_close(
        interval_margins(fixed(network, seen.statistics)), unfolded, rtol=1e-6, atol=1e-8
    )


@pytest.mark.parametrize("name", ["pgd", "mtl_ibp", "sabr", "trades"])
@pytest.mark.parametrize("policy", ["clean_batch", "running", "adversarial_batch"])
def test_running_statistics_move_once_and_by_one_batch(network, name, policy):
    module, before = network.module, buffers(network.module)
    step = {}
    original = objectives.points.pgd if name != "trades" else objectives.points.trades

    def spy(*args, **options):
        step["point"] = original(*args, **options)
        assert_same(buffers(module), step.setdefault("during", buffers(module)))
        return step["point"]

    spied = "pgd" if name != "trades" else "trades"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(objectives.points, spied, spy)
        OBJECTIVES[name](network, X, Y, THREAT, seeds=SEEDS, policy=policy)
    twin = copy.deepcopy(module)
    twin.load_state_dict({**module.state_dict(), **before})
    twin(step["point"] if policy == "adversarial_batch" else X)
    assert_same(buffers(module), buffers(twin))


def test_whose_statistics_each_pass_sees(network):
    """By replacing the network's normalisation by hand."""
    module = network.module
    clean, running = observed(network, X), fixed(network)
    logits = {"clean": fixed(network, clean.statistics), "running": running}

    step = Step(network, X, Y, THREAT, SEEDS, policy="clean_batch", point=pgd)
    expected = pgd(logits["clean"].frozen(), THREAT, X, Y, SEEDS)
    torch.testing.assert_close(step.point, expected)
    torch.testing.assert_close(step.attacked, logits["clean"](expected))
    torch.testing.assert_close(step.clean, clean.logits)

    module.load_state_dict(build().state_dict())
    step = Step(network, X, Y, THREAT, SEEDS, policy="running", point=pgd)
    expected = pgd(running.frozen(), THREAT, X, Y, SEEDS)
    torch.testing.assert_close(step.point, expected)
    torch.testing.assert_close(step.attacked, running(expected))
    torch.testing.assert_close(step.clean, clean.logits)

    module.load_state_dict(build().state_dict())
    step = Step(network, X, Y, THREAT, SEEDS, policy="adversarial_batch", point=pgd)
    torch.testing.assert_close(step.point, expected)
    seen = observed(network, expected)
    torch.testing.assert_close(step.attacked, seen.logits)
    torch.testing.assert_close(step.clean, fixed(network, seen.statistics)(X))


def test_a_layer_that_is_not_training_keeps_its_statistics(network):
    network.module.norm.eval()
    before = buffers(network.module)
    assert normalised(network)
    OBJECTIVES["ibp"](network, X, Y, THREAT, seeds=SEEDS)
    after = buffers(network.module)
    assert_same({k: v for k, v in after.items() if k.startswith("norm.")},
                {k: v for k, v in before.items() if k.startswith("norm.")})  # fmt: skip
    assert not torch.equal(after["flat.running_mean"], before["flat.running_mean"])
    network.module.eval()
    assert not normalised(network)


def test_dropout_is_off_for_attacks_and_bounds_alone(network):
    network.module.drop.train()
    twice = [Step(network, X, Y, THREAT, SEEDS, policy="running", point=pgd) for _ in range(2)]
    network.module.load_state_dict(build().state_dict())
    views = [fixed(network), fixed(network)]
    assert torch.equal(views[0].frozen()(X), views[1].frozen()(X))
    assert torch.equal(interval_margins(views[0]), interval_margins(views[1]))
    assert not torch.equal(twice[0].clean, twice[1].clean)
    assert not torch.equal(views[0](X), views[1](X))
    assert network.module.drop.training
