"""VNN-LIB 2.0 against the standard's own parser (``pip install vnnlib``), where it is installed: the same truth at
every point, by evaluating its syntax tree literally."""

from __future__ import annotations

import re
from decimal import Decimal
from fractions import Fraction
from functools import reduce
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from calipers.errors import SpecError
from calipers.vnnlib import loads
from test_vnnlib import NUMBERS, TRUTH, K, N, points, properties, to_second

peer = pytest.importorskip("vnnlib", reason="the standard's parser is not installed")
RELATIONS = {
    "LessEqual": "<=", "GreaterEqual": ">=", "LessThan": "<", "GreaterThan": ">", "Equal": "==", "NotEqual": "!=",
}  # fmt: skip
STRICT = ("0.5", "-0.25", "1.0", "0.1", "-2.0", "0.0", "0.7000000000000001")


def number(node: Any, x: list[Fraction], y: list[Fraction]) -> Fraction:
    match type(node).__name__:
        case "Var":
            return (x if node.kind == peer.SymbolKind.Input else y)[node.indices[-1]]
        case "Float" | "Int":
            return Fraction(node.lexeme)
        case "Negate":
            return -number(node.expr, x, y)
        case "Minus":
            return number(node.head, x, y) - sum(number(a, x, y) for a in node.rest)
        case "Plus" | "Multiply" as kind:
            operation = NUMBERS["+" if kind == "Plus" else "*"]
            return reduce(operation, (number(a, x, y) for a in node.args))
    raise AssertionError(type(node))


def true(node: Any, x: list[Fraction], y: list[Fraction]) -> bool:
    kind = type(node).__name__
    if kind in ("And", "Or"):
        return (all if kind == "And" else any)(true(a, x, y) for a in node.args)
    return TRUTH[RELATIONS[kind]](number(node.lhs, x, y), number(node.rhs, x, y))


def strictly(text: str) -> str:
    """The text within 2.0's own grammar: real literals without exponent or plus sign, ``==``."""
    head, body = to_second(text).replace("float32", "real").split("\n\n", 1)
    body = re.sub(r"\(= ", "(== ", body)

    def plain(m: re.Match[str]) -> str:
        digits = format(Decimal(m[0]), "f")
        return digits if "." in digits else f"{digits}.0"

    return head + "\n" + re.sub(r"(?<=[\s(])[-+]?[0-9.]+(?:[eE][-+]?[0-9]+)?(?=[\s)])", plain, body)


@given(properties(STRICT), st.lists(points, min_size=6, max_size=6))
def test_the_same_truth_everywhere(text: str, samples: list[list[float]]) -> None:
    text = strictly(text)
    theirs = peer.parse_query_string(text)
    try:
        ours = loads(text)
    except SpecError as error:
        assert "no input is left" in str(error)  # noqa: PT017
        ours = None
    for sample in samples:
        values = [Fraction(v) for v in sample]
        expected = all(true(a.expr, values[:N], values[N : N + K]) for a in theirs.assertions)
        assert (ours is not None and ours.holds(sample[:N], sample[N:])) == expected
