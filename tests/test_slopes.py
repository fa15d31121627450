"""Chosen lines: the dual against the paper's own algorithm, alpha-CROWN against its promises."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import networks
from calipers.bounds import BOUNDS, alpha_crown, crown, dual, preactivations
from calipers.bounds.slopes import Choice, Log, OwnLines, _optimised, _with_gradients, ascend
from calipers.bounds.state import State, start
from calipers.graph.graph import Network
from calipers.sets import Interval, Region
from calipers.spec import Spec
from differences import check_gradients
from patterns import layers

INF, F64 = math.inf, torch.float64


def paper(
    weights: list[tuple[np.ndarray, np.ndarray]], x: np.ndarray, eps: float, dual_norm: float
) -> tuple[list[tuple[np.ndarray, np.ndarray]], Any]:
    """Wong and Kolter 2018 as printed: bounds of every layer by the dual network, then a function of c.

    J(nu) = −Σ nu_{i+1}·b_i − x·nuhat_1 − eps·‖nuhat_1‖_* + Σ over unstable j of l_j·[nu_j]_+
    """
    bounds: list[tuple[np.ndarray, np.ndarray]] = []

    def value(c: np.ndarray, depth: int) -> float:
        nu, total = -c, 0.0
        for i in range(depth, -1, -1):
            W, b = weights[i]
            total -= nu @ b
            nuhat = W.T @ nu
            if i == 0:
                return float(total - x @ nuhat - eps * np.linalg.norm(nuhat, dual_norm))
            low, high = bounds[i - 1]
            unstable = (low < 0) & (high > 0)
            slope = np.where(unstable, high / np.where(unstable, high - low, 1.0), high > 0)
            nu = slope * nuhat
            total += float((low * np.maximum(nu, 0))[unstable].sum())
        raise AssertionError

    for depth in range(len(weights) - 1):
        eye = np.eye(len(weights[depth][1]))
        low = np.array([value(e, depth) for e in eye])
        bounds.append((low, np.array([-value(-e, depth) for e in eye])))
    return bounds, lambda c: value(c, len(weights) - 1)


@pytest.mark.parametrize(("p", "dual_norm"), [(INF, 1), (2.0, 2), (1.0, INF)])
@pytest.mark.parametrize("seed", range(3))
def test_dual_is_the_paper_s(seed: int, p: float, dual_norm: float) -> None:
    network = networks.mlp(seed, (5, 9, 8, 7, 3))
    x = networks.inputs(network, 2, seed).double() * 0.5
    eps = 0.3 if p == INF else 0.6
    spec = Spec.functional(torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(seed)))
    low = dual(network, Region.ball(x, eps, p), spec, dtype=F64, raw=True)
    for i in range(2):
        _, value = paper(layers(network), x[i].numpy(), eps, dual_norm)
        expected = [value(c) for c in spec.C[i].double().numpy()]
        assert np.abs(low[i].numpy() - expected).max() <= 1e-9


def test_parallel_differs_from_adaptive() -> None:
    """The equality above would mean little if CROWN's own slopes passed it."""
    network = networks.mlp(0, (5, 9, 8, 7, 3))
    region = Region.ball(networks.inputs(network, 2, 0).double() * 0.5, 0.3, INF)
    spec = Spec.label(torch.tensor([0, 1]), 3)
    gap = crown(network, region, spec, dtype=F64, raw=True) - dual(
        network, region, spec, dtype=F64, raw=True
    )
    assert gap.abs().max() > 1e-3


def wide(network: Network, count: int = 3, eps: float = 0.25) -> tuple[Region, Spec]:
    x = networks.inputs(network, count, 1) * 0.5 + 0.25
    return Region.ball(x, eps, INF, 0.0, 1.0), Spec.label(torch.arange(count) % 3, 3)


@pytest.mark.parametrize("name", ["mlp", "conv", "residual", "sigmoid", "max_pool", "clamp"])
def test_optimised_lines_gain(name: str) -> None:
    network = networks.ARCHITECTURES[name](3)
    region, spec = wide(network)
    base = crown(network, region, spec, dtype=F64)
    final = alpha_crown(network, region, spec, intermediate_steps=0, stop=False, dtype=F64)
    full = alpha_crown(network, region, spec, stop=False, dtype=F64)
    assert (final >= base).all()
    assert (full >= base).all()
    if name in ("mlp", "conv", "residual"):
        assert final.mean() > base.mean() + 1e-4
        assert full.mean() > final.mean() + 1e-5


def test_it_stops_where_it_is_proved() -> None:
    """Rows that CROWN proves keep CROWN's value; the others get the value that they get alone."""
    network = networks.mlp(2)
    region, spec = wide(network, 6, 0.1)
    base = crown(network, region, spec, dtype=F64)
    some = alpha_crown(network, region, spec, dtype=F64)
    proved = (base > 0).all(1)
    assert 0 < proved.sum() < len(proved)
    assert torch.equal(some[proved], base[proved])
    for i in torch.nonzero(~proved).flatten().tolist():
        one = slice(i, i + 1)
        alone = alpha_crown(network, region[one], spec[one], dtype=F64)
        assert (some[one] - alone).abs().max() <= 1e-9


