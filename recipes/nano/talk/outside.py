"""What lies outside the world: questions of all kinds, and the few friendly sentences that answer them.

The last fifth of every list is kept for evaluation, and so are the last two patterns of each kind.
"""

from __future__ import annotations

from collections.abc import Callable

from .sums import TOO_HARD
from .turns import About, Skill, Talk, Turn, part

UNKNOWN, CAN_NOT = "sorry i do not know that", "sorry i can not do that yet"
NO_LOOK, NO_OPINION = "sorry i can not look that up", "i am only a small model i have no opinion"
REFUSALS = (UNKNOWN, CAN_NOT, NO_LOOK, NO_OPINION, TOO_HARD)
# What others than our model say instead: right too.
DECLINED = (
    "i do not know", "do not know that", "i can not", "i am not able", "i have no opinion", "too hard", "not sure",
    "i am unable", "no idea", "did not understand", "do not understand", "can not do that", "can not look",
)  # fmt: skip

_PEOPLE = (
    "the president", "the king of spain", "albert einstein", "mozart", "shakespeare", "the pope", "my neighbor",
    "elvis", "napoleon", "the mayor", "cleopatra", "the prime minister", "picasso", "my boss", "santa claus",
    "beethoven", "the queen of england", "marie curie", "isaac newton", "the chancellor", "columbus",
    "julius caesar", "the dalai lama", "charlie chaplin", "leonardo da vinci",
)  # fmt: skip
_COUNTRIES = (
    "france", "germany", "italy", "china", "japan", "brazil", "canada", "egypt", "india", "mexico", "norway", "poland",
    "russia", "spain", "england", "america", "australia", "greece", "turkey", "africa", "kenya", "chile", "sweden",
    "portugal", "vietnam",
)  # fmt: skip
_TOPICS = (
    "the internet", "the universe", "history", "philosophy", "gravity", "electricity", "the stock market",
    "football results", "dinosaurs", "the roman empire", "climate change", "democracy", "the second world war",
    "biology", "black holes", "physics", "evolution", "the economy", "religion", "mathematics", "oxygen",
    "vitamins", "art", "computers", "space travel", "the brain", "politics", "chemistry", "volcanoes",
    "the moon landing", "atoms", "medicine", "the ocean", "robots", "cars and engines", "astronomy", "bitcoin",
    "quantum computers", "the middle ages", "opera", "jazz", "genes", "inflation", "earthquakes", "the olympic games",
)  # fmt: skip
_TASKS = (
    "cook rice", "bake a cake", "tie a tie", "fix a bike", "learn english", "play chess", "lose weight",
    "build a house", "open a bank account", "write a letter", "find a job", "drive a car", "clean a carpet",
    "grow tomatoes", "sleep better", "make coffee", "install windows", "repair a phone", "save money",
    "paint a wall", "swim faster", "train a dog", "knit a sweater", "boil an egg", "change a tire",
)  # fmt: skip
_ORDERS = (
    "turn on the lights", "play some music", "set an alarm", "call my mother", "book a hotel", "order a pizza",
    "speak louder", "stop talking", "send an email", "open the door", "buy a ticket", "take a picture",
    "call a taxi", "show me the news", "start the car", "search the internet", "draw a picture", "sing a song",
    "write a poem", "tell me a story", "play a game with me", "set a timer", "turn off the television",
    "make me a sandwich", "write a letter to my boss", "clean my room", "play some jazz", "lock the house",
    "read my messages", "wake me up at six", "dance for me", "water the plants",
)  # fmt: skip
_NOW = (
    "the weather", "the weather today", "the weather tomorrow", "the time", "the date today", "the news", "the traffic",
    "the temperature outside", "the price of gold", "the score of the game", "the next bus", "the exchange rate",
    "the lottery numbers", "the news of today", "the forecast", "the price of milk", "the stock price",
    "the latest news", "the time in tokyo", "the result of the election", "the cinema program", "the air quality",
    "the price of oil", "the flight status", "the snow height",
)  # fmt: skip
_OPINIONS = (
    "love", "god", "the government", "money", "war", "your makers", "this movie", "my new haircut", "coffee", "pizza",
    "dogs", "cats", "music", "the future", "other robots", "the meaning of life", "death", "happiness", "people",
    "football", "my hair", "the president", "poetry", "fashion", "marriage", "modern art", "taxes",
)  # fmt: skip
_HARD = (
    "the square root of nine", "ten percent of fifty", "a prime number", "pi", "the area of a circle",
    "the sine of one", "two to the power of three", "the solution of this equation", "one third of nine",
    "a million plus one", "the logarithm of ten", "the derivative of x", "infinity plus one", "the cube of four",
    "a quarter of eight",
)  # fmt: skip
_LANGUAGES = ("german", "french", "spanish", "italian", "chinese", "latin", "russian", "greek", "polish", "dutch")
_PHRASES = (
    "good morning", "i love you", "thank you", "where is the station", "this sentence", "my name", "how are you",
    "the house is big", "see you tomorrow", "happy birthday",
)  # fmt: skip
_CODE = (
    "a program", "a function in python", "a website", "a sorting algorithm", "some java code", "a shell script",
    "a loop in c", "a calculator app", "an html page", "a database query", "a regular expression", "a unit test",
    "a game in python", "a sudoku solver", "a web server",
)  # fmt: skip
_MINE = (
    "my keys", "my phone", "my wallet", "my birthday", "my address", "my shoe size", "my dog", "my favorite color",
    "my age", "my mother", "my job", "my password", "my bank", "my bag", "my friends", "my car", "my glasses",
    "my favorite song", "my passport", "my umbrella",
)  # fmt: skip
# Whole questions of many kinds.
_FACTS = (
    "who invented the telephone", "how tall is the eiffel tower", "how far is the sun", "how deep is the ocean",
    "why is the sky blue", "who wrote this book", "when did the war end", "how many people live on earth",
    "what is the biggest country", "how fast is light", "what is the longest river", "who won the world cup",
    "who painted the mona lisa", "what is the meaning of life", "when was rome built", "why do we dream",
    "how do planes fly", "what year is it", "why is water wet", "who was the first man on the moon",
    "how does a computer work", "what came first the chicken or the egg", "where do babies come from",
    "why do cats purr", "how many stars are in the sky", "what is the tallest building", "who discovered america",
    "when do the shops open", "how much does a house cost", "what should i eat tonight", "which phone should i buy",
    "will it rain tomorrow", "what is inside the earth", "how old is the universe", "why do leaves fall",
    "what is a black hole", "who is the richest person", "how many bones do we have", "why is the sea salty",
    "what causes thunder",
)  # fmt: skip

