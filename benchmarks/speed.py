"""What Calipers costs beside the bare network: the walk, PGD, interval and linear bounds. One thread.

    python benchmarks/speed.py [--bounds DIR] [--quick]

Every ratio is the median over interleaved pairs in one process, with the same batch, layout, precision and
allocator on both sides. Times are CPU time of the process (one thread), so that being preempted does not count.
``--bounds DIR`` holds ``NET.onnx`` and ``auto_lirpa_0.7.1.npz`` (input boxes, margin rows and auto_LiRPA's bounds):
our bounds are compared with those, and if the package ``auto_LiRPA`` can be imported it is timed in the same run. The
figures that were measured stand in PERFORMANCE.md.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import statistics
import time
import warnings
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import calipers as cp
from calipers.bounds import BOUNDS
from calipers.graph.graph import bind, evaluate

Timed = Callable[[], Any]
LIRPA = {"interval": "IBP", "crown_ibp": "CROWN-IBP", "crown": "CROWN"}


def pairs(ours: Timed, theirs: Timed, runs: int) -> tuple[float, float, float]:
    """(median ms of ours, of theirs, median ratio ours/theirs) over interleaved runs, after a warm-up of each."""
    ours(), theirs()
    first, second = [], []
    for _ in range(runs):
        begin = time.process_time()
        ours()
        middle = time.process_time()
        theirs()
        first.append(middle - begin)
        second.append(time.process_time() - middle)
    ratio = statistics.median(a / b for a, b in zip(first, second, strict=True))
    return statistics.median(first) * 1e3, statistics.median(second) * 1e3, ratio


def mlp(*widths: int) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Flatten()]
    for a, b in pairwise(widths):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def cnn() -> nn.Sequential:
    """The tutorial's convolutional network."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1, stride=2), nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(),
        nn.Conv2d(64, 64, 3, padding=1, stride=2), nn.ReLU(),
        nn.Flatten(), nn.Linear(64 * 7 * 7, 100), nn.ReLU(), nn.Linear(100, 10),
    )  # fmt: skip


class Residual(nn.Module):
    """Two residual blocks with batch norm on 32x32 images, about the size of VNN-COMP's resnet_2b."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.ReLU()
        )
        self.one = nn.Sequential(
            nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
            nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16),
        )  # fmt: skip
        self.skip = nn.Conv2d(8, 16, 1, stride=2)
        self.two = nn.Sequential(
            nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
            nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16),
        )  # fmt: skip
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(1024, 100), nn.ReLU(), nn.Linear(100, 10))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = F.relu(self.one(x) + self.skip(x))
        x = F.relu(self.two(x) + x)
        return self.head(x)


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp 784-200-10": (lambda: mlp(784, 200, 10), (1, 28, 28)),
    "mlp 784-256-256-10": (lambda: mlp(784, 256, 256, 10), (1, 28, 28)),
    "cnn (tutorial)": (cnn, (1, 28, 28)),
    "resnet, 2 blocks": (Residual, (3, 32, 32)),
}


def made(name: str) -> tuple[nn.Module, cp.Network, tuple[int, ...]]:
    torch.manual_seed(0)
    build, shape = MODELS[name]
    module = build().eval().requires_grad_(requires_grad=False)
    return module, cp.capture(module, torch.rand(2, *shape)), shape


def bare_passes(module: nn.Module, x: Tensor, y: Tensor, count: int) -> None:
    """``count`` forward passes and backward passes to the input, and nothing else."""
    for _ in range(count):
        point = x.detach().requires_grad_()
        torch.autograd.grad(F.cross_entropy(module(point), y, reduction="sum"), point)


def walk_and_interval(runs: int) -> None:
    print(
        "\n| network | batch | forward ms | walk / forward | interval / forward | CROWN-IBP / forward |"
    )
    print("| --- | --- | --- | --- | --- | --- |")
    for name in MODELS:
        module, network, shape = made(name)
        env = bind(network.graph, module)
        for batch in (1, 16, 128):
            x = torch.rand(batch, *shape)
            region = cp.ThreatModel(math.inf, 0.01).around(x)
            with torch.no_grad():
                spec = cp.Spec.label(module(x).argmax(1), 10)
                _, forward, walk = pairs(
                    lambda: evaluate(network.graph, env, x), lambda: module(x), runs
                )
                _, _, ibp = pairs(
                    lambda: cp.interval(network, region, spec), lambda: module(x), runs
                )
                _, _, mixed = pairs(
                    lambda: cp.crown_ibp(network, region, spec),
                    lambda: module(x),
                    max(runs // 4, 3),
                )
            print(
                f"| {name} | {batch} | {forward:.3f} | {walk:.2f} | {ibp:.2f} | {mixed:.1f} |",
                flush=True,
            )


def attack(runs: int, steps: int = 40) -> None:
    peer = importlib.util.find_spec("torchattacks") is not None
    print(
        f"\n| network | batch | bare {steps} passes ms | PGD-{steps} / bare | module | no record | torchattacks |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name in MODELS:
        module, network, shape = made(name)
        for batch in (128, 1000):
            x = torch.rand(batch, *shape)
            with torch.no_grad():
                y = module(x).argmax(1)
            region, spec = cp.ThreatModel(math.inf, 0.01).around(x), cp.Spec.label(y, 10)
            count = runs if batch < 1000 else max(3, runs // 5)
            rivals: list[Timed] = [
                lambda: cp.pgd(network, region, spec, steps=steps),
                lambda: cp.pgd(module, region, spec, steps=steps),
                lambda: simplest(module, region, x, y, steps),
            ]
            if peer:
                rivals.append(lambda: torchattacks_pgd(module, x, y, steps))
            rows = [pairs(f, lambda: bare_passes(module, x, y, steps), count) for f in rivals]
            shown = [f"{ratio:.2f}" for _, _, ratio in rows] + ["-"] * (4 - len(rows))
            print(f"| {name} | {batch} | {rows[0][1]:.0f} | {' | '.join(shown)} |", flush=True)


def simplest(module: nn.Module, region: cp.Region, x: Tensor, y: Tensor, steps: int) -> Tensor:
    """PGD's steps with nothing else: no record of the best point, the last one is what it is."""
    low, high = region.inner(x.dtype)
    point = x.clone()
    for _ in range(steps):
        point.requires_grad_()
        loss = F.cross_entropy(module(point), y, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, point)
        point = point.detach().add_(gradient.sign_(), alpha=0.001).clamp_(low, high)
    return point


