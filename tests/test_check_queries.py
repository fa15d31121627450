"""The checker's reader of queries against Calipers' own, which shares no code with it, at random points."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest

from calipers.vnnlib import Query, load, loads
from calipers_check.vnnlib import Clause, clauses
from certificates import query

SUITES = sorted((Path(__file__).parents[2] / "shared" / "data" / "vnncomp").glob("*/vnnlib"))
HEAD = """(vnnlib-version <2.0>) (declare-network N (declare-input A real [2,1])
(declare-output B real [1, 3]))"""
TEXTS = [
    query([-1.0, 0.0], [1.0, 0.5], 3, formula)
    for formula in (
        "(>= Y_0 Y_1)",
        "(or (and (<= Y_0 Y_1) (<= Y_0 0.25)) (and (>= X_0 0.5) (> Y_2 (+ Y_1 Y_0 -0.5))))",
        "(and (or (<= Y_0 0) (>= Y_0 0.5)) (or (<= Y_1 0) (and (<= X_1 0.2) (<= Y_1 1))) (< Y_2 1))",
        "(or (or (<= Y_0 0) (= X_0 0.0)) (>= (- (* 2 Y_0) (* Y_1 0.3) 0.1) (- Y_2)))",
        "(and (>= 0.5 Y_0) (<= (* -2 X_0) 0.5) (or (<= X_1 0.1) (>= X_1 0.4)))",
    )
] + [
    f"{HEAD} (assert (and (<= A[0,0] 1.0) (>= A[0,0] -1.0) (<= A[1,0] 0.5) (>= A[1,0] 0.0))) {more}"
    for more in (
        "(assert (or (> B[0,0] B[0,2]) (!= B[0,1] 0.25)))",
        "(assert (< (+ B[0,0] B[0,1]) 0.5)) (assert (or (>= B[0,0] 0.1) (<= (- A[0,0]) 0.3)))",
    )
]


def agree(peer: Query, own: list[Clause], points: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    inside = [c for c in own if not c.void]
    unsafe = 0
    for _ in range(points):
        c = inside[rng.integers(len(inside))]
        x = c.lower + rng.random(len(c.lower)) * (c.upper - c.lower)
        y = rng.normal(size=c.C.shape[1]) * 0.7
        found = any(
            bool(((b.lower <= x) & (x <= b.upper)).all() and (b.C @ y + b.d <= 0).all())
            for b in inside
        )
        exactly = peer.holds(x.tolist(), y.tolist())
        # an end between two floats is rounded outward, which shows where nothing else lies inside
        thin = bool((c.upper <= np.nextafter(c.lower, np.inf)).any())
        assert found == exactly or (thin and found)
        unsafe += found
    assert points < 50 or unsafe


@pytest.mark.parametrize("text", TEXTS)
def test_texts_mean_the_same(text: str) -> None:
    agree(loads(text), clauses(text), 200, 0)


@pytest.mark.skipif(not SUITES, reason="no shared data")
@pytest.mark.parametrize("suite", SUITES, ids=lambda p: p.parent.name)
def test_files_of_competitions_mean_the_same(suite: Path) -> None:
    for path in sorted(suite.iterdir())[:2]:
        data = path.read_bytes()
        text = (gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data).decode()
        agree(load(path), clauses(text), 3, 1)
