"""Simple facts of the world, as tables: relation -> what is asked about -> the answer, then others that are right."""

from __future__ import annotations

from .turns import a, listed


def _table(text: str) -> dict[str, tuple[str, ...]]:
    """Entries "subject: answer|other answer", parted by semicolons."""
    found = {}
    for entry in listed(text, ";"):
        subject, _, answers = entry.partition(":")
        if answers:
            found[" ".join(subject.split())] = tuple(" ".join(answer.split()) for answer in answers.split("|"))
    return found


COLOR_OF = _table("""
    banana:yellow; grass:green; sky:blue; snow:white; coal:black; blood:red; tomato:red; lemon:yellow;
    carrot:orange; strawberry:red; cherry:red; leaf:green; frog:green; cucumber:green; pea:green; milk:white;
    cloud:white; sea:blue; sun:yellow; elephant:grey; mouse:grey; pig:pink; flamingo:pink; chocolate:brown; bear:brown;
    wood:brown; coffee:brown; pumpkin:orange; swan:white; crow:black; fire truck:red; salt:white; sugar:white;
    plum:purple;
    lettuce:green; ruby:red; emerald:green; stone:grey; paper:white; raven:black; corn:yellow; canary:yellow;
    spinach:green; broccoli:green; potato:brown; lavender:purple; eggplant:purple; salmon:pink; night:black; ice:white;
    sand:yellow; tree:green; polar bear:white; rain cloud:grey; fire:orange|red; egg:white|brown;
    rose:red|pink|white""")
SOUND_OF = _table("""
    dog:woof; cat:meow; cow:moo; duck:quack; sheep:baa; pig:oink; horse:neigh; lion:roar; bee:buzz; frog:croak|ribbit;
    snake:hiss; owl:hoot; rooster:cock a doodle doo; mouse:squeak; donkey:hee haw; wolf:howl; crow:caw;
    chick:peep|cheep;
    turkey:gobble; bird:tweet|chirp; bear:growl|roar; tiger:roar; elephant:trumpet; goose:honk; fly:buzz; kitten:meow;
    puppy:woof; lamb:baa; goat:bleat|baa; clock:tick tock; bell:ding dong; hen:cluck""")
LEGS_OF = _table("""
    dog:four; cat:four; cow:four; horse:four; sheep:four; pig:four; lion:four; tiger:four; elephant:four; mouse:four;
    frog:four; goat:four; rabbit:four; bear:four; fox:four; wolf:four; camel:four; zebra:four; giraffe:four;
    turtle:four;
    bird:two; duck:two; hen:two; owl:two; goose:two; penguin:two; person:two; eagle:two; spider:eight; ant:six; bee:six;
    fly:six; beetle:six; butterfly:six; snake:zero|none; fish:zero|none; worm:zero|none; crab:ten; table:four;
    chair:four; whale:zero|none; snail:zero|none""")
USE_OF = _table("""
    knife:cutting; spoon:eating; fork:eating; cup:drinking; glass:drinking; pen:writing; pencil:writing|drawing;
    bed:sleeping; chair:sitting; key:opening doors; clock:telling the time; car:driving; book:reading;
    phone:calling people;
    broom:sweeping; soap:washing; oven:baking|cooking; scissors:cutting; umbrella:staying dry; hammer:hitting nails;
    towel:drying; lamp:giving light; brush:painting; toothbrush:brushing teeth; boat:sailing; ball:playing;
    shoe:walking;
    camera:taking pictures; bag:carrying things; ladder:climbing; needle:sewing; hat:keeping warm|covering your head;
    mirror:seeing yourself; bell:ringing; map:finding the way; money:buying things; candle:giving light;
    comb:combing hair; bike:riding; piano:playing music; pot:cooking; saw:cutting wood; plane:flying;
    bridge:crossing a river;
    coat:keeping warm; stove:cooking; radio:hearing music; ruler:measuring; shovel:digging; window:looking out""")
YOUNG_OF = _table("""
    dog:puppy; cat:kitten; cow:calf; horse:foal; sheep:lamb; pig:piglet; duck:duckling; bear:cub; lion:cub; hen:chick;
    frog:tadpole; goat:kid; deer:fawn; swan:cygnet; goose:gosling; kangaroo:joey; elephant:calf; person:baby; fox:cub;
    wolf:cub|pup; tiger:cub; bird:chick""")
HOME_OF = _table("""
    bird:nest; bee:hive; spider:web; fish:water|sea|river|lake; horse:stable; pig:sty; rabbit:hole|burrow;
    lion:den|savanna;
    king:castle|palace; person:house; cow:barn|stable; camel:desert; penguin:ice|south pole; monkey:jungle|trees|tree;
    frog:pond; whale:sea|ocean; shark:sea|ocean; snail:shell; owl:tree|forest; squirrel:tree; bear:forest|cave;
    fox:forest|den; mouse:hole; queen:castle|palace; ant:ground; wolf:forest; farmer:farm; crab:sea""")
KIND_OF = _table("""
    apple:fruit; banana:fruit; pear:fruit; grape:fruit; lemon:fruit; cherry:fruit; plum:fruit; peach:fruit;
    carrot:vegetable; potato:vegetable; onion:vegetable; cabbage:vegetable; pea:vegetable; rose:flower; tulip:flower;
    daisy:flower; lily:flower; oak:tree; pine:tree; birch:tree; maple:tree; dog:animal; cat:animal; horse:animal;
    cow:animal; lion:animal; elephant:animal; rabbit:animal; bear:animal; eagle:bird; owl:bird; robin:bird;
    penguin:bird;
    crow:bird; duck:bird; salmon:fish; shark:fish; trout:fish; ant:insect; bee:insect; fly:insect; beetle:insect;
    hammer:tool; saw:tool; drill:tool; guitar:instrument; piano:instrument; drum:instrument; violin:instrument;
    flute:instrument; car:vehicle; bus:vehicle; truck:vehicle; train:vehicle; bike:vehicle; chair:piece of furniture;
    table:piece of furniture; sofa:piece of furniture; bed:piece of furniture; bread:food; cheese:food; soup:food;
    rice:food; milk:drink; water:drink; tea:drink; juice:drink; football:game; tennis:game; chess:game; red:color;
    blue:color; green:color; monday:day; friday:day; april:month; may:month; seven:number; ten:number; circle:shape;
    square:shape; triangle:shape; snake:animal; tiger:animal; wolf:animal""")
