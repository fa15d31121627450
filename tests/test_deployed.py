"""The rounding of the forward pass, against float32 passes whose sums are formed in other orders."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import calipers as cp
from calipers.bounds import deployed
from calipers.bounds.deployed import deviation
from calipers.data import load
from calipers.errors import UnsupportedOp
from calipers.graph import primitives as prim
from calipers.graph.graph import bind, walk
from calipers.models import load_model
from calipers.ops import OPS
from networks import ARCHITECTURES, Builder, inputs

F32, F64 = torch.float32, torch.float64


def sequential(products: Tensor, bias: Tensor | None, order: Tensor, last: bool) -> Tensor:
    """Σ over the last dimension, one float32 addition after the other, the bias first or last."""
    start = torch.zeros_like(products[..., 0])
    total = start if bias is None or last else start + bias
    for i in order.tolist():
        total = total + products[..., i]
    return total + bias if last and bias is not None else total


def reordered(seed: int) -> Callable[..., Any]:
    """A rule for `walk` that sums linear layers and convolutions in an order of its own."""
    generator = torch.Generator().manual_seed(seed)

    def order(n: int, sizes: Tensor) -> Tensor:
        if seed % 3 == 0:
            return torch.randperm(n, generator=generator)
        return sizes.reshape(-1, n).abs().sum(0).argsort(descending=seed % 3 == 1)

    def rule(node, args, kwargs):
        if node.op is F.linear and args[0].ndim == 2:
            x, w, b = (*args, None)[:3]
            products = x.unsqueeze(1) * w
            return sequential(products, b, order(w.shape[1], products), seed % 2 == 0)
        if node.op is torch.conv2d and len(args) <= 5:
            x, w, b, stride, padding = args
            columns = F.unfold(x, w.shape[2:], padding=padding, stride=stride).transpose(1, 2)
            products = columns.unsqueeze(2) * w.flatten(1)
            total = sequential(products, b, order(products.shape[-1], products), seed % 2 == 0)
            size = [
                (n + 2 * p - k) // s + 1
                for n, p, k, s in zip(x.shape[2:], padding, w.shape[2:], stride, strict=True)
            ]
            return total.transpose(1, 2).reshape(len(x), -1, *size)
        return node.op(*args, **kwargs)

    return rule


def passes(network, x: Tensor) -> list[Tensor]:
    """Outputs in float32: the module's, and with other orders of summation."""
    env = bind(network.graph, network.module)
    graph, first = network.graph, network.graph.inputs[0]
    return [
        network(x),
        *(walk(graph, {**env, first: x}, reordered(s))[graph.output] for s in range(6)),
    ]


def largest_ratio(network, region, spec, count: int = 6) -> float:
    """The largest share of the radius that a pass differs by; 1 or less if it is a bound."""
    radius = deviation(network, region, spec)
    assert torch.isfinite(radius).all()
    exact, worst = network.in_double(), 0.0
    C = spec.C.double()
    for i in range(count):
        seeds = torch.arange(len(region)) + 100 * i
        x = region.sample(seeds, F32) if i else region.project(region.center.float())
        truth = exact(x)
        for y in passes(network, x):
            error = torch.einsum("bmk,bk->bm", C, y.double() - truth).abs()
            own = 1e-13 * (1 + truth.abs().amax(1, keepdim=True))  # the oracle's
            worst = max(worst, ((error - own).clamp_min(0) / radius.clamp_min(1e-300)).max().item())
    return worst


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_no_pass_leaves_the_radius(name: str) -> None:
    for seed in range(3):
        network = ARCHITECTURES[name](seed)
        x = inputs(network, 3, seed)
        region = cp.ThreatModel((math.inf, 2.0, 1.0)[seed], (0.1, 0.0, 1.0)[seed]).around(x)
        spec = cp.Spec.label(torch.arange(3) % network.num_classes, network.num_classes)
        ratio = largest_ratio(network, region, spec, 3)
        assert ratio <= 1
        assert ratio > 1e-4, "absurdly loose"


