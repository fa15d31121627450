"""ATen operators to the graph's vocabulary: one table, one short function where arguments need care.

A lowering gets a `Call` (arguments with `Ref` for values, the output shape without the batch) and returns what
replaces it: ``(op, args)`` or ``(op, args, kwargs)``; several nodes are made through ``call.emit``.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F

from calipers.errors import CaptureError
from calipers.graph import composites
from calipers.graph import primitives as prim
from calipers.graph.graph import Ref

aten = torch.ops.aten
Lowered = (
    tuple[Callable[..., Any], tuple[Any, ...]]
    | tuple[Callable[..., Any], tuple[Any, ...], Mapping[str, Any]]
)


@dataclass(frozen=True)
class Call:
    """One ATen call on its way into the graph."""

    args: Sequence[Any]
    shape: tuple[int, ...]  # of the output, without the batch
    rank: Callable[[Any], int]  # the rank of an argument, batch included
    shape_of: Callable[[Any], tuple[int, ...]]  # the shape of an argument, without the batch
    emit: Callable[..., Ref]  # makes a further node: emit(op, *args, shape=..., **kwargs)
    training: Callable[[bool], Any]  # the owning module's mode flag
    active: Callable[[Any], bool]  # whether an argument depends on the input
    dtype: Callable[[Any], torch.dtype]  # of an argument
    original: Callable[[], Lowered]  # the operator itself

    def arg(self, index: int, default: Any = None) -> Any:
        return self.args[index] if index < len(self.args) else default


def _same(op: Callable[..., Any], count: int | None = None) -> Callable[[Call], Lowered]:
    """The op takes ATen's arguments as they are (the first ``count``)."""
    return lambda c: (op, tuple(c.args[:count]))


def _sub(c: Call) -> Lowered:
    left, right, alpha = c.args[0], c.args[1], c.arg(2, 1)
    if not isinstance(right, Ref):
        return torch.add, (left, -alpha * right)
    shape = c.shape_of(right)
    if alpha != 1:
        right = c.emit(torch.mul, right, alpha, shape=shape)
    negated = c.emit(torch.neg, right, shape=shape)
    return torch.add, ((left, negated) if isinstance(left, Ref) else (negated, left))


def _rsub(c: Call) -> Lowered:
    return _sub(replace(c, args=[c.args[1], c.args[0], *c.args[2:]]))


def _add(c: Call) -> Lowered:
    left, right, alpha = c.args[0], c.args[1], c.arg(2, 1)
    if alpha != 1:
        right = (
            c.emit(torch.mul, right, alpha, shape=c.shape_of(right))
            if isinstance(right, Ref)
            else alpha * right
        )
    return torch.add, (left, right)


def _dims(dims: Any, rank: int) -> tuple[int, ...]:
    wanted = range(rank) if dims is None else ([dims] if isinstance(dims, int) else dims)
    out = tuple(sorted(d % rank for d in wanted))
    if 0 in out:
        raise CaptureError(
            "a reduction over dimension 0 mixes the examples of a batch; reduce over features only"
        )
    return out


def _reduce(op: Callable[..., Any]) -> Callable[[Call], Lowered]:
    return lambda c: (op, (c.args[0], _dims(c.arg(1), c.rank(c.args[0])), bool(c.arg(2, False))))


def _pair(value: Any, count: int) -> tuple[int, ...]:
    items = [value] if isinstance(value, int) else list(value)
    return tuple(items * count if len(items) == 1 else items)


def _avg_pool(n: int) -> Callable[[Call], Lowered]:
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


def _max_pool(n: int) -> Callable[[Call], Lowered]:
    def lower(c: Call) -> Lowered:
        kernel = _pair(c.args[1], n)
        stride = _pair(c.arg(2) or kernel, n)
        padding, dilation = _pair(c.arg(3, 0), n), _pair(c.arg(4, 1), n)
        return prim.max_pool, (c.args[0], kernel, stride, padding, dilation, bool(c.arg(5, False)))

    return lower


