"""The step functions of a turn: one Thinker token, one speech frame. All that changes lies in the states.

Rows where `active` is False stand still. Shapes: B rows, V text vocabulary, C codec vocabulary, K codebooks, D Talker
width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from omni.generation.sampling import RowSampling
from omni.layers.cache import KVCache
from omni.layers.decoder_state import DecoderState
from omni.layers.state import State
from omni.talker.talker import Talker
from omni.thinker.thinker import Thinker


@dataclass
class TextState(State):
    """Where the Thinker stands: logits [B, V] of the next token, tokens seen bool [B, V], draws made [B]."""

    decoder: DecoderState
    logits: Tensor
    seen: Tensor
    steps: Tensor

    @classmethod
    def create(cls, thinker: Thinker, rows: int, capacity: int) -> TextState:
        """Nothing read yet."""
        weight = thinker.lm_head.weight
        logits = weight.new_zeros(rows, weight.shape[0])
        steps = torch.zeros(rows, dtype=torch.int64, device=weight.device)
        return cls(thinker.init_state(rows, capacity), logits, torch.zeros_like(logits, dtype=torch.bool), steps)


@dataclass
class SpeechState(State):
    """Where the Talker stands.

    logits [B, C] and hidden [B, D] of the next frame, codes seen bool [B, C] in this turn, frames drawn [B]; frame
    [B, D], the embedding sum of the frame that waits to be read.
    """

    decoder: DecoderState
    mtp: KVCache
    logits: Tensor
    hidden: Tensor
    seen: Tensor
    steps: Tensor
    frame: Tensor

    @classmethod
    def create(cls, talker: Talker, rows: int, capacity: int) -> SpeechState:
        """Nothing read yet."""
        weight = talker.codec_head.weight
        logits, hidden = weight.new_zeros(rows, weight.shape[0]), weight.new_zeros(rows, weight.shape[1])
        return cls(
            decoder=talker.init_state(rows, capacity),
            mtp=talker.mtp.init_cache(rows),
            logits=logits,
            hidden=hidden,
            seen=torch.zeros_like(logits, dtype=torch.bool),
            steps=torch.zeros(rows, dtype=torch.int64, device=weight.device),
            frame=torch.zeros_like(hidden),
        )


def draw_token(state: TextState, sampling: RowSampling, active: Sequence[bool]) -> Tensor:
    """The next token of every row, int64 [B]; the Thinker has not read it yet."""
    ids = sampling.draw(state.logits, state.steps, state.seen)
    moves = torch.tensor(active, device=ids.device)
    state.seen = state.seen.scatter(1, ids[:, None], moves[:, None] | state.seen.gather(1, ids[:, None]))
    state.steps = state.steps + moves
    return ids


def read_token(thinker: Thinker, state: TextState, ids: Tensor, active: Sequence[bool]) -> None:
    """The Thinker reads the tokens int64 [B] that were drawn."""
    logits = thinker.step(ids, state.decoder, active)
    state.logits = torch.where(torch.tensor(active, device=ids.device)[:, None], logits, state.logits)


def draw_frame(
    talker: Talker,
    state: SpeechState,
    codes: RowSampling,
    residual: RowSampling,
    banned: Tensor,
    active: Sequence[bool],
) -> Tensor:
    """The next frame of every row: codes int64 [B, K]; `banned` bool [C] are never drawn.

    Where code 0 is the end of speech the row has ended and its residual codes mean nothing.
    """
    first = codes.draw(state.logits, state.steps, state.seen, banned)
    moves = torch.tensor(active, device=first.device)
    state.seen = state.seen.scatter(1, first[:, None], moves[:, None] | state.seen.gather(1, first[:, None]))
    embedding = talker.codec_embedding(first)
    per_frame = len(talker.mtp.lm_head)

    def sample(logits: Tensor, i: int) -> Tensor:
        return residual.draw(logits, state.steps * per_frame + i)

    rest, total = talker.mtp.generate(state.hidden, embedding, sample, state.mtp)
    state.frame = torch.where(moves[:, None], embedding + total, state.frame)
    state.steps = state.steps + moves
    return torch.cat((first[:, None], rest), dim=1)


def read_frame(talker: Talker, state: SpeechState, text: Tensor, active: Sequence[bool]) -> None:
    """The Talker reads the frame that waits and the text vectors [B, D] that follow it."""
    logits, hidden = talker.step(state.frame + text, state.decoder, active)
    moves = torch.tensor(active, device=text.device)[:, None]
    state.logits = torch.where(moves, logits, state.logits)
    state.hidden = torch.where(moves, hidden, state.hidden)
