"""Maxima over windows and axes, described by the input positions of each window."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from calipers.graph import primitives as prim
from calipers.ops.kinds import Extremum

Shape = tuple[int, ...]


def _positions(shape: Shape) -> Tensor:
    return torch.arange(math.prod(shape)).reshape(shape)


@lru_cache(maxsize=256)
def _pool_windows(
    shape: Shape,
    kernel: Shape,
    stride: Shape,
    padding: Shape,
    dilation: Shape,
    ceil_mode: bool = False,
) -> Tensor:
    n = len(kernel)
    grid = _positions(shape)
    pads: list[int] = []
    for size, k, s, p, d in reversed(
        list(zip(shape[-n:], kernel, stride, padding, dilation, strict=True))
    ):
        span = d * (k - 1) + 1
        reach = size + 2 * p - span
        out = (-(-reach // s) if ceil_mode else reach // s) + 1
        if ceil_mode and (out - 1) * s >= size + p:  # a window may not start in the padding
            out -= 1
        pads += [p, max((out - 1) * s + span - size - p, 0)]
    grid = F.pad(grid, pads, value=-1)
    for i in range(n):
        dim = len(shape) - n + i  # the windows themselves gather at the end
        span = dilation[i] * (kernel[i] - 1) + 1
        grid = grid.unfold(dim, span, stride[i])[..., :: dilation[i]]
    return grid.flatten(len(shape))


def _windows_of_pool(
    shape: Shape, kernel: Any, stride: Any, padding: Any, dilation: Any, ceil_mode: bool = False
) -> Tensor:
    return _pool_windows(
        tuple(shape), tuple(kernel), tuple(stride), tuple(padding), tuple(dilation), ceil_mode
    )


def _windows_of_axes(shape: Shape, dims: Shape, keepdim: bool) -> Tensor:
    axes = [d - 1 for d in dims]  # the batch is not in ``shape``
    rest = [i for i in range(len(shape)) if i not in axes]
    grid = _positions(tuple(shape)).permute(*rest, *axes)
    out = [shape[i] for i in rest]
    if keepdim:
        out = [1 if i in axes else n for i, n in enumerate(shape)]
    return grid.reshape(*out, -1)


EXTREMA: dict[Callable[..., Any], Extremum] = {
    prim.max_pool: Extremum(_windows_of_pool),
    prim.maximum: Extremum(_windows_of_axes),
}
