"""Audio from files, bytes and arrays: any rate, any number of channels -> 16 kHz mono fp32 samples."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from omni.encoders.resample import MAX_RATE_HZ, MIN_RATE_HZ, StreamingResampler
from omni.processing.containers import (
    Damage,
    Downmix,
    decode,
    lost_pages,
    ogg_links,
    open_channels,
    open_container,
    read_packets,
    reason_of,
    tracks,
)
from omni.processing.media_budget import DEFAULT_BUDGET, MediaBudget, RefusedError
from omni.processing.sources import (
    Source,
    as_file,
    describe,
    enough_memory,
    first_bytes,
    from_decoder,
    is_source,
    open_source,
    read_part,
    unpack,
)

SAMPLE_RATE = 16000
WHOLE = (0.0, math.inf)
MAX_CLIP_S = 5400.0  # the released model's 65536 positions hold 84 minutes of sound
_BLOCK_SAMPLES = 1 << 20
_PIECE_SAMPLES = 1 << 23  # resampled at once: clips of up to three minutes in one piece
_UNKNOWN_FRAMES = 1 << 48  # a stream of unknown length counts more
# How the files begin that soundfile reads: wav, w64, flac, ogg, aiff, au, caf. Its mp3 reader prints: FFmpeg has those.
_SOUNDFILE_MAGIC = (b"RIFF", b"RIFX", b"RF64", b"riff", b"fLaC", b"OggS", b"FORM", b".snd", b"caff")
_FULL_SCALE = {torch.int8: 2**7, torch.int16: 2**15, torch.int32: 2**31}


def load_audio(
    value: Any,
    sampling_rate: int | None = None,
    device: torch.device | None = None,
    budget: MediaBudget = DEFAULT_BUDGET,
    start_s: float = 0.0,
    end_s: float | None = None,
) -> Tensor:
    """One clip as fp32 samples [n] in -1 .. 1 at 16 kHz, channels averaged; resampled on `device` (None: the CPU).

    `value` is a path, address, data URI, bytes, an array ([n], [channels, n] or [n, channels]; integers are PCM), an
    `(array, rate_hz)` pair, a dict with `array` and `sampling_rate` (or `path` / `bytes`) or a torchcodec AudioDecoder.
    `sampling_rate` is the rate of a bare array (default 16000). `start_s` .. `end_s` is the part to take. Files are
    decoded in pieces, within `budget`; damaged packets are left out, with a warning.
    Raises FileNotFoundError, OSError or ValueError naming the medium.
    """
    part = read_part(start_s, end_s, "audio")
    value = from_decoder(value)
    if isinstance(value, Mapping):
        value, sampling_rate = _read_mapping(value, sampling_rate)
    elif isinstance(value, tuple) and len(value) == 2 and not is_source(value[0]) and np.ndim(value[1]) == 0:
        value, sampling_rate = value[0], value[1]
    name = describe(value)
    if is_source(value):
        if sampling_rate is not None:
            raise ValueError(f"audio {name}: sampling_rate belongs to arrays; a file knows its own rate")
        source = open_source(value, "audio")
        with enough_memory(f"audio {name}"):
            samples, _ = decode_audio(source, name, SAMPLE_RATE, device, budget, part)
        check_samples(samples, name, part)
        return samples
    samples, rate = read_array(value), SAMPLE_RATE if sampling_rate is None else sampling_rate
    if part != WHOLE:
        first, last = (round(min(bound * _check_rate(rate, name), samples.numel())) for bound in part)
        samples = samples[first:last]
    check_samples(samples, name, part)
    return resample(samples.to(device), rate, name, budget)


def _check_length(duration_s: float, name: str, budget: MediaBudget = DEFAULT_BUDGET) -> None:
    """Refuse what no model can take, before it fills the memory: an hour of silence is a file of 100 kB."""
    most = MAX_CLIP_S if budget.seconds is None else budget.seconds
    if duration_s > most:
        raise RefusedError(
            f"audio {name} is longer than the limit of {most / 60:g} minutes; give a part of it, or "
            "MediaBudget(seconds=…)"
        )


def check_samples(samples: Tensor, name: str, part: tuple[float, float] = WHOLE) -> None:
    """Raise ValueError for a clip without samples, or with NaN or infinite ones; `part`: the part that was taken."""
    if samples.numel() == 0:
        told = "; leave it out or give a clip with sound" if part == WHOLE else f" in {part[0]:g}..{part[1]:g} s"
        raise ValueError(f"audio {name} has no samples{told}")
    _check_finite(samples, name)


def read_piece(value: Any) -> Tensor:
    """A piece of a clip that arrives live, read as `load_audio` reads an array; it may be empty."""
    samples = read_array(value, "an array, tensor or list of samples")
    _check_finite(samples, describe(value))
    return samples


def _check_finite(samples: Tensor, name: str, before: int = 0) -> None:
    """Raise ValueError for NaN and infinity; `before` samples came earlier. In blocks: torch makes several copies."""
    for block in samples.split(_BLOCK_SAMPLES):
        if not bool(torch.isfinite(block).all()):
            bad = int((~torch.isfinite(block)).nonzero()[0])
            raise RefusedError(
                f"audio {name}: sample {before + bad} is {block[bad].item()}; remove NaN and infinite samples"
            )
        before += len(block)


def resample(samples: Tensor, rate_hz: int | float, name: str = "", budget: MediaBudget = DEFAULT_BUDGET) -> Tensor:
    """Samples [n] at `rate_hz` (rounded to whole Hz) -> [m] at 16 kHz, by windowed sinc."""
    rate = _check_rate(rate_hz, name)
    _check_length(samples.numel() / rate, name, budget)
    return samples if rate == SAMPLE_RATE else StreamingResampler(rate, SAMPLE_RATE)(samples)


def _check_rate(rate_hz: Any, name: str) -> int:
    """The rate in whole Hz. Raises TypeError or ValueError."""
    if isinstance(rate_hz, bool) or not isinstance(rate_hz, (int, float, np.integer, np.floating)):
        raise TypeError(f"the sampling rate of audio {name} must be a number of Hz, got {rate_hz!r}")
    if not MIN_RATE_HZ <= rate_hz <= MAX_RATE_HZ:
        raise RefusedError(
            f"the sampling rate of audio {name} is {rate_hz} Hz; it must lie in {MIN_RATE_HZ}..{MAX_RATE_HZ} Hz"
        )
    return round(float(rate_hz))


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
    return unpack({key: value.get(key) for key in ("bytes", "path")}, "audio"), sampling_rate


class _Recording:
    """Blocks of sound as they are decoded, of any rates and channels, kept as mono samples at one rate.

    rate_hz: that rate (None: the first block's). part: the seconds that are kept. `loud`: whether anything but silence
    is among them; `done`: whether they are complete.
    """

    def __init__(
        self,
        name: str,
        rate_hz: int | None,
        device: torch.device | None,
        budget: MediaBudget,
        part: tuple[float, float] = WHOLE,
    ) -> None:
        self.name, self.rate_hz, self.device, self.budget, self.part = name, rate_hz, device, budget, part
        self.kept: list[Tensor] = []
        self.loose: list[Tensor] = []
        self.pending: list[Tensor] = []
        self.resampler: StreamingResampler | None = None
        self.source_hz = self.place = self.passed = self.waiting = self.decoded = self.kept_bytes = 0
        self.before_s = self.seconds = 0.0
        self.loud = self.done = False

    def promise(self, seconds: float) -> None:
        """Refuse what a header says is too long."""
        start_s, end_s = self.part
        _check_length(self.seconds + min(seconds, end_s) - start_s, self.name, self.budget)

    def add(self, block: Tensor, rate_hz: int, channels: int) -> None:
        """Mono samples [n], which were `channels` times as many."""
        self.decoded += len(block) * channels
        self.budget.check("samples", self.decoded, f"audio {self.name}", "has more samples")
        if rate_hz != self.source_hz:
            self._begin(rate_hz)
        block = self._cut(block)
        self.seconds += len(block) / rate_hz
        _check_length(self.seconds, self.name, self.budget)
        self.pending.append(block)
        self.waiting += len(block)
        if self.waiting >= _PIECE_SAMPLES:
            self._pass()

    def finish(self) -> Tensor:
        """All samples [m]; the parts are freed as they are joined, so that they are not held twice."""
        self._close()
        self.kept, self.loose = self.kept + self.loose, []
        whole = torch.empty(sum(map(len, self.kept)), device=self.device)
        end = len(whole)
        while self.kept:
            part = self.kept.pop()
            whole[end - len(part) : end] = part
            end -= len(part)
        return whole

    def _begin(self, rate_hz: int) -> None:
        """Blocks of another rate."""
        self._close()
        self.before_s += self.place / self.source_hz if self.source_hz else 0.0
        self.source_hz, self.place = rate_hz, 0
        self.rate_hz = self.rate_hz or rate_hz
        if rate_hz != self.rate_hz:
            self.resampler = StreamingResampler(_check_rate(rate_hz, self.name), self.rate_hz)
            self.state = self.resampler.init_state(self.device)

    def _cut(self, block: Tensor) -> Tensor:
        """What of a block lies in the part."""
        if self.part == WHOLE:
            return block
        start, end = (round(min((bound - self.before_s) * self.source_hz, 1 << 60)) - self.place for bound in self.part)
        self.place += len(block)
        self.done = end <= len(block)
        return block[max(start, 0) : max(end, 0)]

    def _pass(self) -> None:
        if not self.pending:
            return
        piece = torch.cat(self.pending)
        _check_finite(piece, self.name, self.passed)
        self.passed, self.waiting, self.pending = self.passed + len(piece), 0, []
        self.loud = self.loud or bool(piece.any())
        piece = piece.to(self.device)
        self._keep(piece if self.resampler is None else self.resampler.step(piece, self.state))

    def _close(self) -> None:
        self._pass()
        if self.resampler is not None:
            self._keep(self.resampler.finish(self.state))
            self.resampler = None

    def _keep(self, samples: Tensor) -> None:
        self.loose.append(samples)
        if sum(map(len, self.loose)) > _PIECE_SAMPLES:  # in large blocks, whose memory is given back when they go
            self.kept.append(torch.cat(self.loose))
            self.loose = []
        self.kept_bytes += samples.nbytes
        self.budget.check("kept_bytes", self.kept_bytes, f"audio {self.name}", "takes more bytes")


def decode_audio(
    source: Source,
    name: str,
    rate_hz: int | None = None,
    device: torch.device | None = None,
    budget: MediaBudget = DEFAULT_BUDGET,
    part: tuple[float, float] = WHOLE,
) -> tuple[Tensor, int]:
    """Decode a file, or a part of it in seconds, to mono fp32 samples [n] at `rate_hz` (None: its own) and that rate.

    soundfile reads what it knows, FFmpeg (PyAV) the rest, and what soundfile finds damaged or empty.
    """
    plain = None
    if first_bytes(source, 4).startswith(_SOUNDFILE_MAGIC):
        plain = _decode_plain(source, _Recording(name, rate_hz, device, budget, part))
        if plain is not None and plain[0].numel():
            return plain
    try:
        decoded = decode_sound_track(source, name, 0.0, None, rate_hz, device, budget, part)
    except RefusedError:
        raise
    except ValueError:
        if plain is not None:
            return plain
        raise
    if decoded is None:
        raise ValueError(f"audio {name} holds no sound track of a known codec")
    return decoded[:2]


def _decode_plain(source: Source, recording: _Recording) -> tuple[Tensor, int] | None:
    """What soundfile reads: mono fp32 samples [n] and the rate; None for a coding that it does not know."""
    import soundfile

    try:
        for link in ogg_links(source):
            with soundfile.SoundFile(as_file(link)) as file:
                if file.subtype.startswith("MPEG"):  # soundfile stops at damage there, and prints
                    return None
                known, rate = (file.frames if file.frames < _UNKNOWN_FRAMES else 0), int(file.samplerate)
                recording.promise(known / rate)
                read, size = 0, max(1, _BLOCK_SAMPLES // file.channels)
                # in blocks: a header may promise more samples than there are
                while not recording.done and len(block := file.read(size, dtype="float32", always_2d=True)):
                    recording.add(torch.from_numpy(block).mean(dim=1), rate, file.channels)
                    read += len(block)
                if file.format == "FLAC" and read < known and not recording.done:
                    return None  # damaged: soundfile stops there
        if file.format == "OGG" and (lost := lost_pages(source)):
            Damage(lost, "pages are missing").warn(f"audio {recording.name}")
        return recording.finish(), recording.rate_hz or rate
    except (RefusedError, MemoryError):
        raise
    except (soundfile.SoundFileError, RuntimeError, OSError, TypeError, ValueError):
        return None


def decode_sound_track(
    source: Source,
    name: str,
    start_s: float = 0.0,
    end_s: float | None = None,
    rate_hz: int | None = None,
    device: torch.device | None = None,
    budget: MediaBudget = DEFAULT_BUDGET,
    part: tuple[float, float] = WHOLE,
) -> tuple[Tensor, int, float] | None:
    """A file's sound through FFmpeg: mono fp32 samples [n], their rate in Hz and the time of the first one in s.

    The best track that is not silent, or the best. Only blocks that touch `start_s` .. `end_s` by the file's clock are
    kept, and of them the `part` in seconds from the first; the rate is `rate_hz` (None: the track's own). Packets that
    cannot be decoded are left out, with a warning. None if the file has no sound track.
    """
    best: tuple[Tensor, int, float] | None = None
    damage, place, count = Damage(), 0, 1
    try:
        while place < count:
            lost, recording = Damage(), _Recording(name, rate_hz, device, budget, part)
            with open_container(source) as container:
                found = tracks(container, "audio")
                count = len(found)
                if not found:
                    return None
                first_s = _record(container, found[place], recording, start_s, end_s, lost)
            samples = recording.finish()
            if best is None or recording.loud or (samples.numel() and not best[0].numel()):
                best, damage = (samples, recording.rate_hz or SAMPLE_RATE, first_s), lost
            place = count if recording.loud else place + 1
    except (RefusedError, MemoryError):
        raise
    except Exception as error:  # FFmpeg's errors have many classes
        raise _undecodable(name, reason_of(error)) from error
    if best is not None and not best[0].numel() and damage.packets:
        raise _undecodable(name, damage.reason)
    damage.warn(f"audio {name}")
    return best


def _undecodable(name: str, reason: str) -> ValueError:
    return ValueError(
        f"audio {name} cannot be decoded ({reason}); it must be wav, flac, mp3, ogg, m4a or another format that FFmpeg "
        "reads"
    )


def _record(
    container: Any, track: Any, recording: _Recording, start_s: float, end_s: float | None, damage: Damage
) -> float:
    """Put the blocks of a track that touch `start_s` .. `end_s` into the recording; the time of the first in s."""
    open_channels(container, track)
    base_s = float(track.time_base or 1)
    if end_s is None and track.duration:
        recording.promise(track.duration * base_s - max(start_s, 0.0))
    downmix = Downmix()
    first_s: float | None = None
    for frame in decode(read_packets(container, [track], damage), track, damage):
        if not frame.sample_rate or not frame.samples:
            continue
        time_s = (frame.pts or 0) * base_s
        if time_s + frame.samples / frame.sample_rate <= start_s:
            continue
        if recording.done or (end_s is not None and time_s >= end_s):
            break
        first_s = time_s if first_s is None else first_s
        for block in downmix(frame):
            recording.add(block, frame.sample_rate, frame.layout.nb_channels)
    return first_s or 0.0


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
