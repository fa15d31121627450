"""What the commands do, with the heavy imports."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar
from rich.table import Table
from rich.text import Text

from calipers.attacks import LEVELS
from calipers.cli.options import seconds_of, shape_of, share_of, writable
from calipers.data import Data, load, load_mask
from calipers.errors import unknown_name
from calipers.evaluate import Audit, Curve
from calipers.evaluate import audit as run_audit
from calipers.evaluate import curve as run_curve
from calipers.evaluate import explain as run_explain
from calipers.evaluate.cascade import default_cascade, select
from calipers.evaluate.curve import folder as run_folder
from calipers.evaluate.fold import Progress
from calipers.evaluate.limits import bytes_of
from calipers.files import write_atomically
from calipers.graph.graph import Network, evaluating
from calipers.methods import SIDES, find, statement
from calipers.models import load_model
from calipers.sets import ThreatModel
from calipers.zoo import ZOO

DEFAULT_MODEL = "digits_pgd"
NORMS = {"linf": math.inf, "l2": 2.0, "l1": 1.0}


@dataclass(frozen=True)
class Subject:
    """What is measured, as the command line says it."""

    model: str | None
    weights: Path | None
    input_shape: str | None
    data: str
    data_dir: Path | None
    norm: str
    eps: str
    grid: str | None = None
    mask: Path | None = None

    @property
    def name(self) -> str:
        """The model's name without its folder."""
        return Path(self.model or DEFAULT_MODEL).name

    def load(self) -> tuple[Network, Data, ThreatModel]:
        """Cheapest first, so that a typing error shows at once."""
        if self.norm not in NORMS:
            raise unknown_name("norm", self.norm, NORMS)
        mask = None if self.mask is None else load_mask(self.mask)
        ThreatModel(NORMS[self.norm], self.eps, mask=mask, grid=self.grid)
        data = load(self.data, data_dir=self.data_dir)
        threat = ThreatModel(
            NORMS[self.norm], self.eps, data.lower, data.upper, mask=mask, grid=self.grid
        )
        return self.loader(data)(), data, threat

    def loader(self, data: Data) -> Callable[[], Network]:
        """What makes the network, here or in another process."""
        shape = shape_of(self.input_shape) or tuple(data.x.shape[1:])
        return partial(load_model, self.model or DEFAULT_MODEL, self.weights, shape)


def audit(
    subject: Subject,
    *,
    samples: int | None,
    budget: str | None,
    methods: str | None,
    run: Path | None,
    json_file: Path | None,
    report: Path | None,
    figures: Path | None,
    seed: int,
    allow_softmax: bool,
    deployed: bool,
    memory: str | None,
    certificates: Path | None,
    workers: int | None,
    threads: int,
    worker_memory: str | None,
    precision: str | None,
    diagnose: bool,
    ray: str | None,
    comparisons: int,
) -> bool:
    """Run, print, write; returns whether Ctrl-C ended it early."""
    for option, file in (("--json", json_file), ("--report", report)):
        if file is not None:
            writable(option, file.absolute())
    if figures is not None:
        writable(
            "--figures",
            figures.absolute() / "curve.svg" if figures.is_dir() else figures.absolute(),
        )
    limit = None if memory is None else bytes_of(memory)
    seconds = None if budget is None else seconds_of(budget)
    narrow = 0.0 if precision is None else share_of(precision, "--precision")
    names = None if methods is None else [m.strip() for m in methods.split(",") if m.strip()]
    if names is not None:
        select(names)  # a typing error shows before anything is loaded
    radii = [e.strip() for e in subject.eps.split(",")]
    for eps in radii:
        ThreatModel(math.inf, eps)
    subject = replace(subject, eps=radii[0])
    network, data, threat = subject.load()
    result: Audit | Curve
    measure = run_audit if len(radii) == 1 else partial(run_curve, eps=radii)
    with progress_bar() as show:
        result = measure(
            network,
            data,
            threat,
            seconds=seconds,
            samples=samples,
            seed=seed,
            run=run,
            cascade=None if names is None else select(names, network),
            progress=show,
            allow_softmax=allow_softmax,
            deployed=deployed,
            memory=limit,
            name=subject.name,
            workers=workers,
            threads=threads,
            worker_memory=worker_memory,
            loader=subject.loader(data),
            precision=narrow,
            diagnose=diagnose,
            ray=ray,
            comparisons=max(comparisons, len(radii)),
        )
    console().print(result.table())
    if json_file is not None:
        write_atomically(json_file, json.dumps(result.json(), indent=2, allow_nan=False) + "\n")
    if certificates is not None:
        result = _certified(result, network, certificates)
    if report is not None:
        result.report(report)
        sys.stderr.write(f"report: {report}\n")
    if figures is not None:
        missing = result.figures(figures)
        sys.stderr.write(f"figures: {figures}{missing and f' ({missing})'}\n")
    return result.stopped == "interrupted"


