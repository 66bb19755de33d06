"""Recordings of training data, from files, addresses, bytes and arrays, as samples at a wanted rate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from omni.encoders.resample import MAX_RATE_HZ, MIN_RATE_HZ, StreamingResampler
from omni.processing.audio_file import check_samples, decode_audio, read_array
from omni.processing.sources import describe, enough_memory, from_decoder, is_source, open_source


def read_speech(source: Any, rate_hz: int) -> Tensor:
    """A recording as mono fp32 samples [n] at `rate_hz`.

    `source` is a path, address, data URI or bytes, an `(array, rate_hz)` pair, a dict with `array` and
    `sampling_rate` (or `path` / `bytes`) or a torchcodec AudioDecoder. Damaged packets are left out, with a warning.
    Raises FileNotFoundError, OSError or ValueError naming the medium.
    """
    value = medium_of(source)
    name = describe(value[0] if isinstance(value, tuple) else value)
    if isinstance(value, tuple):
        samples, rate = read_array(value[0]), value[1]
        if isinstance(rate, bool) or not MIN_RATE_HZ <= round(float(rate)) <= MAX_RATE_HZ:
            raise ValueError(
                f"the sampling rate of audio {name} is {rate!r}; it must lie in {MIN_RATE_HZ}..{MAX_RATE_HZ}"
            )
    else:
        source = open_source(value, "audio")
        with enough_memory(f"audio {name}"):
            samples, rate = decode_audio(source, name, rate_hz)
    check_samples(samples, name)
    return StreamingResampler(round(float(rate)), rate_hz)(samples)


def medium_of(source: Any) -> Any:
    """A path, address or bytes; or an (array, rate) pair."""
    source = from_decoder(source)
    if isinstance(source, Mapping):
        if source.get("array") is not None:
            if source.get("sampling_rate") is None:
                raise ValueError("a recording given as {'array': …} needs its 'sampling_rate' in Hz")
            return source["array"], source["sampling_rate"]
        source = source.get("bytes") or source.get("path")
    if isinstance(source, tuple) and len(source) == 2:
        return source
    if not is_source(source):
        raise TypeError(
            f"a recording must be a path, address, bytes, (array, rate) pair or dict, got {type(source).__name__}"
        )
    return source
