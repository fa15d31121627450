"""Arguments and options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL",
        help="FILE.onnx, MODULE.py:FACTORY, or a name of the zoo; the built-in digits network if left out.",
    ),
]
NeededModel = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="FILE.onnx, MODULE.py:FACTORY, or a name of the zoo."),
]
Weights = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE", help="State dict for MODEL, .safetensors or .pt; no code in it is run."
    ),
]
InputShape = Annotated[
    str | None,
    typer.Option(metavar="N,N,...", help="Shape of one input; that of the data if left out."),
]
DataName = Annotated[
    str,
    typer.Option(
        "--data", metavar="DATA", help="digits, mnist, cifar10, FILE.npz with x and y, or a folder."
    ),
]
DataDir = Annotated[
    Path | None, typer.Option(metavar="DIR", help="Where the files of mnist or cifar10 are.")
]
Norm = Annotated[str, typer.Option(metavar="linf|l2|l1", help="Norm that limits a change.")]
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
        metavar="FILE.npy", help="Booleans, one per feature: an input may change only where true."
    ),
]
Seed = Annotated[int, typer.Option(metavar="N", help="Seed of samples and random starts.")]
Json = Annotated[
    Path | None, typer.Option("--json", metavar="FILE", help="Write the result as JSON.")
]
Softmax = Annotated[
    bool, typer.Option("--allow-softmax", help="Measure a model that returns probabilities.")
]
Budget = Annotated[str | None, typer.Option(metavar="TIME", help="Time limit: 90s, 10m, 1.5h.")]
Memory = Annotated[
    str | None, typer.Option(metavar="SIZE", help="Working memory to plan for: 500MB, 2GB.")
]
Samples = Annotated[int | None, typer.Option(metavar="N", help="Only N examples, drawn at random.")]
Diagnose = Annotated[
    bool,
    typer.Option(
        "--diagnose", help="Also check, on up to 60 examples, whether failures are to be believed."
    ),
]
