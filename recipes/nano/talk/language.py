"""Spelling, letters, comparing and opposites."""

from __future__ import annotations

from .facts import named
from .lexicon import OPPOSITE_OF, SCALES, SPELLED
from .numerals import LARGEST, word
from .turns import About, Skill, Talk, Turn

SAME = "they are the same"


def spelt(name: str) -> Turn:
    """The letters of a word."""
    return Turn(
        "", " ".join(name), kind="letters", slots={"word": name}, gist=f"you asked how to spell {name}",
        about=About("spell", (name,)),
    )  # fmt: skip


def _spell(talk: Talk) -> Turn:
    return spelt(talk.rng.choice(SPELLED))


def _read_letters(talk: Talk) -> Turn:
    name = talk.rng.choice([name for name in SPELLED if len(name) > 2])
    return Turn("", name, kind="word", slots={"letters": " ".join(name)}, gist=f"you spelled {name}")


def first_letter(name: str) -> Turn:
    return Turn(
        "", name[0], kind="letter", slots={"word": name}, gist=f"you asked for the first letter of {name}",
        why=f"because {name} starts with {name[0]}", about=About("first letter", (name,)),
    )  # fmt: skip


def last_letter(name: str) -> Turn:
    return Turn(
        "", name[-1], kind="letter", slots={"word": name}, gist=f"you asked for the last letter of {name}",
        why=f"because {name} ends with {name[-1]}", about=About("last letter", (name,)),
    )  # fmt: skip


def letters_in(name: str) -> Turn:
    return Turn(
        "", word(len(name)), kind="number", slots={"word": name}, gist=f"you asked how many letters {name} has",
        about=About("letters in", (name,), len(name)),
    )  # fmt: skip


def _first_letter(talk: Talk) -> Turn:
    return first_letter(talk.rng.choice(SPELLED))


def _last_letter(talk: Talk) -> Turn:
    return last_letter(talk.rng.choice(SPELLED))


def _letters_in(talk: Talk) -> Turn:
    return letters_in(talk.rng.choice(SPELLED))


def opposite(name: str) -> Turn:
    """A word that means the opposite."""
    first, *others = OPPOSITE_OF[name]
    return Turn(
        "", first, accepted=tuple(others), kind="opposite", slots={"word": name},
        gist=f"you asked for the opposite of {name}", why=f"because {first} is the opposite of {name}",
        about=About("opposite", (name,)),
    )  # fmt: skip


def _opposite(talk: Talk) -> Turn:
    return opposite(talk.rng.choice(list(OPPOSITE_OF)))


def _compared(answer: str, other: str, more: str, shown: tuple[str, str]) -> Turn:
    slots = {"more": more, "x": shown[0], "y": shown[1]}
    gist = f"you asked which is {more} {shown[0]} or {shown[1]}"
    why = f"because {answer} is {more} than {other}"
    about = About("compare", (answer, other, more))
    bare = (answer.split()[-1],) if " " in answer and answer.split()[0] in ("a", "an", "the") else ()
    return Turn(
        "", answer, accepted=bare, kind="choice",
        rivals=(other.split()[-1] if bare else other,), choice=True, slots=slots,
        gist=gist, why=why, about=about,
    )  # fmt: skip


def _pair(talk: Talk) -> tuple[str, str, str, str, str]:
    """Of two things: what the more is called, the less, the two adjectives, and which of them is asked."""
    rng = talk.rng
    more, less, things = rng.choice(SCALES)
    low = rng.randrange(len(things) - 1)
    high = rng.randint(low + 1, len(things) - 1)
    least, most = named(things[low]), named(things[high])
    if "age" not in things and rng.random() < 0.5:
        return least, most, less[0], more[0], less[1]
    return most, least, more[0], less[0], more[1]


def _compare(talk: Talk) -> Turn:
    answer, other, more, _, _ = _pair(talk)
    shown = (answer, other) if talk.rng.random() < 0.5 else (other, answer)
    return _compared(answer, other, more, shown)


def _compare_numbers(talk: Talk) -> Turn:
    rng = talk.rng
    high = 20 if rng.random() < 0.4 else LARGEST
    a, b = rng.sample(range(high + 1), 2)
    more = rng.choice(("bigger", "larger", "more", "smaller", "less"))
    answer, other = (max(a, b), min(a, b)) if more in ("bigger", "larger", "more") else (min(a, b), max(a, b))
    return _compared(word(answer), word(other), more, (word(a), word(b)))


def _is_it(talk: Talk) -> Turn:
    """Yes or no."""
    rng = talk.rng
    if rng.random() < 0.3:
        a, b = rng.sample(range(LARGEST + 1 if rng.random() < 0.5 else 21), 2)
        more = rng.choice(("bigger", "more", "smaller", "less"))
        true, x, y = (a > b) == (more in ("bigger", "more")), word(a), word(b)
    else:
        x, y, more, _, _ = _pair(talk)
        true = rng.random() < 0.5
        x, y = (x, y) if true else (y, x)
    answer, other = ("yes", "no") if true else ("no", "yes")
    fact = f"{x} is {more} than {y}" if true else f"{y} is {more} than {x}"
    return Turn(
        "", answer, kind="choice", rivals=(other,), choice=True, slots={"more": more, "x": x, "y": y},
        gist=f"you asked if {x} is {more} than {y}", why=f"because {fact}", about=About("is it", (x, y, more)),
    )  # fmt: skip


