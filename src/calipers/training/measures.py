"""Clean, attacked and certified accuracy of a network in training, by the code that audits use."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from calipers.bounds.interval import propagate
from calipers.bounds.ladder import nonlinear_operands
from calipers.bounds.state import start
from calipers.bracket import witness
from calipers.graph.graph import Network, evaluating
from calipers.seeds import mixed
from calipers.sets import Region, ThreatModel
from calipers.spec import Spec
from calipers.training.normalisation import fixed

PART = 250  # examples at a time: more leave the cache


@dataclass(frozen=True)
class Measured:
    """Counts of examples: certified <= robust <= attacked <= clean.

    Args:
        attacked: correct, and not broken by the attack; None where none was run.
        certified: by each bound in turn; what an earlier one proved counts for the later ones.
        unknown: correct, neither certified nor broken.
    """

    n: int
    clean: int
    attacked: int | None = None
    certified: Mapping[str, int] = field(default_factory=dict)

    @property
    def proved(self) -> int:
        """Certified by any bound."""
        return max(self.certified.values(), default=0)

    @property
    def unknown(self) -> int:
        return (self.clean if self.attacked is None else self.attacked) - self.proved

    def shares(self) -> dict[str, float]:
        """``clean``, ``attacked``, ``certified`` as shares, where they were measured."""
        found = {"clean": self.clean / self.n}
        if self.attacked is not None:
            found["attacked"] = self.attacked / self.n
        if self.certified:
            found["certified"] = self.proved / self.n
        return found

    def json(self) -> dict[str, Any]:
        return {
            "n": self.n,
            "clean": self.clean,
            "attacked": self.attacked,
            "certified": dict(self.certified),
            "unknown": self.unknown,
        }


def measure(
    network: Network,
    x: Tensor,
    y: Tensor,
    threat: ThreatModel,
    *,
    bounds: Sequence[Callable[..., Tensor]] = (),
    attack: Callable[..., Tensor] | None = None,
    final: bool = True,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> Measured:
    """Accuracy of ``network`` in evaluation mode on ``x`` (N, *x): clean, certified by ``bounds``, under ``attack``.

    Each stage sees what the ones before left open: a certified example needs no attack.

    Sound: bounds subtract the rounding of their computation.

    Args:
        final: bounds in float64, and broken is what `calipers.witness` says; without, as a monitor, bounds in the
            network's dtype and broken is what its own arithmetic says.
        seed: of the attack's random starts.
        progress: called with the number of examples done.
    """
    clean = held = 0
    proved = [0] * len(bounds)
    with evaluating(network.module), torch.no_grad():
        model = fixed(network).frozen()  # what attacks climb on; the network itself decides
        for first in range(0, len(x), PART):
            rows = slice(first, first + PART)
            points, labels = x[rows].to(network.device, network.dtype), y[rows].to(network.device)
            spec, region = Spec.label(labels, network.num_classes), threat.around(points)
            alive = spec.margin_at(network(points)) > 0
            clean += int(alive.sum())
            certified = torch.zeros_like(alive)
            for i, bound in enumerate(bounds):
                left = (alive & ~certified).nonzero().flatten()
                certified[left] = _proved(network, region[left], spec[left], bound, final)
                proved[i] += int(certified.sum())
            if attack is not None:
                left = (alive & ~certified).nonzero().flatten()
                seeds = mixed(left.cpu() + first, seed)
                alive[left] = _held(
                    network, region[left], spec[left], partial(attack, model), seeds, final
                )
                held += int(alive.sum())
            if progress is not None:
                progress(min(first + PART, len(x)))
    names = [getattr(bound, "__name__", str(bound)) for bound in bounds]
    count = None if attack is None else held
    return Measured(len(x), clean, count, dict(zip(names, proved, strict=True)))


def _proved(
    network: Network, region: Region, spec: Spec, bound: Callable[..., Tensor], final: bool
) -> Tensor:
    if not len(region):
        return torch.zeros(0, dtype=torch.bool, device=network.device)
    exact = final or network.device.type != "cpu"  # elsewhere float32 has no error bound
    dtype = torch.float64 if exact else None
    return (bound(network, region, spec, dtype=dtype, rigorous=True) > 0).all(1)


def _held(
    network: Network,
    region: Region,
    spec: Spec,
    attack: Callable[..., Tensor],
    seeds: Tensor,
    final: bool,
) -> Tensor:
    """Which rows the attack did not break."""
    if not len(region):
        return torch.ones(0, dtype=torch.bool, device=network.device)
    with torch.enable_grad():
        points = attack(region, spec, seeds=seeds, dtype=network.dtype)
    broken = ~(spec.margin_at(network(points)) > 0)
    if final:
        rows = broken.nonzero().flatten()
        upper = witness(network, region[rows], spec[rows], points[rows]).upper
        broken[rows] = (upper <= 0).to(broken.device)
    return ~broken


@torch.no_grad()
def unstable(network: Network, x: Tensor, threat: ThreatModel) -> float:
    """The share of neurons that interval bounds leave undecided over the regions around ``x``: what costs bounds."""
    with evaluating(network.module):
        state = start(
            network, threat.around(x), dtype=network.dtype, rigorous=False, memory=None, statistics=None
        )  # fmt: skip
        propagate(state)
        masks = list(nonlinear_operands(state).values())
    total = sum(m.numel() for m in masks)
    return sum(int(m.sum()) for m in masks) / total if total else 0.0
