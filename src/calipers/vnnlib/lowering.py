"""From the exact tree to boxes and specifications.

The tree says what is unsafe. In disjunctive form it is a union of (box of inputs) × (conjunction of output rows);
per distinct box, ``unsafe = OR_k AND_m row <= 0`` is the negation of the `Spec` ``AND_k OR_m row > 0``. Boxes
whose clauses have the same form become the rows of one batch.
"""

from __future__ import annotations

import math
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from decimal import Decimal
from fractions import Fraction
from itertools import chain, product
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from calipers.errors import NoInputs
from calipers.sets import Interval, Region, cast
from calipers.spec import Spec
from calipers.vnnlib.reader import Text
from calipers.vnnlib.tree import Affine, Node, affine, plus, scaled, variables

MAX_DISJUNCTS = 200_000
MAX_NUMBERS = 2**25  # of one tensor
_INF = math.inf

Lift = Callable[[Tensor, Tensor], dict[str, Tensor]]
Conjunction = tuple[Node, ...]
# A side of a box: the float64 numbers just inside, just outside and nearest to its exact ends, upper ends negated:
# then the intersection is the elementwise maximum.
Ends = tuple[float, float, float, float, float, float]
_FREE: Ends = (-_INF,) * 6
_SIGNS = {"<=": 1, "<": 1, ">=": -1, ">": -1}
_FLIPPED = {"<=": ">=", ">=": "<=", "<": ">", ">": "<", "=": "="}


class Case(NamedTuple):
    """Boxes that share the form of their clauses: unsafe iff some row of ``region`` has a point whose outputs violate
    its row of ``spec``. ``lift(x, y)`` names the tensors of one point, with or without its batch axis."""

    region: Region
    spec: Spec
    lift: Lift


class Row(NamedTuple):
    """Unsafe needs Σ coefficient · output + constant <= 0 (< 0 where ``open``)."""

    coefficients: tuple[tuple[int, Fraction | int], ...]
    constant: Fraction | Decimal
    open: bool


_ALWAYS = Row((), Fraction(-1), False)


class Part(NamedTuple):
    """A conjunction of relations, taken apart."""

    bounds: list[tuple[int, Ends]]
    rows: tuple[Row, ...]


def lower(
    text: Text, input_shape: Sequence[int] | None = None, dtype: torch.dtype | None = None
) -> list[Case]:
    """The cases of a query; none if nothing can be unsafe. Arguments and errors: see `calipers.vnnlib.load`."""
    shape = text.input.shape if input_shape is None else tuple(input_shape)
    if math.prod(shape) != text.input.size:
        raise text.source.error(
            text.input.at,
            f"declares {text.input.size} inputs, but the network's input shape {shape} has {math.prod(shape)}; "
            "is this the network of the query?",
        )
    known: dict[int, Part | None] = {}
    plain, branches = _split(text)
    base = _part(text, plain, known)
    if base is None:
        return []
    common = _common_box(text, base, plain)
    parts = [part for branch in branches if (part := _part(text, branch, known)) is not None]
    touched, own = _own_boxes(text, common, parts)
    by_box: dict[bytes, list[int]] = defaultdict(list)
    for b in np.flatnonzero(~_void(own).any(1)).tolist():
        by_box[own[b].tobytes()].append(b)
    groups: dict[Any, list[tuple[int, list[tuple[Row, ...]]]]] = defaultdict(list)
    for same in by_box.values():
        clauses = [base.rows + parts[b].rows or (_ALWAYS,) for b in same]
        groups[tuple(tuple(row.open for row in rows) for rows in clauses)].append(
            (same[0], clauses)
        )

    def lift(x: Tensor, y: Tensor) -> dict[str, Tensor]:
        return {v.name: t.reshape(v.shape) for v, t in ((text.input, x), (text.output, y))}

    cases = []
    for members in groups.values():
        first = [b for b, _ in members]
        _check_size(text, len(first) * common.size)
        ends = np.repeat(common[None], len(first), 0)
        ends[:, touched] = own[first]
        cases.append(
            Case(_region(text, ends, shape, dtype), _spec(text, [c for _, c in members]), lift)
        )
    return cases


# -- Boolean structure -----------------------------------------------------------------------------------


def _split(text: Text) -> tuple[Conjunction, Iterable[Conjunction]]:
    """The relations that always hold, and the disjuncts of everything else."""
    plain: list[Node] = []
    choices: list[list[Conjunction]] = []
    queue = list(text.tree.args)
    for node in queue:  # grows
        if not isinstance(node, Node):
            continue
        if node.op == "and":
            queue.extend(node.args)
        elif node.op in ("or", "!="):
            choices.append(_disjuncts(text, node))
        else:
            plain.append(node)
    _limit(text, math.prod(len(c) for c in choices), text.tree)
    return tuple(plain), (sum(picked, ()) for picked in product(*choices))


