"""Audits killed at random moments: after each kill the audit is begun again, and its table must be the undisturbed one.

    python benchmarks/kills.py [--kills 100] [--workers 2] [--samples 100] [--seed 0]

Half of the kills (signal 9) end the process that drives the audit, half a worker. The table is that of
``calipers runs export`` and of its stages, in all columns but seconds, number by number; nothing may be lost from one
start to the next but what was under way. A row per finished audit, and a count at the end.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from calipers import ThreatModel, audit
from calipers.data import load
from calipers.evaluate.cascade import select
from calipers.evaluate.runs import read
from calipers.models import load_model

STAGES = ("clean", "interval", "fgsm", "crown_ibp", "pgd-20", "crown", "alpha_crown", "auto")


def drive(folder: Path, args: argparse.Namespace) -> None:
    """The audit that is killed."""
    audit(
        load_model("digits_pgd"), load("digits"), ThreatModel(math.inf, "0.1"), cascade=select(STAGES),
        samples=args.samples, run=folder, workers=args.workers, chunk=5,
    )  # fmt: skip


def table(folder: Path) -> tuple[object, ...]:
    run = read(folder)
    examples = [r._replace(seconds=0.0) for r in run.records]
    return examples, [t._replace(seconds=0.0) for t in run.stages], run.failures


def units(folder: Path) -> int:
    return sum(t.examples for t in read(folder).stages) if (folder / "run.json").exists() else 0


def started(folder: Path, args: argparse.Namespace) -> subprocess.Popen[bytes]:
    options = [f"--workers={args.workers}", f"--samples={args.samples}"]
    return subprocess.Popen([sys.executable, __file__, "--drive", str(folder), *options])


def workers(pid: int) -> list[int]:
    """The worker processes of a driver."""
    with suppress(OSError):
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return [
            int(c) for c in children if b"spawn_main" in Path(f"/proc/{c}/cmdline").read_bytes()
        ]
    return []


def main(args: argparse.Namespace) -> None:
    draws = random.Random(args.seed)  # noqa: S311
    with tempfile.TemporaryDirectory() as root:
        whole, begin = Path(root) / "whole", time.monotonic()
        started(whole, args).wait()
        usual, expected = time.monotonic() - begin, table(whole)
        print(f"undisturbed: {units(whole)} units in {usual:.1f} s", flush=True)
        kills = {"driver": 0, "worker": 0}
        audits = starts = 0
        while sum(kills.values()) < args.kills:
            audits += 1
            folder, seen, code = Path(root) / str(audits), 0, -1
            while code:
                driver, begin, before = started(folder, args), time.monotonic(), sum(kills.values())
                starts += 1
                while driver.poll() is None and sum(kills.values()) < args.kills:
                    with suppress(subprocess.TimeoutExpired):
                        driver.wait(draws.uniform(0, usual / 2))
                    who = min(kills, key=lambda name: (kills[name], draws.random()))
                    pids = [driver.pid] if who == "driver" else workers(driver.pid)
                    if driver.poll() is None and pids:
                        os.kill(draws.choice(pids), signal.SIGKILL)
                        kills[who] += 1
                code = driver.wait()
                if (
                    sum(kills.values()) == before and not seen
                ):  # nobody disturbed it: so long it takes now
                    usual = time.monotonic() - begin
                if code not in (0, -signal.SIGKILL):
                    raise SystemExit(f"audit {audits}: the driver ended with {code}")
                now = units(folder)
                if now < seen:
                    raise SystemExit(f"audit {audits}: {seen} units, then {now}")
                seen = now
            if table(folder) != expected:
                raise SystemExit(f"audit {audits}: another table; see {folder}")
            print(f"audit {audits}: the same table after {kills} kills so far", flush=True)
        print(f"{kills} kills, {starts} starts, {audits} audits: every table the undisturbed one")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--samples", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--drive", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.drive:
        drive(given.drive, given)
    else:
        main(given)
