"""Linear bounds forward: every value as an affine form in shared symbols, carried from the inputs.

A value h is enclosed by h = c + Σ_k e_k·G_k + t with |e_k| ≤ 1 and |t| ≤ rest: the first symbols are the input's sides,
and each activation adds one for every neuron that it bends, so that later layers see what these errors have in common
(a zonotope). Where there are too many, the smallest go into ``rest``, elementwise (a mixed form). The error of rounding
goes there too. One product per layer takes the symbols of the whole batch along; for few inputs, or few unstable
neurons, that is much cheaper than a backward pass for each neuron, and as tight as one with parallel lines.

Reference: Singh et al. 2018 (DeepZ), theorem 3.1; equal to Wong and Kolter 2018 where all symbols
are kept (Salman et al. 2019).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from calipers.bounds.interval import RULES as INTERVAL
from calipers.bounds.interval import magnitude, propagate, windowed
from calipers.bounds.ladder import Statistics, at_reference, chunked, interval_bounds
from calipers.bounds.state import State, absolute, at, check_spec, flat, met
from calipers.graph import primitives as prim
from calipers.graph.graph import Network, Node
from calipers.ops import Step
from calipers.ops.kinds import Activation, Affine, Bilinear, Extremum, Lines, Pieces
from calipers.sets import Interval, Region
from calipers.spec import Spec

SYMBOLS = 128  # that an activation may add: more cost more than they gain
NUMBERS = 1 << 26  # in the largest form of one example
PIECE = 1 << 19  # bytes of a form that are summed at once


def forward(
    network: Network,
    region: Region,
    spec: Spec,
    *,
    dtype: torch.dtype | None = None,
    rigorous: bool = False,
    memory: int | None = None,
    statistics: Statistics | None = None,
) -> Tensor:
    """Lower bounds by affine forms carried from the input, never below `interval`'s. Arguments as in `interval`.

    Sound: for every region; an l2 or l1 ball is replaced by its bounding box.
    Cost: a forward pass for each symbol: the inputs that vary, and up to 128 more per activation.
    """
    return chunked(_forward, network, region, spec, dtype, rigorous, memory, statistics)


def _forward(state: State, spec: Spec) -> Tensor:
    graph = state.network.graph
    activations = sum(isinstance(step.kind, Activation) for step in state.facts.steps)
    inputs = torch.arange(math.prod(state.network.input_shape))[: NUMBERS // (2 * graph.widest)]
    rows = max(1, NUMBERS // graph.widest - len(inputs))
    symbols = max(1, min(SYMBOLS, rows // max(1, activations)))
    example = 3 * state.dtype.itemsize * graph.widest * (len(inputs) + symbols * activations)
    size = max(1, state.memory // example)

    def bounds(span: slice) -> Tensor:
        some, part = state.over(state.region[span]), spec[span]
        C, d = check_spec(some, part)
        propagate(some)
        form = propagate_forms(some, symbols=symbols, inputs=inputs, keep=(graph.output,))
        low, _ = functionals_of(some, form[graph.output], C.transpose(0, 1))
        weak = interval_bounds(some.over(some.region), part)
        return torch.maximum(at_reference(some, C, d) + low.T, weak)

    return torch.cat([bounds(slice(i, i + size)) for i in range(0, state.batch, size)])


def functionals_of(state: State, form: Form, A: Tensor) -> tuple[Tensor, Tensor]:
    """Lower bounds (S, B) of A·(h − c) for rows ``A`` (S, B, n) of a value of form ``form``, and the rows' coefficients
    (S, B, K) of the symbols."""
    along = torch.einsum("sbn,kbn->sbk", A, flat(form.rows, 2))
    loss = along.abs().sum(-1)
    size = A.abs()
    if form.rest is not None:
        loss = loss + (size * flat(form.rest)).sum(-1)
    if state.rigorous:
        loss = loss * (1 + state.gamma(along.shape[-1] + A.shape[-1] + 4))
        loss = loss + state.gamma(A.shape[-1]) * (size * flat(form.radius)).sum(-1)
        loss = loss + (along.shape[-1] + 4) * (A.shape[-1] + 4) * state.tiny
    return -loss, along


class Form(NamedTuple):
    """h = c + Σ_k e_k·rows_k + t, |e_k| ≤ 1, |t| ≤ rest; the centre c is the state's reference.

    Args:
        rows: (K, B, *shape). Symbols are numbered as they arise, so a value's are the first K of all.
        rest: (B, *shape), or None for zero.
        radius: Σ|rows_k| + rest, rounded up where rounding counts.
    """

    rows: Tensor
    rest: Tensor | None
    radius: Tensor


def propagate_forms(
    state: State,
    *,
    symbols: int,
    inputs: Tensor,
    keep: Collection[str] = (),
    tighten: Callable[[State, Node], None] | None = None,
) -> dict[str, Form]:
    """Fill ``state.boxes`` with the forms' intervals, and the reference with their centres.

    Boxes that are there already are met with. Returned are the forms of the values ``keep``; others are forgotten after
    their last use.

    Args:
        symbols: how many new symbols a value may add at most.
        inputs: flat positions of the input elements that get a symbol; the others' deviations go into ``rest``.
        tighten: may improve the intervals of a node's operands before it is read.
    """
    graph = state.network.graph
    forms = {graph.inputs[0]: _at_input(state, inputs)}
    for step in state.facts.steps:
        name = step.node.name
        if tighten is not None:
            tighten(state, step.node)
        state.spend(state.batch * (1 + sum(len(forms[v].rows) for v in step.reads)))
        center, rows, rest, *known = RULES[type(step.kind)](
            state, step, [forms[v] for v in step.reads], symbols
        )
        radius = known[0] if known else _radius(state, rows, rest)
        state.env[name], forms[name] = center, Form(rows, rest, radius)
        state.boxes[name] = _met(state, name, center, radius)
        for old in graph.last_use[name]:
            if old not in keep:
                forms.pop(old, None)
    return {k: v for k, v in forms.items() if k in keep}


Parts = (
    tuple[Tensor, Tensor, Tensor | None] | tuple[Tensor, Tensor, Tensor | None, Tensor]
)  # and its radius


def _at_input(state: State, inputs: Tensor) -> Form:
    frame, name = state.frame, state.network.graph.inputs[0]
    z, box = state.env[name], state.boxes[name]
    centred = frame.above is frame.below
    sides = frame.above if centred else torch.maximum(z - box.lower, box.upper - z)
    size = flat(sides)
    rows = size.new_zeros(len(inputs), *size.shape)
    rows[torch.arange(len(inputs)), :, inputs] = size[:, inputs].T
    rest = size.index_fill(1, inputs, 0.0).reshape(sides.shape)
    return Form(rows.reshape(-1, *sides.shape), rest if bool(rest.any()) else None, sides)


def _radius(state: State, rows: Tensor, rest: Tensor | None) -> Tensor:
    radius = _size(rows)
    if rest is not None:
        radius = radius + rest
    return radius * (1 + state.gamma(len(rows) + 2)) if state.rigorous else radius


def _size(rows: Tensor) -> Tensor:
    """Σ|rows|, in pieces that stay in the cache."""
    step = max(1, PIECE // max(1, rows[0].nbytes)) if len(rows) else 1
    if rows.requires_grad or step >= len(rows):
        return rows.abs().sum(0)
    total = rows[:step].abs().sum(0)
    for i in range(step, len(rows), step):
        total += rows[i : i + step].abs().sum(0)
    return total


def _met(state: State, name: str, center: Tensor, radius: Tensor) -> Interval:
    if state.rigorous:
        radius = radius + state.gamma(1) * (center.abs() + radius)
    box, known = Interval(center - radius, center + radius), state.boxes.get(name)
    return box if known is None else met(known, box)


# -- the kinds ----------------------------------------------------------------------------------------------------


# the argument number of c in Lx + c
OFFSET: dict[Callable[..., Any], int] = {
    F.linear: 2,
    torch.conv1d: 2,
    torch.conv2d: 2,
    torch.conv3d: 2,
}
# ops that are their own linear part
LINEAR: frozenset[Callable[..., Any]] = frozenset(
    {
        torch.matmul, torch.mul, torch.div, torch.neg, torch.sum, torch.mean, torch.permute, torch.index_select,
        prim.reshape, prim.expand, prim.slice_, prim.average_pool, prim.identity, prim.dropout,
    }
)  # fmt: skip


def _affine(state: State, step: Step, forms: list[Form], _: int) -> Parts:
    node = step.node
    kind: Affine = step.kind  # type: ignore[assignment]
    args, kwargs = state.arguments(node)
    center = node.op(*args, **kwargs)
    most = max(len(f.rows) for f in forms)
    stacked = [_padded(f.rows, most).flatten(0, 1) for f in forms]
    rows = _linear_part(step, stacked, args, kwargs).reshape(most, *center.shape)
    gamma = state.gamma(max(kind.terms(*args, **kwargs), 0))
    if not gamma and all(f.rest is None for f in forms):
        return center, rows, None
    rests = [torch.zeros_like(f.radius) if f.rest is None else f.rest for f in forms]
    if gamma:
        sizes = [
            torch.add(rest, state.env[v].abs() + f.radius, alpha=gamma)
            for rest, v, f in zip(rests, step.reads, forms, strict=True)
        ]
    else:
        sizes = rests
    places = dict(zip(step.perturbed, sizes, strict=True))
    if kind.magnitude is not None:
        rest = kind.magnitude(gamma, *at(args, places), **kwargs)
    else:
        rest = _linear_part(step, sizes, args, kwargs)
        if gamma:  # the constant's own rounding
            rest = rest + gamma * node.op(
                *absolute(at(args, {k: torch.zeros_like(v) for k, v in places.items()})), **kwargs
            )
    return center, rows, rest + (most + 4) * state.tiny if state.rigorous else rest


def _padded(rows: Tensor, count: int) -> Tensor:
    if len(rows) == count:
        return rows
    return torch.cat([rows, rows.new_zeros(count - len(rows), *rows.shape[1:])])


def _linear_part(
    step: Step, values: list[Tensor], args: list[Any], kwargs: Mapping[str, Any]
) -> Tensor:
    """L·v for values v of the perturbed arguments; by default the derivative of the op, whatever it is."""
    node = step.node
    if not len(values[0]):  # no symbols: what is differentiated must have been used
        return values[0].new_zeros(0, *node.shape)
    if node.op is torch.add:
        return sum(values[1:], values[0]).expand(len(values[0]), *node.shape)
    offset = OFFSET.get(node.op)
    if offset is not None or node.op in LINEAR:
        filled = at(args, dict(zip(step.perturbed, values, strict=True)))
        if offset is not None and len(filled) > offset:
            filled[offset] = None
        found: Tensor = node.op(*filled, **kwargs)
        return found
    differentiable = torch.is_grad_enabled()
    with torch.enable_grad():  # the vector-Jacobian product is linear too, and its transpose is L
        points = [torch.zeros_like(v).requires_grad_() for v in values]
        y = node.op(*at(args, dict(zip(step.perturbed, points, strict=True))), **kwargs)
        dual = torch.zeros_like(y).requires_grad_()
        pulled = torch.autograd.grad(y, points, dual, create_graph=True)
        (derivative,) = torch.autograd.grad(pulled, dual, values, create_graph=differentiable)
    return derivative


def _activation(state: State, step: Step, forms: list[Form], symbols: int) -> Parts:
    """s·z + t with t in a strip, whose middle goes to the centre and whose half width is a new symbol."""
    args, kwargs = state.arguments(step.node)
    form, z = forms[0], args[0]
    slope, low, high, size = _strip(step, state.boxes[step.reads[0]], args[1:], kwargs)
    half = 0.5 * (high - low)
    center = torch.addcmul(low + half, slope, z)
    rest = None if form.rest is None else form.rest * slope.abs()
    if state.rigorous:
        kind: Activation = step.kind  # type: ignore[assignment]
        size = size + slope.abs() * (z.abs() + form.radius)
        half = half + (half > 0) * state.gamma(2) * size
        slack = state.gamma(16 + int(kind.ulps)) * size + (len(form.rows) + 4) * state.tiny
        rest = slack if rest is None else rest + slack
    radius = slope.abs() * form.radius + half  # what the rows' sizes add up to
    if state.rigorous:
        radius = (radius + slack) * (1 + state.gamma(len(form.rows) + 8))
    fresh, left = _fresh(half, symbols)
    if left is not None:
        rest = left if rest is None else rest + left
    if not len(fresh):
        return center, form.rows * slope, rest, radius
    if form.rows.requires_grad or fresh.requires_grad or slope.requires_grad:
        return center, torch.cat([form.rows * slope, fresh]), rest, radius
    rows = fresh.new_empty(len(form.rows) + len(fresh), *fresh.shape[1:])
    torch.mul(form.rows, slope, out=rows[: len(form.rows)])
    rows[len(form.rows) :] = fresh
    return center, rows, rest, radius


def _strip(
    step: Step, box: Interval, args: list[Any], kwargs: Mapping[str, Any]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """slope·z + low ≤ f(z) ≤ slope·z + high on the box: the strip along the chord of a piecewise-linear f, which is the
    narrowest for one kink; for others the strip around the two lines. Last, the size of the numbers summed."""
    kind: Activation = step.kind  # type: ignore[assignment]
    l, u = box
    if kind.pieces is None:
        lines: Lines = kind.relax(box, *args, **kwargs)
        slope = 0.5 * (lines.lower_slope + lines.upper_slope)
        steep = lines.lower_slope.abs() + lines.upper_slope.abs()
        size = steep * magnitude(box) + lines.lower_offset.abs() + lines.upper_offset.abs()
        under, over = lines.lower_slope - slope, lines.upper_slope - slope
        low = torch.minimum(under * l, under * u) + lines.lower_offset
        high = torch.maximum(over * l, over * u) + lines.upper_offset
        return slope, low, high, size
    at_l, at_u, width = step.node.op(l, *args, **kwargs), step.node.op(u, *args, **kwargs), u - l
    slope = (at_u - at_l) / width
    slope = torch.where(width > 0, slope, 0.0)
    first, second = at_l - slope * l, at_u - slope * u
    low, high = torch.minimum(first, second), torch.maximum(first, second)
    for point, value in _kinks(kind.pieces(*args, **kwargs)):
        inside = torch.where((l < point) & (point < u), value - slope * point, first)
        low, high = torch.minimum(low, inside), torch.maximum(high, inside)
    return slope, low, high, slope.abs() * magnitude(box) + at_l.abs() + at_u.abs()


def _kinks(pieces: Pieces) -> list[tuple[float, float]]:
    found, value = [], pieces.value
    for i, point in enumerate(pieces.points):
        if i:
            value += pieces.slopes[i] * (point - pieces.points[i - 1])
        found.append((point, value))
    return found


def _fresh(half: Tensor, symbols: int) -> tuple[Tensor, Tensor | None]:
    """A new symbol for each of the ``symbols`` widest strips of an example, and the others' half widths."""
    size = flat(half)
    bent = size > 0
    place = bent.cumsum(1)
    count = int(place[:, -1].max()) if size.numel() else 0
    left = None
    if count <= symbols:
        b, i = torch.nonzero(bent, as_tuple=True)
        rows = size.new_zeros(count, *size.shape)
        rows[place[b, i] - 1, b, i] = size[b, i]
    else:
        best = size.topk(symbols, 1)
        rows = size.new_zeros(symbols, *size.shape)
        rows.scatter_(2, best.indices.T.unsqueeze(2), best.values.T.unsqueeze(2))
        left = size.scatter(1, best.indices, 0.0).reshape(half.shape)
    return rows.reshape(-1, *half.shape), left


