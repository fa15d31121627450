"""Augmentation on the device, from one seed per example: the same for every batch size, device and process."""

from __future__ import annotations

import torch
from torch import Tensor

from calipers.seeds import mixed


def flip(x: Tensor, *, seeds: Tensor) -> Tensor:
    """Each image (B, C, H, W), mirrored left to right with probability one half."""
    turned = _draw(seeds, 1, 2, x.device).bool().reshape(-1, 1, 1, 1)
    return torch.where(turned, x.flip(-1), x)


def crop(x: Tensor, *, seeds: Tensor, padding: int = 2) -> Tensor:
    """Each image (B, C, H, W), shifted by up to ``padding`` pixels each way; what comes in repeats the edge.

    The same as padding by the edge's values and cropping at random: no value that the image does not have.

    Raises:
        ValueError: a negative padding.
    """
    if padding < 0:
        raise ValueError(f"padding: {padding} is negative")
    height, width = x.shape[-2:]
    down, right = (_draw(seeds, k, 2 * padding + 1, x.device) - padding for k in (2, 3))
    rows = (torch.arange(height, device=x.device) + down[:, None]).clamp_(0, height - 1)
    columns = (torch.arange(width, device=x.device) + right[:, None]).clamp_(0, width - 1)
    each = torch.arange(len(x), device=x.device)[:, None, None]
    return x.movedim(1, -1)[each, rows[:, :, None], columns[:, None, :]].movedim(-1, 1).contiguous()


def flip_and_crop(x: Tensor, *, seeds: Tensor, padding: int = 2) -> Tensor:
    """`flip`, then `crop`: the usual augmentation of small photographs."""
    return crop(flip(x, seeds=seeds), seeds=seeds, padding=padding)


def _draw(seeds: Tensor, purpose: int, count: int, device: torch.device) -> Tensor:
    """A whole number below ``count`` for each seed."""
    return (mixed(seeds, purpose) % count).to(device)
