"""Decisions: right where the answer is known, and never a verdict when something is wrong."""

from __future__ import annotations

import math
import re
import signal
import time
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import certificates
from calipers.errors import SolverError
from calipers.evaluate import solvers, verify
from calipers.evaluate.limits import TimeIsUp, alarm
from calipers.evaluate.replay import replay_assignment
from calipers.evaluate.solvers import Entry, problem
from calipers.evaluate.verify import Decision, decide
from calipers.exact import Outcome
from calipers.graph.graph import Network
from calipers.graph.onnx import load_onnx
from calipers.vnnlib import Query, loads
from networks import Builder, mlp
from queries import ANSWERS, HEAD, SECOND, diamond, norm, text, write_network

Square = tuple[Path, Network]


@pytest.fixture(scope="module")
def square(tmp_path_factory: pytest.TempPathFactory) -> Square:
    return diamond(tmp_path_factory.mktemp("square"))


def query(network: Network, source: str) -> Query:
    return loads(source, input_shape=network.input_shape, dtype=network.dtype)


def ask(square: Square, source: str, **options: object) -> Decision:
    network = square[1]
    return decide(network, query(network, source), **{"seconds": 10.0, **options})  # type: ignore[arg-type]


@pytest.mark.parametrize("unsafe", ANSWERS)
def test_known_answers(square: Square, unsafe: str) -> None:
    found = ask(square, text("-1", "1", unsafe))
    assert found.verdict in (ANSWERS[unsafe], "unknown")
    assert found.verdict == ANSWERS[unsafe] or "complete search" in found.reason
    if found.verdict == "sat":
        assert found.x is not None
        assert found.y is not None
        x = [Fraction(v) for v in found.x.double().flatten().tolist()]
        assert all(-1 <= v <= 1 for v in x)
        assert found.y[0, 0].item() == pytest.approx(norm(found.x.double()).item(), rel=1e-6)
        assert "onnxruntime" in found.reason
    if found.verdict == "unsat":
        assert found.lower > 0
        assert all(b.lower > 0 for b in found.boxes)


@pytest.mark.parametrize("kind", ["real", "float32"])
@pytest.mark.parametrize("unsafe", [u for u in ANSWERS if "X_" not in u])
def test_both_versions_have_one_answer(square: Square, unsafe: str, kind: str) -> None:
    second = unsafe.replace("Y_0", "Y[0,0]").replace("Y_1", "Y[0,1]")
    found = ask(square, SECOND.format(kind=kind, unsafe=second))
    assert found.verdict == ask(square, text("-1.0", "1.0", unsafe)).verdict
    covered = any("rounding" in note for note in found.notes)
    assert covered == ((kind == "float32" and found.verdict != "sat") or covered)


def test_a_declared_type_covers_the_forward_pass(square: Square) -> None:
    """Y_0 <= 2 in real arithmetic; that float32 may exceed it by rounding is not excluded, unless asked not to care."""
    just = SECOND.format(kind="float32", unsafe="(>= Y[0,0] 2.0000001)")
    assert ask(square, just, seconds=2.0).verdict != "unsat"
    assert ask(square, just, real=True).verdict == "unsat"
    assert ask(square, just.replace("float32", "real")).verdict == "unsat"
    clear = SECOND.format(kind="float32", unsafe="(>= Y[0,0] 2.01)")
    assert ask(square, clear).verdict == "unsat"


def test_a_bound_between_two_numbers(square: Square) -> None:
    """X_0 = 0.1 holds at no float32: such a witness says that it is rounded, and --exact refuses it."""
    at = f"{HEAD}(assert (= X_0 0.1))(assert (>= X_1 0))(assert (<= X_1 1))(assert (>= Y_0 0.5))"
    found = ask(square, at)
    assert (found.verdict, found.rounded) == ("sat", True)
    assert ask(square, at, exact=True, seconds=2).verdict in ("unknown", "timed-out")
    assert not ask(square, text("-1", "1", "(>= Y_0 1.5)")).rounded


def replayed(network: Network, at: Query, found: Decision, folder: Path) -> tuple[str, str]:
    """The text of a witness, and its class."""
    written = found.counterexample(at)
    (folder / "c.txt").write_text(f"sat\n{written}")
    return written, replay_assignment(folder / "c.txt", at, network)[0].verdict


