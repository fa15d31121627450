"""What bounds do with what they should not be given: an error that says so, or nothing known; never robust."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import calipers as cp
import networks
from calipers.bounds import BOUNDS, ladder, preactivations
from calipers.bounds.lipschitz import certified_radius, lipschitz
from calipers.bounds.losses import worst_cross_entropy
from calipers.bounds.widths import layer_widths
from calipers.bracket import Bracket, Evidence, Verdict
from calipers.data import load
from calipers.errors import DataError, MemoryLimit, ModelError, RegionError, UnsupportedOp
from calipers.models import load_model
from calipers.sets import Interval, Region
from calipers.spec import Spec
from networks import ARCHITECTURES, Builder

F64 = torch.float64
INF = math.inf


def setting(network: Any, eps: float = 0.01, count: int = 3):
    x = networks.inputs(network, count, 11)
    return Region.ball(x, eps, INF, 0.0, 1.0), Spec.label(torch.arange(count) % 3, 3)


def robust(low: torch.Tensor, spec: Spec, method: str) -> int:
    verdicts = Bracket.from_bound(spec.margin(low), Evidence(method)).verdict()
    return sum(v is Verdict.ROBUST for v in verdicts)


@pytest.mark.parametrize("rigorous", [False, True])
@pytest.mark.parametrize("method", BOUNDS)
@pytest.mark.parametrize(
    "name", ["mlp", "conv", "max_pool", "residual", "product", "sigmoid", "clamp"]
)
def test_nan_bounds_on_the_way_are_never_robust(
    name: str, method: str, rigorous: bool, monkeypatch: Any
) -> None:
    """A NaN in any intermediate interval, as a bug or an overflow would leave it."""
    network = ARCHITECTURES[name](0)
    region, _ = setting(network)
    C = torch.eye(3).expand(3, 3, 3)
    spec = Spec.functional(torch.cat([C, -C], 1))
    real = ladder.propagate

    def poisoned(state: Any, **keywords: Any) -> None:
        real(state, **keywords)
        for key, box in state.boxes.items():
            if key != "x":
                bad = torch.full_like(box.lower, math.nan)
                state.boxes[key] = Interval(bad, bad)
                state.env[key] = bad
        output = network.graph.output
        state.env[output] = torch.full_like(state.env[output], math.nan)

    monkeypatch.setattr(ladder, "propagate", poisoned)
    low = BOUNDS[method](network, region, spec, dtype=F64, rigorous=rigorous)
    assert robust(low, spec, method) == 0


@pytest.mark.parametrize("rigorous", [False, True])
@pytest.mark.parametrize("method", BOUNDS)
def test_nan_in_an_example(method: str, rigorous: bool) -> None:
    """A threat model and a box refuse it; a ball made by hand has no verdict, and does not spoil its neighbours."""
    network = networks.mlp(0)
    region, spec = setting(network)
    good = BOUNDS[method](network, region, spec, dtype=F64, rigorous=rigorous)
    x = region.center.clone()
    x[1, 0] = math.nan
    with pytest.raises(DataError, match="NaN"):
        cp.ThreatModel(INF, 0.1).around(x)
    with pytest.raises(RegionError, match="NaN"):
        Region.box(x, x)
    low = BOUNDS[method](
        network, Region.ball(x, 0.01, INF, 0.0, 1.0), spec, dtype=F64, rigorous=rigorous
    )
    assert not (low[1] > -INF).any()
    torch.testing.assert_close(low[[0, 2]], good[[0, 2]], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("method", BOUNDS)
def test_one_example_that_overflows_leaves_the_others_alone(method: str) -> None:
    network = networks.mlp(2)
    region, spec = setting(network)
    good = BOUNDS[method](network, region, spec, dtype=F64, rigorous=True)
    low, high = (end.clone() for end in region.hull())
    low[1], high[1] = -1e308, 1e308
    mixed = BOUNDS[method](network, Region.box(low, high), spec, dtype=F64, rigorous=True)
    torch.testing.assert_close(mixed[[0, 2]], good[[0, 2]], rtol=1e-9, atol=1e-12)
    assert not (mixed[1] > 0).any()


@pytest.mark.parametrize("method", BOUNDS)
def test_unbounded_regions_of_every_op(method: str) -> None:
    """An unbounded feature that counts: no finite positive bound, whatever the op."""
    for name in ("mlp", "conv", "max_pool", "residual", "sigmoid", "mixed", "abs"):
        network = ARCHITECTURES[name](1)
        shape = (2, *network.input_shape)
        region = Region.box(torch.full(shape, -INF), torch.full(shape, INF))
        C = torch.eye(3).expand(2, 3, 3)
        spec = Spec.functional(torch.cat([C, -C], 1))
        with torch.no_grad():
            values = [
                spec.values(network.in_double()(torch.randn(shape, dtype=F64) * 10**k))
                for k in range(5)
            ]
        least = torch.stack(values).amin(0)
        for rigorous in (False, True):
            low = BOUNDS[method](network, region, spec, dtype=F64, rigorous=rigorous)
            assert not (low > least).any(), name
            assert robust(low, spec, method) == 0


def test_empty_regions_say_so() -> None:
    with pytest.raises(RegionError):
        Region.box(torch.tensor([[1.0]]), torch.tensor([[0.0]]))
    network = networks.mlp(0)
    nobody = Region.ball(torch.empty(0, 4), 0.1, INF)
    spec = Spec.functional(torch.empty(0, 2, 3))
    for method, bound in BOUNDS.items():
        assert bound(network, nobody, spec).shape == (0, 2), method
    assert lipschitz(network, nobody, spec).shape == (0, 2)
    assert preactivations(network, nobody)[network.graph.output].lower.shape == (0, 3)


@pytest.mark.parametrize("method", BOUNDS)
def test_an_unsupported_op_in_the_middle_is_named_with_its_place(method: str) -> None:
    class Odd(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = torch.nn.Linear(4, 4), torch.nn.Linear(4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(torch.erfinv(torch.tanh(self.first(x))))

    try:
        network = cp.capture(Odd().eval(), torch.rand(2, 4))
    except UnsupportedOp as error:
        assert "erfinv" in str(error)  # noqa: PT017
        return
    region, spec = setting(network)
    with pytest.raises(UnsupportedOp, match="erfinv"):
        BOUNDS[method](network, region, spec)


@pytest.mark.parametrize("what", [lipschitz, certified_radius])
def test_the_other_readings_refuse_it_too(what: Any) -> None:
    b = Builder((4,))
    b.linear(b(torch.erfinv, b.linear(b.x, 4)), 3)
    network = b.network()
    region, spec = setting(network)
    with pytest.raises(UnsupportedOp, match="erfinv"):
        what(network, region, spec)
    with pytest.raises(UnsupportedOp, match="erfinv"):
        layer_widths(network, region)
    with pytest.raises(UnsupportedOp, match="erfinv"):
        worst_cross_entropy(network, region, torch.zeros(3, dtype=torch.int64))


def test_an_audit_goes_on_without_the_bounds() -> None:
    """The stages that cannot read the network are skipped with the reason; nothing is certified, attacks still run."""
    b = Builder((64,), 0)
    b.linear(b(torch.erfinv, b(torch.clamp, b.linear(b.x, 20), -0.9, 0.9)), 10)
    network, data = b.network(), load("digits")
    x = data.x[:8].flatten(1)
    y = network(x).argmax(1)
    audit = cp.audit(network, (x, y), cp.ThreatModel(INF, "0.01"))
    assert audit.certified == 0.0
    assert any("skipped: unsupported: erfinv" in r.note for r in audit.methods if r.side == "bound")


@pytest.mark.parametrize("method", BOUNDS)
def test_a_network_too_large_for_memory(method: str, monkeypatch: Any) -> None:
    """A layer whose working memory nobody has: an error that says so; with any limit some answer, one by one."""
    network = networks.mlp(0)
    region, spec = setting(network)
    low = BOUNDS[method](network, region, spec, memory=1, dtype=F64)
    torch.testing.assert_close(low, BOUNDS[method](network, region, spec, dtype=F64))

    def short(*_: Any, **__: Any) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 TB")

    monkeypatch.setattr(ladder, "propagate", short)
    monkeypatch.setattr("calipers.bounds.slopes.propagate", short)
    with pytest.raises(MemoryLimit, match=r"single example.*9 TB"):
        BOUNDS[method](network, region, spec)


def test_nan_weights_end_an_audit() -> None:
    network, data = load_model("digits_pgd"), load("digits")
    module: Any = network.module
    first = next(module.parameters())
    before = first.detach().clone()
    try:
        with torch.no_grad():
            first.view(-1)[0] = math.nan
        with pytest.raises(ModelError):
            cp.audit(network, (data.x[:5], data.y[:5]), cp.ThreatModel(INF, "0.05"))
    finally:
        with torch.no_grad():
            first.copy_(before)
