"""Many queries: every row right, nothing lost to a kill, contradictions loud."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from calipers.errors import SpecError, StoreMismatch
from calipers.evaluate import bench as module
from calipers.evaluate.bench import (
    HEADER,
    Result,
    Settings,
    bench,
    read_results,
    solve,
    summaries,
    tasks,
)
from calipers.evaluate.plots import cactus
from calipers.evaluate.workers import Process
from queries import ANSWERS, DIAMOND, text, write_network

CALIPERS = [sys.executable, "-c", "from calipers.cli import main; main()"]
EASY = [u for u in ANSWERS if "X_" not in u]


def suite(
    folder: Path, queries: Mapping[str, str], *, limit: float = 20.0, truth: bool = True
) -> Path:
    """A benchmark's folder: ``queries`` from what is unsafe to the answer."""
    (folder / "onnx").mkdir(parents=True)
    write_network(folder / "onnx" / "net.onnx", DIAMOND)
    lines, rows = [], ["onnx,vnnlib,timeout_s,expected"]
    for i, (unsafe, answer) in enumerate(queries.items()):
        (folder / f"p{i}.vnnlib").write_text(text("-1", "1", unsafe))
        lines.append(f"onnx/net.onnx,p{i}.vnnlib,{limit}")
        rows.append(f"onnx/net.onnx.gz,p{i}.vnnlib.gz,{limit},{answer}")
    (folder / "instances.csv").write_text("\n".join(lines) + "\n")
    if truth:
        (folder / "expected.csv").write_text("\n".join(rows) + "\n")
    return folder


def table(results: list[Result]) -> list[tuple[object, ...]]:
    """What does not depend on the clock."""
    return [(r.key, r.limit, r.result, r.expected, r.method, r.lower, r.domains) for r in results]


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decide in this process: what is tested is not the workers."""

    def decided(left, count, settings):
        for task in left:
            yield solve(task, settings)

    monkeypatch.setattr(module, "_decided", decided)


def test_answers_are_those_expected(tmp_path: Path, here) -> None:
    results = bench(tasks(suite(tmp_path / "s", {u: ANSWERS[u] for u in EASY})))
    assert [r.result for r in results] == [ANSWERS[u] for u in EASY]
    assert all(r.expected == r.result for r in results)
    (found,) = summaries(results)
    assert (found.sat, found.unsat, found.contradictions, found.expected) == (3, 3, 0, 6)


def test_what_there_is_to_do(tmp_path: Path) -> None:
    first = suite(tmp_path / "a", {"(>= Y_0 1)": "sat"})
    suite(tmp_path / "b", {"(>= Y_0 1)": "unsat"}, truth=False)
    assert [(t.suite, t.limit, t.expected) for t in tasks(tmp_path, cap=3)] == [
        ("a", 3, "sat"),
        ("b", 3, ""),
    ]
    (first / "few.csv").write_text("onnx/net.onnx,p0.vnnlib,7\n")
    assert [t.limit for t in tasks(first / "few.csv")] == [7]
    for wrong in (tmp_path / "none", first / "onnx"):
        with pytest.raises(SpecError, match=r"no instances\.csv there"):
            tasks(wrong)
    (first / "expected.csv").write_text("a,b\n1,2\n")
    with pytest.raises(SpecError, match="has no column"):
        tasks(first)


def test_one_bad_instance_costs_itself_only(tmp_path: Path, here) -> None:
    folder = suite(
        tmp_path / "s", {"(>= Y_0 1.5)": "sat", "(>= Y_9 1)": "sat", "(>= Y_0 3)": "unsat"}
    )
    results = bench(tasks(folder))
    assert [r.result for r in results] == ["sat", "error", "unsat"]
    assert "'Y_9' is not declared" in results[1].reason
    (folder / "onnx" / "net.onnx").write_text("<html>")
    assert {r.result for r in bench(tasks(folder))} == {"error"}


def test_contradictory_boxes(tmp_path: Path, here) -> None:
    folder = suite(tmp_path / "s", {"(>= Y_0 1.5)": "unsat"})
    (folder / "p0.vnnlib").write_text(text("1", "-1", "(>= Y_0 1.5)"))
    (row,) = bench(tasks(folder))
    assert row.result == "unsat"
    assert "no input is left" in row.reason


def test_workers_share_the_work_and_keep_the_order(tmp_path: Path) -> None:
    todo = tasks(suite(tmp_path / "s", {u: ANSWERS[u] for u in EASY}))
    results = bench(
        todo, workers=2, out=tmp_path / "r.csv", settings=Settings(save=tmp_path / "ce")
    )
    assert [r.key for r in results] == [t.key for t in todo]
    assert [r.result for r in results] == [ANSWERS[u] for u in EASY]
    assert read_results(tmp_path / "r.csv") == results
    kept = sorted(p.name for p in (tmp_path / "ce" / "s").iterdir())
    assert kept == [
        f"net_p{i}.counterexample.gz" for i, u in enumerate(EASY) if ANSWERS[u] == "sat"
    ]


def test_a_worker_that_dies_or_hangs_is_replaced(tmp_path: Path, monkeypatch) -> None:
    """The network's file is a pipe that nobody writes to (hangs), or the worker is killed from outside."""
    folder = suite(tmp_path / "s", {"(>= Y_0 1.5)": "sat", "(>= Y_0 3)": "unsat"})
    monkeypatch.setattr(module, "GRACE", 0.5)
    original = Process.give

    def give(self, task, sent, seconds):
        original(self, task, sent, seconds)
        if task.vnnlib == "p0.vnnlib":
            os.kill(self.process.pid, signal.SIGKILL if kill else signal.SIGSTOP)

    monkeypatch.setattr(Process, "give", give)
    kill = True
    first, second = bench(tasks(folder))
    assert (first.result, second.result) == ("error", "unsat")
    assert "worker died (exit code -9)" in first.reason
    kill = False
    (folder / "instances.csv").write_text("onnx/net.onnx,p0.vnnlib,0.5\n")
    (row,) = bench(tasks(folder))
    assert row.result == "timed-out"
    assert "the worker was ended" in row.reason


