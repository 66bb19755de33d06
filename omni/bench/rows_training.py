"""The row on training (p11): forward, backward and optimizer of the Thinker and of the Talker's decoder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from omni.bench.probe import probe
from omni.bench.result import Row, Series, Table, Verdict
from omni.bench.rows_speech import EAGER, SHIPPED
from omni.bench.timing import seconds_of
from omni.bench.workbench import Workbench
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
        thinker = model.require("thinker")
        model.audio_encoder = model.vision_encoder = None  # the other side does not touch them either

        def text_loss() -> Tensor:
            thought = thinker_pass(model, batch)
            found = linear_cross_entropy(thought.final, thinker.lm_head.weight, thought.labels)
            return found.total / found.count

        return text_loss, thinker
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


def training(bench: Workbench) -> Row:
    """p11: seconds and peak memory of a training step, both sides with the same loss."""
    row = Row("p11", "Training step")
    batches = {
        "lengths as in a chat set": [16, 9] if bench.options.quick else [512, 64, 210, 116, 282, 86, 380, 156],
        "equal lengths": [16] if bench.options.quick else [256, 256],
    }
    bench.drop_models()
    for title, lengths in batches.items():
        for part in ("thinker", "talker"):
            with bench.pair(bench.config, bench.dtype) as (ours, peer, folder):
                table = _step_table(bench, ours, peer, part, title, lengths)
                row.tables.append(table)
                memory = None if bench.options.quick else _memory_table(bench, str(folder), part, title, lengths)
            row.tables += [] if memory is None else [memory]
            if title == "equal lengths":
                continue
            row.verdicts.append(Verdict(f"{part}, step over transformers'", table.ratio(EAGER), ">=", 1.3))
            if memory is not None:
                share = 1 / memory.ratio(EAGER)
                row.verdicts.append(Verdict(f"{part}, peak memory over transformers'", share, "<=", 1.0))
    row.remarks.append(
        "AdamW on all parameters of the part; the same ids, and the same loss to 1e-4 before timing. The chat set: 8 "
        "conversations spread evenly in the logarithm of their length. Tokens a second leave padding out. Memory: "
        "gradients, optimizer state and activations of two steps in a fresh process."
    )
    return row


def _step_table(bench: Workbench, ours: OmniModel, peer: Any, part: str, title: str, lengths: Sequence[int]) -> Table:
    step, their_step = training_step(ours, part, lengths), training_step(peer.model, part, lengths)
    peer.use(experts="grouped_mm")
    here, there = step(), their_step()
    if abs(here - there) > (1e-4 if bench.dtype == torch.float32 else 0.05) * max(1.0, abs(there)):
        raise ValueError(f"the two sides have different losses of the {part}: {here} and {there}")

    def theirs(**setting: Any) -> Callable[[], float]:
        def run() -> float:
            peer.use(**setting)
            return seconds_of(their_step, bench.device)

        return run

    runs: dict[str, Any] = {
        EAGER: lambda: seconds_of(step, bench.device),
        SHIPPED: theirs(),
        GROUPED: theirs(experts="grouped_mm"),
    }
    labels = bench.labels(batch=len(lengths), tokens=f"{min(lengths)} to {max(lengths)}", loss=f"{here:.4f}")
    return Table(f"{part}, one step, {title}", "s", labels, bench.measure(runs), GROUPED, ("tok/s", sum(lengths)))


def _memory_table(bench: Workbench, folder: str, part: str, title: str, lengths: Sequence[int]) -> Table:
    series = []
    for side, name in (("omni", EAGER), ("transformers", GROUPED)):
        bench.say(f"memory of a training step in a fresh process: {name}")
        got = probe(
            "train", side=side, part=part, folder=folder, dtype=str(bench.dtype).removeprefix("torch."),
            device=str(bench.device), threads=torch.get_num_threads(), lengths=list(lengths),
        )  # fmt: skip
        series.append(Series(name, [[float(got["peak"] or 0)]]))
    labels = bench.labels(batch=len(lengths), tokens=f"{min(lengths)} to {max(lengths)}")
    return Table(f"{part}, peak memory beyond the parameters, {title}", "B", labels, series, GROUPED)
