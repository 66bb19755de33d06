"""Arithmetic: what is asked, and the answers, from zero to one hundred and honest beyond."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

from .numerals import LARGEST, NUMBERS, word
from .turns import About, Skill, Talk, Turn

MORE, LESS = "that is more than a hundred", "that is less than zero"
UNEVEN, BY_ZERO = "that does not come out even", "nothing can be divided by zero"
TOO_LARGE = "i only know numbers up to a hundred"
TOO_HARD = "sorry that is too hard for me"
BEYOND = (MORE, LESS, UNEVEN, BY_ZERO, TOO_LARGE)
OPERATIONS = ("plus", "minus", "times", "divided by")
_COUNTED = (
    "apples", "books", "coins", "eggs", "cards", "balls", "cookies", "pens", "stars", "flowers", "boxes", "cups",
)  # fmt: skip


def outcome(value: int) -> tuple[str, tuple[str, ...]]:
    """The answer that a whole number makes, and what is right besides: the number itself where the world ends."""
    if value > LARGEST:
        return MORE, (word(value), "more than a hundred", "over a hundred", "above a hundred")
    if value < 0:
        return LESS, (word(value), "less than zero", "below zero", "negative")
    return word(value), ()


def result(operation: str, a: int, b: int) -> tuple[str, tuple[str, ...], int | None]:
    """The answer to a sum, what is right besides, and the number where it is one of the world's."""
    if operation == "divided by" and (not b or a % b):
        return (UNEVEN if b else BY_ZERO), (_quotient(a, b) if b else ()), None
    value = {"plus": a + b, "minus": a - b, "times": a * b}[operation] if operation != "divided by" else a // b
    answer, accepted = outcome(value)
    return answer, accepted, value if 0 <= value <= LARGEST else None


def _quotient(a: int, b: int) -> tuple[str, ...]:
    whole, rest = divmod(a, b)
    exact = (f"{word(whole)} and a half",) if 2 * rest == b else ()
    return (*exact, f"{word(whole)} remainder {word(rest)}")


