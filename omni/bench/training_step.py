"""One training step of the Thinker or of the Talker's decoder, this library's and the peer's, for timing and memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from omni.layers.packing import PackedBlocks
from omni.model import OmniModel
from omni.processing.inputs import OmniInputs
from omni.training.data.samples import IGNORED, TrainingBatch
from omni.training.objectives.losses import linear_cross_entropy
from omni.training.objectives.passes import thinker_pass

GROUPED = "transformers, grouped_mm"


def training_step(model: Any, part: str, lengths: Sequence[int]) -> Callable[[], float]:
    """A function that makes one AdamW step on random ids -> the loss before it.

    model: an `OmniModel` or transformers' own; part: "thinker" or "talker"; lengths: tokens of each conversation. The
    loss is the mean cross-entropy of the next id, in the Thinker over the second half of each conversation, as if that
    was the reply. This library reads the conversations packed in one row, transformers padded to the longest.
    """
    ours = isinstance(model, OmniModel)
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(30, 200, (n,), generator=generator) for n in lengths]  # below every special id
    labels = [row.clone() for row in ids]
    if part == "thinker":
        for row in labels:
            row[: len(row) // 2] = IGNORED
    loss, module = (_our_loss if ours else _their_loss)(model, part, ids, labels, device)
    model.train()
    # A rate this low changes nothing that could be seen, so that every step does the same work.
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-8)

    def step() -> float:
        value = loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(value.detach())

    return step


Ids = list[Tensor]
LossOf = tuple[Callable[[], Tensor], torch.nn.Module]


def _our_loss(model: OmniModel, part: str, ids: Ids, labels: Ids, device: torch.device) -> LossOf:
    if part == "thinker":
        padded, mask = _padded(ids, 0), _padded([torch.ones_like(row) for row in ids], 0)
        inputs = OmniInputs(input_ids=padded, attention_mask=mask)
        batch = TrainingBatch(inputs, labels, [], [""] * len(ids))
        model.audio_encoder = model.vision_encoder = None  # the other side does not touch them either

        def text_loss() -> Tensor:
            thought = thinker_pass(model, batch)
            found = linear_cross_entropy(thought.final, model.require("thinker").lm_head.weight, thought.labels)
            return found.total / found.count

        return text_loss, model.require("thinker")
    talker, packed = model.require("talker"), torch.cat(ids).to(device)
    blocks = PackedBlocks([len(row) for row in ids], device, causal=True)
    positions = torch.cat([torch.arange(len(row), dtype=torch.float32) for row in ids]).to(device).expand(3, 1, -1)
    following = torch.cat([torch.cat((row[1:], row.new_full((1,), IGNORED))) for row in labels]).to(device)

    def code_loss() -> Tensor:
        hidden = talker(talker.codec_embedding(packed)[None], positions, blocks=blocks, with_logits=False).hidden[0]
        found = linear_cross_entropy(hidden, talker.codec_head.weight, following)
        return found.total / found.count

    return code_loss, talker


def _their_loss(model: Any, part: str, ids: Ids, labels: Ids, device: torch.device) -> LossOf:
    padded, wanted = _padded(ids, 0).to(device), _padded(labels, IGNORED).to(device)
    mask = _padded([torch.ones_like(row) for row in ids], 0).to(device)
    talker = model.talker

    def logits() -> Tensor:
        if part == "thinker":
            return model.thinker(input_ids=padded, attention_mask=mask, use_cache=False).logits
        embeds = getattr(talker, "thinker_to_talker_proj", torch.nn.Identity())(talker.get_input_embeddings()(padded))
        positions = torch.arange(padded.shape[1], device=device).expand(3, len(padded), -1)
        out = talker.model(inputs_embeds=embeds, attention_mask=mask, position_ids=positions, use_cache=False)
        return talker.codec_head(out.last_hidden_state)

    def loss() -> Tensor:
        predicted = logits()[:, :-1].flatten(0, 1)
        return F.cross_entropy(predicted.float(), wanted[:, 1:].flatten(), ignore_index=IGNORED)

    return loss, model.thinker if part == "thinker" else talker


def _padded(rows: Ids, fill: int) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=fill)
