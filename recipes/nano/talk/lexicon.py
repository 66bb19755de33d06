"""Words of the world: those it spells, opposites, what is compared, and sentences made of them."""

from __future__ import annotations

import random
from collections.abc import Sequence

from .shapes import COLORS, SHAPES
from .turns import listed

SPELLED = tuple(
    dict.fromkeys(
        listed("""
    cat dog bird fish horse cow pig sheep goat duck hen mouse rabbit lion tiger bear wolf fox frog snake monkey camel
    elephant zebra giraffe penguin owl eagle bee ant fly spider whale shark turtle kitten puppy
    house home door window wall floor roof room kitchen garden table chair bed lamp clock mirror picture carpet stairs
    bridge street road city town village school church shop market station hospital park farm castle tower
    apple banana pear grape lemon cherry plum peach orange carrot potato onion tomato bread butter cheese milk water
    juice coffee tea sugar salt soup rice egg cake cookie candy honey meat
    car bus train plane boat ship bike truck wheel engine rocket taxi
    book pen pencil paper letter word page story song music dance game ball doll toy card bag box bottle cup glass
    plate spoon fork knife bowl pot pan key money coin ring watch phone camera computer radio television
    sun moon star sky cloud rain snow wind storm fire earth sea river lake island mountain hill forest tree leaf
    flower rose grass stone sand field beach desert
    man woman boy girl child baby mother father brother sister uncle aunt friend king queen doctor teacher farmer
    driver nurse pilot sailor soldier student
    head hair face eye ear nose mouth tooth tongue neck arm hand finger leg foot knee heart back
    shirt coat hat shoe sock dress glove scarf button pocket
    red green blue yellow purple pink brown black white grey
    one two three four five six seven eight nine ten
    spring summer autumn winter morning evening night day week month year hour minute
    big small long short old new young good bad hot cold warm happy sad fast slow strong weak hard soft light dark
    clean dirty full empty open quiet loud sweet rich poor early late
    go come run walk jump swim fly sing read write draw play work sleep eat drink buy sell give take make find look
    listen speak think know love help wash cook build
    and but with from about after before under over because always never again today hello please thanks
    north south east west number color shape circle square triangle people animal question answer world""")
    )
)

OPPOSITES = tuple(
    pair.split("/")
    for pair in listed("""
    hot/cold big/small long/short old/young good/bad happy/sad fast/slow strong/weak hard/soft light/dark clean/dirty
    full/empty open/closed quiet/loud sweet/sour rich/poor early/late up/down left/right in/out on/off over/under
    before/after above/below inside/outside near/far front/back top/bottom first/last begin/end start/stop come/go
    give/take buy/sell push/pull win/lose love/hate laugh/cry ask/answer find/hide remember/forget rise/fall
    day/night morning/evening summer/winter black/white yes/no true/false right/wrong always/never everything/nothing
    north/south east/west man/woman boy/girl king/queen brother/sister friend/enemy life/death war/peace
    high/low wide/narrow thick/thin deep/shallow heavy/light wet/dry new/old rough/smooth sharp/blunt cheap/expensive
    easy/difficult safe/dangerous same/different many/few more/less alive/dead awake/asleep hungry/full tall/short
    polite/rude brave/afraid beautiful/ugly clever/stupid tight/loose straight/crooked lucky/unlucky""")
)


def _opposites() -> dict[str, tuple[str, ...]]:
    found: dict[str, tuple[str, ...]] = {}
    for one, other in OPPOSITES:
        found[one] = (*found.get(one, ()), other)
        found[other] = (*found.get(other, ()), one)
    return found


OPPOSITE_OF = _opposites()  # the first is the answer, the others are right too

