"""Adversarial points of a training step: the last point of a short ascent, where attacks keep the best one they met.

Each function takes (model, threat, x, y, seeds) and returns one point per example. The model is any callable; its
parameters get no gradients. Draws come from the examples' seeds alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from calipers.attacks.gradient import step_length
from calipers.attacks.inputs import input_gradient
from calipers.seeds import mixed
from calipers.sets import Region, ThreatModel
from calipers.training.regions import around, radius, scaled

Model = Callable[[Tensor], Tensor]
Toward = Callable[
    [Tensor], Tensor
]  # logits -> the derivative of what is maximised with respect to them
Point = Callable[[Model, ThreatModel, Tensor, Tensor, Tensor], Tensor]


# -- draws -----------------------------------------------------------------------------------------------------------


def uniform(seeds: Tensor, like: Tensor, purpose: int = 0) -> Tensor:
    """Numbers in [0, 1) of the shape and dtype of ``like`` (B, *x): each example's from its own seed alone."""
    count = like[0].numel()
    state = mixed(seeds.to(like.device), purpose).unsqueeze(1)
    half = (count + 1) // 2
    bits = mixed(state, torch.arange(half, device=like.device))  # 63 of them: two numbers of 24
    drawn = like.new_empty(len(like), count)
    drawn[:, :half] = bits >> 39
    drawn[:, half:] = (bits[:, : count - half] >> 15) & 0xFFFFFF
    return drawn.mul_(2.0**-24).view(like.shape)


def normal(seeds: Tensor, like: Tensor, purpose: int = 0) -> Tensor:
    """Standard normal numbers, as `uniform`.

    Reference: Box and Muller 1958.
    """
    size, angle = (uniform(seeds, like, 2 * purpose + i) for i in (0, 1))
    return (-2 * torch.log1p(-size)).sqrt_() * torch.cos(2 * math.pi * angle)


# -- what is maximised -----------------------------------------------------------------------------------------------


def cross_entropy(y: Tensor) -> Toward:
    """Each example's own cross-entropy: softmax − label, its label entry without cancellation."""
    label = y.unsqueeze(1)

    def toward(logits: Tensor) -> Tensor:
        g = torch.softmax(logits, 1).scatter_(1, label, 0.0)
        return g.scatter_(1, label, -g.sum(1, keepdim=True))

    return toward


def divergence(clean: Tensor) -> Toward:
    """KL(softmax(clean) ‖ softmax(logits))."""
    target = torch.softmax(clean, 1)
    return lambda logits: torch.softmax(logits, 1) - target


# -- ascents ---------------------------------------------------------------------------------------------------------


def gradient_at(model: Model, x: Tensor, toward: Toward) -> Tensor:
    """The input gradient (B, *x) of what ``toward`` is the derivative of."""
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        logits = model(leaf)
    return input_gradient(logits, leaf, toward(logits.detach()))


def climbed(
    model: Model, region: Region, x: Tensor, toward: Toward, *, steps: int, step_size: float
) -> Tensor:
    """The last point of ``steps`` projected steps of steepest ascent from ``x``; the step size is relative to eps."""
    length = step_length(region, step_size, x.dtype)
    for _ in range(steps):
        x = region.ascend(x, gradient_at(model, x, toward), length)
    return x


def start(threat: ThreatModel, region: Region, x: Tensor, seeds: Tensor) -> Tensor:
    """A random member: for linf x + eps·U(−1, 1), clamped to the domain; elsewhere `Region.sample`."""
    if region.p != math.inf or not math.isfinite(radius(threat)):
        return region.sample(seeds, x.dtype)
    noise = uniform(seeds, x).mul_(2).sub_(1)
    return region.project(torch.add(x, noise.mul_(_radii(threat, x))))


def _radii(threat: ThreatModel, x: Tensor) -> float | Tensor:
    return threat.eps.to(x) if isinstance(threat.eps, Tensor) else radius(threat)


def pgd(
    model: Model,
    threat: ThreatModel,
    x: Tensor,
    y: Tensor,
    seeds: Tensor,
    *,
    steps: int = 10,
    step_size: float = 0.25,
    restarts: int = 1,
    random_start: bool = True,
    scale: float = 1.0,
) -> Tensor:
    """Projected gradient ascent on the cross-entropy; of several starts the point of highest loss.

    Args:
        step_size: relative to eps.
        random_start: the first start too, which is ``x`` otherwise.
        scale: search a set of so many times the radius.

    Cost: ``steps`` forward and backward passes for each start, and a forward pass more where there are several.
    Reference: Madry et al. 2018; one step of 1.25 eps from a random start is Wong et al. 2020 (FGSM-RS).
    """
    threat = scaled(threat, scale)
    if radius(threat) == 0:
        return x
    region, toward = around(threat, x), cross_entropy(y)
    points = []
    for restart in range(restarts):
        first = (
            x if not (random_start or restart) else start(threat, region, x, mixed(seeds, restart))
        )
        points.append(climbed(model, region, first, toward, steps=steps, step_size=step_size))
    return points[0] if restarts == 1 else worst(model, y, points)


