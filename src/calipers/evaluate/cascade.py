"""The order in which methods are tried: cheapest first, attacks and bounds in turn.

A stage sees only the examples that all earlier stages left UNKNOWN, so attacks run on what is not certified and
bounds on what is not broken.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from calipers.attacks import auto, fgsm, pgd
from calipers.bounds import alpha_crown, crown, crown_ibp, interval
from calipers.bounds.ladder import neurons
from calipers.describe import describe
from calipers.errors import unknown_name
from calipers.evaluate.solvers import complete
from calipers.graph.graph import Network
from calipers.sets import Region
from calipers.spec import Spec

Side = Literal["attack", "bound", "exact"]
LARGE = 4000  # rows of a full CROWN pass from which on float32 pays


@dataclass(frozen=True)
class Stage:
    """One method of a cascade.

    Args:
        side: ``attack`` (``method(model, region, spec, *, dtype, seeds)`` returns points) or ``bound``
            (``method(network, region, spec, *, dtype, rigorous)`` returns lower bounds of the functionals; it also gets
            ``memory=`` where the audit has such a limit); or ``exact``, one example at a time until the deadline
            (``method(network, region, spec, *, deadline, memory, accept)`` returns a `Complete`).
        cost: passes of the network per example, roughly; it only orders the stages.
        dtype: a bound's working precision. Its rounding is subtracted either way, so both are proofs.
    """

    name: str
    side: Side
    method: Callable[..., Any]
    cost: float = 1.0
    dtype: torch.dtype = torch.float64

    def describe(self) -> str:
        """Name, function, keywords and precision: what identifies the stage in a stored run."""
        precision = f" in {self.dtype}" if self.side == "bound" else ""
        return f"{self.name}: {self.side} {describe(self.method)}{precision}"


def clean(
    model: object,  # noqa: ARG001
    region: Region,
    spec: Spec,  # noqa: ARG001
    *,
    dtype: torch.dtype = torch.float32,
    seeds: Tensor | None = None,  # noqa: ARG001
) -> Tensor:
    """The examples themselves: the attack that changes nothing."""
    return region.center.to(dtype)


def default_cascade(network: Network | None = None) -> tuple[Stage, ...]:
    """clean, interval, FGSM, CROWN-IBP, PGD-20, CROWN, alpha-CROWN and the attack cascade, by rising cost for
    ``network``; then complete search, which needs a time limit.

    CROWN pulls back two rows per neuron, so on a large network it comes late, and works in float32, where it takes half
    the time and memory and the rounding that it subtracts is still small beside the margins.
    """
    search = partial(pgd, loss="margin", drop=True)
    rows = 0 if network is None else 2 * neurons(network)
    precision = torch.float32 if rows > LARGE else torch.float64
    stages = (
        Stage("clean", "attack", clean, 1),
        Stage("interval", "bound", interval, 2),
        Stage("fgsm", "attack", fgsm, 3),
        Stage("crown_ibp", "bound", crown_ibp, 15),
        Stage("pgd-20", "attack", partial(search, steps=20), 40),
        Stage("crown", "bound", crown, max(rows, 100), precision),
        Stage("alpha_crown", "bound", alpha_crown, max(6 * rows, 500), precision),
        Stage("auto", "attack", auto, 600),
        Stage("complete", "exact", complete, math.inf),
    )
    return tuple(sorted(stages, key=lambda stage: stage.cost))


def select(names: Sequence[str], network: Network | None = None) -> tuple[Stage, ...]:
    """The default cascade's stages of these names, in the cascade's order; always with ``clean``.

    Raises:
        ValueError: no such stage (with the nearest name), or no name at all.
    """
    stages = default_cascade(network)
    known = [stage.name for stage in stages]
    for name in names:
        if name not in known:
            raise unknown_name("methods", name, known)
    if not names:
        raise ValueError(f"methods: name at least one of {', '.join(known)}")
    return tuple(stage for stage in stages if stage.name in {"clean", *names})
