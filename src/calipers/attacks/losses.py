"""What an attack maximises: a function of the specification's values, one number per example.

All are exact for labels (values y_label − y_j) and well defined for any conjunction of clauses. Each looks at all
clauses, or drives towards breaking one of them, the *target* (for labels: towards one rival). Sums over a batch
of them have per-example gradients, so that nothing depends on the batch size.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from calipers.errors import unknown_name
from calipers.spec import Spec

Loss = Callable[..., Tensor]  # (values, spec) or (values, spec, target) -> (B,)
logger = logging.getLogger(__name__)


def margin_loss(values: Tensor, spec: Spec, target: Tensor | None = None) -> Tensor:
    """−margin: positive exactly where the specification fails. Its gradient does not depend on the scale of
    the loss, and it may be negative, so a search for its maximum must start at −inf."""
    clauses = spec.clauses(values)
    return -(clauses.amin(-1) if target is None else _at(clauses, target))


def cross_entropy(values: Tensor, spec: Spec, target: Tensor | None = None) -> Tensor:
    """log(1 + Σ exp(−value)) over clauses: for labels exactly logsumexp(y) − y_label; with a target the log
    probability of that class, y_target − logsumexp(y)."""
    clauses = spec.clauses(values)
    # softplus is linear beyond its threshold; at torch's 20 that would cost float64 half of its digits
    loss = F.softplus(torch.logsumexp(-clauses, -1), threshold=40.0)
    return loss if target is None else -_at(clauses, target) - loss


def shortfall(values: Tensor, spec: Spec, target: Tensor | None = None) -> Tensor:
    """Minus what a clause lacks of being broken, the sum of its positive values: the nearest clause, or the target.

    A conjunction of many functionals moves along all that are missing, not only the worst. Never positive: 0 where
    the clause is broken.
    """
    lacking = lacks(values, spec)
    return -(lacking.amin(-1) if target is None else _at(lacking, target))


def lacks(values: Tensor, spec: Spec) -> Tensor:
    """What each clause lacks of being broken, the sum of its positive values: (..., M) to (..., clauses)."""
    zero = values.new_zeros((*values.shape[:-1], spec.count))
    return zero.scatter_add(-1, spec.clause.expand_as(values), values.clamp_min(0.0))


def dlr(values: Tensor, spec: Spec, target: Tensor | None = None) -> Tensor:
    """The difference of logits ratio: −margin over the spread of the largest logits, the same at any scale.

    With z the logits in falling order, −margin / (z1 − z3), or −value_target / (z1 − (z3 + z4) / 2). It needs three
    classes, with a target four; `suited` falls back to the margin below that. Where the spread is 0 so is the gradient.

    Reference: Croce and Hein 2020, eq. 6 and 7.
    """
    clauses = spec.clauses(values)
    logits = F.pad(-clauses, (1, 0))  # relative to the label's
    z = logits.topk(3 if target is None else 4, -1).values
    spread = z[..., 0] - (z[..., 2] if target is None else (z[..., 2] + z[..., 3]) / 2)
    gap = clauses.amin(-1) if target is None else _at(clauses, target)
    return -gap / spread.clamp_min(torch.finfo(values.dtype).tiny)


def _at(clauses: Tensor, target: Tensor) -> Tensor:
    return clauses.gather(-1, target.unsqueeze(-1)).squeeze(-1)


LOSSES: dict[str, Loss] = {
    "margin": margin_loss,
    "cross_entropy": cross_entropy,
    "dlr": dlr,
    "shortfall": shortfall,
}

# Losses that are defined from so many clauses on: without and with a target.
FEWEST: dict[Loss, tuple[int, int]] = {dlr: (2, 3)}


def suited(loss: str | Loss, spec: Spec, *, targeted: bool = False) -> Loss:
    """The loss itself, or the margin where it is not defined for so few clauses, which is logged.

    Raises:
        ValueError: unknown name; the nearest one is suggested.
    """
    named = loss_named(loss)
    fewest = FEWEST.get(named, (1, 1))[targeted]
    if spec.count >= fewest:
        return named
    logger.warning(
        "loss %s needs %d classes%s, the specification has %d: the margin is used instead",
        getattr(named, "__name__", named), fewest + 1, " with a target" if targeted else "", spec.count + 1,
    )  # fmt: skip
    return margin_loss


class Reading(NamedTuple):
    """What outputs say: the loss's derivative with respect to them (B, K), the margin and the loss (B,).

    The last two are functions, since not every attack asks.
    """

    toward: Tensor
    margin: Callable[[], Tensor]
    loss: Callable[[], Tensor]


def read(loss: Loss, y: Tensor, spec: Spec, target: Tensor | None = None) -> Reading:
    """Output gradient, margin and loss of outputs ``y`` (B, K); closed forms where they are known.

    Between two passes of a network every small call costs several microseconds, so there are few.
    """
    if spec.of_label is not None and loss in _OF_LABEL:
        label = spec.of_label.unsqueeze(1)
        if target is not None:
            target = target.unsqueeze(1)
            target = target + (target >= label)  # the clause's class
        return _OF_LABEL[loss](y, label, target)
    with torch.enable_grad():
        leaf = y.detach().requires_grad_()
        values = spec.values(leaf)
        each = loss(values, spec) if target is None else loss(values, spec, target)
        (toward,) = torch.autograd.grad(each.sum(), leaf)
    return Reading(toward, lambda: spec.margin(values.detach()), each.detach)


def output_gradient(loss: Loss, y: Tensor, spec: Spec) -> Tensor:
    """The derivative of each example's loss with respect to its outputs ``y``, (B, K)."""
    return read(loss, y, spec).toward


def _cross_entropy(y: Tensor, label: Tensor, target: Tensor | None) -> Reading:
    """The label's entry is minus the sum of the others: probability − 1 is 0 in float32 from margins of 17 on."""
    toward = torch.softmax(y, 1)
    if target is None:
        toward.scatter_(1, label, 0.0)
        toward.scatter_(1, label, -toward.sum(1, keepdim=True))
    else:
        toward.neg_().scatter_(1, target, 0.0)
        toward.scatter_(1, target, -toward.sum(1, keepdim=True))

    def margin() -> Tensor:
        return (y.gather(1, label) - _rivals(y, label).amax(1, keepdim=True)).squeeze(1)

    def value() -> Tensor:
        own = y.gather(1, label)
        rivals = torch.logsumexp(_rivals(y, label), 1, keepdim=True)
        loss = F.softplus(rivals - own, threshold=40.0)
        return (loss if target is None else y.gather(1, target) - own - loss).squeeze(1)

    return Reading(toward, margin, value)


def _rivals(y: Tensor, label: Tensor) -> Tensor:
    return y.scatter(1, label, -torch.inf)


def _margin(y: Tensor, label: Tensor, target: Tensor | None) -> Reading:
    top, rival = _rivals(y, label).max(1, keepdim=True)
    own = y.gather(1, label)
    toward = torch.zeros_like(y).scatter_(1, rival if target is None else target, 1.0)
    toward.scatter_(1, label, -1.0)

    def margin() -> Tensor:
        return (own - top).squeeze(1)

    if target is None:
        return Reading(toward, margin, lambda: (top - own).squeeze(1))
    return Reading(toward, margin, lambda: (y.gather(1, target) - own).squeeze(1))


_OF_LABEL: dict[Loss, Callable[[Tensor, Tensor, Tensor | None], Reading]] = {
    cross_entropy: _cross_entropy,
    margin_loss: _margin,
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
