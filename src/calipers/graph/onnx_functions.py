"""ONNX operators beyond linear algebra: elementwise functions, normalisation, softmax, comparisons, resizing.

Rules as in `onnx_rules`, with the same composites as capture.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from calipers.errors import CaptureError
from calipers.graph import composites
from calipers.graph import primitives as prim
from calipers.graph.onnx_graph import Builder, Call, Const, Input, Output, Shape, Value, broadcast

Rule = Callable[..., Output]


def maker(b: Builder, lead: bool) -> composites.Make:
    """How composites add nodes; shapes are ours."""

    def make(op: Callable[..., Any], *args: Any, shape: Shape) -> Value:
        return b.emit(op, *args, shape=(1, *shape) if lead else shape, lead=lead)

    return make


def emit(b: Builder, op: Callable[..., Any], x: Value, *args: Any) -> Value:
    """An op that keeps the shape."""
    return b.emit(op, x, *args, shape=x.shape, lead=x.lead)


def combined(b: Builder, op: Callable[..., Any], x: Input, y: Input) -> Value:
    """An elementwise op of two operands."""
    (x, y), shape, lead = b.align([x, y])
    return b.emit(op, x, y, shape=shape, lead=lead)


def tensor_of(value: Input | None, what: str) -> Tensor:
    if not isinstance(value, Const):
        raise CaptureError(f"{what} must be given and constant")
    return value.tensor


def negative(b: Builder, x: Input) -> Input:
    if isinstance(x, Const):
        b.allocate(x.shape, x.tensor.itemsize)
        return Const(-x.tensor, f"{x.name}.neg")
    return emit(b, torch.neg, x)


def single(b: Builder, value: Input) -> float | None:
    """The number that a constant holds, if it is one number."""
    del b
    return (
        float(value.tensor.reshape(()).item())
        if isinstance(value, Const) and value.tensor.numel() == 1
        else None
    )


# -- elementwise -----------------------------------------------------------------------------------------


def _elu(b: Builder, c: Call, x: Value) -> Output:
    alpha = float(c.attr("alpha", 1.6732632423543772 if c.op == "Selu" else 1.0))
    scale = float(c.attr("gamma", 1.0507009873554805)) if c.op == "Selu" else 1.0
    rate = 1 / alpha if c.op == "Celu" else 1.0
    if min(alpha, scale) <= 0:
        raise CaptureError(f"alpha={alpha} and gamma={scale} must be positive")
    return emit(b, prim.elu, x, alpha, scale, rate)


def _gelu(b: Builder, c: Call, x: Value) -> Output:
    return emit(b, F.gelu if c.text("approximate", "none") == "none" else prim.tanh_gelu, x)


def _hard_sigmoid(b: Builder, c: Call, x: Value) -> Output:
    steep = emit(b, torch.mul, x, float(c.attr("alpha", 0.2)))
    return emit(b, torch.clamp, emit(b, torch.add, steep, float(c.attr("beta", 0.5))), 0.0, 1.0)


def _prelu(b: Builder, _c: Call, x: Value, weight: Input) -> Output:
    w = tensor_of(weight, "slope")
    if broadcast([x.shape, tuple(w.shape)]) != x.shape:
        raise CaptureError(f"slopes of shape {tuple(w.shape)} do not fit {x.shape}")
    b.allocate(tuple(w.shape), w.itemsize)
    above = combined(b, torch.mul, emit(b, torch.relu, x), Const(1 - w, f"{weight.name}.rest"))
    return combined(b, torch.add, above, combined(b, torch.mul, x, weight))


def _thresholded(b: Builder, c: Call, x: Value) -> Output:
    step = emit(b, prim.step, emit(b, torch.add, x, -float(c.attr("alpha", 1.0))), 0.0)
    return combined(b, torch.mul, x, step)


def _pow(b: Builder, _c: Call, x: Input, y: Input) -> Output:
    exponent = single(b, y)
    if not isinstance(x, Value) or exponent is None:
        raise CaptureError("the exponent must be one constant number")
    result: Output = composites.power(maker(b, x.lead), x, x.own, exponent)
    return result


def mul(b: Builder, _c: Call, x: Input, y: Input) -> Output:
    """A product; a square, SiLU and GELU where it is one of those."""
    if isinstance(x, Value) and isinstance(y, Value):
        if x.name == y.name:
            return emit(b, torch.pow, x, 2.0)
        for one, other in ((x, y), (y, x)):
            known = _gated(b, one, other)
            if known is not None:
                return known
    return combined(b, torch.mul, x, y)


def _gated(b: Builder, x: Value, gate: Value) -> Value | None:
    """x·sigmoid(x), or s·x·(1 + erf(x/√2)) = 2s·gelu(x)."""
    made = b.made.get(gate.name)
    if made is None or x.shape != gate.shape:
        return None
    if made.op is torch.sigmoid and made.operands[0] == x.name:
        return emit(b, F.silu, x)
    source, scale = _unscaled(b, x.name)
    bell = b.made.get(made.operands[0]) if made.op is torch.add and _number(b, made) == 1 else None
    if bell is None or bell.op is not torch.erf:
        return None
    inside, rate = _unscaled(b, bell.operands[0])
    if inside != source or abs(rate * math.sqrt(2) - 1) > 1e-6:
        return None
    result = emit(b, F.gelu, Value(source, x.shape, x.lead))
    return result if 2 * scale == 1 else emit(b, torch.mul, result, 2 * scale)


def _number(b: Builder, node: Any) -> float | None:
    """The one number among a node's operands."""
    for arg in node.args:
        if isinstance(arg, (int, float)):
            return float(arg)
        found = b.tensors.get(getattr(arg, "name", ""))
        if found is not None and found.numel() == 1:
            return float(found.reshape(()).item())
    return None


