"""Small talk, what the model is, repeating, dictation, names and things to remember, and what is no question."""

from __future__ import annotations

import re
from collections.abc import Callable

from .lexicon import BEINGS, SPELLED, THINGS, sentence
from .numerals import LARGEST, NUMBERS, word
from .shapes import COLORS
from .turns import About, Skill, Sound, Talk, Turn, part

NOTHING_HEARD = "i did not hear anything"
UNCLEAR = "sorry i did not understand that"
WHICH, NICE = "i do not know what you mean", "that is nice"
NOISES = ("silence", "hiss", "hum", "music", "babble", "clicks")
NAMES = (
    "anna", "tom", "maria", "peter", "lisa", "john", "sarah", "david", "emma", "paul", "laura", "james", "julia",
    "mark", "nina", "adam", "clara", "daniel", "eva", "felix", "grace", "henry", "ida", "jack", "kate", "leo",
    "mia", "noah", "olivia", "oscar", "rosa", "sam", "sophie", "ted", "vera", "will", "zoe", "ben", "alice",
    "george", "helen", "max", "lucy", "martin", "amy", "robert", "ella", "simon", "ruth", "victor",
)  # fmt: skip
_OUT_OF_LETTERS = re.compile(r"[^a-z' ]+")

# skill -> (weight, answer, what else is right, "what did i ask", phrasings)
_TALK: dict[str, tuple[float, str, tuple[str, ...], str, tuple[str, ...]]] = {
    "hello": (2.0, "hello how can i help you", ("hello", "hi", "hey"), "you said hello", (
        "hello", "hi", "hey", "hi there", "hello there", "hey there", "good day", "hello omni", "hi omni", "greetings",
        "hey you", "hello hello", "hi hi", "a very good day to you",
    )),
    "good morning": (0.6, "good morning", ("morning", "hello"), "you said good morning", (
        "good morning", "morning", "good morning omni", "good morning to you", "hello good morning", "hi good morning",
        "a good morning to you", "good morning how nice to see you", "oh good morning", "good morning there",
        "morning omni", "a very good morning",
    )),
    "good evening": (0.6, "good evening", ("evening", "hello"), "you said good evening", (
        "good evening", "evening", "good evening omni", "good evening to you", "hello good evening", "hi good evening",
        "a good evening to you", "good evening how nice to see you", "oh good evening", "good evening there",
        "evening omni", "a very good evening",
    )),
    "good night": (0.6, "good night", ("sleep well",), "you said good night", (
        "good night", "night", "good night omni", "sleep well", "i am going to bed", "good night then", "night night",
        "have a good night", "i will go to sleep now", "good night and thank you", "sleep well omni",
        "a good night to you",
    )),
    "how are you": (1.5, "i am fine thank you", ("fine", "good", "very well", "doing well"), "you asked how i am", (
        "how are you", "hi how are you", "hello how are you", "good morning how are you", "how are you doing",
        "how do you do", "how is it going", "how are things", "are you ok", "are you well", "how are you today",
        "how do you feel", "what is up", "is everything ok", "how have you been", "how is life", "are you doing well",
    )),
    "thanks": (1.5, "you are welcome", ("welcome", "no problem", "my pleasure"), "you said thank you", (
        "thank you", "thanks", "thank you very much", "thanks a lot", "many thanks", "thank you so much",
        "great thanks", "ok thank you", "thanks omni", "thank you that is all", "thank you omni",
        "that was helpful thanks", "that was kind of you", "i thank you",
    )),
    "goodbye": (1.2, "goodbye", ("bye", "see you"), "you said goodbye", (
        "goodbye", "bye", "bye bye", "see you", "see you later", "good bye", "until next time", "i have to go",
        "see you soon", "that is all goodbye", "ok bye", "bye omni", "see you tomorrow", "i must go now",
    )),
    "who are you": (1.5, "i am omni a small model that hears sees and speaks", ("omni",
    "model"), "you asked who i am", (
        "who are you", "what are you", "tell me about yourself", "tell me who you are", "who am i talking to",
        "who is there", "introduce yourself", "who is this", "what kind of thing are you",
        "say something about yourself", "what is omni", "please introduce yourself", "who am i speaking with",
        "explain who you are",
    )),
    "your name": (1.5, "my name is omni", ("omni",), "you asked for my name", (
        "what is your name", "tell me your name", "what are you called", "do you have a name", "your name please",
        "how are you called", "what should i call you", "what do people call you", "can you tell me your name",
        "and what is your name", "may i know your name", "what name do you have",
    )),
    "who made you": (1.0, "i was made with the omni library", ("omni library", "library"), "you asked who made me", (
        "who made you", "who created you", "who built you", "who trained you", "where do you come from",
        "how were you made", "who is your maker", "who programmed you", "who designed you",
        "what were you made with", "who are your makers", "by whom were you made",
    )),
    "what can you do": (1.5, "i can do sums count spell and talk about pictures", ("sums", "count", "spell"),
                        "you asked what i can do", (
        "what can you do", "what do you know", "how can you help me", "help", "what can i ask you",
        "what are you good at", "what can i ask", "tell me what you can do", "can you help me",
        "what are your skills", "i need help", "what can you do for me", "show me what you can do",
        "with what can you help me",
    )),
    "are you human": (1.0, "no i am a small computer model", ("model", "computer", "no"), "you asked if i am human", (
        "are you human", "are you a robot", "are you a person", "are you real", "are you a computer",
        "are you a machine", "are you alive", "am i talking to a human", "are you a real person", "are you an ai",
        "are you a human being", "do i talk to a machine",
    )),
    "how old are you": (0.6, "i am very young", ("young", "new"), "you asked how old i am", (
        "how old are you", "what is your age", "tell me your age", "when were you born", "when is your birthday",
        "are you old", "are you young", "how old is omni", "what age are you", "how many years old are you",
        "how old might you be", "since when do you exist",
    )),
    "where are you": (0.6, "i live in this computer", ("computer",), "you asked where i am", (
        "where are you", "where do you live", "where is your home", "where are you now", "what is your address",
        "tell me where you live", "where do you stay", "where are you located", "in which city do you live",
        "do you live in a house", "where might you be", "what place do you live in",
    )),
    "languages": (0.5, "i only speak english", ("english",), "you asked which languages i speak", (
        "what languages do you speak", "do you speak german", "do you speak french", "which languages do you know",
        "do you speak spanish", "can you speak chinese", "do you understand english", "which language is this",
        "can you speak another language", "what language do you speak", "in which languages can i talk to you",
        "do you know other languages",
    )),
    "praise": (0.8, "thank you that is kind", ("thank you", "thanks"), "you said something nice", (
        "well done", "good job", "very good", "that is right", "correct", "you are clever", "you are great", "nice",
        "great", "i like you", "you are good", "exactly", "you are so smart", "that was right",
        "what a good answer", "you did well",
    )),
    "blame": (0.6, "i am sorry i make mistakes", ("sorry",), "you said that i was wrong", (
        "that is wrong", "wrong", "that is not right", "you are wrong", "no that is wrong", "that is not correct",
        "this is false", "incorrect", "you made a mistake", "no that is not true", "you are stupid", "that was wrong",
        "this cannot be right", "what a bad answer",
    )),
    "fine": (0.6, "ok", ("all right", "good"), "you said ok", (
        "ok", "okay", "all right", "i see", "yes", "no", "aha", "sure", "fine", "hm", "oh", "alright then",
        "got it", "i get it",
    )),
    "can you hear me": (0.8, "yes i can hear you", ("yes",), "you asked if i hear you", (
        "can you hear me", "do you hear me", "are you listening", "are you there", "is anybody there",
        "do you understand me", "is this working", "testing testing", "can you hear my voice",
        "hello can you hear me", "do i come through", "is my voice loud enough",
    )),
    "sorry": (0.4, "no problem", ("that is ok", "no worries"), "you said sorry", (
        "sorry", "i am sorry", "my mistake", "oh sorry", "excuse me", "i apologize", "sorry about that",
        "that was my mistake", "sorry omni", "oh i am sorry", "forgive me", "please excuse my mistake",
    )),
    "user is sad": (0.5, "i am sorry to hear that", ("sorry",), "you told me how you feel", (
        "i am sad", "i feel bad", "i am tired", "i feel sick", "i am lonely", "i am not well", "i had a bad day",
        "i am ill", "i feel lonely", "i am angry", "i am not feeling well", "today was a bad day",
    )),
    "user is happy": (0.5, "that is good to hear", ("good", "great", "nice"), "you told me how you feel", (
        "i am happy", "i feel good", "i am fine", "i am good", "i am well", "i am very happy", "i had a good day",
        "i feel great", "i am doing well", "i am glad", "today was a good day", "i am in a good mood",
    )),
    "joke": (0.6, "what animal says moo a cow", ("cow",), "you asked for a joke", (
        "tell me a joke", "do you know a joke", "say something funny", "make me laugh", "tell me something funny",
        "a joke please", "can you tell a joke", "i want to hear a joke", "do you know any jokes", "tell a joke",
        "got a joke for me", "give me a good joke",
    )),
    "say something": (0.5, "hello i am omni and i like numbers", ("hello", "omni"), "you asked me to say something", (
        "say something", "talk to me", "speak", "please say something", "can you speak", "can you talk",
        "let me hear your voice", "say anything", "just say something", "speak to me", "let me hear you",
        "tell me something",
    )),
}  # fmt: skip


