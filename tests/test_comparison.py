"""Runs side by side: the shares are the audits', examples are matched by what was measured, names stay text."""

from __future__ import annotations

import json
import math
import sqlite3
from pathlib import Path

import pytest

from calipers import ThreatModel, audit, curve
from calipers.data import load
from calipers.errors import DataError
from calipers.evaluate.cascade import select
from calipers.evaluate.comparison import compare, pairs, render, shares, sides
from calipers.evaluate.runs import Stored, radius_given
from calipers.models import load_model

KEPT = select(["fgsm", "crown_ibp"])
EPS = ("0.02", "1/10")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root, data = tmp_path_factory.mktemp("runs"), load("digits")
    first, threat = (data.x[:40], data.y[:40]), ThreatModel(math.inf, "0.1")
    found = {}
    for name in ("digits_standard", "digits_pgd"):
        net = load_model(name)
        found[name] = curve(net, first, threat, EPS, run=root / name, cascade=KEPT)
    net = load_model("digits_pgd")
    found["other"] = audit(
        net, (data.x[50:60], data.y[50:60]), threat, run=root / "other", cascade=KEPT
    )
    return root, found


def test_shares_are_those_of_the_audits(runs):
    root, found = runs
    both = sides([root / "digits_standard", root / "digits_pgd"])
    assert [s.name for s in both] == ["digits_standard", "digits_pgd"]
    for side in both:
        for run, one in zip(side.runs, found[side.name].audits, strict=True):
            assert shares(run) == pytest.approx((one.certified, one.empirical))


def test_examples_are_compared_radius_by_radius(runs):
    root, found = runs
    said = pairs(sides([root / "digits_standard", root / "digits_pgd"]))
    assert [p.eps for p in said] == ["0.02", "1/10"]
    for pair, a, b in zip(
        said, found["digits_standard"].audits, found["digits_pgd"].audits, strict=True
    ):
        assert {n for n, *_ in pair.identity} == {"model"}
        assert sum(pair.counts.values()) == 40
        changed = sum(u is not v for u, v in zip(a.verdicts, b.verdicts, strict=True))
        assert len(pair.changed) == changed
        assert pair.contradictions == 0  # another model may well break where the first is proved


def test_different_examples_are_not_matched(runs):
    root, _ = runs
    (pair,) = pairs(sides([root / "digits_pgd" / "eps-1_10", root / "other"]))
    assert not pair.counts
    assert "different examples" in render(sides([root / "digits_pgd" / "eps-1_10", root / "other"]))


def test_a_contradiction_is_counted(runs, tmp_path):
    root, _ = runs
    audit(
        load_model("digits_pgd"), (load("digits").x[:40], load("digits").y[:40]),
        ThreatModel(math.inf, "1/10"), run=tmp_path / "again", cascade=KEPT,
    )  # fmt: skip
    with sqlite3.connect(tmp_path / "again" / "run.sqlite") as connection:
        connection.execute(
            "UPDATE unit SET lower = -9, upper = -1 WHERE stage = 'crown_ibp' AND lower > 0"
        )
    connection.close()
    (pair,) = pairs(sides([root / "digits_pgd" / "eps-1_10", tmp_path / "again"]))
    assert pair.contradictions > 0
    assert "one of them is wrong" in render(
        sides([root / "digits_pgd" / "eps-1_10", tmp_path / "again"])
    )


def test_hostile_names_stay_text(runs, tmp_path):
    root, _ = runs
    payload = "<img src=x onerror=alert(1)>"
    hostile = tmp_path / payload
    hostile.mkdir()
    for file in (root / "other").iterdir():
        (hostile / file.name).write_bytes(file.read_bytes())
    record = json.loads((hostile / "run.json").read_text())
    record["identity"] |= {"threat": payload, payload: [payload], "data": payload}
    (hostile / "run.json").write_text(json.dumps(record))
    html = render(sides([root / "other", hostile]))
    assert "<img" not in html
    assert html.count("&lt;img") >= 5


def test_bad_input(runs, tmp_path):
    root, _ = runs
    for wrong in ([], [root / "other"], [root / "other", root / "other"]):
        with pytest.raises(ValueError, match="two or more"):
            sides(wrong)
    with pytest.raises(DataError, match="not the run directory"):
        sides([root / "other", tmp_path])


def test_the_command(runs, run, tmp_path):
    root, _ = runs
    code, said, _ = run(
        "runs",
        "compare",
        root / "digits_standard",
        root / "digits_pgd",
        "--report",
        tmp_path / "c.html",
    )
    assert code == 0
    assert "have another verdict" in said
    assert (tmp_path / "c.html").read_text().endswith("</html>\n")
    assert compare([root / "digits_standard", root / "digits_pgd"], tmp_path / "d.html")


@pytest.mark.parametrize(
    ("threat", "radius"),
    [("p=inf eps='8/255' lower=0.0", "8/255"), ("p=2 eps=0.5 lower=0.0", 0.5),
     ("p=1 eps=Fraction(1, 3) lower=0", "1/3"),
     ("p=inf eps=[0.1, 0.2] lower=0.0", None), ("", None), ("p=inf eps=1-e lower=0", None), ("eps=3", 3.0)],
)  # fmt: skip
def test_radii_are_read_back_as_they_were_given(threat, radius):
    assert radius_given(Stored(Path(), {"threat": threat}, (), ())) == radius
