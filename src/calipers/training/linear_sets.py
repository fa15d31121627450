"""The adversary of a linear model: smoothed worst cases, their derivatives, and what a dual certificate needs of them.

For an example (x, y), y = ±1, with the allowed changes δ (a ball, perhaps in a box) the robust margin is

    m(w, b) = y(w·x + b) − r(w),    r(w) = max over δ of −y·w·δ.

Smoothing with mu > 0 replaces r by a function whose gradient is itself an allowed change:

- l_inf, box included: the set is a box of middle x + c and half-widths h, and |w| becomes √(w² + mu²);
- l2: ‖w‖ becomes √(‖w‖² + mu²);
- l1: max |w_j| = min over t of t + Σ (w_j − t)₊ + (−w_j − t)₊, with (u + √(u² + mu²))/2 for u₊;
- l1 and l2 in a box: mu/2·‖δ‖² is subtracted inside the maximum, so that δ is a projection.

So wherever the gradient of the smoothed problem vanishes, the weights s = −L'(m) and these changes are feasible for the
dual of the *true* problem: smoothing costs a little of the value, never the certificate. Changes are shrunk by a
factor 1 − slack, which leaves room to repair what rounding spoils.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from calipers.rounding import enclose
from calipers.sets import Region, ThreatModel
from calipers.training.linear_losses import Array, follow, slope

U = 2.0**-53
BLOCK = 2**22  # entries of a block of rows
KEEP = 2**25  # what is derived from so many entries is computed once


def gamma(n: float) -> float:
    """The relative error of a float64 sum of n products, in any order."""
    return n * U / (1 - n * U)


class Account(NamedTuple):
    """A dual point, by feature: the sum ``residual`` that should vanish, its rounding, and the room to repair it."""

    residual: Array
    rounding: Array
    room: Array


class Norm(NamedTuple):
    """A smoothed dual norm at w: value, gradient, and the Hessian diag(diagonal) − along·alongᵀ."""

    value: float
    gradient: Array
    diagonal: Array
    along: Array


def smooth_norm(w: Array, p: float, mu: float, aid: Array) -> Norm:
    """The dual norm of l_p, smoothed; ``aid`` (2, d) are the dual variables of the absolute values in it."""
    if p == math.inf:
        root = np.sqrt(w * w + mu * mu)
        return Norm(float(root.sum()), w / root, slope(w, mu, aid[0]), np.zeros(len(w)))
    if p == 2:
        length = math.sqrt(float(w @ w) + mu * mu)
        return Norm(length, w / length, np.full(len(w), 1 / length), w / length**1.5)
    over, level = excess(w, mu)
    root = np.sqrt(over * over + mu * mu)
    shares = plus(over, root, mu) / root
    shares /= shares.sum()
    bends = slope(over, mu, aid) / 2
    along = (bends[0] - bends[1]) / math.sqrt(float(bends.sum()))
    value = level + float(plus(over, root, mu).sum())
    return Norm(value, shares[0] - shares[1], bends.sum(0), along)


def plus(u: Array, root: Array, mu: float) -> Array:
    """(u + √(u² + mu²))/2 without cancellation."""
    above = (abs(u) + root) / 2
    value: Array = np.where(u > 0, above, mu * mu / (4 * above))
    return value


def excess(w: Array, mu: float) -> tuple[Array, float]:
    """±w − t (2, d), and the level t that minimises t + Σ (w − t)₊ + (−w − t)₊, smoothed: the shares add up to 1."""
    peak = float(abs(w).max(initial=0.0))
    below = np.stack([w - peak, -w - peak])
    low, high = (
        -peak,
        mu * (math.sqrt(2 * len(w)) + 1),
    )  # of t − peak, which is small: computed accurately
    for _ in range(200):
        middle = (low + high) / 2
        if not low < middle < high:
            break
        over = below - middle
        root = np.sqrt(over * over + mu * mu)
        if float((plus(over, root, mu) / root).sum()) > 1:
            low = middle
        else:
            high = middle
    return below - high, peak + high


def follow_norm(aid: Array, w: Array, move: Array, p: float, mu: float) -> Array:
    """``aid`` after w moves."""
    if p == math.inf:
        return np.stack([follow(aid[0], w, move, mu), aid[1]])
    if p == 2:
        return aid
    over, _ = excess(w, mu)
    bends = slope(over, mu, aid)
    lift = float((bends[0] - bends[1]) @ move) / float(bends.sum())
    return follow(aid, over, np.stack([move - lift, -move - lift]), mu)


def gram(x: Any, c: Array) -> Array:
    """xᵀ·diag(c)·x for c ≥ 0, sparse or dense."""
    if not isinstance(x, np.ndarray):
        product: Array = (x.T @ x.multiply(c[:, None]).tocsr()).toarray()
        return product
    total = np.zeros((x.shape[1], x.shape[1]))
    for rows in slices(x.shape):
        root = x[rows] * np.sqrt(c[rows])[:, None]
        total += root.T @ root
    return total


def slices(shape: tuple[int, ...]) -> Iterator[slice]:
    """Blocks of rows."""
    step = max(1, BLOCK // max(1, shape[1]))
    for start in range(0, shape[0], step):
        yield slice(start, start + step)


def dense(x: Any, rows: slice) -> Array:
    """A block of rows as an array."""
    block: Array = x[rows] if isinstance(x, np.ndarray) else x[rows].toarray()
    return block


class Adversary:
    """What the solver asks of an adversary of n examples of d features.

    ``aid`` (2, d) holds the dual variables of the absolute values in a norm; some ignore it.
    """

    def __init__(self, x: Any, y: Array, threat: ThreatModel) -> None:
        self.x, self.y, self.p, self.inside = x, y, float(threat.p), True
        eps = enclose(threat.eps, "eps")
        self.eps, self.reach = eps.lower.numpy(), eps.upper.numpy()
        n, d = x.shape
        spread, least = float(abs(x).max()), float(self.eps.min())
        power = 0 if self.p == math.inf else 1 / self.p
        # four times what rounding can ask for
        need = 4 * gamma(n + 16) * (spread / least + 4) * d**power if least > 0 else 0.0
        self.slack = min(max(need, 1e-8), 1e-3)

    def mu(self, smoothing: float) -> float:
        """The mu that changes a margin by ``smoothing`` at most."""
        d = self.x.shape[1]
        count = {math.inf: d, 2.0: 1, 1.0: 4}[self.p]
        found: float = smoothing / max(float(self.reach.max()) * count, 1e-100)
        return found

    def margins(self, w: Array, b: float, mu: float) -> tuple[Array, float]:
        """Smoothed margins, and what is added to the summed losses outside of them."""
        raise NotImplementedError

    def residual(self, w: Array, mu: float, s: Array) -> Array:
        """Σ s·y·(x + δ): minus the gradient in w of the summed losses, (d,)."""
        raise NotImplementedError

    def curvature(self, w: Array, mu: float, s: Array, c: Array, aid: Array) -> Array:
        """Σ c·zzᵀ + Σ s·∂²r over the examples, z = y(x + δ, 1): (d + 1, d + 1)."""
        raise NotImplementedError

    def room(self, s: Array) -> Array:
        """How far Σ s·y·δ can move along each feature, within the sets and either way."""
        raise NotImplementedError

    def exact(self, w: Array, b: float) -> tuple[Array, Array, float]:
        """True margins, their error bound, and an upper bound on what is added outside of the loss."""
        raise NotImplementedError

    def size(self, s: Array) -> Array:
        """An upper bound on Σ s·|x + δ|, (d,)."""
        total: Array = abs(self.x).T @ s + self.total(s) * self.reach
        return total * (1 + gamma(len(s) + 16))

    def total(self, s: Array) -> float:
        """How many examples' changes count."""
        return float(s.sum()) if self.inside else float(len(s))

    def account(self, w: Array, mu: float, s: Array) -> Account:
        error = gamma(len(s) + 32) * self.size(s)
        return Account(self.residual(w, mu, s), error, self.room(s) * (1 - gamma(len(s) + 8)))


