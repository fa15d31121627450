"""The architectures of the literature on certified training: plain `nn.Sequential`, normalisation inside.

Sizes are multiply-adds for one 28x28 image: ``wong_small`` 0.6 M, ``gowal_small`` 1.2 M, ``stretch`` 2.5 M,
``gowal_medium`` 6.2 M, ``cnn5`` 46 M, ``cnn7`` 114 M. The tutorial's networks are `calipers.zoo`'s.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Conv(NamedTuple):
    """A square convolution: output channels, kernel, stride, padding."""

    channels: int
    kernel: int
    stride: int = 1
    padding: int = 0


class Normalise(nn.Module):
    """(x − mean) / std by channel, as the first layer: radii stay in input units."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).reshape(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std).reshape(-1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


def convolutional(
    shape: tuple[int, int, int],
    convolutions: Sequence[Conv],
    hidden: Sequence[int],
    classes: int = 10,
    *,
    norm: bool = False,
    mean: Sequence[float] | None = None,
    std: Sequence[float] = (1.0,),
) -> nn.Sequential:
    """Convolutions, then linear layers, with ReLU between; with ``norm`` batch normalisation before every ReLU.

    Args:
        shape: (channels, height, width) of an input.
        hidden: widths of the linear layers before the last.
        norm: also behind hidden linear layers, without which interval training of deep networks does not start.
        mean, std: of the inputs' channels; None leaves inputs as they are.
    """
    layers: list[nn.Module] = [] if mean is None else [Normalise(mean, std)]
    channels, *size = shape
    for c in convolutions:
        layers.append(nn.Conv2d(channels, c.channels, c.kernel, c.stride, c.padding))
        layers += [nn.BatchNorm2d(c.channels)] if norm else []
        layers.append(nn.ReLU())
        channels, size = c.channels, [(n + 2 * c.padding - c.kernel) // c.stride + 1 for n in size]
    layers.append(nn.Flatten())
    width = channels * size[0] * size[1]
    for features in hidden:
        layers.append(nn.Linear(width, features))
        layers += [nn.BatchNorm1d(features)] if norm else []
        layers.append(nn.ReLU())
        width = features
    return nn.Sequential(*layers, nn.Linear(width, classes))


MNIST = (1, 28, 28)
CIFAR = (3, 32, 32)


def wong_small(shape: tuple[int, int, int] = MNIST, *, norm: bool = False) -> nn.Sequential:
    """Two strided convolutions and 100 features.

    Reference: Wong and Kolter 2018.
    """
    return convolutional(shape, (Conv(16, 4, 2, 1), Conv(32, 4, 2, 1)), (100,), norm=norm)


def stretch(shape: tuple[int, int, int] = MNIST, *, norm: bool = False) -> nn.Sequential:
    """`wong_small` at twice its width: what two CPU cores can train with certificates in three quarters of an hour."""
    return convolutional(shape, (Conv(32, 4, 2, 1), Conv(64, 4, 2, 1)), (256,), norm=norm)


def gowal_small(shape: tuple[int, int, int] = MNIST, *, norm: bool = False) -> nn.Sequential:
    """Two unpadded convolutions and 100 features.

    Reference: Gowal et al. 2018, table 1.
    """
    return convolutional(shape, (Conv(16, 4, 2), Conv(32, 4)), (100,), norm=norm)


def gowal_medium(shape: tuple[int, int, int] = MNIST, *, norm: bool = False) -> nn.Sequential:
    """Four unpadded convolutions and twice 512 features.

    Reference: Gowal et al. 2018, table 1.
    """
    layers = (Conv(32, 3), Conv(32, 4, 2), Conv(64, 3), Conv(64, 4, 2))
    return convolutional(shape, layers, (512, 512), norm=norm)


def cnn5(
    shape: tuple[int, int, int] = CIFAR,
    *,
    norm: bool = True,
    classes: int = 10,
    mean: Sequence[float] | None = None,
    std: Sequence[float] = (1.0,),
) -> nn.Sequential:
    """`cnn7` without its second and fourth convolution."""
    layers = (Conv(64, 3, 1, 1), Conv(128, 3, 2, 1), Conv(128, 3, 1, 1))
    return convolutional(shape, layers, (512,), classes, norm=norm, mean=mean, std=std)


def cnn7(
    shape: tuple[int, int, int] = CIFAR,
    *,
    norm: bool = True,
    classes: int = 10,
    mean: Sequence[float] | None = None,
    std: Sequence[float] = (1.0,),
) -> nn.Sequential:
    """Five convolutions and 512 features, normalised behind every hidden layer: the reference of certified training.

    Reference: Shi et al. 2021, section 4.1.
    """
    layers = (Conv(64, 3, 1, 1), Conv(64, 3, 1, 1), Conv(128, 3, 2, 1), Conv(128, 3, 1, 1))
    return convolutional(
        shape, (*layers, Conv(128, 3, 1, 1)), (512,), classes, norm=norm, mean=mean, std=std
    )
