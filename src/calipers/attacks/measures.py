"""What changes and runs of attacks look like, in numbers: how sparse, how steadily, how much by chance."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from calipers.attacks.gradient import pgd
from calipers.attacks.losses import Loss, read, suited
from calipers.attacks.search import Model, required
from calipers.seeds import mixed
from calipers.sets import Region
from calipers.spec import Spec


def gini(change: Tensor) -> Tensor:
    """The Gini index of each example's |change| over its n features, (B, *x) to (B,): how unevenly it is spread.

        G = Σ_i (2i − n − 1)·a_i / (n·Σ_i a_i),   a_1 ≤ ... ≤ a_n the absolute changes

    0 where all features change alike (FGSM, without a box), 1 − 1/n where one takes all, 1 − k/n where k take all in
    equal parts; the same at any scale. 0 for no change at all.

    Reference: Hurley and Rickard 2009.
    """
    size = change.detach().flatten(1).double().abs().sort(1).values
    n = size.shape[1]
    rank = 2 * torch.arange(1, n + 1, dtype=size.dtype, device=size.device) - n - 1
    total = size.sum(1)
    return (size @ rank) / (n * torch.where(total > 0, total, 1.0))


def loss_curve(
    model: Model,
    region: Region,
    spec: Spec,
    *,
    attack: Callable[..., Tensor] = pgd,
    loss: str | Loss = "cross_entropy",
    seeds: Tensor | None = None,
) -> Tensor:
    """The loss at every point that the attack evaluates, (evaluations, B): for PGD its steps + 1 iterates in order.

    Args:
        attack: a fixed-budget attack that evaluates all examples each time (``drop=False`` where it has the choice).
        loss: what is recorded, whatever the attack maximises.

    Raises:
        ValueError: the attack evaluated only some of the examples.

    Cost: the attack's.
    """
    seen: list[Tensor] = []

    def recording(x: Tensor) -> Tensor:
        y = model(x)
        seen.append(y.detach())
        return y

    attack(recording, region, spec, seeds=seeds)
    if any(len(y) != len(region) for y in seen):
        raise ValueError(
            f"attack: it evaluated parts of the {len(region)} examples; a curve needs all of them each time, so "
            "pass functools.partial(attack, drop=False)"
        )
    objective = suited(loss, spec)
    return torch.stack([read(objective, y, spec).loss() for y in seen])


def restart_losses(
    model: Model,
    region: Region,
    spec: Spec,
    *,
    attack: Callable[..., Tensor] = pgd,
    restarts: int = 50,
    loss: str | Loss = "cross_entropy",
    seeds: Tensor,
) -> Tensor:
    """The loss that each of ``restarts`` random starts ends with, (restarts, B): narrow where the surface is benign.

    A spread as wide as the distance to the boundary says that one run means little.

    Args:
        attack: takes ``random_start`` (PGD, APGD); the loss is that of the point it returns.
        seeds: (B,) one seed per example.

    Raises:
        ValueError: ``restarts`` is less than 1.

    Cost: ``restarts`` times the attack's, and a forward pass each.
    Reference: Madry et al. 2018, figure 1.
    """
    if restarts < 1:
        raise ValueError(f"restarts: {restarts} must be at least 1")
    seeds = required(seeds, len(region), random=True)
    objective = suited(loss, spec)
    found = []
    for restart in range(restarts):
        points = attack(
            model, region, spec, random_start=True, loss=loss, seeds=mixed(seeds, restart)
        )
        with torch.no_grad():
            y = model(points)
        found.append(read(objective, y, spec).loss())
    return torch.stack(found)
