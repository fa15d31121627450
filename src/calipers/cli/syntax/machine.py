"""Commands about the machine."""

from __future__ import annotations

import typer

from calipers.cli.syntax.application import app


@app.command()
def doctor() -> None:
    """Is this machine fit to measure: packages, arithmetic, solver, ONNX, and bounds against attacks.

    Exit code 1 if anything fails.
    """
    from calipers.cli import examining

    if not examining.run():
        raise typer.Exit(1)
