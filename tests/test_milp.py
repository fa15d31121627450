"""The exact program against brute force over activation patterns, and the solver's process under bad conditions."""

from __future__ import annotations

import math
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import networks
from calipers import programs
from calipers.bounds import crown, lp, preactivations
from calipers.bracket import witness
from calipers.errors import SolverError
from calipers.exact import certify, exact_preactivations, milp, optima
from calipers.graph.graph import Network
from calipers.programs import Limits, Program, apart
from calipers.sets import Interval, Region
from calipers.spec import Spec
from calipers_check.table import Table
from exact_checks import pattern_minimum
from networks import ARCHITECTURES
from patterns import exact_minimum, layers

F64, INF = torch.float64, math.inf
TIME = 120.0  # seconds: never reached, these are tiny


def deadline(seconds: float = TIME) -> float:
    return time.perf_counter() + seconds


def setting(
    network: Network, p: float = INF, eps: float = 0.4, label: int = 0
) -> tuple[Region, Spec]:
    x = networks.inputs(network, 1, 11)
    return Region.ball(x, eps, p, 0.0, 1.0), Spec.label(torch.tensor([label]), network.num_classes)


@pytest.mark.parametrize("p", [INF, 1.0])
@pytest.mark.parametrize("seed", range(2))
def test_optima_are_the_minima_over_all_activation_patterns(seed: int, p: float) -> None:
    network = networks.mlp(seed, (3, 4, 3, 3))
    region, spec = setting(network, p)
    found = optima(network, region, spec, deadline=deadline())
    bounds = lp(network, region, spec, dtype=F64)[0].tolist()
    for o, row, low in zip(found, spec.C[0].double().numpy(), bounds, strict=True):
        assert o.status == "optimal"
        assert o.upper == pytest.approx(exact_minimum(network, region, row[None]), abs=1e-6)
        assert o.lower == pytest.approx(o.upper, abs=1e-6)
        assert o.replayed
        assert low <= o.upper + 1e-6  # exact in LP
        assert o.point is not None
        assert region.contains(o.point[None]).all()


@pytest.mark.parametrize(
    "name",
    ["conv", "residual", "max_pool", "mixed", "clamp", "abs", "leaky_steep", "leaky_negative"],
)
def test_every_piecewise_linear_op_replays_and_lies_between_bound_and_samples(name: str) -> None:
    network = ARCHITECTURES[name](1)
    region, spec = setting(network, eps=0.03)
    found = optima(network, region, spec, deadline=deadline())
    low = lp(network, region, spec, dtype=F64)[0].tolist()
    x = torch.cat([region.sample(torch.tensor([s]), F64) for s in range(100)])
    above = (network.in_double()(x) @ spec.C[0].double().T + spec.d[0].double()).amin(0).tolist()
    for o, lower, upper in zip(found, low, above, strict=True):
        assert o.status == "optimal"
        assert o.replayed
        assert lower - 1e-6 <= o.upper <= upper + 1e-6


def test_an_l2_ball_is_bounded_from_outside() -> None:
    network = networks.mlp(0, (3, 4, 3, 3))
    region, spec = setting(network, 2.0, 0.3)
    for o, low in zip(
        optima(network, region, spec, deadline=deadline()),
        crown(network, region, spec, dtype=F64)[0],
        strict=True,
    ):
        assert o.lower <= o.value + 1e-5
        assert o.lower >= low.item() - 0.05
    box, _ = setting(network, INF, 0.3)
    for o, wide in zip(optima(network, region, spec), optima(network, box, spec), strict=True):
        assert o.lower >= wide.lower - 1e-6


# -- verdicts ---------------------------------------------------------------------------------------------------------


def clauses(C: Tensor, clause: list[int], shift: float) -> Spec:
    return Spec(C[None], torch.full((1, len(C)), shift), torch.tensor(clause))


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("clause", [[0, 0, 0, 1], [0, 1, 0, 2]])
def test_verdicts_on_general_specifications(clause: list[int], seed: int) -> None:
    """The margin moved to either side of 0 by an offset decides; brute force says where it is."""
    network = networks.mlp(seed, (3, 4, 3, 4))
    region, _ = setting(network)
    C = torch.randn(4, 4, generator=torch.Generator().manual_seed(seed))
    exact = pattern_minimum(network, region, clauses(C, clause, 0.0))
    robust = milp(network, region, clauses(C, clause, 1e-3 - exact), deadline=deadline())
    assert robust.robust
    assert 0 < robust.lower <= 1e-3 + 1e-6
    assert robust.trusts == "highs"
    assert robust.point is None
    spec = clauses(C, clause, -1e-3 - exact)
    broken = milp(network, region, spec, deadline=deadline())
    assert not broken.robust
    assert broken.point is not None
    assert witness(network, region, spec, broken.point[None]).upper.item() <= 0


