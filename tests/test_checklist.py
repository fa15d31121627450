"""The 104 capabilities that the lectures ask for: every link of docs/coverage.toml leads somewhere."""

from __future__ import annotations

import ast
import functools
import importlib
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
TOOLS = ROOT / "docs" / "_tools"


@functools.cache
def tool(name: str) -> Any:
    """A module of the documentation's tools."""
    sys.path.insert(0, str(TOOLS))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(TOOLS))


ITEMS = tool("capabilities").read()[1]
each = pytest.mark.parametrize("item", ITEMS, ids=lambda item: str(item["number"]))


@functools.cache
def names_in(file: str) -> frozenset[str]:
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    return frozenset(node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))


def resolve(name: str) -> Any:
    """The object of a dotted name: the longest module, then attributes."""
    parts = name.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for part in parts[cut:]:
            found = getattr(found, part)
        return found
    raise ModuleNotFoundError(name)


def test_all_numbers_are_there_once_and_in_order() -> None:
    assert [item["number"] for item in ITEMS] == list(range(1, 105))
    sections = tool("capabilities").read()[0]
    assert {item["section"] for item in ITEMS} == set(sections)


@each
def test_functions_import(item: dict[str, Any]) -> None:
    assert item["functions"] or item["status"] == "missing"
    for name in item["functions"]:
        assert resolve(name) is not None


@each
def test_tests_exist(item: dict[str, Any]) -> None:
    assert item["tests"] or item["status"] == "missing"
    for test in item["tests"]:
        file, name = test.split("::")
        assert name in names_in(file), f"{file} has no {name}"


@each
def test_what_is_lacking_is_said(item: dict[str, Any]) -> None:
    assert item["status"] in ("here", "partly", "missing")
    assert item["status"] == "here" or item["note"], "say what is missing"
    assert item["text"]
    assert not item["text"].endswith(".")


@each
def test_a_page_has_its_anchor(item: dict[str, Any]) -> None:
    assert item["anchor"] in tool("capabilities").anchors(), "no page explains it"


def test_a_broken_link_is_found() -> None:
    with pytest.raises(AttributeError):
        resolve("calipers.bounds.no_such_bound")
    with pytest.raises(AttributeError):
        resolve("calipers.no_such_name")
    assert "test_no_such_test" not in names_in("tests/test_bounds.py")
