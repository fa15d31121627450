"""Single examples for people: pictures before and after, what each method said, where the evidence is."""

from __future__ import annotations

import base64
import io
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

import numpy as np
import torch
from markupsafe import Markup
from torch import Tensor

from calipers.bracket import Verdict
from calipers.data import Data
from calipers.evaluate.pictures import Array, as_change, as_image, data_uri, vector_bars
from calipers.evaluate.result import Audit

KIND = {Verdict.ROBUST: "robust", Verdict.VULNERABLE: "broken", Verdict.UNKNOWN: "unknown"}
WORD = {Verdict.ROBUST: "certified", Verdict.VULNERABLE: "broken", Verdict.UNKNOWN: "unknown"}


@dataclass(frozen=True)
class Picture:
    """One input as a picture: a PNG data URI or an SVG, whichever is not None."""

    uri: str | None = None
    svg: Markup | None = None


@dataclass(frozen=True)
class Said:
    """What a method said about an example."""

    name: str
    side: str
    value: str
    seconds: float
    work: str


@dataclass(frozen=True)
class Shown:
    """An example before, the change, and after, with its bracket and where that comes from.

    Args:
        factor: what the picture of the change is multiplied by; 0 if there is none.
        low, high: the bracket's ends as numbers that JavaScript reads.
        span: up to which radius it is certified and from which it is broken, as texts and such numbers.
        witness: the point as a link that holds it.
        certificate: the file's name and a link to it, which is empty where it does not lie beside the report.
    """

    index: int
    label: str
    before: str
    after: str
    clean: Picture
    change: Picture
    adversarial: Picture
    size: str
    factor: float
    lower: str
    upper: str
    low: str
    high: str
    kind: str
    verdict: str
    reason: str
    seconds: float
    methods: tuple[Said, ...]
    span: tuple[str, str, str, str]
    witness: str
    certificate: tuple[str, str] | None


class Look(NamedTuple):
    """What pictures of several examples have in common.

    Args:
        limit: the change drawn in full colour; each example's own largest one if None.
        folder: where the page will be.
    """

    audit: Audit
    limit: float | None = None
    folder: Path | None = None
    spans: Sequence[tuple[str, str]] = ()


def class_name(audit: Audit, index: int) -> str:
    names = audit.data.classes
    return names[index] if index < len(names) else str(index)


def signed(value: float) -> str:
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    return f"{value:+.4f}".replace("-", "−")


def number(value: float) -> str:
    """As JavaScript reads it."""
    return repr(value).replace("inf", "Infinity")


def shown(look: Look, rows: Sequence[int]) -> list[Shown]:
    """The examples ``rows`` (of the audit's order)."""
    said = _said(look.audit, rows)
    return [_shown(look, i, said[i]) for i in rows]


def _shown(look: Look, i: int, said: tuple[Said, ...]) -> Shown:
    audit, verdict = look.audit, look.audit.verdicts[i]
    lower, upper = audit.bracket.lower[i].item(), audit.bracket.upper[i].item()
    x, z = audit.x[i].double().numpy(), _point(audit, i)
    delta = None if z is None else z.double().numpy() - x
    most = 0.0 if delta is None else float(np.abs(delta).max())
    limit = most if look.limit is None else look.limit
    size = (
        ""
        if delta is None
        else f"{np.linalg.vector_norm(delta.ravel(), ord=float(audit.threat.p)):.4g}"
    )
    low, high = bounds_of_data(audit.data)
    scale = (high - low) or 1.0
    span = look.spans[i] if look.spans else ("", "")
    return Shown(
        index=int(audit.positions[i]),
        label=class_name(audit, int(audit.y[i])),
        before=class_name(audit, int(audit.predictions[i])),
        after=class_name(audit, int(audit.adversarial[i])),
        clean=picture((x - low) / scale),
        change=Picture() if delta is None else picture(delta, limit),
        adversarial=Picture() if z is None else picture((z.double().numpy() - low) / scale),
        size=size,
        factor=1 / limit if limit > 0 and delta is not None else 0.0,
        lower=signed(lower),
        upper=signed(upper),
        low=number(lower),
        high=number(upper),
        kind=KIND[verdict],
        verdict=WORD[verdict],
        reason=audit.reason(i),
        seconds=sum(s.seconds for s in said),
        methods=said,
        span=(*span, number(_radius(span[0], 0.0)), number(_radius(span[1], math.inf))),
        witness=_npy(z) if z is not None and verdict is Verdict.VULNERABLE else "",
        certificate=_certificate(audit, i, look.folder),
    )


