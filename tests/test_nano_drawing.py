"""The drawing of omni-nano's pictures and clips: repeatable, as described, and in colours that can be told apart."""

from __future__ import annotations

import itertools
import math
import random
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "recipes" / "nano"))

import contact_sheet
import figures
import grounds
import photographed
import scenes
import shades
import world
from drawing import draw_clip, draw_picture, draw_scene
from pictures import write_clip
from scenes import ANYWHERE, Clip, Item, Picture, random_clip, random_picture, scene_of
from talk import scenes as talked


def test_names_of_colors_do_not_meet() -> None:
    """What is usually meant by a name lies in its range alone, and so does every shade of it; no shade of one name can
    be taken for one of another."""
    rng = random.Random(0)
    seen = {}
    for name in shades.COLORS:
        drawn = [*shades.USUAL[name], *(shades.shade(name, rng) for _ in range(150))]
        for color in drawn:
            assert [other for other in shades.COLORS if shades.is_named(color, other)] == [name], (name, color)
        seen[name] = np.array([shades.oklab(color) for color in drawn])
    for one, other in itertools.combinations(shades.COLORS, 2):
        assert np.linalg.norm(seen[one][:, None] - seen[other], axis=-1).min() > 0.045, (one, other)


def test_oklch_is_there_and_back() -> None:
    rng = random.Random(1)
    for _ in range(200):
        color = (rng.randrange(256), rng.randrange(256), rng.randrange(256))
        back = shades.rgb_of(*shades.oklch(color))
        assert back is not None and max(abs(a - b) for a, b in zip(color, back)) <= 1
    assert shades.distance((0, 0, 0), (255, 255, 255)) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("kind", grounds.KINDS)
def test_pictures_follow_from_their_seed(kind: str) -> None:
    """The same picture looks the same, another seed another way; all kinds of ground in all sizes and aspects."""
    for number, pixels in enumerate(((64, 64), (640, 160), (160, 640), (224, 224), (97, 131), (700, 500))):
        picture = random_picture(random.Random(f"{kind} {number}"), ground=kind, count=2, pixels=pixels)
        image = draw_picture(picture)
        assert image.mode == "RGB" and image.size == pixels
        assert image.tobytes() == draw_picture(picture).tobytes()
        assert scene_of(picture) == scene_of(picture)
        assert image.tobytes() != draw_picture(random_picture(random.Random(0), ground=kind, pixels=pixels)).tobytes()


def test_a_picture_may_be_large() -> None:
    picture = random_picture(random.Random(3), ground="photographed", count=3, pixels=(2000, 1500))
    assert draw_picture(picture).size == (2000, 1500)


def test_sizes_range_from_64_to_2000() -> None:
    sizes = [scenes.any_pixels(random.Random(seed)) for seed in range(2000)]
    assert min(map(min, sizes)) == 64 and 1500 < max(map(max, sizes)) <= 2000
    aspects = sorted(width / height for width, height in sizes)
    assert aspects[0] == pytest.approx(0.25, abs=0.03) and aspects[-1] == pytest.approx(4, abs=0.3)


def test_things_are_where_they_are_said_to_be() -> None:
    """Inside the picture, apart from each other, in the cell that is asked for, and told from the ground."""
    for seed in range(300):
        scene = scene_of(random_picture(random.Random(seed)))
        short, behind = min(scene.width, scene.height), scene.ground.all_colors()
        for item in scene.items:
            assert item.middle is not None and item.size is not None and item.shade is not None
            assert shades.is_named(item.shade, item.color)
            assert shades.apart(item.shade, behind) >= grounds.APART[scene.ground.kind]
            assert item.cell == scenes.cell_of(item.middle)
            for place, side in zip(item.middle, (scene.width, scene.height)):
                assert item.size * short / 2 <= min(place, 1 - place) * side
        for one, other in itertools.combinations(scene.items, 2):
            ways = [(a - b) * side for a, b, side in zip(one.middle, other.middle, (scene.width, scene.height))]
            assert math.hypot(*ways) > (one.size + other.size) * short / 2


@pytest.mark.parametrize("skill", (*world.PICTURE_SKILLS, "dialogue"))
def test_pictures_of_the_world_keep_their_cells(skill: str) -> None:
    """The short descriptions that questions are asked about are drawn as they are."""
    for seed in range(40):
        picture = world.SKILLS[skill](random.Random(seed)).picture
        assert picture is not None
        items = tuple(Item(item.shape, item.color, item.cell) for item in picture.items)
        scene = scene_of(Picture(items, picture.seed))
        asked = sorted((item.cell, item.color, item.shape) for item in items)
        assert sorted((item.cell, item.color, item.shape) for item in scene.items) == asked


def test_what_is_talked_about_is_drawn() -> None:
    """Pictures and clips of the larger world keep what is asked about: things, colours, cells, directions."""
    for seed in range(150):
        rng = random.Random(seed)
        told = talked.picture_for(("count", "color", "digit", "empty", "unknown shape")[seed % 5], rng)
        scene = scene_of(scenes.from_talk(told))
        asked, drawn = (sorted((i.cell, i.color, i.shape, i.outline) for i in whose.items) for whose in (told, scene))
        assert asked == drawn
        clip = talked.clip_for(rng)
        moving = scenes.clip_from_talk(clip)
        assert (moving.shape, moving.color, moving.direction) == (clip.shape, clip.color, clip.direction)
        scenes.clip_scene_of(moving)


