"""The Talker: a mixture-of-experts decoder over codebook 0, with its residual-code head (Qwen3-Omni, section 2.4).

Shapes: B rows, T tokens or frames, D Talker width, Dt Thinker width, V codec vocabulary, K codebooks. Rows are
left-aligned. One frame is 80 ms in the release.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from omni.config.qwen3_omni import TalkerConfig
from omni.layers.decoder_layer import DecoderLayer
from omni.layers.moe import MoE
from omni.layers.norm import RMSNorm
from omni.rope.tm_rope import TMRope
from omni.talker.decoder import TalkerDecoder
from omni.talker.mtp import MTP


class Projection(nn.Module):
    """Thinker width -> Talker width: Linear, SiLU, Linear. [..., Dt] -> [..., D]."""

    def __init__(self, config: TalkerConfig) -> None:
        super().__init__()
        text = config.text_config
        self.linear_fc1 = nn.Linear(config.thinker_hidden_size, text.intermediate_size)
        self.linear_fc2 = nn.Linear(text.intermediate_size, text.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_fc2(F.silu(self.linear_fc1(x)))


class Talker(TalkerDecoder):
    """Codec embedding, decoder, codebook-0 head, residual-code head, and the projections of its conditioning."""

    def __init__(self, config: TalkerConfig) -> None:
        super().__init__()
        text = config.text_config
        self.config = config
        self.rope = TMRope.of(text)
        self.text_projection = Projection(config)
        self.hidden_projection = Projection(config)
        self.codec_embedding = nn.Embedding(text.vocab_size, text.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(text, MoE(text)) for _ in range(text.num_hidden_layers))
        self.norm = RMSNorm(text.hidden_size, text.rms_norm_eps)
        self.codec_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        self.mtp = MTP(config.code_predictor_config)

    def text_vectors(self, embeds: Tensor, hidden: Tensor | None = None) -> Tensor:
        """As in `TalkerDecoder`; text enters by its embeddings alone."""
        return self.text_projection(embeds)

    def media_vectors(self, hidden: Tensor) -> Tensor:
        return self.hidden_projection(hidden)

    def suppressed(self) -> Tensor:
        """bool [V]: codec ids that are never drawn: the last 1024 ids except the end of speech."""
        mask = torch.arange(self.config.text_config.vocab_size, device=self.codec_embedding.weight.device)
        return (mask >= self.config.num_codes) & (mask != self.config.codec_eos_token_id)
