"""Bounds against auto_LiRPA: time, tightness, and the time to its optimised bounds. One thread.

    python benchmarks/bounds.py DIR [--quick] [--net NAME] [--batch N,N] [--methods A,B]

DIR holds ``NET.onnx`` and ``auto_lirpa_0.7.1.npz``: input boxes, margin rows and auto_LiRPA's bounds. If the package
``auto_LiRPA`` can be imported it is timed in the same run, interleaved with ours. Times are CPU time of the process.
The last tables need no peer: the cost of rigour, and l2 and l1 balls with the box against the same balls without.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from speed import Timed, as_module, pairs
from torch import Tensor

import calipers as cp
from calipers.bounds import BOUNDS

PEER = {
    "interval": "IBP",
    "crown_ibp": "CROWN-IBP",
    "crown": "CROWN",
    "alpha_crown": "alpha-CROWN",
}  # ours -> the stored bounds
STEPS = 20  # of the peer's alpha-CROWN
# steps, intermediate steps, share of the intermediate bounds: by cost
PLANS = (
    (2, 0, 1.0),
    (8, 0, 1.0),
    (8, 2, 0.9),
    (8, 3, 0.995),
    (20, 3, 0.995),
    (20, 8, 1.0),
    (40, 20, 1.0),
)
TIE = 1e-4  # float32 sums in another order


class Case:
    """One network with its first ``batch`` boxes and rows, and the peer's stored bounds."""

    def __init__(self, folder: Path, name: str, batch: int) -> None:
        stored = np.load(folder / "auto_lirpa_0.7.1.npz")
        self.name, self.batch = name, batch
        self.network = cp.load_onnx(folder / f"{name}.onnx")
        self.x, self.low, self.high, self.C = (
            torch.tensor(stored[f"{name}/{k}"][:batch]) for k in ("x", "lo", "hi", "C")
        )
        self.eps = float(stored[f"{name}/eps"])
        self.region, self.spec = cp.Region.box(self.low, self.high), cp.Spec.functional(self.C)
        self.stored = {
            ours: torch.tensor(stored[key])
            for ours, theirs in PEER.items()
            if (key := f"{name}/lb/{theirs}/bs{batch}") in stored
        }

    def bound(self, method: str, **keywords: Any) -> Tensor:
        return BOUNDS[method](self.network, self.region, self.spec, **keywords)


class Peer:
    """auto_LiRPA on the same network, boxes and rows; its set-up is not counted."""

    def __init__(self, case: Case) -> None:
        from auto_LiRPA import BoundedModule, BoundedTensor, PerturbationLpNorm

        center = (case.low + case.high) / 2
        options = {"optimize_bound_args": {"iteration": STEPS, "early_stop": False}}
        self.module = BoundedModule(as_module(case.network), center, bound_opts=options)
        limits = PerturbationLpNorm(norm=math.inf, x_L=case.low, x_U=case.high)
        self.box, self.C = BoundedTensor(center, limits), case.C

    def bound(self, method: str) -> Tensor:
        theirs = {"alpha_crown": "CROWN-Optimized"}.get(method, PEER[method])
        low: Tensor = self.module.compute_bounds(
            x=(self.box,), C=self.C, method=theirs, bound_upper=False
        )[0]
        return low.detach()


def spent(run: Timed) -> tuple[float, Any]:
    begin = time.process_time()
    result = run()
    return time.process_time() - begin, result


