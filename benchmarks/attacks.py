"""Strength and cost of the attack cascade, beside its peers: robust accuracy, passes per example, CPU seconds.

    python benchmarks/attacks.py [--mnist DIR --weights FILE] [--tutorial DIR] [--cifar DIR --onnx FILE]
                                 [--samples N] [--peers] [--cases NAME ...]

``--weights`` is what ``benchmarks/train_mnist.py`` wrote (eps 0.3), ``--tutorial`` holds ``ch4_model_cnn_robust.pt``
(eps 0.1), ``--onnx`` is a CIFAR-10 network that takes normalised inputs (``resnet_2b.onnx``). One pass is one example
through the network, forward or backward, counted by a wrapper around the model on both sides. Every point that a
method returns is judged again: it counts as broken only if it lies in ball and box (ours: exactly; peers: within
1e-5) and is misclassified.

Peers, if installed: torchattacks (PyPI). Its stand-in for AutoAttack's "standard" runs APGD-CE, APGD-T and FAB-T with
100 steps each and Square with 5,000 queries, one after the other on what is left.
"""

from __future__ import annotations

import argparse
import math
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from train_mnist import network as small_cnn

import calipers as cp
from calipers import data
from calipers.evaluate.checks import onnxruntime_replica
from calipers.models import load_model
from calipers.seeds import seeds

CHUNK = 250  # examples a peer is given at a time


class Case(NamedTuple):
    name: str
    model: nn.Module
    x: Tensor
    y: Tensor
    p: float
    eps: str


class Normalised(nn.Module):
    """CIFAR-10 pixels in [0, 1], normalised as the networks of the verification competitions expect."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        for name, value in (("mean", (0.4914, 0.4822, 0.4465)), ("std", (0.2471, 0.2435, 0.2616))):
            self.register_buffer(name, torch.tensor(value).view(3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.net((x - self.mean) / self.std)
        return y


class Counted(nn.Module):
    """Counts the examples that pass forward and backward."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.passes = net, 0

    def forward(self, x: Tensor) -> Tensor:
        self.passes += len(x)
        y: Tensor = self.net(x)
        if y.requires_grad:
            y.register_hook(self.count)
        return y

    def count(self, gradient: Tensor) -> None:
        self.passes += len(gradient)


def cases(arguments: argparse.Namespace) -> Iterator[Case]:
    n = arguments.samples
    if arguments.mnist:
        test = data.load("mnist", data_dir=arguments.mnist)
        x, y = test.x[: n or 1000], test.y[: n or 1000]
        if arguments.weights:
            net = small_cnn()
            net.load_state_dict(load_file(str(arguments.weights)))
            for p, eps in ((math.inf, "0.3"), (2.0, "2"), (1.0, "8")):
                yield Case(f"mnist-eps0.3-{norm(p)}", net, x, y, p, eps)
        if arguments.tutorial:
            weights = arguments.tutorial / "ch4_model_cnn_robust.pt"
            net = load_model("tutorial_cnn", weights=weights).module
            yield Case("mnist-tutorial-linf", net, x, y, math.inf, "0.1")
    if arguments.cifar and arguments.onnx:
        test = data.load("cifar10", data_dir=arguments.cifar)
        net = Normalised(cp.load_onnx(arguments.onnx).module)
        x, y = test.x[: n or 500], test.y[: n or 500]
        for p, eps in ((math.inf, "2/255"), (2.0, "0.5"), (1.0, "5")):
            yield Case(f"cifar-{norm(p)}", net, x, y, p, eps)


def norm(p: float) -> str:
    return {math.inf: "linf", 2.0: "l2", 1.0: "l1"}[p]


def measured(case: Case, name: str, run: Callable[[nn.Module], Tensor], slack: float) -> Tensor:
    """Prints a row; returns which examples stay robust."""
    model = Counted(case.model)
    begin = time.process_time()
    points = run(model)
    seconds = time.process_time() - begin
    region = cp.ThreatModel(case.p, case.eps).around(case.x)
    with torch.no_grad():
        wrong = torch.cat([case.model(part).argmax(1) for part in points.split(CHUNK)]) != case.y
        clean = torch.cat([case.model(part).argmax(1) for part in case.x.split(CHUNK)]) != case.y
    inside = region.contains(points) if not slack else within(case, points, slack)
    robust = ~((wrong & inside) | clean)
    count = len(case.x)
    print(
        f"| {case.name} | {name} | {100 * robust.sum().item() / count:.1f} | {model.passes / count:.0f} | "
        f"{seconds:.1f} | {int((~inside).sum())} |",
        flush=True,
    )
    return robust


