"""What comes in an order: numbers counted, days, months, letters."""

from __future__ import annotations

from dataclasses import replace

from .numerals import LARGEST, NUMBERS, ORDINALS, word
from .sums import MORE, TOO_LARGE, outcome
from .turns import About, Skill, Talk, Turn

DAYS = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")
MONTHS = (
    "january", "february", "march", "april", "may", "june", "july", "august", "september", "october", "november",
    "december",
)  # fmt: skip
MONTH_DAYS = dict(zip(MONTHS, (31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)))
LETTERS = tuple("abcdefghijklmnopqrstuvwxyz")
ROWS: dict[str, tuple[str, ...]] = {"number": NUMBERS, "day": DAYS, "month": MONTHS, "letter": LETTERS}
NO_LETTER_AFTER, NO_LETTER_BEFORE = "z is the last letter", "a is the first letter"
TOO_MANY = "that is too many numbers for me"
_LONGEST = 12  # numbers in one answer


def neighbour(row: str, name: str, step: int) -> Turn:
    """What comes `step` after a name of a row; days and months go round, numbers and letters end."""
    names = ROWS[row]
    place = names.index(name) + step
    if row in ("day", "month"):
        place %= len(names)
    accepted: tuple[str, ...] = ()
    if 0 <= place < len(names):
        answer = names[place]
    elif row == "letter":
        answer = NO_LETTER_AFTER if step > 0 else NO_LETTER_BEFORE
    else:
        answer, accepted = outcome(place)
    known = 0 <= place < len(names)
    side = "after" if step > 0 else "before"
    far = "" if abs(step) == 1 else f"{word(abs(step))} {row}s "
    about = About(f"{row} {side}", (name, step, answer if known else ""), place if row == "number" and known else None)
    gist = f"you asked what comes {far}{side} {name}"
    why = f"because {answer} comes {far}{side} {name}" if known else ""
    slots = {"name": name}
    return Turn("", answer, accepted=accepted, kind=row, slots=slots, gist=gist, why=why, about=about)


def _number_after(talk: Talk) -> Turn:
    rng = talk.rng
    if rng.random() < 0.05:
        number = rng.randint(LARGEST + 1, 999)
        return Turn("", TOO_LARGE, accepted=(word(number + 1), MORE), kind="number", slots={"name": word(number)},
                    gist="you asked for a large number", about=About("refused"))  # fmt: skip
    return neighbour("number", rng.choice(NUMBERS[:21] if rng.random() < 0.4 else NUMBERS), 1)


def _number_before(talk: Talk) -> Turn:
    rng = talk.rng
    return neighbour("number", rng.choice(NUMBERS[:21] if rng.random() < 0.4 else NUMBERS), -1)


def _day_after(talk: Talk) -> Turn:
    return neighbour("day", talk.rng.choice(DAYS), 1)


def _day_before(talk: Talk) -> Turn:
    return neighbour("day", talk.rng.choice(DAYS), -1)


def _two_days(talk: Talk) -> Turn:
    return neighbour("day", talk.rng.choice(DAYS), 2)


def _today(talk: Talk) -> Turn:
    turn = neighbour("day", talk.rng.choice(DAYS), talk.rng.choice((1, -1)))
    assert turn.about is not None
    return replace(turn, slots=dict(turn.slots) | {"when": "tomorrow" if turn.about.key[1] == 1 else "yesterday"})


def _month_after(talk: Talk) -> Turn:
    return neighbour("month", talk.rng.choice(MONTHS), 1)


def _month_before(talk: Talk) -> Turn:
    return neighbour("month", talk.rng.choice(MONTHS), -1)


def _letter_after(talk: Talk) -> Turn:
    return neighbour("letter", talk.rng.choice(LETTERS), 1)


def _letter_before(talk: Talk) -> Turn:
    return neighbour("letter", talk.rng.choice(LETTERS), -1)


