"""ONNX operators to the graph's vocabulary: one table, one short function where arguments need care.

A rule gets the `Builder`, the `Call` and its inputs, the first of which depends on the network's input (unless the
operator is in ``ANYWHERE``; None stands for an omitted input), and returns the output, or a list of outputs.
Operators on constants that have no such rule are in `onnx_folds`; all others are folded through these rules.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from calipers.errors import CaptureError
from calipers.graph import composites
from calipers.graph import primitives as prim
from calipers.graph.onnx_functions import ANYWHERE as FUNCTIONS_ANYWHERE
from calipers.graph.onnx_functions import FUNCTIONS, maker, negative
from calipers.graph.onnx_graph import Builder, Call, Const, Input, Output, Shape, Value, broadcast
from calipers.graph.onnx_windows import WINDOWS

Rule = Callable[..., Output]


def constant(value: Input | None, what: str) -> Tensor | None:
    """The tensor of an input that must be known now; None if it is omitted."""
    if isinstance(value, Value):
        raise CaptureError(f"{what} depends on the network's input; it must be constant")
    return None if value is None else value.tensor


def integers(value: Input | None, what: str) -> list[int] | None:
    tensor = constant(value, what)
    return None if tensor is None else [int(v) for v in tensor.reshape(-1).tolist()]


def number(value: Input | None, what: str, default: float) -> float:
    tensor = constant(value, what)
    return default if tensor is None else float(tensor.reshape(()).item())


def axis_of(axis: int, rank: int) -> int:
    if not -rank <= axis < rank:
        raise CaptureError(f"axis {axis} does not exist in rank {rank}")
    return axis % rank


def given_ints(c: Call, name: str, value: Input | None) -> list[int] | None:
    """Integers from the attribute (old opsets) or from the input (new ones)."""
    found = c.attr(name)
    return list(found) if found is not None else integers(value, name)


# -- elementwise -----------------------------------------------------------------------------------------


def unary(op: Callable[..., Any], *extra: Any) -> Rule:
    return lambda b, _c, x: b.emit(op, x, *extra, shape=x.shape, lead=x.lead)


def _leaky(b: Builder, c: Call, x: Value) -> Output:
    return b.emit(F.leaky_relu, x, float(c.attr("alpha", 0.01)), shape=x.shape, lead=x.lead)


def binary(op: Callable[..., Any]) -> Rule:
    def rule(b: Builder, _c: Call, x: Input, y: Input) -> Output:
        (x, y), shape, lead = b.align([x, y])
        return b.emit(op, x, y, shape=shape, lead=lead)

    return rule


def _add(b: Builder, c: Call, x: Input, y: Input) -> Output:
    for value, other in ((x, y), (y, x)):
        if isinstance(value, Value) and isinstance(other, Const):
            return _with_bias(b, value, other) or binary(torch.add)(b, c, x, y)
    return binary(torch.add)(b, c, x, y)


def _with_bias(b: Builder, x: Value, bias: Const) -> Value | None:
    """``F.linear(_, w)`` plus a row vector, as one node, if nothing else reads the product."""
    node = b.made.get(x.name)
    if node is None or node.op is not F.linear or len(node.args) != 2 or b.readers.get(x.name) != 1:
        return None
    size = x.shape[-1] if x.own else 0
    if bias.shape[-1:] != (size,) or bias.tensor.numel() != size or bias.rank > x.rank:
        return None
    row = bias if bias.rank == 1 else Const(bias.tensor.reshape(-1), bias.name)
    return b.emit(F.linear, *node.args, row, shape=x.shape, lead=x.lead)


def _sub(b: Builder, c: Call, x: Input, y: Input) -> Output:
    return _add(b, c, x, negative(b, y))


def _clip(
    b: Builder, c: Call, x: Value, low: Input | None = None, high: Input | None = None
) -> Output:
    lower = number(low, "min", c.attr("min", -math.inf))
    upper = number(high, "max", c.attr("max", math.inf))
    if math.isnan(lower) or math.isnan(upper):
        raise CaptureError("a clip bound is NaN")
    ends = (None if lower == -math.inf else lower, None if upper == math.inf else upper)
    if ends == (None, None):
        return x
    return b.emit(torch.clamp, x, *ends, shape=x.shape, lead=x.lead)


def _same(_b: Builder, c: Call, x: Value, *rest: Input) -> Output:
    """Identity; Dropout too, which is one in evaluation."""
    if c.op == "Dropout":
        training = constant(rest[1], "training_mode") if len(rest) > 1 else None
        if training is not None and bool(training):
            raise CaptureError("is in training mode; export the model in evaluation mode")
        if [out for out in c.outputs[1:] if out]:
            raise CaptureError("returns its mask; export the model in evaluation mode")
    return x


def _cast(b: Builder, c: Call, x: Value) -> Output:
    from calipers.graph.onnx_file import torch_dtype

    target = torch_dtype(int(c.attr("to")))
    if b.made.get(x.name) is not None and b.made[x.name].op is prim.step:
        return x  # a comparison's result, which is a number already
    if target != b.dtype:
        raise CaptureError(
            f"changes {b.dtype} to {target} inside the network; export it in one precision"
        )
    return x


# -- products --------------------------------------------------------------------------------------------


def _linear(b: Builder, x: Value, w: Const, bias: Const | None = None) -> Value:
    """x (..., k) times w (n, k) transposed, plus bias (n)."""
    if x.shape[-1] != w.shape[1]:
        raise CaptureError(f"cannot multiply {x.shape} by {w.shape[::-1]}")
    out = (*x.shape[:-1], w.shape[0])
    extra = () if bias is None else (bias,)
    return b.emit(F.linear, x, w, *extra, shape=out, lead=x.lead)


def _transposed(b: Builder, w: Const) -> Const:
    b.allocate(w.shape, w.tensor.itemsize)
    return Const(w.tensor.mT.contiguous(), w.name)


def _gemm(b: Builder, c: Call, x: Input, y: Input, z: Input | None = None) -> Output:
    alpha, beta = float(c.attr("alpha", 1.0)), float(c.attr("beta", 1.0))
    if x.rank != 2 or y.rank != 2:
        raise CaptureError(f"expects matrices, got shapes {x.shape} and {y.shape}")
    x = _turned(b, x) if c.attr("transA", 0) else x
    if z is not None and beta != 1:
        z = _scaled(b, z, beta)
    if isinstance(x, Const) or isinstance(y, Value):
        y = _turned(b, y) if c.attr("transB", 0) else y
        product: Output = _matmul(b, c, x, y)
    else:
        w = y if c.attr("transB", 0) else _transposed(b, y)
        if isinstance(z, Const) and alpha == 1 and x.shape[0] == 1:
            row = z.tensor.broadcast_to(1, w.shape[0]).reshape(-1)
            bias = z if z.rank == 1 and row.shape == z.shape else Const(row.contiguous(), z.name)
            return _linear(b, x, w, bias)
        product = _linear(b, x, w)
    if alpha != 1:
        product = _scaled(b, product, alpha)
    return product if z is None else binary(torch.add)(b, c, product, z)


def _turned(b: Builder, x: Input) -> Input:
    return _transposed(b, x) if isinstance(x, Const) else permuted(b, x, (1, 0))


def _scaled(b: Builder, x: Any, factor: float) -> Any:
    if isinstance(x, Const):
        b.allocate(x.shape, x.tensor.itemsize)
        return Const(x.tensor * factor, f"{x.name}.scaled")
    return b.emit(torch.mul, x, factor, shape=x.shape, lead=x.lead)


def _matmul(b: Builder, _c: Call, x: Input, y: Input) -> Output:
    if not x.rank or not y.rank:
        raise CaptureError("cannot multiply a scalar")
    if isinstance(x, Value) and isinstance(y, Const) and y.rank <= 2:
        x = b.alone(x) if x.lead and x.rank == 1 else x
        if y.rank == 2:
            return _linear(b, x, _transposed(b, y))
        product = _linear(b, x, Const(y.tensor[None], y.name))
        return b.shaped(product, product.shape[:-1], product.lead and product.rank > 1)
    if isinstance(x, Const) and isinstance(y, Value) and x.rank == 2:
        column = y.rank == 2 and y.shape[1] == 1
        if y.rank == 1 or column:  # a matrix times one vector is a linear layer
            rows = _linear(b, b.shaped(y, y.shape[:1], False), x)
            return b.shaped(rows, (*rows.shape, 1), False) if column else rows
    if x.rank < 2 or y.rank < 2:
        raise CaptureError(f"cannot multiply shapes {x.shape} and {y.shape}; reshape them first")
    return _stacks(b, x, y)


def _stacks(b: Builder, x: Input, y: Input) -> Output:
    """Stacks of matrices, at least one of which is active."""
    if x.shape[-1] != y.shape[-2]:
        raise CaptureError(f"cannot multiply {x.shape} by {y.shape}")
    rank = max(x.rank, y.rank)
    front = broadcast([x.shape[:-2], y.shape[:-2]])
    full = [(1,) * (rank - o.rank) + o.shape for o in (x, y)]
    lead = (
        rank > 2
        and front[0] == 1
        and any(o.lead or o.rank < rank for o in (x, y) if isinstance(o, Value))
    )
    args = [
        b.shaped(o, s, lead) if isinstance(o, Value) else o
        for o, s in zip((x, y), full, strict=True)
    ]
    left, right = args
    if isinstance(left, Value) and isinstance(right, Value):
        out = (*front, x.shape[-2], y.shape[-1])[1 if lead else 0 :]
        both: Value = composites.matmul(maker(b, lead), left, right, left.own, right.own, out)
        return both
    return b.emit(torch.matmul, *args, shape=(*front, x.shape[-2], y.shape[-1]), lead=lead)


# -- shapes ----------------------------------------------------------------------------------------------


def _flatten(b: Builder, c: Call, x: Value) -> Output:
    axis = c.attr("axis", 1)
    axis = axis if axis >= 0 else axis + x.rank
    return b.natural(x, (math.prod(x.shape[:axis]), math.prod(x.shape[axis:])))


def _reshape(b: Builder, c: Call, x: Value, target: Input | None = None) -> Output:
    wanted = given_ints(c, "shape", target) or []
    if not c.attr("allowzero", 0):
        wanted = [x.shape[i] if n == 0 else n for i, n in enumerate(wanted)]
    total, known = math.prod(x.shape), math.prod(n for n in wanted if n != -1)
    if wanted.count(-1) > 1 or min(wanted, default=0) < -1:
        raise CaptureError(f"cannot reshape {x.shape} to {wanted}")
    return b.natural(x, [total // known if n == -1 and known else n for n in wanted])


def permuted(b: Builder, x: Value, order: Sequence[int]) -> Value:
    """``x`` with ONNX axes in ``order``; a reshape if only axes of size 1 move."""
    if sorted(order) != list(range(x.rank)):
        raise CaptureError(f"order {tuple(order)} is no permutation of {x.rank} axes")
    shape = [x.shape[i] for i in order]
    wide = [i for i in order if x.shape[i] != 1]
    if wide == sorted(wide):
        return b.natural(x, shape)
    x = x if x.lead and order[0] == 0 else b.alone(x)
    dims = tuple(order) if x.lead else (0, *(i + 1 for i in order))
    return b.emit(torch.permute, x, dims, shape=shape, lead=x.lead)


def _transpose(b: Builder, c: Call, x: Value) -> Output:
    return permuted(b, x, c.attr("perm") or range(x.rank)[::-1])


def _squeeze(b: Builder, c: Call, x: Value, axes: Input | None = None) -> Output:
    wanted = given_ints(c, "axes", axes)
    if wanted is None:
        wanted = [i for i, n in enumerate(x.shape) if n == 1]
    drop = {axis_of(a, x.rank) for a in wanted}
    shape = [n for i, n in enumerate(x.shape) if i not in drop]
    return b.shaped(x, shape, x.lead and 0 not in drop)


def _unsqueeze(b: Builder, c: Call, x: Value, axes: Input | None = None) -> Output:
    wanted = given_ints(c, "axes", axes) or []
    rank = x.rank + len(wanted)
    put = {axis_of(a, rank) for a in wanted}
    if len(put) != len(wanted):
        raise CaptureError(f"axes {wanted} name one axis twice")
    rest = iter(x.shape)
    return b.natural(x, [1 if i in put else next(rest) for i in range(rank)])


def _expand(b: Builder, _c: Call, x: Value, target: Input) -> Output:
    wanted = tuple(integers(target, "shape") or [])
    shape = broadcast([x.shape, wanted])
    full = (1,) * (len(shape) - x.rank) + x.shape
    x = b.shaped(x, full, bool(shape) and shape[0] == 1)
    own = shape[1:] if x.lead else shape
    return x if own == x.own else b.emit(prim.expand, x, own, shape=shape, lead=x.lead)


def _concat(b: Builder, c: Call, *parts: Input) -> Output:
    rank = parts[0].rank
    axis = axis_of(c.attr("axis", 1), rank)  # opset 3 and before had a default
    parts = tuple(p for p in parts if p.shape[axis])
    shape = list(parts[0].shape)
    if any(
        p.shape[:axis] + p.shape[axis + 1 :] != tuple(shape[:axis] + shape[axis + 1 :])
        for p in parts
    ):
        raise CaptureError(f"cannot concatenate {[p.shape for p in parts]} along axis {axis}")
    shape[axis] = sum(p.shape[axis] for p in parts)
    lead = axis > 0 and any(p.lead for p in parts if isinstance(p, Value)) and shape[0] == 1
    ready = [b.shaped(p, p.shape, lead) if isinstance(p, Value) else p for p in parts]
    dim = axis if lead else axis + 1
    if all(isinstance(p, Value) for p in ready):
        return b.emit(torch.cat, list(ready), dim, shape=shape, lead=lead)
    return _joined(b, ready, tuple(shape), axis, lead)


def _joined(b: Builder, parts: Sequence[Input], shape: Shape, axis: int, lead: bool) -> Output:
    """Concatenation with constants: active parts padded with zeros to full size, plus the constants."""
    b.allocate(shape, b.dtype.itemsize)
    frame = torch.zeros(shape, dtype=next(p.tensor.dtype for p in parts if isinstance(p, Const)))
    total: Value | None = None
    start = 0
    for part in parts:
        size = part.shape[axis]
        if isinstance(part, Const):
            frame.narrow(axis, start, size).copy_(part.tensor)
        else:
            around = (start, shape[axis] - start - size)
            pads = (0, 0) * (len(shape) - 1 - axis) + around
            padded = b.emit(prim.pad, part, pads, 0.0, shape=shape, lead=lead)
            total = b.emit(torch.add, total, padded, shape=shape, lead=lead) if total else padded
        start += size
    return b.emit(torch.add, total, Const(frame, "concat"), shape=shape, lead=lead)


def _slice(b: Builder, c: Call, x: Value, *inputs: Input | None) -> Output:
    given = [*inputs, None, None, None, None]
    starts, ends = given_ints(c, "starts", given[0]), given_ints(c, "ends", given[1])
    if starts is None or ends is None or len(starts) != len(ends):
        raise CaptureError("starts and ends do not match")
    axes = given_ints(c, "axes", given[2]) or list(range(len(starts)))
    steps = integers(given[3], "steps") or [1] * len(starts)
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        axis = axis_of(axis, x.rank)
        begin, stop, stride = _range(start, end, step, x.shape[axis])
        x = b.taken(x, axis, range(begin, stop, stride))
    return x


def _range(start: int, end: int, step: int, size: int) -> tuple[int, int, int]:
    """Clamped ends as ONNX has them; a negative step may end at -1."""
    if step == 0:
        raise CaptureError("slice step is 0")
    start, end = (n + size if n < 0 else n for n in (start, end))
    low, high = (0, size) if step > 0 else (-1, size - 1)
    return max(min(start, high), low, 0), max(min(end, high), low), step


def _gather(b: Builder, c: Call, x: Input, index: Input) -> Output:
    if not isinstance(x, Value):
        raise CaptureError("looks up a constant at positions computed from the network's input")
    where = constant(index, "indices")
    if where is None:
        raise CaptureError("has no indices")
    axis = axis_of(c.attr("axis", 0), x.rank)
    b.allocate(where.shape)
    picked = b.taken(x, axis, integers(index, "indices") or [])
    shape = (*x.shape[:axis], *where.shape, *x.shape[axis + 1 :])
    return b.shaped(picked, shape, picked.lead and axis > 0)


def _split(b: Builder, c: Call, x: Value, sizes: Input | None = None) -> Output:
    axis = axis_of(c.attr("axis", 0), x.rank)
    size, count = x.shape[axis], len(c.outputs)
    wanted = given_ints(c, "split", sizes)
    if wanted is None:
        part = -(-size // count)
        wanted = [part] * (count - 1) + [size - part * (count - 1)]
    if sum(wanted) != size or len(wanted) != count or min(wanted) < 1:
        raise CaptureError(f"cannot split {size} into {wanted}")
    starts = [sum(wanted[:i]) for i in range(count)]
    return [b.taken(x, axis, range(s, s + n)) for s, n in zip(starts, wanted, strict=True)]


def _pad(b: Builder, c: Call, x: Value, *inputs: Input | None) -> Output:
    given = [*inputs, None, None, None]
    mode = c.text("mode", "constant")
    pads = given_ints(c, "pads", given[0]) or []
    value = number(given[1], "value", float(c.attr("value", 0.0)))
    axes = integers(given[2], "axes") or list(range(len(pads) // 2))
    if len(pads) != 2 * len(axes) or len(axes) > x.rank:
        raise CaptureError(f"{len(pads)} pads do not fit shape {x.shape}")
    ends = [(0, 0)] * x.rank
    for i, axis in enumerate(axes):
        ends[axis_of(axis, x.rank)] = (pads[i], pads[i + len(axes)])
    if mode == "constant":
        return b.padded(x, ends, value)
    for axis, (before, after) in enumerate(ends):
        size = x.shape[axis]
        x = b.taken(x, axis, [_beyond(i, size, mode) for i in range(-before, size + after)])
    return x


def _beyond(i: int, size: int, mode: str) -> int:
    """Which position stands at ``i``, outside the axis perhaps."""
    if mode == "edge":
        return min(max(i, 0), size - 1)
    if mode == "wrap":
        return i % size
    if mode == "reflect" and -size < i < 2 * size - 1:
        return size - 1 - abs(size - 1 - abs(i))
    raise CaptureError(f"padding mode {mode!r} is not supported here; pad with a constant")


# -- reductions and normalisation ------------------------------------------------------------------------


def reduction(op: Callable[..., Any]) -> Rule:
    def rule(b: Builder, c: Call, x: Value, axes: Input | None = None) -> Output:
        wanted = given_ints(c, "axes", axes)
        if not wanted:
            if c.attr("noop_with_empty_axes", 0):
                return x
            wanted = list(range(x.rank))
        return reduced(b, x, op, wanted, bool(c.attr("keepdims", 1)))

    return rule


def reduced(b: Builder, x: Value, op: Callable[..., Any], axes: Sequence[int], keep: bool) -> Value:
    """A reduction over ONNX axes; over the batch's own axis, of size 1, there is nothing to reduce."""
    drop = {axis_of(a, x.rank) for a in axes}
    full = [1 if i in drop else n for i, n in enumerate(x.shape)]
    shape = full if keep else [n for i, n in enumerate(x.shape) if i not in drop]
    dims = tuple(x.dim(a) for a in sorted(drop) if not (x.lead and a == 0))
    lead = x.lead and (keep or 0 not in drop)
    if not dims:
        return b.shaped(x, shape, lead)
    return b.emit(op, x, dims, keep, shape=shape, lead=lead)


