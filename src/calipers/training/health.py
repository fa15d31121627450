"""What goes wrong in robust training without an error, seen in the epochs' measures; findings say what to change.

A record is one epoch's: means over training batches (``clean``, ``attacked``, ``certified``), the probe's (``probe``:
PGD on fixed training examples; ``unstable``: the share of undecided neurons on them) and the validation split's
(``valid_clean``, ...). What is not in a record is not judged.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

History = Sequence[Mapping[str, float]]

PATIENCE = 2  # epochs that something must last
STEPS = 200  # before which guessing is no sign
CHANCE = 1.5  # times the accuracy of guessing
NEAR = 0.02  # of the loss of equal logits
FALL = 0.2  # of the probe's accuracy, from its best
GROWTH = 1.5  # of the share of unstable neurons, over what it was at the full radius
NOTICED = 0.1  # a share of unstable neurons that costs nothing


class Finding(NamedTuple):
    """What is wrong (``kind``) and what to do about it."""

    kind: str
    message: str


def chance(history: History, classes: int, *, full: bool) -> Finding | None:  # noqa: ARG001
    """The network guesses."""
    recent = history[-PATIENCE:]
    early = len(recent) < PATIENCE or recent[-1].get("step", STEPS) < STEPS
    if early or not all(_guesses(r, classes) for r in recent):
        return None
    seen = (
        "accuracy on training batches is {clean:.1%}"
        if "clean" in recent[-1]
        else "the loss is {loss:.3f}"
    )
    return Finding(
        "chance",
        f"{seen.format(**recent[-1])} after {len(history)} epochs, no better than guessing: let "
        "eps rise over more epochs (smooth_ramp), lower lr, or use batch normalisation and "
        "ibp_initialise",
    )


def _guesses(record: Mapping[str, float], classes: int) -> bool:
    """By accuracy, or, where only bounds are trained on, by a loss that is that of equal logits."""
    if "clean" in record:
        return record["clean"] <= CHANCE / classes
    return abs(record.get("loss", 0.0) - math.log(classes)) < NEAR


def overfitting(history: History, classes: int, *, full: bool) -> Finding | None:  # noqa: ARG001
    """Catastrophic overfitting: perfect against the training attack, helpless against PGD."""
    probes = [r["probe"] for r in history if "probe" in r]
    last = history[-1]
    if not probes or "probe" not in last or "attacked" not in last:
        return None
    fallen, gap = max(probes) - probes[-1], last["attacked"] - probes[-1]
    if fallen <= FALL or gap <= FALL:
        return None
    return Finding(
        "overfitting",
        f"catastrophic overfitting: PGD accuracy on training examples fell from {max(probes):.1%} to "
        f"{probes[-1]:.1%} while the training attack's is {last['attacked']:.1%}. Use n_fgsm or pgd "
        "with 2 steps or more, a smaller step, or a smaller eps",
    )


def uncertified(history: History, classes: int, *, full: bool) -> Finding | None:  # noqa: ARG001
    """Nothing is certified although the radius is the full one."""
    shares = [r["valid_certified"] for r in history if "valid_certified" in r and r.get("full")]
    if not full or len(shares) < PATIENCE or max(shares[-PATIENCE:]) >= 1e-3:
        return None
    return Finding(
        "uncertified",
        "no validation example is certified at the full radius: let eps rise over more epochs, give the bound's loss "
        "more weight, initialise with ibp_initialise, or use a smaller network",
    )


def unstable(history: History, classes: int, *, full: bool) -> Finding | None:  # noqa: ARG001
    """More and more neurons are undecided over the regions, at the full radius."""
    shares = [r["unstable"] for r in history if "unstable" in r and r.get("full")]
    if not full or len(shares) < PATIENCE + 1 or shares[-1] < NOTICED:
        return None
    if shares[-1] < GROWTH * min(shares):
        return None
    return Finding(
        "unstable",
        f"the share of unstable neurons grew from {min(shares):.1%} to {shares[-1]:.1%} at the full radius, so bounds "
        "get looser: raise l1 or the weight of the bound's loss, or lower lr",
    )


CHECKS: tuple[Callable[..., Finding | None], ...] = (chance, overfitting, uncertified, unstable)


def examine(history: History, classes: int, *, full: bool) -> list[Finding]:
    """Everything that is wrong after the last epoch of ``history``.

    Args:
        full: whether the training radius has reached its last value.
    """
    if not history:
        return []
    found = (check(history, classes, full=full) for check in CHECKS)
    return [f for f in found if f is not None]


def not_finite(epoch: float, loss: float, norm: float) -> str:
    """What to say when a step is NaN or infinite."""
    what = "loss" if not abs(loss) < float("inf") else "gradient"
    return (
        f"the {what} is not finite at epoch {epoch:.2f} (loss {loss:g}, gradient norm {norm:g}); the step was not "
        "taken. Lower lr, clip gradients (clip=10), let eps rise more slowly, and keep half precision to attacks"
    )
