"""VNN-LIB: what is read means what the text says, by an evaluator that shares nothing with the reader."""

from __future__ import annotations

import gzip
import math
import operator
import re
import time
from collections.abc import Callable, Mapping
from fractions import Fraction
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from calipers.errors import NoInputs, RegionError, SpecError
from calipers.spec import Spec
from calipers.vnnlib import (
    Query,
    format_assignment,
    instances,
    load,
    loads,
    parse_assignment,
    read_assignment,
)

SUITES = Path(__file__).resolve().parents[2] / "shared" / "data" / "vnncomp"
FILES = sorted(SUITES.glob("*/vnnlib/*.vnnlib*"))
INF = math.inf

needs_files = pytest.mark.skipif(
    not FILES, reason="no VNN-COMP files beside the checkout (shared/data/vnncomp)"
)


# -- the oracle: the text as nested lists, evaluated literally ----------------------------------------------


def nested(text: str) -> list[Any]:
    """S-expressions as nested lists of words."""
    words = re.findall(r"[()]|[^\s()]+", re.sub(r";.*", "", text))
    stack: list[list[Any]] = [[]]
    for word in words:
        if word == "(":
            stack.append([])
        elif word == ")":
            done = stack.pop()
            stack[-1].append(done)
        else:
            stack[-1].append(word)
    return stack[0]


TRUTH: Mapping[str, Callable[..., bool]] = {
    "<=": operator.le, ">=": operator.ge, "<": operator.lt, ">": operator.gt,
    "=": operator.eq, "==": operator.eq, "!=": operator.ne,
}  # fmt: skip
NUMBERS = {"+": operator.add, "*": operator.mul, "-": operator.sub}


def number(form: Any, env: Mapping[str, Fraction]) -> Fraction:
    if isinstance(form, str):
        return env[form] if form in env else Fraction(form)
    terms = [number(f, env) for f in form[1:]]
    return -terms[0] if form[0] == "-" and len(terms) == 1 else reduce(NUMBERS[form[0]], terms)


def true(form: Any, env: Mapping[str, Fraction]) -> bool:
    if form[0] == "and":
        return all(true(f, env) for f in form[1:])
    if form[0] == "or":
        return any(true(f, env) for f in form[1:])
    return TRUTH[form[0]](number(form[1], env), number(form[2], env))


def naive(forms: list[Any], x: list[float], y: list[float]) -> bool:
    env = {f"X_{i}": Fraction(v) for i, v in enumerate(x)}
    env |= {f"Y_{i}": Fraction(v) for i, v in enumerate(y)}
    return all(true(f[1], env) for f in forms if f[0] == "assert")


def rationally(spec: Spec, y: torch.Tensor) -> torch.Tensor:
    """`Spec.violated` without rounding: for all rows at once, by the definition."""
    found = []
    for C, d in zip(spec.C.tolist(), spec.d.tolist(), strict=True):
        values = [
            sum(Fraction(c) * Fraction(v) for c, v in zip(row, y[0].tolist(), strict=True))
            + Fraction(offset)
            for row, offset in zip(C, d, strict=True)
        ]
        safe = [v > 0 if s else v >= 0 for v, s in zip(values, spec.strict.tolist(), strict=True)]
        clauses = spec.clause.tolist()
        found.append(
            any(not any(s for s, k in zip(safe, clauses, strict=True) if k == c) for c in clauses)
        )
    return torch.tensor(found)


def lowered(query: Query, x: torch.Tensor, y: torch.Tensor, *, exact: bool = False) -> bool:
    """Whether some box has ``x`` and its specification is violated by ``y``."""
    for region, spec, _ in query.cases:
        points = x.expand(len(region), *x.shape).reshape(region.center.shape)
        broken = rationally(spec, y) if exact else spec.violated(y.expand(len(region), -1))
        if bool((region.contains(points) & broken).any()):
            return True
    return False


# -- generated properties ------------------------------------------------------------------------------------

N, K = 2, 3
DYADIC = ("0", "1", "-1", "0.5", "-0.25", "1.5", "2.0", "-2", "5e-1", "+.75", "-0.0", "2.5E-1")
DECIMAL = (*DYADIC, "0.1", "-0.3", "1e-3", "0.7000000000000001", "1.1")
GRID = sorted(
    {v for c in DECIMAL for near in [float(c)]
     for v in (near, math.nextafter(near, INF), math.nextafter(near, -INF))}
)  # fmt: skip
ops = st.sampled_from(sorted(TRUTH))
lines = st.sampled_from([" ", "\n  ", " ; (assert\n "])


