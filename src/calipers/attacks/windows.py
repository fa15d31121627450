"""Random windows of an input for `square`, drawn for a whole batch at once, each example by its own seed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

WORDS = 10  # random words per query and example


@dataclass(frozen=True)
class Layout:
    """Where windows lie: in images (``vector`` false) squares through all channels, else arithmetic progressions
    modulo n whose stride has no common factor with n, which are subsets of distinct features."""

    channels: int
    height: int
    width: int
    vector: bool
    strides: Tensor

    @classmethod
    def of(cls, shape: torch.Size, device: torch.device) -> Layout:
        n = math.prod(shape)
        image = len(shape) in (2, 3) and min(shape[-2:]) > 1
        channels = math.prod(shape[:-2]) if image else 1
        coprime = [s for s in range(1, n + 1) if image or math.gcd(s, n) == 1]
        strides = torch.tensor(coprime[:1] if image else coprime, device=device)
        height, width = shape[-2:] if image else (1, n)
        return cls(channels, height, width, not image, strides)

    def size(self, share: float) -> int:
        """The side of a square, or the size of a subset."""
        area = share * self.height * self.width
        if self.vector:
            return max(1, round(area))
        return min(max(1, round(math.sqrt(area))), self.height, self.width)

    def window(self, size: int, anchor: Tensor, words: Tensor) -> Tensor:
        """Features (..., k) of a window that holds the feature ``anchor`` (...), by two words (..., 2)."""
        shift = unit_of(words)
        if self.vector:
            stride = self.strides[(shift[..., 0] * len(self.strides)).long()]
            steps = torch.arange(size, device=anchor.device)
            return (anchor.unsqueeze(-1) + stride.unsqueeze(-1) * steps) % self.width
        back = (shift * size).long()
        row = anchor // self.width % self.height
        top = (row - back[..., 0]).clamp(0, self.height - size)
        left = (anchor % self.width - back[..., 1]).clamp(0, self.width - size)
        return (top * self.width + left).unsqueeze(-1) + self._offsets(size, anchor.device)

    def _offsets(self, size: int, device: torch.device) -> Tensor:
        return _offsets(self.channels, self.height, self.width, size).to(device)

    def signs(self, size: int, word: Tensor) -> Tensor:
        """(..., k) bool: one random bit per channel of a square, per feature of a subset."""
        k = size if self.vector else self.channels * size * size
        unit = torch.arange(k, device=word.device) // (1 if self.vector else size * size)
        return ((word.unsqueeze(-1) >> (unit % 63)) & 1).bool()


@cache
def _offsets(channels: int, height: int, width: int, size: int) -> Tensor:
    channel, row, column = torch.meshgrid(
        torch.arange(channels), torch.arange(size), torch.arange(size), indexing="ij"
    )
    return ((channel * height + row) * width + column).flatten()


@cache
def bumps_of(size: int, *, square: bool) -> Tensor:
    """(3, k): a bump that falls off from the middle, whole, and with its lower or its right half negative."""
    if not square:
        return torch.ones(3, size, dtype=torch.float64)
    line = torch.arange(size, dtype=torch.float64)
    line = torch.minimum(line, size - 1 - line)  # distance to the border
    depth = torch.minimum(line.unsqueeze(0), line.unsqueeze(1)).long()
    rings = torch.arange(int(depth.max()) + 1, dtype=torch.float64)
    height = (1 / (rings.max() - rings + 1).square()).cumsum(0)[depth]
    half = torch.where(torch.arange(size) < (size + 1) // 2, 1.0, -1.0)
    return torch.stack([height, height * half.unsqueeze(1), height * half]).flatten(1)


# -- randomness ----------------------------------------------------------------------------------------------------


def _signed(constant: int) -> int:
    return constant - 2**64 if constant >= 2**63 else constant


_STEP = _signed(0x9E3779B97F4A7C15)
_FACTORS = (_signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB))


def mix(z: Tensor) -> Tensor:
    """splitmix64's output function on int64, whose products wrap; shifts are made logical by a mask."""
    z = (z ^ ((z >> 30) & (2**34 - 1))) * _FACTORS[0]
    z = (z ^ ((z >> 27) & (2**37 - 1))) * _FACTORS[1]
    return z ^ ((z >> 31) & (2**33 - 1))


def random_words(key: Tensor, query: int, count: int, words: int = WORDS) -> Tensor:
    """Random int64 (count, B, words) for the queries from ``query`` on: a hash of key, query and place."""
    numbers = torch.arange(count * words, device=key.device).view(count, 1, words) + query * WORDS
    return mix(key.unsqueeze(-1) + (numbers + 1) * _STEP)


def unit_of(word: Tensor) -> Tensor:
    """Uniform in [0, 1), float64, from the upper 53 bits."""
    return ((word >> 11) & (2**53 - 1)).to(torch.float64) * 2.0**-53
