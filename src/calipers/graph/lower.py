"""ATen operators to the graph's vocabulary: one table, one short function where arguments need care.

A lowering gets a `Call` (arguments with `Ref` for values, the output shape without the batch) and returns what
replaces it: ``(op, args)`` or ``(op, args, kwargs)``; several nodes are made through ``call.emit``.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from calipers.errors import CaptureError
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
    return _sub(
        Call([c.args[1], c.args[0], *c.args[2:]], c.shape, c.rank, c.shape_of, c.emit, c.training)
    )


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
            raise CaptureError(
                f"adaptive pooling from {size} to {out} has uneven windows; use sizes that divide"
            )
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
    return torch.matmul, (c.args[0], c.args[1])


def _addmm(c: Call) -> Lowered:
    bias, x, w = c.args[:3]
    product = c.emit(torch.matmul, x, w, shape=c.shape)
    return torch.add, (product, bias)


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
    aten.mul.Tensor: _same(torch.mul, 2),
    aten.div.Tensor: _same(torch.div, 2),
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
    aten.clone.default: _passed,
    aten.detach.default: _passed,
    aten.alias.default: _passed,
    aten.lift_fresh_copy.default: _passed,
}
# In-place operators mean the same once capture has renamed the values they overwrite.
INPLACE: dict[Any, Any] = {
    aten.relu_.default: aten.relu.default,
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
}
SPLITS = frozenset({aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default})


def splits(call: Call, sizes: Sequence[int], dim: int) -> list[tuple[Any, ...]]:
    """The arguments of `slice_` for each part of a split."""
    if dim == 0:
        raise CaptureError("splitting dimension 0 cuts the batch; split features only")
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return [(call.args[0], dim, s, s + n, 1) for s, n in zip(starts, sizes, strict=True)]