def _radius(text: str, none: float) -> float:
    from calipers.rounding import exact

    return float(exact(text)) if text else none


def _point(audit: Audit, i: int) -> Tensor | None:
    """The point of the upper end, if there is one."""
    if audit.bracket.witness is None or not bool(torch.isfinite(audit.bracket.upper[i])):
        return None
    point = audit.bracket.witness[i].cpu()
    return point if bool(torch.isfinite(point).all()) else None


def _said(audit: Audit, rows: Sequence[int]) -> dict[int, tuple[Said, ...]]:
    """Each method's word on each of ``rows``, in the order of the methods."""
    found: dict[int, list[Said]] = {i: [] for i in rows}
    for row in audit.methods:
        if row.units is None:
            continue
        place = {r: j for j, r in enumerate(row.units.rows.tolist())}
        for i in rows:
            if i in place:
                j = place[i]
                ends = (row.units.lower[j].item(), row.units.upper[j].item())
                work = row.units.work[j].item()
                found[i].append(
                    Said(
                        row.name,
                        row.side,
                        _ends(*ends),
                        row.units.seconds[j].item(),
                        f"{work:.0f}" if work else "–",
                    )
                )
    return {i: tuple(parts) for i, parts in found.items()}


def _ends(lower: float, upper: float) -> str:
    parts = [f"≥ {signed(lower)}"] if math.isfinite(lower) else []
    parts += [f"≤ {signed(upper)}"] if math.isfinite(upper) else []
    return ", ".join(parts) or "–"


def _npy(point: Tensor) -> str:
    out = io.BytesIO()
    np.save(out, point.numpy(), allow_pickle=False)
    return "data:application/octet-stream;base64," + base64.b64encode(out.getvalue()).decode()


def _certificate(audit: Audit, i: int, folder: Path | None) -> tuple[str, str] | None:
    evidence = audit.bracket.lower_evidence[i]
    if evidence is None or evidence.path is None:
        return None
    file = Path(evidence.path)
    if folder is None:
        return file.name, ""
    try:
        way = Path(os.path.relpath(file.resolve(), folder.resolve()))
    except ValueError:  # another drive
        return file.name, ""
    return file.name, "" if ".." in way.parts else "./" + quote(way.as_posix())


def bounds_of_data(data: Data) -> tuple[float, float]:
    """What black and white stand for: the domain where it is finite, else the range of the data."""
    low, high = (torch.as_tensor(v).double() for v in (data.lower, data.upper))
    if bool(torch.isfinite(low).all() & torch.isfinite(high).all()):
        return low.min().item(), high.max().item()
    return data.x.min().item(), data.x.max().item()


def picture(values: Array, limit: float | None = None) -> Picture:
    """An image or, for other inputs of up to 512 numbers, bars; a signed change if ``limit`` is given."""
    if values.ndim == 3 and values.shape[0] in (1, 3):
        image = as_image(values) if limit is None else as_change(values, limit)
        return Picture(uri=data_uri(image))
    flat = values.ravel()
    if len(flat) > 512:
        return Picture()
    return Picture(svg=vector_bars(flat, limit or 1.0, signed=limit is not None))


def gallery(audit: Audit, most: int) -> list[int]:
    """Broken examples that were right before the change, at most one a class until all classes had one."""
    right = audit.margins > 0
    rows = [i for i, v in enumerate(audit.verdicts) if v is Verdict.VULNERABLE and bool(right[i])]
    seen: dict[int, int] = {}
    order = []
    for i in rows:
        label = int(audit.y[i])
        order.append((seen.setdefault(label, 0), i))
        seen[label] += 1
    return [i for _, i in sorted(order)[:most]]


def nearest(audit: Audit, most: int) -> list[int]:
    """At most ``most`` examples of each verdict, the nearest to 0 first; the unknown before the broken before the
    certified."""
    found: list[int] = []
    for verdict in (Verdict.UNKNOWN, Verdict.VULNERABLE, Verdict.ROBUST):
        rows = [i for i, v in enumerate(audit.verdicts) if v is verdict]
        end = audit.bracket.lower if verdict is Verdict.ROBUST else audit.bracket.upper
        found += sorted(rows, key=lambda i: abs(end[i].item()))[:most]
    return found
