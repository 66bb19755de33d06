"""Spoken turns as a Talker reads them in training: which tokens it hears, what follows each frame, and the inputs.

A turn's inputs are what is heard of the conversation, the slots before the first frame, and the frames, each with the
text vector that generation would add to it. One class says how, for each way in which Talkers are conditioned:

    ProjectedTurns   the user's turns, text by its embeddings, nine slots            (`omni.talker.conditioning`)
    ReadTurns        the whole prompt and the reply by hidden state and embedding, two slots
                                                                                      (`omni.talker.single_codebook`)

Shapes: N tokens of all conversations, S turns, U tokens heard of a turn, P slots, F frames, K codebooks, Dt Thinker
width, Di width of the Talker's inputs, M inputs of all turns.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from omni.config.qwen2_5_omni import DenseTalkerConfig
from omni.config.qwen3_omni import TalkerConfig
from omni.generation.arguments import speaker_id
from omni.generation.prompt import Prompt
from omni.model import OmniModel
from omni.rope.positions import prompt_positions, slice_segments
from omni.talker.conditioning import PREFIX_LENGTH, add_control, control_ids, user_spans
from omni.training.data.samples import SpokenTurn

HEADER_LENGTH = 3  # <|im_start|>, assistant, line break


class ThoughtOf(NamedTuple):
    """What a Talker may hear of: the batch as it was read, hidden [N, Dt], where each conversation begins in it."""

    prompt: Prompt
    hidden: Tensor
    starts: list[int]


@dataclass
class TurnLayout:
    """One spoken turn.

    heard int64 [U]: tokens of its row; positions fp32 [3, U + P + F]; following int64 [F]: the text that follows each
    frame, as places among the turn's text vectors; text_ids: ids of those vectors that are plain embeddings; reply:
    where the reply's vectors are in the row, for Talkers that hear those. speaker: the voice's id.
    """

    row: int
    heard: Tensor
    positions: Tensor
    text_ids: list[int]
    following: Tensor
    codes: Tensor
    speaker: int
    reply: range = range(0)

    @property
    def frames(self) -> int:
        return self.codes.shape[1]


class SpokenTurns(ABC):
    """How a Talker is conditioned. prefix_length: P, the slots between what is heard and the first frame."""

    prefix_length: int

    @abstractmethod
    def heard_spans(self, ids: Sequence[int], header: int, config: Any) -> list[tuple[int, int]]:
        """Token ranges [start, stop) that are heard before the turn whose header begins at `header`."""

    @abstractmethod
    def lay_out(self, model: OmniModel, prompt: Prompt, row: int, turn: SpokenTurn) -> TurnLayout:
        """Where everything of a turn stands. Raises ValueError for an unknown speaker, codes of another number of
        codebooks, or a turn longer than the Talker's positions."""

    @abstractmethod
    def inputs(
        self, model: OmniModel, thought: ThoughtOf, turns: list[TurnLayout], *, detach: bool
    ) -> tuple[Tensor, Tensor]:
        """The packed row of all turns: vectors [M, Di] and positions fp32 [3, M]. Each module is called once."""

    @abstractmethod
    def dummy(self, model: OmniModel, ids: Sequence[int]) -> SpokenTurn:
        """One silent frame, for batches without speech; `ids`: of the first row."""

    def _place(
        self, model: OmniModel, prompt: Prompt, row: int, turn: SpokenTurn
    ) -> tuple[list[int], Tensor, Tensor, int]:
        """(ids of the row, heard, positions, speaker) of a turn, after checking it."""
        t = model.require("talker").config
        if turn.codes.shape[0] != t.num_code_groups or turn.codes.shape[1] < 1 or not turn.ids:
            raise ValueError(
                f"a spoken turn needs text and codes [{t.num_code_groups} codebooks, frames], got {len(turn.ids)} ids "
                f"and codes {list(turn.codes.shape)}"
            )
        ids = prompt.row_ids(row)
        spans = self.heard_spans(ids, turn.header, model.config)
        segments = [s for start, stop in spans for s in slice_segments(prompt.segments[row], start, stop)]
        heard = torch.tensor([i for start, stop in spans for i in range(start, stop)], dtype=torch.int64)
        positions, start = prompt_positions(segments, t.position_rule)
        prefix = start + torch.arange(self.prefix_length, dtype=torch.float32)
        highest = max(float(positions.max()) if len(heard) else -1.0, float(prefix[-1]))
        rest = torch.cat((prefix, highest + 1 + torch.arange(turn.codes.shape[1], dtype=torch.float32)))
        length, limit = len(heard) + len(rest), t.text_config.max_position_embeddings
        if length > limit:
            raise ValueError(f"a spoken turn takes {length} positions, the Talker has {limit}; shorten it")
        positions = torch.cat((positions, rest.expand(3, -1)), dim=1)
        return ids, heard, positions, speaker_id(model, turn.speaker)


