"""From a model into safetensors files under the Hub's names."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from omni.checkpoint.keys import KeyTable, Slot, is_stacked
from omni.checkpoint.shards import INDEX, OWN, WEIGHTS
from omni.layers.quantized import packed_kind

_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
Entry = tuple[
    str, Tensor, Callable[[], Tensor] | None
]  # key, a tensor of its size, and what gives its values if not it


def save_weights(
    model: nn.Module,
    folder: str | Path,
    *,
    table: KeyTable,
    max_shard_size: str | int = "5GB",
    experts: Literal["separate", "fused"] = "separate",
    progress: bool | None = None,
) -> list[str]:
    """Write all weights into an existing folder and return the file names; use `atomic_folder` for the folder.

    One `model.safetensors` if it fits into `max_shard_size`, else numbered shards and an index; beside them a file of
    what omni alone knows by the family's table. experts: one matrix an expert as the release has it, or "fused" stacked
    ones. Low-rank updates that are still beside their weights (LoRA) are written merged, and stay as they are in the
    model. Memory beyond the model: at most one shard, and none for weights on the CPU. Raises ValueError for bad
    arguments, offloaded or quantised weights, OSError when writing fails.
    """
    limit = parse_size(max_shard_size)
    if experts not in ("separate", "fused"):
        raise ValueError(f"experts {experts!r} is neither 'separate' nor 'fused'")
    if (kind := packed_kind(model)) is not None:
        raise ValueError(
            f"the model's weights were rounded to {kind}, which the Hub's layout has no place for; load the checkpoint "
            "without quantize= and save that"
        )
    entries = list(_entries(model, table, experts))
    if own := [entry for entry in entries if entry[0].startswith(table.own)]:
        _write(Path(folder) / OWN, own)
    shards = _pack([entry for entry in entries if not entry[0].startswith(table.own)], limit)
    names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    if len(shards) == 1:
        names = [WEIGHTS]
    bar = tqdm(
        zip(names, shards), "saving", len(names), unit="shard", delay=0 if progress else 2, disable=progress is False
    )
    for name, shard in bar:
        _write(Path(folder) / name, shard)
    if len(shards) == 1:
        return [*names, *[OWN][: len(own)]]
    tensors = [tensor for shard in shards for _, tensor, _ in shard]
    index = {
        "metadata": {
            "total_parameters": sum(tensor.numel() for tensor in tensors),
            "total_size": sum(tensor.nbytes for tensor in tensors),
        },
        "weight_map": dict(sorted((key, name) for name, shard in zip(names, shards) for key, *_ in shard)),
    }
    (Path(folder) / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return [*names, *[OWN][: len(own)], INDEX]


def parse_size(size: str | int) -> int:
    """Bytes from a number or a string such as "5GB" or "512MiB"; ValueError if it is neither or not positive."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?B)\s*", size.upper()) if isinstance(size, str) else None
    if match and match[2] in _UNITS and len(match[1]) <= 30:
        size = int(float(match[1]) * _UNITS[match[2]])
    if type(size) is not int or size <= 0:
        raise ValueError(f"max_shard_size {size!r} is not a size; write '5GB', '512MiB' or a number of bytes")
    return size


def _entries(model: nn.Module, table: KeyTable, experts: str) -> Iterator[Entry]:
    """Keys and tensors in the order of the released files: by part, within it as the model has them; ties once."""
    seen: set[int] = set()
    found: list[Entry] = []
    for name, tensor, values in _plain_tensors(model):
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        if tensor.is_meta:
            raise ValueError(f"{name} is offloaded or on the meta device; load the model without device_map to save it")
        tensor = tensor.detach()
        if experts == "separate" and is_stacked(name):
            for key, slot in table.separate(name, tensor.shape[0]):
                found.append((key, slot.of(tensor), None if values is None else partial(_of_slot, slot, values)))
        else:
            found.append((table.to_hub(name), tensor, values))
    order = {part: i for i, part in enumerate(table.parts)}
    yield from sorted(found, key=lambda entry: order.get(entry[0].partition(".")[0], len(order)))


