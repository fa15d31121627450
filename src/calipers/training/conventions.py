"""scikit-learn's conventions for estimators, kept without needing scikit-learn."""

from __future__ import annotations

import inspect
import sys
from typing import Any, Self

import numpy as np

from calipers.errors import DataError
from calipers.training.linear_losses import Array


class InputError(DataError, ValueError):
    """Data that an estimator cannot use: a `DataError` here, the ``ValueError`` that scikit-learn's tools expect."""


class NotFitted(InputError, AttributeError):
    """A method that needs `fit` was called before it."""


class Estimator:
    """A classifier whose parameters are its constructor's arguments, stored under their names, checked in `fit`."""

    _estimator_type = "classifier"
    _many_classes = True

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """The constructor's arguments."""
        del deep  # no parameter is an estimator
        names = [n for n in inspect.signature(type(self).__init__).parameters if n != "self"]
        return {name: getattr(self, name) for name in names}

    def set_params(self, **params: Any) -> Self:
        """Change constructor arguments; returns the estimator.

        Raises:
            ValueError: an unknown name.
        """
        known = self.get_params()
        for name, value in params.items():
            if name not in known:
                raise ValueError(
                    f"{name}: no parameter of {type(self).__name__}; known: {', '.join(known)}"
                )
            setattr(self, name, value)
        return self

    def __repr__(self) -> str:
        given = ", ".join(f"{k}={v!r}" for k, v in self.get_params().items())
        return f"{type(self).__name__}({given})"

    def __sklearn_tags__(self) -> Any:
        from sklearn.utils import ClassifierTags, InputTags, Tags, TargetTags

        many = self._many_classes
        return Tags(
            estimator_type="classifier",
            target_tags=TargetTags(required=True),
            classifier_tags=ClassifierTags(multi_class=many),
            input_tags=InputTags(sparse=True),
        )

    def _fitted(self) -> None:
        if not hasattr(self, "coef_"):
            raise _not_fitted()(f"{type(self).__name__} is not fitted yet; call fit(X, y) first")

    def _inputs(self, x: Any, *, fit: bool = False) -> Any:
        """Examples as finite float64, an array or a CSR matrix, of as many features as `fit` saw.

        Raises:
            InputError: the message says what is wrong with them.
        """
        sparse = hasattr(x, "tocsr")
        names = getattr(x, "columns", None)
        x = x.tocsr() if sparse else np.asarray(x)
        if x.dtype.kind == "c":
            raise InputError("X: Complex data not supported; give real numbers")
        try:
            x = x.astype(np.float64)
        except ValueError as error:
            raise InputError(f"X: cannot be read as numbers ({error})") from None
        if x.ndim != 2:
            raise InputError(
                f"X: expected 2D array of shape (examples, features), got shape {x.shape}. Reshape your data"
            )
        for axis, what in enumerate(("sample", "feature")):
            if not x.shape[axis]:
                raise InputError(
                    f"X: found array with 0 {what}(s) (shape={x.shape}) while a minimum of 1 is required."
                )
        if not np.isfinite(x.data if sparse else x).all():
            raise InputError("X: input contains NaN or infinity; remove or impute those values")
        if fit:
            self.n_features_in_ = x.shape[1]
            if names is not None and all(isinstance(name, str) for name in names):
                self.feature_names_in_ = np.asarray(names, dtype=object)
        elif x.shape[1] != self.n_features_in_:
            raise InputError(
                f"X has {x.shape[1]} features, but {type(self).__name__} is expecting "
                f"{self.n_features_in_} features as input"
            )
        return x


def _not_fitted() -> type[Exception]:
    """scikit-learn's own error where it is in use, for its tools tell it apart."""
    module = sys.modules.get("sklearn.exceptions")
    return (
        NotFitted if module is None else type("NotFitted", (NotFitted, module.NotFittedError), {})
    )


def labels(y: Any, count: int) -> tuple[Array, Array]:
    """The classes, and the index of each example's class.

    Raises:
        InputError: not one label per example, NaN, fractions, or fewer than two classes.
    """
    if y is None:
        raise InputError("y: requires y to be passed, but the target y is None")
    y = np.asarray(y)
    if y.ndim == 2 and y.shape[1] == 1:
        _warn_column()
        y = y[:, 0]
    if y.shape != (count,):
        raise InputError(f"y: shape {y.shape}; expected one label per example, ({count},)")
    if y.dtype.kind == "f" and not np.isfinite(y).all():
        raise InputError("y: input contains NaN or infinity")
    if y.dtype.kind == "f" and not (y == np.round(y)).all():
        raise InputError("y: Unknown label type: continuous; give class labels")
    if y.dtype == object and not all(isinstance(v, str) for v in y):
        y = np.asarray(y.tolist())
        if y.dtype.kind not in "iub":
            raise InputError("y: Unknown label type: unknown; give strings or whole numbers")
    classes, index = np.unique(y, return_inverse=True)
    if len(classes) < 2:
        raise InputError(
            f"y: one class only, {classes[0]!r}; a classifier needs examples of at least two classes"
        )
    return classes, index


def _warn_column() -> None:
    import warnings

    module = sys.modules.get("sklearn.exceptions")
    category = UserWarning if module is None else module.DataConversionWarning
    warnings.warn(
        "A column-vector y was passed when a 1d array was expected; it is flattened",
        category,
        stacklevel=4,
    )