def _unscaled(b: Builder, name: str) -> tuple[str, float]:
    """A value as a number times another one."""
    node = b.made.get(name)
    if node is None or node.op not in (torch.mul, torch.div):
        return name, 1.0
    factor = _number(b, node)
    source: str = node.operands[0] if node.operands[0] in b.own else node.operands[-1]
    if factor is None or source not in b.own or b.own[source] != b.own[name]:
        return name, 1.0
    return source, factor if node.op is torch.mul else 1 / factor


def divide(b: Builder, _c: Call, x: Input, y: Input) -> Output:
    if isinstance(y, Const):
        return combined(b, torch.div, x, y)
    return combined(b, torch.mul, emit(b, torch.reciprocal, y), x)


def _largest(b: Builder, _c: Call, *parts: Input) -> Output:
    return reduce(lambda x, y: _larger(b, x, y), _active_first(parts))


def _smallest(b: Builder, c: Call, *parts: Input) -> Output:
    return negative(b, _largest(b, c, *(negative(b, p) for p in parts)))  # type: ignore[arg-type]


def _active_first(parts: Sequence[Input]) -> list[Input]:
    return sorted(parts, key=lambda p: isinstance(p, Const))


def _larger(b: Builder, x: Input, y: Input) -> Value:
    excess = emit(b, torch.relu, combined(b, torch.add, x, negative(b, y)))
    return combined(b, torch.add, excess, y)


def _compare(sign: int, at: float) -> Rule:
    """x > y and its like: a step of ±(x − y)."""

    def rule(b: Builder, _c: Call, x: Input, y: Input) -> Output:
        x, y = (x, y) if sign > 0 else (y, x)
        if isinstance(x, Const):
            gap = combined(b, torch.add, negative(b, y), x)
        else:
            gap = combined(b, torch.add, x, negative(b, y))
        return emit(b, prim.step, gap, at)

    return rule


def _not(b: Builder, _c: Call, x: Value) -> Output:
    return emit(b, torch.add, emit(b, torch.neg, x), 1.0)


