"""Trainings by name: functions whose keywords are their settings and which return a `Run`.

    run = calipers.train(calipers.recipes.mnist_linf_0p1_ibp(epochs=40))

`RECIPES` has them all, `catalogue` describes them, and `build` makes one from texts, as the command line has them.
"""

from __future__ import annotations

import dataclasses
import inspect
import types
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Union, get_args, get_origin, get_type_hints

from calipers.errors import unknown_name
from calipers.recipes import cifar10, digits, mnist, tutorial
from calipers.training.run import NOTES, Run

Recipe = Callable[..., Run]


def _public(module: types.ModuleType) -> dict[str, Recipe]:
    """The functions that ``module`` itself defines for everyone, in their order."""
    functions = inspect.getmembers_static(module, inspect.isfunction)
    own = {n: f for n, f in functions if f.__module__ == module.__name__ and not n.startswith("_")}
    return {n: own[n] for n in vars(module) if n in own}


RECIPES: dict[str, Recipe] = {
    name: recipe
    for module in (digits, tutorial, mnist, cifar10)
    for name, recipe in _public(module).items()
}


def __getattr__(name: str) -> Recipe:
    if name not in RECIPES:
        raise AttributeError(f"module 'calipers.recipes' has no attribute {name!r}")
    return RECIPES[name]


def build(name: str, settings: Mapping[str, str] | None = None) -> Run:
    """The recipe ``name`` with ``settings`` given as texts: its own keywords, or plain fields of its `Run`.

    Raises:
        ValueError: an unknown recipe or setting, or a text that is no value of its type.
    """
    if name not in RECIPES:
        raise unknown_name("recipe", name, RECIPES)
    recipe = RECIPES[name]
    own, common = _settings(recipe), _fields()
    given = dict(settings or {})
    for key in given:
        if key not in own and key not in common:
            raise unknown_name(f"{name}: setting", key, {**own, **common})
    run = recipe(**{k: value(k, text, own[k]) for k, text in given.items() if k in own})
    changes = {k: value(k, text, common[k]) for k, text in given.items() if k not in own}
    return dataclasses.replace(run, **changes)


def _settings(recipe: Recipe) -> dict[str, Any]:
    """The recipe's keywords and their types."""
    hints = get_type_hints(recipe)
    return {name: hints[name] for name in inspect.signature(recipe).parameters}


def _fields() -> dict[str, Any]:
    """The fields of a `Run` that are plain values and no notes, and their types."""
    hints = get_type_hints(Run)
    plain = {bool, int, float, str, types.NoneType}
    return {
        f.name: hints[f.name]
        for f in dataclasses.fields(Run)
        if f.name not in NOTES and _members(hints[f.name]) <= plain
    }


def _members(hint: Any) -> set[Any]:
    return set(get_args(hint)) if get_origin(hint) in (Union, types.UnionType) else {hint}


WORDS = {"true": True, "yes": True, "false": False, "no": False}


def value(key: str, text: str, hint: Any) -> Any:
    """``text`` as a value of the type ``hint``.

    Raises:
        ValueError: it is none.
    """
    kinds = _members(hint)
    if types.NoneType in kinds and text.lower() == "none":
        return None
    if bool in kinds and text.lower() in WORDS:
        return WORDS[text.lower()]
    for kind in (int, float, str):
        if kind in kinds:
            try:
                return kind(text)
            except ValueError:
                continue
    expected = " or ".join(sorted(k.__name__.replace("NoneType", "none") for k in kinds))
    raise ValueError(f"{key}: cannot read {text!r}; expected {expected}")


class Row(NamedTuple):
    """A recipe in the catalogue."""

    name: str
    about: str
    data: str
    threat: str
    network: str
    epochs: str
    needs: str
    expected: str


def catalogue() -> list[Row]:
    """A row per recipe, made from the recipes."""
    return [_row(name, recipe) for name, recipe in RECIPES.items()]


def markdown() -> str:
    """The catalogue as a table of ``docs/recipes.md``."""
    lines = [Row._fields, ["---"] * len(Row._fields), *catalogue()]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def _row(name: str, recipe: Recipe) -> Row:
    run = recipe()
    minutes = "" if run.minutes is None else f"{run.minutes:g} min on {run.hardware}"
    network = run.describe()["model"].split("(")[0].rpartition(".")[2]
    return Row(
        name,
        (inspect.getdoc(recipe) or "").split("\n")[0],
        run.data,
        run.threat.describe().partition(" in ")[0],
        network,
        str(run.epochs),
        minutes or {"cpu": "a CPU", "gpu": "a GPU"}[run.device],
        run.expected,
    )
