"""What the pages of the course share: tables, pictures of images, and the stored results that they quote."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import figures

DATA = Path(__file__).parents[1] / "course" / "data"


class Table:
    """An HTML table for a page, plain text elsewhere."""

    def __init__(self, head: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        self.rows = [[str(cell) for cell in row] for row in (head, *rows)]

    def _repr_html_(self) -> str:
        head, *body = ("".join(f"<{tag}>{html.escape(c)}</{tag}>" for c in row)
                       for tag, row in zip(["th"] + ["td"] * len(self.rows), self.rows, strict=False))  # fmt: skip
        lines = "".join(f"<tr>{row}</tr>" for row in body)
        return (
            f'<table class="docutils"><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table>'
        )

    def __repr__(self) -> str:
        return "\n".join("  ".join(row) for row in self.rows)


def number(value: float) -> str:
    """Four digits, as the tables have them."""
    return f"{value:.4g}"


def stored(name: str) -> Any:
    """A stored result: what a page cannot compute in seconds, with the conditions it was measured under."""
    return json.loads((DATA / f"{name}.json").read_text())


def published(*texts: str) -> Table:
    """The claims of the stored reproduction that hold one of ``texts``: printed, ours, verdict."""
    rows = []
    for claim in stored("reproduced")["claims"]:
        if not any(text in f"{claim['section']}: {claim['claim']}" for text in texts):
            continue
        ours = claim["ours"]
        sample = f" ({claim['images']:,} images)" if claim["images"] not in (None, 10_000) else ""
        reason = f": {claim['reason']}" if claim["reason"] else ""
        rows.append([
            claim["claim"], _values(claim["published"]),
            "not in the fast run" if ours is None else _values(ours), claim["verdict"] + sample + reason,
        ])  # fmt: skip
    if not rows:
        raise ValueError(f"texts: no claim holds any of {texts}")
    return Table(["what", "printed", "ours", "verdict"], rows)


def _values(values: Sequence[float], most: int = 3) -> str:
    return ", ".join(f"{v:.5g}" for v in values[:most]) + (", ..." if len(values) > most else "")


class Change(NamedTuple):
    """What is drawn in red and blue around 0, not as an image."""

    values: Any


def images(
    rows: Sequence[Sequence[Any]], titles: Sequence[Sequence[str]], size: float = 1.1
) -> Any:
    """A grid of square images in [0, 1], or of a `Change`, with a title above each."""
    fig, axes = figures.new(
        size * len(rows[0]), (size + 0.25) * len(rows), len(rows), len(rows[0]), squeeze=False
    )
    for line, names, across in zip(rows, titles, axes, strict=True):
        for image, name, ax in zip(line, names, across, strict=True):
            change = isinstance(image, Change)
            pixels = (image.values if change else image).detach().squeeze().numpy()
            if change:
                limit = abs(pixels).max() or 1.0
                ax.imshow(pixels, cmap="RdBu", vmin=-limit, vmax=limit)
            else:
                ax.imshow(pixels, cmap="gray_r", vmin=0, vmax=1)
            ax.set_title(name, fontsize=8)
            ax.set_axis_off()
    return fig


def small_network() -> Any:
    """A 64-24-16-10 network trained on the digits for two seconds: small enough for exact answers within seconds."""
    import torch

    import calipers
    from calipers.data import load
    from calipers.zoo import mlp

    train = load("digits", split="train")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = mlp(64, 24, 16, 10)
        optimiser = torch.optim.Adam(module.parameters(), lr=5e-3)
        for _ in range(200):
            optimiser.zero_grad()
            torch.nn.functional.cross_entropy(module(train.x), train.y).backward()
            optimiser.step()
    return calipers.capture(module.eval(), train.x[:2])
