"""Images from files, bytes, arrays and PIL objects -> upright RGB pictures, checked before they are decoded."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from omni.processing.media_budget import DEFAULT_BUDGET, MediaBudget, RefusedError
from omni.processing.sources import as_file, describe, enough_memory, first_bytes, is_source, open_source, unpack

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_PIXELS = 100_000_000  # decoded as RGB: 300 MB
MAX_ASPECT_RATIO = 200  # the released image processor's limit
_STRIP_PIXELS = 1 << 22  # converted at once
_ORIENTATION = 0x0112  # EXIF
_FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000", "HEIF")
_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx")


def load_image(value: Any, budget: MediaBudget = DEFAULT_BUDGET) -> Image:
    """One picture as PIL RGB: EXIF orientation applied, transparency laid over white, grey and 16-bit converted.

    `value` is a path, address, data URI, bytes, a dict with `path` or `bytes`, a PIL image, or an array [H, W],
    [H, W, C] or [C, H, W] (uint8, or float in 0..1 or 0..255). Its pixels are counted before they are decoded.
    Raises FileNotFoundError, OSError or ValueError naming the medium.
    """
    from PIL import Image as pil

    value = unpack(value, "image")
    name = describe(value)
    if not isinstance(value, pil.Image) and not is_source(value):
        return pil.fromarray(read_pixels(value, f"image {name}", budget.pixels))
    opened = nullcontext(value) if isinstance(value, pil.Image) else _open(value, name)
    with enough_memory(f"image {name}"), opened as picture:
        check_size(picture.height, picture.width, f"image {name}", budget.pixels)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _upright_rgb(picture, name)


def check_size(height: int, width: int, name: str, most: int | None = None) -> None:
    """Raise ValueError for pictures too large to decode, empty, or too long and thin for the model.

    most: pixels (None: `MAX_PIXELS`).
    """
    most = MAX_PIXELS if most is None else most
    if height < 1 or width < 1:
        raise ValueError(f"{name} is {width} x {height} pixels; it must have at least one")
    if height * width > most:
        raise RefusedError(
            f"{name} is {width} x {height} pixels, more than the limit of {most:,}; make it smaller, or "
            "MediaBudget(pixels=…)"
        )
    if max(height, width) > MAX_ASPECT_RATIO * min(height, width):
        raise ValueError(
            f"{name} is {width} x {height} pixels; one side may be at most {MAX_ASPECT_RATIO} times the other, crop it"
        )


def read_pixels(value: Any, name: str, most: int | None = None) -> np.ndarray:
    """An array of one picture as uint8 [H, W, 3]; `most` as in `check_size`."""
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
    check_size(array.shape[0], array.shape[1], name, most)
    array = _to_bytes(array, name)
    if array.shape[-1] in (2, 4):
        array = _by_rows(array, _over_white, array.shape[-1] - 1)
    return np.ascontiguousarray(np.broadcast_to(array, (*array.shape[:2], 3)))


def _from_tensor(value: Tensor) -> np.ndarray:
    value = value.detach().cpu()
    return (value.float() if value.is_floating_point() else value).numpy()  # numpy has no bfloat16


def _by_rows(array: np.ndarray, convert: Callable[[np.ndarray], np.ndarray], channels: int) -> np.ndarray:
    """`convert` [H, W, C] -> uint8 [H, W, channels], some rows at a time: its floats would not fit for all of them."""
    out = np.empty((*array.shape[:2], channels), np.uint8)
    step = max(1, _STRIP_PIXELS // array.shape[1])
    for row in range(0, len(array), step):
        out[row : row + step] = convert(array[row : row + step])
    return out


def _over_white(array: np.ndarray) -> np.ndarray:
    """The last channel is opacity."""
    alpha = array[..., -1:].astype(np.float32) / 255
    return np.rint(array[..., :-1] * alpha + 255 * (1 - alpha)).astype(np.uint8)


def _to_bytes(array: np.ndarray, name: str) -> np.ndarray:
    if array.dtype == np.uint8:
        return array
    channels = array.shape[-1]
    if array.dtype == np.uint16:
        return _by_rows(array, lambda rows: np.rint(rows / 257).astype(np.uint8), channels)
    if array.dtype == bool:
        return array.astype(np.uint8) * 255
    if not np.isfinite(array).all():
        raise ValueError(f"{name} holds NaN or infinite pixels")
    low, high = float(array.min()), float(array.max())
    if low < 0 or high > 255:
        raise ValueError(f"{name} has pixels in {low:g}..{high:g}; give uint8, or floats in 0..1 or 0..255")
    scale = 255 if np.issubdtype(array.dtype, np.floating) and high <= 1 else 1
    return _by_rows(array, lambda rows: np.rint(rows * scale if scale > 1 else rows).astype(np.uint8), channels)


def _open(value: Any, name: str) -> Image:
    """Open a file and read its header only."""
    from PIL import Image as pil

    source = open_source(value, "image")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # sizes are checked below; damaged EXIF data does not matter
            if first_bytes(source, 12)[4:] in [b"ftyp" + brand for brand in _HEIF_BRANDS]:
                _register_heif(name)
            pil.init()
            return pil.open(as_file(source), formats=[form for form in _FORMATS if form in pil.OPEN])
    except pil.DecompressionBombError as error:
        raise ValueError(
            f"image {name} has more pixels than the limit of {MAX_PIXELS:,}; make it smaller ({error})"
        ) from error
    except (MemoryError, RefusedError):
        raise
    except Exception as error:  # each format's reader raises its own classes
        reason = "no known format" if isinstance(error, pil.UnidentifiedImageError) else error
        raise ValueError(
            f"image {name} cannot be read; it must be a picture, such as png, jpeg or webp ({reason})"
        ) from error


def _register_heif(name: str) -> None:
    try:
        from pillow_heif import register_heif_opener
    except ImportError as error:
        raise RefusedError(
            f"image {name} is HEIC, which needs another library: pip install pillow-heif, or save it as JPEG"
        ) from error
    register_heif_opener()


def _upright_rgb(picture: Image, name: str) -> Image:
    from PIL import Image as pil
    from PIL import ImageOps

    try:
        if picture.getexif().get(_ORIENTATION, 1) != 1:
            picture = ImageOps.exif_transpose(picture)
        if picture.mode.startswith("I;16"):
            return pil.fromarray(read_pixels(np.asarray(picture).astype(np.uint16), f"image {name}", 1 << 62))
        if picture.mode in ("I", "F"):
            values = np.asarray(picture)
            wide = picture.mode == "I" and values.max(initial=0) > 255  # a 16-bit PNG opened as 32-bit integers
            values = values.clip(0, 65535).astype(np.uint16) if wide else values
            return pil.fromarray(read_pixels(values, f"image {name}", 1 << 62))
        if picture.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in picture.info:
            return _laid_over_white(picture)
        picture.load()
        return picture if picture.mode == "RGB" else picture.convert("RGB")
    except MemoryError:
        raise
    except Exception as error:  # each format's reader raises its own classes
        raise ValueError(f"image {name} is damaged and cannot be decoded ({error})") from error


def _laid_over_white(picture: Image) -> Image:
    """A picture with transparency, some rows at a time: whole, its layers would take five times its memory."""
    from PIL import Image as pil

    picture.load()
    out = pil.new("RGB", picture.size)
    step = max(1, _STRIP_PIXELS // picture.width)
    for row in range(0, picture.height, step):
        layer = picture.crop((0, row, picture.width, min(row + step, picture.height))).convert("RGBA")
        white = pil.new("RGBA", layer.size, (255, 255, 255, 255))
        out.paste(pil.alpha_composite(white, layer).convert("RGB"), (0, row))
    return out
