"""What the Talkers of all families share: a decoder that reads vectors and writes the logits of codebook 0.

Shapes: B rows, T tokens or frames, D Talker width, Di width of its inputs, V codec vocabulary. Rows are left-aligned.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from omni.layers.cache import LayerCache
from omni.layers.decoder_layer import Context, Tables, run_layer
from omni.layers.decoder_state import DecoderState, prefill_contexts
from omni.layers.moe import RouterLog
from omni.layers.packing import PackedBlocks
from omni.talker.contract import TalkerContract, TalkerOutput


class TalkerDecoder(TalkerContract):
    """The passes of a Talker; a family's class builds the modules of the contract and these, and says what it hears."""

    rope: Callable[[Tensor], Tables]
    layers: nn.ModuleList
    norm: nn.Module

    def init_state(self, batch_size: int, capacity: int = 256) -> DecoderState:
        """An empty state for `batch_size` rows; `capacity` positions are reserved, more on demand."""
        weight = self.codec_embedding.weight
        return DecoderState.create(self.config.text_config, batch_size, capacity, weight.device, weight.dtype)

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
        routers = RouterLog() if with_router_logits else None
        contexts = prefill_contexts(state, blocks, len(self.layers), tokens)
        hidden = self._read(self.project_input(embeds), positions, contexts, routers)
        if state is not None:
            state.cache.advance(lengths or [tokens] * rows)
        logits = self.codec_head(hidden if with_logits else hidden[:, :0])
        return TalkerOutput(logits, hidden, None if routers is None else routers.logits)

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
        router_logits: RouterLog | None = None,
        run: Callable[..., Tensor] = run_layer,
    ) -> Tensor:
        """All layers and the final norm, x [B, T, D] -> [B, T, D]."""
        tables = self.rope(positions)
        for layer, context in zip(self.layers, contexts):
            x = run(layer, x, tables, context, router_logits)
        return self.norm(x)
