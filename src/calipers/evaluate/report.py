"""The report: one HTML file without scripts or outside references, that anyone can open and keep.

Every string of the result (names of models, data, classes, methods, notes) reaches the page through an escaping
template; the page's policy forbids scripts, remote content, and styles other than its own.
"""

from __future__ import annotations

import math
import secrets
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from torch import Tensor

from calipers.bracket import Verdict
from calipers.evaluate.pictures import (
    as_change,
    as_image,
    data_uri,
    margin_histogram,
    stacked_bar,
    vector_bars,
)
from calipers.evaluate.result import Audit, environment
from calipers.evaluate.tables import SIDES, percent

GRID = 8  # broken examples shown
SAMPLES = 200  # rows of the sample table
KIND = {Verdict.ROBUST: "robust", Verdict.VULNERABLE: "broken", Verdict.UNKNOWN: "unknown"}
WORD = {Verdict.ROBUST: "certified", Verdict.VULNERABLE: "broken", Verdict.UNKNOWN: "unknown"}


@dataclass(frozen=True)
class Picture:
    """One input as a picture: a PNG data URI or an SVG, whichever is not None."""

    uri: str | None = None
    svg: Markup | None = None


@dataclass(frozen=True)
class Shown:
    """A row of the grid: an example before, the change, and after."""

    index: int
    label: str
    before: str
    after: str
    clean: Picture
    change: Picture
    adversarial: Picture
    size: str
    lower: str
    upper: str


