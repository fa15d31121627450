"""The bounds themselves: rounding, gradients, refusals, intermediate bounds, and identities with dense matrices."""

from __future__ import annotations

import importlib
import itertools
import math
import re
from dataclasses import replace
from fractions import Fraction
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import networks
import rationals
from calipers import bound as api_bound
from calipers.bounds import crown, crown_ibp, interval, ladder, linear, preactivations
from calipers.bounds.interval import propagate
from calipers.bounds.state import start
from calipers.bracket import Bracket, Evidence, Verdict
from calipers.errors import UnsupportedOp
from calipers.graph import primitives as prim
from calipers.graph.capture import capture
from calipers.graph.graph import Network, concrete, walk
from calipers.graph.graph import bind as bind_values
from calipers.ops import OPS, Affine, register
from calipers.sets import Interval, Region, ThreatModel
from calipers.spec import Spec
from calipers.work import counting
from differences import check_gradients
from networks import ARCHITECTURES, Builder
from sandwiches import PASSES

F32, F64 = torch.float32, torch.float64
INF = math.inf


def setting(network: Network, p: float = INF, eps: float = 0.1, count: int = 3):
    x = networks.inputs(network, count, 11)
    return Region.ball(x, eps, p, 0.0, 1.0), Spec.label(torch.arange(count) % 3, 3)


# -- rounding ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", PASSES)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_rigour_costs_little_and_never_adds(name: str, method: str) -> None:
    network = ARCHITECTURES[name](1)
    region, spec = setting(network, 2.0, 0.3)
    for dtype in (F64, F32):
        plain = PASSES[method](network, region, spec, dtype=dtype)
        careful = PASSES[method](network, region, spec, dtype=dtype, rigorous=True)
        assert (careful < plain).all()
        assert (plain - careful <= 2e4 * torch.finfo(dtype).eps * (1 + plain.abs())).all()


def members(region: Region) -> list[Tensor]:
    """The centre and the corners of a float32 box (the region is a ball of the maximum norm)."""
    low, high = region.inner(F32)
    n = low[0].numel()
    masks = [torch.tensor(m) for m in itertools.product([False, True], repeat=n)]
    return [region.center.float(), *(torch.where(m, high, low) for m in masks)]


def cancelling(seed: int, size: float) -> Network:
    """A Zombori-style net: huge weights that cancel exactly in real arithmetic and leave a small term, which float32
    loses: h = relu(size·s(x) + small(x)), out = h − size·s(x)."""
    b = Builder((2,), seed)
    s = torch.rand(1, 2, generator=b.generator).round(decimals=2) + 0.5
    small = b.rand(1, 2, scale=1e-2)
    first = torch.cat([s * size, small, -small, torch.ones(1, 2)])
    offset = torch.tensor([size, 1.0, 1.0, size])
    h = b.relu(b(F.linear, b.x, first, offset))
    second = torch.tensor([[1.0, 1.0, 0.0, 0.0], [1.0, 0.0, 1.0, 0.0], [0.0, 0.0, 1.0, 1.0]])
    h = b.relu(b(F.linear, h, second, b.rand(3)))
    b(F.linear, h, torch.tensor([[1.0, -1.0, 0.0], [0.0, 0.0, 1e-8], [0.0, 1e-8, 0.0]]), b.rand(3))
    return b.network()


def shortfall(network: Network, method: str, dtype: torch.dtype, rigorous: bool, eps: float):
    """How far a bound exceeds the exact value at a member, in exact arithmetic: positive is unsound."""
    region, spec = setting(network, INF, eps, 2)
    low = PASSES[method](network, region, spec, dtype=dtype, rigorous=rigorous).tolist()
    worst = Fraction(-(10**30))
    for x in members(region):
        assert region.contains(x).all()
        for row, bounds in zip(rationals.functionals(network, spec, x), low, strict=True):
            for value, lower in zip(row, bounds, strict=True):
                worst = max(worst, Fraction(lower) - value)
    return float(worst)


@pytest.mark.parametrize("method", PASSES)
@pytest.mark.parametrize("eps", [0.0, 1e-7, 1e-3])
def test_rigorous_bounds_hold_in_exact_arithmetic(method: str, eps: float) -> None:
    nets = [networks.mlp(seed, (3, 4, 4, 3)) for seed in range(6)]
    nets += [cancelling(seed, size) for seed in range(4) for size in (1e4, 1e8)]
    for network in nets:
        for dtype in (F32, F64):
            assert shortfall(network, method, dtype, True, eps) <= 0