def test_the_text_of_such_a_witness_is_inside_the_exact_set(square: Square, tmp_path: Path) -> None:
    network = square[1]
    sides = "(assert (= X_0 0.1))(assert (>= X_1 0.30000000001))(assert (<= X_1 0.30000000002))"
    at = query(network, f"{HEAD}{sides}(assert (>= Y_0 0.35))")
    found = decide(network, at, seconds=10.0)
    written, verdict = replayed(network, at, found, tmp_path)
    assert (found.verdict, verdict) == ("sat", "strict")
    first, second = (Fraction(v) for v in re.findall(r"\(X_. ([^)]*)\)", written))
    assert first == Fraction("0.1")
    assert Fraction("0.30000000001") <= second <= Fraction("0.30000000002")
    assert found.x is not None
    assert found.x.flatten().tolist() == [float(np.float32(0.1)), float(np.float32(0.3))]


def test_a_witness_that_only_rounding_makes_is_not_strict(tmp_path: Path) -> None:
    """Y_0 = X_0 − float32(0.1) is 0 where the network is run, and negative at 0.1."""
    layer = [[1.0, 0.0], [0.0, 1.0]], [-float(np.float32(0.1)), 0.0]
    network = load_onnx(write_network(tmp_path / "net.onnx", [layer]))
    sides = "(assert (= X_0 0.1))(assert (>= X_1 0))(assert (<= X_1 1))"
    at = query(network, f"{HEAD}{sides}(assert (>= Y_0 0))")
    found = decide(network, at, seconds=10.0)
    assert (found.verdict, found.rounded, found.decimals) == ("sat", True, None)
    assert replayed(network, at, found, tmp_path)[1] == "tolerant"


def test_many_boxes(square: Square) -> None:
    boxes = "".join(
        f"(and (>= X_0 {i / 300}) (<= X_0 {(i + 1) / 300}) (<= X_1 0.25) (>= X_1 0) (>= Y_0 {{}}))"
        for i in range(300)
    )
    found = ask(square, text("-1", "1", f"(or {boxes.format(*['1.5'] * 300)})"))
    assert found.verdict == "unsat"
    assert len(found.boxes) == verify.ROWS
    limits = ["1.5"] * 300
    limits[217] = "0.9"
    assert ask(square, text("-1", "1", f"(or {boxes.format(*limits)})")).verdict == "sat"


def test_nothing_unsafe_is_unsat_with_the_reason(square: Square) -> None:
    found = ask(square, text("-1", "1", "(<= 1 0)"))
    assert (found.verdict, found.method) == ("unsat", "reader")
    assert "no input" in found.reason


# -- complete search ---------------------------------------------------------------------------------------------


def outcome(*results: Outcome | BaseException):
    """A solver that returns, or raises, these in turn."""
    calls: list[dict[str, object]] = []

    def solve(network, region, spec, **options) -> Outcome:
        calls.append({"region": region, "spec": spec, **options})
        result = results[min(len(calls), len(results)) - 1]
        if isinstance(result, BaseException):
            raise result
        return result

    solve.calls = calls
    return solve


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch):
    """Put solvers in the table's place."""

    def put(*found, suits=lambda _: True):
        class Ready(Entry):
            def load(self):
                return found[int(self.where.rpartition("_")[2])]

        entries = tuple(Ready(f"m.solver_{i}", suits, 0.5) for i in range(len(found)))
        monkeypatch.setattr(solvers, "SOLVERS", entries)

    return put


OPEN = text("-1", "1", "(and (>= Y_0 1.75) (<= X_0 0.5) (>= X_0 -0.5) (<= Y_1 1))")


