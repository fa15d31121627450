"""Texts made to hurt: deep, long, exponential. An error or an answer, in linear time and memory."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from calipers.errors import SpecError
from calipers.vnnlib import loads
from peak import peak, restart

HEAD = "(declare-const X_0 Real)(declare-const Y_0 Real)(declare-const Y_1 Real)\n"
BOX = HEAD + "(assert (>= X_0 0))(assert (<= X_0 1))\n"
MILLION = 10**6

DEEP = {
    "and": f"{BOX}(assert {'(and ' * MILLION}(<= Y_0 0){')' * MILLION})",
    "or": f"{BOX}(assert {'(or ' * MILLION}(<= Y_0 0){')' * MILLION})",
    "sum": f"{BOX}(assert (<= {'(+ ' * MILLION}Y_0{')' * MILLION} 0))",
    "minus": f"{BOX}(assert (<= {'(- ' * MILLION}Y_0{')' * MILLION} 0))",
    "never closed": f"{BOX}(assert {'(and ' * MILLION}",
    "closed": BOX + ")" * MILLION,
    "networks": "(declare-network f " * MILLION,
    "asserts": "(assert " * MILLION,
}  # fmt: skip


@pytest.mark.parametrize("name", DEEP)
def test_a_million_deep_is_an_error_at_once(name: str) -> None:
    begin = time.process_time()
    with pytest.raises(SpecError):
        loads(DEEP[name])
    assert time.process_time() - begin < 2


PAIR = "(or (<= Y_0 0) (<= Y_1 0))"
EXPONENTIAL = {
    "asserts": BOX + f"(assert {PAIR})" * 40,
    "in one and": f"{BOX}(assert (and {PAIR * 40}))",
    "in an or": f"{BOX}(assert (or (and {PAIR * 40}) (<= Y_0 1)))",
    "nested": f"{BOX}(assert {'(and ' * 30}{PAIR}{(PAIR + ')') * 30})",
    "unequal": BOX + "(assert (!= Y_0 1))" * 40,
    "on inputs": BOX + "(assert (or (<= X_0 0.1) (>= X_0 0.2)))" * 40,
}


@pytest.mark.parametrize("name", EXPONENTIAL)
def test_exponential_clauses_are_an_error_at_once(name: str) -> None:
    begin = time.process_time()
    with pytest.raises(SpecError, match=" disjuncts "):
        loads(EXPONENTIAL[name])
    assert time.process_time() - begin < 2


LONG = {
    "flat": (
        "(assert (<= X_{i} 0.25))\n(assert (>= X_{i} 0.125))\n",
        "(declare-const X_{i} Real)\n",
    ),
    "or": ("(and (<= X_0 0.{i}) (>= Y_0 0.5))\n", ""),
    "sum": ("(* 0.5 Y_{i}) ", "(declare-const Y_{i} Real)\n"),
}


def long(kind: str, count: int) -> str:
    body, declaration = LONG[kind]
    middle = "".join(body.format(i=i) for i in range(1, count))
    more = "".join(declaration.format(i=i) for i in range(1, count))
    around = {
        "flat": "{}(assert (<= Y_0 0))",
        "or": "(assert (or {}))",
        "sum": "(assert (<= (+ {}) 1))",
    }[kind]
    box = BOX.replace("(declare-const Y_1 Real)", "") if kind == "sum" else BOX
    return more + box + around.format(middle)


@pytest.mark.parametrize("kind", LONG)
def test_time_is_linear_in_the_text(kind: str) -> None:
    def cost(count: int) -> float:
        source, times = long(kind, count), []
        for _ in range(2):
            begin = time.process_time()
            loads(source)
            times.append(time.process_time() - begin)
        return min(times)

    assert cost(8_000) < 4 * 3 * max(cost(2_000), 0.02)


CHILD = """
import sys, time
from calipers.errors import SpecError
from calipers.vnnlib import load
sys.path.insert(0, sys.argv[2])
from peak import peak
begin, before = time.process_time(), peak()
try:
    load(sys.argv[1])
    said = "answer"
except SpecError as error:
    said = "error"
print(said, time.process_time() - begin, (peak() - before) / 2**20)
"""
HUGE = {
    "one word": b"a",
    "parentheses": b"(",
    "comments": b"; x\n",
    "zeros": b"\0",
}


@pytest.mark.parametrize("name", HUGE)
def test_forty_megabytes(name: str, tmp_path: Path) -> None:
    """Refused in seconds, with less memory than a few copies of the file."""
    file = tmp_path / "huge.vnnlib"
    part = HUGE[name] * (2**20 // len(HUGE[name]))
    with file.open("wb") as out:
        for _ in range(40):
            out.write(part)
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(file), str(Path(__file__).parent)],
        capture_output=True,
        text=True,
        check=False,
    )
    file.unlink()
    assert done.returncode == 0, done.stderr[-300:]
    said, seconds, megabytes = done.stdout.split()
    assert said == "error"
    assert float(seconds) < 6
    assert float(megabytes) < 320


def test_beyond_the_limit_nothing_is_read(tmp_path: Path) -> None:
    file = tmp_path / "sparse.vnnlib"
    with file.open("wb") as out:
        out.truncate(10 * 2**30)
    restart()
    before = peak()
    from calipers.vnnlib import load

    with pytest.raises(SpecError, match="max_bytes"):
        load(file)
    assert peak() - before < 2**26


TOKENS = ["(", ")", "assert", "and", "or", "<=", ">=", "==", "!=", "+", "-", "*", "X_0", "Y_0", "Y_1", "X[0]",
          "1.0", "-3", "1e400", "nan", "declare-const", "declare-network", "declare-input", "Real", "float32", "[1,2]",
          "[", "]", ";", "\n", "(vnnlib-version <2.0>)", "\0", "é", "𝟙"]  # fmt: skip


@given(st.booleans(), st.lists(st.sampled_from(TOKENS), max_size=40))
def test_any_words_are_an_answer_or_an_error(head: bool, words: list[str]) -> None:
    try:
        loads((BOX if head else "") + " ".join(words))
    except SpecError as error:
        assert "line" in str(error)  # noqa: PT017


@given(st.binary(max_size=300))
def test_any_bytes_are_an_answer_or_an_error(data: bytes) -> None:
    try:
        loads(BOX + data.decode("utf-8", errors="replace"))
    except SpecError as error:
        assert "line" in str(error)  # noqa: PT017