def _disjuncts(text: Text, node: Node) -> list[Conjunction]:
    """The disjunctive form, as conjunctions of relations; ``!=`` is ``<`` or ``>``."""
    nodes = [a for a in node.args if isinstance(a, Node)]
    if node.op == "or":
        found = [c for a in nodes for c in _disjuncts(text, a)]
        _limit(text, len(found), node)
        return found
    if node.op == "and":
        if not any(a.op in ("and", "or", "!=") for a in nodes):
            return [tuple(nodes)]
        choices = [_disjuncts(text, a) for a in nodes]
        _limit(text, math.prod(len(c) for c in choices), node)
        return [sum(picked, ()) for picked in product(*choices)]
    if node.op == "!=":
        return [(node._replace(op=op),) for op in "<>"]
    return [(node,)]


def _limit(text: Text, count: int, node: Node) -> None:
    if count > MAX_DISJUNCTS:
        raise text.source.error(
            node.at,
            f"{count} disjuncts once multiplied out, more than the limit of {MAX_DISJUNCTS}; "
            "split the query into several files",
        )


# -- relations -------------------------------------------------------------------------------------------


def _part(text: Text, nodes: Conjunction, known: dict[int, Part | None]) -> Part | None:
    """The bounds and the rows of a conjunction; None if a constant relation is false."""
    bounds: list[tuple[int, Ends]] = []
    rows: list[Row] = []
    for node in nodes:
        op, (left, right), _ = node
        if isinstance(left, Decimal):
            op, left, right = _FLIPPED[op], right, left
        if isinstance(left, int) and isinstance(right, Decimal):  # frequent: no rational arithmetic
            if left >= 0:
                bounds.append((left, _ends(op, right)))
                continue
            if op in _SIGNS:
                sign = _SIGNS[op]
                constant = right.copy_negate() if sign > 0 else right  # a plain minus would round
                rows.append(Row(((~left, sign),), constant, op in ("<", ">")))
                continue
        if id(node) not in known:  # a node recurs in many disjuncts of a product
            known[id(node)] = _general(text, node)
        part = known[id(node)]
        if part is None:
            return None
        bounds += part.bounds
        rows += part.rows
    return Part(bounds, tuple(rows))


def _ends(op: str, value: Decimal | Fraction) -> Ends:
    """x op value."""
    near = float(value)
    back = type(value)(near)  # exact, and so are comparisons
    below = near if back <= value else math.nextafter(near, -_INF)
    above = near if back >= value else math.nextafter(near, _INF)
    if op == "=":
        return above, -below, below, -above, near, -near
    if op in ("<", ">") and back == value:
        below, above = math.nextafter(near, -_INF), math.nextafter(near, _INF)
    if op in ("<=", "<"):
        return -_INF, -below, -_INF, -above, -_INF, -near
    return above, -_INF, below, -_INF, near, -_INF


def _general(text: Text, node: Node) -> Part | None:
    """Any other relation: a constant, rows, or a bound after solving for the input."""
    left, right = node.args
    form = plus(affine(left), scaled(affine(right), Fraction(-1)))  # form op 0
    if not form.coefficients:
        sign = (form.constant > 0) - (form.constant < 0)
        true = sign in {"<=": (-1, 0), ">=": (0, 1), "<": (-1,), ">": (1,), "=": (0,)}[node.op]
        return Part([], ()) if true else None
    inputs = [v for v in form.coefficients if v >= 0]
    if not inputs:
        return Part([], tuple(_rows(text, form, node)))
    if len(form.coefficients) > 1:
        names = [
            text.input.element(v) if v >= 0 else text.output.element(~v) for v in form.coefficients
        ]
        raise text.source.error(
            node.at,
            f"relates several variables, an input among them ({', '.join(names[:4])}); supported are bounds on "
            "single inputs and relations among outputs: let the network output that input too",
        )
    slope = form.coefficients[inputs[0]]
    limit = -form.constant / slope
    _in_range(text, node, limit)
    return Part([(inputs[0], _ends(node.op if slope > 0 else _FLIPPED[node.op], limit))], ())


def _rows(text: Text, form: Affine, node: Node) -> Iterator[Row]:
    """form op 0 as rows <= 0; coefficients become integers where float64 cannot hold them."""
    _in_range(text, node, *form.coefficients.values(), form.constant)
    if not _representable(form):
        denominators = (c.denominator for c in form.coefficients.values())
        form = scaled(form, Fraction(math.lcm(*denominators)))
        _in_range(text, node, *form.coefficients.values(), form.constant)
        if not _representable(form):
            raise text.source.error(
                node.at, "coefficients with too many digits for float64; round them"
            )
    for op in ("<=", ">=") if node.op == "=" else (node.op,):
        signed = scaled(form, Fraction(_SIGNS[op]))
        outputs = tuple(sorted((~v, c) for v, c in signed.coefficients.items()))
        yield Row(outputs, signed.constant, op in ("<", ">"))


def _representable(form: Affine) -> bool:
    return all(Fraction(float(c)) == c for c in form.coefficients.values())


