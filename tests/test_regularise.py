"""Initial weights and the regulariser of interval training, against their definitions."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from calipers import ThreatModel
from calipers.graph.capture import capture
from calipers.sets import Interval
from calipers.spec import Spec
from calipers.training import margins, objectives
from calipers.training.initialise import ibp_initialise
from calipers.training.networks import cnn5, cnn7, gowal_medium, gowal_small, stretch, wong_small
from calipers.training.normalisation import fixed
from calipers.training.regions import around
from calipers.training.regularise import shi


def by_hand(first, layers, tolerance):
    """Neuron by neuron, in Python's own numbers."""
    total = 0.0
    for low, high in layers:
        pairs = list(zip(low.flatten().tolist(), high.flatten().tolist(), strict=True))
        centers = [(l + u) / 2 for l, u in pairs]
        mean = sum(centers) / len(centers)
        half = sum((u - l) / 2 for l, u in pairs) / len(pairs)
        total += max(0.0, tolerance - first / half)
        on = [c for c, (l, _) in zip(centers, pairs, strict=True) if l > 0]
        off = [c for c, (_, u) in zip(centers, pairs, strict=True) if u < 0]
        sums = [(sum(on), -sum(off))]
        sums.append((sum((c - mean) ** 2 for c in on), sum((c - mean) ** 2 for c in off)))
        for a, b in sums:
            if a > 0 and b > 0:
                total += max(0.0, tolerance - min(a / b, b / a))
    return total / (tolerance * len(layers))


def some_boxes(shift):
    center = torch.randn(3, 7, dtype=torch.float64) + shift
    half = 0.6 * torch.rand(3, 7, dtype=torch.float64)
    return Interval(center - half, center + half)


@pytest.mark.parametrize("tolerance", [0.5, 0.9])
def test_the_regulariser_is_its_formula(tolerance):
    source = Interval(
        torch.zeros(3, 5, dtype=torch.float64), torch.full((3, 5), 0.2, dtype=torch.float64)
    )
    boxes = {"a": some_boxes(0.0), "b": some_boxes(1.0), "c": some_boxes(-0.5)}
    ours = shi(source, boxes, ("a", "b", "c"), tolerance=tolerance)
    assert ours.item() == pytest.approx(by_hand(0.1, list(boxes.values()), tolerance), rel=1e-12)
    assert ours > 0


def test_its_gradient_by_differences():
    source = Interval(torch.zeros(3, 5).double(), torch.full((3, 5), 0.2).double())
    ends = [end.requires_grad_() for end in (*some_boxes(0.0), *some_boxes(0.4))]

    def f(*ends):
        boxes = {"a": Interval(*ends[:2]), "b": Interval(*ends[2:])}
        return shi(source, boxes, ("a", "b"), tolerance=0.9)

    assert torch.autograd.gradcheck(f, ends, eps=1e-7, atol=1e-5)


@pytest.mark.parametrize("shift", [-50.0, 50.0])
def test_layers_without_neurons_of_both_kinds_count_by_width_alone(shift):
    box = Interval(*(end.requires_grad_() for end in some_boxes(shift)))
    source = Interval(torch.zeros(3, 5).double(), torch.full((3, 5), 0.02).double())
    value = shi(source, {"a": box}, ("a",))
    half = (box.upper - box.lower).mean().item() / 2
    assert value.item() == pytest.approx((0.5 - 0.01 / half) / 0.5)
    value.backward()
    assert torch.isfinite(box.lower.grad).all()


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Flatten(), nn.Linear(9, 12), nn.ReLU(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3)
    )
    with torch.no_grad():
        module[1].weight.mul_(4)  # so that intervals widen
    return capture(module.double().train(), torch.rand(2, 1, 3, 3).double())


