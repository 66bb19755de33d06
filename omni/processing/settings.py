"""Values of preprocessor files, checked before anything is built from them: what is wrong, or would silently not be
followed, is refused in words."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

SAMPLE_RATE = 16000  # of all sound inside the library
_LARGEST_PATCH = 256  # pixels; released: 14 and 16
_LARGEST_FFT = 1 << 16
_FILTERS = (*range(6), "nearest", "nearest-exact", "bilinear", "bicubic", "box", "hamming", "lanczos")
# Steps that other processors have and this one has not, with the values by which they do nothing.
_ABSENT: Mapping[str, Mapping[str, tuple[Any, ...]]] = {
    "audio": {"dither": (None, 0), "do_normalize": (None, False), "truncation": (None, True, False)},
    "image": {
        **{"do_center_crop": (None, False), "do_pad": (None, False), "crop_size": (None,), "pad_size": (None,)},
        **{
            "do_flip_channel_order": (None, False),
            "do_grayscale": (None, False),
            "do_sample_frames": (None, True, False),
        },
    },
}


def check_audio(values: Mapping[str, Any], where: str, *, own: bool) -> None:
    """Values of the mel front end. own: they stand apart from those for pictures. Raises ValueError."""
    rate = values.get("sampling_rate", SAMPLE_RATE)
    if rate != SAMPLE_RATE or isinstance(rate, bool):
        raise ValueError(
            f"{where}: sampling_rate {rate!r} is not supported: sound of any rate is brought to {SAMPLE_RATE} Hz, "
            f"which the audio encoders hear; write {SAMPLE_RATE}"
        )
    n_fft = _whole(values, "n_fft", 400, 2, _LARGEST_FFT, where)
    _whole(values, "hop_length", 160, 1, n_fft, where)
    _whole(values, "feature_size", 128, 1, n_fft, where)
    absent = _ABSENT["audio"] if own else {"dither": _ABSENT["audio"]["dither"]}
    _check_absent(values, absent, where)


def check_pixels(values: Mapping[str, Any], where: str) -> None:
    """Values for pictures or videos. Raises ValueError."""
    for name, usual in (("patch_size", 14), ("merge_size", 2), ("temporal_patch_size", 2)):
        _whole(values, name, usual, 1, _LARGEST_PATCH, where)
    for name in ("image_mean", "image_std"):
        channels = values.get(name)
        if channels is None:
            continue
        numbers = channels if isinstance(channels, (list, tuple)) else [channels] * 3
        if len(numbers) != 3 or not all(_is_number(v) and (v > 0 or name == "image_mean") for v in numbers):
            kind = "three numbers" if name == "image_mean" else "three positive numbers"
            raise ValueError(f"{where}: {name} must be {kind}, one a colour, got {channels!r}")
    for name in ("do_resize", "do_rescale", "do_normalize", "do_convert_rgb"):
        if values.get(name) is not None and not isinstance(values[name], bool):
            raise ValueError(f"{where}: {name} must be true or false, got {values[name]!r}")
    factor = values.get("rescale_factor")
    if factor is not None and not (_is_number(factor) and factor > 0):
        raise ValueError(f"{where}: rescale_factor must be a positive number, got {factor!r}")
    filter_ = values.get("resample")
    if filter_ is not None and (isinstance(filter_, bool) or filter_ not in _FILTERS):
        names = ", ".join(repr(name) for name in _FILTERS)
        raise ValueError(f"{where}: resample must be one of Pillow's filters, {names}, got {filter_!r}")
    given = values.get("size")
    size: Mapping[str, Any] = given if isinstance(given, Mapping) else {}
    for low, high, source in (("min_pixels", "max_pixels", values), ("shortest_edge", "longest_edge", size)):
        limits = [_whole(source, name, 1, 1, 1 << 40, where) for name in (low, high) if source.get(name) is not None]
        if len(limits) == 2 and limits[0] > limits[1]:
            raise ValueError(f"{where}: {low} {limits[0]} exceeds {high} {limits[1]}")
    _check_absent(values, _ABSENT["image"], where)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _whole(values: Mapping[str, Any], name: str, usual: int, least: int, most: int, where: str) -> int:
    value = values.get(name)
    value = usual if value is None else value
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise ValueError(f"{where}: {name} must be a whole number from {least} to {most}, got {value!r}")
    return value


def _check_absent(values: Mapping[str, Any], absent: Mapping[str, tuple[Any, ...]], where: str) -> None:
    for name, neutral in absent.items():
        if name in values and values[name] not in neutral:
            raise ValueError(
                f"{where}: {name} {values[name]!r} asks for a step that omni does not have; write {neutral[-1]!r}, or "
                "prepare the media yourself"
            )
