"""What is in a picture or a clip, and where: from a short description to everything that is needed to draw it.

A description (`Picture`, `Clip`) says what can be asked about; whatever it leaves open, such as the ground, the size of
the picture and the exact place of a thing, is drawn from its seed. Lengths of things are in parts of the picture's
shorter side, places (x, y) in parts of its width and height; turns are in degrees, clockwise.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import shades
from figures import OTHER, SHAPES, Slant, usual_turn
from grounds import APART, FARTHEST_CORNER, KINDS, Ground, ground
from photographed import Camera, camera, slant_at
from shades import COLORS, RGB

ANYWHERE = -1  # a cell that is left open
RESTS = "still"  # a direction: the thing of a clip does not move
SMALLEST, LARGEST = 0.125, 0.85
_FEWEST_PIXELS = 14  # of a thing's size as drawn
_SEEN_PIXELS, _FEWEST_SEEN = 256 * 256, 22  # a model sees pictures of about so many; then a thing has no fewer
_USUAL_SIDES = (96, 128, 192, 224, 256, 256, 320, 384, 512)
# How often each kind of ground is drawn where none is asked for.
_OFTEN = {"white": 0.2, "black": 0.1, "grey": 0.08, "plain": 0.16, "gradient": 0.1, "noise": 0.09, "texture": 0.08,
          "photographed": 0.19}  # fmt: skip


@dataclass(frozen=True)
class Item:
    """One thing: a shape (or a digit, as its numeral, or "other") in a colour, at a cell 0..8 of a 3 x 3 grid: the one
    that its middle lies in. size: its height; outline: only its line is drawn."""

    shape: str
    color: str
    cell: int
    middle: tuple[float, float] | None = None
    size: float | None = None
    turn: float | None = None
    outline: bool | None = None
    shade: RGB | None = None


@dataclass(frozen=True)
class Picture:
    """Things on a ground (one of `grounds.KINDS`). pixels: width and height; jpeg: quality, 0 for no loss."""

    items: tuple[Item, ...]
    seed: int
    ground: str | None = None
    pixels: tuple[int, int] | None = None
    jpeg: int | None = None


@dataclass(frozen=True)
class Clip:
    """A thing that moves ("to the left", "to the right", "up", "down") or rests. said: words of the sound track."""

    shape: str
    color: str
    direction: str
    seed: int
    said: str | None = None
    ground: str | None = None
    pixels: tuple[int, int] | None = None
    size: float | None = None
    turn: float | None = None
    outline: bool | None = None


@dataclass(frozen=True)
class Thing:
    """All of an item. slant: its turn, and how a camera sees it; line: thickness of its outline, 0 where it is filled;
    edge: colour of a thin line around what is filled; seed: of its proportions."""

    item: Item
    slant: Slant
    line: float
    edge: RGB | None
    seed: int


@dataclass(frozen=True)
class Scene:
    """All of a picture. crisp: edges are not smoothed."""

    width: int
    height: int
    ground: Ground
    things: tuple[Thing, ...]
    camera: Camera | None
    jpeg: int
    crisp: bool

    @property
    def items(self) -> tuple[Item, ...]:
        """The things with all that the description left open."""
        return tuple(thing.item for thing in self.things)


def cell_of(middle: tuple[float, float]) -> int:
    """The cell of a 3 x 3 grid that a place lies in."""
    column, row = (min(2, int(3 * place)) for place in middle)
    return 3 * row + column


def scene_of(picture: Picture) -> Scene:
    """A picture with everything that it leaves open drawn from its seed: the same scene every time.

    Raises ValueError for colours that cannot be told from the ground that is asked for, and for things without room.
    """
    rng = random.Random(f"scene {picture.seed}")
    width, height = picture.pixels or any_pixels(rng)
    items = [_drawn_how(item, rng) for item in picture.items]
    items, on = _colored(items, picture.ground, rng)
    items = _placed(items, width, height, _margin(on), rng)
    things = tuple(_thing(item, on, width / height, rng) for item in items)
    by = camera(rng.getrandbits(32)) if on.kind == "photographed" else None
    jpeg = picture.jpeg
    if jpeg is None:
        jpeg = rng.randint(35, 92) if rng.random() < (0.8 if by else 0.25) else 0
    return Scene(width, height, on, things, by, jpeg, crisp=by is None and rng.random() < 0.08)


def any_pixels(rng: random.Random, largest: int = 2000) -> tuple[int, int]:
    """Width and height, from 64 pixels to `largest`, at most four times as long as short; large ones are rare."""
    longer = rng.choice(_USUAL_SIDES) if rng.random() < 0.4 else round(64 * (640 / 64) ** rng.random())
    if rng.random() < 0.02:
        longer = rng.randint(640, 2000)
    longer = min(longer, largest)
    if rng.random() < 0.4:
        return longer, longer
    shorter = max(64, round(longer / rng.choice((4 / 3, 3 / 2, 16 / 9, 4 ** rng.random(), 4 ** rng.random()))))
    return (shorter, longer) if rng.random() < 0.45 else (longer, shorter)


def random_picture(
    rng: random.Random,
    *,
    ground: str | None = None,
    count: int | None = None,
    size: tuple[float, float] | None = None,
    outline: bool | None = None,
    turned: bool | None = None,
    pixels: tuple[int, int] | None = None,
    shapes: Sequence[str] = (),
    colors: Sequence[str] = COLORS,
) -> Picture:
    """Any things at any places: of shapes (none given: all, digits and others too), of sizes from and to."""
    ground = ground or rng.choices(list(_OFTEN), list(_OFTEN.values()))[0]
    if count is None:
        count = rng.choices(range(7), (2, 9, 8, 6, 4, 2, 1))[0]
    for _ in range(200):
        items = tuple(_any_item(rng, size, outline, turned, shapes, colors) for _ in range(count))
        picture = Picture(items, rng.getrandbits(32), ground, pixels)
        try:
            scene_of(picture)
        except ValueError:
            continue
        return picture
    raise ValueError(f"found no picture of {count} things of sizes {size} and colours {colors} on a {ground} ground")


def _any_item(
    rng: random.Random,
    size: tuple[float, float] | None,
    outline: bool | None,
    turned: bool | None,
    shapes: Sequence[str],
    colors: Sequence[str],
) -> Item:
    kind = rng.random()
    if shapes:
        shape = rng.choice(shapes)
    else:
        shape = rng.choice(SHAPES) if kind < 0.78 else str(rng.randrange(10)) if kind < 0.9 else OTHER
    turn = None if turned is None else usual_turn(shape, rng) if turned else 0.0
    height = None if size is None else rng.uniform(*size)
    return Item(shape, rng.choice(colors), ANYWHERE, size=height, turn=turn, outline=outline)


def _drawn_how(item: Item, rng: random.Random) -> Item:
    """An item with outline and turn."""
    outline, turn = item.outline, item.turn
    if outline is None:
        outline = rng.random() < 0.22
    if turn is None:
        turn = usual_turn(item.shape, rng) if rng.random() < 0.55 else 0.0
    if item.shape.isdigit() or item.shape == OTHER:
        outline = False
    return replace(item, outline=outline, turn=turn)


def _colored(items: list[Item], kind: str | None, rng: random.Random) -> tuple[list[Item], Ground]:
    """Items with shades, and a ground that all of them can be told from."""
    for _ in range(60):
        on = ground(kind or rng.choices(list(_OFTEN), list(_OFTEN.values()))[0], rng)
        behind, found = on.all_colors(), []
        for item in items:
            least = APART[on.kind] * (1.25 if item.outline else 1.0)
            tries = [item.shade] if item.shade else [shades.shade(item.color, rng) for _ in range(4)]
            fit = [shade for shade in tries if shades.apart(shade, behind) >= least]
            if not fit:
                break
            found.append(replace(item, shade=fit[0]))
        else:
            return found, on
    colors = ", ".join(item.color for item in items)
    raise ValueError(f"things in {colors} cannot be told from any {kind or ''} ground; choose another of {KINDS}")


def _margin(on: Ground) -> float:
    return FARTHEST_CORNER + 0.01 if on.sheet else 0.01


def _placed(items: list[Item], width: int, height: int, margin: float, rng: random.Random) -> list[Item]:
    """Items with sizes and middles: in their cells, inside the picture, none touching another."""
    short = min(width, height)
    least = max(SMALLEST, _FEWEST_PIXELS / short, _FEWEST_SEEN / math.sqrt(_SEEN_PIXELS * short / max(width, height)))
    most = (LARGEST, LARGEST, 0.6, 0.48, 0.42, 0.36)[min(5, len(items))]
    for attempt in range(30):
        done: list[Item] = []
        for item in sorted(items, key=lambda item: -(item.size or 0)):
            size = item.size or least * (max(1.05, most * 0.93**attempt / least)) ** rng.random()
            for _ in range(25):
                middle = item.middle or _somewhere(item.cell, size, width, height, margin, rng)
                if middle is not None and all(_clear(middle, size, other, width, height) for other in done):
                    done.append(replace(item, size=size, middle=middle, cell=cell_of(middle)))
                    break
                if item.size is None:
                    size = max(least, size * 0.94)
            else:
                break
        if len(done) == len(items):
            rng.shuffle(done)
            return done
    raise ValueError(f"{len(items)} things do not fit into {width} x {height} pixels where they are asked for")


def _somewhere(
    cell: int, size: float, width: int, height: int, margin: float, rng: random.Random
) -> tuple[float, float] | None:
    """A place in a cell where a thing is inside the picture; None where there is none."""
    short, place = min(width, height), []
    for part, side in ((cell % 3, width), (cell // 3, height)):
        edge = margin + 0.53 * size * short / side
        low, high = (edge, 1 - edge) if cell == ANYWHERE else (max(edge, part / 3 + 0.02), 0)
        if cell != ANYWHERE:
            high = min(1 - edge, (part + 1) / 3 - 0.02)
        if low > high:
            return None
        place.append(rng.uniform(low, high))
    return place[0], place[1]


def _clear(middle: tuple[float, float], size: float, other: Item, width: int, height: int) -> bool:
    """Whether there is room between a thing and another."""
    assert other.middle is not None and other.size is not None
    away = math.hypot((middle[0] - other.middle[0]) * width, (middle[1] - other.middle[1]) * height)
    return away >= (0.6 * (size + other.size) + 0.02) * min(width, height)


def _thing(item: Item, on: Ground, aspect: float, rng: random.Random) -> Thing:
    assert item.turn is not None and item.middle is not None and item.size is not None
    turn = math.radians(item.turn)
    slant: Slant = (math.cos(turn), -math.sin(turn), math.sin(turn), math.cos(turn))
    if on.sheet is not None:
        a, b, c, d = slant_at(on.sheet, item.middle)
        e, f, g, h = slant
        b, c = b * aspect, c / aspect  # of pixels, not of parts of the sides
        slant = (a * e + b * g, a * f + b * h, c * e + d * g, c * f + d * h)
    line = max(0.013, item.size * rng.uniform(0.05, 0.12)) if item.outline else 0.0
    edge: RGB | None = None
    if not line and item.shape in SHAPES and rng.random() < 0.08:
        edge = rng.choice(((0, 0, 0), (40, 40, 40), shades.near(item.shade or (0, 0, 0), rng, 0.08, 0.2)))
    return Thing(item, slant, line, edge, rng.getrandbits(32))


# ---- what is asked about ----

_GROUNDS = {"plain": None, "noisy": "noise", "photo": "photographed"}  # of talk.shapes; plain: nobody asks for it


def from_talk(told: Any) -> Picture:
    """A picture (`talk.turns.Picture`, `world.Picture`): its things in their cells, its ground, and which things are
    lines; all else is left open. On another ground where the colours could not be told from that one."""
    items = tuple(Item(i.shape, i.color, i.cell, outline=getattr(i, "outline", None)) for i in told.items)
    ground = getattr(told, "ground", None)
    for kind in (_GROUNDS.get(ground, ground), None):
        for change in range(20):
            picture = Picture(items, told.seed + (change << 32), kind)
            try:
                scene_of(picture)
            except ValueError:
                continue
            return picture
    raise ValueError(f"found no way to draw {told}")


def clip_from_talk(told: Any) -> Clip:
    """A clip (`talk.turns.Clip`, `world.Clip`), as `from_talk`."""
    ground = getattr(told, "ground", None)
    for kind in (_GROUNDS.get(ground, ground), None):
        for change in range(20):
            clip = Clip(told.shape, told.color, told.direction, told.seed + (change << 32), told.said, kind,
                        outline=getattr(told, "outline", None))  # fmt: skip
            try:
                clip_scene_of(clip)
            except ValueError:
                continue
            return clip
    raise ValueError(f"found no way to draw {told}")


# ---- clips ----


@dataclass(frozen=True)
class ClipScene:
    """The scene of a clip, whose one thing is where it begins, and where it ends."""

    scene: Scene
    end: tuple[float, float]

    def middle(self, share: float) -> tuple[float, float]:
        """Where the thing is after a share 0..1 of the time."""
        start = self.scene.items[0].middle
        assert start is not None
        return start[0] + (self.end[0] - start[0]) * share, start[1] + (self.end[1] - start[1]) * share


def clip_scene_of(clip: Clip) -> ClipScene:
    """A clip with everything that it leaves open drawn from its seed. Sides are even. Raises as `scene_of`."""
    rng = random.Random(f"clip {clip.seed}")
    pixels = clip.pixels or rng.choice(((128, 128), (192, 192), (224, 224), (256, 256), (320, 240), (256, 144),
                                        (320, 180), (144, 256), (240, 320), (480, 360)))  # fmt: skip
    size = clip.size or rng.uniform(0.16, 0.4)
    start, end = _track(clip.direction, size, pixels, rng)
    item = Item(clip.shape, clip.color, ANYWHERE, start, size, clip.turn, clip.outline)
    scene = scene_of(Picture((item,), rng.getrandbits(32), clip.ground, pixels, jpeg=0))
    return ClipScene(scene, end)


def random_clip(rng: random.Random, **conditions: str | float | bool | None) -> Clip:
    """Any shape that moves in any direction, or rests. conditions: fields of the clip."""
    for _ in range(200):
        direction = rng.choice(("to the left", "to the right", "up", "down", RESTS))
        kind = rng.choices(list(_OFTEN), list(_OFTEN.values()))[0]
        clip = Clip(rng.choice(SHAPES), rng.choice(COLORS), direction, rng.getrandbits(32), ground=kind)
        clip = replace(clip, **conditions)  # type: ignore[arg-type]
        try:
            clip_scene_of(clip)
        except ValueError:
            continue
        return clip
    raise ValueError(f"found no clip with {conditions}")


def _track(
    direction: str, size: float, pixels: tuple[int, int], rng: random.Random
) -> tuple[tuple[float, float], tuple[float, float]]:
    """First and last middle: along the direction over at least a third of the picture, hardly to the side."""
    edges = [FARTHEST_CORNER + 0.02 + 0.53 * size * min(pixels) / side for side in pixels]
    free = [max(0.0, 1 - 2 * edge) for edge in edges]
    start = [edge + room * rng.random() for edge, room in zip(edges, free)]
    end = list(start)
    if direction != RESTS:
        axis = 0 if direction.startswith("to") else 1
        way = free[axis] * rng.uniform(0.65, 1.0)
        first = edges[axis] + (free[axis] - way) * rng.random()
        start[axis], end[axis] = first, first + way
        if direction in ("to the left", "up"):
            start[axis], end[axis] = end[axis], start[axis]
        other = 1 - axis
        drift = way * rng.uniform(-0.12, 0.12) * pixels[axis] / pixels[other]
        end[other] = min(1 - edges[other], max(edges[other], end[other] + drift))
    return (start[0], start[1]), (end[0], end[1])