def within(case: Case, points: Tensor, slack: float) -> Tensor:
    change = (points - case.x).flatten(1)
    size = torch.linalg.vector_norm(change.double(), ord=case.p, dim=1)
    eps = float(cp.ThreatModel(case.p, case.eps).around(case.x[:1]).eps)
    boxed = ((points >= -slack) & (points <= 1 + slack)).flatten(1).all(1)
    return (size <= eps * (1 + slack)) & boxed


def ours(case: Case, model: nn.Module, **options: Any) -> Tensor:
    region = cp.ThreatModel(case.p, case.eps).around(case.x)
    spec = cp.Spec.label(case.y, 10)
    return cp.search(model, region, spec, seeds=seeds(case.x, 0, "bench"), **options).points


def pgd40(case: Case, model: nn.Module) -> Tensor:
    region = cp.ThreatModel(case.p, case.eps).around(case.x)
    return cp.pgd(model, region, cp.Spec.label(case.y, 10), steps=40)


def replayed(case: Case, points: Tensor) -> None:
    """Every broken point once more: exact membership, torch in two precisions, onnxruntime."""
    network = cp.capture(case.model, case.x[:2])
    region = cp.ThreatModel(case.p, case.eps).around(case.x)
    spec = cp.Spec.label(case.y, 10)
    with torch.no_grad():
        claimed = torch.cat([case.model(part).argmax(1) for part in points.split(CHUNK)]) != case.y
    upper = cp.witness(
        network, region, spec, points, replicas=(onnxruntime_replica(network),)
    ).upper
    confirmed = upper <= 0
    print(
        f"{case.name}: {int((confirmed & claimed).sum())} of {int(claimed.sum())} witnesses replay",
        flush=True,
    )


def stand_in(case: Case, model: nn.Module, seed: int) -> Tensor:
    """torchattacks' four attacks at full length, each on what the ones before left."""
    import torchattacks

    eps = float(cp.ThreatModel(case.p, case.eps).around(case.x[:1]).eps)
    name = {math.inf: "Linf", 2.0: "L2"}[case.p]
    table = (
        partial(torchattacks.APGD, norm=name, eps=eps, steps=100, loss="ce", seed=seed),
        partial(torchattacks.APGDT, norm=name, eps=eps, steps=100, n_classes=10, seed=seed),
        partial(
            torchattacks.FAB,
            norm=name,
            eps=eps,
            steps=100,
            n_classes=10,
            multi_targeted=True,
            seed=seed,
        ),
        partial(torchattacks.Square, norm=name, eps=eps, n_queries=5000, seed=seed),
    )
    points = case.x.clone()
    with torch.no_grad():
        left = torch.nonzero(model(case.x).argmax(1) == case.y).flatten()
    for make in table:
        attack = make(model)
        attack.set_device("cpu")
        for part in left.split(CHUNK):
            found = attack(case.x[part], case.y[part]).detach()
            with torch.no_grad():
                broken = model(found).argmax(1) != case.y[part]
            points[part[broken]] = found[broken]
        with torch.no_grad():
            left = left[model(points[left]).argmax(1) == case.y[left]]
    return points


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in ("mnist", "weights", "tutorial", "cifar", "onnx"):
        parser.add_argument(f"--{name}", type=Path)
    parser.add_argument("--samples", type=int, help="examples per case")
    parser.add_argument("--peers", action="store_true", help="run torchattacks too (hours)")
    parser.add_argument("--cases", nargs="*", help="only cases whose name contains one of these")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # the peer's own
    print(f"torch {torch.__version__}, one thread, {torch.backends.cpu.get_cpu_capability()}\n")
    print("| case | method | robust accuracy % | passes per example | CPU s | outside |")
    print("| --- | --- | --- | --- | --- | --- |")
    for case in cases(arguments):
        if arguments.cases and not any(part in case.name for part in arguments.cases):
            continue
        case.model.eval().requires_grad_(requires_grad=False)
        measured(case, "pgd-40", partial(pgd40, case), 0.0)
        kept: list[Tensor] = []

        def standard(model: nn.Module, case: Case = case, kept: list[Tensor] = kept) -> Tensor:
            kept.append(ours(case, model))
            return kept[-1]

        measured(case, "quick", partial(ours, case, level="quick"), 0.0)
        robust = measured(case, "standard", standard, 0.0)
        low = partial(ours, case, precision=torch.bfloat16)
        measured(case, "standard, bfloat16", low, 0.0)
        if arguments.peers and case.p != 1:
            for seed in range(3):
                other = measured(
                    case, f"torchattacks x4, seed {seed}", partial(stand_in, case, seed=seed), 1e-5
                )
                differ = torch.nonzero(robust != other).flatten().tolist()
                print(f"images on which we differ: {differ}")
        replayed(case, kept[0])


if __name__ == "__main__":
    main()