def test_reachable_classes_are_those_of_brute_force() -> None:
    network = networks.mlp(5, (3, 4, 3, 4))
    x = networks.inputs(network, 1, 11)
    label = int(network(x).argmax())
    region, spec = setting(network, eps=0.25, label=label)
    found = certify(network, region, label, deadline=deadline())
    rivals = [j for j in range(4) if j != label]
    margins = [exact_minimum(network, region, row[None]) for row in spec.C[0].double().numpy()]
    assert found.reachable == tuple(j for j, m in zip(rivals, margins, strict=True) if m <= 0)
    assert found.excluded == tuple(j for j, m in zip(rivals, margins, strict=True) if m > 0)
    assert not found.undecided
    assert found.robust == (not found.reachable)
    assert milp(network, region, spec, deadline=deadline()).robust == found.robust


def test_an_attack_comes_first() -> None:
    network = networks.mlp(0, (3, 4, 3, 3))
    region, spec = setting(network)
    worst = min(optima(network, region, spec), key=lambda o: o.upper)
    assert worst.point is not None
    point = worst.point[None]
    broken = Spec(spec.C, spec.d - worst.upper - 1e-3, spec.clause)
    found = milp(network, region, broken, attack=lambda *_: point)
    assert found.domains == 0
    assert found.point is not None
    assert torch.equal(found.point, point[0])


def test_wrong_constants_are_caught_by_replay() -> None:
    """Bounds that are not bounds cut the true minimum off, or let through what the network does not do."""
    network = networks.mlp(1, (3, 4, 3, 3))
    region, spec = setting(network)
    boxes = preactivations(network, region, tight=False, dtype=F64)
    read = [n.operands[0] for n in network.graph.nodes if n.op is torch.relu]
    huge = {k: Interval(boxes[k].lower * 0 - 1e10, boxes[k].upper * 0 + 1e10) for k in read}
    right = optima(network, region, spec)
    for o, r in zip(optima(network, region, spec, intermediate=huge), right, strict=True):
        assert not (o.replayed and o.status == "optimal") or o.upper == pytest.approx(
            r.upper, abs=1e-4
        )
    narrow = {k: Interval(boxes[k].upper - 1e-3, boxes[k].upper) for k in read[-1:]}
    for o, r in zip(optima(network, region, spec, intermediate=narrow), right, strict=True):
        assert o.upper >= r.upper - 1e-6


def test_exact_intervals_are_inside_crown_s_and_are_attained() -> None:
    network = networks.mlp(2, (3, 4, 3, 3))
    region, _ = setting(network)
    exact = exact_preactivations(network, region, deadline=deadline())
    wide = preactivations(network, region, dtype=F64)
    second = [n.name for n in network.graph.nodes if n.op is F.linear][1]
    W, b = layers(network)[1]
    front = networks.Builder((3,))
    (W0, b0), _, _ = layers(network)
    h = front.relu(front(F.linear, front.x, torch.from_numpy(W0), torch.from_numpy(b0)))
    front(F.linear, h, torch.from_numpy(W), torch.from_numpy(b))
    part = front.network(F64)
    for i in range(len(b)):
        low = exact_minimum(part, region, np.eye(len(b))[i : i + 1])
        high = -exact_minimum(part, region, -np.eye(len(b))[i : i + 1])
        stable = wide[second].lower[0, i] >= 0 or wide[second].upper[0, i] <= 0
        found = (exact[second].lower[0, i].item(), exact[second].upper[0, i].item())
        assert found[0] <= low + 1e-9
        assert found[1] >= high - 1e-9
        if not stable:
            assert found == pytest.approx((low, high), abs=1e-4)
    assert (exact[second].lower >= wide[second].lower - 1e-4).all()


# -- the solver and its process ----------------------------------------------------------------------------------


def knapsack(n: int = 60, seed: int = 0) -> tuple[Program, np.ndarray]:
    """A market-split problem: small, and far beyond any solver in a second."""
    generator = np.random.default_rng(seed)
    A = generator.integers(0, 100, (6, n)).astype(float)
    half = A.sum(1) // 2
    matrix = Table.of(np.hstack([A, np.eye(6), -np.eye(6)]))
    columns = n + 12
    program = Program(
        np.zeros(columns), np.append(np.ones(n), np.full(12, INF)), np.arange(columns) < n,
        half, half, matrix.starts.astype(np.int32), matrix.column.astype(np.int32), matrix.value, np.zeros(6),
    )  # fmt: skip
    return program, np.append(np.zeros(n), np.ones(12))


