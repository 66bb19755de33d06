"""The small world of omni-nano: its words, what can be asked about it, and the right answers.

A `Task` is one conversation as data: what is asked (as words, to be typed or spoken), about which picture or clip, and
what is to be answered. Everything is drawn from a `random.Random`, so a seed names a data set. No shapes: no tensors.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

NUMBERS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty",
)  # fmt: skip
COLORS = ("red", "green", "blue", "yellow", "purple", "orange")
SHAPES = ("circle", "square", "triangle", "star")
PLACES = ("top left", "top right", "bottom left", "bottom right", "in the middle")
DIRECTIONS = ("to the left", "to the right", "up", "down")
UNKNOWN = "i don't know"
NO_WORD = "~"  # one token, and in no question otherwise

DETERMINERS = ("the", "a", "my", "your")
ADJECTIVES = ("big", "small", "old", "young", "happy", "quiet", *COLORS)
ANIMALS = ("cat", "dog", "bird", "fish", "horse", "king", "queen", "teacher", "farmer", "baby")
THINGS = ("house", "tree", "car", "boat", "river", "garden", "table", "window", "door", "letter")
VERBS = ("sees", "finds", "likes", "takes", "wants", "holds", "paints", "follows", "calls", "remembers")
PREPOSITIONS = ("in", "on", "near", "under")
TIMES = ("now", "today", "again")
SPOKEN = tuple(dict.fromkeys(  # words of what the model says
    (*NUMBERS, *COLORS, *SHAPES, *ADJECTIVES, *ANIMALS, *THINGS, *VERBS, *PREPOSITIONS, *TIMES, *DETERMINERS,
     *" ".join((*PLACES, *DIRECTIONS, UNKNOWN)).split())
))  # fmt: skip

# What lies outside the world: asked, and to be answered with UNKNOWN. The last fifth of each list is for evaluation.
OUTSIDE_SUBJECTS = (
    "the president", "the weather", "my brother", "the moon", "the ocean", "this song", "the internet", "football",
    "the universe", "history", "music", "the stock market", "coffee", "the war", "tomorrow", "chocolate", "a computer",
    "an airplane", "the doctor", "my birthday", "electricity", "gravity", "the mountain", "the library", "spanish",
    "chess", "the airport", "breakfast", "the hospital", "winter", "philosophy", "the newspaper", "oxygen", "a dragon",
    "the museum", "pizza", "the train station", "mathematics", "the emperor", "a volcano",
)  # fmt: skip
OUTSIDE_COUNTRIES = (
    "france", "germany", "italy", "china", "japan", "brazil", "canada", "egypt", "india", "mexico", "norway", "poland",
    "kenya", "chile", "sweden",
)  # fmt: skip
OUTSIDE_REQUESTS = (
    "tell me a joke", "sing a song for me", "who are you", "how old are you", "what time is it", "why is the sky blue",
    "where do you live", "what day is it today", "can you help me with my homework", "who wrote this book",
    "how do i cook rice", "when does the bus arrive", "what is the meaning of life", "give me some advice",
    "please call a taxi", "turn on the lights", "what should i eat tonight", "how far is the sun",
    "translate this into german", "book a hotel room", "how tall is that building", "what did you do yesterday",
    "play some jazz", "set an alarm for me", "who invented the telephone",
)  # fmt: skip
OUTSIDE_PATTERNS = (
    "who is {}", "tell me about {}", "why do people like {}", "when was {} invented", "how much does {} cost",
    "what do you think about {}", "explain {}", "where can i find {}",
)  # fmt: skip
COUNTRY_PATTERNS = ("what is the capital of {}", "how many people live in {}", "where is {}", "have you been to {}")


QUESTIONS = {  # skill -> ways to ask; of "dialogue" the second turn
    "repeat": ("repeat after me {}", "say {}", "please say {}", "repeat {}"),
    "arithmetic": ("what is {}", "how much is {}", "tell me {}"),
    "color": ("what color is the {}", "which color does the {} have", "tell me the color of the {}"),
    "shape": ("which shape is {}", "what shape is {}", "tell me the {} shape"),
    "count": ("how many {}s are there", "how many {}s do you see", "count the {}s"),
    "position": ("where is the {}", "where do you see the {}", "tell me where the {} is"),
    "digit": ("which number is it", "what number do you see", "read the number"),
    "direction": ("which way does it move", "where does it go", "where is it moving"),
    "moving": ("what is moving", "what moves here"),
    "clip speech": ("what was said", "what did you hear", "what did they say"),
    "dialogue": ("and the other one", "what about the other one"),
    "everything": ("what do you see", "tell me what you see"),
}
OPERATIONS = ("plus", "minus", "times")


@dataclass(frozen=True)
class Item:
    """One drawn thing: a shape (or a digit, as its numeral) in a colour, at a cell 0..8 of a 3 x 3 grid."""

    shape: str
    color: str
    cell: int


@dataclass(frozen=True)
class Picture:
    """Items on a plain background; seed: of sizes, small shifts and the background."""

    items: tuple[Item, ...]
    seed: int


@dataclass(frozen=True)
class Clip:
    """A shape that moves in one of `DIRECTIONS`; seed: of its track. said: words of the sound track, None for none."""

    shape: str
    color: str
    direction: str
    seed: int
    said: str | None = None


@dataclass(frozen=True)
class Task:
    """One conversation. question, answer: words; earlier: (question, answer) pairs before it, about the same picture.

    typed: how the question may be written (digits, signs) where that differs from its words. sound_asks: the question
    is the clip's sound track.
    """

    skill: str
    question: str
    answer: str
    picture: Picture | None = None
    clip: Clip | None = None
    earlier: tuple[tuple[str, str], ...] = field(default=())
    typed: str | None = None
    sound_asks: bool = False


def sentence(rng: random.Random) -> str:
    """A sentence of the closed vocabulary, two to eight words."""
    if rng.random() < 0.15:
        return " ".join(rng.choices(NUMBERS, k=rng.randint(2, 4)))
    words = [*_noun_phrase(rng, ANIMALS), rng.choice(VERBS), *_noun_phrase(rng, ANIMALS + THINGS + SHAPES)]
    if rng.random() < 0.2 and len(words) < 6:
        words += [rng.choice(PREPOSITIONS), "the", rng.choice(THINGS)]
    if rng.random() < 0.1:
        words.append(rng.choice(TIMES))
    return " ".join(words)


def _noun_phrase(rng: random.Random, nouns: Sequence[str]) -> list[str]:
    adjective = [rng.choice(ADJECTIVES)] if rng.random() < 0.4 else []
    noun = rng.choice(nouns)
    determiner = rng.choice(DETERMINERS)
    if determiner == "a" and (adjective or [noun])[0][0] in "aeiou":
        determiner = "the"
    return [determiner, *adjective, noun]


def repeat(rng: random.Random) -> Task:
    """Say a sentence again."""
    return _repeat(rng, sentence(rng))


def jumble(rng: random.Random) -> Task:
    """Say words again that make no sentence: no grammar helps, they have to be copied one by one."""
    return _repeat(rng, words(rng, 1, 8))


def words(rng: random.Random, least: int, most: int) -> str:
    """Any of the words that the model says, so many of them."""
    return " ".join(rng.choices(SPOKEN, k=rng.randint(least, most)))


def _repeat(rng: random.Random, said: str) -> Task:
    asked = _ask(rng, "repeat", said)
    typed = asked[: -len(said)].rstrip() + rng.choice((": ", " ", ", ")) + said
    return Task("repeat", asked, said, typed=typed)


def _ask(rng: random.Random, skill: str, about: str = "") -> str:
    return rng.choice(QUESTIONS[skill]).format(about)


def arithmetic(rng: random.Random) -> Task:
    """Sums, differences and products of numbers in 0..10, with results in 0..20."""
    operation = rng.choice(OPERATIONS)
    while True:
        a, b = rng.randint(0, 10), rng.randint(0, 10)
        result = {"plus": a + b, "minus": a - b, "times": a * b}[operation]
        if 0 <= result <= 20 and (operation != "times" or min(a, b) > 0 or rng.random() < 0.1):
            break
    question = _ask(rng, "arithmetic", f"{NUMBERS[a]} {operation} {NUMBERS[b]}")
    sign = {"plus": "+", "minus": "-", "times": "*"}[operation]
    typed = rng.choice((question, question, f"what is {a} {sign} {b}", f"{a}{sign}{b}"))
    return Task("arithmetic", question, NUMBERS[result], typed=typed)


def _cells(rng: random.Random, count: int) -> list[int]:
    return rng.sample(range(9), count)


def color(rng: random.Random) -> Task:
    """The colour of a shape among up to three different ones; now and then one that is not there."""
    shapes = rng.sample(SHAPES, rng.randint(1, 3))
    items = [Item(s, rng.choice(COLORS), c) for s, c in zip(shapes, _cells(rng, len(shapes)))]
    asked, answer = items[0].shape, items[0].color
    if rng.random() < 0.08:
        asked, answer = rng.choice([s for s in SHAPES if s not in shapes]), UNKNOWN
    picture = _picture(rng, items)
    return Task("color", _ask(rng, "color", asked), answer, picture)


def shape(rng: random.Random) -> Task:
    """The shape of a colour among up to three different ones."""
    colors = rng.sample(COLORS, rng.randint(1, 3))
    items = [Item(rng.choice(SHAPES), c, cell) for c, cell in zip(colors, _cells(rng, len(colors)))]
    return Task("shape", _ask(rng, "shape", items[0].color), items[0].shape, _picture(rng, items))


def count(rng: random.Random) -> Task:
    """How many of one shape there are, 0 to 5, among up to two others."""
    kind = rng.choice(SHAPES)
    number = rng.choice((0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5))
    others = rng.randint(0 if number else 1, 2)
    cells = _cells(rng, number + others)
    items = [Item(kind, rng.choice(COLORS), cell) for cell in cells[:number]]
    items += [Item(rng.choice([s for s in SHAPES if s != kind]), rng.choice(COLORS), cell) for cell in cells[number:]]
    return Task("count", _ask(rng, "count", kind), NUMBERS[number], _picture(rng, items))


CORNERS = {"top left": 0, "top right": 2, "bottom left": 6, "bottom right": 8, "in the middle": 4}


def position(rng: random.Random) -> Task:
    """Where one of up to three different shapes is."""
    shapes = rng.sample(SHAPES, rng.randint(1, 3))
    places = rng.sample(PLACES, len(shapes))
    items = [Item(s, rng.choice(COLORS), CORNERS[place]) for s, place in zip(shapes, places)]
    return Task("position", _ask(rng, "position", shapes[0]), places[0], _picture(rng, items))


def digit(rng: random.Random) -> Task:
    """Which digit is drawn."""
    number = rng.randint(0, 9)
    question = _ask(rng, "digit")
    return Task("digit", question, NUMBERS[number], _picture(rng, [Item(str(number), rng.choice(COLORS), 4)]))


def _picture(rng: random.Random, items: Sequence[Item]) -> Picture:
    return Picture(tuple(items), rng.getrandbits(32))


def _clip(rng: random.Random, said: str | None = None) -> Clip:
    return Clip(rng.choice(SHAPES), rng.choice(COLORS), rng.choice(DIRECTIONS), rng.getrandbits(32), said)


def direction(rng: random.Random) -> Task:
    """Which way the shape of a clip moves; asked beside the clip, or in its sound track."""
    question = _ask(rng, "direction")
    if rng.random() < 0.5:
        return Task("direction", question, (clip := _clip(rng, question)).direction, clip=clip, sound_asks=True)
    clip = _clip(rng, sentence(rng) if rng.random() < 0.3 else None)
    return Task("direction", question, clip.direction, clip=clip)


def moving(rng: random.Random) -> Task:
    """What moves in a clip: its colour and shape."""
    question = _ask(rng, "moving")
    asks = rng.random() < 0.4
    clip = _clip(rng, question if asks else None)
    return Task("moving", question, f"the {clip.color} {clip.shape}", clip=clip, sound_asks=asks)


def clip_speech(rng: random.Random) -> Task:
    """What was said in a clip's sound track."""
    said = sentence(rng)
    question = _ask(rng, "clip speech")
    return Task("clip speech", question, said, clip=_clip(rng, said))


