"""Can this model be attacked by gradients at all? Each check measures one number that a working attack keeps small.

A high empirical accuracy means robust, or that the attack failed. What failed attacks look like is known: no gradients,
or gradients that do not describe the model, so that random points, a single step, or an attack without gradients do
better, or so that even unlimited changes do not break it. A finding proves nothing about robustness; it says why an
attack's result should not be believed yet.

Reference: Athalye, Carlini and Wagner 2018, section 3.1; Carlini et al. 2019; Croce et al. 2020 and 2022.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from calipers.attacks.apgd import apgd
from calipers.attacks.cascade import search, stages_of
from calipers.attacks.gradient import fgsm, pgd
from calipers.attacks.inputs import input_gradient, outputs_of, traced
from calipers.attacks.losses import cross_entropy, margin_loss, read
from calipers.attacks.search import Model, required
from calipers.attacks.square import square
from calipers.errors import ModelError, unknown_name
from calipers.rounding import Number, enclose
from calipers.seeds import mixed
from calipers.sets import Region
from calipers.spec import Spec
from calipers.work import counted, counting

SHORT, LONG = 10, 100  # steps of the two attacks that are compared
DRAWS = 20  # random points per example, half of them corners
CLOSE = 1e-4  # of the inputs' range: float32 outputs show it, and it rarely crosses a border of 8-bit rounding
FEATURES = 8  # that are changed so: with all of a large image some would cross one
STEPS = 20  # of the attack on larger radii
DOUBLINGS = 30  # of the radius, where the domain has no end
ALONE = 8  # examples that are evaluated alone

# A threshold says from where on it is no accident. Shares are of the examples.
NONE = 0.0  # one case is one too many
REPEATED = 1e-6  # of the largest output: what sums in another order change in float32
BATCHED = 1e-4  # of the largest output: blocked products differ by more than repeated ones
LUCK = 0.02  # a different attack breaks one or the other example more on any model; a single one never counts
FEW = 0.05  # piecewise-linear networks have flat spots, attacks with few starts local optima; nor does a single one
MOST = 0.5  # a property of the model rather than of some examples
LOST = 2.0**-24  # from here on float32 rounds 1 − probability to 0


@dataclass(frozen=True)
class Finding:
    """What one check found.

    Args:
        name: the check.
        warning: ``value`` exceeds ``threshold``, or is no number.
        value: a share of the examples, or a difference relative to the largest output.
        message: one sentence with the numbers.
        remedy: what to do about it.
        passes: passes of the network that the check took, per example.
    """

    name: str
    warning: bool
    value: float
    threshold: float
    message: str
    remedy: str
    passes: float


@dataclass(frozen=True, eq=False)
class Case:
    """A model on a batch of examples, and what several checks ask of it, each computed once."""

    model: Model
    region: Region
    spec: Spec
    seeds: Tensor
    x: Tensor
    outputs: Tensor
    queries: int
    domain: tuple[Number | Tensor, Number | Tensor]

    def __len__(self) -> int:
        return len(self.x)

    @torch.no_grad()
    def margin(self, points: Tensor) -> Tensor:
        return self.spec.margin_at(self.model(points))

    @cached_property
    def scale(self) -> float:
        return max(1.0, self.outputs.nan_to_num(0.0, 0.0, 0.0).abs().max().item())

    @cached_property
    def clean(self) -> Tensor:
        return self.spec.margin_at(self.outputs)

    @cached_property
    @torch.no_grad()
    def repeated(self) -> float:
        """The largest difference of two passes over the same inputs."""
        return _apart(self.model(self.x), self.outputs) / self.scale

    @cached_property
    def deterministic(self) -> bool:
        return self.repeated <= REPEATED

    @cached_property
    def movable(self) -> bool:
        """Whether there is anything to choose: no radius of 0."""
        return bool((self.region.upper > self.region.lower).any())

    @cached_property
    def gradient(self) -> Tensor | str:
        """The input gradient of −margin, or why there is none."""
        try:
            with torch.enable_grad():
                point = self.x.clone().requires_grad_()
                y = traced(self.model, point, self.spec)
                return input_gradient(y, point, read(margin_loss, y.detach(), self.spec).toward)
        except ModelError as error:
            return str(error).removeprefix("model: ").splitlines()[0]

    @cached_property
    def differentiable(self) -> bool:
        return isinstance(self.gradient, Tensor)

    @cached_property
    def random(self) -> Tensor:
        """(DRAWS, B) margins at random members, every other one a corner (for balls: on the sphere)."""
        found = []
        for draw in range(DRAWS):
            point = self.region.sample(mixed(self.seeds, draw), self.x.dtype)
            found.append(self.margin(self.region.maximizer(point - self.x) if draw % 2 else point))
        return torch.stack(found)

    @cached_property
    def short(self) -> Tensor:
        return self._descent(SHORT)

    @cached_property
    def long(self) -> Tensor:
        return self._descent(LONG)

    def _descent(self, steps: int) -> Tensor:
        points = pgd(
            self.model, self.region, self.spec,
            steps=steps, step_size=2.5 / steps, loss=margin_loss, dtype=self.x.dtype,
        )  # fmt: skip
        return self.margin(points)

    @cached_property
    def white(self) -> Tensor:
        """The lowest margins that gradients found; without gradients those of the examples themselves."""
        if not self.differentiable:
            return self.clean
        cheap = stages_of("standard", self.region.p)[:3]  # as many passes as the black box's
        found = search(
            self.model, self.region, self.spec, level=cheap, dtype=self.x.dtype, seeds=self.seeds
        )
        if found.stopped == "interrupted":  # which `search` turns into a result
            raise KeyboardInterrupt
        return torch.stack([self.short, self.long, found.margin]).amin(0)


Measured = tuple[float, str]


def _apart(y: Tensor, z: Tensor) -> float:
    """The largest difference, NaN being equal to itself."""
    same = (y == z) | (y.isnan() & z.isnan())
    return torch.where(same, 0.0, y - z).abs().max().item()


def _share(rows: Tensor) -> float:
    return rows.double().mean().item()


def _of(rows: Tensor) -> str:
    return f"{int(rows.sum())} of {len(rows)} examples"


# -- the model alone -----------------------------------------------------------------------------------


def _not_finite(case: Case) -> Measured:
    rows = ~torch.isfinite(case.outputs).all(1)
    if case.movable:
        rows |= torch.isnan(case.random).any(0)
    return _share(rows), f"outputs are NaN or infinite at or around {_of(rows)}"


def _probabilities(case: Case) -> Measured:
    y = case.outputs.double()
    rows = (y >= 0).all(1) & (y <= 1).all(1) & ((y.sum(1) - 1).abs() <= 1e-3)
    full = int(((y.amax(1) >= 1 - 1e-6) & rows).sum())
    return _share(rows), f"outputs are in [0, 1] and sum to 1 for {_of(rows)}, with a 1 for {full}"


def _random(case: Case) -> Measured:
    size = case.repeated
    return size, f"a second pass over the same inputs differs by {size:.2g} of the largest output"


@torch.no_grad()
def _batched(case: Case) -> Measured:
    count = min(ALONE, len(case))
    alone = torch.cat([case.model(case.x[i : i + 1]) for i in range(count)])
    apart = _apart(alone, case.outputs[:count]) / case.scale
    return (
        apart,
        f"{count} examples evaluated alone differ from the batch by {apart:.2g} of the largest output",
    )


@torch.no_grad()
def _constant(case: Case) -> Measured:
    """From a random member towards another, so that inputs stay valid and off what borders the data may lie on."""
    base, away = (case.region.sample(mixed(case.seeds, i), case.x.dtype) for i in (0, 1))
    gap = (away - base).flatten(1)
    large = gap.abs().topk(min(FEATURES, gap.shape[1])).values
    share = CLOSE * (case.x.max() - case.x.min()) / large[:, :1].clamp_min(1e-30)
    step = torch.where(gap.abs() >= large[:, -1:], gap, 0.0) * share.clamp(1e-3, 1.0)
    same = (case.model(base + step.view_as(base)) == case.model(base)).all(1)
    return (
        _share(same),
        f"changing {large.shape[1]} features by up to {step.abs().amax():.1g} changes no output for {_of(same)}",
    )


# -- gradients -------------------------------------------------------------------------------------------


def _no_gradient(case: Case) -> Measured:
    if isinstance(case.gradient, str):
        return 1.0, f"torch cannot differentiate the model: {case.gradient}"
    return 0.0, "torch can differentiate the model"


def _zero(case: Case) -> Measured:
    flat = _gradient(case).flatten(1)
    rows = ~(flat != 0).any(1)
    entries = (flat == 0).double().mean().item()
    return _share(
        rows
    ), f"the input gradient is 0 for {_of(rows)}, in {entries:.0%} of all features"


def _unexplained(case: Case) -> Measured:
    """On an affine model no change exceeds the linearisation's best one."""
    gradient = _gradient(case)
    best = case.region.maximizer(gradient) - case.x
    predicted = (gradient * best).flatten(1).sum(1)
    seen = (case.random - case.clean).abs().median(0).values
    rows = seen > predicted + 1e-6 * case.scale
    message = (
        f"random points change the margin by {seen.median():.2g}, the gradient allows {predicted.median():.2g} at most "
        f"(medians); they exceed it for {_of(rows)}"
    )
    return _share(rows), message


