"""Local Lipschitz constants: how fast a functional of the output can change anywhere in a region.

A backward pass with an interval for every coefficient: rows [A − r, A + r] of a value are pulled through an affine op L
as (L'A, |L|'r), through an activation by the range of its slope over the pre-activation's interval, through a product
by the interval of the other factor, and through a maximum to every element that can be the largest. At the input the
interval holds every gradient of the region, and its dual norm bounds the functional's change.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from calipers.bounds.interval import candidates, propagate
from calipers.bounds.ladder import crown, tightener
from calipers.bounds.linear import vjp
from calipers.bounds.planner import example_bytes, in_parts, row_bytes
from calipers.bounds.state import (
    DEFAULT_MEMORY,
    State,
    check_spec,
    describe,
    flat,
    stacked,
    start,
    working_dtype,
)
from calipers.errors import UnsupportedOp
from calipers.graph.graph import Network
from calipers.ops import Step
from calipers.ops.activations import CURVES
from calipers.ops.kinds import Activation, Affine, Bilinear, Extremum
from calipers.ops.smooth import Curve, steepest, undefined
from calipers.sets import Interval, Region
from calipers.spec import Spec

DUAL = {1.0: math.inf, 2.0: 2.0, math.inf: 1.0}


def lipschitz(
    network: Network,
    region: Region,
    spec: Spec,
    *,
    p: float | None = None,
    tight: bool = True,
    dtype: torch.dtype | None = None,
    rigorous: bool = False,
    memory: int | None = None,
) -> Tensor:
    """Upper bounds of the functionals' Lipschitz constants on the region, (B, M):

        |f(x) − f(x')| ≤ L·‖x − x'‖_p  for all x, x' in the region,  f = C·h + d

    Args:
        p: the norm in which the input moves; None is the region's own.
        tight: intervals of pre-activations by CROWN, rather than by interval propagation alone.
        dtype, rigorous, memory: as in `interval`.

    Raises:
        UnsupportedOp: an activation whose slope has no known range here, or an op without an entry in the table.
        ValueError: p is not 1, 2 or inf.

    Sound: regions are convex, so the dual norm's supremum over the region's gradients is a constant for it.
    Cost: the intervals', and two backward rows per functional.
    Reference: Weng et al. 2018 (Fast-Lip), section 3.4; Zhang et al. 2019 (RecurJac).
    """
    norm = region.p if p is None else float(p)
    if norm not in DUAL:
        raise ValueError(f"p: {p!r} is not one of 1, 2, inf")
    low, high = jacobian(
        network, region, spec, tight=tight, dtype=dtype, rigorous=rigorous, memory=memory
    )
    size = torch.maximum(low.abs(), high.abs()).flatten(2)
    found: Tensor = torch.linalg.vector_norm(size, ord=DUAL[norm], dim=-1)
    finfo = torch.finfo(found.dtype)
    return found * (1 + (size.shape[-1] + 8) * finfo.eps) + finfo.tiny if rigorous else found


def jacobian(
    network: Network,
    region: Region,
    spec: Spec,
    *,
    tight: bool = True,
    dtype: torch.dtype | None = None,
    rigorous: bool = False,
    memory: int | None = None,
) -> Interval:
    """Both ends, (B, M, *x) each, of every functional's gradient at every point of the region.

    At a kink every value between the slopes on its two sides counts as one. Arguments and errors as in `lipschitz`.
    """
    chosen = working_dtype(network, spec, dtype, rigorous=rigorous)

    def part(rows: slice, limit: int) -> Interval:
        state = start(
            network, region[rows], dtype=chosen, rigorous=rigorous, memory=limit, statistics=None
        )
        C, _ = check_spec(state, spec[rows])
        propagate(state, tighten=tightener(state) if tight else None)
        step = max(1, state.budget // (4 * max(len(C), 1) * row_bytes(network, chosen)))
        cuts = [_pulled(state, C[:, i : i + step]) for i in range(0, C.shape[1], step)]
        return stacked(cuts, 1)

    each = example_bytes(network, 4 * spec.C.shape[1], chosen)
    each += 4 * chosen.itemsize * spec.C.shape[1] * math.prod(network.input_shape)
    parts = in_parts(
        part,
        len(region),
        size=max(1, (memory or DEFAULT_MEMORY) // 2 // each),
        memory=memory,
        least=row_bytes(network, chosen),
    )
    return stacked(parts)


def certified_radius(
    network: Network,
    region: Region,
    spec: Spec,
    *,
    p: float | None = None,
    tight: bool = True,
    memory: int | None = None,
) -> Tensor:
    """Within this l_p distance of the region's centre no point of the region breaks the specification: (B,).

        r = margin over functionals of f(centre) / L,  at least 0; inf where f cannot change at all

    In float64 with all rounding accounted for. The region's own limits are not part of it: where r exceeds the region's
    radius, the whole region is safe.

    Raises:
        ValueError: a centre lies outside its region. Otherwise as `lipschitz`.

    Reference: Hein and Andriushchenko 2017, theorem 2.1.
    """
    double = torch.float64
    center = region.center.detach()
    if not bool(region.contains(center).all()):
        raise ValueError(
            "region: a centre lies outside its own domain, so no distance from it counts"
        )
    with torch.no_grad():
        speed = lipschitz(
            network, region, spec, p=p, tight=tight, dtype=double, rigorous=True, memory=memory
        )
        point = Region.box(center, center)
        value = crown(network, point, spec, dtype=double, rigorous=True, memory=memory).double()
        radius = spec.margin(value / speed) * (1 - 8 * torch.finfo(double).eps)
    return torch.where(radius > 0, radius, 0.0)  # NaN is no radius


# -- the walk ------------------------------------------------------------------------------------------------


Ball = tuple[Tensor, Tensor]  # coefficients as centre and radius, (S, B, *shape) each


def _pulled(state: State, C: Tensor) -> Interval:
    """The rows of ``C`` (B, M, K) at the input."""
    A = C.transpose(0, 1)
    graph = state.network.graph
    rows: dict[str, Ball] = {graph.output: (A, torch.zeros_like(A))}
    for step in reversed(state.facts.steps):
        if step.node.name not in rows:
            continue
        state.spend(2 * math.prod(A.shape[:2]))
        for index, found in _back(state, step, *rows.pop(step.node.name)).items():
            name = step.node.operands[index]
            if name in rows:
                known = rows[name]
                found = _rounded(state, known[0] + found[0], known[1] + found[1], 1)
            rows[name] = found
    name = graph.inputs[0]
    shape = (*A.shape[:2], *state.network.input_shape)
    center, radius = rows.get(name, (A.new_zeros(shape), A.new_zeros(shape)))
    center, radius = _rounded(state, center, radius, 1)
    return Interval((center - radius).transpose(0, 1), (center + radius).transpose(0, 1))


def _rounded(state: State, center: Tensor, radius: Tensor, terms: int) -> Ball:
    """The ball with what rounding may have done to elementwise results; ``terms`` operations each."""
    gamma = state.gamma(terms)
    if not gamma:
        return center, radius
    return center, radius + gamma * (center.abs() + radius) + torch.finfo(state.dtype).tiny


def _back(state: State, step: Step, center: Tensor, radius: Tensor) -> dict[int, Ball]:
    rule = RULES.get(type(step.kind))
    if rule is None:
        raise UnsupportedOp([describe(step.node)], REMEDY)
    return rule(state, step, center, radius)


REMEDY = "Lipschitz constants need the range of its slope (pieces, or steepest, in the op table)"


def _affine(state: State, step: Step, center: Tensor, radius: Tensor) -> dict[int, Ball]:
    node = step.node
    kind: Affine = step.kind  # type: ignore[assignment]
    args, kwargs = state.arguments(node)
    lead = center.shape[:2]
    terms = kind.terms(*args, **kwargs)
    gamma = state.gamma(terms)
    A = center.flatten(0, 1)
    r = radius.flatten(0, 1)
    if gamma:
        r = r * (1 + gamma) + 2 * gamma * A.abs()
    parts: dict[int, Ball] = {}
    for index in step.perturbed:
        shape = state.shape(node.operands[index])
        back = kind.transpose(A, index, shape, *args, **kwargs) if kind.transpose else None
        if back is None:
            back = vjp(node.op, A, index, shape, args, kwargs)
        wide = _magnitude_back(kind, step, r, index, shape, args, kwargs)
        if gamma:  # products that underflow
            wide = wide + 4 * terms * torch.finfo(state.dtype).tiny
        parts[index] = back.reshape(*lead, *shape), wide.reshape(*lead, *shape)
    return parts


def _magnitude_back(
    kind: Affine,
    step: Step,
    r: Tensor,
    index: int,
    shape: tuple[int, ...],
    args: list[Any],
    kwargs: Mapping[str, Any],
) -> Tensor:
    """|L|'r: the op's own transpose where L ≥ 0, else the transpose of what the table gives for |L|."""
    if kind.magnitude is not None:
        magnitude = kind.magnitude
        return vjp(lambda *a, **k: magnitude(0.0, *a, **k), r, index, shape, args, kwargs)
    back = kind.transpose(r, index, shape, *args, **kwargs) if kind.transpose else None
    return vjp(step.node.op, r, index, shape, args, kwargs) if back is None else back


def slopes(op: Callable[..., Any], kind: Activation, x: Interval, *args: Any) -> Interval | None:
    """The range of an activation's slope over ``x``, or None if it is not known."""
    if kind.pieces is not None:
        known = kind.pieces(*args)
        ends = [-math.inf, *known.points, math.inf]
        low, high = torch.full_like(x.lower, math.inf), torch.full_like(x.lower, -math.inf)
        for i, slope in enumerate(known.slopes):
            met = (x.upper >= ends[i]) & (x.lower <= ends[i + 1])
            value = x.lower.new_tensor(slope)
            low = torch.where(met, low.clamp(max=value), low)
            high = torch.where(met, high.clamp(min=value), high)
        return Interval(low, high)
    if op in CURVES:
        low, high = _curved(CURVES[op], x)
        jump = (
            1e-6 if op is F.hardswish else 0.0
        )  # whose stretches stop short of where its slope jumps
        return Interval(low - jump, high + jump)
    if kind.steepest is None:
        return None
    size = kind.steepest(x, *args)
    return Interval(-size, size)


def _curved(curve: Curve, x: Interval) -> Interval:
    """A slope is monotone on every stretch, so its range is spanned by the ends and by where stretches meet."""
    if callable(curve.concave) or callable(curve.convex):
        size = steepest(curve, x)
        return Interval(-size, size)
    ends = {e for piece in (*curve.concave, *curve.convex) for e in piece if math.isfinite(e)}
    points = [*x, *(x.lower.clamp_min(end).minimum(x.upper) for end in sorted(ends))]
    found = torch.stack([curve.slope(point) for point in points])
    lost = undefined(curve, x)
    return Interval(*(torch.where(lost, math.nan, end) for end in (found.amin(0), found.amax(0))))


def _slopes_of(state: State, step: Step) -> Ball:
    """Centre and radius, (B, *shape) each."""
    node = step.node
    kind: Activation = step.kind  # type: ignore[assignment]
    args, kwargs = state.arguments(node)
    box = state.boxes[step.reads[0]]
    found = slopes(node.op, kind, box, *args[1:], *kwargs.values())
    if found is None:
        raise UnsupportedOp([describe(node)], REMEDY)
    low, high = found
    # an interval with NaN ends meets no piece: nothing is known there
    unknown = torch.isnan(box.lower) | torch.isnan(box.upper) | (low > high)
    center, radius = (low + high) / 2, (high - low) / 2
    radius = torch.where(unknown, math.nan, radius)
    if (
        state.rigorous and kind.pieces is None
    ):  # slopes are sums of terms of about 1 that may cancel
        radius = radius + state.gamma(32) * (1 + center.abs() + radius)
    return _rounded(state, center, radius, 4)


def _activation(state: State, step: Step, center: Tensor, radius: Tensor) -> dict[int, Ball]:
    slope, spread = state.once("slopes", step.node.name, lambda s, _: _slopes_of(s, step))
    wide = center.abs() * spread + radius * (slope.abs() + spread)
    return {0: _rounded(state, center * slope, wide, 3)}


def _bilinear(state: State, step: Step, center: Tensor, radius: Tensor) -> dict[int, Ball]:
    parts: dict[int, Ball] = {}
    for index, other in ((0, 1), (1, 0)):
        low, high = state.boxes[step.node.operands[other]]
        factor, spread = _rounded(state, (low + high) / 2, (high - low) / 2, 2)
        wide = center.abs() * spread + radius * (factor.abs() + spread)
        shape = state.shape(step.node.operands[index])
        ends = _rounded(state, center * factor, wide, 3)
        lead = ends[0].ndim - len(shape)
        broad = [d + lead for d, n in enumerate(shape) if n == 1 and ends[0].shape[d + lead] != 1]
        if broad:
            count = math.prod(ends[0].shape[d] for d in broad)
            first, second = (e.sum(broad, keepdim=True) for e in ends)
            ends = _rounded(state, first, second, count)
        parts[index] = ends
    return parts


def _extremum(state: State, step: Step, center: Tensor, radius: Tensor) -> dict[int, Ball]:
    """Every element that can be the largest of its window may get anything from nothing to all of the row."""
    node = step.node
    kind: Extremum = step.kind  # type: ignore[assignment]
    args, kwargs = state.arguments(node)
    box = state.boxes[step.reads[0]]
    shape = state.shape(step.reads[0])
    where, can = candidates(kind, box, *args[1:], **kwargs)
    alone = can & (can.sum(-1, keepdim=True) == 1)
    share = alone.to(center.dtype) + 0.5 * (can & ~alone)
    spread = share * (can & ~alone)  # 0.5 ± 0.5, or 1 ± 0
    A, r = flat(center, 2).unsqueeze(-1), flat(radius, 2).unsqueeze(-1)
    places = where.flatten().expand(*center.shape[:2], -1)

    def gathered(values: Tensor) -> Tensor:
        out = values.new_zeros(*center.shape[:2], math.prod(shape))
        return out.scatter_add(2, places, values.flatten(2)).reshape(*center.shape[:2], *shape)

    wide = A.abs() * spread + r * (share + spread)
    return {0: _rounded(state, gathered(A * share), gathered(wide), 3 + where.shape[-1])}


RULES: dict[type, Callable[..., dict[int, Ball]]] = {
    Affine: _affine,
    Activation: _activation,
    Bilinear: _bilinear,
    Extremum: _extremum,
}
