"""Initial weights under which intervals keep their width."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@torch.no_grad()
def ibp_initialise(module: nn.Module, *, generator: torch.Generator | None = None) -> None:
    """Draw every weight but the last layer's from N(0, 2π/fan_in²): the expected width of intervals then stays the same
    from one pre-activation to the next.

    Half of the width passes a ReLU, and fan_in·E|w| = 2. Biases and normalisation stay as they are. "Last" is by
    order of the module's layers.

    Reference: Shi et al. 2021, section 3.2.
    """
    weights: list[Tensor] = [
        layer.weight for layer in module.modules() if isinstance(layer, LAYERS)
    ]
    for weight in weights[:-1]:
        fan_in = weight[0].numel()
        weight.normal_(0.0, math.sqrt(2 * math.pi) / fan_in, generator=generator)