class Ball(Adversary):
    """No box: one δ for all examples, up to the sign of y; sparse inputs stay sparse.

    Args:
        inside: whether r is subtracted from the margin (the robust problem); otherwise r is added to every loss: the
            norm-regularised look-alike.
    """

    def __init__(self, x: Any, y: Array, threat: ThreatModel, *, inside: bool = True) -> None:
        super().__init__(x, y, threat)
        self.inside = inside

    def _norm(self, w: Array, mu: float, aid: Array | None = None) -> Norm:
        return smooth_norm(w, self.p, mu, np.zeros((2, len(w))) if aid is None else aid)

    def margins(self, w: Array, b: float, mu: float) -> tuple[Array, float]:
        reduction = (1 - self.slack) * float(self.eps) * self._norm(w, mu).value
        plain = self.y * (self.x @ w + b)
        return (plain - reduction, 0.0) if self.inside else (plain, reduction * len(plain))

    def residual(self, w: Array, mu: float, s: Array) -> Array:
        moved = self.total(s) * (1 - self.slack) * self.eps * self._norm(w, mu).gradient
        total: Array = self.x.T @ (self.y * s) - moved
        return total

    def curvature(self, w: Array, mu: float, s: Array, c: Array, aid: Array) -> Array:
        here, d = self._norm(w, mu, aid), len(w)
        full = np.empty((d + 1, d + 1))
        core, side = gram(self.x, c), self.x.T @ c
        if self.inside:
            delta = (1 - self.slack) * self.eps * here.gradient
            cross = np.outer(self.x.T @ (self.y * c), delta)
            core += float(c.sum()) * np.outer(delta, delta) - cross - cross.T
            side = side - float((self.y * c).sum()) * delta
        weight = self.total(s) * (1 - self.slack) * float(self.eps)
        core[np.diag_indices(d)] += weight * here.diagonal
        core -= weight * np.outer(here.along, here.along)
        full[:d, :d], full[:d, d], full[d, :d], full[d, d] = core, side, side, float(c.sum())
        return full

    def room(self, s: Array) -> Array:
        return np.full(self.x.shape[1], self.total(s) * float(self.eps))

    def exact(self, w: Array, b: float) -> tuple[Array, Array, float]:
        q = {1.0: np.inf, 2.0: 2, math.inf: 1}[self.p]
        reach = float(self.reach) * float(np.linalg.norm(w, q)) * (1 + gamma(2 * len(w) + 8))
        plain = self.y * (self.x @ w + b)
        error = gamma(len(w) + 8) * (abs(self.x) @ abs(w) + abs(b) + reach)
        return (plain - reach, error, 0.0) if self.inside else (plain, error, reach * len(plain))


