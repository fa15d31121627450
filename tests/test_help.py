"""The help of all commands reads as one voice: short summaries, a word for every value, text for every option."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from calipers.cli import app

UNITS = {"time limit": "TIME", "memory": "SIZE", "processes": "N", "threads": "N"}


def below(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every command with its words."""
    for name, found in getattr(command, "commands", {}).items():
        yield (*path, name), found
        yield from below(found, (*path, name))


COMMANDS = list(below(get_command(app)))
each = pytest.mark.parametrize(
    ("path", "command"), COMMANDS, ids=[" ".join(p) for p, _ in COMMANDS]
)


@each
def test_the_summary_is_a_short_sentence(path: tuple[str, ...], command: Any) -> None:
    summary = command.help.strip().partition("\n\n")[0]
    assert summary[0].isupper()
    assert summary.endswith(".")
    assert len(summary) <= 64, f"{' '.join(path)}: the list of commands would cut {summary!r}"
    listed = CliRunner().invoke(app, [*path[:-1], "--help"], terminal_width=80).output
    assert summary in " ".join(listed.split())


@each
def test_options_say_what_they_take_and_do(path: tuple[str, ...], command: Any) -> None:
    for option in command.params:
        if "--help" in option.opts:
            continue
        name = f"{' '.join(path)} {option.opts[0]}"
        assert option.help, f"{name}: no help"
        assert option.help.endswith((".", "?")), f"{name}: {option.help!r}"
        assert option.help[0].isupper() or option.help.split()[0].rstrip(",") in (
            "auto",
            "digits",
        ), name
        assert not getattr(option, "secondary_opts", ()), f"{name}: has a --no- form"
        if not getattr(option, "is_flag", False):
            assert option.metavar, f"{name}: no word for its value"
            for words, unit in UNITS.items():
                if option.help.lower().startswith(words):
                    assert option.metavar == unit, name


def test_the_first_command_is_the_first_to_try() -> None:
    listed = CliRunner().invoke(app, ["--help"], terminal_width=80).output
    names = [
        line.split()[0] for line in listed.partition("Commands:")[2].splitlines() if line.strip()
    ]
    assert names[0] == "audit"
    assert names[-2:] == ["runs", "vnncomp"]