def _smalltalk(name: str) -> Callable[[Talk], Turn]:
    _, answer, accepted, gist, _ = _TALK[name]
    return lambda talk: Turn("", answer, accepted=accepted, kind="chat", gist=gist, about=About("chat", (name,)))


def plain(text: str) -> str:
    """A text as words: small letters, no marks but apostrophes, numbers up to a hundred in words.

    Raises ValueError for figures beyond a hundred, letters outside a..z, and for a text without words.
    """
    text = text.lower().replace("\u2019", "'").replace("-", " ")
    text = re.sub(r"\d+", lambda found: f" {word(_within(int(found[0]), text))} ", text)
    if re.search(r"[^\W_]", _latin.sub("", text)):
        raise ValueError(f"letters other than a..z in {text!r}; leave the sentence out")
    words = [piece.strip("'") for piece in _OUT_OF_LETTERS.sub(" ", text).split()]
    if not any(words):
        raise ValueError(f"no words in {text!r}; give a sentence")
    return " ".join(piece for piece in words if piece)


_latin = re.compile(r"[a-z]+")


def _within(number: int, text: str) -> int:
    if number > LARGEST:
        raise ValueError(f"the number {number} in {text!r} is more than {LARGEST}; write it in words")
    return number


def _text(talk: Talk) -> str:
    if talk.sentences and talk.rng.random() < 0.5:
        return plain(talk.rng.choice(talk.sentences))
    return sentence(talk.rng)


