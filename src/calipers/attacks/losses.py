"""What an attack maximises: a function of the specification's values, one number per example.

All are exact for labels (values y_label − y_j) and well defined for any conjunction of clauses. Sums over a batch
of them have per-example gradients, so that nothing depends on the batch size.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from calipers.errors import unknown_name
from calipers.spec import Spec

Loss = Callable[[Tensor, Spec], Tensor]


def margin_loss(values: Tensor, spec: Spec) -> Tensor:
    """−margin: positive exactly where the specification fails. Its gradient does not depend on the scale of
    the loss, and it may be negative, so a search for its maximum must start at −inf."""
    return -spec.margin(values)


def cross_entropy(values: Tensor, spec: Spec) -> Tensor:
    """log(1 + Σ exp(−value)) over clauses: for labels exactly logsumexp(y) − y_label."""
    return F.softplus(torch.logsumexp(-_clauses(values, spec), -1))


def _clauses(values: Tensor, spec: Spec) -> Tensor:
    """The value of each clause (its maximum)."""
    if spec.simple:
        return values
    count = int(spec.clause.max()) + 1
    start = values.new_full((*values.shape[:-1], count), -torch.inf)
    return start.scatter_reduce(-1, spec.clause.expand_as(values), values, "amax")


LOSSES: dict[str, Loss] = {"margin": margin_loss, "cross_entropy": cross_entropy}


def value_gradient(loss: Loss, values: Tensor, spec: Spec) -> Tensor:
    """The derivative of each example's loss with respect to its values, (B, M): closed form where there is one."""
    if spec.simple and loss in _GRADIENTS:
        return _GRADIENTS[loss](values)
    with torch.enable_grad():
        leaf = values.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(leaf, spec).sum(), leaf)
    return gradient


def _lowest(values: Tensor) -> Tensor:
    lowest = values.argmin(-1, keepdim=True)
    return torch.zeros_like(values).scatter_(-1, lowest, -1.0)


# For labels: minus the rival's weight; for cross-entropy that is its probability.
_GRADIENTS: dict[Loss, Callable[[Tensor], Tensor]] = {
    margin_loss: _lowest,
    cross_entropy: lambda values: -torch.softmax(F.pad(-values, (1, 0)), -1)[..., 1:],
}


def loss_named(loss: str | Loss) -> Loss:
    """A loss by name or itself.

    Raises:
        ValueError: unknown name; the nearest one is suggested.
    """
    if callable(loss):
        return loss
    if loss not in LOSSES:
        raise unknown_name("loss", loss, LOSSES)
    return LOSSES[loss]
