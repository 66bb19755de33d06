"""Images from files, bytes, arrays and PIL objects -> upright RGB pictures, checked before they are decoded."""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from omni.processing.sources import as_file, describe, is_source, open_source

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_PIXELS = 100_000_000  # decoded as RGB: 300 MB
MAX_ASPECT_RATIO = 200  # the released image processor's limit
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")


def load_image(value: Any) -> Image:
    """One picture as PIL RGB: EXIF orientation applied, transparency laid over white, grey and 16-bit converted.

    `value` is a path, address, data URI, bytes, PIL image, or an array [H, W], [H, W, C] or [C, H, W] (uint8, or float
    in 0..1 or 0..255). Raises FileNotFoundError, OSError or ValueError naming the medium.
    """
    from PIL import Image as pil

    name = describe(value)
    if not isinstance(value, pil.Image) and not is_source(value):
        return pil.fromarray(read_pixels(value, f"image {name}"))
    with nullcontext(value) if isinstance(value, pil.Image) else _open(value, name) as picture:
        check_size(picture.height, picture.width, f"image {name}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _upright_rgb(picture, name)


def check_size(height: int, width: int, name: str) -> None:
    """Raise ValueError for pictures too large to decode, empty, or too long and thin for the model."""
    if height < 1 or width < 1:
        raise ValueError(f"{name} is {width} x {height} pixels; it must have at least one")
    if height * width > MAX_PIXELS:
        raise ValueError(f"{name} is {width} x {height} pixels, more than the limit of {MAX_PIXELS:,}; make it smaller")
    if max(height, width) > MAX_ASPECT_RATIO * min(height, width):
        raise ValueError(
            f"{name} is {width} x {height} pixels; one side may be at most {MAX_ASPECT_RATIO} times the other, crop it"
        )


def read_pixels(value: Any, name: str) -> np.ndarray:
    """An array of one picture as uint8 [H, W, 3]."""
    try:
        array = _from_tensor(value) if isinstance(value, Tensor) else np.asarray(value)
    except (TypeError, ValueError, RuntimeError) as error:  # RuntimeError: a tensor without data, on the meta device
        raise TypeError(f"{name} cannot be read as an array: {error}") from error
    if array.dtype.kind not in "biuf" or array.ndim not in (2, 3):
        raise TypeError(
            f"{name} must be a path, address, bytes, PIL image or an array [H, W], [H, W, C] or [C, H, W], "
            f"got {type(value).__name__} of shape {list(array.shape)}"
        )
    if array.ndim == 3 and array.shape[-1] not in (1, 2, 3, 4) and array.shape[0] in (1, 2, 3, 4):
        array = array.transpose(1, 2, 0)
    array = array[..., None] if array.ndim == 2 else array
    if array.shape[-1] not in (1, 2, 3, 4):
        raise ValueError(f"{name} must have 1 to 4 channels, got shape {list(array.shape)}")
    check_size(array.shape[0], array.shape[1], name)
    array = _to_bytes(array, name)
    if array.shape[-1] in (2, 4):  # the last channel is opacity: lay over white
        alpha = array[..., -1:].astype(np.float32) / 255
        array = np.rint(array[..., :-1] * alpha + 255 * (1 - alpha)).astype(np.uint8)
    return np.ascontiguousarray(np.broadcast_to(array, (*array.shape[:2], 3)))


def _from_tensor(value: Tensor) -> np.ndarray:
    value = value.detach().cpu()
    return (value.float() if value.is_floating_point() else value).numpy()  # numpy has no bfloat16


def _to_bytes(array: np.ndarray, name: str) -> np.ndarray:
    if array.dtype == np.uint8:
        return array
    if array.dtype == np.uint16:
        return np.rint(array / 257).astype(np.uint8)
    if array.dtype == bool:
        return array.astype(np.uint8) * 255
    if not np.isfinite(array).all():
        raise ValueError(f"{name} holds NaN or infinite pixels")
    low, high = float(array.min()), float(array.max())
    if low < 0 or high > 255:
        raise ValueError(f"{name} has pixels in {low:g}..{high:g}; give uint8, or floats in 0..1 or 0..255")
    if np.issubdtype(array.dtype, np.floating) and high <= 1:
        array = array * 255
    return np.rint(array).astype(np.uint8)


def _open(value: Any, name: str) -> Image:
    """Open a file and read its header only."""
    from PIL import Image as pil

    source = open_source(value, "image")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # sizes are checked below; damaged EXIF data does not matter
            return pil.open(as_file(source), formats=_FORMATS)
    except pil.DecompressionBombError as error:
        raise ValueError(
            f"image {name} has more pixels than the limit of {MAX_PIXELS:,}; make it smaller ({error})"
        ) from error
    except Exception as error:  # each format's reader raises its own classes
        reason = "no known format" if isinstance(error, pil.UnidentifiedImageError) else error
        raise ValueError(f"image {name} cannot be read; it must be png, jpeg or webp ({reason})") from error


def _upright_rgb(picture: Image, name: str) -> Image:
    from PIL import Image as pil
    from PIL import ImageOps

    try:
        picture = ImageOps.exif_transpose(picture)
        if picture.mode.startswith("I;16"):
            return pil.fromarray(read_pixels(np.asarray(picture).astype(np.uint16), f"image {name}"))
        if picture.mode in ("I", "F"):
            values = np.asarray(picture)
            wide = picture.mode == "I" and values.max(initial=0) > 255  # a 16-bit PNG opened as 32-bit integers
            values = values.clip(0, 65535).astype(np.uint16) if wide else values
            return pil.fromarray(read_pixels(values, f"image {name}"))
        if picture.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in picture.info:
            layer = picture.convert("RGBA")
            white = pil.new("RGBA", layer.size, (255, 255, 255, 255))
            return pil.alpha_composite(white, layer).convert("RGB")
        return picture.convert("RGB")
    except Exception as error:  # each format's reader raises its own classes
        raise ValueError(f"image {name} is damaged and cannot be decoded ({error})") from error