def literal(pool: tuple[str, ...]) -> st.SearchStrategy[str]:
    return st.sampled_from(pool)


@st.composite
def bounds(draw: st.DrawFn) -> str:
    i, op, c = draw(st.integers(0, N - 1)), draw(ops), draw(literal(DECIMAL))
    form = draw(st.sampled_from(["({op} X_{i} {c})", "({op} {c} X_{i})", "({op} (* 2 X_{i}) (- {c}))",
                                 "({op} (+ {c} (- X_{i})) 0.25)", "({op} (- X_{i} (* 3.0 X_{i})) {c})"]))  # fmt: skip
    return form.format(op=op, i=i, c=c)


@st.composite
def outputs(draw: st.DrawFn, pool: tuple[str, ...]) -> str:
    j, k, op, c = (
        draw(st.integers(0, K - 1)),
        draw(st.integers(0, K - 1)),
        draw(ops),
        draw(literal(pool)),
    )
    form = draw(st.sampled_from(["({op} Y_{j} {c})", "({op} Y_{j} Y_{k})", "({op} (- Y_{j} Y_{k}) {c})",
                                 "({op} {c} {c})", "({op} (+ Y_{j} (* 0.5 Y_{k} -3) {c}) 1)",
                                 "({op} (- (* {c} Y_{j})) (- 1 Y_{k}))"]))  # fmt: skip
    return form.format(op=op, j=j, k=k, c=c)


def properties(pool: tuple[str, ...]) -> st.SearchStrategy[str]:
    atoms = st.one_of(bounds(), outputs(pool))
    joined = st.recursive(
        atoms,
        lambda inner: st.builds(
            lambda op, parts, gap: f"({op}{gap}{gap.join(parts)})",
            st.sampled_from(["and", "or"]),
            st.lists(inner, min_size=1, max_size=3),
            lines,
        ),
        max_leaves=8,
    )
    declared = "".join(
        f"(declare-const {v}_{i} Real)\n" for v, n in (("X", N), ("Y", K)) for i in range(n)
    )
    box = "".join(f"(assert (<= X_{i} 2.5))(assert (>= X_{i} -2.5))\n" for i in range(N))
    return st.lists(joined, min_size=1, max_size=3).map(
        lambda asserts: declared + box + "".join(f"(assert {a})\n" for a in asserts)
    )


points = st.lists(st.sampled_from(GRID), min_size=N + K, max_size=N + K)


def compare(text: str, samples: list[list[float]], *, exact: bool) -> None:
    forms = nested(text)
    truth = [naive(forms, s[:N], s[N:]) for s in samples]
    try:
        query = loads(text)
    except SpecError as error:
        assert "no input is left" in str(error)  # noqa: PT017
        assert not any(truth)
        return
    for sample, expected in zip(samples, truth, strict=True):
        assert query.holds(sample[:N], sample[N:]) == expected
        x, y = (torch.tensor(v, dtype=torch.float64) for v in (sample[:N], sample[N:]))
        if exact:
            assert lowered(query, x, y[None]) == expected
        else:
            assert lowered(query, x, y[None], exact=True) or not expected


@given(properties(DYADIC), st.lists(points, min_size=8, max_size=8))
def test_cases_and_tree_are_the_text(text: str, samples: list[list[float]]) -> None:
    """Where float64 holds all numbers and sums, region and specification are exact, ties included."""
    short = [[*s[:N], *(round(v * 4) / 4 for v in s[N:])] for s in samples]
    compare(text, short, exact=True)


@given(properties(DECIMAL), st.lists(points, min_size=8, max_size=8))
def test_no_violation_is_lost_to_rounding(text: str, samples: list[list[float]]) -> None:
    """Offsets are rounded such that the specification, as stored, is never easier than the text."""
    compare(text, samples, exact=False)


def to_second(text: str) -> str:
    """A 1.0 text in version 2.0, all inputs as X [1,n]."""
    n, k = (len(re.findall(rf"declare-const {v}_", text)) for v in "XY")
    body = re.sub(r"\(declare-const [^)]*\)", "", text)
    body = re.sub(r"\b([XY])_(\d+)", r"\1[0,\2]", body)
    return (
        f"(vnnlib-version <2.0>)\n(declare-network f (declare-input X float32 [1,{n}])\n"
        f"  (declare-output Y real [1,{k}]))\n{body}"
    )


