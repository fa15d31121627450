"""The four kinds of op, and the facts that each method needs of them.

A method has one rule per kind, never one per op: concrete evaluation, interval, linear backward and (later) exact
encoding are four readings of the same entry. An op is one function of the graph's vocabulary; its entry is a value of
one kind.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from calipers.sets import Interval


class Lines(NamedTuple):
    """a_lo·z + b_lo ≤ f(z) ≤ a_up·z + b_up on an interval, elementwise."""

    lower_slope: Tensor
    lower_offset: Tensor
    upper_slope: Tensor
    upper_offset: Tensor


class Pieces(NamedTuple):
    """A continuous piecewise-linear function: breakpoints, one slope more than breakpoints, and f(points[0])."""

    points: tuple[float, ...]
    slopes: tuple[float, ...]
    value: float


def no_terms(*_: Any, **__: Any) -> int:
    """Nothing is summed: the op only moves or copies numbers."""
    return 0


@dataclass(frozen=True)
class Affine:
    """x ↦ Lx + c in its perturbed arguments.

    Args:
        magnitude: ``(scale, *args) -> |L|·x + scale·|c|`` with the op's own arguments, the perturbed ones
            nonnegative. None: L ≥ 0, so that the op itself maps lower ends to lower ends.
        transpose: ``(A, index, shape, *args) -> AᵀL``: rows A (R, *out) to rows (R, *shape) for the perturbed
            argument number ``index`` (counting all value arguments) of per-example ``shape``. None, or a None
            that it returns: the VJP of the op.
        rows: ``(index, *args) -> rows of L`` for flat output positions ``index`` (any shape), of shape
            (*index.shape, *in); None: by transposing unit vectors.
        terms: ``(*args) -> n``: the longest sum that the op or its transpose forms; rounding errors are
            at most gamma_n times the sum of magnitudes. 0 where numbers only move.
        separable: each output depends on one input element, so interval bounds stay exact.
        perturbed: which arguments may depend on the input: only the "first", any "one" of them, or "any".
        run: the op where another way of computing it is faster for bounds; None: as it is.
    """

    magnitude: Callable[..., Tensor] | None = None
    transpose: Callable[..., Tensor | None] | None = None
    rows: Callable[..., Tensor | None] | None = None
    terms: Callable[..., int] = no_terms
    separable: bool = False
    perturbed: str = "first"
    run: Callable[..., Tensor] | None = None


@dataclass(frozen=True)
class Tuned:
    """A family of sound lines: two numbers in [0, 1] for every neuron choose the lower and the upper one.

    Args:
        lines: ``(interval, lower, upper, *args) -> Lines``, sound for any choice, equal to f where it is linear on the
            interval; ``lower`` and ``upper`` may have more leading dimensions than the interval.
        start: ``(interval, *args) -> (lower, upper)``: the choice at which to start optimising.
        affine: slopes and offsets are affine functions of the choice.
    """

    lines: Callable[..., Lines]
    start: Callable[..., tuple[Tensor, Tensor]]
    affine: bool = False


@dataclass(frozen=True)
class Activation:
    """An elementwise function of one perturbed argument; further arguments are numbers.

    Args:
        image: ``(interval, *args) -> interval``: the exact range.
        relax: ``(interval, *args) -> Lines``: sound on the interval, equal to f where it is linear there.
        linear: ``(interval, *args) -> bool mask``: where f is linear on the interval, so that tighter bounds
            would not help.
        pieces: ``(*args) -> Pieces`` for a piecewise-linear f.
        ulps: rounding error of the op itself, in units in the last place; 0 where it is exact.
        tuned: lines that can be optimised; None: ``relax`` is all there is.
        steepest: ``(interval, *args) -> Tensor``: a Lipschitz constant on the interval; None: that of the pieces.
    """

    image: Callable[..., Interval]
    relax: Callable[..., Lines]
    linear: Callable[..., Tensor]
    pieces: Callable[..., Pieces] | None = None
    ulps: float = 0.0
    tuned: Tuned | None = None
    steepest: Callable[..., Tensor] | None = None


@dataclass(frozen=True)
class Bilinear:
    """An elementwise product of two perturbed arguments; with one of them constant it is ``affine``.

    Its relaxation is McCormick's, which needs nothing but the two intervals.
    """

    affine: Affine


@dataclass(frozen=True)
class Extremum:
    """A maximum over windows or axes.

    Args:
        windows: ``(shape, *args) -> (*out, k)`` flat input positions of each window, −1 for padding.
    """

    windows: Callable[..., Tensor]


Kind = Affine | Activation | Bilinear | Extremum
