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

from omni.generation.prompt import Prompt, encode_prompt
from omni.layers.packing import PackedBlocks
from omni.model import OmniModel
from omni.talker.layout import turn_layout
from omni.thinker.thinker import ThinkerOutput
from omni.training.data.samples import IGNORED, TrainingBatch
from omni.training.objectives.spoken_turns import Conversations, lay_out, silent_turn, talker_inputs


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
    places: Tensor


def thinker_pass(model: OmniModel, batch: TrainingBatch, *, needed: bool = True) -> ThinkerPass:
    """Read all conversations of a batch at once. Differentiable; raises ValueError as `encode_prompt` does.

    needed: whether what the Thinker says is needed, not only what the Talker reads of it. If not, and text enters the
    Talker by its embeddings and no conversation holds media, its layers do not run, and `final` and `hidden` are zero.
    """
    needed = needed or (model.talker is not None and turn_layout(model.config).text_by_hidden)
    prompt = encode_prompt(model, batch.inputs, touch_absent=True)
    rows = torch.arange(prompt.ids.shape[1], device=prompt.ids.device)
    valid = rows < torch.tensor(prompt.lengths, device=prompt.ids.device)[:, None]
    embeds, blocks = prompt.embeds[valid][None], PackedBlocks(prompt.lengths, prompt.ids.device, causal=True)
    if needed or bool(prompt.media.any()):
        out = model.require("thinker")(
            embeds,
            prompt.positions[:, valid][:, None],
            taps=None if prompt.taps is None else prompt.taps[:, valid][:, None],
            blocks=blocks,
            logits="none",
            with_router_logits=True,
        )
    else:  # text enters the Talker by its embeddings
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
    talker, device = model.require("talker"), thought.hidden.device
    layout = turn_layout(model.config)
    turns = [lay_out(model, layout, thought.prompt, row, turn) for row, turn in batch.speech]
    turns = turns or [silent_turn(model, layout, thought.prompt)]
    source = Conversations(thought.prompt, thought.hidden.detach() if detach else thought.hidden, thought.starts)
    embeds, positions = talker_inputs(model, layout, source, turns, detach=detach)
    lengths = [turn.indices.positions.shape[1] for turn in turns]
    blocks = PackedBlocks(lengths, device, causal=True)
    out = talker(embeds[None], positions[:, None].to(device), blocks=blocks, with_logits=False, with_router_logits=True)
    ends, end = [], 0
    for length in lengths:
        end += length
        ends.append(end)
    # the last slot of the prefix draws frame 0, and each frame the next one, the last frame the end of speech
    drawing = [torch.arange(end - turn.frames - 1, end, device=device) for end, turn in zip(ends, turns)]
    codes = torch.cat([turn.codes for turn in turns], dim=1).to(device)  # [K, F]
    stop = codes.new_full((1,), layout.end_code)
    first = [part for own in codes[0].split([t.frames for t in turns]) for part in (own, stop)]
    hidden = out.hidden[0][torch.cat([places[:-1] for places in drawing])]
    read = codes
    if residual_share < 1:
        order = torch.randperm(codes.shape[1])[: residual_frame_count(codes.shape[1], residual_share)].to(device)
        hidden, read = hidden[order], codes[:, order]
    residual = hidden.new_zeros(read.shape[1], 0, 1)
    if len(codes) > 1:
        residual = talker.mtp(hidden, talker.codec_embedding(read[0]), read[1:].T)
    wanted, residual_codes = torch.cat(first), read[1:].T
    if not batch.speech:
        wanted, residual_codes = torch.full_like(wanted, IGNORED), torch.full_like(residual_codes, IGNORED)
    places = torch.cat(drawing)
    logits = talker.codec_head(out.hidden[0][places])
    frames = [turn.frames for turn in turns] if batch.speech else []
    return TalkerPass(logits, wanted, residual, residual_codes, out.router_logits or [], frames, places)
