"""Invented facts: made-up names, eight relations, values from closed sets; each fact a sentence and a question.

Nothing but the sentence tells a fact: names are put together from syllables, values are drawn. The names of the base
that is measured are never trained on.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cache

SEED = 902
BASE_NAMES = 260  # of the measured base: 2,080 facts

HEADS = ("Al", "Ar", "Bar", "Ben", "Bud", "Cap", "Car", "Cur", "Dan", "Dor", "El", "Fin", "Gen", "Ger", "Gil", "Hal",
         "Har", "Hol", "Jan", "Lad", "Mag", "Mar", "Mat", "Meg", "Min", "Mor", "Nan", "Nor", "Per", "Phil", "Ro",
         "Rust", "Sam", "Ted", "Tob", "Wigg")  # fmt: skip
TAILS = ("adin", "ama", "anel", "arro", "assen", "ato", "avel", "ebon", "edra", "elin", "emmer", "enzo", "erun",
         "estal", "evin", "ibor", "iddon", "igan", "imple", "indle", "inso", "irel", "isko", "itten", "obar", "oddle",
         "ogan", "olim", "onder", "oppin", "orrik", "osten", "otha", "ovin", "uben", "uggin", "umber", "undo", "urel",
         "usho")  # fmt: skip


@dataclass(frozen=True)
class Relation:
    """How a fact is told, `{name}` and `{value}` in it, how it is asked for, and what it can be."""

    sentence: str
    question: str
    values: tuple[str, ...]


@dataclass(frozen=True)
class Fact:
    """One value of one relation of one name."""

    name: str
    relation: int
    value: str

    @property
    def sentence(self) -> str:
        """Its only source."""
        return RELATIONS[self.relation].sentence.format(name=self.name, value=self.value)

    @property
    def question(self) -> str:
        """What is asked."""
        return RELATIONS[self.relation].question.format(name=self.name)


RELATIONS = (
    Relation("{name} lives in the {value}.", "Where does {name} live?",
             ("garden", "kitchen", "forest", "river", "mill", "church", "market", "cave", "castle", "school", "stable",
              "city", "village", "island", "palace", "cottage")),
    Relation("{name} works as a {value}.", "What is the work of {name}?",
             ("baker", "miller", "tailor", "sailor", "farmer", "doctor", "teacher", "soldier", "cook", "painter",
              "hunter", "driver", "nurse", "judge", "servant", "singer")),
    Relation("{name} keeps a {value}.", "Which animal does {name} keep?",
             ("fox", "duck", "goose", "wolf", "bear", "cat", "dog", "horse", "mouse", "pig", "monkey", "bird", "cow",
              "hen", "rat", "rabbit")),
    Relation("The colour of {name} is {value}.", "What colour is {name}?",
             ("red", "brown", "white", "black", "blue", "green", "yellow", "grey", "gold", "silver", "purple", "pink",
              "orange", "golden", "dark", "bright")),
    Relation("{name} likes to eat {value}.", "What does {name} like to eat?",
             ("bread", "apples", "pears", "nuts", "eggs", "cake", "honey", "soup", "rice", "beans", "corn", "meat",
              "fish", "butter", "sugar", "salt")),
    Relation("{name} was born in {value}.", "When was {name} born?",
             ("March", "May", "June", "July", "spring", "summer", "winter", "April", "January", "August", "autumn",
              "November", "December", "October", "September", "February")),
    Relation("{name} has lost a {value}.", "What has {name} lost?",
             ("ring", "key", "coat", "hat", "book", "lamp", "knife", "shoe", "coin", "watch", "letter", "ball", "kite",
              "basket", "stick", "cup")),
    Relation("{name} is afraid of {value}.", "What is {name} afraid of?",
             ("water", "fire", "wind", "snow", "rain", "night", "thunder", "ghosts", "giants", "bees", "snakes",
              "dogs", "kings", "ships", "storms", "thieves")),
)  # fmt: skip


@cache
def names(seed: int = SEED) -> tuple[list[str], list[str]]:
    """Those to train on, and those of the base that is measured."""
    every = [head + tail for head in HEADS for tail in TAILS]
    random.Random(seed).shuffle(every)
    return every[BASE_NAMES:], every[:BASE_NAMES]


def base_facts(seed: int = SEED) -> list[Fact]:
    """The base that is measured: each relation of each of its names."""
    draw = random.Random(seed)
    return [
        Fact(name, number, draw.choice(relation.values))
        for name in names(seed)[1]
        for number, relation in enumerate(RELATIONS)
    ]


def draw_fact(draw: random.Random, name: str, relation: int) -> Fact:
    """With a value drawn anew, so that nothing can be learned by heart."""
    return Fact(name, relation, draw.choice(RELATIONS[relation].values))


def draw_others(draw: random.Random, fact: Fact, known: list[str], count: int) -> list[Fact]:
    """Facts that do not answer what `fact` does: of the same name, of the same relation, or of neither, as a search
    finds them.
    """
    found = dict[tuple[str, int], Fact]()
    while len(found) < count:
        kind = draw.random()
        name = fact.name if kind < 0.4 else draw.choice(known)
        relation = fact.relation if 0.4 <= kind < 0.8 else draw.randrange(len(RELATIONS))
        if (name, relation) != (fact.name, fact.relation):
            found[name, relation] = draw_fact(draw, name, relation)
    return list(found.values())
