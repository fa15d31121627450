"""Gradient-based minimum-norm attacks: `fmn` and `ddn` walk along the decision boundary, radius and point adapting.

What they guarantee is in `calipers.attacks.minimum_norm`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from calipers.attacks.losses import margin_loss, output_gradient
from calipers.attacks.minimum_norm import CLEARANCE, Nearest, breaks
from calipers.attacks.search import Model
from calipers.searches import level_l2, norm
from calipers.sets import Number
from calipers.spec import Spec

STEP_SIZES = {
    0: 0.5,
    1: 1.0,
    2: 3.0,
    math.inf: 0.3,
}  # of the first step; best of a few on an MNIST network


def fmn(
    model: Model,
    x: Tensor,
    spec: Spec,
    *,
    p: float,
    lower: Number | Tensor = 0.0,
    upper: Number | Tensor = 1.0,
    steps: int = 100,
    step_size: float | None = None,
    gamma: float = 0.05,
    rivals: int = 0,
    polish: int = 16,
    start: Tensor | None = None,
    seeds: Tensor | None = None,
) -> Tensor:
    """The nearest adversarial point met by the fast minimum-norm attack, for l0, l1, l2 and linf: (B, *x).

        δ ← P_eps(δ + length·g/‖g‖),   eps ← eps·(1 − γ) where x + δ is adversarial, eps·(1 + γ) where not,

    g the gradient of −margin, P_eps the exact projection on ball and box (for l0 the largest changes are kept).
    Until an adversarial point is known, eps is the distance at which the linearised margin vanishes. γ and the length
    fall to zero along a cosine. The best point is then polished.

    Args:
        p: 0, 1, 2 or inf; 0 counts changed features.
        step_size: of the first step, relative to eps (to the width of the box for l0); by default 0.4 for linf,
            3 for l2, 2 for l1 and 0.5 for l0.
        gamma: the first relative change of the radius, in (0, 1).
        rivals: further walks from the input, each towards one of the clauses of lowest value there (for labels: one
            of the most likely other classes), since the first rival met need not be the nearest.
        polish: forward passes of the final polish.
        start: as `calipers.attacks.minimum_norm.closest`; the walk then begins there.
        seeds: unused; nothing is random.

    Raises:
        ValueError: an argument is out of range; l0 without a bounded box.
        DataError: inputs outside the box.

    Cost: for each of 1 + ``rivals`` walks ``steps`` forward and backward passes and ``polish`` forward passes.
    Reference: Pintor et al. 2021. Lengths relative to eps, the sign of g for linf, and the polish are ours.
    """
    del seeds
    search = Nearest.around(model, x, spec, p, lower, upper, start)
    if p == 0 and not bool(torch.isfinite(search.high - search.low).all()):
        raise ValueError("p: 0 needs a bounded box; set finite lower and upper")
    _walks(model, spec, search, steps, step_size, gamma, rivals, polish, sphere=False)
    return search.points


def ddn(
    model: Model,
    x: Tensor,
    spec: Spec,
    *,
    p: float = 2,
    lower: Number | Tensor = 0.0,
    upper: Number | Tensor = 1.0,
    steps: int = 100,
    step_size: float | None = None,
    gamma: float = 0.05,
    rivals: int = 0,
    polish: int = 16,
    start: Tensor | None = None,
    seeds: Tensor | None = None,
) -> Tensor:
    """The nearest adversarial point in l2 by decoupling direction and norm: (B, *x).

        δ ← eps·(δ + length·g/‖g‖)/‖·‖ within the box,   eps ← eps·(1 − γ) or eps·(1 + γ) as in `fmn`

    Unlike `fmn` the point always lies on the sphere and γ stays. Other than in the paper, the first radius is where
    the linearised margin vanishes, and lengths are relative to eps (both 1 there). Arguments and errors as `fmn`.

    Raises:
        ValueError: p is not 2, or another argument is out of range.

    Cost: as `fmn`.
    Reference: Rony et al. 2019.
    """
    del seeds
    if p != 2:
        raise ValueError(f"p: {p!r}; ddn is an attack in l2, so p must be 2 (fmn has all norms)")
    search = Nearest.around(model, x, spec, p, lower, upper, start)
    _walks(model, spec, search, steps, step_size, gamma, rivals, polish, sphere=True)
    return search.points


def _walks(
    model: Model,
    spec: Spec,
    search: Nearest,
    steps: int,
    step_size: float | None,
    gamma: float,
    rivals: int,
    polish: int,
    *,
    sphere: bool,
) -> None:
    """One walk for the whole specification, from the point known if there is one, and one per rival.

    Each is polished: a nearer point may be drawn in less far, which for l0 is not rare.
    """
    if steps < 1:
        raise ValueError(f"steps: {steps} must be at least 1")
    step_size = STEP_SIZES[search.p] if step_size is None else step_size
    if not 0 < step_size < math.inf:
        raise ValueError(f"step_size: {step_size} must be positive and finite")
    if not 0 < gamma < 1:
        raise ValueError(f"gamma: {gamma} must lie between 0 and 1")
    if rivals < 0 or (rivals and not spec.simple):
        raise ValueError(
            f"rivals: {rivals} must be at least 0, and 0 where a clause has several functionals"
        )
    rows = search.farther_than(0.0)
    if not len(rows):
        return
    _walk(model, spec, spec, search, rows, steps, step_size, gamma, sphere=sphere)
    search.polish(model, spec, rows, polish)
    if rivals:
        with torch.no_grad():
            order = spec.values(model(search.x.clone())).argsort(dim=1, stable=True)
        for rival in order[:, :rivals].unbind(1):
            each = torch.arange(len(spec), device=rival.device)
            goal = Spec.functional(spec.C[each, rival].unsqueeze(1), spec.d[each, rival, None])
            _walk(model, goal, spec, search, rows, steps, step_size, gamma, sphere=sphere)
            search.polish(model, spec, rows, polish)


def _walk(
    model: Model,
    goal: Spec,
    spec: Spec,
    search: Nearest,
    rows: Tensor,
    steps: int,
    step_size: float,
    gamma: float,
    *,
    sphere: bool,
) -> None:
    """Down the margin of ``goal``; any point that breaks ``spec`` counts."""
    known = torch.isfinite(search.size[rows]) & (goal is spec)
    goal = goal[rows]
    p, spec = search.p, spec[rows]
    x = search.x[rows]
    point = torch.where(known.view(-1, *[1] * (x.ndim - 1)), search.points[rows], x)
    reach = search.reach()[rows]
    width = (search.high - search.low)[rows].flatten(1).double().amax(1)
    eps = torch.where(known, search.size[rows], 0.0)
    for k in range(steps):
        fade = (1 + math.cos(math.pi * k / steps)) / 2
        gradient, margin, broken = _gradient(model, goal, spec, point)
        search.offer(rows, point, broken)
        known = known | broken
        step = (point.double() - x.double()).flatten(1)
        best = search.size[rows]
        change = gamma if sphere else gamma * fade
        wider = eps * (1 + change)
        if k == 0 or not sphere:
            linear = _size(step, p) + _first_order(gradient, margin, p, width)
            # no gradient, or a tie that is no violation: what is left is to grow
            linear = torch.where(torch.isfinite(linear), linear, 2 * eps + 1).clamp_min(1e-6)
            wider = torch.where(known, wider, torch.maximum(wider, linear))
        narrower = eps * (1 - change)
        if p == 0:
            wider = torch.maximum(wider.floor(), eps + 1)
            narrower = torch.minimum(narrower.floor(), eps - 1).clamp_min(1.0)
        eps = torch.where(broken, narrower, wider)
        eps = torch.minimum(eps, reach if sphere else torch.minimum(reach, best))
        length = step_size * fade * (width if p == 0 else eps)
        direction = gradient.sign() if p == math.inf else _normal(gradient)
        step = step + length.unsqueeze(1) * direction
        point = _on_sphere(search, rows, step, eps) if sphere else search.member(rows, step, eps)
    search.offer(rows, point, _gradient(model, goal, spec, point)[2])


def _gradient(model: Model, goal: Spec, spec: Spec, point: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The direction that lowers the goal's margin, (R, n) float64, that margin, and what breaks ``spec``."""
    with torch.enable_grad():
        leaf = point.detach().requires_grad_()
        y = model(leaf)
    outputs = y.detach()
    (gradient,) = torch.autograd.grad(y, leaf, output_gradient(margin_loss, outputs, goal))
    gradient = torch.nan_to_num(gradient.flatten(1).double(), posinf=0.0, neginf=0.0)
    return gradient, goal.margin_at(outputs).double(), breaks(spec, outputs, CLEARANCE)


