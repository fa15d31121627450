"""One family of training losses: where the network is looked at, by which bound, and how the pieces are mixed.

    total = (1 − weight)·CE(clean) + weight·mix(step) + regulariser

A `Step` computes its pieces when they are first asked for: clean logits, an adversarial point and the logits there,
certified margins on a box, margins of a latent attack. `family` is the core; every objective of
`calipers.training.objectives` is a preset of it.

The network's module is in training mode. Nothing but its running statistics is touched, and those once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from calipers.bounds.losses import cross_entropy as margin_entropy
from calipers.graph.graph import Network
from calipers.sets import Region, ThreatModel
from calipers.spec import Spec
from calipers.training import latent, margins
from calipers.training.margins import Bound, Certified
from calipers.training.normalisation import (
    View,
    check_policy,
    fixed,
    normalised,
    observed,
    update_running,
)
from calipers.training.points import Point
from calipers.training.regions import around, box, radius
from calipers.training.regularise import shi

LEAST = 1e-6  # the radius at which a regulariser is computed while eps is still 0
PRECISIONS = {"bfloat16": torch.bfloat16, "float16": torch.float16}


class Loss(NamedTuple):
    """What an objective returns.

    Args:
        total: differentiate this.
        measures: 0-d, detached: losses, and the shares of the batch that are correct ("clean"), still correct under
            attack ("attacked") and certified ("certified"), as far as they were computed anyway.
        carry: of `free` alone: pass it to the next replay, after ``total.backward()``.
    """

    total: Tensor
    measures: Mapping[str, Tensor]
    carry: Tensor | None = None


Objective = Callable[..., Loss]
Mix = Callable[["Step"], Tensor]  # the robust loss of each example, (B,)
Box = Callable[["Step"], Region]


class Step:
    """What a mix may look at, computed when it is first asked for.

    Args:
        policy: whose batch statistics count: "clean_batch", those of the clean examples, also for the attack, the pass
            at its points and the bounds; "running", the running ones for all but the clean pass; "adversarial_batch",
            the running ones for the attack, then those of the adversarial batch for all else.
        point: finds adversarial points; None: ``x`` is one.
        precision: of the attack alone, by autocast.
    """

    def __init__(
        self,
        network: Network,
        x: Tensor,
        y: Tensor,
        threat: ThreatModel,
        seeds: Tensor,
        *,
        policy: str = "clean_batch",
        point: Point | None = None,
        region: Box | None = None,
        bound: Bound = margins.interval,
        precision: str | None = None,
    ) -> None:
        check_policy(policy)
        self.network, self.x, self.y, self.threat, self.seeds = network, x, y, threat, seeds
        self.policy, self._point, self._region, self._bound = policy, point, region, bound
        self.precision = None if precision is None else PRECISIONS[precision]
        self.normalised = normalised(network)
        if policy == "adversarial_batch" and point is None:
            raise ValueError(
                'policy: "adversarial_batch" needs an objective with an attack; use "clean_batch"'
            )

    @cached_property
    def spec(self) -> Spec:
        return Spec.label(self.y, self.network.num_classes)

    # -- passes, and the statistics that they leave behind

    @cached_property
    def before(self) -> View:
        """The network under its running statistics, as they were before this step."""
        return fixed(self.network)

    @cached_property
    def _clean(self) -> tuple[Tensor, View]:
        before = self.before if self.policy == "running" else None
        seen = observed(self.network, self.x)
        update_running(self.network, seen)
        return seen.logits, before or fixed(self.network, seen.statistics)

    @cached_property
    def _adversarial(self) -> tuple[Tensor, View]:
        seen = observed(self.network, self.point)
        update_running(self.network, seen)
        return seen.logits, fixed(self.network, seen.statistics)

    @cached_property
    def view(self) -> View:
        """The network as bounds see it."""
        if not self.normalised:
            return self.before
        return (self._adversarial if self.policy == "adversarial_batch" else self._clean)[1]

    @cached_property
    def clean(self) -> Tensor:
        """Logits at ``x`` (B, K)."""
        if self.policy == "adversarial_batch" and self.normalised:
            return self.view(self.x)
        return self._clean[0]

    @cached_property
    def point(self) -> Tensor:
        """The adversarial point (B, *x), a constant."""
        if self._point is None:
            return self.x
        seen = self.before if self.policy == "adversarial_batch" else self.view
        model = seen.frozen(self.precision)
        return self._point(model, self.threat, self.x, self.y, self.seeds)

    @cached_property
    def attacked(self) -> Tensor:
        """Logits at the adversarial point (B, K)."""
        if self.policy == "adversarial_batch" and self.normalised:
            return self._adversarial[0]
        return self.view(self.point)

    # -- bounds

    @cached_property
    def region(self) -> Region:
        return around(self.threat, self.x) if self._region is None else self._region(self)

    @cached_property
    def certified(self) -> Certified:
        """Margins on the region, (B, K − 1), and the intervals behind them."""
        return self._bound(self.view, self.region, self.spec)

    def latent(self, activations: int, **options: Any) -> Tensor:
        """Margins (B, K − 1) by an attack on the box before the last layers."""
        name = latent.cut(self.view.network.graph, activations)
        return latent.margins(
            self.view, self.certified.boxes[name], name, self.spec, self.seeds, **options
        )

    # -- losses of each example

    @property
    def clean_loss(self) -> Tensor:
        return F.cross_entropy(self.clean, self.y, reduction="none")

    @cached_property
    def attacked_loss(self) -> Tensor:
        """The mean over its points, where an example has several."""
        losses = F.cross_entropy(self.attacked, self.labels(self.attacked), reduction="none")
        return losses if len(losses) == len(self.y) else losses.reshape(-1, len(self.y)).mean(0)

    def labels(self, logits: Tensor) -> Tensor:
        """``y``, once for each round of the examples."""
        rounds = len(logits) // len(self.y)
        return self.y if rounds == 1 else self.y.repeat(rounds)

    @cached_property
    def certified_loss(self) -> Tensor:
        return margin_entropy(self.certified.margins)

    def measures(self) -> dict[str, Tensor]:
        """Of whatever has been computed."""
        found: dict[str, Tensor] = {}
        known = self.__dict__
        for name in ("clean", "attacked"):
            if name in known and (name == "clean" or self._point is not None):
                logits = known[name].detach()
                labels = self.labels(logits)
                found[f"{name}_loss"] = F.cross_entropy(logits, labels)
                found[name] = (logits.argmax(1) == labels).float().mean()
        if "clean" not in found and "_clean" in known:  # for its statistics alone
            found["clean"] = (known["_clean"][0].detach().argmax(1) == self.y).float().mean()
        if "certified" in known and self._region is None:
            bounds = known["certified"].margins.detach()
            found["certified_loss"] = margin_entropy(bounds).mean()
            found["certified"] = (bounds > 0).all(1).float().mean()
        return found


def family(
    network: Network,
    x: Tensor,
    y: Tensor,
    threat: ThreatModel,
    *,
    seeds: Tensor,
    mix: Mix,
    point: Point | None = None,
    region: Box | None = None,
    bound: Bound = margins.interval,
    weight: float = 1.0,
    policy: str = "clean_batch",
    regularise: float = 0.0,
    tolerance: float = 0.5,
    eps_max: float | None = None,
    precision: str | None = None,
) -> Loss:
    """(1 − weight)·CE(clean) + weight·mean(mix) + regularise·(1 − eps/eps_max)·(Shi's regulariser).

    Args:
        mix: the robust loss of each example.
        point, region, bound: see `Step`; the region is the threat's own unless given.
        regularise: the regulariser's weight at eps = 0; it fades while eps rises to ``eps_max``, and is then left out.
        precision: "bfloat16" runs the attack alone under autocast.

    Raises:
        ValueError: an argument is out of range.
    """
    if not 0 <= weight <= 1:
        raise ValueError(f"weight: {weight} is not between 0 and 1")
    if precision is not None and precision not in PRECISIONS:
        raise ValueError(f"precision: {precision!r} is not one of {', '.join(PRECISIONS)}")
    step = Step(
        network, x, y, threat, seeds,
        policy=policy, point=point, region=region, bound=bound, precision=precision,
    )  # fmt: skip
    terms: list[Tensor] = []
    extra: dict[str, Tensor] = {}
    if weight < 1:
        terms.append((1 - weight) * step.clean_loss.mean())
    if weight > 0:
        terms.append(weight * mix(step).mean())
    fading = _fading(threat, regularise, eps_max)
    if fading > 0:
        penalty = _regulariser(step, tolerance)
        extra["regulariser"] = penalty.detach()
        terms.append(fading * penalty)
    total = terms[0] if len(terms) == 1 else torch.stack(terms).sum()
    return Loss(total, {"loss": total.detach(), **step.measures(), **extra})


def _fading(threat: ThreatModel, regularise: float, eps_max: float | None) -> float:
    if not regularise:
        return 0.0
    if eps_max is None or not eps_max > 0:
        raise ValueError(f"eps_max: {eps_max!r}; the regulariser needs the radius at which it ends")
    return regularise * max(0.0, 1 - radius(threat) / eps_max)


def _regulariser(step: Step, tolerance: float) -> Tensor:
    found = step.certified
    source = step.network.graph.inputs[0]
    if radius(step.threat) < LEAST:  # a point has no width
        small = around(replace(step.threat, eps=LEAST), step.x)
        found = margins.interval(step.view, small, step.spec)
    return shi(found.boxes[source], found.boxes, found.preactivations, tolerance=tolerance)


# -- mixes ---------------------------------------------------------------------------------------------------


def at_x(step: Step) -> Tensor:
    """CE at the example itself."""
    return step.clean_loss


def at_point(step: Step) -> Tensor:
    """CE at the adversarial point."""
    return step.attacked_loss


def on_region(step: Step) -> Tensor:
    """CE at the certified margins."""
    return step.certified_loss


def summed(step: Step, *, alpha: float) -> Tensor:
    """alpha·CE(certified) + (1 − alpha)·CE(attacked)."""
    if alpha == 0:
        return step.attacked_loss
    if alpha == 1:
        return step.certified_loss
    return alpha * step.certified_loss + (1 - alpha) * step.attacked_loss


def multiplied(step: Step, *, alpha: float) -> Tensor:
    """CE(certified)^alpha · CE(attacked)^(1 − alpha)."""
    if alpha in (0, 1):
        return summed(step, alpha=alpha)
    tiny = torch.finfo(step.x.dtype).tiny
    logs = [loss.clamp_min(tiny).log() for loss in (step.certified_loss, step.attacked_loss)]
    return (alpha * logs[0] + (1 - alpha) * logs[1]).exp()


def combined(step: Step, *, alpha: float) -> Tensor:
    """CE of alpha·(certified margins) + (1 − alpha)·(margins at the adversarial point)."""
    if alpha in (0, 1):
        return summed(step, alpha=alpha)
    attacked = step.spec.values(step.attacked)
    return margin_entropy(alpha * step.certified.margins + (1 - alpha) * attacked)


def with_latent(step: Step, *, split: int, boost: float, steps: int, step_size: float) -> Tensor:
    """CE(latent margins)·CE(certified margins), the gradient of the first factor ``boost`` times as large."""
    inner = margin_entropy(step.latent(split, steps=steps, step_size=step_size))
    inner = boost * inner - (boost - 1) * inner.detach()
    return inner * step.certified_loss


def divergences(step: Step) -> Tensor:
    """KL(softmax(clean) ‖ softmax(attacked)) of each example; no logarithm of 0 occurs."""
    clean, attacked = (F.log_softmax(z, 1) for z in (step.clean, step.attacked))
    return F.kl_div(attacked, clean, reduction="none", log_target=True).sum(1)


def trades_mix(step: Step, *, beta: float) -> Tensor:
    return step.clean_loss + beta * divergences(step) if beta else step.clean_loss


def mart_mix(step: Step, *, beta: float) -> Tensor:
    label = step.y.unsqueeze(1)
    attacked = torch.softmax(step.attacked, 1)
    rival = attacked.scatter(1, label, 0.0).amax(1)
    boosted = step.attacked_loss - torch.log(1.0001 - rival)
    doubt = 1 - torch.softmax(step.clean, 1).gather(1, label).squeeze(1)
    return boosted + beta * divergences(step) * doubt


def small_box(step: Step, *, share: float) -> Region:
    """A box of ``share`` times the region's size, inside it, as close to the adversarial point as it can be."""
    if step.threat.p != float("inf"):
        raise ValueError(f"small boxes need p = inf, not p = {step.threat.p:g}")
    low, high = around(step.threat, step.x).inner(step.x.dtype)
    half = (high - low) * (share / 2)
    # centred between low + half and high − half, written so that share = 1 gives the region itself
    lower = torch.minimum(torch.maximum(step.point - half, low), high - 2 * half)
    lower = torch.maximum(lower, low)
    return box(lower, torch.minimum(lower + 2 * half, high))