def _repeat(talk: Talk) -> Turn:
    said = _text(talk)
    gist = f"you asked me to say {said}"
    return Turn("", said, kind="text", slots={"text": said}, gist=gist, about=About("repeat", (said,)))


def _dictation(talk: Talk) -> Turn | None:
    if not talk.media:
        return None
    said = _text(talk)
    return Turn("", said, kind="text", gist="you asked me to write down what i heard", media="sound", sound=Sound(said),
                about=About("heard"))  # fmt: skip


def _nothing(talk: Talk) -> Turn | None:
    if not talk.media:
        return None
    sound = Sound(None, talk.rng.choice(NOISES))
    return Turn("", NOTHING_HEARD, gist="you asked me what i heard", media="sound", sound=sound, about=About("nothing"))


def _silence(talk: Talk) -> Turn | None:
    turn = _nothing(talk)
    return None if turn is None else Turn("", NOTHING_HEARD, gist="you did not say anything", media="sound",
                                          sound=turn.sound, about=About("nothing"))  # fmt: skip


def _no_sound(talk: Talk) -> Turn:
    """What was heard is asked, and there is no sound."""
    return Turn("", NOTHING_HEARD, gist="you asked me what i heard", about=About("nothing"))


def _statement(talk: Talk) -> Turn:
    return Turn("", NICE, accepted=("ok", "nice", "good"), kind="chat", slots={"x": talk.rng.choice(BEINGS + THINGS)},
                gist="you told me something", about=About("chat", ("statement",)))  # fmt: skip


