"""Spoken turns as a Talker reads them in training: all turns of a batch in one packed row.

What is read where is the family's `TurnLayout` (`omni.talker.layout`), as in generation; here its indices become
vectors, for all turns at once.

Shapes: N tokens of all conversations, U tokens of a turn's prompt, P slots, F frames, K codebooks, Dt Thinker width, Di
width of the Talker's inputs, M inputs of all turns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from omni.generation.arguments import speaker_id
from omni.generation.prompt import Prompt
from omni.model import OmniModel
from omni.talker.layout import HEADER_LENGTH, TurnIndices, TurnLayout
from omni.training.data.samples import SpokenTurn


class Conversations(NamedTuple):
    """What the Talkers' prompts are taken from: the batch as the Thinker read it, hidden [N, Dt], and where each
    conversation begins in it."""

    prompt: Prompt
    hidden: Tensor
    starts: list[int]


@dataclass
class TurnInRow:
    """One spoken turn of a conversation: the row, its indices, its spoken ids, codes int64 [K, F]; where its reply
    stands in the row, if text enters by hidden states too."""

    row: int
    indices: TurnIndices
    reply: list[int]
    codes: Tensor
    reply_at: range = range(0)

    @property
    def frames(self) -> int:
        return self.codes.shape[1]


def lay_out(model: OmniModel, layout: TurnLayout, prompt: Prompt, row: int, turn: SpokenTurn) -> TurnInRow:
    """Where everything of a turn stands. Raises ValueError for an unknown speaker, codes of another number of
    codebooks, or a turn longer than the Talker's positions."""
    t, frames = model.require("talker").config, turn.codes.shape[1]
    if turn.codes.shape[0] != t.num_code_groups or frames < 1 or not turn.ids:
        raise ValueError(
            f"a spoken turn needs text and codes [{t.num_code_groups} codebooks, frames], got {len(turn.ids)} ids "
            f"and codes {list(turn.codes.shape)}"
        )
    ids, start, speaker = prompt.row_ids(row), turn.header + HEADER_LENGTH, speaker_id(model, turn.speaker)
    newline = ids[min(start, len(ids)) - 1]
    header = [model.config.im_start_token_id, model.config.assistant_token_id, newline]
    indices = layout.lay_out(ids[:start], prompt.segments[row], header, speaker, len(turn.ids), frames)
    length, limit = indices.positions.shape[1], t.text_config.max_position_embeddings
    if length > limit:
        raise ValueError(f"a spoken turn takes {length} positions, the Talker has {limit}; shorten it")
    reply_at = _find(ids, turn.ids, start) if layout.text_by_hidden else range(0)
    return TurnInRow(row, indices, turn.ids, turn.codes, reply_at)


def silent_turn(model: OmniModel, layout: TurnLayout, prompt: Prompt) -> TurnInRow:
    """One frame after an empty prompt, for batches without speech. Where text enters by hidden states, its reply is the
    first token of the first row."""
    ids, c = prompt.row_ids(0), model.config
    header = [c.im_start_token_id, c.assistant_token_id, ids[min(HEADER_LENGTH, len(ids)) - 1]]
    indices = layout.lay_out([], [], header, speaker_id(model, None), spoken=1, frames=1)
    reply_at = range(1) if layout.text_by_hidden else range(0)
    codes = torch.zeros(model.require("talker").config.num_code_groups, 1, dtype=torch.int64)
    return TurnInRow(0, indices, [c.tts_pad_token_id], codes, reply_at)