def _minimum(b: Builder, c: Call, x: Value, axes: Input | None = None) -> Output:
    inverse = negative(b, x)
    return negative(b, reduction(prim.maximum)(b, c, inverse, axes))  # type: ignore[arg-type]


def _norm(b: Builder, c: Call, x: Value, axes: Input | None = None) -> Output:
    """Sums of absolute values or squares; of the latter perhaps the root."""
    one = c.op == "ReduceL1"
    size = unary(torch.abs)(b, c, x) if one else unary(torch.pow, 2.0)(b, c, x)
    total = reduction(torch.sum)(b, c, size, axes)
    return unary(torch.sqrt)(b, c, total) if c.op == "ReduceL2" else total


def _global_pool(op: Callable[..., Any]) -> Rule:
    return lambda b, _c, x: reduced(b, b.batched(x), op, range(2, x.rank), True)


def _batch_norm(b: Builder, c: Call, x: Value, *params: Input) -> Output:
    if c.attr("training_mode", 0) or any(c.outputs[1:]) or c.attr("spatial", 1) == 0:
        raise CaptureError("is in training mode; export the model in evaluation mode")
    if any(isinstance(p, Value) for p in params) or len(params) != 4:
        raise CaptureError("needs constant scale, bias, mean and variance")
    x = b.batched(x)
    if any(p.shape != x.shape[1:2] for p in params):
        raise CaptureError(f"its parameters do not fit {x.shape}")
    eps = float(c.attr("epsilon", 1e-5))
    return b.emit(prim.batch_norm, x, *params, False, eps, shape=x.shape, lead=True)


