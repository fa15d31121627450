"""Robust linear models of many classes: a convex upper bound on the worst loss, minimised; with a ridge, certified.

With margins against each rival m_j = (w_y − w_j)·x + b_y − b_j − eps·‖w_y − w_j‖_q, each exact on its own,

- the worst cross-entropy is at most log(1 + Σ exp(−m_j)): the rivals may have different worst points, so this is a
  bound, equal where one rival matters;
- the worst multi-class hinge max_j (1 − m_j)₊ is exact: maxima commute.

Smoothed norms (see `linear_sets`) make it differentiable. By convexity the gradient g of the data term at any model
θ' gives F(θ) ≥ D + ⟨g, θ⟩ + l2/2·‖θ‖² ≥ D − ‖g‖²/(2·l2) for all θ = (W, b), D the entropy of the weights at θ'.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from calipers.rounding import enclose
from calipers.sets import ThreatModel
from calipers.training.linear_losses import Array
from calipers.training.linear_sets import gamma
from calipers.training.linear_solver import Certificate


class Fitted(NamedTuple):
    coef: Array
    intercept: Array
    certificate: Certificate
    steps: int


class _Task(NamedTuple):
    x: Tensor
    y: Tensor
    eps: float
    p: float
    l2: float
    hinge: bool
    intercept: bool


def fit(
    x: Any,
    y: Array,
    classes: int,
    threat: ThreatModel,
    *,
    l2: float,
    hinge: bool,
    intercept: bool,
    tol: float,
    steps: int,
) -> Fitted:
    """The least upper bound on the robust loss, without a box (which is a larger set); the ridge covers W and b."""
    eps = float(enclose(threat.eps, "eps").upper)
    task = _Task(_tensor(x), torch.from_numpy(y), eps, float(threat.p), l2, hinge, intercept)
    theta = torch.zeros(classes, x.shape[1] + 1, dtype=torch.float64, requires_grad=True)
    best, taken = Certificate.of(math.inf, 0.0), 0
    coef = theta.detach().clone()
    for power in range(1, 9):
        smoothing = 10.0**-power
        taken += _descend(task, theta, smoothing, steps)
        value, lower = _value(task, theta.detach()), _lower(task, theta, smoothing)
        if value < best.value:
            coef = theta.detach().clone()
        best = Certificate.of(min(best.value, value), max(best.lower, lower))
        if best.gap <= tol:
            break
    found = coef.numpy()
    return Fitted(found[:, :-1].copy(), found[:, -1].copy(), best, taken)


def _tensor(x: Any) -> Tensor:
    if isinstance(x, np.ndarray):
        return torch.from_numpy(x)
    entries = x.tocoo()
    where = torch.from_numpy(np.stack([entries.row, entries.col]).astype(np.int64))
    return torch.sparse_coo_tensor(
        where, torch.from_numpy(entries.data), x.shape, check_invariants=True
    ).coalesce()


def _size(task: _Task) -> Tensor:
    """|x|, dense."""
    return (task.x.to_dense() if task.x.is_sparse else task.x).abs()


def _descend(task: _Task, theta: Tensor, smoothing: float, steps: int) -> int:
    optimiser = torch.optim.LBFGS(
        [theta], max_iter=steps, max_eval=2 * steps, history_size=30, tolerance_grad=1e-10,
        tolerance_change=1e-14, line_search_fn="strong_wolfe",
    )  # fmt: skip

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = _smoothed(task, theta, smoothing)[0] + task.l2 / 2 * theta.square().sum()
        torch.autograd.backward(loss)
        if not task.intercept and theta.grad is not None:
            theta.grad[:, -1] = 0.0
        return loss

    optimiser.step(closure)  # type: ignore[no-untyped-call]
    return int(optimiser.state[theta]["n_iter"])


def _margins(task: _Task, theta: Tensor, mu: float) -> Tensor:
    """Margins against each rival, (n, K); inf for the label."""
    weight, bias = theta[:, :-1], theta[:, -1]
    scores = task.x @ weight.T + bias
    gaps = weight.unsqueeze(1) - weight.unsqueeze(0)
    if task.p == math.inf:
        size = (gaps.square() + mu * mu).sqrt().sum(-1)
    elif task.p == 2:
        size = (gaps.square().sum(-1) + mu * mu).sqrt()
    elif mu:
        size = mu * torch.logsumexp(torch.cat([gaps, -gaps], -1) / mu, -1)
    else:
        size = gaps.abs().amax(-1)
    found = scores.gather(1, task.y[:, None]) - scores - task.eps * size[task.y]
    own = torch.nn.functional.one_hot(task.y, len(theta)).bool()
    return found.masked_fill(own, math.inf)


def _mu(task: _Task, smoothing: float) -> float:
    d = task.x.shape[1]
    return smoothing / (max(task.eps, 1e-100) * (d if task.p == math.inf else 1))


def _smoothed(task: _Task, theta: Tensor, smoothing: float) -> tuple[Tensor, Tensor]:
    """The mean smoothed loss, and each rival's weight."""
    margin = _margins(task, theta, _mu(task, smoothing))
    heat = smoothing if task.hinge else 1.0
    over = (float(task.hinge) - margin) / heat
    logits = torch.cat([over, torch.zeros_like(over[:, :1])], 1)
    return heat * torch.logsumexp(logits, 1).mean(), logits.softmax(1)


def _value(task: _Task, theta: Tensor) -> float:
    """The loss, rounded up."""
    margin = _margins(task, theta, 0.0)
    size = (_size(task).amax(0) + task.eps) @ theta[:, :-1].abs().amax(0) * 2 + 2 * theta[
        :, -1
    ].abs().max()
    margin = margin - gamma(4 * task.x.shape[1] + 64) * size
    loss = torch.relu(1 - margin).amax(1) if task.hinge else torch.log1p(torch.exp(-margin).sum(1))
    total = float(loss.mean() + task.l2 / 2 * theta.square().sum())
    return total * (1 + gamma(4 * theta.numel() + 2 * len(task.y) + 64))


def _lower(task: _Task, theta: Tensor, smoothing: float) -> float:
    """A lower bound on the optimum; 0 without a ridge."""
    if not task.l2 > 0:
        return 0.0
    loss, weights = _smoothed(task, theta, smoothing)
    (slope,) = torch.autograd.grad(loss, theta)
    weights = weights.detach()
    rivals = weights[:, :-1]
    entropy = rivals.sum(1) if task.hinge else torch.special.entr(weights).sum(1)
    n, k = len(task.y), len(theta)
    size = torch.cat([_size(task).mean(0) + task.eps, theta.new_ones(1)]) * 4 * k
    off = slope.abs() + gamma(8 * (n + k + theta.shape[1]) + 64) * size
    if not task.intercept:
        off = off[:, :-1]
    cost = float(off.square().sum()) / (2 * task.l2)
    mean = float(entropy.mean()) * (1 - gamma(n + 4 * k + 32))
    return max(0.0, float(np.nextafter(mean - cost * (1 + gamma(off.numel() + 16)), -math.inf)))
