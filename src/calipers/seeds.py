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


def _digest(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little") >> 1