def talker_inputs(
    model: OmniModel, layout: TurnLayout, source: Conversations, turns: list[TurnInRow], *, detach: bool
) -> tuple[Tensor, Tensor]:
    """The packed row of all turns: vectors [M, Di] and positions fp32 [3, M].

    Each projection is called equally often whatever the turns hold.
    """
    talker, prompt, device = model.require("talker"), source.prompt, source.hidden.device
    tokens = [turn.indices.tokens.to(device) for turn in turns]
    media = [prompt.media[turn.row, own] for turn, own in zip(turns, tokens)]
    media_hidden = [source.hidden[own[m] + source.starts[turn.row]] for turn, own, m in zip(turns, tokens, media)]
    media_vectors = talker.media_vectors(torch.cat(media_hidden)).split([len(x) for x in media_hidden])
    prompt_text, turn_text = _texts(model, layout, source, turns, tokens, media, detach=detach)

    codes = torch.cat([turn.codes for turn in turns], dim=1).to(device)  # [K, all frames]
    control = [turn.indices.prefix_codes for turn in (turns if layout.voice_by_code else turns[:1])]
    control_vectors = talker.codec_embedding(torch.tensor(control, device=device))
    frame_vectors = talker.embed_frames(codes.T).split([turn.frames for turn in turns])
    parts = []
    for i, (turn, text) in enumerate(zip(turns, turn_text)):
        order = torch.cat((media[i].logical_not().nonzero()[:, 0], media[i].nonzero()[:, 0])).argsort()
        parts.append(torch.cat((prompt_text[i], media_vectors[i].to(text.dtype)))[order])
        own_control = control_vectors[i if layout.voice_by_code else 0]
        parts.append(talker.prefix_vectors(text[list(layout.prefix_texts)], own_control))
        parts.append(frame_vectors[i] + text[turn.indices.following.to(device)])
    return torch.cat(parts), torch.cat([turn.indices.positions for turn in turns], dim=1)


def _texts(
    model: OmniModel,
    layout: TurnLayout,
    source: Conversations,
    turns: list[TurnInRow],
    tokens: list[Tensor],
    media: list[Tensor],
    *,
    detach: bool,
) -> tuple[Sequence[Tensor], list[Tensor]]:
    """(text of each prompt [*, Di], texts [*opening, *reply, END, PAD] of each turn [*, Di]).

    tokens int64 [U] of each prompt, media bool [U] of them.
    """
    prompt, device = source.prompt, source.hidden.device
    read = [(turn.row, own[~m]) for turn, own, m in zip(turns, tokens, media)]  # text that the Thinker has read
    if layout.text_by_hidden:
        read += [(turn.row, torch.tensor(list(turn.reply_at), device=device)) for turn in turns]
    plain = [_plain_ids(turn, layout) for turn in turns]  # text that enters by embedding alone
    ids = torch.tensor([token for own in plain for token in own], device=device)
    embeds = torch.cat((*(prompt.embeds[row, at] for row, at in read), model.require("thinker").embed_tokens(ids)))
    if detach:
        embeds = embeds.detach()
    if layout.text_by_hidden:
        hidden = torch.cat([source.hidden[at + source.starts[row]] for row, at in read])
        n, project = len(hidden), model.require("talker").text_vectors
        vectors = torch.cat((project(embeds[:n], hidden), project(embeds[n:])))
    else:
        vectors = model.require("talker").text_vectors(embeds)
    parts = vectors.split([*(len(at) for _, at in read), *(len(own) for own in plain)])
    prompts, replies, around = parts[: len(turns)], parts[len(turns) : -len(turns)], parts[-len(turns) :]
    return prompts, [
        _in_order(turn, own, replies[i] if layout.text_by_hidden else None)
        for i, (turn, own) in enumerate(zip(turns, around))
    ]


def _plain_ids(turn: TurnInRow, layout: TurnLayout) -> list[int]:
    """Ids of a turn's texts that enter by embedding alone, those of `closing` unless `opening` has them already."""
    opening = turn.indices.opening
    reply = [] if layout.text_by_hidden else turn.reply
    return [*opening, *reply, *(token for token in turn.indices.closing if token not in opening)]


def _in_order(turn: TurnInRow, plain: Tensor, reply: Tensor | None) -> Tensor:
    """[*opening, *reply, END, PAD] as vectors, from those of `_plain_ids` and of a reply that is not among them."""
    opening, closing = turn.indices.opening, turn.indices.closing
    last = [token for token in closing if token not in opening]
    stop = len(plain) - len(last)
    ends = [opening.index(token) if token in opening else stop + last.index(token) for token in closing]
    return torch.cat((plain[: len(opening)], plain[len(opening) : stop] if reply is None else reply, plain[ends]))


def _find(ids: Sequence[int], reply: Sequence[int], start: int) -> range:
    """Where a reply stands among the ids of its row, from `start` on."""
    for at in range(start, len(ids) - len(reply) + 1):
        if list(ids[at : at + len(reply)]) == list(reply):
            return range(at, at + len(reply))
    raise ValueError("what a turn says is not among the ids of its conversation; its header or its ids are wrong")