# What is compared: more, less, and things from least to most.
SCALES: tuple[tuple[tuple[str, str], tuple[str, str], tuple[str, ...]], ...] = (
    (("bigger", "biggest"), ("smaller", "smallest"), (
        "ant", "bee", "mouse", "rabbit", "cat", "dog", "pig", "lion", "cow", "elephant", "whale",
    )),
    (("larger", "largest"), ("smaller", "smallest"), (
        "pea", "coin", "egg", "apple", "melon", "chair", "bed", "car", "bus", "house", "mountain",
    )),
    (("faster", "fastest"), ("slower", "slowest"), (
        "snail", "turtle", "duck", "bike", "horse", "car", "train", "plane", "rocket",
    )),
    (("heavier", "heaviest"), ("lighter", "lightest"), (
        "feather", "pen", "book", "chair", "piano", "car", "truck", "ship",
    )),
    (("older", "oldest"), ("younger", "youngest"), ("baby", "child", "teenager", "mother", "grandmother")),
    (("taller", "tallest"), ("shorter", "shortest"), ("flower", "child", "horse", "giraffe", "tree", "tower",
    "mountain")),
    (("hotter", "hottest"), ("colder", "coldest"), ("ice", "milk", "soup", "fire", "sun")),
    (("longer", "longest"), ("shorter", "shortest"), ("second", "minute", "hour", "day", "week", "month", "year")),
)  # fmt: skip

DETERMINERS = ("the", "a", "my", "your", "her", "his", "our", "this")
ADJECTIVES = (
    "big", "small", "old", "young", "happy", "quiet", "tall", "kind", "little", "new", "good", "sad", "clever", "brave",
    "funny", "hungry", "tired", "strong", *COLORS,
)  # fmt: skip
BEINGS = (
    "cat", "dog", "bird", "fish", "horse", "king", "queen", "teacher", "farmer", "baby", "mother", "father", "brother",
    "sister", "doctor", "friend", "child", "lion", "bear", "rabbit", "sailor", "driver", "girl", "boy", "woman", "man",
)  # fmt: skip
THINGS = (
    "house", "tree", "car", "boat", "river", "garden", "table", "window", "door", "letter", "book", "picture", "ball",
    "cup", "clock", "bridge", "flower", "mountain", "road", "kitchen", "school", "ship", "train", "song", "story",
)  # fmt: skip
VERBS = (
    "sees", "finds", "likes", "takes", "wants", "holds", "paints", "follows", "calls", "remembers", "loves", "watches",
    "brings", "keeps", "hears", "draws", "knows", "needs", "washes", "carries",
)  # fmt: skip
PREPOSITIONS = ("in", "on", "near", "under", "behind", "with", "beside")
TIMES = ("now", "today", "again", "every day", "in the morning", "at night", "tomorrow", "this week")
_STARTS = ("i think", "today", "we know that", "maybe", "every day", "she says that", "look")


def _noun_phrase(rng: random.Random, nouns: Sequence[str]) -> list[str]:
    adjective = [rng.choice(ADJECTIVES)] if rng.random() < 0.4 else []
    noun = rng.choice(nouns)
    determiner = rng.choice(DETERMINERS)
    if determiner == "a" and (adjective or [noun])[0][0] in "aeiou":
        determiner = "the"
    return [determiner, *adjective, noun]


def sentence(rng: random.Random) -> str:
    """A sentence of the world's words, two to twelve of them."""
    chance = rng.random()
    if chance < 0.08:
        return " ".join(rng.choices(SPELLED, k=rng.randint(1, 6)))
    if chance < 0.2:
        return " ".join([*_noun_phrase(rng, BEINGS + THINGS), rng.choice(("is", "was")), rng.choice(ADJECTIVES)])
    words = [*_noun_phrase(rng, BEINGS), rng.choice(VERBS), *_noun_phrase(rng, BEINGS + THINGS + SHAPES)]
    if rng.random() < 0.12:
        words = [*rng.choice(_STARTS).split(), *words]
    if rng.random() < 0.25 and len(words) < 9:
        words += [rng.choice(PREPOSITIONS), "the", rng.choice(THINGS)]
    elif rng.random() < 0.15:
        words += rng.choice(TIMES).split()
    return " ".join(words)


WORDS = (
    *SPELLED, *OPPOSITE_OF, *DETERMINERS, *ADJECTIVES, *BEINGS, *THINGS, *VERBS, *PREPOSITIONS, *TIMES, *_STARTS, "is",
    "was", "the", *(name for more, less, _ in SCALES for name in (*more, *less)),
    *(thing for _, _, things in SCALES for thing in things),
)  # fmt: skip
