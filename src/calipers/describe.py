"""Configured functions as texts: what identifies a method in stored runs, and what people read."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any


def describe(method: Callable[..., Any]) -> str:
    """The qualified name of a function with the arguments of its partials; a dataclass that is called, as it prints."""
    if dataclasses.is_dataclass(method) and not isinstance(method, type):
        return repr(method)
    given: tuple[Any, ...] = ()
    keywords: dict[str, Any] = {}
    while isinstance(method, partial):
        given = (*method.args, *given)
        keywords = {**method.keywords, **keywords}
        method = method.func
    shown = [*map(_text, given), *(f"{k}={_text(v)}" for k, v in sorted(keywords.items()))]
    name = getattr(method, "__qualname__", repr(method))
    return f"{method.__module__}.{name}({', '.join(shown)})"


def _text(value: Any) -> str:
    return describe(value) if callable(value) else repr(value)
