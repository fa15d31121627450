"""What a model must return for an attack to mean anything: one `ModelError` each, with a remedy."""

from __future__ import annotations

from torch import Tensor

from calipers.errors import ModelError
from calipers.spec import Spec


def outputs_of(y: object, spec: Spec, count: int) -> Tensor:
    """``y`` itself, if it is a row of floating-point outputs for each of ``count`` examples.

    Raises:
        ModelError: it is no tensor, or has another shape or type than the specification needs.
    """
    if not isinstance(y, Tensor):
        raise ModelError(
            f"model: returns {type(y).__name__}, not a tensor; wrap it so that it returns its logits alone"
        )
    wanted = (count, spec.C.shape[2])
    if tuple(y.shape) != wanted or not y.is_floating_point():
        raise ModelError(
            f"model: outputs of shape {tuple(y.shape)} and type {y.dtype}; the specification needs floating point of "
            f"shape {wanted}, a row of {wanted[1]} for each example"
        )
    return y


def differentiable(y: Tensor) -> Tensor:
    """``y`` itself, if torch can differentiate it in the inputs.

    Raises:
        ModelError: it cannot; attacks without gradients are named.
    """
    if y.requires_grad:
        return y
    raise ModelError(
        "model: its outputs have no gradient (detached, computed outside torch, or piecewise constant); use "
        "calipers.square, which needs none, or calipers.straight_through around the step that has none"
    )
