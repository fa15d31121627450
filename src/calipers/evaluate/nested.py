"""What audits of the same examples at other radii say: sets around one input are nested.

    Region(eps) is contained in Region(eps') for eps <= eps'

so a certificate, or any lower end, holds at every smaller radius, and a witness, or any upper end, at every larger one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from calipers.bracket import Bracket, Evidence, Model, Verdict, witness
from calipers.evaluate.result import Audit, Row, Units, threat_identity
from calipers.evaluate.store import Store
from calipers.graph.graph import Network
from calipers.rounding import exact
from calipers.sets import ThreatModel
from calipers.spec import Spec
from calipers.work import counted

NAME = "carried"  # the stage of ends that come from audits before this one
CLOSING = "carried later"  # and from those after it
PART = 500  # examples a batch


def radius(threat: ThreatModel) -> Fraction:
    """The radius, exactly.

    Raises:
        ValueError: it is one per feature, or infinite.
    """
    eps = threat.eps
    if isinstance(eps, Tensor):
        if eps.ndim:
            raise ValueError(
                "eps: one radius per feature; radii are compared only where each is one number"
            )
        eps = eps.item()
    return exact(eps)


def require_related(
    known: Sequence[Audit], identity: Mapping[str, Any], positions: Tensor, threat: ThreatModel
) -> None:
    """Raises: ValueError: an audit in ``known`` measured something else, its radius, cascade and seed apart."""
    free = ("threat", "cascade", "seed")
    point = threat_identity(replace(threat, eps=0.0))
    for other in known:
        wrong = [
            name
            for name, value in identity.items()
            if name not in free and other.identity.get(name) != value
        ]
        if threat_identity(replace(other.threat, eps=0.0)) != point:
            wrong.append("threat")
        if not torch.equal(other.positions, positions):
            wrong.append("positions")
        if wrong:
            raise ValueError(
                f"known: the audit of {other.threat.describe()} is of another {', '.join(wrong)}; give audits of "
                "the same model and data that differ in eps alone"
            )


def carried(
    known: Sequence[Audit],
    threat: ThreatModel,
    network: Network,
    x: Tensor,
    y: Tensor,
    replicas: Sequence[Model] = (),
    start: Bracket | None = None,
) -> Bracket:
    """The bracket under ``threat`` that ``known``, audits of ``x`` at other radii, give.

    Every point is judged by `calipers.witness` again.

    Args:
        start: points that do not lower its upper ends are left out.
    """
    mine, bracket = radius(threat), Bracket.unknown(len(x))
    least = bracket.upper if start is None else start.upper
    for other in sorted(known, key=lambda a: radius(a.threat), reverse=True):
        theirs, found = radius(other.threat), other.bracket
        note = f" at eps {other.threat.eps}"
        if theirs >= mine:
            bracket = bracket.meet(_lower(found, note))
        if theirs <= mine and found.witness is not None:
            least = torch.minimum(least, bracket.upper)
            better = (found.upper < least) & (least > 0)
            for rows in torch.split(torch.nonzero(better).flatten(), PART):
                place = rows.to(x.device)
                points = found.witness[rows.to(found.witness.device)].to(x)
                spec = Spec.label(y[place], network.num_classes)
                part = witness(
                    counted(network), threat.around(x[place]), spec, points, replicas=replicas
                )
                said = _noted([found.upper_evidence[i] for i in rows.tolist()], note)
                bracket = bracket.scatter(rows, replace(part, upper_evidence=said))
    return bracket


def _lower(found: Bracket, note: str) -> Bracket:
    """The lower ends alone."""
    return Bracket(
        found.lower,
        torch.full_like(found.upper, math.inf),
        rounding=found.rounding,
        lower_evidence=_noted(found.lower_evidence, note),
    )


def _noted(evidence: Sequence[Evidence | None], note: str) -> tuple[Evidence | None, ...]:
    """The same, saying at which radius; what is already noted keeps its own, and the work was done elsewhere."""
    return tuple(
        e and Evidence(e.method if " at eps " in e.method else e.method + note, path=e.path)
        for e in evidence
    )


def row(bracket: Bracket, name: str = NAME) -> Row:
    """The method row of a carried bracket."""
    decided = sum(v is not Verdict.UNKNOWN for v in bracket.verdict())
    rows = informed(bracket)
    nothing = torch.zeros(len(rows), dtype=torch.float64)
    units = Units(rows, bracket.lower[rows], bracket.upper[rows], nothing, nothing)
    return Row(name, NAME, tried=len(rows), decided=decided, units=units)


def informed(bracket: Bracket) -> Tensor:
    """The rows with an end."""
    return torch.nonzero(torch.isfinite(bracket.lower) | torch.isfinite(bracket.upper)).flatten()


def keep(store: Store, bracket: Bracket, name: str = NAME) -> None:
    """Store a carried bracket, so that the run directory alone says all that its audit said."""
    rows = informed(bracket)
    if len(rows):
        store.add(name, rows.tolist(), bracket[rows], 0.0)