@pytest.fixture
def unbounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without bounds and attacks everything is left to the search."""
    monkeypatch.setattr(verify, "BOUNDS", ())
    monkeypatch.setattr(verify._Search, "attack", lambda *_: None)


def test_the_searchs_proof_counts(square: Square, table, unbounded) -> None:
    solve = outcome(Outcome(lower=0.25, domains=7))
    table(solve)
    found = ask(square, OPEN)
    assert (found.verdict, found.method, found.lower) == ("unsat", "solver_0", 0.25)
    assert found.boxes[0].domains == 7
    assert time.perf_counter() < solve.calls[0]["deadline"] < time.perf_counter() + 10


@pytest.mark.parametrize("lower", [0.0, -1.0, math.nan, -math.inf])
def test_only_a_positive_bound_is_a_proof(square: Square, table, unbounded, lower: float) -> None:
    table(outcome(Outcome(lower=lower, reason="spent")))
    found = ask(square, OPEN)
    assert found.verdict == "unknown"
    assert "spent" in found.reason


@pytest.mark.parametrize(
    "point", [[0.9, 0.9], [0.2, 0.1], [math.nan, 0.0], [math.inf, 0.0], [0.5, 1.5]]
)
def test_no_point_counts_unless_it_replays(square: Square, table, unbounded, point) -> None:
    second = outcome(Outcome(reason="tried as well"))
    table(outcome(Outcome(point=torch.tensor(point))), second)
    found = ask(square, OPEN)
    assert found.verdict == "unknown"
    assert "does not stand a replay" in found.reason
    assert "tried as well" in found.reason
    assert second.calls


def test_a_good_point_counts(square: Square, table, unbounded) -> None:
    table(outcome(Outcome(point=torch.tensor([0.75, 1.0]))))
    found = ask(square, text("-1", "1", "(>= Y_0 1.75)"))
    assert (found.verdict, found.method) == ("sat", "solver_0")
    assert torch.equal(found.x, torch.tensor([[0.75, 1.0]]))


@pytest.mark.parametrize(
    "error", [SolverError("no licence"), MemoryError(), RuntimeError("died"), ZeroDivisionError()]
)
def test_a_crash_is_unknown_and_the_next_is_asked(square: Square, table, unbounded, error) -> None:
    table(outcome(error))
    found = ask(square, OPEN)
    assert found.verdict == "unknown"
    assert type(error).__name__ in found.reason
    table(outcome(error), outcome(Outcome(lower=1.0)))
    assert ask(square, OPEN).verdict == "unsat"


def test_every_box_must_be_proved(square: Square, table, unbounded) -> None:
    two = text("-1", "1", "(or (and (<= X_0 0) (>= Y_0 3)) (and (>= X_0 0.5) (>= Y_0 3)))")
    table(outcome(Outcome(lower=1.0), Outcome(lower=-1.0)))
    assert ask(square, two).verdict == "unknown"
    table(outcome(Outcome(lower=1.0)))
    assert ask(square, two).verdict == "unsat"


def test_work_ends_a_search_whatever_the_time(square: Square, table, unbounded) -> None:
    def solve(network, region, spec, *, progress, **_):
        for i in range(1000):
            progress(Outcome(domains=10 * i))
        return Outcome(lower=1.0)

    table(solve)
    found = ask(square, OPEN, domains=500)
    assert found.verdict == "unknown"
    assert found.boxes[0].domains == 500
    assert "500 sub-problems" in found.reason
    assert ask(square, OPEN).verdict == "unsat"


def test_a_search_that_ignores_the_deadline_is_stopped(square: Square, table, unbounded) -> None:
    def solve(network, region, spec, **_):
        while True:
            time.sleep(0.01)

    table(solve)
    begin = time.perf_counter()
    found = ask(square, OPEN, seconds=0.5)
    assert found.verdict == "timed-out"
    assert time.perf_counter() - begin < 1.5


def test_solvers_that_are_not_there_are_skipped(square: Square, unbounded, monkeypatch) -> None:
    missing = Entry("calipers.exact.nothing.solve", lambda _: True, 1.0)
    monkeypatch.setattr(solvers, "SOLVERS", (missing,))
    found = ask(square, OPEN)
    assert found.verdict == "unknown"
    assert "no complete search" in found.reason


def test_what_kind_of_problem(square: Square) -> None:
    network = square[1]
    ((region, _, _),) = query(network, text("-1", "1", "(>= Y_0 1)")).cases
    assert problem(network, region) == (2, True, True)
    one = query(network, text("-1", "1", "(and (>= Y_0 1) (= X_0 0.5))")).cases[0].region
    assert problem(network, one).varying == 1
    b = Builder((2,))
    b(torch.sigmoid, b.linear(b.x, 3))
    assert not problem(b.network(), region).piecewise


# -- what is wrong with a network ----------------------------------------------------------------------------------


def test_another_function_in_onnxruntime_has_no_verdict(square: Square, monkeypatch) -> None:
    def shifted(x: Tensor) -> Tensor:
        return square[1](x) + 0.01

    monkeypatch.setattr(verify, "onnxruntime_replica", lambda _: shifted)
    for unsafe in ("(>= Y_0 1.5)", "(>= Y_0 2.5)"):
        found = ask(square, text("-1", "1", unsafe))
        assert found.verdict == "unknown"
        assert "outputs differ" in found.reason


def test_every_evaluation_must_be_broken(square: Square, table, unbounded, monkeypatch) -> None:
    """onnxruntime agrees within rounding and says 2.00005; torch says 2, which is not 2.00002."""
    monkeypatch.setattr(verify, "onnxruntime_replica", lambda _: lambda x: square[1](x) + 5e-5)
    table(outcome(Outcome(point=torch.tensor([1.0, 1.0]))))
    assert ask(square, text("-1", "1", "(>= Y_0 2.00002)")).verdict == "unknown"
    assert ask(square, text("-1", "1", "(>= Y_0 1.99)")).verdict == "sat"


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_broken_parameters_have_no_verdict(value: float) -> None:
    network = mlp(0, (2, 4, 2))
    with torch.no_grad():
        next(iter(network.module.buffers())).fill_(value)
    for unsafe in ("(>= Y_0 1.5)", "(<= Y_0 1e9)", "(>= Y_0 1e30)"):
        found = decide(network, query(network, text("-1", "1", unsafe)), seconds=2)
        assert found.verdict == "unknown"
        assert "NaN or infinite" in found.reason


def test_nan_bounds_prove_nothing(square: Square, monkeypatch) -> None:
    def nan(network, region, spec, **_):
        return torch.full(spec.d.shape, math.nan)

    monkeypatch.setattr(verify, "BOUNDS", (nan,))
    found = ask(square, text("-1", "1", "(>= Y_0 2.5)"), seconds=2)
    assert found.verdict == "unknown" or found.method not in ("", "nan")


@pytest.mark.parametrize("seconds", [0, -1, math.nan])
def test_no_time_is_unknown(square: Square, seconds: float) -> None:
    found = ask(square, text("-1", "1", "(>= Y_0 2.5)"), seconds=seconds)
    assert found.verdict == "unknown"
    assert "time limit" in found.reason


@given(st.integers(0, 10**6), st.sampled_from(["<=", ">="]), st.integers(-8, 8))
def test_verdicts_agree_with_samples(seed: int, op: str, eighths: int) -> None:
    """Random nets and half-spaces: unsat has no sampled violation, sat's witness is one."""
    network = mlp(seed % 50, (2, 5, 2))
    source = text("-0.5", "0.5", f"({op} Y_0 {eighths / 8})")
    found = decide(network, query(network, source), seconds=1.0)
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(500, 2, generator=generator) - 0.5
    y = network(x)[:, 0]
    broken = bool((y <= eighths / 8).any() if op == "<=" else (y >= eighths / 8).any())
    if broken:
        assert found.verdict != "unsat"
    if found.verdict == "sat":
        value = network(found.x)[0, 0].item()
        assert value <= eighths / 8 if op == "<=" else value >= eighths / 8


