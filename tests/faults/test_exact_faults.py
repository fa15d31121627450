"""Planted faults in branch and bound: verdicts beside exact minima must catch each of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from functools import cache
from importlib import import_module
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import networks
from calipers.graph.graph import Network
from calipers.sets import Region
from calipers.spec import Spec
from exact_checks import (
    check_intervals,
    check_verdict,
    deadline,
    dense,
    drawn,
    plane_minimum,
    shifted,
)

search: Any = import_module("calipers.exact.branch")  # the package's `branch` may be the function
Search: Any = search.Search
RELU, ABS, LEAKY = (torch.relu,), (torch.abs,), (F.leaky_relu, -0.3)
Case = tuple[Network, Region, Spec, Fraction]

# nets that are not decided at the root; their minimal margin is moved just below 0
BROKEN = [(2, ABS, -0.02), (5, LEAKY, -0.02), (6, ABS, -0.02), (6, RELU, -0.02), (9, ABS, -0.02)]
TIED = [(seed, RELU, -1e-9) for seed in (3, 7, 9)] + [(4, ABS, -1e-9), (7, LEAKY, -1e-9)]


def box(network: Network, seed: int) -> Region:
    return Region.ball(networks.inputs(network, 1, seed), 0.5, math.inf, 0.0, 1.0)


@cache
def cases() -> list[Case]:
    found = []
    for seed, op, by in BROKEN + TIED:
        network = dense(seed, (2, 5, 4, 3), *op)
        region = box(network, seed)
        spec = drawn(seed, [0, 1, 1], 3)
        spec = shifted(spec, by - plane_minimum(network, region, spec))
        found.append((network, region, spec, plane_minimum(network, region, spec)))
    return found


def check(above: float = 0.0) -> None:
    """Verdicts on all cases, or, given ``above``, where their minimal margins are that instead."""
    for network, region, spec, exact in cases():
        if above:
            spec = shifted(spec, above - exact)
            exact = plane_minimum(network, region, spec)
        found = search.branch(network, region, spec, deadline=deadline(0.5), period=1)
        check_verdict(found, network, region, spec, exact)


def unconstrained(
    work: Any, value: Tensor, target: Tensor, grads: Sequence[Tensor], _: Any
) -> list[Tensor]:
    """Steps on multipliers, free to become negative."""
    length = (target - value).clamp_min(0) / (grads[1].square().sum(1) + 1e-12)
    work.multiplier.add_(grads[1] * length.unsqueeze(1))
    return [g * 0 for g in grads]


def one_child(real: Any) -> Any:
    return lambda self, domains, *rest: real(self, domains, *rest)[len(domains) :]


def wrong_side(real: Any) -> Any:
    """The multipliers' constraints point to the other child."""

    def children(self: Any, *args: Any) -> Any:
        found = real(self, *args)
        return replace(found, side=-found.side)

    return children


def wrong_interval(real: Any) -> Any:
    """Both children get the other's intervals."""

    def children(self: Any, domains: Any, *args: Any) -> Any:
        found = real(self, domains, *args)
        low, high = (torch.roll(v, len(domains), 0) for v in (found.low, found.high))
        return replace(found, low=low, high=high)

    return children


def without_rounding(self: Any, domains: Any) -> Any:
    """Closed by what float32 says."""
    return domains[~(domains.bound > 0)]


def kept_from_float32(real: Any) -> Any:
    """Intervals computed again without accounting for rounding."""

    def refreshed(self: Any, domains: Any) -> Any:
        sure, self.sure = self.sure, self.problem
        try:
            return real(self, domains)
        finally:
            self.sure = sure

    return refreshed


def all_in_one(spec: Spec) -> Tensor:
    """Every clause may use every functional."""
    return torch.arange(len(spec.clause)).expand(spec.count, -1)


FAULTS: dict[str, tuple[Any, str, Any]] = {
    "choices beyond [0, 1]": (search, "as_bytes", lambda numbers: numbers * 255 + 60),
    "negative multipliers": (search, "_step", unconstrained),
    "a child dropped": (Search, "split", one_child(Search.split)),
    "multipliers on the wrong side": (Search, "_children", wrong_side(Search._children)),
    "intervals on the wrong side": (Search, "_children", wrong_interval(Search._children)),
    "float32 trusted": (Search, "closed", without_rounding),
    "clauses mixed up": (search, "_members", all_in_one),
}


def test_the_real_search_passes() -> None:
    check()


@pytest.mark.parametrize("name", FAULTS)
def test_planted_faults_are_caught(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(*FAULTS[name])
    with pytest.raises(AssertionError, match="called robust"):
        check()


def test_points_that_no_witness_confirms_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """At 1e-9 above 0 float32 may see a failure that float64 does not."""

    class Yes:
        upper = torch.zeros(1)

    monkeypatch.setattr(search, "witness", lambda *_: Yes)
    with pytest.raises(AssertionError, match="does not fail"):
        check(above=1e-9)


def check_refreshed(monkeypatch: pytest.MonkeyPatch, refreshed: Any) -> None:
    """Whatever intervals are computed again during a search hold the members' values in rational arithmetic."""
    seen = []

    def spied(self: Any, domains: Any) -> Any:
        found = refreshed(self, domains)
        if bool((found.fresh > 0).any()):
            seen.append((self.network, self.region, self.sure, found))
        return found

    monkeypatch.setattr(Search, "refreshed", spied)
    monkeypatch.setattr(search, "SHARE", 1e9)  # small as they are
    for seed in (3, 4, 7, 9):
        network = dense(seed, (2, 5, 4, 3))
        region, spec = box(network, seed), drawn(seed, [0, 1, 1], 3)
        spec = shifted(spec, -1e-9 - plane_minimum(network, region, spec))
        search.branch(network, region, spec, deadline=deadline(0.5), period=1)
    assert seen
    for case in seen:
        check_intervals(*case)


def test_intervals_computed_again_hold_every_member(monkeypatch: pytest.MonkeyPatch) -> None:
    check_refreshed(monkeypatch, Search.refreshed)


def test_intervals_of_float32_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AssertionError, match="outside its interval"):
        check_refreshed(monkeypatch, kept_from_float32(Search.refreshed))
