"""Merging a PEFT LoRA adapter into loaded weights.

Shapes: O outputs, I inputs, r rank, E experts. LoRA (Hu et al., 2021): W [O, I] += alpha / r * B [O, r] A [r, I].
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import regex
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from omni.checkpoint.keys import KeyTable, Slot
from omni.checkpoint.shards import read_file_header
from omni.config.model import OmniConfig
from omni.config.reading import read_json
from omni.layers.quantized import packed_kind

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_LORA_KEY = re.compile(r"(.+)\.lora_(embedding_)?([AB])(?:\.(?!weight$)([^.]+))?(?:\.weight)?")  # 4: adapter's name
_WRAPPED = re.compile(r"\.base_layer\b|\.modules_to_save\.[^.]+")  # what PEFT puts around a layer
_VOCABULARY = ("thinker.embed_tokens.weight", "thinker.lm_head.weight")
_PATTERN_S = 1.0  # for one pattern to match one name; what takes longer does not end
_UNSUPPORTED = ("use_dora", "fan_in_fan_out", "lora_bias", "use_qalora", "use_bdlora", "trainable_token_indices")
_CHANGE_BASE = ("pissa", "corda", "olora", "loftq", "lora_ga")  # ways to begin that take the update out of the base


@dataclass
class _Factors:
    """The two factors of one LoRA update: a [r, I] and b [O, r], or [E * r, I] and [O, r * E] for stacked experts.

    Of a convolution, a is [r, I, ...] with the weight's own kernel and b [O, r, 1, ...].
    """

    a: Tensor | None = None
    b: Tensor | None = None
    embedding: bool = False  # then the weight is the transposed product

    def experts_in(self, weight: Tensor) -> int:
        """How many experts the weight stacks (1 for a matrix), 0 if the factors do not fit it."""
        if self.a is None or self.b is None or self.a.ndim != self.b.ndim or self.a.ndim < 2:
            return 0
        if self.a.ndim > 2:
            whole = (*weight.shape[:1], len(self.a), *(1 for _ in weight.shape[2:]))
            return int(self.a.shape[1:] == weight.shape[1:] and tuple(self.b.shape) == whole)
        experts = weight.shape[0] if weight.ndim == 3 else 1
        shape = (self.b.shape[0], self.a.shape[1])
        rank = self.a.shape[0]
        fits = rank == self.b.shape[1] and rank % experts == 0
        return experts if fits and tuple(weight.shape[-2:]) == (shape[::-1] if self.embedding else shape) else 0

    def product(self, experts: int, device: torch.device) -> Tensor:
        """B A in fp32, in the shape of the weight."""
        assert self.a is not None and self.b is not None
        a, b = self.a.to(device, torch.float32), self.b.to(device, torch.float32)
        if experts > 1:
            return torch.einsum("ore,eri->eoi", b.unflatten(1, (-1, experts)), a.unflatten(0, (experts, -1)))
        product = (b.flatten(1) @ a.flatten(1)).unflatten(1, a.shape[1:])
        return product.T if self.embedding else product


def check_adapter(folder: str | Path) -> dict[str, Any]:
    """The adapter's config; FileNotFoundError or ValueError for one that is absent, broken or not supported."""
    folder = Path(folder)
    config = read_json(folder / CONFIG)
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{folder / CONFIG}: peft_type {config.get('peft_type')!r} is not supported, only 'LORA' is")
    for option in _UNSUPPORTED:
        if config.get(option):
            raise ValueError(f"{folder / CONFIG}: {option} is not supported; merge the adapter with peft first")
    if not (folder / WEIGHTS).is_file():
        if (folder / "adapter_model.bin").exists():
            raise ValueError(
                f"{folder / 'adapter_model.bin'} is a pickle, which can run code when opened and is never loaded; "
                f"convert it to {WEIGHTS}"
            )
        raise FileNotFoundError(f"{folder / WEIGHTS} does not exist; an adapter folder needs it beside {CONFIG}")
    keys = read_file_header(folder / WEIGHTS)
    for name, alpha in {"lora_alpha": config.get("lora_alpha", 8), **(config.get("alpha_pattern") or {})}.items():
        if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not math.isfinite(alpha):
            raise ValueError(f"{folder / CONFIG}: the alpha of {name} must be a finite number, got {alpha!r}")
    began = str(config.get("init_lora_weights")).lower()
    if began.startswith(_CHANGE_BASE) and not any(key.endswith(".base_layer.weight") for key in keys):
        raise ValueError(
            f"{folder / CONFIG}: init_lora_weights {began!r} changed the base weights too, and they are not in this "
            "folder; merge the adapter with peft first"
        )
    return config