@given(properties(DECIMAL))
def test_both_versions_mean_the_same(text: str) -> None:
    try:
        first = loads(text)
    except SpecError:
        with pytest.raises(SpecError, match="no input is left"):
            loads(to_second(text))
        return
    second = loads(to_second(text), input_shape=(N,))
    assert (first.version, second.version) == ((1, 0), (2, 0))
    assert len(first.cases) == len(second.cases)
    for a, b in zip(first.cases, second.cases, strict=True):
        for name in ("center", "lower", "upper", "outer_lower", "outer_upper"):
            assert torch.equal(getattr(a.region, name), getattr(b.region, name))
        assert torch.equal(a.spec.C, b.spec.C)
        assert torch.equal(a.spec.d, b.spec.d)
        assert torch.equal(a.spec.clause, b.spec.clause)
        assert torch.equal(a.spec.strict, b.spec.strict)


# -- what the forms become ------------------------------------------------------------------------------------

HEAD = "(declare-const X_0 Real)(declare-const Y_0 Real)(declare-const Y_1 Real)\n"
UNIT = HEAD + "(assert (>= X_0 0.0))(assert (<= X_0 1))\n"


def test_disjuncts_on_outputs_are_the_clauses_of_one_box() -> None:
    query = loads(UNIT + "(assert (or (and (<= Y_0 Y_1)) (and (> Y_0 3) (>= Y_1 0.5))))")
    ((region, spec, lift),) = query.cases
    assert region.lower.tolist() == [[0.0]]
    assert region.upper.tolist() == [[1.0]]
    assert spec.clause.tolist() == [0, 1, 1]
    assert spec.strict.tolist() == [True, False, True]
    assert spec.C.tolist() == [[[1, -1], [-1, 0], [0, -1]]]
    assert spec.d.tolist() == [[0, 3, 0.5]]
    assert spec.violated(torch.tensor([[1.0, 1.0]])).all()  # a tie breaks <=
    assert not spec.violated(torch.tensor([[3.0, 0.5]])).any()  # but not >
    named = lift(torch.tensor([[0.25]]), torch.tensor([[1.0, 2.0]]))
    assert {k: v.tolist() for k, v in named.items()} == {"X": [0.25], "Y": [1.0, 2.0]}


def test_disjuncts_on_inputs_are_boxes_of_one_batch() -> None:
    query = loads(
        UNIT + "(assert (or (and (<= X_0 0.5) (<= Y_0 0)) (and (>= X_0 0.75) (<= Y_1 0))"
        " (and (<= X_0 0.5) (>= Y_0 9)) (and (>= X_0 2) (<= Y_0 0))))"
    )
    spans = sorted(
        (len(c.spec.d[0]), low, high)
        for c in query.cases
        for low, high in zip(
            c.region.lower.flatten().tolist(), c.region.upper.flatten().tolist(), strict=True
        )
    )
    assert spans == [(1, 0.75, 1.0), (2, 0.0, 0.5)]  # the fourth is empty


def test_thousands_of_boxes_are_one_batch_and_quick() -> None:
    both = "\n".join(
        f"(and (>= X_0 {i / 3000}) (<= X_0 {(i + 1) / 3000}) ({op} Y_0 {i}))"
        for i in range(3000)
        for op in ("<=", ">=")
    )
    start = time.process_time()
    ((region, spec, _),) = loads(f"{UNIT}(assert (or {both}))").cases
    assert (len(region), spec.C.shape, spec.clause.tolist()) == (3000, (3000, 2, 2), [0, 1])
    assert time.process_time() - start < 3


@pytest.mark.parametrize("bound", ["0.1", "8e-2", "-0.3", "1e-400", "0.5"])
def test_bounds_are_exact_pairs(bound: str) -> None:
    ((region, _, _),) = loads(
        f"{HEAD}(assert (>= X_0 {bound}))(assert (<= X_0 7))(assert (<= Y_0 0))"
    ).cases
    low, outer = region.lower.item(), region.outer_lower.item()
    assert Fraction(outer) <= Fraction(bound) <= Fraction(low)
    assert low in (outer, math.nextafter(outer, INF))
    assert (low == outer) == (Fraction(low) == Fraction(bound))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_a_side_without_a_number_has_no_member_unless_asked(dtype: torch.dtype) -> None:
    """X_0 = 0.1 holds at no float; the competition's checker rounds the bound instead."""
    text = f"{HEAD}(assert (>= X_0 0.1))(assert (<= X_0 0.1))(assert (<= Y_0 0))"
    exact = loads(text)
    region = exact.cases[0].region
    assert region.outer_lower.item() < region.outer_upper.item()
    point = torch.tensor([[0.1]], dtype=dtype)
    assert not region.contains(point).any()
    with pytest.raises(RegionError):
        region.inner(dtype)
    read = loads(text, dtype=dtype)
    region = read.cases[0].region
    assert region.contains(region.project(torch.zeros(1, 1, dtype=dtype))).all()
    assert torch.equal(region.project(torch.zeros(1, 1, dtype=dtype)), point)
    assert region.outer_lower.item() <= 0.1 <= region.outer_upper.item()
    assert (
        Fraction(region.outer_lower.item()) < Fraction(1, 10) < Fraction(region.outer_upper.item())
    )
    assert not read.holds(point, [0.0, 0.0])
    assert read.holds(point, [0.0, 0.0], dtype=dtype)
    assert not read.holds(point, [1.0, 0.0], dtype=dtype)
    wide = loads(UNIT.replace("1)", "0.1)") + "(assert (<= Y_0 0))", dtype=dtype)
    plain = loads(UNIT.replace("1)", "0.1)") + "(assert (<= Y_0 0))")
    assert torch.equal(wide.cases[0].region.upper, plain.cases[0].region.upper)


def test_without_outputs_every_member_is_unsafe() -> None:
    ((_, spec, _),) = loads(UNIT).cases
    assert spec.violated(torch.tensor([[7.0, -7.0]], dtype=torch.float64)).all()


def test_nothing_unsafe_has_no_case() -> None:
    assert loads(UNIT + "(assert (<= 1 0))").cases == ()
    assert loads(UNIT + "(assert (or (and (>= X_0 2) (<= Y_0 0)) (< Y_0 Y_0)))").cases == ()


def test_coefficients_beyond_float64_become_integers() -> None:
    ((_, spec, _),) = loads(UNIT + "(assert (<= (* 0.1 Y_0) (* 0.3 Y_1)))").cases
    assert spec.C.tolist() == [[[1, -3]]]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_a_comment_ends_with_its_line(end: str) -> None:
    lines = [
        "; a (",
        UNIT.strip(),
        "; b",
        "(assert (<= Y_0 0)) ; (assert (<= Y_1 0))",
        "(assert (<= Y_0 -1))",
    ]
    ((_, spec, _),) = loads(end.join(lines)).cases
    assert spec.d.tolist() == [[0, 1]]


def test_nan_and_infinity_prove_nothing() -> None:
    query = loads(UNIT + "(assert (or (<= Y_0 0) (> Y_0 -1)))")
    assert query.holds([0.5], [0.0, 0.0])
    for bad in (math.nan, INF, -INF):
        assert not query.holds([0.5], [0.0, bad])
        assert not query.holds([bad], [0.0, 0.0])


SECOND = """(vnnlib-version <2.0>) ; a comment (
(declare-network acc
  (declare-input X float64 [2, 1,3])
  (declare-output out float64 []))
{}"""
SIDES = "".join(
    f"(assert (<= X[{i},0,{j}] {i + j + 1}.5))(assert (>= X [{i}, 0,{j}] -1.0))\n"
    for i in range(2)
    for j in range(3)
)


def test_second_version_tensors() -> None:
    query = loads(SECOND.format(SIDES + "(assert (!= out 1.0))"))
    assert query.input.shape == (2, 1, 3)
    assert query.input.dtype == torch.float64
    ((region, spec, lift),) = query.cases
    assert region.upper.tolist() == [[[[1.5, 2.5, 3.5]], [[2.5, 3.5, 4.5]]]]
    assert spec.clause.tolist() == [0, 1]
    assert spec.strict.tolist() == [False, False]
    assert spec.violated(torch.tensor([[1.5]])).all()
    assert not spec.violated(torch.tensor([[1.0]])).any()
    assert query.input.element(5) == "X[1,0,2]"
    assert query.output.element(0) == "out"
    named = lift(region.center, torch.tensor([[1.5]]))
    assert named["out"].shape == ()


# -- malformed texts -----------------------------------------------------------------------------------------

