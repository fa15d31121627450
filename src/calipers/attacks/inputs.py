"""What a model must return for an attack to mean anything: one `ModelError` each, with a remedy."""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from torch import Tensor

from calipers.errors import ModelError
from calipers.spec import Spec


def require_pairs(spec: Spec, count: int) -> None:
    """Raises:
    ValueError: the specification is one of another number of examples than ``count``.
    """
    if len(spec) != count:
        raise ValueError(
            f"spec: {len(spec)} specifications for {count} examples; one for each is needed"
        )


def outputs_of(y: object, spec: Spec, count: int) -> Tensor:
    """``y`` itself, if it is a row of floating-point outputs for each of ``count`` examples.

    Raises:
        ModelError: it is no tensor, or has another shape or type than the specification needs.
        ValueError: as `require_pairs`.
    """
    require_pairs(spec, count)
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


NO_GRADIENT = (
    "model: its outputs have no gradient in the inputs (detached, or computed outside torch); use calipers.square, "
    "which needs none, or calipers.straight_through around the step that has none"
)


def called(model: Callable[[Tensor], object], point: Tensor) -> object:
    """What the model returns.

    Raises:
        ModelError: it does not take this dtype, or has left torch on the way.
    """
    try:
        return model(point)
    except RuntimeError as error:
        text = str(error)
        if "dtype" in text or text.startswith("Input type"):
            raise ModelError(
                f"model: does not take {point.dtype} ({text}); give the inputs, or the attack's dtype, as the model's "
                "parameters are, or convert the model (model.double())"
            ) from error
        if "requires grad" not in text:  # what NumPy conversions of such a tensor raise
            raise
        raise ModelError(NO_GRADIENT) from error


def traced(model: Callable[[Tensor], object], point: Tensor, spec: Spec) -> Tensor:
    """The model's outputs at ``point``, which requires a gradient, ready to be differentiated.

    Raises:
        ModelError: they are not what `outputs_of` asks for, or torch cannot differentiate them; the message names
            attacks that need no gradient.
        ValueError: as `require_pairs`.
    """
    require_pairs(spec, len(point))
    y = outputs_of(called(model, point), spec, len(point))
    if not y.requires_grad:
        raise ModelError(NO_GRADIENT)
    return y


def input_gradient(y: Tensor, point: Tensor, toward: Tensor) -> Tensor:
    """The derivative of ⟨toward, y⟩ with respect to ``point``.

    Raises:
        ModelError: ``y`` depends on parameters alone, or an operator has no derivative.
    """
    # torch imports sympy (0.4 s) to compare two shapes; a single number has none, but takes two operations more
    seed: tuple[Tensor, Tensor | None] = (y, toward)
    if "torch.fx.experimental.symbolic_shapes" not in sys.modules:
        with torch.enable_grad():
            seed = (torch.dot(y.reshape(-1), toward.reshape(-1)), None)
    try:
        (gradient,) = torch.autograd.grad(seed[0], point, seed[1], allow_unused=True)
    except RuntimeError as error:
        if "derivative for" not in str(error) and not isinstance(error, NotImplementedError):
            raise
        raise ModelError(f"{NO_GRADIENT}: {error}") from error
    if gradient is None:
        raise ModelError(NO_GRADIENT)
    return gradient
