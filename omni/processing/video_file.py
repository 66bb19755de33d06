"""Video from files and frame arrays: frames shown at evenly spread moments, resized as they are decoded; and its sound.

Only the chosen frames are kept, and only after they are resized, so memory does not depend on the length of the file.
Shapes: T chosen frames of H x W pixels.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from omni.processing.audio_file import SAMPLE_RATE, decode_sound_track
from omni.processing.containers import Damage, open_container, reason_of
from omni.processing.film import DEFAULT_FPS, Sampling, check_rate, choose, frames_at, read_index, upright
from omni.processing.image_file import check_size, load_image
from omni.processing.media_budget import DEFAULT_BUDGET, MediaBudget, RefusedError
from omni.processing.sources import Source, decoding, describe, enough_memory, is_source, open_source, unpack

_SOUND_OFFSET_S = 0.04  # smaller differences between the starts of sound and picture are encoder delay, left alone
_LATEST_SOUND_S = 60.0  # sound that begins later than this after the last picture has a wrong clock
_EARLIEST_SOUND_S = 60.0  # and so has sound that begins earlier than this before the first one

# uint8 [3, height, width] of a frame, and how many are taken -> the frame at the size that the model sees
Resize = Callable[[Tensor, int], Tensor]


@dataclass(frozen=True)
class VideoClip:
    """Chosen frames uint8 [T, 3, H, W], the time of each in seconds, and the sound fp32 [samples] at 16 kHz."""

    frames: Tensor
    times_s: tuple[float, ...]
    sound: Tensor | None


def load_video(
    value: Any,
    sampling: Sampling,
    resize: Resize,
    frame_rate: float | None,
    want_sound: bool,
    budget: MediaBudget = DEFAULT_BUDGET,
) -> VideoClip:
    """Read a video.

    `value` is a path, address, data URI or bytes of a file (mp4, webm, mkv, …), a dict with `path` or `bytes`, a
    torchcodec VideoDecoder, a list of pictures, or an array [T, H, W, C] or [T, C, H, W]. `frame_rate` is the rate of a
    list or array, in frames a second; its frames are all taken unless there are more than `max_frames`. Sound is None
    where the file has none or `want_sound` is false.
    Times are the moments asked for: a frame is shown until the next one comes. Where sound is wanted that begins
    before the first picture, times are counted from its start. Damaged packets are left out, with a warning.
    Raises FileNotFoundError, OSError or ValueError naming the medium.
    """
    value = unpack(value, "video")
    name = f"video {describe(value)}"
    if hasattr(value, "get_frame_played_at"):
        with decoding(name):
            return _read_decoder(value, sampling, resize, name)
    if not is_source(value):
        return _read_frames(value, sampling, resize, DEFAULT_FPS if frame_rate is None else frame_rate, name)
    source = open_source(value, "video")
    with enough_memory(name):
        frames, times, first_s, last_s = _decode(source, sampling, resize, budget, name)
        sound, lead_s = _read_sound(source, first_s, last_s, sampling, budget, name) if want_sound else (None, 0.0)
        return VideoClip(_stack(frames), tuple(time + lead_s for time in times), sound)


def _read_frames(value: Any, sampling: Sampling, resize: Resize, rate: float, name: str) -> VideoClip:
    """A list of pictures or one array of frames."""
    check_rate(rate, name)
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
    start_s, end_s = sampling.part_s
    first, last = math.ceil(min(start_s * rate, total)), math.ceil(min(end_s * rate, total))
    if first >= last:
        raise ValueError(f"{name} lasts {total / rate:g} s; nothing lies in {start_s:g}..{end_s:g} s")
    taken = min(last - first, sampling.max_frames)
    if sampling.frames is not None:
        taken = sampling.count(last - first, 0.0)
    chosen = [first + index * (last - first) // taken for index in range(taken)]
    pictures = [value[index] for index in chosen]
    if not isinstance(value, (list, tuple)):
        pictures = _on_one_scale(pictures)
    frames: list[Tensor] = []
    for picture in map(load_image, pictures):
        frames.append(resize(torch.from_numpy(np.array(picture)).permute(2, 0, 1), taken))
    _check_one_size(frames, name)
    return VideoClip(_stack(frames), tuple((index - first) / rate for index in chosen), None)


def _read_decoder(value: Any, sampling: Sampling, resize: Resize, name: str) -> VideoClip:
    """What torchcodec's VideoDecoder shows; it has no sound."""
    facts = value.metadata
    origin_s, end = float(facts.begin_stream_seconds or 0.0), facts.end_stream_seconds
    length = getattr(facts, "duration_seconds", None) if end is None else float(end) - origin_s
    if length is None:
        raise ValueError(f"{name} does not say how long it is; open it with seek_mode='exact', or give the file")
    length_s = float(length)
    start_s, end_s = sampling.part_s
    end_s = min(end_s, length_s)
    if not start_s < end_s:
        raise ValueError(f"{name} lasts {length_s:g} s; no frame lies in {start_s:g}..{end_s:g} s")
    count = sampling.count(max(1, round(len(value) * (end_s - start_s) / length_s)), end_s - start_s)
    times = [step * (end_s - start_s) / count for step in range(count)]
    frames = []
    for time_s in times:
        picture = load_image(value.get_frame_played_at(seconds=origin_s + start_s + time_s).data)
        frames.append(resize(torch.from_numpy(np.array(picture)).permute(2, 0, 1), count))
    _check_one_size(frames, name)
    return VideoClip(_stack(frames), tuple(times), None)


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
    source: Source, sampling: Sampling, resize: Resize, budget: MediaBudget, name: str
) -> tuple[list[Tensor], list[float], float, float]:
    """Chosen frames, their times from the part's start, and the file's times of its first and last frame."""
    import av

    damage, decoded = Damage(), 0

    def check(frame: Any) -> None:
        nonlocal decoded
        check_size(frame.height, frame.width, name, budget.pixels)
        decoded += frame.height * frame.width
        budget.check("film_pixels", decoded, name, "has more pixels in its frames together", "take fewer frames of it")

    frames: list[Tensor] = []
    try:
        with open_container(source) as container:
            index = read_index(container, name, Damage())
            context: Any = container.streams[index.track].codec_context
            check_size(context.height, context.width, name, budget.pixels)
        choice = choose(index, sampling, name)
        shape, kept, last = None, 0, None
        for frame in frames_at(source, index, choice.stamps, check, damage):
            if frame is not last:
                picture = _fit(torch.from_numpy(upright(frame)).permute(2, 0, 1), shape)
                shape, last = picture.shape, frame
                picture = resize(picture, len(choice.stamps))
                kept = picture.nbytes * len(choice.stamps)
                budget.check("kept_bytes", kept, name, "takes more bytes", "take fewer or smaller frames of it")
            frames.append(picture)
    except (RefusedError, MemoryError):
        raise
    except (OSError, RuntimeError, av.FFmpegError) as error:
        raise ValueError(
            f"{name} cannot be decoded ({reason_of(error)}); it must be mp4, webm or mkv, and complete"
        ) from error
    if not frames:
        reason = f" ({damage.reason})" if damage.packets else "; the file may be cut short"
        raise ValueError(f"{name} has no frames that can be decoded{reason}")
    damage.warn(name)
    _check_one_size(frames, name)
    first_s, last_s = index.shown[0] * index.base_s, index.shown[-1] * index.base_s
    return frames, choice.times_s[: len(frames)], first_s, last_s


