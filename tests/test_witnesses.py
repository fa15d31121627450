"""Attacks over a data set, their witnesses on disk, replays and transfer, from Python."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction
from importlib import import_module

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import calipers as cp
from calipers.data import load
from calipers.errors import DataError, ModelError
from calipers.evaluate import empirical, load_witnesses, replay, save_witnesses, transfer
from calipers.evaluate.replay import TOLERANCE, excess
from calipers.evaluate.witnesses import contact_sheet
from calipers.models import load_model

NORMS = (1.0, 2.0, math.inf)


@pytest.fixture(scope="module")
def net():
    return load_model("digits_pgd")


@pytest.fixture(scope="module")
def found(net):
    data = load("digits")
    threat = cp.ThreatModel(math.inf, "0.1")
    return empirical(net, (data.x[:60], data.y[:60]), threat, level="quick").witnesses


# -- empirical accuracy ----------------------------------------------------------------------------------


@pytest.mark.parametrize("p", NORMS)
def test_empirical_accuracy_bounds_the_audits(net, p):
    data = load("digits")
    x, y = data.x[:40], data.y[:40]
    threat = cp.ThreatModel(p, {1.0: 1.0, 2.0: 0.4, math.inf: 0.08}[p])
    result = empirical(net, (x, y), threat)
    audit = cp.audit(net, (x, y), threat)
    assert audit.certified <= result.accuracy <= result.clean_accuracy
    assert (result.bracket.upper >= audit.bracket.lower).all()
    assert torch.isfinite(result.bracket.upper).all()
    assert result.bracket.witness is not None
    assert threat.around(x).contains(result.bracket.witness).all()


def test_what_a_replica_refuses_is_no_success(monkeypatch):
    """onnxruntime disagreeing near the boundary: the search goes on there until it agrees, or fails."""
    net = cp.capture(nn.Linear(1, 2), torch.zeros(1, 1))
    net.module.weight.data = torch.tensor([[1.0], [-1.0]])
    net.module.bias.data = torch.tensor([-0.5, 0.5])  # class 0 where x > 0.5
    module = import_module("calipers.evaluate.empirical")

    shift = torch.tensor([1e-5, -1e-5])
    monkeypatch.setattr(module, "onnxruntime_replica", lambda _: lambda x: net(x) + shift)
    x, y = torch.tensor([[0.6], [0.9]]), torch.tensor([0, 0])
    result = empirical(net, (x, y), cp.ThreatModel(math.inf, "0.100001"))
    assert result.broken == 0
    assert sum(stage.refused for stage in result.stages) >= 1
    result = empirical(net, (x, y), cp.ThreatModel(math.inf, "0.11"))
    assert result.broken == 1


def test_any_attack_with_the_signature_may_be_used(net):
    data = load("digits")

    def corners(model, region, spec, *, dtype, seeds):
        return region.maximizer(torch.ones_like(region.center, dtype=dtype))

    result = empirical(
        net, (data.x[:20], data.y[:20]), cp.ThreatModel(math.inf, 0.1), method=corners
    )
    assert [stage.name for stage in result.stages][1].endswith("corners()")
    assert result.accuracy <= result.clean_accuracy


def test_the_callers_model_is_left_in_training_mode():
    module = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    x, y = torch.rand(5, 4), torch.tensor([0, 1, 2, 0, 1])
    empirical(module.train(), (x, y), cp.ThreatModel(math.inf, 0.1), method="fgsm")
    assert module.training
    with pytest.raises(ModelError, match="probabilities"):
        empirical(nn.Sequential(module, nn.Softmax(-1)), (x, y), cp.ThreatModel(math.inf, 0.1))


# -- on disk ---------------------------------------------------------------------------------------------


THREATS = [
    cp.ThreatModel(math.inf, "8/255"),
    cp.ThreatModel(2.0, Fraction(1, 3), "-0.5", 2),
    cp.ThreatModel(1.0, 0.1, -math.inf, math.inf),
    cp.ThreatModel(math.inf, 8 / 255, grid="1/255"),
    cp.ThreatModel(
        math.inf,
        torch.full((1, 8, 8), 0.1),
        torch.zeros(1, 1, 1),
        torch.ones(1, 1, 1, dtype=torch.float64),
        mask=torch.rand(1, 8, 8) > 0.5,
    ),
]


@pytest.mark.parametrize("threat", THREATS)
def test_witnesses_come_back_as_they_were(found, threat, tmp_path):
    saved = replace(found, threat=threat)
    save_witnesses(tmp_path / "w", saved)
    loaded = load_witnesses(tmp_path / "w")
    for name in ("x", "y", "clean", "index", "margin", "outputs"):
        assert torch.equal(getattr(loaded, name), getattr(saved, name))
    for name in ("model", "data", "model_name", "data_name"):
        assert getattr(loaded, name) == getattr(saved, name)
    for name, value in vars(threat).items():
        again = getattr(loaded.threat, name)
        if isinstance(value, torch.Tensor):
            assert torch.equal(again, value)
            assert again.dtype is value.dtype
        elif isinstance(value, Fraction):
            assert Fraction(again) == value
        else:
            assert (again, type(again)) == (value, type(value))


def test_none_broken(net, tmp_path):
    data = load("digits")
    right = net(data.x).argmax(1) == data.y
    result = empirical(net, (data.x[right][:9], data.y[right][:9]), cp.ThreatModel(math.inf, "0"))
    assert (result.accuracy, result.broken) == (1.0, 0)
    save_witnesses(tmp_path / "w", result.witnesses)
    loaded = load_witnesses(tmp_path / "w")
    assert len(loaded) == 0
    assert replay(loaded, net)[0] == []
    assert transfer(loaded.x, loaded.y, net, clean=loaded.clean).transferred == 0
    assert not (tmp_path / "w" / "witnesses.png").exists()


def test_inputs_that_are_no_images_have_no_picture(tmp_path):
    torch.manual_seed(1)
    module = nn.Linear(4, 3)
    x, y = torch.rand(20, 4), torch.randint(3, (20,))
    result = empirical(module, (x, y), cp.ThreatModel(2.0, 0.5))
    save_witnesses(tmp_path / "w", result.witnesses)
    assert sorted(p.name for p in (tmp_path / "w").iterdir()) == [
        "counterexamples",
        "witnesses.npz",
    ]


def test_the_picture_has_a_column_each(found):
    picture = contact_sheet(found)
    assert picture is not None
    height, width, depth = picture.shape
    assert depth == 3
    changed = (found.x != found.clean).flatten(1).any(1).sum()
    assert width == min(10, int(changed)) * (96 + 12)
    assert height == 3 * (96 + 12) + 2 * (15 + 12)


def test_colour_images_and_any_size(found):
    count = len(found)
    for shape in ((3, 32, 32), (3, 5, 120), (1, 300, 200)):
        x = torch.rand(count, *shape)
        assert contact_sheet(replace(found, x=x, clean=x.flip(0))) is not None


def test_a_failed_save_leaves_nothing(found, tmp_path):
    bad = replace(found, outputs=found.outputs * math.nan)
    with pytest.raises(ValueError, match="finite"):
        save_witnesses(tmp_path / "w", bad)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"margin": np.zeros((2, 2))}, "do not fit"),
        ({"index": lambda a: -1 - a}, "negative"),
        ({"y": lambda a: a + 10}, "labels outside"),
        ({"x": lambda a: a * math.nan}, "NaN"),
        ({"x": lambda a: a.astype(np.float64)}, "do not fit"),
        ({"prediction": lambda a: a + 1}, "prediction"),
        ({"x": lambda a: a.astype(np.longdouble)}, "x: wrong type"),
        ({"x": lambda a: a.astype(">f4")}, "x: wrong type"),
        ({"format": np.array("else")}, "format"),
        ({"model": np.array(3)}, "model: wrong type"),
        ({"y": lambda a: a.astype(str)}, "y: wrong type"),
        ({"threat": np.array("{")}, "threat model"),
        ({"threat": np.array("[]")}, "threat model"),
        ({"threat": np.array('{"norm": "linf", "eps": "-1"}')}, "threat model"),
        ({"threat": np.array('{"norm": "linf", "eps": 1, "other": 2}')}, "threat model"),
        ({"threat": np.array('{"norm": "linf", "eps": null}')}, "threat model"),
        ({"threat_mask": np.array(["a"])}, "threat_mask: wrong type"),
    ],
)
def test_malformed_files(found, tmp_path, change, message):
    save_witnesses(tmp_path / "w", found)
    arrays = dict(np.load(tmp_path / "w" / "witnesses.npz", allow_pickle=False))
    for key, value in change.items():
        arrays[key] = value(arrays[key]) if callable(value) else value
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(DataError, match=message):
        load_witnesses(tmp_path / "bad.npz")


# -- replay ----------------------------------------------------------------------------------------------


@given(data=st.data(), p=st.sampled_from(NORMS), n=st.integers(1, 6))
def test_excess_agrees_with_the_set(data, p, n):
    """Members by `Region.contains` have none; what has none is a member but for the float64 nearest the border."""
    draw = st.lists(st.floats(0, 1, width=32), min_size=n, max_size=n)
    clean, z = (torch.tensor([data.draw(draw)]) for _ in range(2))
    eps = data.draw(st.sampled_from(["0.1", "1/3", 0.25, "8/255"]))
    threat = cp.ThreatModel(p, eps)
    region = threat.around(clean)
    x = data.draw(st.sampled_from([z, region.project(z), region.maximizer(z - 0.5)]))
    over = excess(threat, clean, x)
    if region.contains(x):
        assert over == 0
    elif over == 0:
        gap = (x - clean).double().flatten()
        length = torch.linalg.vector_norm(gap, ord=p).item()
        assert math.isclose(length, float(Fraction(eps)), rel_tol=1e-12)


@pytest.mark.parametrize("p", NORMS)
def test_excess_is_relative_to_the_radius(p):
    threat = cp.ThreatModel(p, "0.25", -4.0, 4.0)
    clean = torch.zeros(1, 3, dtype=torch.float64)
    x = torch.tensor([[0.0, -0.375, 0.0]], dtype=torch.float64)
    assert float(excess(threat, clean, x)) == pytest.approx(0.5)
    assert excess(threat, clean, x / 1.5) == 0
    assert 0 < excess(threat, clean, x / 1.5 * (1 + 1e-15)) < 1e-14
    assert excess(cp.ThreatModel(p, 0), clean, x) == math.inf
    frozen = replace(threat, mask=torch.tensor([True, False, True]))
    assert excess(frozen, clean, x / 10) == math.inf
    assert float(excess(replace(threat, lower=-0.125), clean, x)) == pytest.approx(
        max(0.5, 0.25 / 4.125)
    )


def test_a_network_that_differs_is_told_apart(found, net):
    assert {r.verdict for r in replay(found, net)[0]} == {"strict"}
    robust = cp.capture(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), torch.zeros(1, 1, 8, 8))
    robust.module[1].weight.data.zero_()
    robust.module[1].bias.data.fill_(math.nan)
    replayed, _ = replay(found, robust)
    assert {r.verdict for r in replayed} == {"fails"}  # NaN is no violation


def test_evaluations_that_disagree_within_rounding_are_tolerant(found, net, monkeypatch):
    """The judge says broken, float64 says by a hair not."""
    module = import_module("calipers.evaluate.replay")

    one = replace(
        found,
        **{k: getattr(found, k)[:1] for k in ("x", "y", "clean", "index", "margin", "outputs")},
    )
    label = torch.nn.functional.one_hot(one.y, 10)

    def constant(margin):
        return lambda x: label * float(margin)

    for margin, verdict in ((0.5 * TOLERANCE, "tolerant"), (2 * TOLERANCE, "fails"), (0, "strict")):
        models = {"onnxruntime": constant(0), "torch float64": constant(margin)}
        monkeypatch.setattr(module, "evaluations", lambda _, m=models: (m, ()))
        assert replay(one, net)[0][0].verdict == verdict
        swapped = dict(zip(models, reversed(models.values()), strict=True))
        monkeypatch.setattr(module, "evaluations", lambda _, m=swapped: (m, ()))
        assert replay(one, net)[0][0].verdict == ("strict" if margin == 0 else "fails")


# -- transfer --------------------------------------------------------------------------------------------


def test_transfer_counts(found, net):
    own = transfer(found.x, found.y, net, clean=found.clean)
    assert own.accuracy == 0
    assert own.transferred == own.eligible
    assert transfer(found.clean, found.y, net).accuracy == own.clean_accuracy
    other = load_model("digits_standard")
    result = transfer(found.x, found.y, other, clean=found.clean)
    wrong = other(found.x).argmax(1) != found.y
    right = other(found.clean).argmax(1) == found.y
    assert result.transferred == int((wrong & right).sum())
    with pytest.raises(DataError, match="do not fit"):
        transfer(found.x, found.y[1:], net)
    with pytest.raises(ModelError, match="eval"):
        transfer(found.x, found.y, nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64)))
