"""The course's pages: their cells compile and name what exists, every checklist item is there once, stored results fit.

That they run is the docs build's test: an error in a cell fails it, as does a failed assertion.
"""

import ast
import importlib
import re
from functools import cache
from pathlib import Path

import pytest

from calipers.reproduce import CLAIMS

DOCS = Path(__file__).parents[1] / "docs"
PAGES = sorted((DOCS / "course").glob("*.md"))
CELL = re.compile(r"^```\{code-cell\}[^\n]*\n((?::[^\n]*\n)*)(.*?)^```", re.MULTILINE | re.DOTALL)


def cells(page: Path) -> list[ast.Module]:
    return [ast.parse(m[2], filename=page.name) for m in CELL.finditer(page.read_text())]


@cache
def names_of(module: str) -> frozenset[str]:
    """What a module defines; one of the docs' own tools is read, not imported: it may need what is not installed."""
    tool = DOCS / "_tools" / f"{module}.py"
    if not tool.is_file():
        return frozenset(dir(importlib.import_module(module)))
    found: set[str] = set()
    for node in ast.parse(tool.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        if isinstance(node, ast.Assign):
            found |= {n.id for n in ast.walk(node.targets[0]) if isinstance(n, ast.Name)}
    return frozenset(found)


def exists(module: str, name: str) -> bool:
    if name in names_of(module) or name in getattr(importlib.import_module(module), "__all__", ()):
        return True
    return importlib.util.find_spec(f"{module}.{name}") is not None


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_cells_compile_and_name_what_exists(page: Path) -> None:
    modules: dict[str, str] = {}
    for cell in cells(page):
        for node in ast.walk(cell):
            if isinstance(node, ast.Import):
                for a in node.names:
                    names_of(a.name)
                    modules[a.asname or a.name] = a.name
            if isinstance(node, ast.ImportFrom):
                assert node.module is not None
                wrong = [a.name for a in node.names if not exists(node.module, a.name)]
                assert not wrong, f"{node.module} has no {wrong}"
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                module = modules.get(node.value.id, "")
                if module.startswith(("calipers", "course", "figures")):
                    known = names_of(module) if module != "calipers" else {node.attr}
                    assert node.attr in known or exists(module, node.attr), f"{module}.{node.attr}"
                    if module == "calipers":
                        assert hasattr(importlib.import_module("calipers"), node.attr), node.attr


def test_each_checklist_item_has_one_anchor() -> None:
    text = "\n".join(page.read_text() for page in PAGES)
    anchors = sorted(int(n) for n in re.findall(r"^\(c-(\d+)\)=$", text, re.MULTILINE))
    assert anchors == list(range(1, 105))


def test_every_page_is_in_the_contents() -> None:
    contents = (DOCS / "course" / "index.md").read_text()
    listed = re.findall(r"^[a-z][a-z-]*$", contents, re.MULTILINE)
    assert sorted(listed) == sorted(p.stem for p in PAGES if p.stem != "index")


def test_the_stored_reproduction_is_of_these_claims() -> None:
    import json

    run = json.loads((DOCS / "course" / "data" / "reproduced.json").read_text())
    stored = {c["claim"]: c for c in run["claims"]}
    assert {c.what: list(c.published) for c in CLAIMS} == {
        k: c["published"] for k, c in stored.items()
    }
    assert {c["verdict"] for c in run["claims"]} <= {"agrees", "stronger", "corrected", "left out"}
    assert all(c["reason"] for c in run["claims"] if c["verdict"] == "corrected")
    assert {"torch", "calipers"} <= set(run["versions"])
    assert run["date"]
    assert run["command"]
