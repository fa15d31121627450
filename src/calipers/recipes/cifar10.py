"""CIFAR-10 with CNN7 on one GPU: certified at linf 2/255 and 8/255."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from functools import partial
from typing import Any

from calipers.bounds import crown_ibp, interval
from calipers.sets import ThreatModel
from calipers.training import objectives
from calipers.training.augment import flip_and_crop
from calipers.training.initialise import ibp_initialise
from calipers.training.networks import cnn7
from calipers.training.run import Run
from calipers.training.schedules import multistep, smooth_ramp
from calipers.training.step import Loss

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)


def _cnn7(
    name: str,
    levels: int,
    objective: Callable[..., Loss],
    *,
    epochs: int,
    batch: int,
    lr: float,
    l1: float,
    seed: int,
    **more: Any,
) -> Run:
    """The set-up that published results share; decays at 3/4 and 7/8 of the epochs, the ramp to half of them."""
    eps = float(Fraction(levels, 255))
    return Run(
        name=name,
        data="cifar10",
        model=partial(cnn7, mean=MEAN, std=STD),
        threat=ThreatModel(math.inf, f"{levels}/255"),
        objective=partial(objective, regularise=0.5, eps_max=eps),
        eps=smooth_ramp(eps, start=1, end=1 + epochs / 2),
        lr=multistep(lr, 0.75 * epochs, 0.875 * epochs),
        epochs=epochs,
        batch=batch,
        clip=10.0,
        l1=l1,
        initialise=ibp_initialise,
        augment=flip_and_crop,
        validation=5000,
        check=10,
        bounds=(interval, crown_ibp),
        seed=seed,
        device="gpu",
        **more,
    )


def cifar10_linf_8_255_ibp(
    *, epochs: int = 160, batch: int = 128, lr: float = 5e-4, weight: float = 1.0, seed: int = 0
) -> Run:
    """Interval bounds at 8/255."""
    return _cnn7(
        "cifar10_linf_8_255_ibp", 8, partial(objectives.ibp, weight=weight),
        epochs=epochs, batch=batch, lr=lr, l1=0.0, seed=seed, select="certified",
        expected="48.3 % clean, 34.4 % certified (Shi et al. 2021)", reference="Shi et al. 2021",
    )  # fmt: skip


def cifar10_linf_8_255_mtl_ibp(
    *, epochs: int = 160, batch: int = 128, lr: float = 5e-4, alpha: float = 0.6, seed: int = 0
) -> Run:
    """MTL-IBP at 8/255: interval bounds and one attack step."""
    objective = partial(objectives.mtl_ibp, alpha=alpha, steps=1, step_size=1.0)
    return _cnn7(
        "cifar10_linf_8_255_mtl_ibp", 8, objective,
        epochs=epochs, batch=batch, lr=lr, l1=0.0, seed=seed, select="certified",
        expected="54.3 % clean, 35.4 % certified at 240 epochs (CTBench)", reference="De Palma et al. 2024",
    )  # fmt: skip


def cifar10_linf_2_255_ibp(
    *, epochs: int = 160, batch: int = 128, lr: float = 5e-4, weight: float = 0.8, seed: int = 0
) -> Run:
    """Interval bounds at 2/255."""
    return _cnn7(
        "cifar10_linf_2_255_ibp", 2, partial(objectives.ibp, weight=weight),
        epochs=epochs, batch=batch, lr=lr, l1=1e-6, seed=seed, select="certified",
        expected="66.8 % clean, 52.9 % certified (Shi et al. 2021)", reference="Shi et al. 2021",
    )  # fmt: skip


def cifar10_linf_2_255_mtl_ibp(
    *, epochs: int = 160, batch: int = 128, lr: float = 5e-4, alpha: float = 0.036, seed: int = 0
) -> Run:
    """MTL-IBP at 2/255, with alpha for bounds without branch and bound; 0.01 needs it."""
    objective = partial(objectives.mtl_ibp, alpha=alpha, steps=1, step_size=1.0, scale=2.0)
    return _cnn7(
        "cifar10_linf_2_255_mtl_ibp", 2, objective,
        epochs=epochs, batch=batch, lr=lr, l1=3e-6, seed=seed,
        expected="75.9 % clean, 57.8 % certified by CROWN (CTRAIN)", reference="De Palma et al. 2024",
    )  # fmt: skip
