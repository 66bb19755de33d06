"""Whole conversations, drawn; and all words and answers of the world."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

from . import chat, facts, follow, knowledge, language, lexicon, order, outside, scenes, sums
from .lexicon import sentence
from .numerals import NUMBER_WORDS, NUMBERS
from .turns import Conversation, Skill, Talk, Turn, words_of

MOST_TURNS = 8
SKILLS: dict[str, Skill] = {
    skill.name: skill
    for part in (sums, order, language, knowledge, chat, outside, scenes, follow)
    for skill in part.SKILLS
}
GROUPS: dict[str, tuple[Skill, ...]] = {
    group: tuple(skill for skill in SKILLS.values() if skill.group == group)
    for group in dict.fromkeys(skill.group for skill in SKILLS.values())
}
SHARES = {  # of a turn that starts something new
    "sums": 4.0, "order": 3.0, "words": 2.5, "facts": 2.5, "chat": 2.5, "repeat": 1.2, "outside": 2.5, "sound": 0.8,
    "picture": 2.5, "clip": 0.8,
}  # fmt: skip
_LENGTHS = (6, 4, 4, 3, 3, 2, 2, 2)  # weights of one to eight turns
_FOLLOWS, _FOLLOWS_FIRST = 0.45, 0.03  # how often a turn refers to what was said
_STAYS = 0.6  # how often a picture or clip that is there is asked about again, rather than anything else
_TRIES = 6  # at a turn that refers to something
_THANKS = 0.3  # of conversations end so


def turn(skill: str, rng: random.Random, *, held_out: bool = False, sentences: Sequence[str] = ()) -> Turn:
    """One turn of a skill by itself, not of the group "follow", which needs something to refer to."""
    while True:
        made = SKILLS[skill].ask(Talk(rng, held_out=held_out, sentences=sentences))
        if made is not None:
            return made


def conversation(
    rng: random.Random,
    *,
    turns: int | None = None,
    held_out: bool = False,
    media: bool = True,
    sentences: Sequence[str] = (),
    shares: dict[str, float] | None = None,
) -> Conversation:
    """A conversation of so many turns, or of one to eight.

    held_out: asked in ways and about things that are not trained. media: with pictures, clips and sounds. sentences:
    free English of the caller, to be repeated and written down. shares: how often a new subject is of each group.
    """
    if turns is not None and not 1 <= turns <= MOST_TURNS:
        raise ValueError(f"{turns} turns; a conversation has 1 to {MOST_TURNS}")
    length = turns or rng.choices(range(1, MOST_TURNS + 1), _LENGTHS)[0]
    talk = Talk(rng, held_out=held_out, sentences=sentences, media=media)
    chances = dict(SHARES if shares is None else shares)
    while len(talk.turns) < length:
        made = _next(talk, chances, last=len(talk.turns) + 1 == length)
        if made is not None:
            talk.turns.append(made)
    return Conversation(tuple(talk.turns), held_out)


def _next(talk: Talk, chances: dict[str, float], *, last: bool) -> Turn | None:
    rng = talk.rng
    if last and len(talk.turns) > 1 and rng.random() < _THANKS:
        return SKILLS[rng.choice(("thanks", "thanks", "thanks", "goodbye"))].ask(talk)
    if rng.random() < (_FOLLOWS if talk.turns else _FOLLOWS_FIRST):
        return next((made for _ in range(_TRIES) if (made := _of_group("follow", talk)) is not None), None)
    shown = talk.shown
    if shown is not None and rng.random() < _STAYS:
        return _of_group(shown.media, talk)
    return _of_group(rng.choices(list(chances), list(chances.values()))[0], talk)


def _of_group(group: str, talk: Talk) -> Turn | None:
    skills = GROUPS[group]
    return talk.rng.choices(skills, [skill.weight for skill in skills])[0].ask(talk)


def spoken_texts(rng: random.Random, *, sentences: Sequence[str] = ()) -> Iterator[str]:
    """Texts of this world as a person says them, words only, without end: questions as in conversations, sentences,
    numbers, lone words, and answers, which people say too."""
    answers = all_answers()
    while True:
        chance = rng.random()
        if chance < 0.62:
            for one in conversation(rng, sentences=sentences).turns:
                if one.question:
                    yield spoken(one, rng)
        elif chance < 0.8:
            yield chat.plain(rng.choice(sentences)) if sentences and rng.random() < 0.6 else sentence(rng)
        elif chance < 0.88:
            yield " ".join(rng.choices(NUMBERS[:21] if rng.random() < 0.7 else NUMBERS, k=rng.randint(1, 6)))
        elif chance < 0.94:
            yield rng.choice(lexicon.SPELLED)
        else:
            yield rng.choice(answers)


_BEFORE = ("please", "hey", "ok", "so", "um", "well", "omni", "hey omni", "hello", "and")
_AFTER = ("please", "omni", "now")


def spoken(one: Turn, rng: random.Random) -> str:
    """A turn's question as a person says it: now and then with a word before or behind, and contracted."""
    text = one.question
    if one.kind == "text" or SKILLS[one.skill].group in ("chat", "follow"):
        return text
    chance = rng.random()
    if chance < 0.1:
        text = f"{rng.choice(_BEFORE)} {text}"
    elif chance < 0.16:
        text = f"{text} {rng.choice(_AFTER)}"
    if rng.random() < 0.3:
        for long, short in CONTRACTIONS.items():
            text = f" {text} ".replace(f" {long} ", f" {short} ").strip()
    return text


CONTRACTIONS = {
    "what is": "what's", "who is": "who's", "where is": "where's", "how is": "how's", "it is": "it's",
    "that is": "that's", "i am": "i'm", "you are": "you're", "do not": "don't", "can not": "can't", "did not": "didn't",
    "does not": "doesn't", "is not": "isn't",
}  # fmt: skip


def all_answers() -> list[str]:
    """Every answer but those that take words from the question (sentences that are repeated, spelling, names, what was
    asked) and counting: all of them must be spoken well."""
    parts = (sums.ANSWERS, NUMBERS, order.ANSWERS, language.ANSWERS, knowledge.ANSWERS, chat.CANNED, outside.ANSWERS,
             scenes.ANSWERS, follow.ANSWERS)  # fmt: skip
    return list(dict.fromkeys(answer for part in parts for answer in part))


def vocabulary() -> list[str]:
    """Every word of what is trained, sorted: what the tokenizer knows as single tokens. Words that are kept for
    evaluation are missing."""
    asked = [pattern for skill in SKILLS.values() for pattern in skill.ways(held_out=False)]
    parts = (sums, order, language, knowledge, chat, outside, scenes, follow, lexicon, facts)
    words = words_of(asked) | {word for part in parts for text in part.WORDS for word in text.split()}
    words |= {word for text in (*all_answers(), *_BEFORE, *_AFTER) for word in text.split()}
    words |= {*CONTRACTIONS.values(), *NUMBER_WORDS, "can", "could", "tell", "want", "to", "know", "calculate"}
    return sorted(word for text in words for word in text.split())