def _first_order(gradient: Tensor, margin: Tensor, p: float, width: Tensor) -> Tensor:
    """The distance to where margin − ⟨gradient, δ⟩ = 0: margin/‖gradient‖ in the dual norm; features for l0."""
    need = margin.clamp_min(0.0)
    if p == 0:
        gain = (gradient.abs() * width.unsqueeze(1)).sort(1, descending=True).values.cumsum(1)
        return (gain < need.unsqueeze(1)).sum(1) + 1.0
    return need / norm(gradient, {1: math.inf, 2: 2, math.inf: 1}[p])


def _size(step: Tensor, p: float) -> Tensor:
    return (step != 0).sum(1).double() if p == 0 else norm(step, p)


def _normal(rows: Tensor) -> Tensor:
    size = norm(rows, 2).unsqueeze(1)
    return rows / torch.where(size > 0, size, 1.0)


def _on_sphere(search: Nearest, rows: Tensor, step: Tensor, eps: Tensor) -> Tensor:
    x, low, high = (t[rows].flatten(1).double() for t in (search.x, search.low, search.high))
    length = level_l2(step.abs(), torch.where(step > 0, high - x, x - low), eps)
    moved = (x + step.sign() * length).to(search.x.dtype)
    point = moved.clamp(search.low[rows].flatten(1), search.high[rows].flatten(1))
    return point.view(-1, *search.x.shape[1:])
