"""What a checkpoint's files say that no model can be built from: quantised weights, sizes without weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from omni.config.reading import Config, read_json

# Endings of tensor names by which the writers of quantised weights are known; the first that occurs names them.
_MARKS = {
    "GPTQ": (".g_idx",),
    "AWQ": (".qweight", ".qzeros"),
    "NVFP4": (".weight_global_scale", ".weight_scale_2", ".input_global_scale"),
    "bitsandbytes": (".absmax", ".quant_map", ".SCB", ".weight_format", "__nf4", "__fp4"),
    "compressed-tensors": (".weight_packed",),
    "MXFP4": ("_proj_blocks",),
    "HQQ": (".W_q",),
    "AQLM": (".codebooks",),
    "VPTQ": (".centroids.weight",),
    "quanto": (".weight._data",),
    "torchao": (".tensor_impl.data", "_weight_qdata", ".weight_qdata"),
    "fp8": (".weight_scale_inv", ".weight_scale", ".input_scale"),
}
_FILES = {"hf_quant_config.json": "quantization", "quantize_config.json": "", "quant_config.json": ""}
_COUNTS = ("num_hidden_layers", "encoder_layers", "depth", "num_code_groups")  # each makes so many modules


def refuse_quantised(folder: Path, strange: Collection[str], others: Iterable[str]) -> None:
    """Raise ValueError for quantised weights, by name and with the remedy.

    strange: keys of the parts that are loaded and that the model has no place for; others: keys of other parts. A
    folder that says it is quantised is refused too, unless it is another part that is.
    """
    by_names = _named(strange)
    declared = by_names is None and _named(others) is None
    name = by_names or (_declared(folder) if declared else None)
    if name is None:
        return
    said = (_declared(folder) or "") if by_names else ""
    name += f" ({said})" if said and said.lower() not in name.lower() else ""
    plain = "" if by_names else "; if they are plain again, delete quantization_config from its config.json"
    raise ValueError(
        f"the weights in {folder} are quantised by {name}, which omni does not read (strict=False changes nothing); "
        f"load the checkpoint that they were made from, with quantize='int8' or 'int4' to make it small{plain}"
    )


def _named(keys: Iterable[str]) -> str | None:
    """Whose tensor names these are."""
    found = {name for key in keys for name, endings in _MARKS.items() if key.endswith(endings)}
    return next((name for name in _MARKS if name in found), None)


def _declared(folder: Path) -> str | None:
    """The method that a folder's files name."""
    for name, inner in _FILES.items():
        if (folder / name).is_file():
            values = read_json(folder / name)
            nested = values.get(inner)
            return _in_words(nested if isinstance(nested, Mapping) else values) or name
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    return next((_in_words(found) or "quantization_config" for found in _quantisations(config)), None)


def _quantisations(values: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The quantization_config of a model's config and of the configs inside it."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            if key == "quantization_config":
                if value:
                    yield value
            elif key.endswith("_config"):
                yield from _quantisations(value)


def _in_words(values: Mapping[str, Any]) -> str:
    names = (values.get(key) for key in ("quant_method", "quant_algo", "format"))
    return ", ".join(name for name in names if isinstance(name, str))


def check_counts(folder: Path, part: str, config: Config, keys: Collection[str]) -> None:
    """Raise ValueError where the config of a part asks for far more layers or experts than its `keys` number.

    A part of a billion layers would be built for ever before the files could be found not to fit. Whatever does not
    exceed eight times the largest number in a key is left to the reading of the weights.
    """
    numbers = [int(piece) for key in keys for piece in key.split(".") if piece.isascii() and piece.isdigit()]
    limit = 8 * (max(numbers, default=0) + 1) if keys else 1000
    counted = (*_COUNTS, "num_experts") if any(".experts.0." in key for key in keys) else _COUNTS
    for name, value in _sizes(config):
        if name in counted and value > limit:
            raise ValueError(
                f"config.json in {folder} gives the {part.replace('_', ' ')} {name} = {value}, but its weights number "
                f"nothing beyond {limit // 8}; check that config.json belongs to these files"
            )


def _sizes(config: Config) -> Iterator[tuple[str, int]]:
    """The whole numbers of a part's config; a Thinker's encoders are parts of their own."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if isinstance(value, Config) and field.name not in ("audio_config", "vision_config"):
            yield from _sizes(value)
        elif type(value) is int:
            yield field.name, value
