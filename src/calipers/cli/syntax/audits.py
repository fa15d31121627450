"""Commands about the accuracy of a network on data, and about audits that are kept."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from calipers.cli.syntax.application import app
from calipers.cli.syntax.arguments import (
    Budget,
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
def audit(
    model: Model = None,
    data: DataName = "digits",
    data_dir: DataDir = None,
    norm: Norm = "linf",
    eps: Annotated[
        str,
        typer.Option(
            metavar="E,E,...",
            help="Radius in input units, read exactly: 0.1 or 8/255; of several, a curve.",
        ),
    ] = "0.1",
    grid: Grid = None,
    mask: Mask = None,
    samples: Samples = None,
    comparisons: Annotated[
        int,
        typer.Option(
            metavar="N",
            help="Audits of this sample (several eps, say) that its confidence is for, together.",
        ),
    ] = 1,
    budget: Budget = None,
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
            metavar="NAME,...", help="Only these stages, of those that calipers methods lists."
        ),
    ] = None,
    run: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Keep finished work here, and go on from it.")
    ] = None,
    json: Json = None,
    report: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the result as one HTML file.")
    ] = None,
    figures: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Write the report's figures as SVG, PNG and PDF files."),
    ] = None,
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
        typer.Option(
            metavar="DIR", help="Write a checked certificate for every certified example."
        ),
    ] = None,
    workers: Annotated[
        int | None, typer.Option(metavar="N", help="Processes that share the examples.")
    ] = None,
    threads: Annotated[int, typer.Option(metavar="N", help="Threads of each process.")] = 1,
    worker_memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Memory that a process may take; an equal share of the machine if left out.",
        ),
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option(metavar="SHARE", help="Stop when the bracket is this narrow: 0.5%."),
    ] = None,
    diagnose: Diagnose = False,
    ray: Annotated[
        str | None,
        typer.Option(
            metavar="auto|HOST:PORT",
            help="Measure on a Ray cluster; auto starts one here unless RAY_ADDRESS names one.",
        ),
    ] = None,
) -> None:
    """Bracket the robust accuracy of MODEL on DATA.

    Attacks and proofs take turns, the cheapest first, each on the examples that are still open.
    """
    from calipers.cli import commands

    interrupted = commands.audit(
        commands.Subject(model, weights, input_shape, data, data_dir, norm, eps, grid, mask),
        samples=samples,
        budget=budget,
        methods=methods,
        run=run,
        json_file=json,
        report=report,
        figures=figures,
        seed=seed,
        allow_softmax=allow_softmax,
        deployed=deployed,
        memory=memory,
        certificates=certificates,
        workers=workers,
        threads=threads,
        worker_memory=worker_memory,
        precision=precision,
        diagnose=diagnose,
        ray=ray,
        comparisons=comparisons,
    )
    if interrupted:
        raise typer.Exit(130)


@app.command()
def explain(
    model: Model = None,
    data: DataName = "digits",
    data_dir: DataDir = None,
    index: Annotated[int, typer.Option(metavar="N", help="Which example, counted from 0.")] = 0,
    norm: Norm = "linf",
    eps: Eps = "0.1",
    grid: Grid = None,
    mask: Mask = None,
    weights: Weights = None,
    input_shape: InputShape = None,
    seed: Seed = 0,
) -> None:
    """Show every method's value and time for one example."""
    from calipers.cli import commands

    subject = commands.Subject(model, weights, input_shape, data, data_dir, norm, eps, grid, mask)
    commands.explain(subject, index=index, seed=seed)


@app.command()
def landscape(
    model: Model = None,
    data: DataName = "digits",
    data_dir: DataDir = None,
    index: Annotated[int, typer.Option(metavar="N", help="Which example, counted from 0.")] = 0,
    eps: Annotated[
        str, typer.Option(metavar="E", help="How far along each direction, in input units.")
    ] = "0.1",
    beside: Annotated[
        list[str] | None,
        typer.Option(
            metavar="MODEL[=WEIGHTS]", help="Another network on the same scale; may be repeated."
        ),
    ] = None,
    size: Annotated[
        int, typer.Option(metavar="N", help="Points along each direction; an odd number.")
    ] = 41,
    own_scale: Annotated[
        bool, typer.Option("--own-scale", help="Draw each network on a scale of its own.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw it as FILE.svg, .png, .pdf or .html.")
    ] = None,
    json: Json = None,
    weights: Weights = None,
    input_shape: InputShape = None,
    seed: Seed = 0,
) -> None:
    """Draw the loss and margin of one example on a plane.

    Over the signs of its gradient and random ones; also says how flat they are.
    """
    from calipers.cli import commands, landscaping

    subject = commands.Subject(model, weights, input_shape, data, data_dir, "linf", eps)
    landscaping.run(
        subject, beside=beside or [], index=index, size=size, own_scale=own_scale, out=out,
        json_file=json, seed=seed,
    )  # fmt: skip


