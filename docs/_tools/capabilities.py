"""The table of capabilities, `docs/coverage.toml`, and where each of its links leads."""

from __future__ import annotations

import functools
import re
import tomllib
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[1]
ROOT = DOCS.parent
ANCHOR = re.compile(r"^\(([\w-]+)\)=", re.MULTILINE)
INTRODUCTION = """The lectures that this project follows ask for {count} things. Each is listed with the page that explains it,
the functions that have it, and the tests that fail if it breaks; a test checks that every link leads somewhere. Of all,
{said}."""


def read() -> tuple[dict[str, str], list[dict[str, Any]]]:
    """Titles of sections by key, and the items, with defaults filled in."""
    table = tomllib.loads((DOCS / "coverage.toml").read_text(encoding="utf-8"))
    items = [
        {"status": "here", "note": "", "anchor": f"c-{i['number']}"} | i for i in table["items"]
    ]
    return {s["key"]: s["title"] for s in table["sections"]}, items


@functools.cache
def anchors() -> dict[str, Path]:
    """Every anchor of a page that is not generated, and its file; an anchor in two pages is an error."""
    found: dict[str, Path] = {}
    for page in sorted(DOCS.rglob("*.md")):
        if "generated" in page.parts:
            continue
        for name in ANCHOR.findall(page.read_text(encoding="utf-8")):
            if name in found:
                raise ValueError(f"{page}: the anchor {name} is in {found[name]}, too")
            found[name] = page
    return found


def page() -> str:
    """The page about all items."""
    sections, items = read()
    counts = {s: sum(i["status"] == s for i in items) for s in ("here", "partly", "missing")}
    said = ", ".join(f"{count} {status}" for status, count in counts.items() if count)
    parts = ["# Coverage", INTRODUCTION.format(count=len(items), said=said)]
    for key, title in sections.items():
        parts.append(f"## {title}")
        parts += [_item(item) for item in items if item["section"] == key]
    return "\n\n".join(parts) + "\n"


def _item(item: dict[str, Any]) -> str:
    anchor = item["anchor"]
    head = f"**{item['number']}** {item['text']}."
    if anchor in anchors():
        head += f" {{ref}}`page <{anchor}>`"
    if item["status"] != "here":
        head += f" *{item['status'].capitalize()}.*"
    if item["note"]:
        head += f" {item['note']}"
    code = " ".join(f"{{py:obj}}`{name}`" for name in item["functions"])
    tests = " ".join(f"`{test.removeprefix('tests/')}`" for test in item["tests"])
    return f"{head}\n: {code}\n: {tests}"
