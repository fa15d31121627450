"""Passes without autograd: the module's outputs and autograd's gradients, in memory that no caller is left holding."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

import calipers as cp
from calipers.attacks.losses import cross_entropy
from calipers.attacks.search import look, repeated
from calipers.graph import passes as table
from calipers.graph.graph import Network
from calipers.graph.passes import Pass, Site
from networks import ARCHITECTURES, Builder, inputs, mlp

WITH = {"mlp", "affine", "conv", "residual", "preactivation", "bottleneck", "max_pool"}


class Block(nn.Module):
    """Normalised images, batch norm in evaluation mode, a skip that adds a value to itself later on, dropout, pools."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor([0.2, 0.3, 0.25]).view(3, 1, 1))
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6))
        self.body = nn.Sequential(
            nn.Conv2d(6, 6, 3, padding=1, groups=2), nn.BatchNorm2d(6), nn.ReLU(),
            nn.Conv2d(6, 6, 3, padding=2, dilation=2),
        )  # fmt: skip
        self.head = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(6 * 9, 5))

    def forward(self, x: Tensor) -> Tensor:
        x = (x - 0.4) / self.scale
        x = torch.relu(self.stem(x))
        x = torch.relu(self.body(x) + x) + x
        x = nn.functional.avg_pool2d(nn.functional.max_pool2d(x, 2), 2, padding=1)
        return self.head(x)


def captured() -> Network:
    torch.manual_seed(0)
    module = Block()
    for m in module.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.normal_(m.weight)
            nn.init.normal_(m.running_mean)
            nn.init.uniform_(m.running_var, 0.1, 2.0)
    return cp.capture(module.eval(), torch.rand(2, 3, 8, 8))


def shared_adds() -> Network:
    """Gradients that several values share: sums of sums, one value read twice, broadcast constants, a view."""
    b = Builder((6,), 0)
    h = b.linear(b.x, 6)
    left, right = b.relu(h), b.relu(b.linear(b(torch.add, h, b.x), 6))
    total = b(torch.add, b(torch.add, left, right), b(torch.add, left, left))
    total = b(torch.add, b(torch.add, total, b.x), b.rand(1))
    b.linear(b.relu(b(table.prim.reshape, total, (2, 3))), 4)
    return b.network()


NETWORKS: dict[str, Callable[[], Network]] = {
    **{name: lambda name=name: ARCHITECTURES[name](0) for name in WITH},  # type: ignore[misc]
    "captured": captured,
    "shared_adds": shared_adds,
}


def by_autograd(network: Network, x: Tensor, toward: Tensor) -> tuple[Tensor, Tensor]:
    point = x.clone().requires_grad_()
    y = network(point)
    (gradient,) = torch.autograd.grad(y, point, toward)
    return y.detach(), gradient


def check_like_autograd(network: Network, dtype: torch.dtype) -> None:
    """The outputs bit by bit, gradients to rounding; and again, in the memory that now holds other numbers."""
    network.module.to(dtype)
    for count in (1, 7):
        drawn = inputs(network, 3 * count, 1).to(dtype)
        batch = [part.clone() for part in drawn.split(count)]  # aligned alike, for the kernels
        passes = network.input_passes(batch[0])
        assert passes is not None
        for x in (*batch, batch[0]):
            toward = torch.randn_like(network(x)).detach()
            given = toward.clone()
            y, gradient = by_autograd(network, x, toward)
            most = 16 * torch.finfo(dtype).eps * float(gradient.abs().max())
            for room in (None, torch.full_like(x, torch.nan)):
                assert torch.equal(passes.forward(x), y)
                found = passes.backward(toward, room)
                assert found.shape == x.shape
                assert float((found - gradient).abs().max()) <= most
                assert torch.equal(toward, given)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", sorted(NETWORKS))
def test_outputs_and_gradients_are_the_modules(name: str, dtype: torch.dtype) -> None:
    check_like_autograd(NETWORKS[name](), dtype)


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_which_networks_have_passes(name: str) -> None:
    network = ARCHITECTURES[name](0)
    assert (network.input_passes(inputs(network, 2, 0)) is not None) == (name in WITH)


