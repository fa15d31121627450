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
    # softplus is linear beyond its threshold; at torch's 20 that would cost float64 half of its digits
    return F.softplus(torch.logsumexp(-spec.clauses(values), -1), threshold=40.0)


LOSSES: dict[str, Loss] = {"margin": margin_loss, "cross_entropy": cross_entropy}


def output_gradient(loss: Loss, y: Tensor, spec: Spec) -> Tensor:
    """The derivative of each example's loss with respect to its outputs ``y``, (B, K); a closed form for labels."""
    if spec.of_label is not None and loss in _OF_LABEL:
        return _OF_LABEL[loss](y, spec.of_label.unsqueeze(1))
    with torch.enable_grad():
        leaf = y.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(spec.values(leaf), spec).sum(), leaf)
    return gradient


def _cross_entropy_gradient(y: Tensor, label: Tensor) -> Tensor:
    """The label's entry is minus the sum of the others: probability − 1 is 0 in float32 from margins of 17 on."""
    weights = (
        y - y.amax(1, keepdim=True)
    ).exp_()  # for a few classes far quicker than torch.softmax
    others = weights.div_(weights.sum(1, keepdim=True)).scatter_(1, label, 0.0)
    return others.scatter_(1, label, -others.sum(1, keepdim=True))


def _margin_gradient(y: Tensor, label: Tensor) -> Tensor:
    rival = y.scatter(1, label, -torch.inf).argmax(1, keepdim=True)
    one = y.new_ones((1, 1)).expand_as(label)
    return torch.zeros_like(y).scatter_(1, rival, one).scatter_(1, label, -one)


_OF_LABEL: dict[Loss, Callable[[Tensor, Tensor], Tensor]] = {
    cross_entropy: _cross_entropy_gradient,
    margin_loss: _margin_gradient,
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