# -- the results file --------------------------------------------------------------------------------------------


def test_finished_rows_are_not_decided_again(tmp_path: Path, here, monkeypatch) -> None:
    folder, out = suite(tmp_path / "s", {u: ANSWERS[u] for u in EASY}), tmp_path / "r.csv"
    whole = bench(tasks(folder), out=out)
    lines = out.read_text().splitlines(keepends=True)
    out.write_text("".join(lines[:4]) + lines[4][:25])  # cut short in the fourth row
    seen: list[str] = []
    again = bench(tasks(folder), out=out, progress=lambda row, *_: seen.append(row.vnnlib))
    assert seen == ["p3.vnnlib", "p4.vnnlib", "p5.vnnlib"]
    assert table(again) == table(whole)
    assert [r.seconds for r in again[:3]] == [r.seconds for r in whole[:3]]
    monkeypatch.setattr(module, "_decided", lambda left, *_: iter(() if not left else 1 / 0))
    assert table(bench(tasks(folder), out=out)) == table(whole)


def test_other_results_are_refused(tmp_path: Path, here) -> None:
    folder, out = suite(tmp_path / "s", {"(>= Y_0 1.5)": "sat"}), tmp_path / "r.csv"
    bench(tasks(folder), out=out)
    with pytest.raises(StoreMismatch, match="other instances or limits"):
        bench(tasks(folder, cap=3), out=out)
    out.write_text(out.read_text().replace("0.1.0 ", "0.0.9 "))
    with pytest.raises(StoreMismatch, match="version"):
        bench(tasks(folder), out=out)
    for text_ in ("a,b\n", ",".join(HEADER) + "\nx\n", ",".join(HEADER) + "\n" + "x," * 12 + "x\n"):
        out.write_text(text_)
        with pytest.raises(SpecError):
            bench(tasks(folder), out=out)


def test_kill_9_then_resume_gives_the_same_table(tmp_path: Path) -> None:
    folder = suite(tmp_path / "s", {u: ANSWERS[u] for u in EASY})
    out, cut = tmp_path / "r.csv", 2
    command = [*CALIPERS, "bench", str(folder), "--out", str(out), "--domains", "50"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if out.exists() and out.read_text().count("\n") > cut:
            break
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert cut <= len(read_results(out)) <= 6
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    resumed = read_results(out)
    direct = [solve(task, Settings(domains=50)) for task in tasks(folder)]
    assert table(resumed) == table([replace(r, version="") for r in direct])


# -- the command -------------------------------------------------------------------------------------------------


def test_the_command(run, tmp_path: Path, here) -> None:
    folder = suite(tmp_path / "s", {u: ANSWERS[u] for u in EASY})
    code, out, err = run(
        "bench", folder, "--timeout-cap", "5s", "--out", tmp_path / "r.csv", "--plot", tmp_path / "c.svg",
        "--json", tmp_path / "b.json",
    )  # fmt: skip
    assert code == 0, err
    assert "[6/6] s net.onnx p5.vnnlib unsat" in err
    assert "0 of 6" in out
    content = json.loads((tmp_path / "b.json").read_text())
    assert content["suites"][0]["unsat"] == 3
    assert len(content["results"]) == 6
    assert str(tmp_path) not in (tmp_path / "b.json").read_text()
    assert (tmp_path / "c.svg").read_text().startswith("<svg")


def test_a_contradiction_is_loud(run, tmp_path: Path, here) -> None:
    folder = suite(
        tmp_path / "s", {"(>= Y_0 1.5)": "unsat", "(>= Y_0 3)": "sat", "(>= Y_0 4)": "unknown"}
    )
    code, out, err = run("bench", folder)
    assert code == 1
    assert out.count("CONTRADICTION") == 2
    assert "sat (expected unsat)" in err
    assert "2 of 2" in out


def test_bad_arguments(run, tmp_path: Path) -> None:
    folder = suite(tmp_path / "s", {"(>= Y_0 1.5)": "unsat"})
    for arguments, message in (
        ([tmp_path / "none"], "no instances.csv there"),
        ([folder, "--workers", "0"], "workers: 0"),
        ([folder, "--threads", "0"], "threads: 0"),
        ([folder, "--timeout-cap", "soon"], "--timeout-cap"),
        ([folder, "--out", tmp_path / "a" / "b.csv"], "--out: the folder"),
    ):
        code, out, err = run("bench", *arguments)
        assert (code, out) == (2, "")
        assert message in err


def test_cactus() -> None:
    drawn = cactus({"ours": [0.001, 3.0, 0.5], "<theirs>": [1.0], "none": []})
    assert drawn.count("<polyline") == 3
    assert "ours: 3" in drawn
    assert "&lt;theirs&gt;: 1" in drawn
    with pytest.raises(ValueError, match="nothing was solved"):
        cactus({"none": []})
