"""How a person types a question: figures and signs, quotes, capitals, spaces, marks, a slip, a polite word."""

from __future__ import annotations

import random
import re
from functools import lru_cache
from itertools import pairwise

from .conversations import CONTRACTIONS, SKILLS, vocabulary
from .numerals import NUMBER_WORDS, ORDINALS, read_number
from .sum_forms import SIGNS, sum_forms, typed_sum
from .turns import Turn, pieces

Pieces = list[tuple[str, str]]  # words, each with its slot, "" for none
_EXACT = ("text", "word", "letters")  # slots whose words stay as they are
_EXACT_SKILLS = ("introduce", "remember", "unclear")
_NUMBERED = ("a", "b", "name", "first", "last", "sum", "x", "y", "thing")  # slots that may hold numbers
_SUMS = ("sum", "difference", "product", "quotient")
_OPERATORS = {"plus": "plus", "minus": "minus", "times": "times", "divided": "divided by"}
_ASKS = ("what", "which", "how", "who", "where", "when", "is", "are", "do", "does", "can", "could", "of", "in")
_ORDERS = ("count", "spell", "say", "tell", "name", "list", "add", "multiply", "divide", "subtract", "take",
"calculate",
           "repeat", "write", "double", "halve", "find", "give", "describe", "read", "show", "translate",
           "explain")  # fmt: skip
_POLITE = {  # the last two of each are never trained
    "ask": ("tell me", "can you tell me", "could you tell me", "please tell me", "hey", "hi", "ok", "so", "omni",
            "hey omni", "i want to know", "please", "hello", "quick question", "would you mind telling me",
            "dear omni"), "order": ("please", "can you", "could you", "hey", "ok", "now", "omni", "hey omni",
            "i want you to", "can you please", "would you", "hi", "be so kind and", "dear omni"),
    "behind": ("please", "please", "thanks", "omni", "pls", "thank you", "if you can", "my friend"),
}  # fmt: skip
_COMMA_AFTER = ("no", "hey", "hi", "hello", "ok", "sorry", "wait", "actually", "well", "so", "please", "omni", "oh")
_QUOTES = (("“", "”"), ('"', '"'), ("'", "'"), ("\u2018", "\u2019"), ("«", "»"))  # the fourth: single curved ones
_NO_SIGNS = str.maketrans("", "", "".join({sign for signs in SIGNS.values() for sign in signs}))
_NEARBY = ("qwertyuiop", "asdfghjkl", "zxcvbnm")


def written(turn: Turn, rng: random.Random, *, slips: bool = True) -> str:
    """A turn's question as someone may type it.

    Held-out turns get held-out forms and polite words. slips: with at most one typing error, never in words that the
    answer takes letter by letter, nor such that a word becomes another one of the world.
    """
    if not turn.question:
        return ""
    if turn.skill == "unclear":
        return _capitals(turn.question, rng)
    if turn.skill in _SUMS and turn.about is not None and rng.random() < 0.8:
        operation, a, b = str(turn.about.key[0]), int(turn.about.key[1]), int(turn.about.key[2])
        form = rng.choice(sum_forms(operation, held_out=turn.held_out))
        text = typed_sum(form, operation, a, b, rng)
        if slips and rng.random() < 0.12:
            text = _slipped_text(text, rng)
        return _spaced(_capitals(text, rng), rng)
    found = _figures(pieces(turn.phrasing, turn.slots), turn, rng)
    found = _contracted(_polite(_variant(found, rng), turn, rng), rng)
    if slips and rng.random() < 0.15:
        found = _slipped(found, turn, rng)
    text = " ".join(word for word, _ in _quoted(found, turn, rng))
    return _spaced(_capitals(text + _mark(turn, rng), rng, exact=turn.kind == "text"), rng)


def _figures(found: Pieces, turn: Turn, rng: random.Random) -> Pieces:
    """Numbers as figures, all or none; then signs between them, now and then without spaces."""
    if rng.random() < 0.4:
        return found
    out: Pieces = []
    place = 0
    while place < len(found):
        word, slot = found[place]
        same = [one for one, other in found[place:] if other == slot]
        number = read_number(same, 0) if slot in _NUMBERED and word in NUMBER_WORDS else None
        if number is None:
            nth = slot == "nth" and rng.random() < 0.5
            out.append((_nth(ORDINALS.index(word) + 1) if nth else word, slot))
            place += 1
        else:
            out.append((str(number[0]), slot))
            place += number[1]
    return _signed(out, rng) if rng.random() < 0.5 else out


def _nth(number: int) -> str:
    return str(number) + {1: "st", 2: "nd", 3: "rd"}.get(number, "th")


