"""Audio from files, bytes and arrays: any rate, any number of channels -> 16 kHz mono fp32 samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from omni.encoders.resample import MAX_RATE_HZ, MIN_RATE_HZ, StreamingResampler
from omni.processing.sources import Source, as_file, describe, is_source, open_source

SAMPLE_RATE = 16000
MAX_CLIP_S = 5400.0  # the released model's 65536 positions hold 84 minutes of sound
_BLOCK_SAMPLES = 1 << 20
_UNKNOWN_FRAMES = 1 << 48  # a stream of unknown length counts more
# How the files begin that soundfile reads: wav, w64, flac, ogg, aiff, au, caf. Its mp3 reader prints: FFmpeg has those.
_SOUNDFILE_MAGIC = (b"RIFF", b"RIFX", b"RF64", b"riff", b"fLaC", b"OggS", b"FORM", b".snd", b"caff")
_FULL_SCALE = {torch.int8: 2**7, torch.int16: 2**15, torch.int32: 2**31}


def load_audio(value: Any, sampling_rate: int | None = None, device: torch.device | None = None) -> Tensor:
    """One clip as fp32 samples [n] in -1 .. 1 at 16 kHz, channels averaged; resampled on `device` (None: the CPU).

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
    return resample(samples.to(device), rate, name)


class _TooLongError(ValueError):
    """A clip exceeds `MAX_CLIP_S`; told apart from what decoders raise."""


def _check_length(duration_s: float, name: str) -> None:
    """Refuse what no model can take, before it fills the memory: an hour of silence is a file of 100 kB."""
    if duration_s > MAX_CLIP_S:
        raise _TooLongError(f"audio {name} is longer than the limit of {MAX_CLIP_S / 60:g} minutes; give a part of it")


def check_samples(samples: Tensor, name: str) -> None:
    """Raise ValueError for a clip without samples, or with NaN or infinite ones."""
    if samples.numel() == 0:
        raise ValueError(f"audio {name} has no samples; leave it out or give a clip with sound")
    _check_finite(samples, name)


def read_piece(value: Any) -> Tensor:
    """A piece of a clip that arrives live, read as `load_audio` reads an array; it may be empty."""
    samples = read_array(value, "an array, tensor or list of samples")
    _check_finite(samples, describe(value))
    return samples


def _check_finite(samples: Tensor, name: str) -> None:
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
    _check_length(samples.numel() / rate, name)
    return samples if rate == SAMPLE_RATE else StreamingResampler(rate, SAMPLE_RATE)(samples)


def read_array(value: Any, wanted: str = "a path, address, bytes, array of samples or (array, rate) pair") -> Tensor:
    """An array or list of samples as mono fp32 [n]; integers are scaled from their PCM range to -1 .. 1.

    `wanted` says in the TypeError what else the caller takes. Raises ValueError for other shapes than [n],
    [channels, n] and [n, channels], and for numbers without a scale.
    """
    try:
        array = value.detach().cpu().to_dense() if isinstance(value, Tensor) else _from_numpy(np.array(value))
    except (TypeError, ValueError, RuntimeError) as error:  # RuntimeError: a tensor without data, on the meta device
        raise TypeError(f"audio must be {wanted}, got {type(value).__name__} ({error})") from error
    if array.dim() not in (1, 2):
        raise ValueError(f"audio samples must be [n] or [channels, n], got shape {list(array.shape)}")
    samples = _scale(array)
    if samples.dim() == 2 and samples.numel():
        channels_last = samples.shape[1] < samples.shape[0]
        samples = samples.mean(dim=1 if channels_last else 0)
    return samples.flatten()


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
    if _first_bytes(source).startswith(_SOUNDFILE_MAGIC):
        known = _decode_plain(source, name)
        if known is not None:
            return known
    decoded = decode_sound_track(source, name)
    if decoded is None:
        raise ValueError(f"audio {name} holds no sound track")
    samples, rate, _ = decoded
    return samples, rate


def _first_bytes(source: Source) -> bytes:
    if isinstance(source, bytes):
        return source[:4]
    with source.open("rb") as file:
        return file.read(4)


def _decode_plain(source: Source, name: str) -> tuple[Tensor, int] | None:
    """What soundfile reads: mono fp32 samples [n] and the rate; None for a coding that it does not know."""
    import soundfile

    try:
        with soundfile.SoundFile(as_file(source)) as file:
            if file.frames < _UNKNOWN_FRAMES:
                _check_length(file.frames / file.samplerate, name)
            blocks, total = [], 0  # read in blocks: a header may promise more samples than there are
            while len(block := file.read(_BLOCK_SAMPLES, dtype="float32", always_2d=True)):
                blocks.append(torch.from_numpy(block).mean(dim=1))
                total += len(block)
                _check_length(total / file.samplerate, name)
            return torch.cat(blocks) if blocks else torch.zeros(0), int(file.samplerate)
    except _TooLongError:
        raise
    except (soundfile.SoundFileError, RuntimeError, OSError, TypeError, ValueError):
        return None


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
            if end_s is None and stream.duration and stream.time_base:
                _check_length(float(stream.duration * stream.time_base), name)
            converter = av.AudioResampler(format="fltp")
            blocks: list[Tensor] = []
            first_s, total = 0.0, 0
            for frame in container.decode(stream):
                time_s = float(frame.time or 0.0)
                if time_s + frame.samples / frame.sample_rate <= start_s:
                    continue
                if end_s is not None and time_s >= end_s:
                    break
                if not blocks:
                    first_s = time_s
                total += frame.samples
                for part in converter.resample(frame):
                    blocks.append(torch.from_numpy(part.to_ndarray()).mean(dim=0))
                _check_length(total / frame.sample_rate, name)
            for part in converter.resample(None) if blocks else ():
                blocks.append(torch.from_numpy(part.to_ndarray()).mean(dim=0))
            return torch.cat(blocks) if blocks else torch.zeros(0), int(stream.rate), first_s
    except _TooLongError:
        raise
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
    padded = features[0].new_zeros(len(features), features[0].shape[0], max(frames))
    mask = torch.zeros(len(features), max(frames), dtype=torch.int64, device=padded.device)
    for row, clip in enumerate(features):
        padded[row, :, : clip.shape[1]] = clip
        mask[row, : clip.shape[1]] = 1
    return padded, mask


def write_sound(path: Path, samples: Tensor, sample_rate: int) -> None:
    """Write samples [n] in the format of the file's name; the old file stays until the new one is complete.

    Raises OSError when it cannot be written.
    """
    import soundfile

    partial = path.with_name(f".{path.stem}.part{path.suffix}")
    try:
        soundfile.write(partial, samples.numpy(), sample_rate)
        partial.replace(path)
    except soundfile.LibsndfileError as error:
        raise OSError(f"{path} cannot be written: {error}") from error
    finally:
        partial.unlink(missing_ok=True)