def _of_slot(slot: Slot, values: Callable[[], Tensor]) -> Tensor:
    return slot.of(values())


def _plain_tensors(model: nn.Module) -> Iterator[Entry]:
    """The tensors of a model by the names that they have without LoRA, and what gives their merged values."""
    updated = dict(_updated_modules(model))
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not name.startswith(tuple(f"{prefix}." for prefix in updated)):
            yield name, tensor, None
    kept: dict[str, dict[str, Tensor]] = {}  # of one module at a time, which is written at once

    def merged(prefix: str, name: str) -> Tensor:
        if prefix not in kept:
            kept.clear()
            kept[prefix] = _merged(updated[prefix])
        return kept[prefix][name]

    for prefix, module in updated.items():
        for name, tensor in _weights(module).items():
            yield f"{prefix}.{name}", tensor, partial(merged, prefix, name)


def _updated_modules(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The outermost modules that hold updates beside their weights: PEFT's layers, and experts with factors."""
    for name, child in module.named_children():
        if _has_factors(child) or _inside(child) is not None:
            yield prefix + name, child
        else:
            yield from _updated_modules(child, f"{prefix}{name}.")


def _has_factors(module: nn.Module) -> bool:
    return hasattr(module, "factors") and hasattr(module, "updated")


def _weights(module: nn.Module) -> dict[str, Tensor]:
    """The tensors of the layer that a module with updates stands for."""
    own = dict(_unwrapped(module).state_dict(keep_vars=True))
    return {name: tensor for name, tensor in own.items() if "_lora_" not in name} if _has_factors(module) else own


@torch.no_grad()
def _merged(module: nn.Module) -> dict[str, Tensor]:
    """Their values with the updates; sums are rounded once."""
    if _has_factors(module):
        return {name: module.updated(name) for name in _weights(module)}  # type: ignore[operator]
    twin = copy.deepcopy(module).float()
    layer: Any = twin
    while layer is not None:
        if hasattr(layer, "merge") and not getattr(layer, "disable_adapters", False):
            layer.merge()
        layer = _inside(layer)
    values = _weights(twin)
    return {name: values[name].to(tensor.dtype) for name, tensor in _weights(module).items()}


def _unwrapped(module: nn.Module) -> nn.Module:
    """The layer inside PEFT's."""
    while (inner := _inside(module)) is not None:
        module = inner
    return module


def _inside(module: Any) -> nn.Module | None:
    """What one of PEFT's layers wraps: the trained copy of `modules_to_save`, trained rows, else the base layer."""
    copies = getattr(module, "modules_to_save", None)
    if copies:
        active = getattr(module, "active_adapters", None) or list(copies)
        inner: nn.Module = copies[active[0]]
        return inner
    return next((getattr(module, name) for name in ("token_adapter", "base_layer") if hasattr(module, name)), None)


def _pack(entries: list[Entry], limit: int) -> list[list[Entry]]:
    """Fill shards in order, each up to `limit` bytes; a tensor above the limit gets a shard of its own."""
    shards: list[list[Entry]] = [[]]
    size = 0
    for key, tensor, values in entries:
        if shards[-1] and size + tensor.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append((key, tensor, values))
        size += tensor.nbytes
    return shards


def _write(path: Path, shard: list[Entry]) -> None:
    """One safetensors file; only tensors on other devices, with strides or with shared memory are copied."""
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for key, tensor, values in shard:
        tensor = (tensor if values is None else values()).cpu().contiguous()
        if tensor.data_ptr() in seen:
            tensor = tensor.clone()  # the format refuses two names for one memory
        seen.add(tensor.data_ptr())
        tensors[key] = tensor
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"{path} could not be written: {error}; check the free space and the folder's rights") from error
