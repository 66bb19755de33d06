"""The Thinker: a decoder, dense or of experts, with TM-RoPE over text, sound and vision (Qwen3-Omni, section 2.1).

Shapes: B rows, T new tokens, D width, V vocabulary. Rows are left-aligned: padding, if any, comes after the tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, cast

import torch
from torch import Tensor, nn

from omni.config.decoder import MoEConfig
from omni.config.model import ThinkerConfig
from omni.layers.cache import LayerCache
from omni.layers.decoder_layer import Context, DecoderLayer, Tables, run_layer
from omni.layers.decoder_state import DecoderState, prefill_contexts
from omni.layers.moe import MoE, RouterLog
from omni.layers.norm import RMSNorm
from omni.layers.packing import PackedBlocks
from omni.layers.swiglu import SwiGLU
from omni.rope.tm_rope import TMRope
from omni.thinker.contract import ThinkerContract, ThinkerOutput

Rope = Callable[[Tensor], Tables]


class Thinker(ThinkerContract):
    """Token embedding, decoder layers, final norm and text head.

    `accept_layer` says which hidden states to return (None: those after the final norm); `rope` maps positions
    [3, B, T] to rotary tables and replaces TM-RoPE.
    """

    def __init__(self, config: ThinkerConfig, accept_layer: int | None = None, rope: Rope | None = None) -> None:
        super().__init__()
        text = config.text_config
        self.config = config
        self.accept_layer = text.num_hidden_layers if accept_layer is None else accept_layer
        self.rope = rope or TMRope.of(text)
        self.embed_tokens = nn.Embedding(text.vocab_size, text.hidden_size)
        self.layers = nn.ModuleList(
            DecoderLayer(
                text,
                MoE(cast("MoEConfig", text)) if text.is_sparse(i) else SwiGLU(text.hidden_size, text.intermediate_size),
            )
            for i in range(text.num_hidden_layers)
        )
        self.norm = RMSNorm(text.hidden_size, text.rms_norm_eps)
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        if config.tie_word_embeddings:  # the text config's own flag has no effect in the reference either
            self.lm_head.weight = self.embed_tokens.weight

    def init_state(self, batch_size: int, capacity: int = 256) -> DecoderState:
        """An empty state for `batch_size` rows; `capacity` tokens are reserved, more on demand."""
        weight = self.embed_tokens.weight
        return DecoderState.create(self.config.text_config, batch_size, capacity, weight.device, weight.dtype)

    def forward(
        self,
        embeds: Tensor,
        positions: Tensor,
        state: DecoderState | None = None,
        *,
        taps: Tensor | None = None,
        lengths: Sequence[int] | None = None,
        blocks: PackedBlocks | None = None,
        logits: Literal["all", "last", "none"] = "all",
        with_router_logits: bool = False,
    ) -> ThinkerOutput:
        """Read embeds [B, T, D] at positions fp32 [3, B, T] after what the state holds.

        taps [n, B, T, D]: added after the first n layers. lengths: tokens of each row, the rest is padding
        (None: all T). blocks: several conversations in one row (B = 1), which do not see each other (training; takes
        no state). logits: for all tokens, for the last one of each row, or none (then [B, 0, V]; `final` is what the
        head would read). Without a state nothing is remembered. The caller sets `state.next_position` after a prefill.
        """
        rows, tokens, _ = embeds.shape
        routers = RouterLog() if with_router_logits else None
        contexts = prefill_contexts(state, blocks, len(self.layers), tokens)
        hidden, final = self._read(embeds, positions, contexts, taps=taps, router_logits=routers)
        counts = lengths or [tokens] * rows
        if state is not None:
            state.cache.advance(counts)
        read = final
        if logits == "last":
            read = torch.stack([final[row, (n or 1) - 1] for row, n in enumerate(counts)]).unsqueeze(1)
        elif logits == "none":
            read = final[:, :0]
        return ThinkerOutput(self.lm_head(read), hidden, None if routers is None else routers.logits, final)

    def step(self, ids: Tensor, state: DecoderState, active: Sequence[bool] | None = None) -> Tensor:
        """One further text token a row: ids int64 [B] -> logits of the next one [B, V].

        Rows where `active` is False stand still; their logits mean nothing.
        """
        state.cache.reserve(1)
        logits, _ = self.decode(ids, state.step_positions(), state.cache.decode())
        state.count_step(active)
        return logits

    def decode(
        self,
        ids: Tensor,
        positions: Tensor,
        caches: Sequence[LayerCache],
        run: Callable[..., Tensor] = run_layer,
    ) -> tuple[Tensor, Tensor]:
        """The same as a function of tensors alone: ids [B], positions fp32 [3, B, 1], one view of the cache a layer.

        Returns the logits [B, V] and the output of the final norm [B, D]. Nothing is allocated for keeps, nothing read
        back from the device, nothing decided by values; the caller counts the token (`DecoderState.step`,
        `KVCache.count`). `run` is how a layer is run.
        """
        _, final = self._read(self.embed_tokens(ids)[:, None], positions, caches, run=run)
        return self.lm_head(final)[:, 0], final[:, 0]

    def _read(
        self,
        x: Tensor,
        positions: Tensor,
        contexts: Sequence[Context | None],
        *,
        taps: Tensor | None = None,
        router_logits: RouterLog | None = None,
        run: Callable[..., Tensor] = run_layer,
    ) -> tuple[Tensor, Tensor]:
        """All layers and the final norm over x [B, T, D]: `hidden` and `final` of `ThinkerOutput`, each [B, T, D]."""
        tables = self.rope(positions)
        hidden = x
        for i, (layer, context) in enumerate(zip(self.layers, contexts), start=1):
            x = run(layer, x, tables, context, router_logits)
            if i == self.accept_layer:
                hidden = x
            if taps is not None and i <= len(taps):
                x = x + taps[i - 1].to(x)
        final = self.norm(x)
        return final if self.accept_layer >= len(self.layers) else hidden, final
