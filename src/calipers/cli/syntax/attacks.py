"""Commands that search for counterexamples, and those that use them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from calipers.cli.syntax.application import app
from calipers.cli.syntax.arguments import (
    DataDir,
    DataName,
    Eps,
    Grid,
    InputShape,
    Json,
    Mask,
    Model,
    Norm,
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
        typer.Option(metavar="NAME", help="auto (the cascade), or one attack (calipers methods)."),
    ] = "auto",
    level: Annotated[
        str | None,
        typer.Option(
            metavar="quick|standard|thorough", help="How hard auto tries; standard if left out."
        ),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Steps of the attack (pgd, apgd).")] = None,
    restarts: Annotated[int | None, typer.Option(help="Restarts of it (pgd, apgd).")] = None,
    samples: Annotated[
        int | None, typer.Option(help="Attack this many examples, drawn at random.")
    ] = None,
    seconds: Annotated[
        str | None, typer.Option(metavar="TIME", help="Time limit: 90, 10m, 1.5h.")
    ] = None,
    passes: Annotated[
        float | None,
        typer.Option(metavar="P", help="No new stage of auto after P passes for an example."),
    ] = None,
    certified: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Spend nothing on robust examples: an audit's JSON, or bools in an .npy file.",
        ),
    ] = None,
    diagnose: Annotated[
        bool,
        typer.Option(
            help="Also check, on at most 60 examples, whether the attack's failures should be believed."
        ),
    ] = False,
    save: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Keep all witnesses, a picture and texts in this folder."),
    ] = None,
    json: Json = None,
    weights: Weights = None,
    input_shape: InputShape = None,
    seed: Seed = 0,
    allow_softmax: Softmax = False,
) -> None:
    """Empirical accuracy of MODEL on DATA, with a witness for every example that breaks."""
    from calipers.cli import attacking, commands

    interrupted = attacking.attack(
        commands.Subject(model, weights, input_shape, data, data_dir, norm, eps, grid, mask),
        method=method,
        level=level,
        options={"steps": steps, "restarts": restarts},
        samples=samples,
        seconds=seconds,
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
            help="witnesses.npz or its folder (calipers attack --save), or a VNN-LIB counterexample.",
        ),
    ],
    network: Annotated[
        str,
        typer.Option(metavar="MODEL", help="FILE.onnx, MODULE.py:FACTORY, or a name of the zoo."),
    ],
    query: Annotated[
        Path | None,
        typer.Option("--property", metavar="FILE.vnnlib", help="What a counterexample breaks."),
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="Check that the witnesses come from these data, too.")
    ] = None,
    data_dir: DataDir = None,
    converted: Annotated[
        bool,
        typer.Option(
            "--converted", help="The network is the attacked one in another form, as exported."
        ),
    ] = False,
    json: Json = None,
    weights: Weights = None,
    input_shape: InputShape = None,
) -> None:
    """Check counterexamples again: exact membership; onnxruntime, torch in both precisions.

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
        typer.Argument(
            metavar="WITNESSES", help="witnesses.npz or its folder (calipers attack --save)."
        ),
    ],
    model: Annotated[
        str, typer.Argument(help="FILE.onnx, MODULE.py:FACTORY, or a name of the zoo.")
    ],
    json: Json = None,
    weights: Weights = None,
    input_shape: InputShape = None,
) -> None:
    """Which WITNESSES of one model break MODEL too."""
    from calipers.cli import attacking

    attacking.transfer(witnesses, model, weights=weights, input_shape=input_shape, json_file=json)
