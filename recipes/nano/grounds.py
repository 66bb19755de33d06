"""What things are drawn on: plain colours, gradients, noise, textures, and a printed sheet that lies on a table.

Shapes: a ground is a picture fp32 [height, width, 3] of 0..255.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
import shades
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from shades import RGB

Pixels = NDArray[np.float32]
Quad = tuple[tuple[float, float], ...]  # corners of a sheet from the top left clockwise, in 0..1 of the picture's sides

KINDS = ("white", "black", "grey", "plain", "gradient", "noise", "texture", "photographed")
TEXTURES = ("stripes", "checks", "dots", "blotches", "squared paper", "wood", "cloth")
_FINEST = 640  # pixels of the longer side that noise and textures are made for; larger pictures show them enlarged
FARTHEST_CORNER = 0.08  # of a sheet from that of the picture, in either direction
_CORNERS = ((0, 0), (1, 0), (1, 1), (0, 1))
# How much a thing must differ from all colours of its ground, in `shades.distance`.
APART = {"white": 0.13, "black": 0.2, "grey": 0.17, "plain": 0.16, "gradient": 0.17, "noise": 0.21, "texture": 0.21,
         "photographed": 0.24}  # fmt: skip


@dataclass(frozen=True)
class Ground:
    """colors: one, or the two ends of a gradient, or those of a texture's parts; kind "photographed": of the sheet, or
    of what lies beneath where there is none. texture: of `TEXTURES`, "" for none; table: what a sheet lies on.
    grain: how strong noise is, of 255."""

    kind: str
    colors: tuple[RGB, ...]
    texture: str = ""
    grain: float = 0.0
    sheet: Quad | None = None
    table: Ground | None = None
    seed: int = 0

    def all_colors(self) -> list[RGB]:
        """Every colour that a thing must be told from."""
        if self.kind != "gradient":
            return list(self.colors)
        return [shades.mixed(*self.colors, share / 4) for share in range(5)]


def ground(kind: str, rng: random.Random) -> Ground:
    """Any ground of a kind."""
    seed = rng.getrandbits(32)
    if kind == "white":
        return Ground(kind, (rng.choice(((255, 255, 255), shades.grey(rng, 0.94, 1.0))),))
    if kind == "black":
        return Ground(kind, (rng.choice(((0, 0, 0), shades.grey(rng, 0.0, 0.25))),))
    if kind == "grey":
        return Ground(kind, (shades.grey(rng, 0.35, 0.9),))
    if kind == "plain":
        return Ground(kind, (_plain(rng),))
    if kind == "gradient":
        first = _plain(rng)
        second = shades.near(first, rng, 0.1, 0.45) if rng.random() < 0.5 else _plain(rng)
        return Ground(kind, (first, second), seed=seed)
    if kind == "noise":
        return Ground(kind, (_plain(rng),), grain=rng.uniform(10, 42), seed=seed)
    if kind == "texture":
        return _textured(kind, rng, 0.03, 0.16)
    if kind != "photographed":
        raise ValueError(f"ground {kind!r} is not one of {KINDS}")
    table = _textured("texture", rng, 0.02, 0.12)
    if rng.random() < 0.25:  # the things lie on the table themselves
        return Ground(kind, table.colors, table.texture, seed=seed)
    paper = shades.grey(rng, 0.88, 1.0) if rng.random() < 0.65 else _plain(rng)
    inset = [min(FARTHEST_CORNER, abs(rng.gauss(0, 0.035))) for _ in range(8)]
    sheet = tuple((x + (1 - 2 * x) * inset.pop(), y + (1 - 2 * y) * inset.pop()) for x, y in _CORNERS)
    return Ground(kind, (paper,), sheet=sheet, table=table, seed=seed)


def _plain(rng: random.Random) -> RGB:
    kind = rng.random()
    if kind < 0.25:
        return shades.grey(rng, 0.1, 1.0)
    return shades.any_color(rng) if kind < 0.6 else shades.shade(rng.choice(shades.COLORS), rng)


def _textured(kind: str, rng: random.Random, least: float, most: float) -> Ground:
    texture, seed = rng.choice(TEXTURES), rng.getrandbits(32)
    if texture == "wood":
        first = shades.rgb_of(rng.uniform(0.35, 0.8), rng.uniform(0.03, 0.08), rng.uniform(55, 80)) or (150, 110, 70)
    else:
        first = _plain(rng)
    return Ground(kind, (first, shades.near(first, rng, least, most)), texture, rng.uniform(0, 6), seed=seed)


def paint(what: Ground, width: int, height: int) -> Pixels:
    """The ground alone, without what a camera does to it."""
    rng = np.random.default_rng(what.seed)
    if what.table is not None:
        return _sheet_on_table(what, width, height)
    if what.kind == "gradient":
        share = _slope(rng, width, height)
    elif what.texture:
        share = _texture(what.texture, rng, width, height)
    else:
        share = None
    first = np.asarray(what.colors[0], np.float32)
    if share is None:
        pixels = np.empty((height, width, 3), np.float32)
        pixels[:] = first
    else:
        pixels = first + share[..., None] * (np.asarray(what.colors[1], np.float32) - first)
    if what.grain:
        pixels += grain(rng, width, height, what.grain, coarse=what.kind == "noise")
        np.clip(pixels, 0, 255, out=pixels)
    return pixels


def grain(rng: np.random.Generator, width: int, height: int, strength: float, *, coarse: bool = False) -> Pixels:
    """Noise [height, width, 3] of a standard deviation, often the same in all colours. coarse: grains of up to three
    pixels; in large pictures they are larger too."""
    size = max(1, round(max(width, height) / _FINEST), int(rng.integers(1, 4)) if coarse else 1)
    channels = 1 if rng.random() < 0.5 else 3
    shape = (-(-height // size), -(-width // size), channels)
    noise = rng.standard_normal(shape, dtype=np.float32) * np.float32(strength)
    if size > 1:
        noise = noise.repeat(size, axis=0).repeat(size, axis=1)[:height, :width]
    return noise if channels == 3 else np.broadcast_to(noise, (height, width, 3))


def smooth(rng: np.random.Generator, width: int, height: int, knots: int) -> Pixels:
    """Values [height, width] around 0.5 that change slowly: random knots, so many along a side, joined smoothly."""
    rows, columns = max(2, round(knots * min(1, height / width))), max(2, round(knots * min(1, width / height)))
    values = Image.fromarray(rng.random((rows, columns), dtype=np.float32))
    return np.clip(np.asarray(values.resize((width, height), Image.Resampling.BICUBIC)), 0, 1)


def _slope(rng: np.random.Generator, width: int, height: int) -> Pixels:
    """0..1 [height, width]: along any direction, or from a point outwards."""
    x, y = np.linspace(-1, 1, width, dtype=np.float32)[None], np.linspace(-1, 1, height, dtype=np.float32)[:, None]
    if rng.random() < 0.3:
        a, b = rng.uniform(-0.8, 0.8, 2).astype(np.float32)
        values = np.sqrt((x - a) ** 2 + (y - b) ** 2)
    else:
        angle = rng.uniform(0, 2 * np.pi)
        values = x * np.float32(np.cos(angle)) + y * np.float32(np.sin(angle))
    values -= values.min()
    return values / values.max()


def _texture(kind: str, rng: np.random.Generator, width: int, height: int) -> Pixels:
    """0..1 [height, width]: how much of the second colour."""
    smaller = max(1.0, max(width, height) / _FINEST)
    w, h = max(2, round(width / smaller)), max(2, round(height / smaller))
    share = _small_texture(kind, rng, w, h)
    if smaller > 1:
        share = np.asarray(Image.fromarray(share).resize((width, height), Image.Resampling.BILINEAR))
    return np.clip(share, 0, 1)


def _small_texture(kind: str, rng: np.random.Generator, width: int, height: int) -> Pixels:
    side = min(width, height)
    x, y = np.arange(width, dtype=np.float32)[None], np.arange(height, dtype=np.float32)[:, None]
    if kind == "blotches":
        first = smooth(rng, width, height, int(rng.integers(4, 30)))
        return (first + smooth(rng, width, height, int(rng.integers(10, 60)))) / 2 * 1.6 - 0.3
    if kind == "cloth":
        fine = np.float32(2 * np.pi / rng.uniform(3, 6))
        return 0.5 + 0.25 * np.sin(x * fine) + 0.25 * np.sin(y * fine)
    period = np.float32(side * rng.uniform(0.05, 0.25))
    angle = rng.choice((0.0, np.pi / 2, rng.uniform(0, np.pi)))
    cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    u, v = (x * cos + y * sin) / period, (y * cos - x * sin) / period
    if kind == "wood":
        bent = v + 0.6 * smooth(rng, width, height, 5) + 0.03 * np.sin(u)
        return 0.5 + 0.3 * np.sin(9 * bent) + 0.2 * np.sin(23 * bent)
    edge = period / 2  # values change from 0 to 1 within about two pixels
    if kind == "stripes":
        return _edged(np.sin(2 * np.pi * u) / np.pi, edge) if rng.random() < 0.7 else 0.5 + 0.5 * np.sin(2 * np.pi * u)
    if kind == "checks":
        return _edged(np.sin(np.pi * u) * np.sin(np.pi * v) / np.pi, edge)
    if kind == "dots":  # too small to be taken for circles that are meant
        u, v, period = u * 3, v * 3, period / 3
        radius = np.float32(rng.uniform(0.15, 0.35))
        away = np.sqrt((u % 1 - 0.5) ** 2 + (v % 1 - 0.5) ** 2)
        return _edged(radius - away, period)
    thin = np.float32(rng.uniform(0.6, 1.5)) / period  # squared paper, or ruled
    lines = np.abs(v % 1 - 0.5) if rng.random() < 0.4 else np.minimum(np.abs(u % 1 - 0.5), np.abs(v % 1 - 0.5))
    return _edged(thin - lines, period)


def _edged(values: Pixels, steepness: float) -> Pixels:
    return np.clip(0.5 + values * np.float32(steepness), 0, 1)


def _sheet_on_table(what: Ground, width: int, height: int) -> Pixels:
    """A sheet with its shadow on a table."""
    assert what.table is not None and what.sheet is not None
    rng = np.random.default_rng(what.seed)
    pixels = paint(what.table, width, height)
    finer = 2 if max(width, height) <= _FINEST else 1
    canvas = Image.new("L", (width * finer, height * finer), 0)
    ImageDraw.Draw(canvas).polygon([(x * width * finer, y * height * finer) for x, y in what.sheet], fill=255)
    sheet = np.asarray(canvas if finer == 1 else canvas.reduce(finer), np.float32)[..., None] / 255
    down, right = (int(side * rng.uniform(0, 0.02)) for side in (height, width))
    shadow = np.roll(sheet, (down, right), (0, 1)) * np.float32(rng.uniform(0, 0.5))
    paper = np.asarray(what.colors[0], np.float32)
    return pixels * (1 - shadow) * (1 - sheet) + sheet * paper
