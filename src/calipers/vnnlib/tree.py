"""The exact Boolean tree of a query, and its value at a point in rational arithmetic.

Leaves are variables and literals: input ``i`` is the integer ``i``, output ``j`` is ``~j`` (that is −1−j), a literal is
the `Decimal` that the file writes, so nothing has been rounded. The tree states what is *unsafe*: it is true at the
points that break the property.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from decimal import Decimal
from fractions import Fraction
from functools import reduce
from typing import NamedTuple

import torch

RELATIONS: dict[str, Callable[[Fraction, Fraction], bool]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "<": operator.lt,
    ">": operator.gt,
    "=": operator.eq,
    "!=": operator.ne,
}
JUNCTIONS: dict[str, Callable[[Iterable[bool]], bool]] = {"and": all, "or": any}
ARITHMETIC: dict[str, Callable[[Fraction, Fraction], Fraction]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
}


_NONE = Fraction(0)


class Node(NamedTuple):
    """``(op args...)``; ``at`` is its place in the text, for messages."""

    op: str
    args: tuple[Term, ...]
    at: int


Term = Node | int | Decimal


class Affine(NamedTuple):
    """Σ coefficient · variable + constant."""

    coefficients: dict[int, Fraction]
    constant: Fraction


def holds(
    tree: Node,
    x: Sequence[float | Fraction | Decimal],
    y: Sequence[float | Fraction | Decimal],
    *,
    dtype: torch.dtype | None = None,
    tolerance: Fraction = _NONE,
) -> bool:
    """Whether the tree is true at inputs ``x`` and outputs ``y`` (flat, row-major), in rational arithmetic.

    Floats mean their binary values. With NaN or infinity among them it is False: such a point proves nothing.

    Args:
        dtype: read an input's own bounds as the nearest numbers of this dtype, as the checker of the verification
            competitions does; None reads every literal exactly.
        tolerance: by how much a relation among inputs alone may fail (not ``!=``).
    """
    if not all(isinstance(v, Fraction) or math.isfinite(v) for v in (*x, *y)):
        return False
    inputs, outputs = [Fraction(v) for v in x], [Fraction(v) for v in y]

    def value(term: Term) -> Fraction:
        if isinstance(term, Node):
            terms = [value(a) for a in term.args]
            if len(terms) == 1 and term.op == "-":
                return -terms[0]
            return reduce(ARITHMETIC[term.op], terms)
        if isinstance(term, int):
            return inputs[term] if term >= 0 else outputs[~term]
        return Fraction(term)

    def true(node: Node) -> bool:
        if node.op in JUNCTIONS:
            return JUNCTIONS[node.op](true(a) for a in node.args if isinstance(a, Node))
        if dtype is not None and is_bound(node):
            ends = [
                Fraction(nearest(a, dtype)) if isinstance(a, Decimal) else value(a)
                for a in node.args
            ]
        else:
            ends = [value(a) for a in node.args]
        if RELATIONS[node.op](*ends):
            return True
        near = tolerance > 0 and node.op != "!=" and abs(ends[0] - ends[1]) <= tolerance
        return near and all(v >= 0 for v in variables(node))

    return true(tree)


def decimals(
    tree: Node, x: Sequence[float], y: Sequence[float], dtype: torch.dtype
) -> list[Decimal] | None:
    """Decimals that round to ``x`` in ``dtype``, and at which the tree is true exactly.

    Where the shortest decimal of an input breaks a bound that rounds to the input, that bound takes its place: what is
    left of X_0 = 0.1 is 0.1 itself.

    Returns:
        None if that makes the tree true neither.
    """
    found = [Decimal(repr(v)) for v in x]
    for node in _bounds(tree, x, y, dtype):
        (i,) = variables(node)
        (literal,) = (a for a in node.args if isinstance(a, Decimal))
        ends = [Fraction(literal if isinstance(a, Decimal) else found[i]) for a in node.args]
        if not RELATIONS[node.op](*ends) and nearest(literal, dtype) == x[i]:
            found[i] = literal
    return found if holds(tree, found, y) else None


def _bounds(
    node: Node, x: Sequence[float], y: Sequence[float], dtype: torch.dtype
) -> Iterator[Node]:
    """The bounds of inputs that make the tree true as rounded to ``dtype``: of a disjunction those of one part."""
    parts = [a for a in node.args if isinstance(a, Node)]
    if node.op == "or":
        parts = [a for a in parts if holds(a, x, y, dtype=dtype)][:1]
    if node.op in JUNCTIONS:
        for part in parts:
            yield from _bounds(part, x, y, dtype)
    elif is_bound(node):
        yield node


def is_bound(node: Node) -> bool:
    """Whether a relation is between one input and a literal."""
    left, right = node.args
    if isinstance(left, Decimal):
        left, right = right, left
    return isinstance(left, int) and left >= 0 and isinstance(right, Decimal)


def nearest(value: Decimal, dtype: torch.dtype) -> float:
    """The number of ``dtype`` nearest to the float64 nearest to ``value``."""
    return float(torch.tensor(float(value), dtype=torch.float64).to(dtype))


def affine(term: Term) -> Affine:
    """The affine form of a term, exactly. Products have at most one factor with a variable (the reader sees to it)."""
    if isinstance(term, int):
        return Affine({term: Fraction(1)}, Fraction(0))
    if isinstance(term, Decimal):
        return Affine({}, Fraction(term))
    parts = [affine(a) for a in term.args]
    if term.op == "*":
        scale = math.prod((p.constant for p in parts if not p.coefficients), start=Fraction(1))
        moving = [p for p in parts if p.coefficients]
        return scaled(moving[0], scale) if moving else Affine({}, scale)
    if term.op == "-":
        parts = [
            scaled(p, Fraction(-1)) if i or len(parts) == 1 else p for i, p in enumerate(parts)
        ]
    return plus(*parts)


def plus(*parts: Affine) -> Affine:
    """The sum, without the variables that cancel."""
    total: dict[int, Fraction] = {}
    for part in parts:
        for variable, c in part.coefficients.items():
            total[variable] = total.get(variable, Fraction(0)) + c
    constant = sum((part.constant for part in parts), Fraction(0))
    return Affine({v: c for v, c in total.items() if c}, constant)


def scaled(a: Affine, by: Fraction) -> Affine:
    """``by`` times the form."""
    return Affine({v: c * by for v, c in a.coefficients.items() if by}, a.constant * by)


def variables(term: Term) -> Iterator[int]:
    """Every variable that the term names."""
    if isinstance(term, Node):
        for a in term.args:
            yield from variables(a)
    elif isinstance(term, int):
        yield term
