"""Whether points that break one model break another one too."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from calipers.bracket import require_eval
from calipers.errors import DataError
from calipers.evaluate.checks import batches
from calipers.spec import Spec


@dataclass(frozen=True, eq=False)
class Transfer:
    """A model on points that were made for another one.

    Args:
        right: whether the model is right at each point, (N,) bool; a tie is an error, and so are NaN outputs.
        clean: the same at the examples that the points came from, if they were given.
    """

    right: Tensor
    clean: Tensor | None = None

    @property
    def accuracy(self) -> float:
        """The share of points at which the model is right."""
        return _mean(self.right)

    @property
    def clean_accuracy(self) -> float | None:
        """The share of the clean examples at which it is right."""
        return None if self.clean is None else _mean(self.clean)

    @property
    def eligible(self) -> int:
        """How many examples could transfer: those whose clean example the model gets right (all if not given)."""
        return len(self.right) if self.clean is None else int(self.clean.sum())

    @property
    def fooled(self) -> Tensor:
        """Which of those the model gets wrong at the point, (N,) bool."""
        return ~self.right if self.clean is None else ~self.right & self.clean

    @property
    def transferred(self) -> int:
        """How many that are."""
        return int(self.fooled.sum())

    def json(self) -> dict[str, Any]:
        """The result as plain values."""
        return {
            "n": len(self.right),
            "accuracy": self.accuracy,
            "clean_accuracy": self.clean_accuracy,
            "eligible": self.eligible,
            "transferred": self.transferred,
        }


def transfer(
    points: Tensor,
    y: Tensor,
    model: Callable[[Tensor], Tensor],
    *,
    clean: Tensor | None = None,
) -> Transfer:
    """``model``'s accuracy at ``points`` (N, *x) with labels ``y`` (N,), which need not be in any set around anything.

    Args:
        clean: the examples the points came from, (N, *x).

    Raises:
        DataError: lengths or shapes differ.
        ModelError: normalisation or dropout is in training mode.
        ValueError: labels that the model's outputs do not have.
    """
    require_eval(model)
    if len(y) != len(points) or (clean is not None and clean.shape != points.shape):
        raise DataError(
            f"transfer: points {tuple(points.shape)}, y {tuple(y.shape)}"
            + ("" if clean is None else f", clean {tuple(clean.shape)}")
            + " do not fit each other"
        )
    return Transfer(_right(model, points, y), None if clean is None else _right(model, clean, y))


@torch.no_grad()
def _right(model: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> Tensor:
    found = [torch.zeros(0, dtype=torch.bool)]
    for points, labels in zip(batches(x), batches(y), strict=True):
        outputs = model(points)
        margin = Spec.label(labels.to(outputs.device), outputs.shape[-1]).margin_at(outputs)
        found.append(((margin > 0) & torch.isfinite(outputs).all(-1)).cpu())
    return torch.cat(found)


def _mean(flags: Tensor) -> float:
    return flags.double().mean().item() if len(flags) else 1.0
