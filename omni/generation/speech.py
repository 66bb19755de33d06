"""Speech for texts: the Talker's prompt of every row, the frame loop, and the codec decoder at its end.

Shapes: B rows, T prompt tokens, D Talker width, K codebooks, n frames of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from omni.generation.decode import SpeechState, draw_frame, prefill_speech, read_frame
from omni.generation.prompt import Prompt
from omni.generation.sampling import CODE_STREAM, RESIDUAL_STREAM, RowSampling, SamplingConfig
from omni.rope.positions import Segment, Text, prompt_positions, reply_position, slice_segments
from omni.talker.conditioning import (
    PREFIX_LENGTH,
    assistant_prefix,
    project_user,
    trailing_text_ids,
    user_spans,
)

if TYPE_CHECKING:
    from omni.model import OmniModel

DECODE_FRAMES = 64  # frames given to the codec decoder at a time; bounds its memory, changes nothing else


@dataclass
class SpeechRequest:
    """One row to be spoken.

    header: ids of `<|im_start|>assistant\\n`; spoken: ids of the text, at least one; speaker: codec id of the voice;
    user [T, D], the projected user part with its segments (empty: none); seed and samplings of the row.
    """

    header: list[int]
    spoken: list[int]
    speaker: int
    seed: int
    codes: SamplingConfig
    residual: SamplingConfig
    user: Tensor | None = None
    segments: list[Segment] = field(default_factory=list)


def user_part(model: OmniModel, prompt: Prompt, hidden: Tensor, row: int) -> tuple[Tensor, list[Segment]]:
    """The user turns of one row as the Talker hears them: vectors [T, D] and their segments."""
    ids = prompt.row_ids(row)
    spans = user_spans(ids, model.config.im_start_token_id, model.config.user_token_id)
    tokens = torch.tensor([i for start, stop in spans for i in range(start, stop)], dtype=torch.int64)
    tokens = tokens.to(prompt.ids.device)
    segments = [s for start, stop in spans for s in slice_segments(prompt.segments[row], start, stop)]
    part = project_user(model.talker, prompt.embeds[row, tokens], hidden[row, tokens], prompt.media[row, tokens])
    return part, segments


def _project_text(model: OmniModel, ids: Sequence[int]) -> Tensor:
    """Token ids -> their vectors on the Talker's text side [n, D]."""
    embeds = model.thinker.embed_tokens(torch.tensor(list(ids), dtype=torch.int64, device=model.device))
    return model.talker.text_projection(embeds)


def start_speech(model: OmniModel, requests: Sequence[SpeechRequest]) -> SpeechState:
    """Assemble and read the Talker's prompts."""
    c, talker = model.config, model.talker
    rows, positions, following = [], [], []
    for request in requests:
        special = [c.tts_pad_token_id, c.tts_bos_token_id, request.spoken[0]]
        text = _project_text(model, [*request.header, *special])
        prefix = assistant_prefix(talker, text[:3], text[3], text[4], text[5], request.speaker)
        rows.append(prefix if request.user is None else torch.cat((request.user, prefix)))
        segments = [*request.segments, Text(PREFIX_LENGTH)]
        row_positions, _ = prompt_positions(segments, talker.config.position_id_per_seconds)
        positions.append(row_positions.T)
        following.append(reply_position(row_positions))
    device = model.device
    lengths = [len(row) for row in rows]
    embeds = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    padded = nn.utils.rnn.pad_sequence(positions, batch_first=True).permute(2, 0, 1).to(device)
    return prefill_speech(talker, embeds, padded, lengths, torch.tensor(following, device=device))


def write_codes(
    model: OmniModel, requests: Sequence[SpeechRequest], max_frames: int
) -> tuple[list[Tensor], list[bool]]:
    """All frames of all rows: codes int64 [K, n] a row, and whether the row reached the end of speech itself."""
    c, talker = model.config, model.talker
    state = start_speech(model, requests)
    room = talker.config.text_config.max_position_embeddings
    limits = [min(max_frames, room - length) for length in state.decoder.cache.lengths]
    seeds = torch.tensor([r.seed for r in requests], device=model.device)
    first = RowSampling([r.codes for r in requests], seeds, CODE_STREAM)
    residual = RowSampling([r.residual for r in requests], seeds, RESIDUAL_STREAM)
    width = max(len(r.spoken) for r in requests)
    trailing = [trailing_text_ids(r.spoken, width, c.tts_eos_token_id, c.tts_pad_token_id) for r in requests]
    text = torch.stack([_project_text(model, ids) for ids in trailing])  # [B, width, D]
    pad = _project_text(model, [c.tts_pad_token_id])
    banned = talker.suppressed()

    frames: list[Tensor] = []
    counts, ended = [0] * len(requests), [False] * len(requests)
    active = [limit > 0 for limit in limits]
    while any(active):
        codes, embedding = draw_frame(talker, state, first, residual, banned)
        frames.append(codes)
        for row, code in enumerate(codes[:, 0].tolist()):
            if not active[row]:
                continue
            if code == talker.config.codec_eos_token_id:
                active[row], ended[row] = False, True
            else:
                counts[row] += 1
                active[row] = counts[row] < limits[row]
        if any(active):
            step = len(frames) - 1
            read_frame(talker, state, embedding, text[:, step] if step < width else pad)
    groups = talker.config.num_code_groups
    stacked = torch.stack(frames, dim=2) if frames else torch.zeros(len(requests), groups, 0, dtype=torch.int64)
    return [stacked[row, :, :count].clone() for row, count in enumerate(counts)], ended


def decode_audio(code2wav: Any, codes: Sequence[Tensor]) -> list[Tensor]:
    """Codes [K, n] of every row -> float32 samples on the CPU, each of exactly the length that its frames give.

    Rows are decoded together, padded at the end; the decoder is causal, so a row's samples do not depend on that.
    """
    longest = max((c.shape[1] for c in codes), default=0)
    if longest == 0:
        return [torch.zeros(0) for _ in codes]
    batch = torch.stack([nn.functional.pad(c, (0, longest - c.shape[1])) for c in codes])
    state = code2wav.init_state(len(codes))
    pieces = [code2wav.step(piece, state).float().cpu() for piece in batch.split(DECODE_FRAMES, dim=2)]
    wave = torch.cat(pieces, dim=1)
    hop, lookahead = int(code2wav.hop_length), int(code2wav.lookahead)
    return [wave[row, : max(0, hop * c.shape[1] - lookahead)].clone() for row, c in enumerate(codes)]
