"""Samples: limits as scipy has them, coverage counted out exactly and by simulation, and what is recorded."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import beta, hypergeom
from torch import nn

from calipers import ThreatModel, audit
from calipers.confidence import SLACK, hypergeometric
from calipers.evaluate.cascade import select
from calipers.evaluate.sampling import Sampling, history

STAGES = select(["clean", "interval", "fgsm"])


def accepted(k, n, population, tail):
    """The counts that exact tests do not reject, by trying all of them with scipy."""
    counts = np.arange(k, population - (n - k) + 1)
    low = hypergeom.sf(k - 1, population, counts, n) > tail
    high = hypergeom.cdf(k, population, counts, n) > tail
    return counts[low].min() / population, counts[high].max() / population


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(1, 400), st.floats(0, 1), st.floats(0, 1), st.sampled_from([0.5, 0.95, 0.999]))
def test_limits_are_those_of_exact_tests(population, part, share, confidence):
    n = max(1, round(part * population))
    k = round(share * n)
    found = hypergeometric(k, n, population, confidence)
    assert found == pytest.approx(accepted(k, n, population, (1 - confidence) / 2 * (1 - SLACK)))


def test_whoever_asks_everybody_knows():
    for k in (0, 3, 7):
        assert hypergeometric(k, 7, 7) == (k / 7, k / 7)
    low, high = hypergeometric(5, 10, 60_000)
    assert (low, high) == pytest.approx(
        (beta.ppf(0.025, 5, 6), beta.ppf(0.975, 6, 5)), abs=2e-3
    )  # a large population is as good as an infinite one
    for wrong in ((5, 4, 10), (-1, 4, 10), (1, 4, 3), (0, 0, 3)):
        with pytest.raises(ValueError, match=r"successes|population"):
            hypergeometric(*wrong)
    with pytest.raises(ValueError, match="confidence: 1"):
        hypergeometric(1, 2, 3, 1.0)


@pytest.mark.parametrize(("population", "n"), [(30, 10), (100, 20), (100, 90), (500, 40)])
def test_coverage_counted_out(population, n):
    """For every number of members that count: how often are the limits right? By scipy's probabilities, exactly."""
    k = np.arange(n + 1)
    limits = np.array([hypergeometric(i, n, population, 0.95) for i in k])
    for count in range(population + 1):
        chance = hypergeom.pmf(k, population, count, n)
        share = count / population
        assert chance[limits[:, 0] > share + 1e-12].sum() <= 0.025 + 1e-9
        assert chance[limits[:, 1] < share - 1e-12].sum() <= 0.025 + 1e-9


def simulated(comparisons, used, draws=1000):
    """How often all of ``used`` audits of one sample are right together, of a set where shares fall with eps."""
    rng = np.random.default_rng(0)
    population, n = 400, 50
    radius = rng.exponential(
        1.0, population
    )  # an example is certified below it, broken from 1.3 times it on
    radii = np.linspace(0.1, 2.0, used)
    proved = radius[:, None] > radii
    unbroken = 1.3 * radius[:, None] > radii
    limits = {}

    def right(a, b, true):
        key = (a, b)
        if key not in limits:
            s = Sampling(population, n, n, a, b, 0, comparisons)
            limits[key] = s.within, s.beyond
        (low, high), (lower, upper) = limits[key]
        assert lower <= low  # the finite limits are never wider
        assert high <= upper
        return low <= true[0] and true[1] <= high

    hits = 0
    for _ in range(draws):
        rows = rng.permutation(population)[:n]
        a, b = proved[rows].sum(0), unbroken[rows].sum(0)
        hits += all(
            right(int(a[i]), int(b[i]), (proved[:, i].mean(), unbroken[:, i].mean()))
            for i in range(used)
        )
    return hits / draws


def test_both_ends_and_several_radii_hold_together():
    spread = 3 * math.sqrt(0.05 * 0.95 / 1000)
    assert simulated(1, 1) >= 0.95 - spread
    assert simulated(6, 6) >= 0.95 - spread
    assert simulated(1, 12) < 0.95  # what would be claimed without the correction is not so


def test_what_is_sampling_error_and_what_is_unknown():
    s = Sampling(population=1000, n=100, right=95, proved=60, unbroken=70, seed=3)
    low, high = s.within
    below, above = s.error
    assert s.unknown == pytest.approx(0.1)
    assert (low, high) == pytest.approx((0.6 - below, 0.7 + above))
    assert below > 0
    assert above > 0
    assert high - low == pytest.approx(s.unknown + below + above)
    assert s.beyond == pytest.approx((beta.ppf(0.025, 60, 41), beta.ppf(0.975, 71, 30)))
    assert s.beyond[0] < low
    assert high < s.beyond[1]
    many = Sampling(population=1000, n=100, right=95, proved=60, unbroken=70, seed=3, comparisons=5)
    assert many.beyond == pytest.approx((beta.ppf(0.005, 60, 41), beta.ppf(0.995, 71, 30)))
    assert "10.00% are unknown" in s.lines()[1]
    assert "5 audits of this sample together" in many.lines()[0]


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).eval()


def data():
    x = torch.rand(60, 6, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return x, net()(x).argmax(1)


def measure(eps, run, **options):
    return audit(net(), data(), ThreatModel(math.inf, eps), cascade=STAGES, run=run, **options)


def test_an_audit_of_a_sample_says_so(tmp_path):
    out = measure("0.05", None, samples=20, seed=1, comparisons=3)
    assert out.sampling is not None
    assert (out.sampling.n, out.sampling.population, out.sampling.seed) == (20, 60, 1)
    found = out.json()["sampling"]
    assert found["comparisons"] == 3
    assert found["data_set"]["robust_accuracy"] == list(out.sampling.within)
    assert out.json()["confidence_95"]["certified"][0] == out.sampling.beyond[0]
    whole = measure("0.05", None)
    low, high = out.sampling.within
    assert low <= whole.certified <= whole.empirical <= high
    assert whole.sampling is None
    assert whole.json()["sampling"] is None
    with pytest.raises(ValueError, match="comparisons: 0"):
        measure("0.05", None, comparisons=0)


def test_what_was_chosen_after_the_sample_was_seen_is_recorded(tmp_path):
    first = measure("0.05", tmp_path / "a", samples=20)
    assert first.earlier == ()
    measure("0.05", tmp_path / "other sample", samples=20, seed=5)
    second = measure("0.02", tmp_path / "b", samples=20, seconds=30)
    (before,) = second.earlier
    assert before["run"] == "a"
    assert list(before["differs"]) == ["threat"]
    assert "0.05" in before["differs"]["threat"]
    assert any("measured otherwise in 1 runs before (a)" in note for note in second.notes)
    measure("0.02", tmp_path / "b", samples=20, seconds=60)
    starts = json.loads((tmp_path / "b" / "run.json").read_text())["starts"]
    assert [s["seconds"] for s in starts] == [30, 60]
    assert starts[0]["results"] == 0 < starts[1]["results"]
    assert [e["run"] for e in starts[0]["earlier"]] == ["a"]


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"identity": 3}', '{"identity": {"data": "d"}, "starts": []}', "\0"]
)
def test_other_files_of_that_name_are_passed_over(tmp_path, text):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "run.json").write_text(text)
    assert history(tmp_path / "mine", {"data": "d", "threat": "t"}) == []
