"""The sets an adversary may choose from: norm balls intersected with a box, exactly.

A `Region` is ``{x : ‖x − center‖_p ≤ eps} ∩ [lower, upper]``, one per example, p in {1, 2, inf}. It keeps every
number as a float64 pair: an *inner* one (the set only shrinks by rounding) for whatever must be a member,
and an *outer* one (the set only grows) for whatever must be an upper bound. So `contains(project(z))` holds
in the dtype of ``z``, and `support` never falls below the true maximum by more than the rounding of its own sums.

With the centre inside the box all five operations reduce to one-dimensional problems: write x = center + δ,
and let c be the distance from the centre to the box on the side that δ points to.

- p = inf: the set is a box;
- p = 2: |δ_i| = min(t·v_i, c_i) with Σ min(t·v_i, c_i)² = eps², for the projection (v = |z − center|) and for the
  linear maximiser (v = |a|) alike;
- p = 1: δ_i = clip(v_i − μ, 0, c_i) for the projection; the maximiser fills the largest |a_i| first.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields, replace
from fractions import Fraction
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from calipers.errors import DataError, RegionError
from calipers.grid import Levels, spacing
from calipers.rounding import Interval, Number, add, cast, enclose, exact
from calipers.searches import dual_l1, dual_l2, fill_l1, level_l2, norm, shrink_l1

__all__ = [
    "Frame",
    "Interval",
    "Number",
    "Region",
    "ThreatModel",
    "cast",
    "equivalent_eps",
    "exact",
]

NORMS = (1.0, 2.0, math.inf)
_U = 2.0**-53  # unit roundoff of float64


class Frame(NamedTuple):
    """A region in one dtype, as bounds see it: offsets x − origin lie in [−below, above], x itself in ``hull``.

    The origin is the middle of the box for p = inf (then below = above) and the centre otherwise.
    """

    origin: Tensor
    below: Tensor
    above: Tensor
    hull: Interval
    bounded: bool


@dataclass(frozen=True)
class ThreatModel:
    """What the adversary may do, independent of data: a ball of radius ``eps`` and the input domain.

    Args:
        p: norm order, 1, 2 or ``math.inf``.
        eps: radius in input units; a ``str`` or ``Fraction`` keeps its exact value; a tensor (one radius per
            feature) only for p = inf.
        lower, upper: the input domain, numbers or tensors that broadcast to one example (one bound per channel has
            shape (C, 1, 1)); ±inf for no limit.
        mask: bool, broadcastable to one example: only the features that are True may change; None: all may.
        grid: only whole multiples of it are allowed, as the inputs' dtype stores them: "1/255" for 8-bit images in
            [0, 1]. A radius then counts levels (see `calipers.grid`). Attacks and `Region.contains` honour it; bounds
            cover the continuous set around it.

    Raises:
        ValueError: an argument is out of range; the message names it.
    """

    p: float
    eps: Number | Tensor
    lower: Number | Tensor = 0.0
    upper: Number | Tensor = 1.0
    mask: Tensor | None = None
    grid: Number | None = None

    def __post_init__(self) -> None:
        if self.p not in NORMS:
            raise ValueError(f"p: {self.p!r} is not one of 1, 2, inf")
        eps = enclose(self.eps, "eps")
        if not bool((eps.lower >= 0).all()):
            raise ValueError(f"eps: {self.eps!r} is negative; a radius is at least 0")
        if self.p != math.inf and bool(torch.isinf(eps.lower).any()):
            raise ValueError(
                f"eps: {self.eps!r} leaves only the box, so it needs p = inf, not p = {self.p:g}"
            )
        if eps.lower.ndim and self.p != math.inf:
            raise ValueError(
                f"eps: one radius per feature is a box, so it needs p = inf, not p = {self.p:g}"
            )
        low, high = enclose(self.lower, "lower"), enclose(self.upper, "upper")
        if not bool((low.lower <= high.upper).all()):
            raise ValueError(f"lower: {self.lower!r} exceeds upper: {self.upper!r}")
        if self.mask is not None and self.mask.dtype is not torch.bool:
            raise ValueError(
                f"mask: dtype {self.mask.dtype} is not bool; give True where a feature may change (mask=m > 0)"
            )
        if self.grid is not None:
            spacing(self.grid)

    def around(self, x: Tensor) -> Region:
        """The regions around a batch of examples ``x`` of shape (B, *x).

        Raises:
            DataError: ``x`` is not floating point, not finite, off the grid, or lies outside the domain.
            ValueError: eps, lower, upper or mask does not broadcast to one example.
        """
        require_tensor(x)
        if not x.is_floating_point():
            raise DataError(
                f"x: dtype {x.dtype} is not floating point; convert and scale the inputs first"
            )
        if not torch.isfinite(x).all():
            bad = int((~torch.isfinite(x.detach()).flatten(1).all(1)).sum())
            raise DataError(f"x: {bad} of {len(x)} examples contain NaN or infinite values")
        eps = self.eps
        for name in ("eps", "lower", "upper", "mask"):
            _require_fit(name, getattr(self, name), tuple(x.shape[1:]))
        if isinstance(eps, Tensor) and eps.ndim:  # per feature, even where B equals their number
            eps = eps.to(x.device).expand(x.shape[1:]).unsqueeze(0)
        return Region.ball(x, eps, self.p, self.lower, self.upper, mask=self.mask, grid=self.grid)

    def describe(self) -> str:
        """One line, for people and for run records."""
        norm = {1.0: "l1", 2.0: "l2", math.inf: "linf"}[float(self.p)]

        def show(value: Number | Tensor) -> str:
            if isinstance(value, Tensor):
                return f"per-feature {value.min().item():g}..{value.max().item():g}"
            return f"{value:g}" if isinstance(value, float) else str(value)

        parts = [f"{norm} eps={show(self.eps)} in [{show(self.lower)}, {show(self.upper)}]"]
        if self.grid is not None:
            parts.append(f"on the grid of {spacing(self.grid)}")
        if self.mask is not None:
            parts.append(f"where the mask is true ({int(self.mask.sum())} of {self.mask.numel()})")
        return ", ".join(parts)


def require_tensor(x: object) -> None:
    """Raises:
    DataError: inputs that are no tensor.
    """
    if not isinstance(x, Tensor):
        raise DataError(f"x: {type(x).__name__}, not a tensor; convert it with torch.as_tensor")


@dataclass(frozen=True, eq=False)
class Region:
    """``{x : ‖x − center‖_p ≤ eps} ∩ [lower, upper]``, one set per example.

    ``center``, ``lower``, ``upper`` have shape (B, *x), ``eps`` (B,) or, per feature, (B, *x), all float64 on the
    device of the data.
    ``lower`` and ``upper`` are already intersected with the ball's own box, so for p = inf they are the whole
    set. They hold the inner values; ``outer_*`` the outer ones. With ``levels`` only points on a grid are members;
    bounds (`hull`, `support`, `reach`, `frame`) then hold for the continuous set around them, `relaxed`. Build one with
    `ThreatModel.around`, `Region.ball` or `Region.box`.
    """

    center: Tensor
    eps: Tensor
    p: float
    lower: Tensor
    upper: Tensor
    outer_eps: Tensor
    outer_lower: Tensor
    outer_upper: Tensor
    levels: Levels | None = None
    _cache: dict[object, Interval | Frame] = field(default_factory=dict, repr=False)

    # -- construction ------------------------------------------------------------------------------

    @classmethod
    def ball(
        cls,
        center: Tensor,
        eps: Number | Tensor,
        p: float,
        lower: Number | Tensor = -math.inf,
        upper: Number | Tensor = math.inf,
        *,
        mask: Tensor | None = None,
        grid: Number | None = None,
    ) -> Region:
        """A ball around each row of ``center`` intersected with a box.

        Args:
            eps: a number, a tensor of shape (B,) (one radius per example), or, for p = inf, any other tensor
                that broadcasts to ``center`` (one radius per feature).
            mask, grid: as in `ThreatModel`; a feature that is frozen has lower = upper = centre, exactly.

        Raises:
            DataError: a centre lies outside the box or off the grid.
        """
        one = float(eps.min()) if _per_example(eps, center) else eps  # type: ignore[union-attr]
        ThreatModel(p, one, lower, upper, mask, grid)
        x = center.to(torch.float64)

        def like(bound: Tensor) -> Tensor:
            return bound.to(x.device).expand_as(x)

        low, high = enclose(lower, "lower"), enclose(upper, "upper")
        radius = enclose(eps, "eps")
        if _per_example(eps, center):
            radius = Interval(*(r.to(x.device).reshape(-1, *[1] * (x.ndim - 1)) for r in radius))
        outside = (x < like(low.lower)) | (x > like(high.upper))
        if outside.any():
            rows = int(outside.flatten(1).any(1).sum())
            raise DataError(
                f"x: {rows} of {len(x)} examples lie outside the input domain "
                f"(values {x.min().item():g}..{x.max().item():g}); rescale them or set the domain's lower and upper"
            )
        # A domain bound such as 0.1 lies between two floats; a centre on it must not make the set empty.
        inner_low = torch.maximum(
            add(x, -like(radius.lower), math.inf), torch.minimum(like(low.upper), x)
        )
        inner_high = torch.minimum(
            add(x, like(radius.lower), -math.inf), torch.maximum(like(high.lower), x)
        )
        per_feature = radius.lower.ndim > 0 and not _per_example(eps, center)

        def rows_of(r: Tensor) -> Tensor:
            r = r.to(x.device)
            return r.expand_as(x) if per_feature else r.reshape(-1).expand(len(x))

        outer_low = torch.maximum(add(x, -like(radius.upper), -math.inf), like(low.lower))
        outer_high = torch.minimum(add(x, like(radius.upper), math.inf), like(high.upper))
        sides: tuple[Tensor, ...] = (inner_low, inner_high, outer_low, outer_high)
        if mask is not None:
            free = mask.to(x.device)
            sides = tuple(torch.where(free, side, x) for side in sides)
        levels, outer_eps = None, rows_of(radius.upper)
        if grid is not None:
            levels = Levels.around(center, grid, p, eps, lower, upper, mask)
            ends = [levels.values(k).to(torch.float64) for k in (levels.lower, levels.upper)]
            sides = (*ends, *ends)
            outer_eps = outer_eps if p == math.inf else levels.radius()
        inner_low, inner_high, outer_low, outer_high = sides
        return cls(
            x,
            rows_of(radius.lower),
            float(p),
            inner_low,
            inner_high,
            outer_eps,
            outer_low,
            outer_high,
            levels,
        )

    @classmethod
    def box(cls, lower: Tensor, upper: Tensor) -> Region:
        """The box [lower, upper], shape (B, *x): what a VNN-LIB query gives.

        Raises:
            RegionError: lower > upper somewhere, or a NaN, or a side of infinities alone.
        """
        low, high = lower.to(torch.float64), upper.to(torch.float64)
        if not bool(((low <= high) & (low < math.inf) & (high > -math.inf)).all()):
            raise RegionError("box: lower exceeds upper (or is NaN), so the region is empty")
        middle = torch.minimum(torch.maximum(low / 2 + high / 2, low), high)
        middle = torch.where(
            torch.isfinite(middle), middle, torch.zeros_like(middle).clamp(low, high)
        )
        eps = torch.full((len(low),), math.inf, dtype=torch.float64, device=low.device)
        return cls(middle, eps, math.inf, low, high, eps, low, high)

    def __getitem__(self, index: Tensor | slice) -> Region:
        parts = {
            f.name: getattr(self, f.name)[index]
            for f in fields(self)
            if f.name not in ("p", "levels", "_cache")
        }
        return Region(p=self.p, levels=self.levels and self.levels[index], **parts)

    def __len__(self) -> int:
        return len(self.center)

    @property
    def unit(self) -> Tensor:
        """What step sizes are relative to, broadcastable to (B, *x): eps, or half the width of a box without one."""
        if bool(torch.isinf(self.eps).any()):
            return (self.upper - self.lower) / 2
        return (
            self.eps
            if self.eps.shape == self.center.shape
            else self.eps.reshape(-1, *[1] * (self.center.ndim - 1))
        )

    # -- the grid ----------------------------------------------------------------------------------

    @property
    def grid(self) -> Fraction | None:
        """The distance of neighbouring grid points; None where every point counts."""
        return None if self.levels is None else self.levels.grid

    @cached_property
    def relaxed(self) -> Region:
        """The continuous set around the members: the same ball and box without the grid; itself where there is none.

        What an attack walks in, before `snap`.
        """
        if self.levels is None:
            return self
        eps = self.eps if self.p == math.inf else self.outer_eps
        return replace(self, eps=eps, levels=None, _cache={})

    def snap(self, x: Tensor) -> Tensor:
        """A member near each row of ``x``, in its dtype, and ``x`` itself where there is no grid.

        p = inf: the nearest member. p = 1, 2: ``x`` is projected onto the ball and rounded towards the centre, except
        for the largest remainders (see `Levels.snap`). Members stay; a NaN stays visible.

        Raises:
            RegionError: the dtype of ``x`` is too narrow for the grid's numbers.
        """
        if self.levels is None:
            return x
        point = x.detach().double()
        near = point if self.p == math.inf else self.relaxed.project(point)
        return torch.where(torch.isnan(x), x, self.levels.numbers(self.levels.snap(near), x.dtype))

    # -- membership --------------------------------------------------------------------------------

    def contains(self, x: Tensor) -> Tensor:
        """Whether each row of ``x`` (B, *x) is a member, exactly on the stored numbers, without tolerance: (B,) bool.

        NaN and infinity are no members. Float64 decides where its error bound allows, rational arithmetic elsewhere;
        on a grid, whole numbers of levels alone.
        """
        if self.levels is not None:
            return self.levels.contains(x)
        point = x.detach().to(torch.float64)
        inside = (point >= self.lower) & (point <= self.upper) & torch.isfinite(point)
        inside = inside.flatten(1).all(1)
        if self.p == math.inf:
            return inside
        gap = (point - self.center).flatten(1)
        size = gap.abs().sum(1) if self.p == 1 else gap.square().sum(1)
        limit = self.eps if self.p == 1 else self.eps.square()
        slack = (gap.shape[1] + 8) * (
            limit * 2 * _U + 1e-320
        )  # the second term: squares may underflow
        sure = inside & (size < limit - slack)
        for row in torch.nonzero(inside & ~sure & (size <= limit + slack)).flatten().tolist():
            sure[row] = self._contains_exactly(row, point[row])
        return sure

    def _contains_exactly(self, row: int, point: Tensor) -> bool:
        pairs = zip(point.flatten().tolist(), self.center[row].flatten().tolist(), strict=True)
        gaps = [abs(Fraction(a) - Fraction(b)) for a, b in pairs]
        eps = Fraction(self.eps[row].item())
        return sum(gaps) <= eps if self.p == 1 else sum(g * g for g in gaps) <= eps * eps

    def hull(self) -> Interval:
        """The smallest box around the set (outer values, float64)."""
        return Interval(self.outer_lower, self.outer_upper)

    # -- points ------------------------------------------------------------------------------------

    def inner(self, dtype: torch.dtype) -> Interval:
        """The members of [lower, upper] in ``dtype``: both ends are rounded inwards.

        Raises:
            RegionError: the region has no point in that dtype.
        """
        known = self._cache.get(dtype)
        if not isinstance(known, Interval):
            low = cast(self.lower.detach(), dtype, math.inf)
            high = cast(self.upper.detach(), dtype, -math.inf)
            void = (low > high).flatten(1).any(1)
            if self.p != math.inf and not self._centred(dtype) and not bool(void.any()):
                void = ~self.contains(self.center.detach().to(dtype).clamp(low, high))
            if bool(void.any()):
                raise RegionError(
                    f"{int(void.sum())} of {len(low)} regions contain no point in {dtype}; use a wider dtype"
                )
            known = self._cache[dtype] = Interval(low, high)
        return known

    def _centred(self, dtype: torch.dtype) -> bool:
        """Whether every centre is a number of ``dtype``."""
        center = self.center.detach()
        return torch.equal(center.to(dtype).to(torch.float64), center)

    def project(self, z: Tensor) -> Tensor:
        """The nearest member in the Euclidean norm, in the dtype of ``z``: ``contains(project(z))`` holds.

        Exact for each p with the box included, up to rounding (towards the centre). On a grid it is `snap`.
        """
        if self.levels is not None:
            return self.snap(z)
        low, high = self.inner(z.dtype)
        if self.p == math.inf:
            return torch.clamp(z, low, high)
        gap = (z.detach().to(torch.float64) - self.center).clamp(-1e300, 1e300)
        cap = torch.where(gap > 0, self.upper - self.center, self.center - self.lower)
        size, cap = gap.abs().flatten(1), cap.flatten(1)
        eps = self._safe_eps()
        length = torch.minimum(size, cap)
        over = norm(length, self.p) > eps
        if over.any():
            shrink = shrink_l1 if self.p == 1 else level_l2
            length[over] = shrink(size[over], cap[over], eps[over])
        return self._place(gap.sign() * length.view_as(gap), z.dtype)

    def maximizer(self, a: Tensor) -> Tensor:
        """A member that maximises ⟨a, x⟩, for ``a`` of shape (B, *x), in the dtype of ``a``; the centre where a = 0.

        A region of one example serves any number of rows ``a``, unless it has a grid. Exact; on a grid for p = 2 nearly
        so (a knapsack problem).
        """
        if self.levels is not None:
            return self.levels.numbers(self.levels.maximizer(a), a.dtype)
        low, high = self.inner(a.dtype)
        if self.p == math.inf:
            middle = self.center.detach().to(a.dtype).clamp(low, high)
            return torch.where(a > 0, high, torch.where(a < 0, low, middle))
        slope = a.detach().to(torch.float64)
        cap = torch.where(slope > 0, self.upper - self.center, self.center - self.lower).flatten(1)
        size, eps = slope.abs().flatten(1), self._safe_eps()
        cap = torch.where(size > 0, cap, torch.zeros_like(cap))
        length = fill_l1(size, cap, eps) if self.p == 1 else level_l2(size, cap, eps)
        return self._place(slope.sign() * length.view_as(slope), a.dtype)

    def steepest(self, g: Tensor) -> Tensor:
        """argmax ⟨g, d⟩ over ‖d‖_p ≤ 1: the direction of steepest ascent in the region's norm; 0 where g = 0.

        Features that cannot change (a mask, a side of width 0) are left out of it, unless none can.
        """
        if self.p == math.inf:
            return g.sign()
        flat = g.flatten(1)
        if self._frozen is not None:
            flat = torch.where(self._frozen, 0.0, flat)
        if self.p == 2:
            # divided by the peak first, so that the squares of tiny or huge gradients stay in range
            peak = flat.abs().amax(1, keepdim=True)
            scaled = flat / torch.where(peak > 0, peak, torch.ones_like(peak))
            size: Tensor = torch.linalg.vector_norm(scaled, dim=1, keepdim=True)
            return (scaled / size.clamp_min(1.0)).view_as(g)
        peak = flat.abs().argmax(1, keepdim=True)
        return torch.zeros_like(flat).scatter(1, peak, flat.gather(1, peak).sign()).view_as(g)

    @cached_property
    def _frozen(self) -> Tensor | None:
        """The features (B, n) that cannot change, in the examples in which others can; None if there are none."""
        stuck = (self.lower == self.upper).flatten(1)
        stuck = stuck & ~stuck.all(1, keepdim=True)
        return stuck if bool(stuck.any()) else None

    def ascend(
        self,
        x: Tensor,
        g: Tensor,
        length: float | Tensor,
        *,
        plain: bool = False,
        out: Tensor | None = None,
    ) -> Tensor:
        """project(x + length·steepest(g)), or project(x + length·g) if ``plain``: one step of an attack, into ``out``.

        On a grid a step that is shorter than a level in every feature is lengthened to one, lest it be rounded away;
        attacks do better to walk in `relaxed` and `snap` what they find.
        ``g`` may be overwritten: on small networks a step costs as much as its memory traffic.
        """
        direction = g if plain else g.sign_() if self.p == math.inf else self.steepest(g)
        if isinstance(length, Tensor):
            direction, length = length * direction, 1.0
        if self.grid is not None:
            peak = (direction * length).flatten(1).abs().amax(1).clamp_min(1e-30)
            share = (float(self.grid) / peak).clamp_min(1.0)
            direction = direction * share.view(-1, *[1] * (direction.ndim - 1))
        x = torch.add(x, direction, alpha=length, out=out)
        if self.p == math.inf and self.levels is None:
            low, high = self.inner(x.dtype)
            return x.clamp_(low, high)
        point = self.project(x)
        return point if out is None else out.copy_(point)

    def sample(self, seeds: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """One random member per example: uniform in the box (p = inf), or uniform in the ball, then projected.

        Each example has its own seed, so the draw does not depend on batch or order.
        """
        dtype = dtype or torch.float32
        n = math.prod(self.center.shape[1:])
        rows = [self._draw(int(seed), n) for seed in seeds.tolist()]
        noise = torch.stack(rows).to(self.center.device).view_as(self.center)
        if self.levels is not None and self.p == math.inf:
            return self.levels.numbers(self.levels.sample(noise), dtype)
        if self.p == math.inf:
            low, high = self.inner(dtype)
            if not bool(torch.isfinite(low).all() & torch.isfinite(high).all()):
                raise RegionError("sample: the region is unbounded, so there is no uniform draw")
            return (low + noise.to(dtype) * (high - low)).clamp(low, high)
        eps = self.eps.reshape(-1, *[1] * (self.center.ndim - 1))
        point = self.center + eps * noise
        return self.project(point if self.levels is not None else point.to(dtype)).to(dtype)

    def _draw(self, seed: int, n: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        if self.p == math.inf:
            return torch.rand(n, dtype=torch.float64, generator=generator)
        if self.p == 2:
            direction = torch.randn(n, dtype=torch.float64, generator=generator)
        else:  # a two-sided exponential is uniform on the l1 sphere once normalised
            uniform = torch.rand(n, dtype=torch.float64, generator=generator) - 0.5
            direction = -uniform.sign() * torch.log1p(-2 * uniform.abs().clamp_max(0.5 - 1e-12))
        radius = torch.rand((), dtype=torch.float64, generator=generator) ** (1 / n)
        draw: Tensor = direction / torch.linalg.vector_norm(direction, ord=self.p) * radius
        return draw

    def _safe_eps(self) -> Tensor:
        """The radius less the rounding of a float64 sum, so that members stay members when re-measured."""
        n = math.prod(self.center.shape[1:])
        return self.eps * (1 - 8 * (n + 8) * _U)

    def _place(self, step: Tensor, dtype: torch.dtype) -> Tensor:
        """center + step in ``dtype``, every coordinate rounded towards the centre and into the box."""
        low, high = self.inner(dtype)
        center, step = self.center.detach(), step.detach()
        point = (center + step).to(dtype)
        far = (point.to(torch.float64) - center).abs() > step.abs()
        towards = center.to(dtype).clamp(low, high)
        point = torch.where(far, torch.nextafter(point, towards), point).clamp(low, high)
        if not self._centred(
            dtype
        ):  # rounding may lead out: pull back towards the member nearest the centre
            for share in (0.99, 0.9, 0.5, 0.0):
                out = ~self.contains(point)
                if not bool(out.any()):
                    break
                nearer = (towards + share * (point - towards)).clamp(low, high)
                point = torch.where(out.view(-1, *[1] * (step.ndim - 1)), nearer, point)
        return point

    # -- linear functionals ------------------------------------------------------------------------

    def frame(self, dtype: torch.dtype) -> Frame:
        """The set as bounds see it in ``dtype``, rounded outwards; differentiable in the centre."""
        known = self._cache.get(("frame", dtype))
        if isinstance(known, Frame):
            return known
        box = Interval(self.outer_lower, self.outer_upper)
        middle = self.center
        if self.p == math.inf:
            bounded = torch.isfinite(box.lower) & torch.isfinite(box.upper)
            middle = torch.where(bounded, box.lower / 2 + box.upper / 2, middle)
        origin = middle.to(dtype)
        exact_origin = origin.to(torch.float64)
        below = cast(add(exact_origin, -box.lower, math.inf), dtype, math.inf)
        above = cast(add(box.upper, -exact_origin, math.inf), dtype, math.inf)
        if self.p == math.inf:
            below = above = torch.maximum(below, above)
        hull = Interval(cast(box.lower, dtype, -math.inf), cast(box.upper, dtype, math.inf))
        frame = Frame(origin, below, above, hull, bool(torch.isfinite(above).all()))
        # what carries gradients is built anew for each use
        if not any(t.requires_grad for t in (self.center, self.outer_lower, self.outer_upper)):
            self._cache["frame", dtype] = frame
        return frame

    def reach(self, a: Tensor, frame: Frame | None = None) -> Tensor:
        """max ⟨a, x − origin⟩ over the region, for ``a`` of shape (..., B, *x): a dual value of shape (..., B).

        Sound: for l2 and l1 it is the dual objective at the multiplier found, and any multiplier >= 0 gives an
        upper bound; so the result is never below the maximum, up to the rounding of its sums in the dtype of ``a``.
        Differentiable in ``a`` and in the centre (envelope theorem).
        """
        frame = frame or self.frame(a.dtype)
        rows = a.reshape(*a.shape[: a.ndim - self.center.ndim + 1], -1)
        below, above = frame.below.flatten(1), frame.above.flatten(1)
        if self.p == math.inf and frame.bounded:
            by_example = rows.abs().reshape(-1, *rows.shape[-2:]).transpose(0, 1)
            return (
                torch.matmul(by_example, above.unsqueeze(-1)).squeeze(-1).T.reshape(rows.shape[:-1])
            )
        if self.p == math.inf:  # no limit on a feature that does not count
            return torch.where(rows == 0, 0.0, rows.abs() * above).sum(-1)
        eps = cast(self.outer_eps, a.dtype, math.inf)
        return (dual_l1 if self.p == 1 else dual_l2)(rows, below, above, eps)

    def support(self, a: Tensor) -> Tensor:
        """max ⟨a, x⟩ over the region, for ``a`` of shape (..., B, *x): shape (..., B). Guarantee: see `reach`."""
        frame = self.frame(a.dtype)
        inner = (a * frame.origin).flatten(a.ndim - self.center.ndim + 1).sum(-1)
        return inner + self.reach(a, frame)


def equivalent_eps(p: float, n: int, eps_inf: Number, *, limit: bool = False) -> float:
    """The radius of the l_p ball in n dimensions that has the volume of the l_inf ball of radius ``eps_inf``.

        l2: 2·eps_inf·Γ(n/2 + 1)^(1/n)/√π  →  √(2n/(πe))·eps_inf          l1: eps_inf·(n!)^(1/n)  →  n/e·eps_inf

    Args:
        limit: the right-hand sides, which hold for large n and are what is usually quoted: 1.35 for MNIST (n = 784) at
            0.1, where the exact radius is half a per cent larger.

    Raises:
        ValueError: p is not 1, 2 or inf, n < 1, or eps_inf is negative or no number.
    """
    if p not in NORMS:
        raise ValueError(f"p: {p!r} is not one of 1, 2, inf")
    if n < 1:
        raise ValueError(f"n: {n!r} is not a number of dimensions; give at least 1")
    eps = float(enclose(eps_inf, "eps_inf").upper)
    if not eps >= 0:
        raise ValueError(f"eps_inf: {eps_inf!r} is negative; a radius is at least 0")
    factors = {
        1.0: (math.exp(math.lgamma(n + 1) / n), n / math.e),
        2.0: (
            2 / math.sqrt(math.pi) * math.exp(math.lgamma(n / 2 + 1) / n),
            math.sqrt(2 * n / (math.pi * math.e)),
        ),
        math.inf: (1.0, 1.0),
    }
    return eps * factors[float(p)][limit]


def _require_fit(name: str, value: Number | Tensor | None, shape: tuple[int, ...]) -> None:
    """A tensor of the threat model broadcasts to one example."""
    if not isinstance(value, Tensor):
        return
    try:
        value.expand(shape)
    except RuntimeError:
        raise ValueError(
            f"{name}: shape {tuple(value.shape)} does not broadcast to one example of shape {shape}; give one "
            "value per feature, or (C, 1, 1) for one per channel"
        ) from None


def _per_example(eps: Number | Tensor, center: Tensor) -> bool:
    return isinstance(eps, Tensor) and eps.ndim == 1 and eps.shape == center.shape[:1]
