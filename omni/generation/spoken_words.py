"""Text as it is spoken: its words, and the broad kinds of sound that their letters stand for, with how long they take.

There is no dictionary: vowels, sonorants, fricatives and stops differ little between languages, nor does much which
letters write them. What letters do not write is guessed: a Han character is a syllable, a number is read by its English
name, capitals are spelled, and a mark may be followed by a pause.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

VOWEL, SONORANT, FRICATIVE, STOP, ANY, SILENCE = range(6)  # ANY: of a letter that may be each of them
# Mean lengths, from running speech of three of flite's voices (kal16, rms and awb, 185 sentences).
MEAN_MS = {VOWEL: 95.0, SONORANT: 68.0, FRICATIVE: 104.0, STOP: 73.0, ANY: 80.0}


class Sound(NamedTuple):
    """A sound that is expected: its kind, its mean length in milliseconds, and how often it is there at all."""

    kind: int
    mean_ms: float
    often: float = 1.0


@dataclass(frozen=True)
class Word:
    """A word as it is spoken.

    start, stop: the characters [start, stop) of the text that it stands for, with the marks and space around it.
    sounds: the last is the silence that may follow it.
    """

    start: int
    stop: int
    sounds: tuple[Sound, ...]

    @property
    def mean_ms(self) -> float:
        """Its expected length, with the silence that may follow."""
        return sum(sound.mean_ms * sound.often for sound in self.sounds)


def split_words(text: str, start: int = 0, *, complete: bool) -> list[Word]:
    """The words of a text from character `start` on, where a word begins.

    complete: no more text will come; else the last word, which may still grow, is left out. Words of a text that grows
    are the same whenever they are asked for.
    """
    spans = list(_spans(text, start))
    if spans and not complete:
        del spans[-1]
    elif spans:  # marks alone end the text
        spans[-1] = (spans[-1][0], len(text))
    return [Word(begin, stop, tuple(_sounds(text[begin:stop]))) for begin, stop in spans]


# where the words are

_GAPS = "—…"  # between words without space
# Scripts without space between words, by the Unicode names of their characters: each character is a word.
_NO_SPACES = ("CJK", "HIRAGANA", "KATAKANA", "YI SYLLABLE", "BOPOMOFO", "THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN")
_SYMBOLS = {"%": "percent", "&": "and", "+": "plus", "=": "equals", "$": "dolar", "€": "yuro", "£": "pound", "@": "at"}


def _spans(text: str, start: int) -> Iterator[tuple[int, int]]:
    """The characters of each word; marks belong to the word that they touch, else to the next one."""
    begin, spoken = start, False
    for i in range(start, len(text)):
        speaks = _is_spoken(text[i])
        alone = speaks and (_is_word(text[i]) or _is_word(text[i - 1]))
        if spoken and (alone or text[i].isspace() or text[i - 1] in _GAPS):
            yield begin, i
            begin, spoken = i, False
        spoken = spoken or speaks
    if spoken:
        yield begin, len(text)


def _is_spoken(character: str) -> bool:
    return character.isalnum() or character in _SYMBOLS


def _is_word(character: str) -> bool:
    """Whether a character is a word by itself."""
    return character > "\u0dff" and character.isalpha() and unicodedata.name(character, "").startswith(_NO_SPACES)


# how a word sounds

_PIECES = re.compile(r"\d+(?:[.,:]\d+)*|[^\W\d_]+|[^\w\s]")
_PAUSES = (  # the marks after a word, and how often and how long it is silent then
    (".!?:;\u3002\uff01\uff1f\uff1a\uff1b\u2026\u2014\n", 0.9, 250.0),  # with those of Chinese
    (",\u3001\uff0c", 0.8, 150.0),
)
_NO_MARK = Sound(SILENCE, 50.0, 0.25)


def _sounds(word: str) -> Iterator[Sound]:
    """The sounds of a word with the marks and space around it."""
    wide = any(_is_word(character) for character in word)
    for piece in _PIECES.findall(word.replace("'", "").replace("\u2019", "")):
        if piece[0].isdigit():
            yield from _number(piece, wide=wide)
        elif piece in _SYMBOLS:
            yield from _letters(_SYMBOLS[piece])
        elif piece.isalpha():
            yield from _spelled(piece) if _is_acronym(piece) else _letters(piece.lower())
    marks = word[max((i for i, c in enumerate(word) if _is_spoken(c)), default=0) + 1 :]
    found = (Sound(SILENCE, mean_ms, often) for those, often, mean_ms in _PAUSES if set(marks) & set(those))
    yield next(found, _NO_MARK)


_ONES = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
)  # fmt: skip
_TENS = ("zero", "ten", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")


def _number(digits: str, *, wide: bool) -> Iterator[Sound]:
    """A number, by its English name, or digit by digit where it is long; wide: among Han characters."""
    if wide:
        for _ in range(2 * sum(c.isdigit() for c in digits) - 1):  # a digit, then its place
            yield from _syllable()
        return
    digits = re.sub(r",(?=\d\d\d(?!\d))", "", unicodedata.normalize("NFKC", digits))
    for i, part in enumerate(re.split("[.,:]", digits)):
        for name in ["point"] * (i > 0) + _number_name(part):
            yield from _letters(name)


def _number_name(digits: str) -> list[str]:
    value = int(digits)
    if len(digits) > 6 or digits[0] == "0":
        return [_ONES[int(digit)] for digit in digits]
    if value < 20:
        return [_ONES[value]]
    if value < 100:
        return [_TENS[value // 10], *(_number_name(str(value % 10)) if value % 10 else [])]
    if 1100 <= value < 2100 and value % 100 and value // 100 != 20:  # a year
        return [*_number_name(str(value // 100)), *_number_name(str(value % 100))]
    size, name = (1000, "thousand") if value >= 1000 else (100, "hundred")
    return [*_number_name(str(value // size)), name, *(_number_name(str(value % size)) if value % size else [])]


_LETTER_NAMES = (
    "ay", "bi", "si", "di", "i", "ef", "ji", "ach", "ai", "jay", "kay", "el", "em", "en", "o", "pi", "ku", "ar", "es",
    "ti", "u", "vi", "dabelu", "eks", "wai", "zi",
)  # fmt: skip


def _is_acronym(piece: str) -> bool:
    return 1 < len(piece) < 5 and piece.isupper() and piece.isascii()


def _spelled(piece: str) -> Iterator[Sound]:
    for letter in piece.lower():
        yield from _letters(_LETTER_NAMES[ord(letter) - ord("a")])


_KINDS = {**dict.fromkeys("aeiou", VOWEL), **dict.fromkeys("lmnrwyv", SONORANT), **dict.fromkeys("szfhj", FRICATIVE)}
_KINDS |= {**dict.fromkeys("ptkbdg", STOP), "θ": ANY}  # θ: th, voiced or not
_RESPELLED = [  # as it is spelled, as it sounds; the order matters
    (re.compile(spelled), sounds)
    for spelled, sounds in (
        (r"([^aeiou])\1", r"\1"),
        ("sch|sh|ch|ph", "f"),
        ("th", "θ"),
        ("gh", ""),
        ("wh", "w"),
        ("ck", "k"),
        ("qu?", "kw"),
        ("x", "ks"),
        ("c(?=[eiy])", "s"),
        ("c", "k"),
        ("g(?=[ei])", "j"),
        ("(?<![aeiou])y(?![aeiou])", "i"),
    )
]
_FAINT_E = re.compile("[aeiou].*[^aeiou](e)([sd]?)$")  # often silent
_CYRILLIC = dict(zip("абвгдеёжзийклмнопрстуфхцчшщыэюяіїєґ", "abvgdeojziyklmnoprstufhsfffieuaiieg"))


def _letters(word: str) -> Iterator[Sound]:
    """The sounds of lower-case letters."""
    plain = "".join(c for c in unicodedata.normalize("NFD", word) if not unicodedata.combining(c))
    plain = "".join(_CYRILLIC.get(c, c) for c in plain)
    for spelled, sounds in _RESPELLED:
        plain = spelled.sub(sounds, plain)
    faint = _FAINT_E.search(plain)
    for run in re.finditer("[aeiou]+|.", plain):
        letters = run.group()
        kind = _KINDS.get(letters[0])
        if faint and run.start() == faint.start(1):
            yield Sound(VOWEL, MEAN_MS[VOWEL], 0.5 if faint.group(2) else 0.1)
        elif kind == VOWEL:
            yield Sound(VOWEL, MEAN_MS[VOWEL] * (1.35 if len(letters) > 1 else 1.0))
        elif kind is not None:
            yield Sound(kind, MEAN_MS[kind])
        elif _is_word(letters) or unicodedata.name(letters, "").startswith("HANGUL"):
            yield from _syllable()
        else:  # of an alphabet that is not known, or the part of a Hangul syllable
            yield from (Sound(ANY, MEAN_MS[ANY]), Sound(VOWEL, MEAN_MS[VOWEL], 0.5))


def _syllable() -> Iterator[Sound]:
    """Any syllable: about a fifth of a second, as of Mandarin."""
    yield from (Sound(ANY, 70.0, 0.9), Sound(VOWEL, 120.0), Sound(SONORANT, 60.0, 0.3))