def _bilinear(state: State, step: Step, forms: list[Form], symbols: int) -> Parts:
    """(c + g)(c' + g') = c·c' + c·g' + c'·g + g·g', the last at most the product of the radii."""
    if step.node.op is not torch.mul or len(step.perturbed) != 2:
        return _interval(state, step, forms, symbols)
    (x, y), _ = state.arguments(step.node)
    f, g = forms
    most = max(len(f.rows), len(g.rows))
    rows = _padded(f.rows, most) * y + _padded(g.rows, most) * x
    rest = f.radius * g.radius
    for form, factor in ((f, y), (g, x)):
        if form.rest is not None:
            rest = rest + form.rest * factor.abs()
    if state.rigorous:
        rest = rest + state.gamma(8) * (x.abs() + f.radius) * (y.abs() + g.radius)
        rest = rest + (most + 8) * state.tiny
    return x * y, rows, rest


def _extremum(state: State, step: Step, forms: list[Form], symbols: int) -> Parts:
    """The element of each window whose least value is largest, and a strip as high as any other one can exceed it."""
    node, name = step.node, step.node.name
    kind: Extremum = step.kind  # type: ignore[assignment]
    args, kwargs = state.arguments(node)
    known = Interval(*INTERVAL[Extremum](state, step, args, kwargs))
    state.boxes[name] = met(known, state.boxes[name]) if name in state.boxes else known
    (form,), z = forms, flat(args[0])
    index, (low, _) = windowed(kind, state.boxes[step.reads[0]], *args[1:], **kwargs)
    best, places = low.argmax(2, keepdim=True), index.clamp_min(0)
    values, radius = z[:, places], flat(form.radius)[:, places]
    rows = flat(form.rows, 2)[:, :, places]
    own = rows.gather(3, best.expand(len(rows), *best.shape))
    above = values - values.gather(2, best) + (rows - own).abs_().sum(0)
    rest = None
    if form.rest is not None:
        others = flat(form.rest)[:, places]
        rest = others.gather(2, best)
        above = above + others + rest
    if state.rigorous:
        size = values.abs() + radius
        above = above + state.gamma(len(rows) + 8) * (size + size.gather(2, best))
        above = above + (len(rows) + 8) * state.tiny
    above = above.masked_fill(index < 0, -math.inf).scatter(2, best, 0.0).amax(2)
    half, center = 0.5 * above, values.gather(2, best).squeeze(2)
    rest = None if rest is None else rest.squeeze(2)
    if state.rigorous:
        slack = state.gamma(4) * (center.abs() + above) + 4 * state.tiny
        rest = slack if rest is None else rest + slack
    fresh, left = _fresh(half, symbols)
    if left is not None:
        rest = left if rest is None else rest + left
    rows = torch.cat([own.squeeze(3), fresh])
    return (
        (center + half).reshape(-1, *node.shape),
        rows.reshape(*rows.shape[:2], *node.shape),
        None if rest is None else rest.reshape(-1, *node.shape),
    )


def _interval(state: State, step: Step, _forms: list[Form], _: int) -> Parts:
    """The interval alone, no symbol."""
    args, kwargs = state.arguments(step.node)
    low, high = INTERVAL[type(step.kind)](state, step, args, kwargs)
    center = low + 0.5 * (high - low)
    rest = torch.maximum(high - center, center - low)
    if state.rigorous:
        rest = rest + state.gamma(4) * (low.abs() + high.abs()) + state.tiny
    return center, rest.new_zeros(0, *rest.shape), rest


RULES: dict[type | None, Callable[[State, Step, list[Form], int], Parts]] = {
    Affine: _affine,
    Activation: _activation,
    Bilinear: _bilinear,
    Extremum: _extremum,
}
