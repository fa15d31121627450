"""Linear classifiers trained against the exact worst case, with scikit-learn's conventions.

For two classes the inner maximum of the min-max problem has a closed form and the outer minimum is convex, so `fit`
ends at the global optimum and proves it: ``lower_ <= the optimum <= loss_ <= lower_ + gap_``.

    model = RobustLogisticRegression(eps=0.2).fit(X, y)
    model.robust_score(X_test, y_test)    # exact: the share that no change of the set can break
"""

from __future__ import annotations

import logging
import math
from typing import Any, Self

import numpy as np
import torch
from torch import nn

from calipers.errors import DataError
from calipers.rounding import Number, exact
from calipers.sets import NORMS, ThreatModel
from calipers.training import linear_bounds, linear_multiclass
from calipers.training.conventions import Estimator, InputError, labels
from calipers.training.linear_losses import HINGE, LOGISTIC, Array, Loss
from calipers.training.linear_sets import Adversary, Ball, Boxed, Intervals
from calipers.training.linear_solver import Problem, Solution, minimise

__all__ = [
    "NormRegularisedLogisticRegression",
    "RobustLogisticRegression",
    "RobustSVM",
    "RobustlySeparable",
]

_log = logging.getLogger(__name__)


class RobustlySeparable(DataError):
    """A linear model classifies every example right under every allowed change, so the logistic loss has no minimiser.

    ``coef`` and ``intercept`` are such a model, ``margin`` > 0 its least robust margin, rounding subtracted: the proof.
    """

    def __init__(self, coef: Array, intercept: float, margin: float) -> None:
        self.coef, self.intercept, self.margin = coef, intercept, margin
        super().__init__(
            f"the data are robustly separable (the model in .coef and .intercept has robust margins of {margin:.3g} "
            "or more on all examples), so scaling a model up drives the loss to 0 and no minimiser exists; set a "
            "ridge (l2=1e-3), or use RobustSVM, whose minimum is attained"
        )

    def __reduce__(self) -> tuple[type[RobustlySeparable], tuple[Array, float, float]]:
        return type(self), (self.coef, self.intercept, self.margin)


