"""Turns that refer to what was said before."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from . import facts, language, order, scenes, sums
from .chat import WHICH
from .knowledge import fact
from .lexicon import OPPOSITE_OF, SPELLED
from .numerals import LARGEST, NUMBERS, word
from .order import ROWS, neighbour
from .shapes import SHAPES
from .turns import About, Skill, Talk, Turn

NOT_SAID, NOT_ASKED = "i did not say anything yet", "you did not ask anything yet"
LOST = "i lost track of the number"
SURE, UNSURE = "yes i think so", "no i am not sure"
SMALL, LEARNED = "because i am only a small model", "i learned it that way"
_WHICH_TOO = (WHICH, "what do you mean", "i did not understand that", "do not understand", "do not know")
# Turns that leave what was talked about as it was.
ASIDE = ("again", "slower", "sure", "why", "thanks", "praise", "fine", "what did i ask", "what did you say",
"the first",
          "first answer", "how many questions", "can you hear me")  # fmt: skip
_LOOSE = 0.06  # how often a reference has nothing to refer to


def ground(talk: Talk) -> Turn | None:
    """The turn that a reference goes back to."""
    return next((turn for turn in reversed(talk.turns) if turn.skill not in ASIDE), None)


def _about(talk: Talk) -> About | None:
    turn = ground(talk)
    return None if turn is None else turn.about


def _loose(talk: Talk, gist: str, **slots: str) -> Turn | None:
    """The honest answer to a reference to nothing."""
    if talk.rng.random() > (_LOOSE if talk.turns else 1.0):
        return None
    return Turn("", WHICH, accepted=_WHICH_TOO, slots=slots, gist=gist, about=About("loose"))


def _then(talk: Talk) -> Turn | None:
    rng, about = talk.rng, _about(talk)
    operation = rng.choice(sums.OPERATIONS[:3])
    if about is None or about.number is None:
        b = rng.randint(0, 20)
        gist = f"you asked for {operation} {word(b)}"
        if about is not None and about.kind in ("sum", "double", "chain") and rng.random() < 0.5:
            return Turn("", LOST, accepted=_lost(about, operation, b), kind="number",
            slots={"op": operation, "b": word(b)},
                        gist=gist, about=About("loose"))  # fmt: skip
        return _loose(talk, gist, op=operation, b=word(b))
    number = about.number
    most = {"plus": LARGEST - number, "minus": number, "times": LARGEST // max(1, number)}[operation]
    b = rng.randint(0, 20) if rng.random() < 0.12 else rng.randint(0, min(most, 10 if rng.random() < 0.6 else LARGEST))
    turn = sums.worked(operation, number, b)
    return replace(turn, slots={"op": operation, "b": word(b)})


def _lost(about: About, operation: str, b: int) -> tuple[str, ...]:
    """What is right too where the number was beyond the world: the sum itself."""
    if about.kind == "sum" and about.key[0] != "divided by":
        first, x, y = str(about.key[0]), int(about.key[1]), int(about.key[2])
        value = {"plus": x + y, "minus": x - y, "times": x * y}[first]
        value = {"plus": value + b, "minus": value - b, "times": value * b}[operation]
        return tuple(text for text in (word(value), *(sums.BEYOND if not 0 <= value <= LARGEST else ())))
    return sums.BEYOND


def _changed(make: Callable[[int], Turn]) -> Callable[[Talk], Turn | None]:
    def draw(talk: Talk) -> Turn | None:
        about = _about(talk)
        if about is None or about.number is None:
            return _loose(talk, "you asked for a number")
        return make(about.number)

    return draw


def _same(turn: Turn, gist: str) -> Turn:
    """The answer of a turn once more."""
    return Turn("", turn.answer, accepted=turn.accepted, kind=turn.kind, rivals=turn.rivals, choice=turn.choice,
    gist=gist,
                about=About("again"))  # fmt: skip


def _again(talk: Talk) -> Turn:
    if talk.last is None:
        return Turn(
            "", NOT_SAID, accepted=("did not say anything",), gist="you asked me to say it again", about=About("loose")
        )
    return _same(talk.last, "you asked me to say it again")


def _did_you_say(talk: Talk) -> Turn:
    if talk.last is None:
        return Turn(
            "", NOT_SAID, accepted=("did not say anything",), gist="you asked what i said", about=About("loose")
        )
    return _same(talk.last, "you asked what i said")


def _recalled(turn: Turn, gist: str) -> Turn:
    core = turn.gist
    for head in ("you asked me ", "you asked for ", "you asked ", "you said ", "you told me "):
        core = core.removeprefix(head)
    return Turn("", turn.gist, accepted=(core,), kind="recall", gist=gist, about=About("recall"))


def _did_i_ask(talk: Talk) -> Turn:
    if talk.last is None:
        return Turn(
            "", NOT_ASKED, accepted=("did not ask anything",), gist="you asked what you asked", about=About("loose")
        )
    return _recalled(talk.last, "you asked what you asked")


def _the_first(talk: Talk) -> Turn | None:
    if len(talk.turns) < 2:
        return None
    return _recalled(talk.turns[0], "you asked for your first question")


def _first_answer(talk: Talk) -> Turn | None:
    if len(talk.turns) < 2:
        return None
    return _same(talk.turns[0], "you asked for my first answer")


def _sure(talk: Talk) -> Turn | None:
    last = ground(talk)
    if last is None or last.about is None:
        return None
    if last.about.kind in ("refused", "loose", "nothing", "blind"):
        return Turn("", UNSURE, accepted=("not sure", "no"), gist="you asked if i am sure", about=About("sure"))
    if last.about.kind == "chat":
        return None
    return Turn("", SURE, accepted=("yes",), rivals=("not sure",), gist="you asked if i am sure", about=About("sure"))


def _why(talk: Talk) -> Turn | None:
    last = ground(talk)
    if last is None or last.about is None:
        return _loose(talk, "you asked why")
    accepted: tuple[str, ...]
    if last.about.kind in ("refused", "loose", "nothing", "blind", "chat"):
        answer, accepted = SMALL, ("small model", "do not know", LEARNED)
    elif last.why:
        answer, accepted = last.why, (last.why.removeprefix("because "), LEARNED)
    else:
        answer, accepted = LEARNED, ("learned",)
    return Turn("", answer, accepted=accepted, kind="recall", gist="you asked why", about=About("why"))


def _reached(about: About | None) -> tuple[str, str] | None:
    """The row and the name in it that the last answer ended with."""
    if about is None:
        return None
    if about.kind == "counting":
        return "number", word(int(about.key[0]))
    if about.kind == "ordinal":
        return str(about.key[0]), ROWS[str(about.key[0])][int(about.key[1])]
    row, _, side = about.kind.partition(" ")
    return (row, str(about.key[2])) if side in ("after", "before") and row in ROWS and about.key[2] else None


def _stepped(step: int) -> Callable[[Talk], Turn | None]:
    def draw(talk: Talk) -> Turn | None:
        about, gist = _about(talk), "you asked what comes next" if step > 0 else "you asked what comes before"
        reached = _reached(about)
        if reached is None:
            return _loose(talk, gist, row="one")
        if step < 0 and about is not None and about.kind == "counting":
            return None  # before the last one counted, or on in that direction: who knows
        on = int(about.key[1]) if about is not None and about.kind == "counting" and step > 0 else step
        turn = neighbour(*reached, on)
        return replace(turn, slots={"row": reached[0] if reached[0] != "number" or talk.rng.random() < 0.5 else "one"})

    return draw


def _other(talk: Talk) -> Turn | None:
    last, about = ground(talk), _about(talk)
    gist = "you asked for the other one"
    if last is None or about is None:
        return _loose(talk, gist)
    if about.kind == "compare":
        answer, other, _ = (str(part) for part in about.key)
        bare = (other.split()[-1],) if other.split()[0] in ("a", "an", "the") else ()
        rival = answer.split()[-1] if bare else answer
        return Turn(
            "", other, accepted=bare, kind="choice", rivals=(rival,), choice=True, gist=gist, about=About("other")
        )
    shown = talk.shown
    if about.kind != "seen" or shown is None or shown.picture is None or len(shown.picture.items) != 2:
        return _loose(talk, gist)
    skill, subject = str(about.key[0]), str(about.key[1])
    one, two = shown.picture.items
    if skill in ("color", "position") and one.shape != two.shape:
        wanted = f"the {two.shape if subject == f'the {one.shape}' else one.shape}"
    elif skill == "shape" and one.color != two.color:
        wanted = two.color if subject == one.color else one.color
    else:
        return None
    if skill != "shape" and subject not in (f"the {one.shape}", f"the {two.shape}"):
        return None
    turns = [
        turn for turn in scenes.asked_of(shown.picture).get(skill, ()) if turn.about and turn.about.key[1] == wanted
    ]
    return replace(turns[0], slots={}, gist=gist) if turns else None


def _subject(turn: Turn, text: str) -> Turn:
    return replace(turn, slots={"x": text})


def _likewise(talk: Talk) -> Turn | None:
    """The same question about something else; its words in slot x."""
    rng, about, last = talk.rng, _about(talk), ground(talk)
    if about is None or last is None:
        return None
    kind, key = about.kind, about.key
    if kind in facts.TABLES and kind != "how many":
        subject = rng.choice([name for name in facts.TABLES[kind] if name != key[0]])
        plain = kind in ("mix of", "plural of", "rhyme of", "young of") or rng.random() < 0.5
        name = facts.named(subject) if not plain or subject in facts.BARE else facts.plural(subject)
        return _subject(
            fact(kind, subject), subject if kind in ("mix of", "plural of", "rhyme of", "young of") else name
        )
    makers: dict[str, tuple[Callable[..., Turn], Sequence[str]]] = {
        "opposite": (language.opposite, tuple(OPPOSITE_OF)), "spell": (language.spelt, SPELLED),
        "first letter": (language.first_letter, SPELLED), "last letter": (language.last_letter, SPELLED),
        "letters in": (language.letters_in, SPELLED), "days in": (order.days_in, order.MONTHS),
    }  # fmt: skip
    if kind in makers:
        make, names = makers[kind]
        name = rng.choice([name for name in names if name != key[0]])
        return _subject(make(name), name)
    if kind in ("half", "double"):
        number = rng.randint(0, 50)
        return _subject((sums.halved if kind == "half" else sums.doubled)(number), word(number))
    row, _, side = kind.partition(" ")
    if row in ROWS and side in ("after", "before"):
        name = rng.choice([name for name in (ROWS[row] if row != "number" else NUMBERS[:41]) if name != key[0]])
        return _subject(neighbour(row, name, int(key[1])), name)
    if kind == "seen" and key[0] in ("color", "position") and talk.shown is not None and talk.shown.picture is not None:
        options = [
            turn
            for turn in scenes.asked_of(talk.shown.picture).get(str(key[0]), ())
            if turn.about and turn.about.key[1] not in (key[1], "it", "the number") and turn.answer != last.answer
            and not turn.answer.startswith("i see no ")
        ]  # fmt: skip
        if options:
            turn = rng.choice(options)
            return _subject(turn, turn.slots["thing"])
    return None


def _what_about(talk: Talk) -> Turn | None:
    return _likewise(talk) or _loose(talk, "you asked about something else", x=talk.rng.choice((
        "dogs", "a cat", "friday", "seven", "may", "the other day",
        *(f"the {shape}" for shape in SHAPES))))  # fmt: skip


def _meant(talk: Talk) -> Turn | None:
    rng, about = talk.rng, _about(talk)
    if about is not None and about.kind in ("sum", "chain"):
        if about.kind == "sum" and rng.random() < 0.6:
            operation = str(about.key[0])
        else:
            operation = rng.choice(sums.OPERATIONS)
        turn = sums.worked(operation, *sums.numbers_for(operation, rng))
        return _subject(turn, f"{turn.slots['a']} {operation} {turn.slots['b']}")
    return _likewise(talk)


def _how_many_questions(talk: Talk) -> Turn:
    number = len(talk.turns)
    return Turn("", word(number), kind="number", gist="you asked how many questions you asked", about=About("asked"),
                accepted=("none",) if not number else (word(number + 1),))  # fmt: skip


SKILLS = (
    Skill("then", "follow", _then, (
        "and {op} {b}", "{op} {b}", "now {op} {b}", "and that {op} {b}", "what is that {op} {b}", "then {op} {b}",
        "and now {op} {b}", "ok {op} {b}", "the result {op} {b}", "and what is that {op} {b}", "that {op} {b}",
        "and then {op} {b}", "continue with {op} {b}", "what if i do {op} {b}",
    ), 8.0),
    Skill("double that", "follow", _changed(sums.doubled), (
        "double that", "and double that", "now double that", "double it", "and twice that", "what is double that",
        "twice that", "what is twice that", "and now double it", "can you double that", "take it twice", "and doubled",
    ), 0.8),
    Skill("half of that", "follow", _changed(sums.halved), (
        "half of that", "and half of that", "now half of that", "halve it", "what is half of that",
        "and the half of it", "half of it", "and now halve that", "cut that in half", "can you halve that",
        "take half of it", "and halved",
    ), 0.8),
    Skill("again", "follow", _again, (
        "say it again", "say that again", "again please", "once more", "can you repeat that", "repeat that please",
        "one more time", "could you say that again", "pardon", "sorry what was that", "come again", "again",
        "repeat that", "i did not hear you", "what was that again", "please repeat your answer",
    ), 2.0),
    Skill("slower", "follow", _again, (
        "say it slower", "say that slowly", "more slowly please", "can you say it slower", "a bit slower please",
        "not so fast", "slowly please", "slower", "say it again slowly", "please say it slower",
        "that was too fast", "could you say it slowly",
    ), 0.8),
    Skill("what did you say", "follow", _did_you_say, (
        "what did you say", "what did you just say", "what was your answer", "what was it you said",
        "tell me what you said", "what did you answer", "what have you said", "can you tell me what you said",
        "what was the answer", "what did you tell me", "which answer did you give", "what was your last answer",
    ), 1.2),
    Skill("what did i ask", "follow", _did_i_ask, (
        "what did i ask", "what did i just ask", "what was my question", "tell me what i asked", "what did i say",
        "what did i ask you", "do you remember my question", "repeat my question", "what was my last question",
        "what have i asked", "which question did i ask", "say what i asked",
    ), 1.5),
    Skill("the first", "follow", _the_first, (
        "what was the first one", "what did i ask first", "what was my first question",
        "what was the first thing i asked", "what did i say first", "tell me my first question",
        "which was the first question", "what was the first question", "do you remember my first question",
        "what did i ask at the beginning", "with what question did i start", "what was it that i asked first",
    )),
    Skill("first answer", "follow", _first_answer, (
        "what was your first answer", "what did you say first", "what did you answer first",
        "tell me your first answer", "say your first answer again", "which was your first answer",
        "what was the first answer", "repeat your first answer", "what did you say at the beginning",
        "do you remember your first answer", "with what answer did you start", "what was it that you said first",
    ), 0.6),
    Skill("how many questions", "follow", _how_many_questions, (
        "how many questions did i ask", "how many things did i ask", "how often did i ask you something",
        "how many questions have i asked", "count my questions", "how many times did i ask you something",
        "tell me how many questions i asked", "how many questions were there", "how much did i ask",
        "how many did i ask", "what is the number of my questions", "do you know how many questions i asked",
    ), 0.3),
    Skill("sure", "follow", _sure, (
        "are you sure", "really", "is that right", "are you certain", "is that true", "is that correct",
        "do you mean that", "are you sure about that", "is this right", "are you really sure", "can i trust that",
        "is there no doubt",
    ), 1.2),
    Skill("why", "follow", _why, (
        "why", "why is that", "how do you know", "how do you know that", "why so", "tell me why", "can you tell me why",
        "how come", "why do you say that", "explain that", "for what reason", "what makes you say that",
    ), 1.2),
    Skill("next", "follow", _stepped(1), (
        "and the next", "what comes next", "and then", "and after that", "the next one", "next", "what is next",
        "and the next one", "and what comes after that", "next please", "and the {row} after",
        "and the {row} after that", "and what follows", "what {row} is after that",
    ), 8.0),
    Skill("before that", "follow", _stepped(-1), (
        "and before that", "and the one before", "what comes before that", "and what is before that",
        "what was before that", "the one before", "and the one before that", "and the {row} before",
        "and what came before", "and the {row} before that", "and what precedes it", "what {row} is before that",
    ), 5.0),
    Skill("the other", "follow", _other, (
        "the other one", "and the other one", "what about the other one", "and the other", "how about the other one",
        "now the other one", "what is the other one", "and what about the other", "tell me about the other one",
        "the other one please", "and what of the other one", "the other one too",
    ), 10.0),
    Skill("what about", "follow", _what_about, (
        "what about {x}", "and {x}", "how about {x}", "and what about {x}", "and for {x}", "now {x}",
        "the same for {x}", "ok and {x}", "and how about {x}", "what is it for {x}", "and with {x}",
        "do the same with {x}", "tell me for {x} too",
    ), 8.0),
    Skill("i meant", "follow", _meant, (
        "no i meant {x}", "i meant {x}", "sorry i meant {x}", "no i said {x}", "not that i meant {x}", "i mean {x}",
        "no {x}", "wait i meant {x}", "actually i meant {x}", "oh i meant {x}", "no no i meant {x}",
        "i wanted to say {x}", "correction {x}",
    ), 4.0),
)  # fmt: skip
ANSWERS = (NOT_SAID, NOT_ASKED, WHICH, LOST, SURE, UNSURE, SMALL, LEARNED)
_GISTS = (  # of answers to "what did i ask?" and "why?"
    "you asked what i said you asked if i am sure what comes next before for the other one your first question",
    "my first answer me to say it again what i heard to write down how many questions number about something else",
    "large numbers sum with because comes after before is are has says days legs starts ends with letters letter",
    "how spell which or whether young called sound makes lives plural rhymes live color what i see there where moves",
    "way move shape moving was said",
)
WORDS = (*ANSWERS, *_GISTS)
