"""The Talker: a mixture-of-experts decoder over codebook 0, with its residual-code head (Qwen3-Omni, section 2.4).

Shapes: B rows, T tokens or frames, D Talker width, Dt Thinker width, V codec vocabulary, K codebooks. Rows are
left-aligned. One frame is 80 ms in the release.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from omni.config import TalkerConfig
from omni.layers.cache import LayerCache
from omni.layers.decoder_layer import DecoderLayer, run_layer
from omni.layers.decoder_state import DecoderState
from omni.layers.moe import MoE
from omni.layers.norm import RMSNorm
from omni.layers.packing import PackedBlocks
from omni.rope.tm_rope import TMRope
from omni.talker.mtp import MTP


class TalkerOutput(NamedTuple):
    """logits [B, T, V] of codebook 0; hidden [B, T, D] after the final norm, which the residual-code head reads."""

    logits: Tensor
    hidden: Tensor
    router_logits: list[Tensor] | None = None


class Projection(nn.Module):
    """Thinker width -> Talker width: Linear, SiLU, Linear. [..., Dt] -> [..., D]."""

    def __init__(self, config: TalkerConfig) -> None:
        super().__init__()
        text = config.text_config
        self.linear_fc1 = nn.Linear(config.thinker_hidden_size, text.intermediate_size)
        self.linear_fc2 = nn.Linear(text.intermediate_size, text.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_fc2(F.silu(self.linear_fc1(x)))


class Talker(nn.Module):
    """Codec embedding, decoder, codebook-0 head, residual-code head, and the projections of its conditioning."""

    def __init__(self, config: TalkerConfig) -> None:
        super().__init__()
        text = config.text_config
        self.config = config
        self.rope = TMRope(text.head_size, text.theta, text.mrope_section)
        self.text_projection = Projection(config)
        self.hidden_projection = Projection(config)
        self.codec_embedding = nn.Embedding(text.vocab_size, text.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(text, MoE(text)) for _ in range(text.num_hidden_layers))
        self.norm = RMSNorm(text.hidden_size, text.rms_norm_eps)
        self.codec_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        self.mtp = MTP(config.code_predictor_config)

    def init_state(self, batch_size: int, capacity: int = 256) -> DecoderState:
        """An empty state for `batch_size` rows; `capacity` positions are reserved, more on demand."""
        weight = self.codec_embedding.weight
        return DecoderState.create(self.config.text_config, batch_size, capacity, weight.device, weight.dtype)

    def suppressed(self) -> Tensor:
        """bool [V]: codec ids that are never drawn: the last 1024 ids except the end of speech."""
        mask = torch.arange(self.config.text_config.vocab_size, device=self.codec_embedding.weight.device)
        return (mask >= self.config.num_codes) & (mask != self.config.codec_eos_token_id)

    def embed_frames(self, codes: Tensor) -> Tensor:
        """codes int64 [N, K] -> the sum of each frame's K code embeddings [N, D]."""
        return self.codec_embedding(codes[:, 0]) + self.mtp.embed_residual(codes[:, 1:]).sum(1)

    def forward(
        self,
        embeds: Tensor,
        positions: Tensor,
        state: DecoderState | None = None,
        *,
        lengths: Sequence[int] | None = None,
        blocks: PackedBlocks | None = None,
        with_logits: bool = True,
        with_router_logits: bool = False,
    ) -> TalkerOutput:
        """Read embeds [B, T, D] at positions fp32 [3, B, T] after what the state holds.

        lengths: inputs of each row, the rest is padding (None: all T). blocks: several turns in one row (B = 1), which
        do not see each other (training; takes no state). Without `with_logits` they are [B, 0, V].
        """
        x = embeds
        router_logits: list[Tensor] | None = [] if with_router_logits else None
        tables = self.rope(positions)
        cache = state.cache if state is not None else None
        views: Sequence[LayerCache | PackedBlocks | None] = [blocks] * len(self.layers)
        assert blocks is None or cache is None, "a packed row is read at once"
        if cache is not None:
            cache.reserve(x.shape[1])
            views = cache.layers(x.shape[1])
        for layer, view in zip(self.layers, views):
            x = layer(x, tables, view, router_logits)
        if cache is not None:
            cache.advance(lengths or [x.shape[1]] * x.shape[0])
        x = self.norm(x)
        return TalkerOutput(self.codec_head(x if with_logits else x[:, :0]), x, router_logits)

    def step(self, embeds: Tensor, state: DecoderState, active: Sequence[bool] | None = None) -> tuple[Tensor, Tensor]:
        """One further frame a row: embeds [B, D] -> (logits of codebook 0 [B, V], hidden [B, D]).

        Rows where `active` is False stand still; their outputs mean nothing.
        """
        moves = [True] * len(embeds) if active is None else list(active)
        state.cache.reserve(1)
        logits, hidden = self.decode(embeds, state.step_positions(), state.cache.layers(1))
        state.step(torch.tensor(moves, device=embeds.device))
        state.cache.count(moves)
        return logits, hidden

    def decode(
        self,
        embeds: Tensor,
        positions: Tensor,
        caches: Sequence[LayerCache],
        run: Callable[..., Tensor] = run_layer,
    ) -> tuple[Tensor, Tensor]:
        """The same as a function of tensors alone: embeds [B, D], positions fp32 [3, B, 1], one view of the cache a
        layer. The caller counts the frame (`DecoderState.step`, `KVCache.count`); `run` is how a layer is run.
        """
        x = embeds[:, None]
        tables = self.rope(positions)
        for layer, cache in zip(self.layers, caches):
            x = run(layer, x, tables, cache)
        hidden = self.norm(x)[:, 0]
        return self.codec_head(hidden), hidden
