"""Robust linear models to a certified global optimum: smoothed Newton steps, and a dual point whose gap is computed.

The problem is convex:

    minimise over w, b:   F(w, b) = 1/n Σ L(m_i(w, b)) + l2/2·‖w‖²,      m_i = y_i(w·x_i + b) − max over δ of −y_i·w·δ.

With ``L(m) = max of h(s) − s·m`` any weights s in [0, 1] and any allowed changes δ_i give, for every model,

    F(w, b) ≥ 1/n [Σ h(s_i) − w·ρ − b·β] + l2/2·‖w‖²,    ρ = Σ s_i y_i (x_i + δ_i),  β = Σ s_i y_i,

so where ρ = 0 and β = 0 the number 1/n Σ h(s_i) is a lower bound on the optimum. Floating point leaves them nearly 0:

- β: the weights of the heavier class are scaled down by a factor 1 − φ, φ ≤ |β|/S; h is concave with h(0) = 0, so
  the value keeps a share 1 − φ of itself at least;
- ρ: the changes were found in sets shrunk by 1 − slack, so each feature may still move by slack times its room: if
  ‖ρ_j / room_j‖_p ≤ slack, rounding errors of ρ included, then changes exist in the full sets with ρ = 0 exactly;
- with a ridge ρ needs no repair: it costs ‖ρ‖²/(2·l2·n²).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from calipers.errors import SolverError
from calipers.training.linear_losses import Array, Loss, follow
from calipers.training.linear_sets import Adversary, U, follow_norm, gamma

LAST = 1e-13  # the least smoothing


class Certificate(NamedTuple):
    """``lower <= the optimum <= value <= lower + gap`` in real arithmetic; ``gap`` includes all rounding."""

    value: float
    lower: float
    gap: float

    @classmethod
    def of(cls, value: float, lower: float) -> Certificate:
        return cls(value, lower, max(0.0, math.nextafter(value - lower, math.inf)))


class Solution(NamedTuple):
    """The model found; ``separates``: its true margins are proved to be positive for every example."""

    w: Array
    b: float
    certificate: Certificate
    steps: int
    separates: bool


class Problem(NamedTuple):
    adversary: Adversary
    loss: Loss
    p: float
    l2: float
    intercept: bool

    @property
    def examples(self) -> int:
        return len(self.adversary.y)


class State(NamedTuple):
    """The smoothed problem at a model: w and b in one vector, dual variables of |w| and |1 − m|, value, derivatives."""

    point: Array
    signs: Array
    bends: Array
    margin: Array
    value: float
    weights: Array
    slope: Array
    mu: float
    nu: float


def minimise(problem: Problem, *, tol: float, steps: int) -> Solution:
    """The optimum with a gap of at most ``tol``, or the best found in so many Newton steps; see the module.

    Cost: a Newton step is one product xᵀ·diag·x and one factorisation.
    """
    d = problem.adversary.x.shape[1]
    point, signs, bends = np.zeros(d + 1), np.zeros((2, d)), np.zeros(problem.examples)
    taken, smoothing = 0, 1.0
    best: Solution | None = None
    while True:
        last = smoothing <= 30 * tol
        state = _state(problem, point, signs, bends, smoothing)
        state, used = _descend(problem, state, 1e-13 if last else 1e-3 * smoothing, steps - taken)
        taken += used
        separating = separates(problem, state)
        if last or separating or taken >= steps:
            state, used = _polish(problem, state)
            taken += used
            best = _better(
                best,
                Solution(
                    state.point[:d],
                    float(state.point[d]),
                    certify(problem, state),
                    taken,
                    separating,
                ),
            )
            if separating or best.certificate.gap <= tol or smoothing <= LAST or taken >= steps:
                return best._replace(steps=taken)
        point, signs, bends = state.point, state.signs, state.bends
        smoothing /= 10


def _better(old: Solution | None, new: Solution) -> Solution:
    """The better model, under the better of the two lower bounds."""
    if old is None or new.separates:
        return new
    best = min(old, new, key=lambda s: s.certificate.value)
    lower = max(old.certificate.lower, new.certificate.lower)
    return best._replace(certificate=Certificate.of(best.certificate.value, lower))


def _state(problem: Problem, point: Array, signs: Array, bends: Array, smoothing: float) -> State:
    here = State(
        point, signs, bends, point, 0.0, point, point, problem.adversary.mu(smoothing), smoothing
    )
    return _derive(problem, _evaluate(problem, here, point))


def _evaluate(problem: Problem, state: State, point: Array) -> State:
    """The value at another model; the slope is left as it was."""
    d = len(point) - 1
    margin, outside = problem.adversary.margins(point[:d], float(point[d]), state.mu)
    loss, weights, _ = problem.loss.smooth(margin, state.nu, state.bends)
    ridge = problem.l2 / 2 * float(point[:d] @ point[:d])
    value = (float(loss.sum()) + outside) / len(margin) + ridge
    return state._replace(point=point, margin=margin, value=value, weights=weights)


def _derive(problem: Problem, state: State) -> State:
    """The slope at the state's own model."""
    adversary, d = problem.adversary, len(state.point) - 1
    residual = adversary.residual(state.point[:d], state.mu, state.weights)
    bias = float(adversary.y @ state.weights) if problem.intercept else 0.0
    slope = np.append(problem.l2 * problem.examples * state.point[:d] - residual, -bias)
    return state._replace(slope=slope / problem.examples)


