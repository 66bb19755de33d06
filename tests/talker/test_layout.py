"""The spoken turn as indices: what is laid out at once for training is what generation arrives at step by step."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from omni.config.qwen3_omni import OmniConfig
from omni.rope.positions import Audio, Image, Segment, Text, segment_positions
from omni.talker.layout import END, PAD, PromptEnd, TurnLayout, turn_layout

CONFIGS = Path(__file__).parents[2] / "configs"
FAMILIES = {"qwen3": "qwen3_omni_30b_a3b.json", "qwen2_5": "qwen2_5_omni_7b.json"}
TURNS = 300


def layout_of(family: str) -> TurnLayout:
    return turn_layout(OmniConfig.from_pretrained(CONFIGS / FAMILIES[family]))


class Piece:
    """A part of a conversation: its ids and segment, and whether the user says it."""

    def __init__(self, ids: list[int], segment: Segment, by_user: bool) -> None:
        self.ids, self.segment, self.by_user = ids, segment, by_user


def conversation(rng: random.Random, config: Any) -> list[Piece]:
    """A random conversation, up to the header of the reply: system text, turns of both sides, media of the user."""
    c, pieces = config, []

    def say(role: int, by_user: bool, parts: int) -> None:
        head = [c.im_start_token_id, role, 198]
        pieces.append(Piece(head, Text(3), by_user))
        for _ in range(parts):
            kind = rng.choice(("text", "audio", "image")) if by_user else "text"
            n, height = rng.randint(1, 5), rng.randint(1, 3)
            segment = {"text": Text(n), "audio": Audio(n), "image": Image(height, n)}[kind]
            pieces.append(Piece([rng.randint(200, 900) for _ in range(segment.length)], segment, by_user))
        pieces.append(Piece([c.im_end_token_id, 198], Text(2), by_user))

    if rng.random() < 0.5:
        say(c.system_token_id, False, 1)
    for _ in range(rng.randint(1, 3)):
        say(c.user_token_id, True, rng.randint(1, 4))
        if rng.random() < 0.5:
            say(c.assistant_token_id, False, rng.randint(0, 2))
    pieces.append(Piece([c.im_start_token_id, c.assistant_token_id, 198], Text(3), False))
    return pieces


def read_in_pieces(layout: TurnLayout, pieces: list[Piece]) -> tuple[list[int], Tensor, PromptEnd]:
    """The Talker's prompt as a session reads it: tokens and positions of one piece after the other."""
    tokens: list[int] = []
    positions, start, highest, read = [torch.zeros(3, 0)], 0.0, -1.0, 0
    for piece in pieces:
        if layout.in_prompt(piece.by_user):
            own, start = segment_positions(piece.segment, start, layout.talker.position_rule)
            positions.append(own)
            highest = max(highest, float(own.max()))
            tokens += range(read, read + len(piece.ids))
        read += len(piece.ids)
    return tokens, torch.cat(positions, dim=1), PromptEnd(start, highest)


def speak(layout: TurnLayout, rng: random.Random, spoken: int, frames: int) -> list[int]:
    """Names of the texts after each frame, while reply tokens come at random moments, sometimes too late."""
    written, complete, names = 1, spoken == 1, []
    while len(names) < frames:
        if rng.random() < 0.5:
            complete = complete or written == spoken
            written = min(written + 1, spoken)
        name = layout.text_after(len(names), written, complete)
        if name is None:
            assert not complete and len(names) + 1 >= written  # it waits for what is not written, and for nothing else
        else:
            names.append(name)
    return names


@pytest.mark.parametrize("family", FAMILIES)
def test_a_turn_laid_out_is_the_turn_step_by_step(family: str) -> None:
    layout, rng = layout_of(family), random.Random(17)
    waited = 0
    for _ in range(TURNS):
        pieces = conversation(rng, layout.config)
        ids = [token for piece in pieces for token in piece.ids]
        spoken, frames = rng.randint(1, 9), rng.randint(0, 14)
        header, speaker = ids[-3:], rng.randint(3000, 4000)
        later = [Text(spoken + 1)]  # in training the reply stands behind its prompt
        turn = layout.lay_out(ids, [*(p.segment for p in pieces), *later], header, speaker, spoken, frames)

        tokens, positions, end = read_in_pieces(layout, pieces)
        assert turn.tokens.tolist() == tokens
        steps = [layout.frame_position(end) + t for t in range(frames)]
        rest = torch.cat((layout.prefix_positions(end), torch.tensor(steps, dtype=torch.float32)))
        assert torch.equal(turn.positions, torch.cat((positions, rest.expand(3, -1)), dim=1))
        assert (turn.opening, turn.closing) == (layout.opening(header, speaker), layout.closing())
        assert turn.prefix_codes == layout.prefix_codes(speaker)
        names = speak(layout, rng, spoken, frames)
        assert turn.following.tolist() == names
        waited += frames > spoken
    assert waited > TURNS // 5  # endings were met


@pytest.mark.parametrize("family", FAMILIES)
def test_the_text_of_a_frame_is_the_published_one(family: str) -> None:
    """The last slot has reply token 1; then one token a frame, the end of text once, padding for ever."""
    layout = layout_of(family)
    reply = [11, 12, 13]
    texts = [*layout.opening([1, 2, 3], 2301), *reply, *layout.closing()]
    c = layout.config
    assert texts[layout.prefix_texts[-1]] == 11
    following = [layout.text_after(t, len(reply), True) for t in range(6)]
    after = [texts[name] for name in following if name is not None]
    assert after == [12, 13, c.tts_eos_token_id, *[c.tts_pad_token_id] * 3]
    assert following[2:] == [END, *[PAD] * 3]
    assert [layout.text_after(t, len(reply), False) for t in range(4)] == [*following[:2], None, None]


def slots(family: str) -> list[tuple[int, int | None]]:
    """Text id and codec id of each slot, for a header 1 2 3, the voice 2301 and a first reply token 11."""
    layout = layout_of(family)
    texts, codes = [*layout.opening([1, 2, 3], 2301), 11], layout.prefix_codes(2301)
    plain: list[int | None] = [None] * (layout.prefix_length - len(codes))
    return [(texts[name], code) for name, code in zip(layout.prefix_texts, [*plain, *codes], strict=True)]


def test_nine_slots_after_the_user() -> None:
    c = layout_of("qwen3").config
    t, pad = layout_of("qwen3").talker, c.tts_pad_token_id
    assert slots("qwen3") == [
        (1, None),
        (2, None),
        (3, None),
        (pad, t.codec_nothink_id),
        (pad, t.codec_think_bos_id),
        (pad, t.codec_think_eos_id),
        (pad, 2301),
        (c.tts_bos_token_id, t.codec_pad_id),
        (11, t.codec_bos_id),
    ]


def test_two_slots_after_the_whole_prompt() -> None:
    t = layout_of("qwen2_5").talker
    assert slots("qwen2_5") == [(2301, t.codec_pad_id), (11, t.codec_bos_id)]


@pytest.mark.parametrize("family", FAMILIES)
def test_room_for_frames(family: str) -> None:
    layout = layout_of(family)
    limit = layout.talker.text_config.max_position_embeddings
    assert layout.room(0) == limit - layout.prefix_length
    assert layout.room(limit - layout.prefix_length) == 0
