"""What a saved session may hold: the kinds of its values, and the model that it belongs to.

A file is not trusted: whatever in it is of another kind, or of another size than the model says, is a ValueError.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor

from omni.parts import ModelParts

_LARGEST = 1e15  # of a number: seconds, samples and positions stay far below
_UNLIKE = ("dtype", "torch_dtype", "use_cache", "transformers_version", "architectures")  # no matter which


class Maybe(NamedTuple):
    """A kind, or null."""

    kind: Any


class Either(NamedTuple):
    """One of two kinds."""

    first: Any
    second: Any


# A type, [kind] for any number of them, a tuple of kinds for as many, a dict for what it must hold at least.
_END = {"start": float, "highest": float, "tokens": int}
_FRONT_END = {"rate_hz": int, "samples": int, "mel": dict, "encoder": dict, "resampler": Maybe(dict)}
_ORDER = {"done": int, "placed": int, "video_chunk": int, "sound_chunk": int, "piece": Maybe((bool, int))}
_VIDEO = {
    "first_s": float,
    "last_s": float,
    "tail": float,
    "size": Maybe((int, int)),
    "order": _ORDER,
    "front_end": Maybe(_FRONT_END),
    "frames": [float],
    "grids": [(float, int, int)],
}
_ENTRY = ([int], bool, float, bool)  # ids, of the user, how far the next segment moves on, of a medium
_MESSAGE = {
    "id": str,
    "role": str,
    "status": str,
    "parts": [dict],
    "entries": [_ENTRY],
    "given": [int],
    "times": Maybe({"token_ids": [int], "ends_ms": [float]}),
}
_OPEN = {
    "id": str,
    "parts": [dict],
    "entries": [_ENTRY],
    "tail": [Either(str, [int])],
    "before_medium": (int, [Either(str, [int])]),
    "medium_start": int,
    "clip": Maybe({"begun": bool, "front_end": _FRONT_END}),
    "video": Maybe(_VIDEO),
}
SESSION = {
    "model": Maybe({"model_type": str, "thinker": dict, "talker": Maybe(dict)}),
    "beginning": [int],
    "messages": [_MESSAGE],
    "open": Maybe(_OPEN),
    "tools": Maybe([dict]),
    "speaker": Maybe(str),
    "streaming": dict,
    "use_audio_in_video": bool,
    "keep_media": bool,
    "media_bytes": int,
    "make_room": Maybe(float),
}


OLDER = {  # of formats 1 to 3
    "ids": [int],
    "owed": [int],
    "queued": [(Either(str, [int]), bool)],
    "in_user": bool,
    "thinker": _END,
    "talker": _END,
    "past": [([int], float, bool, bool, bool)],
    "keep_media": bool,
    "text": [Either(str, [int])],
    "speaker": Maybe(str),
    "streaming": dict,
    "use_audio_in_video": bool,
    "clip": Maybe({"begun": bool, "front_end": _FRONT_END}),
    "video": Maybe(_VIDEO),
    "model": Maybe({"model_type": str, "thinker": dict, "talker": Maybe(dict)}),
}


def check(value: Any, kind: Any, where: str) -> None:
    """Raise ValueError if a value of JSON is not of a kind."""
    if isinstance(kind, Maybe):
        if value is not None:
            check(value, kind.kind, where)
    elif isinstance(kind, Either):
        check(value, kind.first if isinstance(value, kind.first) else kind.second, where)
    elif isinstance(kind, dict):
        require(isinstance(value, dict), f"{where} must be an object, got {value!r:.60}")
        for name, inner in kind.items():
            require(name in value, f"{where} lacks {name}")
            check(value[name], inner, f"{where}.{name}")
    elif isinstance(kind, (list, tuple)):
        length = "" if isinstance(kind, list) else f" of {len(kind)}"
        fits = isinstance(value, list) and (isinstance(kind, list) or len(value) == len(kind))
        require(fits, f"{where} must be a list{length}, got {value!r:.60}")
        for i, item in enumerate(value):
            check(item, kind[0] if isinstance(kind, list) else kind[i], f"{where}[{i}]")
    else:
        numbers = {int: (int,), float: (int, float)}
        fits = isinstance(value, numbers.get(kind, (kind,))) and (kind is bool or not isinstance(value, bool))
        if fits and kind in numbers:
            fits = math.isfinite(value) and abs(value) < _LARGEST
        require(fits, f"{where} must be of kind {kind.__name__}, got {value!r:.60}")


def require(fits: bool, message: str) -> None:
    if not fits:
        raise ValueError(message)


_PARTS = {  # what a part of a type holds, and the role that alone may have it
    "text": ({"text": str}, None),
    "tool_call": ({"id": str, "name": str, "arguments": str}, "assistant"),
    "tool_result": ({"call_id": str, "output": str}, "tool"),
}


def check_message(id: str, role: str, parts: Sequence[Mapping[str, Any]], where: str) -> None:
    """Raise ValueError for an id that none can have, or parts that do not belong to a role."""
    require(id not in ("", "root"), f"{where}.id is {id!r}")
    for part in parts:
        kinds, only = _PARTS.get(part["type"], ({}, None))
        check(part, kinds, f"{where}.parts")
        require(only in (None, role), f"{where} of the {role} has a part of type {part['type']!r}")
    require(role != "tool" or [part["type"] for part in parts] == ["tool_result"], f"{where} is no result of a tool")


def check_ids(ids: Sequence[int], vocabulary: int, where: str) -> None:
    """Raise ValueError for an id outside the vocabulary."""
    wrong = next((token for token in ids if not 0 <= token < vocabulary), None)
    require(wrong is None, f"{where} holds the id {wrong}, outside the vocabulary of {vocabulary}")


def take_tensor(tensors: Mapping[str, Tensor], name: str, *sizes: int | None, floating: bool = True) -> Tensor:
    """A tensor of these sizes (None: any). Raises ValueError."""
    require(name in tensors, f"the tensor {name} is missing")
    tensor = tensors[name]
    fits = tensor.dim() == len(sizes) and all(want in (None, size) for want, size in zip(sizes, tensor.shape))
    shape = ", ".join("any" if size is None else str(size) for size in sizes)
    require(fits, f"the tensor {name} is {list(tensor.shape)}, this model's is [{shape}]")
    kind = "floating" if floating else "uint8"
    right = tensor.is_floating_point() if floating else tensor.dtype == torch.uint8
    require(right, f"the tensor {name} is {tensor.dtype}, not {kind}")
    return tensor


@contextmanager
def naming(folder: Path) -> Iterator[None]:
    """Let whatever is wrong with a saved session be a ValueError that names its folder."""
    try:
        yield
    except OSError:
        raise
    except ValueError as error:
        raise ValueError(f"{folder} does not hold a whole session of this model: {error}") from error
    except (SafetensorError, LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise ValueError(f"{folder} does not hold a whole session: {error}; save it again") from error


# the model


def model_values(model: ModelParts) -> dict[str, Any]:
    """What a session's file says of its model, for JSON."""
    config = model.config
    talker = None if model.talker is None else config.talker_config
    values = {
        "model_type": config.model_type,
        "thinker": config.thinker.text_config.to_dict(),
        "talker": None if talker is None else talker.text_config.to_dict(),
    }
    plain: dict[str, Any] = json.loads(json.dumps(values, default=str))
    return plain


