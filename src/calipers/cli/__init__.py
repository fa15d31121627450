"""The command line. Importing it imports neither torch nor any heavy package; each command imports what it runs.

Every expected error (`CalipersError`, a bad argument, a missing file) becomes one paragraph on stderr and exit code 2.
Results go to stdout, progress to stderr, files are written whole or not at all.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from calipers import __version__
from calipers.errors import CalipersError

app = typer.Typer(
    name="calipers",
    help="Bracket the adversarial robustness of a neural network: certified <= robust <= empirical accuracy.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Model = Annotated[
    str | None,
    typer.Argument(
        metavar="[MODEL]",
        help="FILE.onnx, MODULE.py:FACTORY, or a name of the zoo; the built-in digits network if left out.",
    ),
]
Weights = Annotated[
    Path | None,
    typer.Option(help="A .safetensors or .pt state dict for MODEL (read weights-only)."),
]
InputShape = Annotated[
    str | None,
    typer.Option(metavar="N,N,...", help="Shape of one input; the data's if left out."),
]
DataName = Annotated[
    str, typer.Option("--data", help="digits, mnist, cifar10, FILE.npz with x and y, or a folder.")
]
DataDir = Annotated[Path | None, typer.Option(help="Where mnist or cifar10 files are.")]
Norm = Annotated[str, typer.Option(metavar="linf|l2|l1", help="The norm that limits a change.")]
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
        metavar="FILE.npy", help="Bools, one per feature: only where true may an input change."
    ),
]
Seed = Annotated[int, typer.Option(help="Seed of samples and random starts.")]
Json = Annotated[Path | None, typer.Option("--json", help="Write the result as JSON.")]
Softmax = Annotated[
    bool, typer.Option("--allow-softmax", help="Measure a model that returns probabilities.")
]
Diagnose = Annotated[
    bool,
    typer.Option(
        help="Also check, on at most 60 examples, whether the attacks' failures should be believed."
    ),
]


def main() -> None:
    """The console script."""
    try:
        app(prog_name="calipers")
    except (CalipersError, ValueError, OSError) as error:
        if os.environ.get("CALIPERS_TRACEBACK"):
            raise
        sys.stderr.write(f"calipers: {' '.join(str(error).split())}\n")
        sys.exit(2)


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
    diagnose: Diagnose = False,
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
        diagnose=diagnose,
    )
    if interrupted:
        raise typer.Exit(130)


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
    diagnose: Diagnose = False,
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
def methods() -> None:
    """Every method by the side it works on."""
    from calipers.cli import commands

    commands.methods()


@app.command()
def verify(
    files: Annotated[
        list[str],
        typer.Argument(
            metavar="QUERY.vnnlib | MODEL.onnx QUERY.vnnlib",
            help="The query, its network as --network; or both. Any may be gzipped.",
        ),
    ],
    network: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=FILE.onnx", help="The file of the network that the query declares."
        ),
    ] = None,
    timeout: Annotated[
        str | None, typer.Option(metavar="SECONDS", help="Time limit; none if left out.")
    ] = None,
    serialise_assignments: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Write a counterexample as one TensorProto, VARIABLE.pb, each."
        ),
    ] = None,
    exact: Annotated[
        bool,
        typer.Option(
            "--exact",
            help="No counterexample that needs an input's bound rounded to the network's precision.",
        ),
    ] = False,
    real: Annotated[
        bool,
        typer.Option("--real", help="Prove in real arithmetic whatever types the query declares."),
    ] = False,
    memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Working memory to plan for: 500MB, 2GB.")
    ] = None,
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
    """Decide a VNN-LIB query: sat, unsat, unknown or timed-out as the first line, then a counterexample.

    On piecewise-linear networks unsat means that calipers_check, the independent checker, accepted a certificate.

    Everything else goes to stderr. Exit code 0 for an answer, unknown and timed-out included; 2 if the query or the
    network cannot be read or do not fit, 3 if something failed that should not (stdout says unknown then); 130 after
    Ctrl-C.
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


Flag = Annotated[bool, typer.Option()]


@app.command()
def check(
    certificate: Annotated[Path, typer.Argument(metavar="CERTIFICATE")],
    network: Annotated[Path, typer.Option(metavar="FILE.onnx", help="May be gzipped.")],
    property: Annotated[  # noqa: A002
        Path | None,
        typer.Option(metavar="FILE.vnnlib", help="If it is not written into the certificate."),
    ] = None,
) -> None:
    """Check a certificate by the independent program calipers-check: exit code 0 accepted, 1 refused, 2 unusable."""
    from calipers_check.__main__ import main as run

    given = [] if property is None else ["--property", str(property)]
    sys.exit(run([str(certificate), "--network", str(network), *given]))