def _fit(picture: Tensor, shape: torch.Size | None) -> Tensor:
    """A picture [3, H, W] at the size of the first one, where the size changes inside a film."""
    if shape is None or picture.shape == shape:
        return picture.contiguous()
    from torchvision.transforms.v2 import InterpolationMode
    from torchvision.transforms.v2.functional import resize

    return resize(picture, list(shape[1:]), interpolation=InterpolationMode.BICUBIC, antialias=True).contiguous()


def _read_sound(
    source: Source, first_s: float, last_s: float, sampling: Sampling, budget: MediaBudget, name: str
) -> tuple[Tensor | None, float]:
    """The video's sound at 16 kHz, and how many seconds of it come before the first picture.

    Pictures begin at `first_s` of the file's clock and end at `last_s`. Sound is lined up with the part's start; a
    part from the film's start keeps what comes before. None where the file has no sound, or where it begins long after
    the last picture.
    """
    part_start_s, part_end_s = sampling.part_s
    start_s, whole = first_s + part_start_s, part_start_s == 0
    end_s = None if part_end_s == math.inf else first_s + part_end_s
    from_s = -math.inf if whole else start_s
    try:
        decoded = decode_sound_track(source, f"track of {name}", from_s, end_s, SAMPLE_RATE, None, budget)
    except RefusedError:
        raise
    except ValueError as error:  # the pictures are left
        warnings.warn(f"{name} is shown without its sound: {error}", stacklevel=2)
        return None, 0.0
    if decoded is None or decoded[0].numel() == 0 or decoded[2] > last_s + _LATEST_SOUND_S:
        return None, 0.0
    sound, _, sound_s = decoded
    late_s = sound_s - start_s
    lead_s = -late_s if whole and _SOUND_OFFSET_S < -late_s <= _EARLIEST_SOUND_S else 0.0
    if abs(late_s) > _SOUND_OFFSET_S and not lead_s:
        shift = round(late_s * SAMPLE_RATE)
        sound = torch.cat((torch.zeros(shift), sound)) if shift > 0 else sound[-shift:]
    if end_s is not None:
        sound = sound[: math.ceil((end_s - start_s + lead_s) * SAMPLE_RATE)]
    return (sound, lead_s) if sound.numel() else (None, 0.0)
