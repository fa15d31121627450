"""Trains the two digits networks of the package, on one thread, in about a minute: ``python benchmarks/train_zoo.py``.

The data file is made from scikit-learn's copy of the UCI digits (``pip install scikit-learn``) if it is missing.
"""

from __future__ import annotations

import math
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from calipers import data
from calipers.sets import Region, ThreatModel
from calipers.zoo import ZOO

FOLDER = Path(data.__file__).parent / "zoo_data"
THREAT = ThreatModel(math.inf, "0.1")
EPOCHS, BATCH, STEPS = 120, 64, 7


def make_digits(path: Path) -> None:
    """All 1,797 digits as 0..16 in bytes, in one fixed random order: the last 500 are the test set."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    x = digits.images[order].astype(np.uint8)
    np.savez_compressed(path, x=x, y=digits.target[order].astype(np.uint8))


def adversarial(model: nn.Module, region: Region, x: Tensor, y: Tensor) -> Tensor:
    """PGD's point: signed steps of a quarter of eps from a random start."""
    start = x + (torch.rand_like(x) * 2 - 1) * 0.1
    point = region.project(start)
    for _ in range(STEPS):
        point.requires_grad_()
        (gradient,) = torch.autograd.grad(cross_entropy(model(point), y), point)
        point = region.project((point + 0.025 * gradient.sign()).detach())
    return point.detach()


def train(name: str, robust: bool) -> nn.Module:
    """The network ``name`` after EPOCHS epochs of Adam with a cosine schedule and weight decay."""
    torch.manual_seed(0)
    model = ZOO[name].build()
    train_set = data.load("digits", split="train")
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, EPOCHS)
    sparsity = 4e-4 if robust else 0.0  # small weights keep bounds tight
    for _ in range(EPOCHS):
        for index in torch.randperm(len(train_set)).split(BATCH):
            x, y = train_set.x[index], train_set.y[index]
            inputs = adversarial(model, THREAT.around(x), x, y) if robust else x
            loss = cross_entropy(model(inputs), y)
            if sparsity:
                loss = (
                    loss + sparsity * torch.stack([p.abs().sum() for p in model.parameters()]).sum()
                )
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        schedule.step()
    with torch.no_grad():
        for p in model.parameters():
            p[p.abs() < 1e-4] = 0.0  # what weight decay left over
    return model.eval()


def accuracy(model: nn.Module, robust: bool) -> float:
    test = data.load("digits")
    x = adversarial(model, THREAT.around(test.x), test.x, test.y) if robust else test.x
    return (model(x).argmax(1) == test.y).float().mean().item()


def main() -> None:
    torch.set_num_threads(1)
    if not (FOLDER / "digits.npz").exists():
        make_digits(FOLDER / "digits.npz")
    for name in ("digits_standard", "digits_pgd"):
        begin = time.perf_counter()
        model = train(name, robust=name == "digits_pgd")
        target = FOLDER / f"{name}.safetensors"
        save_file(model.state_dict(), target)
        target.chmod(0o644)
        took = time.perf_counter() - begin
        print(
            f"{name}: clean {accuracy(model, False):.3f}, PGD-7 {accuracy(model, True):.3f}, {took:.0f} s"
        )


if __name__ == "__main__":
    main()