def _signed(found: Pieces, rng: random.Random) -> Pieces:
    """ "12", "plus", "7" -> "12", "+", "7"."""
    out: Pieces = []
    place, close = 0, rng.random() < 0.3
    while place < len(found):
        word, slot = found[place]
        name = _OPERATORS.get(word)
        size = 2 if name == "divided by" else 1
        behind = found[place + size][0] if place + size < len(found) else ""
        if name is not None and behind.isdigit() and (not out or out[-1][0].isdigit() or slot == "op"):
            sign = rng.choice(SIGNS[name])
            if close and out and out[-1][0].translate(_NO_SIGNS).isdigit():
                out[-1] = (out[-1][0] + sign + behind, "op")
            elif close:
                out.append((sign + behind, "op"))
            else:
                out += [(sign, "op"), (behind, "op")]
            place += size + 1
        else:
            out.append((word, slot))
            place += 1
    return _symbols(out)


def _symbols(found: Pieces) -> Pieces:
    """ "5", "point", "2" -> "5.2"; "5", "percent" -> "5%"; "5", "squared" -> "5^2"."""
    out: Pieces = []
    for word, slot in found:
        before = out[-1][0] if out else ""
        if before.isdigit() and word in ("point", "percent", "squared"):
            out[-1] = (before + {"point": ".", "percent": "%", "squared": "^2"}[word], slot)
        elif before.endswith(".") and before[:-1].isdigit() and word.isdigit():
            out[-1] = (before + word, slot)
        else:
            out.append((word, slot))
    return out


def _variant(found: Pieces, rng: random.Random) -> Pieces:
    """British spelling."""
    if rng.random() < 0.75:
        return found
    spelling = {"color": "colour", "colors": "colours", "colored": "coloured", "grey": "gray"}
    return [(word if slot in _EXACT else spelling.get(word, word), slot) for word, slot in found]


def _polite(found: Pieces, turn: Turn, rng: random.Random) -> Pieces:
    first = found[0][0]
    if SKILLS[turn.skill].group == "follow" or SKILLS[turn.skill].group == "chat" or rng.random() < 0.6:
        return found
    kind = "ask" if first in _ASKS else "order" if first in _ORDERS else ""
    before = _kept(_POLITE[kind], turn) if kind else ("hey", "ok", "hi", "omni")
    said = rng.choice(before).split()
    if rng.random() < 0.7:
        doubled = said[-1] == first or (first in ("can", "could", "do", "of", "in") and len(said) > 1)
        return found if doubled else [*((word, "") for word in said), *found]
    if turn.kind == "text" or found[-1][0] == "please":
        return found
    return [*found, *((word, "") for word in rng.choice(_kept(_POLITE["behind"], turn)).split())]


def _kept(words: tuple[str, ...], turn: Turn) -> tuple[str, ...]:
    return words[-2:] if turn.held_out else words[:-2]


def _contracted(found: Pieces, rng: random.Random) -> Pieces:
    """ "what is" -> "what's" or "whats"."""
    if rng.random() < 0.6:
        return found
    bare = rng.random() < 0.35
    out: Pieces = []
    place = 0
    while place < len(found):
        end = place + 2
        both = " ".join(word for word, slot in found[place:end] if not slot) if end < len(found) else ""
        short = CONTRACTIONS.get(both)
        if short is None:
            out.append(found[place])
            place += 1
        else:
            out.append((short.replace("'", "") if bare else short, ""))
            place += 2
    return out


def _slips_of(word: str) -> list[str]:
    """What becomes of a word if two letters are swapped, one is left out, doubled, or hit beside."""
    found = [word[:i] + word[i + 1] + word[i] + word[i + 2 :] for i in range(len(word) - 1) if word[i] != word[i + 1]]
    found += [word[:i] + word[i + 1 :] for i in range(len(word))]
    found += [word[:i] + word[i] + word[i:] for i in range(len(word))]
    for row in _NEARBY:
        for left, right in pairwise(row):
            found += [word[:i] + right + word[i + 1 :] for i in range(len(word)) if word[i] == left]
    return list(dict.fromkeys(found))


@lru_cache(1)
def known_slips() -> dict[str, str]:
    """Slip -> the only word of the world that it can be of; ones that are words or could be of several are missing."""
    words = {word for word in vocabulary() if word.isalpha()}
    owners: dict[str, set[str]] = {}
    for word in words:
        for slip in _slips_of(word) if len(word) > 1 else ():
            owners.setdefault(slip, set()).add(word)
    return {slip: next(iter(of)) for slip, of in owners.items() if len(of) == 1 and slip not in words}