def apply_adapter(model: nn.Module, folder: str | Path, *, table: KeyTable) -> None:
    """Merge the adapter in `folder` into the weights of `model`, in place.

    Reads adapters that PEFT saved for the transformers model or for this one, or that were taken from the wrapped
    model's own tensors: LoRA on linear layers, embeddings, single experts and stacked experts, and whole tensors
    (`modules_to_save`, biases, embeddings). A vocabulary that was resized for training is resized here too. Layers of
    parts that the model was loaded without are left out. Raises FileNotFoundError or ValueError before anything is
    changed.
    """
    folder = Path(folder)
    config = check_adapter(folder)
    if (kind := packed_kind(model)) is not None:
        raise ValueError(
            f"an adapter cannot be merged into weights at {kind}; pass adapter= and quantize= to from_pretrained "
            "together, which merges first"
        )
    tensors = _entries(folder)
    targets = dict(model.state_dict(keep_vars=True))
    resized = _resized(tensors, targets, table)
    targets |= resized
    loaded = {name.partition(".")[0] for name in targets}
    replaced: list[tuple[Tensor, Tensor]] = []
    merged: list[tuple[Tensor, _Factors, float]] = []  # weight, factors, scale
    unknown: list[str] = []
    updates: dict[str, _Factors] = defaultdict(_Factors)
    for key, value in tensors.items():
        if match := _LORA_KEY.fullmatch(key):
            factors = updates[match[1]]
            factors.embedding = match[2] is not None
            setattr(factors, match[3].lower(), value)
        elif (weight := _find(key, targets, table)) is not None and weight.shape == value.shape:
            replaced.append((weight, value))
        elif _in_loaded_part(key, loaded, table):
            unknown.append(key)
    for module, factors in updates.items():
        found = _fitting(module, factors, targets, table)
        if found is not None:
            weight, rank = found
            merged.append((weight, factors, _scale(module, rank, config, folder)))
        elif _in_loaded_part(module, loaded, table):
            unknown.append(module)
    if unknown:
        raise ValueError(
            f"the adapter in {folder} changes {len(unknown)} layers that this model lacks or has in another shape: "
            f"{', '.join(unknown[:4])}{', ...' if len(unknown) > 4 else ''}; use the base model it was trained on"
        )
    if any(weight.is_meta for weight in [change[0] for change in replaced] + [change[0] for change in merged]):
        raise ValueError(f"the adapter in {folder} changes offloaded weights; load the model without device_map")
    with torch.no_grad():
        _put(model, resized)
        for weight, value in replaced:
            weight.copy_(value)
        for weight, factors, scale in merged:
            weight.copy_(weight.float() + scale * factors.product(factors.experts_in(weight), weight.device))


def _entries(folder: Path) -> dict[str, Tensor]:
    """The tensors of an adapter's file: factors by PEFT's keys, all others by those of the layers without PEFT."""
    tensors: dict[str, Tensor] = {}
    names = set()
    for key, value in load_file(folder / WEIGHTS).items():
        key = key.removeprefix(_PREFIX)
        if match := _LORA_KEY.fullmatch(key):
            names.add(match[4])
        elif ".original_module." in key:  # the layer as it was before `modules_to_save`
            continue
        else:
            key = _WRAPPED.sub("", key)
        tensors[key] = value
    if len(names) > 1:
        raise ValueError(f"{folder / WEIGHTS} holds the adapters {sorted(map(str, names))}; keep one of them in a file")
    return tensors