def _descend(problem: Problem, state: State, enough: float, limit: int) -> tuple[State, int]:
    """Newton steps until the expected decrease falls below ``enough``, or a model that separates is found.

    Steps are shortened, and damped where even short ones lead nowhere (at a kink that the Hessian does not see).
    """
    damping = 0.0
    for taken in range(limit):
        move = _step(problem, state, damping)
        drop = -float(state.slope @ move)
        if (drop <= enough and not damping) or separates(problem, state):
            return state, taken
        found = _search(problem, state, move, drop)
        if found is None and damping > 1:
            return state, taken + 1
        damping = (
            max(100 * damping, 1e-8) if found is None else damping / 10 if damping > 1e-9 else 0.0
        )
        state = state if found is None else found
    return state, limit


def _search(problem: Problem, state: State, move: Array, drop: float) -> State | None:
    """The first of the steps 1, 1/2, 1/4, ... that decreases the value enough."""
    full = trial = _evaluate(problem, state, state.point + move)
    length = 1.0
    while not trial.value <= state.value - 1e-4 * length * drop + 4 * U * abs(state.value):
        length /= 2
        if length < 1e-6:
            return None
        trial = _evaluate(problem, state, state.point + length * move)
    return _derive(problem, _aided(problem, state, trial, move, full.margin))


def _polish(problem: Problem, state: State) -> tuple[State, int]:
    """Full Newton steps for as long as the slope shrinks, which it does after values no longer differ."""
    for taken in range(20):
        move = _step(problem, state)
        full = _evaluate(problem, state, state.point + move)
        trial = _derive(problem, _aided(problem, state, full, move, full.margin))
        if not np.linalg.norm(trial.slope) < np.linalg.norm(state.slope) / 2:
            return state, taken
        state = trial
    return state, 20


def _aided(problem: Problem, state: State, trial: State, move: Array, margin: Array) -> State:
    """``trial`` with the dual variables that follow from a full step to ``margin``."""
    signs = follow_norm(state.signs, state.point[:-1], move[:-1], problem.p, state.mu)
    bends = follow(state.bends, 1.0 - state.margin, state.margin - margin, state.nu)
    return trial._replace(signs=signs, bends=bends)