PLURAL_OF = _table("""
    mouse:mice; child:children; man:men; woman:women; foot:feet; tooth:teeth; goose:geese; sheep:sheep; fish:fish;
    leaf:leaves; knife:knives; wolf:wolves; life:lives; box:boxes; baby:babies; city:cities; bus:buses; tomato:tomatoes;
    potato:potatoes; person:people|persons; wife:wives; half:halves; shelf:shelves; deer:deer; dog:dogs; cat:cats;
    house:houses; tree:trees; car:cars; book:books; cow:cows; horse:horses; apple:apples; hand:hands; star:stars;
    day:days; glass:glasses; fox:foxes; story:stories; lady:ladies; cherry:cherries; watch:watches; dish:dishes;
    fly:flies; country:countries; party:parties; boy:boys; girl:girls; flower:flowers; window:windows; key:keys""")
MIX_OF = _table("""
    red and blue:purple; red and yellow:orange; blue and yellow:green; black and white:grey; red and white:pink;
    blue and red:purple; yellow and red:orange; yellow and blue:green; white and black:grey; white and red:pink;
    red and green:brown; green and red:brown""")
HOW_MANY = _table("""
    days are in a week:seven; days does a week have:seven; months are in a year:twelve; months does a year have:twelve;
    hours are in a day:twenty four; hours does a day have:twenty four; minutes are in an hour:sixty;
    seconds are in a minute:sixty; minutes does an hour have:sixty; letters are in the alphabet:twenty six;
    fingers are on one hand:five; fingers do you have on two hands:ten; fingers does a person have:ten;
    toes does a person have:ten; eyes does a person have:two; ears does a person have:two; noses does a person have:one;
    wheels does a car have:four; wheels does a bike have:two; sides does a triangle have:three;
    sides does a square have:four; corners does a triangle have:three; corners does a square have:four;
    sides does a pentagon have:five; eggs are in a dozen:twelve; strings does a guitar have:six;
    seasons are in a year:four; arms does an octopus have:eight; wings does a bird have:two; tails does a dog have:one;
    heads does a horse have:one; hands does a person have:two; days are in a weekend:two;
    years are in a century:one hundred; cents are in a dollar:one hundred; points does a star have:five;
    wheels does a tricycle have:three""")
RHYMES = tuple(
    tuple(group.split())
    for group in listed(
        """
    cat hat bat rat mat; dog fog log frog; house mouse; tree bee sea key; car star jar; sun run fun; night light right;
    cake lake snake; ball wall tall; king ring sing; moon spoon soon; goat boat coat; book look cook; bear chair hair;
    rain train plane; cold gold old; bed red head; door floor more; day play say; sky fly high; nose rose; pen ten hen;
    sheep sleep deep; cow now how; fish dish wish; hand sand land; blue shoe two; fox box socks; clock rock sock;
    bell well tell""",
        ";",
    )
)
RHYME_OF = {one: tuple(other for other in group if other != one) for group in RHYMES for one in group}

TABLES: dict[str, dict[str, tuple[str, ...]]] = {
    "color of": COLOR_OF, "sound of": SOUND_OF, "legs of": LEGS_OF, "use of": USE_OF, "young of": YOUNG_OF,
    "home of": HOME_OF, "kind of": KIND_OF, "plural of": PLURAL_OF, "mix of": MIX_OF, "how many": HOW_MANY,
    "rhyme of": RHYME_OF,
}  # fmt: skip
PLURALS = {name: answers[0] for name, answers in PLURAL_OF.items()} | {
    "scissors": "scissors", "salmon": "salmon", "trout": "trout",
}  # fmt: skip
# Things that stand without an article: "what color is snow".
BARE = frozenset(listed("""
    grass snow coal blood milk wood coffee salt sugar paper corn spinach broccoli lavender chocolate night ice sand
    lettuce fire soap money bread cheese soup rice water tea juice football tennis chess red blue green monday friday
    april may seven ten scissors"""))  # fmt: skip
UNIQUE = frozenset(("sky", "sea", "sun"))


def plural(noun: str) -> str:
    """Of a noun of the tables."""
    head, _, last = noun.rpartition(" ")
    many = PLURALS.get(last)
    if many is None:
        if last[-1] == "y" and last[-2] not in "aeiou":
            many = f"{last[:-1]}ies"
        else:
            many = f"{last}es" if last.endswith(("s", "x", "ch", "sh")) else f"{last}s"
    return f"{head} {many}".strip()


def named(noun: str) -> str:
    """A noun as it is asked about: "a dog", "the sky", "snow"."""
    if noun in BARE:
        return noun
    if noun in UNIQUE:
        return f"the {noun}"
    return a(noun)


WORDS = (
    *(text for table in TABLES.values() for subject, answers in table.items() for text in (subject, *answers)),
    *(plural(noun) for table in (COLOR_OF, SOUND_OF, LEGS_OF, USE_OF, YOUNG_OF, HOME_OF, KIND_OF) for noun in table),
    "a", "an", "the",
)  # fmt: skip
