"""What a Thinker has to do for generation, sessions and training.

Shapes: B rows, T new tokens, D width, V vocabulary. Rows are left-aligned: padding, if any, comes after the tokens.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

from torch import Tensor, nn

from omni.layers.cache import LayerCache
from omni.layers.decoder_layer import run_layer
from omni.layers.decoder_state import DecoderState
from omni.layers.packing import PackedBlocks


class ThinkerOutput(NamedTuple):
    """What one pass of the Thinker yields.

    logits [B, T, V] (or [B, 1, V] where only the last token of each row was asked for); hidden [B, T, D], the hidden
    states that the Talker reads: the output of decoder layer `accept_hidden_layer` counted from 1, before that
    layer's DeepStack tap is added (without a Talker: the output of the final norm); router_logits, one [B * T, E] a
    sparse layer, if asked for; final [B, T, D], the output of the final norm, which the head reads.
    """

    logits: Tensor
    hidden: Tensor
    router_logits: list[Tensor] | None = None
    final: Tensor | None = None


class ThinkerContract(nn.Module):
    """A causal decoder over vectors that writes logits of text; its caller holds what it remembers.

    embed_tokens: ids -> embeddings [.., D], which media embeddings replace at placeholders; lm_head: its weight [V, D]
    tells the sizes, and losses use it in pieces.
    """

    embed_tokens: nn.Embedding
    lm_head: nn.Linear

    @abstractmethod
    def init_state(self, batch_size: int, capacity: int = 256) -> DecoderState:
        """An empty state for `batch_size` rows; `capacity` tokens are reserved, more on demand."""

    @abstractmethod
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
        """Read embeds [B, T, D] at positions fp32 [3, B, T] (time, height, width) after what the state holds.

        taps [n, B, T, D]: added after the first n layers. lengths: tokens of each row, the rest is padding
        (None: all T). blocks: several conversations in one row (B = 1), which do not see each other (training; takes
        no state). logits: for all tokens, for the last one of each row, or none (then [B, 0, V]). The state's cache
        counts the tokens; `next_position` is set by the caller.
        """

    @abstractmethod
    def decode(
        self,
        ids: Tensor,
        positions: Tensor,
        caches: Sequence[LayerCache],
        run: Callable[..., Tensor] = run_layer,
    ) -> tuple[Tensor, Tensor]:
        """One further text token a row as a function of tensors alone: ids int64 [B], positions fp32 [3, B, 1], one
        view of the cache a layer -> (logits [B, V], output of the final norm [B, D]).

        Nothing is read back from the device and nothing decided by values; the caller counts the token. `run` is how a
        decoder layer is run.
        """