def _resized(tensors: dict[str, Tensor], targets: dict[str, Tensor], table: KeyTable) -> dict[str, Tensor]:
    """The embedding and the head with another number of rows, where the adapter holds either so; none elsewhere.

    New rows start as the mean of the old ones, as in transformers, until the adapter's own values come.
    """
    ours = {name: targets[name] for name in _VOCABULARY if name in targets}
    found = {key: _find(key, targets, table) for key in tensors if not _LORA_KEY.fullmatch(key)}
    sizes = {
        len(tensors[key])
        for key, weight in found.items()
        if any(weight is own for own in ours.values()) and tensors[key].shape[1:] == weight.shape[1:]  # type: ignore[union-attr]
    }
    if len(sizes) > 1:
        raise ValueError(
            f"the adapter holds an embedding and a head of {sorted(sizes)} tokens; they must be one number"
        )
    changed: dict[str, Tensor] = {}
    for name, own in ours.items():
        for rows in sizes - {len(own)}:
            wide = torch.cat((own.detach(), own.detach().float().mean(0, keepdim=True).to(own).expand(rows, -1)))
            twin = next((changed[other] for other in changed if ours[other] is own), None)  # tied weights stay tied
            changed[name] = nn.Parameter(wide[:rows].clone(), own.requires_grad) if twin is None else twin
    return changed


def _put(model: nn.Module, resized: dict[str, Tensor]) -> None:
    """Give a model an embedding and a head of another number of tokens, and its config that number."""
    for name, weight in resized.items():
        module = model.get_submodule(name.removesuffix(".weight"))
        module.weight = weight  # type: ignore[assignment]
        setattr(module, "num_embeddings" if isinstance(module, nn.Embedding) else "out_features", len(weight))
    config: Any = getattr(model, "config", None)
    if resized and isinstance(config, OmniConfig):
        text = config.thinker.text_config.replace(vocab_size=len(next(iter(resized.values()))))
        thinker = config.thinker.replace(text_config=text)
        model.config = config.replace(thinker_config=thinker)  # type: ignore[assignment]
        model.thinker.config = thinker  # type: ignore[union-attr, assignment]


def _find(key: str, targets: dict[str, Tensor], table: KeyTable) -> Tensor | None:
    """The weight (a view for a single expert's) that a key means, None if the model has none.

    The key may be ours, the Hub's, or relative to a Thinker that was trained alone.
    """
    for slot in (Slot(key), table.slot(key), table.slot(f"thinker.{key}")):
        if slot is not None and slot.name in targets:
            stacked = targets[slot.name]
            if slot.piece == "whole" or slot.expert < stacked.shape[0]:
                return slot.of(stacked)
    return None


def _fitting(module: str, factors: _Factors, targets: dict[str, Tensor], table: KeyTable) -> tuple[Tensor, int] | None:
    """The weight of a module that the factors fit, and their rank; None if there is none.

    PEFT wraps both stacked parameters of an experts module, one inside the other (`.base_layer`): shapes tell which.
    """
    for leaf in ("weight", "gate_up_proj", "down_proj"):
        weight = _find(f"{module.removesuffix('.base_layer')}.{leaf}", targets, table)
        if weight is not None and (experts := factors.experts_in(weight)):
            assert factors.a is not None
            return weight, factors.a.shape[0] // experts
    return None


def _in_loaded_part(key: str, loaded: set[str], table: KeyTable) -> bool:
    """False for a layer of a part that the model was loaded without."""
    slot = table.slot(key)
    return slot is None or slot.name.partition(".")[0] in loaded


def _scale(module: str, rank: int, config: dict[str, Any], folder: Path) -> float:
    """alpha / r, or alpha / sqrt(r) for rank-stabilised LoRA (Kalajdzievski, 2023)."""
    alpha = config.get("lora_alpha", 8)  # peft's default
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        try:
            fits = regex.fullmatch(rf"(.*\.)?({pattern})", module, timeout=_PATTERN_S)
        except (regex.error, TimeoutError) as error:
            reason = "takes too long to match" if isinstance(error, TimeoutError) else f"is no pattern ({error})"
            raise ValueError(
                f"{folder / CONFIG}: alpha_pattern {pattern!r} {reason}; write the layer's name"
            ) from error
        if fits:
            alpha = value
            break
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