def render(audit: Audit) -> str:
    """The page, as text."""
    environment_ = Environment(
        loader=PackageLoader("calipers.evaluate", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment_.filters["percent"] = percent
    shown, factor = _grid(audit)
    bar, histogram, table = _plots(audit)
    rows = _samples(audit)
    return environment_.get_template("report.html").render(
        nonce=secrets.token_urlsafe(16),
        audit=audit,
        threat=audit.threat.describe(),
        robust=audit.counts[Verdict.ROBUST],
        broken=audit.counts[Verdict.VULNERABLE],
        bar=bar,
        histogram=histogram,
        bins=table,
        outside=_outside(audit),
        classes=_classes(audit),
        sides=SIDES,
        shown=shown,
        factor=factor,
        rows=rows,
        left_out=len(audit) - len(rows),
        environment=environment(),
    )


def _plots(audit: Audit) -> tuple[Markup, Markup, list[tuple[float, float, int, int]]]:
    n = len(audit)
    parts = [
        (KIND[v], audit.counts[v] / n)
        for v in (Verdict.ROBUST, Verdict.UNKNOWN, Verdict.VULNERABLE)
    ]
    around = audit.confidence
    intervals = [around["certified"], around["empirical"]] if around else []
    lower, upper = _ends(audit)
    histogram, table = margin_histogram(lower.numpy(), upper.numpy())
    return stacked_bar(parts, intervals), histogram, table


def _ends(audit: Audit) -> tuple[Tensor, Tensor]:
    """The lower ends of examples that are not broken (nobody raised the others'), and all upper ends."""
    return audit.bracket.lower[audit.bracket.upper > 0], audit.bracket.upper


def _outside(audit: Audit) -> tuple[int, int]:
    """How many of the ends shown are infinite."""
    low, high = (int((~torch.isfinite(end)).sum()) for end in _ends(audit))
    return low, high


def class_name(audit: Audit, index: int) -> str:
    names = audit.data.classes
    return names[index] if index < len(names) else str(index)


def _classes(audit: Audit) -> list[dict[str, Any]]:
    """The bracket per class, in class order."""
    verdicts = np.array([KIND[v] for v in audit.verdicts])
    labels, right = audit.y.numpy(), (audit.margins > 0).numpy()
    rows = []
    for index in np.unique(labels).tolist():
        mask = labels == index
        counts = {kind: int((verdicts[mask] == kind).sum()) for kind in KIND.values()}
        n = int(mask.sum())
        rows.append(
            {
                "name": class_name(audit, index),
                "n": n,
                "clean": float(right[mask].mean()),
                "certified": counts["robust"] / n,
                "empirical": 1 - counts["broken"] / n,
                "unknown": counts["unknown"],
            }
        )
    return rows


def _samples(audit: Audit) -> list[dict[str, Any]]:
    """Rows of the sample table: the unknown first, then broken, then certified, each by rising upper end."""
    order = sorted(
        range(len(audit)), key=lambda i: (_rank(audit.verdicts[i]), audit.bracket.upper[i].item())
    )
    return [
        {
            "index": int(audit.positions[i]),
            "label": class_name(audit, int(audit.y[i])),
            "predicted": class_name(audit, int(audit.predictions[i])),
            "kind": KIND[audit.verdicts[i]],
            "verdict": WORD[audit.verdicts[i]],
            "lower": signed(audit.bracket.lower[i].item()),
            "upper": signed(audit.bracket.upper[i].item()),
            "reason": audit.reason(i),
        }
        for i in order[:SAMPLES]
    ]


def _rank(verdict: Verdict) -> int:
    return (Verdict.UNKNOWN, Verdict.VULNERABLE, Verdict.ROBUST).index(verdict)


def signed(value: float) -> str:
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    return f"{value:+.4f}".replace("-", "−")


def _grid(audit: Audit) -> tuple[list[Shown], float]:
    """Broken examples that were right before the change, at most one a class until all classes had one; the factor."""
    points = audit.bracket.witness
    right = audit.margins > 0
    rows = [i for i, v in enumerate(audit.verdicts) if v is Verdict.VULNERABLE and bool(right[i])]
    if points is None or not rows:
        return [], 1.0
    seen: dict[int, int] = {}
    order = []
    for i in rows:
        label = int(audit.y[i])
        order.append((seen.setdefault(label, 0), i))
        seen[label] += 1
    chosen = [i for _, i in sorted(order)[:GRID]]
    deltas = points[chosen].cpu().double() - audit.x[chosen].double()
    limit = deltas.abs().max().item()
    factor = 1 / limit if limit > 0 else 1.0
    return [_shown(audit, i, points[i], limit) for i in chosen], factor


def _shown(audit: Audit, i: int, point: Tensor, limit: float) -> Shown:
    x, z = audit.x[i].double().numpy(), point.cpu().double().numpy()
    low, high = _range(audit)
    scale = (high - low) or 1.0
    size = np.linalg.vector_norm((z - x).ravel(), ord=float(audit.threat.p))
    return Shown(
        int(audit.positions[i]),
        class_name(audit, int(audit.y[i])),
        class_name(audit, int(audit.predictions[i])),
        class_name(audit, int(audit.adversarial[i])),
        _picture((x - low) / scale),
        _picture(z - x, limit),
        _picture((z - low) / scale),
        f"{size:.4g}",
        signed(audit.bracket.lower[i].item()),
        signed(audit.bracket.upper[i].item()),
    )  # fmt: skip


def _range(audit: Audit) -> tuple[float, float]:
    """What black and white stand for: the domain where it is finite, else the range of the data."""
    low, high = (torch.as_tensor(v).double() for v in (audit.data.lower, audit.data.upper))
    if bool(torch.isfinite(low).all() & torch.isfinite(high).all()):
        return low.min().item(), high.max().item()
    return audit.x.min().item(), audit.x.max().item()


def _picture(values: np.ndarray[Any, np.dtype[np.float64]], limit: float | None = None) -> Picture:
    """An image or, for other inputs of up to 512 numbers, bars; a signed change if ``limit`` is given."""
    if values.ndim == 3 and values.shape[0] in (1, 3):
        image = as_image(values) if limit is None else as_change(values, limit)
        return Picture(uri=data_uri(image))
    flat = values.ravel()
    if len(flat) > 512:
        return Picture()
    return Picture(svg=vector_bars(flat, limit or 1.0, signed=limit is not None))