@pytest.mark.parametrize("method", PASSES)
def test_float32_alone_is_not_rigorous(method: str) -> None:
    """The construction does bite: without rounding taken into account float32 certifies what is false."""
    assert max(shortfall(cancelling(s, 1e8), method, F32, False, 0.0) for s in range(4)) > 1e-3


def test_a_certificate_of_the_public_call_is_exact() -> None:
    network = cancelling(0, 1e8)
    x = networks.inputs(network, 2, 11)
    y, threat = torch.tensor([0, 1]), ThreatModel(INF, 1e-3)
    low = api_bound(network, x, y, threat)
    assert low.dtype == F64
    region, spec = threat.around(x), Spec.label(y, 3)
    for point in members(region):
        for row, bounds in zip(
            rationals.functionals(network, spec, point), low.tolist(), strict=True
        ):
            assert all(Fraction(b) <= v for v, b in zip(row, bounds, strict=True))


# -- gradients -----------------------------------------------------------------------------------------------

DIFFERENTIABLE = [m for m in PASSES if m != "alpha_crown"]
SMOOTH = [n for n in ARCHITECTURES if n not in ("affine", "max_pool")]


@pytest.mark.parametrize("method", DIFFERENTIABLE)
@pytest.mark.parametrize("name", SMOOTH)
def test_gradients_against_finite_differences(name: str, method: str) -> None:
    network = ARCHITECTURES[name](2)
    module: Any = network.module.double()
    names = [n for n in network.graph.params if getattr(module, n).is_floating_point()]
    first, last = names[0], names[-1]
    x = networks.inputs(network, 2, 5).double() * 0.5 + 0.25
    spec = Spec.label(torch.tensor([0, 1]), 3)
    for p in (INF, 2.0):

        def low(center: Tensor, a: Tensor, b: Tensor) -> Tensor:
            setattr(module, first, a)
            setattr(module, last, b)
            region = Region.ball(center, 0.05, p, -1.0, 2.0)  # noqa: B023
            return PASSES[method](network, region, spec).sum()

        given = [x, getattr(module, first).detach(), getattr(module, last).detach()]
        leaves = [v.clone().requires_grad_() for v in given]
        gradients = torch.autograd.grad(low(*leaves), leaves)
        check_gradients(low, given, gradients, p)
        setattr(module, first, given[1])
        setattr(module, last, given[2])


@pytest.mark.parametrize("method", DIFFERENTIABLE)
def test_gradcheck(method: str) -> None:
    network = networks.mlp(3, (2, 3, 3))
    module: Any = network.module.double()
    x = networks.inputs(network, 2, 5).double() * 0.5 + 0.25
    spec = Spec.label(torch.tensor([0, 1]), 3)
    weights = [getattr(module, n) for n in network.graph.params]

    def low(center: Tensor, *values: Tensor) -> Tensor:
        for n, value in zip(network.graph.params, values, strict=True):
            setattr(module, n, value)
        return PASSES[method](network, Region.ball(center, 0.05, INF, -1.0, 2.0), spec)

    leaves = [v.detach().clone().requires_grad_() for v in (x, *weights)]
    assert torch.autograd.gradcheck(low, leaves)


# -- parameters are looked up at each call ---------------------------------------------------------------------


def step_of_an_optimiser(module: Any) -> None:
    module[1].weight.grad = torch.ones_like(module[1].weight)
    torch.optim.SGD(module.parameters(), lr=0.1).step()


def write_through_data(module: Any) -> None:
    module[1].weight.data.mul_(-1.5)  # leaves no trace in the tensor's version


def write_through_numpy(module: Any) -> None:
    module[1].weight.detach().numpy()[:] *= -1.5


def swap_data(module: Any) -> None:
    module[1].weight.data = module[1].weight.data * -1.5


def load_state(module: Any) -> None:
    module.load_state_dict({k: v * 1.5 for k, v in module.state_dict().items()})


def replace_parameter(module: Any) -> None:
    module[3].weight = nn.Parameter(module[3].weight.detach() * -1.5)


def replace_buffer(module: Any) -> None:
    module[2].running_var = module[2].running_var * 4


def replace_module(module: Any) -> None:
    module[1] = nn.Linear(4, 5)