class ProjectedTurns(SpokenTurns):
    """Text by its embeddings, media by hidden states, each through a projection of its own; several codebooks."""

    prefix_length = PREFIX_LENGTH

    def heard_spans(self, ids: Sequence[int], header: int, config: Any) -> list[tuple[int, int]]:
        return user_spans(ids[:header], config.im_start_token_id, config.user_token_id)

    def dummy(self, model: OmniModel, ids: Sequence[int]) -> SpokenTurn:
        codes = torch.zeros(model.require("talker").config.num_code_groups, 1, dtype=torch.int64)
        return SpokenTurn(header=0, ids=[model.config.tts_pad_token_id], codes=codes)

    def lay_out(self, model: OmniModel, prompt: Prompt, row: int, turn: SpokenTurn) -> TurnLayout:
        """text_ids: header, tts_pad, tts_bos, reply, tts_eos."""
        c = model.config
        ids, heard, positions, speaker = self._place(model, prompt, row, turn)
        newline = ids[turn.header + 2] if turn.header + 2 < len(ids) else ids[-1]
        header = [c.im_start_token_id, c.assistant_token_id, newline]
        text_ids = [*header, c.tts_pad_token_id, c.tts_bos_token_id, *turn.ids, c.tts_eos_token_id]
        place = torch.arange(turn.codes.shape[1]) + 1  # frame t: reply token t + 1 (from 0), tts_eos, then tts_pad
        following = torch.where(place > len(turn.ids), 3, 5 + place)
        return TurnLayout(row, heard, positions, text_ids, following, turn.codes, speaker)

    def inputs(
        self, model: OmniModel, thought: ThoughtOf, turns: list[TurnLayout], *, detach: bool
    ) -> tuple[Tensor, Tensor]:
        talker: Any = model.talker  # of the family's class
        prompt, device = thought.prompt, thought.hidden.device
        users = [turn.heard.to(device) for turn in turns]
        media = [prompt.media[turn.row, user] for turn, user in zip(turns, users)]
        text_ids = torch.tensor([i for turn in turns for i in turn.text_ids], device=device)
        read = [prompt.embeds[turn.row, user[~heard]] for turn, user, heard in zip(turns, users, media)]
        heard = [thought.hidden[user[m] + thought.starts[turn.row]] for turn, user, m in zip(turns, users, media)]
        text, seen = torch.cat((*read, model.require("thinker").embed_tokens(text_ids))), torch.cat(heard)
        if detach:
            text = text.detach()
        vectors, seen_vectors = talker.text_projection(text), talker.hidden_projection(seen)
        sizes = [*(len(x) for x in read), *(len(turn.text_ids) for turn in turns)]
        user_text, reply_text = vectors.split(sizes)[: len(turns)], vectors.split(sizes)[len(turns) :]
        user_media = seen_vectors.split([len(x) for x in heard])

        codes = torch.cat([turn.codes for turn in turns], dim=1).to(device)  # [K, F]
        control = torch.tensor([i for turn in turns for i in control_ids(talker, turn.speaker)], device=device)
        codec = talker.codec_embedding(torch.cat((control, codes[0])))
        frames = codec[len(control) :] + talker.mtp.embed_residual(codes[1:].T).sum(1)
        parts = []
        for i, (turn, own) in enumerate(zip(turns, frames.split([turn.frames for turn in turns]))):
            order = torch.cat((media[i].logical_not().nonzero()[:, 0], media[i].nonzero()[:, 0])).argsort()
            parts.append(torch.cat((user_text[i], user_media[i].to(vectors.dtype)))[order])
            reply = reply_text[i]
            slots = torch.cat((reply[:3], reply[3:4].expand(4, -1), reply[4:6]))
            parts.append(add_control(slots, codec[6 * i : 6 * i + 6]))
            parts.append(own + reply[turn.following.to(device)])
        return torch.cat(parts), torch.cat([turn.positions for turn in turns], dim=1)


