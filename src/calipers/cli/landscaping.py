"""What ``calipers landscape`` does."""

from __future__ import annotations

import json
from pathlib import Path

from rich.table import Table
from rich.text import Text

from calipers.cli.commands import Subject, console
from calipers.cli.options import shape_of, writable
from calipers.evaluate.figures import KINDS
from calipers.evaluate.landscape import Landscape, landscape
from calipers.files import write_atomically
from calipers.models import load_model
from calipers.rounding import exact


def run(
    subject: Subject,
    *,
    beside: list[str],
    index: int,
    size: int,
    own_scale: bool,
    out: Path | None,
    json_file: Path | None,
    seed: int,
) -> None:
    """Compute, print, write."""
    for option, file in (("--out", out), ("--json", json_file)):
        if file is not None:
            writable(option, file.absolute())
    if out is not None and out.suffix not in (*KINDS, ".html"):
        raise ValueError(f"--out: {out} must end in one of {', '.join(KINDS)}, .html")
    network, data, _ = subject.load()
    networks = {_label(subject.name, subject.weights): network}
    shape = shape_of(subject.input_shape) or tuple(data.x.shape[1:])
    for text in beside:
        name, _, weights = text.partition("=")
        other = load_model(name, Path(weights) if weights else None, shape)
        networks[_label(Path(name).name, Path(weights) if weights else None)] = other
    if len(networks) < 1 + len(beside):
        raise ValueError(f"--beside: {', '.join(beside)}: the same network twice")
    found = landscape(
        networks,
        data,
        float(exact(subject.eps)),
        index=index,
        seed=seed,
        size=size,
        common=not own_scale,
    )
    _print(found)
    if out is not None:
        found.save(out)
    if json_file is not None:
        write_atomically(json_file, json.dumps(found.json()) + "\n")


def _label(name: str, weights: Path | None) -> str:
    return name if weights is None else f"{name} ({weights.name})"


def _print(found: Landscape) -> None:
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("network")
    columns = ("loss", "rise along gradient", "along random", "on the plane", "margin", "lowest")
    for column in columns:
        table.add_column(column, justify="right")
    for name, one in found.json()["networks"].items():
        keys = (
            "loss",
            "rise_along_gradient",
            "rise_along_random",
            "rise",
            "margin",
            "lowest_margin",
        )
        table.add_row(Text(name), *(f"{one[k]:.4g}" for k in keys))
    console().print(
        Text(f"{found.title}, both directions up to {found.eps:g}", style="bold"), table
    )
