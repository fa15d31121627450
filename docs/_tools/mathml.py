"""Formulas as MathML, which browsers draw themselves: no script and no font is fetched."""

from __future__ import annotations

import re
from typing import Any

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.application import Sphinx
from sphinx.util import logging

log = logging.getLogger(__name__)
LEFT_OVER = re.compile(r"\\[A-Za-z]+")
BELOW = re.compile(r"(\\(?:max|min|sup|inf|lim)|\\operatorname\*\{[^}]*\})\s*_")
ALIGNED = re.compile(r"\\begin\{(align|gather|equation|multline)\*?\}(.*)\\end\{\1\*?\}", re.DOTALL)


def mathml(node: nodes.Element, display: str) -> str:
    """The formula of a node; a command that the converter does not know is a warning, hence an error."""
    tex = ALIGNED.sub(r"\\begin{aligned}\2\\end{aligned}", node.astext().strip())
    if display == "block" and r"\\" in tex and r"\begin" not in tex:
        tex = rf"\begin{{aligned}}{tex}\end{{aligned}}"
    if display == "block":
        tex = BELOW.sub(r"\1\\limits_", tex)
    try:
        drawn = convert(tex, display=display)
    except Exception as error:
        log.warning("formula %r: %r", tex, error, location=node)
        return f"<code>{tex}</code>"
    if unknown := LEFT_OVER.findall(drawn):
        log.warning("formula %r: unknown %s", tex, ", ".join(unknown), location=node)
    return drawn


def inline(self: Any, node: nodes.math) -> None:
    self.body.append(mathml(node, "inline"))
    raise nodes.SkipNode


def block(self: Any, node: nodes.math_block) -> None:
    number = f'<span class="eqno">({node["number"]})</span>' if node.get("number") else ""
    anchor = f' id="{node["ids"][0]}"' if node["ids"] else ""
    self.body.append(f'<div class="math"{anchor}>{number}{mathml(node, "block")}</div>\n')
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_html_math_renderer(
        "mathml", inline_renderers=(inline, None), block_renderers=(block, None)
    )
    return {"parallel_read_safe": True, "parallel_write_safe": True}
