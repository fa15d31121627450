"""Work is what the attacks' docstrings say they cost, and counting it changes nothing."""

from __future__ import annotations

import math
import time

import pytest
import torch
from torch import nn

import calipers as cp
from calipers.attacks import fgsm, pgd
from calipers.bracket import in_double, require_eval, witness
from calipers.data import load
from calipers.errors import ModelError
from calipers.models import load_model
from calipers.work import Counted, bare, counted, counting, spend


@pytest.fixture(scope="module")
def case():
    network, data = load_model("digits_standard"), load("digits")
    x, y = data.x[:20], data.y[:20]
    return network, cp.ThreatModel(math.inf, "0.05").around(x), cp.Spec.label(y, 10)


@pytest.mark.parametrize(
    ("method", "forward", "backward"),
    [
        (fgsm, 1, 1),
        (lambda *a, **k: pgd(*a, steps=7, **k), 8, 7),
        (lambda *a, **k: pgd(*a, steps=7, restarts=3, seeds=torch.arange(20), **k), 24, 21),
    ],
)
def test_attacks_cost_what_they_say(case, method, forward: int, backward: int) -> None:
    network, region, spec = case
    with counting() as work:
        points = method(counted(network), region, spec)
    assert (work.forward, work.backward) == (20 * forward, 20 * backward)
    assert work.passes == 20 * (forward + backward)
    assert torch.equal(points, method(network, region, spec))


def test_rows_that_leave_the_batch_cost_nothing_more(case) -> None:
    network, region, spec = case
    with counting() as work:
        pgd(counted(network), region, spec, steps=30, loss="margin", drop=True)
    assert 20 < work.passes < 20 * 61


def test_blocks_nest_and_spend_adds() -> None:
    spend(5)  # nobody counts
    model = counted(nn.Linear(2, 2))
    with counting() as outer:
        model(torch.ones(3, 2))
        with counting() as inner:
            spend(1.5)
            model(torch.ones(4, 2, requires_grad=True))
            with torch.no_grad():
                model(torch.ones(2, 2, requires_grad=True))
    assert (inner.forward, inner.backward) == (7.5, 4)
    assert (outer.forward, outer.backward) == (
        10.5,
        4,
    )  # a parameter's gradients are no backward pass
    model(torch.ones(3, 2))
    assert outer.forward == 10.5


def test_the_witness_sees_through_the_counter() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).eval()
    twin = in_double(counted(model))
    assert twin(torch.ones(1, 3)).dtype == torch.float64
    assert in_double(counted(lambda x: x)) is None
    assert bare(counted(counted(model))) is model
    assert isinstance(counted(model), Counted)
    assert counted(model).training is False
    with pytest.raises(ModelError, match="training mode"):
        require_eval(counted(model.train()))
    model.eval()
    x = torch.rand(5, 3)
    region, spec = (
        cp.ThreatModel(2, 0.1).around(x),
        cp.Spec.label(torch.zeros(5, dtype=torch.long), 2),
    )
    with counting() as work:
        seen = witness(counted(model), region, spec, x)
    plain = witness(model, region, spec, x)
    assert torch.equal(seen.upper, plain.upper)
    assert torch.equal(seen.rounding, plain.rounding)
    broken = int((plain.upper <= 0).sum())
    assert work.passes == 10 + 2 * broken
    assert not any(h for h in (model._forward_hooks, model._backward_hooks))


def test_an_audit_reports_it(tmp_path) -> None:
    network, data = load_model("digits_pgd"), load("digits")
    pair = data.x[:30], data.y[:30]
    threat = cp.ThreatModel(math.inf, "0.1")
    result = cp.audit(network, pair, threat, run=tmp_path)
    rows = {row.name: row for row in result.methods}
    assert 2 <= rows["clean"].work / rows["clean"].tried <= 4
    assert 4 <= rows["fgsm"].work / rows["fgsm"].tried <= 6
    assert rows["fgsm"].passes in {f"{v / 10:.1f}" for v in range(40, 61)}
    evidence = [e for e in result.bracket.upper_evidence if e]
    assert all(e.work > 0 for e in evidence if "pgd" in e.method or e.method in ("clean", "fgsm"))
    assert all(entry["work"] >= 0 for entry in result.json()["methods"])
    again = cp.audit(network, pair, threat, run=tmp_path)
    for first, second in zip(result.methods, again.methods, strict=True):
        assert second.work == pytest.approx(first.work)
    explanation = cp.explain(network, pair, threat)
    assert next(v.work for v in explanation.values if v.name == "fgsm") in (4.0, 6.0)


def test_counting_is_cheap(case) -> None:
    """Far below the noise of a test machine."""
    network, region, spec = case

    def best(model) -> float:
        times = []
        for _ in range(7):
            begin = time.process_time()
            with counting():
                pgd(model, region, spec, steps=40)
            times.append(time.process_time() - begin)
        return min(times)

    assert best(counted(network)) < 1.25 * best(network)
