"""The Talker over a single codebook: dense, conditioned on the Thinker's states (Qwen2.5-Omni, section 2.3).

Its inputs have the Thinker's width and meet the decoder's through one projection. Text that the Thinker has read enters
as hidden state + token embedding, other text by its embedding, media by hidden states; `WholePromptLayout` of
`omni.talker.layout` says what follows what.

Shapes: B rows, N frames, T tokens, D Talker width, Dt Thinker width, V codec vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from omni.config.qwen2_5_omni import DenseTalkerConfig
from omni.layers.cache import KVCache
from omni.layers.decoder_layer import DecoderLayer
from omni.layers.norm import RMSNorm
from omni.layers.swiglu import SwiGLU
from omni.rope.tm_rope import TMRope
from omni.talker.decoder import TalkerDecoder


class NoResidualCodes(nn.Module):
    """Stands in for the residual-code head where a frame has one code: nothing is predicted."""

    lm_head: tuple[nn.Module, ...] = ()

    def init_cache(self, batch_size: int) -> KVCache:
        """A cache without layers."""
        return KVCache.create(0, batch_size, 1, 1, 2, torch.device("cpu"), torch.float32)

    def generate(self, hidden: Tensor, first: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """As `MTP.generate`: no codes int64 [B, 0], and zero [B, Dt] as the sum of their embeddings."""
        return torch.zeros(len(first), 0, dtype=torch.int64, device=first.device), torch.zeros_like(first)


class SingleCodebookTalker(TalkerDecoder):
    """Codec embedding, input projection, decoder and codec head."""

    config: DenseTalkerConfig

    def __init__(self, config: DenseTalkerConfig) -> None:
        super().__init__()
        self.config = config
        self.rope = TMRope.of(config)
        self.input_projection = nn.Linear(config.thinker_hidden_size, config.hidden_size)
        self.codec_embedding = nn.Embedding(config.vocab_size, config.thinker_hidden_size)
        self.layers = nn.ModuleList(
            DecoderLayer(config, SwiGLU(config.hidden_size, config.intermediate_size))
            for _ in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.codec_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.mtp = NoResidualCodes()

    def project_input(self, embeds: Tensor) -> Tensor:
        return self.input_projection(embeds)

    def suppressed(self) -> Tensor:
        """bool [V]: codec ids that are never drawn: the begin of speech (as released)."""
        return self._among([self.config.codec_bos_id])

    def seen_at_first(self) -> Tensor:
        """bool [V]: codec ids that the repetition penalty counts from the start: those of the prompt (as released)."""
        return self._among([self.config.codec_mask_id, self.config.codec_pad_id, self.config.codec_bos_id])

    def text_vectors(self, embeds: Tensor, hidden: Tensor | None = None) -> Tensor:
        """As in `TalkerContract`; hidden states are those after the Thinker's final norm."""
        return embeds if hidden is None else embeds + hidden

    def media_vectors(self, hidden: Tensor) -> Tensor:
        return hidden

    def _among(self, ids: list[int]) -> Tensor:
        every = torch.arange(self.config.vocab_size, device=self.codec_embedding.weight.device)
        return (every[:, None] == torch.tensor(ids, device=every.device)).any(1)