CHANGES = [
    step_of_an_optimiser,
    write_through_data,
    write_through_numpy,
    swap_data,
    load_state,
    replace_parameter,
    replace_buffer,
    replace_module,
    lambda module: module.double(),
    lambda module: module[1].requires_grad_(requires_grad=False).bfloat16().float(),
]


@pytest.mark.parametrize("method", PASSES)
def test_bounds_follow_the_module(method: str) -> None:
    """Whatever happens to its parameters between two calls, the bounds are those of a network captured afresh."""

    def fresh() -> Any:
        torch.manual_seed(5)
        linear, last = nn.Linear(4, 5), nn.Linear(5, 3)
        return nn.Sequential(nn.Flatten(), linear, nn.BatchNorm1d(5), last, nn.ReLU()).eval()

    network = capture(fresh(), torch.rand(2, 4))
    region, spec = setting(network)
    for change in CHANGES:
        module = fresh()
        network = Network(network.graph, module, network.input_shape)
        with torch.no_grad():
            before = PASSES[method](network, region, spec)
        torch.manual_seed(6)
        change(module)
        after = PASSES[method](network, region, spec)
        like = torch.rand(2, 4, dtype=network.dtype)
        again = PASSES[method](capture(module, like), region, spec)
        assert after.dtype == again.dtype == network.dtype
        assert torch.equal(after, again), change
        assert not torch.equal(before.to(after.dtype), after), change
        if (
            method in DIFFERENTIABLE and module[3].weight.requires_grad
        ):  # and gradients flow, whatever ran without them before
            (gradient,) = torch.autograd.grad(after.sum(), module[3].weight)
            assert gradient.abs().sum() > 0


@pytest.mark.parametrize("method", PASSES)
def test_bounds_follow_the_op_table(method: str) -> None:
    network = networks.mlp(0)
    region, spec = setting(network)
    before = PASSES[method](network, region, spec)
    relu: Any = OPS[torch.relu]

    def wide(x: Interval) -> Interval:
        return Interval(relu.image(x).lower, relu.image(x).upper + 1.0)

    try:
        register(torch.relu, replace(relu, image=wide))
        assert (PASSES["interval"](network, region, spec) < before - 1e-3).all()
        if method != "interval":
            assert not torch.equal(PASSES[method](network, region, spec), before)
    finally:
        register(torch.relu, relu)
    assert torch.equal(PASSES[method](network, region, spec), before)


# -- modes and refusals ------------------------------------------------------------------------------------


def with_norm() -> tuple[nn.Module, Network]:
    module = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3))
    return module, capture(module, torch.rand(2, 4))


