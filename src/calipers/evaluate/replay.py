"""Counterexamples checked again, by other means than those that found them.

Membership is decided in rational arithmetic on the numbers as stored; outputs by onnxruntime, and by torch in the
network's own precision and in float64, each point alone. A decimal in a text stands for itself; a network is run on the
nearest number of its precision, which may be the member in its place. Where only the decimals are members (X_0 = 0.1
holds at no float32), the float64 network is run on them. Three classes:

- *strict*: a member of the exact set that breaks the property in every evaluation;
- *tolerant*: what competitions let pass. The point is at most `TOLERANCE` of the set's size outside of it, or a bound
  holds only as rounded to the network's precision; the judge (onnxruntime, or else torch) says that the property is
  broken, and the other evaluations come within `TOLERANCE` of the outputs' size of saying so;
- *fails*: neither.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from calipers.bracket import Model
from calipers.errors import DataError, SpecError
from calipers.evaluate.checks import onnxruntime_replica
from calipers.evaluate.witnesses import Witnesses
from calipers.graph.graph import Network, evaluating
from calipers.rounding import exact
from calipers.sets import ThreatModel
from calipers.spec import Spec
from calipers.vnnlib import Query, Values, read_decimals

TOLERANCE = 1e-4
Class = Literal["strict", "tolerant", "fails"]


@dataclass(frozen=True)
class Replayed:
    """What became of one counterexample.

    Args:
        margins: evaluation -> the property's margin at the point; at most 0 where it is broken, NaN where outputs are.
        outside: how far the point is outside of the exact set, in units of the set's size; 0 for a member.
        reason: why it has its class.
    """

    name: str
    verdict: Class
    reason: str
    outside: float
    margins: Mapping[str, float]

    def json(self) -> dict[str, Any]:
        numbers = {k: v if math.isfinite(v) else str(v) for k, v in self.margins.items()}
        outside = self.outside if math.isfinite(self.outside) else str(self.outside)
        return {**vars(self), "margins": numbers, "outside": outside}


class Said(NamedTuple):
    """What one evaluation says of a point: whether it breaks the property as it is, whether it would within the input
    tolerance, the margin, and the size of the outputs."""

    strict: bool
    tolerant: bool
    margin: float
    size: float


def evaluations(network: Network) -> tuple[dict[str, Model], tuple[str, ...]]:
    """The evaluations by name, the judge first, and a note if onnxruntime is not among them."""
    own = str(network.dtype).removeprefix("torch.")
    runtime = onnxruntime_replica(network)
    found: dict[str, Model] = {} if isinstance(runtime, str) else {"onnxruntime": runtime}
    found[f"torch {own}"] = network
    if network.dtype is not torch.float64:
        found["torch float64"] = network.in_double()
    return found, ((runtime,) if isinstance(runtime, str) else ())


@torch.no_grad()
def replay(witnesses: Witnesses, network: Network) -> tuple[list[Replayed], tuple[str, ...]]:
    """Each witness replayed on ``network``, and notes.

    Raises:
        DataError: the network takes other inputs, or has other outputs.
    """
    witnesses.require_fit(network)
    with evaluating(network.module):
        models, notes = evaluations(network)
        return [_witness(witnesses, row, models, network) for row in range(len(witnesses))], notes


def _witness(
    witnesses: Witnesses, row: int, models: Mapping[str, Model], network: Network
) -> Replayed:
    part = slice(row, row + 1)
    clean, x = witnesses.clean[part], witnesses.x[part].to(network.dtype)
    spec = Spec.label(witnesses.y[part].to(network.device), network.num_classes)
    outside = excess(witnesses.threat, clean, x)
    near = outside <= TOLERANCE

    def judge(y: Tensor) -> Said:
        broken = bool(spec.violated(y))
        margin = spec.margin(spec.values(y)).item()
        return Said(broken and outside == 0, broken and near, margin, y.abs().max().item())

    name = f"example {int(witnesses.index[row])}"
    return _classify(name, float(outside), x.to(network.device), models, judge)


def excess(threat: ThreatModel, clean: Tensor, x: Tensor) -> Fraction | float:
    """How far ``x`` (1, *x) is outside the exact set around ``clean``, in rational arithmetic on the stored numbers.

    In units of the radius and of the domain's width; 0 for a member, inf where there is no tolerance (a frozen feature
    that moved, a radius of 0, a point off the grid). The centre always counts as inside the domain.
    """
    if threat.grid is not None:
        return 0 if bool(threat.around(clean).contains(x)) else math.inf
    gaps = [Fraction(a) - Fraction(b) for a, b in zip(_flat(x), _flat(clean), strict=True)]
    if threat.mask is not None:
        frozen = (~threat.mask.expand(clean.shape[1:])).flatten().tolist()
        if any(f and g for f, g in zip(frozen, gaps, strict=True)):
            return math.inf
    return max(_beyond_ball(threat, clean, gaps), _beyond_domain(threat, clean, gaps))


def _flat(x: Tensor) -> list[float]:
    values: list[float] = x.detach().double().flatten().tolist()
    return values


def _numbers(value: Any, clean: Tensor) -> Sequence[Fraction | float]:
    """A radius or a bound, one number per feature."""
    if isinstance(value, Tensor):
        return [_exact(v) for v in _flat(value.expand(clean.shape[1:]))]
    return [_exact(value)] * clean[0].numel()


def _exact(value: Any) -> Fraction | float:
    return value if isinstance(value, float) and math.isinf(value) else exact(value)


def _share(over: Fraction | float, size: Fraction | float) -> Fraction | float:
    if over <= 0:
        return 0
    return over / size if size else math.inf


def _beyond_ball(threat: ThreatModel, clean: Tensor, gaps: Sequence[Fraction]) -> Fraction | float:
    radii = _numbers(threat.eps, clean)
    if threat.p == math.inf:
        return max(_share(abs(g) - r, r) for g, r in zip(gaps, radii, strict=True))
    if threat.p == 1:
        return _share(sum(map(abs, gaps)) - radii[0], radii[0])
    square = sum((g * g for g in gaps), Fraction(0))
    if square <= radii[0] * radii[0]:
        return 0
    if not radii[0]:
        return math.inf
    # the square root is taken in float64; that the point is outside is exact already
    return max(math.sqrt(square / (radii[0] * radii[0])) - 1, math.ulp(1.0))


def _beyond_domain(
    threat: ThreatModel, clean: Tensor, gaps: Sequence[Fraction]
) -> Fraction | float:
    most: Fraction | float = 0
    sides = (_flat(clean), gaps, *(_numbers(v, clean) for v in (threat.lower, threat.upper)))
    for center, gap, low, high in zip(*sides, strict=True):
        over = max(min(low - Fraction(center), 0) - gap, gap - max(high - Fraction(center), 0))
        most = max(most, _share(over, high - low))
    return most


# -- VNN-LIB ---------------------------------------------------------------------------------------------


@torch.no_grad()
def replay_assignment(
    path: str | Path, query: Query, network: Network
) -> tuple[Replayed, tuple[str, ...]]:
    """A counterexample in a text file, of whichever tool, against ``query``, and notes.

    Only its inputs count, in the network's precision; outputs are computed. The query should be read with the network's
    dtype (``vnnlib.load(..., dtype=network.dtype)``), which is the reading of a *tolerant* pass.

    Raises:
        SpecError: no assignment, or not one of this query.
        DataError: the query is one of another network.
    """
    sizes = (math.prod(network.input_shape), network.num_classes)
    if (query.input.size, query.output.size) != sizes:
        raise DataError(
            f"{query.path}: {query.input.size} inputs and {query.output.size} outputs; the network has {sizes[0]} and "
            f"{sizes[1]}"
        )
    values = read_decimals(path)
    inputs = values.get(query.input.name)
    if inputs is None or len(inputs.numbers) != query.input.size:
        found = ", ".join(f"{k} with {len(v.numbers)}" for k, v in values.items())
        raise SpecError(
            f"{path}: expected {query.input.name} with {query.input.size} numbers, as {query.path} declares; found "
            f"{found}"
        )
    written = inputs.floats().reshape(1, *network.input_shape).to(network.device)
    x = written.to(network.dtype)
    near = list(_near(query, x.cpu()))
    outside = min((o for o, _, _ in near), default=math.inf)
    with evaluating(network.module):
        models, notes = evaluations(network)
        point: Values = x
        y = next(iter(models.values()))(x)
        if not query.holds(x, y) and query.holds(inputs.numbers, y):
            point, double = inputs.numbers, network.in_double()
            models = {**models, "torch float64": lambda _: double(written)}

        def judge(y: Tensor) -> Said:
            flat = y.double().flatten().tolist()
            tolerant = any(query.holds(inside, flat, dtype=network.dtype) for _, inside, _ in near)
            margins = [spec.margin(spec.values(y.double())).item() for _, _, spec in near]
            size = y.abs().max().item()
            return Said(query.holds(point, flat), tolerant, min(margins, default=math.inf), size)

        return _classify(Path(path).name, outside, x, models, judge), notes


def _near(query: Query, x: Tensor) -> Iterator[tuple[float, Tensor, Spec]]:
    """The boxes at most `TOLERANCE` of their width away: how far, the nearest point in each, what must hold there."""
    for region, spec, _ in query.cases:
        low, high = region.lower, region.upper
        over = torch.maximum(low - x.double(), x.double() - high).flatten(1)
        width = (high - low).flatten(1)
        share = torch.where(over > 0, over / width, 0.0).amax(
            1
        )  # a side without width has no tolerance
        ends = region.inner(x.dtype)
        for row in torch.nonzero(share <= TOLERANCE).flatten().tolist():
            inside = x[0].maximum(ends.lower[row]).minimum(ends.upper[row])
            yield share[row].item(), inside, spec[row : row + 1]


# -- the verdict -----------------------------------------------------------------------------------------


def _classify(
    name: str,
    outside: float,
    x: Tensor,
    models: Mapping[str, Model],
    judge: Callable[[Tensor], Said],
) -> Replayed:
    said = {key: judge(model(x).cpu()) for key, model in models.items()}
    margins = {key: s.margin for key, s in said.items()}
    first = next(iter(said))
    place = "inside the set" if outside == 0 else f"{outside:.2g} of the set's size outside of it"
    if all(s.strict for s in said.values()):
        return Replayed(
            name, "strict", f"inside the set, broken in {', '.join(said)}", 0.0, margins
        )
    whole = [key for key, s in said.items() if not s.tolerant]
    unbroken = f"not broken in {', '.join(f'{k} (margin {margins[k]:.3g})' for k in whole)}"
    if outside > TOLERANCE:
        return Replayed(name, "fails", place, outside, margins)
    close = all(s.margin <= TOLERANCE * max(1.0, s.size) for s in said.values())  # NaN fails
    if not said[first].tolerant or not close:
        return Replayed(name, "fails", f"{place}, {unbroken}", outside, margins)
    if whole:
        reason = f"{place}, {unbroken}, within {TOLERANCE:g} of the outputs"
    elif outside > 0:
        reason = f"{place}, within {TOLERANCE:g}; broken in {', '.join(said)}"
    else:
        reason = (
            f"a bound holds only as rounded to the network's precision; broken in {', '.join(said)}"
        )
    return Replayed(name, "tolerant", reason, outside, margins)
