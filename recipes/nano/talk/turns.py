"""What a conversation consists of, as data, and how a skill makes one turn of it.

A `Skill` is one thing that can be asked: its `draw` says what (a `Turn` without words), its `phrasings` how. The last
two phrasings of each are never trained, but kept for evaluation.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from string import Formatter
from typing import TypeVar

HELD_OUT_PHRASINGS = 2  # of each skill, the last ones
_T = TypeVar("_T")


@dataclass(frozen=True)
class Item:
    """One drawn thing: a shape (a numeral for a digit), in a colour, about a cell 0..8 of a 3 x 3 grid.

    rotation: degrees, clockwise. outline: drawn as a line only. size: of the usual radius. shift: of its middle from
    the cell's, x and y, in cells, less than a half so that the cell remains the nearest one.
    """

    shape: str
    color: str
    cell: int
    rotation: float = 0.0
    outline: bool = False
    size: float = 1.0
    shift: tuple[float, float] = (0.0, 0.0)


@dataclass(frozen=True)
class Picture:
    """Items on a ground, one of `shapes.GROUNDS`. seed: of the ground and of small changes. width, height: pixels."""

    items: tuple[Item, ...]
    seed: int
    ground: str = "plain"
    width: int = 128
    height: int = 128


@dataclass(frozen=True)
class Clip:
    """A shape that moves in one of `shapes.DIRECTIONS`; seed: of its track. said: words of the sound track, None for
    none. The rest as of an `Item` and a `Picture`."""

    shape: str
    color: str
    direction: str
    seed: int
    said: str | None = None
    ground: str = "plain"
    rotation: float = 0.0
    outline: bool = False
    size: float = 1.0
    width: int = 128
    height: int = 128


@dataclass(frozen=True)
class Sound:
    """What a turn's sound holds: words, or None and one of `chat.NOISES` alone."""

    said: str | None
    noise: str = "silence"


@dataclass(frozen=True)
class About:
    """What a turn was about, for turns that refer to it.

    kind: of `key`, such as "sum" for ("plus", 5, 2). number: the result, where it is a number of the world.
    """

    kind: str
    key: tuple[str | int, ...] = ()
    number: int | None = None


@dataclass(frozen=True)
class Turn:
    """One question and its answer.

    question: words as they are spoken. answer: what the model is to say. accepted: other right answers. kind: of what
    rivals the answer has, see `judge.right`; rivals: further ones. choice: the rivals stand in the question, so no
    echo of it excuses them. phrasing: the pattern that `slots` were put into. gist, why: answers to "what did i ask?"
    and "why?". media: what comes with the turn, "none", "picture", "clip" or "sound". sound_asks: the question is the
    clip's sound track.
    """

    skill: str
    answer: str
    question: str = ""
    accepted: tuple[str, ...] = ()
    kind: str = "phrase"
    rivals: tuple[str, ...] = ()
    choice: bool = False
    slots: Mapping[str, str] = field(default_factory=dict, hash=False)
    phrasing: str = ""
    held_out: bool = False
    gist: str = ""
    why: str = ""
    about: About | None = None
    media: str = "none"
    picture: Picture | None = None
    clip: Clip | None = None
    sound: Sound | None = None
    sound_asks: bool = False


@dataclass(frozen=True)
class Conversation:
    """One to eight turns. held_out: asked in ways, and about things, that are never trained."""

    turns: tuple[Turn, ...]
    held_out: bool = False


@dataclass
class Talk:
    """A conversation as it is drawn: what was said so far, and from what the rest is drawn.

    sentences: free English of the caller, words only, for "repeat after me" and dictation.
    """

    rng: random.Random
    turns: list[Turn] = field(default_factory=list)
    held_out: bool = False
    sentences: Sequence[str] = ()
    media: bool = True

    @property
    def last(self) -> Turn | None:
        return self.turns[-1] if self.turns else None

    @property
    def shown(self) -> Turn | None:
        """The turn with the last picture or clip."""
        return next((turn for turn in reversed(self.turns) if turn.media in ("picture", "clip")), None)


Draw = Callable[[Talk], "Turn | None"]


@dataclass(frozen=True)
class Skill:
    """One thing that can be asked. draw: None where the talk so far gives nothing to ask. weight: how often."""

    name: str
    group: str
    draw: Draw
    phrasings: tuple[str, ...]
    weight: float = 1.0

    def ways(self, *, held_out: bool) -> tuple[str, ...]:
        """The phrasings that are trained, or those that are kept."""
        if len(self.phrasings) <= HELD_OUT_PHRASINGS:
            return self.phrasings
        return self.phrasings[-HELD_OUT_PHRASINGS:] if held_out else self.phrasings[:-HELD_OUT_PHRASINGS]

    def ask(self, talk: Talk) -> Turn | None:
        """A turn of this skill, in words; None where the talk gives nothing to ask."""
        turn = self.draw(talk)
        if turn is None:
            return None
        phrasing = talk.rng.choice(self.ways(held_out=talk.held_out))
        question = " ".join(phrasing.format(**turn.slots).split())
        clip = replace(turn.clip, said=question) if turn.clip is not None and turn.sound_asks else turn.clip
        return replace(turn, skill=self.name, question=question, phrasing=phrasing, held_out=talk.held_out, clip=clip)


def part(items: Sequence[_T], *, held_out: bool) -> Sequence[_T]:
    """The first four fifths, which are trained, or the rest, which is kept for evaluation."""
    cut = len(items) * 4 // 5
    return items[cut:] if held_out else items[:cut]


def pieces(pattern: str, slots: Mapping[str, str]) -> list[tuple[str, str]]:
    """The words of a filled pattern, each with the slot that it comes from, "" for none."""
    found: list[tuple[str, str]] = []
    for text, name, _, _ in Formatter().parse(pattern):
        found += [(piece, "") for piece in text.split()]
        found += [(piece, name) for piece in slots[name].split()] if name else []
    return found


def a(noun: str) -> str:
    """The noun behind its article."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def listed(text: str, mark: str | None = None) -> list[str]:
    """The entries of a list that is written as one text, parted by spaces or by a mark."""
    return text.split(mark)


def words_of(texts: Sequence[str]) -> set[str]:
    """All words of texts, slots left out."""
    found: set[str] = set()
    for text in texts:
        found.update("".join(literal + " " for literal, *_ in Formatter().parse(text)).split())
    return found
