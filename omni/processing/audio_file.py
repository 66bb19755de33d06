"""Audio from files, bytes and arrays: any rate, any number of channels -> 16 kHz mono fp32 samples."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from omni.processing.sources import Source, as_file, describe, is_source, open_source

SAMPLE_RATE = 16000
MIN_RATE_HZ, MAX_RATE_HZ = 1000, 768_000
_BLOCK_SAMPLES = 1 << 20
_MAX_FILTER_TAPS = 1 << 24  # of an exact resampling filter: 64 MB
_FULL_SCALE = {torch.int8: 2**7, torch.int16: 2**15, torch.int32: 2**31}


def load_audio(value: Any, sampling_rate: int | None = None) -> Tensor:
    """One clip as fp32 samples [n] in -1 .. 1 at 16 kHz, channels averaged.

    `value` is a path, address, data URI, bytes, an array ([n], [channels, n] or [n, channels]; integers are PCM), an
    `(array, rate_hz)` pair or a dict with `array` and `sampling_rate` (or `path` / `bytes`). `sampling_rate` is the
    rate of a bare array (default 16000). Raises FileNotFoundError, OSError or ValueError naming the medium.
    """
    if isinstance(value, Mapping):
        value, sampling_rate = _read_mapping(value, sampling_rate)
    elif isinstance(value, tuple) and len(value) == 2 and not is_source(value[0]) and np.ndim(value[1]) == 0:
        value, sampling_rate = value[0], value[1]
    name = describe(value)
    if is_source(value):
        if sampling_rate is not None:
            raise ValueError(f"audio {name}: sampling_rate belongs to arrays; a file knows its own rate")
        samples, rate = decode_audio(open_source(value, "audio"), name)
    else:
        samples, rate = read_array(value), SAMPLE_RATE if sampling_rate is None else sampling_rate
    check_samples(samples, name)
    return resample(samples, rate, name)


def check_samples(samples: Tensor, name: str) -> None:
    """Raise ValueError for a clip without samples, or with NaN or infinite ones."""
    if samples.numel() == 0:
        raise ValueError(f"audio {name} has no samples; leave it out or give a clip with sound")
    if not bool(torch.isfinite(samples).all()):
        bad = int((~torch.isfinite(samples)).nonzero()[0])
        raise ValueError(f"audio {name}: sample {bad} is {samples[bad].item()}; remove NaN and infinite samples")


def resample(samples: Tensor, rate_hz: int | float, name: str = "") -> Tensor:
    """Samples [n] at `rate_hz` (rounded to whole Hz) -> [m] at 16 kHz, by windowed sinc."""
    if isinstance(rate_hz, bool) or not isinstance(rate_hz, (int, float, np.integer, np.floating)):
        raise TypeError(f"the sampling rate of audio {name} must be a number of Hz, got {rate_hz!r}")
    if not MIN_RATE_HZ <= rate_hz <= MAX_RATE_HZ:
        raise ValueError(
            f"the sampling rate of audio {name} is {rate_hz} Hz; it must lie in {MIN_RATE_HZ}..{MAX_RATE_HZ} Hz"
        )
    rate = round(float(rate_hz))
    if rate == SAMPLE_RATE:
        return samples
    common = math.gcd(rate, SAMPLE_RATE)
    if (rate // common) * (SAMPLE_RATE // common) > _MAX_FILTER_TAPS:
        return _resample_odd(samples, rate)
    from torchaudio.functional import resample as sinc_resample

    return sinc_resample(samples, rate, SAMPLE_RATE)


def _resample_odd(samples: Tensor, rate: int) -> Tensor:
    """Rates with (almost) no factor in common with 16 kHz, such as 44101 Hz, through FFmpeg's interpolated filters."""
    import av

    frame = av.AudioFrame.from_ndarray(samples.numpy()[None], format="fltp", layout="mono")
    frame.sample_rate = rate
    converter = av.AudioResampler(format="fltp", layout="mono", rate=SAMPLE_RATE)
    parts = [*converter.resample(frame), *converter.resample(None)]
    out = torch.cat([torch.from_numpy(part.to_ndarray()[0]) for part in parts])
    return out[: math.ceil(samples.numel() * SAMPLE_RATE / rate)]


def read_array(value: Any) -> Tensor:
    """An array or list of samples as mono fp32 [n]; integers are scaled from their PCM range to -1 .. 1."""
    try:
        array = value.detach().cpu() if isinstance(value, Tensor) else _from_numpy(np.array(value))
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"audio must be a path, address, bytes, array of samples or (array, rate) pair, "
            f"got {type(value).__name__} ({error})"
        ) from error
    if array.dim() not in (1, 2):
        raise ValueError(f"audio samples must be [n] or [channels, n], got shape {list(array.shape)}")
    samples = _scale(array)
    if samples.dim() == 2:
        channels_last = samples.shape[1] < samples.shape[0]
        samples = samples.mean(dim=1 if channels_last else 0)
    return samples


