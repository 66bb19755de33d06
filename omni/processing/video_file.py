"""Video from files and frame arrays: chosen frames, resized as they are decoded, with their real times; and its sound.

A file is read twice: once without decoding, for the time of every frame, then frame by frame. Only the chosen frames
are kept, and only after they are resized, so memory does not depend on the length of the file.
Shapes: T chosen frames of H x W pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from omni.processing.audio_file import SAMPLE_RATE, check_samples, decode_sound_track, resample
from omni.processing.image_file import check_size, load_image
from omni.processing.sources import Source, as_file, describe, is_source, open_source

if TYPE_CHECKING:
    import av.container

DEFAULT_FPS = 2.0  # frames taken from each second, as the models were trained
_SOUND_OFFSET_S = 0.04  # smaller differences between the starts of sound and picture are encoder delay, left alone
_LATEST_SOUND_S = 60.0  # sound that begins later than this after the last picture has a wrong clock

# uint8 [3, height, width] of a frame, and how many are taken -> the frame at the size that the model sees
Resize = Callable[[Tensor, int], Tensor]


@dataclass(frozen=True)
class Sampling:
    """Which frames to take: `fps` a second, their number kept within the limits and a multiple of `multiple`."""

    fps: float = DEFAULT_FPS
    min_frames: int = 4
    max_frames: int = 768
    multiple: int = 2
    start_s: float = 0.0
    end_s: float | None = None

    def __post_init__(self) -> None:
        _check_rate(self.fps, "the sampling")
        for name in ("min_frames", "max_frames"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, Integral) or int(value) < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        for name, moment in (("video_start", self.start_s), ("video_end", self.end_s)):
            if moment is not None and (isinstance(moment, bool) or not isinstance(moment, Real)):
                raise TypeError(f"{name} must be a number of seconds, got {moment!r}")
        if not self.start_s >= 0 or (self.end_s is not None and not self.end_s > self.start_s):
            raise ValueError(f"a video part must have 0 <= video_start < video_end, got {self.start_s}..{self.end_s}")

    def count(self, frames: int, duration_s: float) -> int:
        """How many of `frames` to take."""
        most = min(self.max_frames, frames)
        wanted = min(max(duration_s * self.fps, self.min_frames), most)
        return max(math.floor(wanted / self.multiple) * self.multiple, min(most, self.multiple))


@dataclass(frozen=True)
class VideoClip:
    """Chosen frames uint8 [T, 3, H, W], the time of each in seconds, and the sound fp32 [samples] at 16 kHz."""

    frames: Tensor
    times_s: tuple[float, ...]
    sound: Tensor | None


def _check_rate(rate: Any, name: str) -> None:
    if isinstance(rate, bool) or not isinstance(rate, Real) or not (math.isfinite(rate) and float(rate) > 0):
        raise ValueError(f"fps of {name} must be a positive number, got {rate!r}")


def load_video(value: Any, sampling: Sampling, resize: Resize, frame_rate: float | None, want_sound: bool) -> VideoClip:
    """Read a video.

    `value` is a path, address, data URI or bytes of a file (mp4, webm, mkv, …), a list of pictures, or an array
    [T, H, W, C] or [T, C, H, W]. `frame_rate` is the rate of a list or array, in frames a second; its frames are all
    taken unless there are more than `max_frames`. Sound is None where the file has none or `want_sound` is false.
    Raises FileNotFoundError, OSError or ValueError naming the medium.
    """
    name = f"video {describe(value)}"
    if not is_source(value):
        return _read_frames(value, sampling, resize, DEFAULT_FPS if frame_rate is None else frame_rate, name)
    source = open_source(value, "video")
    frames, times, first_s, last_s = _decode(source, sampling, resize, name)
    sound = _read_sound(source, first_s + sampling.start_s, last_s, sampling, name) if want_sound else None
    return VideoClip(_stack(frames), tuple(times), sound)


def _read_frames(value: Any, sampling: Sampling, resize: Resize, rate: float, name: str) -> VideoClip:
    """A list of pictures or one array of frames."""
    _check_rate(rate, name)
    if not isinstance(value, (list, tuple)):
        ndim = getattr(value, "ndim", 0)
        if ndim != 4:
            raise TypeError(
                f"{name} must be a path, address, bytes, a list of pictures or an array [T, H, W, C] or [T, C, H, W], "
                f"got {ndim} dimensions"
            )
    total = len(value)
    if total == 0:
        raise ValueError(f"{name} has no frames")
    first, last = min(math.ceil(sampling.start_s * rate), total), total
    if sampling.end_s is not None:
        last = min(math.ceil(sampling.end_s * rate), total)
    if first >= last:
        raise ValueError(f"{name} lasts {total / rate:g} s; nothing lies in {sampling.start_s}..{sampling.end_s} s")
    taken = min(last - first, sampling.max_frames)
    chosen = [first + index * (last - first) // taken for index in range(taken)]
    pictures = [value[index] for index in chosen]
    if not isinstance(value, (list, tuple)):
        pictures = _on_one_scale(pictures)
    frames: list[Tensor] = []
    for picture in map(load_image, pictures):
        frames.append(resize(torch.from_numpy(np.array(picture)).permute(2, 0, 1), taken))
    _check_one_size(frames, name)
    return VideoClip(_stack(frames), tuple((index - first) / rate for index in chosen), None)


def _on_one_scale(frames: list[Any]) -> list[Any]:
    """Frames of one array: where one of them exceeds 1, all are in 0..255, the darkest too."""
    try:
        arrays = [
            frame.float().numpy(force=True) if isinstance(frame, Tensor) else np.asarray(frame) for frame in frames
        ]
    except RuntimeError:  # a tensor without data: `load_image` names it
        return frames
    low, high = min(float(array.min()) for array in arrays), max(float(array.max()) for array in arrays)
    if arrays[0].dtype.kind != "f" or not (low >= 0 and 1 < high <= 255):  # also where NaN is among them
        return frames
    return [np.rint(array).astype(np.uint8) for array in arrays]


def _stack(frames: list[Tensor]) -> Tensor:
    """[T, 3, H, W]; empties the list as it goes, so that the frames are not held twice."""
    stacked = torch.empty(len(frames), *frames[0].shape, dtype=frames[0].dtype)
    for place in reversed(range(len(frames))):
        stacked[place] = frames.pop()
    return stacked


def _check_one_size(frames: Sequence[Tensor], name: str) -> None:
    sizes = {tuple(frame.shape[1:]) for frame in frames}
    if len(sizes) > 1:
        raise ValueError(f"{name}: all frames must have one size, got {sorted(sizes)} after resizing")


def _decode(
    source: Source, sampling: Sampling, resize: Resize, name: str
) -> tuple[list[Tensor], list[float], float, float]:
    """Chosen frames, their times from the part's start, and the file's times of its first and last frame."""
    import av

    try:
        with av.open(as_file(source)) as container:
            if not container.streams.video or container.format.name == "tty":  # FFmpeg shows any text file as a film
                raise ValueError(f"{name} has no picture track; give a sound file as an audio item")
            context = container.streams.video[0].codec_context
            check_size(context.height, context.width, name)
            stamps, base_s, origin = _frame_stamps(container, name)
        start, end = origin + sampling.start_s / base_s, math.inf
        if sampling.end_s is not None:
            end = origin + sampling.end_s / base_s
        part = [stamp for stamp in stamps if start <= stamp < end]
        if not part:
            raise ValueError(
                f"{name} lasts {(stamps[-1] - origin) * base_s:g} s; no frame lies in "
                f"{sampling.start_s}..{sampling.end_s} s"
            )
        chosen = _choose(part, base_s, sampling)
        with av.open(as_file(source)) as container:
            if chosen[0] != stamps[0]:
                with suppress(av.error.FFmpegError):  # no index: decode from the start instead
                    container.seek(chosen[0], stream=container.streams.video[0])  # to the key frame before it
            frames, taken = _take(container, chosen, resize)
    except (av.error.FFmpegError, OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"{name} cannot be decoded ({reason}); it must be mp4, webm or mkv, and complete") from error
    if not frames:
        raise ValueError(f"{name} has no frames that can be decoded; the file may be cut short")
    _check_one_size(frames, name)
    return frames, [(stamp - max(start, stamps[0])) * base_s for stamp in taken], origin * base_s, stamps[-1] * base_s


def _frame_stamps(container: av.container.InputContainer, name: str) -> tuple[list[int], float, int]:
    """The time stamp of every frame in order, the seconds of one tick, and the first stamp; nothing is decoded."""
    stream = container.streams.video[0]
    stamps = []
    for packet in container.demux(stream):
        stamp = packet.pts if packet.pts is not None else packet.dts
        if packet.size and stamp is not None and not packet.is_discard:
            stamps.append(stamp)
    if not stamps or stream.time_base is None:
        raise ValueError(f"{name} has no frames")
    stamps.sort()
    return stamps, float(stream.time_base), stamps[0]


def _choose(stamps: Sequence[int], base_s: float, sampling: Sampling) -> list[int]:
    """The stamps of the frames to take: evenly spread in time, each the last frame shown at its moment."""
    total = len(stamps)
    span = (stamps[-1] - stamps[0]) * total / (total - 1) if total > 1 else 0.0  # the last frame lasts as the others
    count = sampling.count(total, span * base_s)
    chosen, index = [], 0
    for step in range(count):
        moment = stamps[0] + step * span / count
        while index + 1 < total and stamps[index + 1] <= moment + 0.5:  # half a tick against rounded stamps
            index += 1
        chosen.append(stamps[index])
    return chosen


def _take(
    container: av.container.InputContainer, chosen: Sequence[int], resize: Resize
) -> tuple[list[Tensor], list[int]]:
    """Decode up to the last chosen stamp and keep the chosen frames, resized."""
    stream = container.streams.video[0]
    stream.thread_type = "AUTO"
    frames: list[Tensor] = []
    taken: list[int] = []
    for frame in container.decode(stream):
        stamp = frame.pts if frame.pts is not None else frame.dts
        if stamp is None or stamp < chosen[len(frames)]:
            continue
        check_size(frame.height, frame.width, "a video frame")
        pixels = torch.from_numpy(frame.to_ndarray(format="rgb24"))
        turns = round(frame.rotation / 90) % 4  # phones store the picture lying and a turn, counter-clockwise
        picture = resize(torch.rot90(pixels, turns).permute(2, 0, 1).contiguous(), len(chosen))
        while len(frames) < len(chosen) and chosen[len(frames)] <= stamp:  # a slow video may show one frame twice
            taken.append(chosen[len(frames)])
            frames.append(picture)
        if len(frames) == len(chosen):
            break
    return frames, taken


def _read_sound(source: Source, start_s: float, last_s: float, sampling: Sampling, name: str) -> Tensor | None:
    """The video's sound at 16 kHz, lined up with its pictures, which begin at `start_s` of the file's clock.

    None where the file has none, or where it begins long after the last picture, at `last_s`.
    """
    end_s = None if sampling.end_s is None else start_s + sampling.end_s - sampling.start_s
    decoded = decode_sound_track(source, f"track of {name}", start_s, end_s)
    if decoded is None or decoded[0].numel() == 0:
        return None
    samples, rate, first_s = decoded
    if first_s > last_s + _LATEST_SOUND_S:
        return None
    check_samples(samples, f"track of {name}")
    sound = resample(samples, rate, f"track of {name}")
    late = first_s - start_s
    if abs(late) > _SOUND_OFFSET_S:
        shift = round(late * SAMPLE_RATE)
        sound = torch.cat((torch.zeros(shift), sound)) if shift > 0 else sound[-shift:]
    if end_s is not None:
        sound = sound[: math.ceil((end_s - start_s) * SAMPLE_RATE)]
    return sound if sound.numel() else None
