"""The world of omni-nano: what can be said to it, that its answers are right and judged so, what is not trained."""

from __future__ import annotations

import random
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "recipes" / "nano"))

import talk
from talk import facts, follow, lexicon, order, outside, scenes, sums
from talk.chat import plain
from talk.numerals import NUMBERS, VALUE_OF, in_figures, word
from talk.sum_forms import SIGNS, sum_forms
from talk.turns import Talk, Turn
from talk.typed import known_slips

OF_ONE_FORM = ("silence", "unclear")  # nothing is asked
OPEN = ("unclear",)  # made of no words
FORM_WORDS = {
    word for name in sums.OPERATIONS for kept in (False, True) for form in sum_forms(name, held_out=kept)
    for word in re.findall("[a-z]+", form)
}  # fmt: skip


def turns(count: int, *, held_out: bool = False) -> Iterator[Turn]:
    for seed in range(count):
        yield from talk.conversation(random.Random(seed), held_out=held_out).turns


def test_the_world_is_large_enough() -> None:
    for skill in talk.SKILLS.values():
        if skill.name in OF_ONE_FORM:
            continue
        assert len(skill.phrasings) >= 12 and len(set(skill.phrasings)) == len(skill.phrasings), skill.name
        assert len(skill.ways(held_out=True)) == 2
        assert not {*skill.ways(held_out=True)} & {*skill.ways(held_out=False)}
    assert len(lexicon.SPELLED) >= 300 and len(lexicon.OPPOSITES) >= 60
    assert sum(len(table) for table in facts.TABLES.values()) >= 200
    trained, kept = (set(outside.questions(held_out=part)) for part in (False, True))
    assert len(trained) >= 300 and len(kept) >= 60 and not trained & kept
    assert max(len(answer.split()) for answer in talk.all_answers()) <= 26  # the alphabet


def test_a_seed_names_a_conversation() -> None:
    for seed in range(100):
        one, two = (talk.conversation(random.Random(seed)) for _ in range(2))
        assert one == two and 1 <= len(one.turns) <= 8
        assert [talk.written(turn, random.Random(1)) for turn in one.turns] == [
            talk.written(turn, random.Random(1)) for turn in two.turns
        ]
    assert {len(talk.conversation(random.Random(0), turns=n).turns) for n in range(1, 9)} == set(range(1, 9))
    with pytest.raises(ValueError, match="9 turns"):
        talk.conversation(random.Random(0), turns=9)


def test_right_answers_are_right_and_rivals_wrong() -> None:
    skills = set()
    for turn in turns(5000):
        skills.add(turn.skill)
        for answer in (turn.answer, *turn.accepted):
            assert talk.right(answer, turn), (turn.skill, turn.question, answer)
        assert talk.right(turn.answer.capitalize() + ".", turn)
        for answer in talk.wrong_answers(turn):
            assert not talk.right(answer, turn), (turn.skill, turn.question, turn.answer, answer)
    assert skills == set(talk.SKILLS)


def asked(skill: str, **about: object) -> Turn:
    """A turn of a skill that says so."""
    for seed in range(20_000):
        turn = talk.turn(skill, random.Random(seed))
        if all(getattr(turn, name) == value for name, value in about.items()):
            return turn
    raise AssertionError(f"no {skill} with {about}")