def _saturated(case: Case) -> Measured:
    share = read(cross_entropy, case.outputs, case.spec).toward.abs().amax(1)
    rows = share <= LOST * case.spec.C.abs().amax().item()
    median = case.clean.median().item()
    message = (
        f"the margin has a median of {median:.3g}; in float32 the gradient of a softmax cross-entropy is lost from "
        f"{-math.log(LOST):.3g} on, which concerns {_of(rows)}"
    )
    return _share(rows), message


def _gradient(case: Case) -> Tensor:
    """Only where the check's needs are met."""
    if isinstance(case.gradient, str):
        raise ModelError(f"model: {case.gradient}")
    return case.gradient


# -- attacks against attacks -----------------------------------------------------------------------------


def _one_step(case: Case) -> Measured:
    points = fgsm(case.model, case.region, case.spec, loss=margin_loss, dtype=case.x.dtype)
    rows = (case.margin(points) <= 0) & ~(torch.minimum(case.short, case.long) <= 0)
    return _share(rows), f"one step breaks {_of(rows)} that {SHORT} and {LONG} steps do not"


def _longer_is_weaker(case: Case) -> Measured:
    rows = (case.short <= 0) & ~(case.long <= 0)
    return _share(rows), f"{SHORT} steps break {_of(rows)} that {LONG} smaller steps do not"


