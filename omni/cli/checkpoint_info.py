"""What `omni info` prints: the parts of a checkpoint, from its config.json and the headers of its weight files.

No tensor is read. A folder (or file) with a config alone is described by building the model on the meta device, which
holds shapes and no data.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

from omni.bench.footprint import cache_bytes_per_token
from omni.checkpoint.keys import KeyTable
from omni.checkpoint.shards import format_bytes
from omni.config.family import Family
from omni.config.locate import CONFIG_FILES, locate
from omni.config.model import OmniConfig
from omni.config.names import import_name

# Module prefixes, the longest first, and what the table calls them.
PARTS = {
    "talker.mtp.": "talker, residual codes",
    "audio_encoder.": "audio encoder",
    "vision_encoder.": "vision encoder",
    "thinker.": "thinker",
    "talker.": "talker",
    "code2wav.": "code2wav",
}
ORDER = ("audio encoder", "vision encoder", "thinker", "talker", "talker, residual codes", "code2wav", "other")
_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}


@dataclass
class PartSize:
    """Tensors of one part: how many, of how many values and bytes, in which dtypes."""

    tensors: int = 0
    parameters: int = 0
    bytes: int = 0
    dtypes: set[str] = field(default_factory=set)

    def add(self, shape: Iterable[int], dtype: str, size_bytes: int) -> None:
        """Count one tensor."""
        self.tensors += 1
        self.parameters += math.prod(shape)
        self.bytes += size_bytes
        self.dtypes.add(dtype)


def part_of(name: str) -> str:
    """The part that a tensor belongs to, by its module name in `OmniModel`."""
    return next((part for prefix, part in PARTS.items() if name.startswith(prefix)), "other")


def sizes_from_files(folder: Path, family: Family) -> tuple[dict[str, PartSize], int]:
    """Sizes of the parts on disk, and the number of weight files. Raises as `read_headers`."""
    from omni.checkpoint.shards import read_headers

    sizes: dict[str, PartSize] = {}
    headers = read_headers(folder)
    table = KeyTable.of(family).for_files(headers)
    for key, tensor in headers.items():
        size = sizes.setdefault(part_of(table.from_hub(key) or ""), PartSize())
        size.add(tensor.shape, _NAMES.get(tensor.dtype, tensor.dtype), tensor.bytes)
    return sizes, len({tensor.shard for tensor in headers.values()})


def sizes_from_config(config: OmniConfig) -> dict[str, PartSize]:
    """Sizes of the parts as the config describes them, in its own dtype (float32 if it names none, and of parts that
    compute in nothing else)."""
    import torch

    from omni.model import OmniModel

    dtype = config.dtype if config.dtype in _BYTES else "float32"
    with torch.device("meta"):
        model = OmniModel(config)
    wide = {name for name, part in model.named_children() if getattr(part, "always_float32", False)}
    sizes: dict[str, PartSize] = {}
    for name, parameter in model.named_parameters():
        own = "float32" if name.partition(".")[0] in wide else dtype
        sizes.setdefault(part_of(name), PartSize()).add(parameter.shape, own, parameter.numel() * _BYTES[own])
    return sizes


def variant(config: OmniConfig) -> str:
    """What this variant takes in and gives out."""
    if config.thinker_config is None:
        return f"{' and '.join(config.parts)} alone"
    media = {"audio": "audio_encoder", "images and video": "vision_encoder"}
    takes = ", ".join(("text", *(name for name, part in media.items() if part in config.parts)))
    return f"{takes} in; {'text and speech' if config.has_talker else 'text'} out"


def has_weights(folder: Path) -> bool:
    """Whether a folder has, or claims to have, weight files."""
    return any(folder.glob("*.safetensors*")) or any(folder.glob("*.bin"))


def print_info(console: Console, name: str) -> None:
    """Print the description of a checkpoint folder, of a folder with a config alone, or of a config file.

    name: one of these, a packaged checkpoint or a Hub id. Raises FileNotFoundError, OSError or ValueError when there is
    none, or the config or the weight files' headers cannot be trusted.
    """
    path = locate(name, files=CONFIG_FILES)
    config = OmniConfig.from_pretrained(path)
    if path.is_dir() and has_weights(path):
        sizes, files = sizes_from_files(path, config.family)
        origin = f"{files} weight file{'s' if files > 1 else ''}, read from the headers"
    else:
        sizes, origin = sizes_from_config(config), "no weight files here: as config.json describes it"
    lines = [f"{name}: {config.model_type}, {variant(config)}", origin]
    for line in lines:
        console.print(line, highlight=False)
    console.print(_parts_table(sizes, config.describe()))
    for line in _remarks(config):
        console.print(line, highlight=False)


def _remarks(config: OmniConfig) -> Iterable[str]:
    """What else the config says of memory, voices and streaming."""
    if config.thinker_config is not None:
        positions = config.thinker.text_config.max_position_embeddings
        cache_mb = cache_bytes_per_token(config) * 1000 / 1e6
        yield f"thinker: {positions:,} positions; its cache takes {cache_mb:,.1f} MB per 1000 tokens in bfloat16"
    if "talker" in config.parts:
        yield f"speakers: {', '.join(sorted(config.talker_config.speaker_id or {})) or 'none named'}"
    if "code2wav" in config.parts and config.family.schedule_in_words is not None:
        yield import_name(config.family.schedule_in_words)(config.code2wav_config)


def _parts_table(sizes: dict[str, PartSize], words: dict[str, str]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("part", no_wrap=True)
    for title in ("tensors", "parameters", "dtype", "memory"):
        table.add_column(title, justify="left" if title == "dtype" else "right", no_wrap=True)
    table.add_column("shape", overflow="fold")
    total = PartSize()
    for part in ORDER:
        if (size := sizes.get(part)) is not None:
            table.add_row(*_cells(part, size), words.get(part, ""))
            total.tensors += size.tensors
            total.parameters += size.parameters
            total.bytes += size.bytes
            total.dtypes |= size.dtypes
    table.add_section()
    table.add_row(*_cells("total", total), "")
    return table


def _cells(part: str, size: PartSize) -> tuple[str, ...]:
    return part, f"{size.tensors:,}", f"{size.parameters:,}", ", ".join(sorted(size.dtypes)), format_bytes(size.bytes)
