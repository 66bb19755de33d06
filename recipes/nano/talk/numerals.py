"""Numbers in words and figures, and how a text says them."""

from __future__ import annotations

from collections.abc import Sequence

LARGEST = 100  # that the world counts to
_SMALL = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
)  # fmt: skip
_TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
_VALUES = {name: value for value, name in enumerate(_SMALL)} | {name: 10 * n for n, name in enumerate(_TENS, 2)}
_SCALES = {"hundred": 100, "thousand": 1000}
NUMBER_WORDS = (*_SMALL, *_TENS, "hundred")
ORDINALS = (
    "first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth", "eleventh",
    "twelfth",
)  # fmt: skip


def word(number: int) -> str:
    """A number in words: "twenty one", "one hundred", "three hundred and five",
    up to 999,999; "minus two" below zero."""
    if number < 0:
        return f"minus {word(-number)}"
    if number < 20:
        return _SMALL[number]
    if number < 100:
        tens, units = divmod(number, 10)
        return _TENS[tens - 2] + (f" {_SMALL[units]}" if units else "")
    scale = "thousand" if number >= 1000 else "hundred"
    head, rest = divmod(number, _SCALES[scale])
    link = " and " if rest < 100 else " "
    return f"{word(head)} {scale}" + (link + word(rest) if rest else "")


NUMBERS = tuple(word(number) for number in range(LARGEST + 1))
VALUE_OF = {name: value for value, name in enumerate(NUMBERS)}


def _below_hundred(words: Sequence[str], place: int) -> tuple[int, int] | None:
    """The number below a hundred that starts at a place, and where it ends."""
    value = _VALUES.get(words[place]) if place < len(words) else None
    if value is None:
        return None
    units = _VALUES.get(words[place + 1], 0) if value >= 20 and place + 1 < len(words) else 0
    return (value + units, place + 2) if 0 < units < 10 else (value, place + 1)


def read_number(words: Sequence[str], place: int) -> tuple[int, int] | None:
    """The number in words or figures that starts at a place, and the place behind it; None where there is none.

    What follows "hundred" belongs to it only behind "and": "one hundred ninety nine" is how one counts down.
    """
    first = words[place]
    if first.isascii() and first.isdigit():
        return int(first), place + 1
    if first in _SCALES:
        found: tuple[int, int] | None = (1, place)
    elif first == "a" and place + 1 < len(words) and words[place + 1] in _SCALES:
        found = 1, place + 1
    else:
        found = _below_hundred(words, place)
    if found is None:
        return None
    value, place = found
    while place < len(words) and words[place] in _SCALES:
        value, place = value * _SCALES[words[place]], place + 1
        more = _below_hundred(words, place + 1) if place < len(words) and words[place] == "and" else None
        if more is not None:
            value, place = value + more[0], more[1]
    return value, place


def in_figures(words: Sequence[str]) -> list[str]:
    """The words with every number as figures: "count to twenty one" -> ["count", "to", "21"]."""
    found: list[str] = []
    place = 0
    while place < len(words):
        number = read_number(words, place)
        if number is None:
            found.append(words[place])
            place += 1
        else:
            found.append(str(number[0]))
            place = number[1]
    return found
