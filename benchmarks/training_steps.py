"""What a training step costs, relative to a standard step (forward, backward, Adam), in one run on one thread.

    python benchmarks/training_steps.py [--batch 256] [--rounds 15] [--networks NAME ...] [--quick]

The steps of all objectives take turns, so that all see the same machine; medians of CPU time are compared.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from functools import partial
from statistics import median

import torch

from calipers import ThreatModel
from calipers.graph.capture import capture
from calipers.training import networks, objectives
from calipers.training.allocation import keep_freed_memory
from calipers.training.initialise import ibp_initialise

NETWORKS = {
    "wong_small": networks.wong_small,
    "stretch": networks.stretch,
    "wong_small, BN": partial(networks.wong_small, norm=True),
    "stretch, BN": partial(networks.stretch, norm=True),
}
OBJECTIVES = {
    "standard": objectives.standard,
    "ibp, weight 1": objectives.ibp,
    "ibp, weight 0.7": partial(objectives.ibp, weight=0.7),
    "ibp, 0.7, regulariser": partial(objectives.ibp, weight=0.7, regularise=0.5, eps_max=0.2),
    "fgsm_rs": objectives.fgsm_rs,
    "fgsm_rs, its own batch": partial(objectives.fgsm_rs, policy="adversarial_batch"),
    **{f"pgd-{k}": partial(objectives.pgd, steps=k) for k in (3, 10)},
    "sabr-8": partial(objectives.sabr, weight=0.7),
    "mtl_ibp-1": partial(objectives.mtl_ibp, steps=1),
    "crown_ibp": objectives.crown_ibp,
    "taps": objectives.taps,
}
GOALS: dict[str, float] = {
    **{f"pgd-{k}": 0.75 * k + 1.1 for k in (3, 10)},
    **dict.fromkeys(("fgsm_rs", "fgsm_rs, its own batch"), 1.85),
    **dict.fromkeys(("ibp, weight 1", "ibp, weight 0.7", "ibp, 0.7, regulariser"), 3.2),
}


def stepper(
    build: Callable[[], torch.nn.Module], objective: objectives.Objective, batch: int
) -> Callable[[], None]:
    torch.manual_seed(0)
    module = build()
    ibp_initialise(module)
    x, y = torch.rand(batch, 1, 28, 28), torch.randint(10, (batch,))
    network = capture(module, x[:2])
    optimiser = torch.optim.Adam(module.parameters(), lr=1e-6)
    threat, seeds = ThreatModel(math.inf, 0.1), torch.arange(batch)
    module.train()

    def step() -> None:
        optimiser.zero_grad()
        objective(network, x, y, threat, seeds=seeds).total.backward()
        optimiser.step()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--quick", action="store_true", help="only objectives with a goal")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()  # as `train` does
    chosen = {
        k: f for k, f in OBJECTIVES.items() if k in GOALS or k == "standard" or not arguments.quick
    }
    for name in arguments.networks:
        steps = {k: stepper(NETWORKS[name], f, arguments.batch) for k, f in chosen.items()}
        seconds: dict[str, list[float]] = {k: [] for k in steps}
        for _ in range(arguments.rounds + 1):
            for key, step in steps.items():
                begin = time.process_time()
                step()
                seconds[key].append(time.process_time() - begin)
        costs = {k: median(v[1:]) for k, v in seconds.items()}
        print(
            f"{name}, batch {arguments.batch}: standard {1e3 * costs['standard']:.1f} ms",
            flush=True,
        )
        for key, cost in costs.items():
            ratio, goal = cost / costs["standard"], GOALS.get(key)
            print(f"  {key:24s} {ratio:6.2f}{f'   goal {goal:.2f}' if goal else ''}")


if __name__ == "__main__":
    main()