def _and(b: Builder, _c: Call, x: Input, y: Input) -> Output:
    x, y = _active_first((x, y))
    return combined(b, torch.mul, x, _as_number(b, y))


def _as_number(b: Builder, x: Input) -> Input:
    """A mask as 0 and 1."""
    if isinstance(x, Value) or x.tensor.dtype == b.dtype:
        return x
    b.allocate(x.shape, b.dtype.itemsize)
    return Const(x.tensor.to(b.dtype), f"{x.name}.number")


def _where(b: Builder, c: Call, mask: Input, x: Input, y: Input) -> Output:
    """mask·x + (1 − mask)·y."""
    inside = _as_number(b, mask)
    if isinstance(inside, Const):
        b.allocate(inside.shape, b.dtype.itemsize)
        outside: Input = Const(1 - inside.tensor, f"{inside.name}.rest")
    else:
        outside = _not(b, c, inside)  # type: ignore[assignment]
    parts: list[Input] = []
    for weight, value in ((inside, x), (outside, y)):
        if isinstance(weight, Const) and isinstance(value, Const):
            b.allocate(broadcast([weight.shape, value.shape]), b.dtype.itemsize)
            product = torch.where(weight.tensor != 0, value.tensor, 0.0)
            parts.append(Const(product, f"{value.name}.part"))
        else:
            parts.append(combined(b, torch.mul, *_active_first((weight, value))))
    return combined(b, torch.add, *_active_first(parts))


# -- over axes -------------------------------------------------------------------------------------------


def _axes(axes: Sequence[int], x: Value) -> tuple[int, ...]:
    """Our dimensions of ONNX axes."""
    wanted = sorted(a % x.rank for a in axes)
    if x.lead and wanted[0] == 0:
        raise CaptureError("works over the batch axis; export the model for batch 1")
    return tuple(x.dim(a) for a in wanted)


