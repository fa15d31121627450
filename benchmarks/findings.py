"""The findings of the lectures about bounds, measured: tables on standard output, figures as SVG.

    python benchmarks/findings.py DIR [--out FOLDER] [--only NAME,...]

DIR holds ``tutorial/*.pt`` (the weights of Kolter and Madry's tutorial) and ``mnist/``. The findings:

gap       every rung's lower bound and the attacks' upper one over eps; exact values where a solver is there
vacuous   interval bounds say nothing about a network that was not trained for them, at any useful eps
depth     intervals widen from layer to layer
pareto    time against tightness
rounding  a model that rounds its input, certified through the step, against the same model without
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import time
import warnings
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import calipers as cp
from calipers.bounds import BOUNDS
from calipers.bounds.widths import layer_widths
from calipers.data import load
from calipers.evaluate import plots
from calipers.models import load_model

F64 = torch.float64
Points = dict[str, list[tuple[float, float]]]


class Tutorial:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        data = load("mnist", data_dir=folder / "mnist")
        self.x, self.y = data.x, data.y

    def net(self, architecture: str, weights: str) -> cp.Network:
        return load_model(architecture, weights=self.folder / "tutorial" / f"{weights}.pt")


def row(*cells: Any) -> None:
    print(
        "| " + " | ".join(f"{c:.4g}" if isinstance(c, float) else str(c) for c in cells) + " |",
        flush=True,
    )


def header(*cells: str) -> None:
    print()
    row(*cells)
    row(*["---"] * len(cells))


def spent(run: Callable[[], Any]) -> tuple[float, Any]:
    begin = time.process_time()
    result = run()
    return time.process_time() - begin, result


def gap(t: Tutorial) -> str:
    """Mean minimal margin of 10 images under the small network, from both sides."""
    network = t.net("tutorial_small", "ch3_model_small")
    x, y = t.x[:10], t.y[:10]
    spec = cp.Spec.label(y, 10)
    found: Points = defaultdict(list)
    exact = importlib.util.find_spec("calipers.exact.milp")
    header("eps", *BOUNDS, "exact", "PGD")
    for eps in (0.0, 0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.08, 0.1):
        region = cp.ThreatModel(math.inf, eps).around(x)
        cells: list[Any] = []
        for name, bound in BOUNDS.items():
            low = spec.margin(bound(network, region, spec, dtype=F64).detach()).mean().item()
            cells.append(low)
            # interval bounds would leave no room for the others
            found[name].append((eps, low if low > -25 else math.nan))
        value = math.nan
        if exact is not None and eps <= 0.05:
            value = exact_mean(network, region, spec)
            found["exact"].append((eps, value))
        points = cp.search(network, region, spec, seeds=torch.arange(10)).points
        upper = spec.margin(spec.values(network.in_double()(points))).mean().item()
        found["attacks"].append((eps, upper))
        row(eps, *cells, value, upper)
    return plots.lines(found, "eps", "mean minimal margin")


def exact_mean(network: cp.Network, region: cp.Region, spec: cp.Spec) -> float:
    from calipers.exact.milp import optima

    margins = []
    for i in range(len(region)):
        one = slice(i, i + 1)
        low = optima(network, region[one], spec[one], deadline=time.perf_counter() + 120)
        margins.append(float(min(o.lower for o in low)))
    return sum(margins) / len(margins)


def vacuous(t: Tutorial) -> str:
    """The share of 200 test images that are not certified, and that PGD breaks, on the PGD-trained network."""
    network = t.net("tutorial_cnn", "ch4_model_cnn_robust")
    robust = t.net("tutorial_cnn_robust_2", "ch4_model_cnn_robust_2")
    x, y = t.x[:200], t.y[:200]
    spec = cp.Spec.label(y, 10)
    found: Points = defaultdict(list)
    header("eps", "interval", "CROWN-IBP", "PGD", "interval, trained on interval bounds")
    for eps in (1e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 1e-2, 0.1):
        region = cp.ThreatModel(math.inf, eps).around(x)
        with torch.no_grad():
            shares = {
                "interval": failed(spec, cp.interval(network, region, spec, rigorous=True)),
                "CROWN-IBP": failed(spec, cp.crown_ibp(network, region, spec, rigorous=True)),
            }
        points = cp.pgd(network, region, spec, steps=10)
        with torch.no_grad():
            shares["PGD"] = failed(spec, spec.values(network(points)))
            low = cp.interval(robust, region, spec, rigorous=True)
            shares["interval, trained on interval bounds"] = failed(spec, low)
        for name, share in shares.items():
            found[name].append((eps, share))
        row(eps, *shares.values())
    return plots.lines(found, "eps", "share not certified (PGD: broken)", log="x")


def failed(spec: cp.Spec, values: Tensor) -> float:
    return (~(spec.margin(values) > 0)).double().mean().item()


def depth(t: Tutorial) -> str:
    """Mean width of what each ReLU reads, by depth."""
    nets = {
        "dnn_2": t.net("tutorial_dnn_2", "ch3_model_dnn_2"),
        "dnn_4": t.net("tutorial_dnn_4", "ch3_model_dnn_4"),
        "cnn, PGD-trained": t.net("tutorial_cnn", "ch4_model_cnn_robust"),
    }
    found: Points = defaultdict(list)
    header(
        "network",
        "layer",
        "neurons",
        "unstable, interval",
        "CROWN",
        "mean width, interval",
        "CROWN",
    )
    for name, network in nets.items():
        region = cp.ThreatModel(math.inf, 0.01).around(t.x[: 2 if "cnn" in name else 10])
        for i, layer in enumerate(layer_widths(network, region), 1):
            loose, tight = layer.rungs["interval"], layer.rungs["crown"]
            found[f"{name}, interval"].append((i, loose.mean))
            found[f"{name}, CROWN"].append((i, tight.mean))
            shares = (loose.unstable, tight.unstable) if layer.op else ("", "")
            row(name, layer.op or "output", layer.neurons, *shares, loose.mean, tight.mean)
    return plots.lines(
        found, "layer (the last one is the output)", "mean width of an interval", log="y"
    )


def pareto(t: Tutorial) -> str:
    """CPU time of an example against its mean bound, four-layer network at eps 0.02."""
    network = t.net("tutorial_dnn_4", "ch3_model_dnn_4")
    x, y = t.x[:16], t.y[:16]
    region, spec = cp.ThreatModel(math.inf, 0.02).around(x), cp.Spec.label(y, 10)
    upper = spec.values(network(cp.pgd(network, region, spec, steps=40)).detach().double())
    top = spec.margin(upper).mean().item()
    found: Points = {}
    header("rung", "ms an example", "mean margin", "below the attack", "certified of 16")
    runs: dict[str, Callable[..., Tensor]] = dict(BOUNDS)
    if "alpha_crown" in BOUNDS:
        runs["alpha_crown, 20 + 8 steps"] = partial(
            BOUNDS["alpha_crown"], steps=20, intermediate_steps=8, share=1.0, stop=False
        )
        runs["alpha_crown, no stop"] = partial(BOUNDS["alpha_crown"], stop=False)
    for name, bound in runs.items():
        call = partial(bound, network, region, spec)
        with torch.no_grad():
            call()
            seconds = min(spent(call)[0] for _ in range(3))
            margin = spec.margin(call())
        ms, low = 1e3 * seconds / len(x), margin.mean().item()
        found[name] = [(ms, top - low)]
        row(name, ms, low, top - low, int((margin > 0).sum()))
    return plots.lines(
        found, "CPU ms for an example", "below what PGD found (mean margin)", log="xy", joined=False
    )


class Rounded(nn.Module):
    """The network behind a rounding of its input to 0 or 1."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(torch.round(x))


