"""Diagnostics: every fault is found, sound models raise no alarm, and the numbers are what they say."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from attack_checks import EPS, NORMS, K, batch, network
from calipers import Region, Spec, ThreatModel, from_numpy
from calipers import data as datasets
from calipers.attacks.diagnostics import CHECKS, Finding, diagnose, lines
from calipers.errors import ModelError
from calipers.models import load_model
from calipers.seeds import seeds

INF = math.inf
Model = Callable[[Tensor], Tensor]
DATA = datasets.load("digits")
X, Y = DATA.x[:40], DATA.y[:40]
NET = load_model("digits_pgd").module


def run(model: Model, p: float = INF, eps: float = 0.1, **options: object) -> dict[str, Finding]:
    found = diagnose(
        model, ThreatModel(p, eps).around(X), Spec.label(Y, 10), seeds=seeds(X, 0, "t"), **options
    )  # type: ignore[arg-type]
    return {f.name: f for f in found}


def warned(found: dict[str, Finding]) -> set[str]:
    return {name for name, f in found.items() if f.warning}


@pytest.mark.parametrize("p", NORMS)
@pytest.mark.parametrize("name", ["digits_standard", "digits_pgd"])
@pytest.mark.parametrize("scale", [0.1, 1.0])
def test_sound_networks_raise_no_alarm(name: str, p: float, scale: float) -> None:
    found = run(load_model(name).module, p, scale * {1.0: 2.0, 2.0: 0.6, INF: 0.1}[p])
    assert warned(found) == set()
    assert list(found) == list(CHECKS)


@pytest.mark.parametrize("p", NORMS)
def test_nor_does_a_smooth_network_in_float64_on_plain_features(p: float) -> None:
    net = network()
    x, y = batch(net, 40)
    region = ThreatModel(p, EPS[p]).around(x)
    found = diagnose(net, region, Spec.label(y, K), dtype=x.dtype, seeds=seeds(x, 0, "t"))
    assert [f.name for f in found if f.warning] == []


def numpy_model() -> Model:
    layers = [
        (m.weight.detach().numpy(), m.bias.detach().numpy())
        for m in NET.modules()
        if isinstance(m, nn.Linear)
    ]

    def forward(x):  # type: ignore[no-untyped-def]
        x = x.reshape(len(x), -1)
        for i, (weight, bias) in enumerate(layers):
            x = (x if i == 0 else x.clip(0, None)) @ weight.T + bias
        return x

    return from_numpy(forward)


ROUNDED = {
    "piecewise constant",
    "zero gradients",
    "misleading gradients",
    "random beats gradient",
    "unbroken at any radius",
}
FAULTS: dict[str, tuple[Model, set[str]]] = {
    "binarised": (lambda x: NET(x.round()), ROUNDED | {"black box beats gradient"}),
    "8-bit": (lambda x: NET((255 * x).round() / 255), ROUNDED),
    "rounded logits": (lambda x: (10 * NET(x)).round() / 10, ROUNDED),
    "not torch": (numpy_model(), {"no gradient", "black box beats gradient"}),
    "detached inputs": (lambda x: NET(x.detach()), {"no gradient"}),
    "no derivative": (
        lambda x: NET(torch.heaviside(x - 0.5, torch.zeros(()))),
        {"no gradient", "piecewise constant"},
    ),
    "detached": (lambda x: NET(x).detach(), {"no gradient", "black box beats gradient"}),
    "shattered": (
        lambda x: NET(x + 0.03 * torch.sin(2000 * x)),
        {"random beats gradient"},
    ),
    "hidden by a tiny gradient": (
        lambda x: NET((x * 20).round() / 20 + 1e-6 * x),
        {"misleading gradients", "piecewise constant"},
    ),
    "logits of 5000": (lambda x: 1000 * NET(x), {"saturated loss"}),
    "probabilities": (lambda x: NET(x).softmax(1), {"probabilities"}),
    "noisy": (lambda x: NET(x + 0.05 * torch.randn_like(x)), {"random outputs"}),
    "batch statistics": (lambda x: NET(x) - NET(x).mean(0), {"mixed batch"}),
    "NaN": (lambda x: NET(x).log(), {"outputs not finite", "unbroken at any radius"}),
    "NaN away from the data": (
        lambda x: torch.where(torch.isin(x, X).all((1, 2, 3))[:, None], NET(x), math.nan),
        {"outputs not finite"},
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_each_fault_is_found(name: str) -> None:
    model, expected = FAULTS[name]
    found = warned(run(model))
    assert expected <= found
    # what else a fault brings along is no surprise, but a healthy part of the model is not blamed
    if name in ("logits of 5000", "probabilities", "noisy", "batch statistics"):
        assert expected == found


def along(profile: Callable[[Tensor], Tensor]) -> tuple[Model, Region, Spec]:
    """A model of two classes whose margin is ``profile`` of the way to a corner, in [−1, 1]."""

    def model(x: Tensor) -> Tensor:
        margin = profile((x - 0.5).mean(1) / 0.1)
        return torch.stack([torch.zeros_like(margin), margin], 1)

    x = torch.full((10, 6), 0.5)
    return model, ThreatModel(INF, 0.1).around(x), Spec.label(torch.ones(10, dtype=torch.long), 2)


def ramp(*corners: tuple[float, float]) -> Callable[[Tensor], Tensor]:
    """The piecewise-linear function through these points."""
    starts, values = (torch.tensor(column) for column in zip(*corners, strict=True))
    slopes = values.diff() / starts.diff()

    def profile(t: Tensor) -> Tensor:
        i = (torch.bucketize(t.detach(), starts) - 1).clamp(0, len(slopes) - 1)
        return values[i] + slopes[i] * (t - starts[i])

    return profile


STEPPED = {
    # a ditch in front of a wall: only one long step reaches what is behind the wall
    "one step beats many": ramp((-1, 2), (0.1, 1), (0.6, 5), (0.9, 5), (1, -1)),
    # a wall that steps of a quarter get over and steps of 1/40 do not
    "longer is weaker": ramp((-1, 3), (0.1, 1), (0.17, 2), (0.24, 1), (0.9, -1), (1, -2)),
}


@pytest.mark.parametrize("name", STEPPED)
def test_walls_that_stop_steps_are_found(name: str) -> None:
    found = diagnose(*along(STEPPED[name]), checks=[name])
    assert [(f.warning, f.value) for f in found] == [(True, 1.0)]


def test_every_check_has_a_fault_that_it_finds() -> None:
    found = set().union(*(expected for _, expected in FAULTS.values()))
    assert found | set(STEPPED) | {"not converged"} == set(CHECKS)


def test_a_target_that_takes_fine_steps_is_found() -> None:
    hidden = 0.5 + 0.1 * torch.linspace(-0.9, 0.93, 6)

    def model(x: Tensor) -> Tensor:
        margin = (x - hidden).abs().mean(1) - 0.003
        return torch.stack([torch.zeros_like(margin), margin], 1)

    _, region, spec = along(ramp((-1, 0), (1, 0)))
    (found,) = diagnose(model, region, spec, checks=["not converged"])
    assert found.warning
    assert found.value == 1


def test_the_linearisation_is_exact_for_affine_models() -> None:
    """No random point changes an affine margin by more than its gradient allows; half the gradient is found out."""
    weight = torch.randn(10, 64)

    class Half(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, factor):  # type: ignore[no-untyped-def]
            ctx.factor = factor
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):  # type: ignore[no-untyped-def]
            return gradient * ctx.factor, None

    for p, eps in ((1.0, 2.0), (2.0, 0.6), (INF, 0.1)):
        for factor, expected in ((1.0, 0.0), (1e-3, 1.0)):
            found = run(
                lambda x, factor=factor: Half.apply(x, factor).flatten(1) @ weight.T,
                p,
                eps,
                checks=["misleading gradients"],
            )
            assert found["misleading gradients"].value == expected


def test_what_needs_a_gradient_or_room_is_left_out() -> None:
    without = run(lambda x: NET(x).detach())
    assert "zero gradients" not in without
    assert "black box beats gradient" in without
    still = run(NET, eps=0.0)
    assert warned(still) == set()
    assert set(still) == {
        "outputs not finite",
        "probabilities",
        "random outputs",
        "mixed batch",
        "no gradient",
    }


def test_masks_boxes_and_domains_of_their_own() -> None:
    mask = torch.zeros(1, 8, 8, dtype=torch.bool)
    mask[0, 2:6, 2:6] = True
    spec, s = Spec.label(Y, 10), seeds(X, 0, "t")
    scaled = ThreatModel(2, 4.0, -1.0, 7.0)

    def shrunk(x: Tensor) -> Tensor:
        return NET((x + 1) / 8)

    for model, region, domain in (
        (NET, ThreatModel(INF, 0.2, mask=mask).around(X), (0.0, 1.0)),
        (NET, ThreatModel(INF, torch.linspace(0.05, 0.2, 8)).around(X), (0, "1")),
        (NET, Region.box((X - 0.1).clamp(0, 1), (X + 0.1).clamp(0, 1)), (0.0, 1.0)),
        (shrunk, scaled.around(8 * X - 1), (-1.0, torch.full((8, 8), 7.0))),
    ):
        found = diagnose(model, region, spec, domain=domain, seeds=s)
        alarms = {f.name for f in found if f.warning}
        # 16 pixels need not be enough to break everything, nor a box that is all there is
        assert alarms <= {"unbroken at any radius"}


@pytest.mark.parametrize("domain", [(0.0, 1.0), (-INF, INF)])
def test_the_doubling_ends_whatever_the_radii_and_the_domain(domain: tuple[float, float]) -> None:
    """Also where nothing is ever broken, features have a radius of 0, or the domain has no end."""
    name = "unbroken at any radius"
    some = torch.tensor([0.0, 0.1]).repeat(4)
    for p, eps in ((INF, some), (INF, 0.05), (2, 0.3), (1, 1.0)):
        region = ThreatModel(p, eps).around(X)
        (found,) = diagnose(
            lambda x: NET(X[:1]).expand(len(x), -1) + 0 * NET(x),
            region,
            Spec.label(Y[:1].expand(len(X)), 10),
            checks=[name],
            domain=domain,
        )
        assert found.value == 1
        assert ("whole domain" in found.message) == (domain[1] == 1)


def test_ctrl_c_ends_it() -> None:
    """Also in the part of it that the cascade would turn into a result."""
    calls = 0

    def model(x: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 30:
            raise KeyboardInterrupt
        return NET(x)

    with pytest.raises(KeyboardInterrupt):
        run(model, checks=["random beats gradient"])


def test_passes_are_those_of_the_model() -> None:
    count = 0

    def model(x: Tensor) -> Tensor:
        nonlocal count
        count += len(x)
        y: Tensor = NET(x)
        if y.requires_grad:
            y.register_hook(back)
        return y

    def back(gradient: Tensor) -> None:
        nonlocal count
        count += len(gradient)

    found = run(model)
    assert sum(f.passes for f in found.values()) * len(X) == pytest.approx(count - len(X))
    assert 300 < count / len(X) < 1000


def test_nothing_of_the_caller_changes() -> None:
    before = {k: v.clone() for k, v in NET.state_dict().items()}
    x = X.clone()
    first, again = run(NET), run(NET)
    assert first == again
    assert torch.equal(x, X)
    assert all(torch.equal(v, before[k]) for k, v in NET.state_dict().items())
    assert all(p.grad is None for p in NET.parameters())


def test_one_example_may_be_luck() -> None:
    """A black box that breaks one example more than gradients do is no alarm, two are. It climbs stairs."""
    x = torch.full((10, 6), 0.5)
    region, spec = ThreatModel(INF, 0.1).around(x), Spec.label(torch.ones(10, dtype=torch.long), 2)
    name = "black box beats gradient"
    for flat in (0, 1, 2):
        rows = torch.arange(10.0).repeat_interleave(6).view(10, 6) * 10  # a mark of the example

        def model(z: Tensor, flat: int = flat) -> Tensor:
            way = ((z % 1 - 0.5).mean(1) / 0.1).clamp(-1, 1)
            hidden = z[:, 0] < 10 * flat - 5
            margin = torch.where(hidden, 2.5 - (3.1 * way).floor(), 2 - way)
            return torch.stack([torch.zeros_like(margin), margin], 1)

        region = ThreatModel(INF, 0.1, -INF, INF).around(x + rows)
        (found,) = diagnose(model, region, spec, checks=[name], seeds=torch.arange(10))
        assert found.threshold == 0.1
        assert found.value == pytest.approx(flat / 10)
        assert found.warning == (flat > 1)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda x: (NET(x), x), "returns tuple, not a tensor"),
        (lambda x: NET(x)[:, :9], r"shape \(40, 9\).*\(40, 10\)"),
        (lambda x: NET(x)[:-1], r"shape \(39, 10\)"),
        (lambda x: NET(x).argmax(1), r"shape \(40,\) and type torch.int64"),
    ],
)
def test_what_is_no_classifier_is_refused(model: Model, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        run(model)


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match=r"zero gradient'.*zero gradients"):
        run(NET, checks=["zero gradient"])
    region, spec = ThreatModel(INF, 0.1).around(X), Spec.label(Y, 10)
    with pytest.raises(ValueError, match="no examples"):
        diagnose(NET, region[:0], spec[:0])
    with pytest.raises(ValueError, match="seeds: shape"):
        diagnose(NET, region, spec, seeds=torch.zeros(2, dtype=torch.int64))


def test_text() -> None:
    good = Finding("a check", False, 0.0, 0.1, "nothing", "no need", 3.0)
    bad = replace(good, name="b", warning=True, value=0.5, message="half", remedy="repair it")
    assert lines([good, bad]) == [
        "ok       a check  nothing",
        "warning  b        half",
        "                  -> repair it",
    ]
    assert lines([good, bad], all_of_them=False)[0].startswith("warning")
    assert lines([]) == []
