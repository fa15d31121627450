"""Is this machine fit to measure? Versions, arithmetic, solver, ONNX, and the sandwich on random networks.

for check in examine(): print(check.mark, check.name, check.said)
"""

from __future__ import annotations

import math
import os
import platform
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from calipers import __version__

REQUIRED = {
    "torch": "networks, attacks, bounds",
    "numpy": "data",
    "onnx": "ONNX files",
    "onnxruntime": "every witness is run there, too",
    "safetensors": "weights, certificates",
    "highspy": "linear and mixed-integer programs",
    "typer": "the command line",
    "rich": "tables",
    "jinja2": "reports",
}
OPTIONAL = {
    "pillow": "folders of images as data, pictures of witnesses: pip install 'calipers[images]'",
    "pyarrow": "calipers runs export FILE.parquet: pip install 'calipers[parquet]'",
    "scikit-learn": "the linear models in its pipelines",
    "ray": "audits on several machines: pip install 'calipers[ray]'",
    "starlette": "calipers serve: pip install 'calipers[serve]'",
    "cairosvg": "figures as PNG and PDF: pip install 'calipers[figures]'",
    "tensorboard": "calipers train --tensorboard: pip install 'calipers[tensorboard]'",
    "pyscipopt": "SCIP for calipers.milp: pip install 'calipers[scip]'",
    "gurobipy": "Gurobi for calipers.milp, with a licence: pip install 'calipers[gurobi]'",
}


NETWORKS = 4
CLOSE = 1e-5  # HiGHS's tolerance, and float32's rounding of an attack's margin


class Check(NamedTuple):
    """One finding: ``ok`` is None where nothing is wrong and something could be added."""

    name: str
    ok: bool | None
    said: str

    @property
    def mark(self) -> str:
        return {True: "ok", False: "FAIL", None: "-"}[self.ok]


def examine() -> Iterator[Check]:
    """All checks, one after the other; a check that raises has failed, with what was raised."""
    yield Check(
        "calipers",
        True,
        f"{__version__} on Python {platform.python_version()}, {platform.platform()}",
    )
    yield from packages()
    for name, check in CHECKS.items():
        try:
            yield Check(name, True, check())
        except Exception as error:  # noqa: BLE001 - whatever is wrong here is the finding
            yield Check(name, False, f"{type(error).__name__}: {' '.join(str(error).split())}")


def packages() -> Iterator[Check]:
    """What is installed, against what is needed, then what could be added."""
    needed = _needed()
    for name, use in REQUIRED.items():
        have, least = _installed(name), needed.get(name, "")
        if have is None:
            yield Check(name, False, f"missing ({use}): pip install {name}")
        elif _numbers(have) < _numbers(least):
            yield Check(name, False, f"{have} is older than {least} ({use}): pip install -U {name}")
        else:
            yield Check(name, True, have)
    for name, use in OPTIONAL.items():
        have = _installed(name)
        yield Check(name, None if have is None else True, have or f"would add {use}")


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _needed() -> dict[str, str]:
    """Least versions, read off the installed package itself; nothing where it runs from its sources alone."""
    try:
        lines = metadata.requires("calipers") or []
    except metadata.PackageNotFoundError:
        return {}
    found = (re.match(r"([\w-]+)\s*>=\s*([\d.]+)$", line) for line in lines)
    return {m[1].lower(): m[2] for m in found if m}


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version.partition("+")[0])[:3])


# -- checks that compute ---------------------------------------------------------------------------


def threads() -> str:
    """Threads and processors; both only for speed."""
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    said = f"{torch.get_num_threads()} of {cores} cores, {torch.backends.cpu.get_cpu_capability()}"
    gpu = (
        f"; {torch.cuda.get_device_name()}"
        if torch.cuda.is_available()
        else "; no GPU, and none is needed"
    )
    return said + gpu


def arithmetic() -> str:
    """Sums round as their dtype promises, subnormal numbers are kept: what rigorous bounds rest on."""
    import torch

    from calipers.bounds.state import require_ieee

    for dtype in (torch.float32, torch.float64):
        require_ieee(dtype, torch.device("cpu"))
    third = torch.tensor(1.0, dtype=torch.float64) / 3
    if third.item() != 1 / 3 or sys.float_info.mant_dig != 53:
        raise ArithmeticError("float64 is not IEEE 754 double precision")
    return "IEEE 754 in float32 and float64, subnormal numbers kept"