X = torch.rand(5, 1, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
Y = torch.tensor([0, 1, 2, 0, 1])
SEEDS = torch.arange(5)


def regulariser(network, objective, eps, **options):
    threat = ThreatModel(math.inf, eps)
    loss = objective(network, X, Y, threat, seeds=SEEDS, regularise=1.0, eps_max=0.4, **options)
    return loss.measures["regulariser"].item()


def test_it_looks_at_the_input_box_and_every_activations_input(network):
    region = around(ThreatModel(math.inf, 0.1), X)
    found = margins.interval(fixed(network), region, Spec.label(Y, 3))
    assert [found.boxes[name].lower.shape[1] for name in found.preactivations] == [12, 8]
    half = ((region.upper - region.lower) / 2).mean().item()
    layers = [found.boxes[name] for name in found.preactivations]
    assert regulariser(network, objectives.ibp, 0.1) == pytest.approx(
        by_hand(half, layers, 0.5), rel=1e-9
    )


def test_on_a_small_box_it_is_relative_to_that_box(network):
    """Half the box around the same centre, and half the radius, are the same to it."""
    free = ThreatModel(math.inf, 0.2, -9.0, 9.0)
    wide = objectives.sabr(
        network, X, Y, free, seeds=SEEDS, share=0.5, scale=0.0, regularise=1.0, eps_max=0.4
    ).measures["regulariser"]
    half = ThreatModel(math.inf, 0.1, -9.0, 9.0)
    narrow = objectives.ibp(network, X, Y, half, seeds=SEEDS, regularise=1.0, eps_max=0.4).measures[
        "regulariser"
    ]
    assert wide.item() == pytest.approx(narrow.item(), rel=1e-6)


def test_at_radius_zero_it_is_the_limit_of_small_ones(network):
    at_zero = regulariser(network, objectives.ibp, 0.0)
    assert at_zero > 0
    assert at_zero == pytest.approx(regulariser(network, objectives.ibp, 1e-5), rel=0.02)


def test_it_fades_with_the_radius(network):
    def extra(eps):
        threat = ThreatModel(math.inf, eps)
        with_, without = (
            objectives.ibp(network, X, Y, threat, seeds=SEEDS, regularise=r, eps_max=0.4)
            for r in (0.5, 0.0)
        )
        if eps >= 0.4:
            assert "regulariser" not in with_.measures
            return with_.total.item() - without.total.item()
        share = (with_.total - without.total) / with_.measures["regulariser"]
        return share.item()

    assert [extra(e) for e in (0.0, 0.1, 0.3)] == pytest.approx([0.5, 0.375, 0.125])
    assert extra(0.4) == extra(0.5) == 0.0


def test_initial_weights_keep_the_width_of_intervals():
    """The gain from one pre-activation to the next is 1 through a ReLU and 2 without."""
    generator = torch.Generator().manual_seed(0)
    module = nn.Sequential(*[nn.Linear(600, 600) for _ in range(7)])
    last = module[-1].weight.clone()
    biases = [layer.bias.clone() for layer in module]
    ibp_initialise(module, generator=generator)
    assert torch.equal(module[-1].weight, last)
    assert all(torch.equal(a.bias, b) for a, b in zip(module, biases, strict=True))
    center, half = torch.randn(64, 600, generator=generator), torch.full((64, 600), 0.01)
    with torch.no_grad():
        center, half = module[0](center), half @ module[0].weight.abs().T
        for layer in module[1:-1]:
            before = half.mean()
            assert (half @ layer.weight.abs().T).mean() / before == pytest.approx(2.0, rel=0.12)
            low, high = (center - half).relu(), (center + half).relu()
            center, half = layer((low + high) / 2), (high - low) / 2 @ layer.weight.abs().T
            assert half.mean() / before == pytest.approx(1.0, rel=0.2)


def test_initialisation_repeats():
    torch.manual_seed(5)
    a, b = wong_small(), wong_small()
    for module in (a, b):
        ibp_initialise(module, generator=torch.Generator().manual_seed(3))
    assert torch.equal(a[0].weight, b[0].weight)
    assert not torch.equal(a[-1].weight, b[-1].weight)


@pytest.mark.parametrize(
    ("build", "shape", "parameters", "mega"),
    [
        (wong_small, (1, 28, 28), 166_406, 0.61), (gowal_small, (1, 28, 28), 329_606, 1.18),
        (stretch, (1, 28, 28), None, 2.5),
        (gowal_medium, (1, 28, 28), None, 6.24), (cnn7, (3, 32, 32), 17_200_000, 151), (cnn7, (1, 28, 28), None, 114),
        (cnn5, (3, 32, 32), None, None),
    ],
)  # fmt: skip
def test_architectures_have_their_published_sizes(build, shape, parameters, mega):
    """Multiply-adds by counting them in a forward pass."""
    module, count = build(shape), 0
    if parameters:
        assert sum(p.numel() for p in module.parameters()) == pytest.approx(parameters, rel=0.01)

    def hook(layer, _inputs, output):
        nonlocal count
        count += layer.weight[0].numel() * output[0].numel()

    for layer in module:
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            layer.register_forward_hook(hook)
    assert module.eval()(torch.rand(1, *shape)).shape == (1, 10)
    if mega:
        assert count / 1e6 == pytest.approx(mega, rel=0.02)


def test_deep_networks_normalise_behind_every_hidden_layer():
    names = [type(layer).__name__ for layer in cnn7(mean=(0.5,) * 3, std=(0.25,) * 3)]
    assert names == [
        "Normalise",
        *["Conv2d", "BatchNorm2d", "ReLU"] * 5,
        "Flatten",
        "Linear",
        "BatchNorm1d",
        "ReLU",
        "Linear",
    ]
