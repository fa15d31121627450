"""Memory: estimated before, halved where an allocation fails, and a clear end where one example does not fit."""

from __future__ import annotations

import math
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

import calipers as cp
import networks
from calipers.bounds import BOUNDS, ladder, planner, preactivations
from calipers.bounds.planner import example_bytes, examples, in_parts, out_of_memory
from calipers.errors import CalipersError, MemoryLimit
from calipers.sets import Region
from calipers.spec import Spec
from networks import ARCHITECTURES

F64 = torch.float64
CPU = (
    "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate "
    "8589934592 bytes. Error code 12 (Cannot allocate memory)"
)


def setting(network: Any, count: int = 10):
    x = networks.inputs(network, count, 11)
    return Region.ball(x, 0.1, math.inf, 0.0, 1.0), Spec.label(torch.arange(count) % 3, 3)


@pytest.mark.parametrize(
    ("error", "is_one"),
    [
        (RuntimeError(CPU), True),
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (torch.OutOfMemoryError("x"), True),
        (MemoryError(), True),
        (RuntimeError("not enough memory: you tried to allocate 1 byte"), True),
        (RuntimeError("std::bad_alloc"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_what_counts_as_out_of_memory(error: BaseException, is_one: bool) -> None:
    assert out_of_memory(error) == is_one


class Fails:
    """Propagation that fails for more than ``fits`` examples at a time, as an allocator would."""

    def __init__(self, real: Any, fits: int) -> None:
        self.real, self.fits = real, fits
        self.sizes: list[int] = []
        self.limits: list[int] = []

    def __call__(self, state: Any, **keywords: Any) -> None:
        self.sizes.append(state.batch)
        self.limits.append(state.memory)
        if state.batch > self.fits:
            raise RuntimeError(CPU)
        self.real(state, **keywords)


@pytest.mark.parametrize("method", ["interval", "crown_ibp", "crown"])
def test_a_failed_allocation_halves_the_batch(monkeypatch: Any, method: str) -> None:
    network = ARCHITECTURES["residual"](0)
    region, spec = setting(network)
    whole = BOUNDS[method](network, region, spec, dtype=F64, rigorous=True)
    boxes = preactivations(network, region, dtype=F64)
    fails = Fails(ladder.propagate, 3)
    monkeypatch.setattr(ladder, "propagate", fails)
    again = BOUNDS[method](network, region, spec, dtype=F64, rigorous=True)
    torch.testing.assert_close(again, whole, rtol=1e-12, atol=1e-12)
    tried = list(dict.fromkeys(fails.sizes))
    assert tried == [10, 5, 2]
    assert min(fails.limits) < max(fails.limits)
    for name, box in preactivations(network, region, dtype=F64).items():
        for end, known in zip(box, boxes[name], strict=True):
            torch.testing.assert_close(end, known, rtol=1e-12, atol=1e-12)


def test_one_example_that_does_not_fit_is_a_clear_error(monkeypatch: Any) -> None:
    network = networks.mlp(0)
    region, spec = setting(network)
    monkeypatch.setattr(ladder, "propagate", Fails(ladder.propagate, 0))
    with pytest.raises(MemoryLimit, match=r"a single example do not fit.*can't allocate") as found:
        cp.crown(network, region, spec)
    assert isinstance(found.value, CalipersError)
    assert isinstance(found.value, MemoryError)
    assert found.value.__cause__ is None  # the failed attempt's tensors are not kept alive


def test_other_errors_pass_through(monkeypatch: Any) -> None:
    network = networks.mlp(0)
    region, spec = setting(network)

    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(ladder, "propagate", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        cp.crown(network, region, spec)


def test_an_audit_says_unknown_where_memory_is_short(monkeypatch: Any) -> None:
    """Never robust: the stage stops, the reason is in its row, attacks go on."""
    from calipers.data import load
    from calipers.models import load_model

    network, data = load_model("digits_pgd"), load("digits")
    monkeypatch.setattr(ladder, "propagate", Fails(ladder.propagate, 0))
    audit = cp.audit(network, (data.x[:20], data.y[:20]), cp.ThreatModel(math.inf, "0.05"))
    assert audit.certified == 0.0
    notes = [row.note for row in audit.methods if row.side == "bound"]
    assert "stopped: out of memory" in notes
    assert audit.unknown > 0


def test_examples_go_in_the_order_given_and_all_of_them() -> None:
    seen: list[tuple[slice, int]] = []

    def run(rows: slice, limit: int) -> list[int]:
        seen.append((rows, limit))
        if rows.stop - rows.start > 4:
            raise MemoryError
        return list(range(rows.start, rows.stop))

    parts = in_parts(run, 11, size=9, memory=1000, least=300)
    assert [i for part in parts for i in part] == list(range(11))
    assert [s for s, _ in seen][:3] == [slice(0, 9), slice(0, 4), slice(4, 8)]
    assert {limit for _, limit in seen} == {1000, 500}
    assert in_parts(run, 0, size=3, memory=None) == [[]]


def test_the_estimate_follows_the_limit() -> None:
    network = ARCHITECTURES["conv"](0)
    each = example_bytes(network, 2, F64)
    assert examples(network, 2, 20 * each, F64) == 10  # half is for backward rows
    assert examples(network, 2, 1, F64) == 1
    assert example_bytes(network, 2, torch.float32) * 2 == each
    assert example_bytes(network, 9, F64) > each


PROGRAM = """
import math, resource, sys, torch
torch.set_num_threads(1)
sys.path.insert(0, {tests!r})
import calipers as cp
from calipers.bounds import BOUNDS
from networks import Builder
from peak import peak

b = Builder((3, 32, 32))
h = b.relu(b.conv(b.x, 16))
h = b.relu(b.conv(h, 16, 3, 2))
h = b.relu(b.conv(h, 32, 3, 2))
b.linear(h, 10)
net = b.network()
x = torch.rand({batch}, 3, 32, 32)
region = cp.ThreatModel(math.inf, 0.001).around(x)
spec = cp.Spec.label(torch.zeros({batch}, dtype=torch.int64), 10)
bound = BOUNDS[{method!r}]
with torch.no_grad():
    bound(net, region[:1], spec[:1])
    region.frame(torch.float32)
    {setup}
    before = peak()
    low = bound(net, region, spec, memory={memory})
    print(peak() - before, tuple(low.shape), bool(torch.isfinite(low).all()))
"""


def measured(method: str, batch: int, memory: int, setup: str = "pass") -> int:
    from pathlib import Path

    code = PROGRAM.format(
        tests=str(Path(__file__).parent), batch=batch, method=method, memory=memory, setup=setup
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    size, _, rest = done.stdout.partition(" ")
    assert rest.strip() == f"({batch}, 9) True"
    return int(size)


@pytest.mark.parametrize(("method", "batch"), [("crown_ibp", 300), ("crown", 12)])
def test_the_limit_is_kept(method: str, batch: int) -> None:
    """Measured on the process, whatever the allocator adds."""
    limit = 64 << 20
    assert measured(method, batch, limit) <= limit


def test_without_a_limit_more_is_taken() -> None:
    assert measured("crown_ibp", 300, 4 << 30) > 64 << 20


def test_a_real_failed_allocation_goes_on_with_less() -> None:
    """The address space is limited to a little more than is in use; the plan assumes far more."""
    setup = (
        "import re; used = int(re.search(r'VmSize:\\s+(\\d+)', open('/proc/self/status').read())[1]) * 1024; "
        "resource.setrlimit(resource.RLIMIT_AS, (used + (100 << 20),) * 2)"
    )
    assert measured("crown_ibp", 300, 4 << 30, setup) <= 100 << 20


def test_planted_no_split(monkeypatch: Any) -> None:
    """A planner that never splits breaks the measured limit's promise: seen by the sizes that run."""
    monkeypatch.setattr(ladder, "examples", lambda *_: 10**9)
    network = networks.mlp(0)
    region, spec = setting(network)
    fails = Fails(ladder.propagate, 10)
    monkeypatch.setattr(ladder, "propagate", fails)
    cp.interval(network, region, spec, memory=1)
    assert fails.sizes == [10]
    monkeypatch.setattr(ladder, "examples", planner.examples)
    fails.sizes.clear()
    cp.interval(network, region, spec, memory=1)
    assert fails.sizes == [1] * 10
    assert isinstance(region.center, Tensor)
