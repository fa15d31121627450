"""Arguments and options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[
    str | None,
    typer.Argument(
        metavar="[MODEL]",
        help="FILE.onnx, MODULE.py:FACTORY, or a name of the zoo; the built-in digits network if left out.",
    ),
]
Weights = Annotated[
    Path | None,
    typer.Option(help="A .safetensors or .pt state dict for MODEL (read weights-only)."),
]
InputShape = Annotated[
    str | None,
    typer.Option(metavar="N,N,...", help="Shape of one input; the data's if left out."),
]
DataName = Annotated[
    str, typer.Option("--data", help="digits, mnist, cifar10, FILE.npz with x and y, or a folder.")
]
DataDir = Annotated[Path | None, typer.Option(help="Where mnist or cifar10 files are.")]
Norm = Annotated[str, typer.Option(metavar="linf|l2|l1", help="The norm that limits a change.")]
Eps = Annotated[
    str, typer.Option(metavar="E", help="Radius in input units, read exactly: 0.1 or 8/255.")
]
Grid = Annotated[
    str | None,
    typer.Option(
        metavar="STEP", help="Allow whole multiples of STEP only: 1/255 for 8-bit images in [0, 1]."
    ),
]
Mask = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE.npy", help="Bools, one per feature: only where true may an input change."
    ),
]
Seed = Annotated[int, typer.Option(help="Seed of samples and random starts.")]
Json = Annotated[Path | None, typer.Option("--json", help="Write the result as JSON.")]
Softmax = Annotated[
    bool, typer.Option("--allow-softmax", help="Measure a model that returns probabilities.")
]
