"""Colours as people name them: the shades that nearly everyone would call so, and how different two colours look.

The ranges are boxes in OKLCH (Ottosson, 2020): lightness 0..1, chroma 0..0.32, hue in degrees, a space in which equal
distances look equally different. Between the ranges of two names there is room: shades that people argue about are
drawn as grounds only. RGB values are 0..255 of sRGB.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable

RGB = tuple[int, int, int]
Box = tuple[float, float, float, float, float, float]  # lightness, chroma and hue, from and to

COLORS = ("red", "green", "blue", "yellow", "purple", "orange", "pink", "brown", "black", "white", "grey")
RANGES: dict[str, tuple[Box, ...]] = {
    "red": ((0.53, 0.64, 0.19, 0.26, 16, 31),),
    "green": ((0.38, 0.62, 0.10, 0.24, 136, 158), (0.62, 0.88, 0.13, 0.30, 136, 156)),
    "blue": ((0.27, 0.45, 0.14, 0.32, 250, 268), (0.45, 0.72, 0.11, 0.32, 238, 268)),
    "yellow": ((0.84, 0.97, 0.14, 0.22, 91, 111),),
    "purple": ((0.34, 0.62, 0.13, 0.30, 298, 318), (0.34, 0.52, 0.14, 0.26, 318, 330)),
    "orange": ((0.68, 0.80, 0.14, 0.20, 51, 72),),
    "pink": ((0.72, 0.89, 0.07, 0.22, 342, 368), (0.65, 0.76, 0.18, 0.27, 346, 360)),
    "brown": ((0.32, 0.50, 0.06, 0.12, 45, 70), (0.40, 0.49, 0.08, 0.13, 32, 45), (0.46, 0.50, 0.15, 0.162, 24, 27)),
    "black": ((0.0, 0.24, 0.0, 0.015, 0, 360),),
    "white": ((0.955, 1.0, 0.0, 0.012, 0, 360),),
    "grey": ((0.46, 0.78, 0.0, 0.012, 0, 360),),
}
# What is meant by the plain words on a screen; each lies in its range, and is drawn often.
USUAL: dict[str, tuple[RGB, ...]] = {
    "red": ((255, 0, 0), (220, 20, 60)),
    "green": ((0, 128, 0), (0, 255, 0), (34, 139, 34)),
    "blue": ((0, 0, 255), (30, 144, 255)),
    "yellow": ((255, 255, 0), (255, 215, 0)),
    "purple": ((128, 0, 128), (148, 0, 211)),
    "orange": ((255, 165, 0), (255, 140, 0)),
    "pink": ((255, 192, 203), (255, 105, 180), (255, 20, 147)),
    "brown": ((139, 69, 19), (165, 42, 42)),
    "black": ((0, 0, 0),),
    "white": ((255, 255, 255),),
    "grey": ((128, 128, 128), (169, 169, 169)),
}
_USUALLY = 0.25


def oklab(color: RGB) -> tuple[float, float, float]:
    """Lightness, green to red, blue to yellow."""
    r, g, b = (_linear(value / 255) for value in color)
    long = (0.4122214708 * r + 0.5363325363 * g + 0.0514459929 * b) ** (1 / 3)
    middle = (0.2119034982 * r + 0.6806995451 * g + 0.1073969566 * b) ** (1 / 3)
    short = (0.0883024619 * r + 0.2817188376 * g + 0.6299787005 * b) ** (1 / 3)
    return (
        0.2104542553 * long + 0.7936177850 * middle - 0.0040720468 * short,
        1.9779984951 * long - 2.4285922050 * middle + 0.4505937099 * short,
        0.0259040371 * long + 0.7827717662 * middle - 0.8086757660 * short,
    )


def oklch(color: RGB) -> tuple[float, float, float]:
    """Lightness, chroma, hue 0..360."""
    lightness, a, b = oklab(color)
    return lightness, math.hypot(a, b), math.degrees(math.atan2(b, a)) % 360


def rgb_of(lightness: float, chroma: float, hue: float) -> RGB | None:
    """The colour of a place in OKLCH; None where sRGB has none."""
    a, b = chroma * math.cos(math.radians(hue)), chroma * math.sin(math.radians(hue))
    long = (lightness + 0.3963377774 * a + 0.2158037573 * b) ** 3
    middle = (lightness - 0.1055613458 * a - 0.0638541728 * b) ** 3
    short = (lightness - 0.0894841775 * a - 1.2914855480 * b) ** 3
    linear = (
        4.0767416621 * long - 3.3077115913 * middle + 0.2309699292 * short,
        -1.2684380046 * long + 2.6097574011 * middle - 0.3413193965 * short,
        -0.0041960863 * long - 0.7034186147 * middle + 1.7076147010 * short,
    )
    if min(linear) < -0.002 or max(linear) > 1.005:
        return None
    r, g, b = (round(255 * _gamma(min(1.0, max(0.0, value)))) for value in linear)
    return r, g, b


def distance(one: RGB, other: RGB) -> float:
    """How different two colours look: 0 for the same, 1 from black to white; 0.02 is just seen side by side."""
    return math.dist(oklab(one), oklab(other))


def apart(color: RGB, others: Iterable[RGB]) -> float:
    """Distance to the nearest of others."""
    return min(distance(color, other) for other in others)


def mixed(one: RGB, other: RGB, share: float) -> RGB:
    """So much of the other colour in the one, as pixels are blended."""
    r, g, b = (round(a + (b - a) * share) for a, b in zip(one, other))
    return r, g, b


def shade(name: str, rng: random.Random) -> RGB:
    """Any colour of that name."""
    if rng.random() < _USUALLY:
        return rng.choice(USUAL[name])
    return _within(rng.choice(RANGES[name]), rng)


def any_color(rng: random.Random) -> RGB:
    """Any colour, with or without a name that people agree on."""
    return _within((0.15, 0.97, 0.0, rng.choice((0.04, 0.12, 0.3)), 0, 360), rng)


def grey(rng: random.Random, darkest: float, lightest: float) -> RGB:
    """Hardly coloured, of a lightness in a range."""
    return _within((darkest, lightest, 0.0, 0.008, 0, 360), rng)


def near(color: RGB, rng: random.Random, least: float, most: float) -> RGB:
    """Another shade of the same hue, about so far away; black and white have shades on one side only."""
    lightness, chroma, hue = oklch(color)
    for _ in range(20):
        step = rng.uniform(least, most) * rng.choice((-1, 1))
        found = rgb_of(min(1.0, max(0.0, lightness + step)), chroma * rng.uniform(0.6, 1.0), hue)
        if found is not None and distance(found, color) > least / 2:
            return found
    return color


def is_named(color: RGB, name: str, slack: float = 0.0) -> bool:
    """Whether a colour lies in the range of a name, or so little outside that rounding may have moved it.

    slack: in lightness and chroma; a hue may be ten degrees off for every 0.01."""
    lightness, chroma, hue = oklch(color)
    if max(color) < 12:  # a step of one is far there, and not seen
        chroma = 0.0
    for low, high, dull, vivid, first, last in RANGES[name]:
        hue_slack = 1000 * slack + 1
        turned = (hue - first + hue_slack) % 360
        if (
            low - slack - 0.005 <= lightness <= high + slack + 0.005
            and dull - slack - 0.005 <= chroma <= vivid + slack + 0.005
            and (last - first >= 360 or turned <= last - first + 2 * hue_slack)
        ):
            return True
    return False


def _within(box: Box, rng: random.Random) -> RGB:
    low, high, dull, vivid, first, last = box
    for _ in range(1000):
        found = rgb_of(rng.uniform(low, high), rng.uniform(dull, vivid), rng.uniform(first, last))
        if found is not None:
            return found
    raise ValueError(f"sRGB has no colour in {box}")


def _linear(value: float) -> float:
    return value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4


def _gamma(value: float) -> float:
    return value * 12.92 if value <= 0.0031308 else 1.055 * value ** (1 / 2.4) - 0.055