class _InBlocks(Adversary):
    """What each example's own region asks for: blocks of rows, kept where they are few."""

    def __init__(self, x: Any, y: Array, threat: ThreatModel) -> None:
        super().__init__(x, y, threat)
        self.threat, self.slices = threat, list(slices(x.shape))
        few = x.shape[0] * x.shape[1] <= KEEP
        self.kept = [self._block(rows) for rows in self.slices] if few else None

    def _block(self, rows: slice) -> Any:
        raise NotImplementedError

    def region(self, rows: slice) -> Region:
        return self.threat.around(torch.from_numpy(dense(self.x, rows)))

    def blocks(self) -> Iterator[tuple[slice, Any]]:
        for k, rows in enumerate(self.slices):
            yield rows, self._block(rows) if self.kept is None else self.kept[k]


class Intervals(_InBlocks):
    """l_inf in a box: each set is a box, of middle and half-widths of its own."""

    def _block(self, rows: slice) -> tuple[Array, Array]:
        region = self.region(rows)
        middle = region.lower / 2 + region.upper / 2
        return middle.numpy(), (region.upper / 2 - region.lower / 2).numpy()

    def margins(self, w: Array, b: float, mu: float) -> tuple[Array, float]:
        found, size = np.empty(len(self.y)), np.sqrt(w * w + mu * mu) * (1 - self.slack)
        for rows, (middle, half) in self.blocks():
            found[rows] = self.y[rows] * (middle @ w + b) - half @ size
        return found, 0.0

    def residual(self, w: Array, mu: float, s: Array) -> Array:
        total, sign = np.zeros(len(w)), w / np.sqrt(w * w + mu * mu) * (1 - self.slack)
        for rows, (middle, half) in self.blocks():
            total += middle.T @ (self.y[rows] * s[rows]) - sign * (half.T @ s[rows])
        return total

    def curvature(self, w: Array, mu: float, s: Array, c: Array, aid: Array) -> Array:
        d = len(w)
        full, sign = np.zeros((d + 1, d + 1)), w / np.sqrt(w * w + mu * mu) * (1 - self.slack)
        for rows, (middle, half) in self.blocks():
            z = np.empty((len(middle), d + 1))
            np.multiply(half, -sign, out=z[:, :d])
            z[:, :d] += self.y[rows][:, None] * middle
            z[:, d] = self.y[rows]
            z *= np.sqrt(c[rows])[:, None]
            full += z.T @ z
        full[np.diag_indices(d)[0], np.diag_indices(d)[1]] += (
            self.room(s) * (1 - self.slack) * slope(w, mu, aid[0])
        )
        return full

    def room(self, s: Array) -> Array:
        total = np.zeros(self.x.shape[1])
        for rows, (_, half) in self.blocks():
            total += half.T @ s[rows]
        return total

    def exact(self, w: Array, b: float) -> tuple[Array, Array, float]:
        margin, error = np.empty(len(self.y)), np.empty(len(self.y))
        for rows, (middle, half) in self.blocks():
            reach = half @ abs(w)
            margin[rows] = self.y[rows] * (middle @ w + b) - reach
            error[rows] = gamma(len(w) + 32) * (abs(middle) @ abs(w) + abs(b) + reach)
        return margin, error, 0.0


