"""The row on training (p11): forward, backward and optimizer of the Thinker and of the Talker's decoder."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from omni.bench.probe import probe
from omni.bench.result import Row, Series, Table, Verdict
from omni.bench.rows_speech import EAGER, SHIPPED
from omni.bench.timing import seconds_of
from omni.bench.workbench import Workbench
from omni.model import OmniModel
from omni.processing.inputs import OmniInputs

GROUPED = "transformers, grouped_mm"


def training_step(model: Any, part: str, rows: int, tokens: int) -> Callable[[], float]:
    """A function that makes one AdamW step on random ids -> the loss before it.

    model: an `OmniModel` or transformers' own. part: "thinker" or "talker". The loss is the mean cross-entropy of the
    next id, computed here from either side's logits.
    """
    ours = isinstance(model, OmniModel)
    device = next(model.parameters()).device
    logits, module, vocabulary = (_ours if ours else _theirs)(model, part)
    high = min(vocabulary, 200)  # below every special id
    ids = torch.randint(30, high, (rows, tokens), generator=torch.Generator().manual_seed(0)).to(device)
    model.train()
    # A rate this low changes nothing that could be seen, so that every step does the same work.
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-8)

    def step() -> float:
        predicted = logits(ids)[:, :-1].flatten(0, 1)
        loss = F.cross_entropy(predicted.float(), ids[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return step


def _ours(model: OmniModel, part: str) -> tuple[Callable[[Tensor], Tensor], torch.nn.Module, int]:
    if part == "thinker":
        words = model.config.thinker_config.text_config.vocab_size
        return lambda ids: model.forward(OmniInputs(input_ids=ids)).logits, model.thinker, words
    talker = model.talker

    def logits(ids: Tensor) -> Tensor:
        positions = torch.arange(ids.shape[1], device=ids.device, dtype=torch.float32).expand(3, len(ids), -1)
        return talker(talker.codec_embedding(ids), positions).logits

    return logits, talker, talker.config.text_config.vocab_size


def _theirs(model: Any, part: str) -> tuple[Callable[[Tensor], Tensor], torch.nn.Module, int]:
    if part == "thinker":
        words = model.config.thinker_config.text_config.vocab_size
        return lambda ids: model.thinker(input_ids=ids, use_cache=False).logits, model.thinker, words
    talker = model.talker

    def logits(ids: Tensor) -> Tensor:
        embeds = talker.get_input_embeddings()(ids)
        positions = torch.arange(ids.shape[1], device=ids.device).expand(3, len(ids), -1)
        hidden = talker.model(inputs_embeds=embeds, position_ids=positions, use_cache=False).last_hidden_state
        return talker.codec_head(hidden)

    return logits, talker, talker.config.text_config.vocab_size


def training(bench: Workbench) -> Row:
    """p11: seconds and peak memory of a training step, both sides with the same loss."""
    row = Row("p11", "Training step")
    sizes = {"rows": 1, "tokens": 16} if bench.options.quick else {"rows": 2, "tokens": 256}
    bench.drop_models()
    with bench.pair(bench.config, bench.dtype) as (ours, peer, folder):
        for part in ("thinker", "talker"):
            row.tables.append(_step_table(bench, row, ours, peer, part, sizes))
            if not bench.options.quick:
                row.tables.append(_memory_table(bench, row, str(folder), part, sizes))
    row.remarks.append(
        "AdamW on all parameters of the part; the same ids, and the same loss to 1e-4 before timing. Memory: "
        "gradients, optimizer state and activations of two steps in a fresh process."
    )
    return row


def _step_table(bench: Workbench, row: Row, ours: OmniModel, peer: Any, part: str, sizes: dict[str, int]) -> Table:
    step, their_step = training_step(ours, part, **sizes), training_step(peer.model, part, **sizes)
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
    count = sizes["rows"] * sizes["tokens"]
    labels = bench.labels(batch=sizes["rows"], context=sizes["tokens"], loss=f"{here:.4f}")
    table = Table(f"{part}, one step", "s", labels, bench.measure(runs), GROUPED, ("tok/s", count))
    row.verdicts.append(Verdict(f"{part}, step over transformers'", table.ratio(EAGER), ">=", 1.3))
    return table


def _memory_table(bench: Workbench, row: Row, folder: str, part: str, sizes: dict[str, int]) -> Table:
    series = []
    for side, name in (("omni", EAGER), ("transformers", GROUPED)):
        bench.say(f"memory of a training step in a fresh process: {name}")
        got = probe(
            "train", side=side, part=part, folder=folder, dtype=str(bench.dtype).removeprefix("torch."),
            device=str(bench.device), threads=torch.get_num_threads(), **sizes,
        )  # fmt: skip
        series.append(Series(name, [[float(got["peak"] or 0)]]))
    labels = bench.labels(batch=sizes["rows"], context=sizes["tokens"])
    table = Table(f"{part}, peak memory beyond the parameters", "B", labels, series, GROUPED)
    row.verdicts.append(Verdict(f"{part}, peak memory over transformers'", 1 / table.ratio(EAGER), "<=", 1.0))
    return table