@app.command()
def inspect(
    model: NeededModel,
    weights: Weights = None,
    input_shape: InputShape = None,
    data: Annotated[
        str | None,
        typer.Option(metavar="DATA", help="Also show, on these data, where bounds widen."),
    ] = None,
    data_dir: DataDir = None,
    norm: Norm = "linf",
    eps: Eps = "0.1",
    samples: Annotated[
        int, typer.Option(metavar="N", help="Average over the first N examples of the data.")
    ] = 10,
) -> None:
    """List layers and operators of MODEL, and what supports them.

    With --data also how wide bounds are, layer by layer.
    """
    from calipers.cli import commands

    if data is None:
        commands.inspect(model, weights, input_shape)
        return
    subject = commands.Subject(model, weights, input_shape, data, data_dir, norm, eps)
    commands.inspect_widths(subject, samples)


@app.command()
def methods(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="A method, for its card.")
    ] = None,
) -> None:
    """List all methods by side, or print the card of one.

    A card says what the method guarantees, what it costs, when it is loose, and where it comes from.
    """
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
            help="Take the shares of a sample as they are, not their 95 % confidence limits.",
        ),
    ] = False,
    junit: Annotated[
        Path | None, typer.Option(metavar="FILE.xml", help="Write the outcome as JUnit XML.")
    ] = None,
) -> None:
    """Hold the result of an audit against thresholds.

    Exit code 0 if all hold, 1 if any fails: for continuous integration.
    """
    from calipers.cli import gating

    if not gating.run(
        result, {"certified": certified, "empirical": empirical, "clean": clean},
        estimates=estimates, junit_file=junit,
    ):  # fmt: skip
        raise typer.Exit(1)


runs = typer.Typer(help="List, show, compare and export kept audits.", no_args_is_help=True)
app.add_typer(runs, name="runs")
Run = Annotated[Path, typer.Argument(metavar="RUN", help="A folder of calipers audit --run.")]


@runs.command("list")
def list_runs(
    root: Annotated[Path, typer.Argument(metavar="DIR", help="Where to look.")] = Path(),
) -> None:
    """List the runs at or below DIR."""
    from calipers.cli import running

    running.listed(root)


@runs.command()
def show(run: Run) -> None:
    """Show what a run measured, and what each stage did."""
    from calipers.cli import running

    running.shown(run)


@runs.command()
def diff(
    first: Run,
    second: Annotated[Path, typer.Argument(metavar="RUN", help="Another one.")],
) -> None:
    """Compare two runs: what they measured, and which examples differ.

    Exit code 1 if both measured the same thing and one proves what the other breaks.
    """
    from calipers.cli import running

    if not running.compared(first, second):
        raise typer.Exit(1)


@runs.command("compare")
def compare_runs(
    directories: Annotated[
        list[Path],
        typer.Argument(metavar="RUN...", help="Folders of calipers audit --run, curves included."),
    ],
    report: Annotated[Path, typer.Option(metavar="FILE", help="Write the page as one HTML file.")],
) -> None:
    """Set runs side by side on one page.

    Brackets, curves, and which examples changed sides. Exit code 1 if two that measured the same thing contradict
    each other.
    """
    from calipers.cli import running

    if not running.side_by_side(directories, report):
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
    """Write the examples of a run for other programs."""
    from calipers.cli import running

    running.export(run, out)


@app.command()
def serve(
    run: Run,
    model: Model = None,
    data: DataName = "digits",
    data_dir: DataDir = None,
    norm: Norm = "linf",
    grid: Grid = None,
    mask: Mask = None,
    weights: Weights = None,
    input_shape: InputShape = None,
    host: Annotated[
        str,
        typer.Option(
            metavar="HOST", help="Where to listen; anything but this machine needs the token."
        ),
    ] = "127.0.0.1",
    port: Annotated[
        int,
        typer.Option(
            min=0, max=65535, metavar="N", help="Port to listen on; 0 takes any free one."
        ),
    ] = 8330,
    token: Annotated[
        str | None,
        typer.Option(metavar="TEXT", envvar="CALIPERS_TOKEN", help="Token to ask for in any case."),
    ] = None,
) -> None:
    """Explore a run in a browser.

    Its examples, brackets at any radius, attacks, bounds and loss surfaces. MODEL, --data and the others as for the
    audit. Nothing is written.
    """
    from calipers.cli import commands, serving

    subject = commands.Subject(model, weights, input_shape, data, data_dir, norm, "0", grid, mask)
    serving.run(run, subject, host=host, port=port, token=token)
