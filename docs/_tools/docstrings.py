"""Docstrings are plain text with backticks; here they become what Sphinx reads.

A formula that stands indented is shown as it is, ``Sound:``, ``Cost:`` and ``Reference:`` become fields, names in backticks
links, and stars, bars and underscores mean nothing.
"""

from __future__ import annotations

import re
from typing import Any

from sphinx.application import Sphinx

FIELD = re.compile(r"(Sound|Cost|Reference|Note): (.*)")
SECTION = re.compile(r"(Args|Raises|Returns|Yields|Attributes):$")
CODE = re.compile(r"``.+?``|`[^`]+`")
NAME = re.compile(r"`[A-Za-z_][\w.]*`")
ITEM = re.compile(r"([-*]|\d+\.) ")


def inline(text: str) -> str:
    """Markup of a line: code stays code, names become links, everything else is text."""
    parts, at = [], 0
    for found in CODE.finditer(text):
        parts.append(re.sub(r"([*|\\]|_(?!\w))", r"\\\1", text[at : found.start()]))
        code = found[0]
        if NAME.fullmatch(code):
            parts.append(f":py:obj:{code}")
        else:
            parts.append(code if code.startswith("``") else f"`{code}`")
        at = found.end()
        if text[at : at + 1].isalnum():
            parts.append("\\ ")
    parts.append(re.sub(r"([*|\\]|_(?!\w))", r"\\\1", text[at:]))
    return "".join(parts)


def blocks(lines: list[str]) -> list[list[str]]:
    """Paragraphs, cut also where a field or a section begins and where an indented formula begins or ends."""
    found: list[list[str]] = [[]]
    section = False
    for line in lines:
        starts = FIELD.match(line) or SECTION.match(line)
        if starts:
            section = bool(SECTION.match(line))
        elif line and not line.startswith(" "):
            section = False
        indented = line.startswith("    ")
        listed = bool(found[-1]) and ITEM.match(found[-1][0].lstrip())
        field = bool(found[-1]) and FIELD.match(found[-1][0])
        bend = (
            bool(found[-1])
            and not (section or listed or field)
            and indented != found[-1][-1].startswith("    ")
        )
        if not line.strip() or starts or bend or (ITEM.match(line) and found[-1]):
            found.append([])
        if line.strip():
            found[-1].append(line)
    return [block for block in found if block]


def converted(lines: list[str]) -> list[str]:
    out: list[str] = []
    for block in blocks(lines):
        if SECTION.match(block[0]):
            out += [block[0], *map(inline, block[1:])]
        elif field := FIELD.match(block[0]):
            rest = [f"    {inline(line.strip())}" for line in block[1:]]
            out += [f":{field[1]}: {inline(field[2])}", *rest]
            continue
        elif block[0].startswith("    "):
            out += ["::", "", *block]
        elif ITEM.match(block[0]):
            out += [
                f"- {inline(ITEM.sub('', block[0], count=1))}",
                *(f"  {inline(line.strip())}" for line in block[1:]),
            ]
        else:
            out += [inline(line.strip()) for line in block]
        out.append("")
    return [*out, ""]


def process(
    _app: Sphinx, _what: str, _name: str, _object: Any, _options: Any, lines: list[str]
) -> None:
    lines[:] = converted(lines)


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("autodoc-process-docstring", process, priority=400)  # before napoleon
    return {"parallel_read_safe": True, "parallel_write_safe": True}
