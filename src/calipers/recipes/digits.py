"""The digits in the package, in seconds: one recipe for each kind of training."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

from calipers.attacks import pgd as attack
from calipers.bounds import crown, interval
from calipers.recipes.choices import bounded
from calipers.sets import ThreatModel
from calipers.training import objectives
from calipers.training.initialise import ibp_initialise
from calipers.training.run import Run
from calipers.training.schedules import constant, one_cycle, smooth_ramp
from calipers.training.step import Loss
from calipers.zoo import mlp

EPS = 0.1
NETWORK = partial(mlp, 64, 64, 32, 10)
# clean, under PGD-50x10, certified (interval, then CROWN), in per cent of 500 test images, with seed 0
MEASURED = {
    "digits_standard": (97.8, 34.8, 12.2),
    "digits_pgd": (98.2, 83.2, 60.6),
    "digits_trades": (96.8, 82.8, 65.8),
    "digits_fgsm_rs": (98.8, 81.8, 53.2),
    "digits_n_fgsm": (97.2, 83.8, 61.8),
    "digits_free": (97.8, 80.4, 51.6),
    "digits_ibp": (95.4, 77.0, 75.4),
    "digits_crown_ibp": (96.4, 74.2, 72.8),
    "digits_mtl_ibp": (97.0, 79.6, 77.0),
    "digits_sabr": (96.2, 80.4, 74.4),
}


def _digits(
    name: str,
    objective: Callable[..., Loss],
    *,
    epochs: int,
    batch: int,
    lr: float,
    seed: int,
    **more: Any,
) -> Run:
    given = {
        "name": name,
        "data": "digits",
        "model": NETWORK,
        "threat": ThreatModel(math.inf, "0.1"),
        "objective": objective,
        "eps": constant(EPS),
        "lr": one_cycle(lr, epochs=epochs),
        "epochs": epochs,
        "batch": batch,
        "clip": 10.0,
        "attack": partial(attack, steps=50, step_size=0.05, restarts=10, random_start=True),
        "bounds": (interval, crown),
        "seed": seed,
        "minutes": 0.2,
        "hardware": "one CPU core",
        "expected": "{} % clean, {} % under attack, {} % certified".format(*MEASURED[name]),
    }
    return Run(**{**given, **more})


def digits_standard(*, epochs: int = 20, batch: int = 64, lr: float = 5e-3, seed: int = 0) -> Run:
    """Plain training: accurate, and not robust."""
    return _digits(
        "digits_standard", objectives.standard, epochs=epochs, batch=batch, lr=lr, seed=seed
    )


def digits_pgd(
    *,
    epochs: int = 30,
    batch: int = 64,
    lr: float = 1e-2,
    steps: int = 7,
    weight: float = 1.0,
    seed: int = 0,
) -> Run:
    """Adversarial training with PGD; weight < 1 mixes the clean loss in."""
    objective = partial(objectives.pgd, steps=steps, weight=weight)
    return _digits("digits_pgd", objective, epochs=epochs, batch=batch, lr=lr, seed=seed)


def digits_trades(
    *, epochs: int = 30, batch: int = 64, lr: float = 1e-2, beta: float = 6.0, seed: int = 0
) -> Run:
    """TRADES: clean cross-entropy and a divergence."""
    objective = partial(objectives.trades, steps=7, beta=beta)
    return _digits("digits_trades", objective, epochs=epochs, batch=batch, lr=lr, seed=seed)


def digits_fgsm_rs(
    *, epochs: int = 30, batch: int = 64, lr: float = 1e-2, step_size: float = 1.25, seed: int = 0
) -> Run:
    """One step from a random start; goes over to N-FGSM should it overfit catastrophically."""
    objective = partial(objectives.fgsm_rs, step_size=step_size)
    return _digits(
        "digits_fgsm_rs", objective, epochs=epochs, batch=batch, lr=lr, seed=seed,
        fallback=partial(objectives.n_fgsm),
    )  # fmt: skip


def digits_n_fgsm(
    *, epochs: int = 30, batch: int = 64, lr: float = 1e-2, noise: float = 2.0, seed: int = 0
) -> Run:
    """One step from a noisy example, not projected back."""
    objective = partial(objectives.n_fgsm, noise=noise)
    return _digits("digits_n_fgsm", objective, epochs=epochs, batch=batch, lr=lr, seed=seed)


def digits_free(
    *, epochs: int = 8, batch: int = 64, lr: float = 1e-2, replays: int = 4, seed: int = 0
) -> Run:
    """Free adversarial training: each batch several times, the perturbation kept."""
    return _digits(
        "digits_free",
        objectives.free,
        epochs=epochs,
        batch=batch,
        lr=lr,
        seed=seed,
        replays=replays,
    )


def digits_ibp(
    *,
    epochs: int = 60,
    batch: int = 64,
    lr: float = 5e-3,
    weight: float = 0.7,
    width: int = 64,
    bound: str = "interval",
    seed: int = 0,
) -> Run:
    """Certified by interval bounds: fast initialisation, smooth ramp, no regulariser needed at this size."""
    return _certified(
        "digits_ibp",
        partial(bounded(bound), weight=weight),
        epochs=epochs,
        batch=batch,
        lr=lr,
        model=partial(mlp, 64, width, width // 2, 10),
        seed=seed,
    )


def digits_crown_ibp(*, epochs: int = 60, batch: int = 64, lr: float = 5e-3, seed: int = 0) -> Run:
    """Certified by one backward pass over interval bounds."""
    return _certified(
        "digits_crown_ibp",
        partial(objectives.crown_ibp, weight=0.7),
        epochs=epochs,
        batch=batch,
        lr=lr,
        seed=seed,
    )


def digits_mtl_ibp(
    *, epochs: int = 60, batch: int = 64, lr: float = 5e-3, alpha: float = 0.5, seed: int = 0
) -> Run:
    """Between PGD (alpha 0) and interval bounds (alpha 1)."""
    return _certified(
        "digits_mtl_ibp", partial(objectives.mtl_ibp, alpha=alpha, steps=5), epochs=epochs, batch=batch, lr=lr,
        seed=seed,
    )  # fmt: skip


def digits_sabr(
    *, epochs: int = 60, batch: int = 64, lr: float = 5e-3, share: float = 0.4, seed: int = 0
) -> Run:
    """Interval bounds on a small box around an adversarial point."""
    return _certified(
        "digits_sabr",
        partial(objectives.sabr, share=share),
        epochs=epochs,
        batch=batch,
        lr=lr,
        seed=seed,
    )


def _certified(name: str, objective: Callable[..., Loss], *, epochs: int, **common: Any) -> Run:
    return _digits(
        name, objective, epochs=epochs, eps=smooth_ramp(EPS, end=epochs / 3), initialise=ibp_initialise,
        validation=200, select="certified", check=2, **common,
    )  # fmt: skip
