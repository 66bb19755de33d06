"""One spoken turn as indices: which tokens, texts and codec ids a Talker reads, and at which positions.

A Talker reads three things one after the other:

    prompt    tokens of the conversation
    prefix    a few slots, each a text, the last of them with a codec id beside it
    frames    the codes of frame t (counted from 0), each with the text that follows it

Texts are named by their place in the list [*opening, *reply, END, PAD]: ids that stand before the reply, the reply's
spoken tokens, the end of text and text padding. The last two are counted from the end, so that a name holds while the
reply is still being written. The last slot of the prefix has reply token 1 (counted from 1), frame t is followed by
token t + 2; when they have run out, by the end of text once, and by padding from then on.

Nothing here is a vector. Generation gathers them as the turn goes on, training and `omni.metrics.agreement` for a whole
turn at once; that they gather the same is due to these indices. A family names its layout, a subclass of `TurnLayout`.

Shapes: U tokens of the prompt, P slots, F frames.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from omni.config.family import find_family
from omni.config.names import import_name
from omni.config.qwen3_omni import OmniConfig
from omni.rope.positions import Segment, prompt_positions, slice_segments

HEADER_LENGTH = 3  # <|im_start|>, assistant, line break
END, PAD = -2, -1  # names of the texts after the reply


class PromptEnd(NamedTuple):
    """Where a decoder's prompt ends: the position of what comes next, the largest position so far (-1: there is none),
    and how many tokens it has."""

    start: float = 0.0
    highest: float = -1.0
    tokens: int = 0

    def after(self, positions: Tensor) -> PromptEnd:
        """The end after more tokens, at positions [3, n]; what comes next still begins at `start`."""
        return self._replace(highest=max(self.highest, float(positions.max())), tokens=self.tokens + positions.shape[1])

    def moved(self, length: float) -> PromptEnd:
        """The same with what comes next so much further on."""
        return self._replace(start=self.start + length)


class TalkerPrompt(NamedTuple):
    """The Talker's part of a conversation: tokens int64 [U], positions fp32 [3, U], and where it ends."""

    tokens: Tensor
    positions: Tensor
    end: PromptEnd


@dataclass(frozen=True)
class TurnIndices:
    """A whole turn.

    tokens int64 [U] of the conversation; opening and closing: ids of the texts before and after the reply;
    prefix_codes: codec ids of the last slots; following int64 [F]: names of the texts after each frame; positions fp32
    [3, U + P + F].
    """

    tokens: Tensor
    opening: list[int]
    closing: list[int]
    prefix_codes: list[int]
    following: Tensor
    positions: Tensor


