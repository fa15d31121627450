"""What the lectures show of trained networks: one norm's robustness is not another's, interval bounds say nothing
about a network that was not trained for them, and why nobody trains on the exact inner maximum. Loss
surfaces: `calipers.attacks.surface`."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from calipers.attacks import pgd
from calipers.bounds import interval
from calipers.bracket import witness
from calipers.exact import optima
from calipers.graph.graph import Network, evaluating
from calipers.seeds import mixed
from calipers.sets import ThreatModel
from calipers.spec import Spec
from calipers.training.points import worst as worst_of

Model = Callable[[Tensor], Tensor]
Attack = Callable[..., Tensor]


def cross_norm(
    model: Model,
    x: Tensor,
    y: Tensor,
    threats: Mapping[str, ThreatModel],
    *,
    num_classes: int,
    seeds: Tensor,
    attack: Attack = pgd,
) -> dict[str, float]:
    """The share of examples that the attack leaves correct under each threat model: an upper end of robust accuracy.

    A network trained for one of them is usually weak against the others.

    Args:
        attack: with the signature of `calipers.attacks`; success is decided by `calipers.witness`.
    """
    spec = Spec.label(y, num_classes)
    found = {}
    for name, threat in threats.items():
        region = threat.around(x)
        points = attack(model, region, spec, seeds=seeds)
        found[name] = float((witness(model, region, spec, points).upper > 0).float().mean())
    return found


@torch.no_grad()
def interval_reach(
    network: Network, x: Tensor, y: Tensor, threat: ThreatModel, radii: Sequence[float]
) -> dict[float, float]:
    """The share of examples that interval bounds certify at each radius, rounding subtracted.

    For a network that was trained on attacks it is 0 at radii far below those that no attack breaks.
    """
    spec = Spec.label(y, network.num_classes)
    found = {}
    with evaluating(network.module):
        for eps in radii:
            region = ThreatModel(threat.p, eps, threat.lower, threat.upper).around(x)
            margins = interval(network, region, spec, rigorous=True)
            found[eps] = float((spec.margin(margins) > 0).float().mean())
    return found


@dataclass(frozen=True)
class ExactStep:
    """One step on the exact inner maximum, beside one on an attack.

    Args:
        exact_loss, attacked_loss: the mean losses at the points found; the first is never the smaller one.
        exact_seconds, attacked_seconds: to find those points.
    """

    exact_loss: float
    attacked_loss: float
    exact_seconds: float
    attacked_seconds: float


def exact_step(
    network: Network,
    x: Tensor,
    y: Tensor,
    threat: ThreatModel,
    optimiser: torch.optim.Optimizer,
    *,
    seeds: Tensor,
    attack: Attack = pgd,
) -> ExactStep:
    """Update on the points of highest loss, found exactly: for two classes the loss rises as the one margin falls, so a
    mixed-integer program finds them.

    It is the step that adversarial training stands in for. Its time grows exponentially with the unstable neurons.

    Raises:
        ValueError: the network has more than two classes.

    Cost: a mixed-integer program for every example.
    """
    if network.num_classes != 2:
        raise ValueError(
            f"network: {network.num_classes} classes; the inner maximum is one program for two classes alone"
        )
    region, spec = threat.around(x), Spec.label(y, 2)
    with evaluating(network.module):
        begin = time.perf_counter()
        near = attack(network, region, spec, seeds=mixed(seeds, 0))
        middle = time.perf_counter()
        worst = []
        for i in range(len(x)):
            row = slice(i, i + 1)
            (optimum,) = optima(network, region[row], spec[row])
            worst.append(near[i] if optimum.point is None else optimum.point.to(x.dtype))
        end = time.perf_counter()
        # the worse of both, because a solver has tolerances
        points = worst_of(network, y, [torch.stack(worst), near])
    losses = [F.cross_entropy(network(p), y) for p in (points, near)]
    optimiser.zero_grad()
    losses[0].backward()  # type: ignore[no-untyped-call]
    optimiser.step()
    return ExactStep(losses[0].item(), losses[1].item(), end - middle, middle - begin)
