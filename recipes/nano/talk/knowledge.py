"""Questions about the simple facts of the world."""

from __future__ import annotations

from collections.abc import Callable

from .facts import HOW_MANY, TABLES, named, plural
from .numerals import VALUE_OF
from .turns import About, Skill, Talk, Turn, a

_IN_THE = ("water", "desert", "jungle", "sea", "forest", "ocean", "river", "lake", "ground")


def _home(place: str) -> str:
    if place == "farm":
        return "on a farm"
    if place == "ice":
        return "on the ice"
    return f"in the {place}" if place in _IN_THE else f"in {a(place)}"


# relation -> how an answer of its table is said, and why it is so
_SAID: dict[str, Callable[[str], str]] = {"use of": "for {}".format, "young of": a, "home of": _home}
_GISTS = {
    "color of": "what color {} is", "sound of": "what sound {} makes", "legs of": "how many legs {} has",
    "use of": "what {} is for", "young of": "what the young of {} is called", "home of": "where {} lives",
    "kind of": "what {} is", "plural of": "for the plural of {}", "mix of": "what {} make", "how many": "how many {}",
    "rhyme of": "what rhymes with {}",
}  # fmt: skip
_WHYS = {
    "color of": "because {0} is {1}", "sound of": "because {0} says {1}", "legs of": "because {0} has {1} legs",
    "use of": "because {0} is {1}", "home of": "because {0} lives {1}", "kind of": "because {0} is {1}",
    "mix of": "because {0} make {1}",
}  # fmt: skip


def _article(kind: str) -> str:
    return kind if kind == "food" else a(kind)


def said(relation: str, answer: str) -> str:
    """An answer of a table as it is said."""
    return _article(answer) if relation == "kind of" else _SAID.get(relation, str)(answer)


def fact(relation: str, subject: str) -> Turn:
    """One entry of a table."""
    answers = TABLES[relation][subject]
    sayings = [said(relation, answer) for answer in answers]
    accepted = tuple(dict.fromkeys((*sayings[1:], *answers)))
    bare = relation in ("mix of", "how many", "plural of", "rhyme of")
    name = subject if bare else named(subject)
    many = subject if bare else plural(subject)
    number = VALUE_OF.get(answers[0]) if relation in ("legs of", "how many") else None
    kind = "number" if number is not None else "color" if relation in ("color of", "mix of") else relation
    slots = {"name": name, "bare": subject, "many": many}
    about = About(relation, (subject,), number)
    gist = "you asked " + _GISTS[relation].format(name)
    why = _WHYS[relation].format(name, sayings[0]) if relation in _WHYS else ""
    return Turn("", sayings[0], accepted=accepted, kind=kind, slots=slots, gist=gist, why=why, about=about)


def _draw(relation: str) -> Callable[[Talk], Turn]:
    subjects = list(TABLES[relation])
    return lambda talk: fact(relation, talk.rng.choice(subjects))


def _is_it_so(talk: Talk) -> Turn:
    """Whether a thing has a colour, or is of a kind."""
    rng = talk.rng
    relation = rng.choice(("color of", "kind of"))
    table = TABLES[relation]
    subject = rng.choice(list(table))
    true = rng.random() < 0.5
    wrong = [answers[0] for answers in table.values() if answers[0] not in table[subject]]
    claimed = said(relation, table[subject][0] if true else rng.choice(wrong))
    answer, other = ("yes", "no") if true else ("no", "yes")
    name, fact_is = named(subject), said(relation, table[subject][0])
    return Turn(
        "", answer, kind="choice", rivals=(other,), choice=True, slots={"x": name, "y": claimed},
        gist=f"you asked if {name} is {claimed}", why=f"because {name} is {fact_is}", about=About("is it so",
        (subject,)),
    )  # fmt: skip