def _sum(b: Builder, c: Call, *parts: Input) -> Output:
    total, *rest = sorted(parts, key=lambda p: isinstance(p, Const))  # the first must be active
    for part in rest:
        total = cast("Value", _add(b, c, total, part))
    return total


# operators whose active input need not be the first
ANYWHERE = FUNCTIONS_ANYWHERE | frozenset(
    {"Add", "Concat", "Div", "Gather", "Gemm", "MatMul", "Mul", "Sub", "Sum"}
)
RULES: dict[str, Rule] = {
    **WINDOWS,
    **FUNCTIONS,
    "Abs": unary(torch.abs),
    "Add": _add,
    "BatchNormalization": _batch_norm,
    "Cast": _cast,
    "Clip": _clip,
    "Concat": _concat,
    "Dropout": _same,
    "Expand": _expand,
    "Flatten": _flatten,
    "Gather": _gather,
    "Gemm": _gemm,
    "GlobalAveragePool": _global_pool(torch.mean),
    "GlobalMaxPool": _global_pool(prim.maximum),
    "Identity": _same,
    "LeakyRelu": _leaky,
    "MatMul": _matmul,
    "Neg": unary(torch.neg),
    "Pad": _pad,
    "ReduceL1": _norm,
    "ReduceL2": _norm,
    "ReduceMax": reduction(prim.maximum),
    "ReduceMin": _minimum,
    "ReduceSumSquare": _norm,
    "ReduceMean": reduction(torch.mean),
    "ReduceSum": reduction(torch.sum),
    "Relu": unary(torch.relu),
    "Reshape": _reshape,
    "Sigmoid": unary(torch.sigmoid),
    "Slice": _slice,
    "Split": _split,
    "Squeeze": _squeeze,
    "Sub": _sub,
    "Sum": _sum,
    "Tanh": unary(torch.tanh),
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
}
