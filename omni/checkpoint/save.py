"""From a model into safetensors files under the Hub's names."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from omni.checkpoint.keys import KeyTable, is_stacked
from omni.checkpoint.shards import INDEX, WEIGHTS
from omni.layers.quantized import packed_kind

_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
Entry = tuple[str, Tensor]


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

    One `model.safetensors` if it fits into `max_shard_size`, else numbered shards and an index. experts: one matrix an
    expert as the release has it, or "fused" stacked ones. Memory beyond the model: at most one shard, and none for
    weights on the CPU. Raises ValueError for bad arguments, offloaded or quantised weights, OSError when writing fails.
    """
    limit = parse_size(max_shard_size)
    if experts not in ("separate", "fused"):
        raise ValueError(f"experts {experts!r} is neither 'separate' nor 'fused'")
    if (kind := packed_kind(model)) is not None:
        raise ValueError(
            f"the model's weights were rounded to {kind}, which the Hub's layout has no place for; load the checkpoint "
            "without quantize= and save that"
        )
    shards = _pack(list(_entries(model, table, experts)), limit)
    names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    if len(shards) == 1:
        names = [WEIGHTS]
    bar = tqdm(
        zip(names, shards), "saving", len(names), unit="shard", delay=0 if progress else 2, disable=progress is False
    )
    for name, shard in bar:
        _write(Path(folder) / name, shard)
    if len(shards) == 1:
        return names
    tensors = [tensor for shard in shards for _, tensor in shard]
    index = {
        "metadata": {
            "total_parameters": sum(tensor.numel() for tensor in tensors),
            "total_size": sum(tensor.nbytes for tensor in tensors),
        },
        "weight_map": dict(sorted((key, name) for name, shard in zip(names, shards) for key, _ in shard)),
    }
    (Path(folder) / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return [*names, INDEX]


def parse_size(size: str | int) -> int:
    """Bytes from a number or a string such as "5GB" or "512MiB"; ValueError if it is neither or not positive."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?B)\s*", size.upper()) if isinstance(size, str) else None
    if match and match[2] in _UNITS:
        size = int(float(match[1]) * _UNITS[match[2]])
    if type(size) is not int or size <= 0:
        raise ValueError(f"max_shard_size {size!r} is not a size; write '5GB', '512MiB' or a number of bytes")
    return size


def _entries(model: nn.Module, table: KeyTable, experts: str) -> Iterator[Entry]:
    """Keys and tensors in the order of the released files: by part, within it as the model has them; ties once."""
    seen: set[int] = set()
    found: list[Entry] = []
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        if tensor.is_meta:
            raise ValueError(f"{name} is offloaded or on the meta device; load the model without device_map to save it")
        tensor = tensor.detach()
        if experts == "separate" and is_stacked(name):
            found += [(key, slot.of(tensor)) for key, slot in table.separate(name, tensor.shape[0])]
        else:
            found.append((table.to_hub(name), tensor))
    order = {part: i for i, part in enumerate(table.parts)}
    yield from sorted(found, key=lambda entry: order.get(entry[0].partition(".")[0], len(order)))


def _pack(entries: list[Entry], limit: int) -> list[list[Entry]]:
    """Fill shards in order, each up to `limit` bytes; a tensor above the limit gets a shard of its own."""
    shards: list[list[Entry]] = [[]]
    size = 0
    for key, tensor in entries:
        if shards[-1] and size + tensor.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append((key, tensor))
        size += tensor.nbytes
    return shards


def _write(path: Path, shard: list[Entry]) -> None:
    """One safetensors file; only tensors on other devices, with strides or with shared memory are copied."""
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for key, tensor in shard:
        tensor = tensor.cpu().contiguous()
        if tensor.data_ptr() in seen:
            tensor = tensor.clone()  # the format refuses two names for one memory
        seen.add(tensor.data_ptr())
        tensors[key] = tensor
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"{path} could not be written: {error}; check the free space and the folder's rights") from error
