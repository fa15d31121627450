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
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from calipers.sets import Interval, Region, cast
from calipers.spec import Spec
from calipers.vnnlib.reader import Text
from calipers.vnnlib.tree import Affine, Node, affine, plus, scaled, variables

MAX_DISJUNCTS = 200_000
MAX_NUMBERS = 2**27  # of one tensor
_INF = math.inf

Lift = Callable[[Tensor, Tensor], dict[str, Tensor]]
Conjunction = tuple[Node, ...]


class Case(NamedTuple):
    """Boxes that share the form of their clauses: unsafe iff some row of ``region`` has a point violating its row
    of ``spec``. ``lift(x, y)`` names the tensors of one point (its batch axis may be kept or dropped)."""

    region: Region
    spec: Spec
    lift: Lift


class Side(NamedTuple):
    """One feature's interval: the tightest float64 numbers inside and around the exact ends."""

    low: float = -_INF
    high: float = _INF
    outer_low: float = -_INF
    outer_high: float = _INF

    def meet(self, other: Side) -> Side:
        return Side(
            max(self.low, other.low),
            min(self.high, other.high),
            max(self.outer_low, other.outer_low),
            min(self.outer_high, other.outer_high),
        )

    @property
    def void(self) -> bool:
        return self.outer_low > self.outer_high


Box = dict[int, Side]


class Row(NamedTuple):
    """Unsafe needs Σ coefficient · output + constant <= 0 (< 0 where ``open``)."""

    coefficients: tuple[tuple[int, Fraction], ...]
    constant: Fraction
    open: bool


_ALWAYS = Row((), Fraction(-1), False)


class Part(NamedTuple):
    """A conjunction of relations: a box, and rows."""

    box: Box
    rows: tuple[Row, ...]


def lower(
    text: Text, input_shape: Sequence[int] | None = None, dtype: torch.dtype | None = None
) -> list[Case]:
    """The cases of a query; none if no point at all can be unsafe. Arguments and errors: see `calipers.vnnlib.load`."""
    shape = text.input.shape if input_shape is None else tuple(input_shape)
    if math.prod(shape) != text.input.size:
        raise text.source.error(
            text.input.at,
            f"declares {text.input.size} inputs, the network's input shape {shape} has {math.prod(shape)}; "
            "is this the network of the query?",
        )
    parts: dict[int, Part | None] = {}
    plain, branches = _split(text)
    base = _part(text, plain, parts)
    if base is None:
        return []
    _check_base(text, base.box, plain)
    by_box: dict[tuple[tuple[int, Side], ...], list[tuple[Row, ...]]] = defaultdict(list)
    for branch in branches:
        part = _part(text, branch, parts)
        if part is None:
            continue
        box = {i: s.meet(base.box[i]) if i in base.box else s for i, s in part.box.items()}
        if not any(s.void for s in box.values()):
            by_box[tuple(sorted(box.items()))].append(base.rows + part.rows or (_ALWAYS,))
    groups = defaultdict(list)
    for key, clauses in by_box.items():
        groups[_form(clauses)].append((key, clauses))
    lift = _lift(text)
    return [
        Case(
            _region(text, base.box, [key for key, _ in members], shape, dtype),
            _spec(text, [clauses for _, clauses in members]),
            lift,
        )
        for members in groups.values()
    ]


def _lift(text: Text) -> Lift:
    def lift(x: Tensor, y: Tensor) -> dict[str, Tensor]:
        return {
            text.input.name: x.reshape(text.input.shape),
            text.output.name: y.reshape(text.output.shape),
        }

    return lift


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
    """The box and the rows of a conjunction; None if a constant relation is false."""
    box: Box = {}
    rows: list[Row] = []
    for node in nodes:
        bound = _bound(node)
        if bound is None:
            if id(node) not in known:  # a node recurs in many disjuncts of a product
                known[id(node)] = _general(text, node)
            part = known[id(node)]
            if part is None:
                return None
            rows.extend(part.rows)
            found: Iterable[tuple[int, Side]] = part.box.items()
        else:
            found = (bound,)
        for i, side in found:
            box[i] = box[i].meet(side) if i in box else side
    return Part(box, tuple(rows))


_FLIPPED = {"<=": ">=", ">=": "<=", "<": ">", ">": "<", "=": "="}


def _bound(node: Node) -> tuple[int, Side] | None:
    """An input's bound: the frequent relation, without rational arithmetic."""
    op, (left, right), _ = node
    if isinstance(left, Decimal):
        op, left, right = _FLIPPED[op], right, left
    if isinstance(left, int) and left >= 0 and isinstance(right, Decimal):
        return left, _side(op, right)
    return None


def _side(op: str, value: Decimal | Fraction) -> Side:
    """x op value."""
    near = float(value)
    back = type(value)(near)  # exact, so the comparisons are
    below = near if back <= value else math.nextafter(near, -_INF)
    above = near if back >= value else math.nextafter(near, _INF)
    if op == "<=":
        return Side(high=below, outer_high=above)
    if op == ">=":
        return Side(low=above, outer_low=below)
    if op == "=":
        return Side(above, below, below, above)
    if op == "<":
        return Side(high=below if below < value else math.nextafter(below, -_INF), outer_high=above)
    return Side(low=above if above > value else math.nextafter(above, _INF), outer_low=below)


