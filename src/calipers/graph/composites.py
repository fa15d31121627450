"""Layers that are made of the graph's vocabulary: softmax, normalisation, attention, products and quotients.

Both readers use them. ``make(op, *args, shape=...)`` adds a node; shapes are of one example, axes count the batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from calipers.graph import primitives as prim

Make = Callable[..., Any]
Shape = tuple[int, ...]
LARGEST = 1 << 22  # elements of one example up to which a tighter form may blow a value up


def _reduced(shape: Shape, dims: Sequence[int]) -> Shape:
    return tuple(1 if i + 1 in dims else n for i, n in enumerate(shape))


def square(make: Make, x: Any, shape: Shape) -> Any:
    return make(torch.pow, x, 2.0, shape=shape)


def negative(make: Make, x: Any, shape: Shape) -> Any:
    return make(torch.neg, x, shape=shape)


def difference(make: Make, x: Any, y: Any, shape: Shape, of: Shape) -> Any:
    """x − y, with y of shape ``of``."""
    return make(torch.add, x, negative(make, y, of), shape=shape)


def _rivals(make: Make, x: Any, shape: Shape, dim: int, weights: Any = None) -> Any:
    """Σ_j exp(x_j − x_i), which is at least 1; with weights of each j for each i, if given."""
    wide = (*shape, shape[dim - 1])
    gaps = make(torch.exp, make(prim.differences, x, dim, shape=wide), shape=wide)
    if weights is not None:
        gaps = make(prim.weigh, gaps, weights, shape=wide)
    return make(torch.sum, gaps, (len(wide),), False, shape=shape)


def _small(shape: Shape, dim: int) -> bool:
    return math.prod(shape) * shape[dim - 1] <= LARGEST


def softmax(make: Make, x: Any, shape: Shape, dim: int, admits: Any = None) -> Any:
    """1 / Σ_j exp(x_j − x_i), which needs no product of two perturbed values; for large ones exp over its sum.

    Args:
        admits: a constant (rows, columns), the exponential of a mask on the last two axes; ``dim`` is the last.

    Reference: Wei et al. 2023 (Convex bounds on the softmax function), section 3.
    """
    if _small(shape, dim):
        each = None
        if admits is not None:
            each = make(prim.rival_weights, admits, shape=(*shape[-2:], shape[-1]))
        shares = make(torch.reciprocal, _rivals(make, x, shape, dim, each), shape=shape)
        return shares if admits is None else make(prim.weigh, shares, admits, shape=shape)
    part = _reduced(shape, (dim,))
    weights = make(torch.exp, _below_top(make, x, shape, dim), shape=shape)
    if admits is not None:
        weights = make(prim.weigh, weights, admits, shape=shape)
    total = make(torch.sum, weights, (dim,), True, shape=part)
    return make(torch.mul, weights, make(torch.reciprocal, total, shape=part), shape=shape)


def log_softmax(make: Make, x: Any, shape: Shape, dim: int) -> Any:
    if _small(shape, dim):
        total = make(torch.log, _rivals(make, x, shape, dim), shape=shape)
        return negative(make, total, shape)
    part = _reduced(shape, (dim,))
    below = _below_top(make, x, shape, dim)
    total = make(torch.sum, make(torch.exp, below, shape=shape), (dim,), True, shape=part)
    return difference(make, below, make(torch.log, total, shape=part), shape, part)


def _below_top(make: Make, x: Any, shape: Shape, dim: int) -> Any:
    part = _reduced(shape, (dim,))
    return difference(make, x, make(prim.maximum, x, (dim,), True, shape=part), shape, part)


def normalized(make: Make, x: Any, shape: Shape, dims: Sequence[int], eps: float) -> Any:
    """(x − mean) / √(variance + eps) over ``dims``. No entry exceeds √(n − 1), which bounds would not see."""
    dims = tuple(dims)
    part = _reduced(shape, dims)
    centered = make(prim.center, x, dims, shape=shape)
    rate = _rate(make, centered, shape, dims, eps)
    result = make(torch.mul, centered, rate, shape=shape)
    most = math.sqrt(max(math.prod(shape) // math.prod(part) - 1, 0)) * (1 + 1e-6)
    return make(torch.clamp, result, -most, most, shape=shape)


def root_normalized(make: Make, x: Any, shape: Shape, dims: Sequence[int], eps: float) -> Any:
    """x / √(mean of squares + eps)."""
    return make(torch.mul, x, _rate(make, x, shape, tuple(dims), eps), shape=shape)


def _rate(make: Make, x: Any, shape: Shape, dims: Shape, eps: float) -> Any:
    part = _reduced(shape, dims)
    mean = make(torch.mean, square(make, x, shape), dims, True, shape=part)
    return make(torch.rsqrt, make(torch.add, mean, eps, shape=part), shape=part)


def matmul(make: Make, x: Any, y: Any, of_x: Shape, of_y: Shape, shape: Shape) -> Any:
    """Both factors perturbed: all products, then their sums. Memory: n·k·m numbers for (n, k) times (k, m)."""
    wide = (*shape[:-1], of_x[-1], shape[-1])
    if math.prod(wide) > LARGEST or len(of_x) < 2 or len(of_y) < 2:
        return make(torch.matmul, x, y, shape=shape)
    left, right = (*of_x, 1), (*of_y[:-2], 1, *of_y[-2:])
    left = (1,) * (len(right) - len(left)) + left
    right = (1,) * (len(left) - len(right)) + right
    rows = make(prim.reshape, x, left, shape=left)
    columns = make(prim.reshape, y, right, shape=right)
    products = make(torch.mul, rows, columns, shape=wide)
    return make(torch.sum, products, (len(wide) - 1,), False, shape=shape)


def contraction(
    make: Make, operands: Sequence[Any], shapes: Sequence[Shape], parts: Sequence[str], result: str
) -> Any | None:
    """The sum, over the letters that ``result`` lacks, of the product of two values whose axes ``parts`` name, the
    batch first: all products, then their sums. None if those are too many.
    """
    sizes = {
        k: n for p, s in zip(parts, shapes, strict=True) for k, n in zip(p[1:], s, strict=True)
    }
    letters = result[1:] + "".join(k for k in sizes if k not in result)
    wide = tuple(sizes[k] for k in letters)
    if math.prod(wide) > LARGEST:
        return None
    factors = []
    for x, letters_of in zip(operands, parts, strict=True):
        own = letters_of[1:]
        order = [k for k in letters if k in own]
        turned = tuple(sizes[k] for k in order)
        x = make(torch.permute, x, (0, *(1 + own.index(k) for k in order)), shape=turned)
        spread = tuple(sizes[k] if k in own else 1 for k in letters)
        factors.append(make(prim.reshape, x, spread, shape=spread))
    products = make(torch.mul, *factors, shape=wide)
    count = len(wide) - len(result) + 1
    if not count:
        return products
    dims = tuple(range(len(result), len(wide) + 1))
    return make(torch.sum, products, dims, False, shape=wide[: len(result) - 1])


def uneven_means(make: Make, x: Any, shape: Shape, out: Shape) -> Any:
    """Means over windows that divide the last ``len(out)`` axes into so many parts, as evenly as they can."""
    for axis, parts in enumerate(out, len(shape) - len(out)):
        n, dim, means = shape[axis], axis + 1, []
        for i in range(parts):
            start, stop = i * n // parts, -(-(i + 1) * n // parts)
            window = (*shape[:axis], stop - start, *shape[axis + 1 :])
            piece = make(prim.slice_, x, dim, start, stop, shape=window)
            means.append(make(torch.mean, piece, (dim,), True, shape=_reduced(shape, (dim,))))
        shape = (*shape[:axis], parts, *shape[axis + 1 :])
        x = make(torch.cat, means, dim, shape=shape)
    return x


def larger(make: Make, x: Any, y: Any, shape: Shape, of_y: Shape) -> Any:
    """max(x, y) = y + relu(x − y)."""
    excess = make(torch.relu, difference(make, x, y, shape, of_y), shape=shape)
    return make(torch.add, excess, y, shape=shape)


def power(make: Make, x: Any, shape: Shape, exponent: float) -> Any:
    """x to a constant power."""
    if exponent == 0:
        return make(torch.add, make(torch.mul, x, 0.0, shape=shape), 1.0, shape=shape)
    if exponent < 0:
        return make(torch.reciprocal, power(make, x, shape, -exponent), shape=shape)
    if exponent == 1:
        return x
    if exponent == 0.5:
        return make(torch.sqrt, x, shape=shape)
    return make(torch.pow, x, float(exponent), shape=shape)


def blended(make: Make, x: Any, weight: Any, other: Any, shape: Shape) -> Any:
    """PReLU: (1 − w)·relu(x) + w·x, exact also for intervals where 0 ≤ w ≤ 1; ``other`` is 1 − w."""
    above = make(torch.mul, make(torch.relu, x, shape=shape), other, shape=shape)
    return make(torch.add, above, make(torch.mul, x, weight, shape=shape), shape=shape)