def torchattacks_pgd(module: nn.Module, x: Tensor, y: Tensor, steps: int) -> Tensor:
    import torchattacks

    peer = torchattacks.PGD(module, eps=0.01, alpha=0.001, steps=steps, random_start=False)
    peer.set_device("cpu")
    points: Tensor = peer(x, y)
    return points


def bounds(folder: Path, runs: int, batches: tuple[int, ...]) -> None:
    stored = np.load(folder / "auto_lirpa_0.7.1.npz")
    peer = importlib.util.find_spec("auto_LiRPA") is not None
    print(
        "\n| network | batch | method | float32 ms | float64, rounding subtracted, ms | auto_LiRPA ms | times faster |"
        " worst ours − theirs (stored 0.7.1) | mean |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for file in sorted(folder.glob("*.onnx")):
        network = cp.load_onnx(file)
        name = file.stem
        for batch in batches:
            low, high, C = (torch.tensor(stored[f"{name}/{k}"][:batch]) for k in ("lo", "hi", "C"))
            region, spec = cp.Region.box(low, high), cp.Spec.functional(C)
            for method, theirs in LIRPA.items():
                count = runs if method != "crown" else max(2, runs // (1 + batch))
                with torch.no_grad():
                    row = one(
                        network,
                        region,
                        spec,
                        method,
                        count,
                        theirs_timed(network, low, high, C, theirs) if peer else None,
                    )
                    gap = BOUNDS[method](network, region, spec) - torch.tensor(
                        stored[f"{name}/lb/{theirs}/bs{batch}"]
                    )
                print(
                    f"| {name} | {batch} | {theirs} | {row} | {gap.min():.1e} | {gap.mean():.1e} |",
                    flush=True,
                )


def one(
    network: cp.Network,
    region: cp.Region,
    spec: cp.Spec,
    method: str,
    count: int,
    peer: Timed | None,
) -> str:
    bound = BOUNDS[method]
    exact, single, _ = pairs(
        lambda: bound(network, region, spec, dtype=torch.float64, rigorous=True),
        lambda: bound(network, region, spec),
        max(2, count // 2),
    )
    if peer is None:
        return f"{single:.2f} | {exact:.2f} | - | -"
    single, other, ratio = pairs(lambda: bound(network, region, spec), peer, count)
    return f"{single:.2f} | {exact:.2f} | {other:.2f} | {1 / ratio:.2f}"


def theirs_timed(network: cp.Network, low: Tensor, high: Tensor, C: Tensor, method: str) -> Timed:
    """One call of auto_LiRPA on the same network, boxes and rows (its set-up is not counted)."""
    from auto_LiRPA import BoundedModule, BoundedTensor, PerturbationLpNorm

    center = (low + high) / 2
    module = BoundedModule(as_module(network), center)
    box = BoundedTensor(center, PerturbationLpNorm(norm=math.inf, x_L=low, x_U=high))
    return lambda: module.compute_bounds(x=(box,), C=C, method=method, bound_upper=False)


def as_module(network: cp.Network) -> nn.Sequential:
    """A plain nn.Sequential of an imported chain of linear, convolution, ReLU and flatten."""
    env = bind(network.graph, network.module)
    layers: list[nn.Module] = []
    for node in network.graph.nodes:
        arguments = [env[a.name] for a in node.args[1:] if hasattr(a, "name")]
        if node.op is torch.relu:
            layers.append(nn.ReLU())
        elif node.op is F.linear:
            layer: nn.Module = nn.Linear(arguments[0].shape[1], arguments[0].shape[0])
            layers.append(filled(layer, arguments))
        elif node.op is torch.conv2d:
            w, stride, padding = arguments[0], node.args[3], node.args[4]
            layers.append(
                filled(nn.Conv2d(w.shape[1], w.shape[0], w.shape[2:], stride, padding), arguments)
            )
        else:
            layers.append(nn.Flatten())
    return nn.Sequential(*layers).eval().requires_grad_(requires_grad=False)


def filled(layer: nn.Module, arguments: list[Tensor]) -> nn.Module:
    layer.weight.data, layer.bias.data = arguments[0].clone(), arguments[1].clone()
    return layer


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bounds", type=Path, help="folder with NET.onnx and auto_lirpa_0.7.1.npz")
    parser.add_argument("--quick", action="store_true", help="fewer runs and batches")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")  # the peer's own
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, one thread, {torch.backends.cpu.get_cpu_capability()}")
    runs = 15 if arguments.quick else 61
    walk_and_interval(runs)
    attack(5 if arguments.quick else 21)
    if arguments.bounds:
        bounds(
            arguments.bounds,
            20 if arguments.quick else 60,
            (1, 16) if arguments.quick else (1, 16, 128),
        )


if __name__ == "__main__":
    main()
