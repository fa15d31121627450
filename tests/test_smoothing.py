"""Randomised smoothing against scipy's binomial bounds and the closed form of linear classifiers."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats
from torch import nn

import calipers
from calipers.training import points, smoothing
from calipers.training.smoothing import largest_radius, lower_share, radius_of, smoothed


@pytest.mark.parametrize("failure", [0.001, 0.05, 0.3])
@pytest.mark.parametrize("draws", [1, 7, 100, 10_000])
def test_confidence_bounds_are_scipys(draws, failure):
    for successes in {0, 1, draws // 3, draws // 2, (9 * draws) // 10, draws - 1, draws}:
        theirs = (
            stats.binomtest(successes, draws, alternative="greater")
            .proportion_ci(1 - failure, "exact")
            .low
        )
        ours = lower_share(successes, draws, failure)
        assert ours <= theirs + 1e-12
        assert ours == pytest.approx(theirs, rel=1e-6, abs=1e-12)


def test_radii_rise_with_the_share_and_end_at_full_agreement():
    shares = [0.3, 0.5, 0.500001, 0.6, 0.9, 0.99, 0.9999, 1.0]
    radii = [radius_of(p, 0.5) for p in shares]
    assert radii[:2] == [0.0, 0.0]
    assert radii == sorted(radii)
    assert math.isfinite(radii[-1])
    assert radius_of(0.9, 0.5) == pytest.approx(0.5 * stats.norm.ppf(0.9))
    full = radius_of(lower_share(1000, 1000, 0.001), 0.25)
    assert full == pytest.approx(0.25 * stats.norm.ppf(0.001 ** (1 / 1000)), rel=1e-6)
    assert full == pytest.approx(largest_radius(0.25, 1000, 0.001), rel=1e-6)


def linear():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 2)).eval()


def distances(model, x):
    """Signed distance to the decision plane, towards class 1."""
    w = model[1].weight[1] - model[1].weight[0]
    gap = model(x) @ torch.tensor([-1.0, 1.0])
    return (gap / w.norm()).detach().double()


def test_a_linear_classifier_is_its_own_smoothing():
    """There P = Φ(distance/sigma), so that the true radius is the distance. The certified one is no larger, its share
    lower by what a sample of that size costs."""
    model, x = linear(), torch.rand(40, 1, 4, 4)
    true = distances(model, x)
    found = smoothed(model, x, sigma=0.5, seeds=torch.arange(40), num_classes=2, draws=4000)
    sure = ~found.abstained
    assert (found.predicted[sure] == (true[sure] > 0)).all()
    assert (found.radius <= true.abs() + 1e-9).all()
    share = torch.tensor(stats.norm.cdf(true.abs().numpy() / 0.5))
    assert (found.share[sure] <= share[sure]).all()
    slack = 7 * (share * (1 - share) / 4000).sqrt() + 20 / 4000
    assert (found.share[sure] >= (share - slack)[sure]).all()
    assert (sure | (share < 0.5 + slack)).all()


def test_bounds_fail_as_rarely_as_promised():
    """At failure 0.2 about a fifth of the bounds may exceed the truth, not more: 300 independent runs."""
    true, failure, draws, runs = 0.7, 0.2, 60, 300
    generator = torch.Generator().manual_seed(0)
    counts = (torch.rand(runs, draws, generator=generator) < true).sum(1).tolist()
    wrong = sum(lower_share(c, draws, failure) > true for c in counts)
    assert stats.binomtest(wrong, runs, failure, alternative="greater").pvalue > 0.001


def test_it_abstains_where_classes_tie():
    model = linear()
    x = torch.rand(4, 1, 4, 4)
    w = (model[1].weight[1] - model[1].weight[0]).detach().view(1, 4, 4)
    tie = x - distances(model, x).float().view(-1, 1, 1, 1) * w / w.norm()
    found = smoothed(model, tie, sigma=0.5, seeds=torch.arange(4), num_classes=2, draws=500)
    assert found.abstained.all()
    assert found.radius.tolist() == [0.0] * 4
    assert found.accuracy(torch.zeros(4)) == 0.0


def test_results_depend_on_the_examples_seed_alone(monkeypatch):
    model, x, seeds = linear(), torch.rand(6, 1, 4, 4), torch.arange(6)
    options = {"sigma": 0.3, "num_classes": 2, "draws": 300}
    whole = smoothed(model, x, seeds=seeds, **options)
    part = smoothed(model, x[[4, 1]], seeds=seeds[[4, 1]], **options)
    assert torch.equal(whole.radius[[4, 1]], part.radius)
    monkeypatch.setattr(smoothing, "CHUNK", 700)
    assert torch.equal(smoothed(model, x, seeds=seeds, **options).radius, whole.radius)
    assert not torch.equal(smoothed(model, x, seeds=seeds + 9, **options).share, whole.share)


def test_the_class_and_its_share_come_from_different_draws():
    """Or the share of the class that was most frequent would be too high."""
    seen = []

    def model(x):
        seen.append(x)
        return torch.zeros(len(x), 2)

    smoothed(
        model,
        torch.zeros(1, 9),
        sigma=1.0,
        seeds=torch.arange(1),
        num_classes=2,
        first=40,
        draws=60,
    )
    first, second = seen
    assert (torch.cdist(first, second) > 0.1).all()


def test_a_model_of_nan_certifies_nothing():
    found = smoothed(
        lambda x: torch.full((len(x), 3), math.nan),
        torch.rand(2, 4),
        sigma=1.0,
        seeds=torch.arange(2),
        num_classes=3,
    )
    assert found.abstained.all()


def test_it_is_labelled_probabilistic_and_is_no_bracket():
    found = smoothed(
        linear(), torch.rand(2, 1, 4, 4), sigma=0.3, seeds=torch.arange(2), num_classes=2, draws=50
    )
    assert not isinstance(found, calipers.Bracket)
    assert not hasattr(found, "lower")
    assert not hasattr(found, "certified")
    assert found.describe().startswith("probabilistic (randomised smoothing, sigma 0.3)")
    assert "probability at most 0.001" in found.describe()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sigma": 0.0}, "sigma: 0"),
        ({"draws": 0}, "draws: 0"),
        ({"failure": 0.5}, "failure: 0.5"),
        ({"seeds": torch.arange(3)}, "seeds: shape"),
        ({"num_classes": 5}, "num_classes: 5, but the model returns"),
    ],
)
def test_bad_arguments_are_named(options, message):
    good = {"sigma": 0.3, "seeds": torch.arange(2), "num_classes": 2, "draws": 10}
    with pytest.raises(ValueError, match=message):
        smoothed(linear(), torch.rand(2, 1, 4, 4), **(good | options))
    with pytest.raises(ValueError, match="successes: 3 of 2"):
        lower_share(3, 2, 0.1)


def test_draws_are_uniform_and_normal():
    like = torch.empty(50, 2001)
    seeds = torch.arange(50)
    assert stats.kstest(points.uniform(seeds, like).flatten().numpy(), "uniform").pvalue > 1e-3
    assert stats.kstest(points.normal(seeds, like).flatten().numpy(), "norm").pvalue > 1e-3
    rows = points.normal(seeds, like)
    correlation = torch.corrcoef(rows).fill_diagonal_(0).abs().max()
    assert correlation < 0.12
    assert torch.equal(points.uniform(seeds[7:9], like[7:9]), points.uniform(seeds, like)[7:9])
