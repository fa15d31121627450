"""Robust linear classifiers: optima against independent convex solvers, exact worst cases, conventions, bad input."""

from __future__ import annotations

import math
import pickle
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import scipy.optimize
import scipy.sparse
import torch

import calipers as cp
import geometry as g
from calipers.errors import DataError, SolverError
from calipers.training.linear import (
    NormRegularisedLogisticRegression,
    RobustLogisticRegression,
    RobustlySeparable,
    RobustSVM,
)

INF = math.inf
RADIUS = {1.0: 0.3, 2.0: 0.2, INF: 0.1}
LOSSES = {"logistic": RobustLogisticRegression, "hinge": RobustSVM}


def points(n: int = 60, d: int = 5, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Two overlapping classes in [0, 1]; some coordinates lie on the boundary."""
    generator = np.random.default_rng(seed)
    x = np.clip(generator.uniform(-0.2, 1.2, (n, d)), 0, 1)
    y = (x[:, 0] + x[:, 1] + 0.4 * generator.standard_normal(n) > 1).astype(int)
    return x, y


def robust_loss(theta: np.ndarray, x: Any, y: Any, p: float, box: bool, hinge: bool) -> float:
    """The robust loss by the geometry's own oracle of the worst point, one example at a time."""
    w, b = theta[:-1], theta[-1]
    sides = (0.0, 1.0) if box else (-INF, INF)
    case = g.Case(torch.from_numpy(x), p, RADIUS[p], *sides)
    total = 0.0
    for i, label in enumerate(2.0 * y - 1):
        center, radius, low, high = case.row(i)
        worst = g.furthest(np.asarray(-label * w, g.LONG), center, radius, p, low, high)
        m = float(label * (w @ worst + b))
        total += max(0.0, 1 - m) if hinge else np.logaddexp(0, -m)
    return total / len(y)


@pytest.mark.parametrize("box", [False, True])
@pytest.mark.parametrize("p", [1.0, 2.0, INF])
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("l2", [0.0, 0.01])
def test_the_bracket_holds_for_every_model_tried(name: str, p: float, box: bool, l2: float) -> None:
    """``loss_`` is the loss of the model, and no model of an independent search falls below ``lower_``."""
    x, y = points(25, 4)
    model = LOSSES[name](RADIUS[p], p, (0, 1) if box else None, l2=l2).fit(x, y)
    assert model.certified_
    assert 0 <= model.gap_ <= 1e-6

    def loss(theta: np.ndarray) -> float:
        return robust_loss(theta, x, y, p, box, name == "hinge") + l2 / 2 * theta[:-1] @ theta[:-1]

    own = np.append(model.coef_, model.intercept_)
    assert loss(own) == pytest.approx(model.loss_, abs=1e-9)
    assert model.robust_loss(x, y) + l2 / 2 * own[:-1] @ own[:-1] == pytest.approx(
        model.loss_, abs=1e-9
    )
    generator = np.random.default_rng(1)
    starts = [own + s * generator.standard_normal(len(own)) for s in (1e-4, 1e-2)]
    for start in [*starts, np.zeros(len(own)), own * 1.001, own * 0.999]:
        assert loss(start) >= model.lower_
    found = scipy.optimize.minimize(loss, starts[1], method="Powell", options={"maxfev": 60})
    assert found.fun >= model.lower_


def linear_program(x: np.ndarray, y: np.ndarray, eps: float) -> float:
    """The robust SVM for l_inf without a box, by HiGHS: w = u − v, slack per example."""
    n, d = x.shape
    sign = 2.0 * y - 1
    a = sign[:, None] * x
    cost = np.concatenate([np.zeros(2 * d + 1), np.full(n, 1 / n)])
    rows = np.hstack([-(a - eps), a + eps, -sign[:, None], -np.eye(n)])
    free = [(0, None)] * (2 * d) + [(None, None)] + [(0, None)] * n
    return scipy.optimize.linprog(cost, A_ub=rows, b_ub=-np.ones(n), bounds=free).fun


@pytest.mark.parametrize("seed", range(4))
def test_the_robust_svm_is_the_linear_program(seed: int) -> None:
    x, y = points(80, 12, seed)
    model = RobustSVM(0.05).fit(x, y)
    truth = linear_program(x, y, 0.05)
    assert model.lower_ <= truth + 1e-9
    assert truth <= model.loss_ + 1e-9
    assert model.gap_ <= 1e-6


@pytest.mark.parametrize("outside", [False, True])
@pytest.mark.parametrize(("p", "dual"), [(1.0, "inf"), (2.0, 2), (INF, 1)])
@pytest.mark.parametrize("name", LOSSES)
def test_cvxpy_agrees(name: str, p: float, dual: Any, outside: bool) -> None:
    cvxpy = pytest.importorskip("cvxpy")
    if outside and name == "hinge":
        pytest.skip("the look-alike is a logistic regression")
    x, y = points(70, 6, 3)
    w, b = cvxpy.Variable(6), cvxpy.Variable()
    reach = RADIUS[p] * cvxpy.norm(w, dual)
    margin = cvxpy.multiply(2.0 * y - 1, x @ w + b) - (0 if outside else reach)
    loss = cvxpy.pos(1 - margin) if name == "hinge" else cvxpy.logistic(-margin)
    objective = cvxpy.sum(loss) / len(y) + (reach if outside else 0)
    truth = cvxpy.Problem(cvxpy.Minimize(objective)).solve(solver="CLARABEL")
    kind = NormRegularisedLogisticRegression if outside else LOSSES[name]
    model = kind(RADIUS[p], p).fit(x, y)
    assert model.gap_ <= 1e-6
    assert model.lower_ - 1e-7 <= truth <= model.loss_ + 1e-7


def test_without_an_adversary_and_with_a_ridge_it_is_scikit_learns() -> None:
    linear_model = pytest.importorskip("sklearn.linear_model")
    x, y = points(100, 4)
    ours = RobustLogisticRegression(0, l2=0.01, tol=1e-10).fit(x, y)
    theirs = linear_model.LogisticRegression(C=1 / (0.01 * 100), tol=1e-10).fit(x, y)
    np.testing.assert_allclose(ours.coef_, theirs.coef_, atol=1e-4)


def test_the_norm_outside_the_loss_is_another_problem() -> None:
    """The deck's last formula: at the same eps the penalty acts in full, so the model is another, and less robust."""
    x, y = points(200, 5, 2)
    robust = RobustLogisticRegression(0.1).fit(x, y)
    alike = NormRegularisedLogisticRegression(0.1).fit(x, y)
    assert alike.certified_
    assert abs(alike.coef_).sum() < 0.7 * abs(robust.coef_).sum()
    assert alike.robust_loss(x, y) > robust.robust_loss(x, y) + 1e-3
    assert alike.loss_ > robust.loss_ + 1e-3


def test_robustly_separable_data_are_refused_with_a_proof() -> None:
    x = np.array([[0.0, 0.1], [0.1, 0.0], [0.9, 1.0], [1.0, 0.8]])
    y = np.array(["a", "a", "b", "b"])
    with pytest.raises(RobustlySeparable, match="no minimiser exists; set a ridge") as caught:
        RobustLogisticRegression(0.2).fit(x, y)
    proof = pickle.loads(pickle.dumps(caught.value))
    for row, sign in zip(x, (-1, -1, 1, 1), strict=True):  # exactly, in rational arithmetic
        w, b = [Fraction(v) for v in proof.coef], Fraction(proof.intercept)
        plain = sign * (sum(v * Fraction(t) for v, t in zip(w, row, strict=True)) + b)
        assert plain - Fraction(0.2) * sum(map(abs, w)) >= Fraction(proof.margin) > 0
    ridge = RobustLogisticRegression(0.2, l2=1e-3).fit(x, y)
    assert ridge.certified_
    assert ridge.robust_score(x, y) == 1
    svm = RobustSVM(0.2).fit(x, y)
    assert svm.certified_
    assert svm.loss_ <= 1e-6
    assert RobustLogisticRegression(0.48).fit(x, y).certified_  # the sets overlap


@pytest.mark.parametrize("box", [None, (0, 1)])
@pytest.mark.parametrize("p", [1.0, 2.0, INF])
@pytest.mark.parametrize("classes", [2, 3])
def test_attack_is_exact_is_bound(p: float, box: Any, classes: int) -> None:
    """One affine functional per pair: perturb attains robust_margins, no attack passes below, CROWN finds the same."""
    x, y = points(30, 4, 5)
    y = y + (x[:, 2] > 0.6) * (classes - 2)
    model = RobustLogisticRegression(RADIUS[p], p, box, l2=0.01, tol=1e-3).fit(x, y)
    margins = model.robust_margins(x, y)
    sides = box or (-INF, INF)
    threat = cp.ThreatModel(p, RADIUS[p], *sides)
    label, inputs = torch.from_numpy(np.searchsorted(model.classes_, y)), torch.from_numpy(x)
    moved = model.perturb(x, y)
    assert threat.around(inputs).contains(torch.from_numpy(moved)).all()
    layer = model.to_module(torch.float64)
    spec = cp.Spec.label(label, classes)
    reached = spec.margin(spec.values(layer(torch.from_numpy(moved)).detach())).numpy()
    np.testing.assert_allclose(reached, margins, atol=1e-9)
    network = cp.capture(layer, inputs[:2])
    lower = cp.bound(network, inputs, label, threat, method=cp.crown).amin(1).numpy()
    np.testing.assert_allclose(lower, margins, atol=1e-6)
    inside, seeds = threat.around(inputs), torch.arange(len(x))
    attacked = cp.pgd(model.to_module(), inside, spec, steps=30, seeds=seeds).double()
    with torch.no_grad():
        found = spec.margin(spec.values(layer(attacked))).numpy()
    assert (found >= margins - 1e-9).all()
    assert model.robust_score(x, y) == (margins > 0).mean()
    assert model.robust_score(x, y) <= model.score(moved, y) + 1e-12
    loss = torch.nn.functional.cross_entropy(layer(attacked), label).item()
    assert loss <= model.robust_loss(x, y) + 1e-9


@pytest.mark.parametrize("kind", [RobustLogisticRegression, RobustSVM])
@pytest.mark.parametrize("p", [1.0, 2.0, INF])
def test_many_classes_are_certified_with_a_ridge(kind: Any, p: float) -> None:
    x, y = points(60, 4, 1)
    y = y + (x[:, 2] > 0.5)
    model = kind(RADIUS[p] / 2, p, l2=0.01, tol=1e-3).fit(x, y)
    assert model.certified_
    ridge = 0.01 / 2 * ((model.coef_**2).sum() + (model.intercept_**2).sum())
    assert model.robust_loss(x, y) + ridge == pytest.approx(model.loss_, abs=1e-9)
    generator = np.random.default_rng(0)
    for scale in (1e-3, 1e-2, 1e-1, 1.0):  # no other model is below the lower bound
        other = kind(RADIUS[p] / 2, p, l2=0.01, tol=1e-3).fit(x, y)
        other.coef_ = other.coef_ + scale * generator.standard_normal(other.coef_.shape)
        norm = (other.coef_**2).sum() + (other.intercept_**2).sum()
        assert other.robust_loss(x, y) + 0.01 / 2 * norm >= model.lower_


def test_two_of_many_classes_are_the_binary_problem() -> None:
    """With K = 2 the bound is exact, and the ridge on both rows is half that on their difference."""
    from calipers.training import linear_multiclass as many

    x, y = points(50, 3, 4)
    found = many.fit(
        x,
        y,
        2,
        cp.ThreatModel(INF, 0.1, -INF, INF),
        l2=0.02,
        hinge=False,
        intercept=False,
        tol=1e-5,
        steps=200,
    )
    two = RobustLogisticRegression(0.1, l2=0.01, fit_intercept=False).fit(x, y)
    assert found.certificate.value == pytest.approx(two.loss_, abs=3e-5)
    assert found.certificate.lower <= two.loss_


@pytest.mark.parametrize("box", [None, (0, 1)])
@pytest.mark.parametrize("classes", [2, 3])
def test_sparse_input_gives_the_same_model(box: Any, classes: int) -> None:
    x, y = points(80, 6, 7)
    x[x < 0.5] = 0
    x[:, 3] = 0  # a constant feature
    y = y + (x[:, 2] > 0.6) * (classes - 2)
    settings: dict[str, Any] = {"eps": 0.1, "box": box, "l2": 0.001, "tol": 1e-4}
    one = RobustLogisticRegression(**settings).fit(x, y)
    for kind in (scipy.sparse.csr_matrix, scipy.sparse.csc_array):
        other = RobustLogisticRegression(**settings).fit(kind(x), y)
        np.testing.assert_allclose(other.coef_, one.coef_, atol=1e-3)
        np.testing.assert_allclose(other.decision_function(kind(x)), other.decision_function(x))
        np.testing.assert_allclose(
            other.robust_margins(kind(x), y), other.robust_margins(x, y), atol=1e-12
        )
    assert one.coef_[0, 3] == 0 or classes == 3


def test_blocks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    from calipers.training import linear_sets

    x, y = points()
    settings: list[dict[str, Any]] = [{"box": (0, 1)}, {"box": (0, 1), "p": 2}, {}]
    whole = [RobustLogisticRegression(0.1, **s).fit(x, y).loss_ for s in settings]
    monkeypatch.setattr(linear_sets, "BLOCK", 35)
    monkeypatch.setattr(linear_sets, "KEEP", 0)
    parts = [RobustLogisticRegression(0.1, **s).fit(x, y).loss_ for s in settings]
    np.testing.assert_allclose(whole, parts, atol=1e-9)


def test_a_box_per_feature_and_an_exact_radius() -> None:
    x, y = points()
    low, high = np.zeros(5), np.linspace(1, 2, 5)
    model = RobustLogisticRegression("1/10", box=(low, high)).fit(x, y)
    assert model.certified_
    wide = RobustLogisticRegression(0.1).fit(x, y)
    assert model.loss_ <= wide.loss_ + 1e-9  # a smaller set
    assert np.isfinite(model.robust_margins(x, y)).all()


def test_no_intercept() -> None:
    x, y = points()
    model = RobustLogisticRegression(0.1, fit_intercept=False).fit(x - 0.5, y)
    assert model.certified_
    assert model.intercept_ == 0


def test_what_is_not_proved_is_not_called_certified() -> None:
    """Equalities that floats cannot meet (no adversary, no ridge) leave the trivial bound; so do few steps."""
    x, y = points()
    plain = RobustLogisticRegression(0).fit(x, y)
    assert plain.lower_ == 0
    assert not plain.certified_
    few = RobustLogisticRegression(0.1, max_iter=2).fit(x, y)
    assert not few.certified_
    assert few.gap_ > 1e-6


WITH_SKLEARN = [
    (RobustLogisticRegression(l2=1e-2, tol=1e-2), {}),
    (RobustSVM(l2=1e-2, tol=1e-2), {}),
    (
        NormRegularisedLogisticRegression(eps=0.01, l2=1e-3),
        {"check_estimator_sparse_tag": "asks for three classes"},
    ),
]


@pytest.mark.parametrize(("model", "known"), WITH_SKLEARN, ids=lambda m: type(m).__name__)
@pytest.mark.filterwarnings("ignore:Estimator .* does not inherit:UserWarning")
def test_scikit_learns_checks_pass(model: Any, known: dict[str, str]) -> None:
    checks = pytest.importorskip("sklearn.utils.estimator_checks")
    found = checks.check_estimator(model, expected_failed_checks=known, on_skip=None)
    assert len(found) > 40


def test_it_works_without_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    for name in [n for n in sys.modules if n.split(".")[0] == "sklearn"]:
        monkeypatch.setitem(sys.modules, name, None)
    x, y = points()
    model = RobustLogisticRegression(0.1)
    with pytest.raises(DataError, match="not fitted yet; call fit"):
        model.predict(x)
    assert model.fit(x, y).score(x, y) > 0.7
    assert repr(model).startswith("RobustLogisticRegression(eps=0.1, p=inf, box=None")
    with pytest.raises(ValueError, match="epsilon: no parameter of RobustLogistic"):
        model.set_params(epsilon=1)


X, Y = points()
BAD: list[tuple[dict[str, Any], Any, Any, str]] = [
    ({"eps": -0.1}, X, Y, "eps: -0.1 is negative"),
    ({"eps": INF}, X, Y, "eps|not finite"),
    ({"eps": "a"}, X, Y, "eps: number: cannot read"),
    ({"p": 3}, X, Y, "p: 3 is not one of 1, 2, inf"),
    ({"box": (0.2, 1)}, X, Y, "lie outside the input domain"),
    ({"box": (1, 0)}, X, Y, "lower: 1 exceeds upper: 0"),
    ({"box": 1}, X, Y, "box: 1 is not a pair"),
    ({"box": (np.zeros(3), 1)}, X, Y, "box"),
    ({"l2": -1}, X, Y, "l2: -1 is negative"),
    ({"l2": math.nan}, X, Y, "l2: nan"),
    ({"tol": 0}, X, Y, "tol: 0 is not positive"),
    ({"max_iter": 0}, X, Y, "max_iter: 0"),
    ({}, np.where(X > 0.99, np.nan, X), Y, "X: input contains NaN"),
    ({}, X[:, 0], Y, "X: expected 2D array"),
    ({}, X[:0], Y[:0], "0 sample"),
    ({}, X, Y[:-1], "y: shape"),
    ({}, X, Y * 0, "y: one class only"),
    ({}, X, Y + 0.5, "Unknown label type: continuous"),
    ({}, X, np.where(Y, np.nan, 0.0), "y: input contains NaN"),
]


@pytest.mark.parametrize(("settings", "x", "y", "message"), BAD, ids=[b[3] for b in BAD])
def test_bad_input_is_named(settings: dict[str, Any], x: Any, y: Any, message: str) -> None:
    with pytest.raises((DataError, ValueError), match=message):
        RobustLogisticRegression(**settings).fit(x, y)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_values_beyond_float64_end_in_an_error() -> None:
    with pytest.raises(SolverError, match="rescale the features"):
        RobustLogisticRegression(0.1).fit(X * 1e200, Y)


def test_labels_outside_the_classes_are_refused() -> None:
    model = RobustLogisticRegression().fit(X, Y)
    with pytest.raises(DataError, match=r"y: labels \[2\] are not among the classes seen in fit"):
        model.robust_score(X, Y + 1)
    with pytest.raises(DataError, match="box"):
        NormRegularisedLogisticRegression(box=(0, 1)).fit(X, Y)
