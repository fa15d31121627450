"""Workers: the same results as one process; whoever dies, nothing is lost and nothing is made up."""

import math
import os
import random
import signal
import sys
import threading
import time
from contextlib import suppress

import pytest
import torch
from torch import nn

from calipers import ThreatModel, audit
from calipers.bracket import Verdict
from calipers.data import load
from calipers.errors import WorkerError
from calipers.evaluate import spread, workers
from calipers.evaluate.cascade import Stage, select
from calipers.evaluate.runs import read
from calipers.evaluate.spread import Batch, Failed, limit_memory
from calipers.evaluate.workers import Lost
from calipers.models import load_model
from stored_runs import settled

THREAT = ThreatModel(math.inf, "0.1")
STAGES = select(["clean", "interval", "fgsm", "crown_ibp", "pgd-20", "crown"])
KILLS = 5


def digits(n=60):
    data = load("digits")
    return data.x[:n], data.y[:n]


def measure(directory, **options):
    return audit(
        load_model("digits_pgd"), digits(), THREAT, cascade=STAGES, run=directory, workers=1, chunk=4,
        **options,
    )  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    units = []
    result = measure(folder, progress=units.append)
    return result, settled(folder), len(units)


def test_two_workers_say_what_one_process_says(undisturbed):
    here = audit(load_model("digits_pgd"), digits(), THREAT, cascade=STAGES)
    two = audit(load_model("digits_pgd"), digits(), THREAT, cascade=STAGES, workers=2)
    for result in (undisturbed[0], two):
        assert result.verdicts == here.verdicts
        assert [(r.tried, r.decided, r.note) for r in result.methods] == [
            (r.tried, r.decided, r.note) for r in here.methods
        ]
        assert torch.allclose(result.bracket.lower, here.bracket.lower, rtol=1e-9, atol=1e-9)
        assert torch.allclose(result.bracket.upper, here.bracket.upper, atol=1e-5)
        broken = torch.tensor([v is Verdict.VULNERABLE for v in result.verdicts])
        points = result.bracket.witness[broken]
        assert THREAT.around(result.x[broken]).contains(points).all()


def soon(pid, draws):
    """End a process at a moment within the next batches."""

    def kill():
        with suppress(ProcessLookupError):
            os.kill(pid(), signal.SIGKILL)

    threading.Timer(draws.uniform(0.0, 0.03), kill).start()


def test_killed_workers_change_nothing(undisturbed, tmp_path, monkeypatch):
    draws, alive, units = random.Random(0), [], [0]  # noqa: S311
    moments = set(draws.sample(range(undisturbed[2] - 5), KILLS))
    new = workers.Team._new

    def noted(team):
        alive.append(new(team))
        return alive[-1]

    def kill(_):
        units[0] += 1
        if units[0] in moments:
            soon(lambda: alive[-1].process.pid, draws)

    monkeypatch.setattr(workers.Team, "_new", noted)
    measure(tmp_path, progress=kill)
    assert len(alive) > KILLS // 2
    assert settled(tmp_path) == undisturbed[1]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a fork of this process")
