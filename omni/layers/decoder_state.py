"""What a decoder remembers between calls: its key-value cache and the position of the next token of every row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from omni.config.decoder import DecoderConfig
from omni.layers.attention_backends import packed_attention
from omni.layers.cache import KVCache
from omni.layers.decoder_layer import Context
from omni.layers.packing import PackedBlocks
from omni.layers.state import State


@dataclass
class DecoderState(State):
    """State of the Thinker or the Talker. next_position fp32 [B] (fractional after a video)."""

    cache: KVCache
    next_position: Tensor

    @classmethod
    def create(
        cls, config: DecoderConfig, batch: int, capacity: int, device: torch.device, dtype: torch.dtype
    ) -> DecoderState:
        """An empty state with room for `capacity` tokens a row (it grows when more come)."""
        cache = KVCache.create(
            config.num_hidden_layers, batch, config.num_key_value_heads, capacity, config.head_size, device, dtype
        )
        return cls(cache, torch.zeros(batch, device=device))

    def step_positions(self) -> Tensor:
        """fp32 [3, B, 1]: positions of one further token a row, which is text; a view of `next_position`."""
        return self.next_position.view(1, -1, 1).expand(3, -1, -1)

    def step(self, active: Tensor) -> None:
        """Count on the device one further token of every row where `active` bool [B] is True."""
        self.cache.length += active.to(self.cache.length.device)
        self.next_position += active.to(self.next_position.device)

    def count_step(self, active: Sequence[bool] | None) -> None:
        """Count one further token of every row that is `active` (None: of all)."""
        moves = [True] * len(self.next_position) if active is None else list(active)
        self.step(torch.tensor(moves, device=self.next_position.device))
        self.cache.count(moves)


@dataclass(eq=False)
class PackedRow:
    """The one row holds several sequences, and each token sees those before it in its own."""

    blocks: PackedBlocks

    def attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [1, H, T, hd], k and v [1, Hkv, T, hd] -> [1, H, T, hd]."""
        q, k, v = (each[0].transpose(0, 1) for each in (q, k, v))
        return packed_attention(q, k, v, self.blocks).transpose(0, 1)[None]


def prefill_contexts(
    state: DecoderState | None, blocks: PackedBlocks | None, layers: int, tokens: int
) -> Sequence[Context | None]:
    """What each of the layers sees beside its `tokens` new tokens a row: its cache, which gets room for them; or the
    limits of a packed row's sequences, which is read at once; or nothing (neither). Raises ValueError for both.
    """
    if state is None:
        return [None if blocks is None else PackedRow(blocks)] * layers
    if blocks is not None:
        raise ValueError(
            f"a packed row (here of {len(blocks.lengths)} sequences) is read at once and takes no state; "
            "pass blocks or state, not both"
        )
    state.cache.reserve(tokens)
    return state.cache.prefill(tokens)