@pytest.mark.parametrize(
    ("skill", "answer", "right", "wrong"),
    [
        ("sum", "nineteen", ["19", "it is 19.", "Nineteen!"], ["19 or 20", "not nineteen", "nine", "ninety"]),
        ("sum", "forty two", ["forty-two", "42", "that's 42"], ["forty", "two", "forty three", "i do not know"]),
        ("sum", "one hundred", ["a hundred", "100"], ["that is more than a hundred", "one hundred and one"]),
        ("difference", "zero", ["0"], ["that is less than zero", "ten"]),
        ("difference", "that is less than zero", ["less than zero? that is less than zero"], ["zero", "three"]),
        ("half", "three and a half", ["3 and a half"], ["three", "four and a half", "a half"]),
        ("color of", "red", ["it is red", "Red."], ["red and blue", "it is not red", "green"]),
        ("day after", "monday", ["it's Monday"], ["monday or tuesday", "sunday"]),
        ("spell", "c a t", ["C-A-T", "it is c a t", "c, a, t"], ["cat", "c a", "c a t s", "a c a t t"]),
        ("place", "a red circle", ["the red circle", "it is a red circle"], ["a red square", "a red star"]),
        ("direction", "to the left", ["it goes to the left"], ["to the right", "left or right", "up"]),
        ("position", "at the top", ["it is at the top"], ["at the top left", "at the bottom", "top"]),
    ],
)  # fmt: skip
def test_judging(skill: str, answer: str, right: list[str], wrong: list[str]) -> None:
    turn = asked(skill, answer=answer)
    assert not [text for text in (answer, *right) if not talk.right(text, turn)]
    assert not [text for text in wrong if talk.right(text, turn)]


def test_an_echo_of_the_question_is_no_rival() -> None:
    turn = replace(sums.worked("plus", 3, 4), question="what is three plus four")
    assert talk.right("three plus four is seven", turn) and talk.right("3+4 = 7", turn)
    assert not talk.right("three plus four", turn) and not talk.right("three plus five is seven", turn)
    choice = asked("compare numbers")
    assert not talk.right(f"{choice.slots['x']} or {choice.slots['y']}", choice)


def test_sums_are_right() -> None:
    for operation in sums.OPERATIONS:
        for seed in range(500):
            a, b = sums.numbers_for(operation, random.Random(seed))
            assert 0 <= a <= 100 and 0 <= b <= 100
            answer, _, number = sums.result(operation, a, b)
            if operation == "divided by":
                whole = a // b if b and a % b == 0 else None
                assert number == whole and (answer == word(whole) if whole is not None else answer in sums.BEYOND)
                continue
            value = {"plus": a + b, "minus": a - b, "times": a * b}[operation]
            wanted = sums.MORE if value > 100 else sums.LESS if value < 0 else NUMBERS[value]
            assert answer == wanted and number == (value if 0 <= value <= 100 else None)


def test_chains_go_on_from_the_last_result() -> None:
    """Whatever stands between that leaves the result as it is."""
    seen = 0
    for seed in range(3000):
        result: int | None = None
        for turn in talk.conversation(random.Random(seed), media=False, shares={"sums": 1.0}).turns:
            if turn.skill == "then" and turn.about is not None and turn.about.kind == "sum" and result is not None:
                operation, b = turn.slots["op"], VALUE_OF[turn.slots["b"]]
                value = {"plus": result + b, "minus": result - b, "times": result * b}[operation]
                wanted = NUMBERS[value] if 0 <= value <= 100 else sums.MORE if value > 100 else sums.LESS
                assert turn.answer == wanted, (turn.question, result)
                seen += 1
            elif turn.skill == "double that" and result is not None:
                assert turn.answer == (NUMBERS[2 * result] if result <= 50 else sums.MORE)
            if turn.skill not in follow.ASIDE:
                result = None if turn.about is None else turn.about.number
    assert seen > 300


def test_references_go_to_what_was_said() -> None:
    counts: dict[str, int] = {}
    for seed in range(4000):
        said: list[Turn] = []
        for turn in talk.conversation(random.Random(seed)).turns:
            counts[turn.skill] = counts.get(turn.skill, 0) + 1
            if turn.skill in ("again", "slower", "what did you say"):
                assert turn.answer == (said[-1].answer if said else "i did not say anything yet")
            elif turn.skill == "what did i ask":
                assert turn.answer == (said[-1].gist if said else "you did not ask anything yet")
            elif turn.skill == "the first":
                assert turn.answer == said[0].gist
            elif turn.skill == "first answer":
                assert turn.answer == said[0].answer
            elif turn.skill == "how many questions":
                assert turn.answer == word(len(said))
            elif turn.skill == "my name":
                names = [one.slots["name"] for one in said if one.skill == "introduce"]
                assert turn.answer == (f"your name is {names[-1]}" if names else "you did not tell me your name")
            elif turn.skill in ("next", "before that") and turn.about is not None and turn.about.kind != "loose":
                row, name = turn.about.kind.split()[0], str(turn.about.key[0])
                assert name in [*order.ROWS[row]] and any(name in one.answer for one in said)
            said.append(turn)
    assert all(counts[skill] > 50 for skill in ("again", "then", "next", "the other", "what about", "i meant", "why"))


