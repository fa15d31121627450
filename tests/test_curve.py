"""Curves over the radius: nested both ways, sound, resumed, and cheaper than audits one by one."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

import calipers as cp
from calipers import ThreatModel, audit, curve
from calipers.bracket import Verdict
from calipers.data import load
from calipers.evaluate.cascade import Stage, select
from calipers.evaluate.curve import folder, halving
from calipers.evaluate.nested import radius
from calipers.evaluate.runs import read
from calipers.models import load_model
from calipers.spec import Spec

THREAT = ThreatModel(math.inf, "0.1")
EPS = ("0.02", "0.06", "0.1", "0.16", "0.3")
KEPT = select(["fgsm", "crown_ibp", "pgd-20", "crown"])


def digits(n=60):
    data = load("digits")
    return data.x[:n], data.y[:n]


@pytest.fixture(scope="module")
def network():
    return load_model("digits_pgd")


@pytest.fixture(scope="module")
def found(network, tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "curve"
    return curve(network, digits(), THREAT, EPS, run=run, cascade=KEPT), run


def test_both_ends_fall_and_nest(found):
    result, _ = found
    assert result.eps == (0.02, 0.06, 0.1, 0.16, 0.3)
    assert result.main.threat.eps == "0.02"
    for ends in (result.certified, result.empirical):
        assert list(ends) == sorted(ends, reverse=True)
    assert all(a <= b for a, b in zip(result.certified, result.empirical, strict=True))
    for small, large in zip(result.audits, result.audits[1:], strict=False):
        assert (small.bracket.lower >= large.bracket.lower).all()
        assert (small.bracket.upper >= large.bracket.upper).all()


def test_it_never_says_less_than_audits_one_by_one_and_never_the_opposite(found, network):
    result, _ = found
    for one in result.audits:
        alone = audit(network, digits(), one.threat, cascade=KEPT)
        pairs = list(zip(one.verdicts, alone.verdicts, strict=True))
        assert all(a is b for a, b in pairs if b is not Verdict.UNKNOWN)
        one.bracket.meet(alone.bracket)  # raises where they contradict each other


def test_it_does_less_work_than_audits_one_by_one(found, network):
    result, _ = found

    def tried(audits):
        return sum(r.tried for a in audits for r in a.methods if r.side != "carried")

    alone = [audit(network, digits(), a.threat, cascade=KEPT) for a in result.audits]
    assert tried(result.audits) < 0.7 * tried(alone)


def test_every_witness_breaks_the_network_inside_its_own_set(found, network):
    result, _ = found
    for one in result.audits:
        rows = [i for i, v in enumerate(one.verdicts) if v is Verdict.VULNERABLE]
        points = one.bracket.witness[rows]
        assert one.threat.around(one.x[rows]).contains(points).all()
        assert (Spec.label(one.y[rows], 10).margin_at(network(points)) <= 0).all()


def test_no_certified_example_breaks_under_a_strong_attack(found, network):
    result, _ = found
    for one in result.audits[1::2]:
        rows = [i for i, v in enumerate(one.verdicts) if v is Verdict.ROBUST]
        x, y = one.x[rows], one.y[rows]
        points = cp.attack(network, x, y, one.threat, method=cp.apgd)
        assert (Spec.label(y, 10).margin_at(network(points)) > 0).all()


def test_run_directories_say_the_same_and_go_on(found, network):
    result, run = found
    for one in result.audits:
        stored = read(folder(run, one.threat))
        assert [r.verdict for r in stored.records] == [v.name.lower() for v in one.verdicts]
    again = curve(network, digits(), THREAT, EPS, run=run, cascade=KEPT)
    for first, second in zip(result.audits, again.audits, strict=True):
        assert torch.equal(first.bracket.lower, second.bracket.lower)
        assert torch.equal(first.bracket.upper, second.bracket.upper)
    # an audit of one radius takes the same directory
    single = audit(network, digits(), result.audits[2].threat, run=run / "eps-0.1", cascade=KEPT)
    assert sum(r.stored for r in single.methods) > 0


def shy(model, region, spec, *, dtype, seeds):
    """An attack that finds nothing in large sets."""
    small = float(region.eps[0]) < 0.05
    return (
        cp.pgd(model, region, spec, dtype=dtype, seeds=seeds) if small else region.center.to(dtype)
    )


def bold(network, region, spec, **options):
    """A bound that proves nothing about small sets."""
    values = cp.crown(network, region, spec, **options)
    return values if float(region.eps[0]) > 0.05 else torch.full_like(values, -math.inf)


def test_what_one_radius_decides_reaches_all_others_and_their_directories(tmp_path):
    network = load_model("digits_standard")
    stages = (*select(["clean"]), Stage("shy", "attack", shy), Stage("bold", "bound", bold))
    eps = ("0.01", "0.03", "0.04", "0.06", "0.07")
    found = curve(network, digits(), THREAT, eps, run=tmp_path, cascade=stages)
    shyly, boldly = found.audits[2], found.audits[3]  # the last radii at which each says anything
    assert shyly.counts[Verdict.VULNERABLE] > 2
    assert boldly.counts[Verdict.ROBUST] > 20
    for place, one in enumerate(found.audits):
        for i, verdict in enumerate(one.verdicts):
            if place > 2 and shyly.verdicts[i] is Verdict.VULNERABLE:
                assert verdict is Verdict.VULNERABLE
            if place < 3 and boldly.verdicts[i] is Verdict.ROBUST:
                assert verdict is Verdict.ROBUST
                assert "bold at eps" in one.bracket.lower_evidence[i].method
        stored = read(folder(tmp_path, one.threat))
        assert [r.verdict for r in stored.records] == [v.name.lower() for v in one.verdicts]
        assert torch.tensor([r.lower for r in stored.records]).equal(one.bracket.lower.float())


def test_what_each_method_said_is_kept(found):
    result, _ = found
    for one in result.audits:
        lower = torch.full_like(one.bracket.lower, -math.inf)
        upper = -lower
        for row in one.methods:
            if row.units is not None:
                assert len(row.units.rows) == row.tried
                where = row.units.rows
                lower[where] = torch.maximum(lower[where], row.units.lower)
                upper[where] = torch.minimum(upper[where], row.units.upper)
        assert torch.equal(lower, one.bracket.lower)
        assert torch.equal(upper, one.bracket.upper)


def test_spans_name_the_radii_of_each_example(found):
    result, _ = found
    for i, (proved, broken) in enumerate(result.spans()):
        for one in result.audits:
            eps = float(one.threat.eps)
            assert (one.verdicts[i] is Verdict.ROBUST) == (eps <= float(proved or 0))
            assert (one.verdicts[i] is Verdict.VULNERABLE) == (eps >= float(broken or "inf"))


@pytest.mark.parametrize("p", [1, 2])
def test_other_norms_a_grid_and_a_closed_form(p):
    """A linear network: the robust radius is margin / ‖w‖ in the dual norm (no box reached)."""
    torch.manual_seed(0)
    net = nn.Linear(6, 2).double()
    x = torch.rand(30, 6, dtype=torch.float64)
    with torch.no_grad():
        y = net(x).argmax(1)
        gap = net.weight[0] - net.weight[1]
        limit = (gap @ x.T + net.bias[0] - net.bias[1]).abs() / gap.norm(math.inf if p == 1 else 2)
    threat = ThreatModel(p, 0.1, -10.0, 10.0)
    found = curve(net.float(), (x.float(), y), threat, ("1/10", 0.3, "0.7"))
    for one in found.audits:
        eps = float(radius(one.threat))
        for i, verdict in enumerate(one.verdicts):
            if abs(limit[i].item() - eps) > 1e-4:
                assert verdict is (Verdict.ROBUST if limit[i] > eps else Verdict.VULNERABLE)


def test_a_sample_has_simultaneous_limits_and_the_grid_nests(network):
    grid = replace(THREAT, grid="1/16")
    found = curve(network, load("digits"), grid, ("1/16", "1/8"), samples=30, cascade=KEPT)
    for one, (low, high) in zip(found.audits, found.confidence, strict=True):
        assert low <= one.confidence["certified"][0]
        assert high >= one.confidence["empirical"][1]
    assert found.json()["curve"][0]["eps"] == "1/16"


def test_interrupted_it_says_what_is_missing(network):
    seen = []

    def stop(at):
        seen.append(at.stage)
        raise KeyboardInterrupt

    found = curve(network, digits(10), THREAT, ("0.05", "0.1"), progress=stop)
    assert found.stopped == "interrupted"
    assert found.left == ("0.05",)
    assert seen[0].startswith("eps 0.1 ")


def test_a_time_limit_is_shared(network):
    found = curve(network, digits(10), THREAT, ("0.05", "0.1"), seconds=2.0)
    assert found.seconds < 10
    assert len(found.audits) == 2


def test_bad_radii_are_named(network):
    for eps in ((), ("0.1", "1/10"), ("0.1", "-1")):
        with pytest.raises(ValueError, match="eps"):
            curve(network, digits(4), THREAT, eps)


def test_audits_of_other_things_are_refused(network):
    first = audit(network, digits(4), THREAT, cascade=KEPT)
    with pytest.raises(ValueError, match=r"known.*data"):
        audit(network, digits(5), THREAT, cascade=KEPT, known=[first])
    with pytest.raises(ValueError, match=r"known.*threat"):
        audit(network, digits(4), ThreatModel(2, "0.2"), cascade=KEPT, known=[first])


@pytest.mark.parametrize("count", [1, 2, 5, 8])
def test_halving_is_an_order(count):
    assert sorted(halving(count)) == list(range(count))
    assert halving(count)[0] == count // 2


def test_the_command_line_takes_a_list(run, tmp_path):
    out, page = tmp_path / "c.json", tmp_path / "c.html"
    code, said, _ = run(
        "audit", "--eps", "0.05, 0.02,1/10", "--samples", 20, "--methods", "fgsm,crown_ibp", "--json", out,
        "--run", tmp_path / "run", "--report", page,
    )  # fmt: skip
    assert code == 0
    assert "0.05" in said
    assert {p.name for p in (tmp_path / "run").iterdir()} == {"eps-0.05", "eps-0.02", "eps-1_10"}
    assert [c["eps"] for c in json.loads(out.read_text())["curve"]] == ["0.02", "0.05", "1/10"]
    assert page.is_file()
    code, _, err = run("gate", out, "--certified", "10%")
    assert code == 2
    assert "a curve over several radii" in err
    code, _, err = run("audit", "--eps", "0.05,abc")
    assert code == 2
    assert "cannot read 'abc'" in err