@pytest.mark.parametrize("shape", figures.SHAPES)
def test_colors_are_what_they_are_called(shape: str) -> None:
    """The middle of a filled shape has a colour of the name's range."""
    for seed, ground in enumerate(("white", "black", "grey", "plain", "gradient", "noise", "texture")):
        rng = random.Random(f"{shape} {seed}")
        picture = random_picture(rng, ground=ground, count=2, outline=False, shapes=(shape,), pixels=(300, 260))
        scene = scene_of(replace(picture, jpeg=0))
        pixels = np.asarray(draw_scene(scene))
        for item in scene.items:
            assert item.middle is not None
            x, y = round(item.middle[0] * scene.width), round(item.middle[1] * scene.height)
            color = tuple(int(value) for value in pixels[y - 1 : y + 2, x - 1 : x + 2].mean((0, 1)).round())
            assert shades.is_named(color, item.color), (item, color)  # type: ignore[arg-type]  # three


@pytest.mark.parametrize("shape", [*figures.SHAPES, *"0123456789", *[figures.OTHER] * 6])
def test_figures_fill_their_square(shape: str) -> None:
    """A mask is as high as the size says, whole, and about in its middle; turned or not, filled or only a line."""
    rng = random.Random(shape)
    for turn in (0.0, 0.4, 3.0):
        slant = (math.cos(turn), -math.sin(turn), math.sin(turn), math.cos(turn))
        drawn = figures.figure(shape, rng)
        lines = (None, 3.0) if drawn.areas else (None,)
        for line in lines:
            inside, reach = figures.mask(drawn, 30.0, slant, (0.3, 0.6), line, 3)
            assert inside.size == (2 * reach, 2 * reach)
            box = inside.getbbox()
            assert box is not None and min(box) > 0 and max(box) < 2 * reach
            assert 30 < box[3] - box[1] < 95 and abs(box[0] + box[2] - 2 * reach) < 50
            values = np.asarray(inside)
            assert values.max() == 255 and ((values > 20) & (values < 235)).any()
    filled, reach = figures.mask(figures.figure("circle", rng), 30.0, slant, (0, 0), None, 3)
    line, _ = figures.mask(figures.figure("circle", rng), 30.0, slant, (0, 0), 3.0, 3)
    assert filled.getpixel((reach, reach)) == 255 and line.getpixel((reach, reach)) == 0


def test_what_cannot_be_drawn_is_refused() -> None:
    with pytest.raises(ValueError, match="white cannot be told from any white ground"):
        scene_of(Picture((Item("circle", "white", 4),), 1, ground="white"))
    large = tuple(Item("star", "red", ANYWHERE, size=0.6) for _ in range(5))
    with pytest.raises(ValueError, match="5 things do not fit into 100 x 100 pixels"):
        scene_of(Picture(large, 1, pixels=(100, 100)))
    with pytest.raises(ValueError, match="'snow' is not one of"):
        grounds.ground("snow", random.Random(0))


def test_a_sheet_that_fills_the_picture_is_not_slanted() -> None:
    whole = ((0.0, 0.0), (1.0, 0.0), (1.0, 1.0), (0.0, 1.0))
    assert photographed.slant_at(whole, (0.3, 0.8)) == pytest.approx((1, 0, 0, 1))
    leaning = ((0.1, 0.05), (0.92, 0.0), (1.0, 0.94), (0.03, 1.0))
    m = photographed.projection(leaning)
    for (x, y), corner in zip(((0, 0), (1, 0), (1, 1), (0, 1)), leaning):
        u, v, w = m @ (x, y, 1)
        assert (u / w, v / w) == pytest.approx(corner)
    a, b, c, d = photographed.slant_at(leaning, tuple((m @ (0.5, 0.5, 1))[:2] / (m @ (0.5, 0.5, 1))[2]))
    assert a * d - b * c == pytest.approx(1)
    near = [(m @ (0.5 + x, 0.5 + y, 1)) for x, y in ((0, 0), (1e-5, 0), (0, 1e-5))]
    middle, right, down = (point[:2] / point[2] for point in near)
    step = np.stack((right - middle, down - middle), axis=1)
    assert step / math.sqrt(np.linalg.det(step)) == pytest.approx(np.array([[a, b], [c, d]]), abs=1e-4)


@pytest.mark.parametrize("direction", (*world.DIRECTIONS, scenes.RESTS))
def test_clips_move_as_they_say(direction: str) -> None:
    for seed, ground in enumerate(("white", "black", "gradient", "texture", "photographed")):
        clip = Clip("square", "red", direction, seed, ground=ground, pixels=(200, 160), size=0.2, outline=False)
        frames = draw_clip(clip, 2.0)
        assert len(frames) == 16 and {frame.size for frame in frames} == {(200, 160)}
        assert frames[0].tobytes() == draw_clip(clip, 2.0)[0].tobytes()
        moved = np.subtract(scenes.clip_scene_of(clip).end, scenes.clip_scene_of(clip).middle(0))
        changed = np.abs(np.asarray(frames[-1], np.float32) - np.asarray(frames[0], np.float32)).max(2) > 90
        if direction == scenes.RESTS:
            assert not moved.any() and changed.mean() < 0.002
            continue
        axis, sign = {"to the left": (0, -1), "to the right": (0, 1), "up": (1, -1), "down": (1, 1)}[direction]
        assert moved[axis] * sign > 0.25 and abs(moved[1 - axis]) < 0.2
        assert changed.mean() > 0.02


def test_clips_of_any_size_are_written(tmp_path: Path) -> None:
    import av

    clip = random_clip(random.Random(5), pixels=(256, 144))
    write_clip(tmp_path / "clip.mp4", draw_clip(clip, 1.0), None)
    with av.open(str(tmp_path / "clip.mp4")) as container:
        frames = [frame.to_image() for frame in container.decode(video=0)]
    assert len(frames) == 8 and frames[0].size == (256, 144)


def test_contact_sheets(tmp_path: Path) -> None:
    assert contact_sheet.contact_sheet(0, "white").size == contact_sheet.clip_sheet(0).size