def swallowed(n: int = 400, scale: float = 100.0):
    """A sum whose small terms are all lost when its large one comes first; then a layer that magnifies the loss."""
    b = Builder((n,))
    w = torch.full((2, n), 2.0**-24)
    w[:, 0] = 1.0
    h = b.relu(b(F.linear, b.x, w, torch.zeros(2)))
    b(F.linear, h, scale * torch.eye(2), torch.zeros(2))
    return b.network()


def nearly_attained() -> None:
    """A loss of n − 1 of the n + 2 units that the radius allows."""
    network = swallowed()
    region = cp.ThreatModel(math.inf, 0).around(torch.ones(1, 400))
    for spec in (
        cp.Spec.functional(torch.tensor([[[1.0, 0.0]]])),
        cp.Spec.functional(torch.tensor([[[1.0, 2.0]]])),
    ):
        ratio = largest_ratio(network, region, spec, 1)
        assert 0.95 < ratio <= 1


def test_the_radius_is_nearly_attained() -> None:
    nearly_attained()


def products_nearly_attained() -> None:
    """Both factors of a product lose."""
    b = Builder((400,))
    w = torch.full((2, 400), 2.0**-24)
    w[:, 0] = 1.0
    b(torch.mul, *(b(F.linear, b.x, w.clone(), torch.zeros(2)) for _ in range(2)))
    region = cp.ThreatModel(math.inf, 0).around(torch.ones(1, 400))
    ratio = largest_ratio(b.network(), region, cp.Spec.functional(torch.tensor([[[1.0, 0.0]]])), 1)
    assert 0.95 < ratio <= 1


def test_the_radius_of_a_product_is_nearly_attained(monkeypatch) -> None:
    products_nearly_attained()
    true = deployed._bilinear

    def one_sided(kind, node, args, kwargs, boxes, errors, dtype) -> Tensor:
        return true(kind, node, args, kwargs, boxes, errors, dtype) / 2

    monkeypatch.setitem(deployed.RULES, deployed.Bilinear, one_sided)
    with pytest.raises(AssertionError):
        products_nearly_attained()


@pytest.mark.parametrize("name", ["digits_standard", "digits_pgd"])
def test_the_radius_is_small_beside_the_margins(name: str) -> None:
    network, data = load_model(name), load("digits")
    x, y = data.x[:10], data.y[:10]
    region, spec = cp.ThreatModel(math.inf, "0.1").around(x), cp.Spec.label(y, 10)
    assert largest_ratio(network, region, spec, 2) <= 1
    radius = deviation(network, region, spec)
    assert radius.max() < 1e-3 * spec.values(network(x)).abs().max()
    small = deviation(network, region[:1], spec[:1])
    torch.testing.assert_close(radius[:1], small)
    pieces = deviation(network, region, spec, memory=1)
    torch.testing.assert_close(pieces, radius)
    assert (deviation(network, region, spec, dtype=F64) < 1e-8 * radius).all()


def test_what_cannot_overflow_is_said_and_what_can_is_infinite() -> None:
    b = Builder((2,))
    b(torch.mul, b(torch.mul, b.linear(b.x, 2), 1e30), 1e30)
    network = b.network()
    region = cp.ThreatModel(math.inf, 0.1).around(torch.rand(1, 2))
    assert torch.isinf(deviation(network, region, cp.Spec.label(torch.tensor([0]), 2))).all()
    only = cp.Spec.functional(torch.zeros(1, 1, 2))
    assert deviation(network, region, only).item() == 0


def test_rounded_constants_count() -> None:
    b = Builder((2,))
    b(prim.pad, b.x, (0, 1), 0.1)
    network = b.network()
    region = cp.ThreatModel(math.inf, 0).around(torch.rand(1, 2))
    radius = deviation(network, region, cp.Spec.functional(torch.eye(3)[None]))
    assert radius[0, :2].tolist() == [0, 0]
    assert radius[0, 2] >= abs(torch.tensor(0.1, dtype=F32).item() - 0.1)


