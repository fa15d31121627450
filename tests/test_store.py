import json
import math
import signal
import sqlite3
import subprocess
import sys
import textwrap

import pytest
import torch

from calipers import ThreatModel
from calipers.bracket import Bracket
from calipers.data import load
from calipers.errors import StoreMismatch
from calipers.evaluate import audit
from calipers.evaluate.cascade import select
from calipers.evaluate.store import Store, code_digest, model_digest
from calipers.files import write_atomically
from calipers.models import load_model

THREAT = ThreatModel(math.inf, "0.1")
STAGES = select(["clean", "interval", "fgsm", "crown_ibp", "pgd-20"])


def digits(n=60):
    data = load("digits")
    return data.x[:n], data.y[:n]


def outcome(result):
    """What must not depend on interruptions."""
    rows = [(r.name, r.tried, r.decided, r.note) for r in result.methods]
    return result.verdicts, rows, result.certified, result.empirical


class StopAfter:
    """A progress callback that presses Ctrl-C after some batches."""

    def __init__(self, batches):
        self.left = batches

    def __call__(self, _):
        self.left -= 1
        if self.left <= 0:
            raise KeyboardInterrupt


@pytest.mark.parametrize("batches", [1, 4, 11])
def test_interrupted_and_resumed_is_uninterrupted(tmp_path, batches):
    network = load_model("digits_pgd")
    whole = audit(network, digits(), THREAT, cascade=STAGES, chunk=7)
    partial = audit(
        network,
        digits(),
        THREAT,
        cascade=STAGES,
        chunk=7,
        run=tmp_path,
        progress=StopAfter(batches),
    )
    assert partial.stopped == "interrupted"
    assert partial.unknown > whole.unknown
    assert partial.cut.any()
    resumed = audit(network, digits(), THREAT, cascade=STAGES, chunk=13, run=tmp_path)
    assert outcome(resumed) == outcome(whole)
    assert torch.allclose(resumed.bracket.lower, whole.bracket.lower, rtol=1e-9, atol=1e-9)
    assert torch.allclose(resumed.bracket.upper, whole.bracket.upper, atol=1e-5)
    again = audit(network, digits(), THREAT, cascade=STAGES, run=tmp_path, progress=StopAfter(1))
    assert again.stopped is None  # nothing was left to do, so nobody was called
    assert outcome(again) == outcome(whole)
    assert torch.equal(again.bracket.upper, resumed.bracket.upper)
    assert torch.equal(again.bracket.witness, resumed.bracket.witness)


def test_killed_and_resumed_is_uninterrupted(tmp_path):
    script = textwrap.dedent(
        f"""
        import math, os, signal
        from calipers import ThreatModel, audit
        from calipers.data import load
        from calipers.evaluate.cascade import select
        from calipers.models import load_model
        left = [9]
        def progress(_):
            left[0] -= 1
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)
        data = load("digits")
        stages = select(["clean", "interval", "fgsm", "crown_ibp", "pgd-20"])
        audit(load_model("digits_pgd"), (data.x[:60], data.y[:60]), ThreatModel(math.inf, "0.1"),
              cascade=stages, chunk=7, run={str(tmp_path)!r}, progress=progress)
        """  # noqa: S608
    )
    killed = subprocess.run([sys.executable, "-c", script], timeout=120, check=False)
    assert killed.returncode == -signal.SIGKILL
    with sqlite3.connect(tmp_path / "run.sqlite") as connection:
        assert (
            connection.execute("SELECT count(*) FROM unit").fetchone()[0] == 57
        )  # batches of 1, 7, 7, ...
    connection.close()
    network = load_model("digits_pgd")
    resumed = audit(network, digits(), THREAT, cascade=STAGES, run=tmp_path)
    assert outcome(resumed) == outcome(audit(network, digits(), THREAT, cascade=STAGES))
    assert any(r.stored for r in resumed.methods)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"threat": ThreatModel(math.inf, "0.11")}, "threat"),
        ({"threat": ThreatModel(2, "0.1")}, "threat"),
        ({"data": digits(59)}, "data"),
        ({"seed": 1}, "seed"),
        ({"cascade": STAGES[:2]}, "cascade"),
        ({"model": "digits_standard"}, "model"),
    ],
)
def test_another_identity_is_refused(tmp_path, change, named):
    usual = {"data": digits(), "threat": THREAT, "seed": 0, "cascade": STAGES[:1]}
    audit(load_model("digits_pgd"), **usual, run=tmp_path)
    now = usual | change
    model = load_model(now.pop("model", "digits_pgd"))
    with pytest.raises(StoreMismatch, match=rf"{named}: stored .*, now .*another --run directory"):
        audit(model, **now, run=tmp_path)


