"""A batch through the model, teacher-forced: the Thinker over whole conversations, the Talker over their spoken turns.

Both read packed rows: all sequences behind each other in one row, none of which sees another, so nothing is computed
for padding. Every trainable part is called in every pass, and each layer equally often whatever the batch holds: a part
that a batch has nothing for reads a dummy whose gradient is zero. Processes that share weights therefore never wait for
each other in vain.

Shapes: B conversations, N tokens of all, D width, Dt Thinker width; S spoken turns with F frames in all, K codebooks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from omni.generation.arguments import speaker_id
from omni.generation.prompt import Prompt, encode_prompt
from omni.layers.packing import PackedBlocks
from omni.model import OmniModel
from omni.rope.positions import prompt_positions, slice_segments
from omni.talker.conditioning import PREFIX_LENGTH, add_control, control_ids, user_spans
from omni.thinker.thinker import ThinkerOutput
from omni.training.samples import IGNORED, SpokenTurn, TrainingBatch


@dataclass
class ThinkerPass:
    """What the Thinker made of a batch. final [N, Dt], what the text head reads; labels int64 [N]: the id that follows,
    or `IGNORED`; hidden [N, Dt], what the Talker reads; router_logits, one [N, E] a sparse layer; prompt: the batch as
    it was read, rows unpacked; starts: where each conversation begins, and N.
    """

    final: Tensor
    labels: Tensor
    hidden: Tensor
    router_logits: list[Tensor]
    prompt: Prompt
    starts: list[int]


@dataclass
class TalkerPass:
    """What the Talker made of the spoken turns.

    logits [F + S, V] of codebook 0 and its codes int64 [F + S], each turn's frames and then the end of speech;
    residual_logits [R, K - 1, Vr] and residual_codes int64 [R, K - 1] of the R frames that the residual head read, all
    F unless a share was asked for; router_logits as in `ThinkerPass`; turns: frames of each turn. A batch without
    speech has one dummy frame, whose codes are `IGNORED`, and no turns.
    """

    logits: Tensor
    codes: Tensor
    residual_logits: Tensor
    residual_codes: Tensor
    router_logits: list[Tensor]
    turns: list[int]


def thinker_pass(model: OmniModel, batch: TrainingBatch, *, needed: bool = True) -> ThinkerPass:
    """Read all conversations of a batch at once. Differentiable; raises ValueError as `encode_prompt` does.

    needed: whether what the Thinker says is needed, not only what the Talker hears of it. If not, and no conversation
    holds media, its layers do not run, and `final` and `hidden` are zero.
    """
    prompt = encode_prompt(model, batch.inputs, touch_absent=True)
    rows = torch.arange(prompt.ids.shape[1], device=prompt.ids.device)
    valid = rows < torch.tensor(prompt.lengths, device=prompt.ids.device)[:, None]
    embeds, blocks = prompt.embeds[valid][None], PackedBlocks(prompt.lengths, prompt.ids.device, causal=True)
    if needed or bool(prompt.media.any()):
        out = model.thinker(
            embeds,
            prompt.positions[:, valid][:, None],
            taps=None if prompt.taps is None else prompt.taps[:, valid][:, None],
            blocks=blocks,
            logits="none",
            with_router_logits=True,
        )
    else:  # the Talker hears text by its embeddings
        out = ThinkerOutput(embeds, torch.zeros_like(embeds), None, torch.zeros_like(embeds))
    following = [torch.cat((labels[1:], labels.new_full((1,), IGNORED))) for labels in batch.labels]
    starts = [0]
    for length in prompt.lengths:
        starts.append(starts[-1] + length)
    labels = torch.cat(following).to(prompt.ids.device)
    assert len(labels) == starts[-1], "a label for every token"
    return ThinkerPass(out.final[0], labels, out.hidden[0], out.router_logits or [], prompt, starts)


def residual_frame_count(frames: int, share: float) -> int:
    """R, the frames of F that the residual head reads: at least one."""
    return max(1, math.ceil(share * frames))


def talker_pass(
    model: OmniModel,
    batch: TrainingBatch,
    thought: ThinkerPass,
    *,
    detach: bool = True,
    residual_share: float = 1.0,
) -> TalkerPass:
    """Read all spoken turns of a batch at once, as the Talker would when it drew these codes itself.

    detach: no gradient flows into the Thinker. residual_share: of the frames, drawn anew each time, that the residual
    head reads; it costs more than the Talker itself, and one frame in sixteen trains it as well (Sesame, 2025,
    "Crossing the uncanny valley of conversational voice": compute amortisation). Raises ValueError for an unknown
    speaker, codes of another number of codebooks, or a turn longer than the Talker's positions.
    """
    talker, device = model.talker, thought.hidden.device
    spoken = batch.speech or [(0, _dummy_turn(model))]
    turns = [_lay_out(model, thought.prompt, row, turn) for row, turn in spoken]
    embeds, positions = _talker_inputs(model, thought, turns, detach)
    lengths = [len(turn.user) + PREFIX_LENGTH + turn.frames for turn in turns]
    blocks = PackedBlocks(lengths, device, causal=True)
    out = talker(embeds[None], positions[:, None].to(device), blocks=blocks, with_logits=False, with_router_logits=True)
    ends, end = [], 0
    for length in lengths:
        end += length
        ends.append(end)
    # the last slot of the prefix draws frame 0, and each frame the next one, the last frame the end of speech
    drawing = [torch.arange(end - turn.frames - 1, end, device=device) for end, turn in zip(ends, turns)]
    codes = torch.cat([turn.codes for turn in turns], dim=1).to(device)  # [K, F]
    stop = codes.new_full((1,), talker.config.codec_eos_token_id)
    first = [part for own in codes[0].split([t.frames for t in turns]) for part in (own, stop)]
    hidden = out.hidden[0][torch.cat([places[:-1] for places in drawing])]
    read = codes
    if residual_share < 1:
        order = torch.randperm(codes.shape[1])[: residual_frame_count(codes.shape[1], residual_share)].to(device)
        hidden, read = hidden[order], codes[:, order]
    residual = talker.mtp(hidden, talker.codec_embedding(read[0]), read[1:].T)
    wanted, residual_codes = torch.cat(first), read[1:].T
    if not batch.speech:
        wanted, residual_codes = torch.full_like(wanted, IGNORED), torch.full_like(residual_codes, IGNORED)
    logits = talker.codec_head(out.hidden[0][torch.cat(drawing)])
    frames = [turn.frames for turn in turns] if batch.speech else []
    return TalkerPass(logits, wanted, residual, residual_codes, out.router_logits or [], frames)


@dataclass
class _Layout:
    """One spoken turn: tokens int64 of the user's part in its row, with positions fp32 [3, U + 9 + F]; the ids of its
    text: header, tts_pad, tts_bos, reply, tts_eos; the text that follows each frame, as places in those ids."""

    row: int
    user: Tensor
    positions: Tensor
    text_ids: list[int]
    following: Tensor
    codes: Tensor
    speaker: int

    @property
    def frames(self) -> int:
        return self.codes.shape[1]


def _lay_out(model: OmniModel, prompt: Prompt, row: int, turn: SpokenTurn) -> _Layout:
    c, t = model.config, model.talker.config
    if turn.codes.shape[0] != t.num_code_groups or turn.codes.shape[1] < 1 or not turn.ids:
        raise ValueError(
            f"a spoken turn needs text and codes [{t.num_code_groups} codebooks, frames], got {len(turn.ids)} ids and "
            f"codes {list(turn.codes.shape)}"
        )
    ids = prompt.row_ids(row)
    spans = user_spans(ids[: turn.header], c.im_start_token_id, c.user_token_id)
    segments = [s for start, stop in spans for s in slice_segments(prompt.segments[row], start, stop)]
    user = torch.tensor([i for start, stop in spans for i in range(start, stop)], dtype=torch.int64)
    positions, start = prompt_positions(segments, t.position_rule)
    prefix = start + torch.arange(PREFIX_LENGTH, dtype=torch.float32)
    highest = max(float(positions.max()) if len(user) else -1.0, float(prefix[-1]))
    frames = turn.codes.shape[1]
    rest = torch.cat((prefix, highest + 1 + torch.arange(frames, dtype=torch.float32)))
    length, limit = len(user) + len(rest), t.text_config.max_position_embeddings
    if length > limit:
        raise ValueError(f"a spoken turn takes {length} positions, the Talker has {limit}; shorten it")
    newline = ids[turn.header + 2] if turn.header + 2 < len(ids) else ids[-1]
    header = [c.im_start_token_id, c.assistant_token_id, newline]
    text_ids = [*header, c.tts_pad_token_id, c.tts_bos_token_id, *turn.ids, c.tts_eos_token_id]
    place = torch.arange(frames) + 1  # frame t is followed by reply token t + 1 (from 0), tts_eos, then tts_pad
    following = torch.where(place > len(turn.ids), 3, 5 + place)
    positions = torch.cat((positions, rest.expand(3, -1)), dim=1)
    return _Layout(row, user, positions, text_ids, following, turn.codes, speaker_id(model, turn.speaker))


def _talker_inputs(model: OmniModel, thought: ThinkerPass, turns: list[_Layout], detach: bool) -> tuple[Tensor, Tensor]:
    """The packed row of all turns: vectors [M, D] and positions fp32 [3, M]. Each module is called once."""
    talker, prompt, device = model.talker, thought.prompt, thought.hidden.device
    users = [turn.user.to(device) for turn in turns]
    media = [prompt.media[turn.row, user] for turn, user in zip(turns, users)]
    text_ids = torch.tensor([i for turn in turns for i in turn.text_ids], device=device)
    read = [prompt.embeds[turn.row, user[~heard]] for turn, user, heard in zip(turns, users, media)]
    heard = [thought.hidden[user[m] + thought.starts[turn.row]] for turn, user, m in zip(turns, users, media)]
    text, seen = torch.cat((*read, model.thinker.embed_tokens(text_ids))), torch.cat(heard)
    if detach:
        text, seen = text.detach(), seen.detach()
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


def _dummy_turn(model: OmniModel) -> SpokenTurn:
    """One silent frame, for batches without speech."""
    codes = torch.zeros(model.talker.config.num_code_groups, 1, dtype=torch.int64)
    return SpokenTurn(header=0, ids=[model.config.tts_pad_token_id], codes=codes)