def dialogue(rng: random.Random) -> Task:
    """Two turns about a picture of two shapes: one is asked for, then "the other one"."""
    shapes, colors = rng.sample(SHAPES, 2), rng.sample(COLORS, 2)
    places = rng.sample(PLACES, 2)
    items = [Item(s, c, CORNERS[p]) for s, c, p in zip(shapes, colors, places)]
    kind = rng.choice(("color", "position", "shape"))
    if kind == "color":
        first, answers = _ask(rng, "color", shapes[0]), colors
    elif kind == "position":
        first, answers = f"where is the {shapes[0]}", places
    else:
        first, answers = f"which shape is {colors[0]}", shapes
    question = _ask(rng, "dialogue")
    picture = _picture(rng, rng.sample(items, 2))
    return Task("dialogue", question, answers[1], picture, earlier=((first, answers[0]),))


def further(task: Task, rng: random.Random) -> dict[str, list[Task]]:
    """Other questions that the same picture or clip answers, by skill. A picture that is asked about several times
    teaches several times as much."""
    found: dict[str, list[Task]] = {}

    def add(skill: str, about: str, answer: str) -> None:
        asked = Task(skill, _ask(rng, skill, about), answer, task.picture, task.clip)
        found.setdefault(skill, []).append(asked)

    if task.clip is not None:
        add("direction", "", task.clip.direction)
        add("moving", "", f"the {task.clip.color} {task.clip.shape}")
        if task.clip.said is not None and not task.sound_asks:
            add("clip speech", "", task.clip.said)
    if task.picture is None or any(item.shape.isdigit() for item in task.picture.items):
        return found
    items = sorted(task.picture.items, key=lambda item: item.cell)
    add("everything", "", " ".join(f"the {item.color} {item.shape}" for item in items))
    places = {cell: place for place, cell in CORNERS.items()}
    for kind in SHAPES:
        alike = [item for item in items if item.shape == kind]
        add("count", kind, NUMBERS[len(alike)])
        if len(alike) == 1:
            add("color", kind, alike[0].color)
            if alike[0].cell in places:
                add("position", kind, places[alike[0].cell])
    for name in COLORS:
        alike = [item for item in items if item.color == name]
        if len(alike) == 1:
            add("shape", name, alike[0].shape)
    return found