@pytest.mark.parametrize("method", PASSES)
def test_training_mode_needs_statistics(method: str) -> None:
    module, network = with_norm()
    region, spec = setting(network)
    module.train()
    with pytest.raises(ValueError, match="training mode"):
        PASSES[method](network, region, spec)
    mean, var = torch.randn(5), torch.rand(5) + 0.1
    given = PASSES[method](
        network, region, spec, statistics={"1.running_mean": mean, "1.running_var": var}
    )
    norm: Any = module[1]
    norm.running_mean, norm.running_var = mean, var
    module.eval()
    assert torch.allclose(given, PASSES[method](network, region, spec), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", PASSES)
def test_every_unsupported_op_is_named(method: str) -> None:
    b = Builder((4,))
    h = b(torch.tan, b.linear(b.x, 4))
    b.linear(b(torch.lgamma, b.relu(h)), 3)
    network = b.network()
    region, spec = setting(network)
    with pytest.raises(UnsupportedOp, match=r"(?s)tan.*lgamma") as error:
        PASSES[method](network, region, spec)
    assert not re.search(r"relu|linear", str(error.value))


@pytest.mark.parametrize("method", PASSES)
@pytest.mark.parametrize("memory", [None, 1])
def test_misfits_are_refused(method: str, memory: int | None) -> None:
    network = networks.mlp(0)
    region, spec = setting(network)
    eye = torch.eye(3).expand(3, 3, 3)
    wrong = [
        (region, Spec.functional(torch.ones(3, 2, 4))),  # outputs
        (region, Spec.functional(eye[:2])),  # examples
        (region, Spec.functional(torch.eye(3).expand(4, 3, 3))),
        (Region.ball(torch.rand(3, 5), 0.1, INF), spec),  # features
        (Region.ball(torch.rand(3, 1, 4), 0.1, INF), spec),
    ]
    for r, s in wrong:
        with pytest.raises(ValueError, match=r"region|spec"):
            PASSES[method](network, r, s, memory=memory)


@pytest.mark.parametrize("method", PASSES)
@pytest.mark.parametrize("bad", [math.nan, INF, -INF])
@pytest.mark.parametrize("name", ["mlp", "conv", "max_pool", "product", "sigmoid"])
def test_bad_weights_are_never_robust(name: str, bad: float, method: str) -> None:
    for place in range(len(ARCHITECTURES[name](0).graph.params)):
        network = ARCHITECTURES[name](0)
        module: Any = network.module
        value = getattr(module, f"p{place}")
        if name in ("conv", "max_pool") and place > 3:
            continue  # enough
        value.view(-1)[0] = bad
        region, spec = setting(network, INF, 0.01)
        C = torch.eye(3).expand(3, 3, 3)  # all outputs, and their negatives
        spec = Spec.functional(torch.cat([C, -C], 1))
        low = PASSES[method](network, region, spec, dtype=F64, rigorous=True)
        values = spec.values(network.in_double()(region.center))
        robust = Bracket.from_bound(spec.margin(low), Evidence(method)).verdict()
        assert Verdict.ROBUST not in robust
        # an infinite weight may leave finite bounds only where they hold
        known = torch.isfinite(values)
        assert not (low > values + 1e-9)[known].any()
        assert not (torch.isfinite(low) & torch.isnan(values)).any() or bad != bad


@pytest.mark.parametrize("method", PASSES)
def test_unbounded_regions(method: str) -> None:
    """No finite bound where there is none; finite ones where the unbounded feature does not count."""
    b = Builder((2,))
    h = b(F.linear, b.x, torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.zeros(2))
    b(F.linear, b.relu(h), torch.tensor([[1.0, 1.0], [0.0, 0.5]]))
    network = b.network()
    region = Region.box(torch.tensor([[-1.0, -INF]]), torch.tensor([[2.0, INF]]))
    spec = Spec.functional(torch.tensor([[[1.0, 0.0], [-1.0, 0.0], [0.0, -1.0]]]))
    for rigorous in (False, True):
        low = PASSES[method](network, region, spec, dtype=F64, rigorous=rigorous)[0]
        assert not (low[1:] > -INF).any()  # truly unbounded: -inf or NaN, nothing else
        assert not low[0] > 0  # the minimum is 0
    one_sided = Region.box(torch.tensor([[1.0, 0.5]]), torch.tensor([[2.0, INF]]))
    low = PASSES[method](network, one_sided, spec, dtype=F64)[0]
    assert not low[0] > 1.5 + 1e-12  # x0 + x1 >= 1.5
    assert not (low[1:] > -INF).any()


# -- intermediate bounds ------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [1.0, 2.0, INF])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_preactivations(name: str, p: float) -> None:
    """Tight boxes inside loose ones, and every value of every sampled member inside both."""
    network = ARCHITECTURES[name](3)
    region, _ = setting(network, p, 0.5)
    loose = preactivations(network, region, tight=False, dtype=F64)
    tight = preactivations(network, region, dtype=F64)
    careful = preactivations(network, region, dtype=F64, rigorous=True)
    assert set(loose) == set(tight) == network.graph.active
    samples = [region.sample(torch.arange(3) + 3 * i, F64) for i in range(20)]
    samples += [region.maximizer(torch.randn(region.center.shape, dtype=F64)) for _ in range(20)]
    env = bind_values(network.graph, network.module, dtype=F64)
    traces = [walk(network.graph, {**env, "x": x}, concrete) for x in samples]
    shrunk = False
    for value, box in tight.items():
        size = 1e-12 * (1 + loose[value].lower.abs() + loose[value].upper.abs())
        assert (box.lower >= loose[value].lower - size).all(), value
        assert (box.upper <= loose[value].upper + size).all(), value
        shrunk |= bool((box.upper < loose[value].upper - 1e-6).any())
        assert (careful[value].lower <= box.lower + size).all()
        for trace in traces:
            assert (trace[value] >= box.lower - size).all(), value
            assert (trace[value] <= box.upper + size).all(), value
            assert (trace[value] >= careful[value].lower - 1e-15).all(), value
    assert shrunk or name in ("affine", "ends_nonlinear") or p == INF


def test_last_layer_elision_is_the_formula() -> None:
    """min of C·(W·h + b) over h in [l, u] is Σ max(CW, 0)·l + min(CW, 0)·u + C·b: tighter than through the logits."""
    network = networks.mlp(5, (4, 6, 3))
    region, spec = setting(network)
    module: Any = network.module
    (w1, b1, w2, b2) = (getattr(module, n).double().numpy() for n in ("p0", "p1", "p2", "p3"))
    low, high = (e.numpy() for e in region.hull())
    middle, half = (low + high) / 2, (high - low) / 2
    center, radius = middle @ w1.T + b1, half @ np.abs(w1).T
    l, u = np.maximum(center - radius, 0), np.maximum(center + radius, 0)
    merged = spec.C.double().numpy() @ w2
    expected = (
        np.einsum("bmk,bk->bm", np.maximum(merged, 0), l)
        + np.einsum("bmk,bk->bm", np.minimum(merged, 0), u)
        + spec.C.double().numpy() @ b2
    )
    found = interval(network, region, spec, dtype=F64).numpy()
    assert np.abs(found - expected).max() <= 1e-13 * (1 + np.abs(expected).max())
    mid, rad = (l + u) / 2 @ w2.T + b2, (u - l) / 2 @ np.abs(w2).T
    logits = np.einsum("bmk,bk->bm", spec.C.double().numpy(), mid) - np.einsum(
        "bmk,bk->bm", np.abs(spec.C.double().numpy()), rad
    )
    assert (found >= logits - 1e-12).all()
    assert (found > logits + 1e-3).any()


def test_crown_of_one_layer_is_the_formula() -> None:
    """One hidden ReLU layer, written out in numpy: the chord above, slope 0 or 1 below."""
    network = networks.mlp(6, (4, 6, 3))
    region, spec = setting(network, INF, 0.3)
    module: Any = network.module
    (w1, b1, w2, b2) = (getattr(module, n).double().numpy() for n in ("p0", "p1", "p2", "p3"))
    low, high = (e.numpy() for e in region.hull())
    middle, half = (low + high) / 2, (high - low) / 2
    center, radius = middle @ w1.T + b1, half @ np.abs(w1).T
    l, u = center - radius, center + radius
    chord = np.where(l >= 0, 1.0, np.where(u <= 0, 0.0, u / (u - l)))
    offset = np.where((l < 0) & (u > 0), -chord * l, 0.0)
    below = np.where(l >= 0, 1.0, np.where(u <= 0, 0.0, u > -l))
    A = spec.C.double().numpy() @ w2
    plus, minus = np.maximum(A, 0), np.minimum(A, 0)
    rows = plus * below[:, None] + minus * chord[:, None]
    bias = np.einsum("bmk,bk->bm", minus, offset) + spec.C.double().numpy() @ b2
    rows_in, bias = rows @ w1, bias + rows @ b1
    expected = (
        np.einsum("bmi,bi->bm", rows_in, middle)
        - np.einsum("bmi,bi->bm", np.abs(rows_in), half)
        + bias
    )
    found = crown(network, region, spec, dtype=F64, raw=True).numpy()
    assert np.abs(found - expected).max() <= 1e-12


# -- convolutions are matrices -------------------------------------------------------------------------------


def as_matrices(network: Network) -> Network:
    """Every convolution of ``network`` replaced by a dense layer between reshapes, the matrix written out by loops."""
    b = Builder(network.input_shape)
    module: Any = network.module
    names: dict[str, Any] = {"x": b.x}

    def arg(item: Any) -> Any:
        if isinstance(item, list):
            return [arg(i) for i in item]
        if hasattr(item, "name"):
            return names.get(item.name) or getattr(module, item.name)
        return item

    for node in network.graph.nodes:
        args = [arg(a) for a in node.args]
        if node.op is torch.conv2d:
            h, w, bias, stride, padding = args
            matrix = conv_matrix(w.double().numpy(), b.size(h), stride, padding)
            spread = bias.repeat_interleave(math.prod(node.shape[1:]))
            flat = b(F.linear, b.flat(h), torch.from_numpy(matrix), spread)
            names[node.name] = b(prim.reshape, flat, node.shape)
        else:
            names[node.name] = b(node.op, *args, **node.kwargs)
    return b.network(F64)


def conv_matrix(w: np.ndarray, shape: tuple[int, ...], stride: Any, padding: Any) -> np.ndarray:
    c, height, width = shape
    out, _, kh, kw = w.shape
    rows = (height + 2 * padding[0] - kh) // stride[0] + 1
    cols = (width + 2 * padding[1] - kw) // stride[1] + 1
    matrix = np.zeros((out, rows, cols, c, height, width))
    for o, i, j, ch, a, e in itertools.product(*map(range, (out, rows, cols, c, kh, kw))):
        y, x = i * stride[0] - padding[0] + a, j * stride[1] - padding[1] + e
        if 0 <= y < height and 0 <= x < width:
            matrix[o, i, j, ch, y, x] += w[o, ch, a, e]
    return matrix.reshape(out * rows * cols, c * height * width)


def skip_net(seed: int) -> Network:
    """A skip around a block of another stride, twice, and an unequal sum of windows; a wide, low map."""
    b = Builder((2, 5, 9), seed)
    h = b.conv(b.x, 3)
    for _ in range(2):
        main = b.conv(b.relu(b.norm(b.conv(h, 3, 3, 2, 1))), 3, 3, 1, 1)
        h = b.norm(b(torch.add, main, b.conv(h, 3, 1, 2, 0)))
        h = b(torch.add, h, b(torch.neg, b.conv(b.relu(h), 3, 3)))
    b.linear(b.relu(b.conv(h, 2, 2, 1, 1)), 3)
    return b.network()


def wide_net(seed: int) -> Network:
    """Large maps, so that rows stay windows through several layers; even kernels, uneven strides."""
    b = Builder((1, 16, 14), seed)
    h = b.relu(b.conv(b.x, 2, 3, 1, 1))
    h = b.relu(b.conv(b.norm(b.conv(h, 2, 2, 1, 1)), 2, 3, 2, 1))
    h = b(torch.tanh, b.conv(h, 2, 3, 1, 0))
    h = b(torch.add, h, b.conv(b(torch.abs, b.conv(h, 3, 3)), 2, 1, 1, 0))
    b.linear(b(prim.average_pool, b.relu(h), (2, 2), (2, 2), (0, 0)), 3)
    return b.network()


CONVOLUTIONAL = {
    **{k: ARCHITECTURES[k] for k in ("conv", "residual", "bottleneck", "max_pool", "affine")},
    "skip": skip_net,
    "wide": wide_net,
}


@pytest.mark.parametrize("p", [2.0, INF])
@pytest.mark.parametrize("name", CONVOLUTIONAL)
def test_a_convolution_equals_its_matrix(name: str, p: float) -> None:
    network = CONVOLUTIONAL[name](7)
    twin = as_matrices(network)
    region, spec = setting(network, p, 0.3)
    x = networks.inputs(network, 3, 2).double()
    assert torch.allclose(network.in_double()(x), twin(x), rtol=1e-12, atol=1e-12)
    for method, bound in PASSES.items():
        for rigorous in (False, True):
            a = bound(network, region, spec, dtype=F64, rigorous=rigorous)
            b = bound(twin, region, spec, dtype=F64, rigorous=rigorous)
            assert ((a - b).abs() <= 1e-9 * (1 + b.abs())).all(), (method, (a - b).abs().max())
    # windows all the way: every neuron's own box, which dense rows must reproduce
    tight, dense = (
        preactivations(network, region, dtype=F64),
        preactivations(twin, region, dtype=F64),
    )
    for node in network.graph.nodes:
        if node.op is not torch.relu:
            continue
        same = [n for n in twin.graph.nodes if n.op is torch.relu and n.shape == node.shape]
        gaps = [
            max(
                (dense[n.name].lower - tight[node.name].lower).abs().max().item(),
                (dense[n.name].upper - tight[node.name].upper).abs().max().item(),
            )
            for n in same
        ]
        assert min(gaps) <= 1e-9, node.name


def test_crown_never_loses_to_its_own_rungs() -> None:
    for name, make in ARCHITECTURES.items():
        network = make(9)
        region, spec = setting(network, 2.0, 0.4)
        rungs = [f(network, region, spec, dtype=F64) for f in (interval, crown_ibp, crown)]
        assert (rungs[1] >= rungs[0] - 1e-12).all(), name
        assert (rungs[2] >= rungs[1] - 1e-12).all(), name


def test_what_follows_a_refined_value_uses_its_new_width() -> None:
    narrowed = 0
    for seed in range(10):
        b = Builder((2,), seed)
        m = b(torch.mul, b.linear(b.x, 3), b.linear(b.x, 3))
        r = b.relu(m)  # m is refined here
        w, c = b.rand(2, 3), b.rand(2)
        t = b(F.linear, m, w, c)
        b(torch.add, t, b.linear(r, 2))
        network = b.network(F64)
        x = torch.randn(1, 2, generator=b.generator, dtype=F64)
        region = Region.ball(x, 0.5, INF)
        loose, tight = (preactivations(network, region, tight=v) for v in (False, True))
        low, high = tight[m.name]
        narrowed += bool((high - low < loose[m.name].upper - loose[m.name].lower - 1e-3).any())
        center = F.linear((low + high) / 2, w.double(), c.double())
        radius = F.linear((high - low) / 2, w.double().abs())
        assert torch.allclose(tight[t.name].lower, center - radius, rtol=0, atol=1e-12)
        assert torch.allclose(tight[t.name].upper, center + radius, rtol=0, atol=1e-12)
    assert narrowed >= 3


def test_values_after_a_refined_one() -> None:
    """A refined value that affine ops read later is no longer centred on the reference; nor is what they make of it."""
    grid = torch.linspace(-1, 1, 101, dtype=F64)
    offsets = torch.cartesian_prod(grid, grid)
    narrowed = 0
    for seed in range(40):
        b = Builder((2,), seed)
        h = b(F.linear, b.relu(b(F.linear, b.x, b.rand(4, 2))), b.rand(1, 4), b.rand(1))
        branch = b(F.linear, b.relu(h), torch.zeros(1, 1))  # h is read, and refined, here
        t = b(F.linear, b(torch.add, h, branch), b.rand(1, 1))
        t = b(F.linear, b(torch.neg, t), b.rand(1, 1))
        b(torch.tanh, t)
        network = b.network(F64)
        x = torch.randn(1, 2, generator=b.generator, dtype=F64)
        region = Region.ball(x, 1.0, INF)
        loose, tight = (preactivations(network, region, tight=v) for v in (False, True))
        narrowed += bool((tight[h.name].upper < loose[h.name].upper - 1e-3).any())
        env = bind_values(network.graph, network.module)
        for name, value in walk(network.graph, {**env, "x": x + offsets}, concrete).items():
            if name in tight and name != "x":
                assert (value >= tight[name].lower - 1e-12).all(), (seed, name)
                assert (value <= tight[name].upper + 1e-12).all(), (seed, name)
    assert narrowed >= 10


def test_rigorous_float32_refuses_reduced_precision_products() -> None:
    network = ARCHITECTURES["mlp"](3)
    region = ThreatModel(math.inf, 0.1).around(torch.rand(2, *network.input_shape))
    spec = Spec.label(torch.zeros(2, dtype=torch.int64), network.num_classes)
    bound = partial(crown, network, region, spec, rigorous=True)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with pytest.raises(ValueError, match=r"mkldnn\.matmul\.fp32_precision=bf16"):
            bound(dtype=torch.float32)
        bound(dtype=torch.float64)  # has no such mode
    finally:
        torch.set_float32_matmul_precision(before)
    bound(dtype=torch.float32)
    with torch.autocast("cpu"), pytest.raises(ValueError, match="autocast"):
        bound(dtype=torch.float64)
    with pytest.raises(ValueError, match="bfloat16 on cpu has no error bound"):
        bound(dtype=torch.bfloat16)


def test_rigorous_bounds_hold_for_thresholds_and_parameters_that_float32_rounds() -> None:
    """y + d with d just below −y in float64: in float32 the two would cancel to a positive number or to zero."""
    b = Builder((1,), 0)
    b(torch.mul, b.x, 1.0)
    network = b.network(F32)
    region = Region.box(torch.tensor([[0.1]]), torch.tensor([[0.1]]))
    y = float(torch.tensor(0.1))
    C, clause = torch.ones(1, 1, 1, dtype=F64), torch.tensor([0])
    below = Spec(C, torch.full((1, 1), -y - 1e-12, dtype=F64), clause)
    scaled = Spec(C * (1 - 1e-12), torch.full((1, 1), -y, dtype=F64), clause)
    for bound in PASSES.values():
        for spec, net in ((below, network), (scaled, network), (below, b.network(F64))):
            values = bound(net, region, spec, dtype=F32, rigorous=True)
            assert values.dtype == F64  # float32 cannot hold what is asked
            assert (values <= 0).all()


def test_work_is_counted_in_passes() -> None:
    """Intervals cost two passes, CROWN-IBP a row for each functional on top, CROWN rows for its neurons as well."""
    network = ARCHITECTURES["mlp"](3)
    region = ThreatModel(math.inf, 0.05).around(torch.rand(4, *network.input_shape))
    spec = Spec.label(torch.zeros(4, dtype=torch.int64), network.num_classes)
    spent = {}
    for name, bound in PASSES.items():
        with counting() as work:
            bound(network, region, spec)
        spent[name] = work.passes / 4
    rows = spec.C.shape[1]
    assert 2 <= spent["interval"] <= 2 + rows
    assert 2 + rows / 2 <= spent["crown_ibp"] <= 2 + 2 * rows
    assert spent["crown_ibp"] < spent["crown"] < 2 + 2 * rows + 2 * 64 * len(network.graph.nodes)
    with counting() as work:
        interval(network, region[:2], spec[:2])
    assert work.passes / 2 == spent["interval"]


@pytest.mark.parametrize("name", ["conv", "residual", "preactivation", "bottleneck", "max_pool"])
def test_the_side_that_settles_a_neuron_is_enough(name: str, monkeypatch) -> None:
    """CROWN that bounds both sides of every neuron finds the same."""
    network = ARCHITECTURES[name](5)
    x = networks.inputs(network, 3, 5).double() * 0.5 + 0.25
    region, spec = Region.ball(x, 0.1, INF, -1.0, 2.0), Spec.label(torch.tensor([0, 1, 2]), 3)
    found = crown(network, region, spec, dtype=F64)
    monkeypatch.setattr(ladder, "kink_of", lambda *_: None)
    both = crown(network, region, spec, dtype=F64)
    assert (found - both).abs().max() <= 1e-9


@pytest.mark.parametrize("rigorous", [False, True])
@pytest.mark.parametrize("name", ["mlp", "conv", "residual", "sigmoid"])
def test_one_side_is_the_same_side(name: str, rigorous: bool) -> None:
    network = ARCHITECTURES[name](5)
    x = networks.inputs(network, 2, 5).double() * 0.5 + 0.25
    state = start(
        network,
        Region.ball(x, 0.1, INF, -1.0, 2.0),
        dtype=F64,
        rigorous=rigorous,
        memory=None,
        statistics=None,
    )
    propagate(state)
    for step in state.facts.steps:
        if isinstance(step.kind, Affine) or step.reads[0] in network.graph.inputs:
            continue
        count = math.prod(state.shape(step.reads[0]))
        index = torch.arange(count).unsqueeze(1).expand(-1, 2)
        both = linear.both_bounds(state, step.reads[0], index)
        sides = [
            linear.side_bounds(state, step.reads[0], index, kink=0.0, second=second)
            for second in (False, True)
        ]
        assert (torch.maximum(sides[0].lower, sides[1].lower) - both.lower).abs().max() <= 1e-9
        assert (torch.minimum(sides[0].upper, sides[1].upper) - both.upper).abs().max() <= 1e-9
        assert (torch.isinf(sides[0].lower) != torch.isinf(sides[0].upper)).all()


@pytest.mark.parametrize("method", PASSES)
@pytest.mark.parametrize("name", [*ARCHITECTURES, "flatten"])
def test_bounds_leave_what_they_are_given(name: str, method: str, monkeypatch) -> None:
    """Rows are overwritten at the input where nobody needs them: never the specification's own, nor weights."""
    monkeypatch.setattr(importlib.import_module("calipers.bounds.state"), "SMALL", 0)
    movers = capture(nn.Flatten(), torch.zeros(3, 1, 3, 1))
    network = movers if name == "flatten" else ARCHITECTURES[name](3)
    region, spec = setting(network, count=1)  # whose rows are a view of the specification's
    before = [spec.C.clone(), *(v.clone() for v in network.module.state_dict().values())]
    first = PASSES[method](network, region, spec)
    after = [spec.C, *network.module.state_dict().values()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert torch.equal(PASSES[method](network, region, spec), first)