class _RobustLinear(Estimator):
    """A linear classifier that minimises the mean worst-case loss over ``{x' : ‖x' − x‖_p ≤ eps}``, within ``box``.

    Two classes: the loss is exact, and fitted to its global minimum with a proof. More classes: the cross-entropy is
    replaced by its upper bound of `calipers.training.linear_multiclass`, which leaves the box aside (a larger set) and
    has its ridge on W and b; it is certified where ``l2`` > 0.

    Args:
        eps: radius in input units; a ``str`` or ``Fraction`` keeps its exact value.
        p: norm of the changes: 1, 2 or ``math.inf``.
        box: (lower, upper) of the input domain, numbers or one per feature; None: no limits.
        l2: ridge, l2/2·‖w‖².
        fit_intercept: whether there is a constant term, which is not regularised.
        tol: the gap at which to stop.
        max_iter: Newton steps.

    Attributes of a fitted model: ``coef_`` (1, d) or (K, d), ``intercept_``, ``classes_``, ``loss_`` (of the training
    data, rounded up), ``lower_`` (no model is below), ``gap_``, ``certified_`` (gap_ <= tol), ``n_iter_``.

    Raises:
        ValueError: a parameter is out of range.
        DataError: data are malformed, lie outside the box, or (`RobustlySeparable`) have no minimiser.
    """

    _loss: Loss = LOGISTIC
    _inside = True

    def __init__(
        self,
        eps: Number = 0.1,
        p: float = math.inf,
        box: tuple[Any, Any] | None = None,
        l2: float = 0.0,
        fit_intercept: bool = True,
        tol: float = 1e-6,
        max_iter: int = 300,
    ) -> None:
        self.eps, self.p, self.box, self.l2 = eps, p, box, l2
        self.fit_intercept, self.tol, self.max_iter = fit_intercept, tol, max_iter

    # -- training ----------------------------------------------------------------------------------

    def fit(self, X: Any, y: Any) -> Self:
        """Train to the certified optimum; X an array or a scipy.sparse matrix (n, d), y one label per example.

        Cost: 20 to 60 Newton steps for p = inf and for p = 2 or 1 without a box, each a product of (d, n) and (n, d).
        """
        threat = self._threat()
        self._check_numbers()
        x = self._inputs(X, fit=True)
        self.classes_, index = labels(y, x.shape[0])
        if len(self.classes_) > 2:
            self._fit_many(x, index, threat)
        else:
            self._fit_two(x, np.where(index == 1, 1.0, -1.0), threat)
        self.certified_ = bool(self.gap_ <= self.tol)
        if not self.certified_:
            _log.warning(
                "%s: gap %.2g after %d steps exceeds tol %g; the model is not proved optimal",
                type(self).__name__, self.gap_, self.n_iter_, self.tol,
            )  # fmt: skip
        return self

    def _fit_two(self, x: Any, y: Array, threat: ThreatModel) -> None:
        kept = _varying(x) if self.fit_intercept else np.ones(x.shape[1], dtype=bool)
        self.coef_, self.intercept_ = np.zeros((1, x.shape[1])), np.zeros(1)
        adversary = self._adversary(x, y, threat, kept)
        problem = Problem(adversary, self._loss, float(self.p), self.l2, self.fit_intercept)
        found = minimise(problem, tol=self.tol, steps=self.max_iter)
        if found.separates:
            self._refuse(problem, found, kept)
        self.coef_[0, kept], self.intercept_[0] = found.w, found.b
        self.loss_, self.lower_, self.gap_ = found.certificate
        self.n_iter_ = found.steps

    def _adversary(self, x: Any, y: Array, threat: ThreatModel, kept: Array) -> Adversary:
        """The adversary on the features that vary; a constant one is part of the intercept and could only do harm."""
        if self.box is None:
            return Ball(x[:, kept], y, threat, inside=self._inside)
        if not self._inside:
            raise InputError(
                f"box: {self.box!r}; the norm as a regulariser knows no box, so give None"
            )
        sides = [_restricted(side, kept) for side in _sides(self.box)]
        kind = Intervals if threat.p == math.inf else Boxed
        return kind(x[:, kept], y, ThreatModel(threat.p, threat.eps, sides[0], sides[1]))

    def _refuse(self, problem: Problem, found: Solution, kept: Array) -> None:
        margin, error, _ = problem.adversary.exact(found.w, found.b)
        coef = np.zeros(len(kept))
        coef[kept] = found.w
        del self.coef_, self.intercept_
        raise RobustlySeparable(coef, found.b, float((margin - error).min()))

    def _fit_many(self, x: Any, index: Array, threat: ThreatModel) -> None:
        if not self._inside:
            raise InputError(
                f"y: {len(self.classes_)} classes. Only binary classification is supported by the norm as a regulariser"
            )
        found = linear_multiclass.fit(
            x, index, len(self.classes_), threat, l2=self.l2, hinge=self._loss is HINGE,
            intercept=self.fit_intercept, tol=self.tol, steps=self.max_iter,
        )  # fmt: skip
        self.coef_, self.intercept_ = found.coef, found.intercept
        self.loss_, self.lower_, self.gap_ = found.certificate
        self.n_iter_ = found.steps

    def _threat(self) -> ThreatModel:
        if self.p not in NORMS:
            raise ValueError(f"p: {self.p!r} is not one of 1, 2, inf")
        return ThreatModel(float(self.p), self.eps, *_sides(self.box))

    def _check_numbers(self) -> None:
        if not exact(self.eps) < 10**100:
            raise ValueError(f"eps: {self.eps!r} is not a radius")
        if not (0 <= self.l2 < math.inf):
            raise ValueError(f"l2: {self.l2!r} is negative or no number; 0 for no ridge")
        if not self.tol > 0:
            raise ValueError(f"tol: {self.tol!r} is not positive")
        if not self.max_iter >= 1:
            raise ValueError(f"max_iter: {self.max_iter!r} is less than one step")

    # -- prediction --------------------------------------------------------------------------------

    def decision_function(self, X: Any) -> Array:
        """Scores: w·x + b (n,) of two classes, positive for ``classes_[1]``; (n, K) of more."""
        self._fitted()
        scores: Array = np.asarray(self._inputs(X) @ self.coef_.T) + self.intercept_
        return scores[:, 0] if len(self.classes_) == 2 else scores

    def predict(self, X: Any) -> Array:
        """The class of the largest score."""
        scores = self.decision_function(X)
        best: Array = self.classes_[
            (scores > 0).astype(int) if scores.ndim == 1 else scores.argmax(1)
        ]
        return best

    def score(self, X: Any, y: Any, sample_weight: Any = None) -> float:
        """The share of examples classified right."""
        return float(np.average(self.predict(X) == np.asarray(y), weights=sample_weight))

    # -- the adversary -----------------------------------------------------------------------------

    def robust_margins(self, X: Any, y: Any) -> Array:
        """The least margin of each example over all allowed changes, exact up to float64 rounding: (n,)."""
        x, index = self._labelled(X, y)
        least: Array = self._rivals(x, index).min(1)
        return least

    def robust_score(self, X: Any, y: Any) -> float:
        """The share of examples that no allowed change breaks, exactly, of any number of classes; a tie is a break."""
        return float((self.robust_margins(X, y) > 0).mean())

    def robust_loss(self, X: Any, y: Any) -> float:
        """The mean worst-case loss without the ridge: exact for two classes and for the hinge, else from above."""
        x, index = self._labelled(X, y)
        found = self._rivals(x, index)
        if self._loss is HINGE:
            return float(np.maximum(0.0, 1.0 - found).max(1).mean())
        return float(
            np.logaddexp.reduce(np.column_stack([-found, np.zeros(len(found))]), axis=1).mean()
        )

    def perturb(self, X: Any, y: Any) -> Array:
        """For each example the allowed point of the least margin: a member of its set, (n, d) float64.

        Exact for two classes and for the hinge; of more classes it is the worst point against the most dangerous rival.
        """
        x, index = self._labelled(X, y)
        rival = self._rivals(x, index).argmin(1)
        return linear_bounds.worst(x, index, rival, self._rows()[0], self._threat())

    def to_module(self, dtype: torch.dtype = torch.float32) -> nn.Linear:
        """The model as ``nn.Linear``, one output per class in the order of ``classes_``, rounded to ``dtype``."""
        self._fitted()
        return linear_bounds.module(self.coef_, self.intercept_, dtype)

    def _rows(self) -> tuple[Array, Array]:
        """Weights and constants of one score per class."""
        if len(self.classes_) > 2:
            return self.coef_, self.intercept_
        zero = np.zeros_like(self.coef_)
        return np.concatenate([zero, self.coef_]), np.concatenate([[0.0], self.intercept_])

    def _rivals(self, x: Any, index: Array) -> Array:
        return linear_bounds.margins(x, index, *self._rows(), self._threat())

    def _labelled(self, X: Any, y: Any) -> tuple[Any, Array]:
        self._fitted()
        x, y = self._inputs(X), np.asarray(y)
        if y.shape != (x.shape[0],):
            raise InputError(f"y: shape {y.shape}; expected one label per example, ({x.shape[0]},)")
        strange = sorted(set(y.tolist()) - set(self.classes_.tolist()), key=str)
        if strange:
            raise InputError(
                f"y: labels {strange[:5]} are not among the classes seen in fit, {self.classes_.tolist()}"
            )
        return x, np.searchsorted(self.classes_, y)


