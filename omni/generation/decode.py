"""The step functions of a turn: one Thinker token, one speech frame. All that changes lies in the states.

Rows where `active` bool [B] is False stand still. `span`: slots of the cache that a static step looks at, None for
exactly those filled. States are updated in place, and the host counts tokens for itself (`KVCache.count`).
Shapes: B rows, V text vocabulary, C codec vocabulary, K codebooks, D Talker width, Di width of its inputs, Dt Thinker
width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from omni.generation.sampling import RowSampling
from omni.layers.cache import KVCache
from omni.layers.decoder_state import DecoderState
from omni.layers.state import State
from omni.parts import StepRunner
from omni.talker.contract import TalkerContract
from omni.thinker.contract import ThinkerContract


@dataclass
class TextState(State):
    """Where the Thinker stands.

    logits [B, V] of the next token, tokens seen bool [B, V], draws made [B]; hidden [B, Dt], the final hidden state of
    the reply token read last ([B, 0] where nobody asks for it).
    """

    decoder: DecoderState
    logits: Tensor
    seen: Tensor
    steps: Tensor
    hidden: Tensor

    @classmethod
    def create(
        cls,
        thinker: ThinkerContract,
        rows: int,
        capacity: int,
        *,
        keep_hidden: bool = False,
        device: torch.device | None = None,
    ) -> TextState:
        """Nothing read yet. device: the model's (None: that of the head's weight, as everywhere in a whole model)."""
        weight = thinker.lm_head.weight
        device = device or weight.device
        logits = weight.new_zeros(rows, weight.shape[0], device=device)
        steps = torch.zeros(rows, dtype=torch.int64, device=device)
        hidden = weight.new_zeros(rows, weight.shape[1] if keep_hidden else 0, device=device)
        seen = torch.zeros_like(logits, dtype=torch.bool)
        return cls(thinker.init_state(rows, capacity), logits, seen, steps, hidden)


@dataclass
class SpeechState(State):
    """Where the Talker stands.

    logits [B, C] and hidden [B, D] of the next frame, codes seen bool [B, C] in this turn, frames drawn [B]; frame
    [B, Di], the embedding sum of the pending frame, as wide as the Talker's inputs.
    """

    decoder: DecoderState
    mtp: KVCache
    logits: Tensor
    hidden: Tensor
    seen: Tensor
    steps: Tensor
    frame: Tensor

    @classmethod
    def create(
        cls, talker: TalkerContract, rows: int, capacity: int, device: torch.device | None = None
    ) -> SpeechState:
        """Nothing read yet; device as in `TextState`."""
        weight = talker.codec_head.weight
        device = device or weight.device
        logits, hidden = (weight.new_zeros(rows, size, device=device) for size in weight.shape)
        return cls(
            decoder=talker.init_state(rows, capacity),
            mtp=talker.mtp.init_cache(rows),
            logits=logits,
            hidden=hidden,
            seen=torch.zeros_like(logits, dtype=torch.bool),
            steps=torch.zeros(rows, dtype=torch.int64, device=device),
            frame=weight.new_zeros(rows, talker.codec_embedding.embedding_dim, device=device),
        )


def draw_token(steps: StepRunner, state: TextState, sampling: RowSampling, active: Tensor) -> Tensor:
    """The next token of every row, int64 [B]; the Thinker has not read it yet."""
    ids = steps.draw(sampling, state.logits, state.steps, state.seen)
    _mark_seen(state.seen, ids, active)
    state.steps += active
    return ids


def read_token(
    steps: StepRunner, thinker: ThinkerContract, state: TextState, ids: Tensor, active: Tensor, span: int | None
) -> None:
    """The Thinker reads the tokens int64 [B] that were drawn."""
    logits, hidden = steps.thinker(thinker, ids, state.decoder, span)
    state.logits.copy_(torch.where(active[:, None], logits, state.logits))
    if state.hidden.shape[1]:
        state.hidden.copy_(torch.where(active[:, None], hidden, state.hidden))
    state.decoder.step(active)


def draw_frame(
    steps: StepRunner,
    talker: TalkerContract,
    state: SpeechState,
    codes: RowSampling,
    residual: RowSampling,
    banned: Tensor,
    active: Tensor,
) -> Tensor:
    """The next frame of every row: codes int64 [B, K]; `banned` bool [C] are never drawn.

    Where code 0 is the end of speech the row has ended and its residual codes mean nothing.
    """
    first = steps.draw(codes, state.logits, state.steps, state.seen, banned)
    _mark_seen(state.seen, first, active)
    embedding = talker.codec_embedding(first)
    per_frame = len(talker.mtp.lm_head)
    draws = (state.steps * per_frame + torch.arange(per_frame, device=first.device)[:, None]).unbind(0)

    def sample(logits: Tensor, i: int) -> Tensor:
        return steps.draw(residual, logits.to(first.device), draws[i]).to(logits.device)

    rest, total = talker.mtp.generate(state.hidden, embedding, sample, state.mtp, step=steps.residual)
    state.frame.copy_(torch.where(active[:, None], embedding + total, state.frame))
    state.steps += active
    return torch.cat((first[:, None], rest), dim=1)


def read_frame(
    steps: StepRunner, talker: TalkerContract, state: SpeechState, text: Tensor, active: Tensor, span: int | None
) -> None:
    """The Talker reads the pending frame and the text vectors [B, Di] that follow it."""
    logits, hidden = steps.talker(talker, state.frame + text, state.decoder, span)
    state.logits.copy_(torch.where(active[:, None], logits, state.logits))
    state.hidden.copy_(torch.where(active[:, None], hidden, state.hidden))
    state.decoder.step(active)


def _mark_seen(seen: Tensor, ids: Tensor, active: Tensor) -> None:
    """Set seen [B, V] at ids [B] where `active`."""
    seen.scatter_(1, ids[:, None], active[:, None] | seen.gather(1, ids[:, None]))