SKILLS = (
    Skill("is it so", "facts", _is_it_so, (
        "is {x} {y}", "tell me if {x} is {y}", "do you think {x} is {y}", "is it true that {x} is {y}",
        "is {x} really {y}", "{x} is {y} right", "would you say {x} is {y}", "i want to know if {x} is {y}",
        "{x} is {y} yes or no", "is it right that {x} is {y}", "say if {x} is {y}", "am i right that {x} is {y}",
    ), 1.2),
    Skill("color of", "facts", _draw("color of"), (
        "what color is {name}", "which color is {name}", "what color does {name} have", "tell me the color of {name}",
        "what is the color of {name}", "do you know what color {name} is", "which color does {name} have",
        "the color of {name}", "how is {name} colored", "say what color {name} is", "name the color of {name}",
        "what color would you paint {name}",
    ), 1.5),
    Skill("sound of", "facts", _draw("sound of"), (
        "what sound does {name} make", "what does {name} say", "which sound does {name} make", "how does {name} sound",
        "tell me what {name} says", "what noise does {name} make", "how does {name} go", "make the sound of {name}",
        "what do you hear from {name}", "do you know the sound of {name}", "what sound comes from {name}",
        "can you sound like {name}",
    ), 1.2),
    Skill("legs of", "facts", _draw("legs of"), (
        "how many legs does {name} have", "how many legs has {name}", "how many legs do {many} have",
        "tell me how many legs {name} has", "what is the number of legs of {name}", "how many legs are on {name}",
        "do you know how many legs {name} has", "on how many legs does {name} stand",
        "the legs of {name} how many are they", "how many legs can you count on {name}", "count the legs of {name}",
        "with how many legs is {name} born",
    ), 1.2),
    Skill("use of", "facts", _draw("use of"), (
        "what is {name} for", "what is {name} used for", "what do you use {name} for", "what do you do with {name}",
        "why do people have {name}", "what can you do with {name}", "tell me what {name} is for",
        "what is {name} good for", "what do we need {name} for", "what are {many} for", "what is the use of {name}",
        "what does one do with {name}",
    ), 1.2),
    Skill("young of", "facts", _draw("young of"), (
        "what is a baby {bare} called", "what do you call a baby {bare}", "what is the young of {name} called",
        "what is the baby of {name}", "what is a young {bare} called", "tell me what a baby {bare} is called",
        "what do you call a young {bare}", "what is the name of a baby {bare}", "how is a baby {bare} called",
        "do you know what a baby {bare} is called", "what word is there for a young {bare}",
        "what name has a baby {bare}",
    )),
    Skill("home of", "facts", _draw("home of"), (
        "where does {name} live", "where do {many} live", "where is the home of {name}", "in what does {name} live",
        "tell me where {name} lives", "what is the home of {name}", "where can you find {name}",
        "where does {name} have its home", "do you know where {name} lives", "what does {name} live in",
        "where would i look for {name}", "where is {name} at home",
    )),
    Skill("kind of", "facts", _draw("kind of"), (
        "what is {name}", "what kind of thing is {name}", "tell me what {name} is", "do you know what {name} is",
        "what sort of thing is {name}", "what do you call {name}", "explain what {name} is", "what exactly is {name}",
        "what would you say {name} is", "what does {bare} mean", "to what group does {name} belong",
        "what type of thing is {name}",
    )),
    Skill("plural of", "facts", _draw("plural of"), (
        "what is the plural of {bare}", "plural of {bare}", "one {bare} two what", "tell me the plural of {bare}",
        "how do you say more than one {bare}", "what do you call many of {bare}", "one {bare} many what",
        "what is more than one {bare}", "what are two of {bare} called", "give me the plural of {bare}",
        "name the plural of {bare}", "if there are two of {bare} what do you say",
    )),
    Skill("mix of", "facts", _draw("mix of"), (
        "what color do {bare} make", "what do {bare} make", "what color do you get from {bare}",
        "what do you get if you mix {bare}", "mix {bare}", "which color do {bare} make together",
        "what is the mix of {bare}", "what color is {bare} mixed", "tell me what color {bare} make",
        "if i mix {bare} what color do i get", "{bare} mixed is what color", "which color comes from {bare}",
    ), 0.6),
    Skill("how many", "facts", _draw("how many"), (
        "how many {bare}", "tell me how many {bare}", "do you know how many {bare}", "say how many {bare}",
        "what do you think how many {bare}", "and how many {bare}", "now tell me how many {bare}",
        "i want to know how many {bare}", "can you say how many {bare}", "exactly how many {bare}",
        "i wonder how many {bare}", "guess how many {bare}",
    )),
    Skill("rhyme of", "facts", _draw("rhyme of"), (
        "what rhymes with {bare}", "which word rhymes with {bare}", "what is a rhyme for {bare}",
        "tell me a rhyme for {bare}", "find a rhyme for {bare}", "give me a word that rhymes with {bare}",
        "name a word that rhymes with {bare}", "do you know a rhyme for {bare}", "what word sounds like {bare}",
        "a rhyme for {bare}", "say something that rhymes with {bare}", "can you rhyme with {bare}",
    )),
)  # fmt: skip
ANSWERS = tuple(
    dict.fromkeys(
        said(relation, answer) for relation, table in TABLES.items() for answers in table.values() for answer in answers
    )
)
WORDS = (*ANSWERS, "for", "in", "on", *HOW_MANY)