def _not_converged(case: Case) -> Measured:
    rows = (case.long <= 0) & ~(case.short <= 0)
    return _share(rows), f"{LONG} steps break {_of(rows)} that {SHORT} do not"


def _random_search(case: Case) -> Measured:
    best = case.random.amin(0)
    rows = (best < case.white - 1e-6 * case.scale) & (case.white > 0)
    return (
        _share(rows),
        f"the best of {DRAWS} random points is nearer to breaking than gradient steps came, for {_of(rows)}",
    )


def _black_box(case: Case) -> Measured:
    points = square(
        case.model, case.region, case.spec,
        queries=case.queries, dtype=case.x.dtype, seeds=mixed(case.seeds, DRAWS),
    )  # fmt: skip
    rows = (case.margin(points) <= 0) & ~(case.white <= 0)
    return _share(rows), f"{case.queries} queries break {_of(rows)} that gradient attacks do not"


def _everything_allowed(case: Case) -> Measured:
    """The radius is doubled until all is broken or the whole domain is allowed."""
    region = case.region
    mask = region.upper > region.lower
    low, high = (enclose(side, "domain").lower.to(case.x.device) for side in case.domain)
    low = torch.where(mask, torch.minimum(low, region.lower), region.center)
    high = torch.where(mask, torch.maximum(high, region.upper), region.center)
    left = torch.nonzero(~(case.white <= 0)).flatten()
    where = "at the radius itself"
    for doubling in range(1, DOUBLINGS + 1):
        if not len(left):
            break
        eps, sides = region.eps[left] * 2.0**doubling, (low[left], high[left])
        covered = _covers(eps, region.p, (high - low)[left])
        radius, p = (math.inf, math.inf) if covered else (eps, region.p)
        wide = Region.ball(region.center[left], radius, p, *sides)
        points = apgd(case.model, wide, case.spec[left], steps=STEPS, dtype=case.x.dtype)
        with torch.no_grad():
            left = left[~(case.spec[left].margin_at(case.model(points)) <= 0)]
        where = "in the whole domain" if covered else f"at {2**doubling} times the radius"
        if covered:
            break
    rows = torch.zeros_like(case.clean, dtype=torch.bool).index_fill(0, left, True)
    return _share(rows), f"{where}, gradient attacks leave {_of(rows)} unbroken"


def _covers(eps: Tensor, p: float, width: Tensor) -> bool:
    """Whether balls of these radii (one each, or per feature) hold every box of these widths around their centres."""
    if eps.ndim > 1:
        return bool((eps >= width).logical_or(width == 0).all())
    return bool((eps >= torch.linalg.vector_norm(width.flatten(1), ord=p, dim=1)).all())


# -- the table -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Check:
    """What is measured, from where on it is a warning, what to do then, and the facts of the `Case` that it needs."""

    measure: Callable[[Case], Measured]
    threshold: float
    remedy: str
    needs: tuple[str, ...] = ()