def solver() -> str:
    """HiGHS finds a minimum that is known: of |x| + |y| − 1 over [0.2, 1]², which is −0.6."""
    import torch

    from calipers.exact import optima
    from calipers.graph.capture import capture
    from calipers.sets import ThreatModel
    from calipers.spec import Spec

    network = capture(_absolute(), torch.zeros(1, 2))
    region = ThreatModel(math.inf, "0.4").around(torch.full((1, 2), 0.6))
    (found,) = optima(network, region, Spec.label(torch.tensor([0]), 2))
    if not abs(found.lower + 0.6) < 1e-5:
        raise ArithmeticError(f"HiGHS says {found.lower} ({found.status}), the minimum is -0.6")
    return "HiGHS, in a process of its own, finds a minimum that is known"


def onnx() -> str:
    """A network written as ONNX, read again, and run by onnxruntime: the same outputs."""
    import torch

    from calipers.graph.capture import capture
    from calipers.graph.onnx import load_onnx, save_onnx, session

    network = capture(_random(0), torch.zeros(1, 3))
    x = torch.rand(4, 3, generator=torch.Generator().manual_seed(1))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "net.onnx"
        save_onnx(network, file)
        again, run = load_onnx(file), session(file)
        with torch.no_grad():
            outputs = [network(x), again(x), torch.cat([run(x[i : i + 1]) for i in range(len(x))])]
    apart = max((y - outputs[0]).abs().max().item() for y in outputs)
    if not apart < 1e-5:
        raise ArithmeticError(f"outputs differ by {apart}")
    return f"torch, the reader and onnxruntime agree to {apart:.0e}"


def sandwich() -> str:
    """Bounds, the exact minimum and attacks on random networks, in this order."""
    import torch

    from calipers.attacks import fgsm, pgd
    from calipers.bounds import alpha_crown, crown, interval
    from calipers.bracket import witness
    from calipers.exact import optima
    from calipers.graph.capture import capture
    from calipers.seeds import seeds
    from calipers.sets import ThreatModel
    from calipers.spec import Spec

    for seed in range(NETWORKS):
        network = capture(_random(seed), torch.zeros(1, 3))
        x = torch.rand(1, 3, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            label = network(x).argmax(1)
        region, spec = ThreatModel(math.inf, "0.3").around(x), Spec.label(label, 3)
        exact = min(found.lower for found in optima(network, region, spec))
        for bound in (interval, crown, alpha_crown):
            low = spec.margin(
                bound(network, region, spec, dtype=torch.float64, rigorous=True)
            ).item()
            if not low <= exact + CLOSE:
                raise ArithmeticError(
                    f"network {seed}: {bound.__name__} says {low}, the minimum is {exact}"
                )
        for attack in (fgsm, pgd):
            points = attack(network, region, spec, seeds=seeds(x, seed, attack.__name__))
            high = witness(network, region, spec, points).upper.item()
            if not high >= exact - CLOSE:
                raise ArithmeticError(
                    f"network {seed}: {attack.__name__} says {high}, the minimum is {exact}"
                )
    return f"bounds <= exact minimum <= attacks on {NETWORKS} random networks"


def _absolute() -> Any:
    """(|x| + |y|, 1) as a network."""
    import torch

    first, last = torch.nn.Linear(2, 4), torch.nn.Linear(4, 2)
    with torch.no_grad():
        first.weight.copy_(torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]]))
        first.bias.zero_()
        last.weight.copy_(torch.tensor([[1.0] * 4, [0.0] * 4]))
        last.bias.copy_(torch.tensor([0.0, 1.0]))
    return torch.nn.Sequential(first, torch.nn.ReLU(), last).eval()


def _random(seed: int) -> Any:
    """Three inputs, two layers of eight neurons, three outputs; the same draws on every machine."""
    import torch

    draw = torch.Generator().manual_seed(seed)
    net = torch.nn.Sequential(
        torch.nn.Linear(3, 8),
        torch.nn.ReLU(),
        torch.nn.Linear(8, 8),
        torch.nn.ReLU(),
        torch.nn.Linear(8, 3),
    )
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draw) / 2)
    return net.eval()


CHECKS: dict[str, Callable[[], str]] = {
    "threads": threads,
    "arithmetic": arithmetic,
    "solver": solver,
    "ONNX": onnx,
    "sandwich": sandwich,
}