def _lone_words(talk: Talk) -> Turn | None:
    """Words that ask nothing, where nothing was said that they could belong to."""
    if talk.turns:
        return None
    x, y = talk.rng.sample(THINGS + BEINGS, 2)
    return Turn("", WHICH, accepted=("what do you mean", UNCLEAR), slots={"x": x, "y": y},
                gist="you asked something that i did not understand", about=About("loose"))  # fmt: skip


def _introduced(talk: Talk) -> Turn:
    name = talk.rng.choice(part(NAMES, held_out=talk.held_out))
    return Turn("", f"nice to meet you {name}", accepted=(name,), kind="name", slots={"name": name},
                gist=f"you told me your name {name}", about=About("name", (name,)))  # fmt: skip


def _my_name(talk: Talk) -> Turn:
    told = [turn.about.key[0] for turn in talk.turns if turn.about is not None and turn.about.kind == "name"]
    if not told:
        return Turn(
            "", "you did not tell me your name", accepted=("i do not know your name",), gist="you asked for your name"
        )
    return Turn("", f"your name is {told[-1]}", accepted=(str(told[-1]),), kind="name", gist="you asked for your name",
                why="because you told me", about=About("my name"))  # fmt: skip


def _remember(talk: Talk) -> Turn:
    rng = talk.rng
    what, things = rng.choice((("number", NUMBERS), ("color", COLORS), ("word", SPELLED), ("animal", BEINGS[:5]),
                               ("thing", THINGS[:10])))  # fmt: skip
    thing = rng.choice(things)
    return Turn("", f"ok i will remember {thing}", accepted=(thing,), kind="phrase",
    slots={"what": what, "thing": thing},
                gist=f"you told me to remember {thing}", about=About("remember", (what, thing)))  # fmt: skip


def _remembered(talk: Talk) -> Turn | None:
    told = [turn.about.key for turn in talk.turns if turn.about is not None and turn.about.kind == "remember"]
    if not told:
        if talk.rng.random() < 0.8:
            return None
        what = talk.rng.choice(("number", "color", "word", "animal", "thing"))
        return Turn("", f"you did not tell me a {what}".replace("a animal", "an animal"), slots={"what": what},
                    accepted=("you did not tell me",), gist=f"you asked for the {what}")  # fmt: skip
    what, thing = (str(part) for part in told[-1])
    return Turn("", thing, kind=what if what in ("number", "color") else "phrase", slots={"what": what},
                gist=f"you asked for the {what}", why="because you told me", about=About("remembered"))  # fmt: skip


def _unclear(talk: Talk) -> Turn:
    rng = talk.rng
    vowels, others = "aeiou", "bcdfghjklmnpqrstvwxyz"

    def noise() -> str:
        if rng.random() < 0.5:
            return "".join(rng.choices(others + vowels, k=rng.randint(3, 9)))
        return "".join(rng.choice(others) + rng.choice(vowels) for _ in range(rng.randint(2, 4)))

    text = " ".join(noise() for _ in range(rng.randint(1, 4)))
    return Turn("", UNCLEAR, slots={"text": text}, gist="you asked something that i did not understand",
                about=About("refused"))  # fmt: skip