class ReadTurns(SpokenTurns):
    """Everything by hidden state and embedding, media by hidden state alone; one codebook."""

    prefix_length = 2

    def heard_spans(self, ids: Sequence[int], header: int, config: Any) -> list[tuple[int, int]]:
        stop = header + HEADER_LENGTH
        return [(0, stop)] if stop > 0 else []

    def dummy(self, model: OmniModel, ids: Sequence[int]) -> SpokenTurn:
        """Nothing is heard before it, and the row's first token is its reply."""
        return SpokenTurn(header=-HEADER_LENGTH, ids=list(ids[:1]), codes=torch.zeros(1, 1, dtype=torch.int64))

    def lay_out(self, model: OmniModel, prompt: Prompt, row: int, turn: SpokenTurn) -> TurnLayout:
        """text_ids: voice, end of text, text padding; the text vectors are the reply's, then the last two of these."""
        c = model.config
        ids, heard, positions, speaker = self._place(model, prompt, row, turn)
        first = _find(ids, turn.ids, turn.header + HEADER_LENGTH)
        count = len(turn.ids)
        following = (torch.arange(turn.codes.shape[1]) + 1).clamp(max=count + 1)
        text_ids = [speaker, c.tts_eos_token_id, c.tts_pad_token_id]
        reply = range(first, first + count)
        return TurnLayout(row, heard, positions, text_ids, following, turn.codes, speaker, reply)

    def inputs(
        self, model: OmniModel, thought: ThoughtOf, turns: list[TurnLayout], *, detach: bool
    ) -> tuple[Tensor, Tensor]:
        talker, prompt, device = model.require("talker"), thought.prompt, thought.hidden.device
        plain = model.require("thinker").embed_tokens(torch.tensor([turn.text_ids for turn in turns], device=device))
        embeds = prompt.embeds.masked_fill(prompt.media[..., None], 0)  # media are heard by their hidden states alone
        if detach:
            plain, embeds = plain.detach(), embeds.detach()
        codes = torch.cat([turn.codes[0] for turn in turns]).to(device)
        control = torch.tensor([talker.config.codec_pad_id, talker.config.codec_bos_id], device=device)
        codec = talker.codec_embedding(torch.cat((control, codes)))
        parts = []
        for turn, own, text in zip(turns, codec[2:].split([turn.frames for turn in turns]), plain):
            start, places = thought.starts[turn.row], torch.tensor(list(turn.reply), device=device)
            heard = turn.heard.to(device)
            parts.append(embeds[turn.row, heard] + thought.hidden[start + heard])
            reply = embeds[turn.row, places] + thought.hidden[start + places]
            parts.append(torch.stack((text[0], reply[0])) + codec[:2])
            parts.append(own + torch.cat((reply, text[1:]))[turn.following.to(device)])
        return torch.cat(parts), torch.cat([turn.positions for turn in turns], dim=1)


def _find(ids: Sequence[int], reply: Sequence[int], start: int) -> int:
    """Where a reply stands among the ids of its row, from `start` on."""
    for place in range(start, len(ids) - len(reply) + 1):
        if list(ids[place : place + len(reply)]) == list(reply):
            return place
    raise ValueError("what a turn says is not among the ids of its conversation; its header or its ids are wrong")


_TURNS: dict[type, SpokenTurns] = {TalkerConfig: ProjectedTurns(), DenseTalkerConfig: ReadTurns()}


def turns_of(config: Any) -> SpokenTurns:
    """How the Talker of this config reads spoken turns."""
    return next(_TURNS[kind] for kind in type(config).__mro__ if kind in _TURNS)
