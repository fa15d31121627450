"""Ops that torch has no batch-free public function for. Every primitive takes and returns a batch first.

The rest of the graph's vocabulary is torch's own functions (``torch.relu``, ``torch.conv2d``, ``torch.add``, ...).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def identity(x: Tensor) -> Tensor:
    return x


def reshape(x: Tensor, shape: Sequence[int]) -> Tensor:
    """Each example to ``shape`` (which does not include the batch)."""
    return x.reshape(x.shape[0], *shape)


def expand(x: Tensor, shape: Sequence[int]) -> Tensor:
    """Each example broadcast to ``shape`` (which does not include the batch)."""
    return x.expand(x.shape[0], *shape)


def slice_(x: Tensor, dim: int, start: int, stop: int, step: int = 1) -> Tensor:
    """``x[..., start:stop:step, ...]`` along ``dim``, all nonnegative, step >= 1."""
    index = [slice(None)] * x.ndim
    index[dim] = slice(start, stop, step)
    return x[tuple(index)]


def pad(x: Tensor, pads: Sequence[int], value: float = 0.0) -> Tensor:
    """Constant padding, in the order of ``torch.nn.functional.pad``."""
    return F.pad(x, list(pads), value=value)


def batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    training: bool,
    eps: float,
) -> Tensor:
    """Batch normalisation over dimension 1. In training mode (or without statistics) the batch's own are used;
    running statistics are never updated by a walk. Differentiable in given statistics."""
    if training or mean is None or var is None:
        return F.batch_norm(x, None, None, weight, bias, training=True, eps=eps)
    if not (mean.requires_grad or var.requires_grad):
        return F.batch_norm(x, mean, var, weight, bias, training=False, eps=eps)
    # ATen's operator is not differentiable in its statistics
    scale = torch.rsqrt(var + eps)
    scale = scale if weight is None else scale * weight
    shift = -mean * scale if bias is None else bias - mean * scale
    column = (-1, *[1] * (x.ndim - 2))
    return x * scale.view(column) + shift.view(column)


def dropout(x: Tensor, rate: float, training: bool) -> Tensor:
    return F.dropout(x, rate, training) if training else x


def average_pool(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    ceil_mode: bool = False,
    count_include_pad: bool = True,
) -> Tensor:
    """Average pooling over the last ``len(kernel)`` dimensions (1, 2 or 3)."""
    pool = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[len(kernel) - 1]
    return pool(x, tuple(kernel), tuple(stride), tuple(padding), ceil_mode, count_include_pad)


def einsum(x: Tensor, y: Tensor, equation: str) -> Tensor:
    """`torch.einsum` of two operands; the batch is the first letter of what depends on the input."""
    return torch.einsum(equation, x, y)


def weigh(x: Tensor, weights: Tensor) -> Tensor:
    """x·weights, for constants that are not negative: unlike a product in general it keeps the order of bounds."""
    return x * weights


def rival_weights(admits: Tensor) -> Tensor:
    """(rows, i, j): what entry j counts for in the sum that entry i is divided by. Its own counts also where it is not
    admitted, since its quotient would else be unbounded before it is set to zero."""
    weights = admits.unsqueeze(1).repeat(1, admits.shape[1], 1)
    own = weights.diagonal(dim1=1, dim2=2)
    own.copy_(torch.where(own > 0, own, torch.ones_like(own)))
    return weights


def lower_triangle(rows: int, columns: int) -> Tensor:
    """1 where the column is not beyond the row, else 0: who may look at whom in causal attention."""
    return torch.ones(rows, columns).tril()


def max_pool(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool = False,
) -> Tensor:
    """Max pooling over the last ``len(kernel)`` dimensions (1, 2 or 3)."""
    pool = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[len(kernel) - 1]
    y: Tensor = pool(x, tuple(kernel), tuple(stride), tuple(padding), tuple(dilation), ceil_mode)
    return y


def maximum(x: Tensor, dims: Sequence[int], keepdim: bool) -> Tensor:
    """The maximum over axes (the batch is not one of them)."""
    return torch.amax(x, tuple(dims), keepdim)


def softplus(x: Tensor) -> Tensor:
    """log(1 + exp(x)), also where torch's own gives x."""
    return torch.logaddexp(x, torch.zeros_like(x))


def tanh_gelu(x: Tensor) -> Tensor:
    """GELU by its approximation with tanh."""
    return F.gelu(x, approximate="tanh")


def elu(x: Tensor, alpha: float = 1.0, scale: float = 1.0, rate: float = 1.0) -> Tensor:
    """scale·x for x > 0, scale·alpha·(exp(rate·x) − 1) elsewhere: ELU, SELU and CELU."""
    return scale * torch.where(x > 0, x, alpha * torch.expm1(rate * x.clamp_max(0)))


def step(x: Tensor, at: float = 0.0) -> Tensor:
    """0 below 0, 1 above, ``at`` at 0."""
    return torch.heaviside(x, x.new_tensor(at))


def center(x: Tensor, dims: Sequence[int]) -> Tensor:
    """Each example less its mean over axes (the batch is not one of them)."""
    return x - x.mean(tuple(dims), keepdim=True)


def differences(x: Tensor, dim: int) -> Tensor:
    """x_j − x_i along ``dim``, j in a new last dimension."""
    along = x.movedim(dim, -1)
    return x.unsqueeze(-1).neg() + along.unsqueeze(dim)


def constant(x: Tensor, value: Tensor) -> Tensor:
    """``value`` for each example of ``x``."""
    return value.expand(x.shape[0], *value.shape)


def indicator(mask: Tensor) -> Tensor:
    """1 where a mask holds, 0 elsewhere."""
    return mask.to(torch.get_default_dtype())


def interpolate(x: Tensor, size: Sequence[int], mode: str, corners: bool = False) -> Tensor:
    """Images resized by interpolation of neighbours ("nearest", "linear", "bilinear", "trilinear")."""
    return F.interpolate(
        x, tuple(size), mode=mode, align_corners=corners if mode != "nearest" else None
    )
