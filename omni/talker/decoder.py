"""What the Talkers of all families share: a decoder that reads vectors and writes the logits of codebook 0.

Shapes: B rows, T tokens or frames, D Talker width, Di width of its inputs, Dt Thinker width, V codec vocabulary, K
codebooks. Rows are left-aligned.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from omni.layers.cache import LayerCache
from omni.layers.decoder_layer import Tables, run_layer
from omni.layers.decoder_state import DecoderState, layer_views
from omni.layers.moe import MoE
from omni.layers.packing import PackedBlocks


class TalkerOutput(NamedTuple):
    """logits [B, T, V] of codebook 0; hidden [B, T, D] after the final norm, which the residual-code head reads."""

    logits: Tensor
    hidden: Tensor
    router_logits: list[Tensor] | None = None


class TalkerDecoder(nn.Module):
    """The passes of a Talker, and its inputs as vectors; a family's class builds the modules named here.

    What is read where is the business of the family's `TurnLayout` (`omni.talker.layout`).
    """

    config: Any
    rope: Callable[[Tensor], Tables]
    codec_embedding: nn.Embedding
    layers: nn.ModuleList
    norm: nn.Module
    codec_head: nn.Linear
    mtp: Any  # the residual-code head, or what stands in for it where there is one codebook

    def init_state(self, batch_size: int, capacity: int = 256) -> DecoderState:
        """An empty state for `batch_size` rows; `capacity` positions are reserved, more on demand."""
        weight = self.codec_embedding.weight
        return DecoderState.create(self.config.text_config, batch_size, capacity, weight.device, weight.dtype)

    def text_vectors(self, embeds: Tensor, hidden: Tensor | None = None) -> Tensor:
        """Inputs of text [n, Di]: token embeddings [n, Dt] and, of tokens that the Thinker has read, its hidden states
        [n, Dt]."""
        raise NotImplementedError

    def media_vectors(self, hidden: Tensor) -> Tensor:
        """Inputs of sound and vision [n, Di], from the Thinker's hidden states [n, Dt]."""
        raise NotImplementedError

    def prompt_vectors(self, embeds: Tensor, hidden: Tensor, media: Tensor) -> Tensor:
        """The inputs of a prompt: embeds and hidden [T, Dt], media bool [T] -> [T, Di]."""
        text = self.text_vectors(embeds[~media], hidden[~media])
        out = text.new_empty(len(media), text.shape[-1])
        out[~media], out[media] = text, self.media_vectors(hidden[media]).to(text.dtype)
        return out

    def prefix_vectors(self, text: Tensor, codec: Tensor) -> Tensor:
        """The inputs between prompt and first frame: text [P, Di] of all slots, codec [n, Di] of the last n."""
        plain = len(text) - len(codec)
        return torch.cat((text[:plain], text[plain:] + codec))

    def embed_frames(self, codes: Tensor) -> Tensor:
        """codes int64 [N, K] -> the sum of each frame's K code embeddings [N, Di]."""
        raise NotImplementedError

    def suppressed(self) -> Tensor:
        """bool [V]: codec ids that are never drawn."""
        raise NotImplementedError

    def seen_at_first(self) -> Tensor:
        """bool [V]: codec ids that the repetition penalty counts from the start."""
        return torch.zeros(self.codec_head.out_features, dtype=torch.bool, device=self.codec_embedding.weight.device)

    def project_input(self, embeds: Tensor) -> Tensor:
        """Inputs [..., Di] -> [..., D]; where the two widths are one, nothing is done."""
        return embeds

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
        """Read embeds [B, T, Di] at positions fp32 [3, B, T] after what the state holds.

        lengths: inputs of each row, the rest is padding (None: all T). blocks: several turns in one row (B = 1), which
        do not see each other (training; takes no state). Without `with_logits` they are [B, 0, V].
        """
        x = self.project_input(embeds)
        router_logits: list[Tensor] | None = [] if with_router_logits else None
        tables = self.rope(positions)
        views = layer_views(state, blocks, len(self.layers), x.shape[1])
        for layer, view in zip(self.layers, views):
            x = layer(x, tables, view, router_logits if isinstance(layer.mlp, MoE) else None)
        if state is not None:
            state.cache.advance(lengths or [x.shape[1]] * x.shape[0])
        x = self.norm(x)
        return TalkerOutput(self.codec_head(x if with_logits else x[:, :0]), x, router_logits)

    def step(self, embeds: Tensor, state: DecoderState, active: Sequence[bool] | None = None) -> tuple[Tensor, Tensor]:
        """One further frame a row: embeds [B, Di] -> (logits of codebook 0 [B, V], hidden [B, D]).

        Rows where `active` is False stand still; their outputs mean nothing.
        """
        state.cache.reserve(1)
        logits, hidden = self.decode(embeds, state.step_positions(), state.cache.layers(1))
        state.count_step(active)
        return logits, hidden

    def decode(
        self,
        embeds: Tensor,
        positions: Tensor,
        caches: Sequence[LayerCache],
        run: Callable[..., Tensor] = run_layer,
    ) -> tuple[Tensor, Tensor]:
        """The same as a function of tensors alone: embeds [B, Di], positions fp32 [3, B, 1], one view of the cache a
        layer. The caller counts the frame (`DecoderState.step`, `KVCache.count`); `run` is how a layer is run.
        """
        x = self.project_input(embeds)[:, None]
        tables = self.rope(positions)
        for layer, cache in zip(self.layers, caches):
            x = run(layer, x, tables, cache)
        hidden = self.norm(x)[:, 0]
        return self.codec_head(hidden), hidden
