"""What the encoders refuse, in the same words for a whole clip and for a piece of one, and in both model families."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from omni.config.encoders import VisionTransformerConfig

FRAMES_HZ = 100  # mel frames a second: 16 kHz, hop of 160 samples (released preprocessor config)
Grid = tuple[int, int, int]
_MAX_SAMPLE = 1e15  # the squares that a spectrum adds up must stay within fp32


def check_samples(samples: Tensor, first: int = 0) -> Tensor:
    """Samples [n] in fp32, after checking that they are floating, one-dimensional, finite and not absurdly large.

    `first` is the place of the first one in its clip, for the message. Raises TypeError or ValueError.
    """
    if not torch.is_floating_point(samples):
        raise TypeError(f"audio samples must be floating point in -1 .. 1, got {samples.dtype}; divide by full scale")
    if samples.dim() != 1:
        raise ValueError(f"audio must be one channel of samples [n], got shape {list(samples.shape)}; mix it down")
    samples = samples.float()
    if bool((samples.abs() <= _MAX_SAMPLE).all()):  # the one time that the host waits for the device
        return samples
    if not torch.isfinite(samples).all():
        bad = int((~torch.isfinite(samples)).nonzero()[0])
        raise ValueError(
            f"audio sample {first + bad} is {samples[bad].item()}; NaN and infinite samples cannot be encoded"
        )
    raise ValueError(f"audio samples reach {samples.abs().max():g}; scale them to -1 .. 1")


def check_open(finished: bool) -> None:
    """Raise ValueError for a clip whose end has been taken."""
    if finished:
        raise ValueError("this clip is finished and takes no more input; start the next one with init_state()")


def check_end(frames: int, finished: bool) -> None:
    """Raise ValueError for a clip that cannot end here: its end has been taken, or it has no frames."""
    check_open(finished)
    if not frames:
        raise ValueError("an audio clip of 0 mel frames has no tokens; it must have at least 1 frame")


def check_seconds(seconds: float, what: str = "an attention window") -> None:
    """Raise TypeError unless `what` is given as a number."""
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)):
        raise TypeError(f"{what} is a number of seconds, got {seconds!r}")


def chosen_chunk(seconds: float, own_frames: int, step_frames: int | None) -> int:
    """A chunk of so many seconds in mel frames: the checkpoint's own, or a shorter one of a multiple of `step_frames`.

    step_frames: None where there is no other chunk. Raises TypeError for what is not a number, ValueError for a chunk
    that is not to be had.
    """
    check_seconds(seconds, "a chunk of sound")
    frames = round(seconds * FRAMES_HZ) if math.isfinite(seconds) else 0
    exact = abs(frames / FRAMES_HZ - seconds) <= 1e-6 * abs(seconds)
    shorter = step_frames is not None and 0 < frames <= own_frames and frames % step_frames == 0
    if exact and (frames == own_frames or shorter):
        return frames
    own_s = own_frames / FRAMES_HZ
    if step_frames is None or step_frames > own_frames:
        raise ValueError(
            f"audio_chunk_s of {seconds:g} s is not possible: this encoder cuts sound into chunks of {own_s:g} s; "
            "leave it out"
        )
    step_s, most_s = step_frames / FRAMES_HZ, own_frames // step_frames * step_frames / FRAMES_HZ
    raise ValueError(
        f"audio_chunk_s of {seconds:g} s is not possible: a chunk is a positive multiple of {step_s:g} s up to "
        f"{most_s:g} s, or the checkpoint's own {own_s:g} s"
    )


def one_a_clip(name: str, value: int | Sequence[int] | Tensor | None, clips: int) -> list[int | None]:
    """A value for all clips, or one for each, as a list. Raises ValueError for another number of them."""
    if value is None or isinstance(value, int):
        return [value] * clips
    values: list[int | None] = [int(n) for n in (value.tolist() if isinstance(value, Tensor) else value)]
    if len(values) != clips:
        raise ValueError(f"{clips} audio clips need one {name}, or as many, got {len(values)}")
    return values


def check_frames(features: Tensor, num_mel_bins: int) -> None:
    """Raise ValueError unless a step's features are [M, n]."""
    if features.dim() != 2 or features.shape[0] != num_mel_bins:
        raise ValueError(
            f"audio features of a step must be [{num_mel_bins} mel bins, frames], got shape {list(features.shape)}"
        )


def check_clips(features: Tensor, lengths: Tensor | Sequence[int], num_mel_bins: int) -> list[int]:
    """The lengths of clips as a list, after checking them against the features [C, M, F]. Raises ValueError."""
    if features.dim() != 3 or features.shape[1] != num_mel_bins:
        raise ValueError(
            f"audio features must be [clips, {num_mel_bins} mel bins, frames], got shape {list(features.shape)}"
        )
    frames = [int(n) for n in (lengths.tolist() if isinstance(lengths, Tensor) else lengths)]
    if len(frames) != features.shape[0]:
        raise ValueError(f"{features.shape[0]} audio clips need as many lengths, got {len(frames)}")
    for clip, n in enumerate(frames):
        if not 1 <= n <= features.shape[2]:
            raise ValueError(f"length of audio clip {clip} is {n} mel frames; it must lie in 1..{features.shape[2]}")
    return frames


def check_patches(pixels: Tensor, grid_thw: Tensor, config: VisionTransformerConfig) -> list[Grid]:
    """The grids as numbers, after checking them against the pixel rows. Raises ValueError."""
    width = config.in_channels * config.temporal_patch_size * config.patch_size**2
    if pixels.dim() != 2 or pixels.shape[1] != width:
        raise ValueError(f"pixels must be patches [N, {width}], got shape {list(pixels.shape)}")
    if grid_thw.dim() != 2 or grid_thw.shape[1] != 3:
        raise ValueError(f"grid_thw must be [items, 3] of (t, h, w) in patches, got shape {list(grid_thw.shape)}")
    grids = [(int(t), int(h), int(w)) for t, h, w in grid_thw.tolist()]
    merge = config.spatial_merge_size
    for item, (t, h, w) in enumerate(grids):
        if min(t, h, w) < 1 or h % merge or w % merge:
            raise ValueError(
                f"grid {item} is (t, h, w) = ({t}, {h}, {w}); all must be positive, h and w multiples of {merge}"
            )
    patches = sum(t * h * w for t, h, w in grids)
    if patches != pixels.shape[0]:
        raise ValueError(f"the grids describe {patches} patches, but there are {pixels.shape[0]} pixel rows")
    return grids
