"""Encoder output into the Thinker's input: embeddings scattered over placeholders, DeepStack taps laid out by token.

Shapes: B rows, T tokens, D width, N media tokens of the batch in the order in which their placeholders stand.
"""

from __future__ import annotations

import torch
from torch import Tensor


def merge_embeddings(embeds: Tensor, mask: Tensor, features: Tensor) -> Tensor:
    """Replace embeds [B, T, D] where mask [B, T] is True by features [N, D]. Raises ValueError if the counts differ."""
    wanted = int(mask.sum())
    if wanted != features.shape[0]:
        raise ValueError(f"{features.shape[0]} media embeddings do not fit {wanted} placeholder tokens")
    return embeds.masked_scatter(mask[..., None], features.to(embeds.dtype))


def lay_out_taps(taps: list[Tensor], mask: Tensor) -> Tensor:
    """DeepStack taps, each [N, D] -> [taps, B, T, D], zero wherever mask [B, T] is False."""
    stacked = torch.stack(taps)
    out = stacked.new_zeros(stacked.shape[0], *mask.shape, stacked.shape[-1])
    out[:, mask] = stacked
    return out
