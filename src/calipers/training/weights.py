"""What a training does to weights besides the gradient step: L1, averages, adversarial perturbations."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def matrices(module: nn.Module) -> list[nn.Parameter]:
    """The weights of linear maps and convolutions: neither biases nor what normalisation layers scale by."""
    return [p for p in module.parameters() if p.ndim >= 2]


def l1(module: nn.Module) -> Tensor:
    """Σ |W| over `matrices`."""
    return torch.stack([p.abs().sum() for p in matrices(module)]).sum()


def average(into: dict[str, Tensor], module: nn.Module, decay: float) -> None:
    """``into`` ← decay·into + (1 − decay)·parameters, in place; buffers are copied."""
    parameters = dict(module.named_parameters())
    with torch.no_grad():
        for name, value in module.state_dict().items():
            if name in parameters:
                into[name].lerp_(value, 1 - decay)
            else:
                into[name].copy_(value)


def copied(module: nn.Module) -> dict[str, Tensor]:
    """The module's state, in tensors of its own."""
    return {k: v.detach().clone() for k, v in module.state_dict().items()}


@contextmanager
def holding(module: nn.Module, state: dict[str, Tensor] | None) -> Iterator[None]:
    """The module with ``state`` in it, and with its own again afterwards; None: as it is."""
    if state is None:
        yield
        return
    own = copied(module)
    try:
        module.load_state_dict(state)
        yield
    finally:
        module.load_state_dict(own)


@contextmanager
def perturbed(module: nn.Module, gamma: float) -> Iterator[None]:
    """The module with each matrix W moved uphill by gamma·‖W‖·G/‖G‖, G its gradient; and back, bit for bit.

    Reference: Wu et al. 2020 (AWP), eq. 10.
    """
    own = [(p, p.detach().clone()) for p in matrices(module)]
    try:
        with torch.no_grad():
            for p, _ in own:
                if p.grad is not None:
                    norm = p.grad.norm()
                    if norm > 0:
                        p.add_(p.grad * (gamma * p.norm() / norm))
        yield
    finally:
        with torch.no_grad():
            for p, value in own:
                p.copy_(value)
