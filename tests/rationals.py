"""Networks evaluated in rational arithmetic: the oracle of everything that claims to account for rounding.

Roots, exponentials and logarithms are rationals too, right to 60 digits; whatever else is exact.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from decimal import Context, Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from calipers.graph import primitives as prim
from calipers.graph.graph import Network, Ref
from calipers.spec import Spec

PLACES = Fraction(1, 10**50)  # roots and exponentials are right to more digits than that
FAR = Fraction(2000)  # the sigmoid there is 0 or 1 but for 10^-868
TEN = Context(prec=60, Emax=10**9, Emin=-(10**9))
Values = Any  # arrays of rationals


def rational(value: Tensor) -> Values:
    """The numbers of a tensor, exactly."""
    flat = [Fraction(v) for v in value.detach().double().flatten().tolist()]
    out = np.empty(len(flat), dtype=object)
    out[:] = flat
    return out.reshape(tuple(value.shape))


def decimal(value: Fraction) -> Decimal:
    return TEN.divide(Decimal(value.numerator), Decimal(value.denominator))


def exponential(value: Fraction) -> Fraction:
    return Fraction(TEN.exp(decimal(value)))


def logarithm(value: Fraction) -> Fraction:
    """Of 1 + t also for tiny t."""
    t = value - 1
    if abs(t) < Fraction(1, 10**9):
        return sum((-((-t) ** k) / k for k in range(1, 9)), Fraction(0))
    return Fraction(TEN.ln(decimal(value)))


def root(value: Fraction) -> Fraction:
    return Fraction(TEN.sqrt(decimal(value)))


def each(f: Callable[[Fraction], Fraction]) -> Callable[[Values], Values]:
    return np.vectorize(f, otypes=[object])


def sigmoid(value: Fraction) -> Fraction:
    return 1 / (1 + exponential(-max(min(value, FAR), -FAR)))


def tanh(value: Fraction) -> Fraction:
    return 2 * sigmoid(2 * value) - 1


def convolution(x: Values, w: Values, b: Values, stride: Any, padding: Any) -> Values:
    (sy, sx), (py, px) = stride, padding
    out, channels, kh, kw = w.shape
    padded = np.full((channels, x.shape[1] + 2 * py, x.shape[2] + 2 * px), Fraction(0), object)
    padded[:, py : py + x.shape[1], px : px + x.shape[2]] = x
    height = (padded.shape[1] - kh) // sy + 1
    width = (padded.shape[2] - kw) // sx + 1
    result = np.empty((out, height, width), dtype=object)
    for o, i, j in itertools.product(range(out), range(height), range(width)):
        window = padded[:, i * sy : i * sy + kh, j * sx : j * sx + kw]
        result[o, i, j] = (window * w[o]).sum() + (Fraction(0) if b is None else b[o])
    return result


def normalised(
    x: Values, w: Any, b: Any, mean: Any, var: Any, _training: Any, eps: float
) -> Values:
    scale = each(lambda v: 1 / root(v + Fraction(eps)))(var) * (1 if w is None else w)
    shape = (-1,) + (1,) * (x.ndim - 1)
    shift = -mean * scale + (0 if b is None else b)
    return x * scale.reshape(shape) + shift.reshape(shape)


def averaged(x: Values, kernel: Any, stride: Any, padding: Any, *_: Any) -> Values:
    weight = np.full((1, 1, *kernel), Fraction(1, math.prod(kernel)), object)
    return np.concatenate(
        [convolution(channel[None], weight, None, stride, padding) for channel in x]
    )


def pooled(x: Values, kernel: Any, stride: Any, padding: Any, *_: Any) -> Values:
    assert tuple(padding) == (0, 0)
    (kh, kw), (sy, sx) = kernel, stride
    height, width = (x.shape[1] - kh) // sy + 1, (x.shape[2] - kw) // sx + 1
    result = np.empty((x.shape[0], height, width), dtype=object)
    for c, i, j in itertools.product(range(x.shape[0]), range(height), range(width)):
        result[c, i, j] = x[c, i * sy : i * sy + kh, j * sx : j * sx + kw].max()
    return result


OPS: dict[Any, Callable[..., Values]] = {
    F.linear: lambda x, w, b=None: w.dot(x) + (0 if b is None else b),
    torch.conv2d: convolution,
    torch.relu: each(lambda v: max(v, Fraction(0))),
    torch.abs: each(abs),
    torch.neg: lambda x: -x,
    torch.sigmoid: each(sigmoid),
    torch.tanh: each(tanh),
    torch.add: lambda x, y: x + (Fraction(y) if isinstance(y, float) else y),
    torch.mul: lambda x, y: x * (Fraction(y) if isinstance(y, float) else y),
    F.leaky_relu: lambda x, slope: each(lambda v: v if v >= 0 else Fraction(slope) * v)(x),
    prim.batch_norm: normalised,
    prim.average_pool: averaged,
    prim.max_pool: pooled,
    prim.reshape: lambda x, shape: x.reshape(shape),
}


def trace(network: Network, x: Values) -> dict[str, Values]:
    """All values of one example ``x`` of rationals (without a batch), parameters as they are stored."""
    module: Any = network.module
    values: dict[str, Values] = {"x": x}

    def argument(item: Any) -> Any:
        if not isinstance(item, Ref):
            return item
        if item.name not in values:
            values[item.name] = rational(getattr(module, item.name))
        return values[item.name]

    for node in network.graph.nodes:
        values[node.name] = OPS[node.op](*(argument(a) for a in node.args))
    return values


def outputs(network: Network, x: Tensor) -> Values:
    """The output of one example."""
    return trace(network, rational(x))[network.graph.output]


def functionals(network: Network, spec: Spec, x: Tensor) -> list[list[Fraction]]:
    """C·h(x) + d of every example."""
    rows = []
    for i in range(len(x)):
        y = outputs(network, x[i])
        rows.append(list(rational(spec.C[i]).dot(y) + rational(spec.d[i])))
    return rows
