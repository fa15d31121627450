"""Affine forms carried forward: they enclose every value, and agree with the dual where theory says so."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import networks
import rationals
import sandwiches
from calipers.bounds import dual, forward
from calipers.bounds.forward import _linear_part, functionals_of, propagate_forms
from calipers.bounds.state import start, with_sparse_weights
from calipers.graph import primitives as prim
from calipers.graph.graph import Network, evaluate
from calipers.ops.kinds import Affine
from calipers.sets import Region
from calipers.spec import Spec

F64 = torch.float64
NETWORKS = sorted(networks.ARCHITECTURES)


def case(name: str, eps: float, count: int = 3) -> tuple[Network, Region]:
    network = networks.ARCHITECTURES[name](3)
    return network, Region.ball(networks.inputs(network, count, 5), eps, math.inf, -1.0, 2.0)


def begin(network: Network, region: Region, *, rigorous: bool = True) -> Any:
    return start(network, region, dtype=F64, rigorous=rigorous, memory=None, statistics=None)


def every(network: Network) -> Tensor:
    return torch.arange(math.prod(network.input_shape))


@pytest.mark.parametrize("symbols", [0, 2, 1000])
@pytest.mark.parametrize("name", NETWORKS)
def test_forms_enclose_every_value(name: str, symbols: int) -> None:
    network, region = case(name, 0.4)
    state = begin(network, region)
    names = [n.name for n in network.graph.nodes if n.name in network.graph.active]
    forms = propagate_forms(state, symbols=symbols, inputs=every(network)[:7], keep=names)
    generator = torch.Generator().manual_seed(0)
    low, high = region.hull()
    for _ in range(40):
        unit = torch.rand(low.shape, generator=generator, dtype=F64)
        x = low + (high - low) * unit.mul(3).sub(1).clamp(0, 1)  # often on a side
        env = {k: v for k, v in state.env.items() if k not in network.graph.active}
        env[network.graph.inputs[0]] = x
        for node in network.graph.nodes:
            if node.name not in env:
                env[node.name] = node.op(*node.fill(env), **node.kwargs)
            if node.name in forms:
                value, box, form = env[node.name], state.boxes[node.name], forms[node.name]
                slack = 1e-13 * (1 + value.abs())  # of the evaluation here
                assert (box.lower <= value + slack).all(), node.name
                assert (value <= box.upper + slack).all(), node.name
                assert ((value - state.env[node.name]).abs() <= form.radius + slack).all()


def test_a_value_without_symbols_passes_through_every_kind_of_convolution() -> None:
    b = networks.Builder((2, 3, 2), 0)
    h = b(prim.max_pool, b.x, (2, 2), (1, 1), (1, 1), (1, 1))
    h = b(torch.conv_transpose2d, h, b.rand(2, 2, 2, 2), None, [2, 1], [1, 0])
    b.linear(b.conv(h, 2), 3)
    network = b.network()
    region = Region.ball(networks.inputs(network, 2, 0), 0.8, 1.0)
    sandwiches.check_sound(
        network, region, Spec.label(torch.arange(2), 3), bounds={"forward": forward}
    )


@pytest.mark.parametrize("seed", range(4))
def test_equal_to_the_dual_where_all_symbols_are_kept(seed: int) -> None:
    """Zonotopes and parallel lines backward are one bound (Salman et al. 2019)."""
    network = networks.mlp(seed, (4, 9, 8, 7, 3))
    region = Region.ball(networks.inputs(network, 3, seed), 0.3, math.inf, -1.0, 2.0)
    spec = Spec.label(torch.arange(3), 3)
    expected = dual(network, region, spec, dtype=F64, raw=True)
    state = begin(network, region, rigorous=False)
    output = network.graph.output
    form = propagate_forms(state, symbols=99, inputs=every(network), keep=(output,))[output]
    C = spec.C.to(F64)
    low, _ = functionals_of(state, form, C.transpose(0, 1))
    found = (C @ state.env[output].unsqueeze(2)).squeeze(2) + low.T
    assert (found - expected).abs().max() <= 1e-9


@pytest.mark.parametrize("name", NETWORKS)
def test_linear_part_is_the_op_less_its_value_at_zero(name: str) -> None:
    network, region = case(name, 0.1, 2)
    state = begin(network, region)
    propagate_forms(state, symbols=0, inputs=every(network)[:1])
    generator = torch.Generator().manual_seed(1)
    for step in state.facts.steps:
        if not isinstance(step.kind, Affine):
            continue
        args, kwargs = state.arguments(step.node)
        values = [
            torch.randn(5, *state.shape(v), generator=generator, dtype=F64) for v in step.reads
        ]

        def at(
            points: list[Tensor],
            step: Any = step,
            kwargs: Any = kwargs,
        ) -> Tensor:
            env = dict(state.env) | dict(zip(step.reads, points, strict=True))
            result: Tensor = step.node.op(*step.node.fill(env), **kwargs)
            return result

        expected = at(values) - at([torch.zeros_like(v) for v in values])
        found = _linear_part(step, values, args, kwargs)
        assert torch.allclose(found, expected, rtol=1e-12, atol=1e-12), step.node


@pytest.mark.parametrize("seed", range(3))
def test_below_the_exact_value_in_rational_arithmetic(seed: int) -> None:
    network = networks.mlp(seed, (3, 6, 5, 2))
    region = Region.ball(networks.inputs(network, 2, seed), 0.5, math.inf, -1.0, 2.0)
    spec = Spec.label(torch.arange(2), 2)
    for dtype in (torch.float32, F64):
        low = forward(network, region, spec, dtype=dtype, rigorous=True)
        for sign in (0.0, 0.5, 1.0):
            x = region.lower + sign * (region.upper - region.lower)
            for i, row in enumerate(rationals.functionals(network, spec, x)):
                assert all(l <= v for l, v in zip(low[i].tolist(), row, strict=True))


def test_an_affine_network_is_bounded_exactly() -> None:
    network = networks.affine(0)
    region = Region.ball(networks.inputs(network, 4, 7), 0.5, math.inf, 0.0, 1.0)
    spec = Spec.label(torch.arange(4) % 3, 3)
    exact = sandwiches.exact_affine_minimum(network, region, spec, math.inf, 0.5, True)
    assert (forward(network, region, spec, dtype=F64) - exact).abs().max() <= 1e-9


def test_sparse_weights_give_the_same_bounds() -> None:
    b = networks.Builder((6,), 0)
    h = b.relu(b.linear(b.x, 200))
    weight = torch.zeros(150, 200)
    weight[torch.arange(150), torch.arange(150)] = 1.0
    weight[torch.arange(150), torch.arange(150) + 50] = -1.0
    h = b.relu(b(torch.nn.functional.linear, h, weight, b.rand(150)))
    b.linear(h, 2)
    network = b.network()
    region = Region.ball(networks.inputs(network, 2, 0), 0.2, math.inf, -1.0, 2.0)
    states = [begin(network, region) for _ in range(2)]
    with_sparse_weights(states[1])
    assert any(
        isinstance(v, Tensor) and v.layout == torch.sparse_csr for v in states[1].env.values()
    )
    boxes = []
    for state in states:
        propagate_forms(state, symbols=64, inputs=every(network))
        boxes.append(state.boxes[network.graph.output])
    for ends in zip(*boxes, strict=True):
        assert torch.allclose(*ends, rtol=1e-12, atol=1e-12)
    x = region.center
    assert torch.allclose(
        evaluate(network.graph, {**states[1].env}, x), network.in_double()(x), atol=1e-9
    )


def test_nan_proves_nothing() -> None:
    network = networks.mlp(0)
    parameter = next(iter(network.module.state_dict().values()))
    parameter[0, 0] = math.nan
    region = Region.ball(networks.inputs(network, 1, 0), 0.1, math.inf, -1.0, 2.0)
    low = forward(network, region, Spec.label(torch.zeros(1).long(), 3), rigorous=True)
    assert not (low > 0).any()