SKILLS = (
    Skill("spell", "words", _spell, (
        "how do you spell {word}", "spell {word}", "spell the word {word}", "please spell {word}",
        "can you spell {word}", "how is {word} spelled", "how do i spell {word}", "tell me how to spell {word}",
        "how do you write {word}", "what are the letters of {word}", "could you spell the word {word} for me",
        "what letters are in {word}", "give me the letters of {word}", "how does one spell {word}",
    ), 2.5),
    Skill("read letters", "words", _read_letters, (
        "what does {letters} spell", "what word is {letters}", "what is {letters}", "which word is {letters}",
        "{letters} what word is that", "what do the letters {letters} spell", "read {letters}",
        "what does {letters} mean", "put the letters {letters} together", "which word has the letters {letters}",
        "tell me the word {letters}", "{letters} makes which word",
    ), 0.8),
    Skill("first letter", "words", _first_letter, (
        "what is the first letter of {word}", "which letter does {word} start with",
        "what letter does {word} begin with", "what does {word} start with", "tell me the first letter of {word}",
        "first letter of {word}", "which is the first letter of {word}", "which letter comes first in {word}",
        "what letter is {word} starting with", "{word} starts with which letter", "name the first letter of {word}",
        "which letter is at the start of {word}",
    ), 0.7),
    Skill("last letter", "words", _last_letter, (
        "what is the last letter of {word}", "which letter does {word} end with", "what letter does {word} end with",
        "what does {word} end with", "tell me the last letter of {word}", "last letter of {word}",
        "which is the last letter of {word}", "which letter comes last in {word}", "how does {word} end",
        "{word} ends with which letter", "name the last letter of {word}", "which letter is at the end of {word}",
    ), 0.7),
    Skill("letters in", "words", _letters_in, (
        "how many letters does {word} have", "how many letters are in {word}", "how many letters has {word}",
        "how long is the word {word}", "count the letters of {word}", "count the letters in {word}",
        "how many letters are there in {word}", "tell me how many letters {word} has", "letters in {word}",
        "what is the number of letters in {word}", "how many letters make up {word}",
        "with how many letters do you write {word}",
    ), 0.7),
    Skill("opposite", "words", _opposite, (
        "what is the opposite of {word}", "opposite of {word}", "tell me the opposite of {word}",
        "what is the contrary of {word}", "what word is the opposite of {word}",
        "which word means the opposite of {word}", "if it is not {word} what is it",
        "give me the opposite of {word}", "say the opposite of {word}", "do you know the opposite of {word}",
        "what would be the opposite of {word}", "name the opposite of {word}",
    ), 2.0),
    Skill("compare", "words", _compare, (
        "which is {more} {x} or {y}", "what is {more} {x} or {y}", "which one is {more} {x} or {y}",
        "is {x} or {y} {more}", "{x} or {y} which is {more}", "tell me which is {more} {x} or {y}",
        "what do you think is {more} {x} or {y}", "which of them is {more} {x} or {y}", "{x} or {y} what is {more}",
        "of {x} and {y} which is {more}", "say which one is {more} {x} or {y}",
        "between {x} and {y} which one is {more}",
    ), 2.0),
    Skill("compare numbers", "words", _compare_numbers, (
        "which is {more} {x} or {y}", "what is {more} {x} or {y}", "which number is {more} {x} or {y}",
        "is {x} or {y} {more}", "{x} or {y} which is {more}", "tell me which is {more} {x} or {y}",
        "which one is {more} {x} or {y}", "what number is {more} {x} or {y}", "{x} or {y} what is {more}",
        "of {x} and {y} which is {more}", "say which one is {more} {x} or {y}",
        "between {x} and {y} which one is {more}",
    ), 1.5),
    Skill("is it", "words", _is_it, (
        "is {x} {more} than {y}", "tell me if {x} is {more} than {y}", "do you think {x} is {more} than {y}",
        "is it true that {x} is {more} than {y}", "is {x} really {more} than {y}", "{x} is {more} than {y} right",
        "would you say {x} is {more} than {y}", "i want to know if {x} is {more} than {y}",
        "can you tell if {x} is {more} than {y}", "{x} is {more} than {y} yes or no", "say if {x} is {more} than {y}",
        "am i right that {x} is {more} than {y}",
    )),
)  # fmt: skip
ANSWERS = (
    *dict.fromkeys(text for answers in OPPOSITE_OF.values() for text in answers),
    *dict.fromkeys(named(thing) for _, _, things in SCALES for thing in things), "yes", "no",
)  # fmt: skip
WORDS = (*ANSWERS, "more", "less", "bigger", "larger", "smaller", "yes", "no", "a", "an", "the")
