"""The solver behind robust linear models: derivatives, weak duality at any point, and planted faults."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import scipy.optimize

from calipers.sets import ThreatModel
from calipers.training import linear_solver as solver
from calipers.training.linear_losses import HINGE, LOGISTIC, Loss
from calipers.training.linear_sets import Adversary, Ball, Boxed, Intervals, excess

INF = math.inf
RADIUS = {1.0: 0.2, 2.0: 0.1, INF: 0.05}
CASES = [
    (p, kind, loss)
    for p in RADIUS
    for kind in ("ball", "outside", "box")
    for loss in (LOGISTIC, HINGE)
]


def problem(
    p: float, kind: str, loss: Loss, l2: float = 0.1, n: int = 40, d: int = 5
) -> solver.Problem:
    generator = np.random.default_rng(0)
    x = np.round(generator.random((n, d)), 1)
    y = np.where(x[:, 0] + 0.5 * generator.standard_normal(n) > 0.5, 1.0, -1.0)
    adversary: Adversary
    if kind == "box":
        adversary = (Intervals if p == INF else Boxed)(x, y, ThreatModel(p, RADIUS[p]))
    else:
        adversary = Ball(x, y, ThreatModel(p, RADIUS[p], -INF, INF), inside=kind == "ball")
    return solver.Problem(adversary, loss, p, l2, True)


def at(task: solver.Problem, point: np.ndarray, smoothing: float) -> solver.State:
    """The state at a model, with the dual variables that its formulas give."""
    n, d = task.adversary.x.shape
    state = solver._state(task, point, np.zeros((2, d)), np.zeros(n), smoothing)
    u, w = 1 - state.margin, point[:d]
    signs = np.stack([w, w]) if task.p == INF else excess(w, state.mu)[0]
    return state._replace(bends=u / np.hypot(u, state.nu), signs=signs / np.hypot(signs, state.mu))


@pytest.mark.parametrize(("p", "kind", "loss"), CASES)
def test_slope_and_step_are_the_derivatives(p: float, kind: str, loss: Loss) -> None:
    task = problem(p, kind, loss)
    point = np.random.default_rng(1).standard_normal(6)
    here = at(task, point, 0.3)

    def value(z: np.ndarray) -> float:
        return solver._evaluate(task, here, z).value

    def slope(z: np.ndarray) -> np.ndarray:
        return solver._derive(task, solver._evaluate(task, here, z)).slope

    step = 1e-6 * np.eye(6)
    first = np.array([(value(point + h) - value(point - h)) / 2e-6 for h in step])
    second = np.array([(slope(point + h) - slope(point - h)) / 2e-6 for h in step])
    np.testing.assert_allclose(here.slope, first, atol=1e-7)
    np.testing.assert_allclose(second @ solver._step(task, here), -here.slope, atol=1e-6)


def truth(task: solver.Problem, start: solver.Solution) -> float:
    """The least true loss that a search without our derivatives finds near a model."""

    def loss(z: np.ndarray) -> float:
        margin, _, outside = task.adversary.exact(z[:-1], z[-1])
        ridge = task.l2 / 2 * z[:-1] @ z[:-1]
        return (task.loss.value(margin).sum() + outside) / len(margin) + ridge

    z = np.append(start.w, start.b)
    found = scipy.optimize.minimize(loss, z + 0.01, method="Powell", options={"maxfev": 150})
    return min(loss(z), found.fun)


@pytest.mark.parametrize("l2", [0.0, 0.1])
@pytest.mark.parametrize(("p", "kind", "loss"), CASES)
def test_any_dual_point_is_a_lower_bound(p: float, kind: str, loss: Loss, l2: float) -> None:
    """Far from the optimum as near it, at any smoothing: the certificate lies below every model's loss."""
    task = problem(p, kind, loss, l2)
    found = solver.minimise(task, tol=1e-6, steps=300)
    least = truth(task, found)
    assert found.certificate.gap <= 1e-6
    optimum, generator = np.append(found.w, found.b), np.random.default_rng(2)
    for smoothing in (1e-6, 1e-3, 1.0):
        for noise in (0.0, 1e-9, 1e-6, 1e-3, 1.0):
            point = optimum + noise * generator.standard_normal(len(optimum))
            lower = solver._dual(task, at(task, point, smoothing))
            assert lower <= least, (smoothing, noise)


def near(task: solver.Problem, found: solver.Solution) -> solver.State:
    return at(task, np.append(found.w, found.b) + 1e-4, 1e-6)


@pytest.mark.parametrize("p", RADIUS)
def test_planted_no_repair_is_noticed(p: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Accounts that claim a residual of 0 certify an infeasible dual point, above the optimum: the tests see it."""
    task = problem(p, "ball", LOGISTIC, 0.0)
    found = solver.minimise(task, tol=1e-6, steps=300)
    state, least = near(task, found), truth(task, found)
    state = state._replace(weights=0.5 * state.weights + 0.25)
    assert solver._dual(task, state) == -math.inf
    honest = task.adversary.account

    def lying(*arguments: Any) -> Any:
        return honest(*arguments)._replace(residual=np.zeros(5))

    monkeypatch.setattr(task.adversary, "account", lying)
    assert solver._dual(task, state) > least


def test_planted_unbalanced_weights_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    task = problem(INF, "ball", LOGISTIC, 0.0)
    state = near(task, solver.minimise(task, tol=1e-6, steps=300))
    one_sided = np.where(task.adversary.y > 0, np.minimum(1, 1.1 * state.weights), state.weights)
    monkeypatch.setattr(solver, "_balanced", lambda weights, y: weights)
    assert solver._dual(task, state._replace(weights=one_sided)) == -math.inf


def test_weights_of_one_class_prove_nothing() -> None:
    task = problem(INF, "ball", LOGISTIC, 0.0)
    state = near(task, solver.minimise(task, tol=1e-6, steps=300))
    lonely = np.where(task.adversary.y > 0, state.weights, 0.0)
    assert solver._dual(task, state._replace(weights=lonely)) <= 0


@pytest.mark.parametrize(("p", "kind", "loss"), CASES)
def test_true_margins_hold_for_every_allowed_change(p: float, kind: str, loss: Loss) -> None:
    """Against sampled and extreme members of the sets."""
    import torch

    from calipers.sets import Region

    task = problem(p, kind, loss)
    sides = (0.0, 1.0) if kind == "box" else (-INF, INF)
    x, y = torch.from_numpy(task.adversary.x), task.adversary.y
    region = Region.ball(x, RADIUS[p], p, *sides)
    generator = np.random.default_rng(3)
    for _ in range(5):
        w, b = generator.standard_normal(5), 0.3
        margin, error, _ = task.adversary.exact(w, b)
        if kind == "outside":
            margin = margin - task.adversary.exact(w, b)[2] / len(y)
        worst = region.maximizer(torch.from_numpy(-y[:, None] * w)).numpy()
        reached = y * (worst @ w + b)
        assert (margin - error <= reached + 1e-12).all()
        np.testing.assert_allclose(margin, reached, atol=1e-9)
