"""Gradients against finite differences."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def check_gradients(
    function: Callable[..., Tensor],
    given: Sequence[Tensor],
    gradients: Sequence[Tensor],
    what: object = "",
) -> None:
    """Along a random direction in each of ``given``: all entries at once, and steps that rarely meet a kink."""
    generator = torch.Generator().manual_seed(1)
    for i, gradient in enumerate(gradients):
        direction = torch.randn(given[i].shape, generator=generator, dtype=torch.float64)
        errors = []
        for step in (1e-5, 1e-6, 1e-7):
            ends = []
            for sign in (1, -1):
                moved = [v.clone() for v in given]
                moved[i] += sign * step * direction
                with torch.no_grad():
                    ends.append(function(*moved))
            slope = (ends[0] - ends[1]).item() / (2 * step)
            errors.append(abs(slope - (gradient * direction).sum().item()) / (1 + abs(slope)))
            if errors[-1] <= 1e-6:
                break  # the others are for where this one met a kink
        assert min(errors) <= 1e-6, (what, i, errors)
