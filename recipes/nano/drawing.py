"""Draws pictures and clips of any size on any ground: `scenes` says what is where, this brings it to pixels.

    from drawing import draw_picture, draw_clip        # the same calls as of pictures.py

Things are drawn three times larger and made smaller, so that edges are smooth.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from figures import figure, mask
from grounds import Pixels, paint
from photographed import as_jpeg, photograph, to_bytes
from PIL import Image
from scenes import Clip, ClipScene, Picture, Scene, Thing, clip_scene_of, scene_of
from shades import RGB

CLIP_FPS = 8
CLIP_SECONDS = 2.0  # of clips without sound; others last as long as it
_FINER = 3
_LARGE_RADIUS = 120  # pixels; what is larger is drawn less finely
_EDGE = 0.045  # thickness of the line around a filled shape, in parts of its size


def draw_picture(picture: Picture) -> Image.Image:
    """RGB, of any size; the same for the same picture. Raises ValueError as `scenes.scene_of`."""
    return draw_scene(scene_of(picture))


def draw_scene(scene: Scene) -> Image.Image:
    """RGB, width x height."""
    pixels = paint(scene.ground, scene.width, scene.height)
    return _finished(_with_things(pixels, scene.things, scene), scene)


def draw_clip(clip: Clip, seconds: float) -> list[Image.Image]:
    """The frames of a clip, CLIP_FPS a second."""
    return clip_frames(clip_scene_of(clip), seconds)


def clip_frames(clip: ClipScene, seconds: float, numbers: Sequence[int] | None = None) -> list[Image.Image]:
    """Frames of a clip: all, or those with such numbers."""
    total = frame_count(seconds)
    ground = paint(clip.scene.ground, clip.scene.width, clip.scene.height)
    frames = []
    for number in range(total) if numbers is None else numbers:
        middle = clip.middle(number / (total - 1))
        pixels = _with_things(ground.copy(), clip.scene.things, clip.scene, middle)
        frames.append(_finished(pixels, clip.scene, number))
    return frames


def frame_count(seconds: float) -> int:
    """Frames of a clip that lasts so long."""
    return max(2, round(seconds * CLIP_FPS))


def _finished(pixels: Pixels, scene: Scene, frame: int = 0) -> Image.Image:
    if scene.camera is not None:
        pixels = photograph(pixels, scene.camera, frame)
    image = Image.fromarray(to_bytes(pixels))
    return as_jpeg(image, scene.jpeg) if scene.jpeg else image


def _with_things(
    pixels: Pixels, things: Sequence[Thing], scene: Scene, middle: tuple[float, float] | None = None
) -> Pixels:
    """Draws the things into the pixels. middle: where, if not where the scene says."""
    for thing in things:
        _draw_thing(pixels, thing, middle or thing.item.middle, scene.crisp)
    return pixels


def covered(thing: Thing, width: int, height: int, middle: tuple[float, float] | None = None) -> Pixels:
    """Which part of each pixel a thing covers, 0..1 [height, width]; also what lies inside a line."""
    pixels = np.zeros((height, width, 1), np.float32)
    filled = replace(thing, line=0.0, edge=None, item=replace(thing.item, shade=(1, 1, 1)))
    _draw_thing(pixels, filled, middle or thing.item.middle, crisp=False)
    return pixels[..., 0]


def _draw_thing(pixels: Pixels, thing: Thing, middle: tuple[float, float] | None, crisp: bool) -> None:
    item, (height, width) = thing.item, pixels.shape[:2]
    assert middle is not None and item.size is not None and item.shade is not None
    short = min(width, height)
    radius = item.size * short / 2
    drawn = figure(item.shape, random.Random(thing.seed))
    finer = 1 if crisp else _FINER if radius < _LARGE_RADIUS else 2
    x, y = middle[0] * width, middle[1] * height
    corner = int(x), int(y)
    offset = (x - corner[0], y - corner[1])
    line = max(1.5, thing.line * short) if thing.line else None
    inside, reach = mask(drawn, radius, thing.slant, offset, line, finer)
    _blend(pixels, item.shade, inside, corner, reach)
    if thing.edge is not None:
        edge, reach = mask(drawn, radius, thing.slant, offset, max(1.0, _EDGE * item.size * short), finer)
        _blend(pixels, thing.edge, edge, corner, reach)


def _blend(pixels: Pixels, color: RGB, inside: Image.Image, corner: tuple[int, int], reach: int) -> None:
    """Puts a colour where the mask says; what lies outside the picture is cut off."""
    height, width = pixels.shape[:2]
    left, top = corner[0] - reach, corner[1] - reach
    x0, y0, x1, y1 = max(0, left), max(0, top), min(width, left + 2 * reach), min(height, top + 2 * reach)
    if x0 >= x1 or y0 >= y1:
        return
    share = np.asarray(inside, np.float32)[y0 - top : y1 - top, x0 - left : x1 - left, None] / np.float32(255)
    part = pixels[y0:y1, x0:x1]
    part += share * (np.asarray(color[: pixels.shape[2]], np.float32) - part)