def test_the_other_one() -> None:
    seen = 0
    for seed in range(2500):
        said: list[Turn] = []
        for turn in talk.conversation(random.Random(seed), shares={"picture": 3, "words": 1}).turns:
            if turn.skill == "the other" and turn.kind in ("color", "shape", "place"):
                picture = next(one.picture for one in reversed(said) if one.picture is not None)
                answers = {"color": [item.color for item in picture.items], "shape": [i.shape for i in picture.items],
                           "place": [talk.PLACES[item.cell] for item in picture.items]}[turn.kind]  # fmt: skip
                assert turn.answer in (*answers, scenes.NO_SHAPE) and len(answers) == 2
                seen += 1
            said.append(turn)
    assert seen > 100


def test_every_answer_to_a_picture_is_there() -> None:
    for seed in range(500):
        rng = random.Random(seed)
        picture = scenes.picture_for(rng.choice(("color", "shape", "count", "digit", "unknown shape", "empty")), rng)
        assert len({item.cell for item in picture.items}) == len(picture.items)
        assert all(max(map(abs, item.shift)) < 0.5 for item in picture.items)
        for found in scenes.asked_of(picture).values():
            for turn in found:
                thing = turn.slots.get("thing", "").removeprefix("the ")
                if turn.skill == "count":
                    shape = {many: one for one, many in scenes.SHAPE_PLURALS.items()}.get(turn.slots["many"])
                    if shape:
                        assert turn.answer == word(sum(item.shape == shape for item in picture.items))
                elif turn.skill == "color" and thing in talk.SHAPES and not turn.answer.startswith("i see no"):
                    assert [item.color for item in picture.items if item.shape == thing] == [turn.answer]
                elif turn.skill == "position":
                    assert [talk.PLACES[i.cell] for i in picture.items if i.shape == thing] == [turn.answer]


def test_held_out_phrasings_are_not_trained() -> None:
    """20,000 turns: none is asked in a way, about a topic or to a name that is kept for evaluation."""
    kept = {(skill.name, way) for skill in talk.SKILLS.values() for way in skill.phrasings[-2:]}
    questions, names, seen = set(outside.questions(held_out=True)), {*talk.chat.NAMES} - {*talk.chat.TRAINED_NAMES}, 0
    for turn in turns(6500):
        seen += 1
        if turn.skill not in OF_ONE_FORM:
            assert (turn.skill, turn.phrasing) not in kept
        assert turn.question not in questions and not turn.held_out
        assert not names & set(turn.answer.split()), turn.answer
    assert seen > 20_000
    asked = {(turn.skill, turn.phrasing) for turn in turns(300, held_out=True) if turn.skill not in OF_ONE_FORM}
    assert asked <= kept and len(asked) > 100


@pytest.mark.parametrize("operation", sums.OPERATIONS)
def test_forms_of_a_sum_say_the_sum(operation: str) -> None:
    """At least forty ways to type each, all different; with or without a slip they say this sum and no other."""
    trained, kept = (sum_forms(operation, held_out=part) for part in (False, True))
    assert len(set(trained)) >= 40 and len(set(kept)) >= 10 and not set(trained) & set(kept)
    skill = dict(zip(sums.OPERATIONS, ("sum", "difference", "product", "quotient")))[operation]
    for seed in range(400):
        rng = random.Random(seed)
        turn = talk.turn(skill, rng, held_out=seed % 4 == 0)
        assert turn.about is not None
        _, a, b = turn.about.key
        wanted = {(operation, a, b), (operation, b, a)} if operation in ("plus", "times") else {(operation, a, b)}
        text = talk.written(turn, rng)
        assert said_sum(text) in wanted, text
        if seed < 20:
            for _, text, _ in talk.every_form(turn, rng):
                assert said_sum(text) in wanted, text