def days_in(month: str) -> Turn:
    """How many days a month has."""
    number = MONTH_DAYS[month]
    accepted = ("twenty nine", "twenty eight or twenty nine") if month == "february" else ()
    return Turn(
        "", word(number), accepted=accepted, kind="number", slots={"name": month},
        gist=f"you asked how many days are in {month}", why=f"because {month} has {word(number)} days",
        about=About("days in", (month,), number),
    )  # fmt: skip


def _days_in(talk: Talk) -> Turn:
    return days_in(talk.rng.choice(MONTHS))


def ordinal(row: str, place: int) -> Turn:
    """The name at a place of the days, months or letters."""
    name = ROWS[row][place]
    slots = {"row": row, "nth": ORDINALS[place]}
    why = f"because {name} is the {ORDINALS[place]} {row}"
    gist = f"you asked for the {ORDINALS[place]} {row}"
    return Turn("", name, kind=row, slots=slots, gist=gist, why=why, about=About("ordinal", (row, place)))


def _ordinal(talk: Talk) -> Turn:
    row = talk.rng.choice(("day", "month", "month", "letter"))
    return ordinal(row, talk.rng.randrange(min(12, len(ROWS[row]))))


def counted(first: int, last: int) -> Turn:
    """All numbers from one to another, up or down."""
    step = 1 if first <= last else -1
    answer = " ".join(word(number) for number in range(first, last + step, step))
    slots = {"first": word(first), "last": word(last)}
    gist = f"you asked me to count from {word(first)} to {word(last)}"
    return Turn("", answer, kind="counting", slots=slots, gist=gist, about=About("counting", (last, step)))


def _count_up(talk: Talk) -> Turn:
    rng = talk.rng
    first = rng.randint(0, 10) if rng.random() < 0.6 else rng.randint(11, LARGEST - 1)
    return counted(first, min(LARGEST, first + rng.randint(1, _LONGEST - 1)))


def _count_far(talk: Talk) -> Turn:
    """More numbers than one answer holds."""
    rng = talk.rng
    last = rng.choice((30, 40, 50, 50, 60, 100, 100, 100, 150, 200, 1000, rng.randint(31, LARGEST)))
    accepted = (" ".join(NUMBERS[1 : last + 1]),) if last <= LARGEST else ()
    return Turn("", TOO_MANY, accepted=accepted, slots={"last": word(last)}, about=About("refused"),
                gist=f"you asked me to count to {word(last)}"
                if last <= LARGEST else "you asked me to count too far")  # fmt: skip


def _count_to(talk: Talk) -> Turn:
    return counted(1, talk.rng.choice((3, 4, 5, 5, 6, 7, 8, 9, 10, 10, 10, 11, 12, 15, 20)))


def _count_down(talk: Talk) -> Turn:
    rng = talk.rng
    last = rng.randint(0, 10) if rng.random() < 0.6 else rng.randint(11, LARGEST - 1)
    return counted(min(LARGEST, last + rng.randint(1, _LONGEST - 1)), last)


def _count_down_from(talk: Talk) -> Turn:
    return counted(talk.rng.choice((3, 4, 5, 5, 6, 7, 8, 9, 10, 10, 10, 12)), talk.rng.choice((0, 1, 1, 1)))


def _countdown(talk: Talk) -> Turn:
    """To one, as nobody said where to end; to zero is right too."""
    turn = counted(talk.rng.choice((3, 4, 5, 5, 6, 7, 8, 9, 10, 10, 10, 12)), 1)
    gist = f"you asked me to count down from {turn.slots['first']}"
    return replace(turn, accepted=(f"{turn.answer} zero",), gist=gist)


def _row(talk: Talk) -> Turn:
    row, names = talk.rng.choice((("days of the week", DAYS), ("months of the year", MONTHS), ("letters", LETTERS)))
    kind = {"days of the week": "day", "months of the year": "month", "letters": "letters"}[row]
    slots = {"row": row if row != "letters" else talk.rng.choice(("letters of the alphabet", "letters", "alphabet"))}
    return Turn("", " ".join(names), kind=f"all {kind}", slots=slots, gist=f"you asked for the {row}")


