"""Whether an answer is right: it holds what was asked for, and no rival of it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache

from .chat import CANNED, CHATS, NOTHING_HEARD, TRAINED_NAMES, UNCLEAR, WHICH
from .facts import TABLES
from .follow import LOST, NOT_ASKED, NOT_SAID
from .lexicon import OPPOSITE_OF
from .numerals import NUMBERS, in_figures
from .order import DAYS, LETTERS, MONTHS
from .outside import REFUSALS
from .scenes import NO_SHAPE, NOTHING
from .shapes import COLORS, DIRECTIONS, PLACES, SHAPES
from .sums import BEYOND
from .turns import Turn

_EXPANDED = {
    "don't": "do not", "dont": "do not", "can't": "can not", "cannot": "can not", "cant": "can not", "i'm": "i am",
    "didn't": "did not", "didnt": "did not", "isn't": "is not", "it's": "it is", "that's": "that is",
    "you're": "you are", "doesn't": "does not", "there's": "there is", "won't": "will not", "aren't": "are not",
    "what's": "what is", "colour": "color", "gray": "grey", "centre": "center", "goodbye": "goodbye", "okay": "ok",
    "negative": "minus",
}  # fmt: skip
_SAYING = frozenset(("is", "are", "equals", "makes", "says", "has", "comes", "was", "be", "called"))
_REFUSING = (*REFUSALS, NOTHING_HEARD, UNCLEAR, WHICH, LOST, NOT_SAID, NOT_ASKED, NO_SHAPE, NOTHING)
_DENYING = frozenset(("not", "never", "no"))
_FREE = ("refusal", "recall", "chat", "phrase")  # kinds whose answers may deny


@lru_cache(1 << 16)
def words_in(text: str) -> tuple[str, ...]:
    """A text as the judge reads it: small letters, no marks, numbers as figures, contractions in full."""
    text = text.lower().replace("\u2019", "'").replace("\u2212", "-")
    text = re.sub(r"(?<![\w])-(?=\d)", "minus ", text).replace("+", " plus ").replace("=", " is ")
    found = [_EXPANDED.get(piece, piece) for piece in re.sub(r"[^a-z0-9' ]+", " ", text).split()]
    words = " ".join(piece.strip("'") for piece in found).split()
    return tuple(in_figures(words))


def _spans(words: Sequence[str], phrase: Sequence[str]) -> list[tuple[int, int]]:
    """Where a phrase stands, first place and the one behind the last."""
    length = len(phrase)
    if not length:
        return []
    found = range(len(words) - length + 1)
    return [(place, place + length) for place in found if tuple(words[place : place + length]) == tuple(phrase)]


def _holds(words: Sequence[str], phrase: Sequence[str]) -> bool:
    return bool(_spans(words, phrase))


@lru_cache(None)
def _rivals(kind: str) -> dict[str, list[tuple[str, ...]]]:
    """What an answer of a kind must not hold besides, by its first word."""
    facts = {name: {answer for answers in table.values() for answer in answers} for name, table in TABLES.items()}
    plain: dict[str, Sequence[str]] = {
        "number": (*NUMBERS, "half", "minus", *BEYOND), "color": COLORS, "shape": SHAPES, "place": PLACES,
        "direction": DIRECTIONS, "day": DAYS, "month": MONTHS, "letter": LETTERS, "opposite": tuple(OPPOSITE_OF),
        "name": TRAINED_NAMES, "chat": CHATS, "recall": (*NUMBERS, *COLORS, *DAYS, *MONTHS),
        "phrase": (*NUMBERS, *COLORS, *SHAPES, *DAYS, *MONTHS), "refusal": (*NUMBERS, *COLORS, *SHAPES, *DAYS, *MONTHS),
    }  # fmt: skip
    own = plain.get(kind, tuple(facts.get(kind, ())))
    refused = () if kind == "refusal" else _REFUSING
    canned = CANNED if kind not in ("chat", "refusal", "phrase", "recall") else ()
    found: dict[str, list[tuple[str, ...]]] = {}
    for phrase in dict.fromkeys(words_in(text) for text in (*own, *refused, *canned)):
        found.setdefault(phrase[0], []).append(phrase)
    return found


def right(answer: str, turn: Turn) -> bool:
    """Whether an answer to a turn is right.

    It must hold the turn's answer, or another accepted one, in words or figures, and neither a rival (another number,
    colour, day ...) nor a denial. What it repeats of the question before it, as in "three plus four is seven", does
    not count, unless the question offers a choice. Texts, letters and counted numbers must be whole and alone.
    """
    given = words_in(answer)
    wanted = [words_in(text) for text in (turn.answer, *turn.accepted)]
    if not given:
        return False
    if turn.kind == "text":
        return given in wanted
    if turn.kind == "letters":
        return _letters(given, len(wanted[0])) == wanted[0]
    if turn.kind == "counting":
        return tuple(word for word in given if word.isdigit()) in wanted
    if turn.kind == "scene":
        return _pairs(given) == _pairs(wanted[0]) != Counter()
    if turn.kind.startswith("all "):
        names: Sequence[str] = {"all day": DAYS, "all month": MONTHS}.get(turn.kind, LETTERS)
        return tuple(word for word in given if word in names) == tuple(names)
    return _holds_no_rival(given, wanted, turn)


def _holds_no_rival(given: tuple[str, ...], wanted: Sequence[tuple[str, ...]], turn: Turn) -> bool:
    good = [span for phrase in wanted for span in _spans(given, phrase)]
    if not good:
        return False
    first = min(start for start, _ in good)
    echoed = first if not turn.choice and first > 1 and _repeated(given[:first], turn) else 0
    rivals = dict(_rivals("choice" if turn.choice else turn.kind))
    for text in turn.rivals:
        phrase = words_in(text)
        rivals[phrase[0]] = [*rivals.get(phrase[0], ()), phrase]
    for place in range(echoed, len(given)):
        if any(start <= place < end for start, end in good) and len(rivals.get(given[place], ())) == 0:
            continue
        if given[place] in _DENYING and turn.kind not in _FREE and not any(s <= place < e for s, e in good):
            return False
        for phrase in rivals.get(given[place], ()):
            end = place + len(phrase)
            inside = any(start <= place and end <= stop for start, stop in good)
            if given[place:end] == phrase and not inside:
                return False
    return True


def _repeated(before: Sequence[str], turn: Turn) -> bool:
    """Whether what stands before the answer only says the question again: "three plus four is"."""
    words = [word for word in before if word not in ("a", "an", "the", "it")]
    asked = {*words_in(turn.question), *_SAYING, "plus", "minus", "times", "divided", "by", "and", "of"}
    return bool(words) and words[-1] in _SAYING and all(word in asked for word in words)


def _letters(given: tuple[str, ...], size: int) -> tuple[str, ...]:
    """The letters at the end of an answer, as in "it is c a t", where there are no others before."""
    alone = [word for word in given[:-size] if len(word) == 1 and word not in ("a", "i")]
    return () if alone else given[-size:]


def _pairs(words: Sequence[str]) -> Counter[tuple[str, str]]:
    """What is named in what colour, in any order."""
    found: Counter[tuple[str, str]] = Counter()
    color = ""
    for place, word in enumerate(words):
        if word in COLORS:
            color = word
        elif word in (*SHAPES, "thing"):
            found[color, word] += 1
            color = ""
        elif word.isdigit() and place and words[place - 1] == "number":
            found["", word] += 1
        elif word.isdigit():
            found["?", word] += 1
    if color:
        found[color, ""] += 1
    return found


_OTHERS: dict[str, Sequence[str]] = {
    "number": NUMBERS, "color": COLORS, "shape": SHAPES, "place": PLACES, "direction": DIRECTIONS, "day": DAYS,
    "month": MONTHS, "letter": LETTERS, "opposite": tuple(OPPOSITE_OF), "name": TRAINED_NAMES, "chat": CHATS,
    "refusal": (*NUMBERS, *COLORS),
}  # fmt: skip


def wrong_answers(turn: Turn) -> list[str]:
    """Answers of the same kind that are wrong: what a model that guesses would say."""
    good = {words_in(text) for text in (turn.answer, *turn.accepted)}
    others = list(turn.rivals) or list(_OTHERS.get(turn.kind, ()))
    if turn.kind in TABLES:
        others = [answers[0] for answers in TABLES[turn.kind].values()]
    if turn.kind not in ("refusal", "phrase", "recall"):
        others += list(REFUSALS[:2])
    if turn.kind in ("text", "counting", "letters") or turn.kind.startswith("all "):
        words = turn.answer.split()
        others += [" ".join(words[:-1]), f"{turn.answer} {words[0]}"]
    if turn.kind == "scene":
        others += ["a red circle and a red circle and a red circle", "i see nothing"]
    others += ["", "hmm"]
    return [text for text in dict.fromkeys(others) if words_in(text) not in good and not _fits(text, turn)]


def _fits(text: str, turn: Turn) -> bool:
    """Whether other small talk fits too: "my name is omni" as an answer to "who are you"."""
    return turn.kind == "chat" and any(_holds(words_in(text), words_in(good)) for good in (turn.answer, *turn.accepted))