# Whole questions about the moment.
_MOMENT = (
    "what time is it", "what day is it", "what day is it today", "what is the date", "what month is it",
    "is it raining", "is it cold outside", "how is the weather", "what is the weather like", "will it snow",
    "how late is it", "who won the game yesterday", "what is on television", "what happened today", "is the store open",
    "what is new in the world", "what holiday is today", "is it warm in spain", "is the train late",
    "what is playing tonight",
)  # fmt: skip
# Things that the tables of facts do not have.
_STRANGE = (
    "dragon", "unicorn", "robot", "dinosaur", "ghost", "mermaid", "vampire", "planet", "monster", "wizard", "octopus",
    "jellyfish", "hedgehog", "raccoon", "hippo", "dolphin", "moose", "parrot", "ostrich", "lizard",
)  # fmt: skip
_STRANGELY = (
    "what color is a {}", "what sound does a {} make", "how many legs does a {} have", "what rhymes with {}",
    "what is a baby {} called", "where does a {} live", "what is a {} for", "what is the opposite of {}",
    "how heavy is a {}", "how fast is a {}", "what does a {} eat", "how long does a {} sleep", "how old does a {} get",
    "why is a {} so big",
)  # fmt: skip

_WHO = (
    "who is {}", "tell me about {}", "who was {}", "what do you know about {}", "how old is {}", "where does {} live",
    "what did {} do", "when was {} born", "is {} famous", "have you met {}", "what is {} known for",
    "is {} still alive",
)  # fmt: skip
_WHERE = (
    "what is the capital of {}", "how many people live in {}", "where is {}", "have you been to {}", "how big is {}",
    "what language do they speak in {}", "how is the weather in {}", "who rules {}", "what do people eat in {}",
    "how far is it to {}", "what is {} famous for", "which money do they use in {}",
)  # fmt: skip
_WHAT = (
    "tell me about {}", "what is {}", "explain {}", "what do you know about {}", "how does {} work",
    "teach me something about {}", "why is {} important", "what can you say about {}", "give me facts about {}",
    "i want to learn about {}", "who invented {}", "write an essay about {}", "summarize {}",
)  # fmt: skip
_HOW = (
    "how do i {}", "how can i {}", "teach me how to {}", "what do i need to {}", "how long does it take to {}",
    "can you help me {}", "show me how to {}", "i want to {}", "explain how to {}", "what is the best way to {}",
    "is it hard to {}", "give me tips to {}",
)  # fmt: skip
_DO = (
    "{}", "please {}", "can you {}", "could you {}", "{} please", "i want you to {}", "would you {}", "{} for me",
    "now {}", "{} right now", "be so kind and {}", "try to {}",
)  # fmt: skip
_LOOK = (
    "what is {}", "tell me {}", "do you know {}", "can you check {}", "how is {}", "i want to know {}", "look up {}",
    "can you tell me {}", "please look up {}", "give me {}", "any word on {}", "find out {}",
)  # fmt: skip
_THINK = (
    "what do you think about {}", "do you like {}", "what is your opinion on {}", "is {} good", "do you believe in {}",
    "how do you feel about {}", "do you think {} is important", "what do you say about {}", "are you for {}",
    "do you love {}", "what are your views on {}", "is {} a good thing",
)  # fmt: skip
_COMPUTE = (
    "what is {}", "calculate {}", "tell me {}", "do you know {}", "how much is {}", "compute {}", "find {}",
    "give me {}", "can you work out {}", "what would be {}", "determine {}", "can you name {}",
)  # fmt: skip
_TRANSLATE = (
    "translate {phrase} into {}", "what is {phrase} in {}", "how do you say {phrase} in {}",
    "say {phrase} in {} please", "can you translate {phrase} to {}", "what does {phrase} mean in {}",
    "please translate {phrase} into {}", "i need {phrase} in {}", "how do i say {phrase} in {}",
    "put {phrase} into {}", "give me the {} for {phrase}", "what would {phrase} be in {}",
)  # fmt: skip
_PROGRAM = (
    "write {}", "can you write {}", "i need {}", "code {} for me", "make {}", "please program {}", "show me {}",
    "help me with {}", "how do i write {}", "can you code {}", "develop {}", "fix {} for me",
)  # fmt: skip
_OWN = (
    "where is {}", "what about {} today", "do you know {}", "tell me about {}", "have you seen {}",
    "where did i leave {}", "what can you tell me about {}", "do you remember {}", "guess {}", "can you find {}",
    "what is wrong with {}", "help me find {}",
)  # fmt: skip

