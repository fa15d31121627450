"""What every attack must satisfy, as functions: used by the tests and, with faults planted, by the faults' tests."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import pairwise

import torch
from torch import Tensor, nn

from calipers import Region, Spec, ThreatModel
from calipers.seeds import seeds

INF = math.inf
NORMS = (1, 2, INF)
EPS = {1: 1.5, 2: 0.5, INF: 0.15}
K, N = 4, 10
Attack = Callable[..., Tensor]


def network(dtype: torch.dtype = torch.float64, outputs: int = K, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Linear(N, 24), nn.ReLU(), nn.Linear(24, 16), nn.Tanh(), nn.Linear(16, outputs)
    )
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(2.0)
    return net.to(dtype)


def batch(net: nn.Module, count: int = 12) -> tuple[Tensor, Tensor]:
    """Inputs in the box, some of them on its sides, with the labels that the network gives them."""
    dtype = next(net.parameters()).dtype
    generator = torch.Generator().manual_seed(1)
    x = (1.4 * torch.rand(count, N, dtype=dtype, generator=generator) - 0.2).clamp(0, 1)
    with torch.no_grad():
        return x, net(x).argmax(1)


def regions(x: Tensor, p: float) -> Iterator[Region]:
    """With and without the box, with per-feature sides, with radii that are no floats, and degenerate."""
    yield ThreatModel(p, EPS[p]).around(x)
    yield ThreatModel(p, "0.1", -INF, INF).around(x)
    yield ThreatModel(p, EPS[p], torch.linspace(-0.5, 0, N), torch.linspace(1, 3, N)).around(x)
    yield ThreatModel(p, 0.0).around(x)
    if p == INF:
        yield Region.box(x - 0.1, x + torch.linspace(0, 0.7, N))  # one side is a point
        yield ThreatModel(p, torch.linspace(0, 0.3, N)).around(x)


def margins(model: Callable[[Tensor], Tensor], spec: Spec, points: Tensor) -> Tensor:
    with torch.no_grad():
        return spec.margin(spec.values(model(points)))


def check_membership(attack: Attack, p: float, dtype: torch.dtype) -> None:
    net = network(dtype)
    x, y = batch(net)
    for region in regions(x, p):
        points = attack(net, region, Spec.label(y, K), dtype=dtype, seeds=seeds(x, 0, "test"))
        assert points.shape == x.shape
        assert points.dtype == dtype
        assert not points.requires_grad
        assert region.contains(points).all()


def check_never_worse_than_its_start(attack: Attack, p: float) -> None:
    """Absurd steps and losses included: the best point met is kept, and the start is one of them."""
    net = network()
    x, y = batch(net)
    spec, region = Spec.label(y, K), ThreatModel(p, 20 * EPS[p], -INF, INF).around(x)
    away = {"loss": lambda values, spec: spec.margin(values)}  # a loss that leads astray
    for options in ({}, away, {"step_size": 2.0}, {"step_size": 1e6, "direction": "gradient"}):
        points = attack(net, region, spec, steps=7, dtype=x.dtype, **options)
        assert (margins(net, spec, points) <= margins(net, spec, x)).all()


def check_best_of_more_steps(attack: Attack, p: float) -> None:
    """The first steps of a longer run are those of a shorter one, so a longer run is never worse."""
    net = network()
    x, y = batch(net)
    spec, region = Spec.label(y, K), ThreatModel(p, EPS[p]).around(x)
    found = [
        margins(net, spec, attack(net, region, spec, steps=steps, step_size=0.9, dtype=x.dtype))
        for steps in range(1, 12)
    ]
    for shorter, longer in pairwise(found):
        assert (longer <= shorter).all()


def check_ascends(attack: Attack, p: float) -> None:
    """From the centre of a smooth loss, a short step lowers the margin of every example that it can."""
    net = network()
    x, y = batch(net)
    spec, region = Spec.label(y, K), ThreatModel(p, EPS[p] / 10, -INF, INF).around(x)
    points = attack(net, region, spec, dtype=x.dtype)
    assert (margins(net, spec, points) < margins(net, spec, x)).all()


def check_batch_independence(attack: Attack, p: float, **options: object) -> None:
    """Whole, reversed, in parts or one by one: the same points, in float64."""
    net = network()
    x, y = batch(net)
    region, s = ThreatModel(p, EPS[p]).around(x), seeds(x, 3, "test")

    def run(index: Tensor) -> Tensor:
        spec = Spec.label(y[index], K)
        return attack(net, region[index], spec, seeds=s[index], dtype=x.dtype, **options)

    rows = torch.arange(len(x))
    whole = run(rows)
    pieces = [torch.cat([run(part) for part in rows.split(size)]) for size in (1, 5)]
    for other in (run(rows.flip(0)).flip(0), *pieces):
        torch.testing.assert_close(other, whole, rtol=1e-9, atol=1e-9)


def check_linear_optimum(attack: Attack, p: float, ratio: float, **options: object) -> None:
    """On affine models the drop of the margin is at least 1/ratio of the closed form, eps·‖w_y − w_t‖_q or, with the
    box, the maximum over ball and box."""
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(2, N, dtype=torch.float64, generator=generator)
    x = torch.rand(8, N, dtype=torch.float64, generator=generator)
    y = torch.arange(8) % 2
    spec = Spec.label(y, 2)
    for box in (False, True):
        threat = ThreatModel(p, EPS[p]) if box else ThreatModel(p, EPS[p], -INF, INF)
        region = threat.around(x)
        slope = weight[1 - y] - weight[y]
        if box:
            best = region.support(slope) - (slope * x).sum(1)
        else:
            q = {1: INF, 2: 2, INF: 1}[p]
            best = EPS[p] * torch.linalg.vector_norm(slope, ord=q, dim=1)
        points = attack(lambda z: z @ weight.T, region, spec, dtype=x.dtype, **options)
        gain = (slope * (points - x)).sum(1)
        assert (gain <= best * (1 + 1e-9)).all()
        assert (gain * ratio >= best).all()
