"""Planted faults in the geometry: the invariants of `geometry` must catch each of them."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

import geometry as g
from calipers import sets
from calipers.sets import Region


def rescaling_projection(self: Region, z: Tensor) -> Tensor:
    """Rescales into the ball, then clamps: what several libraries call a projection."""
    gap = z.double() - self.center
    size = torch.linalg.vector_norm(gap, ord=self.p, dim=1, keepdim=True)
    step = gap * (self._safe_eps()[:, None] / size.clamp_min(1e-300)).clamp_max(1.0)
    return self._place(
        torch.minimum(torch.maximum(self.center + step, self.lower), self.upper) - self.center,
        z.dtype,
    )


def clamped_projection(self: Region, z: Tensor) -> Tensor:
    """Forgets the ball's corners."""
    low, high = self.inner(z.dtype)
    return z.clamp(low, high)


def unrounded_projection(self: Region, z: Tensor) -> Tensor:
    """Right in exact arithmetic, but rounded to nearest."""
    gap = z.double() - self.center
    size = torch.linalg.vector_norm(gap, ord=self.p, dim=1, keepdim=True)
    return (self.center + gap * (self.eps[:, None] / size.clamp_min(1e-300)).clamp_max(1.0)).to(
        z.dtype
    )


def ball_support(self: Region, a: Tensor) -> Tensor:
    """Drops the box: the dual norm alone."""
    dual = {1.0: math.inf, 2.0: 2.0, math.inf: 1.0}[self.p]
    eps = self.outer_eps.to(a.dtype)
    return (a * self.center.to(a.dtype)).sum(-1) + eps * torch.linalg.vector_norm(
        a, ord=dual, dim=-1
    )


def box_support(self: Region, a: Tensor) -> Tensor:
    """Drops the ball."""
    low, high = self.outer_lower.to(a.dtype), self.outer_upper.to(a.dtype)
    return (a.clamp(min=0) * high + a.clamp(max=0) * low).sum(-1)


def low_support(self: Region, a: Tensor) -> Tensor:
    """One part in a million too low."""
    return TRUE_SUPPORT(self, a) - 1e-6 * (a.abs() * self.center.to(a.dtype).abs()).sum(-1)


def tolerant_contains(self: Region, x: Tensor) -> Tensor:
    gap = (x.double() - self.center).flatten(1)
    near = torch.linalg.vector_norm(gap, ord=self.p, dim=1) <= self.eps + 1e-9
    return near & ((x >= self.lower - 1e-9) & (x <= self.upper + 1e-9)).flatten(1).all(1)


def float_contains(self: Region, x: Tensor) -> Tensor:
    """No tolerance, but float64 sums decide."""
    gap = (x.double() - self.center).flatten(1)
    near = torch.linalg.vector_norm(gap, ord=self.p, dim=1) <= self.eps
    return near & ((x >= self.lower) & (x <= self.upper)).flatten(1).all(1)


def sign_maximizer(self: Region, a: Tensor) -> Tensor:
    """The corner of the box, whatever the ball."""
    low, high = self.inner(a.dtype)
    return torch.where(a > 0, high, low)


def ball_maximizer(self: Region, a: Tensor) -> Tensor:
    """The ball's maximiser, clamped."""
    step = self._safe_eps()[:, None] * self.steepest(a).double()
    return self._place(
        torch.minimum(torch.maximum(self.center + step, self.lower), self.upper) - self.center,
        a.dtype,
    )


TRUE_SUPPORT = Region.support


def run_checks(p: float, dtype: torch.dtype, box: bool) -> None:
    generator = np.random.default_rng(5)
    g.check_contains(*g.edge_points(p))
    for _ in range(40):
        case, z, a = g.random_case(generator, p, dtype, box=box)
        g.check_projection(case, z)
        g.check_maximizer(case, a[0])
        g.check_support(case, a)
        g.check_enclosure(case)
        region = case.region
        for point in (z, region.maximizer(a[0])):
            for _ in range(6):
                g.check_contains(region, point)
                moved = torch.nextafter(point, z + a[0])
                point = torch.where(torch.rand(point.shape) < 0.5, moved, point)


@pytest.mark.parametrize("box", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("p", [1, 2, math.inf])
def test_the_real_geometry_passes(p: float, dtype: torch.dtype, box: bool) -> None:
    run_checks(p, dtype, box)


FAULTS: list[tuple[str, Callable[..., Tensor], float, bool]] = [
    ("project", rescaling_projection, 2, True),
    ("project", rescaling_projection, 1, True),
    ("project", rescaling_projection, 1, False),
    ("project", clamped_projection, 2, True),
    ("project", clamped_projection, 1, True),
    ("project", unrounded_projection, 2, False),
    ("support", ball_support, 1, True),
    ("support", ball_support, 2, True),
    ("support", ball_support, math.inf, True),
    ("support", box_support, 1, True),
    ("support", box_support, 2, True),
    ("support", low_support, 2, True),
    ("contains", tolerant_contains, 1, True),
    ("contains", tolerant_contains, 2, True),
    ("contains", tolerant_contains, math.inf, True),
    ("contains", float_contains, 1, False),
    ("contains", float_contains, 2, False),
    ("maximizer", sign_maximizer, 1, True),
    ("maximizer", sign_maximizer, 2, True),
    ("maximizer", ball_maximizer, 1, True),
    ("maximizer", ball_maximizer, 2, True),
]


@pytest.mark.parametrize(("method", "fault", "p", "box"), FAULTS)
def test_planted_fault_is_caught(
    method: str, fault: Callable[..., Tensor], p: float, box: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Region, method, fault)
    with pytest.raises(AssertionError):
        run_checks(p, torch.float64, box)


@pytest.mark.parametrize("p", [1, 2, math.inf])
def test_undirected_rounding_is_caught(p: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sets, "add", lambda a, b, towards: a + b)
    with pytest.raises(AssertionError):
        run_checks(p, torch.float64, False)
