"""What the Talker hears of a conversation: its prompt and the text vector of every frame (Qwen3-Omni, section 2.4).

The prompt is the user's part (all user turns, media included) and nine assistant slots:

    text side   <|im_start|> assistant \n   tts_pad  tts_pad    tts_pad    tts_pad  tts_bos  first reply token
    codec side       0           0      0   nothink  think_bos  think_eos  speaker  pad      bos

Text enters by its Thinker input embedding, media by Thinker hidden states. Frame t (from 0) is followed by the sum of
its code embeddings and the vector of reply token t + 2 (from 1), then tts_eos once, then tts_pad.

Shapes: T prompt tokens, Dt Thinker width, D Talker width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from omni.talker.talker import Talker

PREFIX_LENGTH = 9


def user_spans(ids: Sequence[int], im_start: int, user: int) -> list[tuple[int, int]]:
    """Token ranges [start, stop) of the user turns of a prompt, each up to the next `<|im_start|>`."""
    starts = [i for i, token in enumerate(ids) if token == im_start]
    return [
        (start, stop)
        for start, stop in zip(starts, [*starts[1:], len(ids)])
        if start + 1 < len(ids) and ids[start + 1] == user
    ]


def prefix_slots(text: Tensor, first: Tensor) -> Tensor:
    """The text side of the nine slots [9, D]: vectors of header, tts_pad and tts_bos [5, D], first reply token [D]."""
    return torch.cat((text[:3], text[3].expand(4, -1), text[4:5], first[None]))


def control_ids(talker: Talker, speaker: int) -> list[int]:
    """The codec side of the prefix's last six slots."""
    c = talker.config
    return [c.codec_nothink_id, c.codec_think_bos_id, c.codec_think_eos_id, speaker, c.codec_pad_id, c.codec_bos_id]


def add_control(text: Tensor, control: Tensor) -> Tensor:
    """The prefix from its text side [9, D] and the embeddings of its control ids [6, D]."""
    return torch.cat((text[:-6], text[-6:] + control))
