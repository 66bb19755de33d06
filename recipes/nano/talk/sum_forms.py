"""The ways to type a sum. Each is asked by itself in the evaluation; the last ones of each list are never trained.

a, b: figures. A, B: words. s: the sign. op: its name.
"""

from __future__ import annotations

import random

from .numerals import word

_DASH, _MINUS, _CROSS = "\u2013", "\u2212", "\u00d7"
SIGNS = {
    "plus": ("+",), "minus": ("-", "-", _DASH, _MINUS), "times": ("*", "*", "x", _CROSS, "·"),
    "divided by": ("/", "/", "÷", ":"),
}  # fmt: skip
_HELD_OUT, _HELD_OUT_OWN = 10, 3
_COMMON = (
    "{a}{s}{b}", "{a} {s} {b}", "{a}{s}{b}=", "{a} {s} {b} =", "{a}{s}{b}=?", "{a} {s} {b} = ?", "{a}{s}{b}?",
    "{a} {s} {b}?", "what is {a}{s}{b}", "what is {a} {s} {b}?", "what's {a}{s}{b}?", "whats {a} {s} {b}",
    "{a} {op} {b}", "{a} {op} {b}?", "what is {a} {op} {b}?", "what's {a} {op} {b}", "{A} {op} {B}",
    "{A} {op} {B} please", "what is {A} {op} {B}?", "whats {A} {op} {B}", "calculate {a}{s}{b}",
    "calculate {a} {op} {b}", "compute {a} {s} {b}", "how much is {a}{s}{b}?", "how much is {a} {op} {b}",
    "how much is {A} {op} {B}?", "can you tell me {a} {s} {b}?", "tell me {a}{s}{b}", "hey what is {a} {s} {b}",
    "please calculate {a} {op} {b}", "what does {a} {s} {b} make?", "can you calculate {a} {s} {b}",
    "could you tell me what {a} {op} {b} is?", "{a} {op} {B}", "i need {a} {s} {b}",
    "what do you get for {a}{s}{b}", "what is “{a} {s} {b}”?", "solve {a}{s}{b}", "solve: {a} {s} {b}",
    "({a}{s}{b})", "'{a} {s} {b}'", "hello, what's {a} {s} {b}?", "{a}{op}{b}", "{a} {s}{b}", "please {a} {s} {b}",
    "what is {a} {s} {b} equal to?", "{a} {s} {b} is what", "{a} {s} {b} equals?", "{a} {s} {b} makes",
    "{a} {op} {b} is", "work out {a} {s} {b}", "and what about {a}{s}{b}?", "do you know {a} {s} {b}?",
    "quick: {a}{s}{b}", "{A} {s} {B}", "my homework says {a} {op} {b}", "please tell me the answer to {a}{s}{b}",
    "hi, {a} {op} {b}?", "result of {a} {s} {b}", "\"{a}{s}{b}\"",
)  # fmt: skip
_OWN = {
    "plus": (
        "add {a} and {b}", "add {a} to {b}", "can you add {a} and {b}?", "{a} and {b}?", "what's {a} and {b}",
        "what is {a} and {b} together?", "the sum of {a} and {b}", "what is the sum of {a} and {b}?",
        "what do you get if you add {a} and {b}?", "please add {A} and {B}", "{a} & {b}", "what is {a} added to {b}?",
        "total of {a} and {b}?", "{a} with {b} more", "increase {a} by {b}",
    ),
    "minus": (
        "subtract {b} from {a}", "can you subtract {b} from {a}?", "take {b} away from {a}", "{a} take away {b}",
        "{a} less {b}", "what is {b} less than {a}?", "what's left if you take {b} from {a}?", "take {b} from {a}",
        "please subtract {B} from {A}", "what do you get if you subtract {b} from {a}?", "{a} without {b}",
        "deduct {b} from {a}", "reduce {a} by {b}",
    ),
    "times": (
        "multiply {a} by {b}", "multiply {a} and {b}", "can you multiply {a} by {b}?", "{a} multiplied by {b}",
        "the product of {a} and {b}", "what is the product of {a} and {b}?", "{a} x {b}", "{a}x{b}",
        "what do you get if you multiply {a} by {b}?", "please multiply {A} by {B}", "{a} by {b}",
        "how much is {a} of {b} each?", "{a} lots of {b}",
    ),
    "divided by": (
        "divide {a} by {b}", "can you divide {a} by {b}?", "{a} over {b}", "how often does {b} go into {a}?",
        "how many times does {b} go into {a}", "{a} by {b} divided", "what do you get if you divide {a} by {b}?",
        "please divide {A} by {B}", "share {a} between {b}", "split {a} by {b}", "split {a} into {b} equal parts",
        "{a} shared among {b}", "divide {a} into {b}",
    ),
}  # fmt: skip


def sum_forms(operation: str, *, held_out: bool) -> tuple[str, ...]:
    """The patterns of an operation that are trained, or those that are kept."""
    own = _OWN[operation]
    if held_out:
        return _COMMON[-_HELD_OUT:] + own[-_HELD_OUT_OWN:]
    return _COMMON[:-_HELD_OUT] + own[:-_HELD_OUT_OWN]


def typed_sum(form: str, operation: str, a: int, b: int, rng: random.Random) -> str:
    """A sum in one of these forms."""
    sign = rng.choice(SIGNS[operation])
    return form.format(a=a, b=b, A=word(a), B=word(b), s=sign, op=operation)
