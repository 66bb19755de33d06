"""Attention inside blocks of frames, some layers of which also see the neighbouring blocks.

The frames are cut into blocks; a query sees every frame of its own block and of `back` blocks before and `ahead` blocks
after it. Blocks become rows of one attention call, so that cost and memory grow with the number of frames and no mask
of frames by frames exists. `block_mask` is that mask, for tests and other kernels.
Shapes: B rows, H heads, N frames, hd head width, S frames a block.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from omni.layers.attention_backends import attention


def block_mask(frames: int, block: int, back: int = 0, ahead: int = 0) -> Tensor:
    """bool [N, N]: True where query n (a row) may see key m."""
    index = torch.arange(frames) // block
    distance = index - index[:, None]
    return (distance >= -back) & (distance <= ahead)


def block_attention(
    q: Tensor, k: Tensor, v: Tensor, *, block: int, back: int = 0, ahead: int = 0, lengths: Tensor | None = None
) -> Tensor:
    """q, k, v [B, H, N, hd] -> [B, H, N, hd], as dense attention under `block_mask` gives.

    With `lengths` int64 [B] no query sees frames at or beyond its row's length; what those frames get is finite and
    means nothing.
    """
    rows, _, frames, _ = q.shape
    blocks = -(-frames // block)
    parts = [_into_blocks(x, blocks, block) for x in (q, k, v)]  # each [B, blocks, H, S, hd]
    keys, values = (_with_neighbours(x, back, ahead, dim=3).flatten(0, 1) for x in parts[1:])
    visible = None
    if lengths is not None or back or ahead or frames % block:
        length = torch.tensor([frames], device=q.device) if lengths is None else lengths
        real = (torch.arange(blocks * block, device=q.device) < length[:, None]).unflatten(1, (blocks, block))
        visible = _with_neighbours(real, back, ahead, dim=2)  # [B or 1, blocks, (back + 1 + ahead) * S]
        if lengths is not None:  # a block of nothing but padding sees itself: no row of the softmax is empty
            visible[..., back * block : (back + 1) * block] |= ~real.any(2, keepdim=True)
        visible = visible.expand(rows, -1, -1).flatten(0, 1)[:, None, None]
    y = attention(parts[0].flatten(0, 1), keys, values, visible)
    return y.unflatten(0, (rows, blocks)).transpose(1, 2).flatten(2, 3)[:, :, :frames]


def _into_blocks(x: Tensor, blocks: int, block: int) -> Tensor:
    """[B, H, N, hd] -> [B, blocks, H, S, hd], the last block filled up with zeros."""
    padding = blocks * block - x.shape[2]
    x = F.pad(x, (0, 0, 0, padding)) if padding else x
    return x.unflatten(2, (blocks, block)).transpose(1, 2)


def _with_neighbours(x: Tensor, back: int, ahead: int, dim: int) -> Tensor:
    """Join each block, of those along dimension 1, with the blocks around it along `dim`; zeros outside the signal."""
    if not back and not ahead:
        return x.clone() if x.dtype == torch.bool else x
    blocks = x.shape[1]
    edge = x.new_zeros(x.shape[0], 1, *x.shape[2:])
    x = torch.cat((*[edge] * back, x, *[edge] * ahead), dim=1)
    return torch.cat([x[:, i : i + blocks] for i in range(back + 1 + ahead)], dim=dim)
