"""Loss surfaces of one example under one or several networks, side by side on one scale."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from calipers.attacks.surface import Surface, surface
from calipers.data import Data
from calipers.evaluate.audit import inputs
from calipers.evaluate.charts import heatmap, label, profiles
from calipers.evaluate.figures import KINDS, converted, standalone
from calipers.evaluate.pages import page
from calipers.evaluate.pictures import Array, as_svg
from calipers.files import write_atomically
from calipers.graph.graph import Network, evaluating
from calipers.sets import ThreatModel
from calipers.spec import Spec

WHAT = {"loss": "cross-entropy", "margin": "margin"}


@dataclass(frozen=True, eq=False)
class Landscape:
    """Surfaces of one example by the networks' names.

    Args:
        title: which example.
        common: draw all on one scale.
    """

    title: str
    surfaces: Mapping[str, Surface]
    eps: float
    common: bool = True

    def limits(self, what: str, name: str) -> tuple[float, float]:
        """The scale of ``what`` (``loss`` or ``margin``) in the picture of a network."""
        of = self.surfaces.values() if self.common else [self.surfaces[name]]
        values = [getattr(s, what) for s in of]
        return min(v.min().item() for v in values), max(v.max().item() for v in values)

    def json(self) -> dict[str, Any]:
        """How far the loss rises, as plain values; and all values."""
        return {
            "example": self.title,
            "eps": self.eps,
            "networks": {
                name: {
                    "loss": _own(s, "loss"), "margin": _own(s, "margin"), "highest_loss": s.loss.max().item(),
                    "lowest_margin": s.margin.min().item(), "rise": s.rise, "rise_along_gradient": s.steep,
                    "rise_along_random": s.random, "values": s.loss.tolist(), "margins": s.margin.tolist(),
                    "steps": s.steps.tolist(),
                }
                for name, s in self.surfaces.items()
            },
        }  # fmt: skip

    def picture(self, name: str, what: str) -> Markup:
        """One network's surface."""
        values = _array(getattr(self.surfaces[name], what))
        about = f"{WHAT[what]} of {label(name, 80)} around the example"
        return heatmap(values, self.eps, self.limits(what, name), about)

    def profile(self, name: str, what: str) -> Markup:
        """One network's values along both directions."""
        found = self.surfaces[name]
        values, steps = _array(getattr(found, what)), _array(found.steps)
        both = {
            "along the gradient's signs": values[:, found.middle],
            "along random signs": values[found.middle],
        }
        return profiles(steps, both, self.limits(what, name), f"{WHAT[what]} along both directions")

    def rows(self) -> list[tuple[str, str, list[Markup]]]:
        """(network, what, its surface and its profile), a row of pictures each."""
        return [
            (name, WHAT[what], [self.picture(name, what), self.profile(name, what)])
            for name in self.surfaces
            for what in WHAT
        ]

    def svg(self) -> str:
        """All pictures in one."""
        out, top = [f'<text x="10" y="16">{label(self.title, 90)}</text>'], 30.0
        for name, what, pictures in self.rows():
            out.append(f'<text x="10" y="{top + 12:g}">{label(name, 60)}: {what}</text>')
            for i, drawn in enumerate(pictures):
                place = (
                    f'<svg x="{10 + 386 * i}" y="{top + 22:g}" width="{372 - 8 * i}" height="292" '
                )
                out.append(place + str(drawn).removeprefix("<svg "))
            top += 330
        return standalone(as_svg(776, top, out, "loss surfaces"))

    def html(self) -> str:
        """All pictures and numbers as a page."""
        numbers = [
            (name, [_own(s, "loss"), s.steep, s.random, s.rise, _own(s, "margin"), s.margin.min().item()])
            for name, s in self.surfaces.items()
        ]  # fmt: skip
        return page("landscape.html", found=self, rows=self.rows(), numbers=numbers)

    def save(self, file: str | Path) -> None:
        """As .svg, .png, .pdf or .html, by the file's ending.

        Raises:
            ValueError: another ending.
            DataError: .png and .pdf need cairosvg.
        """
        kind = Path(file).suffix
        if kind not in (*KINDS, ".html"):
            raise ValueError(f"{file}: must end in one of {', '.join(KINDS)}, .html")
        write_atomically(file, self.html() if kind == ".html" else converted(self.svg(), kind))


def landscape(
    networks: Mapping[str, Network],
    data: Data,
    eps: float,
    *,
    index: int = 0,
    seed: int = 0,
    size: int = 41,
    common: bool = True,
) -> Landscape:
    """The loss and the margin of example ``index`` over the gradient's signs and random ones, both up to ``eps``.

    Raises:
        ValueError: no such example, or as `surface`.
    """
    if not 0 <= index < len(data):
        raise ValueError(f"index: {index} is outside 0..{len(data) - 1}")
    part = slice(index, index + 1)
    found = {}
    for name, network in networks.items():
        x = inputs(data.x[part], network, ThreatModel(np.inf, eps, data.lower, data.upper))
        spec = Spec.label(data.y[part].to(network.device), network.num_classes)
        with evaluating(network.module):
            found[name] = surface(network, x, spec, eps, seed=seed, size=size)
    said = int(data.y[index])
    names: Sequence[str] = data.classes
    title = f"{data.name} example {index}, label {names[said] if said < len(names) else said}"
    return Landscape(title, found, eps, common)


def _own(found: Surface, what: str) -> float:
    return float(getattr(found, what)[found.middle, found.middle])


def _array(values: Any) -> Array:
    array: Array = values.detach().double().cpu().numpy()
    return array