class TurnLayout(ABC):
    """How a family's Talker is conditioned, by the ids of a model's config.

    whole_prompt: the prompt is the whole conversation, the header of the assistant's turn included; else the user's
    turns, and the header is text of the prefix. text_by_hidden: a text token that the Thinker has read enters by its
    hidden state and its embedding, so a reply token has to be read before it is spoken; else by its embedding alone.
    Media enter by hidden states, `opening` and `closing` by embeddings. voice_by_code: the voice is a codec id of the
    prefix, else a text id. prefix_texts: names of the slots' texts [P]; reply: name of the first reply token.
    """

    whole_prompt: ClassVar[bool]
    text_by_hidden: ClassVar[bool]
    voice_by_code: ClassVar[bool]
    prefix_texts: ClassVar[tuple[int, ...]]
    reply: ClassVar[int]

    def __init__(self, config: OmniConfig) -> None:
        assert config.talker_config is not None, "a turn is spoken by a Talker"
        self.config = config
        self.talker: Any = config.talker_config  # the family's own class

    @abstractmethod
    def opening(self, header: Sequence[int], speaker: int) -> list[int]:
        """Ids of the texts before the reply; header: the ids that open the assistant's turn, speaker: the voice."""

    def closing(self) -> list[int]:
        """Ids of the end of text and of text padding."""
        return [self.config.tts_eos_token_id, self.config.tts_pad_token_id]

    @abstractmethod
    def prefix_codes(self, speaker: int) -> list[int]:
        """Codec ids beside the texts of the last slots."""

    @property
    def prefix_length(self) -> int:
        """P."""
        return len(self.prefix_texts)

    # the prompt

    def in_prompt(self, in_user_turn: bool) -> bool:
        """Whether tokens of a user's turn, or of what is not the user's, belong to the Talker's prompt."""
        return in_user_turn or self.whole_prompt

    def spans(self, ids: Sequence[int]) -> list[tuple[int, int]]:
        """Token ranges [start, stop) of a conversation that are the Talker's prompt.

        A user's turn goes on to the next `<|im_start|>`.
        """
        if self.whole_prompt:
            return [(0, len(ids))] if ids else []
        starts = [i for i, token in enumerate(ids) if token == self.config.im_start_token_id]
        return [
            (start, stop)
            for start, stop in zip(starts, [*starts[1:], len(ids)])
            if start + 1 < len(ids) and ids[start + 1] == self.config.user_token_id
        ]

    def prompt(self, ids: Sequence[int], segments: Sequence[Segment]) -> TalkerPrompt:
        """The Talker's part of a conversation `ids`, whose segments may go on beyond them."""
        spans = self.spans(ids)
        tokens = torch.tensor([i for start, stop in spans for i in range(start, stop)], dtype=torch.int64)
        own = [segment for start, stop in spans for segment in slice_segments(segments, start, stop)]
        positions, start = prompt_positions(own, self.talker.position_rule)
        end = PromptEnd(start)
        return TalkerPrompt(tokens, positions, end.after(positions) if len(tokens) else end)

    def room(self, end: PromptEnd | int) -> int:
        """Frames that the Talker has positions for after its prompt; below 1 where it cannot speak at all.

        end: of the prompt, or its tokens where each takes one position.
        """
        if isinstance(end, int):
            end = PromptEnd(end, end - 1, end)
        limit: int = self.talker.text_config.max_position_embeddings
        return limit - max(end.tokens + self.prefix_length, math.ceil(self.frame_position(end)))

    # what follows it

    def prefix_positions(self, end: PromptEnd) -> Tensor:
        """Positions of the slots, fp32 [P]: one after the other, as if the prompt went on."""
        return end.start + torch.arange(self.prefix_length, dtype=torch.float32)

    def frame_position(self, end: PromptEnd) -> float:
        """The position of frame 0, which follows the largest so far; each further frame takes the next one."""
        return max(end.highest, end.start + self.prefix_length - 1) + 1

    def text_after(self, frame: int, spoken: int, complete: bool) -> int | None:
        """The name of the text after a frame; spoken: reply tokens so far, complete: whether no more will come.

        None while the reply token that follows is not written yet.
        """
        following = frame + 1
        if following < spoken:
            return self.reply + following
        if not complete:
            return None
        return END if following == spoken else PAD

    # codes

    @property
    def end_code(self) -> int:
        """The codec id that ends speech, as training teaches it."""
        code: int = self.talker.codec_eos_token_id
        return code

    @property
    def stop_codes(self) -> frozenset[int]:
        """The codec ids that end speech."""
        codes: frozenset[int] = self.talker.codec_stop_ids
        return codes

    # all of it

    def lay_out(
        self,
        ids: Sequence[int],
        segments: Sequence[Segment],
        header: Sequence[int],
        speaker: int,
        spoken: int,
        frames: int,
    ) -> TurnIndices:
        """A turn of `spoken` reply tokens and so many frames, after the conversation `ids` (as in `prompt`)."""
        prompt = self.prompt(ids, segments)
        after = self.frame_position(prompt.end) + torch.arange(frames, dtype=torch.float32)
        rest = torch.cat((self.prefix_positions(prompt.end), after))
        return TurnIndices(
            prompt.tokens,
            self.opening(header, speaker),
            self.closing(),
            self.prefix_codes(speaker),
            torch.tensor([self.text_after(frame, spoken, True) for frame in range(frames)], dtype=torch.int64),
            torch.cat((prompt.positions, rest.expand(3, -1)), dim=1),
        )


class UserTurnsLayout(TurnLayout):
    """The user's turns by embeddings (media by hidden states), and nine slots (Qwen3-Omni, section 2.4):

        text    <|im_start|>  assistant  \\n  tts_pad   tts_pad    tts_pad    tts_pad  tts_bos  first reply token
        codec                                 nothink  think_bos  think_eos  speaker    pad     bos

    Padding stands in the list of texts twice, as 3 and as PAD.
    """

    whole_prompt, text_by_hidden, voice_by_code = False, False, True
    prefix_texts = (0, 1, 2, 3, 3, 3, 3, 4, 5)
    reply = 5

    def opening(self, header: Sequence[int], speaker: int) -> list[int]:
        return [*header, self.config.tts_pad_token_id, self.config.tts_bos_token_id]

    def prefix_codes(self, speaker: int) -> list[int]:
        c = self.talker
        return [c.codec_nothink_id, c.codec_think_bos_id, c.codec_think_eos_id, speaker, c.codec_pad_id, c.codec_bos_id]


class WholePromptLayout(TurnLayout):
    """The whole prompt by hidden states and embeddings, and two slots (Qwen2.5-Omni, section 2.3):

    text    voice  first reply token
    codec    pad   bos
    """

    whole_prompt, text_by_hidden, voice_by_code = True, True, False
    prefix_texts = (0, 1)
    reply = 1

    def opening(self, header: Sequence[int], speaker: int) -> list[int]:
        return [speaker]

    def prefix_codes(self, speaker: int) -> list[int]:
        return [self.talker.codec_pad_id, self.talker.codec_bos_id]


def turn_layout(config: OmniConfig) -> TurnLayout:
    """The layout that a model's family names, for its config, which has a Talker."""
    layout: TurnLayout = import_name(find_family(config.model_type).turn_layout)(config)
    return layout
