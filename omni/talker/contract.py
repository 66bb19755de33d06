"""What a Talker has to do for generation, sessions and training.

Shapes: B rows, T tokens or frames, D Talker width, Di width of its inputs, Dt Thinker width, V codec vocabulary, K
codebooks. Rows are left-aligned.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from omni.layers.cache import LayerCache
from omni.layers.decoder_layer import run_layer
from omni.layers.decoder_state import DecoderState
from omni.layers.packing import PackedBlocks


class TalkerOutput(NamedTuple):
    """logits [B, T, V] of codebook 0; hidden [B, T, D] after the final norm, which the residual-code head reads."""

    logits: Tensor
    hidden: Tensor
    router_logits: list[Tensor] | None = None


class TalkerContract(nn.Module):
    """A causal decoder that reads what was said and writes codebook 0, with a head for the residual codes.

    config: a Talker's config (`num_code_groups`, `codec_stop_ids`, `position_rule`, `text_config` with
    `max_position_embeddings`). codec_embedding: code 0 -> [.., Di]. codec_head: its weight [V, D] tells the sizes. mtp:
    the residual-code head as in `omni.talker.mtp`, or what stands in for it where there is one codebook.
    What it reads where is the business of the family's `TurnLayout` (`omni.talker.layout`).
    """

    config: Any
    codec_embedding: nn.Embedding
    codec_head: nn.Linear
    mtp: Any

    @abstractmethod
    def init_state(self, batch_size: int, capacity: int = 256) -> DecoderState:
        """An empty state for `batch_size` rows; `capacity` positions are reserved, more on demand."""

    @abstractmethod
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

    @abstractmethod
    def decode(
        self,
        embeds: Tensor,
        positions: Tensor,
        caches: Sequence[LayerCache],
        run: Callable[..., Tensor] = run_layer,
    ) -> tuple[Tensor, Tensor]:
        """One further frame a row as a function of tensors alone: embeds [B, Di], positions fp32 [3, B, 1], one view of
        the cache a layer -> (logits of codebook 0 [B, V], hidden [B, D]).

        Nothing is read back from the device and nothing decided by values; the caller counts the frame. `run` is how a
        decoder layer is run.
        """

    @abstractmethod
    def text_vectors(self, embeds: Tensor, hidden: Tensor | None = None) -> Tensor:
        """Inputs of text [n, Di]: token embeddings [n, Dt] and, of tokens that the Thinker has read, its hidden states
        [n, Dt]."""

    @abstractmethod
    def media_vectors(self, hidden: Tensor) -> Tensor:
        """Inputs of sound and vision [n, Di], from the Thinker's hidden states [n, Dt]."""

    @abstractmethod
    def suppressed(self) -> Tensor:
        """bool [V]: codec ids that are never drawn."""

    def seen_at_first(self) -> Tensor:
        """bool [V]: codec ids that the repetition penalty counts from the start; usually none."""
        return torch.zeros(len(self.codec_head.weight), dtype=torch.bool, device=self.codec_embedding.weight.device)

    def embed_frames(self, codes: Tensor) -> Tensor:
        """codes int64 [N, K] -> the sum of each frame's K code embeddings [N, Di]."""
        first: Tensor = self.codec_embedding(codes[:, 0])
        return first + self.mtp.embed_residual(codes[:, 1:]).sum(1) if codes.shape[1] > 1 else first

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