_STEPS = ("differentiable", "movable")
_SMOOTH = (
    "find the step without a useful gradient, and attack through calipers.straight_through, or with "
    "calipers.square"
)
_DISTRUST = (
    "do not report this attack: try random starts, other losses, calipers.auto and calipers.square"
)
CHECKS: dict[str, Check] = {
    "outputs not finite": Check(
        _not_finite,
        NONE,
        "check weights and scaling: NaN never counts as broken, so it looks robust",
    ),
    "probabilities": Check(
        _probabilities,
        MOST,
        "return logits: drop the final softmax, through which gradients vanish",
    ),
    "random outputs": Check(
        _random,
        REPEATED,
        "attack calipers.expectation(model, samples, seed), and say what robust is to mean",
    ),
    "mixed batch": Check(
        _batched,
        BATCHED,
        "use running statistics, and keep the examples of a batch independent",
        ("deterministic",),
    ),
    "piecewise constant": Check(_constant, MOST, _SMOOTH, ("deterministic", "movable")),
    "no gradient": Check(
        _no_gradient,
        NONE,
        "use calipers.square, which needs forward passes alone, or return to torch operators",
    ),
    "zero gradients": Check(_zero, FEW, _SMOOTH, _STEPS),
    "misleading gradients": Check(_unexplained, FEW, _SMOOTH, _STEPS),
    "saturated loss": Check(
        _saturated,
        FEW,
        'attack the margin (loss="margin" or "dlr"), whose gradient has no scale',
        _STEPS,
    ),
    "one step beats many": Check(_one_step, LUCK, _DISTRUST, _STEPS),
    "longer is weaker": Check(_longer_is_weaker, FEW, _DISTRUST, _STEPS),
    "not converged": Check(_not_converged, FEW, "use more steps, or calipers.auto", _STEPS),
    "random beats gradient": Check(_random_search, FEW, _DISTRUST, _STEPS),
    "black box beats gradient": Check(_black_box, FEW, _DISTRUST, ("movable",)),
    "unbroken at any radius": Check(
        _everything_allowed,
        LUCK,
        "an attack that may change everything must succeed: this one does not work",
        _STEPS,
    ),
}


def diagnose(
    model: Model,
    region: Region,
    spec: Spec,
    *,
    checks: Sequence[str] = tuple(CHECKS),
    queries: int = 300,
    domain: tuple[Number | Tensor, Number | Tensor] = (0.0, 1.0),
    dtype: torch.dtype = torch.float32,
    seeds: Tensor | None = None,
) -> list[Finding]:
    """Why an attack's failure on these examples should not be believed yet: one finding per check of `CHECKS`.

    Works on any callable; without a gradient only the checks that need none are made, and checks of changes are
    left out where the radius is 0. No finding is a proof in either direction.

    Args:
        checks: names, in the order in which they are made.
        queries: of the black-box attack, per example.
        domain: the input domain, up to which the radius is doubled.
        dtype: of the inputs, normally the model's.
        seeds: (B,) one seed per example; all zero if not given.

    Raises:
        ModelError: the outputs are not one row of numbers per example, as many as the specification has.
        RegionError: a region is unbounded.
        ValueError: unknown check, or no example.

    Cost: 400 to 1000 passes per example, of which 300 are the black box's and 400 the gradient attacks' that it is
        compared with; 50 to 100 examples tell. Each finding says what it took.
    """
    if not len(region):
        raise ValueError("region: no examples; there is nothing to diagnose")
    unknown = [name for name in checks if name not in CHECKS]
    if unknown:
        raise unknown_name("check", unknown[0], CHECKS)
    x = region.project(region.center.to(dtype))
    seeds = required(seeds, len(region), random=False)
    forward = counted(model)
    with torch.no_grad():
        y = outputs_of(forward(x), spec, len(x))
    case = Case(forward, region, spec, seeds, x, y, queries, domain)
    found = (_finding(name, CHECKS[name], case) for name in checks)
    return [finding for finding in found if finding is not None]


def _finding(name: str, check: Check, case: Case) -> Finding | None:
    with counting() as work:
        if not all(getattr(case, fact) for fact in check.needs):
            return None
        value, message = check.measure(case)
    threshold = check.threshold
    if threshold in (LUCK, FEW):
        threshold = max(threshold, 1 / len(case))
    warning = not value <= threshold
    return Finding(name, warning, value, threshold, message, check.remedy, work.passes / len(case))


def lines(findings: Sequence[Finding], *, all_of_them: bool = True) -> list[str]:
    """The findings as lines of plain text, a warning with its remedy on a second line.

    Args:
        all_of_them: also the checks that found nothing.
    """
    width = max((len(f.name) for f in findings), default=0)
    out = []
    for f in findings:
        if f.warning:
            out += [
                f"warning  {f.name:{width}}  {f.message}",
                " " * (width + 11) + f"-> {f.remedy}",
            ]
        elif all_of_them:
            out.append(f"ok       {f.name:{width}}  {f.message}")
    return out
