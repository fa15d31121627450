"""The competition's side: scripts that run, counterexamples classed by its rules, other tools compared."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from calipers.errors import SpecError
from calipers.evaluate.bench import Settings, bench, solve, tasks
from calipers.evaluate.peers import compare, compared
from calipers.evaluate.vnncomp import check, results, score, totals, word
from calipers.evaluate.vnncomp_scripts import SCRIPTS, write_scripts
from queries import DIAMOND, HEAD, text, write_network

UNSAFE = {"p": "(>= Y_0 1.5)", "q": "(>= Y_0 2.5)"}


@pytest.fixture(scope="module")
def benchmarks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A benchmark called small, in two layouts: plain, and with a folder for the version."""
    root = tmp_path_factory.mktemp("benchmarks")
    for folder in (root / "small", root / "versioned" / "1.0"):
        (folder / "onnx").mkdir(parents=True)
        (folder / "vnnlib" / "deep").mkdir(parents=True)
        write_network(folder / "onnx" / "net.onnx", DIAMOND)
        for name, unsafe in UNSAFE.items():
            (folder / "vnnlib" / f"{name}.vnnlib").write_text(text("-1", "1", unsafe))
        (folder / "vnnlib" / "deep" / "r.vnnlib").write_text(text("-1", "1", UNSAFE["p"]))
        (folder / "vnnlib" / "at.vnnlib").write_text(
            f"{HEAD}(assert (= X_0 0.1))(assert (>= X_1 0))(assert (<= X_1 1))(assert (>= Y_0 0.5))"
        )
        (folder / "instances.csv").write_text(
            "onnx/net.onnx,vnnlib/p.vnnlib,20\nonnx/net.onnx,vnnlib/q.vnnlib,20\n"
        )
    return root


def tool(folder: Path, rows: list[tuple[str, str, str, str]], category: str = "small") -> Path:
    """A results folder: rows of (query, result, seconds, counterexample)."""
    (folder / f"2026_{category}").mkdir(parents=True)
    lines = []
    for query, result, seconds, found in rows:
        version = "1.0/" if category == "versioned" else ""
        base = f"/somewhere/vnncomp2026/benchmarks/{category}/{version}"
        lines.append(
            f"{category},{base}onnx/net.onnx,{base}vnnlib/{query}.vnnlib,0.1,{result},{seconds}"
        )
        if found:
            name = f"net_{query.rpartition('/')[2]}.counterexample.gz"
            (folder / f"2026_{category}" / name).write_bytes(gzip.compress(found.encode()))
    (folder / "results.csv").write_text("\n".join(lines) + "\n")
    return folder


def point(x0: float, x1: float, y0: float = 0.0) -> str:
    return f"((X_0 {x0!r})\n (X_1 {x1!r})\n (Y_0 {y0!r})\n (Y_1 1.0))\n"


# what a counterexample to Y_0 >= 1.5 on [-1, 1]² is: by the competition, and exactly
CLASSES = {
    "inside": (point(0.75, 0.875), "correct", "correct"),
    "a tie": (point(0.75, 0.75), "correct", "correct"),
    "outputs are ignored": (point(0.75, 0.875, 99.0), "correct", "correct"),
    "with the line sat": ("sat\n" + point(0.75, 0.875), "correct", "correct"),
    "just outside": (point(1.00005, 0.75), "correct_up_to_tolerance", "correct_up_to_tolerance"),
    "far outside": (point(1.001, 0.75), "spec_not_violated", "spec_not_violated"),
    "not broken": (point(0.5, 0.5), "spec_not_violated", "spec_not_violated"),
    "nearly broken": (point(0.75, 0.7499), "spec_not_violated", "spec_not_violated"),
    "three inputs": ("((X_0 0.5)\n (X_1 1.0)\n (X_2 1.0))", "wrong_shape", "wrong_shape"),
    "a gap": ("((X_0 0.5)\n (X_2 1.0))", "malformed_ce", "malformed_ce"),
    "words": ("nothing was found", "malformed_ce", "malformed_ce"),
    "nan": ("((X_0 nan)\n (X_1 1.0))", "malformed_ce", "malformed_ce"),
    "empty": ("", "no_ce", "no_ce"),
}  # fmt: skip


@pytest.mark.parametrize("case", CLASSES)
def test_classes(benchmarks: Path, tmp_path: Path, case: str) -> None:
    content, rounded, exact = CLASSES[case]
    (tmp_path / "ce").write_text(content)
    folder = benchmarks / "small"
    found = check(tmp_path / "ce", folder / "onnx" / "net.onnx", folder / "vnnlib" / "p.vnnlib")
    assert (found.rounded, found.exact) == (rounded, exact), found.reason


