"""The application that all commands belong to, and its own options."""

from __future__ import annotations

from typing import Annotated

import typer

from calipers import __version__

app = typer.Typer(
    name="calipers",
    help="Bracket the adversarial robustness of a neural network: certified <= robust <= empirical accuracy.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


def _name(wanted: bool) -> None:
    if wanted:
        typer.echo("Calipers")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    name: Annotated[
        bool, typer.Option("--name", callback=_name, is_eager=True, help="Print the tool's name.")
    ] = False,
) -> None:
    del version, name
