"""Lowerings of sums, products, convolutions, pooling, and what moves or picks elements."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from calipers.errors import CaptureError
from calipers.graph import composites
from calipers.graph import primitives as prim
from calipers.graph.graph import Ref
from calipers.graph.lower.calls import Call, Lowered, as_it_is, dims_of, done


def sub(c: Call) -> Lowered:
    left, right, alpha = c.args[0], c.args[1], c.arg(2, 1)
    if not isinstance(right, Ref):
        return torch.add, (left, -alpha * right)
    shape = c.shape_of(right)
    if alpha != 1:
        right = c.emit(torch.mul, right, alpha, shape=shape)
    negated = c.emit(torch.neg, right, shape=shape)
    return torch.add, ((left, negated) if isinstance(left, Ref) else (negated, left))


def rsub(c: Call) -> Lowered:
    return sub(replace(c, args=[c.args[1], c.args[0], *c.args[2:]]))


def add(c: Call) -> Lowered:
    left, right, alpha = c.args[0], c.args[1], c.arg(2, 1)
    if alpha != 1:
        right = (
            c.emit(torch.mul, right, alpha, shape=c.shape_of(right))
            if isinstance(right, Ref)
            else alpha * right
        )
    return torch.add, (left, right)


def reduce(op: Callable[..., Any]) -> Callable[[Call], Lowered]:
    return lambda c: (op, (c.args[0], dims_of(c.arg(1), c.rank(c.args[0])), bool(c.arg(2, False))))


def _pair(value: Any, count: int) -> tuple[int, ...]:
    items = [value] if isinstance(value, int) else list(value)
    return tuple(items * count if len(items) == 1 else items)


def avg_pool(n: int) -> Callable[[Call], Lowered]:
    def lower(c: Call) -> Lowered:
        kernel = _pair(c.args[1], n)
        stride = _pair(c.arg(2) or kernel, n)
        if c.arg(6) is not None:
            raise CaptureError(
                "average pooling with divisor_override is not supported; scale its output instead"
            )
        padding = _pair(c.arg(3, 0), n)
        return prim.average_pool, (
            c.args[0],
            kernel,
            stride,
            padding,
            bool(c.arg(4, False)),
            bool(c.arg(5, True)),
        )

    return lower


def max_pool(n: int) -> Callable[[Call], Lowered]:
    def lower(c: Call) -> Lowered:
        kernel = _pair(c.args[1], n)
        stride = _pair(c.arg(2) or kernel, n)
        padding, dilation = _pair(c.arg(3, 0), n), _pair(c.arg(4, 1), n)
        return prim.max_pool, (c.args[0], kernel, stride, padding, dilation, bool(c.arg(5, False)))

    return lower


def adaptive_pool(n: int) -> Callable[[Call], Lowered]:
    def lower(c: Call) -> Lowered:
        size, out = c.shape_of(c.args[0])[-n:], c.shape[-n:]
        if any(s % o for s, o in zip(size, out, strict=True)):
            return done(composites.uneven_means(c.emit, c.args[0], c.shape_of(c.args[0]), out))
        kernel = tuple(s // o for s, o in zip(size, out, strict=True))
        return prim.average_pool, (c.args[0], kernel, kernel, (0,) * n)

    return lower


def permute(c: Call) -> Lowered:
    rank = c.rank(c.args[0])
    return _permutation(c.args[0], [d % rank for d in c.args[1]])


def transpose(c: Call) -> Lowered:
    rank = c.rank(c.args[0])
    order = list(range(rank))
    i, j = c.args[1] % rank, c.args[2] % rank
    order[i], order[j] = order[j], order[i]
    return _permutation(c.args[0], order)


def _permutation(x: Any, order: Sequence[int]) -> Lowered:
    if order[0] != 0:
        raise CaptureError(
            "a transposition moves the batch dimension away from dimension 0; keep the batch first"
        )
    return torch.permute, (x, tuple(order))


def slice_(c: Call) -> Lowered:
    x, dim, start, stop, step = c.args[0], c.arg(1, 0), c.arg(2), c.arg(3), c.arg(4, 1)
    dim %= c.rank(x)
    if dim == 0:
        if (
            start in (None, 0)
            and (stop is None or (isinstance(stop, int) and stop >= 2**62))
            and step == 1
        ):
            return prim.identity, (x,)
        raise CaptureError(
            "a slice over dimension 0 picks examples out of the batch; slice features only"
        )
    size = c.shape_of(x)[dim - 1]
    begin, end, stride = slice(start, stop, step).indices(size)
    return prim.slice_, (x, dim, begin, end, stride)


def select(c: Call) -> Lowered:
    x, dim, index = c.args
    dim %= c.rank(x)
    if dim == 0:
        raise CaptureError(
            "indexing dimension 0 picks one example out of the batch; index features only"
        )
    size = c.shape_of(x)[dim - 1]
    shape = list(c.shape_of(x))
    shape[dim - 1] = 1
    part = c.emit(prim.slice_, x, dim, index % size, index % size + 1, shape=tuple(shape))
    return prim.reshape, (part, c.shape)


def cat(c: Call) -> Lowered:
    dim = c.arg(1, 0) % (len(c.shape) + 1)
    if dim == 0:
        raise CaptureError(
            "concatenation along dimension 0 mixes batches; concatenate features only"
        )
    return torch.cat, (list(c.args[0]), dim)


def stack(c: Call) -> Lowered:
    dim = c.arg(1, 0) % (len(c.shape) + 1)
    if dim == 0:
        raise CaptureError(
            "stacking along dimension 0 moves the batch; stack along a feature dimension"
        )
    parts = []
    for x in c.args[0]:
        shape = list(c.shape)
        shape[dim - 1] = 1
        parts.append(c.emit(prim.reshape, x, tuple(shape), shape=tuple(shape)))
    return torch.cat, (parts, dim)


def batch_norm(c: Call) -> Lowered:
    x, weight, bias, mean, var, training, _, eps = c.args[:8]
    return prim.batch_norm, (x, weight, bias, mean, var, c.training(training), eps)


def pad(c: Call) -> Lowered:
    if len(c.args) > 2 and isinstance(c.args[2], str):
        if c.args[2] != "constant":
            raise CaptureError(f"padding mode {c.args[2]!r} is not supported; pad with a constant")
        return prim.pad, (c.args[0], tuple(c.args[1]), float(c.arg(3) or 0.0))
    return prim.pad, (c.args[0], tuple(c.args[1]), float(c.arg(2) or 0.0))


def clamp(c: Call) -> Lowered:
    return torch.clamp, (c.args[0], c.arg(1), c.arg(2))


def matmul(c: Call) -> Lowered:
    x, y = c.args[:2]
    if not (c.active(x) and c.active(y)):
        return torch.matmul, (x, y)
    return done(composites.matmul(c.emit, x, y, c.shape_of(x), c.shape_of(y), c.shape))


def einsum(c: Call) -> Lowered:
    """Of two operands, without an ellipsis or a letter twice in one, the batch first."""
    equation, operands = c.args[0].replace(" ", ""), c.args[1]
    read, arrow, result = equation.partition("->")
    parts = read.split(",")
    plain = all(len(set(p)) == len(p) for p in parts) and "." not in equation
    active = [i for i, v in enumerate(operands) if c.active(v)]
    first = all(p.startswith(result[:1]) == (i in active) for i, p in enumerate(parts))
    if len(operands) != 2 or not arrow or not plain or not first:
        return as_it_is(c)
    if len(active) == 1:
        return prim.einsum, (*operands, equation)
    shapes = [c.shape_of(v) for v in operands]
    return done(
        composites.contraction(c.emit, operands, shapes, parts, result)
        or c.emit(prim.einsum, *operands, equation, shape=c.shape)
    )
