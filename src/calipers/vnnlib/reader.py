"""VNN-LIB text, 1.0 and 2.x, to declarations and the exact Boolean tree: one regular expression, one stack.

What 2.0's grammar forbids but whose meaning is plain is read as well: exponents, integer literals for real tensors,
``=`` for ``==``, spaces after a parenthesis.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import NamedTuple

import torch

from calipers.errors import CaptureError, SpecError
from calipers.graph.onnx_file import read_bytes
from calipers.vnnlib.tree import ARITHMETIC, JUNCTIONS, RELATIONS, Node, Term, variables

MAX_BYTES = 128 * 2**20  # its tree takes some 50 times as much memory
MAX_DEPTH = 100
MAX_VARIABLES = 10**8
MAX_DIGITS, MAX_EXPONENT = 1100, 400  # the longest exact float64 has 1,075 digits
_DTYPES = {
    "real": None,
    "float16": torch.float16,
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
}

# Each alternative is one token with the blanks behind it; its last group names it. Frequent forms are one token each.
# Repetitions are possessive, so that no text makes matching slow.
_NAME = r"[A-Za-z_]\w*+(?:\s*+\[[^\]()]*+\])?(?=[\s()])"
_NUMBER = r"[+-]?(?:[0-9]++(?:\.[0-9]*+)?|\.[0-9]++)(?:[eE][+-]?[0-9]++)?(?=[\s()])"
_TOKEN = re.compile(
    rf"""(?:
      \(\s*+(?P<whole>assert\s*+\(\s*+)?
      (?P<relation><=|>=|==|!=|<|>|=)\s*+(?P<left>{_NAME}|{_NUMBER})\s++(?P<right>{_NAME}|{_NUMBER})
      \s*+\)(?(whole)\s*+\))
    | (?P<close>\))
    | \(\s*+declare-(?:const|fun)\s++(?P<constant>[^\s()]++)\s++(?:\(\s*+\)\s*+)?(?P<sort>[^\s()]++)\s*+\)
    | \(\s*+declare-(?P<role>input|output)\s++(?P<tensor>\w++)\s++(?P<dtype>\w++)\s*+(?P<shape>\[[^\]()]*+\])\s*+\)
    | \(\s*+declare-network\s++(?P<network>\w++)
    | \(\s*+vnnlib-version\s*+<\s*+(?P<major>[0-9]++)\.(?P<minor>[0-9]++)\s*+>\s*+\)
    | \(\s*+(?P<open>[^\s()]*+)
    | (?P<literal>{_NUMBER})
    | (?P<name>{_NAME})
    | (?P<odd>[^\s()]++)
    )\s*+""",
    re.VERBOSE | re.ASCII,
)
_CONSTANT = re.compile(r"([XY])_(0|[1-9][0-9]{0,8})", re.ASCII)
_REFUSED = {
    "declare-hidden": "hidden nodes are not supported; make the node an output of the network",
    "equal-to": "queries about several networks are not supported; merge them into one network",
    "isomorphic-to": "queries about several networks are not supported; merge them into one network",
    "declare-input": "expected (declare-input NAME TYPE [1,2]); inputs with initial values are not supported",
    "declare-output": "expected (declare-output NAME TYPE [1,2])",
    "declare-const": "expected (declare-const X_0 Real)",
    "not": "not part of VNN-LIB; negate the relation instead",
    "/": "not part of VNN-LIB; multiply by a constant instead",
}


class Form(NamedTuple):
    """What a parenthesis may hold."""

    of: str
    least: int
    most: float


_FORMS = {
    "assert": Form("Boolean", 1, 1),
    **dict.fromkeys(JUNCTIONS, Form("Boolean", 1, math.inf)),
    **dict.fromkeys(RELATIONS, Form("numeric", 2, 2)),
    **dict.fromkeys(ARITHMETIC, Form("numeric", 1, math.inf)),
}


class Variable(NamedTuple):
    """A declared tensor; for VNN-LIB 1.0 all X_i, or all Y_j, as one.

    Args:
        dtype: None for real.
        flat: entries are written X_3 (1.0) instead of X[0,3].
        at: its place in the text.
    """

    name: str
    dtype: torch.dtype | None
    shape: tuple[int, ...]
    flat: bool
    at: int

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def element(self, index: int) -> str:
        """The name of an entry as the file writes it."""
        if self.flat:
            return f"{self.name}_{index}"
        steps = [math.prod(self.shape[i + 1 :]) for i in range(len(self.shape))]
        places = [index // s % n for s, n in zip(steps, self.shape, strict=True)]
        return f"{self.name}[{','.join(map(str, places))}]" if places else self.name


@dataclass(frozen=True)
class Source:
    """A file's text without comments, for messages."""

    path: str
    text: str

    def error(self, at: int, what: str, kind: type[SpecError] = SpecError) -> SpecError:
        """What is wrong at a place in the text, with file and line."""
        return kind(f"{self.path}, line {self.text.count(chr(10), 0, at) + 1}: {what}")


class Text(NamedTuple):
    """A query as written."""

    source: Source
    version: tuple[int, int]
    input: Variable
    output: Variable
    tree: Node
    network: str | None


def read(path: str | Path, *, max_bytes: int = MAX_BYTES) -> Text:
    """The query in a file, plain or gzip's.

    Raises:
        SpecError: the file is missing, damaged, too large, or no VNN-LIB query; with file, line and remedy.
    """
    path = Path(path)
    if not path.is_file():
        raise SpecError(f"{path}: no such file")
    try:
        data = read_bytes(path, max_bytes)
    except CaptureError as error:
        raise SpecError(str(error)) from None
    return parse(data.decode("utf-8", errors="replace"), str(path))


def parse(text: str, path: str = "query") -> Text:
    """The query in a text.

    Raises:
        SpecError: no VNN-LIB query; ``path``, line and remedy are named.
    """
    state = _State(Source(path, re.sub(r";[^\n\r]*+", "", text)))
    for m in _TOKEN.finditer(state.source.text):
        kind = m.lastgroup
        if kind == "right":
            state.relation(m)
        else:
            _HANDLERS[str(kind)](state, m)
    return state.finish()


class _Frame(NamedTuple):
    op: str
    args: list[Term]
    at: int


@dataclass
class _State:
    """An open parse: what is declared, what is asserted, and the parentheses that are open."""

    source: Source
    version: tuple[int, int] | None = None
    names: dict[str, int] = field(default_factory=dict)  # entry -> its leaf
    tensors: dict[str, Variable] = field(default_factory=dict)  # role -> declaration, of 2.x
    first: dict[str, int] = field(default_factory=dict)  # "X", "Y" -> place, of 1.0
    network: str | None = None
    asserted: list[Term] = field(default_factory=list)
    stack: list[_Frame] = field(default_factory=list)

    # -- tokens ----------------------------------------------------------------------------------------

    def relation(self, m: re.Match[str]) -> None:
        """``(<= X_0 0.5)``, perhaps with its assert around it: nine tenths of any file."""
        whole, op, left, right = m.group("whole", "relation", "left", "right")
        at = m.start("relation")
        a, b = self.names.get(left), self.names.get(right)
        node = Node(
            "=" if op == "==" else op,
            (
                self.leaf(left, at) if a is None else a,
                self.leaf(right, at) if b is None else b,
            ),
            at,
        )
        self.check_place("assert" if whole else op, at)
        (self.asserted if whole else self.stack[-1].args).append(node)

    def opened(self, m: re.Match[str]) -> None:
        op, at = m["open"], m.start()
        op = "=" if op == "==" else op
        if op not in _FORMS:
            why = _REFUSED.get(op, f"expected one of {' '.join(_FORMS)}")
            raise self.source.error(at, f"({op[:40]} ...): {why}")
        if len(self.stack) >= MAX_DEPTH:
            raise self.source.error(
                at, f"nested more than {MAX_DEPTH} deep; flatten the and, or and sums"
            )
        self.check_place(op, at)
        self.stack.append(_Frame(op, [], at))

    def check_place(self, op: str, at: int) -> None:
        """An assert stands alone, everything else in an assert: nothing is dropped in silence."""
        if op == "assert" and self.stack:
            raise self.source.error(at, "an assert inside another form; close the one before it")
        if op != "assert" and (not self.stack or self.stack[-1].op == "declare-network"):
            raise self.source.error(
                at, f"({op} ...) outside of any assert; write (assert ({op} ...))"
            )

    def closed(self, m: re.Match[str]) -> None:
        if not self.stack:
            raise self.source.error(m.start(), "a closing parenthesis too many")
        op, args, at = self.stack.pop()
        if op == "declare-network":
            return
        form = _FORMS[op]
        if not form.least <= len(args) <= form.most:
            raise self.source.error(
                at,
                f"({op} ...) has {len(args)} arguments, not "
                + (f"{form.least}" if form.least == form.most else f"at least {form.least}"),
            )
        boolean = form.of == "Boolean"
        for a in args:
            if boolean != (isinstance(a, Node) and a.op not in ARITHMETIC):
                raise self.source.error(at, f"({op} ...) takes {form.of} arguments only")
        if op == "*" and sum(next(variables(a), None) is not None for a in args) > 1:
            raise self.source.error(
                at, "a product of variables is not linear; only constant factors are supported"
            )
        if op == "assert":
            self.asserted.append(args[0])
        else:
            self.stack[-1].args.append(Node(op, tuple(args), at))

    def bare(self, m: re.Match[str]) -> None:
        if not self.stack or self.stack[-1].op not in _FORMS:
            raise self.source.error(m.start(), f"unexpected {m.group().strip()[:40]!r}")
        self.stack[-1].args.append(self.leaf(m.group().strip(), m.start()))

    def odd(self, m: re.Match[str]) -> None:
        raise self.source.error(
            m.start(), f"cannot read {m['odd'][:40]!r}; expected a decimal number or a variable"
        )

    def leaf(self, token: str, at: int) -> int | Decimal:
        """The variable or the exact number that a token denotes."""
        if token[0] not in "+-.0123456789":
            known = self.names.get(token)
            if known is None:
                known = self.names[token] = self.entry(token, at)
            return known
        _, _, exponent = token.lower().partition("e")
        if len(token) > MAX_DIGITS or abs(int(exponent or 0)) > MAX_EXPONENT:
            raise self.source.error(at, f"the number {token[:30]}... has too many digits")
        if math.isinf(float(token)):
            raise self.source.error(at, f"{token[:30]} exceeds the largest float64")
        return Decimal(token)

    # -- declarations ----------------------------------------------------------------------------------

    def constant(self, m: re.Match[str]) -> None:
        """``(declare-const X_0 Real)``."""
        name, at = m["constant"], m.start()
        known = _CONSTANT.fullmatch(name)
        if not known or m["sort"] != "Real" or self.stack or self.network:
            raise self.source.error(
                at,
                f"cannot declare {name[:40]!r} here: VNN-LIB 1.0 has X_0, X_1, ... and Y_0, Y_1, ..., all Real",
            )
        if name in self.names:
            raise self.source.error(at, f"{name} is declared twice; delete one declaration")
        index = int(known[2])
        self.names[name] = index if known[1] == "X" else ~index
        self.first.setdefault(known[1], at)

    def opens_network(self, m: re.Match[str]) -> None:
        if self.network is not None:
            raise self.source.error(m.start(), f"network {m['network']!r}: {_REFUSED['equal-to']}")
        if self.stack or self.first:
            raise self.source.error(
                m.start(), "declare-network must stand alone, in a file without declare-const"
            )
        self.network = m["network"]
        self.stack.append(_Frame("declare-network", [], m.start()))

    def tensor(self, m: re.Match[str]) -> None:
        """``(declare-input X float32 [1,2])``."""
        role, name, at = m["role"], m["tensor"], m.start()
        if not self.stack or self.stack[-1].op != "declare-network":
            raise self.source.error(at, f"declare-{role} outside of declare-network")
        if role in self.tensors:
            raise self.source.error(
                at,
                f"{role} {name!r} is a second one; networks with one input and one output are supported",
            )
        if name in {v.name for v in self.tensors.values()}:
            raise self.source.error(at, f"{name} is declared twice; give each tensor its own name")
        kind = m["dtype"].lower()
        if kind not in _DTYPES:
            raise self.source.error(
                at, f"{role} {name!r} is {m['dtype']}; supported are {', '.join(_DTYPES)}"
            )
        shape = self.indices(m["shape"], at)
        if 0 in shape or math.prod(shape) > MAX_VARIABLES:
            raise self.source.error(
                at, f"shape {m['shape'][:60]} must have 1 to {MAX_VARIABLES} entries"
            )
        self.tensors[role] = Variable(name, _DTYPES[kind], shape, False, at)

    def indices(self, brackets: str, at: int) -> tuple[int, ...]:
        inside = brackets.strip()[1:-1].strip()
        parts = [p.strip() for p in inside.split(",")] if inside else []
        if not all(re.fullmatch(r"[0-9]{1,9}", p, re.ASCII) for p in parts):
            raise self.source.error(
                at, f"{brackets[:60]} must hold integers, not negative and below 10^9"
            )
        return tuple(map(int, parts))

    def entry(self, token: str, at: int) -> int:
        """The leaf of ``X[0,3]``."""
        name, bracket, inside = token.partition("[")
        found = next((r for r, v in self.tensors.items() if v.name == name.strip()), None)
        if found is None:
            raise self.source.error(at, f"{name.strip()[:40]!r} is not declared; declare it above")
        tensor = self.tensors[found]
        places = self.indices(bracket + inside, at) if bracket else ()
        if len(places) != len(tensor.shape) or any(
            p >= n for p, n in zip(places, tensor.shape, strict=True)
        ):
            raise self.source.error(
                at,
                f"{token[:60]} is no entry of {tensor.name}, whose shape is {list(tensor.shape)}",
            )
        index = 0
        for place, n in zip(places, tensor.shape, strict=True):
            index = index * n + place
        return index if found == "input" else ~index

    def versioned(self, m: re.Match[str]) -> None:
        version = int(m["major"][:9]), int(m["minor"][:9])
        if self.version or self.names or self.network or version[0] not in (1, 2):
            raise self.source.error(
                m.start(),
                f"version {version[0]}.{version[1]}: the first line may say 1.0 or 2.x, once",
            )
        self.version = version

    # -- the end ---------------------------------------------------------------------------------------

    def finish(self) -> Text:
        source, end = self.source, len(self.source.text)
        if self.stack:
            op, _, at = self.stack[-1]
            raise source.error(at, f"({op} ... is never closed; is the file truncated?")
        tensors = self.tensors if self.network is not None else self.constants()
        for role in ("input", "output"):
            if role not in tensors:
                raise source.error(end, f"declares no {role}; is this a VNN-LIB file?")
        if not self.asserted:
            raise source.error(end, "asserts nothing; is the file truncated?")
        version = self.version or ((2, 0) if self.network is not None else (1, 0))
        tree = Node("and", tuple(self.asserted), 0)
        return Text(source, version, tensors["input"], tensors["output"], tree, self.network)

    def constants(self) -> dict[str, Variable]:
        """All X_i as one tensor, and all Y_j."""
        made = {}
        for role, letter in (("input", "X"), ("output", "Y")):
            if letter not in self.first:
                continue
            found = sorted(int(n[2:]) for n in self.names if n[0] == letter)
            gap = next((i for i, n in enumerate(found) if i != n), None)
            if gap is not None:
                raise self.source.error(
                    self.first[letter],
                    f"{letter}_{gap} is not declared, but {letter}_{found[-1]} is",
                )
            made[role] = Variable(letter, None, (len(found),), True, self.first[letter])
        return made


_HANDLERS: dict[str, Callable[[_State, re.Match[str]], None]] = {
    "close": _State.closed,
    "sort": _State.constant,
    "network": _State.opens_network,
    "shape": _State.tensor,
    "minor": _State.versioned,
    "open": _State.opened,
    "literal": _State.bare,
    "name": _State.bare,
    "odd": _State.odd,
}