_ASKED = (
    "{}", "tell me {}", "do you know {}", "can you tell me {}", "i want to know {}", "please tell me {}",
    "a question {}", "i wonder {}", "maybe you know {}", "hey {}", "could you explain {}", "any idea {}",
)  # fmt: skip

_KINDS: dict[str, tuple[str, tuple[str, ...], tuple[str, ...]]] = {
    "outside people": (UNKNOWN, _PEOPLE, _WHO), "outside places": (UNKNOWN, _COUNTRIES, _WHERE),
    "outside topics": (UNKNOWN, _TOPICS, _WHAT), "outside advice": (UNKNOWN, _TASKS, _HOW),
    "outside orders": (CAN_NOT, _ORDERS, _DO), "outside today": (NO_LOOK, _NOW, _LOOK),
    "outside opinions": (NO_OPINION, _OPINIONS, _THINK), "outside sums": (TOO_HARD, _HARD, _COMPUTE),
    "outside languages": (TOO_HARD, _LANGUAGES, _TRANSLATE), "outside code": (TOO_HARD, _CODE, _PROGRAM),
    "outside mine": (UNKNOWN, _MINE, _OWN),
    "outside questions": (UNKNOWN, _FACTS, _ASKED), "outside moment": (NO_LOOK, _MOMENT, _ASKED),
    "outside facts": (UNKNOWN, _STRANGE, _STRANGELY),
}  # fmt: skip


def _draw(kind: str) -> Callable[[Talk], Turn]:
    answer, topics, _ = _KINDS[kind]

    def draw(talk: Talk) -> Turn:
        topic = talk.rng.choice(part(topics, held_out=talk.held_out))
        slots = {"topic": topic, "phrase": talk.rng.choice(part(_PHRASES, held_out=talk.held_out))}
        about = About("refused")
        gist = "you asked something that i do not know"
        return Turn("", answer, accepted=(*REFUSALS, *DECLINED), kind="refusal", slots=slots, gist=gist, about=about)

    return draw


SKILLS = tuple(
    Skill(kind, "outside", _draw(kind), tuple(pattern.replace("{}", "{topic}") for pattern in patterns))
    for kind, (_, _, patterns) in _KINDS.items()
)
ANSWERS = REFUSALS
WORDS = (
    *REFUSALS, *part(_PHRASES, held_out=False),
    *(topic for _, topics, _ in _KINDS.values() for topic in part(topics, held_out=False)),
)  # fmt: skip


def questions(*, held_out: bool) -> list[str]:
    """Every question outside the world, of those that are trained or of those that are kept."""
    return [
        pattern.format(topic=topic, phrase=phrase)
        for skill in SKILLS
        for pattern in skill.ways(held_out=held_out)
        for topic in part(_KINDS[skill.name][1], held_out=held_out)
        for phrase in (part(_PHRASES, held_out=held_out) if "{phrase}" in pattern else ("",))
    ]
