"""Draws the pictures and clips of the small world: coloured shapes on a plain ground, a digit, a shape that moves."""

from __future__ import annotations

import math
import random
from pathlib import Path

import av
import numpy as np
from PIL import Image, ImageDraw, ImageFont
from world import Clip, Picture

SIZE = 128  # pixels of a side
CLIP_FPS = 8
CLIP_SECONDS = 2.0  # of clips without sound; others last as long as it
SOUND_RATE_HZ = 16_000
_FINER = 2  # drawn larger, then made smaller: smooth edges
_RGB = {
    "red": (214, 40, 40),
    "green": (40, 160, 70),
    "blue": (40, 80, 210),
    "yellow": (245, 205, 40),
    "purple": (140, 50, 170),
    "orange": (245, 130, 30),
}


def draw_picture(picture: Picture) -> Image.Image:
    """RGB, SIZE x SIZE."""
    rng = random.Random(picture.seed)
    image, draw = _canvas(rng)
    cell = SIZE * _FINER / 3
    for item in picture.items:
        radius = cell * rng.uniform(0.3, 0.44)
        slack = cell / 2 - radius
        x = (item.cell % 3 + 0.5) * cell + rng.uniform(-slack, slack)
        y = (item.cell // 3 + 0.5) * cell + rng.uniform(-slack, slack)
        color = _shade(item.color, rng)
        if item.shape.isdigit():
            _draw_digit(draw, item.shape, color, rng)
        else:
            _draw_shape(draw, item.shape, color, x, y, radius)
    return image.resize((SIZE, SIZE), Image.Resampling.BOX)


def draw_clip(clip: Clip, seconds: float) -> list[Image.Image]:
    """The frames of a clip, CLIP_FPS a second: the shape crosses about half of the picture."""
    rng = random.Random(clip.seed)
    start = rng.getstate()
    radius, places = track(clip, seconds, rng)
    color = _shade(clip.color, rng)
    frames = []
    for x, y in places:
        rng.setstate(start)
        image, draw = _canvas(rng)
        _draw_shape(draw, clip.shape, color, x * image.width, y * image.width, radius * image.width)
        frames.append(image.resize((SIZE, SIZE), Image.Resampling.BOX))
    return frames


def track(clip: Clip, seconds: float, rng: random.Random) -> tuple[float, list[tuple[float, float]]]:
    """The shape's radius and where its middle is in each frame, x and y, all in 0 .. 1 of the picture's side."""
    radius = rng.uniform(0.11, 0.18)
    across = rng.uniform(radius * 1.2, 1 - radius * 1.2)
    first, last = radius * 1.2 + rng.uniform(0, 0.15), 1 - radius * 1.2 - rng.uniform(0, 0.15)
    if clip.direction in ("to the left", "up"):
        first, last = last, first
    total = max(2, round(seconds * CLIP_FPS))
    along = [first + (last - first) * number / (total - 1) for number in range(total)]
    sideways = clip.direction.startswith("to")
    return radius, [(place, across) if sideways else (across, place) for place in along]


def write_clip(path: Path, frames: list[Image.Image], sound: np.ndarray | None) -> None:
    """H.264 in MP4, of even sides, with the sound [n] at SOUND_RATE_HZ as AAC if there is any."""
    with av.open(str(path), "w") as container:
        video = container.add_stream("h264", rate=CLIP_FPS, options={"crf": "20", "preset": "veryfast"})
        video.width, video.height = frames[0].size
        video.pix_fmt = "yuv420p"
        audio = container.add_stream("aac", rate=SOUND_RATE_HZ, layout="mono") if sound is not None else None
        for frame in frames:
            container.mux(video.encode(av.VideoFrame.from_image(frame)))
        container.mux(video.encode(None))
        if audio is not None and sound is not None:
            heard = av.AudioFrame.from_ndarray(sound[None].astype(np.float32), format="fltp", layout="mono")
            heard.sample_rate = SOUND_RATE_HZ
            container.mux(audio.encode(heard))
            container.mux(audio.encode(None))


def _canvas(rng: random.Random) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    light = rng.randint(205, 255)
    background = tuple(min(255, light + rng.randint(-8, 8)) for _ in range(3))
    image = Image.new("RGB", (SIZE * _FINER, SIZE * _FINER), background)
    return image, ImageDraw.Draw(image)


def _shade(color: str, rng: random.Random) -> tuple[int, ...]:
    return tuple(max(0, min(255, value + rng.randint(-18, 18))) for value in _RGB[color])


def _draw_shape(
    draw: ImageDraw.ImageDraw, shape: str, color: tuple[int, ...], x: float, y: float, radius: float
) -> None:
    if shape == "circle":
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=color)
    elif shape == "square":
        half = radius * 0.86
        draw.rectangle((x - half, y - half, x + half, y + half), fill=color)
    else:
        draw.polygon(_corners(shape, x, y, radius), fill=color)


def _corners(shape: str, x: float, y: float, radius: float) -> list[tuple[float, float]]:
    if shape == "triangle":
        radii, count = [radius * 1.1], 3
    else:  # a star with five points
        radii, count = [radius * 1.15, radius * 0.48], 10
    angles = [-math.pi / 2 + 2 * math.pi * i / count for i in range(count)]
    return [
        (x + radii[i % len(radii)] * math.cos(angle), y + radii[i % len(radii)] * math.sin(angle))
        for i, angle in enumerate(angles)
    ]


def _draw_digit(draw: ImageDraw.ImageDraw, digit: str, color: tuple[int, ...], rng: random.Random) -> None:
    side = SIZE * _FINER
    font = ImageFont.load_default(side * rng.uniform(0.45, 0.8))
    x, y = side / 2 + rng.uniform(-0.08, 0.08) * side, side / 2 + rng.uniform(-0.08, 0.08) * side
    draw.text((x, y), digit, fill=color, font=font, anchor="mm")
