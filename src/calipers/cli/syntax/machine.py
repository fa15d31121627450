"""Commands about the machine."""

from __future__ import annotations

import typer

from calipers.cli.syntax.application import app


@app.command()
def doctor() -> None:
    """Check whether this machine is fit to measure.

    Packages, arithmetic, solver, ONNX, and the order of bounds, minima and attacks. Exit code 1 if anything fails.
    """
    from calipers.cli import examining

    if not examining.run():
        raise typer.Exit(1)