def rounding(t: Tutorial) -> str | None:
    """Certified through the step operator: what the rounding, not the network, is good for."""
    plain = t.net("tutorial_dnn_4", "ch3_model_dnn_4")
    x, y = t.x[:50], t.y[:50]
    try:
        rounded = cp.capture(Rounded(plain.module), x[:2])
        spec = cp.Spec.label(y, 10)
        cp.interval(rounded, cp.ThreatModel(math.inf, 0.1).around(x), spec)
    except cp.errors.CaptureError as error:
        print(f"\nrounding: skipped ({error})")
        return None
    found: Points = defaultdict(list)
    header(
        "eps",
        "model",
        "clean",
        "certified, interval",
        "CROWN",
        "PGD (straight through) leaves",
        "pixels that can flip",
    )
    for eps in (0.02, 0.05, 0.1, 0.2, 0.3, 0.4):
        region = cp.ThreatModel(math.inf, eps).around(x)
        flip = ((x - 0.5).abs() <= eps).double().mean().item()
        for name, network in (("plain", plain), ("rounded", rounded)):
            with torch.no_grad():
                clean = (network(x).argmax(1) == y).double().mean().item()
                low = [
                    1 - failed(spec, bound(network, region, spec, dtype=F64, rigorous=True))
                    for bound in (cp.interval, cp.crown)
                ]
            # rounding has no gradient; the attack sees the identity's
            seen = (
                plain if name == "plain" else lambda v: plain(cp.straight_through(torch.round)(v))
            )
            points = cp.pgd(seen, region, spec, steps=40, restarts=3, seeds=torch.arange(len(x)))
            with torch.no_grad():
                left = 1 - failed(spec, spec.values(network(points)))
            found[f"{name}, certified"].append((eps, max(low)))
            found[f"{name}, attacked"].append((eps, left))
            row(eps, name, clean, *low, left, flip if name == "rounded" else "")
    return plots.lines(found, "eps", "share of 50 images")


FINDINGS = {f.__name__: f for f in (gap, vacuous, depth, pareto, rounding)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="with tutorial/ and mnist/")
    parser.add_argument("--out", type=Path, default=Path("figures"), help="where figures go")
    parser.add_argument("--only", default=",".join(FINDINGS), help="some of the findings")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    arguments.out.mkdir(parents=True, exist_ok=True)
    tutorial = Tutorial(arguments.folder)
    for name in arguments.only.split(","):
        print(f"\n{FINDINGS[name].__doc__}")
        figure = FINDINGS[name](tutorial)
        if figure is not None:
            (arguments.out / f"{name}.svg").write_text(figure)


if __name__ == "__main__":
    main()
