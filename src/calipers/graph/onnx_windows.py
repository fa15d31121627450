"""ONNX convolutions and pooling to torch's: paddings on two sides, automatic paddings, and rounding up.

Where torch has no such padding, the input is padded first, or the output is cut, so that the result is the same number
for number.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from calipers.errors import CaptureError
from calipers.graph import primitives as prim
from calipers.graph.onnx_graph import Builder, Call, Const, Input, Output, Value

Ints = tuple[int, ...]
_CONV = (torch.conv1d, torch.conv2d, torch.conv3d)
_DECONV = (torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d)


@dataclass(frozen=True)
class _Axis:
    """A window sliding along one axis."""

    size: int
    kernel: int
    stride: int
    dilation: int
    before: int
    after: int

    @property
    def span(self) -> int:
        return self.dilation * (self.kernel - 1) + 1

    def out(self, ceil: bool = False) -> int:
        """How many windows fit; rounded up, none starts in the padding behind the input."""
        reach = self.size + self.before + self.after - self.span
        if reach < 0:
            raise CaptureError(f"a window of {self.span} does not fit an axis of {self.size}")
        if not ceil:
            return reach // self.stride + 1
        count = -(-reach // self.stride) + 1
        return count - ((count - 1) * self.stride >= self.size + self.before)


def _ints(c: Call, name: str, count: int, default: int) -> Ints:
    value = tuple(int(v) for v in c.attr(name) or (default,) * count)
    if len(value) != count or min(value) < (0 if name in {"pads", "output_padding"} else 1):
        raise CaptureError(f"{name}={list(value)} does not fit {count} values")
    return value


def _axes(c: Call, sizes: Sequence[int], kernel: Sequence[int]) -> list[_Axis]:
    n = len(sizes)
    if len(kernel) != n or n not in (1, 2, 3):
        raise CaptureError(f"a kernel of shape {tuple(kernel)} does not fit {n} spatial axes")
    strides, dilations = _ints(c, "strides", n, 1), _ints(c, "dilations", n, 1)
    pads = _ints(c, "pads", 2 * n, 0)
    auto = c.text("auto_pad", "NOTSET")
    axes = []
    for i in range(n):
        axis = _Axis(sizes[i], kernel[i], strides[i], dilations[i], 0, 0)
        ends = (pads[i], pads[i + n])
        if auto in {"SAME_UPPER", "SAME_LOWER"}:
            wanted = -(-axis.size // axis.stride)
            ends = _halves(max((wanted - 1) * axis.stride + axis.span - axis.size, 0), auto)
        elif auto == "VALID":
            ends = (0, 0)
        axes.append(_Axis(axis.size, axis.kernel, axis.stride, axis.dilation, *ends))
    return axes


def _halves(total: int, auto: str) -> tuple[int, int]:
    """A padding in two; SAME_UPPER has the odd one behind."""
    small, large = total // 2, total - total // 2
    return (large, small) if auto == "SAME_LOWER" else (small, large)


def _weights(x: Value, w: Input, bias: Input | None, channels: int) -> None:
    if isinstance(w, Value) or isinstance(bias, Value):
        raise CaptureError("its weights depend on the network's input; they must be constant")
    if x.rank != w.rank or (bias is not None and bias.shape != (channels,)):
        raise CaptureError(f"weights of shape {w.shape} do not fit an input of shape {x.shape}")


def _conv(b: Builder, c: Call, x: Value, w: Input, bias: Input | None = None) -> Output:
    _weights(x, w, bias, w.shape[0])
    x = b.batched(x)
    groups = int(c.attr("group", 1))
    if w.shape[1] * groups != x.shape[1] or w.shape[0] % groups:
        raise CaptureError(f"weights of shape {w.shape} do not fit an input of shape {x.shape}")
    axes = _axes(c, x.shape[2:], w.shape[2:])
    shape = (1, w.shape[0], *(a.out() for a in axes))
    if all(a.before == a.after for a in axes):
        padding = tuple(a.before for a in axes)
    else:
        x = b.padded(x, [(0, 0), (0, 0), *((a.before, a.after) for a in axes)])
        padding = (0,) * len(axes)
    strides, dilations = tuple(a.stride for a in axes), tuple(a.dilation for a in axes)
    op = _CONV[len(axes) - 1]
    return b.emit(op, x, w, bias, strides, padding, dilations, groups, shape=shape, lead=True)


def _conv_transpose(b: Builder, c: Call, x: Value, w: Input, bias: Input | None = None) -> Output:
    groups = int(c.attr("group", 1))
    _weights(x, w, bias, w.shape[1] * groups)
    x = b.batched(x)
    n = x.rank - 2
    if w.shape[0] != x.shape[1] or n not in (1, 2, 3) or groups < 1 or w.shape[0] % groups:
        raise CaptureError(f"weights of shape {w.shape} do not fit an input of shape {x.shape}")
    strides, dilations = _ints(c, "strides", n, 1), _ints(c, "dilations", n, 1)
    extra = _ints(c, "output_padding", n, 0)
    if any(e >= max(s, d) for e, s, d in zip(extra, strides, dilations, strict=True)):
        raise CaptureError(f"output_padding={list(extra)} exceeds stride and dilation")
    full = [
        strides[i] * (x.shape[2 + i] - 1) + dilations[i] * (w.shape[2 + i] - 1) + 1 + extra[i]
        for i in range(n)
    ]
    cuts = _cuts(c, full, [x.shape[2 + i] * strides[i] for i in range(n)])
    equal = all(before == after for before, after in cuts)
    padding = tuple(before if equal else 0 for before, _ in cuts)
    front = (1, w.shape[1] * groups)
    shape = (*front, *(f - 2 * p for f, p in zip(full, padding, strict=True)))
    args = (x, w, bias, strides, padding, extra, groups, dilations)
    y = b.emit(_DECONV[n - 1], *args, shape=shape, lead=True)
    if not equal:
        for i, (before, after) in enumerate(cuts):
            y = b.taken(y, 2 + i, range(before, full[i] - after))
    return y


def _cuts(c: Call, full: Sequence[int], same: Sequence[int]) -> list[tuple[int, int]]:
    """What is cut from the front and back of each axis of a full transposed convolution."""
    n, auto = len(full), c.text("auto_pad", "NOTSET")
    wanted = c.attr("output_shape")
    if wanted is None and auto not in {"SAME_UPPER", "SAME_LOWER"}:
        pads = _ints(c, "pads", 2 * n, 0) if auto != "VALID" else (0,) * (2 * n)
        return [(pads[i], pads[i + n]) for i in range(n)]
    target = list(wanted)[-n:] if wanted is not None else same
    totals = [f - t for f, t in zip(full, target, strict=True)]
    if min(totals) < 0:
        raise CaptureError(f"output shape {list(target)} is larger than the full {list(full)}")
    # the rule is mirrored for transposed convolutions: only SAME_UPPER puts the odd one behind
    return [_halves(t, "SAME_UPPER" if auto == "SAME_UPPER" else "SAME_LOWER") for t in totals]


def _pool_axes(c: Call, x: Value) -> list[_Axis]:
    return _axes(c, x.shape[2:], tuple(c.attr("kernel_shape")))


def _max_pool(b: Builder, c: Call, x: Value) -> Output:
    if any(c.outputs[1:]):
        raise CaptureError("returns positions; only the maxima are supported")
    x = b.batched(x)
    axes, ceil = _pool_axes(c, x), bool(c.attr("ceil_mode", 0))
    wanted = [a.out(ceil) for a in axes]
    plain = all(a.before == a.after and 2 * a.before <= a.kernel for a in axes)
    up = ceil if plain else True
    # torch pads both ends alike, and its rounding up reaches behind the input: a wider padding makes further
    # windows at either end, which are cut
    surplus = [(0, a) if plain else _widened(a, n) for a, n in zip(axes, wanted, strict=True)]
    shape = (*x.shape[:2], *(a.out(up) for _, a in surplus))
    args = [(a.kernel, a.stride, a.before, a.dilation) for _, a in surplus]
    y = b.emit(prim.max_pool, x, *zip(*args, strict=True), up, shape=shape, lead=True)
    for i, (skip, _) in enumerate(surplus):
        y = b.taken(y, 2 + i, range(skip, skip + wanted[i]))
    return y


def _widened(axis: _Axis, wanted: int) -> tuple[int, _Axis]:
    """How many windows to skip in front, and the axis padded alike at both ends that has all that are wanted."""
    for skip in range(axis.kernel):
        pad = axis.before + skip * axis.stride
        even = _Axis(axis.size, axis.kernel, axis.stride, axis.dilation, pad, pad)
        if 2 * pad <= axis.kernel and even.out(ceil=True) >= skip + wanted:
            return skip, even
    raise CaptureError("its padding is wider than its windows allow; pad with Pad before pooling")


def _average_pool(b: Builder, c: Call, x: Value) -> Output:
    x = b.batched(x)
    axes, ceil = _pool_axes(c, x), bool(c.attr("ceil_mode", 0))
    if any(a.dilation != 1 for a in axes):
        raise CaptureError("dilated average pooling is not supported")
    include = bool(c.attr("count_include_pad", 0))
    wanted = [a.out(ceil) for a in axes]
    shape = (*x.shape[:2], *wanted)
    kernel, stride = tuple(a.kernel for a in axes), tuple(a.stride for a in axes)
    if all(a.before == a.after and 2 * a.before <= a.kernel for a in axes):
        padding = tuple(a.before for a in axes)
        args = (x, kernel, stride, padding, ceil, include)
        return b.emit(prim.average_pool, *args, shape=shape, lead=True)
    # any other padding: zeros first, then each window's mean scaled to the number of values that count
    ends = [(0, 0), (0, 0)]
    for a, count in zip(axes, wanted, strict=True):
        ends.append((a.before, (count - 1) * a.stride + a.kernel - a.size - a.before))
    y = b.emit(
        prim.average_pool,
        b.padded(x, ends),
        kernel,
        stride,
        (0,) * len(axes),
        shape=shape,
        lead=True,
    )
    scale = _scale(axes, wanted, include, b.dtype)
    if bool((scale == 1).all()):
        return y
    return b.emit(torch.mul, y, Const(scale, "pool.scale"), shape=shape, lead=True)


def _scale(axes: Sequence[_Axis], wanted: Sequence[int], include: bool, dtype: Any) -> Tensor:
    """Window size divided by the number of values in it that count, for each window."""
    scale = torch.ones((), dtype=torch.float64)
    for a, count in zip(axes, wanted, strict=True):
        low, high = (0, a.size + a.before + a.after) if include else (a.before, a.before + a.size)
        start = torch.arange(count) * a.stride
        inside = (start + a.kernel).clamp(max=high) - start.clamp(min=low)
        if int(inside.min()) < 1:
            raise CaptureError("a window lies in the padding alone; use a smaller padding")
        scale = scale[..., None] * (a.kernel / inside.double())
    return scale.to(dtype)


WINDOWS: dict[str, Callable[..., Output]] = {
    "AveragePool": _average_pool,
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "MaxPool": _max_pool,
}