@torch.no_grad()
def worst(model: Model, y: Tensor, points: Sequence[Tensor]) -> Tensor:
    """For each example the one of ``points`` (each (B, *x)) of highest cross-entropy."""
    losses = torch.stack([F.cross_entropy(model(p), y, reduction="none") for p in points])
    # NaN counts as highest: training must see it
    index = losses.nan_to_num(math.inf).argmax(0)
    return torch.stack(list(points))[index, torch.arange(len(y), device=y.device)]


def n_fgsm(
    model: Model,
    threat: ThreatModel,
    x: Tensor,
    y: Tensor,
    seeds: Tensor,
    *,
    noise: float = 2.0,
    step_size: float = 1.0,
) -> Tensor:
    """x + η + step_size·eps·sign(g(x + η)), η uniform in (−noise·eps, noise·eps), clamped to the domain alone.

    The point may leave the set: that is the method.

    Reference: de Jorge et al. 2022, algorithm 1.
    """
    if threat.p != math.inf:
        raise ValueError(f"n_fgsm: needs p = inf, not p = {threat.p:g}")
    eps = radius(threat)
    moved = torch.add(x, uniform(seeds, x).mul_(2).sub_(1), alpha=noise * eps) if noise else x
    g = gradient_at(model, moved, cross_entropy(y))
    return torch.add(moved, g.sign_(), alpha=step_size * eps).clamp_(*_domain(threat, x))


def _domain(threat: ThreatModel, x: Tensor) -> tuple[Tensor, Tensor]:
    """The domain's ends, in the dtype of ``x``."""
    return ThreatModel(math.inf, math.inf, threat.lower, threat.upper).around(x[:1]).inner(x.dtype)


def trades(
    model: Model,
    threat: ThreatModel,
    x: Tensor,
    _y: Tensor,
    seeds: Tensor,
    *,
    steps: int = 10,
    step_size: float = 0.25,
    scale: float = 1.0,
    noise: float = 0.001,
) -> Tensor:
    """Ascent on the divergence from the clean prediction, from ``x`` and a little normal noise (where it is 0).

    Reference: Zhang et al. 2019 (TRADES), algorithm 1.
    """
    threat = scaled(threat, scale)
    if radius(threat) == 0:
        return x
    region = around(threat, x)
    with torch.no_grad():
        toward = divergence(model(x))
    first = region.project(torch.add(x, normal(seeds, x), alpha=noise))
    return climbed(model, region, first, toward, steps=steps, step_size=step_size)


# -- several norms ---------------------------------------------------------------------------------------------------


def strongest(
    model: Model,
    threat: ThreatModel,
    x: Tensor,
    y: Tensor,
    seeds: Tensor,
    *,
    others: Sequence[tuple[float, float]],
    **options: float,
) -> Tensor:
    """For each example the point of highest loss among one `pgd` for each norm.

    Args:
        others: further norms with their radii, beside the threat's own.
    """
    return worst(model, y, every(model, threat, x, y, seeds, others=others, **options))


def every(
    model: Model,
    threat: ThreatModel,
    x: Tensor,
    y: Tensor,
    seeds: Tensor,
    *,
    others: Sequence[tuple[float, float]],
    **options: float,
) -> list[Tensor]:
    """The point of one `pgd` for each norm."""
    return [
        pgd(model, t, x, y, mixed(seeds, i), **options)  # type: ignore[arg-type]
        for i, t in enumerate(norms(threat, others))
    ]


def norms(threat: ThreatModel, others: Sequence[tuple[float, float]]) -> list[ThreatModel]:
    """The threat model, and the same domain with other norms (p, eps)."""
    more = [ThreatModel(p, eps, threat.lower, threat.upper) for p, eps in others]
    return [threat, *more]


def steepest_of_several(
    model: Model,
    threat: ThreatModel,
    x: Tensor,
    y: Tensor,
    seeds: Tensor,
    *,
    others: Sequence[tuple[float, float]],
    steps: int = 20,
    step_size: float = 0.1,
) -> Tensor:
    """At every step one candidate for each norm, its own steepest step projected onto its own ball; the one of highest
    loss is where the next step starts.

    The result lies in one of the balls. For l1 a step moves one feature.

    Cost: ``steps`` times one backward pass and a forward pass for each norm.
    Reference: Maini et al. 2020 (MSD), algorithm 1.
    """
    del seeds  # it starts at x
    regions = [around(t, x) for t in norms(threat, others)]
    lengths = [step_length(region, step_size, x.dtype) for region in regions]
    toward = cross_entropy(y)
    for _ in range(steps):
        g = gradient_at(model, x, toward)
        x = worst(
            model,
            y,
            [r.ascend(x, g.clone(), length) for r, length in zip(regions, lengths, strict=True)],
        )
    return x
