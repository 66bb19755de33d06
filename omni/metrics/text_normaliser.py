"""Text as error rates compare it: what is said, without how it is written.

One rule: NFKC, lower case, punctuation and symbols out (an apostrophe inside a word stays), one space between words;
Han and kana characters stand alone. In English, figures are spelt as words. Not resolved: abbreviations, currencies,
years read in pairs, spelling variants, figures of other languages.
"""

from __future__ import annotations

import re
import unicodedata

# fmt: off
_ONES = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
)
_TENS = ("", "", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
_ORDINALS = {
    "one": "first", "two": "second", "three": "third", "five": "fifth", "eight": "eighth", "nine": "ninth",
    "twelve": "twelfth",
}
# fmt: on
LARGEST = 999_999  # the last number that is spelt as one; longer ones are read digit by digit

_APOSTROPHES = re.compile("[\u2018\u2019\u02bc\u0060\u00b4\uff07]")
_JOINERS = re.compile("[\u200c\u200d\u00ad\ufeff]")  # with soft hyphens; they part no words
_TAG = re.compile(r"[A-Za-z]{2,3}([-_][A-Za-z0-9]+)*")
_ALONE = re.compile(  # written without spaces: kana, Han with extensions and compatibility forms
    "([\u3041-\u3096\u309d-\u309f\u30a1-\u30fa\u30fc-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af])"
)
_NUMBER = re.compile(
    r"(?P<minus>(?<![^\s(])[-\u2212])?"
    r"(?<![0-9])(?P<whole>[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)"
    r"(?:(?P<ordinal>st|nd|rd|th)\b|(?:\.(?P<decimals>[0-9]+))?(?P<percent> ?%)?)"
)


def normalise(text: str, language: str = "en") -> str:
    """Text without case, punctuation and, in English, figures: "It's 21%!" -> "it's twenty one percent".

    language: a tag such as "en", "en-GB" or "zh"; only English has a rule of its own. Idempotent.
    Raises ValueError if it is not a language tag.
    """
    if not _TAG.fullmatch(language):
        raise ValueError(f"language {language!r} is not a language tag; write one such as 'en', 'en-GB' or 'zh'")
    # Apostrophes first, since NFKC takes some apart; NFKC again after lower case, which undoes some compositions.
    text = unicodedata.normalize("NFKC", _APOSTROPHES.sub("'", _JOINERS.sub("", text))).lower()
    text = _APOSTROPHES.sub("'", unicodedata.normalize("NFKC", text))
    text = _ALONE.sub(r" \1 ", text)
    if re.split("[-_]", language)[0].lower() in ("en", "eng"):
        text = _NUMBER.sub(_spell, text)
    return " ".join("".join(_letter(text, i) for i in range(len(text))).split())


def spell_number(number: int) -> str:
    """An English cardinal without hyphens and "and": 1205 -> "one thousand two hundred five".

    Raises ValueError outside 0 .. 999 999.
    """
    if not 0 <= number <= LARGEST:
        raise ValueError(f"{number} cannot be spelt; it must be between 0 and {LARGEST}")
    if number >= 1000:
        return _join(spell_number(number // 1000), "thousand", number % 1000)
    if number >= 100:
        return _join(_ONES[number // 100], "hundred", number % 100)
    if number >= 20:
        return _join(_TENS[number // 10], "", number % 10)
    return _ONES[number]


def words(text: str) -> list[str]:
    """The words of a text between its spaces; of a normalised one, also each Han and kana character."""
    return text.split()


def characters(text: str) -> list[str]:
    """The characters of a text, spaces left out: they are not heard."""
    return list("".join(text.split()))


def _join(head: str, unit: str, rest: int) -> str:
    return " ".join(part for part in (head, unit, spell_number(rest) if rest else "") if part)


def _spell(match: re.Match[str]) -> str:
    """One number of a text in words, set apart from what touches it."""
    figures = match["whole"].replace(",", "")
    as_one = len(figures) <= len(str(LARGEST)) and (figures == "0" or not figures.startswith("0"))
    spelt = spell_number(int(figures)) if as_one else _digits(figures)
    if match["ordinal"]:
        *front, last = spelt.split()
        last = _ORDINALS.get(last) or (f"{last[:-1]}ieth" if last.endswith("y") else f"{last}th")
        return f" {' '.join((*front, last))} "
    decimals = f" point {_digits(match['decimals'])}" if match["decimals"] else ""
    return f" {'minus ' if match['minus'] else ''}{spelt}{decimals}{' percent' if match['percent'] else ''} "


def _digits(figures: str) -> str:
    return " ".join(_ONES[int(figure)] for figure in figures)


def _letter(text: str, i: int) -> str:
    """Character i as it stays in the text: itself, or a space for punctuation, symbols and control characters."""
    if text[i] == "'":
        inside = 0 < i < len(text) - 1 and text[i - 1].isalnum() and text[i + 1].isalnum()
        return "'" if inside else " "
    return " " if unicodedata.category(text[i])[0] in "PSCZ" else text[i]
