"""VNN-LIB texts, 1.0 and 2.x, to clauses: what must hold on which box. See docs/certificates.md, section 1."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from decimal import Decimal
from fractions import Fraction
from itertools import product
from typing import Any, NamedTuple

import numpy as np

from calipers_check.errors import Unusable

MAX_DEPTH = 100
MAX_DISJUNCTS = 100_000
MAX_VARIABLES = 10**7
MAX_NUMBERS = 1 << 27
_TOKEN = re.compile(  # a comment, a form of words alone, a parenthesis, an entry of a tensor, a word
    r"\s*+(;[^\n]*+|\((?:[\w.<>=+*-]++\s*+)++\)|[()]|[^\s()\[\];]*+\[[^\]()]*+\]|[^\s()\[\];]++)",
    re.ASCII,
)
_NUMBER = re.compile(
    r"[+-]?(?:\d{1,400}(?:\.\d{0,400})?|\.\d{1,400})(?:[eE][+-]?\d{1,3})?", re.ASCII
)
_FLAT = re.compile(r"([XY])_(0|[1-9]\d{0,7})", re.ASCII)
_ENTRY = re.compile(r"(\w+)\s*\[([\s\d,]*)\]", re.ASCII)
_RELATIONS = {"<=": (1,), "<": (1,), ">=": (-1,), ">": (-1,), "=": (1, -1), "==": (1, -1)}

Number = Fraction | int  # exact; most coefficients are 1
End = Number | Decimal  # exact too, where nothing is computed: comparisons do not round
Form = dict[int, Number]  # coefficients of variables: inputs i, outputs ~j


class Ball(NamedTuple):
    """All x with |x − center| at most eps, in the norm 1 or 2."""

    center: np.ndarray
    eps: float
    p: int


class Clause(NamedTuple):
    """On the box, and in the ball, at least one functional C y + d must be positive; an empty box (``void``) needs
    nothing."""

    lower: np.ndarray
    upper: np.ndarray
    C: np.ndarray
    d: np.ndarray
    void: bool = False
    ball: Ball | None = None


class Linear(NamedTuple):
    """Σ coefficient·variable + constant."""

    terms: Form
    constant: Number


class _Tensor(NamedTuple):
    role: str
    shape: tuple[int, ...]


def clauses(text: str) -> list[Clause]:
    """The clauses of a text.

    Raises:
        Unusable: it is no query about one network with one input and one output.
    """
    query = _Query()
    for form in _forms(text):
        query.read(form)
    return query.clauses()


def _forms(text: str) -> Iterable[list[Any]]:
    """The top-level parenthesised forms as nested lists."""
    stack: list[list[Any]] = []
    at = 0
    for match in _TOKEN.finditer(text):
        start, end = match.span()
        if start > at:
            raise Unusable(f"property: cannot read {text[at:start].strip()[:40]!r}")
        at, word = end, match[1]
        if word[0] == ";":
            continue
        if word == "(":
            stack.append([])
            if len(stack) > MAX_DEPTH:
                raise Unusable(f"property: nested more than {MAX_DEPTH} deep")
        elif word[-1] == ")":
            if word == ")" and not stack:
                raise Unusable("property: a closing parenthesis too many")
            form = stack.pop() if word == ")" else word[1:-1].split()
            if stack:
                stack[-1].append(form)
            else:
                yield form
        elif not stack:
            raise Unusable(f"property: {word[:40]!r} outside of parentheses")
        else:
            stack[-1].append(word)
    if stack or text[at:].strip():
        raise Unusable("property: the text ends inside a form")


class _Query:
    """Declarations and asserted relations."""

    def __init__(self) -> None:
        self.tensors: dict[str, _Tensor] = {}
        self.flat: dict[str, int] = {}  # X_i: i, Y_j: ~j
        self.plain: list[Any] = []
        self.choices: list[list[list[Any]]] = []

    def read(self, form: list[Any]) -> None:
        match form:
            case ["vnnlib-version", *_]:
                pass
            case ["declare-const" | "declare-fun", str(name), *_]:
                match = _FLAT.fullmatch(name)
                if match is None or self.tensors:
                    raise Unusable(f"property: variable {name[:40]!r} is neither X_i nor Y_j")
                self.flat[name] = int(match[2]) if match[1] == "X" else ~int(match[2])
            case ["declare-network", str(), *declarations]:
                if self.tensors or self.flat:
                    raise Unusable("property: more than one network")
                for declaration in declarations:
                    self.declare(declaration)
            case ["assert", formula]:
                self.split(formula)
            case _:
                raise Unusable(f"property: cannot read the form {str(form)[:60]}")

    def declare(self, declaration: Any) -> None:
        match declaration:
            case ["declare-input" | "declare-output" as role, str(name), str(), str(shape)]:
                sizes = _places(shape.strip("[] "))
                if any(t.role == role for t in self.tensors.values()) or name in self.tensors:
                    raise Unusable("property: more than one input or output")
                self.tensors[name] = _Tensor(role, sizes)
            case _:
                raise Unusable(f"property: cannot read {str(declaration)[:60]}")

    def split(self, formula: Any) -> None:
        """Relations that always hold, and alternatives, in the order of the text."""
        match formula:
            case ["and", *parts]:
                for part in parts:
                    self.split(part)
            case ["or", *_] | ["!=", _, _]:
                self.choices.append(_disjuncts(formula))
            case _:
                self.plain.append(formula)

    # -- numbers and variables --------------------------------------------------------------------------------------

    def linear(self, term: Any) -> Linear:
        match term:
            case str():
                if _NUMBER.fullmatch(term):
                    return Linear({}, Fraction(term))
                return Linear({self.variable(term): 1}, 0)
            case ["+", first, *rest]:
                total = self.linear(first)
                for other in rest:
                    total = _plus(total, self.linear(other))
                return total
            case ["-", only]:
                return _times(self.linear(only), -1)
            case ["-", first, *rest]:
                total = self.linear(first)
                for other in rest:
                    total = _minus(total, self.linear(other))
                return total
            case ["*", first, *rest]:
                total = self.linear(first)
                for other in map(self.linear, rest):
                    if total.terms and other.terms:
                        raise Unusable("property: a product of variables")
                    factor, form = (total, other) if other.terms else (other, total)
                    total = _times(form, factor.constant)
                return total
        raise Unusable(f"property: cannot read the term {str(term)[:60]}")

    def variable(self, name: str) -> int:
        if name in self.flat:
            return self.flat[name]
        if (match := _ENTRY.fullmatch(name)) and match[1] in self.tensors:
            tensor = self.tensors[match[1]]
            place = _places(match[2])
            if len(place) == len(tensor.shape) and all(
                i < n for i, n in zip(place, tensor.shape, strict=True)
            ):
                index = 0
                for i, n in zip(place, tensor.shape, strict=True):
                    index = index * n + i
                return index if tensor.role == "declare-input" else ~index
        elif name in self.tensors and not self.tensors[name].shape:
            return 0 if self.tensors[name].role == "declare-input" else ~0
        raise Unusable(f"property: {name[:40]!r} is not a number nor a declared variable")

    def count(self, role: str, letter: str) -> int:
        sizes = [math.prod(t.shape) for t in self.tensors.values() if t.role == role]
        numbers = [v if letter == "X" else ~v for v in self.flat.values()]
        found = sizes[0] if sizes else max(numbers, default=-1) + 1
        if not 0 < found <= MAX_VARIABLES:
            raise Unusable(f"property: {found} variables {letter}")
        return found

    # -- clauses ----------------------------------------------------------------------------------------------------

    def clauses(self) -> list[Clause]:
        """One clause for each disjunct."""
        inputs, outputs = self.count("declare-input", "X"), self.count("declare-output", "Y")
        count = math.prod(map(len, self.choices))
        if count > MAX_DISJUNCTS or count * inputs > MAX_NUMBERS:
            raise Unusable(f"property: {count} disjuncts of {inputs} inputs are too many")
        base = self.part(self.plain, _Part())
        base_void = base.false or any(
            base.low[i] > base.high[i] for i in base.low if i in base.high
        )
        lower, upper = np.full(inputs, -np.inf), np.full(inputs, np.inf)
        _fill(lower, upper, base)
        found = []
        for picked in product(*self.choices):
            part = self.part([r for relations in picked for r in relations], base)
            l, u = lower, upper
            if part.low or part.high:
                l, u = lower.copy(), upper.copy()
                _fill(l, u, part)
            if not (np.isfinite(l).all() and np.isfinite(u).all()):
                i = int(np.flatnonzero(~np.isfinite(l) | ~np.isfinite(u))[0])
                raise Unusable(f"property: input {i} has no finite bound on one side")
            C = np.zeros((len(part.rows), outputs))
            for row, form in zip(C, part.rows, strict=True):
                for variable, coefficient in form.terms.items():
                    row[~variable] = float(coefficient)
            d = np.array([_below(form.constant) for form in part.rows], dtype=np.float64)
            void = base_void or part.false or part.contradicts(base)
            found.append(Clause(l, u, C, d, void))
        return found

    def part(self, relations: Sequence[Any], base: _Part) -> _Part:
        """A conjunction; what ``base`` bounds is bounded at least as well."""
        part = _Part(rows=list(base.rows))
        for relation in relations:
            match relation:
                case ["<=" | ">=" as op, str(name), str(number)] if self.flat.get(
                    name, -1
                ) >= 0 and _NUMBER.fullmatch(number):  # most of a text
                    part.bound(self.flat[name], Decimal(number), op == "<=", base)
                case [str(op), left, right] if op in _RELATIONS:
                    form = _minus(self.linear(left), self.linear(right))
                    for sign in _RELATIONS[op]:
                        part.add(_times(form, sign), op in ("<", ">"), base)
                case _:
                    raise Unusable(f"property: cannot read the relation {str(relation)[:60]}")
        return part


@dataclass
class _Part:
    """A conjunction: exact bounds of single inputs, functionals that are <= 0, and whether it is plainly false."""

    low: dict[int, End] = field(default_factory=dict)
    high: dict[int, End] = field(default_factory=dict)
    rows: list[Linear] = field(default_factory=list)
    false: bool = False

    def add(self, form: Linear, strict: bool, base: _Part) -> None:
        """form <= 0, or < 0 where ``strict``."""
        terms = {v: c for v, c in form.terms.items() if c}
        if not terms:
            self.false |= form.constant > 0 or (strict and form.constant == 0)
        elif max(terms) < 0:
            self.rows.append(_representable(Linear(terms, form.constant)))
        elif len(terms) == 1:
            ((i, c),) = terms.items()
            end = -form.constant * c if c in (1, -1) else Fraction(-form.constant) / c
            self.bound(i, end, c > 0, base)
        # what relates several inputs, or inputs and outputs, is left out: that makes more points unsafe

    def bound(self, i: int, end: End, above: bool, base: _Part) -> None:
        """Input i is at most ``end`` (``above``), or at least."""
        ends, others = (self.high, base.high) if above else (self.low, base.low)
        old = ends.get(i, others.get(i))
        if old is None or (end < old) == above:
            ends[i] = end
        elif i not in ends:
            ends[i] = old

    def contradicts(self, base: _Part) -> bool:
        """Whether its bounds, or its and those of ``base``, leave nothing."""
        for i in self.low.keys() | self.high.keys():
            low, high = self.low.get(i, base.low.get(i)), self.high.get(i, base.high.get(i))
            if low is not None and high is not None and low > high:
                return True
        return False


def _places(text: str) -> tuple[int, ...]:
    parts = [v.strip() for v in text.split(",")] if text.strip() else []
    if not all(v.isdecimal() and len(v) < 10 for v in parts):
        raise Unusable(f"property: [{text[:40]}] is no list of numbers")
    return tuple(map(int, parts))


def _fill(lower: np.ndarray, upper: np.ndarray, part: _Part) -> None:
    """Ends rounded outward."""
    for i, value in part.low.items():
        lower[i] = _below(value)
    for i, value in part.high.items():
        upper[i] = _above(value)


def _below(value: End) -> float:
    """The largest float64 that is not above."""
    near = _nearest(value)
    return near if near <= value else math.nextafter(near, -math.inf)


def _above(value: End) -> float:
    """The smallest float64 that is not below."""
    near = _nearest(value)
    return near if near >= value else math.nextafter(near, math.inf)


def _nearest(value: End) -> float:
    with suppress(OverflowError):
        if math.isfinite(near := float(value)):
            return near
    raise Unusable("property: a number exceeds the largest float64")


def _representable(form: Linear) -> Linear:
    """With coefficients that are float64 numbers: those of the text, or all multiplied to integers."""
    if any(Fraction(_below(c)) != c for c in form.terms.values()):
        form = _times(form, Fraction(math.lcm(*(c.denominator for c in form.terms.values()))))
        if any(Fraction(_below(c)) != c for c in form.terms.values()):
            raise Unusable("property: coefficients have too many digits for float64")
    return form


def _plus(a: Linear, b: Linear) -> Linear:
    terms = dict(a.terms)
    for variable, coefficient in b.terms.items():
        terms[variable] = terms.get(variable, 0) + coefficient
    return Linear(terms, a.constant + b.constant)


def _minus(a: Linear, b: Linear) -> Linear:
    terms = dict(a.terms)
    for variable, coefficient in b.terms.items():
        terms[variable] = terms.get(variable, 0) - coefficient
    return Linear(terms, a.constant - b.constant)


def _times(a: Linear, factor: Number) -> Linear:
    if factor == 1:
        return a
    return Linear({v: c * factor for v, c in a.terms.items()}, a.constant * factor)


def _disjuncts(formula: Any) -> list[list[Any]]:
    """The disjunctive form, as lists of relations."""
    match formula:
        case ["or", *parts] if parts:
            found = [d for part in parts for d in _disjuncts(part)]
        case ["and", *parts] if parts:
            sides = [_disjuncts(part) for part in parts]
            if math.prod(map(len, sides)) > MAX_DISJUNCTS:
                raise Unusable(f"property: more than {MAX_DISJUNCTS} disjuncts")
            found = [[r for relations in picked for r in relations] for picked in product(*sides)]
        case ["!=", a, b]:
            found = [[["<", a, b]], [[">", a, b]]]
        case _:
            found = [[formula]]
    if len(found) > MAX_DISJUNCTS:
        raise Unusable(f"property: more than {MAX_DISJUNCTS} disjuncts")
    return found
