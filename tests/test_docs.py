"""The tools of the documentation: what must not get past them. The pages themselves run in `make docs`."""

from __future__ import annotations

import importlib
import pydoc
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

TOOLS = Path(__file__).resolve().parents[1] / "docs" / "_tools"


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(TOOLS))
    yield importlib.import_module
    for name in ("docstrings", "mathml", "offline", "shell"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize(
    ("name", "content", "found"),
    [
        ("a.html", '<script src="https://cdn.example/x.js"></script>', True),
        ("a.html", '<link rel="stylesheet" href="//fonts.example/css">', True),
        ("a.html", '<img src="http://example.org/a.png">', True),
        ("a.html", "<style>@import url('https://fonts.example/css');</style>", True),
        ("a.css", "div { background: url(https://example.org/a.png) }", True),
        ("a.html", '<a href="https://example.org">a link</a><img src="a.png">', False),
        (
            "a.html",
            '<script src="_static/x.js"></script><img src="data:image/png;base64,AA">',
            False,
        ),
    ],
)
def test_what_a_page_would_load_is_found(
    tool: Any, tmp_path: Path, name: str, content: str, found: bool
) -> None:
    (tmp_path / name).write_text(content)
    assert tool("offline").main(str(tmp_path)) is found


def test_an_empty_site_is_no_success(tool: Any, tmp_path: Path) -> None:
    assert tool("offline").main(str(tmp_path))


def test_formulas_are_mathml_and_unknown_commands_a_warning(
    tool: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("sphinx", reason="needs the extra docs")
    pytest.importorskip("latex2mathml", reason="needs the extra docs")
    from docutils import nodes

    mathml = tool("mathml")
    warned: list[str] = []
    monkeypatch.setattr(mathml.log, "warning", lambda *words, **_: warned.append(str(words)))
    drawn = mathml.mathml(nodes.math_block("", r"\max_{x \in \Delta} f(x)"), "block")
    assert "<munder>" in drawn
    assert not warned
    mathml.mathml(nodes.math_block("", r"\nosuchcommand x"), "inline")
    assert warned


def test_docstrings_become_markup(tool: Any) -> None:
    pytest.importorskip("sphinx", reason="needs the extra docs")
    converted = tool("docstrings").converted
    lines = [
        "The point of `Region`: (B, *x), |x| at most ``eps``.",
        "",
        "    x ← P(x + d)",
        "",
        "Args:",
        "    steps: how many_",
        "Sound: for every",
        "    region.",
        "Cost: one pass.",
    ]
    assert [line for line in converted(lines) if line] == [
        r"The point of :py:obj:`Region`: (B, \*x), \|x\| at most ``eps``.",
        "::",
        "    x ← P(x + d)",
        "Args:",
        r"    steps: how many\_",
        ":Sound: for every",
        "    region.",
        ":Cost: one pass.",
    ]


def test_commands_stop_at_the_first_that_fails(tool: Any, tmp_path: Path) -> None:
    pytest.importorskip("sphinx", reason="needs the extra docs")
    shell = tool("shell")
    folder = tmp_path / "page"
    folder.mkdir()
    done = shell.run("calipers --version\nfalse\ncalipers --name", folder)
    assert done["code"] == 1
    assert "Calipers" not in done["out"]
    (folder / "file.py").write_text("import sys\nprint('written')\nsys.exit(3)\n")
    done = shell.run("python file.py  # a comment", folder)
    assert (done["code"], done["out"]) == (3, "written\n")
    assert shell.run("echo one | tr a-z A-Z", folder)["out"] == "ONE\n"


PAGES = sorted(p for p in TOOLS.parent.rglob("*.md") if "generated" not in p.parts)
NAME = re.compile(r"`(calipers(?:\.\w+)+)(?:\(\))?`")
TEST = re.compile(r"`(tests/[\w/]+(?:\.py)?)`")


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_names_and_tests_on_a_page_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for file in TEST.findall(text):
        assert (TOOLS.parents[1] / file).exists(), file
    for name in NAME.findall(text):
        assert pydoc.locate(name) is not None, name
