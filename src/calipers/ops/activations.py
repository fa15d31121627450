"""The elementwise functions of the table; the curved ones by their shapes."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from calipers.graph import primitives as prim
from calipers.ops.kinds import Activation
from calipers.ops.piecewise import PIECEWISE
from calipers.ops.smooth import COSINE, SINE, Curve, activation
from calipers.sets import Interval

INF = math.inf
TAIL = 1100.0  # ulps of functions whose tails shrink like exp(-z²/2) with z rounded, down to the smallest number
ALL, NEGATIVE, POSITIVE = (-INF, INF), (-INF, 0.0), (0.0, INF)


def _s_shaped(f: Callable[[Tensor], Tensor], slope: Callable[[Tensor], Tensor]) -> Curve:
    return Curve(f, slope, concave=(POSITIVE,), convex=(NEGATIVE,))


def _gated(
    f: Callable[[Tensor], Tensor],
    slope: Callable[[Tensor], Tensor],
    bends: tuple[float, float],
    turn: float,
    inset: float = 0.0,
) -> Curve:
    """z times a gate that opens: falling slopes below 0, then rising ones, then ones falling to 1.

    Args:
        inset: by how much the convex stretch keeps away from kinks at its ends.
    """
    low, high = bends
    middle = (low + inset, high - inset)
    return Curve(f, slope, ((-INF, low), (high, INF)), (middle,), (turn,))


def _sigmoid_slope(z: Tensor) -> Tensor:
    return torch.sigmoid(z) * torch.sigmoid(-z)


def _tanh_slope(z: Tensor) -> Tensor:
    reach = 350.0 if z.dtype == torch.float64 else 44.0
    return 1 / torch.cosh(z.clamp(-reach, reach)).square()


def _softsign_slope(z: Tensor) -> Tensor:
    return (1 + z.abs()).square().reciprocal()


def _silu_slope(z: Tensor) -> Tensor:
    gate = torch.sigmoid(z)
    return gate * (1 + z * torch.sigmoid(-z))


def _normal(z: Tensor) -> Tensor:
    """The distribution function, accurate in its lower tail too."""
    return 0.5 * torch.erfc(z * -math.sqrt(0.5))


def _gelu_slope(z: Tensor) -> Tensor:
    return _normal(z) + z * torch.exp(-0.5 * z * z) * (1 / math.sqrt(2 * math.pi))


_TANH_GELU = 2 * math.sqrt(2 / math.pi)  # tanh(x) = 2·sigmoid(2x) − 1


def _tanh_gate(z: Tensor) -> Tensor:
    return _TANH_GELU * (z + 0.044715 * z * z * z)


def _tanh_gelu_slope(z: Tensor) -> Tensor:
    inner = _tanh_gate(z)
    gate, closing = torch.sigmoid(inner), torch.sigmoid(-inner)
    return gate * (1 + z * closing * _TANH_GELU * (1 + 3 * 0.044715 * z * z))


def _mish_slope(z: Tensor) -> Tensor:
    gate = torch.tanh(prim.softplus(z))
    return gate + z * torch.sigmoid(z) * (1 - gate) * (1 + gate)


def _hardswish_slope(z: Tensor) -> Tensor:
    return torch.where(z <= -3, 0.0, torch.where(z >= 3, 1.0, (2 * z + 3) / 6))


@lru_cache(maxsize=64)
def _elu(alpha: float = 1.0, scale: float = 1.0, rate: float = 1.0) -> Curve:
    def slope(z: Tensor) -> Tensor:
        return scale * torch.where(z > 0, 1.0, alpha * rate * torch.exp(rate * z.clamp_max(0)))

    def f(z: Tensor) -> Tensor:
        return prim.elu(z, alpha, scale, rate)

    if alpha * rate <= 1:
        return Curve(f, slope, convex=(ALL,))
    return Curve(f, slope, concave=((1e-30, INF),), convex=(NEGATIVE,))  # the kink at 0 bends down


@lru_cache(maxsize=64)
def _power(exponent: float) -> Curve:
    def f(z: Tensor) -> Tensor:
        return torch.pow(z, exponent)

    def slope(z: Tensor) -> Tensor:
        return exponent * torch.pow(z, exponent - 1)

    if exponent != int(exponent):
        bend = {"convex": (POSITIVE,)} if exponent > 1 else {"concave": (POSITIVE,)}
        return Curve(f, slope, domain=POSITIVE, **bend)  # type: ignore[arg-type]
    if exponent % 2 == 0:
        return Curve(f, slope, convex=(ALL,), turns=(0.0,))
    return Curve(f, slope, concave=(NEGATIVE,), convex=(POSITIVE,))


CURVES: dict[Callable[..., Any], Curve] = {
    torch.sigmoid: _s_shaped(torch.sigmoid, _sigmoid_slope),
    torch.tanh: _s_shaped(torch.tanh, _tanh_slope),
    torch.erf: _s_shaped(torch.erf, lambda z: 2 / math.sqrt(math.pi) * torch.exp(-z * z)),
    torch.atan: _s_shaped(torch.atan, lambda z: 1 / (1 + z * z)),
    F.softsign: _s_shaped(lambda z: z / (1 + z.abs()), _softsign_slope),
    F.silu: _gated(
        lambda z: z * torch.sigmoid(z),
        _silu_slope,
        (-2.3993572805154676678, 2.3993572805154676678),
        -1.2784645427610737951,
    ),
    F.gelu: _gated(
        lambda z: z * _normal(z),
        _gelu_slope,
        (-math.sqrt(2), math.sqrt(2)),
        -0.7517915246935644574,
    ),
    prim.tanh_gelu: _gated(
        lambda z: z * torch.sigmoid(_tanh_gate(z)),
        _tanh_gelu_slope,
        (-1.4185040087908283555, 1.4185040087908283555),
        -0.7524614220710162585,
    ),
    F.mish: _gated(
        lambda z: z * torch.tanh(prim.softplus(z)),
        _mish_slope,
        (-2.2563763963607931, 1.4905711794854284593),
        -1.1924312145154952121,
    ),
    F.hardswish: _gated(
        lambda z: z * (z + 3).clamp(0, 6) / 6, _hardswish_slope, (-3.0, 3.0), -1.5, inset=5e-7
    ),
    prim.softplus: Curve(prim.softplus, torch.sigmoid, convex=(ALL,)),
    torch.exp: Curve(torch.exp, torch.exp, convex=(ALL,)),
    torch.log: Curve(torch.log, torch.reciprocal, concave=(ALL,), domain=POSITIVE),
    torch.sqrt: Curve(torch.sqrt, lambda z: 0.5 * z.rsqrt(), concave=(ALL,), domain=POSITIVE),
    torch.rsqrt: Curve(torch.rsqrt, lambda z: -0.5 * z.rsqrt() / z, convex=(ALL,), domain=POSITIVE),
    torch.reciprocal: Curve(
        torch.reciprocal,
        lambda z: -z.square().reciprocal(),
        concave=(NEGATIVE,),
        convex=(POSITIVE,),
        hole=0.0,
    ),
    torch.sin: SINE,
    torch.cos: COSINE,
}  # fmt: skip


def _hardswish_linear(x: Interval) -> Tensor:
    return (x.lower >= 3) | (x.upper <= -3)


def _right_linear(x: Interval, *_: Any) -> Tensor:
    return x.lower >= 0


def _fixed(op: Callable[..., Any], curve: Curve) -> Activation:
    tail = op in (F.gelu, prim.tanh_gelu)
    other = op is prim.softplus  # torch's own goes over to z
    return activation(
        lambda: curve,
        ulps=TAIL if tail else 16.0,
        linear=_hardswish_linear if op is F.hardswish else None,
        relative=not (tail or other),
    )


ACTIVATIONS: dict[Callable[..., Any], Activation] = {
    **PIECEWISE,
    **{op: _fixed(op, curve) for op, curve in CURVES.items()},
    prim.elu: activation(_elu, ulps=16.0, linear=_right_linear),
    torch.pow: activation(_power, ulps=16.0),
}