def _from_numpy(array: np.ndarray) -> Tensor:
    return torch.from_numpy(array.astype(array.dtype.newbyteorder("="), copy=False))


def _scale(array: Tensor) -> Tensor:
    if array.is_floating_point():
        return array.float()
    if array.dtype == torch.uint8:  # unsigned PCM is centred on 128
        return (array.float() - 128) / 128
    if array.dtype == torch.int64:  # what a list of Python integers becomes: 16-bit values
        if array.numel() and int(array.abs().max()) > 2**15:
            raise ValueError("audio samples of type int64 exceed the 16-bit range; convert them to int32 or float")
        array = array.to(torch.int16) if not array.numel() or int(array.max()) < 2**15 else array.clamp(max=2**15 - 1)
        return array.float() / 2**15
    if array.dtype not in _FULL_SCALE:
        raise ValueError(f"audio samples of type {array.dtype} have no scale; convert them to int16 or float32")
    return array.float() / _FULL_SCALE[array.dtype]


def _read_mapping(value: Mapping[str, Any], sampling_rate: int | None) -> tuple[Any, int | None]:
    known = ("array", "sampling_rate", "path", "bytes")
    wrong = [key for key in value if key not in known]
    if wrong:
        raise ValueError(f"an audio dict has the keys {', '.join(known)}; got {wrong[0]!r}")
    if value.get("array") is not None:
        return value["array"], value.get("sampling_rate", sampling_rate)
    for key in ("bytes", "path"):
        if value.get(key) is not None:
            return value[key], sampling_rate
    raise ValueError("an audio dict needs 'array' (with 'sampling_rate'), 'path' or 'bytes'")


def decode_audio(source: Source, name: str) -> tuple[Tensor, int]:
    """Decode a file to mono fp32 samples [n] and its rate in Hz: soundfile first, then FFmpeg (PyAV)."""
    import soundfile

    try:
        with soundfile.SoundFile(as_file(source)) as file:
            blocks = []  # read in blocks: a header may promise more samples than there are
            while len(block := file.read(_BLOCK_SAMPLES, dtype="float32", always_2d=True)):
                blocks.append(torch.from_numpy(block).mean(dim=1))
            return torch.cat(blocks) if blocks else torch.zeros(0), int(file.samplerate)
    except (soundfile.SoundFileError, RuntimeError, OSError, ValueError):
        pass  # not one of its formats
    decoded = decode_sound_track(source, name)
    if decoded is None:
        raise ValueError(f"audio {name} holds no sound track")
    samples, rate, _ = decoded
    return samples, rate


def decode_sound_track(
    source: Source, name: str, start_s: float = 0.0, end_s: float | None = None
) -> tuple[Tensor, int, float] | None:
    """The first sound track through FFmpeg: mono fp32 samples [n], rate in Hz and the time of the first sample in s.

    Only blocks that touch `start_s` .. `end_s` are kept. None if the file has no sound track.
    """
    import av

    try:
        with av.open(as_file(source)) as container:
            if not container.streams.audio:
                return None
            stream = container.streams.audio[0]
            converter = av.AudioResampler(format="fltp")
            blocks: list[Tensor] = []
            first_s = 0.0
            for frame in container.decode(stream):
                time_s = float(frame.time or 0.0)
                if time_s + frame.samples / frame.sample_rate <= start_s:
                    continue
                if end_s is not None and time_s >= end_s:
                    break
                if not blocks:
                    first_s = time_s
                for part in converter.resample(frame):
                    blocks.append(torch.from_numpy(part.to_ndarray()).mean(dim=0))
            for part in converter.resample(None) if blocks else ():
                blocks.append(torch.from_numpy(part.to_ndarray()).mean(dim=0))
            return torch.cat(blocks) if blocks else torch.zeros(0), int(stream.rate), first_s
    except Exception as error:  # FFmpeg's errors have many classes
        raise ValueError(
            f"audio {name} cannot be decoded ({_reason(error)}); it must be wav, flac, mp3, ogg, m4a or another format "
            "that FFmpeg reads"
        ) from error


def _reason(error: BaseException) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def join_clips(features: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Features [M, F_i] of clips, padded on the right -> [A, M, F] and mask int64 [A, F]."""
    frames = [clip.shape[1] for clip in features]
    padded = torch.zeros(len(features), features[0].shape[0], max(frames))
    mask = torch.zeros(len(features), max(frames), dtype=torch.int64)
    for row, clip in enumerate(features):
        padded[row, :, : clip.shape[1]] = clip
        mask[row, : clip.shape[1]] = 1
    return padded, mask
