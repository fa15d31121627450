"""Convex losses of a margin m as maxima over weights: ``L(m) = max of h(s) − s·m over 0 ≤ s ≤ 1``, h concave, h(0) = 0.

The weight s = −L'(m) says how much an example counts. Any s in [0, 1] gives a lower bound on L, which is what a
certificate of optimality is made of. `smooth` replaces the hinge, (u + |u|)/2 with u = 1 − m, by (u + √(u² + nu²))/2.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


class Loss(NamedTuple):
    """``value``: L; ``smooth``: (m, nu, aid) to the smoothed loss, s = −L' and c = L''; ``entropy``: h.

    ``aid`` is the dual variable of |1 − m| (see `slope`), which only the hinge has.
    """

    value: Callable[[Array], Array]
    smooth: Callable[[Array, float, Array], tuple[Array, Array, Array]]
    entropy: Callable[[Array], Array]
    attained: bool  # whether the infimum is attained on separable data


def slope(u: Array, mu: float, aid: Array) -> Array:
    """The second derivative of √(u² + mu²), with the dual variable of |u| where the formula has u/√(u² + mu²).

    Newton's method then converges from afar: it solves aid·√(u² + mu²) = u, which is far less curved than its quotient.
    Reference: Chan, Golub, Mulet, "A nonlinear primal-dual method for total variation-based image restoration" (1999).
    """
    root = np.sqrt(u * u + mu * mu)
    found: Array = np.maximum(1 - aid * u / root, 1e-12) / root
    return found


def follow(aid: Array, u: Array, move: Array, mu: float) -> Array:
    """The dual variable of |u| after u moves: aid·√(u² + mu²) = u, linearised, and kept inside (−1, 1)."""
    root = np.sqrt(u * u + mu * mu)
    step = u / root - aid + slope(u, mu, aid) * move
    limit, size = np.where(step > 0, 1 - aid, 1 + aid), abs(step)
    share = np.divide(0.99 * limit, size, out=np.ones_like(size), where=size > 0.99 * limit)
    moved: Array = aid + float(share.min(initial=1.0)) * step
    return moved


def _logistic(m: Array) -> Array:
    return np.logaddexp(0.0, -m)


def _logistic_smooth(m: Array, nu: float, aid: Array) -> tuple[Array, Array, Array]:
    del nu, aid  # smooth as it is
    value = _logistic(m)
    weight = np.exp(-np.logaddexp(0.0, m))
    return value, weight, weight * (1 - weight)


def _logistic_entropy(s: Array) -> Array:
    inside = (s > 0) & (s < 1)
    t = np.where(inside, s, 0.5)
    return np.where(inside, -t * np.log(t) - (1 - t) * np.log1p(-t), 0.0)


def _hinge(m: Array) -> Array:
    return np.maximum(0.0, 1.0 - m)


def _hinge_smooth(m: Array, nu: float, aid: Array) -> tuple[Array, Array, Array]:
    u = 1.0 - m
    root = np.sqrt(u * u + nu * nu)
    # (u + root)/2 without cancellation
    above = (abs(u) + root) / 2
    value = np.where(u > 0, above, nu * nu / (4 * above))
    return value, value / root, slope(u, nu, aid) / 2


def _hinge_entropy(s: Array) -> Array:
    return s


LOGISTIC = Loss(_logistic, _logistic_smooth, _logistic_entropy, attained=False)
HINGE = Loss(_hinge, _hinge_smooth, _hinge_entropy, attained=True)
