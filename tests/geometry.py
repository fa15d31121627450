"""Oracles and invariants of the geometry, used by the tests and by the planted faults.

The oracles know nothing of `calipers.sets`: they solve the defining optimisation problems by bisection on the
multiplier in extended precision (numpy longdouble), by rational arithmetic, or by HiGHS.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor

from calipers.sets import Region, ThreatModel, exact

LONG = np.longdouble
INF = math.inf


@dataclass(frozen=True)
class Case:
    """One threat model around a batch of points, with the numbers that define it."""

    x: Tensor
    p: float
    eps: object = 0.5
    lower: object = 0.0
    upper: object = 1.0

    @property
    def region(self) -> Region:
        return ThreatModel(self.p, self.eps, self.lower, self.upper).around(self.x)  # type: ignore[arg-type]

    def row(self, i: int) -> tuple[np.ndarray, LONG, np.ndarray, np.ndarray]:
        """Centre, radius and domain of example i in extended precision."""
        center = _long(self.x[i])
        ratio = exact(self.eps)  # type: ignore[arg-type]
        radius = LONG(ratio.numerator) / LONG(ratio.denominator)
        sides = [_side(side, self.x[i]) for side in (self.lower, self.upper)]
        return center, radius, np.minimum(sides[0], center), np.maximum(sides[1], center)


def _long(value: Tensor) -> np.ndarray:
    return value.detach().double().numpy().astype(LONG).reshape(-1)


def _side(side: object, like: Tensor) -> np.ndarray:
    if isinstance(side, Tensor):
        return _long(side.expand_as(like))
    if isinstance(side, float) and math.isinf(side):
        return np.full(like.numel(), side, dtype=LONG)
    ratio = exact(side)  # type: ignore[arg-type]
    return np.full(like.numel(), LONG(ratio.numerator) / LONG(ratio.denominator))


def norm(d: np.ndarray, p: float) -> LONG:
    if p == 1:
        return np.abs(d).sum()
    return np.sqrt((d * d).sum()) if p == 2 else np.abs(d).max()


def nearest(
    z: np.ndarray, c: np.ndarray, eps: LONG, p: float, lo: np.ndarray, hi: np.ndarray
) -> np.ndarray:
    """argmin ‖x − z‖₂ over the ball and the box, by bisection on the multiplier of the ball."""
    if p == INF:
        return np.clip(np.clip(z, c - eps, c + eps), lo, hi)
    if eps == 0:
        return c

    def at(multiplier: LONG) -> np.ndarray:
        if p == 2:
            return np.clip(c + (z - c) / (1 + multiplier), lo, hi)
        return np.clip(c + np.sign(z - c) * np.maximum(np.abs(z - c) - multiplier, 0), lo, hi)

    return _bisect(
        at,
        c,
        eps,
        p,
        LONG(4) * (1 + np.abs(z - c).max()) * (1 + np.sqrt(LONG(len(z)))) / min(eps, LONG(1)),
    )


def furthest(
    a: np.ndarray, c: np.ndarray, eps: LONG, p: float, lo: np.ndarray, hi: np.ndarray
) -> np.ndarray:
    """argmax ⟨a, x⟩ over the ball and the box: a member, so its value is a lower bound on the maximum."""
    if p == INF:
        return np.where(a > 0, np.minimum(c + eps, hi), np.where(a < 0, np.maximum(c - eps, lo), c))
    if eps == 0 or not np.abs(a).max():
        return c
    a = a / np.abs(a).max()
    if p == 2:
        return _bisect(
            lambda m: np.clip(c + a / np.maximum(m, 1e-300), lo, hi),
            c,
            eps,
            p,
            LONG(2) * norm(a, 2) / eps,
        )
    lo, hi = np.maximum(lo, c - 2 * eps), np.minimum(hi, c + 2 * eps)
    # p = 1: a vertex has at most one coordinate strictly between the centre and its cap; try each
    best = c
    for i in range(len(a)):
        full = np.where(
            (np.abs(a) > abs(a[i])) | ((np.abs(a) == abs(a[i])) & (np.arange(len(a)) < i)), 1, 0
        )
        step = full * np.where(a > 0, hi - c, np.where(a < 0, lo - c, 0))
        room = eps - np.abs(step).sum()
        if room < 0:
            continue
        step[i] = np.sign(a[i]) * min(room, (hi - c if a[i] > 0 else c - lo)[i])
        best = max(best, c + step, key=lambda x: (a * (x - c)).sum())
    return best


def _bisect(at, c, eps, p, top):
    if norm(at(LONG(0)) - c, p) <= eps:
        return at(LONG(0))
    low, high = LONG(0), top
    assert norm(at(high) - c, p) <= eps
    for _ in range(400):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        low, high = (low, middle) if norm(at(middle) - c, p) <= eps else (middle, high)
    return at(high)


def member(region: Region, i: int, point: Tensor) -> bool:
    """Membership in rational arithmetic on the numbers that the region stores."""
    values = point[i].double().flatten().tolist()
    if not all(math.isfinite(v) for v in values):
        return False
    for v, low, high in zip(
        values, region.lower[i].flatten().tolist(), region.upper[i].flatten().tolist(), strict=True
    ):
        if not low <= v <= high:
            return False
    if region.p == INF:
        return True
    gaps = [
        abs(Fraction(v) - Fraction(c))
        for v, c in zip(values, region.center[i].flatten().tolist(), strict=True)
    ]
    eps = Fraction(region.eps[i].item())
    return sum(gaps) <= eps if region.p == 1 else sum(g * g for g in gaps) <= eps * eps


# -- invariants ----------------------------------------------------------------------------------


def check_contains(region: Region, points: Tensor) -> None:
    expected = [member(region, i, points) for i in range(len(points))]
    assert region.contains(points).tolist() == expected


def check_projection(case: Case, z: Tensor) -> None:
    """A member, and the nearest one."""
    region = case.region
    projected = region.project(z)
    assert projected.dtype == z.dtype
    assert projected.shape == z.shape
    assert region.contains(projected).all()
    for i in range(len(z)):
        assert member(region, i, projected)
        center, eps, low, high = case.row(i)
        expected = nearest(_long(z[i]), center, eps, case.p, low, high)
        # the grid of the dtype, and float64's resolution of z − centre
        grid = 2 * torch.finfo(z.dtype).eps * np.maximum(np.abs(expected), np.abs(center))
        conditioning = (
            64
            * len(center)
            * 2.0**-53
            * (np.abs(_long(z[i]) - center).max() + eps + np.abs(center).max())
        )
        error = np.abs(_long(projected[i]) - expected)
        assert (error <= grid + conditioning + 1e-300).all(), (case, z[i], projected[i], expected)


def check_maximizer(case: Case, a: Tensor) -> None:
    """A member whose value is the maximum."""
    region = case.region
    point = region.maximizer(a)
    assert point.dtype == a.dtype
    assert region.contains(point).all()
    for i in range(len(a)):
        assert member(region, i, point)
        center, eps, low, high = case.row(i)
        slope = _long(a[i])
        best = furthest(slope, center, eps, case.p, low, high)
        gap = (slope * (best - _long(point[i]))).sum()
        scale = (np.abs(slope) * np.maximum(np.abs(best), np.abs(center))).sum()
        assert gap <= 4 * torch.finfo(a.dtype).eps * scale + 1e-12 * (np.abs(slope) * eps).sum(), (
            case,
            a[i],
            gap,
        )


def check_support(case: Case, a: Tensor) -> None:
    """Never below the value at a member, and hardly above the maximum. ``a`` has shape (S, B, *x)."""
    region = case.region
    values = region.support(a)
    assert values.shape == a.shape[:2]
    assert values.dtype == a.dtype
    for s in range(len(a)):
        for i in range(a.shape[1]):
            center, eps, low, high = case.row(i)
            slope = _long(a[s, i])
            best = furthest(slope, center, eps, case.p, low, high)
            maximum = (slope * best).sum()
            # the rounding of its own sums, relative to their terms: from the centre, or (p = inf) from the box's middle
            steps = np.abs(best - center)
            if case.p == INF:
                steps = np.maximum(np.minimum(eps, high - center), np.minimum(eps, center - low))
            terms = (np.abs(slope) * (np.abs(center) + steps)).sum()
            info = torch.finfo(a.dtype)
            rounding = (len(center) + 4) * (info.eps * terms + info.smallest_normal * info.eps)
            got = LONG(values[s, i].item())
            assert got >= maximum - rounding, (case, slope, got, maximum)
            assert got <= maximum + 2 * rounding + 1e-14 * np.abs(slope).sum() * min(eps, 1), (
                case,
                slope,
                got,
                maximum,
            )


def check_enclosure(case: Case) -> None:
    """Inner numbers lie inside the exact set and outer ones outside, each the nearest float64 that does."""
    region = case.region
    eps = exact(case.eps)  # type: ignore[arg-type]
    low, high = (
        None if isinstance(v, float) and math.isinf(v) else exact(v)
        for v in (case.lower, case.upper)
    )  # type: ignore[arg-type]
    assert (region.eps <= region.outer_eps).all()
    assert Fraction(region.eps[0].item()) <= eps <= Fraction(region.outer_eps[0].item())
    triples = (region.lower, region.outer_lower, region.upper, region.outer_upper, region.center)
    for lo, out_lo, hi, out_hi, c in zip(*(t.flatten().tolist() for t in triples), strict=True):
        floor, roof = Fraction(c) - eps, Fraction(c) + eps
        floor = floor if low is None else max(floor, min(low, Fraction(c)))
        roof = roof if high is None else min(roof, max(high, Fraction(c)))
        assert Fraction(lo) >= floor
        assert Fraction(hi) <= roof
        assert Fraction(out_lo) <= floor
        assert Fraction(out_hi) >= roof
        # tight, given that the radius itself was rounded once
        slack = 2 * Fraction(math.ulp(float(eps) or 0.0)) + 2 * Fraction(
            math.ulp(max(abs(c), abs(float(roof)), abs(float(floor))))
        )
        assert Fraction(lo) - Fraction(out_lo) <= 2 * slack
        assert Fraction(out_hi) - Fraction(hi) <= 2 * slack


def random_case(
    generator: np.random.Generator, p: float, dtype: torch.dtype, *, box: bool = True
) -> tuple[Case, Tensor, Tensor]:
    """A random case with points to project and directions (3 per example)."""
    n, batch = int(generator.integers(1, 7)), 3
    x = torch.from_numpy(generator.random((batch, n))).to(dtype)
    x = torch.where(torch.from_numpy(generator.random((batch, n)) < 0.2), x.round(), x)
    eps = [0, 1e-12, "0.1", "8/255", 0.25, 0.5, 1.5, 4.0][generator.integers(8)]
    sides = (0.0, 1.0) if box else (-INF, INF)
    z = x + torch.from_numpy(
        generator.standard_normal((batch, n)) * 10.0 ** generator.integers(-2, 2)
    ).to(dtype)
    a = torch.from_numpy(generator.standard_normal((3, batch, n))).to(dtype)
    a = torch.where(
        torch.from_numpy(generator.random((3, batch, n)) < 0.15), torch.zeros_like(a), a
    )
    return Case(x, p, eps, *sides), z, a


def edge_points(p: float) -> tuple[Region, Tensor]:
    """Points closer to a sphere than float64 sums can tell, on both sides of it and on it."""
    rows = [(1.0, 2.0**-k) for k in (10, 27, 30, 53, 60, 500, 1074)]
    rows += [(1 - 2.0**-53, 2.0**-k) for k in (26, 27, 52, 53, 54)]
    rows += [
        (0.6, 0.8),
        (0.6, math.nextafter(0.8, 1)),
        (math.nextafter(0.6, 0), 0.8),
        (1.0, 0.0),
        (0.5, 0.5),
    ]
    rows += [
        (0.1, 0.9),
        (0.2, 0.8),
        (0.3, 0.7),
        (0.7, 0.3),
        (1 / 3, 2 / 3),
        (0.28, 0.96),
        (5 / 13, 12 / 13),
    ]
    points = torch.tensor(rows, dtype=torch.float64)
    points = torch.cat([points, -points.flip(1), points * torch.tensor([1.0, -1.0])])
    return Region.ball(torch.zeros_like(points), 1, p), points