def numbers_for(operation: str, rng: random.Random) -> tuple[int, int]:
    """Two numbers in 0..100: half of them easy, most results within the world, the rest beyond it."""
    chance = rng.random()
    if operation == "plus":
        if chance < 0.45:
            return rng.randint(0, 12), rng.randint(0, 12)
        if chance < 0.88:
            total = rng.randint(0, LARGEST)
            return (first := rng.randint(0, total)), total - first
        return rng.randint(0, LARGEST), rng.randint(0, LARGEST)
    if operation == "minus":
        high = 20 if chance < 0.45 else LARGEST
        first, second = rng.randint(0, high), rng.randint(0, high)
        return (first, second) if rng.random() < 0.15 else (max(first, second), min(first, second))
    if operation == "times":
        if chance < 0.6:
            return rng.randint(0, 10), rng.randint(0, 10)
        first = rng.randint(1, 50)
        second = rng.randint(0, LARGEST // first) if chance < 0.88 else rng.randint(2, LARGEST)
        return (first, second) if rng.random() < 0.5 else (second, first)
    divisor = rng.randint(1, 12) if chance < 0.97 else 0
    if chance < 0.8:
        return divisor * rng.randint(0, LARGEST // divisor), divisor
    return rng.randint(0, LARGEST), divisor


def worked(operation: str, a: int, b: int) -> Turn:
    """A sum without its words."""
    answer, accepted, number = result(operation, a, b)
    asked = f"{word(a)} {operation} {word(b)}"
    why = f"because {asked} is {answer}" if number is not None else ""
    about = About("sum", (operation, a, b), number)
    slots = {"a": word(a), "b": word(b)}
    gist = f"you asked for {asked}"
    return Turn("", answer, accepted=accepted, kind="number", slots=slots, gist=gist, why=why, about=about)


def _sum(talk: Talk) -> Turn:
    return worked("plus", *numbers_for("plus", talk.rng))


def _difference(talk: Talk) -> Turn:
    return worked("minus", *numbers_for("minus", talk.rng))


def _product(talk: Talk) -> Turn:
    return worked("times", *numbers_for("times", talk.rng))


def _quotients(talk: Talk) -> Turn:
    return worked("divided by", *numbers_for("divided by", talk.rng))


def _large(talk: Talk) -> Turn:
    """Numbers that the world does not have."""
    rng = talk.rng
    operation = rng.choice(OPERATIONS[:3])
    a, b = rng.choice((rng.randint(101, 999), rng.randint(101, 9999))), rng.randint(1, 200)
    if operation != "minus" and rng.random() < 0.5:
        a, b = b, a
    value = {"plus": a + b, "minus": a - b, "times": a * b}[operation]
    answer, others = outcome(value)
    accepted = (*others, answer if value > LARGEST or value < 0 else word(value))
    slots = {"a": word(a), "b": word(b), "op": operation}
    gist = "you asked for a sum with large numbers"
    return Turn("", TOO_LARGE, accepted=accepted, kind="number", slots=slots, gist=gist, about=About("refused"))


def halved(number: int) -> Turn:
    """Half of a number."""
    whole, odd = divmod(number, 2)
    answer = (f"{word(whole)} and a half" if whole else "a half") if odd else word(whole)
    accepted = ("one half", "zero and a half") if number == 1 else ()
    about = About("half", (number,), None if odd else whole)
    slots = {"a": word(number)}
    gist = f"you asked for half of {word(number)}"
    why = f"because half of {word(number)} is {answer}"
    return Turn("", answer, accepted=accepted, kind="number", slots=slots, gist=gist, why=why, about=about)


def doubled(number: int) -> Turn:
    """Twice a number."""
    answer, accepted = outcome(2 * number)
    about = About("double", (number,), 2 * number if 2 * number <= LARGEST else None)
    slots = {"a": word(number)}
    gist = f"you asked for double {word(number)}"
    why = f"because {word(number)} plus {word(number)} is {answer}" if about.number is not None else ""
    return Turn("", answer, accepted=accepted, kind="number", slots=slots, gist=gist, why=why, about=about)


def _half(talk: Talk) -> Turn:
    rng = talk.rng
    return halved(rng.randint(0, 20) if rng.random() < 0.5 else 2 * rng.randint(0, LARGEST // 2))


def _double(talk: Talk) -> Turn:
    rng = talk.rng
    return doubled(rng.randint(0, 50) if rng.random() < 0.9 else rng.randint(51, LARGEST))


def _how_many_more(talk: Talk) -> Turn:
    a, b = numbers_for("minus", talk.rng)
    return worked("minus", max(a, b), min(a, b))


def added_up(terms: Sequence[int], operations: Sequence[str]) -> Turn:
    """A chain of sums and differences, from left to right."""
    value, asked = terms[0], word(terms[0])
    for operation, term in zip(operations, terms[1:]):
        value += term if operation == "plus" else -term
        asked += f" {operation} {word(term)}"
    answer, accepted = outcome(value)
    number = value if 0 <= value <= LARGEST else None
    about = About("chain", (*terms, *operations), number)
    why = f"because {asked} is {answer}" if number is not None else ""
    gist = f"you asked for {asked}"
    return Turn("", answer, accepted=accepted, kind="number", slots={"sum": asked}, gist=gist, why=why, about=about)


def _chain(talk: Talk) -> Turn:
    rng = talk.rng
    while True:
        terms = [rng.randint(0, rng.choice((10, 10, 30))) for _ in range(3)]
        operations = [rng.choice(OPERATIONS[:2]) for _ in range(2)]
        turn = added_up(terms, operations)
        if turn.about is not None and (turn.about.number is not None or rng.random() < 0.2):
            return turn


def squared(number: int) -> Turn:
    """A number times itself."""
    turn = worked("times", number, number)
    return replace(turn, gist=f"you asked for {word(number)} squared")


def _square(talk: Talk) -> Turn:
    return squared(talk.rng.randint(0, 10 if talk.rng.random() < 0.85 else 20))


def _hard(talk: Talk) -> Turn:
    """What the world does not work out: decimals, percent, roots, powers, signs in front, products before sums."""
    rng = talk.rng
    a, b, c = rng.randint(1, 20), rng.randint(1, 20), rng.randint(1, 9)
    kind = rng.randrange(6)
    accepted: tuple[str, ...] = ()
    if kind == 0:
        text = f"{word(a)} point {word(c)} {rng.choice(OPERATIONS)} {word(b)}"
    elif kind == 1:
        text, part = f"{word(5 * a)} percent of {word(5 * b)}", 25 * a * b
        accepted = (word(part // 100),) if part % 100 == 0 else ()
    elif kind == 2:
        text, accepted = f"the square root of {word(c * c)}", (word(c),)
    elif kind == 3:
        text, accepted = f"minus {word(a)} plus {word(b)}", (word(b - a),)
    elif kind == 4:
        text, accepted = f"{word(a)} plus {word(b)} times {word(c)}", (word(a + b * c),)
    else:
        text, accepted = f"{word(c)} to the power of {word(a)}", (word(c**a),) if c**a < 1000 else ()
    accepted += tuple(text for text in (MORE, LESS) if accepted and outcome_of(accepted[0]) == text)
    slots = {"sum": text}
    gist = "you asked for a hard sum"
    return Turn("", TOO_HARD, accepted=accepted, kind="number", slots=slots, gist=gist, about=About("refused"))


def outcome_of(text: str) -> str:
    """What the world says of a number in words."""
    if text.startswith("minus "):
        return LESS
    return text if text in NUMBERS else MORE


def _story(talk: Talk, operation: str) -> Turn:
    rng = talk.rng
    while True:
        a, b = numbers_for(operation, rng)
        if min(a, b) > 1 and (operation == "plus" or a >= b):
            break
    turn = worked(operation, a, b)
    return replace(turn, slots=dict(turn.slots) | {"things": rng.choice(_COUNTED)})


def _story_more(talk: Talk) -> Turn:
    return _story(talk, "plus")


def _story_less(talk: Talk) -> Turn:
    return _story(talk, "minus")


def _even(talk: Talk) -> Turn:
    number = talk.rng.randint(0, LARGEST)
    answer = "odd" if number % 2 else "even"
    gist = f"you asked if {word(number)} is even or odd"
    about = About("parity", (number,))
    return Turn("", answer, kind="choice", rivals=("even", "odd"), choice=True, slots={"a": word(number)}, gist=gist,
                about=about)  # fmt: skip


SKILLS = (
    Skill("sum", "sums", _sum, (
        "what is {a} plus {b}", "how much is {a} plus {b}", "{a} plus {b}", "add {a} and {b}",
        "what is the sum of {a} and {b}", "what is {a} and {b}", "add {b} to {a}", "tell me {a} plus {b}",
        "what does {a} plus {b} make", "how much is {a} and {b} together", "what do you get if you add {a} and {b}",
        "calculate {a} plus {b}", "i want to know what {a} plus {b} is", "what do {a} and {b} make together",
        "work out {a} plus {b}", "what is the total of {a} and {b}",
    ), 3.0),
    Skill("difference", "sums", _difference, (
        "what is {a} minus {b}", "how much is {a} minus {b}", "{a} minus {b}", "subtract {b} from {a}",
        "take {b} away from {a}", "what is {b} less than {a}", "tell me {a} minus {b}", "what is {a} take away {b}",
        "what is left if you take {b} from {a}", "calculate {a} minus {b}", "what does {a} minus {b} make",
        "what do you get if you subtract {b} from {a}", "work out {a} minus {b}", "how much is {a} without {b}",
    ), 2.5),
    Skill("product", "sums", _product, (
        "what is {a} times {b}", "how much is {a} times {b}", "{a} times {b}", "multiply {a} by {b}",
        "multiply {a} and {b}", "what is {a} multiplied by {b}", "what is the product of {a} and {b}",
        "tell me {a} times {b}", "calculate {a} times {b}", "what does {a} times {b} make",
        "what do you get if you multiply {a} by {b}", "how many are {a} times {b}", "work out {a} times {b}",
        "how much do you get for {a} times {b}",
    ), 2.5),
    Skill("quotient", "sums", _quotients, (
        "what is {a} divided by {b}", "how much is {a} divided by {b}", "{a} divided by {b}", "divide {a} by {b}",
        "tell me {a} divided by {b}", "calculate {a} divided by {b}", "what does {a} divided by {b} make",
        "what do you get if you divide {a} by {b}", "how many times does {b} go into {a}",
        "how many times is {b} in {a}", "work out {a} divided by {b}", "split {a} by {b}",
    ), 1.2),
    Skill("large numbers", "sums", _large, (
        "what is {a} {op} {b}", "how much is {a} {op} {b}", "{a} {op} {b}", "tell me {a} {op} {b}",
        "calculate {a} {op} {b}", "what does {a} {op} {b} make", "can you do {a} {op} {b}", "do you know {a} {op} {b}",
        "i want to know {a} {op} {b}", "please tell me {a} {op} {b}", "work out {a} {op} {b}", "try {a} {op} {b}",
    ), 0.6),
    Skill("half", "sums", _half, (
        "what is half of {a}", "how much is half of {a}", "half of {a}", "tell me half of {a}",
        "what is one half of {a}", "halve {a}", "what is the half of {a}", "calculate half of {a}",
        "what do you get if you halve {a}", "cut {a} in half", "work out half of {a}", "how many are half of {a}",
    )),
    Skill("double", "sums", _double, (
        "what is double {a}", "what is twice {a}", "double {a}", "twice {a}", "how much is double {a}",
        "how much is twice {a}", "tell me double {a}", "what is the double of {a}", "what do you get if you double {a}",
        "calculate twice {a}", "work out double {a}", "how many are twice {a}",
    )),
    Skill("how many more", "sums", _how_many_more, (
        "how many more is {a} than {b}", "how much more is {a} than {b}", "how much bigger is {a} than {b}",
        "what is the difference between {a} and {b}", "how far is it from {b} to {a}",
        "how much is between {b} and {a}", "what do i have to add to {b} to get {a}",
        "how many are missing from {b} to {a}", "how much less is {b} than {a}", "how much smaller is {b} than {a}",
        "by how much is {a} more than {b}", "how many do i need to get from {b} to {a}",
    )),
    Skill("chain", "sums", _chain, (
        "what is {sum}", "how much is {sum}", "{sum}", "tell me {sum}", "calculate {sum}", "what does {sum} make",
        "can you do {sum}", "do you know what {sum} is", "i want to know what {sum} is", "what do you get for {sum}",
        "work out {sum}", "how many are {sum}",
    )),
    Skill("square", "sums", _square, (
        "what is {a} squared", "how much is {a} squared", "{a} squared", "what is the square of {a}", "square {a}",
        "tell me {a} squared", "what is {a} times itself", "multiply {a} by itself", "the square of {a}",
        "calculate {a} squared", "work out {a} squared", "how many are {a} squared",
    ), 0.6),
    Skill("hard sums", "sums", _hard, (
        "what is {sum}", "how much is {sum}", "{sum}", "tell me {sum}", "calculate {sum}", "what does {sum} make",
        "can you do {sum}", "do you know what {sum} is", "i want to know what {sum} is", "what do you get for {sum}",
        "work out {sum}", "how many are {sum}",
    ), 0.7),
    Skill("story more", "sums", _story_more, (
        "i have {a} {things} and get {b} more how many do i have",
        "i have {a} {things} and find {b} more how many {things} do i have now",
        "there are {a} {things} and {b} more come how many are there",
        "if i have {a} {things} and buy {b} more how many do i have", "{a} {things} and {b} {things} how many is that",
        "she has {a} {things} and gets {b} more how many does she have",
        "i had {a} {things} then i got {b} more how many {things} do i have",
        "you have {a} {things} and i give you {b} more how many do you have",
        "he has {a} {things} and i have {b} how many do we have together",
        "put {b} {things} with {a} {things} how many are there",
        "i own {a} {things} and get {b} as a present how many is that",
        "how many {things} are {a} {things} and {b} {things}",
    ), 0.6),
    Skill("story less", "sums", _story_less, (
        "i have {a} {things} and lose {b} how many do i have",
        "i have {a} {things} and give away {b} how many {things} do i have left",
        "there are {a} {things} and i take {b} how many are left",
        "if i have {a} {things} and sell {b} how many do i have", "{a} {things} without {b} {things} how many is that",
        "she has {a} {things} and loses {b} how many does she have",
        "i had {a} {things} then i lost {b} how many {things} do i have",
        "you have {a} {things} and give me {b} how many do you have left",
        "he has {a} {things} and gives {b} to me how many are left for him",
        "take {b} {things} from {a} {things} how many are left",
        "i own {a} {things} but {b} are broken how many are good",
        "how many of {a} {things} are left when {b} are gone",
    ), 0.6),
    Skill("even or odd", "sums", _even, (
        "is {a} even or odd", "is {a} odd or even", "is {a} an even or an odd number", "tell me if {a} is even or odd",
        "even or odd {a}", "is the number {a} even or odd", "what is {a} even or odd",
        "do you know if {a} is odd or even", "is {a} an odd number or an even number", "say if {a} is even or odd",
        "would you call {a} even or odd", "{a} is that even or odd",
    ), 0.7),
)  # fmt: skip
ANSWERS = (*NUMBERS, *BEYOND, "a half", *(f"{word(n)} and a half" for n in range(1, 50)), "even", "odd")
WORDS = (
    *NUMBERS,
    *BEYOND,
    *OPERATIONS,
    *_COUNTED,
    "half",
    "even",
    "odd",
    "negative",
    "remainder",
    "thousand",
    "point",
    "percent of",
    "the square root of",
    "to the power of",
    TOO_HARD,
)
