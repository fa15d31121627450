"""ONNX operators on constants alone: shape arithmetic and masks that exporters leave in the file.

A fold gets the `Builder`, the `Call` and tensors, books the result's bytes before making it, and returns it.
Operators that also have a rule for active inputs are listed here only where integers, or speed, ask for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from calipers.errors import CaptureError
from calipers.graph.onnx_file import torch_dtype
from calipers.graph.onnx_graph import Builder, Call, broadcast

Fold = Callable[..., Tensor]


def _elementwise(op: Callable[..., Tensor]) -> Fold:
    """An operator on any number of tensors, folded from the left."""

    def fold(b: Builder, _c: Call, *tensors: Tensor) -> Tensor:
        b.allocate(broadcast([tuple(t.shape) for t in tensors]))
        if len(tensors) < 3:
            return op(*tensors)
        result = tensors[0]
        for other in tensors[1:]:
            result = op(result, other)
        return result

    return fold


def _divide(x: Tensor, y: Tensor) -> Tensor:
    if x.is_floating_point():
        return x / y
    if bool((y == 0).any()):
        raise CaptureError("divides an integer by 0")
    return torch.div(x, y, rounding_mode="trunc")


def _where(b: Builder, _c: Call, mask: Tensor, x: Tensor, y: Tensor) -> Tensor:
    b.allocate(broadcast([tuple(t.shape) for t in (mask, x, y)]))
    return torch.where(mask, x, y)


def _sizes(tensor: Tensor) -> list[int]:
    return [int(v) for v in tensor.reshape(-1).tolist()]


def _constant_of_shape(b: Builder, c: Call, shape: Tensor) -> Tensor:
    value = c.attr("value")
    fill = torch.zeros(1) if value is None else b.read(value)
    b.allocate(_sizes(shape), fill.itemsize)
    return fill.reshape(()).expand(_sizes(shape)).clone()


def _expand(b: Builder, _c: Call, x: Tensor, shape: Tensor) -> Tensor:
    full = broadcast([tuple(x.shape), tuple(_sizes(shape))])
    b.allocate(full, x.itemsize)
    return x.expand(full).contiguous()


def _tile(b: Builder, _c: Call, x: Tensor, repeats: Tensor) -> Tensor:
    counts = _sizes(repeats)
    if len(counts) != x.ndim or min(counts, default=0) < 0:
        raise CaptureError(f"repeats {counts} do not fit shape {tuple(x.shape)}")
    b.allocate([n * k for n, k in zip(x.shape, counts, strict=True)], x.itemsize)
    return x.repeat(counts)


def _range(b: Builder, _c: Call, start: Tensor, limit: Tensor, delta: Tensor) -> Tensor:
    first, last, step = start.item(), limit.item(), delta.item()
    count = max(math.ceil((last - first) / step), 0)
    b.allocate((count,))
    return (first + torch.arange(count) * step).to(start.dtype)


def _cast(b: Builder, c: Call, x: Tensor) -> Tensor:
    dtype = torch_dtype(int(c.attr("to")))
    b.allocate(tuple(x.shape), dtype.itemsize)
    return x.to(dtype)


def _cast_like(b: Builder, _c: Call, x: Tensor, like: Tensor) -> Tensor:
    b.allocate(tuple(x.shape), like.itemsize)
    return x.to(like.dtype)


def _concat(b: Builder, c: Call, *parts: Tensor) -> Tensor:
    b.allocate((sum(p.numel() for p in parts),))
    return torch.cat(parts, c.attr("axis", 1))


def _matmul(b: Builder, _c: Call, x: Tensor, y: Tensor) -> Tensor:
    front = broadcast([tuple(x.shape[:-2]), tuple(y.shape[:-2])])
    tail = (*x.shape[-2:-1], *(y.shape[-1:] if y.ndim > 1 else ()))
    b.allocate((*front, *tail))
    return torch.matmul(x, y)


def _prod(b: Builder, c: Call, x: Tensor, axes: Tensor | None = None) -> Tensor:
    wanted = c.attr("axes") or (None if axes is None else _sizes(axes)) or range(x.ndim)
    b.allocate(tuple(x.shape))
    for axis in sorted((a % x.ndim for a in wanted), reverse=True):
        x = x.prod(axis, keepdim=bool(c.attr("keepdims", 1)))
    return x


def _mod(b: Builder, c: Call, x: Tensor, y: Tensor) -> Tensor:
    return _elementwise(torch.fmod if c.attr("fmod", 0) else torch.remainder)(b, c, x, y)


def _power(x: Tensor, y: Tensor) -> Tensor:
    return torch.pow(x, y).to(x.dtype)


def _constant(b: Builder, c: Call) -> Tensor:
    a: Any = c.attrs
    if "value" in a:
        return b.read(a["value"])
    for name, dtype in (("value_float", torch.float32), ("value_floats", torch.float32),
                        ("value_int", torch.int64), ("value_ints", torch.int64)):  # fmt: skip
        if name in a:
            return torch.tensor(a[name], dtype=dtype)
    raise CaptureError(f"holds {', '.join(a) or 'nothing'}, which is not supported")


FOLDS: dict[str, Fold] = {
    "Add": _elementwise(torch.add),
    "And": _elementwise(torch.logical_and),
    "Cast": _cast,
    "CastLike": _cast_like,
    "Ceil": _elementwise(torch.ceil),
    "Concat": _concat,
    "Constant": _constant,
    "ConstantOfShape": _constant_of_shape,
    "Div": _elementwise(_divide),
    "Equal": _elementwise(torch.eq),
    "Expand": _expand,
    "Floor": _elementwise(torch.floor),
    "Greater": _elementwise(torch.gt),
    "GreaterOrEqual": _elementwise(torch.ge),
    "Less": _elementwise(torch.lt),
    "LessOrEqual": _elementwise(torch.le),
    "Log": _elementwise(torch.log),
    "MatMul": _matmul,
    "Max": _elementwise(torch.maximum),
    "Min": _elementwise(torch.minimum),
    "Mod": _mod,
    "Not": _elementwise(torch.logical_not),
    "Or": _elementwise(torch.logical_or),
    "Pow": _elementwise(_power),
    "Range": _range,
    "Reciprocal": _elementwise(torch.reciprocal),
    "ReduceProd": _prod,
    "Sign": _elementwise(torch.sign),
    "Sqrt": _elementwise(torch.sqrt),
    "Tile": _tile,
    "Where": _where,
}
