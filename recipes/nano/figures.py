"""What is drawn: shapes, digits and things of other kinds, as masks of any size, turn and slant, with smooth edges.

A figure is lines in a square from -1 to 1, y downwards, or a glyph of a font. The size of a thing is the height of that
square, which every shape about fills. Masks are uint8 pictures, 255 inside.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from PIL import Image, ImageDraw, ImageFont

Point = tuple[float, float]
Slant = tuple[float, float, float, float]  # a 2 x 2 matrix, row by row: turns and slants a figure
SHAPES = ("circle", "square", "triangle", "star", "diamond", "pentagon", "heart", "cross")
OTHER = "other"  # any of
OTHERS = ("arrow", "moon", "letter", "scribble", "bolt", "spiral", "house", "tick", "hexagon")
LETTERS = "ABCDEFGHJKLMNPQRSUVWYZ&?%#@"  # none that is a shape: I, O, T, X
# Fonts that many machines have; those that are found are drawn with, beside the one that comes with Pillow.
_FONTS = (
    *("DejaVuSans.ttf", "DejaVuSans-Bold.ttf", "DejaVuSerif.ttf", "DejaVuSansMono.ttf", "LiberationSans-Regular.ttf"),
    *("LiberationSerif-Regular.ttf", "LiberationSerif-Bold.ttf", "LiberationMono-Regular.ttf"),
    *("LiberationSansNarrow-Bold.ttf", "LiberationSans-BoldItalic.ttf"),
)
_GLYPH_PIXELS = 160  # height of a glyph before it is brought to its size
_CURVE = 40  # points of a circle
_SEGMENTS = ("abcdef", "bc", "abged", "abgcd", "fgbc", "afgcd", "afgedc", "abc", "abcdefg", "abcdfg")
_SEGMENT_LINES = {
    "a": ((-0.5, -0.95), (0.5, -0.95)), "b": ((0.5, -0.95), (0.5, 0.0)), "c": ((0.5, 0.0), (0.5, 0.95)),
    "d": ((-0.5, 0.95), (0.5, 0.95)), "e": ((-0.5, 0.0), (-0.5, 0.95)), "f": ((-0.5, -0.95), (-0.5, 0.0)),
    "g": ((-0.5, 0.0), (0.5, 0.0)),
}  # fmt: skip


@dataclass(frozen=True)
class Figure:
    """Closed areas, or open strokes of a thickness, or a glyph of a font: one of them."""

    areas: tuple[tuple[Point, ...], ...] = ()
    strokes: tuple[tuple[Point, ...], ...] = ()
    thickness: float = 0.2
    glyph: str = ""
    font: str = ""
    bold: float = 0.0


def figure(shape: str, rng: random.Random) -> Figure:
    """A shape, a digit (its numeral) or something of another kind; rng: of proportions, fonts and what other kind."""
    if shape == OTHER or shape in OTHERS:
        return _other(rng.choice(OTHERS) if shape == OTHER else shape, rng)
    if shape.isdigit():
        if rng.random() < 0.08:
            lines = tuple(_SEGMENT_LINES[name] for name in _SEGMENTS[int(shape)])
            return Figure(strokes=lines, thickness=rng.uniform(0.14, 0.28))
        return _glyph(shape, rng)
    return Figure(areas=(tuple(_OUTLINES[shape](rng)),))


def usual_turn(shape: str, rng: random.Random) -> float:
    """By how many degrees a shape may be turned and still be called so: a square on its corner is a diamond."""
    if shape == "square":
        return rng.uniform(-30, 30)
    if shape not in SHAPES:
        return rng.uniform(-18, 18)
    if shape == "heart":
        return rng.gauss(0, 40)
    return rng.uniform(-10, 10) if shape == "diamond" else rng.uniform(-180, 180)


def mask(
    drawn: Figure, radius: float, slant: Slant, offset: Point, line: float | None, finer: int
) -> tuple[Image.Image, int]:
    """The mask of a figure, a square whose middle pixel's corner is the middle of the figure but for `offset`, and
    half its side. radius: half the size, in pixels; line: thickness of the outline in pixels where only that is drawn;
    finer: drawn so many times larger, then made smaller."""
    reach = math.ceil(radius * 1.5 * max(1.0, math.hypot(*slant) / 1.42) + (line or 0) / 2) + 2
    if drawn.glyph:
        return _glyph_mask(drawn, radius, slant, offset, reach), reach
    side = 2 * reach * finer
    canvas = Image.new("L", (side, side), 0)
    draw = ImageDraw.Draw(canvas)
    x0, y0 = ((reach + shift) * finer for shift in offset)
    a, b, c, d = (value * radius * finer for value in slant)

    def placed(points: tuple[Point, ...]) -> list[Point]:
        return [(x0 + a * x + b * y, y0 + c * x + d * y) for x, y in points]

    for points in map(placed, drawn.areas):
        if line is None:
            draw.polygon(points, fill=255)
        else:
            draw.line([*points, *points[:2]], fill=255, width=max(1, round(line * finer)), joint="curve")
    for points in map(placed, drawn.strokes):
        width = max(finer, round(drawn.thickness * radius * finer))
        draw.line(points, fill=255, width=width, joint="curve")
        for x, y in (points[0], points[-1]):
            draw.ellipse((x - width / 2, y - width / 2, x + width / 2, y + width / 2), fill=255)
    return (canvas if finer == 1 else canvas.reduce(finer)), reach


def _circle(rng: random.Random) -> list[Point]:
    return _round(_CURVE, [0.96])


def _square(rng: random.Random) -> list[Point]:
    half = 0.85
    return [(-half, -half), (half, -half), (half, half), (-half, half)]


def _triangle(rng: random.Random) -> list[Point]:
    if rng.random() < 0.6:
        return _round(3, [1.1])
    width, lean = rng.uniform(0.75, 1.1), rng.uniform(-0.5, 0.5)
    corners = [(lean, -1.1), (width, 0.7), (-width, 0.7)]
    x, y = (sum(corner[axis] for corner in corners) / 3 for axis in (0, 1))
    return [(a - x, b - y) for a, b in corners]


def _star(rng: random.Random) -> list[Point]:
    return _round(10, [1.12, 1.12 * rng.choice((0.382, rng.uniform(0.36, 0.55)))])


def _diamond(rng: random.Random) -> list[Point]:
    tall, wide = 1.08, 1.08 * rng.choice((1.0, rng.uniform(0.58, 0.85)))
    if rng.random() < 0.2:
        tall, wide = wide, tall
    return [(0, -tall), (wide, 0), (0, tall), (-wide, 0)]


def _pentagon(rng: random.Random) -> list[Point]:
    return _round(5, [1.04])


def _heart(rng: random.Random) -> list[Point]:
    plump = rng.uniform(0.92, 1.12)
    points = []
    for i in range(_CURVE):
        t = 2 * math.pi * i / _CURVE
        y = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
        points.append((16 * math.sin(t) ** 3 / 16 * plump, -(y + 2.4) / 14.5))
    return points


def _cross(rng: random.Random) -> list[Point]:
    a, w = 1.0, rng.uniform(0.24, 0.4)
    quarter = [(w, -a), (w, -w), (a, -w)]
    return [(x, y) for turn in range(4) for x, y in (_turned(point, 90 * turn) for point in quarter)]


_OUTLINES: dict[str, Callable[[random.Random], list[Point]]] = {
    "circle": _circle, "square": _square, "triangle": _triangle, "star": _star, "diamond": _diamond,
    "pentagon": _pentagon, "heart": _heart, "cross": _cross,
}  # fmt: skip


def _other(kind: str, rng: random.Random) -> Figure:
    if kind == "letter":
        return _glyph(rng.choice(LETTERS), rng)
    if kind == "scribble":
        points = [(rng.uniform(-0.9, 0.9), rng.uniform(-0.9, 0.9)) for _ in range(rng.randint(5, 9))]
        return Figure(strokes=(tuple(_smooth(points)),), thickness=rng.uniform(0.12, 0.24))
    if kind == "spiral":
        turns = [i / 60 for i in range(61)]
        line = tuple((0.95 * s * math.cos(16 * s), 0.95 * s * math.sin(16 * s)) for s in turns)
        return Figure(strokes=(line,), thickness=rng.uniform(0.12, 0.2))
    if kind == "tick":
        return Figure(strokes=(((-0.8, 0.1), (-0.25, 0.7), (0.85, -0.75)),), thickness=rng.uniform(0.2, 0.35))
    points = {
        "arrow": _arrow, "moon": _moon, "bolt": lambda _: list(_BOLT), "house": _house,
        "hexagon": lambda _: _round(6, [1.0]),
    }[kind](rng)  # fmt: skip
    quarter = 90 * rng.randrange(4) if kind == "arrow" else 0
    return Figure(areas=(tuple(_turned(point, quarter) for point in points),))


_BOLT = ((0.1, -1.0), (-0.6, 0.15), (-0.05, 0.15), (-0.3, 1.0), (0.6, -0.25), (0.05, -0.25), (0.45, -1.0))


def _arrow(rng: random.Random) -> list[Point]:
    shaft, head, neck = rng.uniform(0.16, 0.3), rng.uniform(0.55, 0.85), rng.uniform(-0.1, 0.3)
    return [(1, 0), (neck, -head), (neck, -shaft), (-1, -shaft), (-1, shaft), (neck, shaft), (neck, head)]


def _moon(rng: random.Random) -> list[Point]:
    depth, side = rng.uniform(0.35, 0.65), rng.choice((-1, 1))
    angles = [math.pi * (i / 20 - 0.5) for i in range(21)]
    outer = [(math.cos(a), math.sin(a)) for a in angles]
    inner = [(depth * math.cos(a), math.sin(a)) for a in reversed(angles)]
    return [(side * (x - 0.55) * 1.2, y) for x, y in outer + inner]


def _house(rng: random.Random) -> list[Point]:
    wall = rng.uniform(0.5, 0.75)
    return [(0, -1), (1, -0.1), (wall, -0.1), (wall, 0.95), (-wall, 0.95), (-wall, -0.1), (-1, -0.1)]


def _round(count: int, radii: list[float]) -> list[Point]:
    """Corners around the middle, the first one on top, on circles in turn."""
    angles = [-math.pi / 2 + 2 * math.pi * i / count for i in range(count)]
    return [(radii[i % len(radii)] * math.cos(a), radii[i % len(radii)] * math.sin(a)) for i, a in enumerate(angles)]


def _turned(point: Point, degrees: float) -> Point:
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return point[0] * cos - point[1] * sin, point[0] * sin + point[1] * cos


def _smooth(points: list[Point]) -> list[Point]:
    """A curve through points (Catmull and Rom)."""
    curve = []
    for before, a, b, after in zip(points, points[1:], points[2:], points[3:]):
        for step in range(8):
            t = step / 8
            curve.append(
                tuple(
                    0.5 * (2 * q + (r - p) * t + (2 * p - 5 * q + 4 * r - s) * t**2 + (3 * q - p - 3 * r + s) * t**3)
                    for p, q, r, s in zip(before, a, b, after)
                )
            )
    return curve  # type: ignore[return-value]  # pairs


# ---- glyphs ----


def _glyph(text: str, rng: random.Random) -> Figure:
    return Figure(glyph=text, font=rng.choice(fonts()), bold=rng.choice((0.0, 0.0, rng.uniform(0.02, 0.06))))


@cache
def fonts() -> tuple[str, ...]:
    """Names of the fonts to draw with; "" is Pillow's own."""
    found = [""]
    for name in _FONTS:
        try:
            ImageFont.truetype(name, 20)
        except OSError:
            continue
        found.append(name)
    return tuple(found)


