"""Figures for executed pages: inline SVG whose lines and letters take the colour of the page, light or dark.

import figures
fig, ax = figures.new(width=6, height=3)
ax.plot(x, y, color=figures.BLUE)
figures.show(fig, "What is seen, for those who cannot see it.")
"""

from __future__ import annotations

import html
import io
import itertools
import re
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

# Colours with a contrast of at least 3 to white and to black, told apart by the colour blind.
BLUE, ORANGE, GREEN, RED, VIOLET, GREY = (
    "#2f7fc1",
    "#c26a00",
    "#1b8a5a",
    "#d1495b",
    "#8a63c9",
    "#808080",
)
INK = "#010203"  # stands for the colour of the page's text
mpl.rcParams.update(
    {
        "svg.fonttype": "none",
        "font.family": "sans-serif",
        "font.size": 10,
        "axes.edgecolor": INK,
        "axes.labelcolor": INK,
        "axes.titlecolor": INK,
        "axes.titlesize": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.prop_cycle": mpl.cycler(color=[BLUE, ORANGE, GREEN, RED, VIOLET, GREY]),
        "text.color": INK,
        "xtick.color": INK,
        "ytick.color": INK,
        "grid.color": GREY,
        "grid.alpha": 0.3,
        "legend.frameon": False,
        "savefig.transparent": True,
    }
)
_numbers = itertools.count()


class Picture:
    """Inline SVG for a page."""

    def __init__(self, svg: str, text: str) -> None:
        self.svg, self.text = svg, text

    def _repr_html_(self) -> str:
        return self.svg

    def __repr__(self) -> str:
        return f"[figure: {self.text}]"


def new(
    width: float = 6.5, height: float = 3.2, rows: int = 1, columns: int = 1, **keywords: Any
) -> tuple[Figure, Any]:
    """A figure and its axes, as `plt.subplots` gives them, in the site's size and style."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, **keywords)


def show(figure: Figure, text: str) -> Picture:
    """The figure as a page shows it; `text` says what is seen, for those who cannot see it."""
    buffer = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": f"{text}{next(_numbers)}"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font: \1 sans-serif", svg)
    label = html.escape(text, quote=True)
    return Picture(
        svg.replace("<svg ", f'<svg class="figure" role="img" aria-label="{label}" ', 1), text
    )
