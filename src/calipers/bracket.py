"""Where the two jaws meet: a lower and an upper end on the minimal margin, with the evidence for each.

`witness` is the only function that may declare an example broken; every attack and solver goes through it.
"""

from __future__ import annotations

import copy
import enum
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from calipers.errors import ModelError, SoundnessError
from calipers.sets import Region
from calipers.spec import Spec
from calipers.work import Counted, bare, counted

Model = Callable[[Tensor], Tensor]


class Verdict(enum.Enum):
    """The value is the message."""

    ROBUST = "robust: no allowed change breaks it"
    VULNERABLE = "vulnerable: a witness breaks it"
    UNKNOWN = "unknown: neither proved nor broken"


@dataclass(frozen=True)
class Evidence:
    """Where one end of a bracket comes from.

    Args:
        method: the method that gave the end.
        seconds: its time for this example (a batch's time shared equally).
        work: passes of the network spent on this example (a batch's shared equally), see `calipers.work`.
        path: the file of a stored witness or certificate.
    """

    method: str
    seconds: float = 0.0
    work: float = 0.0
    path: str | None = None


@dataclass(frozen=True, eq=False)
class Bracket:
    """lower ≤ min over the region of the margin ≤ upper, per example; ``witness`` attains upper.

    All (B,) float64; ``rounding`` is the error radius of the two ends: lower may exceed upper by it
    without contradiction.
    """

    lower: Tensor
    upper: Tensor
    witness: Tensor | None = None
    rounding: Tensor | None = None
    lower_evidence: tuple[Evidence | None, ...] = ()
    upper_evidence: tuple[Evidence | None, ...] = ()

    def __post_init__(self) -> None:
        count = len(self.lower)
        # NaN is no bound: it becomes the end that says nothing
        ends = {
            "lower": torch.nan_to_num(
                self.lower.detach().double(), nan=-math.inf, posinf=math.inf, neginf=-math.inf
            ),
            "upper": torch.nan_to_num(
                self.upper.detach().double(), nan=math.inf, posinf=math.inf, neginf=-math.inf
            ),
            "rounding": torch.zeros(count, dtype=torch.float64)
            if self.rounding is None
            else self.rounding.double(),
            "lower_evidence": self.lower_evidence or (None,) * count,
            "upper_evidence": self.upper_evidence or (None,) * count,
        }
        for name, value in ends.items():
            object.__setattr__(self, name, value)

    @classmethod
    def unknown(cls, count: int) -> Bracket:
        """(−inf, inf) for each of ``count`` examples."""
        infinite = torch.full((count,), math.inf, dtype=torch.float64)
        return cls(-infinite, infinite)

    @classmethod
    def from_bound(cls, margin: Tensor, evidence: Evidence) -> Bracket:
        """A lower end alone. ``margin`` must already be safe against rounding."""
        count = len(margin)
        upper = torch.full((count,), math.inf, dtype=torch.float64)
        return cls(margin.cpu(), upper, lower_evidence=(evidence,) * count)

    def __len__(self) -> int:
        return len(self.lower)

    def __getitem__(self, index: Tensor) -> Bracket:
        rows = torch.arange(len(self))[index].tolist()
        return Bracket(
            self.lower[index],
            self.upper[index],
            None if self.witness is None else self.witness[index],
            self._radius[index],
            tuple(self.lower_evidence[i] for i in rows),
            tuple(self.upper_evidence[i] for i in rows),
        )

    @property
    def _radius(self) -> Tensor:
        assert self.rounding is not None  # noqa: S101 - set in __post_init__
        return self.rounding

    def meet(self, other: Bracket) -> Bracket:
        """The intersection: the larger lower and the smaller upper end of each row, with its witness and evidence.

        Raises:
            SoundnessError: a row is empty by more than its rounding radius, or the sizes differ.
        """
        if len(self) != len(other):
            raise SoundnessError(f"meet: {len(self)} rows against {len(other)}")
        raised, lowered = other.lower > self.lower, other.upper < self.upper
        lower, upper = (
            torch.maximum(self.lower, other.lower),
            torch.minimum(self.upper, other.upper),
        )
        radius = torch.maximum(self._radius, other._radius)
        low = tuple(_pick(self.lower_evidence, other.lower_evidence, raised))
        high = tuple(_pick(self.upper_evidence, other.upper_evidence, lowered))
        empty = lower - upper > radius
        if empty.any():
            row = int(torch.nonzero(empty)[0])
            raise SoundnessError(
                f"example {row}: lower end {lower[row].item():.9g} ({_name(low[row])}) exceeds upper end "
                f"{upper[row].item():.9g} ({_name(high[row])}) by more than the rounding {radius[row].item():.3g}; "
                "one of the two methods is wrong: please report it"
            )
        points = _merge(self, other, lowered)
        return Bracket(lower, upper, points, radius, low, high)

    def scatter(self, index: Tensor, other: Bracket) -> Bracket:
        """`meet` with a bracket that covers only the rows ``index``."""
        whole, radius = Bracket.unknown(len(self)), torch.zeros(len(self), dtype=torch.float64)
        whole.lower[index], whole.upper[index] = other.lower, other.upper
        radius[index] = other._radius
        low, high = list(whole.lower_evidence), list(whole.upper_evidence)
        for i, row in enumerate(torch.arange(len(self))[index].tolist()):
            low[row], high[row] = other.lower_evidence[i], other.upper_evidence[i]
        points = None
        if other.witness is not None:
            points = other.witness.new_zeros((len(self), *other.witness.shape[1:]))
            points[index] = other.witness
        whole = replace(
            whole,
            witness=points,
            rounding=radius,
            lower_evidence=tuple(low),
            upper_evidence=tuple(high),
        )
        return self.meet(whole)

    def verdict(self) -> list[Verdict]:
        """ROBUST where lower > 0, VULNERABLE where upper ≤ 0 (a tie is a failure), else UNKNOWN; both at once,
        which only rounding allows, is UNKNOWN."""
        proved, broken = self.lower > 0, self.upper <= 0
        return [
            Verdict.ROBUST
            if p and not b
            else Verdict.VULNERABLE
            if b and not p
            else Verdict.UNKNOWN
            for p, b in zip(proved.tolist(), broken.tolist(), strict=True)
        ]

    def reason(self, row: int) -> str:
        """Why a row has its verdict, in a few words."""
        lower, upper = self.lower[row].item(), self.upper[row].item()
        if lower > 0 and upper <= 0:
            return f"within rounding ({self._radius[row].item():.2g})"
        if lower > 0:
            return f"proved by {_name(self.lower_evidence[row])}"
        if upper <= 0:
            return f"broken by {_name(self.upper_evidence[row])}"
        return f"margin between {lower:.4g} and {upper:.4g}"

    def accuracy(self) -> tuple[float, float]:
        """(certified, empirical): the share proved robust, and the share not broken."""
        verdicts = self.verdict()
        certified = sum(v is Verdict.ROBUST for v in verdicts)
        broken = sum(v is Verdict.VULNERABLE for v in verdicts)
        count = max(len(verdicts), 1)
        return certified / count, (len(verdicts) - broken) / count


