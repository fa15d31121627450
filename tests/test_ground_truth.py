"""Networks whose truth is known by construction, decided strictly: no falsehood is certified."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from calipers.evaluate import strict
from calipers.evaluate.queries import read
from calipers.evaluate.strict import Certified, decide_strictly
from calipers.evaluate.verify import Decision
from calipers.graph.onnx import save_onnx
from queries import DIAMOND, SECOND, text, write_network
from test_branch import PLANTED

Layers = list[tuple[list[list[float]], list[float]]]
BIG = 1e9

# (1e9 + x0) − 1e9 is x0, up to 1 in truth, and 0 in float32
CANCELLING: Layers = [
    ([[1.0, 0.0], [0.0, 0.0]], [BIG, BIG]),
    ([[1.0, -1.0], [0.0, 0.0]], [0.0, 1.0]),
]
# 1e4 + s − 1e4 − s is 0 in truth, and −s, 0 or s in float32, as the order of the sum has it; x0 rides on top
SMALL = 2.0**-14
ORDERED: Layers = [
    ([[0.0, 0.0]] * 4 + [[1.0, 0.0]], [1.0] * 4 + [0.0]),
    ([[1e4, SMALL, -1e4, -SMALL, SMALL / 16], [0.0] * 5], [0.0, 1.0]),
]


def decided(
    folder: Path, layers: Layers, query: str, seconds: float = 20.0
) -> tuple[Decision, Certified | None]:
    file, prop = write_network(folder / "net.onnx", layers), folder / "query.vnnlib"
    prop.write_text(query)
    return decide_strictly(*read(file, prop), (file, prop), seconds=seconds)


@pytest.mark.parametrize("over", [1e-2, 1e-5, 1e-7, 0.0, -1e-7, -1e-2])
def test_the_boundary_is_where_arithmetic_has_it(tmp_path: Path, over: float) -> None:
    """|x0| + |x1| is at most 2, and 2 at the corners alone."""
    found, made = decided(tmp_path, DIAMOND, text("-1.0", "1.0", f"(>= Y_0 {2 + over:.12f})"))
    assert found.verdict == ("unsat" if over > 0 else "sat")
    assert (made is not None and made.accepted) == (over > 0)


@pytest.mark.parametrize("over", [-1e-2, -1e-5, 1e-5, 1e-2])
def test_linear_functions_have_their_closed_form(tmp_path: Path, over: float) -> None:
    """w·x + b on a box is at most w·center + b + |w|·radius."""
    linear: Layers = [([[0.75, -1.25], [0.5, 0.0]], [0.125, 0.0])]
    top = 0.75 * 0.5 + 1.25 * 0.5 + 0.125
    found, made = decided(tmp_path, linear, text("-0.5", "0.5", f"(>= Y_0 {top + over:.12f})"))
    assert found.verdict == ("unsat" if over > 0 else "sat")
    assert (made is not None and made.accepted) == (over > 0)


@pytest.mark.parametrize("piecewise", [True, False])
def test_a_refused_certificate_counts_where_one_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piecewise: bool
) -> None:
    """Rigorous arithmetic is what an answer about smooth activations rests on."""
    monkeypatch.setattr(strict, "checked", lambda *_: "its rows do not suffice")
    monkeypatch.setattr(strict, "coverable", lambda *_: piecewise)
    found, made = decided(tmp_path, DIAMOND, text("-1.0", "1.0", "(>= Y_0 2.5)"))
    assert made is not None
    assert not made.accepted
    assert found.verdict == ("unknown" if piecewise else "unsat")
    assert "its rows do not suffice" in " ".join([found.reason, *found.notes])


@pytest.mark.parametrize("kind", ["real", "float32"])
def test_cancelling_weights_are_certified_under_neither_semantics(
    tmp_path: Path, kind: str
) -> None:
    for threshold in (1e-3, 0.75, 1.0):
        query = SECOND.format(kind=kind, unsafe=f"(>= Y[0,0] {threshold})")
        assert decided(tmp_path, CANCELLING, query, 2.0)[0].verdict != "unsat"


def test_sums_whose_order_matters_are_certified_for_real_numbers_alone(tmp_path: Path) -> None:
    """Over the reals y0 is at most s/16; a float32 pass may reach s."""
    for threshold in (SMALL / 8, 0.9 * SMALL):
        real, declared = (
            decided(
                tmp_path, ORDERED, SECOND.format(kind=k, unsafe=f"(>= Y[0,0] {threshold})"), 5.0
            )
            for k in ("real", "float32")
        )
        assert real[0].verdict == "unsat"
        assert real[1] is not None
        assert real[1].accepted
        assert declared[0].verdict != "unsat"
    false = SECOND.format(kind="real", unsafe=f"(>= Y[0,0] {SMALL / 16})")
    assert decided(tmp_path, ORDERED, false, 2.0)[0].verdict != "unsat"


@pytest.mark.parametrize("name", ["interval", "square", "corner"])
def test_planted_counterexamples_are_never_certified(tmp_path: Path, name: str) -> None:
    """The output is 0, or below, within a thousandth of one point; random points see nothing of it."""
    make: Callable[[float], object] = PLANTED[name]
    for depth in (1.25, 1.0):
        network = make(depth)
        file, prop = tmp_path / "net.onnx", tmp_path / "query.vnnlib"
        save_onnx(network, file)  # type: ignore[arg-type]
        inputs = range(network.input_shape[0])  # type: ignore[attr-defined]
        names = [*(f"X_{i}" for i in inputs), "Y_0"]
        box = [f"(assert (>= X_{i} 0))(assert (<= X_{i} 1))" for i in inputs]
        declared = [f"(declare-const {n} Real)" for n in names]
        prop.write_text("".join([*declared, *box, "(assert (<= Y_0 0))"]))
        found, made = decide_strictly(*read(file, prop), (file, prop), seconds=3.0)
        assert found.verdict != "unsat"
        assert made is None