def _adaptive_pool(n: int) -> Callable[[Call], Lowered]:
    def lower(c: Call) -> Lowered:
        size, out = c.shape_of(c.args[0])[-n:], c.shape[-n:]
        if any(s % o for s, o in zip(size, out, strict=True)):
            return _done(composites.uneven_means(c.emit, c.args[0], c.shape_of(c.args[0]), out))
        kernel = tuple(s // o for s, o in zip(size, out, strict=True))
        return prim.average_pool, (c.args[0], kernel, kernel, (0,) * n)

    return lower


def _permute(c: Call) -> Lowered:
    rank = c.rank(c.args[0])
    return _permutation(c.args[0], [d % rank for d in c.args[1]])


def _transpose(c: Call) -> Lowered:
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


def _slice(c: Call) -> Lowered:
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


def _select(c: Call) -> Lowered:
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


def _cat(c: Call) -> Lowered:
    dim = c.arg(1, 0) % (len(c.shape) + 1)
    if dim == 0:
        raise CaptureError(
            "concatenation along dimension 0 mixes batches; concatenate features only"
        )
    return torch.cat, (list(c.args[0]), dim)


def _stack(c: Call) -> Lowered:
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


def _batch_norm(c: Call) -> Lowered:
    x, weight, bias, mean, var, training, _, eps = c.args[:8]
    return prim.batch_norm, (x, weight, bias, mean, var, c.training(training), eps)


def _pad(c: Call) -> Lowered:
    if len(c.args) > 2 and isinstance(c.args[2], str):
        if c.args[2] != "constant":
            raise CaptureError(f"padding mode {c.args[2]!r} is not supported; pad with a constant")
        return prim.pad, (c.args[0], tuple(c.args[1]), float(c.arg(3) or 0.0))
    return prim.pad, (c.args[0], tuple(c.args[1]), float(c.arg(2) or 0.0))


def _clamp(c: Call) -> Lowered:
    return torch.clamp, (c.args[0], c.arg(1), c.arg(2))


def _matmul(c: Call) -> Lowered:
    x, y = c.args[:2]
    if not (c.active(x) and c.active(y)):
        return torch.matmul, (x, y)
    return _done(composites.matmul(c.emit, x, y, c.shape_of(x), c.shape_of(y), c.shape))


def _einsum(c: Call) -> Lowered:
    """Of two operands, without an ellipsis or a letter twice in one, the batch first."""
    equation, operands = c.args[0].replace(" ", ""), c.args[1]
    read, arrow, result = equation.partition("->")
    parts = read.split(",")
    plain = all(len(set(p)) == len(p) for p in parts) and "." not in equation
    active = [i for i, v in enumerate(operands) if c.active(v)]
    first = all(p.startswith(result[:1]) == (i in active) for i, p in enumerate(parts))
    if len(operands) != 2 or not arrow or not plain or not first:
        return _as_it_is(c)
    if len(active) == 1:
        return prim.einsum, (*operands, equation)
    shapes = [c.shape_of(v) for v in operands]
    return _done(
        composites.contraction(c.emit, operands, shapes, parts, result)
        or c.emit(prim.einsum, *operands, equation, shape=c.shape)
    )


# -- composites and elementwise functions ---------------------------------------------------------------


def _done(value: Any) -> Lowered:
    """Nothing is left to do."""
    return prim.identity, (value,)


def _as_it_is(c: Call) -> Lowered:
    """Without a rule: attacks run it, bounds name it."""
    return c.original()


def _made(c: Call, op: Callable[..., Any], *args: Any) -> Any:
    return c.emit(op, *args, shape=c.shape)


def _unary(op: Any) -> Callable[[Call], Lowered]:
    return lambda c: (op, (c.args[0],))


def _mul(c: Call) -> Lowered:
    x, y = c.args[:2]
    return (
        (torch.pow, (x, 2.0))
        if isinstance(x, Ref) and x == y and c.active(x)
        else (torch.mul, (x, y))
    )


def _div(c: Call) -> Lowered:
    x, y = c.args[:2]
    if len(c.args) > 2 and c.args[2] is not None:  # rounds
        return _as_it_is(c)
    if not c.active(y):
        return torch.div, (x, y)
    inverse = c.emit(torch.reciprocal, y, shape=c.shape_of(y))
    return torch.mul, ((x, inverse) if isinstance(x, Ref) else (inverse, x))


def _pow(c: Call) -> Lowered:
    x, exponent = c.args[:2]
    return _done(composites.power(c.emit, x, c.shape, float(exponent)))


def _larger(c: Call) -> Lowered:
    x, y = c.args[:2]
    x, y = (x, y) if c.active(x) else (y, x)
    return _done(composites.larger(c.emit, x, y, c.shape, c.shape_of(y)))


def _smaller(c: Call) -> Lowered:
    x, y = (c.emit(torch.neg, v, shape=c.shape_of(v)) for v in c.args[:2])
    active = x if c.active(c.args[0]) else y
    other = y if active is x else x
    of = c.shape_of(c.args[1] if active is x else c.args[0])
    return torch.neg, (composites.larger(c.emit, active, other, c.shape, of),)


def _smallest(c: Call) -> Lowered:
    x = c.args[0]
    inverse = c.emit(torch.neg, x, shape=c.shape_of(x))
    dims = _dims(c.arg(1), c.rank(x))
    return torch.neg, (_made(c, prim.maximum, inverse, dims, bool(c.arg(2, False))),)


def _softmax(make: Callable[..., Any]) -> Callable[[Call], Lowered]:
    def lower(c: Call) -> Lowered:
        (dim,) = _dims(c.args[1], c.rank(c.args[0]))
        return _done(make(c.emit, c.args[0], c.shape, dim))

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
        x = _made(c, op, x, value)
    return _done(x)


def _layer_norm(c: Call) -> Lowered:
    x, size = c.args[0], c.args[1]
    rank = c.rank(x)
    dims = range(rank - len(size), rank)
    eps = c.arg(4, 1e-5)
    return _scaled(c, composites.normalized(c.emit, x, c.shape, dims, eps), c.arg(2), c.arg(3))


def _rms_norm(c: Call) -> Lowered:
    x, size, eps = c.args[0], c.args[1], c.arg(3)
    if eps is None:  # the machine epsilon of a dtype that the graph does not know
        return _as_it_is(c)
    dims = range(c.rank(x) - len(size), c.rank(x))
    return _scaled(c, composites.root_normalized(c.emit, x, c.shape, dims, eps), c.arg(2), None)


def _group_norm(c: Call) -> Lowered:
    x, groups = c.args[:2]
    return _grouped(c, x, groups, c.arg(2), c.arg(3), c.arg(4, 1e-5))


def _grouped(c: Call, x: Any, groups: int, weight: Any, bias: Any, eps: float) -> Lowered:
    channels, *rest = c.shape
    parts = (groups, channels // groups * math.prod(rest))
    split = c.emit(prim.reshape, x, parts, shape=parts)
    whole = composites.normalized(c.emit, split, parts, (2,), eps)
    whole = _made(c, prim.reshape, whole, c.shape)
    return _scaled(c, whole, weight, bias, (channels, *[1] * len(rest)))


def _instance_norm(c: Call) -> Lowered:
    x, weight, bias, mean, var, use_input, _, eps = c.args[:8]
    if not use_input:
        return prim.batch_norm, (x, weight, bias, mean, var, False, eps)
    return _grouped(c, x, c.shape[0], weight, bias, eps)


def _attention(c: Call) -> Lowered:
    """softmax(q·kᵀ·scale + mask)·v, the mask a constant."""
    q, k, v = c.args[:3]
    mask, causal = c.arg(3), c.arg(5, False)
    if (
        c.arg(4, 0.0)
        or not all(map(c.active, (q, k, v)))
        or (mask is not None and (c.active(mask) or c.rank(mask) != 2))
    ):
        return _as_it_is(c)
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
    return _done(composites.matmul(c.emit, weights, v, shape, of_v, c.shape))


def _prelu(c: Call) -> Lowered:
    x, weight = c.args[:2]
    shape = (-1, *[1] * (len(c.shape) - 1)) if c.shape_of(weight) != (1,) else (1,)
    weight = c.emit(torch.reshape, weight, shape, shape=shape)
    other = c.emit(torch.rsub, weight, 1, shape=shape)
    return _done(composites.blended(c.emit, x, weight, other, c.shape))


def _elu(c: Call) -> Lowered:
    numbers = tuple(float(c.arg(i, 1.0)) for i in (1, 2, 3))
    return (prim.elu, (c.args[0], *numbers)) if min(numbers) > 0 else _as_it_is(c)


def _celu(c: Call) -> Lowered:
    alpha = float(c.arg(1, 1.0))
    return (prim.elu, (c.args[0], alpha, 1.0, 1 / alpha)) if alpha > 0 else _as_it_is(c)


def _gelu(c: Call) -> Lowered:
    return (F.gelu if c.arg(1, "none") == "none" else prim.tanh_gelu), (c.args[0],)


def _softplus(c: Call) -> Lowered:
    x, beta = c.args[0], float(c.arg(1, 1.0))
    x = x if beta == 1 else _made(c, torch.mul, x, beta)
    y = _made(c, prim.softplus, x)
    return _done(y) if beta == 1 else (torch.div, (y, beta))


def _log_sigmoid(c: Call) -> Lowered:
    return torch.neg, (_made(c, prim.softplus, _made(c, torch.neg, c.args[0])),)


def _hardsigmoid(c: Call) -> Lowered:
    raised = _made(c, torch.clamp, _made(c, torch.add, c.args[0], 3.0), 0.0, 6.0)
    return torch.div, (raised, 6.0)


def _glu(c: Call) -> Lowered:
    x, dim = c.args[0], c.arg(1, -1) % c.rank(c.args[0])
    size = c.shape_of(x)[dim - 1] // 2
    parts = [_made(c, prim.slice_, x, dim, start, start + size, 1) for start in (0, size)]
    return torch.mul, (parts[0], _made(c, torch.sigmoid, parts[1]))


def _compare(sign: int, at: float) -> Callable[[Call], Lowered]:
    """x > y and its like: a step of ±(x − y)."""

    def lower(c: Call) -> Lowered:
        gap_op, gap_args, *_ = _sub(replace(c, args=list(c.args[:2])))
        gap = _made(c, gap_op, *gap_args)
        return prim.step, (gap if sign > 0 else _made(c, torch.neg, gap), at)

    return lower


def _where(c: Call) -> Lowered:
    """mask·x + (1 − mask)·y."""
    mask, x, y = c.args[:3]
    if any(isinstance(v, float) and not math.isfinite(v) for v in (x, y)):
        return _as_it_is(c)
    if not c.active(mask):
        mask = c.emit(prim.indicator, mask, shape=c.shape_of(mask))
        other = c.emit(torch.rsub, mask, 1, shape=())
    else:
        other = _made(c, torch.add, _made(c, torch.neg, mask), 1.0)
    parts = [_made(c, torch.mul, m, v) for m, v in ((mask, x), (other, y))]
    return torch.add, tuple(parts)


def _masked_fill(c: Call) -> Lowered:
    return _where(replace(c, args=[c.args[1], c.args[2], c.args[0]]))


def _variance(c: Call) -> Lowered:
    x, dims = c.args[0], _dims(c.arg(1), c.rank(c.args[0]))
    shape = c.shape_of(x)
    centered = c.emit(prim.center, x, dims, shape=shape)
    mean = _made(
        c, torch.mean, composites.square(c.emit, centered, shape), dims, bool(c.arg(3, False))
    )
    count = math.prod(shape[d - 1] for d in dims)
    correction = c.arg(2)
    left = count - (1 if correction is None else correction)
    return _done(mean) if left == count else (torch.mul, (mean, count / left))


def _norm(c: Call) -> Lowered:
    x, order, dims = c.args[0], c.arg(1, 2), _dims(c.arg(2), c.rank(c.args[0]))
    shape, keep = c.shape_of(x), bool(c.arg(3, False))
    if order == 1:
        return torch.sum, (c.emit(torch.abs, x, shape=shape), dims, keep)
    if order != 2:
        return _as_it_is(c)
    squares = composites.square(c.emit, x, shape)
    return torch.sqrt, (_made(c, torch.sum, squares, dims, keep),)


def _interpolate(mode: str) -> Callable[[Call], Lowered]:
    def lower(c: Call) -> Lowered:
        x, corners = c.args[0], bool(c.arg(2, False)) and mode != "nearest"
        n = len(c.shape) - 1
        factors = c.args[-1]
        sizes = zip(c.shape[-n:], c.shape_of(x)[-n:], factors or [1.0] * n, strict=True)
        if factors is not None and any(out != size * f for out, size, f in sizes):
            return _as_it_is(c)  # the factor, not the size, then says where neighbours lie
        return prim.interpolate, (x, c.shape[-n:], mode, corners)

    return lower


def _pixel_shuffle(c: Call) -> Lowered:
    x, r = c.args
    channels, height, width = c.shape
    apart = (channels, r, r, height // r, width // r)
    mixed = (channels, height // r, r, width // r, r)
    x = c.emit(prim.reshape, x, apart, shape=apart)
    x = c.emit(torch.permute, x, (0, 1, 4, 2, 5, 3), shape=mixed)
    return prim.reshape, (x, c.shape)


def _repeat(c: Call) -> Lowered:
    x, counts = c.args[0], c.args[1]
    shape = c.shape_of(x)
    if len(counts) != len(shape) + 1:
        return _as_it_is(c)
    for dim, count in enumerate(counts[1:], 1):
        if count != 1:
            shape = (*shape[: dim - 1], shape[dim - 1] * count, *shape[dim:])
            x = c.emit(torch.cat, [x] * count, dim, shape=shape)
    return _done(x)


def _index_select(c: Call) -> Lowered:
    x, dim, index = c.args
    dim %= c.rank(x)
    return _as_it_is(c) if dim == 0 or c.active(index) else (torch.index_select, (x, dim, index))


def _addmm(c: Call) -> Lowered:
    bias, x, w = c.args[:3]
    op, args, *_ = _matmul(replace(c, args=[x, w]))
    product = c.emit(op, *args, shape=c.shape)
    return torch.add, (product, bias)


SELU_ALPHA, SELU_SCALE = 1.6732632423543772, 1.0507009873554805
_SHAPE_ONLY = ("view", "reshape", "_unsafe_view")
# what may share memory with its argument
VIEWS = frozenset(
    {
        aten.view.default,
        aten.reshape.default,
        aten.permute.default,
        aten.t.default,
        aten.unsqueeze.default,
        aten.squeeze.default,
        aten.squeeze.dim,
        aten.squeeze.dims,
        aten.expand.default,
        aten.contiguous.default,
        aten.chunk.default,
        aten.split.Tensor,
        aten.split_with_sizes.default,
        aten.unbind.int,
        aten.detach.default,
        aten.alias.default,
        aten.slice.Tensor,
        aten.select.int,
        aten.transpose.int,
        aten.flatten.using_ints,
        aten.unflatten.int,
        operator.getitem,
    }
)

# where the batch size may stand, because the output's shape says it all
SHAPED = frozenset(
    {
        aten.view.default,
        aten.reshape.default,
        aten._unsafe_view.default,  # noqa: SLF001
        aten.expand.default,
        aten.unflatten.int,
        aten.slice.Tensor,
    }
)

_reshaped: Callable[[Call], Lowered] = lambda c: (prim.reshape, (c.args[0], c.shape))  # noqa: E731
_passed: Callable[[Call], Lowered] = lambda c: (prim.identity, (c.args[0],))  # noqa: E731


def _converted(c: Call) -> Lowered:
    """To another floating-point dtype: the graph computes in one."""
    dtypes = [a for a in c.args[1:] if isinstance(a, torch.dtype)]
    return _passed(c) if all(d.is_floating_point for d in dtypes) else _as_it_is(c)


LOWER: dict[Any, Callable[[Call], Lowered]] = {
    aten.linear.default: _same(F.linear),
    aten.matmul.default: _matmul,
    aten.mm.default: _matmul,
    aten.addmm.default: _addmm,
    aten.conv1d.default: _same(torch.conv1d),
    aten.conv2d.default: _same(torch.conv2d),
    aten.conv3d.default: _same(torch.conv3d),
    aten.conv1d.padding: _same(torch.conv1d),
    aten.conv2d.padding: _same(torch.conv2d),
    aten.conv_transpose1d.default: _same(torch.conv_transpose1d),
    aten.conv_transpose3d.input: _same(torch.conv_transpose3d),
    aten.conv_transpose2d.input: _same(torch.conv_transpose2d),
    aten.relu.default: _same(torch.relu),
    aten.leaky_relu.default: lambda c: (F.leaky_relu, (c.args[0], c.arg(1, 0.01))),
    aten.sigmoid.default: _same(torch.sigmoid),
    aten.tanh.default: _same(torch.tanh),
    aten.abs.default: _same(torch.abs),
    aten.neg.default: _same(torch.neg),
    aten.clamp.default: _clamp,
    aten.clamp_min.default: lambda c: (torch.clamp, (c.args[0], c.args[1], None)),
    aten.clamp_max.default: lambda c: (torch.clamp, (c.args[0], None, c.args[1])),
    aten.hardtanh.default: lambda c: (torch.clamp, (c.args[0], c.arg(1, -1.0), c.arg(2, 1.0))),
    aten.relu6.default: lambda c: (torch.clamp, (c.args[0], 0.0, 6.0)),
    aten.add.Tensor: _add,
    aten.sub.Tensor: _sub,
    aten.rsub.Scalar: _rsub,
    aten.rsub.Tensor: _rsub,
    aten.mul.Tensor: _mul,
    aten.div.Tensor: _div,
    aten.bmm.default: _matmul,
    **{
        getattr(aten, name).default: _unary(op)
        for name, op in {
            "exp": torch.exp,
            "log": torch.log,
            "sqrt": torch.sqrt,
            "rsqrt": torch.rsqrt,
            "erf": torch.erf,
            "reciprocal": torch.reciprocal,
            "sin": torch.sin,
            "cos": torch.cos,
            "atan": torch.atan,
            "silu": F.silu,
            "mish": F.mish,
            "hardswish": F.hardswish,
            "sign": torch.sign,
            "round": torch.round,
            "floor": torch.floor,
            "ceil": torch.ceil,
        }.items()
    },
    aten.square.default: lambda c: (torch.pow, (c.args[0], 2.0)),
    aten.pow.Tensor_Scalar: _pow,
    aten.gelu.default: _gelu,
    aten.elu.default: _elu,
    aten.selu.default: lambda c: (prim.elu, (c.args[0], SELU_ALPHA, SELU_SCALE, 1.0)),
    aten.celu.default: _celu,
    aten.softplus.default: _softplus,
    aten.log_sigmoid.default: _log_sigmoid,
    aten.hardsigmoid.default: _hardsigmoid,
    aten.prelu.default: _prelu,
    aten.glu.default: _glu,
    aten.gt.Scalar: _compare(1, 0.0),
    aten.gt.Tensor: _compare(1, 0.0),
    aten.ge.Scalar: _compare(1, 1.0),
    aten.ge.Tensor: _compare(1, 1.0),
    aten.lt.Scalar: _compare(-1, 0.0),
    aten.lt.Tensor: _compare(-1, 0.0),
    aten.le.Scalar: _compare(-1, 1.0),
    aten.le.Tensor: _compare(-1, 1.0),
    aten.where.self: _where,
    aten.where.ScalarSelf: _where,
    aten.where.ScalarOther: _where,
    aten.where.Scalar: _where,
    aten.masked_fill.Scalar: _masked_fill,
    aten.maximum.default: _larger,
    aten.minimum.default: _smaller,
    aten.max.other: _larger,
    aten.min.other: _smaller,
    aten.amin.default: _smallest,
    aten.softmax.int: _softmax(composites.softmax),
    aten.log_softmax.int: _softmax(composites.log_softmax),
    aten.layer_norm.default: _layer_norm,
    aten.rms_norm.default: _rms_norm,
    aten.group_norm.default: _group_norm,
    aten.instance_norm.default: _instance_norm,
    aten.scaled_dot_product_attention.default: _attention,
    aten.einsum.default: _einsum,
    aten.var.correction: _variance,
    aten.linalg_vector_norm.default: _norm,
    aten.expand_as.default: lambda c: (prim.expand, (c.args[0], c.shape)),
    aten.upsample_nearest1d.vec: _interpolate("nearest"),
    aten.upsample_nearest2d.vec: _interpolate("nearest"),
    aten.upsample_nearest3d.vec: _interpolate("nearest"),
    aten.upsample_linear1d.vec: _interpolate("linear"),
    aten.upsample_bilinear2d.vec: _interpolate("bilinear"),
    aten.pixel_shuffle.default: _pixel_shuffle,
    aten.repeat.default: _repeat,
    aten.index_select.default: _index_select,
    aten.batch_norm.default: _batch_norm,
    aten.dropout.default: lambda c: (prim.dropout, (c.args[0], c.args[1], c.training(c.args[2]))),
    aten.feature_dropout.default: lambda c: (
        prim.dropout,
        (c.args[0], c.args[1], c.training(c.args[2])),
    ),
    aten.view.default: _reshaped,
    aten.reshape.default: _reshaped,
    aten._unsafe_view.default: _reshaped,  # noqa: SLF001
    aten.flatten.using_ints: _reshaped,
    aten.unflatten.int: _reshaped,
    aten.squeeze.default: _reshaped,
    aten.squeeze.dim: _reshaped,
    aten.squeeze.dims: _reshaped,
    aten.unsqueeze.default: _reshaped,
    aten.expand.default: lambda c: (prim.expand, (c.args[0], c.shape)),
    aten.permute.default: _permute,
    aten.transpose.int: _transpose,
    aten.slice.Tensor: _slice,
    aten.select.int: _select,
    aten.cat.default: _cat,
    aten.stack.default: _stack,
    aten.pad.default: _pad,
    aten.constant_pad_nd.default: _pad,
    aten.mean.dim: _reduce(torch.mean),
    aten.sum.dim_IntList: _reduce(torch.sum),
    aten.amax.default: _reduce(prim.maximum),
    aten.avg_pool1d.default: _avg_pool(1),
    aten.avg_pool2d.default: _avg_pool(2),
    aten.avg_pool3d.default: _avg_pool(3),
    aten.max_pool1d.default: _max_pool(1),
    aten.max_pool2d.default: _max_pool(2),
    aten.max_pool3d.default: _max_pool(3),
    aten.adaptive_avg_pool1d.default: _adaptive_pool(1),
    aten.adaptive_avg_pool2d.default: _adaptive_pool(2),
    aten.contiguous.default: _passed,
    aten.to.dtype: _converted,
    aten.type_as.default: _converted,
    aten._to_copy.default: _converted,  # noqa: SLF001
    aten.clone.default: _passed,
    aten.detach.default: _passed,
    aten.alias.default: _passed,
    aten.lift_fresh_copy.default: _passed,
}
# In-place operators mean the same once capture has renamed the values they overwrite.
INPLACE: dict[Any, Any] = {
    aten.relu_.default: aten.relu.default,
    aten.silu_.default: aten.silu.default,
    aten.elu_.default: aten.elu.default,
    aten.celu_.default: aten.celu.default,
    aten.selu_.default: aten.selu.default,
    aten.hardswish_.default: aten.hardswish.default,
    aten.hardsigmoid_.default: aten.hardsigmoid.default,
    aten.mish_.default: aten.mish.default,
    aten.gelu_.default: aten.gelu.default,
    aten.leaky_relu_.default: aten.leaky_relu.default,
    aten.sigmoid_.default: aten.sigmoid.default,
    aten.tanh_.default: aten.tanh.default,
    aten.abs_.default: aten.abs.default,
    aten.neg_.default: aten.neg.default,
    aten.clamp_.default: aten.clamp.default,
    aten.hardtanh_.default: aten.hardtanh.default,
    aten.relu6_.default: aten.relu6.default,
    aten.add_.Tensor: aten.add.Tensor,
    aten.sub_.Tensor: aten.sub.Tensor,
    aten.mul_.Tensor: aten.mul.Tensor,
    aten.div_.Tensor: aten.div.Tensor,
    aten.dropout_.default: aten.dropout.default,
    aten.detach_.default: aten.detach.default,
    aten.masked_fill_.Scalar: aten.masked_fill.Scalar,
    aten.masked_fill_.Tensor: aten.masked_fill.Tensor,
}


def _swapped(node: Any) -> list[int]:
    order = list(range(node.args[0].meta["val"].ndim))
    i, j = node.args[1], node.args[2]
    order[i], order[j] = order[j], order[i]
    return order


# what may be done to a value while its batch is not first
PERMUTES: dict[Any, Callable[[Any], list[int]]] = {
    aten.permute.default: lambda node: [d % len(node.args[1]) for d in node.args[1]],
    aten.transpose.int: _swapped,
}
PASSES = frozenset({aten.contiguous.default, aten.clone.default})
MOVES = PASSES | {*PERMUTES, aten.unbind.int, aten.select.int}
REPEATS = frozenset({aten.expand.default, aten.repeat.default})
SPLITS = frozenset({aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default})


def splits(call: Call, sizes: Sequence[int], dim: int) -> list[tuple[Any, ...]]:
    """The arguments of `slice_` for each part of a split."""
    if dim == 0:
        raise CaptureError("splitting dimension 0 cuts the batch; split features only")
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return [(call.args[0], dim, s, s + n, 1) for s, n in zip(starts, sizes, strict=True)]