def test_the_readings_differ_where_no_number_lies_between_the_bounds(
    benchmarks: Path, tmp_path: Path
) -> None:
    (tmp_path / "ce").write_text(point(0.1, 0.75))
    folder = benchmarks / "small"
    found = check(tmp_path / "ce", folder / "onnx" / "net.onnx", folder / "vnnlib" / "at.vnnlib")
    assert (found.rounded, found.exact) == ("correct", "correct_up_to_tolerance")
    # the competition's own comparison, as its checker writes it
    x = np.float32(0.1)
    assert not x < 0.1
    assert not x > 0.1


@pytest.mark.parametrize("category", ["small", "versioned"])
def test_scores(benchmarks: Path, tmp_path: Path, category: str) -> None:
    rows = [
        ("p", "sat", "1.5", CLASSES["inside"][0]),
        ("q", "unsat", "2.5", ""),
        ("q", "sat", "2.5", point(1.0, 1.0)),  # 2 is not at least 2.5
        ("p", "sat", "99", CLASSES["inside"][0]),  # after the limit of 20 s
        ("deep/r", "violated", "3", CLASSES["just outside"][0]),
        ("p", "run_instance_timeout", "20", ""),
        ("p", "", "1", ""),
        ("p", "error_exit_code_1", "1", ""),
        ("at", "sat", "1", ""),
        ("gone", "sat", "1", point(1.0, 1.0)),
    ]
    scored = score(tool(tmp_path / "t", rows, category), benchmarks)
    assert [s.rounded for s in scored] == [10, 10, -150, 0, 10, 0, 0, 0, -150, 0]
    assert [s.result for s in scored][5:8] == ["timeout", "unknown", "error"]
    assert [s.checked.rounded for s in scored if s.checked] == [
        "correct", "spec_not_violated", "correct_up_to_tolerance", "no_ce", "unsupported"]  # fmt: skip
    (total,) = totals(scored)
    assert (total.rows, total.sat, total.unsat, total.tolerated) == (10, 2, 1, 1)
    assert (total.incorrect, total.points, total.points_exact) == (2, -270, -270)


def test_another_tools_counterexample_proves_an_unsat_wrong(
    benchmarks: Path, tmp_path: Path
) -> None:
    ours = tool(
        tmp_path / "ours",
        [("p", "unsat", "1", ""), ("at", "unsat", "1", ""), ("q", "unsat", "1", "")],
    )
    theirs = tool(
        tmp_path / "theirs",
        [
            ("p", "sat", "1", CLASSES["inside"][0]),
            ("at", "sat", "1", point(0.1, 0.75)),
            ("q", "sat", "1", point(1, 1)),
        ],
    )
    scored = score(ours, benchmarks, against=[theirs])
    assert [(s.rounded, s.exact) for s in scored] == [(-150, -150), (-150, 10), (10, 10)]
    tolerated = tool(tmp_path / "other", [("p", "sat", "1", CLASSES["just outside"][0])])
    assert [s.rounded for s in score(ours, benchmarks, against=[tolerated])] == [10, 10, 10]


def test_malformed_results(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"results\.csv: no such file"):
        results(tmp_path)
    for line, message in (
        ("a,b,c", "line 1: expected category"),
        ("a,b,c,1,maybe,1", "'maybe' is no result"),
    ):
        (tmp_path / "results.csv").write_text(line)
        with pytest.raises(SpecError, match=message):
            results(tmp_path)
    assert [word(w) for w in ("UNSAT", "sat", "timed-out", "", "error_nonmaximal x")] == [
        "unsat", "sat", "timeout", "unknown", "unknown"]  # fmt: skip


def test_several_networks_are_neutral(benchmarks: Path, tmp_path: Path) -> None:
    (tmp_path / "results.csv").write_text(
        "small,\"[('f','a.onnx'),('g','b.onnx')]\",vnnlib/p.vnnlib,0.1,sat,1\n"
    )
    (scored,) = score(tmp_path, benchmarks)
    assert (scored.rounded, scored.checked.rounded) == (0, "unsupported")


def test_our_own_counterexamples_are_correct(benchmarks: Path, tmp_path: Path, monkeypatch) -> None:
    """From bench to score: what we claim passes the checker."""
    from calipers.evaluate import bench as module

    monkeypatch.setattr(
        module, "_decided", lambda left, _, settings: (solve(t, settings) for t in left)
    )
    todo = tasks(benchmarks / "small")
    rows = bench(todo, out=tmp_path / "r.csv", settings=Settings(save=tmp_path / "tool"))
    lines = [f"small,{r.onnx},{r.vnnlib},0,{r.result},{r.seconds}\n" for r in rows]
    (tmp_path / "tool" / "results.csv").write_text("".join(lines))
    scored = score(tmp_path / "tool", benchmarks)
    assert [(s.result, s.rounded, s.exact) for s in scored] == [("sat", 10, 10), ("unsat", 10, 10)]


# -- other tools -------------------------------------------------------------------------------------------------


