"""The step functions of a turn: one Thinker token, one speech frame. All that changes lies in the states.

Shapes: B rows, V text vocabulary, C codec vocabulary, K codebooks, D Talker width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from omni.generation.prompt import Prompt
from omni.generation.sampling import RowSampling
from omni.layers.cache import KVCache
from omni.layers.decoder_state import DecoderState
from omni.layers.state import State
from omni.talker.talker import Talker
from omni.thinker.thinker import Thinker


@dataclass
class TextState(State):
    """Where the Thinker stands: logits [B, V] of the next token, tokens seen [B, V], draws made [B]."""

    decoder: DecoderState
    logits: Tensor
    seen: Tensor
    steps: Tensor


@dataclass
class SpeechState(State):
    """Where the Talker stands: logits [B, C] and hidden [B, D] of the next frame, codes seen [B, C], draws made [B]."""

    decoder: DecoderState
    mtp: KVCache
    logits: Tensor
    hidden: Tensor
    seen: Tensor
    steps: Tensor


def prefill_text(thinker: Thinker, prompt: Prompt, reserve: int = 0) -> tuple[TextState, Tensor]:
    """Read the prompt; returns the state and the hidden states [B, T, D] that the Talker needs."""
    rows, tokens = prompt.ids.shape
    decoder = thinker.init_state(rows, tokens + min(reserve, 1024))
    out = thinker(prompt.embeds, prompt.positions, decoder, taps=prompt.taps, lengths=prompt.lengths, last_only=True)
    decoder.next_position = prompt.next_position
    logits = out.logits[:, 0]
    lengths = torch.tensor(prompt.lengths, device=logits.device)
    valid = torch.arange(tokens, device=logits.device) < lengths[:, None]
    counts = logits.new_zeros(logits.shape, dtype=torch.int32)
    seen = counts.scatter_add_(1, prompt.ids, valid.int()) > 0
    return TextState(decoder, logits, seen, torch.zeros_like(lengths)), out.hidden


def draw_token(state: TextState, sampling: RowSampling) -> Tensor:
    """The next token of every row, int64 [B]; the Thinker has not read it yet."""
    ids = sampling.draw(state.logits, state.steps, state.seen)
    state.seen = state.seen.scatter(1, ids[:, None], True)
    state.steps = state.steps + 1
    return ids


def read_token(thinker: Thinker, state: TextState, ids: Tensor) -> None:
    """The Thinker reads the tokens int64 [B] that were drawn."""
    state.logits = thinker.step(ids, state.decoder)


def prefill_speech(
    talker: Talker, embeds: Tensor, positions: Tensor, lengths: list[int], following: Tensor
) -> SpeechState:
    """Read the Talker's prompt: embeds [B, T, D], positions fp32 [3, B, T], lengths [B]; `following` [B] comes next."""
    rows, tokens = embeds.shape[:2]
    decoder = talker.init_state(rows, tokens + 64)
    out = talker(embeds, positions, decoder, lengths=lengths)
    decoder.next_position = following
    last = [n - 1 for n in lengths]
    logits, hidden = (torch.stack([x[row, i] for row, i in enumerate(last)]) for x in (out.logits, out.hidden))
    seen = torch.zeros_like(logits, dtype=torch.bool)
    return SpeechState(
        decoder,
        talker.mtp.init_cache(rows),
        logits,
        hidden,
        seen,
        torch.zeros(rows, dtype=torch.int64, device=embeds.device),
    )


def draw_frame(
    talker: Talker, state: SpeechState, codes: RowSampling, residual: RowSampling, banned: Tensor
) -> tuple[Tensor, Tensor]:
    """The next frame of every row: codes int64 [B, K] and the sum of their embeddings [B, D].

    Where code 0 is the end of speech the row has ended and its residual codes mean nothing. `banned` bool [C].
    """
    first = codes.draw(state.logits, state.steps, state.seen, banned)
    state.seen = state.seen.scatter(1, first[:, None], True)
    embedding = talker.codec_embedding(first)
    per_frame = len(talker.mtp.lm_head)

    def sample(logits: Tensor, i: int) -> Tensor:
        return residual.draw(logits, state.steps * per_frame + i)

    rest, total = talker.mtp.generate(state.hidden, embedding, sample, state.mtp)
    state.steps = state.steps + 1
    return torch.cat((first[:, None], rest), dim=1), embedding + total


def read_frame(talker: Talker, state: SpeechState, frame: Tensor, text: Tensor) -> None:
    """The Talker reads a frame's embedding sum [B, D] and the text vector [B, D] that follows it."""
    state.logits, state.hidden = talker.step(frame + text, state.decoder)
