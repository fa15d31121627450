"""Lowerings of elementwise functions, and of what is composed of several nodes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F

from calipers.graph import composites
from calipers.graph import primitives as prim
from calipers.graph.graph import Ref
from calipers.graph.lower import affine
from calipers.graph.lower.calls import Call, Lowered, as_it_is, dims_of, done, made


def unary(op: Any) -> Callable[[Call], Lowered]:
    return lambda c: (op, (c.args[0],))


def mul(c: Call) -> Lowered:
    x, y = c.args[:2]
    return (
        (torch.pow, (x, 2.0))
        if isinstance(x, Ref) and x == y and c.active(x)
        else (torch.mul, (x, y))
    )


def div(c: Call) -> Lowered:
    x, y = c.args[:2]
    if len(c.args) > 2 and c.args[2] is not None:  # rounds
        return as_it_is(c)
    if not c.active(y):
        return torch.div, (x, y)
    inverse = c.emit(torch.reciprocal, y, shape=c.shape_of(y))
    return torch.mul, ((x, inverse) if isinstance(x, Ref) else (inverse, x))


def power(c: Call) -> Lowered:
    x, exponent = c.args[:2]
    return done(composites.power(c.emit, x, c.shape, float(exponent)))


def larger(c: Call) -> Lowered:
    x, y = c.args[:2]
    x, y = (x, y) if c.active(x) else (y, x)
    return done(composites.larger(c.emit, x, y, c.shape, c.shape_of(y)))


def smaller(c: Call) -> Lowered:
    x, y = (c.emit(torch.neg, v, shape=c.shape_of(v)) for v in c.args[:2])
    active = x if c.active(c.args[0]) else y
    other = y if active is x else x
    of = c.shape_of(c.args[1] if active is x else c.args[0])
    return torch.neg, (composites.larger(c.emit, active, other, c.shape, of),)


def smallest(c: Call) -> Lowered:
    x = c.args[0]
    inverse = c.emit(torch.neg, x, shape=c.shape_of(x))
    dims = dims_of(c.arg(1), c.rank(x))
    return torch.neg, (made(c, prim.maximum, inverse, dims, bool(c.arg(2, False))),)


def softmax(make: Callable[..., Any]) -> Callable[[Call], Lowered]:
    def lower(c: Call) -> Lowered:
        (dim,) = dims_of(c.args[1], c.rank(c.args[0]))
        return done(make(c.emit, c.args[0], c.shape, dim))

    return lower


def _scaled(
    c: Call, x: Any, weight: Any, bias: Any, shape: tuple[int, ...] | None = None
) -> Lowered:
    """Weight and bias of a normalisation, given the shape in which they broadcast."""
    for op, value in ((torch.mul, weight), (torch.add, bias)):
        if value is None:
            continue
        if shape is not None:
            value = c.emit(torch.reshape, value, shape, shape=shape)
        x = made(c, op, x, value)
    return done(x)


def layer_norm(c: Call) -> Lowered:
    x, size = c.args[0], c.args[1]
    rank = c.rank(x)
    dims = range(rank - len(size), rank)
    eps = c.arg(4, 1e-5)
    return _scaled(c, composites.normalized(c.emit, x, c.shape, dims, eps), c.arg(2), c.arg(3))


def rms_norm(c: Call) -> Lowered:
    x, size, eps = c.args[0], c.args[1], c.arg(3)
    if eps is None:  # the machine epsilon of a dtype that the graph does not know
        return as_it_is(c)
    dims = range(c.rank(x) - len(size), c.rank(x))
    return _scaled(c, composites.root_normalized(c.emit, x, c.shape, dims, eps), c.arg(2), None)


def group_norm(c: Call) -> Lowered:
    x, groups = c.args[:2]
    return _grouped(c, x, groups, c.arg(2), c.arg(3), c.arg(4, 1e-5))


def _grouped(c: Call, x: Any, groups: int, weight: Any, bias: Any, eps: float) -> Lowered:
    channels, *rest = c.shape
    parts = (groups, channels // groups * math.prod(rest))
    split = c.emit(prim.reshape, x, parts, shape=parts)
    whole = composites.normalized(c.emit, split, parts, (2,), eps)
    whole = made(c, prim.reshape, whole, c.shape)
    return _scaled(c, whole, weight, bias, (channels, *[1] * len(rest)))


def instance_norm(c: Call) -> Lowered:
    x, weight, bias, mean, var, use_input, _, eps = c.args[:8]
    if not use_input:
        return prim.batch_norm, (x, weight, bias, mean, var, False, eps)
    return _grouped(c, x, c.shape[0], weight, bias, eps)


def attention(c: Call) -> Lowered:
    """softmax(q·kᵀ·scale + mask)·v, the mask a constant."""
    q, k, v = c.args[:3]
    mask, causal = c.arg(3), c.arg(5, False)
    if (
        c.arg(4, 0.0)
        or not all(map(c.active, (q, k, v)))
        or (mask is not None and (c.active(mask) or c.rank(mask) != 2))
    ):
        return as_it_is(c)
    of_q, of_k, of_v = map(c.shape_of, (q, k, v))
    seen = (of_q[-2], of_k[-2])
    admits = None  # the exponential of the mask
    if causal:
        admits = c.emit(prim.lower_triangle, *seen, shape=seen)
    elif mask is not None:
        truth = c.dtype(mask) == torch.bool
        op, args = (torch.where, (mask, 1.0, 0.0)) if truth else (torch.exp, (mask,))
        admits = c.emit(op, *args, shape=seen)
    scale = c.arg(6) or 1 / math.sqrt(of_q[-1])
    turned = (*of_k[:-2], of_k[-1], of_k[-2])
    order = (*range(len(of_k) - 1), len(of_k), len(of_k) - 1)
    k = c.emit(torch.permute, k, order, shape=turned)
    shape = (*of_q[:-1], of_k[-2])
    scores = composites.matmul(c.emit, q, k, of_q, turned, shape)
    scores = c.emit(torch.mul, scores, scale, shape=shape)
    weights = composites.softmax(c.emit, scores, shape, len(shape), admits)
    return done(composites.matmul(c.emit, weights, v, shape, of_v, c.shape))


def prelu(c: Call) -> Lowered:
    x, weight = c.args[:2]
    shape = (-1, *[1] * (len(c.shape) - 1)) if c.shape_of(weight) != (1,) else (1,)
    weight = c.emit(torch.reshape, weight, shape, shape=shape)
    other = c.emit(torch.rsub, weight, 1, shape=shape)
    return done(composites.blended(c.emit, x, weight, other, c.shape))


def elu(c: Call) -> Lowered:
    numbers = tuple(float(c.arg(i, 1.0)) for i in (1, 2, 3))
    return (prim.elu, (c.args[0], *numbers)) if min(numbers) > 0 else as_it_is(c)


def celu(c: Call) -> Lowered:
    alpha = float(c.arg(1, 1.0))
    return (prim.elu, (c.args[0], alpha, 1.0, 1 / alpha)) if alpha > 0 else as_it_is(c)


def gelu(c: Call) -> Lowered:
    return (F.gelu if c.arg(1, "none") == "none" else prim.tanh_gelu), (c.args[0],)


def softplus(c: Call) -> Lowered:
    x, beta = c.args[0], float(c.arg(1, 1.0))
    x = x if beta == 1 else made(c, torch.mul, x, beta)
    y = made(c, prim.softplus, x)
    return done(y) if beta == 1 else (torch.div, (y, beta))


def log_sigmoid(c: Call) -> Lowered:
    return torch.neg, (made(c, prim.softplus, made(c, torch.neg, c.args[0])),)


def hardsigmoid(c: Call) -> Lowered:
    raised = made(c, torch.clamp, made(c, torch.add, c.args[0], 3.0), 0.0, 6.0)
    return torch.div, (raised, 6.0)


def glu(c: Call) -> Lowered:
    x, dim = c.args[0], c.arg(1, -1) % c.rank(c.args[0])
    size = c.shape_of(x)[dim - 1] // 2
    parts = [made(c, prim.slice_, x, dim, start, start + size, 1) for start in (0, size)]
    return torch.mul, (parts[0], made(c, torch.sigmoid, parts[1]))


def compare(sign: int, at: float) -> Callable[[Call], Lowered]:
    """x > y and its like: a step of ±(x − y)."""

    def lower(c: Call) -> Lowered:
        gap_op, gap_args, *_ = affine.sub(replace(c, args=list(c.args[:2])))
        gap = made(c, gap_op, *gap_args)
        return prim.step, (gap if sign > 0 else made(c, torch.neg, gap), at)

    return lower


def where(c: Call) -> Lowered:
    """mask·x + (1 − mask)·y."""
    mask, x, y = c.args[:3]
    if any(isinstance(v, float) and not math.isfinite(v) for v in (x, y)):
        return as_it_is(c)
    if not c.active(mask):
        mask = c.emit(prim.indicator, mask, shape=c.shape_of(mask))
        other = c.emit(torch.rsub, mask, 1, shape=())
    else:
        other = made(c, torch.add, made(c, torch.neg, mask), 1.0)
    parts = [made(c, torch.mul, m, v) for m, v in ((mask, x), (other, y))]
    return torch.add, tuple(parts)


def masked_fill(c: Call) -> Lowered:
    return where(replace(c, args=[c.args[1], c.args[2], c.args[0]]))


def variance(c: Call) -> Lowered:
    x, dims = c.args[0], dims_of(c.arg(1), c.rank(c.args[0]))
    shape = c.shape_of(x)
    centered = c.emit(prim.center, x, dims, shape=shape)
    mean = made(
        c, torch.mean, composites.square(c.emit, centered, shape), dims, bool(c.arg(3, False))
    )
    count = math.prod(shape[d - 1] for d in dims)
    correction = c.arg(2)
    left = count - (1 if correction is None else correction)
    return done(mean) if left == count else (torch.mul, (mean, count / left))


def norm(c: Call) -> Lowered:
    x, order, dims = c.args[0], c.arg(1, 2), dims_of(c.arg(2), c.rank(c.args[0]))
    shape, keep = c.shape_of(x), bool(c.arg(3, False))
    if order == 1:
        return torch.sum, (c.emit(torch.abs, x, shape=shape), dims, keep)
    if order != 2:
        return as_it_is(c)
    squares = composites.square(c.emit, x, shape)
    return torch.sqrt, (made(c, torch.sum, squares, dims, keep),)


def interpolate(mode: str) -> Callable[[Call], Lowered]:
    def lower(c: Call) -> Lowered:
        x, corners = c.args[0], bool(c.arg(2, False)) and mode != "nearest"
        n = len(c.shape) - 1
        factors = c.args[-1]
        sizes = zip(c.shape[-n:], c.shape_of(x)[-n:], factors or [1.0] * n, strict=True)
        if factors is not None and any(out != size * f for out, size, f in sizes):
            return as_it_is(c)  # the factor, not the size, then says where neighbours lie
        return prim.interpolate, (x, c.shape[-n:], mode, corners)

    return lower


def pixel_shuffle(c: Call) -> Lowered:
    x, r = c.args
    channels, height, width = c.shape
    apart = (channels, r, r, height // r, width // r)
    mixed = (channels, height // r, r, width // r, r)
    x = c.emit(prim.reshape, x, apart, shape=apart)
    x = c.emit(torch.permute, x, (0, 1, 4, 2, 5, 3), shape=mixed)
    return prim.reshape, (x, c.shape)


def repeat(c: Call) -> Lowered:
    x, counts = c.args[0], c.args[1]
    shape = c.shape_of(x)
    if len(counts) != len(shape) + 1:
        return as_it_is(c)
    for dim, count in enumerate(counts[1:], 1):
        if count != 1:
            shape = (*shape[: dim - 1], shape[dim - 1] * count, *shape[dim:])
            x = c.emit(torch.cat, [x] * count, dim, shape=shape)
    return done(x)


def index_select(c: Call) -> Lowered:
    x, dim, index = c.args
    dim %= c.rank(x)
    return as_it_is(c) if dim == 0 or c.active(index) else (torch.index_select, (x, dim, index))


def addmm(c: Call) -> Lowered:
    bias, x, w = c.args[:3]
    op, args, *_ = affine.matmul(replace(c, args=[x, w]))
    product = c.emit(op, *args, shape=c.shape)
    return torch.add, (product, bias)
