"""Randomised smoothing: certificates that hold with a stated probability, and for the smoothed classifier alone.

The smoothed classifier predicts the class that the network gives most often to x + N(0, sigma²). It is never evaluated
exactly, only sampled, so nothing here is a `calipers.Bracket`, and no number from here may stand in a column of
certified accuracies.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor

from calipers.confidence import clopper_pearson
from calipers.seeds import mixed
from calipers.training.points import normal

ABSTAIN = -1
CHUNK = 1 << 22  # numbers of noise drawn at a time


@dataclass(frozen=True)
class Smoothed:
    """What sampling says about the smoothed classifier at each example, each statement wrong with probability at most
    ``failure``.

    Args:
        predicted: (B,) the class, or `ABSTAIN`.
        radius: (B,) the l2 radius within which the smoothed classifier predicts that class; 0 where it abstains.
        share: (B,) the lower confidence bound of the class's probability under noise.
        sigma, failure: of the noise, and the probability that an example's statement is wrong.
    """

    predicted: Tensor
    radius: Tensor
    share: Tensor
    sigma: float
    failure: float

    @property
    def abstained(self) -> Tensor:
        return self.predicted == ABSTAIN

    def accuracy(self, y: Tensor, radius: float = 0.0) -> float:
        """The share of examples with the right class at ``radius`` or more (more than 0 at radius 0)."""
        right = (self.predicted == y) & (self.radius > 0 if radius == 0 else self.radius >= radius)
        return float(right.float().mean())

    def describe(self) -> str:
        """One line that says what kind of statement this is."""
        return (
            f"probabilistic (randomised smoothing, sigma {self.sigma:g}): each example wrong with probability at most "
            f"{self.failure:g}; {int(self.abstained.sum())} of {len(self.predicted)} abstained"
        )


def smoothed(
    model: Callable[[Tensor], Tensor],
    x: Tensor,
    *,
    sigma: float,
    seeds: Tensor,
    num_classes: int,
    first: int = 100,
    draws: int = 10_000,
    failure: float = 0.001,
) -> Smoothed:
    """Predict and certify by sampling: an example's class and l2 radius hold with probability at least 1 − ``failure``.

        R = sigma·Φ⁻¹(p),   p a lower confidence bound of P[model(x + N(0, sigma²)) = class]

    The class is chosen by ``first`` draws, the bound comes from ``draws`` others (Clopper and Pearson). It abstains
    where p <= 1/2. Even where all draws agree R is at most `largest_radius`.

    Args:
        model: in evaluation mode.
        seeds: (B,) one for each example; results depend on nothing else.

    Raises:
        ValueError: an argument is out of range.

    Cost: ``first + draws`` forward passes for each example.
    Reference: Cohen et al. 2019, algorithms Predict and Certify, theorem 1.
    """
    if not sigma > 0 or not math.isfinite(sigma):
        raise ValueError(f"sigma: {sigma} must be positive")
    if first < 1 or draws < 1:
        raise ValueError(f"first: {first} and draws: {draws} must be at least 1")
    if not 0 < failure < 0.5:
        raise ValueError(f"failure: {failure} is not between 0 and 1/2")
    if seeds.shape != (len(x),):
        raise ValueError(
            f"seeds: shape {tuple(seeds.shape)} is not one for each of {len(x)} examples"
        )
    rows = []
    for example, seed in zip(x, seeds, strict=True):
        guess = _counts(model, example, seed, sigma, first, num_classes, 0)
        counted = _counts(model, example, seed, sigma, draws, num_classes, 1)
        label = int(guess.argmax())
        rows.append((label, lower_share(int(counted[label]), draws, failure)))
    share = torch.tensor([p for _, p in rows], dtype=torch.float64)
    radius = torch.tensor([radius_of(p, sigma) for _, p in rows], dtype=torch.float64)
    labels = torch.tensor([label for label, _ in rows])
    predicted = torch.where(radius > 0, labels, ABSTAIN)
    return Smoothed(predicted, radius, share, sigma, failure)


@torch.no_grad()
def _counts(
    model: Callable[[Tensor], Tensor],
    x: Tensor,
    seed: Tensor,
    sigma: float,
    draws: int,
    classes: int,
    purpose: int,
) -> Tensor:
    """How often each class is predicted under noise. NaN outputs count for no class."""
    counts = torch.zeros(classes, dtype=torch.int64, device=x.device)
    step = max(1, CHUNK // x.numel())
    for start in range(0, draws, step):
        number = torch.arange(start, min(start + step, draws), device=x.device)
        each = mixed(mixed(seed.to(x.device).expand(len(number)), purpose), number)
        points = x.expand(len(number), *x.shape)
        logits = model(torch.add(points, normal(each, points), alpha=sigma))
        if logits.shape != (len(number), classes):
            raise ValueError(
                f"num_classes: {classes}, but the model returns {tuple(logits.shape[1:])} outputs"
            )
        sure = ~torch.isnan(logits).any(1)
        counts += torch.bincount(logits.argmax(1)[sure], minlength=classes)
    return counts


def radius_of(share: float, sigma: float) -> float:
    """sigma·Φ⁻¹(share), 0 where the share is no majority."""
    if not share > 0.5:
        return 0.0
    return sigma * NormalDist().inv_cdf(min(share, 1 - 2**-53))


def largest_radius(sigma: float, draws: int, failure: float) -> float:
    """The radius where all draws agree: sigma·Φ⁻¹(failure^(1/draws)); more needs more draws."""
    return radius_of(failure ** (1 / draws), sigma)


def lower_share(successes: int, draws: int, failure: float) -> float:
    """The p with P[Binomial(draws, p) >= successes] = failure, a little below: the true share is less with
    probability at most ``failure``, whatever it is.

    Reference: Clopper and Pearson 1934, one-sided.
    """
    low, _ = clopper_pearson(successes, draws, 1 - 2 * failure)
    return low * (1 - 1e-9)  # its own rounding