def _certified(result: Audit | Curve, network: Network, folder: Path) -> Audit | Curve:
    """The result with certificates; those of a curve in a folder for each radius."""
    if isinstance(result, Audit):
        return _certificates(result, network, folder)
    return result.each(lambda one: _certificates(one, network, run_folder(folder, one.threat)))


def _certificates(result: Audit, network: Network, folder: Path) -> Audit:
    from calipers.evaluate.certificates import certificates, linked

    found = certificates(result, network, folder)
    accepted = sum(not reason for reason in found.values())
    sys.stderr.write(f"certificates: {accepted} of {len(found)} certified examples, in {folder}\n")
    for reason in sorted({r for r in found.values() if r})[:3]:
        sys.stderr.write(f"calipers: {reason}\n")
    return linked(result, folder, found)


def explain(subject: Subject, *, index: int, seed: int) -> None:
    network, data, threat = subject.load()
    console().print(run_explain(network, data, threat, index=index, seed=seed).table())


def inspect(model: str, weights: Path | None, input_shape: str | None) -> None:
    _facts(load_model(model, weights, shape_of(input_shape)))


def inspect_widths(subject: Subject, samples: int) -> None:
    from calipers.bounds.widths import layer_widths
    from calipers.evaluate.tables import widths_table

    if samples < 1:
        raise ValueError(f"--samples: {samples} is no number of examples; give at least 1")
    network, data, threat = subject.load()
    _facts(network)
    x = data.x[:samples].to(network.device)
    with evaluating(network.module):
        rows = layer_widths(network, threat.around(x))
    title = f"Intervals on {len(x)} of {data.name}, {threat.describe()}"
    console().print("", widths_table(rows, title), sep="\n")


def _facts(network: Network) -> None:
    from calipers.graph.inspect import inspect as inspect_network

    out = console()
    for line in inspect_network(network).lines():
        out.print(line, markup=False, highlight=False, soft_wrap=True)


def methods(name: str | None) -> None:
    """All methods by side, or the card of each method of that name."""
    out = console()
    if name is not None:
        for side, method, card in find(name):
            out.print(Text(f"{name} ({side.title})", style="bold"))
            table = Table.grid(padding=(0, 2))
            table.add_row("  does", Text(statement(method)))
            for field, said in card._asdict().items():
                table.add_row(f"  {field}", Text(said))
            out.print(table)
        return
    for side in SIDES:
        out.print(Text(side.title, style="bold"))
        table = Table.grid(padding=(0, 2))
        for entry, method in side.methods.items():
            table.add_row(f"  {entry}", Text(statement(method)))
        out.print(table)
    out.print(Text(f"Levels of the attack auto: {', '.join(LEVELS)}"))
    stages = ", ".join(stage.name for stage in default_cascade())
    out.print(Text(f"Stages of an audit, in order: {stages}", style="bold"))
    out.print(Text(f"Models of the zoo: {', '.join(ZOO)}"))


def console() -> Console:
    """Standard output: as wide as the terminal, or 120 columns in a pipe."""
    return Console() if sys.stdout.isatty() else Console(width=120)


@contextmanager
def progress_bar() -> Iterator[Callable[[Progress], None]]:
    """A bar on a terminal, a line per finished stage elsewhere; on standard error."""
    if not sys.stderr.isatty():
        yield _plain
        return
    columns = (
        TextColumn("{task.description:<10}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[counts]}"),
        TimeElapsedColumn(),
    )
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("checks", total=None, counts="")

        def show(at: Progress) -> None:
            bar.update(
                task, description=at.stage, completed=at.done, total=at.total, counts=_counts(at)
            )

        yield show


def _plain(at: Progress) -> None:
    if at.done == at.total:
        sys.stderr.write(f"{at.stage}: {at.total} tried; {_counts(at)}\n")
        sys.stderr.flush()


def _counts(at: Progress) -> str:
    """Verdicts, the interval of robust accuracy so far, speed and time left in this stage."""
    n = max(at.robust + at.unknown + at.vulnerable, 1)
    low, high = 100 * at.robust / n, 100 * (n - at.vulnerable) / n
    said = f"{at.robust} certified, {at.unknown} unknown, {at.vulnerable} broken; {low:.1f} .. {high:.1f} %"
    if not at.rate:
        return said
    left = f", {at.eta:.0f} s left" if at.done < at.total else ""
    return f"{said}; {at.rate:.1f} examples/s{left}"
