"""What the vision encoder learns from: drawn pictures and clips as patches, and which words each token is to say.

A token says the words of the thing whose middle it holds: colour and kind, and where it is in the picture or which way
it moves; a token that holds no middle says `NOTHING`. Near the edge of two tokens they share the thing, so that the
shares of all tokens add up to the number of things. What a token says is a weight for each of `WORDS`: in which vectors
it says them is decided later (`name_things.put_into`).

While it is trained, a token also says how much of each of its 8 x 8 parts is covered by things, and of what kind the
thing is that covers it: much more to learn from than the middles alone. This is not kept.

Shapes: K words; patches fp32 [N, 3 * 2 * 16 * 16]; a grid is (1, h, w) in patches, and h * w / 4 tokens.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from drawing import CLIP_FPS, CLIP_SECONDS, clip_frames, covered, draw_scene, frame_count
from figures import OTHER, SHAPES
from PIL import Image
from scenes import (
    RESTS,
    Clip,
    Item,
    Picture,
    Scene,
    Thing,
    any_pixels,
    cell_of,
    clip_scene_of,
    random_clip,
    random_picture,
    scene_of,
)
from shades import COLORS
from torch import Tensor
from world import NO_WORD, NUMBERS

from omni.processing.vision import PixelBudget, VisionProcessor

NOTHING = NO_WORD
KINDS_OF_THINGS = (*SHAPES, *NUMBERS[:10], OTHER)
_PLACES = ("top", "bottom", "left", "right", "middle")
_MOVES = ("to", "up", "down")  # "to" and "left": to the left
WHERE = (*_PLACES, *_MOVES)
WORDS = (NOTHING, *COLORS, *KINDS_OF_THINGS, *WHERE)
WORD = {word: place for place, word in enumerate(WORDS)}
COLOR_WORDS, KIND_WORDS = (slice(WORD[a], WORD[b] + 1) for a, b in ((COLORS[0], COLORS[-1]), (SHAPES[0], OTHER)))

PATCH, MERGE = 16, 2
TOKEN = PATCH * MERGE  # pixels of a token's side
MIN_PIXELS, MAX_PIXELS = 224 * 224, 256 * 256  # of a picture as the encoder sees it: 49 to 64 tokens
FRAME_SIDE = 192  # pixels of a frame of a clip, whatever its aspect: 36 tokens for two frames
_USUAL = PixelBudget()  # the processor's own
_FINE = 8
PARTS = _FINE * _FINE
_LEAST_COVERED = 0.15  # of a token, to be of a kind
_SHARED = 0.08  # of a token's side: so near its edge a thing belongs to its neighbour too
_IMAGE_SETTINGS = {"patch_size": PATCH, "merge_size": MERGE, "temporal_patch_size": 2, "image_mean": [0.5] * 3,
                   "image_std": [0.5] * 3, "min_pixels": MIN_PIXELS, "max_pixels": MAX_PIXELS}  # fmt: skip
_CLIPS = 0.25  # share of a batch
_COUNTS = (1, 3, 4, 4, 4, 3, 2, 2, 1)  # how often so many things are in a picture: many teach much
_COARSE, _COARSE_PIXELS = 0.4, 160 * 160  # share of batches of smaller pictures, twice as many; they cost a third
_EASY_STEPS = 3000  # at first all batches are easy, then less and less often, until here
_SIZES = 5  # of pictures in a batch
_LARGEST_DRAWN = 640  # pixels; larger pictures are shrunk to the same as these, and take long to draw


@dataclass(frozen=True)
class Shown:
    """One picture, or two frames of a clip. wanted [tokens, K]: the weight of each word in each token. things: what is
    there, as (token that holds its middle, its words). covered [tokens, PARTS], 0..1: of each part of a token; kinds
    int64 [tokens]: which of `KINDS_OF_THINGS` covers it most, -1 for none."""

    patches: Tensor
    grid: tuple[int, int, int]
    wanted: Tensor
    things: list[tuple[int, tuple[str, ...]]]
    covered: Tensor
    kinds: Tensor


@dataclass(frozen=True)
class Batch:
    """Several of them, packed, those of one size side by side."""

    patches: Tensor
    grids: Tensor
    wanted: Tensor
    things: list[tuple[int, tuple[str, ...]]]
    covered: Tensor
    kinds: Tensor


def vision_processor() -> VisionProcessor:
    """Cuts into patches as the model's own processor will."""
    frame = FRAME_SIDE * FRAME_SIDE
    frames = {name: value for name, value in _IMAGE_SETTINGS.items() if not name.endswith("_pixels")}
    return VisionProcessor(_IMAGE_SETTINGS, frames, (frame, frame))


