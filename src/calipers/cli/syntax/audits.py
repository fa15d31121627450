"""Commands about the accuracy of a network on data, and about audits that are kept."""

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
def audit(
    model: Model = None,
    data: DataName = "digits",
    data_dir: DataDir = None,
    norm: Norm = "linf",
    eps: Eps = "0.1",
    grid: Grid = None,
    mask: Mask = None,
    samples: Annotated[
        int | None, typer.Option(help="Audit this many examples, drawn at random.")
    ] = None,
    budget: Annotated[
        str | None, typer.Option(metavar="TIME", help="Time limit: 90s, 10m, 1.5h.")
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(
            "--memory",
            "--max-memory",
            metavar="SIZE",
            help="Working memory to plan for: 500MB, 2GB.",
        ),
    ] = None,
    methods: Annotated[
        str | None,
        typer.Option(
            metavar="A,B,...", help="Only these stages of the cascade (calipers methods)."
        ),
    ] = None,
    run: Annotated[
        Path | None, typer.Option(help="Keep finished work here; goes on where it stopped.")
    ] = None,
    json: Json = None,
    report: Annotated[Path | None, typer.Option(help="Write the result as one HTML file.")] = None,
    weights: Weights = None,
    input_shape: InputShape = None,
    seed: Seed = 0,
    allow_softmax: Softmax = False,
    deployed: Annotated[
        bool,
        typer.Option("--deployed", help="Certify the network as it runs, its rounding included."),
    ] = False,
    certificates: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Write a checked certificate per certified example."),
    ] = None,
    workers: Annotated[
        int | None, typer.Option(help="Processes that measure at the same time.")
    ] = None,
    threads: Annotated[int, typer.Option(help="Threads of each worker.")] = 1,
    worker_memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="What a worker may take; an equal share of the machine if left out.",
        ),
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option(metavar="SHARE", help="Stop when the interval is as narrow as this: 0.5%."),
    ] = None,
) -> None:
    """Certified and empirical accuracy of MODEL on DATA, with a bracket per example."""
    from calipers.cli import commands

    interrupted = commands.audit(
        commands.Subject(model, weights, input_shape, data, data_dir, norm, eps, grid, mask),
        samples=samples,
        budget=budget,
        methods=methods,
        run=run,
        json_file=json,
        report=report,
        seed=seed,
        allow_softmax=allow_softmax,
        deployed=deployed,
        memory=memory,
        certificates=certificates,
        workers=workers,
        threads=threads,
        worker_memory=worker_memory,
        precision=precision,
    )
    if interrupted:
        raise typer.Exit(130)


@app.command()
def explain(
    model: Model = None,
    data: DataName = "digits",
    data_dir: DataDir = None,
    index: Annotated[int, typer.Option(help="Which example.")] = 0,
    norm: Norm = "linf",
    eps: Eps = "0.1",
    grid: Grid = None,
    mask: Mask = None,
    weights: Weights = None,
    input_shape: InputShape = None,
    seed: Seed = 0,
) -> None:
    """Every method's value and time for one example, nested."""
    from calipers.cli import commands

    subject = commands.Subject(model, weights, input_shape, data, data_dir, norm, eps, grid, mask)
    commands.explain(subject, index=index, seed=seed)


@app.command()
def inspect(
    model: Annotated[
        str, typer.Argument(help="FILE.onnx, MODULE.py:FACTORY, or a name of the zoo.")
    ],
    weights: Weights = None,
    input_shape: InputShape = None,
    data: Annotated[
        str | None,
        typer.Option(help="Also show, on these data, where bounds widen: digits, mnist, an .npz."),
    ] = None,
    data_dir: DataDir = None,
    norm: Norm = "linf",
    eps: Eps = "0.1",
    samples: Annotated[int, typer.Option(help="Average over the first examples of the data.")] = 10,
) -> None:
    """Layers, parameters, operators of MODEL, and what each method supports; with --data, how wide bounds are, layer by
    layer."""
    from calipers.cli import commands

    if data is None:
        commands.inspect(model, weights, input_shape)
        return
    subject = commands.Subject(model, weights, input_shape, data, data_dir, norm, eps)
    commands.inspect_widths(subject, samples)


@app.command()
def methods(
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="Only this one, with its card.")
    ] = None,
) -> None:
    """Every method by the side it works on; of one, what it guarantees, costs, and when it is loose."""
    from calipers.cli import commands

    commands.methods(name)


@app.command()
def gate(
    result: Annotated[
        Path, typer.Argument(metavar="RESULT.json", help="What calipers audit --json wrote.")
    ],
    certified: Annotated[
        str | None, typer.Option(metavar="SHARE", help="Least certified accuracy: 85% or 0.85.")
    ] = None,
    empirical: Annotated[
        str | None, typer.Option(metavar="SHARE", help="Least accuracy under attack.")
    ] = None,
    clean: Annotated[
        str | None, typer.Option(metavar="SHARE", help="Least accuracy without any change.")
    ] = None,
    estimates: Annotated[
        bool,
        typer.Option(
            "--estimates",
            help="Let the shares of a sample count as they are, not their 95 % confidence limits.",
        ),
    ] = False,
    junit: Annotated[
        Path | None, typer.Option(metavar="FILE.xml", help="Write the outcome as JUnit XML.")
    ] = None,
) -> None:
    """Hold an audit's result against thresholds, for continuous integration.

    Exit code 0 if all hold, 1 if any fails.
    """
    from calipers.cli import gating

    if not gating.run(
        result, {"certified": certified, "empirical": empirical, "clean": clean},
        estimates=estimates, junit_file=junit,
    ):  # fmt: skip
        raise typer.Exit(1)


runs = typer.Typer(
    help="Run directories of audits: list, show, compare, export.", no_args_is_help=True
)
app.add_typer(runs, name="runs")
Run = Annotated[Path, typer.Argument(metavar="RUN", help="What calipers audit --run named.")]


@runs.command("list")
def list_runs(
    root: Annotated[Path, typer.Argument(metavar="[DIR]", help="Where to look.")] = Path(),
) -> None:
    """A line for every run at or below DIR."""
    from calipers.cli import running

    running.listed(root)


@runs.command()
def show(run: Run) -> None:
    """What a run measured, and what each of its stages did."""
    from calipers.cli import running

    running.shown(run)


@runs.command()
def diff(
    first: Run,
    second: Annotated[Path, typer.Argument(metavar="RUN", help="Another one.")],
) -> None:
    """How two runs differ: in what they measured, and in which examples.

    Exit code 1 if both measured the same thing and one proves what the other breaks.
    """
    from calipers.cli import running

    if not running.compared(first, second):
        raise typer.Exit(1)


@runs.command()
def export(
    run: Run,
    out: Annotated[
        Path,
        typer.Option(
            metavar="FILE", help="FILE.csv, .json, .parquet (by example) or .tex (by stage)."
        ),
    ],
) -> None:
    """Write a run's examples for other programs."""
    from calipers.cli import running

    running.export(run, out)