SKILLS = (
    Skill("count up", "order", _count_up, (
        "count from {first} to {last}", "count up from {first} to {last}", "count {first} to {last}",
        "please count from {first} to {last}", "start at {first} and count to {last}",
        "can you count from {first} to {last}", "say the numbers from {first} to {last}",
        "tell me all numbers from {first} to {last}", "which numbers are there from {first} to {last}",
        "name the numbers from {first} to {last}", "begin with {first} and count up to {last}",
        "list the numbers from {first} until {last}",
    )),
    Skill("count to", "order", _count_to, (
        "count to {last}", "count up to {last}", "please count to {last}", "can you count to {last}",
        "i want you to count to {last}", "now count to {last}", "could you count up to {last}",
        "show me how you count to {last}", "count for me to {last}", "let me hear you count to {last}",
        "try to count to {last}", "count all the way to {last}",
    )),
    Skill("count far", "order", _count_far, (
        "count to {last}", "count up to {last}", "please count to {last}", "can you count to {last}",
        "i want you to count to {last}", "now count to {last}", "count from one to {last}",
        "could you count up to {last}", "say all numbers up to {last}", "count for me to {last}",
        "try to count to {last}", "count all the way to {last}",
    ), 0.5),
    Skill("count down", "order", _count_down, (
        "count from {first} down to {last}", "count down from {first} to {last}",
        "count backwards from {first} to {last}", "please count down from {first} to {last}",
        "start at {first} and count down to {last}", "can you count down from {first} to {last}",
        "say the numbers from {first} down to {last}", "count {first} down to {last}",
        "go from {first} down to {last}", "count back from {first} to {last}",
        "begin with {first} and count down to {last}", "list the numbers from {first} back to {last}",
    )),
    Skill("countdown", "order", _countdown, (
        "count down from {first}", "count backwards from {first}", "please count down from {first}",
        "can you count down from {first}", "start at {first} and count down", "do a countdown from {first}",
        "give me a countdown from {first}", "countdown from {first}", "count back from {first}",
        "i want you to count down from {first}", "begin with {first} and count down",
        "let me hear a countdown from {first}",
    ), 0.7),
    Skill("number after", "order", _number_after, (
        "what comes after {name}", "which number comes after {name}", "what number is after {name}",
        "what is the number after {name}", "which number follows {name}", "what is the next number after {name}",
        "tell me what comes after {name}", "what is one more than {name}", "after {name} comes what",
        "what do you say after {name} when you count", "say the number that follows {name}",
        "which number is next after {name}",
    )),
    Skill("number before", "order", _number_before, (
        "what comes before {name}", "which number comes before {name}", "what number is before {name}",
        "what is the number before {name}", "what is one less than {name}", "tell me what comes before {name}",
        "what is the number just before {name}", "before {name} comes what", "which number stands before {name}",
        "tell me the number before {name}", "say the number that is before {name}",
        "which number is right before {name}",
    )),
    Skill("day after", "order", _day_after, (
        "what day comes after {name}", "which day comes after {name}", "what is the day after {name}",
        "which day follows {name}", "tell me the day after {name}", "what comes after {name}",
        "what day is tomorrow if today is {name}", "what is tomorrow of {name}", "what is the next day after {name}",
        "{name} is today what is tomorrow", "which day is next after {name}", "what day do we have after {name}",
    )),
    Skill("day before", "order", _day_before, (
        "what day comes before {name}", "which day comes before {name}", "what is the day before {name}",
        "tell me the day before {name}", "what comes before {name}", "what day was yesterday if today is {name}",
        "what is yesterday of {name}", "{name} is today what was yesterday", "which day is just before {name}",
        "what day was it before {name}", "which day is right before {name}", "what day do we have before {name}",
    )),
    Skill("today", "order", _today, (
        "today is {name} what is {when}", "if today is {name} what day is {when}", "it is {name} what day is {when}",
        "today is {name} which day is {when}", "if it is {name} today what is {when}", "today is {name} and {when}",
        "when today is {name} which day is {when}", "what day is {when} when today is {name}",
        "it is {name} today which day is {when}", "say today is {name} what is {when}",
        "suppose today is {name} what is {when}", "which day is {when} if we have {name} today",
    ), 0.7),
    Skill("in two days", "order", _two_days, (
        "what day is two days after {name}", "which day is two days after {name}", "what comes two days after {name}",
        "today is {name} what day is it in two days", "if today is {name} what is the day after tomorrow",
        "what is the day after tomorrow if it is {name}", "tell me the day two days after {name}",
        "{name} plus two days", "what day is it two days from {name}", "it is {name} what day is it in two days",
        "name the day two days after {name}", "two days after {name} is which day",
    ), 0.6),
    Skill("month after", "order", _month_after, (
        "what month comes after {name}", "which month comes after {name}", "what is the month after {name}",
        "which month follows {name}", "tell me the month after {name}", "what comes after {name}",
        "what is the next month after {name}", "if it is {name} what is next month", "after {name} comes which month",
        "it is {name} now which month is next", "which month is next after {name}",
        "what month do we have after {name}",
    ), 0.8),
    Skill("month before", "order", _month_before, (
        "what month comes before {name}", "which month comes before {name}", "what is the month before {name}",
        "tell me the month before {name}", "what comes before {name}", "if it is {name} what was last month",
        "before {name} comes which month", "it is {name} now which month was last", "which month is just before {name}",
        "what month was it before {name}", "which month is right before {name}", "what month do we have before {name}",
    ), 0.8),
    Skill("letter after", "order", _letter_after, (
        "what letter comes after {name}", "which letter comes after {name}", "what is the letter after {name}",
        "which letter follows {name}", "tell me the letter after {name}", "what comes after {name}",
        "what is the next letter after {name}", "what letter is after {name}", "what comes after the letter {name}",
        "in the alphabet what comes after {name}", "which letter is next after {name}",
        "say the letter that follows {name}",
    )),
    Skill("letter before", "order", _letter_before, (
        "what letter comes before {name}", "which letter comes before {name}", "what is the letter before {name}",
        "tell me the letter before {name}", "what comes before {name}", "what letter is before {name}",
        "what comes before the letter {name}", "in the alphabet what comes before {name}",
        "what is the letter just before {name}", "which letter stands before {name}",
        "which letter is right before {name}", "say the letter that is before {name}",
    )),
    Skill("days in a month", "order", _days_in, (
        "how many days are in {name}", "how many days does {name} have", "how many days has {name}",
        "how long is {name}", "tell me how many days are in {name}", "how many days are there in {name}",
        "what is the number of days in {name}", "how many days long is {name}", "days in {name}",
        "does {name} have thirty days or how many", "how many days make up {name}", "count the days of {name}",
    )),
    Skill("ordinal", "order", _ordinal, (
        "which {row} is {nth}", "which {row} is the {nth}", "what is the {nth} {row}", "which is the {nth} {row}",
        "tell me the {nth} {row}", "name the {nth} {row}", "the {nth} {row}", "what {row} is the {nth}",
        "what {row} comes {nth}", "which {row} comes {nth}", "what do you call the {nth} {row}", "say the {nth} {row}",
    )),
    Skill("whole row", "order", _row, (
        "name the {row}", "list the {row}", "say the {row}", "tell me the {row}", "what are the {row}",
        "can you say the {row}", "say all the {row}", "name all the {row}", "please list the {row}",
        "do you know the {row}", "let me hear the {row}", "give me all the {row}",
    ), 0.4),
)  # fmt: skip
ANSWERS = (TOO_MANY, *DAYS, *MONTHS, *LETTERS, NO_LETTER_AFTER, NO_LETTER_BEFORE, " ".join(DAYS), " ".join(MONTHS),
           " ".join(LETTERS))  # fmt: skip
WORDS = (*ANSWERS, *ORDINALS, "today", "tomorrow", "yesterday", "days", "months", "letters", "of", "the", "week",
"year",
         "alphabet", "twenty eight or twenty nine", "large number", "day", "month", "letter", "two")  # fmt: skip
