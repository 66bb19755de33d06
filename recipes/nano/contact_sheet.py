"""One picture of many examples of what is drawn, with what they are: to look whether people would agree.

python recipes/nano/contact_sheet.py FILE [--seed 0] [--ground photographed] [--clips]
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

from drawing import clip_frames, draw_scene, frame_count
from grounds import KINDS
from PIL import Image, ImageDraw, ImageFont
from scenes import Item, any_pixels, clip_scene_of, random_clip, random_picture, scene_of

_ROWS, _COLUMNS, _SIDE, _TEXT = 8, 12, 156, 34


def contact_sheet(seed: int, ground: str | None = None) -> Image.Image:
    """8 x 12 pictures; a column each for a kind of ground, if none is asked for."""
    sheet, draw = _empty()
    for number in range(_ROWS * _COLUMNS):
        rng = random.Random(f"sheet {seed} {number}")
        kind = ground or KINDS[number % len(KINDS)]
        scene = scene_of(random_picture(rng, ground=kind, pixels=any_pixels(rng, largest=640)))
        _put(sheet, draw, number, draw_scene(scene), "\n".join(map(_label, scene.items)) or "nothing")
    return sheet


def clip_sheet(seed: int, ground: str | None = None) -> Image.Image:
    """Clips, three frames of each: the first, the middle and the last."""
    sheet, draw = _empty()
    for number in range(_ROWS * _COLUMNS // 3):
        clip = random_clip(random.Random(f"clips {seed} {number}"), **({"ground": ground} if ground else {}))
        last = frame_count(2.0) - 1
        frames = clip_frames(clip_scene_of(clip), 2.0, (0, last // 2, last))
        for place, frame in enumerate(frames):
            label = f"{clip.color} {clip.shape}\n{clip.direction}" if not place else ""
            _put(sheet, draw, 3 * number + place, frame, label)
    return sheet


def _label(item: Item) -> str:
    assert item.size is not None
    return f"{item.color} {item.shape} {item.cell}"


def _empty() -> tuple[Image.Image, ImageDraw.ImageDraw]:
    sheet = Image.new("RGB", (_COLUMNS * _SIDE, _ROWS * (_SIDE + _TEXT)), (90, 110, 120))
    return sheet, ImageDraw.Draw(sheet)


def _put(sheet: Image.Image, draw: ImageDraw.ImageDraw, number: int, image: Image.Image, label: str) -> None:
    x, y = number % _COLUMNS * _SIDE, number // _COLUMNS * (_SIDE + _TEXT)
    small = image.copy()
    small.thumbnail((_SIDE - 6, _SIDE - 6))
    sheet.paste(small, (x + 3, y + 3))
    lines, font = label.split("\n"), ImageFont.load_default(9)
    for column, part in enumerate((lines[:3], lines[3:])):
        place = (x + 3 + 78 * column, y + _SIDE)
        draw.multiline_text(place, "\n".join(part), fill="white", font=font, spacing=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ground", choices=KINDS)
    parser.add_argument("--clips", action="store_true", help="clips, three frames of each")
    args = parser.parse_args()
    (clip_sheet if args.clips else contact_sheet)(args.seed, args.ground).save(args.file)


if __name__ == "__main__":
    main()
