"""How far the network that runs may be from the network that is proved: the worst rounding of its forward pass.

A bound speaks of real arithmetic on the stored parameters. The module runs in float32, and rounds: `deviation` bounds
the difference of the outputs' functionals over the whole region, whatever the order in which its sums are formed. A
lower bound that stays positive after subtracting it is a proof about the executed network.

One running error e per value, |computed − real| ≤ e elementwise, from boxes |z| ≤ m of the real values:

- affine, y = L·z + c with sums of n terms:  |L|·e + γ_n·(|L|·(m + e) + |c|),  γ_n = (n + 2)u / (1 − (n + 2)u);
- an activation with Lipschitz constant λ:  min(λ·e, the width of its image of [l − e, u + e]) plus its own ulps;
- a product x·y:  |x|·e_y + |y|·e_x + e_x·e_y + u·(|x| + e_x)(|y| + e_y);   a maximum: the largest e of the window.

Sound: for sums in any order, with or without fused multiply-adds and with subnormals flushed; not for products in fewer
bits (tf32, bf16) nor for Winograd or Fourier convolutions. The functionals themselves are read off the computed outputs
exactly, as a comparison of two logits is.
Reference: Higham 2002 (Accuracy and Stability of Numerical Algorithms), chapter 3.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from calipers.bounds.interval import magnitude
from calipers.bounds.ladder import preactivations
from calipers.bounds.state import absolute, describe, require_ieee
from calipers.errors import UnsupportedOp
from calipers.graph import primitives as prim
from calipers.graph.graph import Network, Node, Ref, bind, concrete, walk
from calipers.ops import facts, kind_of
from calipers.ops.kinds import Activation, Affine, Bilinear, Extremum, no_terms
from calipers.sets import Interval, Region
from calipers.spec import Spec

DEFAULT_MEMORY = 1 << 30


def _inner(_x: Any, w: Tensor, *_: Any) -> int:
    return math.prod(w.shape[1:])


# the sums of the way forward, where an entry of the op table counts those of the way back too
TERMS: dict[Callable[..., Any], Callable[..., int]] = {
    F.linear: _inner,
    torch.conv1d: _inner,
    torch.conv2d: _inner,
    torch.conv3d: _inner,
    torch.matmul: lambda x, _y: x.shape[-1],
    prim.expand: no_terms,
    torch.index_select: no_terms,
}
# parts of what networks run as one operator, with other roundings: softmax, layer normalisation
PARTS = frozenset({prim.center, prim.differences})
_OWN = 1 + 1e-9  # the rounding of this computation, which is in float64


def deviation(
    network: Network,
    region: Region,
    spec: Spec,
    *,
    dtype: torch.dtype | None = None,
    memory: int | None = None,
) -> Tensor:
    """For every point of the region, |functionals of the computed outputs − real functionals| is at most this: (B, M).

    The points are numbers of ``dtype``. Where values could overflow the result is inf.

    Args:
        dtype: in which the network runs; None is its own.
        memory: bytes of working memory to plan for.

    Raises:
        UnsupportedOp: an op without a known error bound.
        ValueError: products may round to fewer bits than the dtype has, or the device's sums have no error bound.

    Cost: about four forward passes in float64.
    """
    working = dtype or network.dtype
    require_ieee(working, region.center.device)
    values = sum(math.prod(n.shape) for n in network.graph.nodes) + math.prod(network.input_shape)
    size = max(1, (memory or DEFAULT_MEMORY) // (values * 8 * 8))
    parts = []
    for start in range(0, len(region), size):
        part = slice(start, start + size)
        error = _output_error(network, region[part], working)
        C = spec.C[part].to(error)
        total = torch.where(C == 0, 0.0, C.abs() * error.unsqueeze(1)).sum(-1)
        parts.append(total * _OWN)
    return torch.cat(parts)


@torch.no_grad()
def _output_error(network: Network, region: Region, dtype: torch.dtype) -> Tensor:
    """The error radius of the outputs, (B, K) float64; inf where a value could overflow or an error is NaN."""
    graph = network.graph
    boxes = preactivations(network, region, tight=False, dtype=torch.float64, rigorous=True)
    known = facts(graph)
    env: dict[str, Any] = bind(graph, network.module, dtype=torch.float64)
    first = graph.inputs[0]
    errors = {first: torch.zeros_like(boxes[first].lower)}

    def rule(node: Node, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        if node.name not in graph.active:
            _require_exact(network, node)
            return concrete(node, args, kwargs)
        if node.op in PARTS:
            raise UnsupportedOp(
                [describe(node)], "deployed verdicts know no error bound of this operator"
            )
        kind = known.kinds[node.name]
        error = RULES[type(kind)](kind, node, args, kwargs, boxes, errors, dtype)
        error = error * _OWN
        largest = torch.maximum(boxes[node.name].lower.abs(), boxes[node.name].upper.abs()) + error
        fits = largest <= torch.finfo(dtype).max / 2  # NaN fits not
        errors[node.name] = torch.where(fits, error, math.inf)
        return boxes[node.name]

    env[first] = boxes[first]
    walk(graph, env, rule)
    return errors[graph.output]


def _require_exact(network: Network, node: Node) -> None:
    """What is computed from parameters alone must only be moved: its rounding is not accounted for."""
    kind = kind_of(network.graph, node)
    moved = isinstance(kind, Affine) and TERMS.get(node.op, kind.terms) is no_terms
    if not moved:
        raise UnsupportedOp(
            [describe(node)],
            "deployed verdicts do not account for the rounding of computed parameters; fold them into the layer",
        )


def unit(dtype: torch.dtype) -> float:
    """The unit roundoff."""
    return torch.finfo(dtype).eps / 2


def gamma(n: int, dtype: torch.dtype) -> float:
    """γ of a sum of n products in any order, with a bias and a scale."""
    if n <= 0:
        return 0.0
    product = (n + 2) * unit(dtype)
    return product / (1 - product) if product < 0.5 else math.inf


def _put(args: Sequence[Any], node: Node, make: Callable[[str, Any], Any]) -> list[Any]:
    """``args`` with ``make(name, value)`` for values of the graph and ``make("", value)`` for plain arguments."""

    def visit(spec: Any, value: Any) -> Any:
        if isinstance(spec, Ref):
            return make(spec.name, value)
        if isinstance(spec, list):
            return [visit(s, v) for s, v in zip(spec, value, strict=True)]
        return make("", value)

    return [visit(s, v) for s, v in zip(node.args, args, strict=True)]


def _affine(
    kind: Affine,
    node: Node,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    boxes: Mapping[str, Interval],
    errors: Mapping[str, Tensor],
    dtype: torch.dtype,
) -> Tensor:
    references = _put(args, node, lambda name, v: boxes[name].lower if name in errors else v)
    terms = TERMS.get(node.op, kind.terms)(*references, **kwargs)
    rate = gamma(terms, dtype)
    # products below the smallest normal number may be flushed
    flushed = terms * torch.finfo(dtype).tiny
    if kind.magnitude is not None:
        slack = _put(
            args,
            node,
            lambda n, v: errors[n] + rate * (magnitude(boxes[n]) + errors[n]) if n in errors else v,
        )
        error: Tensor = kind.magnitude(rate, *slack, **kwargs)
        return error + flushed
    # L ≥ 0: its own op, less its constant term, maps errors; with absolute values throughout it maps magnitudes
    zero = node.op(
        *_put(args, node, lambda n, v: torch.zeros_like(errors[n]) if n in errors else v), **kwargs
    )
    moved = node.op(*_put(args, node, errors.get), **kwargs)
    # the constant term may be a number that the dtype rounds (a padding of 0.1)
    error = moved - zero + (unit(dtype) + 2.0**-50) * zero.abs()
    if rate:
        sizes = _put(args, node, lambda n, v: magnitude(boxes[n]) + errors[n] if n in errors else v)
        error = error + rate * node.op(*absolute(sizes), **kwargs) + flushed
    return error


def _activation(
    kind: Activation,
    node: Node,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    boxes: Mapping[str, Interval],
    errors: Mapping[str, Tensor],
    dtype: torch.dtype,
) -> Tensor:
    name = node.operands[0]
    box, error = boxes[name], errors[name]
    wide = Interval(box.lower - error, box.upper + error)
    image = kind.image(wide, *args[1:], **kwargs)
    span = image.upper - image.lower
    steepest = _lipschitz(kind, node, wide, args, kwargs)
    carried = torch.where(error > 0, torch.minimum(steepest * error, span), 0.0)
    return carried + kind.ulps * 2 * unit(dtype) * magnitude(image)


def _lipschitz(
    kind: Activation, node: Node, x: Interval, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> float | Tensor:
    if kind.steepest is not None:
        return kind.steepest(x, *args[1:], **kwargs)
    if kind.pieces is not None:
        return max(abs(slope) for slope in kind.pieces(*args[1:], **kwargs).slopes)
    raise UnsupportedOp(
        [describe(node)],
        "deployed verdicts need its Lipschitz constant (the `steepest` of its entry in the op table)",
    )


def _bilinear(
    _kind: Bilinear,
    node: Node,
    _args: Sequence[Any],
    _kwargs: Mapping[str, Any],
    boxes: Mapping[str, Interval],
    errors: Mapping[str, Tensor],
    dtype: torch.dtype,
) -> Tensor:
    first, second = node.operands
    x, y, ex, ey = (
        magnitude(boxes[first]),
        magnitude(boxes[second]),
        errors[first],
        errors[second],
    )
    rounding = unit(dtype) * (x + ex) * (y + ey) + torch.finfo(dtype).tiny
    return x * ey + y * ex + ex * ey + rounding


def _extremum(
    _kind: Extremum,
    node: Node,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    _boxes: Mapping[str, Interval],
    errors: Mapping[str, Tensor],
    _dtype: torch.dtype,
) -> Tensor:
    largest: Tensor = node.op(errors[node.operands[0]], *args[1:], **kwargs)
    return largest


RULES: dict[type, Callable[..., Tensor]] = {
    Affine: _affine,
    Activation: _activation,
    Bilinear: _bilinear,
    Extremum: _extremum,
}
