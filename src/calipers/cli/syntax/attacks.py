"""Commands that search for counterexamples, and those that use them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from calipers.cli.syntax.application import app
from calipers.cli.syntax.arguments import (
    DataDir,
    DataName,
    Diagnose,
    Eps,
    Grid,
    InputShape,
    Json,
    Mask,
    Model,
    NeededModel,
    Norm,
    Samples,
    Seed,
    Softmax,
    Weights,
)


@app.command()
def attack(
    model: Model = None,
    data: DataName = "digits",
    data_dir: DataDir = None,
    norm: Norm = "linf",
    eps: Eps = "0.1",
    grid: Grid = None,
    mask: Mask = None,
    method: Annotated[
        str,
        typer.Option(
            metavar="NAME", help="auto, the cascade, or an attack that calipers methods lists."
        ),
    ] = "auto",
    level: Annotated[
        str | None,
        typer.Option(
            metavar="quick|standard|thorough", help="How hard auto tries; standard if left out."
        ),
    ] = None,
    steps: Annotated[int | None, typer.Option(metavar="N", help="Steps, of pgd and apgd.")] = None,
    restarts: Annotated[
        int | None, typer.Option(metavar="N", help="Restarts, of pgd and apgd.")
    ] = None,
    samples: Samples = None,
    budget: Annotated[
        str | None,
        typer.Option("--budget", "--seconds", metavar="TIME", help="Time limit: 90s, 10m, 1.5h."),
    ] = None,
    passes: Annotated[
        float | None,
        typer.Option(metavar="N", help="No new stage of auto after N passes for an example."),
    ] = None,
    certified: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Skip what is certified: the JSON of an audit, or booleans in an .npy file.",
        ),
    ] = None,
    diagnose: Diagnose = False,
    save: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Write all witnesses, a picture of each and texts."),
    ] = None,
    json: Json = None,
    weights: Weights = None,
    input_shape: InputShape = None,
    seed: Seed = 0,
    allow_softmax: Softmax = False,
) -> None:
    """Search for a witness against every example of DATA.

    What none is found for is not proved robust: see calipers audit.
    """
    from calipers.cli import attacking, commands

    interrupted = attacking.attack(
        commands.Subject(model, weights, input_shape, data, data_dir, norm, eps, grid, mask),
        method=method,
        level=level,
        options={"steps": steps, "restarts": restarts},
        samples=samples,
        seconds=budget,
        passes=passes,
        certified=certified,
        diagnose=diagnose,
        save=save,
        json_file=json,
        seed=seed,
        allow_softmax=allow_softmax,
    )
    if interrupted:
        raise typer.Exit(130)


@app.command()
def replay(
    witness: Annotated[
        Path,
        typer.Argument(
            metavar="WITNESS",
            help="A folder of calipers attack --save, or a VNN-LIB counterexample.",
        ),
    ],
    network: Annotated[
        str,
        typer.Option(metavar="MODEL", help="FILE.onnx, MODULE.py:FACTORY, or a name of the zoo."),
    ],
    query: Annotated[
        Path | None,
        typer.Option(
            "--property", metavar="FILE.vnnlib", help="Query that a counterexample answers."
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(metavar="DATA", help="Also check that the witnesses come from these data."),
    ] = None,
    data_dir: DataDir = None,
    converted: Annotated[
        bool,
        typer.Option(
            "--converted", help="The network is the attacked one in another form, such as exported."
        ),
    ] = False,
    json: Json = None,
    weights: Weights = None,
    input_shape: InputShape = None,
) -> None:
    """Check witnesses again: exactly, and by three evaluations.

    Exit code 0 if all are strict or tolerant, 1 if any fails.
    """
    from calipers.cli import attacking

    failed = attacking.replay(
        witness,
        network,
        weights=weights,
        input_shape=input_shape,
        query=query,
        data=data,
        data_dir=data_dir,
        converted=converted,
        json_file=json,
    )
    if failed:
        raise typer.Exit(1)


@app.command()
def transfer(
    witnesses: Annotated[
        Path,
        typer.Argument(metavar="WITNESSES", help="A folder of calipers attack --save."),
    ],
    model: NeededModel,
    json: Json = None,
    weights: Weights = None,
    input_shape: InputShape = None,
) -> None:
    """Count the witnesses against one model that break MODEL, too."""
    from calipers.cli import attacking

    attacking.transfer(witnesses, model, weights=weights, input_shape=input_shape, json_file=json)
