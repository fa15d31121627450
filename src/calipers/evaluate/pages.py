"""Pages from templates: every value is escaped; the only style and the only script are ours, and the policy says so.

A page opens from a file, loads nothing, and says everything without its script, which sorts and filters tables.
"""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from importlib import resources
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from calipers.evaluate.tables import percent


@cache
def _environment() -> Environment:
    made = Environment(
        loader=PackageLoader("calipers.evaluate", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    made.filters["percent"] = percent
    made.filters["jsnumber"] = lambda value: repr(value).replace("inf", "Infinity")
    return made


def asset(name: str) -> str:
    """A file beside the templates."""
    return (resources.files("calipers.evaluate") / "templates" / name).read_text(encoding="utf-8")


def source_hash(text: str) -> str:
    """What a content security policy calls ``text``."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def page(template: str, **values: Any) -> str:
    """The page, as text."""
    style, script = asset("style.css"), asset("table.js")
    return (
        _environment()
        .get_template(template)
        .render(
            style=Markup(style),  # noqa: S704 - our own file
            script=Markup(script),  # noqa: S704
            style_hash=source_hash(style),
            script_hash=source_hash(script),
            **values,
        )
    )


def live(template: str, **values: Any) -> str:
    """A page of the explorer, which serves style and scripts as files."""
    return _environment().get_template(template).render(**values)
