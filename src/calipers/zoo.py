"""Networks known by name: two trained digits networks in the package, and the architectures of a tutorial.

The tutorial is Kolter and Madry's "Adversarial Robustness: Theory and Practice"; its weights are not shipped, its
architectures take them with ``--weights`` (the modules' parameter names are those of its state dicts).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import nn


def mlp(inputs: int, *widths: int) -> nn.Sequential:
    """Flatten, then linear layers with ReLU between; the last width is the number of classes."""
    sizes = (inputs, *widths)
    layers: list[nn.Module] = [nn.Flatten()]
    for i, (before, after) in enumerate(zip(sizes, widths, strict=False)):
        layers += [nn.ReLU()] if i else []
        layers.append(nn.Linear(before, after))
    return nn.Sequential(*layers)


def tutorial_cnn(strides: tuple[int, int, int, int]) -> nn.Sequential:
    """Four 3x3 convolutions (32, 32, 64, 64 channels) with these strides on 28x28, then 3136-100-10."""
    channels = (1, 32, 32, 64, 64)
    layers: list[nn.Module] = []
    for i, stride in enumerate(strides):
        layers += [nn.Conv2d(channels[i], channels[i + 1], 3, stride, 1), nn.ReLU()]
    layers += [nn.Flatten(), nn.Linear(7 * 7 * 64, 100), nn.ReLU(), nn.Linear(100, 10)]
    return nn.Sequential(*layers)


@dataclass(frozen=True)
class Entry:
    """An architecture, the shape of its inputs, and the packaged weights (a file in ``zoo_data``) if it has any."""

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    about: str
    weights: str | None = None


_DIGITS = partial(mlp, 64, 64, 32, 10)
_IMAGE = (1, 28, 28)

ZOO: dict[str, Entry] = {
    "digits_standard": Entry(
        _DIGITS, (1, 8, 8), "96 ReLUs, standard training", "digits_standard.safetensors"
    ),
    "digits_pgd": Entry(
        _DIGITS, (1, 8, 8), "96 ReLUs, trained on PGD at linf 0.1", "digits_pgd.safetensors"
    ),
    "tutorial_dnn_2": Entry(partial(mlp, 784, 200, 10), _IMAGE, "784-200-10"),
    "tutorial_dnn_4": Entry(partial(mlp, 784, 200, 100, 100, 10), _IMAGE, "784-200-100-100-10"),
    "tutorial_small": Entry(partial(mlp, 784, 50, 20, 10), _IMAGE, "784-50-20-10"),
    "tutorial_cnn": Entry(
        partial(tutorial_cnn, (1, 2, 1, 2)), _IMAGE, "4 convolutions, strides 1 2 1 2"
    ),
    "tutorial_cnn_robust_2": Entry(
        partial(tutorial_cnn, (2, 1, 1, 2)), _IMAGE, "4 convolutions, strides 2 1 1 2"
    ),
}