def _step(problem: Problem, state: State, damping: float = 0.0) -> Array:
    """Newton's step, with ``damping`` relative to the mean curvature, at least what a factorisation needs."""
    d = len(state.point) - 1
    _, weights, bends = problem.loss.smooth(state.margin, state.nu, state.bends)
    w = state.point[:d]
    curve = problem.adversary.curvature(w, state.mu, weights, bends, state.signs) / problem.examples
    curve[np.arange(d), np.arange(d)] += problem.l2
    if not problem.intercept:
        curve[d, :] = curve[:, d] = 0.0
        curve[d, d] = 1.0
    damp = (1e-14 + damping) * float(np.trace(curve)) / len(curve) + 1e-300
    while damp < math.inf:
        try:
            factor = np.linalg.cholesky(curve + damp * np.eye(len(curve)))
        except np.linalg.LinAlgError:
            damp *= 100
            continue
        found: Array = np.linalg.solve(factor.T, np.linalg.solve(factor, -state.slope))
        return found
    raise SolverError("X: the values are too large or too small for float64; rescale the features")


def separates(problem: Problem, state: State) -> bool:
    """Whether every true margin is proved positive, so that scaling the model up drives the logistic loss to 0."""
    if problem.l2 > 0 or problem.loss.attained or not problem.adversary.inside:
        return False
    if not (state.margin > 0).all():
        return False
    margin, error, _ = problem.adversary.exact(state.point[:-1], float(state.point[-1]))
    return bool((margin - error > 0).all())


def certify(problem: Problem, state: State) -> Certificate:
    """The loss of a model rounded up, and a lower bound on every model's from the dual point that it gives."""
    d, n = len(state.point) - 1, problem.examples
    w, b = state.point[:d], float(state.point[d])
    margin, error, outside = problem.adversary.exact(w, b)
    loss = problem.loss.value(margin - error)
    ridge = problem.l2 / 2 * float(w @ w)
    value = ((float(loss.sum()) + outside) / n + ridge) * (1 + gamma(2 * n + d + 32)) + 1e-300
    return Certificate.of(value, max(0.0, _dual(problem, state)))


def _balanced(weights: Array, y: Array) -> Array:
    """The heavier class scaled down to the other one's sum, but for rounding."""
    sums = {sign: float(weights[y == sign].sum()) for sign in (-1.0, 1.0)}
    heavy = max(sums, key=lambda sign: sums[sign])
    share = sums[-heavy] / sums[heavy] if sums[heavy] > 0 else 1.0
    balanced: Array = np.where(y == heavy, weights * share, weights)
    return balanced


def _dual(problem: Problem, state: State) -> float:
    """A lower bound on the optimum from weights in [0, 1], −inf where the repair fails."""
    n, adversary, weights = problem.examples, problem.adversary, state.weights
    if problem.intercept:
        weights = _balanced(weights, adversary.y)
    entropy = float(problem.loss.entropy(weights).sum()) * (1 - gamma(n + 16))
    residual, rounding, room = adversary.account(state.point[:-1], state.mu, weights)
    if problem.intercept:
        total = float(weights.sum())
        imbalance = abs(float(adversary.y @ weights)) + gamma(n + 2) * total
        heavier = (total * (1 - gamma(n)) - imbalance) / 2
        if not heavier > imbalance:
            return -math.inf
        share = imbalance / heavier
        entropy *= 1 - share
        rounding = rounding + share * adversary.size(weights)
        room = room * (1 - share)
    off = (abs(residual) + rounding) * (1 + 8 * U)
    if problem.l2 > 0:
        cost = float(off @ off) / (2 * problem.l2 * n) * (1 + gamma(len(off) + 16))
        return (entropy - cost) / n * (1 - 4 * U)
    need = np.divide(off, room, out=np.full(len(off), math.inf), where=room > 0)
    if not np.linalg.norm(need, problem.p) * (1 + gamma(len(off) + 8)) <= adversary.slack:
        return -math.inf
    return entropy / n * (1 - 4 * U)
