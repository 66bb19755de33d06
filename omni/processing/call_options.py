"""What a call of the processor asks of all its media, checked."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from omni.config.keywords import nearest
from omni.encoders.checks import check_seconds
from omni.encoders.mel import LEVELS
from omni.processing.media_budget import DEFAULT_BUDGET, MediaBudget
from omni.processing.vision import PixelBudget


@dataclass(frozen=True)
class CallOptions:
    """What a call asks of all its media; an item's own options win."""

    use_audio_in_video: bool | None = None
    fps: float | None = None
    min_pixels: int | None = None
    max_pixels: int | None = None
    total_pixels: int | None = None
    max_frames: int | None = None
    mel_level: str = "clip"
    audio_chunk_s: float | None = None
    audio_window_s: float | None = None
    device: torch.device | None = None
    media_budget: MediaBudget = DEFAULT_BUDGET

    def __post_init__(self) -> None:
        if self.use_audio_in_video is not None and not isinstance(self.use_audio_in_video, bool):
            raise TypeError(f"use_audio_in_video must be None, True or False, got {self.use_audio_in_video!r}")
        if not isinstance(self.media_budget, MediaBudget):
            raise TypeError(f"media_budget must be a MediaBudget, got {self.media_budget!r}")
        if self.mel_level not in LEVELS:
            raise ValueError(f"unknown mel_level {self.mel_level!r}; {nearest(str(self.mel_level), LEVELS)}")
        for name in ("audio_chunk_s", "audio_window_s"):
            if (seconds := getattr(self, name)) is not None:
                check_seconds(seconds, name)
                if not 0 < seconds < math.inf:
                    raise ValueError(f"{name} must be a positive number of seconds or None, got {seconds!r}")

    def budget(self, options: Mapping[str, Any]) -> PixelBudget:
        names = ("min_pixels", "max_pixels", "total_pixels", "resized_height", "resized_width")
        return PixelBudget(*(options.get(name, getattr(self, name, None)) for name in names))


def usable(device: torch.device | str | None) -> torch.device | None:
    """The device, after one value was put there; ValueError if this machine does not have it."""
    if device is None:
        return None
    try:
        found = torch.device(device)
        torch.zeros(1, device=found).tolist()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"device {device!r} cannot be used here ({str(error).splitlines()[0]})") from error
    return found