OPEN = SECOND.format("")
MALFORMED = {
    "": "a.vnnlib: the file is empty",
    "\n": "line 2: declares no input",
    "hello": "line 1: cannot read|line 1: unexpected",
    HEAD: "asserts nothing",
    UNIT + "(assert (<= Y_0 0)": r"line 3: \(assert ... is never closed; is the file truncated",
    UNIT + "(assert (<= Y_0 0)))": "line 3: a closing parenthesis too many",
    UNIT + "\n(assert (<= Y_2 0))": "line 4: 'Y_2' is not declared; declare it above",
    UNIT + "(assert (<= Y_0 NaN))": "line 3: 'NaN' is not declared",
    UNIT + "(assert (<= Y_0 inf))": "line 3: 'inf' is not declared",
    UNIT + "(assert (<= Y_0 1.2.3))": "line 3: cannot read '1.2.3'",
    UNIT + "(assert (<= Y_0 0x10))": "line 3: cannot read '0x10'",
    UNIT + "(assert (<= Y_0 1e309))": "1e309 exceeds the largest float64",
    UNIT + "(assert (<= Y_0 1e-99999))": "too many digits",
    UNIT + "(assert (<= Y_0 " + "1" * 2000 + "))": "too many digits",
    UNIT + "(assert (<= (* 1e300 Y_0 1e300) 1))": "line 3: a value exceeds",
    UNIT + "(assert (<= (* 0.1234567890123456789 Y_0) Y_1))": "line 3: coefficients with too many digits",
    HEAD + "(assert (<= X_0 1))(assert (<= Y_0 0))": "line 1: X_0 has no lower bound; assert one",
    UNIT + "(assert (or (<= X_0 -1) (<= X_0 0.5)))(assert\n(>= X_0 1.5))": "line 4: X_0 has lower bound 1.5 above",
    UNIT + "(assert (<= (* Y_0 Y_1) 1))": "line 3: a product of variables is not linear",
    UNIT + "(assert (<= Y_0))": r"line 3: \(<= ...\) has 1 arguments, not 2",
    UNIT + "(assert (<= Y_0 Y_1 3))": r"has 3 arguments, not 2",
    UNIT + "(assert (and))": r"\(and ...\) has 0 arguments, not at least 1",
    UNIT + "(assert)": "has 0 arguments, not 1",
    UNIT + "(assert (or (<= Y_0 1) 3))": r"\(or ...\) takes Boolean arguments only",
    UNIT + "(assert (<= (<= Y_0 1) 3))": r"\(<= ...\) takes numeric arguments only",
    UNIT + "(assert (<= (and (<= Y_0 1)) 3))": "takes numeric arguments only",
    UNIT + "(assert (and (assert (<= Y_0 1))))": "line 3: an assert inside another form",
    UNIT + "(<= Y_0 1)": "line 3: .* outside of any assert",
    UNIT + "(and (<= Y_0 1))": "line 3: .* outside of any assert",
    UNIT + "(assert (=> (<= Y_0 1) (<= Y_1 1)))": r"line 3: \(=> ...\): expected one of",
    UNIT + "(assert (not (<= Y_0 1)))": "negate the relation instead",
    UNIT + "(check-sat)": r"line 3: \(check-sat ...\): expected one of",
    UNIT + "(assert (<= X_0 Y_0))": r"line 3: relates several variables, an input among them \(X_0, Y_0\)",
    UNIT + "(assert " + "(and " * 50_000 + "(<= Y_0 1)" + ")" * 50_001: "line 3: nested more than 100 deep",
    UNIT + "(assert (or (<= Y_0 0) (<= Y_1 0)))\n" * 20: r"line 1: 1048576 disjuncts .* the limit of 200000",
    HEAD + HEAD: "line 2: X_0 is declared twice",
    HEAD + "(declare-const X_2 Real)": "line 1: X_1 is not declared, but X_2 is",
    HEAD + "(declare-const X_01 Real)": "line 2: cannot declare 'X_01' here",
    HEAD + "(declare-const Z Real)": "line 2: cannot declare 'Z' here",
    HEAD + "(declare-const Y_2 Int)": "line 2: cannot declare 'Y_2' here",
    "(vnnlib-version <3.0>)" + HEAD: "version 3.0",
    OPEN.replace("float64", "int8"): "line 3: input 'X' is int8; supported are real, float16",
    OPEN.replace("[]", "[0]"): "must have 1 to",
    OPEN.replace("[]", "[-1]"): "must hold integers",
    OPEN.replace("[]", "[999999999,999999999]"): "must have 1 to",
    OPEN.replace("(declare-output", "(declare-input Z real [1])\n(declare-output"): "line 4: input 'Z' is a second one",
    OPEN.replace("(declare-output", '(declare-hidden h real [1] "n")(declare-output'): "hidden nodes are not supported",
    OPEN.replace("(declare-input", "(equal-to f)(declare-input"): "several networks are not supported",
    OPEN + "(declare-network g (declare-input A real [1]) (declare-output B real [1]))": "line 5: network 'g'",
    OPEN.replace("[]))", "[]) (<= out 1.0))"): r"line 4: \(<= ...\) outside of any assert",
    OPEN.replace("[]))", "[]) (and (<= out 1.0)))"): r"line 4: \(and ...\) outside of any assert",
    OPEN.replace("[]))", "[]) (assert (<= out 1.0)))"): "line 4: an assert inside another form",
    OPEN.replace("[]))", "[]) 1.0)"): "line 4: unexpected '1.0'",
    OPEN.replace("[]))", "[])") + "(assert (<= out 1.0))": "line 5: an assert inside another form",
    OPEN.replace("out ", "X "): "X is declared twice",
    OPEN.replace("float64 []", "[]"): r"\(declare-output ...\): expected",
    OPEN + HEAD: "line 5: cannot declare 'X_0' here",
    OPEN + "(assert (<= X[0,0] 1.0))": r"line 5: X\[0,0\] is no entry of X, whose shape is \[2, 1, 3\]",
    OPEN + "(assert (<= X[0,0,3] 1.0))": "is no entry of X",
    OPEN + "(assert (<= X[0,0,-1] 1.0))": "must hold integers, not negative",
    OPEN + "(assert (<= X 1.0))": "is no entry of X",
    OPEN + "(assert (<= out[0] 1.0))": "is no entry of out",
}  # fmt: skip


