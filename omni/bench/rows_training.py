"""The row on training (p11): forward, backward and optimizer of the Thinker and of the Talker's decoder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from omni.bench.probe import probe
from omni.bench.result import Row, Series, Table, Verdict
from omni.bench.rows_speech import EAGER, SHIPPED
from omni.bench.timing import seconds_of
from omni.bench.training_step import training_step
from omni.bench.workbench import Workbench
from omni.model import OmniModel

GROUPED = "transformers, grouped_mm"


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
