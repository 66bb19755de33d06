"""What a camera makes of a picture: it looks from a side, the light is uneven, the lens soft, the sensor noisy.

Shapes: pixels fp32 [height, width, 3] of 0..255.
"""

from __future__ import annotations

import io
import math
from dataclasses import dataclass

import numpy as np
from grounds import Pixels, Quad, grain, smooth
from PIL import Image, ImageFilter

Slant = tuple[float, float, float, float]
_SOFTEST = 0.006  # of the shorter side: standard deviation of the lens' blur
_NOISIEST = 9.0  # of 255


@dataclass(frozen=True)
class Camera:
    """light: how much darker the darkest part is, 0..1; cast: a factor for each of red, green and blue; blur: standard
    deviation in parts of the shorter side; noise: of 255; seed: of where light falls and of the noise."""

    light: float
    cast: tuple[float, float, float]
    blur: float
    noise: float
    seed: int


def camera(seed: int) -> Camera:
    """Any camera in any room."""
    rng = np.random.default_rng(seed)
    warm = float(rng.normal(0, 0.025))
    cast = (1 + warm, 1 + float(rng.normal(0, 0.01)), 1 - warm)
    softness = float(rng.random() ** 2) * _SOFTEST
    return Camera(float(rng.uniform(0.05, 0.4)), cast, softness, float(rng.uniform(1, _NOISIEST)), seed)


def photograph(pixels: Pixels, by: Camera, frame: int = 0) -> Pixels:
    """The picture as that camera sees it. frame: of a clip, whose noise changes while the light does not."""
    rng = np.random.default_rng(by.seed)
    height, width = pixels.shape[:2]
    dark = 1 - smooth(rng, width, height, 3) * np.float32(by.light)
    exposure = np.asarray(by.cast, np.float32) * np.float32(rng.uniform(0.92, 1.12))
    seen = pixels * dark[..., None] * exposure
    deviation = by.blur * min(width, height)
    if deviation > 0.3:
        soft = Image.fromarray(to_bytes(seen)).filter(ImageFilter.GaussianBlur(deviation))
        seen = np.asarray(soft, np.float32)
    return seen + grain(np.random.default_rng([by.seed, frame]), width, height, by.noise)


def to_bytes(pixels: Pixels) -> np.ndarray:
    """uint8, without wrapping around."""
    return np.clip(pixels + np.float32(0.5), 0, 255).astype(np.uint8)


def as_jpeg(image: Image.Image, quality: int) -> Image.Image:
    """Written and read again."""
    kept = io.BytesIO()
    image.save(kept, "JPEG", quality=quality)
    return Image.open(kept).convert("RGB")


def slant_at(sheet: Quad, place: tuple[float, float]) -> Slant:
    """How a figure on a sheet looks at a place of the picture: the derivative of the sheet's projection there, of area
    one. Sheet and picture have the same aspect, so that it is the identity for a sheet that fills the picture."""
    m = projection(sheet)
    u, v, w = np.linalg.solve(m, np.array([*place, 1.0]))
    x, y, z = m @ np.array([u / w, v / w, 1.0])
    rows = [[(m[i, j] * z - at * m[2, j]) / z**2 for j in (0, 1)] for i, at in ((0, x), (1, y))]
    (a, b), (c, d) = rows
    size = math.sqrt(abs(a * d - b * c))
    return float(a / size), float(b / size), float(c / size), float(d / size)


def projection(sheet: Quad) -> np.ndarray:
    """[3, 3]: the unit square onto four corners, from the top left clockwise (Heckbert, 1989)."""
    (x0, y0), (x1, y1), (x2, y2), (x3, y3) = sheet
    dx, dy = x0 - x1 + x2 - x3, y0 - y1 + y2 - y3
    area = (x1 - x2) * (y3 - y2) - (x3 - x2) * (y1 - y2)
    g = (dx * (y3 - y2) - (x3 - x2) * dy) / area
    h = ((x1 - x2) * dy - dx * (y1 - y2)) / area
    return np.array([[x1 - x0 + g * x1, x3 - x0 + h * x3, x0], [y1 - y0 + g * y1, y3 - y0 + h * y3, y0], [g, h, 1.0]])
