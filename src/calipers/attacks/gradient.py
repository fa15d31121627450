"""Gradient attacks: FGSM, projected gradient descent, and targeted attacks.

Each returns one point per example and no success flag: `calipers.witness` alone decides. Models are any callables
that are differentiable in their input; their parameters' gradients are neither computed nor touched.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from calipers.attacks.losses import Loss, loss_named, output_gradient
from calipers.errors import unknown_name
from calipers.sets import Region
from calipers.spec import Spec

Model = Callable[[Tensor], Tensor]


def fgsm(
    model: Model,
    region: Region,
    spec: Spec,
    *,
    loss: str | Loss = "cross_entropy",
    dtype: torch.dtype = torch.float32,
    seeds: Tensor | None = None,
) -> Tensor:
    """The point of the region that maximises the loss's linearisation at the centre: (B, *x).

    max ⟨g, x⟩ over the ball and the box, g the input gradient at the centre: x + eps·sign(g) for linf. Exact for
    an affine model.

    Cost: one forward and one backward pass.
    Reference: Goodfellow et al. 2015; for l2 and l1 with a box the exact linear maximiser.
    """
    del seeds  # nothing is random
    x = region.project(region.center.to(dtype))
    gradient, _ = _gradient(model, loss_named(loss), spec, x)
    return region.maximizer(gradient)


def pgd(
    model: Model,
    region: Region,
    spec: Spec,
    *,
    steps: int = 40,
    step_size: float = 0.1,
    restarts: int = 1,
    random_start: bool = False,
    direction: str = "steepest",
    loss: str | Loss = "cross_entropy",
    drop: bool = False,
    dtype: torch.dtype = torch.float32,
    seeds: Tensor | None = None,
) -> Tensor:
    """For each example the point of lowest margin met by projected gradient ascent on the loss: (B, *x).

        x ← P(x + step_size·eps·argmax_{‖d‖_p ≤ 1} ⟨g, d⟩)        direction = "steepest"
        x ← P(x + step_size·g)                                    direction = "gradient"

    P is the exact Euclidean projection on ball and box, g the gradient of the example's own loss.

    Args:
        step_size: relative to eps (to half the width of a box without eps); absolute for "gradient".
        restarts: the first starts at the centre (unless ``random_start``), the others at random points.
        drop: stop working on an example once its margin is <= 0.
        dtype: of the points, normally the model's.
        seeds: (B,) one seed per example; needed for random starts.

    Raises:
        ValueError: an argument is out of range.

    Cost: ``steps`` forward and backward passes and one forward pass per restart.
    Reference: Madry et al. 2018; Kolter and Madry, chapter 4 (normalised steepest descent).
    """
    if steps < 1 or restarts < 1:
        raise ValueError(f"steps: {steps} and restarts: {restarts} must be at least 1")
    if not step_size > 0:
        raise ValueError(f"step_size: {step_size} must be positive")
    if direction not in ("steepest", "gradient"):
        raise unknown_name("direction", direction, ("steepest", "gradient"))
    if seeds is None:
        if random_start or restarts > 1:
            raise ValueError(
                "seeds: random starts need one seed per example (calipers.seeds.seeds)"
            )
        seeds = torch.zeros(len(region), dtype=torch.int64)
    objective = loss_named(loss)
    best = _Best.at(region.project(region.center.to(dtype)))
    for restart in range(restarts):
        alive = _alive(best) if drop and restart else None
        if alive is not None and not len(alive):
            break
        _ascend(
            model,
            region if alive is None else region[alive],
            spec if alive is None else spec[alive],
            objective,
            best,
            alive,
            start=seeds + restart if random_start or restart else None,
            steps=steps,
            step_size=step_size,
            plain=direction == "gradient",
            drop=drop,
        )
    return best.points


@dataclass
class _Best:
    """The best point of each example so far; lower margins win, NaN never does.

    With ``drop`` the first point that breaks an example stays: others decide when its row leaves the batch, so that
    what came later would depend on them.
    """

    points: Tensor
    margin: Tensor

    @classmethod
    def at(cls, points: Tensor) -> _Best:
        return cls(points.clone(), points.new_full((len(points),), torch.inf))

    def update(self, rows: Tensor | None, points: Tensor, margin: Tensor, drop: bool) -> None:
        known = self.margin if rows is None else self.margin[rows]
        better = margin < known
        if drop:
            better &= known > 0
        chosen = torch.nonzero(better).flatten()
        if not len(chosen):
            return
        if len(chosen) < len(points):
            points, margin = points.index_select(0, chosen), margin.index_select(0, chosen)
        target = chosen if rows is None else rows[chosen]
        self.points.index_copy_(0, target, points)
        self.margin.index_copy_(0, target, margin)


def _alive(best: _Best) -> Tensor:
    return torch.nonzero(~(best.margin <= 0)).flatten()


def _ascend(
    model: Model,
    region: Region,
    spec: Spec,
    objective: Loss,
    best: _Best,
    rows: Tensor | None,
    *,
    start: Tensor | None,
    steps: int,
    step_size: float,
    plain: bool,
    drop: bool,
) -> None:
    """One run over the examples ``rows`` (None: all); the working set shrinks as they are broken."""
    dtype = best.points.dtype
    if start is None:
        x = region.project(region.center.to(dtype))
    else:
        x = region.sample(start if rows is None else start[rows.cpu()], dtype)
    length = step_size if plain else _length(region, step_size, dtype)
    for _ in range(steps):
        gradient, margin = _gradient(model, objective, spec, x)
        best.update(rows, x, margin, drop)
        if drop:
            keep = ~(margin <= 0)
            left = int(keep.sum())
            if not left:
                return
            if left <= 0.9 * len(x):  # re-indexing costs a copy, so not for every single one
                index = torch.nonzero(keep).flatten()
                rows = index if rows is None else rows[index]
                region, spec, x, gradient = region[index], spec[index], x[index], gradient[index]
                length = length[index] if isinstance(length, Tensor) else length
        gradient = gradient if plain else _unblocked(region, x, gradient)
        x = region.ascend(x, gradient, length, plain=plain)
    with torch.no_grad():
        best.update(rows, x, spec.margin_at(model(x)), drop)


def _unblocked(region: Region, x: Tensor, gradient: Tensor) -> Tensor:
    """For l1, without the entries that the box stops: the step moves one feature, which must not be a stuck one."""
    if region.p != 1:
        return gradient
    low, high = region.inner(x.dtype)
    center, radius = region.center.to(x.dtype), region.unit.to(x.dtype)
    room = torch.where(gradient > 0, high - x, x - low) > 1e-6 * radius  # not a rounding error's
    ball = (x - center).abs() >= 0.999 * radius  # the whole radius is spent there: stay
    return torch.where(room | ball, gradient, 0.0)


def _length(region: Region, step_size: float, dtype: torch.dtype) -> float | Tensor:
    """The step in input units; one number where all examples share it."""
    unit = region.unit
    flat = unit.flatten()
    if bool((flat == flat[0]).all()):
        return step_size * float(flat[0])
    return (step_size * unit).to(dtype)


def _gradient(model: Model, objective: Loss, spec: Spec, x: Tensor) -> tuple[Tensor, Tensor]:
    """The input gradient of each example's loss, and its margin.

    The loss is differentiated on the logits alone, so that the network's backward pass is the whole cost.
    """
    with torch.enable_grad():
        point = x.detach().requires_grad_()
        logits = model(point)
    outputs = logits.detach()
    toward = output_gradient(objective, outputs, spec)
    (gradient,) = torch.autograd.grad(logits, point, toward)
    return gradient, spec.margin_at(outputs)


@dataclass(frozen=True)
class Targeted:
    """What a targeted attack did, example by example.

    Args:
        points: (B, *x).
        fooled: the prediction is no longer the label.
        hit: the prediction is the target.
    """

    points: Tensor
    fooled: Tensor
    hit: Tensor


def _minus_label(y: Tensor, t: Tensor, eye: Tensor) -> Tensor:
    return eye[y] - eye[t]


def _minus_others(_y: Tensor, t: Tensor, eye: Tensor) -> Tensor:
    return 1.0 - 2.0 * eye[t]


# The functional to minimise: its negative is the objective of the lectures.
OBJECTIVES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "label": _minus_label,  # h_target − h_label
    "others": _minus_others,  # h_target − Σ over all others
}


def targeted(
    model: Model,
    region: Region,
    y: Tensor,
    target: Tensor,
    *,
    num_classes: int,
    objective: str = "label",
    attack: Callable[..., Tensor] = pgd,
    seeds: Tensor | None = None,
) -> Targeted:
    """Drive examples of label ``y`` towards the class ``target``, and report fooled and hit apart.

    Args:
        objective: "label" maximises h_target − h_label; "others" maximises h_target less the sum of all other
            logits, which fools fewer examples but hits the target more consistently.
        attack: a fixed-budget attack, given the objective as a one-functional specification with ``loss="margin"``.

    Raises:
        ValueError: unknown objective, or labels outside 0..num_classes − 1.
    """
    if objective not in OBJECTIVES:
        raise unknown_name("objective", objective, OBJECTIVES)
    Spec.target(y, target, num_classes)  # checks both
    eye = torch.eye(num_classes, device=y.device)
    goal = Spec.functional(OBJECTIVES[objective](y, target, eye).unsqueeze(1))
    points = attack(model, region, goal, loss="margin", seeds=seeds)
    with torch.no_grad():
        predicted = model(points).argmax(-1)
    return Targeted(points, predicted != y, predicted == target)
