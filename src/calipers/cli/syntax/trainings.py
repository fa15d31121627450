"""Commands that train, and the data and experiments for it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from calipers.cli.syntax.application import app
from calipers.cli.syntax.arguments import DataDir, Json

Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="A setting of the recipe, or a plain field of its run."
    ),
]
Anyway = Annotated[
    bool,
    typer.Option("--anyway", help="Train without a GPU what needs one, however long it takes."),
]


@app.command()
def train(
    recipe: Annotated[
        str | None, typer.Argument(metavar="RECIPE", help="A name that --list shows.")
    ] = None,
    listed: Annotated[
        bool, typer.Option("--list", help="List the recipes, with what they need and give.")
    ] = False,
    settings: Settings = None,
    run: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Keep network, log and checkpoint here, and go on from them."
        ),
    ] = None,
    data_dir: DataDir = None,
    json: Json = None,
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard", help="Also write files for TensorBoard.")
    ] = False,
    anyway: Anyway = False,
) -> None:
    """Train a network by a recipe.

    For accuracy under attack or for certificates; test data are looked at once, at the end. Several processes:
    torchrun --nproc-per-node N -m calipers.cli train RECIPE --run DIR.
    """
    from calipers.cli import training

    if listed:
        training.listing()
        return
    if recipe is None:
        raise ValueError("RECIPE: name one; calipers train --list shows them")
    interrupted = training.train(
        recipe, settings=settings or [], directory=run, data_dir=data_dir, json_file=json,
        tensorboard=tensorboard, anyway=anyway,
    )  # fmt: skip
    if interrupted:
        raise typer.Exit(130)


@app.command("compare")
def compare_trainings(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Folders of calipers train --run.")
    ],
) -> None:
    """Set trainings side by side: accuracies and cost."""
    from calipers.cli import training

    training.compare(runs)


@app.command()
def sweep(
    recipe: Annotated[
        str, typer.Argument(metavar="RECIPE", help="A name that calipers train --list shows.")
    ],
    vary: Annotated[
        list[str],
        typer.Option(
            metavar="KEY=A,B,...",
            help="A setting and its values; may be repeated. KEY+KEY=A+B,C+D: two that change together.",
        ),
    ],
    run: Annotated[Path, typer.Option(metavar="DIR", help="Keep a folder for each training here.")],
    settings: Settings = None,
    data_dir: DataDir = None,
    anyway: Anyway = False,
) -> None:
    """Train a recipe once for each combination of values.

    Then all are set side by side. Started again, it goes on where it stopped.
    """
    from calipers.cli import training

    interrupted = training.sweep(
        recipe, vary=vary, settings=settings or [], directory=run, data_dir=data_dir, anyway=anyway
    )
    if interrupted:
        raise typer.Exit(130)


@app.command()
def download(
    name: Annotated[str, typer.Argument(metavar="mnist|cifar10", help="Which.")],
    data_dir: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Where to; if left out, a cache that is looked into by itself."
        ),
    ] = None,
    source: Annotated[
        str | None, typer.Option(metavar="URL", help="Another address of the files.")
    ] = None,
) -> None:
    """Fetch a data set, checked byte by byte.

    In the cache it is found without --data-dir.
    """
    from calipers.cli import training

    training.fetch(name, data_dir, source)


@app.command()
def reproduce(
    data_dir: Annotated[
        Path,
        typer.Option(
            metavar="DIR", help="Where the weights of the tutorial and the four files of MNIST are."
        ),
    ],
    fast: Annotated[
        bool, typer.Option("--fast", help="Attack a sample of the images only.")
    ] = False,
    only: Annotated[
        str,
        typer.Option(metavar="TEXT", help="Only claims whose section or description holds TEXT."),
    ] = "",
    json: Json = None,
) -> None:
    """Compute what the tutorial printed again.

    From the weights of Kolter and Madry's tutorial, each number beside the printed one. Exit
    code 1 if any differs without a known reason.
    """
    from calipers.cli import reproducing

    if not reproducing.run(data_dir, fast=fast, only=only, json_file=json):
        raise typer.Exit(1)
