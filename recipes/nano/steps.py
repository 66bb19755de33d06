"""Steps of training that go on where they were: one loop for the parts that are no stage of `omni train`."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from omni.training.run.optimiser import lr_factor


@dataclass(frozen=True)
class Learning:
    """AdamW's settings and its rate's curve; clip: the largest gradient norm; logged, saved: after so many steps."""

    rate: float
    warmup: int
    least: float
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.02
    clip: float = 1.0
    logged: int = 50
    saved: int = 500


def take_steps(
    parts: nn.Module,
    loss_of: Callable[[int], tuple[Tensor, Mapping[str, Tensor]]],
    folder: Path,
    steps: int,
    how: Learning,
) -> dict[str, float]:
    """Train what of `parts` requires a gradient. loss_of: number of a step -> what is lowered, and what is logged.

    The folder gets log.jsonl, and state.pt, from which the same call goes on. Returns the means that were logged last.
    """
    learnt = [parameter for parameter in parts.parameters() if parameter.requires_grad]
    learner = torch.optim.AdamW(learnt, lr=how.rate, betas=how.betas, weight_decay=how.weight_decay)
    folder.mkdir(parents=True, exist_ok=True)
    state, first, start = folder / "state.pt", 0, time.perf_counter()
    if state.exists():
        kept = torch.load(state)
        parts.load_state_dict(kept["parts"])
        learner.load_state_dict(kept["learner"])
        first = kept["step"]
    recent: list[dict[str, float]] = []
    mean: dict[str, float] = {}
    logged = min(how.logged, max(1, steps // 10))
    for step in range(first, steps):
        loss, shown = loss_of(step)
        learner.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(learnt, how.clip)
        for group in learner.param_groups:
            factor = lr_factor(step, steps=steps, warmup_steps=min(how.warmup, steps - 1), min_lr_ratio=how.least)
            group["lr"] = how.rate * factor
        learner.step()
        recent = [*recent, {name: float(value.detach()) for name, value in shown.items()}][-logged:]
        if (step + 1) % logged == 0 or step + 1 == steps:
            mean = {name: sum(one[name] for one in recent) / len(recent) for name in recent[0]}
            seconds = (time.perf_counter() - start) / (step + 1 - first)
            row = {"step": step + 1, "losses": mean, "loss": next(iter(mean.values())), "seconds": seconds}
            with (folder / "log.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        if (step + 1) % how.saved == 0:
            partial = state.with_suffix(".part")
            torch.save({"parts": parts.state_dict(), "learner": learner.state_dict(), "step": step + 1}, partial)
            partial.replace(state)
    return mean