def _leaks(site: Site, x: object) -> Pass:
    """A relu whose gradient forgets one entry."""
    step = table._relu(site, x)

    def backward(g: Tensor, y: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        (gradient,) = step.backward(g, y, x)
        return (gradient.flatten(1).index_fill(1, torch.tensor([0]), 0.0).view_as(gradient),)

    return Pass(step.forward, backward)


@pytest.mark.parametrize("name", ["mlp", "conv", "residual"])
def test_a_wrong_rule_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(table.RULES, torch.relu, _leaks)
    with pytest.raises(AssertionError):
        check_like_autograd(NETWORKS[name](), torch.float64)


def test_an_operand_that_is_read_again_must_not_be_overwritten(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What the sharing tables are for: with everything declared apart, sums' gradients are spoilt."""
    monkeypatch.setattr(table, "SHARING", frozenset())
    with pytest.raises(AssertionError):
        check_like_autograd(shared_adds(), torch.float64)


@contextmanager
def _hooked(network: Network) -> Iterator[None]:
    handle = next(network.module.children()).register_forward_hook(lambda *_: None)
    yield
    handle.remove()


@contextmanager
def _training(network: Network) -> Iterator[None]:
    network.module.train()
    yield
    network.module.eval()


@pytest.mark.parametrize(
    "state", [_hooked, _training, lambda _: torch.autocast("cpu", dtype=torch.bfloat16)]
)
def test_what_only_autograd_knows_is_left_to_it(state: Callable[[Network], object]) -> None:
    network = captured()
    x = inputs(network, 2, 0)
    with state(network):  # type: ignore[attr-defined]
        assert network.input_passes(x) is None
    assert network.input_passes(x) is not None
    assert network.input_passes(x.double()) is None  # not the parameters' type
    assert network.input_passes(torch.rand(2, 3, 9, 8)) is None


def test_a_value_that_nobody_reads_leaves_it_to_autograd() -> None:
    b = Builder((4,), 0)
    h = b.relu(b.linear(b.x, 5))
    b.linear(h, 3)
    spare = b.network()
    b.relu(h)
    dead = b.network()
    graph = table.Graph(dead.graph.nodes, dead.graph.params, ("x",), spare.graph.output)
    x = torch.rand(2, 4)
    assert spare.input_passes(x) is not None
    assert Network(graph, dead.module, (4,)).input_passes(x) is None


def test_the_output_may_be_read_inside() -> None:
    b = Builder((4,), 0)
    h = b.linear(b.x, 4)
    b(torch.add, b.relu(h), h)
    network = b.network()
    inner = table.Graph(network.graph.nodes[:1], network.graph.params, ("x",), "n0")
    for one in (network, Network(inner, network.module, (4,))):
        assert one.input_passes(torch.rand(2, 4)) is not None
    check_like_autograd(network, torch.float64)


def problem(network: Network, count: int = 9) -> tuple[Tensor, cp.Spec]:
    x = inputs(network, count, 2)
    with torch.no_grad():
        y = network(x)
    return x, cp.Spec.label(y.argmax(1), y.shape[1])


def test_a_small_network_writes_its_gradient_where_it_is_told() -> None:
    b = Builder((2, 3, 4), 0)
    b.linear(b.relu(b.linear(b.x, 5)), 3)
    x = torch.rand(6, 2, 3, 4)
    for network, there in ((b.network(), True), (shared_adds(), False)):
        shaped = x.flatten(1)[:, :6].clone() if network.input_shape == (6,) else x
        passes, place = network.input_passes(shaped), torch.empty_like(shaped)
        assert passes is not None
        gradient = passes.backward(torch.ones_like(passes.forward(shaped)), place)
        assert (gradient.data_ptr() == place.data_ptr()) is there


def test_looks_share_nothing_with_one_another() -> None:
    network = mlp(0)
    x, spec = problem(network)
    run, other = repeated(network), repeated(network)
    first = look(run, cross_entropy, spec, x)
    kept = first.gradient.clone(), first.margin.clone(), first.loss().clone()
    look(other, cross_entropy, spec, x / 3)
    look(run, cross_entropy, spec, x / 2)
    look(run, cross_entropy, spec[torch.arange(4)], x[:4] / 2)
    assert torch.equal(first.gradient, kept[0])
    assert torch.equal(first.margin, kept[1])
    assert torch.equal(first.loss(), kept[2])


ATTACKS: dict[str, Callable[..., Tensor]] = {
    "pgd": cp.pgd,
    "pgd, dropping": lambda *a, **k: cp.pgd(*a, drop=True, restarts=2, **k),
    "fgsm": cp.fgsm,
    "apgd": cp.apgd,
}


@pytest.mark.parametrize("name", ["mlp", "conv", "max_pool"])
@pytest.mark.parametrize("p", [1.0, 2.0, math.inf])
@pytest.mark.parametrize("attack", sorted(ATTACKS))
def test_attacks_find_the_same_points(attack: str, p: float, name: str) -> None:
    """Bit by bit: of these networks every sum is formed by the same kernel."""
    network = NETWORKS[name]()
    x, spec = problem(network)
    region = cp.ThreatModel(p, {1.0: 1.0, 2.0: 0.4, math.inf: 0.1}[p]).around(x)
    seeds = torch.arange(len(x))
    found = ATTACKS[attack](network, region, spec, seeds=seeds)
    assert torch.equal(found, ATTACKS[attack](network.module, region, spec, seeds=seeds))


def test_attacks_follow_changed_parameters() -> None:
    network = mlp(0)
    x, spec = problem(network)
    region = cp.ThreatModel(math.inf, 0.2).around(x)
    before = cp.pgd(network, region, spec)
    with torch.no_grad():
        for tensor in network.module.buffers():
            tensor.neg_()
    after = cp.pgd(network, region, spec)
    assert not torch.equal(before, after)
    assert torch.equal(after, cp.pgd(network.module, region, spec))


def test_two_threads_may_attack_one_network() -> None:
    network = captured()
    x, spec = problem(network, 40)
    regions = [cp.ThreatModel(math.inf, eps).around(x) for eps in (0.01, 0.02, 0.05, 0.1)]
    expected = [cp.pgd(network, region, spec) for region in regions]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda region: cp.pgd(network, region, spec), regions))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
