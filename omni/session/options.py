"""The arguments of sessions and engines, checked where they are given."""

from __future__ import annotations

import math
import os
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from omni.encoders.contract import chosen_cuts
from omni.generation.arguments import speaker_name
from omni.generation.streaming_config import StreamingConfig
from omni.parts import ModelParts
from omni.processing.processor import OmniProcessor
from omni.processing.template import tool_schemas


def check_parts(model: Any, processor: Any, streaming: Any) -> None:
    """What sessions are made of; processor and streaming may be None. Raises TypeError, or ValueError without a
    Thinker."""
    if not isinstance(model, ModelParts):
        raise TypeError(f"a session takes an OmniModel, got {type(model).__name__}; see OmniModel.from_pretrained")
    model.require("thinker")
    for name, value, kind in (
        ("processor", processor, OmniProcessor),
        ("streaming", streaming, StreamingConfig),
    ):
        if value is not None and not isinstance(value, kind):
            raise TypeError(f"{name} must be of {kind.__name__} or None, got {type(value).__name__} {value!r}")


def check_speaker(model: ModelParts, speaker: Any) -> None:
    """A session's voice, or None. Raises TypeError, or ValueError for one that the model does not have."""
    check_text("speaker", speaker)
    if speaker is not None and model.talker is not None:
        speaker_name(model, speaker)


def check_window(model: ModelParts, streaming: StreamingConfig) -> None:
    """The audio chunk and window are ones that the encoder can have. Raises TypeError or ValueError."""
    if model.audio_encoder is not None:
        chosen_cuts(model.audio_encoder, streaming.audio_chunk_s, streaming.audio_window_s)


def check_text(name: str, value: Any) -> None:
    """A text or None. Raises TypeError."""
    if value is not None and not isinstance(value, str):
        raise TypeError(f"{name} must be a text or None, got {type(value).__name__} {value!r}")


def whole_rate(sample_rate: Any) -> int:
    """A sample rate in Hz. Raises ValueError."""
    whole = isinstance(sample_rate, Real) and not isinstance(sample_rate, bool) and sample_rate % 1 == 0
    if not whole or not 1000 <= sample_rate <= 384000:
        raise ValueError(f"sample_rate must be a whole number of Hz in 1000..384000, got {sample_rate!r}")
    return int(sample_rate)


def seconds(time_s: Any) -> float:
    """A time. Raises ValueError."""
    if not isinstance(time_s, Real) or isinstance(time_s, bool) or not math.isfinite(time_s):
        raise ValueError(f"time_s must be a number of seconds, got {time_s!r}")
    return float(time_s)


def whole_count(count: Any) -> int:
    """A number of turns. Raises TypeError."""
    if not isinstance(count, Integral) or isinstance(count, bool):
        raise TypeError(f"count must be a whole number of turns, got {count!r}")
    return int(count)


def session_folder(path: Any) -> Path:
    """The folder of a saved session. Raises TypeError, or ValueError for an empty path."""
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"a session is saved in a folder; its path must be a string or Path, got {path!r}")
    if not os.fspath(path):
        raise ValueError("the path of the session's folder is empty; name a folder")
    return Path(path).expanduser()


MEDIA_BYTES = 1 << 29  # of embeddings on the host: two hours of sound at the released width


def byte_count(media_bytes: Any) -> int:
    """A number of bytes. Raises TypeError or ValueError."""
    if not isinstance(media_bytes, Integral) or isinstance(media_bytes, bool):
        raise TypeError(f"media_bytes must be a whole number of bytes, got {media_bytes!r}")
    if media_bytes < 0:
        raise ValueError(f"media_bytes must be at least 0, got {media_bytes}; keep_media=False keeps nothing")
    return int(media_bytes)


def share(make_room: Any) -> float | None:
    """The share of the positions that are freed when a session is full, or None. Raises TypeError or ValueError."""
    if make_room is None:
        return None
    if not isinstance(make_room, Real) or isinstance(make_room, bool):
        raise TypeError(f"make_room must be a share between 0 and 1 or None, got {make_room!r}")
    if not 0 < float(make_room) < 1:
        raise ValueError(f"make_room must be a share between 0 and 1, got {make_room}; 0.2 frees a fifth")
    return float(make_room)


def tool_list(tools: Any) -> list[Any] | None:
    """The JSON schemas of tools, None for none. Raises TypeError or ValueError."""
    return tool_schemas(tools)