@pytest.mark.parametrize("text", MALFORMED, ids=range(len(MALFORMED)))
def test_malformed_texts_are_named(text: str, tmp_path: Path) -> None:
    file = tmp_path / "a.vnnlib"
    file.write_text(text)
    with pytest.raises(SpecError, match=rf"a\.vnnlib, line \d+: .*|{file}.*") as error:
        load(file)
    assert re.search(MALFORMED[text], str(error.value)), str(error.value)
    assert len(str(error.value)) < 400 + len(str(file))


@pytest.mark.parametrize(
    "text",
    [
        "(" * 300_000, ")" * 300_000, "(assert " * 300_000, " " * 300_000 + "(", "(" + " " * 300_000,
        "1" * 300_000, "x" * 300_000, "(<=" + " " * 300_000, "X[" * 100_000, ";" * 300_000,
        "(assert (<= " * 50_000, "(declare-const " + " " * 300_000, HEAD + "(assert (<= X_0 " + "1" * 300_000,
    ],
)  # fmt: skip
def test_no_text_is_slow_to_refuse(text: str) -> None:
    start = time.process_time()
    with pytest.raises(SpecError):
        loads(text)
    assert time.process_time() - start < 2


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="no such file"):
        load(tmp_path / "none.vnnlib")
    file = tmp_path / "cut.vnnlib.gz"
    data = gzip.compress((UNIT + "(assert (<= Y_0 0))\n" * 100).encode())
    file.write_bytes(data)
    assert len(load(file).cases) == 1
    file.write_bytes(data[: len(data) // 2])
    with pytest.raises(SpecError, match=r"cut\.vnnlib\.gz: damaged gzip stream"):
        load(file)
    file.write_bytes(gzip.compress(b" " * 10**7))
    with pytest.raises(SpecError, match="times the compressed size"):
        load(file)
    with pytest.raises(SpecError, match="max_bytes"):
        load(file, max_bytes=10)
    file.write_bytes(np.random.default_rng(0).bytes(1000))
    with pytest.raises(SpecError, match="line 1"):
        load(file)


def test_the_shape_must_fit() -> None:
    text = UNIT + "(assert (<= Y_0 0))"
    assert loads(text, input_shape=(1, 1)).cases[0].region.center.shape == (1, 1, 1)
    with pytest.raises(
        SpecError, match=r"declares 1 inputs, but the network's input shape \(2, 2\) has 4"
    ):
        loads(text, input_shape=(2, 2))


# -- assignments ---------------------------------------------------------------------------------------------

finite = st.floats(allow_nan=False, allow_infinity=False)
small = st.floats(width=32, allow_nan=False, allow_infinity=False)


@given(st.lists(finite, min_size=6, max_size=6), finite, st.booleans())
def test_assignments_round_trip(x: list[float], y: float, second: bool) -> None:
    text = SECOND.format(SIDES + "(assert (<= out 1.0))")
    if not second:
        text = "".join(f"(declare-const X_{i} Real)" for i in range(6)) + "(declare-const Y_0 Real)"
        text += "".join(f"(assert (<= X_{i} 1))(assert (>= X_{i} 0))" for i in range(6))
    query = loads(text)
    values = query.cases[0].lift(
        torch.tensor(x, dtype=torch.float64), torch.tensor([y], dtype=torch.float64)
    )
    written = format_assignment((query.input, query.output), values)
    assert written.startswith("X float64 [2,1,3]\n" if second else "((X_0 ")
    read = parse_assignment("sat\n" + written)
    assert {k: v.shape for k, v in read.items()} == {k: v.shape for k, v in values.items()}
    assert all(torch.equal(read[k], values[k]) for k in values)


@given(st.lists(small, min_size=2, max_size=2))
def test_float32_round_trips(x: list[float]) -> None:
    query = loads(UNIT.replace("X_0", "Z").replace("Z", "X_0") + "(assert (<= Y_0 0))")
    point = torch.tensor(x[:1]), torch.tensor(x)
    written = format_assignment((query.input, query.output), query.cases[0].lift(*point))
    read = parse_assignment(written)
    assert torch.equal(read["X"].float(), point[0])
    assert torch.equal(read["Y"].float(), point[1])


@pytest.mark.parametrize(
    "text",
    [
        "sat\n((X_0 0.025)\n (X_1 -1e-3)\n (Y_0 3))", "((X_0 .025) (X_1 -0.001) (Y_0 3.))",
        "(X_0 0.025)\n(X_1 -.001)\n(Y_0 +3)\n", "((X_0  2.5E-2)\n(X_1 = -0.001)\n\n( Y_0\t3 ) )\n; done (",
        "violated\r\n((Y_0 3)\r\n(X_1 -0.001)\r\n(X_0 0.025))",
        "sat\nX float32 [2]\n0.025\n\n-1e-3\nY real [1]\n3", "X Real[ 2 ]\n 2.5e-2 \n-.001\nY float32 [ 1]\n+3.0\n",
    ],
)  # fmt: skip
def test_foreign_assignments_are_read(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(text)
    read = read_assignment(tmp_path / "a.txt")
    assert {k: v.tolist() for k, v in read.items()} == {"X": [0.025, -0.001], "Y": [3.0]}
    (tmp_path / "a.gz").write_bytes(gzip.compress(text.encode()))
    assert read_assignment(tmp_path / "a.gz").keys() == read.keys()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no assignment"), ("unsat", "cannot read 'unsat'"), ("((X_0 nan))", "cannot read"),
        ("((X_0 1) (X_0 2))", "X_0 stands there twice"), ("((X_1 1))", "X_0 is missing, but X_1"),
        ("((Y_0 1))", "holds no X_0"), ("((X_0 1e999))", "no finite number"),
        ("((X_0 1) hello)", "cannot read 'hello'"), ("((X_0 1e-9999))", "too many digits"),
        ("X float32 [2]\n1", "X has 1 of its 2 numbers"), ("X float32 [1]\nnan", "no finite number"),
        ("X float32 [1]\n1\n2", "cannot read '2'"), ("X float32 [1]\n1\nX float32 [1]\n1", "each once"),
    ],
)  # fmt: skip
def test_damaged_assignments_are_named(text: str, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        parse_assignment(text)


def test_what_cannot_be_written() -> None:
    query = loads(UNIT + "(assert (<= Y_0 0))")
    both = (query.input, query.output)
    with pytest.raises(ValueError, match="Y is missing"):
        format_assignment(both, {"X": torch.zeros(1)})
    for bad in (torch.zeros(3), torch.tensor([1.0, math.nan])):
        with pytest.raises(ValueError, match="Y must be 2 finite numbers"):
            format_assignment(both, {"X": torch.zeros(1), "Y": bad})


TENTH = float(np.float32(0.1))  # above 0.1, and the nearest float32 of all that is nearer than 3e-9
EQUAL = "(assert (= X_0 0.1))"


@pytest.mark.parametrize(
    ("sides", "y", "written"),
    [
        (EQUAL, 0, "0.1"),
        ("(assert (<= X_0 0.1))(assert (>= 0.1 X_0))(assert (>= X_0 0.1))", 0, "0.1"),
        ("(assert (>= X_0 0.1000000016))(assert (<= X_0 0.1000000017))", 0, "0.1000000016"),
        ("(assert (>= X_0 0.1000000016))(assert (>= X_0 0.1000000018))", 0, "0.1000000018"),
        ("(assert (>= X_0 0.1000000018))(assert (>= X_0 0.1000000016))", 0, "0.1000000018"),
        ("(assert (or (and (= X_0 0.3)) (and (= X_0 0.1)) (and (= X_0 0.1000000001))))", 0, "0.1"),
        ("(assert (or (and (= X_0 0.1000000001) (>= Y_0 1)) (and (= X_0 0.1))))", 0, "0.1"),
        ("(assert (or (and (= X_0 0.1000000001) (>= Y_0 1)) (and (= X_0 0.1))))", 1, "0.1000000001"),
        ("(assert (>= X_0 0.1))", 0, repr(TENTH)),  # nothing is in the way
        ("(assert (<= X_0 0.09))", 0, None),  # too far away
        ("(assert (> X_0 0.1000000016))", 0, None),  # its end is not inside
        ("(assert (>= X_0 0.1000000017))(assert (<= X_0 0.1000000016))", 0, None),
        (f"{EQUAL}(assert (>= Y_0 1))", 0, None),
    ],
)  # fmt: skip
def test_decimals_that_are_inside_where_no_float32_is(
    sides: str, y: float, written: str | None
) -> None:
    text = UNIT.replace("(assert (<= X_0 1))", "(assert (<= X_0 1))" + sides)
    try:
        query = loads(text, dtype=torch.float32)
    except NoInputs:
        assert written is None
        return
    x, y_ = torch.tensor([[TENTH]]), torch.tensor([[y, 0.0]])
    found = query.decimals(x, y_)
    assert (found and [str(v) for v in found]) == (written and [written])
    if found:
        assert query.holds(found, y_)
        assert np.float32(float(found[0])) == TENTH
        values = {"X": found, "Y": y_}
        read = parse_assignment(format_assignment((query.input, query.output), values))
        assert read["X"].float().tolist() == [TENTH]


# -- instances and real files ---------------------------------------------------------------------------------


def test_instances(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="no such file; give the folder"):
        instances(tmp_path)
    (tmp_path / "a.onnx.gz").touch()
    (tmp_path / "b.vnnlib").touch()
    table = tmp_path / "instances.csv"
    table.write_text("a.onnx, b.vnnlib.gz ,12.5\n\n")
    assert instances(tmp_path) == [(tmp_path / "a.onnx.gz", tmp_path / "b.vnnlib", 12.5)]
    table.write_text("a.onnx,b.vnnlib,1\n\na.onnx,c.vnnlib,1")
    with pytest.raises(SpecError, match=r"line 3: c\.vnnlib: no such file"):
        instances(tmp_path)
    table.write_text("a.onnx,b.vnnlib,soon")
    with pytest.raises(SpecError, match="line 1: expected network,property,seconds"):
        instances(tmp_path)


@needs_files
def test_every_file_loads() -> None:
    """With a member in float32 (the checker's reading), inside the exact box wherever that has one."""
    for file in FILES:
        query = load(file, dtype=torch.float32)
        for region, spec, _ in query.cases:
            point = region.project(region.center.float())
            assert region.contains(point).all(), file
            assert spec.C.shape == (len(region), len(spec.clause), query.output.size), file
            assert bool((region.outer_lower <= region.lower).all()), file


@needs_files
def test_every_instance_is_there() -> None:
    found = {s.name: len(instances(s)) for s in SUITES.iterdir() if (s / "instances.csv").is_file()}
    assert found
    for suite, count in found.items():
        assert count == len((SUITES / suite / "instances.csv").read_text().split()), suite


# of each suite the first and the smallest
SOME = [
    f
    for s in sorted({f.parent for f in FILES})
    for f in sorted({min(s.iterdir()), min(s.iterdir(), key=lambda f: (f.stat().st_size, f))})
]


@needs_files
@pytest.mark.parametrize("file", SOME, ids=lambda f: f"{f.parts[-3]}-{f.name[:20]}")
def test_real_files_mean_what_they_say(file: Path) -> None:
    """Random members and near misses with random outputs, ties included, against the text itself."""
    data = file.read_bytes()
    text = (gzip.decompress(data) if file.suffix == ".gz" else data).decode()
    forms, query = nested(text), load(file)
    rng = np.random.default_rng(0)
    ((region, _, _),) = query.cases
    low, high = region.lower[0].numpy(), region.upper[0].numpy()
    literals = [float(c) for c in re.findall(r"Y_\d+\s+(-?[0-9][-+\deE.]*)\)", text)] or [0.0]
    met = set()
    for trial in range(24):
        if trial >= 12 and len(met) == 2:
            break  # enough
        x = np.clip(low + rng.random(low.shape) * (high - low), low, high)
        x = np.where(low > high, low, x)
        y = rng.choice(literals) + rng.integers(-1, 2, query.output.size) * (trial % 4)
        if trial % 3 == 2:  # one step out of one side
            i = rng.integers(len(x))
            x[i] = np.nextafter([low, high][trial % 2][i], [-INF, INF][trial % 2])
        expected = naive(forms, x.tolist(), y.tolist())
        met.add(expected)
        assert query.holds(x.tolist(), y.tolist()) == expected
        assert lowered(query, torch.from_numpy(x), torch.from_numpy(y)[None]) == expected
    assert met == {False, True} or bool((low > high).any())