def test_a_killed_driver_loses_the_batch_in_progress_only(undisturbed, tmp_path):
    draws, counts = random.Random(1), [0]  # noqa: S311
    for _ in range(KILLS):
        moment = draws.randrange(1, undisturbed[2] // (KILLS - 1))
        pid = os.fork()
        if not pid:
            left = [moment]

            def kill(_, left=left):
                left[0] -= 1
                if not left[0]:
                    soon(os.getpid, draws)

            with suppress(BaseException):
                measure(tmp_path, progress=kill)
            os._exit(0)
        os.waitpid(pid, 0)
        counts.append(sum(t.examples for t in read(tmp_path).stages))
    assert counts == sorted(counts)
    assert counts[1] < counts[-1]
    measure(tmp_path)
    assert settled(tmp_path) == undisturbed[1]


def deadly(network, region, spec, **_):
    """A bound that the second example kills and the fourth fills the memory of."""
    marks = {round(float(v), 4) for v in region.center.flatten(1).sum(1)}
    x = digits(4)[0].flatten(1).sum(1).tolist()
    if round(x[1], 4) in marks:
        os.kill(os.getpid(), signal.SIGKILL)
    if round(x[3], 4) in marks:
        torch.empty(1 << 33, dtype=torch.uint8)
    return torch.full(spec.d.shape, -1.0, dtype=torch.float64)


def test_a_crash_and_a_lack_of_memory_cost_one_example_each(tmp_path, monkeypatch):
    monkeypatch.setattr(spread, "_share", lambda _: 1 << 31)
    clean, *_ = select(["clean"])
    out = audit(
        load_model("digits_pgd"), digits(10), THREAT, cascade=(clean, Stage("deadly", "bound", deadly)),
        run=tmp_path, workers=1,
    )  # fmt: skip
    row = out.methods[1]
    assert row.tried == 10 - 2 - out.methods[0].decided
    assert "1 failed: the worker died (exit code -9)" in row.note
    assert "1 failed: out of memory" in row.note
    failed = {example: reason for _, example, reason in read(tmp_path).failures}
    assert set(failed) == {1, 3}
    assert failed[3] == "out of memory"
    for example in (1, 3):
        assert out.verdicts[example] is Verdict.UNKNOWN


def test_what_is_tried_again():
    four = Batch(torch.arange(4), math.inf)
    died, late = Lost(-9), Lost(None)
    (again,), _ = spread._after(four, died)
    assert (again.rows.tolist(), again.deaths) == ([0, 1, 2, 3], 1)
    halves, _ = spread._after(again, died)
    assert [b.rows.tolist() for b in halves] == [[0, 1], [2, 3]]
    singles, _ = spread._after(halves[0], died)
    assert [(b.rows.tolist(), b.deaths) for b in singles] == [([0], 0), ([1], 0)]
    (last,), _ = spread._after(singles[0], died)
    assert spread._after(last, died)[0] == []
    assert "exit code -9" in spread._after(last, died)[1]
    assert len(spread._after(four, Failed("out of memory"))[0]) == 2
    assert spread._after(four, Failed("")) == ([], "")
    assert spread._after(four, late)[0] == []


def sleepy(network, region, spec, **_):
    time.sleep(0.08 * len(region))
    return torch.full(spec.d.shape, -1.0, dtype=torch.float64)


def test_time_and_ctrl_c_stop_workers():
    clean, *_ = select(["clean"])
    network = load_model("digits_pgd")
    stages = (clean, Stage("sleepy", "bound", sleepy))
    began = []

    def press(at):
        if at.stage == "sleepy" and at.done > 5 and not began:
            began.append(at)
            os.kill(os.getpid(), signal.SIGINT)

    out = audit(network, digits(200), THREAT, cascade=stages, workers=1, chunk=5, progress=press)
    assert out.stopped == "interrupted"
    assert 5 < out.methods[1].tried <= 20
    assert began[0].rate > 0
    assert began[0].eta < math.inf
    begin = time.perf_counter()
    out = audit(network, digits(500), THREAT, cascade=stages, workers=1, seconds=12)
    assert time.perf_counter() - begin < 12 + spread.GRACE + 5
    assert out.stopped == "time"
    assert out.methods[1].note in ("stopped by time", "not reached")


def test_precision_stops_when_the_interval_is_narrow_enough():
    network = load_model("digits_pgd")
    whole = audit(network, digits(), THREAT, cascade=STAGES, chunk=5)
    wide = audit(network, digits(), THREAT, cascade=STAGES, chunk=5, precision=0.5)
    assert whole.unknown < 15
    assert wide.stopped == "precision"
    assert wide.unknown <= 30
    assert wide.empirical - wide.certified <= 0.5
    assert sum(r.work for r in wide.methods) < sum(r.work for r in whole.methods)
    assert wide.cut.any()
    with pytest.raises(ValueError, match=r"precision: 2 is no share"):
        audit(network, digits(), THREAT, precision=2)


class Local(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(64, 10)
        self.change = lambda y: y  # cannot be sent

    def forward(self, x):
        return self.change(self.linear(x.flatten(1)))


def test_what_cannot_be_sent_is_named():
    with pytest.raises(WorkerError, match="cannot be sent to other processes"):
        audit(Local(), digits(8), THREAT, cascade=STAGES[:1], workers=1)
    with pytest.raises(ValueError, match="workers: 0 is not at least 1"):
        audit(load_model("digits_pgd"), digits(8), THREAT, workers=0)


def other():
    return load_model("digits_standard")


def test_a_worker_with_another_network_is_refused():
    with pytest.raises(WorkerError, match="is not the one that is audited"):
        audit(
            load_model("digits_pgd"), digits(8), THREAT, cascade=STAGES[:1], workers=1, loader=other
        )


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_cap_is_on_top_of_what_is_there():
    import resource

    before = resource.getrlimit(resource.RLIMIT_AS)
    try:
        limit_memory(1 << 30)
        with pytest.raises(RuntimeError, match="allocate"):
            torch.empty(1 << 31, dtype=torch.uint8)
        assert len(torch.empty(1 << 26, dtype=torch.uint8)) == 1 << 26
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
