"""Planted faults in the attacks: the checks of `attack_checks` must catch each of them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

import attack_checks as checks
from attack_checks import INF
from calipers import Region, Spec, fgsm, pgd
from calipers.attacks import gradient
from calipers.attacks.losses import Loss
from calipers.attacks.search import Look, Model, Record, Trail

Patch = Callable[[pytest.MonkeyPatch], None]
TRUE_LOOK, TRUE_SLOPE = gradient.look, gradient.slope


def changed_gradient(patch: pytest.MonkeyPatch, change: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Wherever a gradient attack reads one; ``change`` sees the gradient and the points."""

    def looked(model: Model, objective: Loss, spec: Spec, x: Tensor) -> Look:
        seen = TRUE_LOOK(model, objective, spec, x)
        return seen._replace(gradient=change(seen.gradient, x))

    def sloped(model: Model, objective: Loss, trail: Trail) -> Tensor:
        x = trail.here
        return change(TRUE_SLOPE(model, objective, trail), x)

    patch.setattr(gradient, "look", looked)
    patch.setattr(gradient, "slope", sloped)


def sign_flipped(patch: pytest.MonkeyPatch) -> None:
    changed_gradient(patch, lambda slope, _: -slope)


def projection_skipped(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Region, "project", lambda self, z: z)
    patch.setattr(Region, "ascend", ascend)


def ascend(
    self: Region,
    x: Tensor,
    gradient: Tensor,
    length: float | Tensor,
    *,
    plain: bool,
    out: Tensor | None = None,
) -> Tensor:
    """A step and its projection, one after the other, so that a fault in either shows."""
    point = self.project(x + length * (gradient if plain else self.steepest(gradient)))
    return point if out is None else out.copy_(point)


def box_forgotten(patch: pytest.MonkeyPatch) -> None:
    """A step that stays in the ball alone."""

    def ball(self: Region, z: Tensor) -> Tensor:
        gap = z - self.center.to(z.dtype)
        size = torch.linalg.vector_norm(gap.flatten(1), ord=self.p, dim=1).clamp_min(1e-30)
        return self.center.to(z.dtype) + gap * (self.eps.to(z.dtype) / size).clamp_max(1).view(
            -1, 1
        )

    patch.setattr(Region, "project", ball)
    patch.setattr(Region, "ascend", ascend)


def averaged_loss(patch: pytest.MonkeyPatch) -> None:
    """The mean over the batch instead of the sum: plain steps shrink with the batch."""

    changed_gradient(patch, lambda slope, x: slope / len(x))


def last_kept(patch: pytest.MonkeyPatch) -> None:
    def update(
        self: Record, owner: Tensor | None, points: Tensor, margin: Tensor, *, first: bool
    ) -> None:
        del first
        chosen = torch.arange(len(self.margin)) if owner is None else owner
        self.points = self.points.index_copy(0, chosen, points)
        self.margin = self.margin.index_copy(0, chosen, margin)

    def take(self: Record, points: Tensor, margins: Tensor) -> None:
        self.points, self.margin = points[-1].clone(), margins[-1]

    patch.setattr(Record, "update", update)
    patch.setattr(Record, "take", take)


def one_seed_for_all(patch: pytest.MonkeyPatch) -> None:
    """Noise drawn for the batch as a whole."""
    true = Region.sample

    def sample(self: Region, seeds: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        return true(self, seeds[0] + torch.arange(len(seeds)), dtype)

    patch.setattr(Region, "sample", sample)


def direction_of_another_norm(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Region, "steepest", lambda self, g: g / g.norm(dim=1, keepdim=True))
    patch.setattr(Region, "ascend", ascend)


PLAIN = partial(pgd, steps=3, direction="gradient", step_size=0.3)
RESTARTED = partial(pgd, steps=2, restarts=2)
FEW = partial(pgd, steps=12, loss="margin")

CHECKS: dict[str, Callable[[], None]] = {
    "ascends": lambda: checks.check_ascends(partial(pgd, steps=1, step_size=0.1), 2),
    "fgsm ascends": lambda: checks.check_ascends(fgsm, INF),
    "inside": lambda: checks.check_membership(pgd, 2, torch.float32),
    "start": lambda: checks.check_never_worse_than_its_start(pgd, INF),
    "steps": lambda: checks.check_best_of_more_steps(pgd, 2),
    "batch": lambda: checks.check_batch_independence(PLAIN, INF),
    "batch, restarts": lambda: checks.check_batch_independence(RESTARTED, 2),
    "closed form": lambda: checks.check_linear_optimum(FEW, INF, 1 + 1e-5),
}

FAULTS: list[tuple[Patch, str]] = [
    (sign_flipped, "ascends"),
    (sign_flipped, "fgsm ascends"),
    (sign_flipped, "closed form"),
    (projection_skipped, "inside"),
    (projection_skipped, "closed form"),
    (box_forgotten, "inside"),
    (averaged_loss, "batch"),
    (last_kept, "start"),
    (last_kept, "steps"),
    (one_seed_for_all, "batch, restarts"),
    (direction_of_another_norm, "closed form"),
]


@pytest.mark.parametrize("name", CHECKS)
def test_the_real_attacks_pass(name: str) -> None:
    CHECKS[name]()


@pytest.mark.parametrize(
    ("fault", "name"), FAULTS, ids=[f"{f.__name__}-{name}" for f, name in FAULTS]
)
def test_planted_fault_is_caught(fault: Patch, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fault(monkeypatch)
    with pytest.raises(AssertionError):
        CHECKS[name]()
