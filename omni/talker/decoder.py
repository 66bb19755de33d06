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
from omni.layers.decoder_layer import Context, Tables, run_layer
from omni.layers.decoder_state import DecoderState, prefill_contexts
from omni.layers.packing import PackedBlocks
from omni.talker.conditioning import user_spans


class TalkerOutput(NamedTuple):
    """logits [B, T, V] of codebook 0; hidden [B, T, D] after the final norm, which the residual-code head reads."""

    logits: Tensor
    hidden: Tensor
    router_logits: list[Tensor] | None = None


class TalkerDecoder(nn.Module):
    """The passes of a Talker; a family's class builds the modules named here and says what it hears.

    reads_replies: a reply token is heard by the Thinker's hidden state too, so the Thinker has to read it before it is
    spoken. hears_all: the whole prompt is heard, system, earlier turns and the head of the reply included; else the
    user's turns. prefix_length: inputs between the prompt and the first frame.
    """

    config: Any
    rope: Callable[[Tensor], Tables]
    codec_embedding: nn.Embedding
    layers: nn.ModuleList
    norm: nn.Module
    codec_head: nn.Linear
    mtp: Any  # the residual-code head, or what stands in for it where there is one codebook
    reads_replies = False
    hears_all = False
    prefix_length: int

    def init_state(self, batch_size: int, capacity: int = 256) -> DecoderState:
        """An empty state for `batch_size` rows; `capacity` positions are reserved, more on demand."""
        weight = self.codec_embedding.weight
        return DecoderState.create(self.config.text_config, batch_size, capacity, weight.device, weight.dtype)

    def heard_spans(self, ids: Sequence[int], im_start: int, user: int) -> list[tuple[int, int]]:
        """Token ranges [start, stop) of a prompt that are heard; im_start, user: ids that open a user's turn."""
        return [(0, len(ids))] if self.hears_all else user_spans(ids, im_start, user)

    def text_vectors(self, embeds: Tensor, hidden: Tensor | None = None) -> Tensor:
        """Text as it is heard [n, Di]: token embeddings [n, Dt] and, of tokens that were read, hidden states alike."""
        raise NotImplementedError

    def media_vectors(self, hidden: Tensor) -> Tensor:
        """Sound and vision as they are heard [n, Di], by the Thinker's hidden states [n, Dt]."""
        raise NotImplementedError

    def prompt_vectors(self, embeds: Tensor, hidden: Tensor, media: Tensor) -> Tensor:
        """The heard part of a prompt: embeds and hidden [T, Dt], media bool [T] -> [T, Di]."""
        text = self.text_vectors(embeds[~media], hidden[~media])
        out = text.new_empty(len(media), text.shape[-1])
        out[~media], out[media] = text, self.media_vectors(hidden[media]).to(text.dtype)
        return out

    def prefix_ids(self, header: Sequence[int], tts_pad: int, tts_bos: int, speaker: int) -> list[int]:
        """The text ids of the prefix, but for the first reply token; header: the ids that open the reply's turn."""
        raise NotImplementedError

    def assistant_prefix(self, text: Tensor, first: Tensor, speaker: int) -> Tensor:
        """The inputs between prompt and first frame [prefix_length, Di].

        text: vectors of `prefix_ids`; first [Di]: the vector of the first reply token.
        """
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
        rows, tokens, _ = embeds.shape
        router_logits: list[Tensor] | None = [] if with_router_logits else None
        contexts = prefill_contexts(state, blocks, len(self.layers), tokens)
        hidden = self._read(self.project_input(embeds), positions, contexts, router_logits)
        if state is not None:
            state.cache.advance(lengths or [tokens] * rows)
        return TalkerOutput(self.codec_head(hidden if with_logits else hidden[:, :0]), hidden, router_logits)

    def step(self, embeds: Tensor, state: DecoderState, active: Sequence[bool] | None = None) -> tuple[Tensor, Tensor]:
        """One further frame a row: embeds [B, Di] -> (logits of codebook 0 [B, V], hidden [B, D]).

        Rows where `active` is False stand still; their outputs mean nothing.
        """
        state.cache.reserve(1)
        logits, hidden = self.decode(embeds, state.step_positions(), state.cache.decode())
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
        hidden = self._read(self.project_input(embeds)[:, None], positions, caches, run=run)[:, 0]
        return self.codec_head(hidden), hidden

    def _read(
        self,
        x: Tensor,
        positions: Tensor,
        contexts: Sequence[Context | None],
        router_logits: list[Tensor] | None = None,
        run: Callable[..., Tensor] = run_layer,
    ) -> Tensor:
        """All layers and the final norm, x [B, T, D] -> [B, T, D]."""
        tables = self.rope(positions)
        for layer, context in zip(self.layers, contexts):
            x = run(layer, x, tables, context, router_logits)
        return self.norm(x)
