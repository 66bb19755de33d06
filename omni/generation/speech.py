"""What the Talker hears of a prompt that the Thinker has read."""

from __future__ import annotations

import torch
from torch import Tensor

from omni.generation.prompt import Prompt
from omni.parts import ModelParts
from omni.rope.positions import Segment, slice_segments


def heard_part(model: ModelParts, prompt: Prompt, hidden: Tensor, row: int) -> tuple[Tensor, list[Segment]]:
    """What the Talker hears of one row, as it hears it: vectors [T, Di] and their segments.

    hidden [T, Dt]: the Thinker's hidden states of the row.
    """
    ids, talker = prompt.row_ids(row), model.require("talker")
    spans = talker.heard_spans(ids, model.config.im_start_token_id, model.config.user_token_id)
    tokens = torch.tensor([i for start, stop in spans for i in range(start, stop)], dtype=torch.int64)
    tokens = tokens.to(prompt.ids.device)
    segments = [s for start, stop in spans for s in slice_segments(prompt.segments[row], start, stop)]
    return talker.prompt_vectors(prompt.embeds[row, tokens], hidden[tokens], prompt.media[row, tokens]), segments
