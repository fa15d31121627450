"""Configured functions as texts: what identifies a method in stored runs, and what people read."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any


def describe(method: Callable[..., Any]) -> str:
    """The qualified name of a function with the keywords of its partials; a dataclass that is called, as it prints."""
    if dataclasses.is_dataclass(method):
        return repr(method)
    keywords: dict[str, Any] = {}
    while isinstance(method, partial):
        keywords = {**method.keywords, **keywords}
        method = method.func
    arguments = ", ".join(
        f"{k}={describe(v) if callable(v) else repr(v)}" for k, v in sorted(keywords.items())
    )
    return f"{method.__module__}.{getattr(method, '__qualname__', repr(method))}({arguments})"