class Boxed(_InBlocks):
    """l1 and l2 balls in a box: a projection per example."""

    def _block(self, rows: slice) -> Region:
        return self.region(rows)

    def mu(self, smoothing: float) -> float:
        return 2 * smoothing / max(float(self.reach.max()) ** 2, 1e-100)

    def _worst(self, w: Array, mu: float) -> Iterator[tuple[slice, Region, NDArray[Any], Array]]:
        """Blocks with the goal of their projections and the changes δ, before shrinking."""
        for rows, region in self.blocks():
            goal = self.y[rows][:, None] * (w * (-(1 - self.slack) / mu))
            moved = region.project(region.center + torch.from_numpy(goal)) - region.center
            yield rows, region, goal, moved.numpy()

    def margins(self, w: Array, b: float, mu: float) -> tuple[Array, float]:
        found = np.empty(len(self.y))
        for rows, region, _, delta in self._worst(w, mu):
            worst = region.center.numpy() + (1 - self.slack) * delta
            found[rows] = self.y[rows] * (worst @ w + b) + mu / 2 * (delta * delta).sum(1)
        return found, 0.0

    def residual(self, w: Array, mu: float, s: Array) -> Array:
        total = np.zeros(len(w))
        for rows, region, _, delta in self._worst(w, mu):
            worst = region.center.numpy() + (1 - self.slack) * delta
            total += worst.T @ (self.y[rows] * s[rows])
        return total

    def curvature(self, w: Array, mu: float, s: Array, c: Array, aid: Array) -> Array:
        del aid  # the projection has no dual variable of its own
        d = len(w)
        full = np.zeros((d + 1, d + 1))
        for rows, region, goal, delta in self._worst(w, mu):
            z = np.empty((len(delta), d + 1))
            z[:, :d], z[:, d] = region.center.numpy() + (1 - self.slack) * delta, 1.0
            z *= np.sqrt(c[rows])[:, None]
            full += z.T @ z
            free, scale, along = _projection_slope(region, goal, delta)
            weight = s[rows] * scale * (1 - self.slack) ** 2 / mu
            full[np.diag_indices(d)[0], np.diag_indices(d)[1]] += weight @ free
            along *= np.sqrt(weight)[:, None]
            full[:d, :d] -= along.T @ along
        return full

    def room(self, s: Array) -> Array:
        up, down = np.zeros(self.x.shape[1]), np.zeros(self.x.shape[1])
        for rows, region in self.blocks():
            above = (region.upper - region.center).numpy()
            below = (region.center - region.lower).numpy()
            one, other = s[rows] * (self.y[rows] > 0), s[rows] * (self.y[rows] < 0)
            up += one @ above + other @ below
            down += one @ below + other @ above
        return np.minimum(up, down)

    def exact(self, w: Array, b: float) -> tuple[Array, Array, float]:
        margin, error = np.empty(len(self.y)), np.empty(len(self.y))
        for rows, region in self.blocks():
            slope = torch.from_numpy(-self.y[rows][:, None] * w)
            margin[rows] = self.y[rows] * b - region.support(slope).numpy()
            hull = region.hull()
            size = torch.maximum(hull.lower.abs(), hull.upper.abs()).numpy() @ abs(w)
            error[rows] = gamma(4 * len(w) + 64) * (4 * size + abs(b))
        return margin, error, 0.0


def _projection_slope(region: Region, goal: Array, delta: Array) -> tuple[Array, Array, Array]:
    """The Jacobian ``scale·(diag(free) − along·alongᵀ)`` of each row's projection onto its ball in a box."""
    centre = region.center.numpy()
    cap = np.where(goal > 0, region.upper.numpy() - centre, centre - region.lower.numpy())
    size, wanted = abs(delta), abs(goal)
    inside = size < cap * (1 - 1e-12)
    over = np.linalg.norm(np.minimum(wanted, cap), region.p, axis=1) > region.eps.numpy()
    binds = over[:, None]
    free = inside & (~binds | (size > 0))
    along = np.where(free & binds, np.sign(delta) if region.p == 1 else delta, 0.0)
    along /= np.maximum(np.linalg.norm(along, axis=1, keepdims=True), 1e-300)
    if region.p == 1:
        return free, np.ones(len(delta)), along
    share = np.where(free, size / np.maximum(wanted, 1e-300), 0.0).max(1)
    return free, np.where(over, share, 1.0), along