@app.command()
def supports(
    onnx_opset_versions: Flag = False,
    onnx_element_types: Flag = False,
    onnx_operators: Flag = False,
    vnnlib_versions: Flag = False,
    hidden_node_theories: Flag = False,
    multiple_input_output_theories: Flag = False,
    multiple_network_theories: Flag = False,
    multiple_node_comparison_theories: Flag = False,
    arithmetic_complexity_theories: Flag = False,
    optimised_disjunctive_reasoning: Flag = False,
    serialise_assignments: Flag = False,
) -> None:
    """What `verify` can decide, as the VNN-LIB standard asks for it: one line per entry."""
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
        typer.Option(help="CSV with a row per instance; goes on where an earlier run stopped."),
    ] = None,
    workers: Annotated[int, typer.Option(help="Processes that share the instances.")] = 1,
    threads: Annotated[int, typer.Option(help="Threads of each process.")] = 1,
    memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Working memory to plan for: 500MB, 2GB.")
    ] = None,
    domains: Annotated[
        int | None,
        typer.Option(help="At most so many sub-problems for a box, whatever the machine."),
    ] = None,
    exact: Annotated[bool, typer.Option("--exact", help="As in calipers verify.")] = False,
    fast: Annotated[bool, typer.Option("--fast", help="As in calipers verify.")] = False,
    save: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Keep counterexamples, as SUITE/NET_PROPERTY.counterexample.gz."
        ),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="F.svg", help="Instances solved against time.")
    ] = None,
    json: Json = None,
) -> None:
    """Decide many VNN-LIB queries and compare with expected.csv where there is one.

    Exit code 1 if a verdict is the opposite of the expected one.
    """
    from calipers.cli import benching

    code = benching.run(
        path, cap=timeout_cap, out=out, workers=workers, threads=threads, memory=memory,
        domains=domains, exact=exact, fast=fast, save=save, plot=plot, json_file=json,
    )  # fmt: skip
    raise typer.Exit(code)


@app.command()
def reproduce(
    data_dir: Annotated[
        Path, typer.Option(metavar="DIR", help="The tutorial's weights and MNIST's four files.")
    ],
    fast: Annotated[
        bool, typer.Option("--fast", help="Attacks on a sample of the images.")
    ] = False,
    only: Annotated[
        str, typer.Option(metavar="TEXT", help="Claims whose section or description holds TEXT.")
    ] = "",
    json: Json = None,
) -> None:
    """The numbers that the tutorial of Kolter and Madry printed, computed again from its weights.

    Exit code 1 if any differs without a known reason.
    """
    from calipers.cli import reproducing

    if not reproducing.run(data_dir, fast=fast, only=only, json_file=json):
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
        str | None, typer.Argument(metavar="RECIPE", help="A name from --list.")
    ] = None,
    listed: Annotated[
        bool, typer.Option("--list", help="The recipes, with what they need and give.")
    ] = False,
    settings: Settings = None,
    run: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Keep network, log and checkpoint here; goes on there."),
    ] = None,
    data_dir: DataDir = None,
    json: Json = None,
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard", help="Also write TensorBoard's files into DIR.")
    ] = False,
    anyway: Anyway = False,
) -> None:
    """Train a network by RECIPE: adversarially or for certificates, then measure it once on test data.

    Several processes: torchrun --nproc-per-node N -m calipers.cli train RECIPE --run DIR.
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
        list[Path], typer.Argument(metavar="RUN RUN...", help="Folders of calipers train --run.")
    ],
) -> None:
    """Trainings side by side: clean, empirical and certified accuracy, and cost."""
    from calipers.cli import training

    training.compare(runs)


@app.command()
def sweep(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="As in calipers train.")],
    vary: Annotated[
        list[str],
        typer.Option(metavar="KEY=A,B,...", help="A setting and its values; may be repeated."),
    ],
    run: Annotated[
        Path, typer.Option(metavar="DIR", help="A folder for each training goes in here.")
    ],
    settings: Settings = None,
    data_dir: DataDir = None,
    anyway: Anyway = False,
) -> None:
    """RECIPE once for each combination of values, then all side by side; goes on where it stopped."""
    from calipers.cli import training

    interrupted = training.sweep(
        recipe, vary=vary, settings=settings or [], directory=run, data_dir=data_dir, anyway=anyway
    )
    if interrupted:
        raise typer.Exit(130)


@app.command()
def download(
    name: Annotated[str, typer.Argument(metavar="mnist|cifar10")],
    data_dir: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Where to; a cache folder, which is looked into, if left out."
        ),
    ] = None,
    source: Annotated[
        str | None, typer.Option(metavar="URL", help="Another address that has the files.")
    ] = None,
) -> None:
    """Fetch a data set, checked byte by byte; it is read from there without --data-dir."""
    from calipers.cli import training

    training.fetch(name, data_dir, source)


vnncomp = typer.Typer(
    help="The verification competition: scripts, results checked again, results compared.",
    no_args_is_help=True,
)
app.add_typer(vnncomp, name="vnncomp")
Benchmarks = Annotated[
    Path, typer.Option(metavar="DIR", help="Where the benchmarks' networks and queries are.")
]


@vnncomp.command()
def init(folder: Annotated[Path, typer.Argument(metavar="DIR")]) -> None:
    """Write install_tool.sh, post_install.sh, prepare_instance.sh and run_instance.sh into DIR."""
    from calipers.cli import benching

    benching.scripts(folder)


@vnncomp.command()
def score(
    folder: Annotated[
        Path,
        typer.Argument(metavar="RESULTS", help="A tool's folder: results.csv and counterexamples."),
    ],
    benchmarks: Benchmarks,
    against: Annotated[
        list[Path] | None,
        typer.Option(metavar="RESULTS", help="Another tool's folder, whose counterexamples count."),
    ] = None,
    json: Json = None,
) -> None:
    """Points by the rules of 2026: counterexamples replayed, bounds read as rounded and exactly.

    Exit code 1 if any answer is incorrect.
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
        Path, typer.Argument(metavar="THEIRS", help="Another tool's results folder or CSV.")
    ],
    benchmarks: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Replay their counterexamples where verdicts contradict."),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="F.svg", help="Instances solved against time.")
    ] = None,
) -> None:
    """Two tools' verdicts side by side. Exit code 1 if any contradict each other."""
    from calipers.cli import benching

    raise typer.Exit(benching.peer(ours, theirs, benchmarks=benchmarks, plot=plot))
