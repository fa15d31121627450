"""What every bound and every attack must satisfy together: for the real ones and for planted faults."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

import geometry as g
from calipers.attacks import ATTACKS, apgd, auto, square
from calipers.bounds import BELOW, BOUNDS, alpha_crown
from calipers.bracket import witness
from calipers.evaluate.solvers import SOLVERS, problem
from calipers.exact import milp
from calipers.graph.graph import Network
from calipers.sets import Region
from calipers.spec import Spec

F32, F64 = torch.float32, torch.float64
# the rungs that are passes of the network, few steps of those that take steps; a program per functional is for the
# smaller tests (and test_lp.py)
PASSES = {name: bound for name, bound in BOUNDS.items() if name != "lp"} | {
    "alpha_crown": partial(alpha_crown, steps=3, intermediate_steps=1)
}
# every attack, the dear ones with small budgets
QUICK = {
    **ATTACKS,
    "apgd": partial(apgd, steps=25),
    "square": partial(square, queries=50),
    "auto": partial(auto, level="quick"),
}
PRECISIONS: list[tuple[torch.dtype, bool]] = [(F64, True), (F32, True), (F64, False)]


def points(network: Network, region: Region, spec: Spec, seed: int = 0) -> dict[str, Tensor]:
    """Members of the region: what each attack finds, random ones, extreme ones, and the centre."""
    generator = torch.Generator().manual_seed(seed)
    count = len(region)
    seeds = torch.randint(2**40, (count,), generator=generator)
    found = {name: f(network, region, spec, seeds=seeds) for name, f in QUICK.items()}
    found["centre"] = region.project(region.center.float())
    for i in range(8):
        found[f"sample {i}"] = region.sample(seeds + i)
        direction = torch.randn(region.center.shape, generator=generator)
        found[f"extreme {i}"] = region.maximizer(direction)
    return found


def check_sound(
    network: Network,
    region: Region,
    spec: Spec,
    precisions: Iterable[tuple[torch.dtype, bool]] = PRECISIONS,
    bounds: Mapping[str, Any] = PASSES,
) -> None:
    """Each functional's bound lies under its value at every point, in float64; the rungs are ordered."""
    values, size = {}, None
    forward = network.in_double()
    for name, x in points(network, region, spec).items():
        assert region.contains(x).all(), name
        y = forward(x)
        values[name] = spec.values(y)
        size = y.abs().amax(-1, keepdim=True)
    for dtype, rigorous in precisions:
        found: dict[str, Tensor] = {}
        for method, bound in bounds.items():
            low = bound(network, region, spec, dtype=dtype, rigorous=rigorous).double()
            assert torch.isfinite(low).all(), (method, dtype, rigorous)
            for name, value in values.items():
                # the oracle's own rounding; a rigorous bound gets nothing on top
                slack = 1e-13 * (1 + value.abs() + size)
                assert (low <= value + slack).all(), (method, dtype, rigorous, name, low - value)
            # the same number by another order of sums
            slack = 256 * torch.finfo(dtype).eps * (1 + low.abs())
            found[method] = low
            below = found.get(BELOW.get(method, ""))
            if below is not None:
                assert (below <= low + slack).all(), (method, "is looser", below - low)


def check_solvers(network: Network, region: Region, spec: Spec, margin: Tensor) -> None:
    """Offsets move the known margins to either side of 0: each search proves the one; for the other it shows a
    witness, or says why it found none."""
    suitable = [e for e in SOLVERS if e.suits(problem(network, region))]
    solvers: dict[str, Any] = {"milp": milp} | {e.name: e.load() for e in suitable}
    for name, solve in solvers.items():
        for i, known in enumerate(margin.double().tolist()):
            side = -1e-2 if i % 2 else 1e-2
            here = region[i : i + 1]
            moved = Spec(spec.C[i : i + 1], spec.d[i : i + 1] + (side - known), spec.clause)
            found = solve(network, here, moved, deadline=time.perf_counter() + 60)
            assert found.robust == (side > 0), (name, i, side, found)
            assert found.lower <= side + 1e-6, (name, i, side, found)
            if found.point is not None:
                assert witness(network, here, moved, found.point[None]).upper <= 0
            else:
                assert side > 0 or found.reason


def exact_affine_minimum(
    network: Network, region: Region, spec: Spec, p: float, eps: float, box: bool
) -> Tensor:
    """The minimum of each functional of an affine network in closed form, by the geometry's own oracle: (B, M)."""
    forward = network.in_double()
    zero = torch.zeros(1, *network.input_shape, dtype=F64)
    J = torch.autograd.functional.jacobian(lambda x: forward(x)[0], zero).flatten(1)
    offset = forward(zero)[0]
    sides = (0.0, 1.0) if box else (-math.inf, math.inf)
    case = g.Case(region.center, p, eps, *sides)
    exact = torch.empty(spec.d.shape, dtype=F64)
    for i in range(len(region)):
        center, radius, low, high = case.row(i)
        for m, functional in enumerate(spec.C[i].double()):
            slope = (functional @ J).numpy().astype(g.LONG)
            worst = g.furthest(-slope, center, radius, p, low, high)
            exact[i, m] = float((slope * worst).sum()) + float(functional @ offset)
    return exact


def check_affine_is_exact(network: Network, region: Region, spec: Spec, exact: Tensor) -> None:
    for name, bound in PASSES.items():
        if name in ("interval", "forward") and region.p != math.inf:
            continue  # boxes are all it knows of a ball
        low = bound(network, region, spec, dtype=F64)
        assert (low - exact).abs().max() <= 1e-9, name
