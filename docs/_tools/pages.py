"""Pages that are written when the site is built, from the tables in the code: `docs/generated`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import capabilities
from typer.main import get_command
from typer.testing import CliRunner

import calipers
from calipers.cli import app
from calipers.methods import SIDES, statement

HERE = Path(__file__).parents[1] / "generated"
FIELDS = {
    "guarantee": "Guarantee",
    "cost": "Cost",
    "loose": "When loose",
    "paper": "Paper",
}
MODULES = {
    "Sets and statements": [
        "calipers.grid",
        "calipers.work",
        "calipers.errors",
        "calipers.confidence",
    ],
    "Networks": [
        "calipers.graph.graph",
        "calipers.graph.inspect",
        "calipers.models",
        "calipers.zoo",
        "calipers.data",
    ],
    "Operators": ["calipers.ops", "calipers.ops.kinds", "calipers.ops.piecewise"],
    "Attacks": [
        "calipers.attacks.losses",
        "calipers.attacks.minimum_norm",
        "calipers.attacks.diagnostics",
        "calipers.attacks.measures",
    ],
    "Bounds": [
        "calipers.bounds.ladder",
        "calipers.bounds.lipschitz",
        "calipers.bounds.deployed",
        "calipers.bounds.losses",
        "calipers.bounds.widths",
    ],
    "Exact": [
        "calipers.exact.outcome",
        "calipers.exact.branch",
        "calipers.exact.inputs",
        "calipers.exact.milp",
        "calipers.exact.certificate",
    ],
    "Training": [
        "calipers.training.objectives",
        "calipers.training.step",
        "calipers.training.schedules",
        "calipers.training.linear",
        "calipers.training.smoothing",
        "calipers.training.experiments",
        "calipers.training.health",
    ],
    "Measuring": [
        "calipers.evaluate.result",
        "calipers.evaluate.cascade",
        "calipers.evaluate.solvers",
        "calipers.evaluate.gate",
        "calipers.evaluate.plots",
        "calipers.vnnlib",
        "calipers.methods",
        "calipers.doctor",
    ],
}
RUNNER = CliRunner()
PUBLIC = "`import calipers as cp`: all that is public at the top. Importing it is quick; names load on first use."
COMMANDS = """`calipers COMMAND --help` prints the same. Results are on standard output, progress and messages on standard
error. Times are `90s`, `10m` or `1.5h`, sizes `500MB` or `2GB`, shares `0.5%` or `0.005`; radii are in units of the inputs,
and read exactly. Exit codes: 0 done, 1 a check failed, 2 wrong arguments or files, 130 interrupted."""
METHODS = """What each method promises, what it costs, when its result is far from the truth, and where it comes from.
Costs are in passes of the network for one example; a gradient is two. `calipers methods NAME` prints a card in the
terminal, `calipers explain` what each method finds for an example of yours."""


def write() -> None:
    """All of them; a page that is as it was keeps its time, so that Sphinx leaves it alone."""
    made = {"methods.md": methods(), "commands.md": commands(), "coverage.md": capabilities.page()}
    made |= reference()
    notebooks = HERE.parents[1] / "examples" / "notebooks"
    made |= {
        f"notebooks/{p.name}": p.read_text(encoding="utf-8") for p in notebooks.glob("*.ipynb")
    }
    for name, text in made.items():
        page = HERE / name
        page.parent.mkdir(parents=True, exist_ok=True)
        if not page.exists() or page.read_text(encoding="utf-8") != text:
            page.write_text(text, encoding="utf-8")


def methods() -> str:
    """A card for each method of `calipers.methods`."""
    parts = ["# Method cards", METHODS]
    for side in SIDES:
        title, _, meaning = side.title.partition(": ")
        parts.append(f"({side.name}-methods)=\n## {title}")
        parts.append(f"{meaning[:1].upper()}{meaning[1:]}." if meaning else "Beside the registers.")
        for name, method in side.methods.items():
            card = side.cards[name]._asdict()
            anchor = f"({side.name}-{name.replace('_', '-').lower()})="
            fields = [f":{title}: {escape(card[field])}" for field, title in FIELDS.items()]
            function = f":Function: `{method.__module__}.{method.__qualname__}`"
            parts += [f"{anchor}\n### {name}", escape(statement(method))]
            parts.append("\n".join([*fields, function]))
    return "\n\n".join(parts) + "\n"


def commands() -> str:
    """The help of every command."""
    parts = ["# Commands", COMMANDS]
    for path in [[], *_paths(get_command(app), [])]:
        said = RUNNER.invoke(app, [*path, "--help"], prog_name="calipers", terminal_width=88).output
        text = "\n".join(line.rstrip() for line in said.strip().splitlines())
        depth = "##" if len(path) < 2 else "###"
        parts.append(f"{depth} {' '.join(['calipers', *path])}\n\n```text\n{text}\n```")
    return "\n\n".join(parts) + "\n"


def _paths(command: Any, above: list[str]) -> Iterator[list[str]]:
    """The words of each command below this one."""
    for name, below in getattr(command, "commands", {}).items():
        yield [*above, name]
        yield from _paths(below, [*above, name])


def reference() -> dict[str, str]:
    """A page with the public names, and one for each group of modules."""
    public = [f"calipers.{name}" for name in calipers.__all__ if name != "__version__"]
    made = {"reference-calipers.md": ["# calipers", PUBLIC, *map(_described, public)]}
    for title, modules in MODULES.items():
        page = f"reference-{title.split()[0].lower()}.md"
        made[page] = [f"# {title}"]
        for module in modules:
            made[page].append(f"## {module.removeprefix('calipers.')}")
            made[page].append(f"```{{eval-rst}}\n.. automodule:: {module}\n   :members:\n```")
    return {page: "\n\n".join(parts) + "\n" for page, parts in made.items()}


def _described(name: str) -> str:
    """A public name: a register by its entries, everything else by its docstring."""
    found = getattr(calipers, name.removeprefix("calipers."))
    if isinstance(found, dict):
        entries = ", ".join(
            f":py:obj:`{key} <{f.__module__}.{f.__qualname__}>`" for key, f in found.items()
        )
        return f"```{{eval-rst}}\n.. py:data:: {name}\n\n   The functions by name: {entries}.\n```"
    kind, members = ("class", "   :members:\n") if isinstance(found, type) else ("function", "")
    return f"```{{eval-rst}}\n.. auto{kind}:: {name}\n{members}```"


def escape(text: str) -> str:
    """A docstring's words as Markdown: stars are products, double backticks code."""
    return text.replace("``", "`").replace("*", r"\*").replace("$", r"\$")
