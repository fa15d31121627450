"""The two jaws, and the one function that may declare success."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import calipers
from calipers.bracket import Bracket, Evidence, Verdict, witness
from calipers.errors import ModelError, SoundnessError
from calipers.graph.capture import capture
from calipers.graph.graph import Network
from calipers.sets import Region, ThreatModel
from calipers.spec import Spec

INF = math.inf


def double(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def bracket(
    lower: list[float],
    upper: list[float],
    name: str = "m",
    rounding: float = 0.0,
    point: float | None = None,
) -> Bracket:
    n = len(lower)
    return Bracket(
        double(*lower), double(*upper), None if point is None else torch.full((n, 2), point), double(*[rounding] * n),
        (Evidence(name),) * n, (Evidence(name),) * n,
    )  # fmt: skip


# -- meet ----------------------------------------------------------------------------------------


def test_meet_takes_the_inner_ends_with_their_evidence_and_witness() -> None:
    a = bracket([-1, 0.5, -INF], [1, 2, 3], "a", point=0.1)
    b = bracket([-2, 0.7, -5], [0.5, 2, INF], "b", point=0.2)
    both = a.meet(b)
    assert both.lower.tolist() == [-1, 0.7, -5]
    assert both.upper.tolist() == [0.5, 2, 3]
    assert [e.method for e in both.lower_evidence if e] == ["a", "b", "b"]
    assert [e.method for e in both.upper_evidence if e] == ["b", "a", "a"]  # a tie keeps the first
    assert both.witness is not None
    torch.testing.assert_close(both.witness[:, 0], torch.tensor([0.2, 0.1, 0.1]))
    assert a.lower.tolist() == [-1, 0.5, -INF]  # the arguments are untouched


@given(st.lists(st.tuples(*[st.floats(-3, 3)] * 4), min_size=1, max_size=5))
def test_meet_is_the_intersection(rows: list[tuple[float, ...]]) -> None:
    """The ends by min and max in plain Python; an empty row, and only that, is a contradiction."""
    first = bracket([min(r[:2]) for r in rows], [max(r[:2]) for r in rows])
    second = bracket([min(r[2:]) for r in rows], [max(r[2:]) for r in rows])
    lower = [max(min(r[:2]), min(r[2:])) for r in rows]
    upper = [min(max(r[:2]), max(r[2:])) for r in rows]
    if any(lo > up for lo, up in zip(lower, upper, strict=True)):
        with pytest.raises(SoundnessError):
            first.meet(second)
        with pytest.raises(SoundnessError):
            second.meet(first)
        return
    for both in (first.meet(second), second.meet(first)):
        assert both.lower.tolist() == lower
        assert both.upper.tolist() == upper
        assert both.meet(first).lower.tolist() == lower


def test_unknown_is_neutral() -> None:
    a = bracket([0.1, -2], [0.4, -1], point=0.3)
    for both in (a.meet(Bracket.unknown(2)), Bracket.unknown(2).meet(a)):
        assert torch.equal(both.lower, a.lower)
        assert torch.equal(both.upper, a.upper)
        assert both.witness is not None
        assert torch.equal(both.witness, a.witness)


def test_contradiction_names_row_and_methods() -> None:
    a = bracket([0.0, 0.5], [1, 1], "bounds")
    b = bracket([-1, -1], [1, 0.4], "attack")
    with pytest.raises(
        SoundnessError,
        match=r"example 1: lower end 0\.5 \(bounds\) exceeds upper end 0\.4 \(attack\)",
    ):
        a.meet(b)
    with pytest.raises(SoundnessError, match="1 rows against 2"):
        bracket([0], [1]).meet(b)


def test_within_rounding_is_unknown_with_its_reason() -> None:
    a = bracket([1e-9], [1], "bounds")
    b = bracket([-1], [-1e-9], "attack", rounding=3e-9)
    both = a.meet(b)
    assert both.verdict() == [Verdict.UNKNOWN]
    assert both.reason(0) == "within rounding (3e-09)"
    assert both.accuracy() == (0.0, 1.0)
    with pytest.raises(SoundnessError):
        a.meet(bracket([-1], [-1e-9], rounding=1.9e-9))


def test_a_row_without_a_point_does_not_borrow_one() -> None:
    """The witness attains the upper end, or is NaN: never a point of another method that did worse."""
    exact = bracket([-3, -3], [-1, 2], "exact")
    attack = bracket([-INF, -INF], [-0.5, 1], "attack", point=0.2)
    for both in (exact.meet(attack), attack.meet(exact)):
        assert both.upper.tolist() == [-1, 1]
        assert both.witness is not None
        assert torch.isnan(both.witness[0]).all()
        torch.testing.assert_close(both.witness[1], torch.full((2,), 0.2))


def test_scatter_meets_some_rows() -> None:
    a = bracket([-1, -1, -1], [1, 1, 1], "a", point=0.1)
    part = bracket([0.5, -0.5], [0.75, -0.25], "b", rounding=1e-3, point=0.2)
    for index in (torch.tensor([2, 0]), torch.tensor([False, True, True])):
        whole = a.scatter(index, part)
        rows = torch.arange(3)[index].tolist()
        for i in range(3):
            k = rows.index(i) if i in rows else None
            assert whole.lower[i] == (-1 if k is None else part.lower[k])
            assert whole.upper[i] == (1 if k is None else part.upper[k])
            assert whole.witness is not None
            assert whole.witness[i, 0].item() == pytest.approx(0.1 if k is None else 0.2)
            evidence = whole.lower_evidence[i]
            assert evidence is not None
            assert evidence.method == ("a" if k is None else "b")
            assert whole.rounding is not None
            assert whole.rounding[i] == (0 if k is None else 1e-3)
    assert a.upper.tolist() == [1, 1, 1]
    with pytest.raises(SoundnessError, match="example 2"):
        a.scatter(torch.tensor([2]), bracket([2], [3]))


def test_indexing() -> None:
    a = bracket([-1, 0.5, -3], [1, 2, -1], point=0.1)
    for index in (torch.tensor([2, 1]), torch.tensor([False, True, True]), slice(1, 3)):
        part = a[index]  # type: ignore[index]
        assert torch.equal(part.lower, a.lower[index])
        assert len(part) == len(part.lower_evidence) == 2
        assert part.witness is not None
        assert len(part.witness) == 2


# -- verdicts ------------------------------------------------------------------------------------


def test_verdicts_and_accuracy() -> None:
    nan = math.nan
    b = bracket([0.1, 0.0, -1, -1, nan, nan, INF, -INF], [1, 1, 0, 1e-300, nan, -1, INF, INF])
    V = Verdict
    assert b.verdict() == [
        V.ROBUST,
        V.UNKNOWN,
        V.VULNERABLE,
        V.UNKNOWN,
        V.UNKNOWN,
        V.VULNERABLE,
        V.ROBUST,
        V.UNKNOWN,
    ]
    assert b.accuracy() == (2 / 8, 6 / 8)
    assert b.reason(0) == "proved by m"
    assert b.reason(2) == "broken by m"
    assert b.reason(1) == "margin between 0 and 1"
    assert b.lower[4] == -INF
    assert b.upper[4] == INF


def test_nan_bound_never_proves() -> None:
    b = Bracket.from_bound(torch.tensor([math.nan, 1.0]), Evidence("ibp"))
    assert b.verdict() == [Verdict.UNKNOWN, Verdict.ROBUST]
    assert Bracket.unknown(2).meet(b).verdict() == [Verdict.UNKNOWN, Verdict.ROBUST]


def test_no_examples() -> None:
    assert Bracket.unknown(0).verdict() == []
    certified, empirical = Bracket.unknown(0).accuracy()
    assert certified <= empirical


# -- witness -------------------------------------------------------------------------------------


def linear() -> nn.Module:
    """Two logits (x0, x1): margin x0 − x1 for label 0."""
    net = nn.Linear(2, 2, bias=False)
    net.weight.data = torch.eye(2)
    return net


def setting(rows: int = 1, eps: object = "0.1") -> tuple[Region, Spec]:
    x = torch.tensor([[0.55, 0.5]]).expand(rows, 2)
    return ThreatModel(INF, eps).around(x), Spec.label(torch.zeros(rows, dtype=torch.long), 2)  # type: ignore[arg-type]


def test_a_witness_counts_and_its_margin_is_the_upper_end() -> None:
    region, spec = setting(3)
    x = torch.tensor([[0.5, 0.55], [0.55, 0.5], [0.5, 0.5]])
    b = witness(linear(), region, spec, x, evidence=Evidence("attack", work=3))
    expected = x.double()[:, 0] - x.double()[:, 1]
    torch.testing.assert_close(b.upper, expected, rtol=0, atol=1e-15)
    assert b.verdict() == [Verdict.VULNERABLE, Verdict.UNKNOWN, Verdict.VULNERABLE]  # a tie counts
    assert b.lower.tolist() == [-INF] * 3
    assert b.witness is not None
    assert torch.equal(b.witness, x)
    assert b.upper_evidence[0] == Evidence("attack", work=3)
    loose = Spec(spec.C, spec.d, spec.clause, torch.tensor([False]))
    assert (
        witness(linear(), region, loose, x).verdict()[2] is Verdict.UNKNOWN
    )  # >= 0 holds at a tie


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_ulp_outside_is_not_accepted(dtype: torch.dtype) -> None:
    region, spec = setting()
    net = linear().to(dtype)
    edge = region.maximizer(torch.tensor([[-1.0, 1.0]], dtype=dtype))
    assert witness(net, region, spec, edge).verdict() == [Verdict.VULNERABLE]
    for i, away in ((0, -INF), (1, INF)):
        out = edge.clone()
        out[0, i] = torch.nextafter(out[0, i], torch.tensor(away, dtype=dtype))
        b = witness(net, region, spec, out)
        assert b.verdict() == [Verdict.UNKNOWN]
        assert b.upper.tolist() == [INF]


@pytest.mark.parametrize("value", [math.nan, INF, -INF])
def test_outputs_that_are_no_numbers_are_not_accepted(value: float) -> None:
    region, spec = setting()

    def model(x: Tensor) -> Tensor:
        return torch.stack([torch.full((len(x),), -1.0), torch.full((len(x),), value)], 1)

    assert witness(model, region, spec, torch.tensor([[0.5, 0.55]])).upper.tolist() == [INF]
    module = linear()
    module.weight.data[1, 1] = value
    assert witness(module, region, spec, torch.tensor([[0.5, 0.55]])).upper.tolist() == [INF]
    assert witness(linear(), region, spec, torch.tensor([[0.5, value]])).upper.tolist() == [INF]


def test_every_replica_must_agree() -> None:
    region, spec = setting(2)
    x = torch.tensor([[0.5, 0.55], [0.5, 0.56]])
    calls: list[Tensor] = []

    def agrees(z: Tensor) -> Tensor:
        calls.append(z)
        return z

    def disagrees(z: Tensor) -> Tensor:
        return torch.where(z[:, 1:] < 0.555, z.flip(1), z)

    assert (
        witness(linear(), region, spec, x, replicas=[agrees]).verdict() == [Verdict.VULNERABLE] * 2
    )
    assert [tuple(z.shape) for z in calls] == [(1, 2), (1, 2)]  # each alone
    b = witness(linear(), region, spec, x, replicas=[agrees, disagrees])
    assert b.verdict() == [Verdict.UNKNOWN, Verdict.VULNERABLE]
    assert b.upper[0] > 0
    nan = witness(linear(), region, spec, x, replicas=[lambda z: z * math.nan])
    assert nan.upper.tolist() == [INF, INF]


def test_float64_must_agree() -> None:
    """float32 rounds the margin to a tie; in float64 it is positive, so nothing is broken."""
    net = nn.Linear(2, 2)
    net.weight.data = torch.eye(2)
    net.bias.data = torch.tensor([2.0**25, 2.0**25])
    region, spec = setting()
    x = torch.tensor([[0.55, 0.5]])
    assert (net(x)[0, 0] - net(x)[0, 1]).item() == 0
    b = witness(net, region, spec, x)
    assert b.verdict() == [Verdict.UNKNOWN]
    assert b.upper[0] > 0
    assert witness(Network(*_captured()), region, spec, torch.tensor([[0.5, 0.55]])).verdict() == [
        Verdict.VULNERABLE
    ]


def _captured() -> tuple[object, nn.Module, tuple[int, ...]]:
    net = capture(linear(), torch.zeros(1, 2))
    return net.graph, net.module, net.input_shape


class OfTheBatch(nn.Module):
    """Wrong only in company."""

    def forward(self, x: Tensor) -> Tensor:
        return x if len(x) == 1 else x.flip(1)


def test_a_violation_in_a_batch_only_is_no_success() -> None:
    region, spec = setting(2)
    x = torch.tensor([[0.55, 0.5], [0.56, 0.5]])
    assert spec.violated(OfTheBatch()(x)).all()
    for model in (OfTheBatch(), lambda z: OfTheBatch()(z)):
        b = witness(model, region, spec, x)
        assert b.verdict() == [Verdict.UNKNOWN] * 2
        assert (b.upper > 0).all()


def test_the_callers_model_is_unchanged() -> None:
    net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Dropout(), nn.Linear(3, 2))
    net.eval()
    net[0].train()  # harmless there, and not to be changed either
    net[0].weight.grad = torch.ones(3, 2)
    state = copy.deepcopy(net.state_dict())
    modes = [m.training for m in net.modules()]
    region, spec = setting(4)
    x = region.sample(torch.arange(4)).requires_grad_()
    b = witness(net, region, spec, x)
    assert [m.training for m in net.modules()] == modes
    assert all(
        torch.equal(v, state[k]) and v.dtype == state[k].dtype for k, v in net.state_dict().items()
    )
    assert torch.equal(net[0].weight.grad, torch.ones(3, 2))
    assert net[3].weight.grad is None
    assert x.grad is None
    assert b.witness is not None
    assert not b.witness.requires_grad
    assert not b.upper.requires_grad
    assert all(p.requires_grad for p in net.parameters())


@given(st.integers(0, 2**31))
def test_upper_end_is_attained(seed: int) -> None:
    """Against numpy in float64: the margin of the logits at the point, wherever the point is a member."""
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(4, 3, generator=generator)
    net = nn.Linear(3, 4, bias=False)
    net.weight.data = W
    x = torch.rand(5, 3, generator=generator)
    y = torch.randint(4, (5,), generator=generator)
    region = ThreatModel(2, 0.3).around(x)
    points = x + 0.2 * torch.randn(5, 3, generator=generator)
    b = witness(net, region, Spec.label(y, 4), points)
    logits = points.double().numpy() @ W.double().numpy().T
    for i in range(5):
        distance = ((points[i].double() - x[i].double()) ** 2).sum().sqrt().item()
        inside = distance <= 0.3 and 0 <= points[i].min() <= points[i].max() <= 1
        margin = logits[i, y[i]] - max(v for j, v in enumerate(logits[i]) if j != y[i])
        assert abs(distance - 0.3) > 1e-9
        assert b.upper[i].item() == (pytest.approx(margin, abs=1e-5) if inside else INF)
        assert (b.verdict()[i] is Verdict.VULNERABLE) == (inside and margin <= 0)


def test_training_mode_of_batch_dependent_layers_is_refused_and_nothing_changes() -> None:
    module = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 3))
    before = {k: v.clone() for k, v in module.state_dict().items()}
    x, y = torch.rand(5, 4), torch.zeros(5, dtype=torch.int64)
    region, spec = ThreatModel(2.0, 0.1).around(x), Spec.label(y, 3)
    with pytest.raises(ModelError, match=r"^model: 1 in training mode; call \.eval\(\)"):
        witness(module, region, spec, x)
    with pytest.raises(ModelError, match="training mode"):
        calipers.attack(module, x, y, ThreatModel(2.0, 0.1))
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())
    assert len(witness(module.eval(), region, spec, x)) == 5
