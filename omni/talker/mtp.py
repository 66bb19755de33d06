"""The residual-code head (MTP, "code predictor" in the checkpoint): codebooks 1 .. K - 1 of one frame.

Shapes: N frames, D width, K codebooks, V codes a codebook. Position 0 of its sequence is the Talker's hidden state,
position 1 the embedding of code 0, position j the embedding of code j - 1; `lm_head[i]` reads position i + 1 and
predicts code i + 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from omni.config.qwen3_omni import MTPConfig
from omni.layers.cache import KVCache, LayerCache
from omni.layers.decoder_layer import DecoderLayer, Tables
from omni.layers.norm import RMSNorm
from omni.layers.swiglu import SwiGLU
from omni.rope.rotary import Rotary

Sampler = Callable[[Tensor, int], Tensor]


class MTP(nn.Module):
    """A small dense decoder with one head and one embedding table for each residual codebook."""

    keep_together = True  # on one device: `generate` does not pass through the hooks of `forward`

    def __init__(self, config: MTPConfig) -> None:
        super().__init__()
        self.config = config
        residual = config.num_code_groups - 1
        self.rope = Rotary(config.head_size, config.theta)
        self.codec_embedding = nn.ModuleList(
            nn.Embedding(config.vocab_size, config.hidden_size) for _ in range(residual)
        )
        self.layers = nn.ModuleList(
            DecoderLayer(config, SwiGLU(config.hidden_size, config.intermediate_size))
            for _ in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.ModuleList(
            nn.Linear(config.hidden_size, config.vocab_size, bias=False) for _ in range(residual)
        )

    def init_cache(self, batch_size: int) -> KVCache:
        """Room for one frame of `batch_size` rows; `generate` empties it before use."""
        c, weight = self.config, self.norm.weight
        return KVCache.create(
            c.num_hidden_layers, batch_size, c.num_key_value_heads, c.num_code_groups, c.head_size,
            weight.device, weight.dtype,
        )  # fmt: skip

    def decode(self, x: Tensor, tables: Tables, caches: Sequence[LayerCache] | None = None) -> Tensor:
        """All layers and the final norm, x [N, T, D] -> [N, T, D]: a function of tensors alone."""
        contexts: Sequence[LayerCache | None] = caches or [None] * len(self.layers)
        for layer, context in zip(self.layers, contexts):
            x = layer(x, tables, context)
        return self.norm(x)

    def embed_residual(self, codes: Tensor) -> Tensor:
        """codes int64 [N, K - 1] -> their embeddings [N, K - 1, D], table i for codebook i + 1."""
        return torch.stack([table(codes[:, i]) for i, table in enumerate(self.codec_embedding)], dim=1)

    def forward(self, hidden: Tensor, first: Tensor, codes: Tensor) -> Tensor:
        """Teacher-forced logits of all residual codebooks in one pass.

        hidden [N, D]: Talker hidden states after its final norm; first [N, D]: the Talker's embedding of code 0;
        codes int64 [N, K - 1]: the true residual codes -> logits [N, K - 1, V], entry i for codebook i + 1.
        """
        residual = self.embed_residual(codes)[:, :-1]
        x = torch.cat((hidden[:, None], first[:, None], residual), dim=1)  # [N, K, D]
        x = self.decode(x, self.rope(torch.arange(x.shape[1], device=x.device)[None]))[:, 1:]
        return torch.stack([head(x[:, i]) for i, head in enumerate(self.lm_head)], dim=1)

    def generate(
        self,
        hidden: Tensor,
        first: Tensor,
        sample: Sampler,
        cache: KVCache | None = None,
        *,
        step: Callable[..., Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The residual codes of one frame: K - 1 fixed steps.

        hidden, first [B, D] as in `forward`; `sample(logits [B, V], i)` chooses code i + 1. Whatever `cache` holds is
        overwritten. `step` stands in for `MTP.code_logits`; then the first two vectors are read one by one as well, so
        that one shape is enough. Returns codes int64 [B, K - 1] and the sum of their embeddings [B, D].
        """
        cache = self.init_cache(hidden.shape[0]) if cache is None else cache
        slots = torch.arange(self.config.num_code_groups, device=hidden.device)
        cos, sin = self.rope(slots[None])
        places = [(slots[i : i + 1], (cos[:, i : i + 1], sin[:, i : i + 1])) for i in range(len(slots))]
        if step is None:
            step = MTP.code_logits
            views = cache.views(2, slots[:2].expand(len(hidden), -1), "first")
            read = self.decode(torch.stack((hidden, first), dim=1), (cos[:, :2], sin[:, :2]), views)
            logits = self.lm_head[0](read[:, -1])
        else:
            step(self, hidden[:, None], *places[0], cache, self.lm_head[0])
            logits = step(self, first[:, None], *places[1], cache, self.lm_head[0])
        codes, total = [], torch.zeros_like(hidden)
        for i, table in enumerate(self.codec_embedding):
            codes.append(sample(logits, i))
            embedding = table(codes[-1])
            total = total + embedding
            if i + 1 < len(self.lm_head):
                logits = step(self, embedding[:, None], *places[i + 2], cache, self.lm_head[i + 1])
        return torch.stack(codes, dim=1), total

    def code_logits(self, x: Tensor, slot: Tensor, tables: Tables, cache: KVCache, head: nn.Module) -> Tensor:
        """Read one vector a row, x [B, 1, D] at slot int64 [1] of the frame: logits of the next code [B, V].

        A function of tensors alone, as `Thinker.decode`.
        """
        span = cache.keys.shape[3]
        visible = (torch.arange(span, device=x.device) <= slot)[None, None, None]
        views = cache.views(span, slot.expand(x.shape[0], -1), "decode", visible)
        return head(self.decode(x, tables, views)[:, -1])