def count_of(method: str, batch: int, runs: int) -> int:
    return runs if method in ("interval", "crown_ibp") else max(2, runs // (2 + 2 * batch))


def tightness(case: Case, peer: Peer | None, methods: list[str], runs: int) -> None:
    """Time, mean margin, and the share of rows at least as tight, of every rung that both have."""
    for method in methods:
        if method == "alpha_crown":
            continue  # an iteration of ours is none of theirs: see `to_their_bound`
        with torch.no_grad():
            ours = case.bound(method)
            theirs = case.stored.get(method)
            ms = other = ratio = math.nan
            count = count_of(method, case.batch, runs)
            if peer is not None:
                theirs = peer.bound(method) if theirs is None else theirs
                ms, other, ratio = pairs(
                    partial(case.bound, method), partial(peer.bound, method), count
                )
            else:
                ms, _, _ = pairs(partial(case.bound, method), lambda: None, count)
            double, _, _ = pairs(
                partial(case.bound, method, dtype=torch.float64, rigorous=True),
                lambda: None,
                max(2, count // 2),
            )
        cells = [f"{ms:.2f}", f"{other:.2f}", f"{1 / ratio:.2f}", f"{double:.2f}"]
        print(
            f"| {case.name} | {case.batch} | {method} | {' | '.join(cells)} | {gaps(ours, theirs)} |",
            flush=True,
        )


def gaps(ours: Tensor, theirs: Tensor | None) -> str:
    if theirs is None:
        return f"{ours.mean():.4f} | - | - | -"
    gap = ours - theirs
    tight = (gap >= -TIE * (1 + theirs.abs())).double().mean()
    return f"{ours.mean():.4f} | {theirs.mean():.4f} | {100 * tight:.1f} % | {gap.min():.1e}"


def to_their_bound(case: Case, peer: Peer | None, seconds: float) -> None:
    """Seconds of ours to the mean margin that the peer has after its iterations, and to decide the same examples."""
    theirs, took = case.stored.get("alpha_crown"), math.nan
    if peer is not None:
        took, fresh = spent(lambda: peer.bound("alpha_crown"))
        theirs = fresh if theirs is None else theirs
    if theirs is None:
        return
    target = theirs.mean().item()
    decided = int((theirs.amin(1) > 0).sum())
    tie = 1e-5 * (1 + abs(target))
    for label, keywords in (
        ("float32", {}),
        ("float64, rigorous", {"dtype": torch.float64, "rigorous": True}),
    ):
        reached, total, best = None, 0.0, -math.inf
        for steps, inner, share in PLANS:
            took_us, low = spent(
                lambda s=steps, i=inner, f=share: case.bound(
                    "alpha_crown", steps=s, intermediate_steps=i, share=f, stop=False, **keywords
                )
            )
            total += took_us
            best = max(best, low.mean().item())
            if low.mean().item() >= target - tie:
                reached = took_us, steps, inner, best
                break
            if total > seconds:
                break
        verdicts, low = spent(lambda: case.bound("alpha_crown", **keywords))
        ours = int((low.amin(1) > 0).sum())
        shown = (
            f"not reached: {best:.4f} | -"
            if reached is None
            else (
                f"{reached[0]:.2f} ({reached[1]} + {reached[2]} steps, mean {reached[3]:.4f}) | {took / reached[0]:.1f}"
            )
        )
        print(
            f"| {case.name} | {case.batch} | {label} | {target:.4f} | {took:.2f} | {shown} "
            f"| {verdicts:.2f} | {ours} / {decided} |",
            flush=True,
        )


def balls(case: Case, count: int) -> None:
    """With the box, against the same ball without it: strictly tighter wherever the box cuts the ball."""
    for p, eps in ((2.0, 0.5), (1.0, 3.0)):
        x = case.x[:count]
        y = case.network(x).argmax(1)
        spec = cp.Spec.label(y, 10)
        for method in ("crown_ibp", "crown"):
            boxed, free = (
                BOUNDS[method](
                    case.network, cp.Region.ball(x, eps, p, *sides), spec, dtype=torch.float64
                )
                for sides in ((0.0, 1.0), (-math.inf, math.inf))
            )
            gain = boxed - free
            print(
                f"| {case.name} | l{p:g} {eps} | {method} | {boxed.mean():.4f} | {free.mean():.4f} "
                f"| {100 * (gain > 1e-9).double().mean():.1f} % | {gain.min():.1e} |",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="with NET.onnx and auto_lirpa_0.7.1.npz")
    parser.add_argument("--quick", action="store_true", help="fewer runs")
    parser.add_argument("--net", help="only this network")
    parser.add_argument("--batch", default="1,16,128", help="batch sizes")
    parser.add_argument("--methods", default=",".join(PEER), help="rungs")
    parser.add_argument("--seconds", type=float, default=300.0, help="limit of a search for steps")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")  # the peer's own
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, one thread, {torch.backends.cpu.get_cpu_capability()}")
    available = importlib.util.find_spec("auto_LiRPA") is not None
    names = (
        [arguments.net]
        if arguments.net
        else sorted(f.stem for f in arguments.folder.glob("*.onnx"))
    )
    methods = [m for m in arguments.methods.split(",") if m in BOUNDS]
    cases = [
        Case(arguments.folder, name, int(batch))
        for name in names
        for batch in arguments.batch.split(",")
    ]
    print(
        "\n| network | batch | method | ms | auto_LiRPA ms | times faster | float64, rigorous, ms | mean margin "
        "| auto_LiRPA | rows as tight | worst |\n" + "| --- " * 11 + "|"
    )
    for case in cases:
        tightness(case, Peer(case) if available else None, methods, 10 if arguments.quick else 40)
    if "alpha_crown" in methods:
        print(
            f"\n| network | batch | precision | auto_LiRPA's mean after {STEPS} steps | its s | ours s to that mean "
            "| times faster | ours s to decide | decided ours / theirs |\n" + "| --- " * 9 + "|"
        )
        for case in cases:
            if case.batch <= 16:
                to_their_bound(case, Peer(case) if available else None, arguments.seconds)
    print(
        "\n| network | ball | method | mean with the box | without | rows strictly tighter | worst |\n"
        + "| --- " * 7
        + "|"
    )
    for case in cases:
        if case.batch == max(c.batch for c in cases):
            balls(case, min(16, case.batch))


if __name__ == "__main__":
    main()
