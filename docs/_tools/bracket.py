"""Draws the README's picture: how the bracket of a network's robust accuracy closes. `python docs/_tools/bracket.py`

Three pairs of methods on the built-in digits network, 200 test images: intervals and FGSM, CROWN and PGD, all of an
audit but its complete search, so that the picture does not depend on the machine.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path

import figures
import torch

import calipers as cp
from calipers.data import load
from calipers.evaluate.cascade import default_cascade
from calipers.models import load_model

TARGET = Path(__file__).parents[1] / "_static" / "bracket.svg"
RADII = ("0.01", "0.03", "0.05", "0.07", "0.09", "0.11", "0.13", "0.15", "0.17", "0.2")
STYLE = "<style>svg{color:#1f2328}@media(prefers-color-scheme:dark){svg{color:#d1d7e0}}</style>"


def ends(eps: str) -> list[tuple[float, float]]:
    """(certified, empirical) at one radius, of each pair with those before it."""
    net, data = load_model("digits_pgd"), load("digits")
    x, y = data.x[:200], data.y[:200]
    threat = cp.ThreatModel(math.inf, eps)
    region, spec = threat.around(x), cp.Spec.label(y, 10)

    def both(
        bound: Callable[..., torch.Tensor], attack: Callable[..., torch.Tensor]
    ) -> tuple[float, float]:
        low = spec.margin(bound(net, region, spec, dtype=torch.float64, rigorous=True)) > 0
        return low.double().mean().item(), cp.witness(
            net, region, spec, attack(net, region, spec)
        ).accuracy()[1]

    result = cp.audit(net, (x, y), threat, cascade=default_cascade(net)[:-1])
    found = [
        both(cp.interval, cp.fgsm),
        both(cp.crown, cp.pgd),
        (result.certified, result.empirical),
    ]
    return [
        (max(low for low, _ in found[:n]), min(high for _, high in found[:n])) for n in (1, 2, 3)
    ]


def main() -> None:
    radii = [float(eps) for eps in RADII]
    pairs = list(zip(*map(ends, RADII), strict=True))
    figure, ax = figures.new(7, 3.3)
    names = ("intervals, FGSM", "CROWN, PGD", "the audit")
    for pair, name, shade in zip(pairs, names, (0.22, 0.4, 1.0), strict=True):
        low, high = ([100 * end[i] for end in pair] for i in (0, 1))
        ax.fill_between(radii, low, high, color=figures.BLUE, alpha=shade, linewidth=2, label=name)
    ax.set(
        xlabel="largest change of a pixel",
        ylabel="robust accuracy, %",
        xlim=(radii[0], radii[-1]),
        ylim=(0, 100),
    )
    ax.legend(title="it lies between ... and ...", loc="lower left")
    text = "Robust accuracy of a network against the radius: three brackets, each inside the one before."
    svg = figures.show(figure, text).svg.replace('class="figure" ', "")
    TARGET.write_text(svg.replace(">", f">{STYLE}", 1), encoding="utf-8")
    sys.stdout.write(
        "\n".join(f"{eps}: {[p[i] for p in pairs]}" for i, eps in enumerate(RADII)) + "\n"
    )


if __name__ == "__main__":
    main()
