"""Run directories read back: what the audit said is what is read; nothing is written; damage is named."""

import csv
import io
import json
import math
import sqlite3

import pytest
import torch

from calipers import ThreatModel, audit
from calipers.data import load
from calipers.errors import DataError, StoreMismatch
from calipers.evaluate.runs import EXPORTS, difference, exported, find, overview, read
from calipers.models import load_model

INF = math.inf


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    network, data = load_model("digits_pgd"), load("digits")
    results = {
        name: audit(network, data, ThreatModel(INF, eps), samples=30, run=root / name)
        for name, eps in (("small", "0.02"), ("large", "0.1"))
    }
    return root, results


@pytest.mark.parametrize("name", ["small", "large"])
def test_a_run_reads_back_as_what_the_audit_said(runs, name):
    root, results = runs
    run, result = read(root / name), results[name]
    said = {v.name.lower(): n for v, n in result.counts.items()}
    assert run.counts == said
    assert [r.example for r in run.records] == list(range(30))
    assert [r.verdict for r in run.records] == [v.name.lower() for v in result.verdicts]
    lower = torch.tensor([r.lower for r in run.records], dtype=torch.float64)
    upper = torch.tensor([r.upper for r in run.records], dtype=torch.float64)
    assert torch.equal(lower, result.bracket.lower)
    assert torch.equal(upper, result.bracket.upper)
    assert {t.stage: t.examples for t in run.stages if t.examples} == {
        r.name: r.tried for r in result.methods if r.tried
    }
    assert sum(t.seconds for t in run.stages) == pytest.approx(sum(r.seconds for r in run.records))


def test_reading_changes_nothing(runs):
    root, _ = runs
    before = {p: p.read_bytes() for p in (root / "small").iterdir()}
    read(root / "small")
    assert {p: p.read_bytes() for p in (root / "small").iterdir()} == before


def test_a_difference_names_what_was_measured_and_which_examples(runs):
    root, _ = runs
    small, large = read(root / "small"), read(root / "large")
    found = difference(small, large)
    assert list(found.identity) == ["threat"]
    wanted = [i for i in range(30) if small.records[i].verdict != large.records[i].verdict]
    assert [a.example for a, _ in found.verdicts] == wanted
    assert found.alone == (0, 0)
    assert not difference(small, small).verdicts


def test_exports_hold_the_same_numbers(runs):
    run = read(runs[0] / "large")
    rows = list(csv.DictReader(io.StringIO(exported(run, ".csv").decode())))
    assert [float(r["lower"]) for r in rows] == [r.lower for r in run.records]
    assert [r["verdict"] for r in rows] == [r.verdict for r in run.records]
    content = json.loads(exported(run, ".json"), parse_constant=pytest.fail)
    assert len(content["examples"]) == 30
    assert content["run"] == run.identity
    tex = exported(run, ".tex").decode()
    assert r"crown\_ibp & " in tex
    assert tex.count(r"\\") == len(run.stages) + 2
    with pytest.raises(ValueError, match="parquet"):
        exported(run, ".xlsx")


def test_parquet_holds_the_same_numbers(runs):
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    run = read(runs[0] / "large")
    table = parquet.read_table(io.BytesIO(EXPORTS[".parquet"](run)))
    assert table["upper"].to_pylist() == [r.upper for r in run.records]


def test_what_is_no_run_is_named(tmp_path):
    with pytest.raises(DataError, match="not the run directory"):
        read(tmp_path)
    with pytest.raises(DataError, match="no such folder"):
        find(tmp_path / "none")
    (tmp_path / "run.json").write_text("{}")
    (tmp_path / "run.sqlite").write_bytes(b"not a database, but long enough to be read as one" * 40)
    with pytest.raises(StoreMismatch, match="damaged"):
        read(tmp_path)
    ((directory, said),) = overview(find(tmp_path))
    assert directory == tmp_path
    assert "damaged" in said


def test_a_run_that_is_being_written_is_named(runs, tmp_path):
    for file in (runs[0] / "small").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    writer = sqlite3.connect(tmp_path / "run.sqlite", isolation_level=None)
    writer.execute("PRAGMA locking_mode=EXCLUSIVE")
    writer.execute("PRAGMA journal_mode=WAL")
    writer.execute("BEGIN EXCLUSIVE")
    try:
        with pytest.raises(StoreMismatch, match="writing there"):
            read(tmp_path)
    finally:
        writer.close()


def test_the_command(runs, run, tmp_path):
    root, _ = runs
    code, out, _ = run("runs", "list", root)
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == ["run", "large", "small"]
    assert "crown_ibp" in run("runs", "show", root / "small")[1]
    code, out, _ = run("runs", "diff", root / "small", root / "large")
    assert code == 0
    assert "examples with another verdict" in out
    file = tmp_path / "a.csv"
    assert run("runs", "export", root / "small", "--out", file)[0] == 0
    assert file.read_bytes() == exported(read(root / "small"), ".csv")
    assert run("runs", "export", root / "small", "--out", tmp_path / "a.xyz")[0] == 2