_DICTATION = (
    "write down what you hear", "what did you hear", "what was said", "what did they say", "write this down",
    "please write down what was said", "what do you hear", "listen and write", "take a dictation",
    "tell me what you hear", "what is said here", "write what i say", "note down what you hear", "what were the words",
)  # fmt: skip
SKILLS = (
    *(Skill(name, "chat", _smalltalk(name), entry[4], entry[0]) for name, entry in _TALK.items()),
    Skill("repeat", "repeat", _repeat, (
        "repeat after me {text}", "say {text}", "please say {text}", "repeat {text}", "can you say {text}",
        "say after me {text}", "now say {text}", "repeat the words {text}", "say this {text}",
        "could you repeat {text}", "i want you to say {text}", "please repeat after me {text}",
        "speak after me {text}", "say the following {text}",
    ), 3.0),
    Skill("introduce", "chat", _introduced, (
        "my name is {name}", "i am {name}", "hello my name is {name}", "hi i am {name}", "call me {name}",
        "you can call me {name}", "this is {name}", "{name} is my name", "hello i am {name}", "people call me {name}",
        "the name is {name}", "they call me {name}",
    ), 1.2),
    Skill("statement", "chat", _statement, (
        "i like the {x}", "i have a {x}", "my {x} is big", "i see a {x}", "i bought a {x}", "we have a {x} at home",
        "i love my {x}", "there is a {x} in my house", "my {x} is old", "i want a {x}", "i found a {x}",
        "today i saw a {x}", "my {x} is very beautiful", "i dreamed of a {x}",
    ), 1.0),
    Skill("lone words", "chat", _lone_words, (
        "{x}", "the {x}", "a {x}", "my {x}", "{x} {y}", "{x} and {y}", "{x} or {y}", "{x} {x}", "only {x}", "just {x}",
        "some {x}", "{x} maybe",
    ), 1.5),
    Skill("my name", "chat", _my_name, (
        "what is my name", "do you know my name", "who am i", "tell me my name", "what am i called",
        "can you say my name", "do you remember my name", "what did i say my name is", "say my name",
        "how am i called", "do you still know my name", "what name did i tell you",
    ), 0.8),
    Skill("remember", "chat", _remember, (
        "remember the {what} {thing}", "please remember the {what} {thing}", "my {what} is {thing}",
        "the {what} is {thing}", "remember this {what} {thing}", "keep the {what} {thing} in mind",
        "i am thinking of the {what} {thing}", "do not forget the {what} {thing}",
        "the {what} to remember is {thing}", "can you remember the {what} {thing}", "memorize the {what} {thing}",
        "hold on to the {what} {thing}",
    ), 0.7),
    Skill("remembered", "chat", _remembered, (
        "what was the {what}", "which {what} did i tell you", "what {what} did i say", "tell me the {what} again",
        "do you remember the {what}", "what is the {what}", "what was my {what}", "which {what} was it",
        "say the {what} that i told you", "what {what} should you remember", "do you still know the {what}",
        "give me back the {what}",
    ), 0.7),
    Skill("dictation", "sound", _dictation, _DICTATION, 2.0),
    Skill("nothing heard", "sound", _nothing, _DICTATION, 0.7),
    Skill("silence", "sound", _silence, ("",), 1.0),
    Skill("no sound", "chat", _no_sound, _DICTATION, 0.3),
    Skill("unclear", "outside", _unclear, ("{text}",), 1.0),
)  # fmt: skip
CANNED = (*(entry[1] for entry in _TALK.values()), NICE, NOTHING_HEARD, UNCLEAR, "you did not tell me your name",
          *(f"you did not tell me {what}" for what in ("a number", "a color", "a word", "an animal",
          "a thing")))  # fmt: skip
CHATS = (*(entry[1] for entry in _TALK.values()), NICE)
TRAINED_NAMES = part(NAMES, held_out=False)
WORDS = (*CANNED, *TRAINED_NAMES, "nice to meet you", "your name is", "ok i will remember", "because you told me",
         "number", "color", "word", "animal", "thing")  # fmt: skip