# -- alarms ------------------------------------------------------------------------------------------------------


def test_an_alarm_lets_an_import_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "slowly_imported.py").write_text(
        "import time\nend = time.perf_counter() + 0.3\nwhile time.perf_counter() < end: pass\nwhole = 1\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(TimeIsUp), alarm(time.perf_counter() + 0.1):  # noqa: PT012 - it rings after the import
        import slowly_imported

        time.sleep(5)
    assert slowly_imported.whole == 1


def test_an_alarm_rings_and_leaves_an_earlier_timer_as_it_was() -> None:
    before = signal.getitimer(signal.ITIMER_REAL)
    handler = signal.getsignal(signal.SIGALRM)
    begin = time.perf_counter()
    with pytest.raises(TimeIsUp), alarm(begin + 0.05):  # noqa: PT012 - it rings anywhere in the loop
        while time.perf_counter() < begin + 5:
            pass
    assert time.perf_counter() < begin + 1
    with alarm(time.perf_counter() + 5):
        pass
    after = signal.getitimer(signal.ITIMER_REAL)
    assert signal.getsignal(signal.SIGALRM) == handler
    assert after[0] == pytest.approx(before[0], abs=1)
    with pytest.raises(TimeIsUp), alarm(time.perf_counter() - 1):
        pytest.fail("ran")


def test_results_are_json(square: Square) -> None:
    import json

    for unsafe in ("(>= Y_0 1.5)", "(>= Y_0 2.5)"):
        found = ask(square, text("-1", "1", unsafe))
        content = json.loads(json.dumps(found.json(), allow_nan=False))
        assert content["verdict"] == found.verdict
        assert {"reason", "method", "lower", "seconds", "boxes", "notes", "rounded"} < set(content)
    assert replace(found, verdict="unknown").json()["verdict"] == "unknown"


def test_a_box_of_many_inputs_is_bounded_attacked_and_split(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The search calls the long attack, gradients and all, between its bound of the whole box and its first split."""
    monkeypatch.setattr(verify, "SECOND", 0.1)
    monkeypatch.setattr(verify, "LONGEST", 0.2)
    network = mlp(0, (40, 16, 16, 1))
    corners = torch.rand(100_000, 40, generator=torch.Generator().manual_seed(0)).round() * 2 - 1
    top = float(network(0.2 * corners).max())
    unsafe = f"(>= Y_0 {top + 0.25:.6f})"
    source = certificates.query([-0.2] * 40, [0.2] * 40, 1, unsafe)
    found = decide(network, query(network, source), seconds=60.0)
    assert found.verdict == "unsat", found.reason
    assert found.method == "branch"
    assert found.boxes[0].domains > 0
