"""Models that torch cannot differentiate, as the callables that black-box attacks query."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from calipers.errors import ModelError


def from_numpy(function: Callable[[Any], Any]) -> Callable[[Tensor], Tensor]:
    """A function of NumPy arrays, (B, *x) to (B, K), as a model: same values, no gradient.

    It gets an array of its own, so it may change it, and outputs come back on the device of the inputs.
    For an ONNX file in onnxruntime see `calipers.session`, which is such a model already.

    Raises:
        ModelError: when called, if the outputs are not a (B, K) array of floating point.
    """

    def model(x: Tensor) -> Tensor:
        y = np.asarray(function(x.detach().cpu().numpy().copy()))
        if y.ndim != 2 or len(y) != len(x) or not np.issubdtype(y.dtype, np.floating):
            raise ModelError(
                f"model: {len(x)} examples gave outputs of shape {y.shape} and type {y.dtype}; "
                "expected one row of floating-point outputs per example"
            )
        return torch.from_numpy(np.ascontiguousarray(y)).to(x.device)

    return model
