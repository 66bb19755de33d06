"""English sentences that are not of the small world, and who says what in the data of hearing.

The sentences are the examples of WordNet (Debian: `apt-get install wordnet-base`; its licence lets everyone use, copy
and change it), shuffled once: the last are for evaluation and never spoken in training.
"""

from __future__ import annotations

import functools
import random
import re
from pathlib import Path

import talk
from talk.numerals import NUMBERS

WORDNET = Path("/usr/share/wordnet")
HELD_OUT = 2000
_LONGEST = 13  # words: more than that is more than 5 s
_QUOTED = re.compile(r'"([^"]+)"')
_PLAIN = re.compile(r"[a-z' ,.!?;:-]+")


@functools.cache
def sentences(held_out: bool = False) -> tuple[str, ...]:
    """The examples, as they are written in small letters. Raises FileNotFoundError where WordNet is not there."""
    files = sorted(WORDNET.glob("data.*"))
    if not files:
        raise FileNotFoundError(f"{WORDNET} holds no data.*; on Debian: apt-get install wordnet-base")
    found: dict[str, None] = {}
    for file in files:
        for line in file.read_text(encoding="latin-1").splitlines():
            for quoted in _QUOTED.findall(line.partition("|")[2]):
                text = quoted.strip(" ;-").lower()
                if _PLAIN.fullmatch(text) and 3 <= len(text.split()) <= 16:
                    found[text] = None
    shuffled = list(found)
    random.Random("wordnet").shuffle(shuffled)
    return tuple(shuffled[-HELD_OUT:] if held_out else shuffled[:-HELD_OUT])


def words_of(text: str) -> list[str]:
    """The words of a text, small, without marks."""
    return re.sub(r"[^a-z' ]", " ", text.lower()).split()


@functools.cache
def _vocabulary() -> tuple[str, ...]:
    return tuple(sorted({word for text in sentences() for word in words_of(text) if len(word) > 1}))


def draw_text(rng: random.Random) -> str:
    """Something to be said and written down: half of it English, the rest words, digits and the small world."""
    chance = rng.random()
    if chance < 0.5:
        words = words_of(rng.choice(sentences()))
        if rng.random() < 0.3:
            count = rng.randint(1, min(6, len(words)))
            start = rng.randrange(len(words) - count + 1)
            words = words[start : start + count]
        return " ".join(words[:_LONGEST])
    if chance < 0.6:
        return " ".join(rng.choices(NUMBERS[:10], k=rng.choice((1, 1, 2, 3, 4, 5, 6))))
    if chance < 0.68:
        return " ".join(rng.choices(_vocabulary(), k=rng.choice((1, 1, 1, 2, 3))))
    texts = talk.spoken_texts(rng, sentences=sentences())
    for _ in range(rng.randrange(8)):  # a conversation begins with what needs nothing before it
        next(texts)
    return " ".join(words_of(next(texts))[:_LONGEST])
