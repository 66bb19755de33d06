"""torch's flex_attention (Dong et al., 2024), compiled at the first call: masks as functions, skipped by blocks.

It needs neither a mask in memory nor keys repeated for grouped queries. On a CPU it is several times slower than the
fused kernels and has no backward pass, so that the attention table uses it on CUDA only.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

_BLOCK = 128  # queries and keys to a block of the mask


@cache
def _kernel(device: str) -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True) if device == "cuda" else flex_attention


def _blocks_up_to(last: Tensor, keys: int, visible: Any) -> Any:
    """Block mask of queries whose last visible keys are `last` int64 [B, T], rising along T."""
    from torch.nn.attention.flex_attention import BlockMask

    B, T = last.shape
    ends = torch.arange(_BLOCK, T + _BLOCK, _BLOCK, device=last.device).clamp(max=T) - 1  # last query of each block
    columns = -(-keys // _BLOCK)
    counts = (last[:, ends] // _BLOCK + 1).clamp(max=columns)
    places = torch.arange(columns, dtype=torch.int32, device=last.device)
    return BlockMask.from_kv_blocks(
        counts.to(torch.int32)[:, None],
        places.expand(B, 1, len(ends), columns).contiguous(),
        BLOCK_SIZE=_BLOCK,
        mask_mod=visible,
        seq_lengths=(T, keys),
    )


def dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, causal: bool) -> Tensor:
    """q [B, H, T, D], k and v [B, Hkv, S, D], mask bool, broadcastable to [B, H, T, S] -> [B, H, T, D]."""
    T, S = q.shape[2], k.shape[2]

    def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return j <= i + (S - T)

    def masked(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return torch.where(allowed[b, h, i, j], score, float("-inf"))

    allowed = torch.empty(0) if mask is None else mask.expand(q.shape[0], q.shape[1], T, S)
    last = torch.arange(S - T, S, device=q.device).expand(q.shape[0], T)
    return _kernel(q.device.type)(
        *(q, k, v),
        score_mod=None if mask is None else masked,
        block_mask=_blocks_up_to(last, S, visible) if causal else None,
        enable_gqa=q.shape[1] != k.shape[1],
    )


def cached(q: Tensor, keys: Tensor, values: Tensor, slots: Tensor) -> Tensor:
    """Attention over a cache; shapes as in `cached_attention`."""

    def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return j <= slots[b, i]

    mask = _blocks_up_to(slots, keys.shape[2], visible)
    return _kernel(q.device.type)(q, keys, values, block_mask=mask, enable_gqa=q.shape[1] != keys.shape[1])