def _slip(word: str, rng: random.Random) -> str:
    """A word with one slip that leaves no doubt; the word itself where there is none."""
    if len(word) < 4 or not word.isalpha():
        return word
    options = [slip for slip in _slips_of(word) if known_slips().get(slip) == word]
    return rng.choice(options) if options else word


def _slipped(found: Pieces, turn: Turn, rng: random.Random) -> Pieces:
    if turn.skill in _EXACT_SKILLS:
        return found
    places = [i for i, (word, slot) in enumerate(found) if slot not in _EXACT and len(word) >= 4]
    if rng.random() < 0.15:  # a missing space
        gaps = [i for i, (one, two) in enumerate(pairwise(found)) if not one[1] and not two[1]]
        if gaps:
            place = rng.choice(gaps)
            return [*found[:place], (found[place][0] + found[place + 1][0], ""), *found[place + 2 :]]
    if not places:
        return found
    place = rng.choice(places)
    return [*found[:place], (_slip(found[place][0], rng), found[place][1]), *found[place + 1 :]]


def _slipped_text(text: str, rng: random.Random) -> str:
    words = [found for found in re.finditer(r"[a-z]{4,}", text)]
    if not words:
        return text
    found = rng.choice(words)
    return text[: found.start()] + _slip(found[0], rng) + text[found.end() :]


def _quoted(found: Pieces, turn: Turn, rng: random.Random) -> Pieces:
    """What is to be said or spelled in quotes, behind a colon, or as it is; commas where a person sets them."""
    out = list(found)
    places = [i for i, (_, slot) in enumerate(out) if slot in ("text", "word")]
    if places:
        first, last, chance = places[0], places[-1], rng.random()
        if chance < 0.35:
            left, right = rng.choice(_QUOTES)
            out[first] = (left + out[first][0], out[first][1])
            out[last] = (out[last][0] + right, out[last][1])
        elif chance < 0.6 and first and last + 1 == len(out):
            out[first - 1] = (out[first - 1][0] + rng.choice((":", ":", ",")), "")
    letters = [i for i, (_, slot) in enumerate(out) if slot == "letters"]
    if letters and rng.random() < 0.3:
        joined = rng.choice("-.").join(out[i][0] for i in letters)
        out = [*out[: letters[0]], (joined, "letters"), *out[letters[-1] + 1 :]]
    if len(out) > 1 and out[0][0] in _COMMA_AFTER and not out[0][1] and rng.random() < 0.5:
        out[0] = (out[0][0] + ",", "")
    for i, (one, two) in enumerate(pairwise(out)):
        choice = one[1] == "more" and two[1] == "x"
        told = "how many" in f"{two[0]} {out[i + 2][0] if i + 2 < len(out) else ''}" and i > 2
        if (choice or told) and rng.random() < 0.5:
            out[i] = (one[0] + ",", one[1])
    return out


def _mark(turn: Turn, rng: random.Random) -> str:
    if turn.kind == "text" and "{text}" in turn.phrasing:
        return rng.choice(("", "", ".", "!"))
    asks = turn.question.split()[0] in _ASKS or turn.question.startswith("and")
    return rng.choice(("?", "?", "?", "", "", "??", " ?", "?!") if asks else ("", "", ".", "?", "!", ".."))


def _capitals(text: str, rng: random.Random, *, exact: bool = False) -> str:
    chance = rng.random()
    if chance < 0.5:
        return text
    if chance < 0.85:
        text = re.sub(r"\bi\b", "I", text) if rng.random() < 0.5 else text
        return text[:1].upper() + text[1:]
    if chance < 0.92:
        return text.upper()
    if chance < 0.97 and not exact:
        return " ".join(word[:1].upper() + word[1:] for word in text.split(" "))
    return "".join(letter.upper() if rng.random() < 0.15 else letter for letter in text)


def _spaced(text: str, rng: random.Random) -> str:
    """Spaces at the ends, or doubled."""
    chance = rng.random()
    if chance < 0.03:
        return f" {text}"
    if chance < 0.08:
        return f"{text} "
    if chance < 0.11 and " " in text:
        gaps = [found.start() for found in re.finditer(" ", text)]
        place = rng.choice(gaps)
        return f"{text[:place]} {text[place:]}"
    return text


def every_form(turn: Turn, rng: random.Random) -> list[tuple[str, str, bool]]:
    """A sum in every way to type it: (form, text, whether it is held out)."""
    if turn.skill not in _SUMS or turn.about is None:
        raise ValueError(f"a turn of {turn.skill!r} has no forms; take one of {_SUMS}")
    operation, a, b = str(turn.about.key[0]), int(turn.about.key[1]), int(turn.about.key[2])
    return [
        (form, typed_sum(form, operation, a, b, rng), kept)
        for kept in (False, True)
        for form in sum_forms(operation, held_out=kept)
    ]
