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
import re
from dataclasses import dataclass, field, fields
from fractions import Fraction
from typing import NamedTuple

import torch
from torch import Tensor

from calipers.errors import DataError, RegionError

Number = float | int | str | Fraction
NORMS = (1.0, 2.0, math.inf)
_NUMBER = re.compile(r"[+-]?\d{1,40}(\.\d{0,60})?([eE][+-]?\d{1,3})?(/\d{1,40})?")
_U = 2.0**-53  # unit roundoff of float64


class Interval(NamedTuple):
    """Two tensors of one shape, lower <= upper elementwise."""

    lower: Tensor
    upper: Tensor


class Frame(NamedTuple):
    """A region in one dtype, as bounds see it: offsets x − origin lie in [−below, above], x itself in ``hull``.

    The origin is the middle of the box for p = inf (then below = above) and the centre otherwise.
    """

    origin: Tensor
    below: Tensor
    above: Tensor
    hull: Interval
    bounded: bool


def exact(value: Number) -> Fraction:
    """The exact rational that ``value`` denotes: ``"0.1"`` is 1/10, ``"8/255"`` is 8/255, a float its binary value.

    Raises:
        ValueError: not a finite number, or a string that is not a plain decimal or ratio.
    """
    if isinstance(value, str):
        if not _NUMBER.fullmatch(value.strip()):
            raise ValueError(
                f"number: cannot read {value[:80]!r}; write a decimal or a ratio such as 8/255"
            )
        numerator, _, denominator = value.strip().partition("/")
        if denominator and int(denominator) == 0:
            raise ValueError(f"number: {value!r} divides by zero")
        return Fraction(numerator) / Fraction(denominator or "1")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"number: {value!r} is not finite")
    return Fraction(value)


def _enclose(value: Number | Tensor, name: str) -> Interval:
    """The tightest float64 numbers around ``value``; a tensor's entries are exact already."""
    if isinstance(value, Tensor):
        if torch.isnan(value).any():
            raise ValueError(f"{name}: contains NaN")
        double = value.to(torch.float64)
        return Interval(double, double)
    if isinstance(value, float) and math.isinf(value):
        bound = torch.tensor(value, dtype=torch.float64)
        return Interval(bound, bound)
    try:
        fraction = exact(value)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    try:
        nearest = float(fraction)
    except OverflowError:
        raise ValueError(f"{name}: {value!r} exceeds the largest float64") from None
    below = nearest if Fraction(nearest) <= fraction else math.nextafter(nearest, -math.inf)
    above = nearest if Fraction(nearest) >= fraction else math.nextafter(nearest, math.inf)
    return Interval(
        torch.tensor(below, dtype=torch.float64), torch.tensor(above, dtype=torch.float64)
    )


def _step(value: Tensor, towards: float, where: Tensor) -> Tensor:
    """``value``, moved to its neighbour where asked; differentiable as the identity."""
    fixed = value.detach()
    neighbour = torch.nextafter(fixed, torch.full_like(fixed, towards))
    move = torch.where(where & torch.isfinite(fixed), neighbour - fixed, torch.zeros_like(fixed))
    return value + move


def _add(a: Tensor, b: Tensor, towards: float) -> Tensor:
    """a + b in float64, rounded towards ``towards`` (±inf) exactly, by the error term of the sum."""
    total = a + b
    with torch.no_grad():
        part = total - a
        error = (a - (total - part)) + (b - part)
        off = error < 0 if towards < 0 else error > 0
    return _step(total, towards, off & torch.isfinite(error))


def cast(value: Tensor, dtype: torch.dtype, towards: float) -> Tensor:
    """A float64 tensor in ``dtype``, rounded towards ±inf."""
    if dtype == value.dtype:
        return value
    rounded = value.to(dtype)
    with torch.no_grad():
        back = rounded.to(value.dtype)
        off = back > value if towards < 0 else back < value
        overflow = off & torch.isinf(rounded)  # a finite value beyond the dtype's range
    largest = math.copysign(torch.finfo(dtype).max, -towards)
    return torch.where(overflow, largest, _step(rounded, towards, off))


