"""Bounds as recorded programs: the same bits as without, and never of other parameters, regions or courses."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import networks
from calipers import Region, Spec
from calipers.bounds import crown, crown_ibp, interval
from calipers.bounds import recorded as module
from calipers.bounds.ladder import _crown_ibp
from calipers.bounds.recorded import Program, Tape
from calipers.bounds.state import check_spec, start, with_sparse_weights
from calipers.graph.capture import capture
from calipers.graph.graph import Network
from calipers.ops import facts
from calipers.work import counting
from networks import ARCHITECTURES

BOUNDS: dict[str, Callable[..., Tensor]] = {
    "interval": interval,
    "crown_ibp": crown_ibp,
    "crown": crown,
}
PROGRAMS = {"interval": 1, "crown_ibp": 1, "crown": 2}  # of each
MODES: dict[str, dict[str, Any]] = {
    "float32": {},
    "rigorous": {"dtype": torch.float64, "rigorous": True},
}


def programs(network: Network) -> list[Program]:
    known = module._PROGRAMS.get(facts(network.graph), {})
    return [p for p in known.values() if isinstance(p, Program)]


def case(network: Network, eps: float = 0.1, count: int = 3, seed: int = 7) -> tuple[Region, Spec]:
    x = networks.inputs(network, count, seed=seed)
    spec = Spec.label(torch.arange(count) % network.num_classes, network.num_classes)
    return Region.ball(x, eps, math.inf, 0.0, 1.0), spec


def plainly(bound: Callable[..., Tensor], *args: Any, **options: Any) -> Tensor:
    """What it is without any program: those are for when nobody asks for gradients."""
    with torch.enable_grad():
        return bound(*args, **options).detach()


def often(bound: Callable[..., Tensor], *args: Any, **options: Any) -> Tensor:
    with torch.no_grad():
        found = [bound(*args, **options) for _ in range(4)]
    assert all(torch.equal(found[0], f) for f in found)
    return found[0]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", BOUNDS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_programs_give_the_same_bits(architecture: str, name: str, mode: str) -> None:
    network = ARCHITECTURES[architecture](0)
    for count in (1, 3):
        region, spec = case(network, count=count)
        found = often(BOUNDS[name], network, region, spec, **MODES[mode])
        assert torch.equal(found, plainly(BOUNDS[name], network, region, spec, **MODES[mode]))
        for other in (case(network, 0.3, count, 8), case(network, 0.0, count, 9)):
            with torch.no_grad():
                again = BOUNDS[name](network, *other, **MODES[mode])
            assert torch.equal(again, plainly(BOUNDS[name], network, *other, **MODES[mode]))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("architecture", "name"),
    [
        *(
            (architecture, name)
            for architecture in ("mlp", "conv", "preactivation")
            for name in BOUNDS
        ),
        *((name, "interval") for name in ("bottleneck", "max_pool", "sigmoid", "mixed")),
    ],
)
def test_common_networks_are_recorded(architecture: str, name: str, mode: str) -> None:
    network = ARCHITECTURES[architecture](0)
    often(BOUNDS[name], network, *case(network), **MODES[mode])
    assert len(programs(network)) == PROGRAMS[name]


def change_in_place(layer: nn.Linear) -> None:
    with torch.no_grad():
        layer.weight.mul_(-2)


def change_behind_its_back(layer: nn.Linear) -> None:
    layer.weight.data[0] += 3


def change_the_parameter(layer: nn.Linear) -> None:
    layer.weight = nn.Parameter(layer.weight.detach() * 0.5 - 1)


def change_the_state(layer: nn.Linear) -> None:
    layer.load_state_dict({"weight": layer.weight + 0.25, "bias": layer.bias - 4})


@pytest.mark.parametrize(
    "change",
    [change_in_place, change_behind_its_back, change_the_parameter, change_the_state],
)
@pytest.mark.parametrize("name", BOUNDS)
def test_changed_parameters_change_the_bounds(name: str, change: Callable[[nn.Linear], None]):
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    network = capture(layers, torch.rand(2, 6))
    region, spec = case(network)
    before = often(BOUNDS[name], network, region, spec)
    assert len(programs(network)) == PROGRAMS[name]
    change(layers[0])  # type: ignore[arg-type]
    after = often(BOUNDS[name], network, region, spec)
    assert not torch.equal(before, after)
    assert torch.equal(after, plainly(BOUNDS[name], network, region, spec))


def test_the_work_is_counted() -> None:
    network = ARCHITECTURES["conv"](0)
    counts = []
    for _ in range(4):
        with torch.no_grad(), counting() as work:
            crown_ibp(network, *case(network))
        counts.append(work.passes)
    assert len(programs(network)) == 1
    assert counts[0] > 0
    assert counts == [counts[0]] * 4


def test_rows_in_any_layout_are_left_as_they_were() -> None:
    network = ARCHITECTURES["mlp"](0)
    region, _ = case(network)
    d = torch.zeros(3, 3)
    layouts = [
        torch.randn(3, 3, network.num_classes),
        torch.randn(3, network.num_classes, 3).mT,
        torch.randn(1, 3, network.num_classes).expand(3, -1, -1),
    ]
    for C in layouts:
        kept = C.clone()
        often(crown_ibp, network, region, Spec.functional(C, d))
        assert torch.equal(C, kept)
    assert len(programs(network)) == 3


def test_gradients_are_never_recorded() -> None:
    torch.manual_seed(0)
    network = capture(nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)), torch.rand(2, 4))
    region, spec = case(network)
    often(interval, network, region, spec)
    total = interval(network, region, spec).sum()
    parameters = list(network.module.parameters())
    assert any(bool(g.any()) for g in torch.autograd.grad(total, parameters))


def test_sparse_weights_have_programs_of_their_own() -> None:
    torch.manual_seed(0)
    wide = nn.Linear(160, 160)
    wide.weight.data *= torch.rand(160, 160) < 0.02
    network = capture(nn.Sequential(wide, nn.ReLU(), nn.Linear(160, 3)).eval(), torch.rand(2, 160))
    region, spec = case(network)
    bound = module.recorded(_crown_ibp)
    found = []
    for sparse in (True, False) * 4:
        state = start(network, region, dtype=None, rigorous=False, memory=None, statistics=None)
        if sparse:
            with_sparse_weights(state)
            assert any(v.layout == torch.sparse_csr for v in state.env.values())
        with torch.no_grad():
            found.append(bound(state, *check_spec(state, spec)))
    assert len(programs(network)) >= 1
    for first, second in pairwise(found):
        torch.testing.assert_close(first, second)


def test_few_programs_are_kept() -> None:
    network = ARCHITECTURES["mlp"](0)
    for count in range(1, module.MOST + 9):
        often(interval, network, *case(network, count=count))
    assert 0 < len(programs(network)) <= module.MOST


# -- the tape ----------------------------------------------------------------------------------------------------------


def taped(course: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor) -> Tape:
    tape = Tape([x, y])
    with torch.no_grad(), tape:
        tape.result = course(x, y)  # type: ignore[attr-defined]
    return tape


def _views(x: Tensor, y: Tensor) -> Tensor:
    z = x.clone()
    z[:, 1:] += y[:, 1:]
    z[0].mul_(2)
    unused = z.exp()
    z.add_(1)
    del unused
    return torch.cat([z, x.T.reshape(2, 3)]).flatten(1)


def _several(x: Tensor, y: Tensor) -> Tensor:
    first, second = torch.split(torch.stack([x, y]), 1)
    values, _ = (first - second).abs().max(0)
    return torch.where(values > 0.5, values, torch.zeros_like(values)).clamp_(max=2.0)


def _keywords(x: Tensor, y: Tensor) -> Tensor:
    z = torch.empty_like(x)
    torch.add(input=x, other=y, alpha=2, out=z)
    return torch.clamp(z, min=x, max=y.abs())


@pytest.mark.parametrize("course", [_views, _several, _keywords])
def test_a_written_program_is_the_course_itself(course: Callable[[Tensor, Tensor], Tensor]):
    torch.manual_seed(0)
    tape = taped(course, torch.randn(2, 3), torch.randn(2, 3))
    run = tape.written([tape.result])  # type: ignore[attr-defined]
    assert run is not None
    for _ in range(3):
        x, y = torch.randn(2, 3), torch.randn(2, 3)
        kept = x.clone(), y.clone()
        with torch.no_grad():
            assert torch.equal(run(x, y)[0], course(x, y))
        assert torch.equal(x, kept[0])
        assert torch.equal(y, kept[1])


def _slope(x: Tensor) -> Tensor:
    with torch.enable_grad():
        leaf = x.clone().requires_grad_()
        return torch.autograd.grad((leaf**2).sum(), leaf)[0]


ELSEWHERE = torch.ones(2, 3)
NUMBERS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "a truth": lambda x, y: x + 1 if bool((x > 0).all()) else y + 1,
    "a number": lambda x, y: x * float(y.sum()),
    "an item": lambda x, y: x * y.max().item(),
    "a list": lambda x, y: x * sum(y.flatten().tolist()),
    "an array": lambda x, y: x * y.numpy().max(),
    "an equality": lambda x, y: x + 1 if torch.equal(x, y) else x,
    "positions": lambda x, y: x.sum() * torch.nonzero(y > 0).shape[0],
    "a mask": lambda x, y: x.sum() * y[y > 0].numel(),
    "places": lambda x, y: x.sum() * torch.where(y > 0.5)[0].numel(),
    "a range": lambda x, y: x.sum() + torch.arange(y.sum() + 1).sum(),
    "rows by number": lambda x, y: x[torch.tensor([0, 1])] + y,
    "a selection": lambda x, y: x.sum() + torch.masked_select(y, y > 0).sum(),
    "a tensor from elsewhere": lambda x, y: x + y + ELSEWHERE,
    "a tensor of its own numbers": lambda x, y: x + torch.tensor([float(v) for v in y.shape]).sum(),
    "a derivative": lambda x, y: _slope(x) + y,
    "an input": lambda x, _: x,
}


@pytest.mark.parametrize("name", NUMBERS)
def test_what_depends_on_numbers_is_refused(name: str) -> None:
    x, y = torch.rand(2, 3), torch.rand(2, 3)
    tape = taped(NUMBERS[name], x, y)
    run = tape.written([tape.result])  # type: ignore[attr-defined]
    if name == "an input":  # it does not
        assert run is not None
        assert torch.equal(run(y, x)[0], NUMBERS[name](y, x))
    else:
        assert run is None
        assert tape.refused


def test_a_program_is_written_in_names_of_its_own() -> None:
    def odd(x: Tensor, **_: int) -> Tensor:
        if (
            torch.overrides.has_torch_function_unary(x)
            or torch._C._is_torch_function_mode_enabled()
        ):
            return torch.overrides.handle_torch_function(odd, (x,), x, **_)  # called "add"
        return x + 1

    odd.__name__ = "add"
    x = torch.rand(2, 3)
    for keyword, works in (("k", True), ("k=1), print(", False)):
        tape = taped(lambda a, b, k=keyword: odd(a, **{k: 1}) + b, x, x + 1)
        assert (tape.written([tape.result]) is not None) == works, tape.refused  # type: ignore[attr-defined]


def test_the_same_tensor_twice_is_refused() -> None:
    x = torch.rand(2, 3)
    tape = taped(lambda a, b: a - b, x, x)
    assert tape.written([tape.result]) is None  # type: ignore[attr-defined]