def test_tools_are_compared_and_their_witnesses_replayed(benchmarks: Path, tmp_path: Path) -> None:
    ours = tool(
        tmp_path / "ours",
        [("p", "unsat", "1", ""), ("q", "unsat", "2", ""), ("at", "unknown", "3", "")],
    )
    theirs = tool(
        tmp_path / "theirs",
        [("p", "sat", "4", CLASSES["inside"][0]), ("q", "sat", "5", point(1.0, 1.0)), ("at", "unsat", "6", ""),
         ("other", "sat", "1", "")],
    )  # fmt: skip
    pairs = compare(ours, theirs, benchmarks=benchmarks)
    assert [p.contradicts for p in pairs] == [True, True, False]
    assert pairs[0].replayed.rounded == "correct"  # they are right
    assert pairs[1].replayed.rounded == "spec_not_violated"  # they are not
    (found,) = compared(pairs)
    assert (found.both, found.ours_only, found.theirs_only, found.contradictions) == (2, 0, 1, 2)
    assert (found.ours_seconds, found.theirs_seconds) == (3, 9)


# -- the commands ------------------------------------------------------------------------------------------------


def test_score_and_compare_on_the_command_line(run, benchmarks: Path, tmp_path: Path) -> None:
    good = tool(
        tmp_path / "good", [("p", "sat", "1", CLASSES["inside"][0]), ("q", "unsat", "1", "")]
    )
    bad = tool(tmp_path / "bad", [("p", "unsat", "1", ""), ("q", "sat", "1", point(1.0, 1.0))])
    code, out, _ = run(
        "vnncomp", "score", good, "--benchmarks", benchmarks, "--json", tmp_path / "a.json"
    )
    assert code == 0
    assert "20" in out
    content = json.loads((tmp_path / "a.json").read_text())
    assert content["categories"][0]["points"] == 20
    assert content["rows"][0]["counterexample"]["exact"] == "correct"
    code, out, _ = run("vnncomp", "score", bad, "--benchmarks", benchmarks, "--against", good)
    assert code == 1
    assert "-300" in out
    assert "spec_not_violated (-150)" in out
    code, out, _ = run(
        "vnncomp", "compare", good, bad, "--benchmarks", benchmarks, "--plot", tmp_path / "c.svg"
    )
    assert code == 1
    assert out.count("CONTRADICTION") == 2
    assert "its witness: spec_not_violated" in out
    assert "bad: 2" in (tmp_path / "c.svg").read_text()
    code, _, err = run("vnncomp", "score", tmp_path, "--benchmarks", benchmarks)
    assert code == 2
    assert "no such file" in err


def test_init_writes_four_scripts_once(run, tmp_path: Path) -> None:
    code, out, _ = run("vnncomp", "init", tmp_path / "scripts")
    assert code == 0
    assert sorted(Path(line).name for line in out.split()) == sorted(SCRIPTS)
    for name in SCRIPTS:
        file = tmp_path / "scripts" / name
        assert file.stat().st_mode & 0o777 == 0o755
        assert b"\r" not in file.read_bytes()
        subprocess.run(["bash", "-n", str(file)], check=True)
        assert "kill" not in file.read_text()
    code, _, err = run("vnncomp", "init", tmp_path / "scripts")
    assert code == 2
    assert "exists already" in err


def test_run_instance_writes_verdict_and_counterexample(benchmarks: Path, tmp_path: Path) -> None:
    """With a stand-in for the installed program on the path."""
    scripts = tmp_path / "scripts"
    write_scripts(scripts)
    stub = tmp_path / "bin" / "calipers"
    stub.parent.mkdir()
    stub.write_text(
        f'#!/bin/sh\nexec {sys.executable} -c "from calipers.cli import main; main()" "$@"\n'
    )
    stub.chmod(0o755)
    environment = {**os.environ, "PATH": f"{stub.parent}:{os.environ['PATH']}"}
    folder, out = benchmarks / "small", tmp_path / "out.txt"

    def script(name: str, *arguments: object) -> int:
        command = ["bash", str(scripts / name), "v1", "small", *map(str, arguments)]
        return subprocess.run(command, env=environment, capture_output=True, check=False).returncode

    files = folder / "onnx" / "net.onnx", folder / "vnnlib" / "p.vnnlib"
    assert script("prepare_instance.sh", *files) == 0
    assert script("run_instance.sh", *files, out, "30.0") == 0
    lines = out.read_text().splitlines()
    assert lines[0] == "sat"
    (tmp_path / "ce").write_text("\n".join(lines[1:]))
    assert check(tmp_path / "ce", *files).exact == "correct"
    assert script("run_instance.sh", folder / "none.onnx", files[1], out, "30") == 0
    assert out.read_text() == "unknown\n"
    assert script("run_instance.sh", "[('f','a.onnx'),('g','b.onnx')]", files[1], out, "30") == 0
    assert out.read_text() == "unknown\n"
    assert subprocess.run(
        ["bash", str(scripts / "run_instance.sh"), "v2"], capture_output=True, check=False
    ).returncode
    assert script("post_install.sh") == 0
    stub.write_text("#!/bin/sh\necho timed-out\n")
    assert script("run_instance.sh", *files, out, "1") == 0
    assert out.read_text() == "timeout\n"
