"""Pixels for the vision encoder: pictures and videos -> patches, through transformers' Qwen2-VL processors.

Shapes: patches have sides of P pixels; an image gives patches fp32 [h * w, 3 * 2 * P * P] and its grid [1, h, w]; a
video [t * h * w, …], [t, h, w].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from numbers import Integral
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from omni.processing.image_file import MAX_ASPECT_RATIO, load_image
from omni.processing.media_budget import DEFAULT_BUDGET, MediaBudget, as_number
from omni.processing.sources import describe
from omni.processing.video_file import DEFAULT_FPS, Sampling, load_video

# Pixels of one video frame: 128 .. 768 tokens of 32 x 32 pixels (the default of Qwen3-Omni's processor).
VIDEO_MIN_PIXELS = 128 * 32 * 32
VIDEO_MAX_PIXELS = 768 * 32 * 32
# What transformers' Qwen2-VL processors take where the preprocessor files say nothing.
_IMAGE_PIXELS = (56 * 56, 28 * 28 * 1280)
_PATCH_SIZE, _MERGE_SIZE, _TEMPORAL_PATCH_SIZE = 14, 2, 2
_MIN_FRAMES, _MAX_FRAMES = 4, 768
_SIZE_KEYS = ("size", "min_pixels", "max_pixels", "resized_height", "resized_width")
_BICUBIC = 3  # as Pillow counts
_LARGE_PIXELS = 16_000_000  # a larger picture is shrunk before anything copies it
LARGEST_MIN_PIXELS = 16384 * 32 * 32  # a picture enlarged to this takes 16384 tokens
VIDEO_TOKENS = 128000 * 0.9  # of a whole video, where a call says nothing else (Qwen's video recipe)
_LEAST_ABOVE_MIN = 1.05  # of min_pixels: what a budget for the whole video leaves each frame (Qwen's video recipe)


@dataclass(frozen=True)
class PixelBudget:
    """Fewest and most pixels of a picture after resizing; None takes the checkpoint's.

    `total_pixels` bounds a whole video (None: no bound): the pixels of all its frames after resizing, those of one
    temporal patch counted once. The processor's own default is what `VIDEO_TOKENS` tokens hold. `resized_height` and
    `resized_width`, rounded to whole tokens, are a size that no limit changes.
    """

    min_pixels: int | None = None
    max_pixels: int | None = None
    total_pixels: int | None = None
    resized_height: float | None = None
    resized_width: float | None = None

    def __post_init__(self) -> None:
        for name in ("min_pixels", "max_pixels", "total_pixels"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, Integral) or int(value) < 1):
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
            if value is not None:  # the image processors take Python's own
                object.__setattr__(self, name, int(value))
        if self.min_pixels is not None and self.min_pixels > LARGEST_MIN_PIXELS:
            raise ValueError(f"min_pixels {self.min_pixels} exceeds the limit of {LARGEST_MIN_PIXELS}; make it smaller")
        if self.min_pixels is not None and self.max_pixels is not None and self.min_pixels > self.max_pixels:
            raise ValueError(f"min_pixels {self.min_pixels} exceeds max_pixels {self.max_pixels}")

        sides = (self.resized_height, self.resized_width)
        if sides != (None, None) and not all(_is_side(side) for side in sides):
            raise ValueError(f"resized_height and resized_width must both be positive numbers, got {sides}")

    def size(self, factor: int) -> tuple[int, int] | None:
        """The height and width that are asked for, as multiples of `factor`; None where the limits decide.

        Raises ValueError for more than the largest picture that can be asked for.
        """
        if self.resized_height is None or self.resized_width is None:
            return None
        height, width = (max(1, round(side / factor)) * factor for side in (self.resized_height, self.resized_width))
        if height * width > LARGEST_MIN_PIXELS:
            raise ValueError(
                f"resized_height x resized_width is {height} x {width} pixels, more than the limit of "
                f"{LARGEST_MIN_PIXELS}; make it smaller"
            )
        return height, width

    def within(self, least: int, most: int) -> tuple[int, int]:
        """The limits with the defaults `least` and `most`; a limit that was given moves the other default."""
        low = least if self.min_pixels is None else self.min_pixels
        high = most if self.max_pixels is None else self.max_pixels
        return (low, max(low, high)) if self.max_pixels is None else (min(low, high), high)

    def of_frame(
        self, frames: int, frames_per_patch: int, usual: tuple[int, int] = (VIDEO_MIN_PIXELS, VIDEO_MAX_PIXELS)
    ) -> tuple[int, int]:
        """The limits of each frame of a video of so many frames; the total never shrinks one below the least size."""
        low, high = self.within(*usual)
        if self.total_pixels is not None:
            share = self.total_pixels * frames_per_patch // frames
            high = min(high, max(share, int(low * _LEAST_ABOVE_MIN)))
        return low, max(low, high)


@dataclass(frozen=True)
class VideoPixels:
    """One processed video: patches, grid, the time of every grid step in seconds, its sound at 16 kHz."""

    name: str
    pixels: Tensor
    grid: list[int]
    grid_times_s: list[float]
    sound: Tensor | None


def _is_side(value: Any) -> bool:
    return 0 < as_number(value) < math.inf


def _given(settings: Mapping[str, Any], name: str, default: Any) -> Any:
    value = settings.get(name)
    return default if value is None else value


def _image_limits(settings: Mapping[str, Any]) -> tuple[int, int]:
    """Fewest and most pixels of a picture: `min_pixels` and `max_pixels`, else `size`. Raises ValueError."""
    size = settings.get("size")
    if size is None:
        size = dict(zip(("shortest_edge", "longest_edge"), _IMAGE_PIXELS))
    if not isinstance(size, Mapping):
        raise ValueError(f"size in the preprocessor files must be a JSON object, got {size!r}")
    limits = []
    for name, edge in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge")):
        value = _given(settings, name, size.get(edge))
        if value is None:
            raise ValueError(f"size in the preprocessor files lacks {edge}, and there is no {name} either: {size!r}")
        limits.append(int(value))
    return limits[0], limits[1]


def _built(processor: Any, settings: Mapping[str, Any], **more: Any) -> Any:
    """One of transformers' processors, which raise classes of the library's own."""
    values = {name: value for name, value in settings.items() if name not in _SIZE_KEYS}
    try:
        return processor(**values, **more)
    except Exception as error:
        raise ValueError(f"the image or video values of the preprocessor files are unusable: {error}") from error


class VisionProcessor:
    """Resizes, normalises and cuts into patches, one medium at a time.

    The settings are those of transformers' processors, which are imported when the first picture or video comes. They
    may also hold `resized_height` and `resized_width`: the one size that a model knows. Every picture or frame gets
    this size, unless a call says otherwise. frame_pixels: fewest and most pixels of a video frame, where nothing else
    is said.
    """

    def __init__(
        self,
        image_settings: Mapping[str, Any],
        video_settings: Mapping[str, Any],
        frame_pixels: tuple[int, int] = (VIDEO_MIN_PIXELS, VIDEO_MAX_PIXELS),
    ) -> None:
        for settings in (image_settings, video_settings):
            for name in ("patch_size", "merge_size", "temporal_patch_size"):
                value = settings.get(name, 1)
                if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                    raise ValueError(f"{name} in the preprocessor files must be a positive integer, got {value!r}")
        self._image_settings, self._video_settings = image_settings, video_settings
        self._image_limits = _image_limits(image_settings)
        self.merge_size: int = image_settings.get("merge_size", _MERGE_SIZE)
        self.temporal_patch_size: int = video_settings.get("temporal_patch_size", _TEMPORAL_PATCH_SIZE)
        self.frame_pixels = frame_pixels
        patch_size = video_settings.get("patch_size", _PATCH_SIZE)
        self.factor: int = patch_size * video_settings.get("merge_size", _MERGE_SIZE)
        self.total_pixels = int(VIDEO_TOKENS * self.factor * self.factor)
        self._image_size, self._frame_size = map(self._known_size, (image_settings, video_settings))

    def _known_size(self, settings: Mapping[str, Any]) -> tuple[int, int] | None:
        """The height and width that the preprocessor files ask for, if they do. Raises ValueError."""
        try:
            sides = settings.get("resized_height"), settings.get("resized_width")
            return PixelBudget(resized_height=sides[0], resized_width=sides[1]).size(self.factor)
        except ValueError as error:
            raise ValueError(f"the preprocessor files cannot be followed: {error}") from error

    @cached_property
    def image_processor(self) -> Any:
        """transformers' own. Raises ValueError for values that it cannot take."""
        from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor

        size = dict(zip(("shortest_edge", "longest_edge"), self._image_limits))
        return _built(Qwen2VLImageProcessor, self._image_settings, size=size)

    @cached_property
    def video_processor(self) -> Any:
        """transformers' own, for all but the size of frames. Raises ValueError for values that it cannot take."""
        from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

        # The limit on pixels is on each frame, as in the release, not on the whole video.
        return _built(Qwen2VLVideoProcessor, self._video_settings, cap_pixels_per_frame=False)

    def image(
        self,
        value: Any,
        budget: PixelBudget,
        device: torch.device | None = None,
        media_budget: MediaBudget = DEFAULT_BUDGET,
        check: Callable[[int], None] | None = None,
    ) -> tuple[Tensor, list[int]]:
        """One picture: patches and grid, computed on `device` (None: the CPU). `media_budget` is for decoding it.

        check: is told how many tokens there will be, before any is made.
        """
        picture: Any = load_image(value, media_budget)
        low, high = budget.within(*self._image_limits)
        options: dict[str, Any] = {"return_tensors": "pt", "device": device}
        target, own = self._size(replace(budget, total_pixels=None), self._image_size), self.image_processor
        resizes = own.do_resize or target is not None
        if not resizes:
            self._check_sides(picture.height, picture.width, own, f"picture {describe(value)}")
        sides = (picture.height, picture.width)
        height, width = target or (self._target(*sides, low, high) if resizes else sides)
        if check is not None:
            check(height * width // self.factor**2)
        options["size"] = {"shortest_edge": low, "longest_edge": high}
        large = picture.width * picture.height > _LARGE_PIXELS and own.do_resize and own.resample == _BICUBIC
        if target is not None or large:
            # as the image processor would, which alone holds a large picture several times
            pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()
            del picture
            picture, options["do_resize"] = _scale(pixels.to(device), (height, width)), False
        out = self.image_processor(images=[picture], **options)
        return out["pixel_values"], out["image_grid_thw"][0].tolist()

    def video(
        self,
        value: Any,
        settings: Mapping[str, Any],
        budget: PixelBudget,
        want_sound: bool,
        device: torch.device | None = None,
        media_budget: MediaBudget = DEFAULT_BUDGET,
        check: Callable[[int], None] | None = None,
    ) -> VideoPixels:
        """One video, its patches computed on `device` (None: the CPU). `media_budget` is for decoding it.

        `settings` may hold fps, nframes, min_frames, max_frames, video_start and video_end (None: default). check: is
        told how many tokens its pictures will be, before any is kept.
        """
        sampling = Sampling(
            fps=_given(settings, "fps", DEFAULT_FPS),
            min_frames=_given(settings, "min_frames", self._video_settings.get("min_frames", _MIN_FRAMES)),
            max_frames=_given(settings, "max_frames", self._video_settings.get("max_frames", _MAX_FRAMES)),
            multiple=self.temporal_patch_size,
            start_s=_given(settings, "video_start", 0.0),
            end_s=settings.get("video_end"),
            frames=settings.get("nframes"),
        )
        size = self._size(budget, self._frame_size)

        if budget.total_pixels is None:
            budget = replace(budget, total_pixels=self.total_pixels)

        def resize(frame: Tensor, frames: int) -> Tensor:
            limits = budget.of_frame(frames, self.temporal_patch_size, self.frame_pixels)
            if check is not None:
                height, width = size or self._target(frame.shape[1], frame.shape[2], *limits)
                check(-(-frames // self.temporal_patch_size) * (height * width // self.factor**2))
            return self._resize(frame, *limits) if size is None else _scale(frame, size)

        clip = load_video(value, sampling, resize, settings.get("fps"), want_sound, media_budget)
        times = list(clip.times_s[:: self.temporal_patch_size])
        pixels, grid = self._patches(clip.frames, device)
        return VideoPixels(describe(value), pixels, grid, times, clip.sound)

    def _patches(self, frames: Tensor, device: torch.device | None = None) -> tuple[Tensor, list[int]]:
        """Frames uint8 [T, 3, H, W] -> patches and grid [t, h, w]; an odd last frame counts twice.

        One grid step at a time, straight to its place: the float copies of all frames would not fit.
        """
        values, depth = self.video_processor, self.temporal_patch_size
        patch, merge = values.patch_size, values.merge_size
        (count, channels, height, width), steps = frames.shape, -(-len(frames) // depth)
        h, w = height // patch, width // patch
        sides = {"mh": merge, "ph": patch, "mw": merge, "pw": patch}
        shape = (steps, h // merge, w // merge, merge, merge, channels, depth, patch, patch)
        pixels = torch.empty(shape, device=device)
        for step in range(steps):
            part = frames[[min(step * depth + i, count - 1) for i in range(depth)]].to(device)
            part = values.rescale_and_normalize(
                part, values.do_rescale, values.rescale_factor, values.do_normalize, values.image_mean, values.image_std
            )
            pixels[step] = rearrange(part, "d c (h mh ph) (w mw pw) -> h w mh mw c d ph pw", **sides)
        return pixels.view(steps * h * w, -1), [steps, h, w]

    def frame(self, value: Any, media_budget: MediaBudget = DEFAULT_BUDGET) -> Tensor:
        """One frame of a video that is pushed frame by frame: uint8 [3, height, width], resized as in a video."""
        pixels = torch.from_numpy(np.array(load_image(value, media_budget))).permute(2, 0, 1)
        size = self._frame_size
        return self._resize(pixels, *self.frame_pixels) if size is None else _scale(pixels, size)

    def grid_step(self, frames: list[Tensor]) -> tuple[Tensor, list[int]]:
        """Patches and grid [1, h, w] of the frames of one temporal patch; a missing last one is shown twice."""
        return self._patches(torch.stack(frames))

    def _size(self, budget: PixelBudget, known: tuple[int, int] | None) -> tuple[int, int] | None:
        """The height and width that a call asks for, else the known ones; None where limits decide."""
        return known if budget == PixelBudget() else budget.size(self.factor)

    def _check_sides(self, height: int, width: int, values: Any, what: str) -> None:
        """Raise ValueError for a size that cannot stay as it is, where the preprocessor files switch resizing off."""
        factor = values.patch_size * values.merge_size
        if height % factor or width % factor:
            raise ValueError(
                f"{what} has {width} x {height} pixels, and the preprocessor files say do_resize false: both must "
                f"then be multiples of {factor}; write do_resize true, or resize it"
            )

    def _resize(self, frame: Tensor, min_pixels: int, max_pixels: int) -> Tensor:
        """One frame uint8 [3, height, width] at the size that the model sees."""
        height, width = frame.shape[-2:]
        if not self.video_processor.do_resize:
            self._check_sides(height, width, self.video_processor, "a video frame")
            return frame.to(torch.uint8)
        return _scale(frame, self._target(height, width, min_pixels, max_pixels))

    def _target(self, height: int, width: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
        """The height and width of what the model sees, within the limits."""
        from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

        assert max(height, width) <= MAX_ASPECT_RATIO * min(height, width)
        h, w = smart_resize(height, width, factor=self.factor, min_pixels=min_pixels, max_pixels=max_pixels)
        return int(h), int(w)


def _scale(frame: Tensor, target: tuple[int, int]) -> Tensor:
    """A frame uint8 [3, height, width] at another height and width."""
    from torchvision.transforms.v2 import InterpolationMode
    from torchvision.transforms.v2.functional import resize

    if target == tuple(frame.shape[-2:]):
        return frame
    return resize(frame.to(torch.uint8), list(target), interpolation=InterpolationMode.BICUBIC, antialias=True)