@cache
def _font(name: str) -> ImageFont.FreeTypeFont:
    font = ImageFont.truetype(name, _GLYPH_PIXELS) if name else ImageFont.load_default(_GLYPH_PIXELS)
    assert isinstance(font, ImageFont.FreeTypeFont)
    return font


@cache
def _glyph_picture(text: str, font: str, bold: int) -> Image.Image:
    """The glyph alone, cut to its edges."""
    room = 2 * _GLYPH_PIXELS
    canvas = Image.new("L", (room, room), 0)
    middle = (room / 2, room / 2)
    ImageDraw.Draw(canvas).text(middle, text, fill=255, font=_font(font), anchor="mm", stroke_width=bold)
    box = canvas.getbbox()
    assert box is not None
    return canvas.crop(box)


def _glyph_mask(drawn: Figure, radius: float, slant: Slant, offset: Point, reach: int) -> Image.Image:
    picture = _glyph_picture(drawn.glyph, drawn.font, round(drawn.bold * _GLYPH_PIXELS))
    scale = 2 * radius / picture.height
    smaller = min(4, int(1 / scale)) if scale < 0.5 else 1
    if smaller > 1:
        picture = picture.reduce(smaller)
        scale = 2 * radius / picture.height
    a, b, c, d = (value * scale for value in slant)
    area = a * d - b * c
    a, b, c, d = d / area, -b / area, -c / area, a / area
    x, y = reach + offset[0], reach + offset[1]
    back = (a, b, picture.width / 2 - a * x - b * y, c, d, picture.height / 2 - c * x - d * y)
    size = (2 * reach, 2 * reach)
    return picture.transform(size, Image.Transform.AFFINE, back, Image.Resampling.BICUBIC)