class RobustLogisticRegression(_RobustLinear):
    """Logistic regression against the worst change: minimises the mean of log(1 + exp(−m)), m the robust margin."""

    __doc__ += (_RobustLinear.__doc__ or "").partition("\n")[2]

    def predict_proba(self, X: Any) -> Array:
        """Probabilities of the classes at the given points, (n, K)."""
        scores = self.decision_function(X)
        if scores.ndim == 1:
            scores = np.column_stack([np.zeros(len(scores)), scores])
        log = scores - np.logaddexp.reduce(scores, axis=1, keepdims=True)
        return np.asarray(np.exp(log))


class RobustSVM(_RobustLinear):
    """The soft-margin SVM against the worst change: minimises the mean of max(0, 1 − m), m the robust margin."""

    __doc__ += (_RobustLinear.__doc__ or "").partition("\n")[2]
    _loss = HINGE


class NormRegularisedLogisticRegression(RobustLogisticRegression):
    """A look-alike of the robust problem, for contrast: mean log(1 + exp(−y(w·x + b))) + eps·‖w‖_q, the norm *outside*.

    It is not robust training: the penalty acts on every example alike, where the robust loss scales it by how much an
    example counts, Σ s/n < 1. Two classes, no box. `robust_score` and the rest speak of the same changes as elsewhere.
    """

    _inside = _many_classes = False


def _sides(box: tuple[Any, Any] | None) -> list[Any]:
    """The domain's two ends as `ThreatModel` takes them."""
    if box is None:
        return [-math.inf, math.inf]
    try:
        ends = list(box)
    except TypeError:
        ends = []
    if len(ends) != 2:
        raise ValueError(f"box: {box!r} is not a pair (lower, upper)")
    return [torch.as_tensor(e) if isinstance(e, np.ndarray | list | tuple) else e for e in ends]


def _restricted(side: Any, kept: Array) -> Any:
    """An end of the domain on the features kept."""
    if not isinstance(side, torch.Tensor) or side.ndim == 0:
        return side
    if side.shape != kept.shape:
        raise InputError(
            f"box: a bound of shape {tuple(side.shape)} for {len(kept)} features; give a number or one per feature"
        )
    return side[torch.from_numpy(kept)]


def _varying(x: Any) -> Array:
    """Which features take more than one value."""
    low, high = x.min(axis=0), x.max(axis=0)
    if not isinstance(x, np.ndarray):
        low, high = low.toarray().ravel(), high.toarray().ravel()
    varying: Array = np.asarray(low < high)
    return varying