def test_the_identity_is_readable(tmp_path):
    result = audit(
        load_model("digits_pgd"), digits(9), THREAT, cascade=STAGES[:1], run=tmp_path / "a" / "b"
    )
    stored = json.loads((tmp_path / "a" / "b" / "run.json").read_text())
    assert stored == result.json()["identity"]
    assert stored["code"] == code_digest()


def test_the_model_digest_sees_parameters_and_graph():
    first, other = load_model("digits_pgd"), load_model("digits_standard")
    assert model_digest(first) == model_digest(load_model("digits_pgd"))
    assert model_digest(first) != model_digest(other)
    with torch.no_grad():
        first.module[1].bias[0] += 1e-6
    assert model_digest(first) != model_digest(load_model("digits_pgd"))


def bracket(n):
    lower = torch.arange(n, dtype=torch.float64) - 5
    return Bracket(lower, lower + 3, torch.rand(n, 2, 3), torch.full((n,), 1e-9))


def test_units_come_back_as_they_went(tmp_path):
    part = bracket(4)
    with Store(tmp_path, {"a": 1}) as store:
        store.add("x", [3, 1, 7, 5], part, 2.0)
        assert store.get("y", part.witness[0]) is None
    with Store(tmp_path, {"a": 1}) as store:
        rows, back, seconds = store.get("x", part.witness[0])
    order = [1, 0, 3, 2]
    assert rows == [1, 3, 5, 7]
    assert seconds == 2.0
    for name in ("lower", "upper", "witness", "rounding"):
        assert torch.equal(getattr(back, name), getattr(part, name)[order])


def test_infinite_ends_are_kept(tmp_path):
    with Store(tmp_path, {}) as store:
        store.add("b", [0, 1], Bracket.unknown(2), 0.0)
        _, back, _ = store.get("b", torch.zeros(2))
    assert back.lower.tolist() == [-math.inf] * 2
    assert back.upper.tolist() == [math.inf] * 2
    assert back.witness is None


def test_one_writer(tmp_path):
    with Store(tmp_path, {}) as store:
        store.add("b", [0], Bracket.unknown(1), 0.0)
        script = f"from calipers.evaluate.store import Store; Store({str(tmp_path)!r}, {{}})"
        second = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False
        )
    assert "another audit is writing there" in second.stderr


def test_directories_that_are_no_runs(tmp_path):
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(StoreMismatch, match="not a run record"):
        Store(tmp_path, {})
    (tmp_path / "run.json").unlink()
    (tmp_path / "run.sqlite").write_bytes(b"x" * 5000)
    with pytest.raises(StoreMismatch, match=r"no run\.json"):
        Store(tmp_path, {})
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(StoreMismatch, match="damaged"):
        Store(tmp_path, {})


def test_files_are_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.txt"
    write_atomically(path, "one")
    write_atomically(path, "zwei ≥")
    assert path.read_text(encoding="utf-8") == "zwei ≥"
    assert oct(path.stat().st_mode & 0o777) == "0o644"
    with pytest.raises(UnicodeEncodeError):
        write_atomically(path, "\ud800")
    assert path.read_text(encoding="utf-8") == "zwei ≥"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]