def place_words(middle: tuple[float, float]) -> tuple[str, ...]:
    """Where a thing is: of nine places, the words of the one it is in."""
    row, column = divmod(cell_of(middle), 3)
    words = (*(("top",), (), ("bottom",))[row], *(("left",), (), ("right",))[column])
    return words or ("middle",)


def item_words(item: Item) -> tuple[str, ...]:
    """Colour and kind."""
    if item.shape.isdigit():
        return item.color, NUMBERS[int(item.shape)]
    return item.color, item.shape if item.shape in SHAPES else OTHER


def move_words(clip: Clip) -> tuple[str, ...]:
    """Which way it moves: "to left", "to right", "up", "down"; none if it rests."""
    return () if clip.direction == RESTS else tuple(word for word in clip.direction.split() if word != "the")


def tokens_of(
    named: Sequence[tuple[tuple[float, float], tuple[str, ...]]], rows: int, columns: int
) -> tuple[Tensor, list[tuple[int, tuple[str, ...]]]]:
    """What the tokens are to say of things with middles and words: `Shown.wanted` and `Shown.things`."""
    said = torch.zeros(rows, columns, len(WORDS))
    thingness = torch.zeros(rows, columns)
    things = []
    for (x, y), words in named:
        share = _shares(y * rows, rows)[:, None] * _shares(x * columns, columns)
        thingness += share
        for word in words:
            said[..., WORD[word]] += share
        things.append((min(rows - 1, int(y * rows)) * columns + min(columns - 1, int(x * columns)), words))
    said[..., WORD[NOTHING]] = (1 - thingness).clamp(min=0)
    return said.flatten(0, 1), things