@dataclass(frozen=True)
class ThreatModel:
    """What the adversary may do, independent of data: a ball of radius ``eps`` and the input domain.

    Args:
        p: norm order, 1, 2 or ``math.inf``.
        eps: radius in input units; a ``str`` or ``Fraction`` keeps its exact value; a tensor (one radius per
            feature) only for p = inf.
        lower, upper: the input domain, numbers or tensors that broadcast to one example; ±inf for no limit.

    Raises:
        ValueError: an argument is out of range; the message names it.
    """

    p: float
    eps: Number | Tensor
    lower: Number | Tensor = 0.0
    upper: Number | Tensor = 1.0

    def __post_init__(self) -> None:
        if self.p not in NORMS:
            raise ValueError(f"p: {self.p!r} is not one of 1, 2, inf")
        eps = _enclose(self.eps, "eps")
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
        low, high = _enclose(self.lower, "lower"), _enclose(self.upper, "upper")
        if not bool((low.lower <= high.upper).all()):
            raise ValueError(f"lower: {self.lower!r} exceeds upper: {self.upper!r}")

    def around(self, x: Tensor) -> Region:
        """The regions around a batch of examples ``x`` of shape (B, *x).

        Raises:
            DataError: ``x`` is not floating point, not finite, or lies outside the domain.
        """
        if not x.is_floating_point():
            raise DataError(
                f"x: dtype {x.dtype} is not floating point; convert and scale the inputs first"
            )
        if not torch.isfinite(x).all():
            bad = int((~torch.isfinite(x.detach()).flatten(1).all(1)).sum())
            raise DataError(f"x: {bad} of {len(x)} examples contain NaN or infinite values")
        eps = self.eps
        if isinstance(eps, Tensor) and eps.ndim:  # per feature, even where B equals their number
            eps = eps.to(x.device).expand(x.shape[1:]).unsqueeze(0)
        return Region.ball(x, eps, self.p, self.lower, self.upper)

    def describe(self) -> str:
        """One line, for people and for run records."""
        norm = {1.0: "l1", 2.0: "l2", math.inf: "linf"}[float(self.p)]

        def show(value: Number | Tensor) -> str:
            if isinstance(value, Tensor):
                return f"per-feature {value.min().item():g}..{value.max().item():g}"
            return f"{value:g}" if isinstance(value, float) else str(value)

        return f"{norm} eps={show(self.eps)} in [{show(self.lower)}, {show(self.upper)}]"


