"""Every way of computing attention behind one function and one table.

Shapes: q [B, H, T, D]; k, v [B, Hkv, S, D] with H a multiple of Hkv; `mask` bool, broadcastable to [B, H, T, S], True
where a query may look; `causal` lets query i of T see the keys up to S - T + i.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F


def plain_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
    """Softmax attention written out, fp32 softmax: the oracle of every other entry."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = (q @ k.transpose(-1, -2)).float() * q.shape[-1] ** -0.5
    if causal:
        T, S = q.shape[-2], k.shape[-2]
        allowed = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
        scores = scores.masked_fill(~allowed, float("-inf"))
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return scores.softmax(-1).to(v.dtype) @ v


def sdpa_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
    """torch's fused kernels."""
    if causal and (mask is not None or q.shape[-2] != k.shape[-2]):
        T, S = q.shape[-2], k.shape[-2]
        allowed = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
        mask = allowed if mask is None else mask & allowed
        causal = False
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=grouped)


ATTENTION: dict[str, Callable[..., Tensor]] = {"plain": plain_attention, "sdpa": sdpa_attention}


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *, causal: bool = False, backend: str = "sdpa"
) -> Tensor:
    """Scaled dot-product attention -> [B, H, T, D]. Raises ValueError for an unknown backend."""
    if backend not in ATTENTION:
        raise ValueError(f"attention backend {backend!r} is not one of {sorted(ATTENTION)}")
    return ATTENTION[backend](q, k, v, mask, causal)


def packed_attention(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], *, backend: str = "sdpa") -> Tensor:
    """Attention inside consecutive blocks of one packed row: q, k, v [N, H, D] with sum(lengths) = N -> [N, H, D].

    Blocks of equal length share one call, so there is neither padding nor an N x N mask.
    """
    assert sum(lengths) == q.shape[0], "block lengths must cover the packed row"
    starts = torch.tensor(lengths).cumsum(0) - torch.tensor(lengths)
    out = torch.empty_like(q)
    for length in sorted(set(lengths)):
        if length == 0:
            continue
        rows = starts[torch.tensor(lengths) == length]
        index = (rows[:, None] + torch.arange(length)).flatten().to(q.device)
        blocks = [x[index].unflatten(0, (-1, length)).transpose(1, 2) for x in (q, k, v)]  # [blocks, H, length, D]
        done = attention(*blocks, backend=backend)
        out = out.index_copy(0, index, done.transpose(1, 2).flatten(0, 1))
    return out
