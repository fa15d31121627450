"""Training examples in memory, and which of them a step sees: functions of the seed and the step alone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from calipers.data import Data
from calipers.errors import DataError
from calipers.seeds import mixed
from calipers.sets import ThreatModel

SPLIT = 20_201  # the seed of the validation split: the same examples for every run


@dataclass(frozen=True, eq=False)
class Examples:
    """Images as bytes where every value is a whole number of 1/255 (a quarter of the memory), else as they came."""

    stored: Tensor
    y: Tensor

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The examples ``rows``, exactly as they came, and their labels."""
        x = self.stored[rows.to(self.stored.device)]
        if x.dtype == torch.uint8:
            x = x.to(torch.float32) / 255
        return x, self.y[rows.to(self.y.device)]


def stored(data: Data, rows: Tensor, device: torch.device) -> Examples:
    """The examples ``rows`` of ``data`` on ``device``."""
    x = data.x[rows]
    levels = (x * 255).round_()
    if bool(((levels >= 0) & (levels <= 255)).all()) and torch.equal(levels / 255, x):
        x = levels.to(torch.uint8)
    return Examples(x.to(device), data.y[rows].to(device))


def split(count: int, validation: int) -> tuple[Tensor, Tensor]:
    """Positions to train on and positions to select on, disjoint, both in rising order.

    Raises:
        DataError: not even one example would be left.
    """
    if validation >= count:
        raise DataError(
            f"validation: {validation} of {count} training examples leaves none to train on; ask for fewer"
        )
    order = torch.randperm(count, generator=torch.Generator().manual_seed(SPLIT))
    return order[validation:].sort().values, order[:validation].sort().values


def require_fit(data: Data, threat: ThreatModel, classes: int) -> None:
    """Labels are classes of the model, and examples lie in the threat's domain.

    Raises:
        DataError: they do not; the message has numbers and a remedy.
    """
    top = int(data.y.max())
    if top >= classes:
        raise DataError(
            f"{data.name}: labels go up to {top}, but the model has {classes} outputs (classes 0..{classes - 1}); "
            "number the classes from 0, or build the model with more outputs"
        )
    for first in range(0, len(data), 2048):
        threat.around(data.x[first : first + 2048])


@lru_cache(maxsize=2)
def order(count: int, seed: int, epoch: int) -> Tensor:
    """The order of epoch ``epoch``, a permutation of 0..count − 1."""
    generator = torch.Generator().manual_seed(int(mixed(torch.tensor([seed]), epoch)))
    return torch.randperm(count, generator=generator)


def rows_of(step: int, *, count: int, batch: int, seed: int) -> Tensor:
    """The examples of step ``step``: every epoch a new order, cut into whole batches."""
    batch = min(batch, count)
    epoch, at = divmod(step, per_epoch(count, batch))
    return order(count, seed, epoch)[at * batch : (at + 1) * batch]


def per_epoch(count: int, batch: int) -> int:
    """Steps in an epoch; the examples that do not fill a batch wait for another epoch."""
    return max(1, math.floor(count / batch))


def seeds_of(rows: Tensor, *, seed: int, step: int) -> Tensor:
    """One seed for each of ``rows`` at ``step``."""
    return mixed(mixed(rows, seed), step)
