import json
import math
import shutil
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
from calipers.errors import StoreError, StoreMismatch
from calipers.evaluate import audit
from calipers.evaluate.cascade import select
from calipers.evaluate.runs import read
from calipers.evaluate.salvage import salvaged
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
    assert stored["identity"] == result.json()["identity"]
    assert stored["identity"]["code"] == code_digest()
    assert stored["starts"][0]["torch"] == torch.__version__
    audit(load_model("digits_pgd"), digits(9), THREAT, cascade=STAGES[:1], run=tmp_path / "a" / "b")
    again = json.loads((tmp_path / "a" / "b" / "run.json").read_text())
    assert again["identity"] == stored["identity"]
    assert len(again["starts"]) == 2


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
    (tmp_path / "run.json").write_text('{"format": 2, "identity": {}}')
    with Store(tmp_path, {}) as store:
        assert "0 results of it were kept" in store.notes[0]
    assert (tmp_path / "run.sqlite.damaged").read_bytes() == b"x" * 5000
    (tmp_path / "b").write_text("a file")
    with pytest.raises(StoreError, match="another --run directory"):
        Store(tmp_path / "b", {})


def test_a_newer_store_is_refused_by_name(tmp_path):
    identity = {"calipers": "9.1"}
    with Store(tmp_path, identity):
        pass
    record = json.loads((tmp_path / "run.json").read_text())
    (tmp_path / "run.json").write_text(json.dumps({**record, "format": 3}))
    before = {p: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(StoreMismatch, match=r'newer version of Calipers \("9\.1", store format 3'):
        Store(tmp_path, {"calipers": "0.1"})
    assert {p: p.read_bytes() for p in tmp_path.iterdir()} == before


CASCADE = {"cascade": ["a: attack", "b: bound"]}


def filled(directory, n=2000):
    with Store(directory, CASCADE) as store:
        for stage in ("a", "b"):
            for i in range(0, n, 100):
                store.add(stage, range(i, i + 100), bracket(100), 1.0, 5.0)
    return (directory / "run.sqlite").stat().st_size


def kept(directory, like):
    with Store(directory, CASCADE) as store:
        found = {stage: store.get(stage, like) for stage in ("a", "b")}
        notes = store.notes
    return {k: f[0] if f else [] for k, f in found.items()}, notes


def test_any_damage_is_found_and_the_rest_is_kept(tmp_path):
    """Bytes overwritten anywhere: never a wrong number, never a refusal. All but a few of the units are still there."""
    size = filled(tmp_path / "whole")
    generator = torch.Generator().manual_seed(0)
    like = torch.zeros(2, 3)
    lost = []
    for case in range(20):
        folder = shutil.copytree(tmp_path / "whole", tmp_path / str(case))
        place = int(torch.randint(size, (), generator=generator))
        length = int(torch.randint(1, 3000, (), generator=generator))
        with (folder / "run.sqlite").open("rb+") as file:
            file.seek(place)
            file.write(bytes(torch.randint(256, (length,), generator=generator).tolist()))
        with Store(folder, CASCADE) as store:
            for stage in ("a", "b"):
                rows, back, _ = store.get(stage, like) or ([], bracket(0), 0.0)
                lower = torch.tensor(rows) % 100 - 5.0
                assert torch.equal(back.lower, lower.double())
                assert torch.equal(back.upper, lower.double() + 3)
                assert {e.work for e in back.lower_evidence} == ({0.05} if rows else set())
                lost.append(2000 - len(rows))
        found, notes = kept(folder, like)  # and mended for good
        assert not notes
        assert sum(map(len, found.values())) == 4000 - sum(lost[-2:])
    assert sum(lost) > 0
    assert max(lost) < 100


@pytest.mark.parametrize("size", [10, 900, 5000, 20_000])
def test_large_points_are_salvaged(tmp_path, size):
    """Whatever the pages that a point takes, and whichever of them lead to others."""
    part = Bracket(torch.arange(60.0) - 30, torch.arange(60.0), torch.rand(60, size))
    with Store(tmp_path, CASCADE) as store:
        store.add("a", range(60), part, 1.0)
    whole = {u[1]: u for u in salvaged(tmp_path / "run.sqlite") if len(u) == 9}
    assert sorted(whole) == list(range(60))
    for row, unit in whole.items():
        assert unit[2] == row - 30
        assert unit[5] == part.witness[row].numpy().tobytes()


def test_a_truncated_file_is_mended(tmp_path):
    size = filled(tmp_path)
    with (tmp_path / "run.sqlite").open("rb+") as file:
        file.truncate(size // 2)
    found, notes = kept(tmp_path, torch.zeros(2, 3))
    assert "was damaged" in notes[0]
    assert sum(map(len, found.values())) > 1900


def test_a_changed_number_is_measured_again(tmp_path):
    """A flip that leaves the file a sound database, such as a bound that turned positive."""
    filled(tmp_path, 100)
    with sqlite3.connect(tmp_path / "run.sqlite") as connection:
        connection.execute("UPDATE unit SET lower = 1.0 WHERE stage = 'b' AND example = 7")
    connection.close()
    with Store(tmp_path, CASCADE) as store:
        rows, _, _ = store.get("b", torch.zeros(2, 3))
        assert rows == [i for i in range(100) if i != 7]
        assert "1 stored results of b do not fit" in store.notes[0]


def test_an_audit_measures_again_what_was_damaged(tmp_path):
    network = load_model("digits_pgd")
    whole = audit(network, digits(), THREAT, cascade=STAGES, run=tmp_path)
    file = tmp_path / "run.sqlite"
    content = bytearray(file.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 4096] = b"\7" * 4096
    file.write_bytes(content)
    again = audit(network, digits(), THREAT, cascade=STAGES, run=tmp_path)
    assert outcome(again) == outcome(whole)
    assert "run.sqlite was damaged" in again.notes[-1]


def test_a_full_disk_loses_nothing(tmp_path):
    filled(tmp_path, 100)
    with Store(tmp_path, CASCADE) as store:
        pages = store.connection.execute("PRAGMA page_count").fetchone()[0]
        store.connection.execute(f"PRAGMA max_page_count={pages}")
        with pytest.raises(
            StoreError, match=r"full; everything finished before is kept: make room"
        ):
            store.add("c", range(100, 2100), bracket(2000), 1.0)
    found, notes = kept(tmp_path, torch.zeros(2, 3))
    assert found == {"a": list(range(100)), "b": list(range(100))}
    assert not notes


def as_nobody(directory):
    """What a store says to a user who may not write in ``directory``."""
    script = f"""
import os
from calipers.evaluate.store import Store
from calipers.errors import StoreError
if hasattr(os, "geteuid") and os.geteuid() == 0:
    os.seteuid(65534)
try:
    Store({str(directory)!r}, {CASCADE})
except StoreError as error:
    print(error)
"""
    return subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True
    ).stdout


def test_a_read_only_directory_is_refused_before_anything_is_measured(tmp_path):
    for parent in [tmp_path, *tmp_path.parents[:2]]:
        parent.chmod(0o755)
    filled(tmp_path / "old", 100)
    (tmp_path / "new").mkdir()
    for folder in (tmp_path / "old", tmp_path / "new"):
        for file in folder.iterdir():
            file.chmod(0o444)
        folder.chmod(0o555)
        said = as_nobody(folder)
        folder.chmod(0o755)
        assert "another --run directory" in said, folder


def test_failures_are_kept_until_they_are_measured(tmp_path):
    with Store(tmp_path, CASCADE) as store:
        store.fail("a", [3, 5], "out of memory")
        store.fail("a", [5], "the worker died")
        assert store.failures == [("a", 3, "out of memory"), ("a", 5, "the worker died")]
        store.add("a", [3], bracket(1), 1.0)
        assert store.failures == [("a", 5, "the worker died")]
        assert store.get("a", torch.zeros(2, 3))[0] == [3]
    assert read(tmp_path).failures == (("a", 5, "the worker died"),)


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