def _name(evidence: Evidence | None) -> str:
    return evidence.method if evidence else "?"


def _pick(
    first: tuple[Evidence | None, ...], second: tuple[Evidence | None, ...], take: Tensor
) -> list[Evidence | None]:
    return [b if t else a for a, b, t in zip(first, second, take.tolist(), strict=True)]


def _merge(first: Bracket, second: Bracket, take: Tensor) -> Tensor | None:
    """The witness of each row's upper end; NaN where that end came without a point."""
    points = first.witness if second.witness is None else second.witness
    if points is None:
        return None
    mask = take.to(points.device).reshape(-1, *[1] * (points.ndim - 1))
    none = torch.full_like(points, math.nan)
    if first.witness is None:
        without = torch.isfinite(first.upper).to(points.device).view_as(mask) & ~mask
        return torch.where(without, none, points)
    return torch.where(mask, none if second.witness is None else second.witness, first.witness)


def in_double(model: Model) -> Model | None:
    """The same function in float64 without touching the caller's model, or None for a plain callable."""
    if isinstance(model, Counted):
        inner = in_double(model.model)
        return inner and counted(inner)
    if not isinstance(model, nn.Module):
        maker = getattr(model, "in_double", None)
        return maker() if maker else None
    twin = copy.deepcopy(model).double()
    return lambda x: twin(x.double())