def _general(text: Text, node: Node) -> Part | None:
    """Any other relation: a bound after solving for the input, a row, or a constant."""
    left, right = node.args
    form = plus(affine(left), scaled(affine(right), Fraction(-1)))  # form op 0
    if not form.coefficients:
        true = {"<=": form.constant <= 0, ">=": form.constant >= 0, "<": form.constant < 0,
                ">": form.constant > 0, "=": form.constant == 0}[node.op]  # fmt: skip
        return Part({}, ()) if true else None
    inputs = [v for v in form.coefficients if v >= 0]
    if not inputs:
        return Part({}, tuple(_rows(text, form, node)))
    if len(form.coefficients) > 1:
        names = ", ".join(
            (text.input.element(v) if v >= 0 else text.output.element(~v))
            for v in [*form.coefficients][:4]
        )
        raise text.source.error(
            node.at,
            f"relates several variables, an input among them ({names}); supported are bounds on single inputs and "
            "relations among outputs. Let the network output the input too",
        )
    slope = form.coefficients[inputs[0]]
    limit = -form.constant / slope
    _in_range(text, node, limit)
    return Part({inputs[0]: _side(node.op if slope > 0 else _FLIPPED[node.op], limit)}, ())


def _rows(text: Text, form: Affine, node: Node) -> Iterator[Row]:
    """form op 0 as rows <= 0; coefficients become integers where float64 cannot hold them."""
    _in_range(text, node, *form.coefficients.values(), form.constant)
    if not _representable(form):
        form = scaled(
            form, Fraction(math.lcm(*(c.denominator for c in form.coefficients.values())))
        )
        _in_range(text, node, *form.coefficients.values(), form.constant)
        if not _representable(form):
            raise text.source.error(node.at, "a coefficient has too many digits for float64")
    for op in ("<=", ">=") if node.op == "=" else (node.op,):
        signed = form if op in ("<=", "<") else scaled(form, Fraction(-1))
        outputs = tuple(sorted((~v, c) for v, c in signed.coefficients.items()))
        yield Row(outputs, signed.constant, op in ("<", ">"))


def _representable(form: Affine) -> bool:
    return all(Fraction(float(c)) == c for c in form.coefficients.values())


def _in_range(text: Text, node: Node, *values: Fraction) -> None:
    if any(abs(v) > sys.float_info.max for v in values):
        raise text.source.error(node.at, "a value exceeds the largest float64")


# -- tensors ---------------------------------------------------------------------------------------------


def _check_base(text: Text, box: Box, plain: Conjunction) -> None:
    void = next((i for i, side in box.items() if side.void), None)
    if void is None:
        return
    last = [n for n in plain if void in variables(n)][-1]
    side, name = box[void], text.input.element(void)
    raise text.source.error(
        last.at,
        f"{name} has lower bound {side.outer_low:.9g} above its upper bound {side.outer_high:.9g}; "
        "no input is left",
    )


def box(inner: Interval, outer: Interval) -> Region:
    """The box between exact ends, given the float64 numbers inside and around them, (B, *x) each.

    A side without a float64 number (inner lower above inner upper) is allowed: then no point is a member, while
    bounds hold for the real numbers in it.
    """
    middle = torch.minimum(
        torch.maximum(inner.lower / 2 + inner.upper / 2, inner.lower), inner.upper
    )
    eps = torch.full((len(middle),), _INF, dtype=torch.float64)
    return Region(middle, eps, _INF, inner.lower, inner.upper, eps, outer.lower, outer.upper)


def _region(
    text: Text,
    base: Box,
    boxes: Sequence[tuple[tuple[int, Side], ...]],
    shape: tuple[int, ...],
    dtype: torch.dtype | None,
) -> Region:
    """One row per box: the base's sides, and the box's own where it has some."""
    _check_size(text, len(boxes) * text.input.size * len(Side._fields))
    table = np.empty((text.input.size, len(Side._fields)))
    table[:] = Side()
    table[list(base)] = list(base.values()) or np.empty((0, len(Side._fields)))
    whole = np.repeat(table[None], len(boxes), 0)
    own = [(b, i, side) for b, sides in enumerate(boxes) for i, side in sides]
    if own:
        rows, features, sides = zip(*own, strict=True)
        whole[list(rows), list(features)] = sides
    if not np.isfinite(whole).all():
        _, feature, end = (int(k[0]) for k in np.nonzero(~np.isfinite(whole)))
        side = "upper" if end % 2 else "lower"
        raise text.source.error(
            text.input.at, f"{text.input.element(feature)} has no {side} bound; assert one"
        )
    ends = torch.from_numpy(whole).reshape(len(boxes), *shape, -1)
    low, high, outer_low, outer_high = (t.contiguous() for t in ends.unbind(-1))
    if dtype is not None:
        none = cast(low, dtype, _INF) > cast(high, dtype, -_INF)
        low = torch.where(none, outer_low.to(dtype).double(), low)
        high = torch.where(none, outer_high.to(dtype).double(), high)
        outer_low, outer_high = torch.minimum(low, outer_low), torch.maximum(high, outer_high)
    return box(Interval(low, high), Interval(outer_low, outer_high))


def _form(clauses: Sequence[tuple[Row, ...]]) -> tuple[tuple[bool, ...], ...]:
    return tuple(tuple(row.open for row in rows) for rows in clauses)


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
            d[b, m] = _side("<=", row.constant).high
    clause = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    strict = torch.tensor([not row.open for row in chain.from_iterable(members[0])])
    return Spec(torch.from_numpy(C), torch.from_numpy(d), clause, strict)


def _check_size(text: Text, count: int) -> None:
    if count > MAX_NUMBERS:
        raise text.source.error(
            0,
            f"needs a tensor of {count} numbers, more than the limit of {MAX_NUMBERS}; split the query",
        )