def _softmax(make: Callable[..., Any]) -> Rule:
    def rule(b: Builder, c: Call, x: Value) -> Output:
        axis = int(c.attr("axis", -1 if c.version >= 13 else 1))
        if c.version < 13 and axis % x.rank != x.rank - 1:  # over all axes from this one on
            front = math.prod(x.shape[: axis % x.rank])
            flat = b.natural(x, (front, math.prod(x.shape) // front))
            return b.natural(rule(b, Call(c.op, c.name, 13, {"axis": 1}, c.outputs), flat), x.shape)  # type: ignore[arg-type]
        x = b.alone(x) if x.lead and axis % x.rank == 0 else x
        (dim,) = _axes([axis], x)
        result: Output = make(maker(b, x.lead), x, x.own, dim)
        return result

    return rule


def _scaled(
    b: Builder, x: Value, scale: Input | None, bias: Input | None, shape: Shape | None = None
) -> Output:
    for op, value in ((torch.mul, scale), (torch.add, bias)):
        if value is None:
            continue
        given = tensor_of(value, "scale and bias")
        factor = Const(given if shape is None else given.reshape(shape), value.name)
        x = combined(b, op, x, factor)
    return x


def _layer_norm(
    b: Builder, c: Call, x: Value, scale: Input | None = None, bias: Input | None = None
) -> Output:
    if any(c.outputs[1:]):
        raise CaptureError("returns its statistics; only the normalised value is supported")
    dims = _axes(range(int(c.attr("axis", -1)) % x.rank, x.rank), x)
    norm = composites.root_normalized if c.op == "RMSNormalization" else composites.normalized
    eps = float(c.attr("epsilon", 1e-5))
    return _scaled(b, norm(maker(b, x.lead), x, x.own, dims, eps), scale, bias)


def _group_norm(b: Builder, c: Call, x: Value, scale: Input, bias: Input) -> Output:
    x = b.batched(x)
    channels = x.shape[1]
    groups = channels if c.op == "InstanceNormalization" else int(c.attr("num_groups"))
    size = math.prod(x.shape[1:]) // groups
    split = b.shaped(x, (1, groups, size), True)
    normal = composites.normalized(
        maker(b, True), split, split.own, (2,), float(c.attr("epsilon", 1e-5))
    )
    whole = b.shaped(normal, x.shape, True)
    ones = (1,) * (x.rank - 2)
    if (
        tensor_of(scale, "scale").numel() == groups != channels
    ):  # operator set 18: one number per group
        repeat = channels // groups
        scale, bias = (
            Const(tensor_of(v, "scale").repeat_interleave(repeat), "scale") for v in (scale, bias)
        )
    return _scaled(b, whole, scale, bias, (channels, *ones))


# -- resizing --------------------------------------------------------------------------------------------


def _resize(b: Builder, c: Call, x: Value, *inputs: Input | None) -> Output:
    given = [*inputs, None, None, None]
    if c.op == "Upsample" or c.version < 11:
        scales, sizes = given[0], None
        place, rounding = "asymmetric", "floor"
    else:
        scales, sizes = given[1], given[2]
        place = c.text("coordinate_transformation_mode", "half_pixel")
        rounding = c.text("nearest_mode", "round_prefer_floor")
    mode = c.text("mode", "nearest")
    if c.attr("axes") is not None or c.attr("antialias", 0) or place == "tf_crop_and_resize":
        raise CaptureError(
            "resizes in a way that is not supported; use scales or sizes of all axes"
        )
    if sizes is not None and (wanted := tensor_of(sizes, "sizes")).numel():
        new = [int(v) for v in wanted.tolist()]
        rates = [n / s for n, s in zip(new, x.shape, strict=True)]
    else:
        listed = tensor_of(scales, "scales").tolist() if scales is not None else c.attr("scales")
        rates = [float(v) for v in listed]
        new = [math.floor(s * r) for s, r in zip(x.shape, rates, strict=True)]
    for axis, (size, out, rate) in enumerate(zip(x.shape, new, rates, strict=True)):
        if (size, rate) == (out, 1.0):
            continue
        at = [_source(i, size, out, rate, place) for i in range(out)]
        if mode == "nearest":
            x = b.taken(x, axis, [min(max(_rounded(p, rounding), 0), size - 1) for p in at])
        elif mode == "linear":
            x = _mixed(b, x, axis, at)
        else:
            raise CaptureError(f"resizing mode {mode!r} is not supported; use nearest or linear")
    return x


def _source(i: int, size: int, out: int, rate: float, place: str) -> float:
    """Where output i lies on the input's axis."""
    if place == "asymmetric":
        return i / rate
    if place == "align_corners":
        return i * (size - 1) / (out - 1) if out > 1 else 0.0
    if place == "pytorch_half_pixel" and out == 1:
        return 0.0
    if place in {"half_pixel", "pytorch_half_pixel"}:
        return (i + 0.5) / rate - 0.5
    raise CaptureError(f"coordinate mode {place!r} is not supported; use half_pixel or asymmetric")


def _rounded(p: float, how: str) -> int:
    forms: dict[str, Callable[[float], float]] = {
        "floor": math.floor,
        "ceil": math.ceil,
        "round_prefer_floor": lambda v: math.ceil(v - 0.5),
        "round_prefer_ceil": lambda v: math.floor(v + 0.5),
    }
    return int(forms[how](p))


def _mixed(b: Builder, x: Value, axis: int, at: Sequence[float]) -> Value:
    """Linear interpolation along one axis, as a product with a matrix."""
    size = x.shape[axis]
    b.allocate((len(at), size))
    weights = torch.zeros(len(at), size, dtype=torch.float64)
    for i, p in enumerate(at):
        p = min(max(p, 0.0), size - 1.0)
        low = min(math.floor(p), max(size - 2, 0))
        weights[i, low] += 1 - (p - low)
        if size > 1:
            weights[i, low + 1] += p - low
    order = [i for i in range(x.rank) if i != axis] + [axis]
    shape = tuple(x.shape[i] for i in order)
    turned = _permuted(b, x, order, shape)
    product = b.emit(
        F.linear,
        turned,
        Const(weights.to(b.dtype), "resize"),
        shape=(*shape[:-1], len(at)),
        lead=x.lead,
    )
    back = sorted(range(x.rank), key=order.__getitem__)
    return _permuted(b, product, back, tuple(product.shape[i] for i in back))


def _permuted(b: Builder, x: Value, order: Sequence[int], shape: Shape) -> Value:
    if list(order) == list(range(x.rank)):
        return x
    if x.lead and order[0] != 0:
        raise CaptureError("resizes the batch axis; export the model for batch 1")
    dims = tuple(order) if x.lead else (0, *(i + 1 for i in order))
    return b.emit(torch.permute, x, dims, shape=shape, lead=x.lead)


def _depth_to_space(b: Builder, c: Call, x: Value) -> Output:
    x = b.batched(x)
    _, channels, height, width = x.shape
    r, depth = int(c.attr("blocksize")), x.shape[1] // int(c.attr("blocksize")) ** 2
    del channels
    first = c.text("mode", "DCR") == "DCR"
    apart = (1, r, r, depth, height, width) if first else (1, depth, r, r, height, width)
    order = (0, 3, 4, 1, 5, 2) if first else (0, 1, 4, 2, 5, 3)
    x = b.shaped(x, apart, True)
    x = _permuted(b, x, order, (1, depth, height, r, width, r))
    return b.shaped(x, (1, depth, height * r, width * r), True)


def _tile(b: Builder, _c: Call, x: Value, repeats: Input) -> Output:
    for axis, count in enumerate(int(v) for v in tensor_of(repeats, "repeats").tolist()):
        if count != 1:
            x = b.taken(x, axis, list(range(x.shape[axis])) * count)
    return x


def elementwise(op: Any, *args: Any) -> Rule:
    return lambda b, _c, x: emit(b, op, x, *args)


ANYWHERE = frozenset(
    {"And", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Max", "Min", "Pow", "Where"}
)
FUNCTIONS: dict[str, Rule] = {
    **{
        name: elementwise(op)
        for name, op in {
            "Atan": torch.atan, "Ceil": torch.ceil, "Cos": torch.cos, "Erf": torch.erf, "Exp": torch.exp,
            "Floor": torch.floor, "HardSwish": F.hardswish, "Log": torch.log, "Mish": F.mish,
            "Reciprocal": torch.reciprocal, "Round": torch.round, "Sign": torch.sign, "Sin": torch.sin,
            "Softplus": prim.softplus, "Softsign": F.softsign, "Sqrt": torch.sqrt,
        }.items()
    },
    "And": _and,
    "Celu": _elu,
    "DepthToSpace": _depth_to_space,
    "Div": divide,
    "Elu": _elu,
    "Gelu": _gelu,
    "Greater": _compare(1, 0.0),
    "GreaterOrEqual": _compare(1, 1.0),
    "GroupNormalization": _group_norm,
    "HardSigmoid": _hard_sigmoid,
    "InstanceNormalization": _group_norm,
    "LayerNormalization": _layer_norm,
    "Less": _compare(-1, 0.0),
    "LessOrEqual": _compare(-1, 1.0),
    "LogSoftmax": _softmax(composites.log_softmax),
    "Max": _largest,
    "Min": _smallest,
    "Mul": mul,
    "Not": _not,
    "PRelu": _prelu,
    "Pow": _pow,
    "RMSNormalization": _layer_norm,
    "Resize": _resize,
    "Selu": _elu,
    "Softmax": _softmax(composites.softmax),
    "ThresholdedRelu": _thresholded,
    "Tile": _tile,
    "Upsample": _resize,
    "Where": _where,
}  # fmt: skip
