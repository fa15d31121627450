"""`calipers.verify` and the audit's last stage: complete search under a time limit."""

from __future__ import annotations

import math
import time

import pytest
import torch

import calipers as cp
from calipers.bracket import Verdict
from calipers.errors import DataError, SoundnessError
from calipers.evaluate import solvers
from calipers.evaluate.cascade import select
from calipers.evaluate.limits import alarm
from calipers.evaluate.solvers import Entry
from calipers.exact import Outcome
from networks import mlp

INF = math.inf


@pytest.fixture
def network() -> cp.Network:
    return mlp(3, (4, 12, 10, 3))


def examples(network: cp.Network, count: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.rand(count, 4, generator=torch.Generator().manual_seed(1)) * 0.8 + 0.1
    return x, network(x).argmax(1)


def put(monkeypatch: pytest.MonkeyPatch, solve) -> None:
    class Ready(Entry):
        def load(self):
            return solve

    monkeypatch.setattr(solvers, "SOLVERS", (Ready("m.planted", lambda _: True, 1.0),))


COMPLETE = select(["clean", "complete"])


def test_brackets_of_a_batch(network: cp.Network) -> None:
    x, y = examples(network)
    bracket = cp.verify(network, x, y, cp.ThreatModel(INF, 0.02), seconds=20)
    assert len(bracket) == 12
    assert Verdict.ROBUST in bracket.verdict()
    for row, verdict in enumerate(bracket.verdict()):
        if verdict is Verdict.VULNERABLE:
            assert network(bracket.witness[row : row + 1]).argmax(1) != y[row]
    sampled = x.unsqueeze(1) + 0.02 * (2 * torch.rand(12, 200, 4) - 1)
    margins = cp.Spec.label(y, 3)
    for row in range(12):
        inside = sampled[row].clamp(0, 1)
        spec = margins[torch.tensor([row])]
        lowest = min(spec.margin_at(network(p[None])).item() for p in inside)
        assert bracket.lower[row] <= lowest + 1e-6


def test_wrong_labels_are_broken(network: cp.Network) -> None:
    x, y = examples(network, 3)
    bracket = cp.verify(network, x, (y + 1) % 3, cp.ThreatModel(INF, 0.01), seconds=5)
    assert bracket.verdict() == [Verdict.VULNERABLE] * 3


def test_the_most_promising_example_comes_first(network: cp.Network, monkeypatch) -> None:
    seen: list[tuple[float, float]] = []

    def solve(network, region, spec, *, deadline, **_) -> Outcome:
        lower = spec.margin(cp.interval(network, region, spec, dtype=torch.float64, rigorous=True))
        seen.append((lower.item(), deadline - time.perf_counter()))
        return Outcome(reason="planted")

    put(monkeypatch, solve)
    x, y = examples(network)
    cascade = select(["clean", "interval", "complete"])
    out = cp.audit(network, (x, y), cp.ThreatModel(INF, 0.2), seconds=30, cascade=cascade)
    bounds = [lower for lower, _ in seen]
    assert len(seen) > 3
    assert bounds == sorted(bounds, reverse=True)
    assert all(0 < left < 31 for _, left in seen)
    assert seen[0][1] < seen[-1][1]  # what the first ones leave, the last ones have
    assert out.methods[-1].tried == len(seen)
    assert out.methods[-1].decided == 0
    assert out.stopped is None


def test_only_proofs_and_replayed_points_count(network: cp.Network, monkeypatch) -> None:
    x, y = examples(network, 4)
    threat = cp.ThreatModel(INF, 0.2)
    ask = {"seconds": 20, "cascade": COMPLETE}
    put(monkeypatch, lambda *_, **__: Outcome(lower=1e-6))
    assert cp.audit(network, (x, y), threat, **ask).certified == 1
    for lower in (0.0, -1.0, math.nan):
        put(monkeypatch, lambda *_, lower=lower, **__: Outcome(lower=lower))
        assert cp.audit(network, (x, y), threat, **ask).certified == 0
    for point in (x[0], torch.full((4,), math.nan), x[0] + 5):
        put(monkeypatch, lambda *_, point=point, **__: Outcome(point=point))
        out = cp.audit(network, (x, y), threat, **ask)
        assert (out.certified, out.empirical) == (0, 1)


def test_a_false_proof_meets_the_witness(network: cp.Network, monkeypatch) -> None:
    """A search that returns a broken point and a positive bound contradicts itself."""
    x, y = examples(network, 1)
    other = torch.rand(5000, 4)
    broken = other[network(other).argmax(1) != y[0]][0]
    put(monkeypatch, lambda *_, **__: Outcome(lower=0.5, point=broken))
    with pytest.raises(SoundnessError, match="one of the two methods is wrong"):
        cp.audit(network, (x, y), cp.ThreatModel(INF, 1.0), seconds=9, cascade=COMPLETE)


def test_without_a_limit_nothing_is_searched(network: cp.Network, monkeypatch) -> None:
    put(monkeypatch, lambda *_, **__: 1 / 0)
    x, y = examples(network, 4)
    out = cp.audit(network, (x, y), cp.ThreatModel(INF, 0.2), cascade=COMPLETE)
    assert out.methods[-1].note == "not tried: needs a time limit"
    assert out.certified == 0
    assert out.stopped is None


def test_a_search_is_stopped_by_the_time_and_resumed(network, monkeypatch, tmp_path) -> None:
    """The stored run keeps proofs and drops what time left undecided, so that a second call tries it again."""
    calls: list[float] = []

    def slow(*_, deadline, **__) -> Outcome:
        calls.append(deadline)
        if len(calls) == 1:
            return Outcome(lower=1e-6)
        with alarm(deadline):
            while True:
                time.sleep(0.01)

    put(monkeypatch, slow)
    x, y = examples(network, 4)
    ask = {"cascade": COMPLETE, "run": tmp_path / "run"}
    begin = time.perf_counter()
    out = cp.audit(network, (x, y), cp.ThreatModel(INF, 0.2), seconds=5, **ask)
    assert time.perf_counter() - begin < 8
    assert (out.stopped, out.certified) == ("time", 0.25)
    assert out.cut.sum() == 3
    put(monkeypatch, lambda *_, **__: Outcome(lower=1e-6))
    out = cp.audit(network, (x, y), cp.ThreatModel(INF, 0.2), seconds=20, **ask)
    assert (out.stopped, out.certified) == (None, 1)


def test_deployed_asks_for_more(network: cp.Network, monkeypatch) -> None:
    specs: list[cp.Spec] = []

    def solve(_, __, spec, **___) -> Outcome:
        specs.append(spec)
        return Outcome(lower=1e-12)

    put(monkeypatch, solve)
    x, y = examples(network, 1)
    ask = {"seconds": 20, "cascade": COMPLETE}
    for deployed in (False, True):
        out = cp.audit(network, (x, y), cp.ThreatModel(INF, 0.2), deployed=deployed, **ask)
        assert out.certified == 1
    assert (specs[0].d == 0).all()
    assert (specs[1].d < 0).all()


def test_bad_arguments(network: cp.Network) -> None:
    x, y = examples(network, 2)
    threat = cp.ThreatModel(INF, 0.1)
    with pytest.raises(DataError, match="captured network"):
        cp.verify(torch.nn.Linear(4, 3), x, y, threat)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="seconds: 0"):
        cp.verify(network, x, y, threat, seconds=0)
    with pytest.raises(ValueError, match="y: 1 labels for 2"):
        cp.verify(network, x, y[:1], threat)
    with pytest.raises(DataError):
        cp.verify(network, x + 3, y, threat)