def test_no_step_is_crown() -> None:
    network = networks.mlp(2)
    region, spec = wide(network)
    assert torch.equal(alpha_crown(network, region, spec, steps=0), crown(network, region, spec))


DIFFERENTIABLE = ["mlp", "conv", "residual", "sigmoid", "clamp", "mixed"]


def perturbed(network: Network) -> tuple[list[Tensor], Callable[..., tuple[Region, Spec]]]:
    """The centre, the first and the last parameter; and a problem with them replaced."""
    module: Any = network.module.double()
    names = [n for n in network.graph.params if getattr(module, n).is_floating_point()]
    x = networks.inputs(network, 3, 1).double() * 0.5 + 0.25

    def problem(center: Tensor, *values: Tensor) -> tuple[Region, Spec]:
        for name, value in zip((names[0], names[-1]), values, strict=True):
            setattr(module, name, value)
        return Region.ball(center, 0.2, INF, -1.0, 2.0), Spec.label(torch.arange(3) % 3, 3)

    return [x, *(getattr(module, n).detach() for n in (names[0], names[-1]))], problem


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_gradients_are_those_of_the_bound_under_the_lines_found(name: str) -> None:
    network = networks.ARCHITECTURES[name](3)
    given, problem = perturbed(network)
    log = Log()
    settings = {"steps": 4, "intermediate_steps": 3, "share": 0.9, "stop": True}

    def begun(*values: Tensor) -> tuple[State, Spec]:
        region, spec = problem(*values)
        options = {"dtype": F64, "rigorous": False, "memory": None, "statistics": None}
        return start(network, region, **options), spec  # type: ignore[arg-type]

    with torch.no_grad():
        _optimised(*begun(*given), **settings, log=log)  # type: ignore[arg-type]
    assert log.lines

    def fixed(*values: Tensor) -> Tensor:
        return _with_gradients(*begun(*values), copy(log)).sum()

    def copy(log: Log) -> Log:
        return Log(log.wanted, log.values, list(log.lines))

    leaves = [v.clone().requires_grad_() for v in given]
    bound = alpha_crown(network, *problem(*leaves), **settings)  # type: ignore[arg-type]
    with torch.no_grad():
        assert (bound - alpha_crown(network, *problem(*given), **settings)).abs().max() < 1e-9  # type: ignore[arg-type]
    gradients = torch.autograd.grad(bound.sum(), leaves)
    check_gradients(fixed, given, gradients)


@pytest.mark.parametrize("seed", range(3))
def test_gradients_are_those_of_the_optimised_bound(seed: int) -> None:
    """The optimum's own derivative, lines moving: one neuron's best line is an end of its range, found exactly."""
    network = networks.mlp(seed, (2, 1, 3))
    given, problem = perturbed(network)
    settings: dict[str, Any] = {"steps": 8, "intermediate_steps": 0, "stop": False}
    leaves = [v.clone().requires_grad_() for v in given]
    bound = alpha_crown(network, *problem(*leaves), **settings).sum()
    gradients = torch.autograd.grad(bound, leaves)
    direction = torch.randn(given[0].shape, generator=torch.Generator().manual_seed(1), dtype=F64)
    ends = []
    for sign in (1, -1):
        moved = [given[0] + sign * 1e-6 * direction, *given[1:]]
        with torch.no_grad():
            ends.append(alpha_crown(network, *problem(*moved), **settings).sum())
    slope = (ends[0] - ends[1]).item() / 2e-6
    assert abs(slope - (gradients[0] * direction).sum().item()) <= 1e-6 * (1 + abs(slope))


@pytest.mark.parametrize("bad", [{"steps": -1}, {"intermediate_steps": -1}, {"share": 2.0}])
def test_bad_arguments_are_named(bad: dict[str, Any]) -> None:
    network = networks.mlp(2)
    with pytest.raises(ValueError, match=next(iter(bad))):
        alpha_crown(network, *wide(network), **bad)


def test_steps_that_break_bounds_do_no_harm() -> None:
    """A NaN, wherever the ascent meets it, is not kept."""
    calls = []

    def evaluate(chosen: OwnLines) -> Tensor:
        if not chosen.choices:
            zero, box = torch.zeros(2), Interval(torch.zeros(2), torch.zeros(2))
            leaf = torch.full((2,), 0.5, requires_grad=True)
            chosen.choices["a"] = Choice(leaf, leaf, box, zero, zero)
        lower = chosen.choices["a"].lower
        calls.append(lower.detach().clone())
        value = -(lower - 0.9).square()
        return value if len(calls) != 3 else value * math.nan

    best = ascend(evaluate, steps=6)
    assert torch.isfinite(best).all()
    assert (best > -0.16 + 1e-3).all()
    assert all(((c >= 0) & (c <= 1)).all() for c in calls[:3])


def test_dual_respects_interval_ends() -> None:
    network = networks.mlp(1, (4, 12, 12, 3))
    region, spec = wide(network)
    assert (
        dual(network, region, spec, dtype=F64)
        >= BOUNDS["interval"](network, region, spec, dtype=F64)
    ).all()
    for box in preactivations(network, region).values():
        assert (box.lower <= box.upper).all()
