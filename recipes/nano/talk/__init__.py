"""The world of omni-nano: what can be said to it, in one to eight turns, and the right answers,
as data without tensors.

    from talk import conversation, right, written

    drawn = conversation(random.Random(7))
    typed = [written(turn, random.Random(place)) for place, turn in enumerate(drawn.turns)]
    assert all(right(turn.answer, turn) for turn in drawn.turns)

Everything is drawn from a `random.Random`, so a seed names a data set. To add a skill: a `Skill` with at least ten
phrasings and a drawing function, in the module of its subject; the conversations take it from that module's `SKILLS`.
"""

from .conversations import (
    GROUPS,
    SHARES,
    SKILLS,
    all_answers,
    conversation,
    spoken,
    spoken_texts,
    turn,
    vocabulary,
)
from .judge import right, wrong_answers
from .shapes import COLORS, DIRECTIONS, GROUNDS, OTHER_SHAPES, PLACES, SHAPES
from .turns import Clip, Conversation, Item, Picture, Skill, Sound, Turn
from .typed import every_form, written

__all__ = [
    "COLORS", "DIRECTIONS", "GROUNDS", "GROUPS", "OTHER_SHAPES", "PLACES", "SHAPES", "SHARES", "SKILLS", "Clip",
    "Conversation", "Item", "Picture", "Skill", "Sound", "Turn", "all_answers", "conversation", "every_form", "right",
    "spoken", "spoken_texts", "turn", "vocabulary", "written", "wrong_answers",
]  # fmt: skip
