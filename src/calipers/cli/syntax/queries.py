"""Commands that decide VNN-LIB queries, and those around them."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from calipers.cli.syntax.application import app
from calipers.cli.syntax.arguments import Json, Memory, Seed


@app.command()
def verify(
    files: Annotated[
        list[str],
        typer.Argument(
            metavar="QUERY.vnnlib | MODEL.onnx QUERY.vnnlib",
            help="The query, its network given by --network; or both. Any may be gzipped.",
        ),
    ],
    network: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=FILE.onnx", help="File of the network that the query declares."),
    ] = None,
    timeout: Annotated[
        str | None, typer.Option(metavar="TIME", help="Time limit: 30, 90s, 10m; none if left out.")
    ] = None,
    serialise_assignments: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Write a counterexample as tensors, VARIABLE.pb each."),
    ] = None,
    exact: Annotated[
        bool,
        typer.Option(
            "--exact",
            help="No counterexample that needs a bound rounded to the precision of the network.",
        ),
    ] = False,
    real: Annotated[
        bool,
        typer.Option("--real", help="Prove in real arithmetic whatever types the query declares."),
    ] = False,
    memory: Memory = None,
    certificate: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write what proves unsat, for calipers-check."),
    ] = None,
    fast: Annotated[
        bool,
        typer.Option("--fast", help="Answer unsat without a certificate that the checker accepts."),
    ] = False,
    json: Json = None,
    seed: Seed = 0,
) -> None:
    """Decide a VNN-LIB query.

    The first line of standard output is sat, unsat, unknown or timed-out; a counterexample follows, everything else
    is on standard error. On piecewise-linear networks unsat means that calipers-check accepted a certificate.

    Exit code 0 for an answer, unknown and timed-out included; 2 if the query or the network cannot be read or do not
    fit, 3 if something failed that should not (standard output says unknown then); 130 after Ctrl-C.
    """
    begin = time.perf_counter()  # the limit includes the import of torch
    from calipers.cli import verifying

    code = verifying.verify(
        files,
        begin=begin,
        networks=network or [],
        timeout=timeout,
        folder=serialise_assignments,
        exact=exact,
        real=real,
        memory=memory,
        json_file=json,
        seed=seed,
        fast=fast,
        certificate=certificate,
    )
    raise typer.Exit(code)


@app.command()
def check(
    certificate: Annotated[
        Path,
        typer.Argument(metavar="CERTIFICATE", help="A file of --certificate or --certificates."),
    ],
    network: Annotated[
        Path, typer.Option(metavar="FILE.onnx", help="The network; may be gzipped.")
    ],
    property: Annotated[  # noqa: A002
        Path | None,
        typer.Option(metavar="FILE.vnnlib", help="The query, unless it is in the certificate."),
    ] = None,
) -> None:
    """Check a certificate by the independent checker.

    The same as calipers-check: exit code 0 accepted, 1 refused, 2 unusable.
    """
    from calipers_check.__main__ import main as run

    given = [] if property is None else ["--property", str(property)]
    sys.exit(run([str(certificate), "--network", str(network), *given]))


@app.command()
def supports(
    onnx_opset_versions: Annotated[
        bool, typer.Option("--onnx-opset-versions", help="Oldest and newest operator set of ONNX.")
    ] = False,
    onnx_element_types: Annotated[
        bool, typer.Option("--onnx-element-types", help="Types of numbers.")
    ] = False,
    onnx_operators: Annotated[
        bool, typer.Option("--onnx-operators", help="Operators of ONNX.")
    ] = False,
    vnnlib_versions: Annotated[
        bool, typer.Option("--vnnlib-versions", help="Versions of VNN-LIB.")
    ] = False,
    hidden_node_theories: Annotated[
        bool,
        typer.Option(
            "--hidden-node-theories", help="Whether properties may speak of hidden values."
        ),
    ] = False,
    multiple_input_output_theories: Annotated[
        bool,
        typer.Option(
            "--multiple-input-output-theories",
            help="Whether networks may have several inputs or outputs.",
        ),
    ] = False,
    multiple_network_theories: Annotated[
        bool,
        typer.Option(
            "--multiple-network-theories", help="Whether queries may have several networks."
        ),
    ] = False,
    multiple_node_comparison_theories: Annotated[
        bool,
        typer.Option(
            "--multiple-node-comparison-theories",
            help="Whether relations may compare several values.",
        ),
    ] = False,
    arithmetic_complexity_theories: Annotated[
        bool,
        typer.Option(
            "--arithmetic-complexity-theories", help="Which arithmetic relations may use."
        ),
    ] = False,
    optimised_disjunctive_reasoning: Annotated[
        bool,
        typer.Option(
            "--optimised-disjunctive-reasoning", help="Whether disjunctions are decided together."
        ),
    ] = False,
    serialise_assignments: Annotated[
        bool,
        typer.Option(
            "--serialise-assignments", help="Whether counterexamples can be written as tensors."
        ),
    ] = False,
) -> None:
    """List what calipers verify can decide.

    In the words of the VNN-LIB standard, a line for each entry.
    """
    asked = [name for name, wanted in locals().items() if wanted]
    if not asked:
        raise ValueError("supports: name a capability, such as --onnx-operators")
    from calipers.cli.supported import answer

    typer.echo("\n".join(line for name in asked for line in answer(name)))


@app.command()
def bench(
    path: Annotated[
        Path,
        typer.Argument(
            metavar="instances.csv | DIR",
            help="Lines network,property,seconds; a benchmark's folder; or a folder of benchmarks.",
        ),
    ],
    timeout_cap: Annotated[
        str | None, typer.Option(metavar="TIME", help="At most this long for each: 30, 90s, 10m.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.csv", help="Write a row for each instance, and go on from those there."
        ),
    ] = None,
    workers: Annotated[
        int, typer.Option(metavar="N", help="Processes that share the instances.")
    ] = 1,
    threads: Annotated[int, typer.Option(metavar="N", help="Threads of each process.")] = 1,
    memory: Memory = None,
    domains: Annotated[
        int | None,
        typer.Option(metavar="N", help="At most N sub-problems for a box, whatever the machine."),
    ] = None,
    exact: Annotated[bool, typer.Option("--exact", help="As in calipers verify.")] = False,
    fast: Annotated[bool, typer.Option("--fast", help="As in calipers verify.")] = False,
    save: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Write counterexamples, as SUITE/NET_PROPERTY.counterexample.gz."
        ),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE.svg", help="Draw instances solved against time.")
    ] = None,
    json: Json = None,
) -> None:
    """Decide many VNN-LIB queries.

    Verdicts are compared with expected.csv where there is one; exit code 1 if one is the opposite of the expected.
    """
    from calipers.cli import benching

    code = benching.run(
        path, cap=timeout_cap, out=out, workers=workers, threads=threads, memory=memory,
        domains=domains, exact=exact, fast=fast, save=save, plot=plot, json_file=json,
    )  # fmt: skip
    raise typer.Exit(code)


vnncomp = typer.Typer(
    help="Take part in the verification competition, and score it.",
    no_args_is_help=True,
)
app.add_typer(vnncomp, name="vnncomp")
Benchmarks = Annotated[
    Path, typer.Option(metavar="DIR", help="Where the networks and queries are.")
]


@vnncomp.command()
def init(folder: Annotated[Path, typer.Argument(metavar="DIR", help="Where to.")]) -> None:
    """Write the four scripts that the competition asks for."""
    from calipers.cli import benching

    benching.scripts(folder)


@vnncomp.command()
def score(
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="RESULTS", help="Folder of a tool: results.csv and counterexamples."
        ),
    ],
    benchmarks: Benchmarks,
    against: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="RESULTS", help="Folder of another tool, whose counterexamples count."
        ),
    ] = None,
    json: Json = None,
) -> None:
    """Count points by the rules of 2026.

    Counterexamples are replayed, bounds read as rounded and exactly. Exit code 1 if any answer is incorrect.
    """
    from calipers.cli import benching

    code = benching.rescore(folder, benchmarks=benchmarks, against=against or [], json_file=json)
    raise typer.Exit(code)


@vnncomp.command()
def compare(
    ours: Annotated[
        Path, typer.Argument(metavar="OURS", help="CSV of calipers bench, or a results folder.")
    ],
    theirs: Annotated[
        Path, typer.Argument(metavar="THEIRS", help="Folder or CSV of another tool.")
    ],
    benchmarks: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Replay their counterexamples where verdicts contradict."),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE.svg", help="Draw instances solved against time.")
    ] = None,
) -> None:
    """Set the verdicts of two tools side by side.

    Exit code 1 if any contradict each other.
    """
    from calipers.cli import benching

    raise typer.Exit(benching.peer(ours, theirs, benchmarks=benchmarks, plot=plot))
