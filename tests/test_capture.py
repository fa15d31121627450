"""Captured graphs against the modules themselves: in every mode, dtype, batch size, and after training steps."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from calipers.errors import CaptureError
from calipers.graph.capture import capture
from calipers.graph.graph import Network, bind, evaluate


class Fn(nn.Module):
    """A forward function with some layers."""

    def __init__(self, forward: Callable[..., Tensor], **layers: nn.Module) -> None:
        super().__init__()
        self.body = forward
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, x)


class WithTensors(nn.Module):
    """Parameters and buffers that are reshaped, transposed, joined and sliced on their way into the forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(3) + 0.5)
        self.shift = nn.Parameter(torch.rand(3))
        self.register_buffer("mean", torch.rand(1, 3, 1, 1))
        self.weight = nn.Parameter(torch.randn(12, 4))
        self.more = nn.Parameter(torch.randn(1, 12))
        self.plain = torch.rand(5)

    def forward(self, x: Tensor) -> Tensor:
        x = (x - self.mean) / self.scale.view(1, -1, 1, 1) + self.shift[:, None, None]
        matrix = torch.cat([self.weight.t(), self.more], 0)
        return F.linear(x.flatten(1), matrix) + self.plain * self.shift.mean()


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(2, 4, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(4)
        self.short = nn.Conv2d(2, 4, 1, bias=False)
        self.relu = nn.ReLU(inplace=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        y += self.short(x)
        return self.head(F.adaptive_avg_pool2d(self.relu(y), 1).flatten(1))


def chained(m: Fn, x: Tensor) -> Tensor:
    y = m.a(x)
    z = y.add_(1.0)
    z.mul_(2.0)
    y.relu_()
    return m.b(y) + z.mean(1, keepdim=True)


def parts(m: Fn, x: Tensor) -> Tensor:
    h = m.a(x)
    a, b = h.chunk(2, 1)
    c, d, e = torch.split(h, [1, 3, 4], dim=-1)
    f = torch.split(h, 4, 1)
    s = torch.stack([a, b, f[1]], dim=1)
    return torch.cat([c, d * e[:, :3], s.sum(1), s[:, -1]], 1)


def shapes(m: Fn, x: Tensor) -> Tensor:
    y = m.a(x)
    y = y.permute(0, 2, 3, 1).reshape(x.shape[0], -1, 4)
    y = y.transpose(1, 2).contiguous().view(x.size(0), 4, 4, 4)
    y = y.unsqueeze(1).squeeze(1).unflatten(1, (2, 2)).flatten(1, 2)
    y = y.unsqueeze(1).expand(-1, 2, -1, -1, -1)
    return y.flatten(1)[:, ::7]


def slices(m: Fn, x: Tensor) -> Tensor:
    y = m.a(x)
    return torch.cat(
        [y[:, 0, 1:], y[:, -1, ::2], y[..., -1], y[:, 1:3, 0], y[:, :2, -2:].flatten(1)], 1
    )


def arithmetic(m: Fn, x: Tensor) -> Tensor:
    a, b = m.a(x), m.b(x)
    c = torch.sub(a, b, alpha=0.5) + torch.add(a, b, alpha=3)
    d = 1 - a + (2.5 - b) / 4 - 3 + (-c) * 2
    return torch.rsub(a, d, alpha=2) - 0.5 * torch.add(d, 2, alpha=3) + a * b / (b.abs() + 1)


def activations(m: Fn, x: Tensor) -> Tensor:
    a = m.a(x)
    out = [
        F.leaky_relu(a, 0.2),
        F.leaky_relu(a),
        torch.sigmoid(a),
        torch.tanh(a),
        F.hardtanh(a),
        F.relu6(a * 4),
    ]
    out += [
        a.clamp(-0.3, 0.2),
        a.clamp(min=0.1),
        a.clamp(max=0.1),
        a.abs(),
        F.hardtanh(a, -0.2, 0.4),
    ]
    out += [torch.clamp_min(a, 0.0), torch.clamp_max(a, 0.0), F.gelu(a), F.softplus(a)]
    return torch.cat(out, 1)


def pools(m: Fn, x: Tensor) -> Tensor:
    y = m.a(x)
    out = [
        F.avg_pool2d(y, 2),
        F.avg_pool2d(y, 3, 2, 1, count_include_pad=False),
        F.avg_pool2d(y, (3, 2), (2, 1), (1, 0), ceil_mode=True),
        F.max_pool2d(y, 2),
        F.max_pool2d(y, 3, 2, 1),
        F.max_pool2d(y, 3, 2, ceil_mode=True),
        F.max_pool2d(y, 2, 1, 0, 2),
        F.adaptive_avg_pool2d(y, (2, 4)),
        F.pad(y, (1, 0, 2, 1), value=0.5),
        F.pad(y, (1, 1)),
    ]
    return torch.cat([o.flatten(1) for o in out], 1)


def reductions(m: Fn, x: Tensor) -> Tensor:
    y = m.a(x)
    out = [
        y.mean((2, 3)),
        y.mean(1).flatten(1),
        y.sum(dim=(1, -1)),
        y.amax((1, 2)),
        y.mean(-1, keepdim=True).flatten(1),
    ]
    return torch.cat(out, 1)


def sequence(m: Fn, x: Tensor) -> Tensor:
    y = F.max_pool1d(torch.relu(m.a(x)), 2) + F.avg_pool1d(torch.relu(m.a(x)), 2)
    return F.adaptive_avg_pool1d(y, 2).flatten(1)


def functional_weights(m: Fn, x: Tensor) -> Tensor:
    fixed = torch.linspace(-1, 1, 24).reshape(4, 6)
    return F.linear(x, fixed, torch.ones(4)) * torch.tensor([1.0, 2.0, 3.0, 4.0]) + m.a(x)


def _weight_norm() -> nn.Module:
    norm = nn.utils.parametrizations.weight_norm
    return nn.Sequential(norm(nn.Linear(6, 5)), nn.ReLU(), norm(nn.Linear(5, 3)))


class Twice(nn.Module):
    """One layer, called twice, and a second layer that shares its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)
        self.drop = nn.Dropout(0.5)
        self.bn = nn.BatchNorm1d(6)
        self.tied = nn.Linear(6, 6)
        self.tied.weight = self.fc.weight

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(torch.relu(self.fc(x)))
        return self.tied(self.bn(self.fc(y)))


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), (6,)),
    "conv": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 3, 2, 1), nn.ReLU(), nn.Conv2d(4, 4, 2, padding="same", groups=2, dilation=2),
            nn.LeakyReLU(0.1), nn.Flatten(), nn.Linear(36, 3),
        ),
        (2, 5, 6),
    ),
    "residual": (Residual, (2, 4, 4)),
    "dropout": (lambda: nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.ReLU(), nn.Linear(8, 3)), (6,)),
    "twice": (Twice, (6,)),
    "chained": (lambda: Fn(chained, a=nn.Linear(6, 5), b=nn.Linear(5, 3)), (6,)),
    "parts": (lambda: Fn(parts, a=nn.Linear(6, 8)), (6,)),
    "shapes": (lambda: Fn(shapes, a=nn.Conv2d(2, 4, 1)), (2, 4, 4)),
    "slices": (lambda: Fn(slices, a=nn.Conv1d(2, 4, 1)), (2, 5)),
    "arithmetic": (lambda: Fn(arithmetic, a=nn.Linear(6, 4), b=nn.Linear(6, 4)), (6,)),
    "activations": (lambda: Fn(activations, a=nn.Linear(6, 4)), (6,)),
    "pools": (lambda: Fn(pools, a=nn.Conv2d(1, 2, 1)), (1, 6, 8)),
    "reductions": (lambda: Fn(reductions, a=nn.Conv2d(1, 2, 1)), (1, 3, 4)),
    "sequence": (lambda: Fn(sequence, a=nn.Conv1d(2, 3, 3, padding=1)), (2, 8)),
    "transposed": (
        lambda: nn.Sequential(nn.ConvTranspose2d(2, 3, 3, 2, 1, 1, bias=False), nn.Tanh(), nn.Flatten()), (2, 3, 3)
    ),
    "functional_weights": (lambda: Fn(functional_weights, a=nn.Linear(6, 4)), (6,)),
    "weight_norm": (_weight_norm, (6,)),
    "tensors": (WithTensors, (3, 2, 2)),
}  # fmt: skip


@pytest.fixture(scope="module")
def captured() -> Callable[[str], Network]:
    """Captures on demand, once; every test gets a network whose module is a fresh copy."""
    cache: dict[str, Network] = {}

    def get(name: str) -> Network:
        if name not in cache:
            torch.manual_seed(len(name))
            build, shape = NETS[name]
            cache[name] = capture(build().eval(), torch.randn(1, *shape))
        net = cache[name]
        return Network(net.graph, copy.deepcopy(net.module), net.input_shape)

    return get


def walked(net: Network, x: Tensor, **options: object) -> Tensor:
    return evaluate(net.graph, bind(net.graph, net.module, **options), x)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", NETS)
def test_walk_equals_module(name: str, captured: Callable[[str], Network]) -> None:
    net = captured(name)
    assert net.input_shape == NETS[name][1]
    for batch in (1, 2, 5):
        x = torch.randn(batch, *net.input_shape)
        torch.testing.assert_close(walked(net, x), net(x), rtol=1e-6, atol=1e-6)
    assert net.num_classes == net(x).shape[1]
    double = net.in_double()(x)
    for node in net.graph.nodes:  # shapes are the true ones
        assert node.op is not None
        assert node.path is not None
    if name not in ("functional_weights", "tensors"):  # their plain tensors do not follow .double()
        net.module.double()
        torch.testing.assert_close(walked(net, x.double()), net(x.double()), rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(double, net(x.double()), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("name", NETS)
def test_recorded_shapes_are_the_true_ones(name: str, captured: Callable[[str], Network]) -> None:
    net = captured(name)
    env = bind(net.graph, net.module)
    env[net.graph.inputs[0]] = torch.randn(3, *net.input_shape)
    for node in net.graph.nodes:
        env[node.name] = node.op(
            *[_look(a, env) for a in node.args],
            **{k: _look(v, env) for k, v in node.kwargs.items()},
        )
        whole = tuple(env[node.name].shape)
        active = node.name in net.graph.active
        assert node.shape == (whole[1:] if active else whole), node
        assert not active or whole[0] == 3


def _look(value: object, env: dict[str, object]) -> object:
    if isinstance(value, (list, tuple)):
        return [_look(v, env) for v in value]
    return env[value.name] if hasattr(value, "name") else value  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", [n for n in NETS if n not in ("pools", "slices", "shapes")])
def test_parameters_are_live_and_get_gradients(
    name: str, captured: Callable[[str], Network]
) -> None:
    net = captured(name)
    if not list(net.module.parameters()):
        pytest.skip("no parameters")
    x = torch.randn(4, *net.input_shape)
    expected = torch.autograd.grad(
        net(x).square().sum(), list(net.module.parameters()), allow_unused=True
    )
    got = torch.autograd.grad(
        walked(net, x).square().sum(), list(net.module.parameters()), allow_unused=True
    )
    assert any(g is not None and g.abs().sum() > 0 for g in got)
    for e, g in zip(expected, got, strict=True):
        assert (e is None) == (g is None)
        if e is not None:
            torch.testing.assert_close(g, e, rtol=1e-4, atol=1e-5)
    before = walked(net, x).detach()
    optimiser = torch.optim.SGD(net.module.parameters(), lr=0.1)
    for parameter, gradient in zip(net.module.parameters(), expected, strict=True):
        parameter.grad = gradient
    optimiser.step()
    after = walked(net, x)
    torch.testing.assert_close(after, net(x), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(before, after)


@pytest.mark.parametrize("name", ["residual", "twice"])
def test_batch_norm_follows_the_mode(name: str, captured: Callable[[str], Network]) -> None:
    net = captured(name)
    x = 3 + 2 * torch.randn(5, *net.input_shape)
    evaluated = walked(net, x)
    net.module.train()
    state = copy.deepcopy(net.module.state_dict())
    trained = walked(net, x)
    assert all(
        torch.equal(v, state[k]) for k, v in net.module.state_dict().items()
    )  # a walk has no side effects
    torch.testing.assert_close(trained, net(x), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(trained, evaluated, atol=1e-3)
    net.module.load_state_dict(state)
    net.module.eval()
    torch.testing.assert_close(walked(net, x), evaluated)


def test_statistics_replace_those_of_the_batch(captured: Callable[[str], Network]) -> None:
    """In training mode with a clean batch's statistics bound, the walk on that batch is the training-mode output,
    and one example alone gives the same output as within the batch."""
    net = captured("residual")
    net.module.train()
    x = 1 + torch.randn(6, *net.input_shape)
    seen: dict[str, Tensor] = {}

    def record(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], _: Tensor) -> None:
            seen[f"{name}.running_mean"] = args[0].mean((0, 2, 3))
            seen[f"{name}.running_var"] = args[0].var((0, 2, 3), unbiased=False)

        return hook

    for name in ("bn1", "bn2"):
        net.module.get_submodule(name).register_forward_hook(record(name))
    expected = net(x)
    got = walked(net, x, statistics=seen)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    # gradients flow through the statistics: they are those of the training-mode pass
    parameters = list(net.module.parameters())
    slopes = torch.autograd.grad(got.square().sum(), parameters, retain_graph=True)
    for a, b in zip(slopes, torch.autograd.grad(expected.square().sum(), parameters), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    expected, seen = expected.detach(), {k: v.detach() for k, v in seen.items()}
    torch.testing.assert_close(
        walked(net, x[:1], statistics=seen), expected[:1], rtol=1e-4, atol=1e-5
    )


def test_dropout_follows_the_mode(captured: Callable[[str], Network]) -> None:
    net = captured("dropout")
    x = torch.randn(5, 6)
    net.module.train()
    torch.manual_seed(3)
    expected = net(x)
    torch.manual_seed(3)
    torch.testing.assert_close(walked(net, x), expected)
    assert not torch.allclose(expected, net(x))
    net.module[1].eval()  # the mode is each layer's own
    torch.testing.assert_close(walked(net, x), net(x))
    torch.testing.assert_close(walked(net, x), walked(net, x))


def test_in_double_is_float64_arithmetic(captured: Callable[[str], Network]) -> None:
    net = captured("mlp")
    x = torch.randn(3, 6)
    first, last = net.module[0], net.module[2]
    hidden = (x.double() @ first.weight.double().T + first.bias.double()).clamp_min(0)
    expected = hidden @ last.weight.double().T + last.bias.double()
    torch.testing.assert_close(net.in_double()(x), expected, rtol=1e-14, atol=1e-14)


def test_cast_is_differentiable(captured: Callable[[str], Network]) -> None:
    net = captured("mlp")
    walked(net, torch.randn(3, 6).double(), dtype=torch.float64).sum().backward()
    assert net.module[0].weight.grad is not None
    assert net.module[0].weight.grad.dtype == torch.float32


def test_mode_is_restored_module_by_module() -> None:
    net = nn.Sequential(
        nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Sequential(nn.Dropout(), nn.Linear(4, 2))
    )
    net.train()
    net[1].eval()
    modes = [m.training for m in net.modules()]
    state = copy.deepcopy(net.state_dict())
    capture(net, torch.randn(3, 4))
    assert [m.training for m in net.modules()] == modes
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in net.parameters())
    with pytest.raises(CaptureError):
        capture(nn.Sequential(net, nn.Softmax(0)), torch.randn(3, 4))
    assert [m.training for m in net.modules()] == modes


def test_missing_parameter_is_named(captured: Callable[[str], Network]) -> None:
    net = captured("mlp")
    with pytest.raises(CaptureError, match=r"0\.weight.*capture the module again"):
        bind(net.graph, nn.Sequential(nn.ReLU(), nn.Linear(6, 8)))


def viewed_before(m: Fn, x: Tensor) -> Tensor:
    y = m.a(x)
    v = y.view(-1, 2, 2)
    y.relu_()
    return v.flatten(1)


def view_of_view(m: Fn, x: Tensor) -> Tensor:
    y = m.a(x)
    w = y.view(-1, 2, 2)[:, 0]
    y.relu_()
    return w + y[:, :2]


def part_overwritten(m: Fn, x: Tensor) -> Tensor:
    y = m.a(x)
    y[:, :2].add_(1.0)
    return y


def part_assigned(m: Fn, x: Tensor) -> Tensor:
    y = m.a(x)
    y[:, 0] = 0.0
    return y


def overwritten_input(m: Fn, x: Tensor) -> Tensor:
    return m.a(x.mul_(2.0))


def branching(m: Fn, x: Tensor) -> Tensor:
    return m.a(x) if x.sum() > 0 else -m.a(x)


def forward_with_plain_random(m: Fn, x: Tensor) -> Tensor:
    return m.a(x) + torch.randn(4)


REFUSED: dict[str, tuple[Callable[..., object], str | None]] = {
    "centred over the batch": (lambda m, x: m.a(x) - m.a(x).mean(0, keepdim=True), "mixes"),
    "mean over everything": (lambda m, x: m.a(x) - x.mean(), "mixes"),
    "largest of all": (lambda m, x: m.a(x) / x.abs().max(), "mixes"),
    "normalised by the batch's norm": (lambda m, x: m.a(x) / x.norm(), "mixes"),
    "softmax over the batch": (lambda m, x: m.a(x).softmax(0), "mixes the examples"),
    "reversed batch": (lambda m, x: m.a(x).flip(0), "rest of its batch"),
    "cumulated over the batch": (lambda m, x: m.a(x).cumsum(0), "rest of its batch"),
    "gram matrix": (lambda m, x: m.a(x) @ m.a(x).T, None),
    "batch moved": (lambda m, x: m.a(x).transpose(0, 1), "batch"),
    "first example only": (lambda m, x: m.a(x)[0] + m.a(x), "batch"),
    "half of the batch": (lambda m, x: m.a(x)[: x.shape[0] // 2], None),
    "batch into features": (lambda m, x: m.a(x).reshape(1, -1), None),
    "batch size as a number": (lambda m, x: m.a(x) * x.shape[0], "batch size"),
    "constant per example": (lambda m, x: m.a(x) + torch.arange(x.shape[0])[:, None], "batch size"),
    "batch joined": (lambda m, x: torch.cat([m.a(x), m.a(x)], 0), "batch"),
    "view kept": (viewed_before, "overwrites memory"),
    "view of a view kept": (view_of_view, "overwrites memory"),
    "part overwritten": (part_overwritten, "overwrites memory"),
    "part assigned": (part_assigned, "in place"),
    "input overwritten": (overwritten_input, "overwrites memory"),
    "in place without a rule": (lambda m, x: F.threshold(m.a(x), 0.1, 0.0, inplace=True), "in place"),
    "two outputs": (lambda m, x: (m.a(x), x), "2 values"),
    "one output in a tuple": (lambda m, x: (m.a(x),), "logits alone"),
    "output without classes": (lambda m, x: m.a(x).sum(1), "logits"),
    "output of rank 3": (lambda m, x: m.a(x).unsqueeze(1), "logits"),
    "branch on values": (branching, "control flow"),
    "random": (forward_with_plain_random, "at random"),
    "dropout that never stops": (lambda m, x: F.dropout(m.a(x), 0.5), "at random"),
    "divisor of a pool": (
        lambda m, x: F.avg_pool2d(m.a(x)[:, None, None], (1, 2), divisor_override=3).flatten(1), "divisor_override",
    ),
    "batch last": (lambda m, x: torch.einsum("bi,ij->jb", x, m.a.weight.T), "mixes the batch"),
    "reflection": (lambda m, x: F.pad(m.a(x)[:, None], (1, 1), mode="reflect").flatten(1), "reflect"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_bounded_per_example_is_refused(what: str) -> None:
    forward, message = REFUSED[what]
    with pytest.raises(CaptureError, match=message):
        capture(Fn(forward, a=nn.Linear(6, 4)), torch.randn(2, 6))  # type: ignore[arg-type]


def test_bad_arguments() -> None:
    with pytest.raises(CaptureError, match=r"expected an nn\.Module, got function"):
        capture(lambda x: x, torch.randn(2, 6))  # type: ignore[arg-type]
    with pytest.raises(CaptureError, match="no batch"):
        capture(nn.Linear(6, 2), torch.randn(6))
    with pytest.raises(CaptureError, match="no batch"):
        capture(nn.Linear(6, 2), torch.randn(0, 6))
    with pytest.raises(CaptureError):
        capture(nn.Linear(6, 2), torch.randn(2, 5))
    with pytest.raises(CaptureError, match="batch of one"):
        capture(
            nn.Sequential(nn.Linear(6, 2), nn.BatchNorm1d(2, track_running_stats=False)),
            torch.randn(2, 6),
        )


def test_wrong_lowering_is_caught_at_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    """A planted fault: a table entry that computes something else does not survive capture."""
    from calipers.graph import capture as module

    monkeypatch.setitem(
        module.LOWER, torch.ops.aten.sigmoid.default, lambda c: (torch.tanh, (c.args[0],))
    )
    with pytest.raises(CaptureError, match="does not reproduce"):
        capture(nn.Sequential(nn.Linear(6, 2), nn.Sigmoid()), torch.randn(2, 6))


@pytest.fixture(autouse=True)
def _no_side_effects() -> Iterator[None]:
    yield
    assert torch.is_grad_enabled()
