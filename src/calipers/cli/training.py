"""What ``calipers train``, ``compare`` and ``sweep`` do."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bar
from rich.table import Table
from rich.text import Text

from calipers.cli.commands import console
from calipers.cli.options import writable
from calipers.downloads import download
from calipers.errors import DataError
from calipers.files import write_atomically
from calipers.recipes import build, catalogue
from calipers.training import Measured, Run, Status, Trained, checkpoints
from calipers.training import train as run_training
from calipers.training.distributed import group
from calipers.training.loop import RESULT

SHOWN = ("clean", "attacked", "certified")


def listing() -> None:
    """The catalogue: a recipe, then what it is about, what it needs and what it gives."""
    out = console()
    for row in catalogue():
        out.print(Text(f"{row.name}: {row.data}, {row.threat}, {row.network}, {row.epochs} epochs"))
        for said in (row.about, f"needs {row.needs}", row.expected and f"gives {row.expected}"):
            if said:
                out.print(Padding(Text(said), (0, 0, 0, 4)))


def train(
    recipe: str,
    *,
    settings: Sequence[str],
    directory: Path | None,
    data_dir: Path | None,
    json_file: Path | None,
    tensorboard: bool,
    anyway: bool,
) -> bool:
    """Train, print, write; returns whether Ctrl-C ended it early."""
    if json_file is not None:
        writable("--json", json_file.absolute())
    run = build(recipe, _pairs("--set", settings))
    result = _run(run, directory, data_dir=data_dir, tensorboard=tensorboard, anyway=anyway)
    if result is None:
        return True
    if not group().first:
        return False
    console().print(_table([_line(run.name, result.json())]))
    for finding in result.findings:
        console().print(Text(f"{finding.kind}: {finding.message}"))
    if result.test is not None:
        console().print(Text(_advice(result)))
    if json_file is not None:
        write_atomically(json_file, json.dumps(result.json(), indent=2) + "\n")
    return False


def _run(run: Run, directory: Path | None, prefix: str = "", **options: Any) -> Trained | None:
    """The training with its progress shown; None after Ctrl-C."""
    try:
        with _progress(prefix) as show:
            return run_training(run, directory=directory, progress=show, **options)
    except KeyboardInterrupt:
        kept = "nothing was kept" if directory is None else "the same command goes on"
        sys.stderr.write(f"{prefix}interrupted; {kept}\n")
        return None


def compare(folders: Sequence[Path]) -> None:
    """The trade-off of clean, empirical and certified accuracy and cost, and the settings that differ."""
    results = {_name(folder, folders): _result(folder) for folder in folders}
    out = console()
    out.print(_table([_line(name, result) for name, result in results.items()]))
    for line in _settings_that_differ(results):
        out.print(Text(line))


def sweep(
    recipe: str,
    *,
    vary: Sequence[str],
    settings: Sequence[str],
    directory: Path,
    data_dir: Path | None,
    anyway: bool,
) -> bool:
    """One training for each combination, each in a folder of its own; finished ones are not repeated. As `train`."""
    fixed = _pairs("--set", settings)
    combined = _combinations(_pairs("--vary", vary))
    runs = {
        " ".join(f"{k}={v}" for k, v in one.items()): build(recipe, {**fixed, **one})
        for one in combined
    }  # all are built before any is trained
    rows = []
    for name, run in runs.items():
        folder = directory / name.replace("/", "_").replace(" ", "_")
        result = _run(run, folder, f"{name}: ", data_dir=data_dir, anyway=anyway)
        if result is None:
            return True
        rows.append(_line(name, result.json()))
    if group().first:
        console().print(_table(rows))
    return False


def _combinations(vary: Mapping[str, str]) -> list[dict[str, str]]:
    """All combinations of the settings' values. Settings joined by + take their values together.

    Raises:
        ValueError: no setting, one named twice, or joined ones with another number of values.
    """
    if not vary:
        raise ValueError("--vary: name a setting and its values, such as --vary seed=0,1,2")
    choices = []
    for joined, text in vary.items():
        keys = joined.split("+")
        rows = [one.split("+") if len(keys) > 1 else [one] for one in text.split(",")]
        for row in rows:
            if len(row) != len(keys):
                raise ValueError(
                    f"--vary: {joined} needs {len(keys)} values joined by +, not {'+'.join(row)!r}"
                )
        choices.append([dict(zip(keys, row, strict=True)) for row in rows])
    names = [key for joined in vary for key in joined.split("+")]
    for key in names:
        if names.count(key) > 1:
            raise ValueError(f"--vary: {key} is given twice")
    return [
        {k: v for one in chosen for k, v in one.items()} for chosen in itertools.product(*choices)
    ]


def fetch(name: str, folder: Path | None, source: str | None) -> None:
    """Download, and say where to."""
    with Bar(
        TextColumn("{task.description}"),
        DownloadColumn(),
        console=Console(stderr=True),
        transient=True,
    ) as bar:
        tasks: dict[str, TaskID] = {}

        def show(file: str, done: int) -> None:
            if file not in tasks:
                tasks[file] = bar.add_task(file, total=None)
            bar.update(tasks[file], completed=done)

        where = download(name, folder, source=source, progress=show)
    console().print(Text(f"{name}: {where}"))


# -- tables ------------------------------------------------------------------------------------------------------------


def _line(name: str, result: Mapping[str, Any]) -> list[str]:
    """A row: accuracies in per cent, and what they cost."""
    test = result["test"]
    shares = {} if test is None else _measured(test).shares()
    accuracies = [f"{100 * shares[k]:.2f}" if k in shares else "-" for k in SHOWN]
    unknown = "-" if test is None else str(_measured(test).unknown)
    return [
        name,
        *accuracies,
        unknown,
        f"{result['epoch']} of {result['run']['epochs']}",
        f"{result['parameters']:,}",
        f"{result['seconds'] / 60:.1f}",
    ]


def _measured(test: Mapping[str, Any]) -> Measured:
    return Measured(**{k: v for k, v in test.items() if k != "unknown"})


def _table(rows: Sequence[Sequence[str]]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in (
        "training",
        "clean %",
        "attacked %",
        "certified %",
        "unknown",
        "epoch",
        "weights",
        "minutes",
    ):
        table.add_column(column, justify="left" if column == "training" else "right")
    for row in rows:
        table.add_row(*row)
    return table


def _settings_that_differ(results: Mapping[str, Mapping[str, Any]]) -> list[str]:
    described = {name: result["run"] for name, result in results.items()}
    first = next(iter(described.values()))
    keys = [k for k in first if any(d.get(k) != first[k] for d in described.values())]
    return [
        f"{key}: " + " | ".join(f"{n}: {d.get(key)}" for n, d in described.items()) for key in keys
    ]


def _name(folder: Path, folders: Sequence[Path]) -> str:
    """The folder's name, or its whole path where several have that name."""
    return folder.name if sum(f.name == folder.name for f in folders) == 1 else str(folder)


