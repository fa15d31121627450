"""What a recipe returns: everything that determines the result of a training, and nothing else."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from calipers.attacks import pgd
from calipers.bounds import interval
from calipers.describe import describe
from calipers.errors import unknown_name
from calipers.sets import ThreatModel
from calipers.training.schedules import Schedule
from calipers.training.step import Objective

MEASURES = ("clean", "attacked", "certified")
DEVICES = ("cpu", "gpu")
STRONG = partial(pgd, steps=50, restarts=10, random_start=True)
NOTES = ("name", "about", "minutes", "hardware", "expected", "reference")


@dataclass(frozen=True, eq=False)
class Run:
    """A training, in full. Functions are module-level ones or partials of them, so that a run prints and pickles.

    Args:
        data: a built-in name or a path; see `calipers.data.load`.
        test: the path of the test examples where ``data`` is a path; None: none.
        model: builds the untrained module, with torch's global generator seeded.
        threat: what the result is evaluated against.
        objective: (network, x, y, threat, *, seeds, **knobs) -> Loss; its ``threat`` has the scheduled radius.
        eps: the training radius by epoch.
        knobs: further keyword arguments of the objective, by epoch.
        optimiser: (parameters) -> torch optimiser; its learning rate is set from ``lr`` before each step.
        clip: the largest norm of a gradient; None: no limit.
        l1: weight of the sum of |W| over convolutions and linear layers.
        accumulate: a batch goes through in so many parts (batch normalisation sees the parts).
        replays: steps on each batch; the objective's perturbation is carried from one to the next.
        ema: decay of averaged weights, which are then what is evaluated.
        awp: radius, relative to a tensor's norm, of the adversarial weight perturbation, which doubles a step's cost;
            0: none.
        initialise: called on the new module.
        augment: (x, *, seeds) -> x.
        validation: so many training examples, the same for every seed, are kept for selection.
        select: the measure on these (``clean``, ``attacked``, ``certified``) whose best epoch is the result, among
            epochs at the full radius; None: the last epoch.
        fallback: the objective, with the same knobs, to go on with after catastrophic overfitting, from the last good
            epoch.
        attack, bounds: of the final evaluation; bounds in turn, each on what the ones before left open.
        check: epochs between measurements on the validation examples.
        device: ``cpu``, or ``gpu`` for a training that is out of reach without one.
        minutes, hardware, expected, reference: what it took and gave where it was measured, for people.
    """

    name: str
    data: str
    model: Callable[[], nn.Module]
    threat: ThreatModel
    objective: Objective
    eps: Schedule
    lr: Schedule
    epochs: int
    batch: int
    knobs: Mapping[str, Schedule] = field(default_factory=dict)
    optimiser: Callable[..., torch.optim.Optimizer] = torch.optim.Adam
    clip: float | None = None
    l1: float = 0.0
    accumulate: int = 1
    replays: int = 1
    ema: float | None = None
    awp: float = 0.0
    initialise: Callable[[nn.Module], None] | None = None
    augment: Callable[..., Tensor] | None = None
    validation: int = 0
    select: str | None = None
    fallback: Objective | None = None
    attack: Callable[..., Tensor] = STRONG
    bounds: tuple[Callable[..., Tensor], ...] = (interval,)
    check: int = 1
    test: str | None = None
    seed: int = 0
    device: str = "cpu"
    about: str = ""
    minutes: float | None = None
    hardware: str = ""
    expected: str = ""
    reference: str = ""

    def __post_init__(self) -> None:
        for name in ("epochs", "batch", "accumulate", "replays", "check"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)} is not at least 1")
        for name in ("l1", "awp", "validation"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}: {getattr(self, name)} is negative or not finite")
        for name, known in (("select", (None, *MEASURES)), ("device", DEVICES)):
            if getattr(self, name) not in known:
                raise unknown_name(name, getattr(self, name), [k for k in known if k])
        for wrong, message in self._combinations():
            if wrong:
                raise ValueError(message)

    def _combinations(self) -> tuple[tuple[bool, str], ...]:
        """What cannot be, and what to say then."""
        clip, ema = self.clip, self.ema
        return (
            (clip is not None and not clip > 0, f"clip: {clip} must be positive; None: no limit"),
            (
                ema is not None and not 0 <= ema < 1,
                f"ema: {ema} is not in [0, 1); None: no average",
            ),
            (
                self.select is not None and not self.validation,
                f"select: {self.select!r} needs validation examples; set validation, such as 5000",
            ),
            (
                self.batch % self.accumulate > 0,
                f"accumulate: {self.accumulate} does not divide batch: {self.batch}",
            ),
            (
                self.replays > 1 and self.accumulate > 1,
                "replays: each carries a perturbation of the whole batch; set accumulate=1",
            ),
            (
                self.replays > 1 and self.awp > 0,
                "awp: cannot be combined with replays; set one of the two to its default",
            ),
        )

    def describe(self) -> dict[str, Any]:
        """Every field that determines the result, as text or number: what tells two runs apart."""
        return {f.name: _plain(getattr(self, f.name)) for f in fields(self) if f.name not in NOTES}

    def full(self, epoch: float) -> bool:
        """Whether the radius has reached its last value at ``epoch``."""
        return self.eps(epoch) >= self.eps(self.epochs)


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, ThreatModel):
        return value.describe()
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in sorted(value.items())}
    if isinstance(value, tuple):
        return [_plain(v) for v in value]
    return describe(value)
