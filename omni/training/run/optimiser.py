"""What is trained and how fast: parameters by name pattern, AdamW with groups, and the learning-rate curve.

No shapes of its own: parameters are [..] of any shape; matrices are those with two axes or more.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from torch import Tensor, nn

from omni.config.keywords import nearest
from omni.training.run.train_config import OptimiserTable

_FUSED = ("cpu", "cuda", "xpu", "mps")  # devices with a fused AdamW in PyTorch


def match_names(names: Sequence[str], patterns: Iterable[str], where: str) -> list[str]:
    """The names, in order, that the patterns choose: shell wildcards, later ones win, a leading "!" takes names out.

    Raises ValueError, which begins with `where`, for a pattern that matches nothing or where nothing is left.
    """
    chosen: dict[str, bool] = {}
    for pattern in patterns:
        wildcard = pattern.removeprefix("!")
        hits = [name for name in names if fnmatchcase(name, wildcard)]
        if not hits:
            raise ValueError(f"{where}: pattern {pattern!r} matches no parameter; {_near(wildcard, names)}")
        chosen.update(dict.fromkeys(hits, not pattern.startswith("!")))
    kept = [name for name in names if chosen.get(name)]
    if not kept:
        raise ValueError(f"{where} = {list(patterns)} leaves no parameter; '*' chooses all of them")
    return kept


def _near(wildcard: str, names: Sequence[str]) -> str:
    """The end of an error message: the prefix of the parameters' names that a pattern resembles."""
    prefixes: dict[str, None] = {}
    for name in names:
        steps = re.sub(r"\.\d+(?=\.|$)", ".*", name).split(".")  # one entry for all layers
        prefixes.update(dict.fromkeys(".".join([*steps[:i], "*"]) for i in range(1, len(steps))))
        prefixes[".".join(steps)] = None
    ending = "" if wildcard.endswith("*") else ".*"
    if wildcard + ending in prefixes:
        return f"did you mean {wildcard + ending!r}?"
    beginnings = ", ".join(p for p in prefixes if p.count(".") == 1)
    return nearest(wildcard, prefixes, f"names begin with {beginnings}")


def trainable(model: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Let exactly the parameters learn whose names match, see `match_names`; returns their names.

    They are made float32 in place where they are of half precision: an update of 1e-5 of a weight is lost in bf16.
    Raises ValueError for a pattern that matches nothing.
    """
    named = dict(model.named_parameters())
    kept = match_names(list(named), patterns, "train.parameters")
    chosen = set(kept)
    for name, parameter in named.items():
        parameter.requires_grad_(name in chosen)
        if name in chosen and parameter.dtype in (torch.bfloat16, torch.float16):
            parameter.data = parameter.data.float()
    return kept


def param_groups(model: nn.Module, table: OptimiserTable) -> list[dict[str, Any]]:
    """The trainable parameters as AdamW's groups, one for each pair of learning rate and weight decay
    (and, where parameters are sharded, for each mesh).

    Each group has `params` as (name, parameter), `lr`, `base_lr` (the same, which `set_lr` reads) and `weight_decay`:
    zero for one-dimensional parameters (norms, biases, scales) and embeddings. Of several `table.group` patterns that
    match a parameter the last one holds. Raises ValueError for a pattern that matches no trainable parameter.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if not named:
        raise ValueError("no parameter of the model is trainable; choose some with train.parameters")
    embeddings = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters(recurse=False)}
    settings = {name: (1.0, table.weight_decay) for name, _ in named}
    for group in table.group:
        for name in match_names(list(settings), [group.pattern], "optimiser.group"):
            decay = table.weight_decay if group.weight_decay is None else group.weight_decay
            settings[name] = (group.lr_scale, decay)
    groups: dict[tuple[float, float, Any], list[tuple[str, nn.Parameter]]] = {}
    for name, p in named:
        scale, decay = settings[name]
        # AdamW's fused kernels take whole parameters, or those sharded over one mesh, but not both at once
        key = (scale, 0.0 if p.dim() <= 1 or id(p) in embeddings else decay, getattr(p, "device_mesh", None))
        groups.setdefault(key, []).append((name, p))
    return [
        {"params": params, "lr": table.lr * scale, "base_lr": table.lr * scale, "weight_decay": decay}
        for (scale, decay, _), params in groups.items()
    ]


def make_adamw(model: nn.Module, table: OptimiserTable) -> torch.optim.AdamW:
    """AdamW over the trainable parameters, fused where PyTorch can, its state made now.

    A state made at once is the one that would come with the first gradient, so a checkpoint always holds all of it.
    """
    groups = param_groups(model, table)
    parameters = [p for group in groups for _, p in group["params"]]
    fused = all(p.device.type in _FUSED and p.is_floating_point() for p in parameters)
    optimizer = torch.optim.AdamW(groups, lr=table.lr, betas=table.betas, eps=table.eps, fused=fused)
    for p in parameters:
        optimizer.state[p] = {
            "step": torch.zeros((), dtype=torch.float32, device=p.device if fused else "cpu"),
            "exp_avg": torch.zeros_like(p, memory_format=torch.preserve_format),
            "exp_avg_sq": torch.zeros_like(p, memory_format=torch.preserve_format),
        }
    return optimizer


def named_state(optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Tensor]]:
    """The optimiser's tensors by the names of their parameters: the live ones, to be saved or filled in place."""
    return {
        name: optimizer.state[p]
        for group in optimizer.param_groups
        for name, p in zip(group["param_names"], group["params"])
    }


def lr_factor(
    step: int,
    *,
    steps: int,
    warmup_steps: int = 0,
    schedule: Literal["cosine", "linear", "constant"] = "cosine",
    min_lr_ratio: float = 0.0,
) -> float:
    """The learning rate of an update, relative to its peak; `step` counts from 0.

    Warm-up: (step + 1) / (warmup_steps + 1) for the first `warmup_steps` updates, then 1 falling to `min_lr_ratio` at
    `steps`: by half a cosine (Loshchilov and Hutter, 2017), in a line, or not at all. With progress p in [0, 1] the
    cosine is min + (1 - min) * (1 + cos(pi p)) / 2.
    """
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    if schedule == "constant":
        return 1.0
    progress = min((step - warmup_steps) / max(steps - warmup_steps, 1), 1.0)
    fall = (1 + math.cos(math.pi * progress)) / 2 if schedule == "cosine" else 1 - progress
    return min_lr_ratio + (1 - min_lr_ratio) * fall


def set_lr(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Every group's learning rate: `factor` times its peak. Nothing remembers the curve, so nothing has to be saved."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor
