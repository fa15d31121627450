"""Affine ops: linear maps, convolutions, sums, and everything that only moves numbers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from calipers.graph import primitives as prim
from calipers.ops.kinds import Affine

Shape = tuple[int, ...]


def _scaled(offset: Any, scale: float) -> Tensor | None:
    return None if offset is None or not scale else offset.abs() * scale


# -- linear and matmul ---------------------------------------------------------------------------------


def _linear_magnitude(scale: float, x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    return F.linear(x, w.abs(), _scaled(b, scale))


def _linear_transpose(A: Tensor, _i: int, _s: Shape, _x: Any, w: Tensor, _b: Any = None) -> Tensor:
    return A @ w


def _linear_rows(index: Tensor, x: Any, w: Tensor, _b: Any = None) -> Tensor | None:
    # only a plain vector input makes row i of L equal to row i of the weight
    if x.ndim != 2 or w.layout != torch.strided:
        return None
    return w.index_select(0, index.flatten()).view(*index.shape, -1)


def _matmul_magnitude(_: float, x: Tensor, y: Tensor) -> Tensor:
    return torch.matmul(x.abs(), y.abs())


def _matmul_terms(x: Tensor, y: Tensor) -> int:
    longest: int = max(*x.shape[-2:], *y.shape[-2:])
    return longest


def _einsum_magnitude(_: float, x: Tensor, y: Tensor, equation: str) -> Tensor:
    return prim.einsum(x.abs(), y.abs(), equation)


def _einsum_terms(x: Tensor, y: Tensor, equation: str) -> int:
    read, _, result = equation.partition("->")
    sizes = {
        k: n
        for letters, v in zip(read.split(","), (x, y), strict=True)
        for k, n in zip(letters, v.shape, strict=True)
    }
    return math.prod(n for k, n in sizes.items() if k not in result)


# -- convolutions --------------------------------------------------------------------------------------


SMALL = 1 << 19  # products; with fewer, a convolution takes less time than what goes with it
WINDOWS = 1 << 21  # bytes of all windows of a few images
FEW = 32  # rows; with fewer, a call for every place of a kernel does not pay


def convolve(
    x: Tensor, w: Tensor, b: Tensor | None = None, stride: Any = 1, padding: Any = 0, *rest: Any
) -> Tensor:
    """`torch.conv2d`, by one matrix product where it is small (on a CPU, and without gradients); torch does so itself
    for kernels up to 3 x 3."""
    plain = rest in ((), (1, 1), ((1, 1), 1), ([1, 1], 1)) and not isinstance(padding, str)
    plain = plain and min(w.shape[2:]) > 3
    steps = _tuple(stride, 2)
    products = x.numel() * w.numel() // max(1, w.shape[1] * math.prod(steps))
    tracked = _tracked(x, w)
    if not plain or tracked or products > SMALL or x.ndim != 4 or x.device.type != "cpu":
        return _in_pieces(x, w, b, stride, padding, *rest)
    kernel, sides = list(w.shape[2:]), list(_tuple(padding, 2))
    y: Tensor = torch.ops.aten.thnn_conv2d(x, w, kernel, b, list(steps), sides)
    return y


def _tracked(*values: Tensor) -> bool:
    return torch.is_grad_enabled() and any(value.requires_grad for value in values)


def _in_pieces(
    x: Tensor, w: Tensor, b: Tensor | None = None, stride: Any = 1, *rest: Any
) -> Tensor:
    """`torch.conv2d`; in float64 on a CPU a few images at a time, so that their windows, all of which the library
    writes out, stay in the cache."""
    step = max(1, x.shape[0])
    if x.dtype == torch.float64 and x.device.type == "cpu" and step > 1 and not _tracked(x, w):
        windows = x[0, 0].numel() * w[0].numel() // math.prod(_tuple(stride, 2))
        step = max(1, WINDOWS // max(1, windows * x.itemsize))
    if step >= x.shape[0]:
        return torch.conv2d(x, w, b, stride, *rest)
    parts = torch.split(x, step)
    return torch.cat([torch.conv2d(part, w, b, stride, *rest) for part in parts])


def _conv_magnitude(op: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def magnitude(scale: float, x: Tensor, w: Tensor, b: Any = None, *rest: Any) -> Tensor:
        return op(x, w.abs(), _scaled(b, scale), *rest)

    return magnitude


def _tuple(value: Any, count: int) -> tuple[int, ...]:
    return (value,) * count if isinstance(value, int) else tuple(value) * (count // len(value))


def pull_back(
    A: Tensor,
    w: Tensor,
    stride: Shape,
    padding: Shape = (0, 0),
    extra: Shape = (0, 0),
    dilation: Shape = (1, 1),
) -> Tensor:
    """The transpose of a 2-D convolution without groups. Towards very few channels (an image) one small product
    per row and a scatter are several times faster on a CPU than the library's transposed convolution; and so is, in
    float64, the backward pass of the convolution, although it is the same map."""
    kernel, image = tuple(w.shape[2:]), w.shape[1] <= 4
    double = A.dtype == torch.float64 and not _tracked(A, w)
    if A.device.type != "cpu" or not (image or double):
        return F.conv_transpose2d(A, w, None, stride, padding, extra, 1, dilation)
    size = [
        (out - 1) * s - 2 * p + d * (k - 1) + 1 + e
        for out, k, s, p, d, e in zip(
            A.shape[2:], kernel, stride, padding, dilation, extra, strict=True
        )
    ]
    if double:
        inner = not image and tuple(stride) != (1, 1)
        layout = torch.channels_last if inner else torch.contiguous_format
        shaped = torch.empty((len(A), w.shape[1], *size), dtype=A.dtype, memory_format=layout)
        steps = list(stride), list(padding), list(dilation), False, [0, 0], 1
        wanted = [True, False, False]  # the gradient of its input, of which only the shape counts
        rows = A.contiguous(memory_format=layout)
        back: Tensor
        back, *_ = torch.ops.aten.convolution_backward(rows, shaped, w, None, *steps, wanted)
        return back.contiguous()
    columns = torch.matmul(w.flatten(1).T, A.flatten(2))
    if columns.requires_grad or len(A) < FEW:
        return F.fold(columns, tuple(size), kernel, dilation, padding, stride)
    return _scattered(
        columns.reshape(len(A), w.shape[1], *kernel, *A.shape[2:]), size, stride, padding, dilation
    )


def _scattered(
    columns: Tensor, size: list[int], stride: Shape, padding: Shape, dilation: Shape
) -> Tensor:
    """`F.fold` of columns (R, C, ky, kx, y, x), several times faster: one sum for each place of the kernel."""
    rows, channels, ky, kx, y, x = columns.shape
    (sy, sx), (py, px), (dy, dx) = stride, padding, dilation
    whole = columns.new_zeros(rows, channels, size[0] + 2 * py, size[1] + 2 * px)
    for i in range(ky):
        for j in range(kx):
            lines = slice(i * dy, i * dy + (y - 1) * sy + 1, sy)
            places = slice(j * dx, j * dx + (x - 1) * sx + 1, sx)
            whole[:, :, lines, places] += columns[:, :, i, j]
    return whole[:, :, py : py + size[0], px : px + size[1]]


def _conv_transpose(transposed: Callable[..., Tensor], n: int) -> Callable[..., Tensor | None]:
    """The transpose of an n-dimensional convolution; None (so the VJP) for string padding."""

    def transpose(
        A: Tensor,
        _i: int,
        shape: Shape,
        _x: Any,
        w: Tensor,
        _b: Any = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Tensor | None:
        if isinstance(padding, str):
            return None
        s, p, d = (_tuple(v, n) for v in (stride, padding, dilation))
        sizes = zip(shape[-n:], A.shape[-n:], w.shape[-n:], s, p, d, strict=True)
        extra = tuple(
            size - ((out - 1) * si - 2 * pi + di * (k - 1) + 1)
            for size, out, k, si, pi, di in sizes
        )
        if n == 2 and groups == 1:
            return pull_back(A, w, s, p, extra, d)
        return transposed(A, w, None, s, p, extra, groups, d)

    return transpose


def _conv_terms(_x: Any, w: Tensor, *_: Any) -> int:
    return max(w.shape[0], w.shape[1]) * math.prod(w.shape[2:])


def _deconv_transpose(conv: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def transpose(
        A: Tensor,
        _i: int,
        shape: Shape,
        _x: Any,
        w: Tensor,
        _b: Any = None,
        stride: Any = 1,
        padding: Any = 0,
        _output_padding: Any = 0,
        groups: int = 1,
        dilation: Any = 1,
    ) -> Tensor:
        back = conv(A, w, None, stride, padding, dilation, groups)
        for dim, size in enumerate(
            shape[1:], 2
        ):  # an output padding of a whole stride adds positions
            back = back.narrow(dim, 0, size)
        return back

    return transpose


# -- elementwise with constants, sums --------------------------------------------------------------------


def _sum_to(A: Tensor, shape: Shape) -> Tensor:
    """Undo broadcasting of a per-example ``shape``."""
    missing = A.ndim - 1 - len(shape)
    if missing:
        A = A.sum(tuple(range(1, missing + 1)))
    wide = [i + 1 for i, n in enumerate(shape) if n == 1 and A.shape[i + 1] != 1]
    return A.sum(wide, keepdim=True) if wide else A


def _factor(args: tuple[Any, ...], index: int) -> Any:
    """The constant of a product whose perturbed argument is number ``index``."""
    values = [a for a in args if isinstance(a, Tensor)]
    return (
        args[1 - index] if len(values) == 2 else next(a for a in args if not isinstance(a, Tensor))
    )


def _absolute(value: Any) -> Any:
    return value.abs() if isinstance(value, Tensor) else abs(value)


def _mul_magnitude(_: float, x: Any, y: Any) -> Tensor:
    return torch.mul(_absolute(x), _absolute(y))


def _mul_transpose(A: Tensor, index: int, shape: Shape, x: Any, y: Any) -> Tensor:
    return _sum_to(A * _factor((x, y), index), shape)


def _div_magnitude(_: float, x: Tensor, y: Any) -> Tensor:
    return torch.div(x, _absolute(y))


def _div_transpose(A: Tensor, _i: int, shape: Shape, _x: Any, y: Any) -> Tensor:
    return _sum_to(A / y, shape)


def batch_norm_scale(w: Any, var: Tensor, eps: float, like: Tensor) -> Tensor:
    scale = (var + eps).rsqrt()
    scale = scale if w is None else scale * w
    return scale.reshape(-1, *[1] * (like.ndim - 2))


def _batch_norm_magnitude(
    scale: float, x: Tensor, w: Any, b: Any, mean: Tensor, var: Tensor, _training: bool, eps: float
) -> Tensor:
    factor = batch_norm_scale(w, var, eps, x).abs()
    if not scale:
        return x * factor
    shift = mean.abs().reshape(-1, *[1] * (x.ndim - 2)) * factor
    if b is not None:
        shift = shift + b.abs().reshape(-1, *[1] * (x.ndim - 2))
    return x * factor + scale * shift


def _batch_norm_transpose(
    A: Tensor,
    _i: int,
    _s: Shape,
    _x: Any,
    w: Any,
    _b: Any,
    _m: Any,
    var: Tensor,
    _t: bool,
    eps: float,
) -> Tensor:
    return A * batch_norm_scale(w, var, eps, A)


# -- movers ---------------------------------------------------------------------------------------------


def _reshape_transpose(A: Tensor, _i: int, shape: Shape, *_: Any) -> Tensor:
    return A.reshape(A.shape[0], *shape)


def _permute_transpose(A: Tensor, _i: int, _s: Shape, _x: Any, dims: Shape) -> Tensor:
    inverse = sorted(range(len(dims)), key=lambda i: dims[i])
    return A.permute(inverse)


def _slice_transpose(
    A: Tensor, _i: int, shape: Shape, _x: Any, dim: int, start: int, stop: int, step: int = 1
) -> Tensor:
    out = A.new_zeros(A.shape[0], *shape)
    prim.slice_(out, dim, start, stop, step).copy_(A)
    return out


def _cat_transpose(A: Tensor, index: int, shape: Shape, parts: list[Any], dim: int) -> Tensor:
    start = sum(part.shape[dim] for part in parts[:index])
    return A.narrow(dim, start, shape[dim - 1])


def _pad_transpose(A: Tensor, _i: int, _s: Shape, _x: Any, pads: Shape, _v: float = 0.0) -> Tensor:
    return F.pad(A, [-p for p in pads])


def _reduce_count(x: Any, dims: Shape, _keep: bool = False) -> int:
    return math.prod(x.shape[d] for d in dims)


def _sum_transpose(A: Tensor, _i: int, shape: Shape, _x: Any, dims: Shape, keep: bool) -> Tensor:
    if not keep:
        for d in sorted(dims):
            A = A.unsqueeze(d)
    return A.expand(A.shape[0], *shape)


def _mean_transpose(A: Tensor, i: int, shape: Shape, x: Any, dims: Shape, keep: bool) -> Tensor:
    return _sum_transpose(A, i, shape, x, dims, keep) / math.prod(shape[d - 1] for d in dims)


def _pool_count(_x: Any, kernel: Shape, *_: Any) -> int:
    return math.prod(kernel)


def _one(*_: Any, **__: Any) -> int:
    return 1


def _through(A: Tensor, *_: Any) -> Tensor:
    return A


def _add_transpose(A: Tensor, _i: int, shape: Shape, *_: Any) -> Tensor:
    return _sum_to(A, shape)


# -- centring, differences, constants ----------------------------------------------------------------------


def _center_magnitude(_: float, x: Tensor, dims: Shape) -> Tensor:
    count = math.prod(x.shape[d] for d in dims)
    return x * ((count - 2) / count) + x.mean(tuple(dims), keepdim=True)


def _center_transpose(A: Tensor, _i: int, _s: Shape, _x: Any, dims: Shape) -> Tensor:
    return prim.center(A, dims)


def _differences_magnitude(_: float, x: Tensor, dim: int) -> Tensor:
    sums = x.unsqueeze(-1) + x.movedim(dim, -1).unsqueeze(dim)
    equal = torch.eye(x.shape[dim], dtype=torch.bool, device=x.device)
    shape = [1] * sums.ndim
    shape[dim] = shape[-1] = x.shape[dim]
    return torch.where(equal.reshape(shape), 0.0, sums)


def _differences_transpose(A: Tensor, _i: int, _s: Shape, _x: Any, dim: int) -> Tensor:
    return A.sum(dim).movedim(-1, dim) - A.sum(-1)


def _constant_magnitude(scale: float, x: Tensor, value: Tensor) -> Tensor:
    return scale * prim.constant(x, value.abs())


def _constant_transpose(A: Tensor, _i: int, shape: Shape, *_: Any) -> Tensor:
    return A.new_zeros(A.shape[0], *shape)


def _interpolation_terms(_x: Any, size: Shape, mode: str, _corners: bool = False) -> int:
    return 0 if mode == "nearest" else 8 * 2 ** len(size)  # weights are themselves computed


AFFINE: dict[Callable[..., Any], Affine] = {
    F.linear: Affine(
        _linear_magnitude, _linear_transpose, _linear_rows, lambda _x, w, *_: max(w.shape)
    ),
    torch.matmul: Affine(_matmul_magnitude, terms=_matmul_terms, perturbed="one"),
    prim.einsum: Affine(_einsum_magnitude, terms=_einsum_terms, perturbed="one"),
    torch.conv1d: Affine(
        _conv_magnitude(torch.conv1d), _conv_transpose(F.conv_transpose1d, 1), terms=_conv_terms
    ),
    torch.conv2d: Affine(
        _conv_magnitude(convolve),
        _conv_transpose(F.conv_transpose2d, 2),
        terms=_conv_terms,
        run=convolve,
    ),
    torch.conv3d: Affine(
        _conv_magnitude(torch.conv3d), _conv_transpose(F.conv_transpose3d, 3), terms=_conv_terms
    ),
    torch.conv_transpose1d: Affine(
        _conv_magnitude(torch.conv_transpose1d), _deconv_transpose(torch.conv1d), terms=_conv_terms
    ),
    torch.conv_transpose2d: Affine(
        _conv_magnitude(torch.conv_transpose2d), _deconv_transpose(torch.conv2d), terms=_conv_terms
    ),
    torch.add: Affine(transpose=_add_transpose, terms=_one, separable=True, perturbed="any"),
    torch.neg: Affine(
        lambda _s, x: x,
        lambda A, *_: -A,
        separable=True,
    ),
    torch.mul: Affine(_mul_magnitude, _mul_transpose, terms=_one, separable=True, perturbed="one"),
    prim.weigh: Affine(transpose=_mul_transpose, terms=_one, separable=True),
    torch.div: Affine(_div_magnitude, _div_transpose, terms=_one, separable=True),
    prim.batch_norm: Affine(
        _batch_norm_magnitude, _batch_norm_transpose, terms=lambda *_: 6, separable=True
    ),
    prim.dropout: Affine(transpose=_through, separable=True),
    prim.identity: Affine(transpose=_through, separable=True),
    prim.reshape: Affine(transpose=_reshape_transpose, separable=True),
    prim.expand: Affine(transpose=_add_transpose, terms=lambda x, shape: math.prod(shape)),  # noqa: ARG005
    prim.slice_: Affine(transpose=_slice_transpose, separable=True),
    prim.pad: Affine(transpose=_pad_transpose, separable=True),
    torch.permute: Affine(transpose=_permute_transpose, separable=True),
    torch.index_select: Affine(terms=_one),
    torch.cat: Affine(transpose=_cat_transpose, separable=True, perturbed="any"),
    torch.sum: Affine(transpose=_sum_transpose, terms=_reduce_count),
    torch.mean: Affine(transpose=_mean_transpose, terms=_reduce_count),
    prim.average_pool: Affine(terms=_pool_count),
    prim.center: Affine(_center_magnitude, _center_transpose, terms=_reduce_count),
    prim.differences: Affine(
        _differences_magnitude, _differences_transpose, terms=lambda x, dim: 2 * x.shape[dim]
    ),
    prim.constant: Affine(_constant_magnitude, _constant_transpose, separable=True),
    prim.interpolate: Affine(terms=_interpolation_terms),
    torch.conv_transpose3d: Affine(
        _conv_magnitude(torch.conv_transpose3d), _deconv_transpose(torch.conv3d), terms=_conv_terms
    ),
}
