"""Trains the small convolutional MNIST network that the attack benchmark breaks at eps 0.3, on one thread.

    python benchmarks/train_mnist.py DATA_DIR OUT.safetensors [--eps 0.3] [--epochs 12]

PGD training (seven signed steps of eps / 4 from a random start), eps rising over the first quarter of the epochs.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from calipers import data

STEPS, BATCH = 7, 100


def network() -> nn.Sequential:
    """Two strided convolutions and two linear layers, 166,406 parameters."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 4, stride=2, padding=1), nn.ReLU(),
        nn.Conv2d(16, 32, 4, stride=2, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(32 * 7 * 7, 100), nn.ReLU(), nn.Linear(100, 10),
    )  # fmt: skip


def adversarial(model: nn.Module, x: Tensor, y: Tensor, eps: float) -> Tensor:
    low, high = (x - eps).clamp_min(0.0), (x + eps).clamp_max(1.0)
    point = (x + eps * (2 * torch.rand_like(x) - 1)).clamp(0.0, 1.0)
    for _ in range(STEPS):
        point.requires_grad_()
        (gradient,) = torch.autograd.grad(cross_entropy(model(point), y, reduction="sum"), point)
        point = (point.detach() + eps / 4 * gradient.sign()).clamp(low, high)
    return point


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data_dir", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--eps", type=float, default=0.3)
    parser.add_argument("--epochs", type=int, default=12)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    train = data.load("mnist", data_dir=arguments.data_dir, split="train")
    test = data.load("mnist", data_dir=arguments.data_dir)
    model = network()
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-3)
    steps = arguments.epochs * (len(train) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, total_steps=steps)
    done, begin = 0, time.perf_counter()
    for epoch in range(arguments.epochs):
        for index in torch.randperm(len(train)).split(BATCH)[: len(train) // BATCH]:
            x, y = train.x[index], train.y[index]
            eps = arguments.eps * min(1.0, 4 * done / steps)
            loss = cross_entropy(model(adversarial(model, x, y, eps)), y)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
            done += 1
        x, y = test.x[:1000], test.y[:1000]
        clean = (model(x).argmax(1) == y).float().mean().item()
        attacked = adversarial(model, x, y, arguments.eps)
        robust = (model(attacked).argmax(1) == y).float().mean().item()
        spent = time.perf_counter() - begin
        print(
            f"epoch {epoch + 1}: clean {clean:.3f} PGD-{STEPS} {robust:.3f} {spent:.0f} s",
            flush=True,
        )
    save_file(model.state_dict(), str(arguments.out))


if __name__ == "__main__":
    main()