@torch.no_grad()
def weight_marks(model: ModelParts) -> Tensor:
    """int64 [n, 2]: of the matrices that the caches come from, a number for the name and one value, as bfloat16's bits.

    Weights that are elsewhere (offloaded) or packed are left out.
    """
    names, values = [], []
    for part, module in (("thinker", model.thinker), ("talker", model.talker)):
        for name, weight in [] if module is None else module.named_parameters():
            if weight.is_floating_point() and not weight.is_meta and weight.numel():
                names.append(zlib.crc32(f"{part}.{name}".encode()))
                values.append(weight[tuple(size // 2 for size in weight.shape)])
    bits = [value.to(torch.bfloat16).view(torch.int16) for value in values]
    marks = torch.stack([value.cpu().long() for value in bits]) if bits else torch.zeros(0, dtype=torch.int64)
    return torch.stack((torch.tensor(names, dtype=torch.int64), marks), dim=1)


def check_model(model: ModelParts, values: Mapping[str, Any], marks: Tensor) -> None:
    """Raise ValueError if a session was saved with another model, naming what differs."""
    mine = model_values(model)
    require(
        values["model_type"] == mine["model_type"],
        f"it was saved with another model: {values['model_type']!r}, this one is {mine['model_type']!r}",
    )
    for part in ("thinker", "talker"):
        require(
            (values[part] is None) == (mine[part] is None),
            "it was saved with another variant: only one of the two models has a Talker",
        )
        for name, value in (mine[part] or {}).items():
            saved = values[part].get(name, value)
            require(
                saved == value or name in _UNLIKE,
                f"it was saved with another model: {name} of its {part} is {saved!r:.60}, this model's {value!r:.60}",
            )
    require(marks.dim() == 2 and marks.shape[1] == 2, f"the tensor model.weights is {list(marks.shape)}, not [n, 2]")
    saved_marks = dict(marks.tolist())
    known = [(name, value) for name, value in weight_marks(model).tolist() if name in saved_marks]
    unlike = sum(saved_marks[name] != value for name, value in known)
    require(
        not unlike,
        f"it was saved with another model: {unlike} of {len(known)} weights that were looked at have other values",
    )