def _in_range(text: Text, node: Node, *values: Fraction) -> None:
    if any(abs(v) > sys.float_info.max for v in values):
        raise text.source.error(node.at, "a value exceeds the largest float64")


# -- boxes -----------------------------------------------------------------------------------------------


def _void(ends: Any) -> Any:
    """Where the outer ends leave nothing: (..., 6) to (...)."""
    return ends[..., 2] > -ends[..., 3]


def _common_box(text: Text, base: Part, plain: Conjunction) -> Any:
    """What holds in every disjunct: (inputs, 6)."""
    _check_size(text, text.input.size * len(_FREE))
    box = np.tile(np.array(_FREE), (text.input.size, 1))
    if base.bounds:
        features, ends = zip(*base.bounds, strict=True)
        np.maximum.at(box, np.array(features), np.array(ends))
    void = np.flatnonzero(_void(box))
    if len(void):
        i = int(void[0])
        last = [n for n in plain if i in variables(n)][-1]
        raise text.source.error(
            last.at,
            f"{text.input.element(i)} has lower bound {box[i, 2]:.9g} above its upper bound {-box[i, 3]:.9g}, "
            "so no input is left",
            NoInputs,
        )
    return box


def _own_boxes(text: Text, common: Any, parts: Sequence[Part]) -> tuple[Any, Any]:
    """The features that single disjuncts bound, (F,), and the box of each disjunct there, (disjuncts, F, 6)."""
    owner = [b for b, part in enumerate(parts) for _ in part.bounds]
    bounds = [bound for part in parts for bound in part.bounds]
    touched, place = np.unique(
        np.array([i for i, _ in bounds], dtype=np.int64), return_inverse=True
    )
    _check_size(text, len(parts) * len(touched) * len(_FREE))
    boxes = np.repeat(common[None, touched], len(parts), 0)
    if bounds:
        np.maximum.at(boxes, (np.array(owner), place), np.array([ends for _, ends in bounds]))
    return touched, boxes + 0.0  # equal boxes are compared by their bytes, so no −0


# -- tensors ---------------------------------------------------------------------------------------------


def box(inner: Interval, outer: Interval) -> Region:
    """The box between exact ends, given the float64 numbers inside and around them, (B, *x) each.

    A side may hold no float64 number (inner lower above inner upper): then no point is a member, while bounds hold for
    the real numbers in it.
    """
    middle = (inner.lower / 2 + inner.upper / 2).maximum(inner.lower).minimum(inner.upper)
    eps = torch.full((len(middle),), _INF, dtype=torch.float64)
    return Region(middle, eps, _INF, inner.lower, inner.upper, eps, outer.lower, outer.upper)


def _region(text: Text, ends: Any, shape: tuple[int, ...], dtype: torch.dtype | None) -> Region:
    """``ends`` (B, inputs, 6) as a batch of boxes."""
    if not np.isfinite(ends).all():
        _, feature, end = (int(k[0]) for k in np.nonzero(~np.isfinite(ends)))
        name, side = text.input.element(feature), "upper" if end % 2 else "lower"
        raise text.source.error(text.input.at, f"{name} has no {side} bound; assert one")
    columns = torch.from_numpy(ends).reshape(len(ends), *shape, len(_FREE)).unbind(-1)
    low, high, outer_low, outer_high = columns[0], -columns[1], columns[2], -columns[3]
    if dtype is not None:
        none = cast(low, dtype, _INF) > cast(high, dtype, -_INF)
        low = torch.where(none, columns[4].to(dtype).double(), low)
        high = torch.where(none, -columns[5].to(dtype).double(), high)
        outer_low, outer_high = outer_low.minimum(low), outer_high.maximum(high)
    return box(
        Interval(low.contiguous(), high.contiguous()),
        Interval(outer_low.contiguous(), outer_high.contiguous()),
    )


def _spec(text: Text, members: Sequence[Sequence[tuple[Row, ...]]]) -> Spec:
    """One row per member. Offsets are rounded down, so that what is proved of the specification holds exactly."""
    sizes = [len(rows) for rows in members[0]]
    _check_size(text, len(members) * sum(sizes) * text.output.size)
    C = np.zeros((len(members), sum(sizes), text.output.size))
    d = np.empty(C.shape[:2])
    for b, clauses in enumerate(members):
        for m, row in enumerate(chain.from_iterable(clauses)):
            for output, coefficient in row.coefficients:
                C[b, m, output] = coefficient
            d[b, m] = -_ends("<=", row.constant)[1]
    clause = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    strict = torch.tensor([not row.open for row in chain.from_iterable(members[0])])
    return Spec(torch.from_numpy(C), torch.from_numpy(d), clause, strict)


def _check_size(text: Text, count: int) -> None:
    if count > MAX_NUMBERS:
        raise text.source.error(
            0, f"needs a tensor of {count} numbers, more than the limit of {MAX_NUMBERS}; split it"
        )