def require_eval(model: object) -> None:
    """Refuse a module whose outputs depend on its batch or on chance: normalisation or dropout in training mode.

    Raises:
        ModelError: naming the layers.
    """
    model = bare(model)
    module = model if isinstance(model, nn.Module) else getattr(model, "module", None)
    if not isinstance(module, nn.Module):
        return
    kinds = (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd)  # noqa: SLF001
    names = [
        n or type(m).__name__
        for n, m in module.named_modules()
        if m.training and isinstance(m, kinds)
    ]
    if names:
        raise ModelError(
            f"model: {', '.join(names[:5])} in training mode; call .eval() before measuring"
        )


@torch.no_grad()
def witness(
    model: Model,
    region: Region,
    spec: Spec,
    x: Tensor,
    *,
    replicas: Sequence[Model] = (),
    evidence: Evidence | None = None,
) -> Bracket:
    """Upper ends from points: the margin at each row of ``x`` (B, *x), if it is a member of its region.

    The only place where success is decided. A row is broken only if the point is strictly in the exact set and its
    outputs are finite and violate the specification in *every* evaluation, each point alone in a batch of one: the
    model in its own dtype, in float64 where it is an ``nn.Module``, and each of ``replicas`` (onnxruntime, say).
    Rows outside the set, or with NaN outputs, get upper = inf.

    Raises:
        ModelError: normalisation or dropout is in training mode.
        ValueError: not one point and one specification for each region.

    Cost: two batched passes, and two single ones for each row that looks broken.
    """
    require_eval(model)
    if not len(x) == len(spec) == len(region):
        raise ValueError(
            f"x: {len(x)} points and {len(spec)} specifications for {len(region)} regions; one each is needed"
        )
    label = evidence or Evidence("witness")
    x = x.detach()
    own = _margins(model, spec, x)
    double = in_double(model)
    high = own if double is None else _margins(double, spec, x)
    upper = torch.maximum(own, high)
    rounding = (own - high).abs() + 64 * 2.0**-53 * (1 + own.abs())
    if double is None:
        rounding = rounding + 64 * torch.finfo(x.dtype).eps * (1 + own.abs())
    inside = region.contains(x)
    for row in torch.nonzero(inside & ((own <= 0) | (high <= 0))).flatten().tolist():
        upper[row] = _alone(model, double, replicas, spec[row : row + 1], x[row : row + 1])
    upper = torch.where(inside & ~torch.isnan(upper), upper, math.inf)
    rounding = torch.where(torch.isfinite(rounding), rounding, 0.0)
    lower = torch.full_like(upper, -math.inf)
    return Bracket(lower.cpu(), upper.cpu(), x, rounding.cpu(), upper_evidence=(label,) * len(x))


def _margins(model: Model, spec: Spec, x: Tensor) -> Tensor:
    y = model(x).double()
    margin = spec.margin(spec.values(y))
    return torch.where(torch.isfinite(y).all(-1), margin, torch.nan)


def _alone(
    model: Model, double: Model | None, replicas: Sequence[Model], spec: Spec, x: Tensor
) -> float:
    """The largest margin over all evaluations of one point; positive unless all of them are violations."""
    worst = -math.inf
    for forward in [model, *([double] if double else []), *replicas]:
        y = forward(x).double().to(x.device)
        margin = spec.margin(spec.values(y)).item()
        if math.isnan(margin) or not bool(torch.isfinite(y).all()):
            return math.inf
        if not spec.violated(y).item():
            margin = max(margin, math.ulp(0.0))
        worst = max(worst, margin)
    return worst