def said_sum(text: str) -> tuple[str, int, int]:
    """The sum that a text asks for, read without the world's forms."""
    text = re.sub(r"(?<=\d)(?=[a-z])|(?<=[a-z])(?=\d)", " ", text.lower())
    for name, signs in SIGNS.items():
        for sign in signs:
            if not sign.isalpha():
                text = re.sub(rf"(?<=[\w ]){re.escape(sign)}(?=[\w ])(?! what)", f" {name} ", text)
    text = re.sub(r"\bx\b", "times", text)
    text = re.sub(r"[^a-z0-9& ]", " ", text.replace("'", ""))
    words = in_figures([piece if piece in FORM_WORDS else known_slips().get(piece, piece) for piece in text.split()])
    numbers = [int(piece) for piece in words if piece.isdigit()]
    text = " ".join(words)
    cues = (
        ("divided by", "divide|into|split|share|over|in "),
        ("minus", "minus|subtract|take|less|without|left|deduct|reduce"),
        ("times", "times|multipl|product|of \\d+ each|lots|^\\d+ by \\d+"),
        ("plus", "plus|add|sum|and|&|total|more|increase"),
    )
    direct = re.search(r"\d+ (plus|minus|times|divided by) \d+", text)
    if direct:
        return direct[1], numbers[0], numbers[1]
    found = next(name for name, cue in cues if re.search(cue, text))
    turned = {"minus": r"from|less than", "divided by": r"go|in \d"}.get(found)
    first, second = reversed(numbers) if turned and re.search(turned, text) else numbers
    return found, first, second


def test_slips_leave_no_doubt() -> None:
    known = set(talk.vocabulary())
    slips = known_slips()
    assert len(slips) > 10_000 and not known & set(slips)
    for seed in range(2000):
        rng = random.Random(seed)
        turn = talk.turn("spell", rng)
        assert turn.slots["word"] in talk.written(turn, rng).lower()


def test_numbers_in_words_come_back() -> None:
    for number in range(1000):
        assert in_figures(word(number).split()) == [str(number)]
    assert word(-3) == "minus three" and word(12_345) == "twelve thousand three hundred and forty five"
    assert in_figures(["count", "from", "twenty", "to", "one", "hundred"]) == ["count", "from", "20", "to", "100"]
    assert in_figures(["one", "hundred", "ninety", "nine", "ninety", "eight"]) == ["100", "99", "98"]


def test_every_word_is_in_the_vocabulary() -> None:
    known = set(talk.vocabulary())
    assert len(known) == len(talk.vocabulary())
    for turn in turns(3000):
        if turn.skill not in OPEN:
            assert {*turn.question.split(), *turn.answer.split()} <= known, (turn.question, turn.answer)
            assert re.fullmatch(r"[a-z' ]+", turn.answer), turn.answer
    drawn = talk.spoken_texts(random.Random(0))
    for _ in range(2000):
        text = next(drawn)
        assert re.fullmatch(r"[a-z' ]+", text), text


def test_sentences_of_the_caller_are_repeated() -> None:
    assert plain("It's 21 o'clock, Mr. Wood-Smith!") == "it's twenty one o'clock mr wood smith"
    for text, message in (("in 1984", "1984"), ("déjà vu", "letters"), ("...", "no words")):
        with pytest.raises(ValueError, match=message):
            plain(text)
    sentences = ["The quick brown fox jumps over the lazy dog."]
    found = {talk.turn("repeat", random.Random(seed), sentences=sentences).answer for seed in range(40)}
    assert plain(sentences[0]) in found and len(found) > 5


def test_a_reference_to_nothing_is_answered_honestly() -> None:
    for skill in ("then", "next", "the other", "what about", "again", "what did i ask"):
        turn = talk.SKILLS[skill].ask(Talk(random.Random(0)))
        assert turn is not None and " not " in turn.answer
