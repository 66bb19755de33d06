"""What `omni info` prints: the parts of a checkpoint, from its config.json and the headers of its weight files.

No tensor is read. A folder (or file) with a config alone is described by building the model on the meta device, which
holds shapes and no data.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import singledispatch
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from omni.bench.footprint import cache_bytes_per_token
from omni.checkpoint.shards import format_bytes
from omni.config.decoder import MoEConfig
from omni.config.qwen2_5_encoders import WhisperAudioEncoderConfig, WindowVisionEncoderConfig
from omni.config.qwen3_omni import AudioEncoderConfig, Code2WavConfig, OmniConfig, VisionEncoderConfig
from omni.config.token2wav import Token2WavConfig

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


def sizes_from_files(folder: Path, family: str) -> tuple[dict[str, PartSize], int]:
    """Sizes of the parts on disk, and the number of weight files; family: the config's model_type. Raises as
    `read_headers`."""
    from omni.checkpoint.keys import KEY_TABLES
    from omni.checkpoint.shards import read_headers

    sizes: dict[str, PartSize] = {}
    headers = read_headers(folder)
    for key, tensor in headers.items():
        size = sizes.setdefault(part_of(KEY_TABLES[family].from_hub(key) or ""), PartSize())
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


def describe_parts(config: OmniConfig) -> dict[str, str]:
    """The sizes of each part in words, from the config."""
    thinker, talker = config.thinker_config, config.talker_config
    out = {"thinker": in_words(thinker.text_config)}
    for name, part in (("audio encoder", thinker.audio_config), ("vision encoder", thinker.vision_config)):
        if part is not None:
            out[name] = in_words(part)
    if config.has_talker and talker is not None and config.code2wav_config is not None:
        layer = "the last layer" if talker.accept_hidden_layer is None else f"layer {talker.accept_hidden_layer}"
        out["talker"] = f"{in_words(talker.text_config)}, reads {layer} of the Thinker"
        if talker.num_code_groups > 1:
            mtp = talker.code_predictor_config
            out["talker, residual codes"] = f"{in_words(mtp)}, {mtp.num_code_groups - 1} of {mtp.num_code_groups} codes"
        out["code2wav"] = in_words(config.code2wav_config)
    return out


@singledispatch
def in_words(part: Any) -> str:
    """A part's config in a line. Here: that of a decoder."""
    heads = f"{part.num_attention_heads} heads over {part.num_key_value_heads} of {part.head_size}"
    experts = f", {part.num_experts_per_tok} of {part.num_experts} experts" if isinstance(part, MoEConfig) else ""
    return f"{part.num_hidden_layers} layers of {part.hidden_size}, {heads}{experts}"


def _audio(c: Any, window_frames: int) -> str:
    layers = f"{c.encoder_layers} layers of {c.d_model}, {c.encoder_attention_heads} heads"
    return f"{layers}, {c.num_mel_bins} mel bins, window {window_frames / 100:g} s"


def _vision(c: Any) -> str:
    return f"{c.depth} layers of {c.hidden_size}, {c.num_heads} heads, patch {c.patch_size}"


@in_words.register
def _(c: AudioEncoderConfig) -> str:
    return _audio(c, c.n_window_infer)


@in_words.register
def _(c: WhisperAudioEncoderConfig) -> str:
    return _audio(c, c.chunk_frames)


@in_words.register
def _(c: VisionEncoderConfig) -> str:
    return f"{_vision(c)}, taps after layers {', '.join(map(str, c.deepstack_visual_indexes)) or 'none'}"


@in_words.register
def _(c: WindowVisionEncoderConfig) -> str:
    whole = ", ".join(map(str, c.fullatt_block_indexes)) or "none"
    return f"{_vision(c)}, windows of {c.window_size} pixels but in layers {whole}"


@in_words.register
def _(c: Code2WavConfig) -> str:
    return (
        f"{c.num_quantizers} codebooks of {c.codebook_size}, {c.num_hidden_layers} layers of {c.hidden_size}, "
        f"{c.hop_length} samples a frame"
    )


@in_words.register
def _(c: Token2WavConfig) -> str:
    dit = c.dit_config
    return (
        f"DiT of {dit.num_hidden_layers} layers of {dit.hidden_size}, {dit.num_attention_heads} heads; BigVGAN from "
        f"{c.bigvgan_config.upsample_initial_channel} channels; {c.hop_length} samples a code"
    )


def variant(config: OmniConfig) -> str:
    """What this variant takes in and gives out."""
    thinker = config.thinker_config
    media = {"audio": thinker.audio_config, "images and video": thinker.vision_config}
    takes = ", ".join(("text", *(name for name, part in media.items() if part is not None)))
    return f"{takes} in; {'text and speech' if config.has_talker else 'text'} out"


def has_weights(folder: Path) -> bool:
    """Whether a folder has, or claims to have, weight files."""
    return any(folder.glob("*.safetensors*")) or any(folder.glob("*.bin"))


def print_info(console: Console, path: Path) -> None:
    """Print the description of a checkpoint folder, of a folder with a config alone, or of a config file.

    Raises FileNotFoundError or ValueError when the config or the weight files' headers cannot be trusted.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; pass a checkpoint folder or a config.json")
    config = OmniConfig.from_pretrained(path)
    if path.is_dir() and has_weights(path):
        sizes, files = sizes_from_files(path, config.model_type)
        origin = f"{files} weight file{'s' if files > 1 else ''}, read from the headers"
    else:
        sizes, origin = sizes_from_config(config), "no weight files here: as config.json describes it"
    console.print(f"{path}: {config.model_type}, {variant(config)}", highlight=False)
    console.print(f"{origin}", highlight=False)
    console.print(_parts_table(sizes, describe_parts(config)))
    cache_mb = cache_bytes_per_token(config) * 1000 / 1e6
    positions = config.thinker_config.text_config.max_position_embeddings
    console.print(
        f"thinker: {positions:,} positions; its cache takes {cache_mb:,.1f} MB per 1000 tokens in bfloat16",
        highlight=False,
    )
    if config.has_talker and config.talker_config is not None:
        speakers = sorted(config.talker_config.speaker_id or {})
        console.print(f"speakers: {', '.join(speakers) or 'none named'}", highlight=False)
        if isinstance(config.code2wav_config, Token2WavConfig):
            console.print(_windows(config.code2wav_config), highlight=False)


def _windows(config: Token2WavConfig) -> str:
    """How sound comes while codes are drawn, by the usual schedule."""
    from omni.code2wav.chunk_schedule import ChunkSchedule, first_audio

    schedule = ChunkSchedule.usual(config)
    first = first_audio(config, schedule)
    return (
        f"streaming: windows of {schedule.chunk_codes} codes; the first {first.audio_ms:.0f} ms of sound need "
        f"{first.codes} codes, {first.wait_ms:.0f} ms of speech, and the time to compute them"
    )


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