def unknown(rng: random.Random, held_out: bool = False) -> Task:
    """Something outside the world, or about a picture that is not there. held_out: from words kept for evaluation."""
    draw = rng.random()
    if draw < 0.15 and not held_out:
        return Task("unknown", rng.choice((color, shape, count, position, digit))(rng).question, UNKNOWN)
    if draw < 0.4:
        question = rng.choice(_part(OUTSIDE_REQUESTS, held_out))
    elif draw < 0.6:
        question = rng.choice(COUNTRY_PATTERNS).format(rng.choice(_part(OUTSIDE_COUNTRIES, held_out)))
    else:
        question = rng.choice(OUTSIDE_PATTERNS).format(rng.choice(_part(OUTSIDE_SUBJECTS, held_out)))
    return Task("unknown", question, UNKNOWN)


def _part(items: Sequence[str], held_out: bool) -> Sequence[str]:
    cut = len(items) * 4 // 5
    return items[cut:] if held_out else items[:cut]


def misspelt(rng: random.Random) -> Task:
    """Letters that are no words, typed: also outside the world."""
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 8))) for _ in range(rng.randint(1, 5))]
    return Task("unknown", " ".join(words), UNKNOWN)


SKILLS: dict[str, Callable[[random.Random], Task]] = {
    "repeat": repeat,
    "arithmetic": arithmetic,
    "color": color,
    "shape": shape,
    "count": count,
    "position": position,
    "digit": digit,
    "direction": direction,
    "moving": moving,
    "clip speech": clip_speech,
    "dialogue": dialogue,
    "unknown": unknown,
}
PICTURE_SKILLS = ("color", "shape", "count", "position", "digit")
CLIP_SKILLS = ("direction", "moving", "clip speech")