def told(picture: Picture) -> tuple[Tensor, tuple[int, int]]:
    """What a picture's tokens are to say [tokens, K], and their rows and columns, without drawing it."""
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

    scene = scene_of(picture)
    sides = smart_resize(scene.height, scene.width, factor=TOKEN, min_pixels=MIN_PIXELS, max_pixels=MAX_PIXELS)
    rows, columns = (int(side) // TOKEN for side in sides)
    return tokens_of(_named(scene), rows, columns)[0], (rows, columns)


def told_clip(clip: Clip, times: Sequence[float], seconds: float) -> Tensor:
    """What the tokens of a clip of so many seconds are to say [times * tokens, K], two frames half a second apart at
    each time, without drawing it."""
    scene, side, said = clip_scene_of(clip), FRAME_SIDE // TOKEN, []
    for time in times:
        middle = scene.middle(min(1.0, (time + 0.25) / seconds))
        words = (*item_words(scene.scene.items[0]), *(move_words(clip) or place_words(middle)))
        said.append(tokens_of([(middle, words)], side, side)[0])
    return torch.cat(said)


def _named(scene: Scene) -> list[tuple[tuple[float, float], tuple[str, ...]]]:
    """The things of a picture: middles and words."""
    return [(item.middle, (*item_words(item), *place_words(item.middle))) for item in scene.items if item.middle]


def _shares(place: float, count: int) -> Tensor:
    """How a place on a line belongs to its unit steps [count]: to one, near an edge to two."""
    edges = torch.arange(1, count)
    passed = ((place - edges + _SHARED) / (2 * _SHARED)).clamp(0, 1)  # 1 where it lies wholly behind that edge
    return torch.cat((passed.new_ones(1), passed)) - torch.cat((passed, passed.new_zeros(1)))


class Show:
    """Pictures and clips as the encoder sees them."""

    def __init__(self) -> None:
        self.processor = vision_processor()

    def picture(self, picture: Picture, budget: PixelBudget = _USUAL) -> Shown:
        """A picture, within the limits of the model or others."""
        scene = scene_of(picture)
        patches, grid = self.processor.image(draw_scene(scene), budget)
        rows, columns = grid[1] // MERGE, grid[2] // MERGE
        places = [(thing, (thing.item.middle,)) for thing in scene.things if thing.item.middle]
        return Shown(
            patches,
            (1, grid[1], grid[2]),
            *tokens_of(_named(scene), rows, columns),
            *_covered(places, rows, columns),
        )

    def clip(self, clip: Clip, rng: random.Random) -> Shown:
        """Two frames of a clip, half a second apart."""
        seconds = rng.uniform(CLIP_SECONDS, 2 * CLIP_SECONDS)
        total, step = frame_count(seconds), CLIP_FPS // 2
        first = rng.randrange(total - step)
        numbers, scene = (first, first + step), clip_scene_of(clip)
        size = (FRAME_SIDE, FRAME_SIDE)
        frames = [frame.resize(size, Image.Resampling.BICUBIC) for frame in clip_frames(scene, seconds, numbers)]
        patches, grid = self.processor.grid_step([self.processor.frame(frame) for frame in frames])
        first_place, middle, last_place = (
            scene.middle(n / (total - 1)) for n in (first, sum(numbers) / 2, first + step)
        )
        words = (*item_words(scene.scene.items[0]), *(move_words(clip) or place_words(middle)))
        rows, columns = grid[1] // MERGE, grid[2] // MERGE
        return Shown(
            patches,
            (1, grid[1], grid[2]),
            *tokens_of([(middle, words)], rows, columns),
            *_covered([(scene.scene.things[0], (first_place, last_place))], rows, columns),
        )

    def _easy(self, rng: random.Random) -> Shown:
        """A small square picture of large things, upright and filled."""
        side, count = rng.choice((128, 160, 256)), rng.randint(2, 5)
        picture = random_picture(rng, count=count, pixels=(side, side), size=(0.2, 0.36), outline=False, turned=False)
        return self.picture(picture, PixelBudget(max_pixels=_COARSE_PIXELS))

    def batch(self, number: int, size: int) -> Batch:
        """The batch of a step: the same every time."""
        rng = random.Random(f"seeing {number}")
        if rng.random() < 1 - number / _EASY_STEPS:
            return packed([self._easy(rng) for _ in range(round(size * 1.5))])
        clips = round(size * _CLIPS)
        shown = [self.clip(random_clip(rng), rng) for _ in range(clips)]
        coarse = rng.random() < _COARSE
        budget = PixelBudget(max_pixels=_COARSE_PIXELS) if coarse else _USUAL
        sizes = [any_pixels(rng, largest=_LARGEST_DRAWN) for _ in range(_SIZES)]
        for number in range((size - clips) * (2 if coarse else 1)):
            count = rng.choices(range(len(_COUNTS)), _COUNTS)[0]
            picture = random_picture(rng, count=count, pixels=sizes[number % _SIZES])
            shown.append(self.picture(picture, budget))
        return packed(shown)


def _covered(
    things: Sequence[tuple[Thing, tuple[tuple[float, float], ...]]], rows: int, columns: int
) -> tuple[Tensor, Tensor]:
    """`Shown.covered` and `Shown.kinds` of things at one or more places, of which each counts as much."""
    everything = torch.zeros(rows * columns, PARTS)
    kinds, most = torch.full((rows * columns,), -1), torch.full((rows * columns,), _LEAST_COVERED)
    for thing, places in things:
        area = sum(covered(thing, columns * _FINE, rows * _FINE, place) for place in places) / len(places)
        parts = torch.from_numpy(area).unflatten(0, (rows, _FINE)).unflatten(2, (columns, _FINE))
        parts = parts.transpose(1, 2).reshape(rows * columns, PARTS)
        everything += parts
        share = parts.mean(1)
        kinds[share > most] = KINDS_OF_THINGS.index(item_words(thing.item)[1])
        most = torch.maximum(most, share)
    return everything.clamp(max=1), kinds


def packed(shown: Sequence[Shown]) -> Batch:
    """As one row of patches, sorted by tokens: attention is computed for all of a size at once."""
    shown = sorted(shown, key=lambda one: len(one.wanted))
    things, first = [], 0
    for one in shown:
        things += [(first + token, words) for token, words in one.things]
        first += len(one.wanted)
    return Batch(
        torch.cat([one.patches for one in shown]),
        torch.tensor([one.grid for one in shown]),
        torch.cat([one.wanted for one in shown]),
        things,
        torch.cat([one.covered for one in shown]),
        torch.cat([one.kinds for one in shown]),
    )
