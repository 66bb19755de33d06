"""Pictures and clips, and what is asked about them."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace

from .chat import NOTHING_HEARD
from .lexicon import sentence
from .numerals import word
from .shapes import COLORS, DIRECTIONS, GROUNDS, OTHER_SHAPES, PLACES, SHAPE_PLURALS, SHAPES, colors_on
from .turns import About, Clip, Item, Picture, Skill, Talk, Turn, a

NOTHING, NO_PICTURE, NO_CLIP = "i see nothing", "i see no picture", "i see no clip"
NO_SHAPE = "i do not know that shape"
_BLIND = (NOTHING, NO_PICTURE, NO_CLIP, "there is no picture", "i can not see")
_TURNS = {"circle": 0, "square": 12, "diamond": 12, "cross": 18, "heart": 30, "star": 180, "pentagon": 180}  # degrees
_GROUND_WEIGHTS = (5, 2, 2, 1, 2, 2, 2)  # of GROUNDS
_MOST = 6  # items that are counted


def _size(rng: random.Random) -> tuple[int, int]:
    """Width and height in pixels, half of them square."""
    width = rng.choice((96, 128, 128, 128, 160, 192, 224, 256))
    if rng.random() < 0.5:
        return width, width
    return width, max(64, min(384, round(width * rng.choice((0.5, 0.6, 0.75, 1.33, 1.6, 2.0)))))


def _item(rng: random.Random, shape: str, color: str, cell: int, *, alone: bool) -> Item:
    turn = _TURNS.get(shape, 30)
    rotation = round(rng.uniform(-turn, turn), 1) if rng.random() < 0.5 else 0.0
    outline = not shape.isdigit() and rng.random() < 0.2
    if alone and cell == 4 and rng.random() < 0.35:
        size, slack = rng.uniform(1.3, 2.8), 0.1
    else:
        size, slack = rng.uniform(0.5, 1.15), 0.3
    shift = (round(rng.uniform(-slack, slack), 3), round(rng.uniform(-slack, slack), 3))
    return Item(shape, color, cell, rotation, outline, round(size, 3), shift if rng.random() < 0.6 else (0.0, 0.0))


def picture_of(rng: random.Random, kinds: Sequence[tuple[str, str]], ground: str, cells: Sequence[int] = ()) -> Picture:
    """A picture of (shape, colour) pairs, at these cells or at any."""
    cells = cells or rng.sample(range(9), len(kinds))
    alone = len(kinds) == 1
    items = tuple(_item(rng, shape, color, cell, alone=alone) for (shape, color), cell in zip(kinds, cells))
    width, height = _size(rng)
    return Picture(items, rng.getrandbits(32), ground, width, height)


def picture_for(skill: str, rng: random.Random) -> Picture:
    """A picture that a skill has something to ask about."""
    ground = rng.choices(GROUNDS, _GROUND_WEIGHTS)[0]
    colors = colors_on(ground)
    if skill == "digit":
        return picture_of(rng, [(str(rng.randint(0, 9)), rng.choice(colors))], ground, [4])
    if skill == "empty":
        return picture_of(rng, [], ground)
    if skill == "unknown shape":
        return picture_of(rng, [(rng.choice(OTHER_SHAPES), rng.choice(colors))], ground)
    if skill == "count":
        kind, number = rng.choice(SHAPES), rng.choice((0, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6))
        others = [shape for shape in SHAPES if shape != kind]
        kinds = [(kind, rng.choice(colors)) for _ in range(number)]
        kinds += [(rng.choice(others), rng.choice(colors)) for _ in range(rng.randint(0 if number else 1, 2))]
        return picture_of(rng, kinds, ground)
    number = rng.choice((1, 2, 2, 2, 3, 3, 4))
    if skill == "shape":
        return picture_of(rng, [(rng.choice(SHAPES), color) for color in rng.sample(colors, number)], ground)
    shapes = rng.sample(SHAPES, number)
    return picture_of(rng, [(shape, rng.choice(colors)) for shape in shapes], ground)


def described(item: Item) -> str:
    """ "a red circle", "the number three", "a red thing"."""
    if item.shape.isdigit():
        return f"the number {word(int(item.shape))}"
    return f"{a(item.color)} {item.shape if item.shape in SHAPES else 'thing'}"


def everything(picture: Picture) -> str:
    """All that a picture shows, row by row."""
    found = [described(item) for item in sorted(picture.items, key=lambda item: item.cell)]
    if not found:
        return NOTHING
    return " and ".join((" ".join(found[:-1]), found[-1])) if len(found) > 1 else found[0]


def _seen(
    skill: str, answer: str, kind: str, about: str, gist: str, accepted: tuple[str, ...] = (), **slots: str
) -> Turn:
    return Turn(skill, answer, accepted=accepted, kind=kind, slots=slots, gist=gist, why="because i can see it",
                about=About("seen", (skill, about)))  # fmt: skip


def _yes(asked: str, *, true: bool) -> Turn:
    answer, other = ("yes", "no") if true else ("no", "yes")
    turn = _seen("is there", answer, "choice", asked, f"you asked if there is {asked}", thing=asked)
    return replace(turn, rivals=(other,), choice=True)


def _color_of(thing: str, items: Sequence[Item]) -> Turn | None:
    if len(items) != 1:
        name = thing.removeprefix("the ")
        return _seen("color", f"i see no {name}", "color", thing, f"you asked for the color of {thing}",
                     (f"there is no {name}", "no " + name), thing=thing) if not items else None  # fmt: skip
    return _seen("color", items[0].color, "color", thing, f"you asked for the color of {thing}", thing=thing)


def asked_of(picture: Picture) -> dict[str, list[Turn]]:
    """Every question that a picture answers, by skill, without words."""
    items = picture.items
    found: dict[str, list[Turn]] = {}

    def add(turn: Turn | None) -> None:
        if turn is not None:
            found.setdefault(turn.skill, []).append(turn)

    drawn = [item for item in items if item.shape in SHAPES]
    if len(items) <= 4:
        add(_seen("everything", everything(picture), "scene" if items else "phrase", "", "you asked what i see",
                  () if items else _BLIND))  # fmt: skip
    if any(item.shape.isdigit() for item in items):
        number = word(int(items[0].shape))
        add(_seen("digit", number, "number", "", "you asked which number it is"))
        add(_color_of("the number", items))
        return found
    for shape in SHAPES:
        alike = [item for item in drawn if item.shape == shape]
        add(_color_of(f"the {shape}", alike))
        add(_yes(a(shape), true=bool(alike)))
        add(_count(SHAPE_PLURALS[shape], len(alike)))
        if len(alike) == 1:
            place = PLACES[alike[0].cell]
            add(
                _seen(
                    "position", place, "place", f"the {shape}", f"you asked where the {shape} is", thing=f"the {shape}"
                )
            )
    for color in COLORS:
        colored = [item for item in items if item.color == color]
        if len(colored) == 1:
            answer = colored[0].shape if colored[0] in drawn else NO_SHAPE
            add(_seen("shape", answer, "shape", color, f"you asked which shape is {color}", color=color))
        add(_count(f"{color} shapes", len(colored)))
        for item in colored[:1]:
            if item in drawn:
                add(_yes(f"{a(color)} {item.shape}", true=True))
                add(_yes(f"{a(COLORS[COLORS.index(color) - 1])} {item.shape}", true=any(
                    other.shape == item.shape and other.color == COLORS[COLORS.index(color) - 1] for other in items
                )))  # fmt: skip
    add(_count("shapes", len(items)))
    for item in items:
        place = PLACES[item.cell]
        known = described(item)
        where = place if " the " in f" {place}" else f"at the {place}"
        add(_seen("place", known, "scene", place, f"you asked what is {where}", place=where))
    if len(items) == 1:
        answer = items[0].shape if drawn else NO_SHAPE
        add(_color_of("it", items))
        add(_seen("only shape", answer, "shape", "it", "you asked which shape it is"))
    return found


def _count(many: str, number: int) -> Turn | None:
    if number > _MOST:
        return None
    accepted = ("none", "no", f"there are no {many}") if not number else ()
    turn = _seen("count", word(number), "number", many, f"you asked how many {many} there are", accepted, many=many)
    return replace(turn, about=About("seen", ("count", many), number))


def clip_for(rng: random.Random, said: str | None = None) -> Clip:
    """Any clip."""
    ground = rng.choices(GROUNDS, _GROUND_WEIGHTS)[0]
    shape = rng.choice(SHAPES)
    turn = _TURNS.get(shape, 30)
    width, height = _size(rng)
    return Clip(
        shape, rng.choice(colors_on(ground)), rng.choice(DIRECTIONS), rng.getrandbits(32), said, ground,
        round(rng.uniform(-turn, turn), 1) if rng.random() < 0.4 else 0.0, rng.random() < 0.2,
        round(rng.uniform(0.7, 1.5), 3), width, height,
    )  # fmt: skip


def asked_of_clip(clip: Clip) -> dict[str, list[Turn]]:
    """Every question that a clip answers, by skill, without words."""
    moving = f"{a(clip.color)} {clip.shape}"
    heard = (
        Turn("clip speech", NOTHING_HEARD, gist="you asked what was said") if clip.said is None
        else Turn("clip speech", clip.said, kind="text", gist="you asked what was said")
    )  # fmt: skip
    return {
        "direction": [_seen("direction", clip.direction, "direction", "", "you asked which way it moves")],
        "moving": [_seen("moving", moving, "scene", "", "you asked what moves")],
        "clip color": [_seen("clip color", clip.color, "color", "", "you asked what color moves")],
        "clip shape": [_seen("clip shape", clip.shape, "shape", "", "you asked which shape moves")],
        "clip speech": [replace(heard, about=About("seen", ("clip speech", "")))],
    }


def _pick(rng: random.Random, turns: Sequence[Turn]) -> Turn:
    """Any of the questions; those about what is not there seldom."""
    there = [turn for turn in turns if turn.answer != "zero" and not turn.answer.startswith("i see no ")]
    return rng.choice(there if there and rng.random() < 0.85 else turns)


def _draw(skill: str) -> Callable[[Talk], Turn | None]:
    def draw(talk: Talk) -> Turn | None:
        rng, shown = talk.rng, talk.shown
        if shown is not None and (not talk.media or rng.random() < 0.9):
            options = asked_of(shown.picture).get(skill) if shown.picture is not None else None
            return _pick(rng, options) if options else None
        picture = picture_for(_source(skill, rng), rng)
        options = asked_of(picture).get(skill)
        if not options:
            return None
        turn = _pick(rng, options)
        if not talk.media or (shown is None and rng.random() < 0.06):
            return Turn("", NO_PICTURE, accepted=_BLIND, slots=turn.slots, gist=turn.gist, about=About("blind"))
        return replace(turn, media="picture", picture=picture)

    return draw


def _source(skill: str, rng: random.Random) -> str:
    """For which skill the picture is drawn."""
    if skill == "color" and rng.random() < 0.1:
        return "digit"
    if skill == "everything" and rng.random() < 0.3:
        return rng.choice(("empty", "digit", "unknown shape"))
    if skill in ("shape", "only shape", "color") and rng.random() < 0.12:
        return "unknown shape"
    return skill


def _draw_clip(skill: str) -> Callable[[Talk], Turn | None]:
    def draw(talk: Talk) -> Turn | None:
        rng, shown = talk.rng, talk.shown
        if shown is not None and (not talk.media or rng.random() < 0.9):
            return asked_of_clip(shown.clip)[skill][0] if shown.clip is not None else None
        if not talk.media or (shown is None and rng.random() < 0.05):
            turn = asked_of_clip(clip_for(rng))[skill][0]
            blind = (NO_CLIP, *_BLIND) if skill != "clip speech" else (NOTHING_HEARD,)
            return Turn("", blind[0], accepted=blind[1:], gist=turn.gist, about=About("blind"))
        asks = skill != "clip speech" and rng.random() < 0.3
        said = sentence(rng) if rng.random() < (0.85 if skill == "clip speech" else 0.25) else None
        clip = clip_for(rng, None if asks else said)
        return replace(asked_of_clip(clip)[skill][0], media="clip", clip=clip, sound_asks=asks)

    return draw


SKILLS = (
    Skill("color", "picture", _draw("color"), (
        "what color is {thing}", "which color is {thing}", "what color does {thing} have",
        "tell me the color of {thing}", "what is the color of {thing}", "which color does {thing} have",
        "the color of {thing} please", "can you see what color {thing} is", "what color do you see on {thing}",
        "how is {thing} colored", "name the color of {thing}", "say what color {thing} is",
    ), 2.0),
    Skill("shape", "picture", _draw("shape"), (
        "which shape is {color}", "what shape is {color}", "tell me the {color} shape", "what is the {color} shape",
        "what is {color}", "which one is {color}", "what is the {color} thing", "what shape is the {color} one",
        "what shape has the {color} thing", "what kind of shape is {color}", "name the {color} shape",
        "say which shape is {color}",
    ), 2.0),
    Skill("only shape", "picture", _draw("only shape"), (
        "which shape is it", "what shape is it", "what shape do you see", "which shape is this", "what shape is this",
        "tell me the shape", "what is the shape", "which shape do you see", "what kind of shape is this",
        "what shape is that", "name the shape", "say which shape it is",
    ), 0.8),
    Skill("count", "picture", _draw("count"), (
        "how many {many} are there", "how many {many} do you see", "count the {many}",
        "how many {many} are in the picture", "how many {many} can you see", "tell me how many {many} there are",
        "what is the number of {many}", "how many {many}", "can you count the {many}", "how many {many} are on it",
        "how many {many} can you find", "say how many {many} there are",
    ), 2.0),
    Skill("position", "picture", _draw("position"), (
        "where is {thing}", "where do you see {thing}", "tell me where {thing} is", "in which place is {thing}",
        "where can i find {thing}", "where in the picture is {thing}", "what is the place of {thing}",
        "can you see where {thing} is", "where is {thing} in the picture", "where does {thing} stand", "find {thing}",
        "say where {thing} is",
    ), 2.0),
    Skill("place", "picture", _draw("place"), (
        "what is {place}", "what do you see {place}", "what shape is {place}", "which shape is {place}",
        "tell me what is {place}", "what can you see {place}", "what is there {place}", "{place} what is there",
        "what thing is {place}", "what is to be seen {place}", "say what is {place}", "name what is {place}",
    ), 0.8),
    Skill("is there", "picture", _draw("is there"), (
        "is there {thing}", "do you see {thing}", "can you see {thing}", "is there {thing} in the picture",
        "is {thing} in the picture", "is {thing} there", "do you see {thing} in the picture",
        "tell me if there is {thing}", "does the picture have {thing}", "does the picture show {thing}",
        "say if there is {thing}", "can you find {thing}",
    ), 1.0),
    Skill("digit", "picture", _draw("digit"), (
        "which number is it", "what number do you see", "read the number", "what number is it",
        "which number do you see", "tell me the number", "what number is this", "which digit is it",
        "what is the number in the picture", "what digit is this", "say the number that you see",
        "which number is in the picture",
    ), 1.5),
    Skill("everything", "picture", _draw("everything"), (
        "what do you see", "tell me what you see", "what is in the picture", "what is in this picture",
        "describe the picture", "what can you see", "what does the picture show", "what is this",
        "look at this what is it", "please describe what you see", "name what you see", "say what is in the picture",
    ), 2.0),
    Skill("direction", "clip", _draw_clip("direction"), (
        "which way does it move", "where does it go", "where is it moving", "in which direction does it move",
        "what direction does it move", "which way does it go", "where does it move to", "tell me where it goes",
        "which direction is it going", "what way is it moving", "say which way it moves", "to which side does it move",
    ), 2.0),
    Skill("moving", "clip", _draw_clip("moving"), (
        "what is moving", "what moves here", "what moves", "what do you see moving", "tell me what moves",
        "what is it that moves", "which thing is moving", "what is moving in the clip", "what do you see in the video",
        "what can you see in the clip", "say what is moving", "name the thing that moves",
    ), 1.5),
    Skill("clip color", "clip", _draw_clip("clip color"), (
        "what color is it", "which color is it", "what color is the moving thing", "what color does it have",
        "tell me the color of what moves", "what is its color", "which color does the moving shape have",
        "what color is the thing in the clip", "what color moves", "which color is moving", "name its color",
        "say what color it is",
    ), 0.7),
    Skill("clip shape", "clip", _draw_clip("clip shape"), (
        "which shape is it", "what shape is it", "which shape is moving", "what shape moves",
        "tell me the shape that moves", "what is its shape", "what shape is the moving thing",
        "which shape moves in the clip", "what kind of shape is moving", "what shape does it have",
        "name its shape", "say which shape it is",
    ), 0.7),
    Skill("clip speech", "clip", _draw_clip("clip speech"), (
        "what was said", "what did you hear", "what did they say", "what is said in the clip",
        "what did you hear in the video", "write down what was said", "tell me what was said", "what do they say",
        "what was the speaker saying", "what words did you hear", "note what was said", "repeat what you heard",
    ), 1.5),
)  # fmt: skip
_MOVES = tuple(f"{a(color)} {shape}" for color in COLORS for shape in (*SHAPES, "thing"))
ANSWERS = (*COLORS, *SHAPES, *PLACES, *DIRECTIONS, *_MOVES, NO_SHAPE, NOTHING, NO_PICTURE, NO_CLIP,
           *(f"i see no {shape}" for shape in SHAPES))  # fmt: skip
WORDS = (*ANSWERS, *SHAPE_PLURALS.values(), "the number", "and", "it", "because i can see it", "at", "none", "shapes",
         "things")  # fmt: skip
