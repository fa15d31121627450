"""Randomness per example: results do not depend on batch, order, chunk or worker."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def seeds(x: Tensor, run_seed: int, method: str, restart: int = 0) -> Tensor:
    """One seed per example, (B,) int64, from the run's seed, the example's bytes, the method and the restart."""
    salt = f"{run_seed}:{method}:{restart}:".encode()
    rows = x.detach().cpu().contiguous().flatten(1)
    return torch.tensor(
        [_digest(salt + row.view(torch.uint8).numpy().tobytes()) for row in rows.unbind()],
        dtype=torch.int64,
    )


def mixed(seeds: Tensor, number: int | Tensor) -> Tensor:
    """New seeds from ``seeds`` (B,) for the purpose ``number`` (one, or one each): the finaliser of splitmix64."""
    step = torch.as_tensor(number, dtype=torch.int64, device=seeds.device) + 1
    z = seeds + step * -7046029254386353131  # the golden ratio in 64 bits; products wrap around
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685)):
        z = (z ^ ((z >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return (z ^ ((z >> 31) & ((1 << 33) - 1))) & ((1 << 63) - 1)


def _digest(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little") >> 1
