"""OmniInputs: one batch of prompts and their media, in the field names of the transformers processor.

Shapes: B rows, T tokens; A clips of at most F mel frames with M bins; N images or V videos whose patches are stacked
along one axis (P rows of D pixel values each); grids count patches as (time, height, width).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Any, Union

import numpy as np
import torch
from torch import Tensor

from omni.config.family import family_of
from omni.config.keywords import nearest
from omni.config.model import ThinkerConfig
from omni.encoders.checks import FRAMES_HZ
from omni.encoders.contract import chosen_rate
from omni.rope.positions import Audio, AudioVideo, Image, MediaTokens, Segment, Video, parse_segments

# What a transformers processor may return beside the fields; nothing here is needed to run the model.
_PASSED_OVER = frozenset(
    {"num_audio_tokens", "mm_token_type_ids", "token_type_ids", "video_metadata", "text_replacement_offsets"}
)
_INTEGERS = (
    *("input_ids", "attention_mask", "feature_attention_mask", "image_grid_thw", "video_grid_thw"),
    "reply_start",
)
_CUTS = ("audio_chunk_s", "audio_window_s")
_FEATURES = ("input_features", "pixel_values", "pixel_values_videos")


@dataclass(init=False, eq=False)
class OmniInputs:
    """A batch of prompts with their media; `OmniInputs(**batch)` takes a transformers batch as it is.

    Lists and numpy arrays become tensors. Raises TypeError on an unknown field and ValueError where shapes or values
    contradict each other.

    Fields:
        input_ids: int64 [B, T], media placeholders included; padded on the left or on the right.
        attention_mask: int64 [B, T], 1 on tokens, 0 on padding (None: no padding).
        input_features: float [A, M, F] log-mel of every clip, in the order of the prompts.
        feature_attention_mask: int64 [A, F], 1 on the clip's frames (None: all frames count).
        audio_chunk_s, audio_window_s: float64 [A], or one number for all clips: seconds of the chunks into which the
            audio encoder cuts a clip, and of its attention window (None: the checkpoint's). The placeholders of a clip
            are those of its chunks.
        pixel_values: float [P, D] patches of all images; image_grid_thw: int64 [N, 3].
        pixel_values_videos: float [P, D] patches of all videos; video_grid_thw: int64 [V, 3].
        video_second_per_grid: float32 [V], seconds between two grid steps.
        use_audio_in_video: None reads from the ids which videos have sound; True or False checks it.
        video_grid_times: per video the real time in seconds of every grid step (its first frame's time);
            wins over `video_second_per_grid`.
        reply_start: int64 [B], the column of `input_ids` at which the reply begins where the prompt holds its beginning
            (None: found in the ids; T: the prompt holds none of it).
    """

    input_ids: Tensor
    attention_mask: Tensor
    input_features: Tensor | None = None
    feature_attention_mask: Tensor | None = None
    audio_chunk_s: Tensor | None = None
    audio_window_s: Tensor | None = None
    pixel_values: Tensor | None = None
    image_grid_thw: Tensor | None = None
    pixel_values_videos: Tensor | None = None
    video_grid_thw: Tensor | None = None
    video_second_per_grid: Tensor | None = None
    use_audio_in_video: bool | None = None
    video_grid_times: list[Tensor] | None = None
    reply_start: Tensor | None = None

    def __init__(self, input_ids: Any, attention_mask: Any = None, **media: Any) -> None:
        known = [field.name for field in fields(self)]
        for name in media:
            if name not in known and name not in _PASSED_OVER:
                hint = nearest(name, known, f"it has {', '.join(known)}")
                raise TypeError(f"OmniInputs has no field {name!r}; {hint}")
        values = {"input_ids": input_ids, "attention_mask": attention_mask, **media}
        for name in known:
            setattr(self, name, _read_field(name, values.get(name)))
        _check_ids(self.input_ids)
        if self.attention_mask is None:
            self.attention_mask = torch.ones_like(self.input_ids)
        if self.input_features is not None and self.feature_attention_mask is None and self.input_features.dim() == 3:
            clips, frames = self.input_features.shape[0], self.input_features.shape[-1]
            self.feature_attention_mask = torch.ones(clips, frames, dtype=torch.int64)
        _check_mask(self.input_ids, self.attention_mask)
        _check_starts(self.input_ids, self.reply_start)
        _check_audio(self)
        for name in _CUTS:
            setattr(self, name, _one_a_clip(name, getattr(self, name), self.feature_attention_mask))
        _check_grid("pixel_values", self.pixel_values, "image_grid_thw", self.image_grid_thw)
        _check_grid("pixel_values_videos", self.pixel_values_videos, "video_grid_thw", self.video_grid_thw)
        _check_times(self)

    @property
    def batch_size(self) -> int:
        """Number of prompts B."""
        return self.input_ids.shape[0]

    def __len__(self) -> int:
        return self.batch_size

    def to(self, device: Union[torch.device, str, int, None] = None, dtype: torch.dtype | None = None) -> OmniInputs:
        """A copy on `device`. `dtype` casts pixel values and mel features; ids, masks, grids and times keep theirs.

        Times and chunks stay on the CPU, where positions are computed.
        """
        if isinstance(device, torch.dtype):
            raise TypeError(f"OmniInputs.to takes a device first, got {device}; write to(dtype={device})")
        try:
            device = None if device is None else torch.empty(0, device=device).device
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"device {device!r} is not available here; 'cpu' always is") from error
        moved = copy.copy(self)
        for name in (*_INTEGERS, *_FEATURES):
            value = getattr(self, name)
            if value is not None:
                setattr(moved, name, value.to(device=device, dtype=dtype if name in _FEATURES else None))
        return moved

    def to_dict(self) -> dict[str, Any]:
        """The fields that are set, by name: what `OmniInputs(**...)` takes."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if value is not None}

    def segments(self, config: ThinkerConfig, audio_tokens: Callable[..., int] | None = None) -> list[list[Segment]]:
        """What lies where in every prompt, padding removed: one list of segments a row.

        `audio_tokens` gives the tokens of a clip of so many mel frames (None: as the config's encoder), with the
        keyword `chunk_frames` in chunks that were chosen. Raises ValueError where placeholders in the ids and media
        features disagree, or where the model has no encoder for a medium.
        """
        tokens = MediaTokens(
            audio=config.audio_token_id,
            image=config.image_token_id,
            video=config.video_token_id,
            audio_start=config.audio_start_token_id,
            vision_start=config.vision_start_token_id,
        )
        images, videos, audios = (
            iter(self._images(config)),
            iter(self._videos(config)),
            iter(self._audios(config, audio_tokens)),
        )
        rows = []
        for ids, mask in zip(self.input_ids.tolist(), self.attention_mask.tolist()):
            kept = [token for token, keep in zip(ids, mask) if keep]
            joint_marks = config.position_rule.joint_marks
            rows.append(parse_segments(kept, tokens, images, videos, audios, joint_marks))
        for kind, rest in (("image", images), ("video", videos), ("audio clip", audios)):
            _check_exhausted(kind, rest)
        with_sound = sum(isinstance(segment, AudioVideo) for row in rows for segment in row)
        if self.use_audio_in_video is True and not with_sound:
            raise ValueError("use_audio_in_video is True but no video in the ids has sound")
        if self.use_audio_in_video is False and with_sound:
            raise ValueError(f"use_audio_in_video is False but the ids hold {with_sound} video(s) with sound")
        return rows

    def _images(self, config: ThinkerConfig) -> list[Image]:
        if self.image_grid_thw is None:
            return []
        merge = _merge_size(config, "images")
        return [Image(h // merge, w // merge) for _, h, w in self.image_grid_thw.tolist()]

    def _videos(self, config: ThinkerConfig) -> list[Video]:
        if self.video_grid_thw is None:
            return []
        merge = _merge_size(config, "videos")
        grids = self.video_grid_thw.tolist()
        return [Video(self.video_times(i), h // merge, w // merge) for i, (_, h, w) in enumerate(grids)]

    def video_times(self, index: int) -> tuple[float, ...]:
        """Seconds of every grid step of one video."""
        if self.video_grid_times is not None:
            return tuple(self.video_grid_times[index].tolist())
        assert self.video_grid_thw is not None and self.video_second_per_grid is not None
        seconds = float(self.video_second_per_grid[index])
        return tuple(step * seconds for step in range(int(self.video_grid_thw[index, 0])))

    def _audios(self, config: ThinkerConfig, audio_tokens: Callable[..., int] | None) -> list[Audio]:
        if self.feature_attention_mask is None:
            return []
        audio = config.audio_config
        if audio_tokens is None:
            if audio is None:
                raise ValueError("the inputs hold audio but this model has no audio encoder; leave the audio out")
            audio_tokens = family_of(audio).token_counter(audio.chunk_frames)
        own = 0 if audio is None else audio.chunk_frames
        lengths = self.feature_attention_mask.sum(-1).tolist()
        chunks = [None if chunk_s is None else round(chunk_s * FRAMES_HZ) for chunk_s, _ in self.audio_cuts()]
        return [clip(audio_tokens, int(frames), chunk, own) for frames, chunk in zip(lengths, chunks)]

    def audio_cuts(self) -> list[tuple[float | None, float | None]]:
        """Chunk and attention window of each clip in seconds, None for the checkpoint's."""
        clips = 0 if self.feature_attention_mask is None else len(self.feature_attention_mask)
        chunks, windows = (
            [None] * clips if values is None else values.tolist()
            for values in (self.audio_chunk_s, self.audio_window_s)
        )
        return list(zip(chunks, windows))


def clip(audio_tokens: Callable[..., int], frames: int, chunk_frames: int | None, own_frames: int = 0) -> Audio:
    """A clip of so many mel frames, in chunks of `chunk_frames` (None: the encoder's own, of `own_frames`)."""
    if chunk_frames is None:
        return Audio(audio_tokens(frames))
    rate = chosen_rate(audio_tokens, chunk_frames, own_frames)
    return Audio(audio_tokens(frames, chunk_frames=chunk_frames), rate)


def _merge_size(config: ThinkerConfig, media: str) -> int:
    if config.vision_config is None:
        raise ValueError(f"the inputs hold {media} but this model has no vision encoder; leave the {media} out")
    return config.vision_config.spatial_merge_size


def _check_exhausted(kind: str, rest: Iterator[Any]) -> None:
    left = len(list(rest))
    if left:
        raise ValueError(f"the inputs hold {left} more {kind}(s) than the ids have placeholders for")


def _read_field(name: str, value: Any) -> Any:
    """A field's value as a tensor of its kind."""
    if value is None:
        return None
    if name == "use_audio_in_video":
        if not isinstance(value, bool):
            raise TypeError(f"use_audio_in_video must be None, True or False, got {value!r}")
        return value
    if name in _CUTS:
        return _read_times(name, value)
    if name == "video_grid_times":
        return [_read_times(f"video_grid_times[{i}]", times) for i, times in enumerate(value)]
    tensor = _tensor(name, value)
    if name in _INTEGERS:
        if tensor.numel() and (tensor.is_floating_point() or tensor.is_complex()):
            raise ValueError(f"{name} must hold integers, got {tensor.dtype}")
        return tensor.to(torch.int64)
    if name == "video_second_per_grid":
        return tensor.cpu().to(torch.float32).reshape(-1)
    return tensor if tensor.is_floating_point() else tensor.to(torch.float32)


def _read_times(name: str, value: Any) -> Tensor:
    """Seconds in fp64 (a list of Python floats would otherwise be rounded to fp32)."""
    times = value if isinstance(value, Tensor) else _tensor(name, np.asarray(value))
    return times.detach().cpu().to(torch.float64)


def _tensor(name: str, value: Any) -> Tensor:
    try:
        return value if isinstance(value, Tensor) else torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"{name} cannot be made a tensor ({error}); rows of unequal length must be padded first (padding=True)"
        ) from error


def _check_ids(ids: Tensor | None) -> None:
    if ids is None or ids.dim() != 2 or ids.shape[0] == 0 or ids.shape[1] == 0:
        shape = None if ids is None else tuple(ids.shape)
        raise ValueError(f"input_ids must be [rows, tokens] with at least one of each, got shape {shape}")


def _check_mask(ids: Tensor, mask: Tensor) -> None:
    if mask.shape != ids.shape:
        raise ValueError(f"attention_mask {tuple(mask.shape)} must have the shape of input_ids {tuple(ids.shape)}")
    if not bool(((mask == 0) | (mask == 1)).all()):
        raise ValueError("attention_mask must hold only 0 and 1")
    steps = (mask[:, 1:] != mask[:, :-1]).sum(-1)
    empty, broken = (mask.sum(-1) == 0), (steps > 1)
    for row in torch.where(empty | broken)[0].tolist():
        what = "is empty" if bool(empty[row]) else "has gaps; pad on the left or on the right only"
        raise ValueError(f"row {row} of attention_mask {what}")


def _check_starts(ids: Tensor, starts: Tensor | None) -> None:
    rows, width = ids.shape
    if starts is not None and (starts.shape != (rows,) or not bool(((starts >= 0) & (starts <= width)).all())):
        raise ValueError(
            f"reply_start must be [{rows}] columns of input_ids, each in 0..{width}, got {starts.tolist()}"
        )


def _check_audio(inputs: OmniInputs) -> None:
    features, mask = inputs.input_features, inputs.feature_attention_mask
    if features is None:
        if mask is not None:
            raise ValueError("feature_attention_mask is given without input_features")
        return
    if features.dim() != 3:
        raise ValueError(f"input_features must be [clips, mel bins, frames], got shape {tuple(features.shape)}")
    assert mask is not None
    if mask.shape != (features.shape[0], features.shape[2]):
        raise ValueError(
            f"feature_attention_mask {tuple(mask.shape)} must be [clips, frames] = "
            f"{(features.shape[0], features.shape[2])} of input_features"
        )
    if not bool(((mask == 0) | (mask == 1)).all()) or bool((mask[:, 1:] > mask[:, :-1]).any()):
        raise ValueError("feature_attention_mask must be ones, then zeros: clips are padded on the right")
    if not bool((mask.sum(-1) > 0).all()):
        raise ValueError("input_features hold a clip without frames; leave empty clips out")
    _check_finite("input_features", features)


def _one_a_clip(name: str, values: Tensor | None, clips: Tensor | None) -> Tensor | None:
    """Seconds of each clip, positive; None without clips."""
    if values is None or clips is None:
        return None
    if values.dim() == 0:
        values = values.expand(len(clips)).clone()
    if values.shape != (len(clips),):
        raise ValueError(f"{name} must be one number, or one for each of {len(clips)} clips, got {values.tolist()}")
    if not bool((torch.isfinite(values) & (values > 0)).all()):
        raise ValueError(f"{name} must be positive numbers of seconds, got {values.tolist()}")
    return values


def _check_grid(pixels_name: str, pixels: Tensor | None, grid_name: str, grid: Tensor | None) -> None:
    if (pixels is None) != (grid is None):
        raise ValueError(f"{pixels_name} and {grid_name} must be given together")
    if pixels is None or grid is None:
        return
    if grid.dim() != 2 or grid.shape[1] != 3 or not bool((grid > 0).all()):
        raise ValueError(f"{grid_name} must be [count, 3] of positive (time, height, width), got {grid.tolist()}")
    if grid_name == "image_grid_thw" and bool((grid[:, 0] != 1).any()):
        raise ValueError(f"image_grid_thw must have time 1 in every row, got {grid.tolist()}; videos have their own")
    rows = int(grid.prod(-1).sum())
    if pixels.dim() != 2 or pixels.shape[0] != rows:
        raise ValueError(f"{pixels_name} must have {rows} rows, the patches of {grid_name}, got {tuple(pixels.shape)}")
    _check_finite(pixels_name, pixels)


def _check_times(inputs: OmniInputs) -> None:
    grid, times, seconds = inputs.video_grid_thw, inputs.video_grid_times, inputs.video_second_per_grid
    if grid is None:
        if times is not None or seconds is not None:
            raise ValueError("video times are given without video_grid_thw")
        return
    if times is None and seconds is None:
        raise ValueError("videos need their times: give video_second_per_grid or video_grid_times")
    if seconds is not None and (len(seconds) != len(grid) or not bool((seconds > 0).all())):
        raise ValueError(f"video_second_per_grid must be {len(grid)} positive numbers, got {seconds.tolist()}")
    if seconds is not None:
        _check_finite("video_second_per_grid", seconds)
    if times is None:
        return
    if len(times) != len(grid):
        raise ValueError(f"video_grid_times must hold one list for each of {len(grid)} videos, got {len(times)}")
    for index, (steps, row) in enumerate(zip(times, grid.tolist())):
        if steps.dim() != 1 or len(steps) != row[0]:
            raise ValueError(
                f"video_grid_times[{index}] must hold {row[0]} times, one a grid step, got {tuple(steps.shape)}"
            )
        _check_finite(f"video_grid_times[{index}]", steps)
        if bool((steps[1:] < steps[:-1]).any()):
            raise ValueError(f"video_grid_times[{index}] must not fall, got {steps.tolist()}")


def _check_finite(name: str, values: Tensor) -> None:
    if values.numel() and not all(bool(torch.isfinite(bound)) for bound in torch.aminmax(values)):  # makes no copy
        raise ValueError(f"{name} hold NaN or infinity; check the media or the features they come from")