def test_the_deadline_holds_and_leaves_a_bound() -> None:
    program, cost = knapsack()
    begin = time.perf_counter()
    (found,) = apart(program, cost[None], Limits(1.0))
    assert time.perf_counter() - begin < 1.0 + programs.GRACE + 3.0
    assert found.status == "out of time"
    assert found.lower <= found.upper


def test_a_lack_of_memory_is_a_status() -> None:
    program, cost = knapsack()
    (found,) = apart(program, cost[None], Limits(60.0, memory=60 << 20))
    assert found.status != "optimal"
    assert found.lower == -INF
    network = networks.mlp(0, (3, 4, 3, 3))
    region, spec = setting(network)
    outcome = milp(network, region, spec, memory=60 << 20, deadline=deadline())
    assert not outcome.robust
    assert outcome.point is None
    assert outcome.reason


def test_a_crash_is_a_status(monkeypatch: pytest.MonkeyPatch) -> None:
    network = networks.mlp(0, (3, 4, 3, 3))
    region, spec = setting(network)
    monkeypatch.setattr(programs.sys, "executable", "/bin/false")
    outcome = milp(network, region, spec, deadline=deadline())
    assert not outcome.robust
    assert "died with code 1" in outcome.reason


def test_ctrl_c_ends_the_child() -> None:
    program, cost = knapsack()
    children: list[int] = []

    def running() -> list[int]:
        pids = [int(p.name) for p in Path("/proc").iterdir() if p.name.isdigit()]
        return [p for p in pids if child_of_us(p)]

    before = running()  # of other tests

    def interrupt(_i: int, _s: Any) -> None:
        children.extend(p for p in running() if p not in before)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        apart(program, np.stack([0 * cost, cost]), Limits(60.0), done=interrupt)
    assert children
    assert not any(child_of_us(p) for p in children)


def child_of_us(pid: int) -> bool:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return False
    return int(fields[1]) == os.getpid() and fields[0] != "Z"


def test_limits_stop_at_a_bound_or_a_point() -> None:
    network = networks.mlp(0, (3, 4, 3, 3))
    region, spec = setting(network)
    passed = deadline(-1.0)
    outcome = milp(network, region, spec, deadline=passed)
    assert outcome.reason == "out of time"
    assert not outcome.robust


def test_bad_arguments_are_named() -> None:
    network = networks.mlp(0)
    region, spec = setting(network)
    with pytest.raises(ValueError, match=r"backend.*'higs'.*Did you mean 'highs'"):
        milp(network, region, spec, backend="higs")
    for backend in ("scip", "gurobi"):
        package, _ = programs.BACKENDS[backend]
        if programs.find_spec(package) is None:
            with pytest.raises(SolverError, match=rf"pip install {package}"):
                milp(network, region, spec, backend=backend)
    two = Region.ball(networks.inputs(network, 2, 0), 0.1, INF)
    with pytest.raises(ValueError, match=r"region.*2 examples"):
        milp(network, two, Spec.label(torch.tensor([0, 1]), 3))
    with pytest.raises(ValueError, match="spec"):
        milp(network, region, Spec.functional(torch.ones(1, 1, 5)))


def test_nan_weights_are_never_robust() -> None:
    network = networks.mlp(0)
    module: Any = network.module
    with torch.no_grad():
        module.p0[0, 0] = math.nan
    region, spec = setting(network)
    outcome = milp(network, region, spec, deadline=deadline())
    assert not outcome.robust
    assert outcome.point is None


@pytest.mark.parametrize(("backend", "package"), [("scip", "pyscipopt"), ("gurobi", "gurobipy")])
@pytest.mark.parametrize("p", [INF, 1.0])
def test_the_other_back_ends_give_the_same_answers(backend: str, package: str, p: float) -> None:
    pytest.importorskip(package, reason=f"{package} is not installed")
    network = networks.mlp(0, (3, 4, 3, 3))
    region, spec = setting(network, p)
    ours = optima(network, region, spec, deadline=deadline())
    theirs = optima(network, region, spec, deadline=deadline(), backend=backend)
    for a, b in zip(ours, theirs, strict=True):
        assert (a.status, b.status) == ("optimal", "optimal")
        assert b.lower == pytest.approx(a.lower, abs=1e-6)
        assert b.upper == pytest.approx(a.upper, abs=1e-6)
        assert b.replayed
    assert milp(network, region, spec, deadline=deadline(), backend=backend).robust is (
        milp(network, region, spec, deadline=deadline()).robust
    )