def written(task: Task, rng: random.Random) -> str:
    """The question as someone may type it: its other form where it has one, capitals and marks or none."""
    text = task.typed or task.question
    if rng.random() < 0.5:
        text = text[0].upper() + text[1:]
    return text + rng.choice(("", "?" if task.skill != "repeat" else "", "." if task.skill == "repeat" else "?"))


def spelled(text: str, rng: random.Random) -> str:
    """A question as the audio encoder spells it, a token every 80 ms: its words between tokens of no word (`NO_WORD`),
    now and then a word twice without one between. A Thinker that can read this can nearly hear."""
    written = NO_WORD * rng.choice((0, 2, 3, 4, 5))
    for place, word in enumerate(text.split()):
        word = word if not place else f" {word}"
        again = f" {word.strip()}" if rng.random() < 0.15 else ""
        written += word + again + NO_WORD * rng.choice((1, 1, 2, 2, 3, 4, 6))
    return written


def language(rng: random.Random) -> tuple[str, Task]:
    """A typed question that needs no picture, two in five as the audio encoder will spell them; and its task."""
    make_task = rng.choices((jumble, repeat, arithmetic, unknown, misspelt), (4, 2, 6, 2, 1))[0]
    task = make_task(rng)
    if rng.random() < 0.4 and make_task is not misspelt:
        return spelled(task.question, rng), task
    return written(task, rng), task


def all_answers() -> list[str]:
    """Every answer but the sentences that are repeated: all of them must be spoken well."""
    moves = [f"the {color} {shape}" for color in COLORS for shape in SHAPES]
    return [*NUMBERS, *COLORS, *SHAPES, *PLACES, *DIRECTIONS, *moves, UNKNOWN]


def vocabulary() -> list[str]:
    """Every word of the world, those asked outside it included: what the tokenizer knows as single tokens. Words kept
    for evaluation are bytes, as any other."""
    asked = [pattern for patterns in QUESTIONS.values() for pattern in patterns]
    outside = (OUTSIDE_SUBJECTS, OUTSIDE_COUNTRIES, OUTSIDE_REQUESTS)
    trained = [text for texts in outside for text in _part(texts, held_out=False)]
    texts = [*SPOKEN, *OPERATIONS, *(f"{shape}s" for shape in SHAPES), *asked, *trained, *OUTSIDE_PATTERNS]
    texts += COUNTRY_PATTERNS
    return sorted({word for text in texts for word in text.replace("{}s", "").replace("{}", "").split()})
