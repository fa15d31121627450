"""Gradient attacks: FGSM, projected gradient descent, and targeted attacks.

Each returns one point per example and no success flag: `calipers.witness` alone decides. Models are any callables
that are differentiable in their input; their parameters' gradients are neither computed nor touched.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from calipers.attacks.losses import Loss, suited
from calipers.attacks.search import Model, Record, Rows, Trail, look, repeated, required, slope
from calipers.errors import unknown_name
from calipers.sets import Region
from calipers.spec import Spec


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
    return region.maximizer(look(model, suited(loss, spec), spec, x).gradient)


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
    seeds = required(seeds, len(region), random=random_start or restarts > 1)
    objective = suited(loss, spec)
    center = region.project(region.center.to(dtype))
    best = Record.at(center)
    plain = direction == "gradient"
    length = step_size if plain else step_length(region, step_size, dtype)
    model = repeated(model)
    for restart in range(restarts):
        x = region.sample(seeds + restart, dtype) if random_start or restart else center
        rows = _Rows(None, region, spec, x, length)
        if drop and restart:
            alive = best.alive()
            if not len(alive):
                break
            rows.keep(alive)
        _ascend(model, rows, objective, best, steps=steps, plain=plain, drop=drop)
    return best.points


@dataclass
class _Rows(Rows):
    region: Region
    spec: Spec
    x: Tensor
    length: float | Tensor


def _ascend(
    model: Model,
    rows: _Rows,
    objective: Loss,
    best: Record,
    *,
    steps: int,
    plain: bool,
    drop: bool,
) -> None:
    """One run; with ``drop`` the working set shrinks as examples are broken."""
    if not drop:
        _whole(model, rows, objective, best, steps=steps, plain=plain)
        return
    for _ in range(steps):
        gradient, margin, _ = look(model, objective, rows.spec, rows.x)
        best.update(rows.owner, rows.x, margin, first=True)
        direction = gradient if plain else _unblocked(rows.region, rows.x, gradient)
        rows.x = rows.region.ascend(rows.x, direction, rows.length, plain=plain)
        if not rows.shrink(best, margin):
            return
    with torch.no_grad():
        best.update(rows.owner, rows.x, rows.spec.margin_at(model(rows.x)), first=True)


def _whole(
    model: Model, rows: _Rows, objective: Loss, best: Record, *, steps: int, plain: bool
) -> None:
    """The same for all examples to the end, where nothing has to be known from step to step."""
    region, trail = rows.region, Trail(best, rows.spec, rows.x)
    for _ in range(steps):
        x = trail.here
        gradient = slope(model, objective, trail)
        direction = gradient if plain else _unblocked(region, x, gradient)
        region.ascend(x, direction, rows.length, plain=plain, out=trail.here)
    with torch.no_grad():
        trail.note(model(trail.here))
    trail.settle()


def _unblocked(region: Region, x: Tensor, gradient: Tensor) -> Tensor:
    """For l1, without the entries that the box stops: the step moves one feature, which must not be a stuck one."""
    if region.p != 1:
        return gradient
    low, high = region.inner(x.dtype)
    center, radius = region.center.to(x.dtype), region.unit.to(x.dtype)
    room = torch.where(gradient > 0, high - x, x - low) > 1e-6 * radius  # not a rounding error's
    ball = (x - center).abs() >= 0.999 * radius  # the whole radius is spent there: stay
    return torch.where(room | ball, gradient, 0.0)


def step_length(region: Region, step_size: float, dtype: torch.dtype) -> float | Tensor:
    """The step in input units; one number where all examples share it."""
    unit = region.unit
    flat = unit.flatten()
    if len(flat) and bool((flat == flat[0]).all()):
        return step_size * float(flat[0])
    return (step_size * unit).to(dtype)


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
