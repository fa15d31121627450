"""`nn.MultiheadAttention` for capture: torch's own form puts tokens before the batch; here the batch stays first."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_FORWARD = nn.MultiheadAttention.forward


@contextmanager
def batch_first() -> Iterator[None]:
    """While this lasts, layers with ``batch_first`` and without padding masks compute the same in another order."""
    nn.MultiheadAttention.forward = _forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.MultiheadAttention.forward = _FORWARD  # type: ignore[method-assign]


def _forward(
    self: nn.MultiheadAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *args: Any,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    given = (
        dict(zip(("key_padding_mask", "need_weights", "attn_mask"), args, strict=False)) | kwargs
    )
    mask = given.get("attn_mask")
    masked = given.get("key_padding_mask") is not None or (mask is not None and mask.ndim != 2)
    extra = self.bias_k is not None or self.add_zero_attn
    if not self.batch_first or query.ndim != 3 or masked or extra:
        return _FORWARD(self, query, key, value, *args, **kwargs)
    if self.in_proj_weight is not None:
        weights = self.in_proj_weight.chunk(3)
    else:
        weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
    biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
    split = (self.num_heads, self.head_dim)
    q, k, v = (
        torch.unflatten(F.linear(x, w, b), -1, split).transpose(1, 2)
        for x, w, b in zip((query, key, value), weights, biases, strict=True)
    )
    if mask is not None and mask.dtype == torch.bool:  # here it names what must not be seen
        mask = ~mask
    heads = F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2)
    return self.out_proj(heads), None