@dataclass(frozen=True, eq=False)
class Region:
    """``{x : ‖x − center‖_p ≤ eps} ∩ [lower, upper]``, one set per example.

    ``center``, ``lower``, ``upper`` have shape (B, *x), ``eps`` (B,) or, per feature, (B, *x), all float64 on the
    device of the data.
    ``lower`` and ``upper`` are already intersected with the ball's own box, so for p = inf they are the whole
    set. They hold the inner values; ``outer_*`` the outer ones. Build one with `ThreatModel.around`,
    `Region.ball` or `Region.box`.
    """

    center: Tensor
    eps: Tensor
    p: float
    lower: Tensor
    upper: Tensor
    outer_eps: Tensor
    outer_lower: Tensor
    outer_upper: Tensor
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
    ) -> Region:
        """A ball around each row of ``center`` intersected with a box.

        Args:
            eps: a number, a tensor of shape (B,) (one radius per example), or, for p = inf, any other tensor
                that broadcasts to ``center`` (one radius per feature).

        Raises:
            DataError: a centre lies outside the box.
        """
        ThreatModel(p, eps if not _per_example(eps, center) else float(eps.min()), lower, upper)  # type: ignore[union-attr]
        x = center.to(torch.float64)

        def like(bound: Tensor) -> Tensor:
            return bound.to(x.device).expand_as(x)

        low, high = _enclose(lower, "lower"), _enclose(upper, "upper")
        radius = _enclose(eps, "eps")
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
            _add(x, -like(radius.lower), math.inf), torch.minimum(like(low.upper), x)
        )
        inner_high = torch.minimum(
            _add(x, like(radius.lower), -math.inf), torch.maximum(like(high.lower), x)
        )
        per_feature = radius.lower.ndim > 0 and not _per_example(eps, center)

        def rows_of(r: Tensor) -> Tensor:
            r = r.to(x.device)
            return r.expand_as(x) if per_feature else r.reshape(-1).expand(len(x))

        return cls(
            x,
            rows_of(radius.lower),
            float(p),
            inner_low,
            inner_high,
            rows_of(radius.upper),
            torch.maximum(_add(x, -like(radius.upper), -math.inf), like(low.lower)),
            torch.minimum(_add(x, like(radius.upper), math.inf), like(high.upper)),
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
            if f.name not in ("p", "_cache")
        }
        return Region(p=self.p, **parts)

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

    # -- membership --------------------------------------------------------------------------------

    def contains(self, x: Tensor) -> Tensor:
        """Whether each row of ``x`` (B, *x) is a member, exactly on the stored numbers, without tolerance: (B,) bool.

        NaN and infinity are no members. Float64 decides where its error bound allows, rational arithmetic elsewhere.
        """
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

        Exact for each p with the box included, up to rounding (towards the centre).
        """
        low, high = self.inner(z.dtype)
        if self.p == math.inf:
            return torch.clamp(z, low, high)
        gap = (z.detach().to(torch.float64) - self.center).clamp(-1e300, 1e300)
        cap = torch.where(gap > 0, self.upper - self.center, self.center - self.lower)
        size, cap = gap.abs().flatten(1), cap.flatten(1)
        eps = self._safe_eps()
        length = torch.minimum(size, cap)
        over = _norm(length, self.p) > eps
        if over.any():
            shrink = _shrink_l1 if self.p == 1 else _level_l2
            length[over] = shrink(size[over], cap[over], eps[over])
        return self._place(gap.sign() * length.view_as(gap), z.dtype)

    def maximizer(self, a: Tensor) -> Tensor:
        """A member that maximises ⟨a, x⟩, for ``a`` of shape (B, *x), in the dtype of ``a``; the centre where a = 0."""
        low, high = self.inner(a.dtype)
        if self.p == math.inf:
            middle = self.center.detach().to(a.dtype).clamp(low, high)
            return torch.where(a > 0, high, torch.where(a < 0, low, middle))
        slope = a.detach().to(torch.float64)
        cap = torch.where(slope > 0, self.upper - self.center, self.center - self.lower).flatten(1)
        size, eps = slope.abs().flatten(1), self._safe_eps()
        cap = torch.where(size > 0, cap, torch.zeros_like(cap))
        length = _fill_l1(size, cap, eps) if self.p == 1 else _level_l2(size, cap, eps)
        return self._place(slope.sign() * length.view_as(slope), a.dtype)

    def steepest(self, g: Tensor) -> Tensor:
        """argmax ⟨g, d⟩ over ‖d‖_p ≤ 1: the direction of steepest ascent in the region's norm; 0 where g = 0."""
        if self.p == math.inf:
            return g.sign()
        flat = g.flatten(1)
        if self.p == 2:
            # divided by the peak first, so that the squares of tiny or huge gradients stay in range
            peak = flat.abs().amax(1, keepdim=True)
            scaled = flat / torch.where(peak > 0, peak, torch.ones_like(peak))
            size: Tensor = torch.linalg.vector_norm(scaled, dim=1, keepdim=True)
            return (scaled / size.clamp_min(1.0)).view_as(g)
        peak = flat.abs().argmax(1, keepdim=True)
        return torch.zeros_like(flat).scatter(1, peak, flat.gather(1, peak).sign()).view_as(g)

    def ascend(
        self, x: Tensor, g: Tensor, length: float | Tensor, *, plain: bool = False
    ) -> Tensor:
        """project(x + length·steepest(g)), or project(x + length·g) if ``plain``: one step of an attack.

        ``g`` may be overwritten.
        """
        box = self.p == math.inf
        direction = g if plain else g.sign_() if box else self.steepest(g)
        step = length * direction if isinstance(length, Tensor) else direction
        z = torch.add(x, step, alpha=1.0 if isinstance(length, Tensor) else length)
        if box:  # the new point is nobody else's yet
            low, high = self.inner(z.dtype)
            return z.clamp_(low, high)
        return self.project(z)

    def sample(self, seeds: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """One random member per example: uniform in the box (p = inf), or uniform in the ball, then projected.

        Each example has its own seed, so the draw does not depend on batch or order.
        """
        dtype = dtype or torch.float32
        n = math.prod(self.center.shape[1:])
        rows = [self._draw(int(seed), n) for seed in seeds.tolist()]
        noise = torch.stack(rows).to(self.center.device).view_as(self.center)
        if self.p == math.inf:
            low, high = self.inner(dtype)
            if not bool(torch.isfinite(low).all() & torch.isfinite(high).all()):
                raise RegionError("sample: the region is unbounded, so there is no uniform draw")
            return (low + noise.to(dtype) * (high - low)).clamp(low, high)
        eps = self.eps.reshape(-1, *[1] * (self.center.ndim - 1))
        return self.project((self.center + eps * noise).to(dtype))

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
        below = cast(_add(exact_origin, -box.lower, math.inf), dtype, math.inf)
        above = cast(_add(box.upper, -exact_origin, math.inf), dtype, math.inf)
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
        return (_dual_l1 if self.p == 1 else _dual_l2)(rows, below, above, eps)

    def support(self, a: Tensor) -> Tensor:
        """max ⟨a, x⟩ over the region, for ``a`` of shape (..., B, *x): shape (..., B). Guarantee: see `reach`."""
        frame = self.frame(a.dtype)
        inner = (a * frame.origin).flatten(a.ndim - self.center.ndim + 1).sum(-1)
        return inner + self.reach(a, frame)


# -- one-dimensional searches; rows of nonnegative ``size``, caps, and one radius per row ----------------


def _per_example(eps: Number | Tensor, center: Tensor) -> bool:
    return isinstance(eps, Tensor) and eps.ndim == 1 and eps.shape == center.shape[:1]


def _norm(rows: Tensor, p: float) -> Tensor:
    size: Tensor = torch.linalg.vector_norm(rows, ord=p, dim=-1)
    return size


def _level(size: Tensor, cap: Tensor, eps: Tensor) -> Tensor:
    """t with Σ min(t·size, cap)² = eps²; inf where all caps fit into the ball. Shapes (..., n), (..., n), (...).

    Newton from below: with the capped set of the current t the equation is a plain square root, each step
    raises t and only adds to the capped set, so it ends after finitely many steps (in practice under ten).
    """
    square, limit = size.square(), cap.square()
    budget = eps.square()
    fits = torch.where(size > 0, limit, 0.0).sum(-1) <= budget
    t = (budget / square.sum(-1).clamp_min(1e-300)).sqrt()
    for _ in range(size.shape[-1]):
        capped = t.unsqueeze(-1) * size >= cap
        rest = (budget - torch.where(capped, limit, 0.0).sum(-1)).clamp_min(0.0)
        free = torch.where(capped, 0.0, square).sum(-1)
        better = torch.where(free > 0, (rest / free.clamp_min(1e-300)).sqrt(), t)
        tiny = ~fits & (free < 1e-30)
        if bool(tiny.any()):  # the squares of what is not capped underflow: rescale
            loose = torch.where(capped, 0.0, size)
            peak = loose.amax(-1)
            unit = loose / torch.where(peak > 0, peak, 1.0).unsqueeze(-1)
            rescaled = (rest / unit.square().sum(-1).clamp_min(1.0)).sqrt() / peak
            better = torch.where(tiny & (peak > 0), rescaled, better)
        if bool((fits | (better <= t * (1 + 1e-14))).all()):
            break
        t = torch.maximum(t, better)
    return torch.where(fits, math.inf, t)


def _level_l2(size: Tensor, cap: Tensor, eps: Tensor) -> Tensor:
    scale = size.amax(-1, keepdim=True)
    unit = size / torch.where(scale > 0, scale, 1.0)
    t = _level(unit, cap, eps).unsqueeze(-1)
    length = torch.where(unit > 0, torch.minimum(t * unit, cap), torch.zeros_like(cap))
    over: Tensor = torch.linalg.vector_norm(length, dim=-1, keepdim=True)
    return length * (eps.unsqueeze(-1) / over.clamp_min(1e-300)).clamp_max(1.0)


def _shrink_l1(size: Tensor, cap: Tensor, eps: Tensor) -> Tensor:
    """clip(size − μ, 0, cap) with sum eps: the l1 projection inside caps, by sorting the 2n breakpoints of μ.

    No cap exceeds eps, so a gap between two sizes that is wider than eps only tells which is larger: it is
    narrowed first, and points far away are projected as accurately as near ones.
    """
    ordered, place = size.sort(-1, descending=True)
    gaps = ordered - torch.cat([ordered[..., 1:], torch.zeros_like(ordered[..., :1])], -1)
    gaps = torch.minimum(gaps, 2 * eps.unsqueeze(-1))
    size = torch.zeros_like(size).scatter(-1, place, gaps.flip(-1).cumsum(-1).flip(-1))
    points = torch.cat([size, (size - cap).clamp_min(0.0)], -1)
    turns = torch.cat([torch.ones_like(size), -torch.ones_like(size)], -1)
    points, order = points.sort(-1, descending=True)
    slope = turns.gather(-1, order).cumsum(-1)
    ends = torch.cat([points[..., 1:], torch.zeros_like(points[..., :1])], -1)
    total = (slope * (points - ends)).cumsum(-1)
    index = (total < eps.unsqueeze(-1)).sum(-1, keepdim=True).clamp_max(points.shape[-1] - 1)
    excess = total.gather(-1, index) - eps.unsqueeze(-1)
    mu = ends.gather(-1, index) + excess / slope.gather(-1, index).clamp_min(1.0)
    length = torch.minimum((size - mu).clamp_min(0.0), cap)
    return length * (eps.unsqueeze(-1) / length.sum(-1, keepdim=True).clamp_min(1e-300)).clamp_max(
        1.0
    )


def _fill_l1(size: Tensor, cap: Tensor, eps: Tensor) -> Tensor:
    """Spend the radius on the largest entries first, each up to its cap."""
    order = size.argsort(dim=-1, descending=True, stable=True)
    room = cap.gather(-1, order)
    before = room.cumsum(-1) - room
    spent = torch.minimum((eps.unsqueeze(-1) - before).clamp_min(0.0), room)
    length = torch.zeros_like(cap).scatter(-1, order, spent)
    return length * (eps.unsqueeze(-1) / length.sum(-1, keepdim=True).clamp_min(1e-300)).clamp_max(
        1.0
    )


def _dual_l2(a: Tensor, below: Tensor, above: Tensor, eps: Tensor) -> Tensor:
    """min over the multiplier λ of max over the box of ⟨a, δ⟩ − λ/2·(‖δ‖² − eps²), evaluated at λ = 1/t."""
    with torch.no_grad():
        size = a.abs()
        scale = size.amax(-1, keepdim=True)
        unit = size / torch.where(scale > 0, scale, 1.0)
        cap = torch.where(a > 0, above, below)
        t = _level(unit, cap, eps.expand(unit.shape[:-1]))
        multiplier = torch.where(
            torch.isinf(t), 0.0, scale.squeeze(-1) / t.clamp_min(1e-30)
        ).unsqueeze(-1)
        corner = multiplier == 0
    free = a / torch.where(corner, 1.0, multiplier)
    best = torch.where(
        corner, torch.where(a > 0, above, -below), torch.minimum(torch.maximum(free, -below), above)
    )
    best = torch.where(a == 0, torch.zeros_like(best), best)
    quadratic = best.square().sum(-1) - eps.square()
    return (a * best).sum(-1) - multiplier.squeeze(-1) / 2 * quadratic


def _dual_l1(a: Tensor, below: Tensor, above: Tensor, eps: Tensor) -> Tensor:
    """min over λ of λ·eps + Σ (a − λ)₊·above + (−a − λ)₊·below, at the entry where the radius is used up."""
    size = a.abs()
    with torch.no_grad():
        cap = torch.where(a > 0, above, below)
        # how many entries, largest first, are filled to their cap before the radius is used up
        entry = size.argmax(-1, keepdim=True)
        spent = torch.zeros_like(entry, dtype=torch.bool)
        tight = cap.gather(-1, entry).squeeze(-1) < eps
        if tight.any():
            order = size[tight].argsort(-1, descending=True)
            room = cap[tight].gather(-1, order).cumsum(-1)
            used = (room < eps.expand(tight.shape)[tight].unsqueeze(-1)).sum(-1, keepdim=True)
            spent[tight] = used == size.shape[-1]
            entry[tight] = order.gather(-1, used.clamp_max(size.shape[-1] - 1))
    # differentiable: the entry at the level takes what is left of the radius
    level = torch.where(spent, 0.0, size.gather(-1, entry))
    gain = torch.relu(a - level) * above + torch.relu(-a - level) * below
    return level.squeeze(-1) * eps + gain.sum(-1)