def test_what_has_no_error_bound_is_refused(monkeypatch) -> None:
    network = ARCHITECTURES["tanh"](0)
    region = cp.ThreatModel(math.inf, 0).around(inputs(network, 1, 0))
    spec = cp.Spec.label(torch.tensor([0]), 3)
    monkeypatch.setitem(OPS, torch.tanh, replace(OPS[torch.tanh], steepest=None))
    with pytest.raises(UnsupportedOp, match="Lipschitz constant"):
        deviation(network, region, spec)

    class Computed(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.weight * 3.1, self.bias)

    x = torch.rand(2, 3)
    captured = cp.capture(Computed(3, 2), x)
    with pytest.raises(UnsupportedOp, match="computed parameters"):
        deviation(captured, cp.ThreatModel(2, 0).around(x), cp.Spec.label(torch.tensor([0, 1]), 2))


def test_an_audit_certifies_what_runs(tmp_path) -> None:
    data = load("digits")
    pair = data.x[:40], data.y[:40]
    threat = cp.ThreatModel(math.inf, "0.1")
    network = load_model("digits_pgd")
    real, runs = cp.audit(network, pair, threat), cp.audit(network, pair, threat, deployed=True)
    assert runs.certified <= real.certified
    assert runs.certified > 0.5
    assert runs.json()["deployed"] is True
    assert any("float32, whatever the order of its sums" in note for note in runs.notes)
    assert not any("deployed" in note for note in real.notes)
    assert runs.identity != real.identity
    assert (runs.bracket.lower <= real.bracket.lower).all()

    # margins of 1e-6 on outputs of a thousand: true of the parameters, not of what runs
    model = nn.Linear(4, 2)
    with torch.no_grad():
        model.weight.fill_(1000.0)
        model.bias.copy_(torch.tensor([1e-6, 0.0]))
    x, y = torch.full((3, 4), 0.3), torch.zeros(3, dtype=torch.long)
    assert cp.audit(model, (x, y), cp.ThreatModel(2, 0)).bracket.lower.min() > 0
    assert cp.audit(model, (x, y), cp.ThreatModel(2, 0), deployed=True).certified == 0


def test_the_command_line_option(tmp_path, monkeypatch, capsys) -> None:
    from calipers.cli import main

    arguments = ["audit", "--samples", "20", "--deployed", "--json", str(tmp_path / "a.json")]
    monkeypatch.setattr("sys.argv", ["calipers", *arguments])
    with contextlib.suppress(SystemExit):
        main()
    assert (
        "certified (deployed): also of the network as it runs in float32" in capsys.readouterr().out
    )
    assert json.loads((tmp_path / "a.json").read_text())["deployed"] is True


# -- planted faults -------------------------------------------------------------------------------------


def quarter_gamma(n: int, dtype: torch.dtype) -> float:
    return TRUE_GAMMA(n, dtype) / 5


def no_terms(n: int, dtype: torch.dtype) -> float:
    """Rounding of one operation, whatever the length of the sum."""
    return TRUE_GAMMA(min(n, 1), dtype)


def forgets_carried(kind, node, args, kwargs, boxes, errors, dtype) -> Tensor:
    fresh = {name: torch.zeros_like(e) for name, e in errors.items()}
    return TRUE_RULES[deployed.Affine](kind, node, args, kwargs, boxes, fresh, dtype)


def forgets_relu(kind, node, args, kwargs, boxes, errors, dtype) -> Tensor:
    return 0 * errors[node.operands[0]]


TRUE_GAMMA, TRUE_RULES = deployed.gamma, dict(deployed.RULES)


@pytest.mark.parametrize("fault", [quarter_gamma, no_terms])
def test_a_wrong_gamma_is_caught(fault, monkeypatch) -> None:
    monkeypatch.setattr(deployed, "gamma", fault)
    with pytest.raises(AssertionError):
        nearly_attained()


@pytest.mark.parametrize(
    ("kind", "fault"), [(deployed.Affine, forgets_carried), (deployed.Activation, forgets_relu)]
)
def test_a_lost_error_is_caught(kind, fault, monkeypatch) -> None:
    monkeypatch.setitem(deployed.RULES, kind, fault)
    with pytest.raises(AssertionError):
        nearly_attained()
