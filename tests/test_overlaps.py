"""Sets that hold an example of another class, against a loop over all pairs."""

from __future__ import annotations

import math
import time

import pytest
import torch

import calipers as cp
from calipers.evaluate import checks
from calipers.evaluate.checks import overlaps
from calipers.sets import ThreatModel
from calipers.zoo import mlp

INF = math.inf


def every_pair(x, y, threat):
    """For each example the others of another class in its set, by the definition."""
    region = threat.around(x)
    held = {}
    for i in range(len(x)):
        inside = region[torch.full((len(x),), i)].contains(x)
        held[i] = [j for j in range(len(x)) if inside[j] and y[j] != y[i]]
    return {i: js for i, js in held.items() if js}


def compare(x, y, threat, **options) -> int:
    held, found = every_pair(x, y, threat), overlaps(x, y, threat, **options)
    if not held:
        assert found is None
        return 0
    assert found is not None
    assert found.count == len(held)
    assert found.second in held[found.first]
    gaps = {(i, j): (x[i] - x[j]).flatten().norm(p=threat.p).item() for i in held for j in held[i]}
    assert found.distance == pytest.approx(gaps[found.first, found.second], rel=1e-5)
    if threat.p == 2:  # the order in which pairs are looked at
        assert found.distance == pytest.approx(min(gaps.values()), rel=1e-5)
    return found.count


def many_comparisons() -> int:
    generator = torch.Generator().manual_seed(0)
    total = 0
    for eps in (0.0, 0.1, 0.3, 0.6, 2.0):
        for p in (1.0, 2.0, INF):
            x = torch.rand(40, 3, 1, generator=generator)
            x[7] = x[3]
            y = torch.randint(0, 3, (40,), generator=generator)
            y[7], y[3] = 0, 1
            for memory in (1, 10_000, 1 << 27):
                total += compare(x, y, ThreatModel(p, eps), memory=memory)
            mask = torch.tensor([True, False, True]).view(3, 1)
            total += compare(x, y, ThreatModel(p, eps, mask=mask))
    total += compare(x, y, ThreatModel(INF, torch.tensor([[0.5], [0.0], [0.3]])))
    levels = (x * 255).round() / 255
    return total + compare(levels, y, ThreatModel(2, "40/255", grid="1/255"))


def test_overlaps_are_all_pairs() -> None:
    assert many_comparisons() > 100


def test_the_note_has_the_figures() -> None:
    x = torch.tensor([[0.1, 0.1], [0.9, 0.9], [0.12, 0.1]])
    y = torch.tensor([0, 0, 2])
    found = overlaps(x, y, ThreatModel(INF, "0.05"))
    assert (found.count, found.tried) == (2, 3)
    note = found.note(y, ThreatModel(INF, "0.05"), torch.tensor([10, 11, 12]))
    assert "the sets of 2 of 3 examples hold an example of another class" in note
    assert "are 0.02 apart; linf eps=0.05 in [0, 1]" in note
    assert "10, class 0" in note
    assert "12, class 2" in note
    assert overlaps(x, y, ThreatModel(INF, "0.01")) is None


def test_an_audit_notes_it() -> None:
    x = torch.rand(30, 4)
    network = cp.capture(mlp(4, 8, 3), x[:2])
    y = torch.arange(30) % 3
    wide = cp.audit(network, (x, y), ThreatModel(INF, 0.5))
    assert any("eps is large for these data" in note for note in wide.notes)
    narrow = cp.audit(network, (x, y), ThreatModel(INF, 1e-4))
    assert not any("eps is large" in note for note in narrow.notes)


def test_large_data_cost_little() -> None:
    x = torch.rand(3000, 784)
    y = torch.arange(3000) % 10
    begin = time.process_time()
    assert overlaps(x, y, ThreatModel(INF, 0.1)) is None
    assert time.process_time() - begin < 10
    found = overlaps(x, y, ThreatModel(INF, 1.0), work=100 * 3000 * 784)
    assert found.tried == found.count == 100


def low_reach(region):
    """Half the radius."""
    return TRUE_REACH(region) / 4


TRUE_REACH = checks._reach


def test_a_planted_fault_is_caught(monkeypatch) -> None:
    monkeypatch.setattr(checks, "_reach", low_reach)
    with pytest.raises(AssertionError):
        many_comparisons()