def _result(folder: Path) -> dict[str, Any]:
    """What a finished training left.

    Raises:
        DataError: the folder holds none.
    """
    file = folder / RESULT
    if not file.is_file():
        unfinished = (folder / checkpoints.FILE).exists()
        what = (
            "the training there is not finished; start it again to go on"
            if unfinished
            else "no training there"
        )
        raise DataError(f"{folder}: no {RESULT}: {what}")
    try:
        result: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        _line("", result)
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{file}: not the result of a training ({error})") from None
    return result


def _advice(result: Trained) -> str:
    """How to go on."""
    run = result.run
    if result.directory is None:
        return "nothing was kept; --run DIR keeps the network, the log and a checkpoint"
    return (
        f"{result.directory / 'model.onnx'}: calipers audit it with --data {run.data} for complete search on the "
        f"{result.test.unknown if result.test else 0} unknown examples"
    )


def _pairs(option: str, texts: Sequence[str]) -> dict[str, str]:
    """``key=value`` texts as a mapping.

    Raises:
        ValueError: one is none, or a key stands twice.
    """
    found: dict[str, str] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not (equals and key.strip() and value.strip()):
            raise ValueError(f"{option}: cannot read {text!r}; write key=value, such as epochs=10")
        if key.strip() in found:
            raise ValueError(f"{option}: {key.strip()} is given twice")
        found[key.strip()] = value.strip()
    return found


# -- progress ----------------------------------------------------------------------------------------------------------


@contextmanager
def _progress(prefix: str = "") -> Iterator[Callable[[Status], None]]:
    """A bar on a terminal, a line per epoch elsewhere; on standard error."""
    if not sys.stderr.isatty():
        yield lambda status: _plain(status, prefix)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[values]}"),
        TimeRemainingColumn(),
    )
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("train", total=None, values="")

        def show(status: Status) -> None:
            if status.message:
                bar.console.print(Text(f"{prefix}{status.message}"))
            if status.phase != "validate":
                bar.update(
                    task,
                    description=f"{prefix}{status.phase} {status.epoch}/{status.epochs}",
                    completed=status.done,
                    total=status.total,
                    values=_values(status.values),
                )

        yield show


def _plain(status: Status, prefix: str) -> None:
    if status.message:
        sys.stderr.write(f"{prefix}{status.message}\n")
    if status.phase == "validate":
        sys.stderr.write(
            f"{prefix}epoch {status.epoch} of {status.epochs}: {_values(status.values)}\n"
        )
    sys.stderr.flush()


def _values(values: Mapping[str, Any]) -> str:
    """The loss, and the shares in per cent: of training batches, then of validation examples."""
    found = [f"loss {values['loss']:.3f}"] if "loss" in values else []
    for before in ("", "valid_"):
        shares = [f"{k} {100 * values[before + k]:.1f}" for k in SHOWN if before + k in values]
        found += [("validation: " if before else "") + ", ".join(shares)] if shares else []
    return " · ".join(found)
